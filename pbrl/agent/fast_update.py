"""The SAC update with its derivative written out: the same numbers as autograd's, without graph, copies or dispatch.

For perceptrons of linear layers, ReLU, LayerNorm and residual blocks; one or two critics; Adam or AdamW.

Haarnoja et al. (2018), as in Stable-Baselines3's `SAC.train`. `PreferenceSAC.autograd_update` is the readable form and
the one that runs for any other networks; `tests/test_update.py` holds the two equal.

With `torch.bfloat16` the products of the hidden layers are computed in it; weights, Adam, the last layers (the Q head
and the Gaussian's parameters) and everything between are float32. Compiled (torch.compile; the code is kept on disk
for the next run), what lies between the products is fused: without the explicit derivative compiling does not pay.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, Actor
from torch import Tensor, nn
from torch.nn.functional import linear

from pbrl.agent.networks import LOG_SQRT_2PI, SQUASH_EPSILON, ResidualBlock, SquashedStdActor, Standardised, lowest
from pbrl.agent.replay import Batch, RelabelReplay

masked = torch.ops.aten.threshold_backward  # gradient where the activation is positive, else 0


class Learner(Protocol):
    """What the update needs of an agent: `pbrl.agent.sac.PreferenceSAC`."""

    actor: Any
    critic: Any
    critic_target: Any
    gamma: float
    device: Any
    noise: torch.Generator
    replay_buffer: RelabelReplay
    log_ent_coef: Any
    ent_coef_tensor: Any

    def move_temperature(self, log_prob: Tensor) -> None: ...


class FusedAdam:
    """`optimizer.step()` on given gradients without its Python. All state stays the optimizer's own."""

    def __init__(self, optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
        self.optimizer, self.params = optimizer, params
        self._first: Any = None

    @torch.no_grad()
    def step(self, grads: list[Tensor]) -> None:
        """One step; `grads` in the order of `params`."""
        if not self._known():
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad
            self.optimizer.step()
            return
        group = self.optimizer.param_groups[0]
        self._count += 1  # the fused kernel does not count
        fused = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        fused(
            self.params,
            grads,
            self._means,
            self._squares,
            [],
            self._steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
        )

    def _known(self) -> bool:
        """Whether the kernel can be called on the optimizer's present state (it may have been loaded or cleared)."""
        state = self.optimizer.state
        first = state.get(self.params[0])
        if not first or not isinstance(self.optimizer, torch.optim.Adam):
            return False
        if first is not self._first:
            groups = self.optimizer.param_groups
            if len(groups) != 1 or groups[0]["amsgrad"] or not groups[0]["fused"]:
                return False
            every = [state[param] for param in self.params]
            self._means = [one["exp_avg"] for one in every]
            self._squares = [one["exp_avg_sq"] for one in every]
            self._count = torch.stack([one["step"] for one in every])
            self._steps = list(self._count.unbind())
            for one, step in zip(every, self._steps, strict=True):
                one["step"] = step  # the same numbers, side by side
            self._first = first
        return True


class Trace(NamedTuple):
    """What a forward pass leaves for its derivative, for each step; None where there is nothing to keep."""

    values: list[Tensor | None]  # of a product and of LayerNorm its input, of ReLU its output
    weights: list[Tensor | None]  # of a product its weight, as multiplied
    means: list[Tensor | None]  # of LayerNorm each row's mean
    rates: list[Tensor | None]  # and 1/deviation

    def rows(self, rows: Tensor | slice) -> Trace:
        """The trace of some rows."""
        values, means, rates = (
            [None if one is None else one[..., rows, :] for one in kind]
            for kind in (self.values, self.means, self.rates)
        )
        return Trace(values, self.weights, means, rates)


class Step(NamedTuple):
    """One step of networks of one shape: what is done, and by which modules (of each network, its heads)."""

    kind: str  # product, norm, relu; keep and add: the two ends of a residual connection
    modules: list[list[Any]]


def steps(modules: Iterable[nn.Module]) -> list[tuple[str, nn.Module]] | None:
    """The steps of layers that can be differentiated here, each with its module; None if there are others."""
    found: list[tuple[str, nn.Module]] = []
    for module in modules:
        if type(module) is nn.Linear and module.bias is not None:
            found.append(("product", module))
        elif type(module) is nn.LayerNorm and module.bias is not None and len(module.normalized_shape) == 1:
            found.append(("norm", module))
        elif type(module) is nn.ReLU:
            found.append(("relu", module))
        elif type(module) is ResidualBlock:
            inner = steps([module.norm, module.up, nn.ReLU(), module.down])
            found += [("keep", module), *(inner or []), ("add", module)]
        elif type(module) is not nn.Identity:
            return None
    return found


class Perceptrons:
    """Networks of one shape: hidden layers (see `steps`) and one linear last layer, of one or several heads.

    Several networks are multiplied at once; a leading axis [n, …] of values, gradients and traces then counts them.
    The parameters are the modules' own; nothing is kept between calls.

    Args:
        nets: for each network its hidden layers and its heads.
        dtype: of the hidden layers' products. Norms and sums are computed in the last layer's.
    """

    def __init__(self, nets: list[tuple[list[nn.Module], list[nn.Linear]]], dtype: torch.dtype) -> None:
        self.count, self.dtype = len(nets), dtype
        self.outputs = [head.out_features for head in nets[0][1]]
        self.wide = nets[0][1][0].weight.dtype
        hidden = [steps(layers) or [] for layers, _ in nets]
        self.steps = [Step(every[0][0], [[module] for _, module in every]) for every in zip(*hidden, strict=True)]
        self.steps.append(Step("product", [list(heads) for _, heads in nets]))
        self.params: list[Tensor] = [
            param
            for step in self.steps
            if step.kind in ("product", "norm")
            for heads in step.modules
            for head in heads
            for param in (head.weight, head.bias)
        ]

    def forward(self, inputs: Tensor) -> tuple[Tensor, Trace]:
        """The last layer's values, [(n,) B, heads], for inputs [B, ·], and what the derivative needs."""
        trace, kept = Trace([], [], [], []), []
        x = inputs.expand(self.count, *inputs.shape) if self.count > 1 else inputs
        for i, step in enumerate(self.steps):
            value, weight, mean, rate = None, None, None, None
            if step.kind == "product":
                x, value, weight = self._product(i, x)
            elif step.kind == "relu":
                x = value = x.relu_()
            elif step.kind == "norm":
                value = x.to(self.wide)
                x, mean, rate = self._norm(step, value)
            elif step.kind == "keep":
                x = x.to(self.wide)
                kept.append(x)
            else:
                x = kept.pop() + x.to(self.wide)
            trace.values.append(value)
            trace.weights.append(weight)
            trace.means.append(mean)
            trace.rates.append(rate)
        return x, trace

    def _product(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A linear layer: its output, its input and its weight as multiplied."""
        dtype = self.dtype if i < len(self.steps) - 1 else self.wide
        weight, bias = (self._joined(self.steps[i], name).to(dtype) for name in ("weight", "bias"))
        x = x.to(dtype)
        if weight.shape[-2] == 1 and torch.compiler.is_compiling():  # no product: fused with its neighbours
            return (x * weight).sum(-1, keepdim=True) + bias.unsqueeze(-2), x, weight
        if self.count > 1:
            return torch.baddbmm(bias.unsqueeze(1), x, weight.mT), x, weight
        return linear(x, weight, bias), x, weight

    def _norm(self, step: Step, x: Tensor) -> Sequence[Tensor]:
        """LayerNorm: its output, and the mean and 1/deviation of each row, [(n,) B, 1]."""
        every = zip(self._each(x), [heads[0] for heads in step.modules], strict=True)
        return self._side_by_side(
            torch.native_layer_norm(one, one.shape[-1:], norm.weight, norm.bias, norm.eps) for one, norm in every
        )

    def _through_norm(self, trace: Trace, i: int, grad: Tensor, params: bool) -> Sequence[Tensor]:
        """The loss's gradient before a LayerNorm, and by its weight and bias if `params`."""
        given = [self._each(kind[i]) for kind in (trace.values, trace.means, trace.rates)]
        every = zip(self._each(grad.to(self.wide)), *given, [heads[0] for heads in self.steps[i].modules], strict=True)
        mask = [True, params, params]
        return self._side_by_side(
            torch.ops.aten.native_layer_norm_backward(
                one.contiguous(), x, x.shape[-1:], mean, rate, norm.weight, norm.bias, mask
            )[: 3 if params else 1]
            for one, x, mean, rate, norm in every
        )

    def _each(self, values: Tensor | None) -> Sequence[Tensor]:
        """What belongs to each network."""
        assert values is not None
        return values.unbind() if self.count > 1 else [values]

    def _side_by_side(self, found: Iterable[Sequence[Tensor]]) -> Sequence[Tensor]:
        """Several values of each network, as several of all networks."""
        return [torch.stack(one) if self.count > 1 else one[0] for one in zip(*found, strict=True)]

    def _joined(self, step: Step, name: str) -> Tensor:
        """Weight [(n,) out, in] or bias [(n,) out] of a step: heads one below the other, networks side by side."""
        parts = [[getattr(head, name) for head in heads] for heads in step.modules]
        nets = [torch.cat(heads) if len(heads) > 1 else heads[0] for heads in parts]
        return torch.stack(nets) if len(nets) > 1 else nets[0]

    def backward(self, trace: Trace, grad: Tensor) -> list[Tensor]:
        """The parameters' gradients, in the order of `params`, given the loss's gradient [(n,) B, heads]."""
        grads: list[Tensor] = []
        kept: list[Tensor] = []
        last = len(self.steps) - 1
        for i in range(last, -1, -1):
            value, weight, kind = trace.values[i], trace.weights[i], self.steps[i].kind
            if kind == "product":
                assert value is not None and weight is not None
                grad = grad.to(weight.dtype)
                if grad.shape[-1] == 1 and torch.compiler.is_compiling():
                    by_weight = (grad * value).sum(-2, keepdim=True)
                else:
                    by_weight = (grad.mT @ value).to(self.wide)
                grads = self._apart(by_weight, grad.sum(-2, dtype=self.wide), heads=i == last) + grads
            if kind == "norm":
                grad, by_weight, by_bias = self._through_norm(trace, i, grad, params=True)
                grads = self._apart(by_weight, by_bias) + grads
            elif i:
                grad = self._through(trace, i, grad, kept)
        return grads

    def _apart(self, weight: Tensor, bias: Tensor, heads: bool = False) -> list[Tensor]:
        """The gradients of each module of a step, as `_joined` joins their parameters."""
        found: list[Tensor] = []
        pairs = zip(weight.unbind(), bias.unbind(), strict=True) if self.count > 1 else [(weight, bias)]
        for by_weight, by_bias in pairs:
            if heads and len(self.outputs) > 1:
                split = zip(by_weight.split(self.outputs), by_bias.split(self.outputs), strict=True)
                found += [one for head in split for one in head]
            else:
                found += [by_weight, by_bias]
        return found

    def _through(self, trace: Trace, i: int, grad: Tensor, kept: list[Tensor]) -> Tensor:
        """The loss's gradient before step i, given the one after it; `kept`: of the residual connections still open."""
        value, kind = trace.values[i], self.steps[i].kind
        if kind == "product":
            weight = trace.weights[i]
            assert weight is not None
            grad = grad.to(weight.dtype)
            return grad * weight if weight.shape[-2] == 1 else grad @ weight
        if kind == "relu":
            return masked(grad, value, 0)
        grad = grad.to(self.wide)
        if kind == "norm":
            return self._through_norm(trace, i, grad, params=False)[0]
        if kind == "add":
            kept.append(grad)
            return grad
        return grad + kept.pop()

    def input_gradient(self, trace: Trace, grad: Tensor, first: int) -> Tensor:
        """The gradient of the inputs from column `first` on: [(n,) B, ·] for the loss's gradient [(n,) B, 1]."""
        kept: list[Tensor] = []
        for i in range(len(self.steps) - 1, 0, -1):
            grad = self._through(trace, i, grad, kept)
        weight = trace.weights[0]
        assert weight is not None
        return (grad.to(weight.dtype) @ weight[..., first:]).to(self.wide)


class Sampled(NamedTuple):
    """Reparameterised actions of a squashed Gaussian and the factors of their derivative, [B, A] each."""

    actions: Tensor
    rest: Tensor  # 1 − actions²
    deviation: Tensor  # standard deviation times noise
    slope: Tensor  # of the log standard deviation by the last layer's value


class FastUpdate:
    """The update of one agent whose networks are `Perceptrons`.

    Args:
        agent: see `supports`.
        dtype: of the hidden layers' products: float32 or bfloat16.
    """

    def __init__(self, agent: Learner, dtype: torch.dtype) -> None:
        self.agent = agent
        actor: Any = agent.actor
        self.log_std_range = getattr(actor, "log_std_range", None)
        self.scale = getattr(actor.features_extractor, "scale", None)  # the critics' have the same numbers
        self.actor = Perceptrons([(_layers(actor.latent_pi), [actor.mu, actor.log_std])], dtype)
        # one product for both critics gives each thread one of them; with one thread, or in fp32, two are faster
        # (measured: experiments.benchmarks update)
        cuda = agent.device.type == "cuda"
        two = len(agent.critic.q_networks) == 2
        self.together = two and (cuda or (dtype != torch.float32 and torch.get_num_threads() > 1))
        self.critics, self.targets = (
            [Perceptrons(nets, dtype)] if self.together else [Perceptrons([net], dtype) for net in nets]
            for nets in (
                [(_layers(net)[:-1], _layers(net)[-1:]) for net in critic.q_networks]
                for critic in (agent.critic, agent.critic_target)
            )
        )
        critic_params = [param for nets in self.critics for param in nets.params]
        self.actor_adam = FusedAdam(actor.optimizer, self.actor.params)
        self.critic_adam = FusedAdam(agent.critic.optimizer, critic_params)
        # dQ/da of all rows, masked, instead of some: choosing would wait for a GPU, and bf16 products are compiled for
        # each number of rows anew (oneDNN: a millisecond each)
        self.whole = dtype != torch.float32 or cuda
        self.gamma, self.act_dim = agent.gamma, actor.mu.out_features
        self.critic_stage: Any = self._critic_stage
        self.actor_stage: Any = self._actor_stage

    def compile(self, batch_size: int) -> float:
        """Compile what lies between the optimisers' steps, for batches of this size; nothing learns meanwhile.

        The code is kept where PyTorch keeps it: in TORCHINDUCTOR_CACHE_DIR, by default a folder of /tmp.

        Returns:
            Seconds that it took: half a minute for new code, some seconds where the code lies on disk.

        Raises:
            RuntimeError: if it cannot be compiled here (no C++ compiler, say); the update then stays as it was.
        """
        from torch._inductor import config

        began, before = time.monotonic(), self.whole
        self.whole = True
        eager = self._critic_stage, self._actor_stage
        # not looking each time at what never changes (this object, kinds of parameters) saves a twentieth
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
        compiled: Any = torch.compile  # whose types do not know isolate_recompiles
        stages = [
            compiled(stage, fullgraph=True, dynamic=False, isolate_recompiles=True, options=options) for stage in eager
        ]
        with config.patch(compile_threads=1), warnings.catch_warnings():  # here, not in processes that would stay
            warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's, about itself
            try:
                self._warm(batch_size, *stages)
            except Exception as error:  # whatever a compiler raises
                self.whole = before
                reason = " ".join(str(error).split())[:200]
                raise RuntimeError(f"{type(error).__name__}: {reason}") from error
        self.critic_stage, self.actor_stage = stages
        return time.monotonic() - began

    @torch.no_grad()
    def _warm(self, size: int, critic_stage: Any, actor_stage: Any) -> None:
        """Run both stages on zeros, with the shapes and kinds of tensors that training will have."""
        replay = self.agent.replay_buffer
        batch = replay.batch(np.zeros((size, replay.rows.shape[1]), np.float32))
        alpha, log_prob, sampled, trace, _, loss = critic_stage(batch, self._noise(batch), self._log_alpha())
        actor_stage(batch.obs, alpha, log_prob, sampled, trace, loss)

    def _noise(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        shape = 2 * len(batch.rewards), self.act_dim
        if generator is None:
            return batch.obs.new_zeros(shape)
        return torch.randn(shape, generator=generator, device=batch.obs.device)

    def _log_alpha(self) -> Tensor:
        learned = self.agent.log_ent_coef
        return self.agent.ent_coef_tensor.log() if learned is None else learned

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Temperature, critics and actor, in this order: critic loss, actor loss, temperature, entropy, mean Q."""
        noise = self._noise(batch, self.agent.noise)
        alpha, log_prob, sampled, trace, critic_grads, critic_loss = self.critic_stage(batch, noise, self._log_alpha())
        self.agent.move_temperature(log_prob)
        self.critic_adam.step(critic_grads)
        actor_grads, metrics = self.actor_stage(batch.obs, alpha, log_prob, sampled, trace, critic_loss)
        self.actor_adam.step(actor_grads)
        return metrics

    def _critic_stage(
        self, batch: Batch, noise: Tensor, log_alpha: Tensor
    ) -> tuple[Tensor, Tensor, Sampled, Trace, list[Tensor], Tensor]:
        size = len(batch.rewards)
        alpha = log_alpha.exp().squeeze()
        obs, next_obs = self._seen(batch.obs), self._seen(batch.next_obs)
        raw, trace = self.actor.forward(torch.cat([obs, next_obs]))
        sampled, log_probs = self._sample(raw, noise)
        here = Sampled(*(one[:size] for one in sampled))
        next_q = lowest(self._values(self.targets, next_obs, sampled.actions[size:])[0].unbind())
        target = batch.rewards + batch.not_done * self.gamma * (next_q - alpha * log_probs[size:])
        values, traces = self._values(self.critics, obs, batch.actions)
        errors = values - target
        loss = errors.square().sum() / (2 * size)
        parts = zip(self.critics, traces, self._parts((errors / size).unsqueeze(2)), strict=True)
        grads = [grad for nets, trace, part in parts for grad in nets.backward(trace, part)]
        return alpha, log_probs[:size], here, trace.rows(slice(size)), grads, loss

    def _actor_stage(
        self, obs: Tensor, alpha: Tensor, log_prob: Tensor, sampled: Sampled, trace: Trace, critic_loss: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        values, traces = self._values(self.critics, self._seen(obs), sampled.actions)
        q = lowest(values.unbind())
        actor_loss = (alpha * log_prob - q).mean()
        action_gradient = self._action_gradient(values, traces, obs.shape[1])
        # of mean(alpha log π − Q) by the Gaussian's mean and the last layer's log std
        by_mean = (2 * alpha * sampled.actions / (sampled.rest + SQUASH_EPSILON) - action_gradient) * sampled.rest
        by_log_std = (by_mean * sampled.deviation - alpha) * sampled.slope
        grads = self.actor.backward(trace, torch.cat([by_mean, by_log_std], dim=1) / len(obs))
        return grads, torch.stack([critic_loss, actor_loss, alpha, -log_prob.mean(), q.mean()])

    def _seen(self, obs: Tensor) -> Tensor:
        """Observations as the networks see them."""
        return obs if self.scale is None else self.scale.forward(obs)

    def _sample(self, last: Tensor, noise: Tensor) -> tuple[Sampled, Tensor]:
        """Squashed actions [N, A] and their log-probabilities [N], from the last layer's values [N, 2A]."""
        mean, raw = last.chunk(2, dim=1)
        if self.log_std_range is None:
            slope = ((raw >= LOG_STD_MIN) & (raw <= LOG_STD_MAX)).to(raw.dtype)
            log_std = raw.clamp(LOG_STD_MIN, LOG_STD_MAX)
        else:
            low, high = self.log_std_range
            half, unit = (high - low) / 2, torch.tanh(raw)
            slope = (1 - unit.square()) * half
            log_std = low + half * (unit + 1)
        deviation = log_std.exp() * noise
        actions = torch.tanh(mean + deviation)
        rest = 1 - actions.square()
        density = (torch.log(rest + SQUASH_EPSILON) + log_std + 0.5 * noise.square()).sum(1)
        return Sampled(actions, rest, deviation, slope), -(density + mean.shape[1] * LOG_SQRT_2PI)

    def _parts(self, both: Tensor) -> Sequence[Tensor]:
        """What belongs to each of `self.critics`, of something of both critics [2, …]."""
        return [both] if self.together else both.unbind()

    def _values(self, critics: list[Perceptrons], obs: Tensor, actions: Tensor) -> tuple[Tensor, list[Trace]]:
        """The critics' values, one or two times [B], and the traces of `critics`."""
        inputs = torch.cat([obs, actions], dim=1)
        values, traces = zip(*(nets.forward(inputs) for nets in critics), strict=True)
        return (values[0] if self.together else torch.stack(values)).squeeze(2), list(traces)

    def _action_gradient(self, values: Tensor, traces: list[Trace], obs_dim: int) -> Tensor:
        """dQ/da [B, A] of the lower critic in each row (autograd halves it between exactly equal critics)."""
        second = values[-1] < values[0]
        chosen = torch.stack([~second, second])[: len(values)]
        gradient = values.new_zeros(len(second), self.act_dim)
        if self.whole:
            for nets, trace, part in zip(self.critics, traces, self._parts(chosen.unsqueeze(2)), strict=True):
                found = nets.input_gradient(trace, part.to(values.dtype), obs_dim)
                gradient = gradient + (found.sum(0) if self.together else found)
            return gradient
        for nets, trace, part in zip(self.critics, traces, chosen, strict=True):
            rows = part.nonzero().squeeze(1)
            found = nets.input_gradient(trace.rows(rows), values.new_ones(len(rows), 1), obs_dim)
            gradient.index_copy_(0, rows, found)
        return gradient


def supports(agent: Learner) -> bool:
    """Whether `FastUpdate` can differentiate actor and critics: own or SB3's actor, flat inputs, known `steps`."""
    actor, critic = agent.actor, agent.critic
    return (
        type(actor) in (Actor, SquashedStdActor)
        and not actor.use_sde
        and all(type(m.features_extractor) in (FlattenExtractor, Standardised) for m in (actor, critic))
        and _known(actor.latent_pi)
        and len(critic.q_networks) in (1, 2)
        and all(_known(net) and type(list(net.children())[-1]) is nn.Linear for net in critic.q_networks)
    )


def _layers(net: nn.Module) -> list[Any]:
    return list(net.children())


def _known(net: nn.Module) -> bool:
    """Whether it begins with a linear layer and all of it can be differentiated here."""
    found = steps(net.children())
    return found is not None and found[:1] != [] and found[0][0] == "product"
