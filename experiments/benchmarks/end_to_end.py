"""Environment steps per second: of the simulators alone, and of a whole preference run with its cost split."""

from __future__ import annotations

import resource
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from stable_baselines3 import SAC

from experiments.benchmarks.parts import straightforward
from pbrl import fitting
from pbrl.launch.build import build
from pbrl.launch.configuration import register_resolvers
from pbrl.loop import Loop

TASKS = ("door-open", "button-press", "walker-walk", "cheetah-run")
STEPS = 2000  # of each whole run: 500 random, then pretraining, three sessions, two evaluations
OVERRIDES = (
    f"total_steps={STEPS}",
    "threads=1",
    "agent.learning_starts=500",
    "pretraining.steps=300",
    "pretraining.updates=10",
    "feedback.every=400",
    "feedback.budget=60",
    "feedback.per_session=20",
    "eval.every=1000",
    "eval.episodes=1",
    "checkpoint_every=1000",
)


def config(*overrides: str) -> Any:
    """The composed config."""
    register_resolvers()
    with initialize_config_module("pbrl.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides))


def simulators() -> list[dict[str, Any]]:
    """Random actions, one environment at a time."""
    rows = []
    for task in TASKS:
        env = instantiate(config(f"env={task}").env)
        rng = np.random.default_rng(0)
        env.reset(seed=0)
        began = time.process_time()
        for _ in range(1000):
            *_, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
            if terminated or truncated:
                env.reset()
        rows.append({"task": task, "steps_per_cpu_second": 1000 / (time.process_time() - began)})
    return rows


class Split:
    """Processor time by part, each part's without the parts called within it (relabelling is with the pay in it)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []
        self._part = ""

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """Count the time of `owner.method` as `part`."""
        call: Callable[..., Any] = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._part == "relabel":
                return call(*args, **kwargs)
            outer, self._part = self._part, part
            began = time.process_time()
            self._inner.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                spent, inner = time.process_time() - began, self._inner.pop()
                self._part = outer
                self.seconds[part] = self.seconds.get(part, 0.0) + spent - inner
                if self._inner:
                    self._inner[-1] += spent

        setattr(owner, method, counted)


def slow_down(loop: Loop) -> None:
    """Stock SB3's `train`, the straightforward pay and reward training; the rest of the run is the same."""
    agent, ensemble = loop.agent, loop.parts.reward
    for optimizer in (agent.actor.optimizer, agent.critic.optimizer):
        optimizer.param_groups[0]["fused"] = None  # SB3's default
    agent.train = types.MethodType(SAC.train, agent)  # type: ignore[method-assign]
    ensemble.predict = lambda obs, actions: np.stack(  # type: ignore[method-assign]
        [straightforward(ensemble, obs, actions)[:, 0]]
    )


VARIANTS = {
    "ours, fp32 compiled": ("agent.compile=true",),
    "ours, bf16 compiled": ("agent.compile=true", "agent.precision=bf16"),
    "stock": ("agent.compile=false",),
}


def whole_run(variant: str, folder: str) -> dict[str, Any]:
    """One run of door-open at the published setting, without the time that compiling takes; see the module's text."""
    fixed = (
        "env=door-open",
        "experiment=published",
        "updater=pebble-published",
        f"run_dir={folder}/{list(VARIANTS).index(variant)}",
    )
    cfg = config(*fixed, *OVERRIDES, *VARIANTS[variant])
    loop = build(cfg, {"env": "door-open", "updater": "pebble-published"}, [])
    pairs = fitting.BLOCK_PAIRS
    if variant == "stock":
        slow_down(loop)
        fitting.BLOCK_PAIRS = int(cfg.updater.fit.batch_size)
    loop.agent.prepare()
    split, agent = Split(), loop.agent
    split.wrap(agent, "train", "update")
    split.wrap(loop.parts.updater, "update", "reward")
    split.wrap(agent.replay_buffer, "relabel", "relabel")
    split.wrap(loop, "_evaluate", "evaluation")
    split.wrap(loop, "_pay", "pay")
    split.wrap(loop, "save", "checkpoint")
    split.wrap(agent.training_env, "step", "simulator")
    split.wrap(agent, "_sample_action", "acting")
    split.wrap(loop.questions, "select", "questions")
    split.wrap(loop.diary, "session", "metrics")
    began, wall = time.process_time(), time.perf_counter()
    try:
        loop.run()
    finally:
        fitting.BLOCK_PAIRS = pairs
    cpu = time.process_time() - began
    shares = {f"{part}_share": seconds / cpu for part, seconds in sorted(split.seconds.items())}
    return {
        "variant": variant,
        "steps_per_second": cfg.total_steps / (time.perf_counter() - wall),
        "steps_per_cpu_second": cfg.total_steps / cpu,
        **shares,
        "other_share": 1 - sum(shares.values()),
        "process_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def run() -> list[dict[str, Any]]:
    """Each variant in turn, two times; the first round warms up and is shown too."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return [whole_run(variant, f"{folder}/{turn}") for turn in range(2) for variant in VARIANTS]
