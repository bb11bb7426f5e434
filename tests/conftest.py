"""Shared by all tests: one torch thread a worker, no display, no W&B account, and tiny runs of the real loop."""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)
os.environ["WANDB_SILENT"] = "true"

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import pbrl.asking
from envs.pointmass import PointMass
from experiments.faults.runs import TINY
from pbrl.agent.sac import PreferenceSAC
from pbrl.asking import AnswerJournal
from pbrl.interfaces import as_teacher
from pbrl.launch.build import build
from pbrl.launch.configuration import register_resolvers
from pbrl.launch.shipped import make
from pbrl.loop import Loop, Stopped
from pbrl.pay import Pay
from pbrl.reward import RewardEnsemble
from pbrl.types import Answer, Query

torch.set_num_threads(1)
register_resolvers()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background: processes
    signal.signal(signal.SIGINT, signal.default_int_handler)  # that tests start would ignore Ctrl-C too

option = make  # what a shipped option describes: so that what is tested is what is run


def point_mass_agent(**changes: Any) -> PreferenceSAC:
    """The default agent on the point mass, not compiled."""
    made: PreferenceSAC = option("agent", "sac", env=PointMass(seed=0), seed=0, **{"compile": False, **changes})
    return made


def config(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
    """The composed config and the chosen options, as `python -m pbrl.train` has them."""
    return copy.deepcopy(_composed(overrides))


@functools.cache  # a fifth of a second each, hundreds of times
def _composed(overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    with initialize_config_module("pbrl.conf", version_base="1.3"):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
    choices = {name: str(choice) for name, choice in cfg.hydra.runtime.choices.items() if "/" not in name}
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    OmegaConf.set_struct(cfg, True)
    return cfg, choices


def tiny_loop(run_dir: Path, *overrides: str) -> Loop:
    """A tiny run, built and ready; of the steps that our fitting takes at least it takes a fifth."""
    cfg, choices = config(*TINY, *overrides)
    cfg.run_dir = str(run_dir)
    if OmegaConf.select(cfg, "updater.fit.least_steps") == 100:
        cfg.updater.fit.least_steps = 20
    return build(cfg, choices, [])


def ask(teacher: Any, query: Query, journal: AnswerJournal) -> Answer:
    """`pbrl.asking.ask` of whatever can be called."""
    return pbrl.asking.ask(as_teacher(teacher), query, journal)


def finish(loop: Loop) -> dict[str, Any]:
    """Run to the end and close."""
    complete = False
    try:
        summary = loop.run()
        complete = True
    finally:
        loop.close(complete)
    return summary


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the columns that measure time."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


class PaidMean(RewardEnsemble):
    """Its mean is what an agent with convexity 2 is paid for it."""

    def mean(self, obs: Tensor, actions: Tensor) -> Tensor:
        return Pay(convexity=2.0).convex(super().mean(obs, actions))


def stopped_and_resumed(folder: Path, at: int, *overrides: str) -> Loop:
    """A tiny run in `folder`/halves, stopped at step `at` and loaded again; uninterrupted in `folder`/whole.

    What is returned is to be finished; then `rows` of both are equal.
    """
    finish(tiny_loop(folder / "whole", *overrides))
    loop = tiny_loop(folder / "halves", *overrides)
    loop.stop = lambda: loop.step >= at
    with pytest.raises(Stopped):
        loop.run()
    loop.close(False)
    cfg, choices = config(*TINY, f"resume={folder / 'halves'}")
    return build(cfg, choices, [])


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished tiny run."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    finish(tiny_loop(run_dir))
    return run_dir
