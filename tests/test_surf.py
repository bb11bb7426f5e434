"""SURF: PEBBLE with both its parts off; pseudo-labels and crops as published."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pbrl.updaters.surf import pseudo_label_loss
from tests.conftest import finish, option, rows, tiny_loop
from tests.preference_problem import answered, session, small_reward


def test_surf_without_unlabelled_pairs_and_crops_equals_pebble_bit_for_bit() -> None:
    preferences = answered(40)
    trained = []
    off = {
        "fit": {"epochs": 5, "crop": None, "steps_per_label": None, "stop_accuracy": 0.97},
        "unlabelled_per_label": 0,
    }
    for updater in (option("updater", "pebble-published", fit={"epochs": 5}), option("updater", "surf", **off)):
        reward = small_reward()
        metrics = updater.update(reward, preferences, session())
        trained.append((reward.state_dict(), metrics))
    assert trained[0][1] == trained[1][1]
    for name, weights in trained[0][0].items():
        assert torch.equal(weights, trained[1][0][name]), name


@pytest.mark.slow
def test_a_whole_surf_run_with_both_options_off_equals_a_pebble_run(tmp_path: Path) -> None:
    off = ("updater.fit.crop=null", "updater.unlabelled_per_label=0", "updater.fit.steps_per_label=null")
    finish(tiny_loop(tmp_path / "pebble", "updater=pebble-published"))
    finish(tiny_loop(tmp_path / "surf", "updater=surf", *off, "updater.fit.stop_accuracy=0.97"))
    assert rows(tmp_path / "pebble") == rows(tmp_path / "surf")


def test_pseudo_labels_count_only_above_the_confidence() -> None:
    logits = torch.tensor([5.0, -5.0, 1.0])  # sigmoid(5) = 0.9933, sigmoid(1) = 0.73
    cropped = torch.tensor([2.0, 3.0, -4.0])
    loss, share = pseudo_label_loss(logits, cropped, confidence=0.99)
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(3))) / 3  # labels 1 and 0; the third row counts as zero
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(share) == pytest.approx(2 / 3)


def test_surf_draws_unlabelled_pairs_per_label_and_keeps_the_newest() -> None:
    few = {"fit": {"epochs": 1, "steps_per_label": None, "crop": [0.7, 1.3]}, "segment_length": 6}
    surf = option("updater", "surf", **few, unlabelled_per_label=3, unlabelled_kept=50)
    preferences = answered(10, margin=2)
    surf.update(small_reward(), preferences, session())
    assert surf.unlabelled is not None
    assert surf.unlabelled[0].obs.shape == (30, 10, 2), "with the margins around the six steps"
    old = surf.unlabelled[0].obs[-20:]
    surf.update(small_reward(), preferences, session(seed=1))
    assert len(surf.unlabelled[0]) == 50
    assert torch.equal(surf.unlabelled[0].obs[:20], old)


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "steps"), [(10, 79), (200, 1563)])
def test_surf_takes_the_published_number_of_gradient_steps(labels: int, steps: int) -> None:
    """ceil(1000 · labels / 128), the last epoch cut short."""
    surf = option("updater", "surf", task="walker-walk", unlabelled_per_label=0, fit={"crop": None})
    metrics = surf.update(small_reward(members=1, hidden=[2]), answered(labels, 2), session())
    assert metrics["reward/steps"] == steps


@pytest.mark.parametrize(("labels", "kept", "expected"), [(10, 10_000, 512), (10, 300, 300), (200, 10_000, 512)])
def test_surf_has_as_many_pseudo_labels_a_step_however_few_answers(
    labels: int, kept: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SURF: mu · 128 unlabelled pairs, or all there are."""
    fit = {"steps_per_label": None, "epochs": 1, "crop": None}
    surf = option("updater", "surf", fit=fit, unlabelled_per_label=100, unlabelled_kept=kept)
    drawn: list[int] = []
    pseudo = surf._pseudo_labels

    def counted(reward: Any, member: int, index: Any, *rest: Any) -> Any:
        drawn.append(len(index))
        return pseudo(reward, member, index, *rest)

    monkeypatch.setattr(surf, "_pseudo_labels", counted)
    metrics = surf.update(small_reward(hidden=[2]), answered(labels, 2), session())
    assert sum(drawn) == expected * 2 * metrics["reward/steps"]  # two members
    assert 0 <= metrics["surf/confident"] <= 1


def test_surf_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    few = {"fit": {"epochs": 1, "steps_per_label": None}, "unlabelled_per_label": 2, "segment_length": 12}
    surf = option("updater", "surf", **few)
    surf.update(small_reward(), answered(5, 12, margin=1), session())
    torch.save(surf.state_dict(), tmp_path / "state.pt")
    other = option("updater", "surf", **few)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert surf.unlabelled is not None
    assert other.unlabelled is not None
    for side, restored in zip(surf.unlabelled, other.unlabelled, strict=True):
        assert torch.equal(side.obs, restored.obs)
        assert torch.equal(side.actions, restored.actions)
    fresh = option("updater", "surf")
    fresh.load_state_dict(option("updater", "surf").state_dict())
    assert fresh.unlabelled is None
