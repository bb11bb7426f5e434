"""How answers are fitted: limits, crops, the price on size; what pieces of segments are drawn."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from pbrl.fitting import LOOKED_AT, answer_loss, crops, train_epochs
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.types import Answer, Query, Segments
from tests.conftest import option
from tests.preference_problem import answered, small_reward


def learned_steps(**changes: Any) -> tuple[dict[str, float], np.ndarray]:
    """Fit pairs whose better segment has the larger first coordinates; the reward of a large one and of a small one."""
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(40, 10, 2, generator=draw) for _ in range(2))
    preferences = Preferences({})
    task = torch.stack([first[..., 0], second[..., 0]], 1)
    actions = torch.zeros(40, 10, 1)
    query = Query(Segments(first, actions), Segments(second, actions), task, 0.0)
    better = first[..., 0].sum(1) > second[..., 0].sum(1)
    preferences.add(query, Answer(better.float(), torch.ones(40, dtype=torch.bool)), 0)
    reward = RewardEnsemble(2, 1, members=2, hidden=(16,), learning_rate=1e-2, seed=0)
    fit = option("updater", "pebble-published", fit={"epochs": 3, "stop_accuracy": 0.0} | changes).fit
    metrics = fit(reward, preferences, np.random.default_rng(0))
    return metrics, reward.predict(np.array([[2.0, 0], [-2.0, 0]], np.float32), np.zeros((2, 1), np.float32)).mean(0)


def test_least_steps_outlast_both_limits() -> None:
    assert learned_steps()[0]["reward/epochs"] == 1  # any accuracy is enough to stop
    metrics, rewards = learned_steps(least_steps=60)
    assert metrics["reward/epochs"] == 60
    assert rewards[0] > rewards[1]


def test_crops_are_drawn_anew_and_still_teach_the_same() -> None:
    whole, cropped = (learned_steps(crop=crop, least_steps=60) for crop in (None, [0.5, 1.0]))
    assert whole[0]["reward/loss"] != cropped[0]["reward/loss"]
    assert cropped[1][0] > cropped[1][1] + 0.1


def test_several_pieces_of_a_pair_count_as_their_mean() -> None:
    """With k pieces a step's loss is the mean over k draws of the loss with one."""
    draw = torch.Generator().manual_seed(0)
    first, second = (Segments(torch.randn(6, 10, 2, generator=draw), torch.zeros(6, 10, 1)) for _ in range(2))
    reward, labels = RewardEnsemble(2, 1, members=1, hidden=(8,), seed=0), torch.tensor([0.0, 1, 1, 0, 0.5, 1])
    kept = crops(18, 10, 3, 6, np.random.default_rng(0))
    together = answer_loss(reward, 0, first, second, labels, kept, shrink=0.2)
    apart = [
        answer_loss(reward, 0, first, second, labels, (kept[0][i : i + 6], kept[1][i : i + 6]), shrink=0.2)
        for i in (0, 6, 12)
    ]
    for i in (0, 3):  # the loss and the price on size
        torch.testing.assert_close(together[i], torch.stack([one[i] for one in apart]).mean())
    assert float(together[2]) == sum(float(one[2]) for one in apart) == 15
    assert learned_steps(crop=[0.5, 1.0], pieces=4, least_steps=60)[1][0] > 0


def test_smoothed_answers_bound_the_margin() -> None:
    """The loss of one pair is least where the log-odds are log((1 − ε/2) / (ε/2))."""
    preferences = Preferences({})
    obs = torch.ones(1, 1, 1)
    query = Query(Segments(obs, obs), Segments(-obs, obs), torch.zeros(1, 2, 1), 0.0)
    preferences.add(query, Answer(torch.ones(1), torch.ones(1, dtype=torch.bool)), 0)
    reward = RewardEnsemble(1, 1, members=1, hidden=(16,), output="linear", learning_rate=1e-2, seed=0)
    changes = {"least_steps": 800, "label_smoothing": 0.2, "epochs": 1, "stop_accuracy": 2.0}
    option("updater", "pebble-published", fit=changes).fit(reward, preferences, np.random.default_rng(0))
    logits = float(reward.preference_logits(query.first, query.second))
    assert logits == pytest.approx(np.log(0.9 / 0.1), rel=0.01)


