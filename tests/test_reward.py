"""The reward ensemble, its losses and its training."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from pbrl.fitting import train_epochs
from pbrl.losses import bradley_terry_loss, calibration_error, correct, log_likelihood, preference_logits
from pbrl.preferences import Preferences
from pbrl.reed import DynamicsAwareReward
from pbrl.reward import ACTIVATIONS, OUTPUTS, RewardEnsemble
from pbrl.types import Answer, Query, Segments
from tests.conftest import option


def test_bradley_terry_by_hand() -> None:
    first, second = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    labels = torch.tensor([1.0, 0.5])
    expected = (math.log(1 + math.exp(-2.0)) + math.log(2.0)) / 2
    assert bradley_terry_loss(first, second, labels).item() == pytest.approx(expected, abs=1e-6)


def test_bradley_terry_is_stable_for_huge_returns() -> None:
    first, second = torch.full((1, 50), 100.0), torch.full((1, 50), -100.0)
    assert bradley_terry_loss(first, second, torch.zeros(1)).item() == pytest.approx(10_000.0)
    assert bradley_terry_loss(first, second, torch.ones(1)).item() == 0.0


def test_the_gradient_of_the_log_likelihood_is_label_minus_probability() -> None:
    logits = torch.tensor([-2.0, 0.3, 5.0], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    log_likelihood(logits, labels).sum().backward()
    torch.testing.assert_close(logits.grad, labels - torch.sigmoid(logits.detach()))


def test_shapes_are_checked_at_the_door() -> None:
    with pytest.raises(ValueError, match=r"\[3, 2\] and \[3, 4\]"):
        preference_logits(torch.zeros(3, 2), torch.zeros(3, 4))


def test_equal_pairs_count_neither_as_right_nor_as_wrong() -> None:
    hits, decided = correct(torch.tensor([1.0, -1.0, 2.0]), torch.tensor([1.0, 1.0, 0.5]))
    assert (int(hits), int(decided)) == (1, 2)


def test_calibration_error_by_hand() -> None:
    logits = torch.logit(torch.tensor([0.85, 0.85, 0.25, 0.25]))
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert calibration_error(logits, labels) == pytest.approx((abs(0.85 - 0.5) * 2 + 0.25 * 2) / 4, abs=1e-6)
    assert math.isnan(calibration_error(torch.zeros(0), torch.zeros(0)))


def test_prediction_in_blocks_equals_the_forward_pass() -> None:
    reward = RewardEnsemble(5, 2, members=2, hidden=(8,), seed=3)
    rng = np.random.default_rng(0)
    obs, actions = rng.normal(size=(5000, 5)).astype(np.float32), rng.uniform(-1, 1, (5000, 2)).astype(np.float32)
    with torch.no_grad():
        whole = reward(torch.from_numpy(obs), torch.from_numpy(actions)).numpy()
    np.testing.assert_allclose(reward.predict(obs, actions), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [RewardEnsemble, DynamicsAwareReward, partial(RewardEnsemble, skip=True)])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("output", list(OUTPUTS))
def test_one_row_is_paid_as_many_are(kind: Callable[..., RewardEnsemble], activation: str, output: str) -> None:
    reward = kind(5, 2, members=2, hidden=(8, 9), activation=activation, output=output, seed=3)
    rng = np.random.default_rng(0)
    obs, actions = 9 * rng.normal(size=(3, 5)).astype(np.float32), rng.uniform(-1, 1, (3, 2)).astype(np.float32)
    together = reward.predict(obs, actions)
    for i in range(3):
        alone = reward.predict(obs[i : i + 1], actions[i : i + 1])
        assert alone.dtype == together.dtype and alone.shape == (2, 1)
        np.testing.assert_allclose(alone[:, 0], together[:, i], rtol=1e-5, atol=1e-6)


def test_a_member_with_a_skip_begins_linear_and_bends_where_answers_ask_for_it() -> None:
    """Preferred is what is near the middle: no linear function of the input orders that."""
    reward = RewardEnsemble(1, 1, members=2, hidden=(32,), sees_actions=False, learning_rate=1e-2, skip=True, seed=0)

    def before_the_tanh(x: float) -> np.ndarray:
        return np.arctanh(reward.predict(np.full((2, 1), x, np.float32), np.zeros((2, 1), np.float32))[:, 0])

    bend = before_the_tanh(-1.0) - 2 * before_the_tanh(0.0) + before_the_tanh(1.0)
    np.testing.assert_allclose(bend, 0.0, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    first, second = (2 * torch.rand(200, 4, 1, generator=generator) - 1 for _ in range(2))
    labels = (first.square().sum((1, 2)) < second.square().sum((1, 2))).float()
    pairs = Segments(first, torch.zeros_like(first)), Segments(second, torch.zeros_like(second))
    fit = option("updater", "pebble", fit={"shrink": 0.0, "crop": None, "least_steps": 300}).fit
    preferences = Preferences({})
    preferences.add(Query(*pairs, torch.zeros(200, 2, 4), 0.0), Answer(labels, torch.ones(200, dtype=torch.bool)), 0)
    fit(reward, preferences, np.random.default_rng(0))
    assert (before_the_tanh(-1.0) - 2 * before_the_tanh(0.0) + before_the_tanh(1.0) < -0.5).all()


def test_a_skips_gradient_is_that_of_central_differences() -> None:
    reward = RewardEnsemble(3, 2, members=1, hidden=(4, 4), activation="silu", skip=True, seed=1).double()
    with torch.no_grad():
        for parameter in reward.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    obs, actions = (torch.randn(5, size, dtype=torch.float64, requires_grad=True) for size in (3, 2))
    weights = tuple(reward.parameters())
    names = [name for name, _ in reward.named_parameters()]

    def rewards(obs: torch.Tensor, actions: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(reward, dict(zip(names, weights, strict=True)), (obs, actions))

    assert "members.0.skip.weight" in names
    assert torch.autograd.gradcheck(rewards, (obs, actions, *weights))


def test_a_skips_hidden_layers_alone_are_rounded() -> None:
    exact, rounded = (RewardEnsemble(3, 1, hidden=(16,), skip=True, precision=name) for name in ("fp32", "bf16"))
    obs, actions = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32), np.zeros((200, 1), np.float32)
    np.testing.assert_array_equal(rounded.predict(obs, actions), exact.predict(obs, actions))  # the linear function
    with torch.no_grad():
        for reward in (exact, rounded):
            for member in reward.members:
                member.layers[-2].weight.fill_(0.1)
    found, expected = rounded.predict(obs, actions), exact.predict(obs, actions)
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_a_member_that_starts_anew_begins_linear_again() -> None:
    reward = RewardEnsemble(2, 2, members=1, hidden=(8,), skip=True, seed=0)
    with torch.no_grad():
        for parameter in reward.parameters():
            parameter.fill_(2.0)
    ones = torch.ones(4, 5, 2)
    assert reward.renew_saturated(Segments(ones, ones), np.random.default_rng(0)) == 1
    assert not reward.members[0].layers[-2].weight.any()
    assert (reward.members[0].skip.weight != 2.0).all()


def test_members_differ_and_the_seed_decides() -> None:
    a, b, c = (RewardEnsemble(3, 1, hidden=(4,), seed=seed) for seed in (1, 1, 2))
    same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)]
    other = [torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True)]
    assert all(same)
    assert not any(other)
    assert not torch.equal(a.members[0][0].weight, a.members[1][0].weight)


def test_building_does_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    RewardEnsemble(3, 1, hidden=(4,), seed=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "options",
    [{"members": 0}, {"activation": "gelu"}, {"output": "softmax"}, {"precision": "fp8"}, {"skip": True, "hidden": ()}],
)
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RewardEnsemble(3, 1, **options)


def linear_task(pairs: int) -> tuple[Segments, Segments, torch.Tensor]:
    """Pairs whose better segment has the larger sum of the first observation entry."""
    rng = np.random.default_rng(1)
    sides = [
        Segments(
            torch.from_numpy(rng.normal(size=(pairs, 6, 3)).astype(np.float32)),
            torch.from_numpy(rng.uniform(-1, 1, (pairs, 6, 1)).astype(np.float32)),
        )
        for _ in range(2)
    ]
    return *sides, (sides[0].obs[..., 0].sum(1) > sides[1].obs[..., 0].sum(1)).float()  # type: ignore[return-value]


def test_training_learns_unseen_preferences() -> None:
    reward = RewardEnsemble(3, 1, hidden=(32,), learning_rate=3e-3)
    first, second, labels = linear_task(300)

    def loss(member: int, index: np.ndarray):
        a, b, y = first[index], second[index], labels[index]
        left, right = reward.member(member, a.obs, a.actions), reward.member(member, b.obs, b.actions)
        return bradley_terry_loss(left, right, y), *correct(preference_logits(left.detach(), right.detach()), y)

    rng = np.random.default_rng(0)
    metrics = train_epochs(reward, loss, 200, batch_size=32, max_epochs=400, stop_accuracy=0.97, rng=rng)
    assert metrics["reward/accuracy"] > 0.97
    assert metrics["reward/epochs"] < 400, "it must stop early"
    logits = reward.preference_logits(first[200:], second[200:]).mean(0)
    hits, decided = correct(logits, labels[200:])
    assert hits / decided > 0.8  # 100 unseen pairs; guessing: 0.8 has probability 6e-10


@pytest.mark.parametrize(
    "size, even, expected",
    [
        (65, True, [21, 22, 22]),
        (65, False, [32, 32, 1]),  # B-Pref's
        (64, True, [32, 32]),
        (33, True, [16, 17]),
        (7, True, [7]),
    ],
)
def test_an_epochs_steps_share_its_pairs_evenly(size: int, even: bool, expected: list[int]) -> None:
    reward, sizes = RewardEnsemble(3, 1, members=2, hidden=(4,)), {0: [], 1: []}
    seen: dict[int, list[int]] = {0: [], 1: []}

    def loss(member: int, index: np.ndarray):
        sizes[member].append(len(index))
        seen[member] += index.tolist()
        return next(reward.members[member].parameters()).sum(), torch.tensor(0), torch.tensor(1)

    rng = np.random.default_rng(0)
    options = {"batch_size": 32, "max_epochs": 2, "stop_accuracy": 2.0, "even_batches": even}
    assert train_epochs(reward, loss, size, rng=rng, **options)["reward/steps"] == 2 * len(expected)  # type: ignore[arg-type]
    for m in (0, 1):
        assert sizes[m] == 2 * expected
        assert sorted(seen[m]) == sorted(2 * list(range(size)))


def fitted(size: int, precision: str = "fp32") -> tuple[RewardEnsemble, dict[str, float]]:
    """Three epochs of Adam on `size` pairs in one batch."""
    first, second, labels = linear_task(size)
    reward = RewardEnsemble(3, 1, hidden=(32, 32), precision=precision)

    def loss(member: int, index: np.ndarray):
        a, b, y = first[index], second[index], labels[index]
        left, right = reward.member(member, a.obs, a.actions), reward.member(member, b.obs, b.actions)
        return bradley_terry_loss(left, right, y), *correct(preference_logits(left.detach(), right.detach()), y)

    rng = np.random.default_rng(0)
    metrics = train_epochs(reward, loss, size, batch_size=size, max_epochs=3, stop_accuracy=2.0, rng=rng)
    return reward, metrics


def test_training_in_blocks_equals_training_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, metrics = fitted(75)  # 32, 32, 11
    monkeypatch.setattr("pbrl.fitting.BLOCK_PAIRS", 75)
    whole, expected = fitted(75)
    for a, b in zip(blocks.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_bf16_training_and_prediction_stay_near_full_precision() -> None:
    (exact, _), (rounded, metrics) = fitted(64), fitted(64, "bf16")
    obs, actions = np.random.default_rng(2).normal(size=(200, 3)), np.zeros((200, 1))
    expected, found = (r.predict(obs.astype(np.float32), actions.astype(np.float32)) for r in (exact, rounded))
    assert found.dtype == np.float32
    assert not np.array_equal(expected, found)
    np.testing.assert_allclose(found, expected, atol=0.02)
    one = rounded.predict(obs[:1].astype(np.float32), actions[:1].astype(np.float32))
    np.testing.assert_allclose(one, found[:, :1], atol=0.02)
    assert metrics["reward/epochs"] == 3


def test_a_diverged_loss_is_reported() -> None:
    reward = RewardEnsemble(3, 1, hidden=(4,))

    def loss(member: int, index: np.ndarray):
        value = sum(p.sum() for p in reward.members[member].parameters()) * torch.nan
        return value, torch.tensor(0), torch.tensor(1)

    with pytest.raises(FloatingPointError, match="loss became nan in epoch 1"):
        train_epochs(reward, loss, 4, batch_size=2, max_epochs=3, stop_accuracy=1.0, rng=np.random.default_rng(0))


def test_no_pairs_train_nothing() -> None:
    reward = RewardEnsemble(3, 1, hidden=(4,))
    before = [p.clone() for p in reward.parameters()]
    metrics = train_epochs(
        reward,
        None,
        0,
        batch_size=2,
        max_epochs=3,
        stop_accuracy=1.0,
        rng=np.random.default_rng(0),  # type: ignore[arg-type]
    )
    assert metrics["reward/epochs"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, reward.parameters(), strict=True))


def test_a_checkpoint_does_not_change_an_optimisers_settings() -> None:
    reward = RewardEnsemble(2, 1, learning_rate=1e-3)
    state = reward.state()
    state["optimizer"]["param_groups"][0] |= {"lr": "x", "amsgrad": True}
    reward.load_state(state)
    (settings,) = reward.optimizer.param_groups
    assert (settings["lr"], settings["amsgrad"]) == (1e-3, False)
