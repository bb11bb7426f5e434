"""Random pairs whose better segment has the larger first coordinates, and as much of a session as updaters use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.types import Answer, Query, Segments


def segments(count: int, length: int, rng: np.random.Generator) -> Segments:
    obs, actions = (rng.normal(size=(count, length, 2)).astype(np.float32) for _ in range(2))
    return Segments(torch.from_numpy(obs), torch.from_numpy(np.tanh(actions)))


def answered(
    count: int, length: int = 6, margin: int = 0, wrong: int = 0, seed: int = 0, earlier: int = 0
) -> Preferences:
    """Pairs labelled by the sum of the first observation; the first `wrong` labels are turned.

    All but the first `earlier` are of the present session.
    """
    rng = np.random.default_rng(seed)
    wide = segments(count, length + 2 * margin, rng), segments(count, length + 2 * margin, rng)
    first, second = (side.steps(margin, margin + length) for side in wide)
    labels = (first.obs[..., 0].sum(1) > second.obs[..., 0].sum(1)).float()
    labels[:wrong] = 1 - labels[:wrong]
    query = Query(first, second, torch.zeros(count, 2, length), context=wide if margin else None)
    preferences = Preferences()
    for number, part in enumerate((slice(0, earlier), slice(earlier, count))):
        if len(labels[part]):
            preferences.add(query[part], Answer(labels[part], torch.ones_like(labels[part]) > 0), number)
    return preferences


def session(seed: int = 0) -> Any:
    """As much of a `Session` as these updaters use, on random steps whose next observation is obs + 0.1 action."""
    rng = np.random.default_rng(seed)

    def transitions(count: int) -> dict[str, Tensor]:
        steps = segments(count, 1, rng)
        obs, actions = steps.obs[:, 0], steps.actions[:, 0]
        return {"obs": obs, "actions": actions, "next_obs": obs + 0.1 * actions, "not_done": torch.ones(count)}

    return SimpleNamespace(
        rng=rng,
        env_step=5000,
        unlabelled=lambda count, length: (segments(count, length, rng), segments(count, length, rng)),
        transitions=transitions,
        novelty=lambda obs, nearest: obs.norm(dim=1),
    )


def small_reward(**options: Any) -> RewardEnsemble:
    return RewardEnsemble(2, 2, **{"members": 2, "hidden": [16], "seed": 0, **options})
