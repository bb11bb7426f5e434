"""Is it the reward or the agent that fails? `python -m experiments.blame RUN --to FOLDER --steps 10000`.

FOLDER/task    the run goes on from its last checkpoint, all its steps paid by the task: if the agent recovers, it was
               the reward that held it back
FOLDER/anew    a new agent, from step 0, on the reward of that checkpoint, which learns no more: if it fails as well,
               it is not that the agent had got stuck

Both are runs like any other, with true returns in metrics.jsonl; `resume` would pay them otherwise, so do not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.utils import instantiate

from pbrl.launch.build import build
from pbrl.launch.configuration import ConfigError
from pbrl.launch.stored import read_config
from pbrl.learned_reward import load_reward
from pbrl.loop import Loop
from pbrl.records.checkpoint import CheckpointError


def paid_by_the_task(run: Path, to: Path, steps: int, trust: Sequence[str] = ()) -> Loop:
    """A copy of the run in `to`, ready to go on for `steps` more, its replay paid by the task.

    Args:
        trust: modules of your own that the run's config may name.

    Raises:
        ConfigError: if there is no run whose reward was learned, or its first steps are no longer kept.
    """
    cfg, choices = read_config(run, trust)
    if choices.get("updater") == "oracle":
        raise ConfigError(f"{run}: its agent was paid by the task all along (updater=oracle)")
    shutil.copytree(run, to)
    cfg.resume, cfg.trust = str(to), list(trust)
    loop = build(cfg, choices, [])
    replay, rollouts = loop.agent.replay_buffer, loop.parts.rollouts
    if replay.size() != rollouts.total or rollouts.total > rollouts.capacity:
        loop.release()
        raise ConfigError(f"{run}: of its first steps the task's rewards are no longer kept (feedback.memory_steps)")
    loop.asks = False
    loop.agent.pay_by(None)
    if replay.deviations is not None:  # of a pay that moves: the task's has none
        replay.deviations[:] = 0
    replay.rewards[: rollouts.total, 0] = rollouts.task_rewards[: rollouts.total]
    loop.total_steps, loop.due.eval = loop.step + steps, loop.step
    return loop


def paid_by_the_last_reward(run: Path, to: Path, steps: int, trust: Sequence[str] = ()) -> Loop:
    """A new agent of the run's settings in `to`, paid by the reward of the run's last checkpoint for `steps` steps.

    Args:
        trust: modules of your own that the run's config may name.

    Raises:
        ConfigError, CheckpointError: as `pbrl.learned_reward.load_reward`.
    """
    cfg, choices = read_config(run, trust)
    reward, step = load_reward(run, instantiate(cfg.env, _convert_="all"), trust)
    for key in {"disagreement_bonus", "pessimism"} & cfg.reward.keys():  # of the run's own reward, which nobody asks
        cfg.reward[key] = 0.0
    cfg.updater, cfg.total_steps = {"_target_": "pbrl.updaters.oracle.Oracle"}, steps
    cfg.run_dir, cfg.resume = str(to), None
    loop = build(cfg, choices | {"updater": "oracle"}, [])
    loop.agent.pay_by(lambda obs, actions: reward.pay(reward.predict(obs, actions), step))
    return loop


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.blame", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=10000, help="environment steps of each (default: 10000)")
    parser.add_argument("--trust", nargs="*", default=[], help="modules of your own that the run's config may name")
    options = parser.parse_args(arguments)
    try:
        if options.to.exists():
            raise ConfigError(f"--to {options.to}: expected a new folder")
        for name, made in (("task", paid_by_the_task), ("anew", paid_by_the_last_reward)):
            try:
                loop = made(options.run, options.to / name, options.steps, options.trust)
            except (ConfigError, CheckpointError):  # a copy that cannot go on would be taken for a run
                shutil.rmtree(options.to / name, ignore_errors=True)
                if options.to.exists() and not any(options.to.iterdir()):
                    options.to.rmdir()
                raise
            origin = f"python -m experiments.blame {options.run} --to {options.to} --steps {options.steps}"
            (options.to / name / "command.txt").write_text(origin + "\n")
            try:
                loop.run()
            finally:
                loop.close(loop.step >= loop.total_steps)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
