"""The SAC update with its derivative written out: the same numbers as autograd's, without graph, copies or dispatch.

Haarnoja et al. (2018), as in Stable-Baselines3's `SAC.train`. `PreferenceSAC.update` is the readable form and the
one that runs for networks other than plain ReLU perceptrons; `tests/test_update.py` holds the two equal.

With `torch.bfloat16` the products of the hidden layers are computed in it; weights, Adam, the last layers (the Q head
and the Gaussian's parameters) and everything between are float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, Actor
from torch import Tensor, nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from pbrl.agent import PreferenceSAC
    from pbrl.replay import Batch

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
SQUASH_EPSILON = 1e-6  # SB3's, inside the logarithm of the tanh correction
masked = torch.ops.aten.threshold_backward.grad_input  # gradient where the activation is positive, else 0


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


class Perceptron:
    """Hidden linear layers with ReLU and one linear last layer (of one or several heads), over inputs [B, ·].

    `forward` keeps what `backward` needs; parameters are the modules' own, gradients are written into `grads`.
    """

    def __init__(self, hidden: list[nn.Linear], heads: list[nn.Linear], dtype: torch.dtype) -> None:
        self.params: list[Tensor] = [param for layer in (*hidden, *heads) for param in (layer.weight, layer.bias)]
        self.hidden = list(zip(self.params[: 2 * len(hidden) : 2], self.params[1 : 2 * len(hidden) : 2], strict=True))
        self.heads = [(head.weight, head.bias) for head in heads]
        self.dtype, self.cast = dtype, dtype != heads[0].weight.dtype
        self.inputs: list[Tensor] = []  # of each layer, in the last `forward`
        self.weights: list[Tensor] = []  # of each layer, as multiplied
        outputs = [head.out_features for head in heads]
        shapes = [weight.shape for weight, _ in self.hidden] + [torch.Size((sum(outputs), heads[0].in_features))]
        like = heads[0].weight.detach()
        self._weight_grads = [like.new_empty(shape) for shape in shapes]
        self._bias_grads = [like.new_empty(shape[0]) for shape in shapes]
        split = [grads[:-1] + list(grads[-1].split(outputs)) for grads in (self._weight_grads, self._bias_grads)]
        self.grads = [grad for pair in zip(*split, strict=True) for grad in pair]  # in the order of `params`

    def forward(self, inputs: Tensor, keep: bool = True) -> Tensor:
        """The last layer's values: [B, heads]. keep: for a derivative afterwards."""
        self.inputs, self.weights = [], []
        for weight, bias in self.hidden:
            if self.cast:
                inputs, weight, bias = inputs.to(self.dtype), weight.to(self.dtype), bias.to(self.dtype)
            if keep:
                self.inputs.append(inputs)
                self.weights.append(weight)
            inputs = linear(inputs, weight, bias).relu_()
        weight, bias = self.heads[0]
        if len(self.heads) > 1:
            weight, bias = (torch.cat(both) for both in zip(*self.heads, strict=True))
        if self.cast:
            inputs = inputs.to(weight.dtype)
        if keep:
            self.inputs.append(inputs)
            self.weights.append(weight)
        return linear(inputs, weight, bias)

    def backward(self, grad: Tensor) -> None:
        """Write the parameters' gradients, given the loss's gradient [n, heads] of the first n rows."""
        rows = len(grad)
        for i in range(len(self.weights) - 1, -1, -1):
            inputs = self.inputs[i] if len(self.inputs[i]) == rows else self.inputs[i][:rows]
            if grad.dtype == self._weight_grads[i].dtype:
                torch.mm(grad.t(), inputs, out=self._weight_grads[i])
            else:
                self._weight_grads[i].copy_(grad.t() @ inputs)
            torch.sum(grad, 0, dtype=self._bias_grads[i].dtype, out=self._bias_grads[i])
            if i:
                grad = self._through(i, grad, inputs)

    def _through(self, i: int, grad: Tensor, inputs: Tensor) -> Tensor:
        """The loss's gradient before the ReLU that gave layer i its inputs, given the one after layer i."""
        weight = self.weights[i]
        grad = grad * weight if len(weight) == 1 else grad @ weight
        masked(grad, inputs, 0, grad_input=grad)
        return grad.to(self.dtype) if self.cast else grad

    def input_gradient(self, grad: Tensor, rows: Tensor | slice, first: int) -> Tensor:
        """The gradient of the inputs from column `first` on, in some rows: [n, ·] for the loss's gradient [n, 1]."""
        for i in range(len(self.weights) - 1, 0, -1):
            grad = self._through(i, grad, self.inputs[i][rows])
        return (grad @ self.weights[0][:, first:]).to(self.weights[-1].dtype)


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
        self.critic_grads = [grad for net in self.critics for grad in net.grads]
        self.actor_adam = FusedAdam(actor.optimizer, self.actor.params)
        self.critic_adam = FusedAdam(agent.critic.optimizer, critic_params)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Temperature, critics and actor, in this order: critic loss, actor loss, temperature, entropy, mean Q."""
        agent, size = self.agent, len(batch.rewards)
        both, log_probs = self._sample(torch.cat([batch.obs, batch.next_obs]))
        log_prob, next_log_prob = log_probs[:size], log_probs[size:]
        alpha = agent._update_temperature(log_prob)

        next_q = _values(self.targets, torch.cat([batch.next_obs, both[size:]], dim=1), keep=False).amin(dim=1)
        target = torch.addcmul(batch.rewards, batch.not_done, next_q - alpha * next_log_prob, value=agent.gamma)
        errors = _values(self.critics, torch.cat([batch.obs, batch.actions], dim=1)) - target.unsqueeze(1)
        critic_loss = errors.square().sum() / (2 * size)
        errors /= size
        for net, grad in zip(self.critics, errors.split(1, dim=1), strict=True):
            net.backward(grad)
        self.critic_adam.step(self.critic_grads)

        q, lower = _values(self.critics, torch.cat([batch.obs, both[:size]], dim=1)).min(dim=1)
        actor_loss = (alpha * log_prob - q).mean()
        self.actor.backward(self._policy_gradient(alpha, self._action_gradient(lower, batch.obs.shape[1])))
        self.actor_adam.step(self.actor.grads)
        return torch.stack([critic_loss, actor_loss, alpha.squeeze(), -log_prob.mean(), q.mean()])

    def _sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Squashed actions [N, A] and their log-probabilities [N]; keeps what `_policy_gradient` needs."""
        mean, raw = self.actor.forward(obs).chunk(2, dim=1)
        if self.log_std_range is None:
            self._slope = ((raw >= LOG_STD_MIN) & (raw <= LOG_STD_MAX)).to(raw.dtype)
            log_std = raw.clamp(LOG_STD_MIN, LOG_STD_MAX)
        else:
            low, high = self.log_std_range
            half, unit = (high - low) / 2, torch.tanh(raw)
            self._slope = (1 - unit.square()).mul_(half)
            log_std = unit.add_(1).mul_(half).add_(low)
        noise = torch.randn(mean.shape, generator=self.agent.noise, device=mean.device, dtype=mean.dtype)
        self._deviation = log_std.exp() * noise
        self._actions = torch.tanh(mean + self._deviation)
        self._rest = 1 - self._actions.square()
        density = torch.log(self._rest + SQUASH_EPSILON).add_(log_std).addcmul_(noise, noise, value=0.5)
        return self._actions, -(density.sum(1) + mean.shape[1] * LOG_SQRT_2PI)

    def _action_gradient(self, lower: Tensor, obs_dim: int) -> Tensor:
        """dQ/da [B, A] of the lower critic in each row (autograd halves it between exactly equal critics)."""
        gradient = self._actions.new_zeros(len(lower), self._actions.shape[1])
        for i, net in enumerate(self.critics):
            chosen = lower == i
            if gradient.is_cuda:  # all rows: choosing some would wait for the device
                gradient += net.input_gradient(chosen.to(gradient.dtype).unsqueeze(1), slice(None), obs_dim)
            else:
                rows = chosen.nonzero().squeeze(1)
                gradient.index_copy_(0, rows, net.input_gradient(gradient.new_ones(len(rows), 1), rows, obs_dim))
        return gradient

    def _policy_gradient(self, alpha: Tensor, action_gradient: Tensor) -> Tensor:
        """Gradient [B, 2A] of mean(alpha log π − Q) by the Gaussian's mean and the last layer's log std."""
        size = len(action_gradient)
        actions, rest = self._actions[:size], self._rest[:size]
        by_mean = (2 * alpha * actions / (rest + SQUASH_EPSILON) - action_gradient).mul_(rest)
        by_log_std = (by_mean * self._deviation[:size] - alpha).mul_(self._slope[:size])
        return torch.cat([by_mean, by_log_std], dim=1).div_(size)


def supports(agent: PreferenceSAC) -> bool:
    """Whether actor and critics are what `FastUpdate` differentiates: own or SB3's actor, flat observations, ReLU."""
    from pbrl.agent import SquashedStdActor  # the agent imports this module

    actor, critic = agent.actor, agent.critic
    return (
        type(actor) in (Actor, SquashedStdActor)
        and not actor.use_sde
        and all(isinstance(m.features_extractor, FlattenExtractor) for m in (actor, critic))
        and _plain(actor.latent_pi, last=nn.ReLU)
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


def _values(critics: list[Perceptron], inputs: Tensor, keep: bool = True) -> Tensor:
    return torch.cat([critic.forward(inputs, keep) for critic in critics], dim=1)
