"""The SAC update with its derivative written out: the same numbers as autograd's, without graph, copies or dispatch.

Haarnoja et al. (2018), as in Stable-Baselines3's `SAC.train`. `PreferenceSAC.autograd_update` is the readable form and
the one that runs for networks other than plain ReLU perceptrons; `tests/test_update.py` holds the two equal.

With `torch.bfloat16` the products of the hidden layers are computed in it; weights, Adam, the last layers (the Q head
and the Gaussian's parameters) and everything between are float32. Compiled (torch.compile; the code is kept on disk
for the next run), what lies between the products is fused: without the explicit derivative compiling does not pay.
"""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, Actor
from torch import Tensor, nn
from torch.nn.functional import linear

from pbrl.policy import LOG_SQRT_2PI, SQUASH_EPSILON, SquashedStdActor

if TYPE_CHECKING:
    from pbrl.agent import PreferenceSAC
    from pbrl.replay import Batch

masked = torch.ops.aten.threshold_backward  # gradient where the activation is positive, else 0


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
        torch._foreach_add_(self._steps, 1)  # the fused kernel does not count
        torch._fused_adam_(
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
            self._steps = [one["step"] for one in every]
            self._first = first
        return True


class Trace(NamedTuple):
    """What a forward pass leaves for its derivative: inputs and weight of each layer, as multiplied."""

    inputs: list[Tensor]
    weights: list[Tensor]

    def rows(self, rows: Tensor | slice) -> Trace:
        """The trace of some rows."""
        return Trace([one[rows] for one in self.inputs], self.weights)


class Perceptron:
    """Hidden linear layers with ReLU and one linear last layer (of one or several heads), over inputs [B, ·].

    The parameters are the modules' own; nothing is kept between calls.
    """

    def __init__(self, hidden: list[nn.Linear], heads: list[nn.Linear], dtype: torch.dtype) -> None:
        self.params: list[Tensor] = [param for layer in (*hidden, *heads) for param in (layer.weight, layer.bias)]
        self.hidden: list[tuple[Tensor, Tensor]] = [(layer.weight, layer.bias) for layer in hidden]
        self.heads: list[tuple[Tensor, Tensor]] = [(head.weight, head.bias) for head in heads]
        self.outputs = [head.out_features for head in heads]
        self.dtype = dtype

    def forward(self, inputs: Tensor) -> tuple[Tensor, Trace]:
        """The last layer's values, [B, heads], and what the derivative needs."""
        trace = Trace([], [])
        for weight, bias in self.hidden:
            inputs, weight, bias = inputs.to(self.dtype), weight.to(self.dtype), bias.to(self.dtype)
            trace.inputs.append(inputs)
            trace.weights.append(weight)
            inputs = linear(inputs, weight, bias).relu_()
        weight, bias = self.heads[0]
        if len(self.heads) > 1:
            weight, bias = (torch.cat(both) for both in zip(*self.heads, strict=True))
        inputs = inputs.to(weight.dtype)
        trace.inputs.append(inputs)
        trace.weights.append(weight)
        return linear(inputs, weight, bias), trace

    def backward(self, trace: Trace, grad: Tensor) -> list[Tensor]:
        """The parameters' gradients, in the order of `params`, given the loss's gradient [B, heads]."""
        grads: list[Tensor] = []
        for i in range(len(trace.weights) - 1, -1, -1):
            dtype = self.heads[0][0].dtype
            both = (grad.t() @ trace.inputs[i]).to(dtype), grad.sum(0, dtype=dtype)
            if not grads and len(self.heads) > 1:
                both_split = [one.split(self.outputs) for one in both]
                grads = [one for pair in zip(*both_split, strict=True) for one in pair]
            else:
                grads = [*both, *grads]
            if i:
                grad = self._through(trace, i, grad)
        return grads

    def _through(self, trace: Trace, i: int, grad: Tensor) -> Tensor:
        """The loss's gradient before the ReLU that gave layer i its inputs, given the one after layer i."""
        weight = trace.weights[i]
        grad = grad * weight if len(weight) == 1 else grad @ weight
        return masked(grad, trace.inputs[i], 0).to(self.dtype)

    def input_gradient(self, trace: Trace, grad: Tensor, first: int) -> Tensor:
        """The gradient of the inputs from column `first` on: [n, ·] for the loss's gradient [n, 1]."""
        for i in range(len(trace.weights) - 1, 0, -1):
            grad = self._through(trace, i, grad)
        return (grad @ trace.weights[0][:, first:]).to(trace.weights[-1].dtype)


class Sampled(NamedTuple):
    """Reparameterised actions of a squashed Gaussian and the factors of their derivative, [B, A] each."""

    actions: Tensor
    rest: Tensor  # 1 − actions²
    deviation: Tensor  # standard deviation times noise
    slope: Tensor  # of the log standard deviation by the last layer's value


class FastUpdate:
    """The update of one agent whose networks are plain ReLU perceptrons.

    Args:
        agent: see `supports`.
        dtype: of the hidden layers' products: float32 or bfloat16.
    """

    def __init__(self, agent: PreferenceSAC, dtype: torch.dtype) -> None:
        self.agent = agent
        actor: Any = agent.actor
        self.log_std_range = getattr(actor, "log_std_range", None)
        self.actor = Perceptron(_linear(actor.latent_pi), [actor.mu, actor.log_std], dtype)
        self.critics, self.targets = (
            [Perceptron(_linear(net)[:-1], _linear(net)[-1:], dtype) for net in critic.q_networks]
            for critic in (agent.critic, agent.critic_target)
        )
        critic_params = [param for net in self.critics for param in net.params]
        self.actor_adam = FusedAdam(actor.optimizer, self.actor.params)
        self.critic_adam = FusedAdam(agent.critic.optimizer, critic_params)
        # dQ/da of all rows, masked, instead of some: choosing would wait for a GPU, and bf16 products are compiled for
        # each number of rows anew (oneDNN: a millisecond each)
        self.whole = dtype != torch.float32 or critic_params[0].is_cuda
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
        stages = [torch.compile(stage, fullgraph=True, dynamic=False) for stage in eager]
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
        raw, trace = self.actor.forward(torch.cat([batch.obs, batch.next_obs]))
        sampled, log_probs = self._sample(raw, noise)
        here = Sampled(*(one[:size] for one in sampled))
        next_q = torch.minimum(*self._values(self.targets, batch.next_obs, sampled.actions[size:])[0])
        target = batch.rewards + batch.not_done * self.gamma * (next_q - alpha * log_probs[size:])
        values, traces = self._values(self.critics, batch.obs, batch.actions)
        errors = [value - target for value in values]
        loss = torch.stack(errors).square().sum() / (2 * size)
        grads = [
            grad
            for net, kept, error in zip(self.critics, traces, errors, strict=True)
            for grad in net.backward(kept, (error / size).unsqueeze(1))
        ]
        return alpha, log_probs[:size], here, trace.rows(slice(size)), grads, loss

    def _actor_stage(
        self, obs: Tensor, alpha: Tensor, log_prob: Tensor, sampled: Sampled, trace: Trace, critic_loss: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        values, traces = self._values(self.critics, obs, sampled.actions)
        q = torch.minimum(*values)
        actor_loss = (alpha * log_prob - q).mean()
        action_gradient = self._action_gradient(values, traces, obs.shape[1])
        # of mean(alpha log π − Q) by the Gaussian's mean and the last layer's log std
        by_mean = (2 * alpha * sampled.actions / (sampled.rest + SQUASH_EPSILON) - action_gradient) * sampled.rest
        by_log_std = (by_mean * sampled.deviation - alpha) * sampled.slope
        grads = self.actor.backward(trace, torch.cat([by_mean, by_log_std], dim=1) / len(obs))
        return grads, torch.stack([critic_loss, actor_loss, alpha, -log_prob.mean(), q.mean()])

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

    @staticmethod
    def _values(critics: list[Perceptron], obs: Tensor, actions: Tensor) -> tuple[list[Tensor], list[Trace]]:
        """Each critic's values [B] and traces."""
        inputs = torch.cat([obs, actions], dim=1)
        both = [critic.forward(inputs) for critic in critics]
        return [value.squeeze(1) for value, _ in both], [trace for _, trace in both]

    def _action_gradient(self, values: list[Tensor], traces: list[Trace], obs_dim: int) -> Tensor:
        """dQ/da [B, A] of the lower critic in each row (autograd halves it between exactly equal critics)."""
        second = values[1] < values[0]
        gradient = values[0].new_zeros(len(second), self.act_dim)
        for net, trace, chosen in zip(self.critics, traces, (~second, second), strict=True):
            if self.whole:
                gradient = gradient + net.input_gradient(trace, chosen.to(gradient.dtype).unsqueeze(1), obs_dim)
            else:
                rows = chosen.nonzero().squeeze(1)
                some = net.input_gradient(trace.rows(rows), gradient.new_ones(len(rows), 1), obs_dim)
                gradient.index_copy_(0, rows, some)
        return gradient


def supports(agent: PreferenceSAC) -> bool:
    """Whether actor and critics are what `FastUpdate` differentiates: own or SB3's actor, flat observations, ReLU."""
    actor, critic = agent.actor, agent.critic
    return (
        type(actor) in (Actor, SquashedStdActor)
        and not actor.use_sde
        and all(isinstance(m.features_extractor, FlattenExtractor) for m in (actor, critic))
        and _plain(actor.latent_pi, last=nn.ReLU)
        and len(critic.q_networks) == 2
        and all(_plain(net, last=nn.Linear) for net in critic.q_networks)
    )


def _plain(net: nn.Module, last: type[nn.Module]) -> bool:
    """Linear layers with biases and ReLUs in turn."""
    layers = list(net.children())
    kinds = [nn.Linear if i % 2 == 0 else nn.ReLU for i in range(len(layers))]
    return (
        len(layers) > 1
        and [type(layer) for layer in layers] == kinds
        and kinds[-1] is last
        and all(layer.bias is not None for layer in _linear(net))
    )


def _linear(net: nn.Module) -> list[nn.Linear]:
    return [layer for layer in net.children() if isinstance(layer, nn.Linear)]
