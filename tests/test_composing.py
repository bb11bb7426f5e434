"""Options of different methods compose, resume, or are refused with a reason."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from envs.pointmass import PointMass
from pbrl.launch.configuration import ConfigError
from tests.conftest import finish, rows, stopped_and_resumed, tiny_loop


class Stateless(PointMass):
    """A simulator that cannot be set back."""

    def __init__(self, horizon: int = 50, seed: int | None = None) -> None:
        super().__init__(horizon, seed)
        self.state_size = 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("updater=aparl", "query=disagreement", "agent.hybrid_ratio=0.5", "teacher=mistake"),
        ("updater=surf", "query=k-center-disagreement", "reward=reed", "teacher=equal"),
        ("updater=mrn", "updater.meta_every=50", "query=near-policy", "reward.disagreement_bonus=0.05"),
        ("updater=rime", "updater.warm_updates=20", "query=branch", "teacher=skip", "agent.hybrid_ratio=0.5"),
    ],
    ids=lambda options: options[0].split("=")[1],
)
def test_options_compose(tmp_path: Path, options: tuple[str, ...]) -> None:
    fast = ("reward.embedding=16", "reward.max_updates=20") if "reward=reed" in options else ()
    surf = ("updater.fit.steps_per_label=0.5", "updater.unlabelled_per_label=4") if "updater=surf" in options else ()
    summary = finish(tiny_loop(tmp_path / "run", *options, *fast, *surf))
    assert summary["complete"]
    assert summary["feedback/asked"] >= 10, "steps of fresh rollouts and branches are environment steps too"
    assert math.isfinite(summary["eval/return"])


RESUMED = {
    "surf": ("updater=surf", "updater.fit.steps_per_label=0.5", "updater.unlabelled_per_label=4"),
    "mrn": ("updater=mrn", "updater.meta_every=30"),
    "rime": ("updater=rime", "updater.warm_updates=20", "updater.epochs=3"),
    "reed": ("reward=reed", "reward.embedding=16", "reward.max_updates=20"),
    "rune-qpa": ("reward.disagreement_bonus=0.1", "agent.hybrid_ratio=0.5", "query=near-policy"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    finish(stopped_and_resumed(tmp_path, 330, *RESUMED[name]))
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("updater=oracle", "reward.disagreement_bonus=0.05"), "learns no reward"),
        (("reward.disagreement_bonus=0.05", "reward.members=1", "query=uniform"), "members of at least 2"),
        (("reward.members=1",), "query.score=disagreement"),
        (("query=branch", "env._target_=tests.test_composing.Stateless"), "branch_share"),
        (("updater=oracle", "import_preferences=some.npz"), "import_preferences"),
        (("agent.hybrid_ratio=2",), "hybrid_ratio"),
        (("updater=surf", "updater.fit.crop=[1.0, 6.0]"), "segment_length"),
    ],
)
def test_senseless_combinations_are_refused_before_anything_starts(
    tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        tiny_loop(tmp_path / "run", *options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