@pytest.mark.slow
def test_shrinking_centres_the_rewards() -> None:
    free, shrunk = (learned_steps(least_steps=200, shrink=shrink)[1] for shrink in (0.0, 25.0))
    assert shrunk[0] > shrunk[1]
    assert abs(shrunk.mean()) < abs(free.mean())
    assert np.abs(shrunk).max() < np.abs(free).max()


def test_the_logged_loss_is_that_of_the_answers_without_the_price_on_size() -> None:
    free, shrunk = (learned_steps(epochs=1, shrink=shrink)[0]["reward/loss"] for shrink in (0.0, 25.0))
    assert free == shrunk, "one step: of the networks as they were"


@pytest.mark.slow
@pytest.mark.parametrize("output", ["tanh", "sigmoid"])
def test_a_saturated_member_starts_anew_and_learns(output: str) -> None:
    """One at −1 everywhere has no gradient: seen on door-open, where `disagreement` then asked what was known."""
    reward = RewardEnsemble(2, 2, members=3, hidden=(16,), output=output, learning_rate=1e-2, seed=0)
    preferences = answered(40)
    steps = preferences.first.obs.flatten(0, 1).numpy(), preferences.first.actions.flatten(0, 1).numpy()
    changes = {"least_steps": 60, "shrink": 0.3}
    fit = option("updater", "pebble-published", fit=changes).fit
    published = option("updater", "pebble-published", fit={"least_steps": 60}).fit
    assert "reward/renewed" not in fit(reward, preferences, np.random.default_rng(0))
    with torch.no_grad():
        reward.members[1][-2].bias.fill_(-30.0)
    published(reward, preferences, np.random.default_rng(1))
    assert np.ptp(reward.predict(*steps)[1]) < 1e-6  # as published it stays what it is
    resumed = RewardEnsemble(2, 2, members=3, hidden=(16,), output=output, learning_rate=1e-2, seed=9)
    resumed.load_state(copy.deepcopy(reward.state()))
    metrics = fit(reward, preferences, np.random.default_rng(1))
    assert metrics == fit(resumed, preferences, np.random.default_rng(1))
    np.testing.assert_array_equal(reward.predict(*steps), resumed.predict(*steps))
    assert metrics["reward/renewed"] == 1
    assert metrics["reward/accuracy"] > 0.9
    assert np.ptp(reward.predict(*steps)[1]) > 0.1
    assert "reward/renewed" not in fit(reward, preferences, np.random.default_rng(2))
    assert len(reward.optimizer.state) == len(list(reward.parameters()))


def steep_reward() -> RewardEnsemble:
    """Two members on one observation: tanh(obs), and a constant 0."""
    reward = RewardEnsemble(1, 1, members=2, hidden=(), sees_actions=False, seed=0)
    with torch.no_grad():
        for parameter in reward.parameters():
            parameter.zero_()
        reward.members[0][0].weight.fill_(1.0)
    return reward


@pytest.mark.parametrize(("high", "low", "renewed"), [(6, 0, 0), (9, 0, 1), (0, 9, 1), (5, 5, 0)])
def test_a_member_that_is_nearly_saturated_at_one_end_starts_anew(high: int, low: int, renewed: int) -> None:
    """Seen on door-open: 0.95 and more at nine of ten of the policy's steps, 80 % of the answers ordered rightly."""
    reward, obs = steep_reward(), torch.zeros(10, 10, 1)
    obs[:, :high], obs[:, 10 - low :] = 2.0, -2.0  # tanh(2) is 0.96; the other steps' is 0
    assert reward.renew_saturated(Segments(obs, obs), np.random.default_rng(0)) == renewed
    assert bool(reward.members[0][0].bias) == bool(renewed)
    assert not reward.members[1][0].bias


@pytest.mark.parametrize(("early", "late", "renewed"), [(2.0, 0.0, False), (0.0, 2.0, True)])
def test_what_counts_is_the_newest_answers_steps(early: float, late: float, renewed: bool) -> None:
    obs = torch.full((LOOKED_AT + 100, 10, 1), early)
    obs[-LOOKED_AT:] = late
    preferences = Preferences({})
    query = Query(Segments(obs, obs), Segments(obs, obs), torch.zeros(len(obs), 2, 10), 0.0)
    preferences.add(query, Answer(torch.ones(len(obs)), torch.ones(len(obs), dtype=torch.bool)), 0)
    fit = option("updater", "pebble", fit={"least_steps": 1, "epochs": 1}).fit
    assert ("reward/renewed" in fit(steep_reward(), preferences, np.random.default_rng(0))) == renewed


