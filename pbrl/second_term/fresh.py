"""On-policy rollouts and this session's labelled pairs, divided so that the gate's two estimates share nothing.

Reusing rollouts for both factors of the implicit term manufactures a reproducible false term, and a label that enters
both halves makes them agree, or disagree, for no reason. So every pair belongs to one half with all of its steps, its
label and its centring. The steps of no pair are cut into pieces, dealt to four parts: 0 and 1 are the first half's,
2 and 3 the second's. A part's rewards and traces meet only what was computed from its half's pairs and its partner.

    half 0: pairs ─► ∂_theta G ─► x (curvature of part 1) ─► traces and rewards of part 0, and the same with 0 and 1
            exchanged; half 1: the same with parts 2 and 3

What stays: pieces of one episode follow each other, so they share the states where they meet.
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

PARTS = 4  # of the pieces: k and k ^ 1 are partners, k // 2 is the half
LABELLED_SHARE = 0.5  # of the fresh steps at most that lend their scores; the rest are the rollouts these meet


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

    def half(self, half: int) -> Trajectories:
        """The pieces of the parts 2 half and 2 half + 1."""
        index = torch.arange(len(self)) % PARTS // 2 == half
        return Trajectories(self.obs[index], self.actions[index], self.raw_actions[index], self.mask[index])

    def to(self, device: torch.device) -> Trajectories:
        return Trajectories(*(t.to(device) for t in (self.obs, self.actions, self.raw_actions, self.mask)))


@dataclass(frozen=True)
class Labelled:
    """N answered pairs about the present policy's segments; the two sides are stacked on axis 0."""

    segments: Segments  # [2, N, H, ...] flattened to [2N, H, ...]: all first ones, then all second ones
    prefers_first: Tensor  # float32 [N]
    half: Tensor  # int64 [N]: the half that the pair belongs to

    def __len__(self) -> int:
        return len(self.prefers_first)

    def sizes(self) -> list[int]:
        """Pairs in each half."""
        return [int((self.half == half).sum()) for half in (0, 1)]


@dataclass(frozen=True)
class Division:
    """This session's fresh data, divided. Pairs that would join both halves are in neither."""

    pairs: Labelled
    chosen: Tensor  # int64 [N]: their rows in the preferences
    pieces: Trajectories  # the steps in none of these pairs

    def enough(self, pieces: bool = True) -> bool:
        """Whether both halves have a pair, and (if `pieces` are needed) every part two pieces."""
        return min(self.pairs.sizes()) >= 1 and (len(self.pieces) >= 2 * PARTS or not pieces)


def cut(episodes: list[Segments], trajectory_length: int) -> Trajectories:
    """The episodes cut into pieces of `trajectory_length` steps from their beginnings; the last of each may be shorter.

    Piece i belongs to part i % PARTS.

    Raises:
        ValueError: without episodes, or if they hold no raw actions.
    """
    return _cut(episodes, trajectory_length, np.full(sum(episode.length for episode in episodes), -1))


def divide(
    preferences: Preferences,
    episodes: list[Segments],
    trajectory_length: int,
    labelled_share: float = LABELLED_SHARE,
) -> Division:
    """This session's fresh pairs dealt to two halves, and the other steps of `episodes` cut into pieces.

    Pair by pair, each goes to the half whose steps it shares, to the smaller half if it shares none, and to neither if
    it touches both. Segments that are not in `episodes` (branches) touch nothing. Once the pairs hold `labelled_share`
    of the steps, the steps of further ones serve as rollouts, and their labels are not used.

    Raises:
        ValueError: if there is nothing to divide, or without raw actions (imported answers, say).
    """
    latest = preferences.current
    count = len(latest)
    first, second = preferences.first[latest], preferences.second[latest]
    if first.raw_actions is None:
        raise ValueError("the preferences hold no raw actions, so the policy's scores are unknown")
    segments = Segments.cat([first, second])
    begin = _locate(episodes, segments).reshape(2, count)
    owner = np.full(sum(episode.length for episode in episodes), -1)  # half of the pairs that a step lies in
    half, sizes = np.full(count, -1), [0, 0]
    for i in range(count):
        rows = (begin[begin[:, i] >= 0, i][:, None] + np.arange(segments.length)).ravel()
        touched = set(owner[rows]) - {-1}
        grown = (owner >= 0).sum() + (owner[np.unique(rows)] < 0).sum()
        if len(touched) == 2 or grown > labelled_share * len(owner):
            continue
        half[i] = touched.pop() if touched else int(sizes[1] < sizes[0])
        sizes[half[i]] += 1
        owner[rows] = half[i]
    chosen = torch.from_numpy(np.flatnonzero(half >= 0))
    kept = Segments.cat([first[chosen], second[chosen]])
    pairs = Labelled(kept, preferences.prefers_first[latest[chosen]], torch.from_numpy(half)[chosen])
    return Division(pairs, latest[chosen], _cut(episodes, trajectory_length, owner))


