"""One training run from a composed config: interrupts, the closing lines, and what to do when it fails."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pbrl.asking import TeacherError
from pbrl.files import printable
from pbrl.launch.build import build
from pbrl.launch.command import evaluate_command, train_command
from pbrl.launch.configuration import LONGEST_MESSAGE
from pbrl.launch.stored import lock, trust_of
from pbrl.loop import Stopped


class Interrupts:
    """Ctrl-C and SIGTERM ask the run to stop at the next step; while the teacher is busy they interrupt it.

    A second Ctrl-C stops at once, without saving. (A second SIGTERM does not: schedulers repeat theirs.)
    """

    def __init__(self) -> None:
        self.requested = False
        self.asking = False

    def __enter__(self) -> Interrupts:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {sig: signal.signal(sig, self._handle) for sig in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        if self._main:
            for sig, handler in self._before.items():
                signal.signal(sig, handler)

    def _handle(self, signum: int, frame: Any) -> None:
        again, self.requested = self.requested, True
        if self.asking or (again and signum == signal.SIGINT):
            raise KeyboardInterrupt
        print("\nstopping after this step, then saving (Ctrl-C again: stop at once)", file=sys.stderr)

    def set_asking(self, asking: bool) -> None:
        """The teacher is busy, or is no longer: meanwhile an interrupt, also one just before, does not wait for it."""
        self.asking = asking
        if asking and self.requested:
            raise KeyboardInterrupt


def run(cfg: DictConfig, choices: dict[str, str], overrides: list[str], locked: bool = False) -> dict[str, Any]:
    """One training run from a composed config; returns its summary.

    Args:
        locked: the caller holds the lock of the run's folder (`pbrl.launch.stored.lock`); else it is taken here.

    Raises:
        ConfigError: before anything starts, if the config cannot work.
    """
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:

        def hold(run_dir: Path) -> None:
            if not locked:
                stack.enter_context(lock(run_dir))

        if isinstance(cfg.resume, str) and Path(cfg.resume).is_dir():
            hold(Path(cfg.resume))
        loop = build(cfg, choices, overrides, hold)
        loop.stop, loop.on_asking = (lambda: interrupts.requested), interrupts.set_asking
        resume = train_command(loop.run_dir, trust_of(loop.run_dir))
        complete = False
        try:
            summary = loop.run()
            complete = True
        except Stopped:
            print(f"\nstopped at step {loop.step} and saved; go on with\n  {resume}")
            raise SystemExit(130) from None
        except KeyboardInterrupt:
            print(f"\nstopped at once; go on from the last checkpoint with\n  {resume}", file=sys.stderr)
            raise SystemExit(130) from None
        except (TeacherError, FloatingPointError, OSError, ValueError) as error:
            saved = "everything is saved" if isinstance(error, TeacherError) else "the last checkpoint is kept"
            said = printable(error, LONGEST_MESSAGE)
            print(f"\nerror at step {loop.step}: {said}\n{saved}; go on with\n  {resume}", file=sys.stderr)
            raise SystemExit(1) from error
        finally:
            _close(loop, complete)
    print_summary(summary, loop.run_dir)
    return summary


def _close(loop: Any, complete: bool) -> None:
    try:
        loop.close(complete)
    except OSError as error:  # a full disk, most likely: what is in the checkpoints is not affected
        print(f"summary.json or the log could not be closed: {error}", file=sys.stderr)


def print_summary(summary: dict[str, Any], run_dir: Path) -> None:
    """The closing lines: numbers and paths."""
    shown = {
        "success": "eval/success",
        "share of the oracle's return": "eval/normalized_return",
        "labels": "feedback/labels",
        "right on random recent pairs": "reward/recent_accuracy",
        "right on the pairs asked about": "reward/holdout_accuracy",
        "seconds": "time/wall",
    }
    early = summary["env_step"] < summary["total_steps"]
    print(f"\n{'stopped by a callback' if early else 'finished'} at step {summary['env_step']}")
    print(f"  {'true return':30} {summary['eval/return']:.4g} (of the mean policy, at step {summary['eval_step']})")
    for name, key in shown.items():
        if summary.get(key) is not None:
            print(f"  {name:30} {summary[key]:.4g}")
    print(f"  {'metrics':30} {run_dir / 'metrics.jsonl'}")
    print(f"  {'checkpoints':30} {run_dir / 'checkpoints'}")
    if films := sorted((run_dir / "videos").glob("eval_*.mp4")):
        print(f"  {'film of the last evaluation':30} {films[-1]}")
    trust = trust_of(run_dir, ("env", "agent", "reward"))
    print(f"  {'watch it':30} {evaluate_command(run_dir, trust, '--video')}")
