"""The agent's networks: SB3's SAC policy with the options of the published code, and squashed Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import Tensor, nn

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
SQUASH_EPSILON = 1e-6  # SB3's, inside the logarithm of the tanh correction


class SquashedStdActor(Actor):
    """SB3's actor, its log standard deviation squashed by tanh into `log_std_range` instead of clamped."""

    log_std_range: tuple[float, float] | None = None

    def get_action_dist_params(self, obs: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if self.log_std_range is None:
            return super().get_action_dist_params(obs)
        latent = self.latent_pi(self.extract_features(obs, self.features_extractor))
        low, high = self.log_std_range
        return self.mu(latent), low + 0.5 * (high - low) * (torch.tanh(self.log_std(latent)) + 1), {}  # type: ignore[operator]


class PreferencePolicy(SACPolicy):
    """SB3's SAC policy with the two options of the published code: `log_std_range` and `orthogonal_init`."""

    def __init__(
        self, *args: Any, log_std_range: Sequence[float] | None = None, orthogonal_init: bool = False, **kwargs: Any
    ) -> None:
        self.log_std_range = None if log_std_range is None else (float(log_std_range[0]), float(log_std_range[1]))
        self.orthogonal_init = orthogonal_init
        super().__init__(*args, **kwargs)
        if orthogonal_init:
            for module in (self.actor, self.critic):
                initialise(module, orthogonal=True)
            self.critic_target.load_state_dict(self.critic.state_dict())

    def make_actor(self, features_extractor: Any = None) -> Actor:
        kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        actor = SquashedStdActor(**kwargs).to(self.device)
        actor.log_std_range = self.log_std_range
        return actor

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"log_std_range": self.log_std_range, "orthogonal_init": self.orthogonal_init}
        return super()._get_constructor_parameters() | own


def initialise(module: nn.Module, orthogonal: bool) -> None:
    """Draw new weights for every linear layer of `module`, from torch's global generator (fork it around the call)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if orthogonal:
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)
            else:
                layer.reset_parameters()


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """tanh of a reparameterised Gaussian sample and its log-probability, with SB3's correction: [..., A], [...]."""
    actions = torch.tanh(mean + log_std.exp() * noise)
    log_prob = (-0.5 * noise.square() - log_std - LOG_SQRT_2PI).sum(-1)
    return actions, log_prob - torch.log(1 - actions.square() + SQUASH_EPSILON).sum(-1)
