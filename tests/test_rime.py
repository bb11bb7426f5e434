"""RIME: divergences and thresholds by hand, flips, and the warm start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.second_term.guard import Estimate
from pbrl.updaters.rime import divergences
from tests.conftest import finish, option, rows, tiny_loop
from tests.gaussian_problem import STEPS, GaussianSession
from tests.preference_problem import answered, session, small_reward


def trained_on(preferences: Preferences, reward: Any, **fit: Any) -> None:
    option("updater", "pebble-published", fit=fit).update(reward, preferences, session())


def test_divergences_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(1 / 3), 0.0]])  # means 0.5, 0.5
    assert divergences(logits, torch.tensor([1.0, 0.5])).tolist() == pytest.approx([math.log(2), 0.0], abs=1e-9)
    one = torch.tensor([[math.log(9.0)] * 3])  # p = 0.9
    expected = [-math.log(0.9), -math.log(0.1), 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)]
    assert divergences(one, torch.tensor([1.0, 0.0, 0.5])).tolist() == pytest.approx(expected, rel=1e-6)


def test_rime_thresholds_follow_the_paper() -> None:
    rime = option("updater", "rime", beta_epochs=10)
    assert rime.lower_threshold == math.inf, "at first everything is trusted"
    rime.largest, rime.variance, rime.done = 0.7, 0.4, 5
    assert rime.lower_threshold == pytest.approx(-math.log(0.7) + 0.5 * 0.7 + (3.0 - 0.5 * 2.0) * 0.4)
    rime.variance, rime.done = 9.0, 100
    assert rime.lower_threshold == pytest.approx(-math.log(0.7) + 0.35 + 3.0), "the uncertainty term is capped"


def test_the_variance_pools_all_trusted_divergences_by_count() -> None:
    rime = option("updater", "rime")
    rng = np.random.default_rng(0)
    epochs = [torch.from_numpy(rng.exponential(scale, size)) for scale, size in ((0.7, 50), (0.3, 80), (0.1, 20))]
    rime.observe(epochs[0])
    assert rime.variance == pytest.approx(float(epochs[0].var(unbiased=False))), "its start, 1, is forgotten at once"
    mean, variance, count = 0.1 * float(epochs[0].mean()), rime.variance, 50
    for epoch in epochs[1:]:
        rime.observe(epoch)
        size = len(epoch)
        between = (float(epoch.mean()) - mean) ** 2 * count * size / (count + size)
        variance = (variance * count + float(epoch.var(unbiased=False)) * size + between) / (count + size)
        mean, count = mean + 0.1 * (float(epoch.mean()) - mean), count + size
        assert rime.variance == pytest.approx(variance)


def test_the_learning_rate_warms_up_epoch_by_epoch() -> None:
    rates: list[float] = []

    class Inner:
        pairs = "buffer"

        def update(self, reward: Any, preferences: Preferences, session: Any) -> dict[str, float]:
            rates.append(reward.optimizer.param_groups[0]["lr"])
            return {"reward/accuracy": 0.0}

    reward = small_reward(learning_rate=1e-2)
    rime = option("updater", "rime", inner=Inner(), epochs=4, warm_updates=0, warmup_epochs=5)
    for _ in range(2):
        rime.update(reward, answered(20), session())
    assert rates == pytest.approx([0, 0.002, 0.004, 0.006, 0.008, 0.01, 0.01, 0.01])
    assert reward.optimizer.param_groups[0]["lr"] == 1e-2


def test_wrong_answers_are_distrusted_within_the_first_epochs() -> None:
    """30 % wrong; with a variance that averages from 1 on, all of them are still trusted in the eighth epoch."""
    trusted = []
    rime = option("updater", "rime", epochs=8, least_epochs=8, warm_updates=0, warmup_epochs=0)
    denoise = rime._denoise

    def spied(reward: Any, preferences: Preferences) -> Any:
        found = denoise(reward, preferences)
        trusted.append(float(found[0][:90].float().mean()))
        return found

    rime._denoise = spied
    rime.update(small_reward(hidden=[64], learning_rate=5e-3), answered(300, wrong=90), session())
    assert trusted[0] == 1
    assert trusted[7] < 0.7


@pytest.mark.slow
def test_rime_flips_and_distrusts_wrong_labels() -> None:
    preferences = answered(300, wrong=30)
    reward = small_reward(hidden=[64])
    trained_on(answered(300), reward, epochs=60, stop_accuracy=0.999)  # it knows the truth
    rime = option("updater", "rime", warm_updates=0, flip=0.2)
    rime.largest, rime.variance, rime.done = 0.7, 0.1, 60
    trusted, flipped = rime._denoise(reward, preferences)
    assert trusted[30:].float().mean() > 0.9
    assert trusted[:30].float().mean() < 0.4
    assert flipped[30:].sum() == 0
    assert flipped[:30].sum() > 5
    assert not (trusted & flipped).any()


def test_rime_survives_equal_labels_and_epochs_without_trusted_pairs() -> None:
    preferences = answered(20)
    preferences.prefers_first[:5] = 0.5
    reward = small_reward()
    rime = option("updater", "rime", epochs=3, least_epochs=1, warm_updates=0)
    metrics = rime.update(reward, preferences, session())
    assert metrics["rime/trusted"] > 0
    rime.largest, rime.variance, rime.done = 2.0, -100.0, 0  # a threshold below every divergence
    before = [p.detach().clone() for p in reward.parameters()]
    metrics = rime.update(reward, preferences, session())
    assert metrics["rime/trusted"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, reward.parameters(), strict=True))


def test_rime_trains_its_inner_updater_on_the_flipped_labels() -> None:
    seen: list[tuple[Tensor, int]] = []

    class Inner:
        pairs = "buffer"

        def update(self, reward: Any, preferences: Preferences, session: Any) -> dict[str, float]:
            seen.append((preferences.prefers_first.clone(), int(preferences.new.sum())))
            return {"reward/accuracy": 0.0}

    preferences = answered(40, wrong=10, earlier=5)
    reward = small_reward(hidden=[64])
    trained_on(answered(40), reward, epochs=150, stop_accuracy=0.9999)
    rime = option("updater", "rime", inner=Inner(), epochs=2, warm_updates=0, flip=0.45)
    rime.largest, rime.variance, rime.done = 2.0, 0.0, 60  # tau_low = −ln 2 + 1 = 0.31; tau_high = −ln 0.45 = 0.80
    kl = divergences(reward.preference_logits(preferences.first, preferences.second), preferences.prefers_first)
    rime.update(reward, preferences, session())
    given = preferences.prefers_first
    trusted, flipped = kl < 1 - math.log(2), kl > -math.log(0.45)
    assert trusted.any()
    assert flipped.any()
    kept = trusted | flipped
    assert torch.equal(seen[0][0], torch.where(flipped, 1 - given, given)[kept])
    assert [new for _, new in seen] == [int(kept[-35:].sum()), 0], "new pairs are shown as new once"
    assert int(preferences.new.sum()) == 35, "the store itself is as it was"


def test_rime_starts_warm_from_the_novelty() -> None:
    reward, now = small_reward(hidden=[32, 32], learning_rate=3e-3), session()
    metrics = option("updater", "rime", epochs=1, warm_updates=400)._warm_start(reward, now)
    batch = now.transitions(500)
    with torch.no_grad():
        paid = reward.mean(batch["obs"], batch["actions"])
    assert np.corrcoef(paid, now.novelty(batch["obs"], 5))[0, 1] > 0.9
    assert metrics["rime/warm_start_loss"] > 0


def test_rime_refuses_what_it_cannot_wrap() -> None:
    with pytest.raises(ValueError, match="nothing to denoise"):
        option("updater", "rime", inner=option("updater", "oracle"))
    with pytest.raises(ValueError, match="between sessions"):
        option("updater", "rime", inner=option("updater", "mrn"))


@pytest.mark.parametrize("name", ["penalty", "aparl"])
def test_an_inner_second_term_is_the_first_epochs_and_its_session_is_counted_once(name: str) -> None:
    walk = {"walk": {"steps": 5, "trajectory_length": STEPS, "states": 4, "rollout_steps": 64}, "sigma_decay": 0.5}
    inner = option("updater", name, fit={"epochs": 1, "least_steps": 0}, **(walk if name == "penalty" else {}))
    rime = option("updater", "rime", inner=inner, epochs=3, least_epochs=3, warm_updates=0)
    reward, now = RewardEnsemble(2, 1, members=3, hidden=(8, 8), activation="silu"), GaussianSession(0)
    metrics = rime.update(reward, now.preferences(), now)
    assert metrics["reward/epochs"] == 3 and inner.safeguard.updates == 1
    assert metrics[f"{name}/usable"] == 1 and metrics[f"{name}/fallbacks"] == 0
    assert rime.own_steps(10, STEPS) == now.rolled == inner.own_steps(10, STEPS), "later epochs take no steps"
    if name == "penalty":
        assert inner.sigma == inner.first_sigma / 2


def test_an_inner_updater_hears_the_start() -> None:
    rime = option("updater", "rime", inner=option("updater", "penalty", reference="initial"))
    rime.start(GaussianSession(0))
    assert rime.inner.reference_policy is not None


def test_an_inner_updater_that_takes_steps_at_every_call_is_planned_for() -> None:
    class Inner:
        def update(self, reward: Any, preferences: Preferences, session: Any) -> dict[str, float]:
            return {}

        def own_steps(self, pairs: int, length: int) -> int:
            return 100

    assert option("updater", "rime", inner=Inner(), epochs=4).own_steps(10, 50) == 400


def test_rime_wraps_another_updater(tmp_path: Path) -> None:
    inner = ("updater@updater.inner=surf", "updater.inner.fit.crop=[0.8, 1.2]")
    options = ("updater=rime", *inner, "updater.warm_updates=5", "updater.epochs=3", "updater.least_epochs=1")
    loop = tiny_loop(tmp_path / "run", *options, "total_steps=350")
    finish(loop)
    assert loop.parts.preferences.margin == 2, "the inner updater's margins are asked for"


@pytest.mark.slow
def test_an_epoch_is_one_pass_also_where_the_inner_updater_alone_takes_more(tmp_path: Path) -> None:
    limits = ("updater.epochs=3", "updater.least_epochs=3", "updater.warm_updates=0", "updater.warmup_epochs=0")
    finish(tiny_loop(tmp_path / "run", "updater=rime", "updater@updater.inner=pebble", *limits, "total_steps=350"))
    steps = [row["reward/steps"] for row in rows(tmp_path / "run") if "feedback/session" in row]
    assert steps == [3, 3], "of 5 and 10 pairs, in batches of 32"


def test_the_gate_of_an_inner_second_term_through_critics_hears_of_it_once_a_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inner = option("updater", "aparl", implicit={"estimator": "critic-pairs"}, fit={"epochs": 1, "least_steps": 0})
    rime = option("updater", "rime", inner=inner, epochs=3, least_epochs=3, warm_updates=0)
    asked = []
    monkeypatch.setattr(inner, "second_term", lambda *given: asked.append(given) or Estimate(None))
    reward, now = RewardEnsemble(2, 1, members=3, hidden=(8, 8), activation="silu"), GaussianSession(0)
    assert rime.update(reward, now.preferences(), now)["reward/epochs"] == 3
    assert len(asked) == 1
