"""Configs that earlier versions stored: they read, build and mean what they meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pbrl.launch.configuration import check
from pbrl.launch.stored import read_config
from pbrl.upgrade import upgrade
from tests.conftest import config

ROOT = Path(__file__).parent.parent
STORED = sorted(ROOT.glob("experiments/results/first-light/*/*/config.yaml"))

FLAT = {"epochs": 50, "batch_size": 32, "stop_accuracy": 0.97, "least_steps": 100, "crop": 0.3, "shrink": 0.3}
PUBLISHED = FLAT | {"batch_size": 128, "least_steps": 0, "crop": 0.0, "shrink": 0.0}


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.parent.name}/{path.parent.name}")
def test_every_stored_run_still_reads(path: Path) -> None:
    cfg, _ = read_config(path.parent)
    check(cfg)
    updater: Any = instantiate(cfg.updater, _convert_="all")
    if updater.pairs == "none":
        return
    old = OmegaConf.load(path).updater
    fit = updater.fit
    assert (fit.batch_size, fit.least_steps, fit.shrink) == (
        old.batch_size,
        old.get("least_steps", 0),
        old.get("shrink", 0.0),
    )
    assert fit.crop_lengths(50)[0] == round((1 - old.get("crop", 0.0)) * 50)


def stored(updater: dict[str, Any]) -> dict[str, Any]:
    return {"segment_length": 20, "updater": updater}


def fitted(**options: Any) -> dict[str, Any]:
    """What an upgraded updater's fit is."""
    config = stored(options)
    upgrade(config)
    fit: dict[str, Any] = config["updater"]["fit"]
    return fit


def test_the_flat_values_of_a_fitting_become_its_node() -> None:
    ours = OmegaConf.to_container(config("env=pointmass", "updater=pebble")[0].updater.fit, resolve=True)
    published = OmegaConf.to_container(config("env=pointmass", "updater=pebble-published")[0].updater.fit, resolve=True)
    assert ours["even_batches"] and not published["even_batches"]
    for target in ("pebble.Pebble", "aparl.APARL", "penalty.Penalty"):
        assert fitted(_target_=f"pbrl.updaters.{target}", **FLAT) == ours | {"even_batches": False}
    assert fitted(_target_="pbrl.updaters.mrn.Mrn", epochs=50, batch_size=128, stop_accuracy=0.97) == published


def test_surfs_crops_were_steps_and_are_shares() -> None:
    old = {"_target_": "pbrl.updaters.surf.Surf", "epochs": 50, "batch_size": 128, "stop_accuracy": 1.1}
    old |= {"steps_per_label": 7.8125, "crop": 2}
    upgraded = stored(dict(old))
    upgrade(upgraded)
    assert upgraded["updater"]["fit"]["crop"] == [0.9, 1.1]
    assert upgraded["updater"]["segment_length"] == 20
    assert "crop" not in upgraded["updater"]
    assert fitted(**old | {"crop": 0})["crop"] is None


def test_what_rime_wraps_is_upgraded_too() -> None:
    inner = {"_target_": "pbrl.updaters.pebble.Pebble", **PUBLISHED, "epochs": 1, "stop_accuracy": 1.1}
    upgraded = stored({"_target_": "pbrl.updaters.rime.Rime", "epochs": 50, "stop_accuracy": 0.98, "inner": inner})
    upgrade(upgraded)
    assert upgraded["updater"]["inner"]["fit"]["epochs"] == 1
    assert (upgraded["updater"]["epochs"], upgraded["updater"]["stop_accuracy"]) == (50, 0.98), "RIME's own stay"


def test_the_horizon_of_v_is_a_trajectory_length() -> None:
    for name in ("implicit", "walk"):
        upgraded = stored({"_target_": "pbrl.updaters.aparl.APARL", **FLAT, name: {"horizon": 25}})
        upgrade(upgraded)
        assert upgraded["updater"][name] == {"trajectory_length": 25}


@pytest.mark.parametrize("name", ["pebble", "surf", "rime", "aparl", "penalty", "mrn", "oracle"])
def test_a_config_of_today_stays_as_it_is(name: str) -> None:
    now: Any = OmegaConf.to_container(config("env=pointmass", f"updater={name}")[0], resolve=True)
    same: Any = OmegaConf.to_container(config("env=pointmass", f"updater={name}")[0], resolve=True)
    upgrade(now)
    assert now == same


@pytest.mark.parametrize("wrong", ["text", [], {"a": 1}, None, True, float("nan")], ids=str)
def test_nonsense_is_left_to_be_refused(wrong: Any) -> None:
    for name in ("pebble.Pebble", "surf.Surf"):
        for key in ("crop", "epochs", "_target_", "inner", "implicit"):
            node = {"_target_": f"pbrl.updaters.{name}", **FLAT, key: wrong}
            upgrade({"segment_length": wrong, "updater": node})
            upgrade({"updater": node})


@pytest.mark.parametrize(("stored", "share"), [({}, 0.0), ({"at_least": 1}, 0.0), ({"at_least": 9}, 0.36)])
def test_pairs_that_a_session_asked_at_least_become_a_share(stored: dict[str, Any], share: float) -> None:
    old = {"feedback": {"per_session": 25, **stored}, "updater": {}}
    upgrade(old)
    assert old["feedback"] == {"per_session": 25, "decay_to": share}


@pytest.mark.parametrize("per_session", [None, "many", 0, 5])
def test_a_share_of_what_is_no_number_stays_as_it_is_to_be_refused(per_session: Any) -> None:
    old = {"feedback": {"per_session": per_session, "at_least": 9}, "updater": {}}
    upgrade(old)
    assert old["feedback"] == {"per_session": per_session, "at_least": 9}


@pytest.mark.parametrize("stored", [{}, {"pretraining": {"steps": 1000}}, {"pretraining": {"whiten": True}}])
def test_pretraining_was_not_whitened_before_there_was_a_key_for_it(stored: dict[str, Any]) -> None:
    """Today's default of Meta-World's tasks is: a resumed run would have been paid another novelty."""
    expected = {"whiten": False, **stored.get("pretraining", {})}
    old = {**stored, "updater": {}}
    upgrade(old)
    assert old["pretraining"] == expected
