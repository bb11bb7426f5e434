"""The agent's networks: SB3's SAC policy with the options of the published code, and squashed Gaussians."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import FlattenExtractor, create_mlp
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import Tensor, nn

from pbrl.standardise import Standardise

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
SQUASH_EPSILON = 1e-6  # SB3's, inside the logarithm of the tanh correction


class Standardised(FlattenExtractor):
    """SB3's extractor of flat observations, standardised: so `predict`, `save` and `load` know about it."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space)
        self.scale = Standardise(self.features_dim, on=True)

    def forward(self, observations: Tensor) -> Tensor:
        return self.scale(super().forward(observations))


class ResidualBlock(nn.Module):
    """x + W₂ relu(W₁ n(x)), four times as wide inside; n is LayerNorm or nothing (SimBa, Lee et al., ICLR 2025)."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def hidden_layers(size: int, net_arch: Sequence[int], norm: bool, blocks: int) -> list[nn.Module]:
    """The hidden layers of an actor or critic with inputs of this size.

    Without blocks: linear, LayerNorm if `norm`, ReLU, for each width. With: a linear layer, that many residual blocks,
    LayerNorm if `norm`, all of the last width.
    """
    if not blocks:
        return create_mlp(size, -1, list(net_arch), post_linear_modules=[nn.LayerNorm] if norm else None)
    width = net_arch[-1]
    last = [nn.LayerNorm(width)] if norm else []
    return [nn.Linear(size, width), *(ResidualBlock(width, norm) for _ in range(blocks)), *last]


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
    """SB3's SAC policy with options.

    Args:
        log_std_range, orthogonal_init: as in the published code (B-Pref).
        actor_layer_norm, critic_layer_norm, blocks: see `hidden_layers`.
    """

    def __init__(
        self,
        *args: Any,
        log_std_range: Sequence[float] | None = None,
        orthogonal_init: bool = False,
        actor_layer_norm: bool = False,
        critic_layer_norm: bool = False,
        blocks: int = 0,
        **kwargs: Any,
    ) -> None:
        self.norms, self.blocks = (actor_layer_norm, critic_layer_norm), blocks
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
        if self.blocks or self.norms[0]:
            layers = hidden_layers(actor.features_dim, actor.net_arch, self.norms[0], self.blocks)
            actor.latent_pi = nn.Sequential(*layers).to(self.device)
        return actor

    def make_critic(self, features_extractor: Any = None) -> ContinuousCritic:
        critic = super().make_critic(features_extractor)
        if self.blocks or self.norms[1]:
            net_arch: Any = self.critic_kwargs["net_arch"]
            size = critic.features_extractor.features_dim + int(self.action_space.shape[0])  # type: ignore[index]
            for i in range(critic.n_critics):
                layers = hidden_layers(size, net_arch, self.norms[1], self.blocks)
                net = nn.Sequential(*layers, nn.Linear(net_arch[-1], 1)).to(self.device)
                critic.q_networks[i] = net
                setattr(critic, f"qf{i}", net)
        return critic

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {
            "log_std_range": self.log_std_range,
            "orthogonal_init": self.orthogonal_init,
            "actor_layer_norm": self.norms[0],
            "critic_layer_norm": self.norms[1],
            "blocks": self.blocks,
        }
        return super()._get_constructor_parameters() | own


def initialise(module: nn.Module, orthogonal: bool) -> None:
    """Draw new weights for every linear layer of `module`, from torch's global generator (fork it around the call)."""
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
        if isinstance(layer, nn.Linear):
            if orthogonal:
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)
            else:
                layer.reset_parameters()


def lowest(values: Iterable[Tensor]) -> Tensor:
    """The critics' lower value: float32 of their shape."""
    return functools.reduce(torch.minimum, values)


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """tanh of a reparameterised Gaussian sample and its log-probability, with SB3's correction: [..., A], [...]."""
    actions = torch.tanh(mean + log_std.exp() * noise)
    log_prob = (-0.5 * noise.square() - log_std - LOG_SQRT_2PI).sum(-1)
    return actions, log_prob - torch.log(1 - actions.square() + SQUASH_EPSILON).sum(-1)
