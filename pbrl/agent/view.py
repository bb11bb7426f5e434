"""The agent as reward updaters see it: pure functions of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from stable_baselines3.sac.policies import Actor
from torch import Tensor, nn
from torch.func import functional_call

from pbrl.agent.networks import LOG_SQRT_2PI, lowest, squash
from pbrl.types import Params

if TYPE_CHECKING:
    from pbrl.agent.sac import PreferenceSAC


class _Distribution(nn.Module):
    def __init__(self, actor: Actor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std, _ = self.actor.get_action_dist_params(obs)
        return mean, log_std


class _Critics(nn.Module):
    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return torch.cat(self.critic(obs, actions), dim=1).T


def _copies(module: nn.Module) -> Params:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def _prefixed(prefix: str, params: Params) -> Params:
    return {f"{prefix}.{name}": value for name, value in params.items()}


class AgentView:
    """The agent as reward updaters see it: a `pbrl.types.PolicyView` of pure functions."""

    def __init__(self, agent: PreferenceSAC) -> None:
        self._agent = agent
        self._distribution = _Distribution(agent.actor)
        self._critics = _Critics(agent.critic)

    @property
    def gamma(self) -> float:
        return self._agent.gamma

    @property
    def alpha(self) -> float:
        log_alpha = self._agent.log_ent_coef
        return float(self._agent.ent_coef_tensor if log_alpha is None else log_alpha.detach().exp())

    def parameters(self) -> Params:
        return _copies(self._agent.actor)

    def distribution(self, theta: Params, obs: Tensor) -> tuple[Tensor, Tensor]:
        rows = obs.reshape(-1, obs.shape[-1])  # SB3 flattens all but the first axis
        mean, log_std = functional_call(self._distribution, _prefixed("actor", theta), (rows,))
        shape = (*obs.shape[:-1], mean.shape[-1])  # written out, as there may be no rows
        return mean.reshape(shape), log_std.reshape(shape)

    def log_prob(self, theta: Params, obs: Tensor, raw_actions: Tensor) -> Tensor:
        mean, log_std = self.distribution(theta, obs)
        return (-0.5 * ((raw_actions - mean) / log_std.exp()).square() - log_std - LOG_SQRT_2PI).sum(-1)

    def critic_parameters(self) -> Params:
        return _copies(self._agent.critic)

    def q_values(self, critic: Params, obs: Tensor, actions: Tensor) -> Tensor:
        return functional_call(self._critics, _prefixed("critic", critic), (obs, actions))

    @torch.no_grad()
    def critic_features(self, obs: Tensor, actions: Tensor) -> Tensor:
        heads = [[m for m in q.modules() if isinstance(m, nn.Linear)][-1] for q in self._agent.critic.q_networks]
        found: list[Tensor] = []
        hooks = [head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])) for head in heads]
        try:
            self._agent.critic(obs, actions)
        finally:
            for hook in hooks:
                hook.remove()
        features = torch.stack(found)
        return torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)

    @torch.no_grad()
    def next_value(self, next_obs: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = self._distribution(next_obs)
        actions, log_prob = squash(mean, log_std, noise)
        return lowest(self._agent.critic_target(next_obs, actions)).squeeze(1) - self.alpha * log_prob

    def objective(self, theta: Params, obs: Tensor, noise: Tensor) -> Tensor:
        """SAC's actor objective, maximised: mean over obs of min Q(s, a) − alpha log π_theta(a | s); float32 []."""
        mean, log_std = self.distribution(theta, obs)
        actions, log_prob = squash(mean, log_std, noise)
        return (lowest(self._agent.critic(obs, actions)).squeeze(1) - self.alpha * log_prob).mean()