def test_members_that_differ_or_can_still_learn_are_left_alone() -> None:
    reward = RewardEnsemble(2, 2, members=2, hidden=(16,), seed=0)
    same = Segments(torch.ones(4, 5, 2), torch.ones(4, 5, 2))  # all steps alike: a constant, and not saturated
    rng = np.random.default_rng(0)
    assert reward.renew_saturated(same, rng) == 0
    linear = RewardEnsemble(2, 2, members=2, hidden=(16,), output="linear", seed=0)
    with torch.no_grad():
        linear.members[0][-2].bias.fill_(-30.0)
    assert linear.renew_saturated(same, rng) == 0
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"least_steps": -1},
        {"pieces": 0},
        {"label_smoothing": 1.0},
        {"steps_per_label": 0.0},
        {"crop": [0.0, 1.0]},
        {"crop": [1.0, 0.5]},
        {"crop": [0.5]},
        {"shrink": -1.0},
        {"pieces": 0},
        {"stop_over": "all"},
    ],
    ids=str,
)
def test_fitting_refuses_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    [(name, _)] = wrong.items()
    with pytest.raises(ValueError, match=rf"updater\.fit\.{name}=.*; expected"):
        option("updater", "pebble", fit=wrong)


def test_crops_have_the_published_lengths_and_can_lie_anywhere() -> None:
    first, second = crops(4000, 16, 7, 13, np.random.default_rng(0))
    lengths = first.sum(1)
    assert torch.equal(lengths, second.sum(1)), "both segments of a pair keep the same number of steps"
    assert set(lengths.tolist()) == set(range(7, 14))
    for kept in (first, second):
        edges = (kept[:, 1:] != kept[:, :-1]).sum(1) + kept[:, 0].int() + kept[:, -1].int()
        assert (edges == 2).all(), "one piece without holes"
        starts = kept.int().argmax(1)
        assert set(starts[lengths == 7].tolist()) == set(range(10)), "the first and the last start occur"
    assert (first != second).any()


def test_crops_never_exceed_what_is_stored() -> None:
    first, _ = crops(500, 10, 7, 13, np.random.default_rng(0))  # no margin: an imported data set
    assert set(first.sum(1).tolist()) == {7, 8, 9, 10}


def test_several_whole_segments_of_a_pair_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"updater\.fit\.pieces=2; expected at least 1; 1 without a crop"):
        option("updater", "pebble", fit={"pieces": 2, "crop": None})


def test_several_pieces_of_a_pair_weigh_as_their_mean() -> None:
    reward, preferences = small_reward(members=1), answered(3, 6)
    kept = crops(4 * 3, 6, 3, 5, np.random.default_rng(0))
    sides, labels = (preferences.first, preferences.second), preferences.prefers_first
    loss, hits, decided, _ = answer_loss(reward, 0, *sides, labels, kept)
    each = [answer_loss(reward, 0, *sides, labels, (kept[0][i : i + 3], kept[1][i : i + 3])) for i in (0, 3, 6, 9)]
    assert loss.item() == pytest.approx(np.mean([one[0].item() for one in each]), rel=1e-5)
    assert (int(hits), int(decided)) == (sum(int(one[1]) for one in each), 12)


def accuracies(values: list[float], **limits: Any) -> dict[str, float]:
    """Train on one batch an epoch whose accuracy is given."""
    rest = iter(values)
    reward = small_reward(members=1)

    def loss(member: int, index: np.ndarray) -> Any:
        return next(reward.members[0].parameters()).sum(), torch.tensor(next(rest) * 10), torch.tensor(10)

    options = {"batch_size": 4, "max_epochs": 99, "stop_accuracy": 0.9, "rng": np.random.default_rng(0)}
    return train_epochs(reward, loss, 4, **(options | limits))


def test_the_stop_looks_at_the_last_epoch_or_at_all_steps() -> None:
    values = [0.5, 0.95, 1, 1, 1, 1, 1, 1]
    assert accuracies(values)["reward/steps"] == 2
    assert accuracies(values, stop_over="update")["reward/steps"] == 6  # 5.45 / 6 is the first mean above 0.9
    assert accuracies(values, stop_over="update", max_steps=3)["reward/steps"] == 3
    assert accuracies(values, max_steps=3, least_steps=5)["reward/steps"] == 5