def check_share(earlier_share: float | None) -> None:
    """Raise a ValueError unless `training_rows` can use it."""
    if earlier_share is not None and not 0 <= earlier_share <= 1:
        raise ValueError(f"updater.earlier_share={earlier_share}; expected a share in [0, 1], or null for all pairs")


def training_rows(new: Tensor, earlier_share: float | None, rng: np.random.Generator) -> np.ndarray:
    """Which stored pairs to fit: int64 [n], the earlier ones first, ascending.

    Args:
        new: which of them are this session's, bool [N].
        earlier_share: share, in [0, 1], of earlier sessions' pairs among those fitted, drawn anew at each update
            without replacement, as far as there are enough; None, or 1: all pairs.
    """
    old, latest = (np.flatnonzero(which) for which in (~new.numpy(), new.numpy()))
    if earlier_share is None or earlier_share == 1 or len(latest) == 0:
        return np.arange(len(new))
    count = min(round(len(latest) * earlier_share / (1 - earlier_share)), len(old))
    return np.concatenate([old[np.sort(rng.choice(len(old), count, replace=False))], latest])


def _cut(episodes: list[Segments], trajectory_length: int, owner: np.ndarray) -> Trajectories:
    """Pieces of at most `trajectory_length` steps of the runs of steps with owner −1, in order."""
    if not episodes or any(episode.raw_actions is None for episode in episodes):
        raise ValueError(f"{len(episodes)} fresh episodes; expected at least one, all with raw actions")
    starts, stops, end = [], [], 0
    for episode in episodes:
        end += episode.length
        free = np.flatnonzero(owner[end - episode.length : end] < 0) + end - episode.length
        for run in np.split(free, np.flatnonzero(np.diff(free) > 1) + 1):
            if len(run):
                starts.append(np.arange(run[0], run[-1] + 1, trajectory_length))
                stops.append(np.minimum(starts[-1] + trajectory_length, run[-1] + 1))
    start, stop = (np.concatenate(found) if found else np.zeros(0, np.int64) for found in (starts, stops))
    index = start[:, None] + np.arange(min(trajectory_length, int((stop - start).max(initial=1))))
    mask = torch.from_numpy(index < stop[:, None])
    rows = torch.from_numpy(np.minimum(index, stop[:, None] - 1))
    obs, actions, raw_actions = (
        torch.cat([getattr(episode, name)[0] for episode in episodes])[rows]
        for name in ("obs", "actions", "raw_actions")
    )
    return Trajectories(obs, actions, raw_actions, mask)


def _locate(episodes: list[Segments], segments: Segments) -> np.ndarray:
    """Row of the episodes, laid end to end, at which each segment begins; −1 if nowhere: int64 [len(segments)]."""
    if segments.step is None or any(episode.step is None for episode in episodes):
        return np.full(len(segments), -1)
    beginnings = [int(episode.step[0]) for episode in episodes if episode.step is not None]
    rows = [begin + np.arange(e.length) for begin, e in zip(beginnings, episodes, strict=True)]
    steps, wanted = np.concatenate(rows), segments.step.numpy()  # both count the run's steps; the rows ascend
    row = np.minimum(np.searchsorted(steps, wanted), len(steps) - 1)
    return np.where(steps[row] == wanted, row, -1)
