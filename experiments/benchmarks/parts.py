"""What the loop does beside the update: pay, relabelling, the entropy bonus, reward training, the replay's size."""

from __future__ import annotations

import resource
from functools import partial
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.timing import interleaved
from experiments.benchmarks.update import Still, fill
from pbrl.agent.replay import RelabelReplay
from pbrl.launch.shipped import make
from pbrl.losses import bradley_terry_loss
from pbrl.nearest import nearest_distances
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.types import Answer, Query, Segments

OBS, ACT, HORIZON, BATCH = 39, 4, 50, 128  # Meta-World's door; B-Pref's reward batch


def straightforward(ensemble: RewardEnsemble, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """B-Pref's pay: inputs joined, every member called in turn on all rows, a numpy array each, then the mean."""
    inputs = np.concatenate([obs, actions], axis=-1)
    return np.array([member(torch.from_numpy(inputs)).detach().numpy() for member in ensemble.members]).mean(axis=0)


def _predicted(ensemble: RewardEnsemble, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    return ensemble.predict(obs, actions).mean(axis=0)


def pay() -> list[dict[str, Any]]:
    """Pay of one row and of ten thousand, for ensembles of several sizes, on one thread."""
    rng, rows = np.random.default_rng(0), []
    obs, actions = rng.random((10_240, OBS), np.float32), rng.random((10_240, ACT), np.float32)
    for members in (1, 3, 7):
        ensemble = RewardEnsemble(OBS, ACT, members)
        for size in (1, len(obs)):
            o, a = obs[:size], actions[:size]
            np.testing.assert_allclose(
                ensemble.predict(o, a).mean(axis=0), straightforward(ensemble, o, a)[:, 0], atol=1e-5
            )
            times = interleaved(
                {
                    "ours": partial(_predicted, ensemble, o, a),
                    "straightforward": partial(straightforward, ensemble, o, a),
                }
            )
            rows.append({"members": members, "rows": size, **_compared(times)})
            rows[-1]["seconds_per_million"] = times["ours"]["cpu_ms"] / size * 1e3
    return rows


def reward_training() -> list[dict[str, Any]]:
    """One optimiser step of all members on 128 pairs: ours in fp32 and bf16, and B-Pref's, all rows at once."""
    draw = torch.Generator().manual_seed(0)
    first, second = (
        Segments(torch.rand(BATCH, HORIZON, OBS, generator=draw), torch.rand(BATCH, HORIZON, ACT, generator=draw))
        for _ in range(2)
    )
    labels = torch.randint(2, (BATCH,), generator=draw).float()
    preferences, fit = Preferences(), make("updater", "pebble-published", fit={"epochs": 1, "stop_accuracy": 2.0}).fit
    query = Query(first, second, torch.zeros(BATCH, 2, HORIZON), 0.0)
    preferences.add(query, Answer(labels, torch.ones(BATCH, dtype=torch.bool)), 0)
    rows = []
    for members in (1, 3, 7):
        ensembles = [RewardEnsemble(OBS, ACT, members, precision=name) for name in ("fp32", "bf16", "fp32")]

        def ours(e: RewardEnsemble) -> None:
            fit(e, preferences, np.random.default_rng(0))

        def published(e: RewardEnsemble) -> None:
            e.optimizer.zero_grad()
            left, right = e(first.obs, first.actions), e(second.obs, second.actions)
            losses = [bradley_terry_loss(a, b, labels) for a, b in zip(left, right, strict=True)]
            torch.stack(losses).sum().backward()
            e.optimizer.step()

        calls = zip(("ours", "bf16", "straightforward"), (ours, ours, published), ensembles, strict=True)
        times = interleaved({name: partial(call, ensemble) for name, call, ensemble in calls})
        compared = _compared(times)
        bf16 = times["bf16"]["cpu_ms"]
        rows.append({"members": members, **compared, "bf16_cpu_ms": bf16})
        rows[-1]["ratio_bf16_cpu"] = times["straightforward"]["cpu_ms"] / bf16
    return rows


def entropy() -> list[dict[str, Any]]:
    """The k-nearest-neighbour bonus: ours against the published code's full matrix of differences."""
    rows = []
    for size, obs_dim, batch in ((10_000, 39, 512), (10_000, 24, 1024)):
        draw = torch.Generator().manual_seed(0)
        stored = torch.randn(size, obs_dim, generator=draw)
        queries = stored[:batch]

        def published(queries: torch.Tensor = queries, stored: torch.Tensor = stored) -> torch.Tensor:
            parts = [torch.norm(queries[:, None] - chunk[None], dim=-1, p=2) for chunk in stored.split(500)]
            return torch.kthvalue(torch.cat(parts, dim=1), k=6, dim=1).values

        def ours(queries: torch.Tensor = queries, stored: torch.Tensor = stored) -> torch.Tensor:
            return nearest_distances(queries, stored, 5)

        difference = float((ours() - published()).abs().max())
        times = interleaved({"ours": ours, "straightforward": published})
        rows.append({"stored": size, "obs": obs_dim, "batch": batch, "difference": difference, **_compared(times)})
    return rows


def replay() -> list[dict[str, Any]]:
    """Memory of the replay and the cost of a batch, by number of transitions."""
    rows = []
    env = Still(OBS, ACT)
    for size in (10_000, 100_000, 1_000_000):
        buffer = RelabelReplay(size, env.observation_space, env.action_space, device="cpu")
        fill(buffer, np.random.default_rng(0))
        rng = np.random.default_rng(1)
        times = interleaved({"draw": partial(buffer.draw, 512, rng)})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append(
            {"transitions": size, "megabytes": buffer.rows.nbytes / 1e6, "process_peak_mb": peak, **times["draw"]}
        )
        del buffer
    return rows


def _compared(times: dict[str, dict[str, float]]) -> dict[str, float]:
    ours, theirs = times["ours"], times["straightforward"]
    return {**ours, "straightforward_cpu_ms": theirs["cpu_ms"], "ratio_cpu": theirs["cpu_ms"] / ours["cpu_ms"]}
