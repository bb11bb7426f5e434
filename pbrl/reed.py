"""REED (Metcalf et al., CoRL 2023): a learned reward whose state-action encoder knows the environment's dynamics.

    z = e(s, a)   embedding of state and action, shared by the ensemble's members, which are small heads on top of it
    L = −mean cos(h(z), stop-gradient(f(s')))   distillation: z must tell the embedding f of the next state
    L = mean_i CE(cos(h(z_i), stop-gradient(f(s'_j))) / temperature over j, i)   contrastive: tell it from others

The encoder is trained on L over the replay before each update of the reward; no answer is needed for that. Then encoder
and heads are trained together on the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbrl.checks import check
from pbrl.optimizers import restore_optimizer
from pbrl.reward import ACTIVATIONS, RewardEnsemble
from pbrl.standardise import Standardise
from pbrl.types import Session


class DynamicsAwareReward(RewardEnsemble):
    """A `RewardEnsemble` whose members share an encoder trained to predict the next state's embedding.

    Departures from the published setting, for the sake of time on a CPU: one encoder for all members instead of a copy
    in each; Adam on batches of 256 instead of plain gradient descent on 12; at most `max_updates` steps a session.

    Args:
        obs_dim, act_dim, members, hidden, activation, output, learning_rate, seed, normalise and those of the pay: as
            in `RewardEnsemble`; `hidden` are the widths of the heads, and the encoder's inputs are standardised.
        state_embedding, action_embedding: sizes of f(s) and of the action's embedding.
        embedding: size of z.
        epochs: passes over the replay before each reward update, counted in drawn transitions.
        max_updates: gradient steps before each reward update at the most; null: no limit.
        dynamics_batch_size, dynamics_learning_rate: of those steps.
        contrastive_temperature: of the contrastive loss; null: distillation.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        members: int = 3,
        hidden: Sequence[int] = (256, 256),
        activation: str = "leaky_relu",
        output: str = "tanh",
        learning_rate: float = 3e-4,
        seed: int = 0,
        state_embedding: int = 20,
        action_embedding: int = 10,
        embedding: int = 256,
        epochs: int = 20,
        max_updates: int | None = 2000,
        dynamics_batch_size: int = 256,
        dynamics_learning_rate: float = 1e-3,
        contrastive_temperature: float | None = None,
        normalise: bool = False,
        pessimism: float = 0.0,
        pessimism_decay: float = 0.0,
        lowest_of: int = 1,
        disagreement_bonus: float = 0.0,
        disagreement_decay: float = 1e-5,
        convexity: float = 0.0,
    ) -> None:
        check(
            "reward",
            epochs=(epochs, epochs >= 1, "at least 1"),
            max_updates=(max_updates, max_updates is None or max_updates >= 1, "at least 1, or null"),
            embedding=(embedding, embedding >= 1, "at least 1"),
            contrastive_temperature=(
                contrastive_temperature,
                contrastive_temperature is None or contrastive_temperature > 0,
                "above 0, or null",
            ),
        )
        super().__init__(
            embedding,
            0,
            members,
            hidden,
            activation,
            output,
            learning_rate,
            seed,
            pessimism=pessimism,
            pessimism_decay=pessimism_decay,
            lowest_of=lowest_of,
            disagreement_bonus=disagreement_bonus,
            disagreement_decay=disagreement_decay,
            convexity=convexity,
        )
        self.obs_scale, self.action_scale = Standardise(obs_dim, normalise), Standardise(act_dim, normalise)
        layer = ACTIVATIONS[activation]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.state_encoder = nn.Sequential(nn.Linear(obs_dim, state_embedding), layer())
            self.action_encoder = nn.Sequential(nn.Linear(act_dim, action_embedding), layer())
            self.joint = nn.Sequential(nn.Linear(state_embedding + action_embedding, embedding), layer())
            self.predictor = nn.Sequential(
                nn.Linear(embedding, embedding), layer(), nn.Linear(embedding, state_embedding)
            )
        self.optimizer = torch.optim.Adam(
            [p for name, p in self.named_parameters() if not name.startswith("predictor.")], lr=learning_rate
        )
        dynamics = (self.state_encoder, self.action_encoder, self.joint, self.predictor)
        self.dynamics_optimizer = torch.optim.Adam(
            [p for module in dynamics for p in module.parameters()], lr=dynamics_learning_rate
        )
        self.epochs, self.max_updates, self.dynamics_batch_size = epochs, max_updates, dynamics_batch_size
        self.contrastive_temperature = contrastive_temperature

    def encode(self, obs: Tensor, actions: Tensor) -> Tensor:
        """z = e(s, a): float32 [..., embedding]."""
        parts = [self._state(obs), self.action_encoder(self.action_scale(actions))]
        return self.joint(torch.cat(parts, dim=-1))

    def _state(self, obs: Tensor) -> Tensor:
        """f(s): float32 [..., state_embedding]."""
        return self.state_encoder(self.obs_scale(obs))

    def member(self, index: int, obs: Tensor, actions: Tensor) -> Tensor:
        """Rewards by one member: float32 [...] for obs [..., obs_dim] and actions [..., act_dim]."""
        return self.members[index](self.encode(obs, actions)).squeeze(-1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Rewards by every member: float32 [M, ...]."""
        z = self.encode(obs, actions)
        return torch.stack([head(z).squeeze(-1) for head in self.members])

    def _row(self, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return self.encode(torch.from_numpy(obs), torch.from_numpy(actions)).numpy()

    def dynamics_loss(self, obs: Tensor, actions: Tensor, next_obs: Tensor) -> Tensor:
        """L of the module's text: float32 []."""
        with torch.no_grad():
            target = self._state(next_obs)
        if self.contrastive_temperature is not None:
            told, meant = F.normalize(self.predictor(self.encode(obs, actions)), dim=-1), F.normalize(target, dim=-1)
            logits = told @ meant.T / self.contrastive_temperature
            return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
        return -F.cosine_similarity(self.predictor(self.encode(obs, actions)), target, dim=-1).mean()

    def pretrain(self, session: Session) -> dict[str, float]:
        """Train the encoder on the replay; the loop calls it before each reward update.

        Returns:
            reward/dynamics_loss (mean over the steps).
        """
        super().pretrain(session)
        updates = max(self.epochs * session.env_step // self.dynamics_batch_size, 1)
        updates = updates if self.max_updates is None else min(updates, self.max_updates)
        total = torch.zeros((), device=self.device)
        for _ in range(updates):
            batch = session.transitions(self.dynamics_batch_size)
            loss = self.dynamics_loss(batch["obs"], batch["actions"], batch["next_obs"])
            self.dynamics_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.dynamics_optimizer.step()
            total += loss.detach()
        return {"reward/dynamics_loss": float(total) / updates}

    def state(self) -> dict[str, Any]:
        """Weights and both optimisers, for a checkpoint."""
        return super().state() | {"dynamics_optimizer": self.dynamics_optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        super().load_state(state)
        restore_optimizer(self.dynamics_optimizer, state["dynamics_optimizer"])
