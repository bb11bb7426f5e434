"""Runs to be broken: `python -m pbrl.train` on the point mass, in processes of their own that can be killed.

A process is a fork of this one, which has imported everything, and calls the same entry with the same arguments: fifty
starts would otherwise be mostly imports. `real=True` starts `python -m pbrl.train` itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pbrl.launch.build
import pbrl.loop
import pbrl.train
from experiments.faults.parts import kill_at_write

# A whole preference run in about a second: every phase happens, nothing has time to become good. The tests' too.
TINY = (
    "env=pointmass",
    "updater=pebble",
    "threads=1",
    "total_steps=600",
    "segment_length=10",
    "agent.learning_starts=100",
    "agent.net_arch=[16,16]",
    "agent.batch_size=32",
    "agent.buffer_size=10000",
    "reward.hidden=[16,16]",
    "pretraining.steps=100",
    "pretraining.updates=5",
    "feedback.budget=15",
    "feedback.per_session=5",
    "feedback.every=100",
    "eval.every=250",
    "eval.episodes=2",
    "checkpoint_every=300",
    "log_every=100",
)
SMALL = (  # to be broken: often stored, and its rings wrap
    *TINY,
    "device=cpu",
    "total_steps=700",
    "checkpoint_every=30",
    "log_every=50",
    "segment_length=20",
    "pretraining.updates=10",
    "agent.buffer_size=400",
    "reward.hidden=[16]",
    "feedback.every=60",
    "feedback.budget=80",
    "feedback.per_session=10",
    "feedback.memory_steps=300",
    "updater.fit.epochs=4",
    "updater.fit.least_steps=6",
    "eval.every=200",
)


@dataclass
class Process:
    """A running training: its process id and the file with everything it prints."""

    pid: int
    output: Path

    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait_for(self, text: str, seconds: float = 1800) -> bool:
        """Until the process has printed `text` (True) or ended (False)."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if text in self.said():
                return True
            if self.ended() is not None:
                return text in self.said()
            time.sleep(0.005)
        raise TimeoutError(f"no {text!r} within {seconds} s:\n{self.said()}")

    def ended(self) -> int | None:
        """The exit code (−9: killed) if it has ended."""
        if not hasattr(self, "_code"):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == 0:
                return None
            self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, seconds: float = 1800) -> int:
        """The exit code, when it ends."""
        end = time.monotonic() + seconds
        while (code := self.ended()) is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"process still running after {seconds} s:\n{self.said()}")
            time.sleep(0.01)
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


def start(
    arguments: Sequence[str], output: Path, fault: str = "", real: bool = False, killed_at: int | None = None
) -> Process:
    """`python -m pbrl.train ARGUMENTS` with PBRL_FAULT=fault; `killed_at`: see `parts.kill_at_write`."""
    output.unlink(missing_ok=True)
    environment = {**os.environ, "PBRL_FAULT": fault}
    if real:
        with output.open("wb") as file:
            command = [sys.executable, "-m", "pbrl.train", *arguments]
            child = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        child.returncode = 0  # waited for by Process, not by Popen
        return Process(child.pid, output)
    pid = os.fork()
    if pid:
        return Process(pid, output)
    code = 1
    try:
        os.environ.update(environment)
        handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv = ["pbrl.train", *arguments]
        if killed_at is not None:
            kill_at_write(killed_at)
        pbrl.train.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def fresh(run_dir: Path, *more: str) -> list[str]:
    """Arguments of a new small run."""
    fits = "updater=rime" not in more  # the others have updater.fit
    return [*(option for option in SMALL if fits or "fit" not in option), f"run_dir={run_dir}", *more]


def resumed(run_dir: Path) -> list[str]:
    """Arguments that go on with it."""
    return [f"resume={run_dir}", "trust=[experiments.faults.parts]"]
