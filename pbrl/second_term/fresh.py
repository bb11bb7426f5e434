"""On-policy rollouts and this session's labelled pairs as padded batches, divided so that no step is used twice.

Reusing rollouts for both factors of the implicit term manufactures a reproducible false term. What must not be shared
are the *scores* ∇lp of single steps, so the fresh steps are divided into four parts: the halves of the gate's two
estimates are {0, 1} and {2, 3}, and within a half each part's scores meet only its partner's rewards. A labelled pair
may lie in several parts: each of its steps brings its score to the part it lies in, so no label is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pbrl.types import Segments

if TYPE_CHECKING:
    from pbrl.preferences import Preferences

PARTS = 4  # parts k and k ^ 1 are partners; k // 2 is the half
HALVES = ([0, 1], [2, 3])


@dataclass(frozen=True)
class Trajectories:
    """B pieces of on-policy episodes, at most H steps each, padded."""

    obs: Tensor  # float32 [B, H, obs_dim]
    actions: Tensor  # float32 [B, H, act_dim]
    raw_actions: Tensor  # float32 [B, H, act_dim]
    mask: Tensor  # bool [B, H]: steps that happened; the others hold copies of real steps

    def __len__(self) -> int:
        return len(self.obs)

    def __getitem__(self, index: slice) -> Trajectories:
        return Trajectories(self.obs[index], self.actions[index], self.raw_actions[index], self.mask[index])

    def parts(self, chosen: list[int]) -> Trajectories:
        """The pieces of these parts."""
        index = torch.isin(torch.arange(len(self)) % PARTS, torch.tensor(chosen))
        return Trajectories(self.obs[index], self.actions[index], self.raw_actions[index], self.mask[index])

    def to(self, device: torch.device) -> Trajectories:
        return Trajectories(*(t.to(device) for t in (self.obs, self.actions, self.raw_actions, self.mask)))


@dataclass(frozen=True)
class Labelled:
    """N answered pairs about the present policy's segments; the two sides are stacked on axis 0."""

    segments: Segments  # [2, N, H, ...] flattened to [2N, H, ...]: all first ones, then all second ones
    prefers_first: Tensor  # float32 [N]
    part: Tensor  # int64 [2N, H]: the part each step belongs to

    def __len__(self) -> int:
        return len(self.prefers_first)


def cut(episodes: list[Segments], horizon: int) -> Trajectories:
    """The episodes cut into pieces of `horizon` steps from their beginnings; the last of each may be shorter.

    Piece i belongs to part i % PARTS.

    Raises:
        ValueError: without episodes, or if they hold no raw actions.
    """
    if not episodes or any(episode.raw_actions is None for episode in episodes):
        raise ValueError(f"{len(episodes)} fresh episodes; expected at least one, all with raw actions")
    start, stop = _pieces(episodes, horizon)
    index = start[:, None] + np.arange(min(horizon, int((stop - start).max())))
    mask = torch.from_numpy(index < stop[:, None])
    rows = torch.from_numpy(np.minimum(index, stop[:, None] - 1))
    obs, actions, raw_actions = (
        torch.cat([getattr(episode, name)[0] for episode in episodes])[rows]
        for name in ("obs", "actions", "raw_actions")
    )
    return Trajectories(obs, actions, raw_actions, mask)


def labelled(preferences: Preferences, count: int, episodes: list[Segments], horizon: int) -> Labelled:
    """The last `count` pairs (this session's), their steps divided as `cut` divides the episodes.

    Segments that are not in `episodes` (branches) are dealt out to the parts pair by pair.

    Raises:
        ValueError: if the preferences hold no raw actions (imported ones, say).
    """
    latest = slice(len(preferences) - count, None)
    first, second = preferences.first[latest], preferences.second[latest]
    if first.raw_actions is None:
        raise ValueError("the preferences hold no raw actions, so the policy's scores are unknown")
    segments = Segments.cat([first, second])
    starts, _ = _pieces(episodes, horizon)
    begin = _locate(episodes, segments)
    row = begin[:, None] + np.arange(segments.horizon)
    piece = np.searchsorted(starts, row, side="right") - 1
    dealt = np.tile(np.arange(count), 2)[:, None]
    part = np.where(begin[:, None] >= 0, piece, dealt) % PARTS
    return Labelled(segments, preferences.prefers_first[latest], torch.from_numpy(part))


def check_share(earlier_share: float | None) -> None:
    """Raise a ValueError unless `training_rows` can use it."""
    if earlier_share is not None and not 0 <= earlier_share <= 1:
        raise ValueError(f"updater.earlier_share={earlier_share}; expected a share in [0, 1], or null for all pairs")


def training_rows(size: int, new: int, earlier_share: float | None, rng: np.random.Generator) -> np.ndarray:
    """Which of `size` stored pairs to fit, the last `new` of which are this session's: int64 [n], ascending.

    Args:
        earlier_share: share, in [0, 1], of earlier sessions' pairs among those fitted, drawn anew at each update
            without replacement, as far as there are enough; None, or 1: all pairs.
    """
    old = size - new
    if earlier_share is None or earlier_share == 1 or new == 0:
        return np.arange(size)
    count = min(round(new * earlier_share / (1 - earlier_share)), old)
    return np.concatenate([np.sort(rng.choice(old, count, replace=False)), np.arange(old, size)])


def _pieces(episodes: list[Segments], horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """First row and end of each piece, in the episodes' rows laid end to end: int64 [B] each, ascending."""
    ends = np.cumsum([episode.horizon for episode in episodes])
    starts = [np.arange(end - episode.horizon, end, horizon) for episode, end in zip(episodes, ends, strict=True)]
    stops = [np.minimum(start + horizon, end) for start, end in zip(starts, ends, strict=True)]
    return np.concatenate(starts), np.concatenate(stops)


def _locate(episodes: list[Segments], segments: Segments) -> np.ndarray:
    """Row of the episodes, laid end to end, at which each segment begins; −1 if nowhere: int64 [len(segments)].

    Found by content: a step's observation and Gaussian action together do not occur twice.
    """

    def keys(obs: Tensor, raw: Tensor | None) -> list[bytes]:
        assert raw is not None
        return [row.tobytes() for row in torch.cat([obs, raw], 1).numpy()]

    rows: list[bytes] = []
    for episode in episodes:
        rows += keys(episode.obs[0], None if episode.raw_actions is None else episode.raw_actions[0])
    where = {key: i for i, key in enumerate(rows)}
    wanted = keys(segments.obs[:, 0], None if segments.raw_actions is None else segments.raw_actions[:, 0])
    return np.array([where.get(key, -1) for key in wanted])
