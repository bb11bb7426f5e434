"""Break runs in every way known, go on with them, and compare with runs that nothing happened to.

    python -m experiments.faults [--kills 52] [--out experiments/results/faults]

Writes table.md and table.csv: fault, times, outcome. A fault's outcome is "same" if the run, continued, equals the
undisturbed one bit for bit (see `same.py`), and "one error" if the process ended with exit code 1 or 2, one message
and no traceback. Exit code 1 if anything else happened. Needs root for the disks (tmpfs); without it they are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch._dynamo  # noqa: F401

from experiments.faults.people import somebody
from experiments.faults.runs import Process, fresh, resumed, start
from experiments.faults.same import differences
from experiments.tables import markdown
from pbrl.labelling.store import FILE_NAME as PEOPLE
from pbrl.launch.configuration import options as options_of
from pbrl.launch.constructors import shipped
from pbrl.records.checkpoint import load_latest, non_finite

PARTS = "experiments.faults.parts"
TEACHER = [f"teacher._target_={PARTS}.FailingTeacher"]
SIMULATOR = [f"env._target_={PARTS}.FailingPointMass"]
CALLBACK = [f"callbacks=[{{_target_:{PARTS}.PoisonedGradient}}]"]
UPDATER = [f"updater._target_={PARTS}.PoisonedPebble"]
READY = " thread(s) ·"  # printed when everything is built, and restored


@dataclass
class Row:
    """One line of the table."""

    fault: str
    times: int = 0
    outcomes: list[str] = field(default_factory=list)
    detail: str = ""

    @property
    def outcome(self) -> str:
        return ", ".join(f"{text} ({self.outcomes.count(text)})" for text in dict.fromkeys(self.outcomes))

    @property
    def good(self) -> bool:
        return bool(self.outcomes) and all(outcome.startswith(("same", "one error")) for outcome in self.outcomes)


class Laboratory:
    """Where runs are broken: a scratch folder, undisturbed runs to compare with, and the table, renewed row by row."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out, self.rows = folder, out, list[Row]()
        self.output = folder / "output.txt"
        self._references: dict[tuple[str, ...], Path] = {}
        self._count = 0

    def new(self) -> Path:
        self._count += 1
        return self.folder / f"run{self._count}"

    def reference(self, *more: str) -> Path:
        """The undisturbed run with these options."""
        if more not in self._references:
            run = self._references[more] = self.new()
            self.finish(fresh(run, *more))
        return self._references[more]

    def finish(self, arguments: list[str]) -> str:
        """Run to the end; what it printed."""
        process = start(arguments, self.output)
        if process.wait() != 0:
            raise RuntimeError(f"a run that should finish did not:\n{process.said()}")
        return process.said()

    def continued(self, run: Path, *more: str) -> str:
        """Resume and finish a run: "same", or what differs from the undisturbed one."""
        self.finish(resumed(run))
        found = differences(self.reference(*more), run)
        return "same" if not found else f"DIFFERS in {', '.join(found[:4])}"

    def error(self, arguments: list[str], fault: str = "", expected: str = "", code: int = 1) -> str:
        """Run into an error: "one error", or what is wrong with it."""
        process = start(arguments, self.output, fault)
        ended, said = process.wait(), process.said()
        problems = [] if ended == code else [f"exit code {ended}"]
        problems += ["traceback"] if "Traceback" in said else []
        problems += [] if expected in said else [f"not said: {expected}"]
        return "one error" if not problems else f"WRONG: {', '.join(problems)}: {said[-1500:]}"

    @contextmanager
    def row(self, fault: str) -> Iterator[Row]:
        row, started = Row(fault), time.monotonic()
        self.rows.append(row)
        try:
            yield row
        except Exception as error:  # one broken experiment must not hide the others
            row.outcomes.append(f"FAILED: {type(error).__name__}: {error}")
        write([row], self.out)
        print(f"{time.monotonic() - started:6.0f} s  {fault}: {row.times} × {row.outcome}  {row.detail}", flush=True)


def labels(run: Path) -> int:
    """Answered queries in the journal, torn lines aside; people's answers."""
    if (run / PEOPLE).exists():
        with contextlib.closing(sqlite3.connect(run / PEOPLE)) as store:
            return int(store.execute("SELECT count(*) FROM answer").fetchone()[0])
    return sum(line.endswith(b"\n") for line in (run / "answers.jsonl").read_bytes().splitlines(keepends=True))


def kills(lab: Laboratory, count: int, rng: np.random.Generator, about: str = "", *options: str) -> None:
    """kill −9 at random moments, thirteen at most to a run, each followed by a resume."""
    people = somebody(lab.output) if "teacher=human" in options else contextlib.nullcontext()
    with lab.row("kill -9 at a random moment" + about) as row, people:
        inside_save = before_first = lost = seed = 0
        while row.times < count:
            run, more = lab.new(), [f"seed={seed}", *options]
            seed += 1
            arguments, answered = fresh(run, *more), 0
            for _ in range(min(13, count - row.times)):
                process = start(arguments, lab.output)
                if rng.random() < 0.85:
                    process.wait_for(READY)
                    for _ in range(rng.integers(4)):  # checkpoints on, however slow the machine is
                        _wait_for(partial(_further, run, process, _newest(run)))
                time.sleep(rng.uniform(0, 0.1))
                if rng.random() < 0.4:  # the most delicate moments deserve more than their share
                    _wait_for(partial(_saving_or_ended, run, process))
                if process.ended() is not None:
                    break
                process.kill()
                process.wait()
                row.times += 1
                if not (run / "config.yaml").exists():
                    continue  # killed before there was a run: the same command begins it
                arguments = resumed(run)
                inside_save += _saving(run)
                before_first += not any((run / "checkpoints").glob("step_*"))
                lost += labels(run) < answered
                answered = labels(run)
            lab.finish(arguments)
            found = differences(lab.reference(*more), run)
            row.outcomes.append("same" if not found else f"DIFFERS in {', '.join(found[:4])}")
        if lost:
            row.outcomes.append(f"LOST answers {lost} times")
        row.detail = f"{inside_save} inside a save, {before_first} before the first; answers lost: {lost}"


def writes(lab: Laboratory, count: int, rng: np.random.Generator) -> None:
    """kill −9 between two changes to the disk, with a teacher whose answers depend on all earlier ones."""
    more = [f"teacher._target_={PARTS}.Remembering"]
    with lab.row("kill -9 before a random fsync, rename, mkdir or unlink, remembering") as row:
        while row.times < count:
            run, lost, answered = lab.new(), 0, 0
            arguments, chosen = fresh(run, *more), int(rng.integers(12, 60))
            while row.times < count:
                process = start(arguments, lab.output, killed_at=chosen)
                if process.wait() != -signal.SIGKILL:
                    break
                row.times += 1
                if (run / "config.yaml").exists():
                    arguments = resumed(run)
                    lost += labels(run) < answered
                    answered = labels(run)
                chosen = int(rng.integers(1, 60))
            lab.finish(arguments)
            found = differences(lab.reference(*more), run)
            row.outcomes.append("same" if not found else f"DIFFERS in {', '.join(found[:4])}")
            row.outcomes += [f"LOST answers {lost} times"] * bool(lost)


def matrix() -> Iterator[tuple[str, list[str]]]:
    """Every updater with four kinds of teachers, by name; people answer at the page, over HTTP."""
    judges = {
        "mistake": ["teacher=mistake"],
        "remembering": [f"teacher._target_={PARTS}.Remembering"],
        "function": [f"teacher._target_={PARTS}.prefers_less_motion"],
        "people": ["teacher=human", "teacher.task=go", "teacher.undo_seconds=0", "teacher.size=64"],
    }
    smaller = {
        "aparl": ["reward.activation=silu"],
        "penalty": ["reward.activation=silu", "updater.walk.rollout_steps=40"],
        "rime": ["updater.epochs=4", "updater.least_epochs=2", "updater.warm_updates=20"],
        **{name: ["updater.fit.steps_per_label=null"] for name in ("surf", "qpa")},
    }
    for updater in sorted(set(options_of("updater")) - {"oracle"}):
        for name, judge in judges.items():
            yield f"{updater}, {name}", [f"updater={updater}", *smaller.get(updater, []), *judge]


def simulator(lab: Laboratory, count: int, rng: np.random.Generator) -> None:
    """The same on a real simulator."""
    kills(lab, count, rng, ", walker-walk", "env=walker-walk", "env.horizon=120", "total_steps=400", "eval.every=400")


def _newest(run: Path) -> str:
    """The name of the newest finished checkpoint."""
    return max((path.name for path in (run / "checkpoints").glob("step_*")), default="")


def _further(run: Path, process: Process, newest: str) -> bool:
    return process.ended() is not None or _newest(run) > newest


def _saving(run: Path) -> bool:
    """Whether a checkpoint has been begun and not finished."""
    return any((run / "checkpoints").glob(".*.tmp"))


def _saving_or_ended(run: Path, process: Process) -> bool:
    return process.ended() is not None or _saving(run)


def interrupts(lab: Laboratory, rng: np.random.Generator) -> None:
    """SIGTERM and SIGINT: saved at once, so that nothing is done twice."""
    for number in (signal.SIGTERM, signal.SIGINT):
        with lab.row(f"{number.name} at a random moment") as row:
            run = lab.new()
            arguments = fresh(run)
            for _ in range(5):
                process = start(arguments, lab.output)
                process.wait_for(READY)
                time.sleep(rng.uniform(0, 0.5))
                if process.ended() is None:
                    process.kill(number)
                    row.times += 1
                if process.wait() not in (0, 130):
                    raise RuntimeError(process.said())
                arguments = resumed(run)
            row.outcomes.append(lab.continued(run))


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size` of its own."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def disks(lab: Laboratory) -> None:
    """A disk that fills up, and one that cannot be written."""
    with lab.row("full disk") as row:
        for size in range(120, 400, 40):
            with disk(lab.folder / "disk", f"{size}k") as folder:
                run = folder / "run"
                outcome = lab.error(fresh(run), expected="No space left")
                row.times += 1
                row.outcomes.append(outcome)
                remount(folder, "size=50m")
                if outcome == "one error" and (run / "config.yaml").exists():
                    held = labels(run)
                    row.outcomes.append(lab.continued(run))
                    if labels(run) < held:
                        row.outcomes.append("LOST answers")
    with lab.row("full disk when the teacher is asked") as row, disk(lab.folder / "disk", "50m") as folder:
        # the room for an answer is taken first: the teacher must not have been asked
        run, asked = folder / "run", lab.folder / "asked.txt"
        process = start(fresh(run, *TEACHER, "+teacher.at=1", f"+teacher.count_file={asked}"), lab.output, "hang")
        process.wait_for("session 1")
        _wait_for(lambda: labels(run) == 1 and (run / "answers.jsonl").read_bytes().endswith(b"\0"))
        process.kill()
        process.wait()
        ballast = folder / "ballast"
        remount(folder, f"size={_used(folder) + 64}k")
        ballast.write_bytes(b"\1" * 1024 * 40)
        before = len(asked.read_text().splitlines())
        row.times += 1
        row.outcomes.append(lab.error(resumed(run), expected="No space left"))
        if len(asked.read_text().splitlines()) > max(before, labels(run)):
            row.outcomes.append("LOST an answer")
        ballast.unlink()
        remount(folder, "size=50m")
        row.outcomes.append(lab.continued(run, *TEACHER, "+teacher.at=1", f"+teacher.count_file={asked}"))
    with lab.row("read-only run directory") as row, disk(lab.folder / "disk", "50m") as folder:
        run = folder / "run"
        process = start(fresh(run), lab.output)
        process.wait_for("session 3")
        process.kill()
        process.wait()
        remount(folder, "ro")
        for arguments in (resumed(run), fresh(folder / "other")):
            row.times += 1
            row.outcomes.append(lab.error(arguments, expected="Read-only file system", code=2))
        remount(folder, "rw")
        row.outcomes.append(lab.continued(run))


def _wait_for(condition: Callable[[], bool], seconds: float = 1800) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.001)


def _used(folder: Path) -> int:
    """kB in use on its file system."""
    usage = shutil.disk_usage(folder)
    return usage.used // 1024


def teachers(lab: Laboratory) -> None:
    """A teacher that hangs, raises, or answers nonsense."""
    with lab.row("teacher hangs, then SIGTERM") as row:
        run = lab.new()
        process = start(fresh(run, *TEACHER), lab.output, "hang")
        process.wait_for("session 2")
        _wait_for(lambda: (run / "answers.jsonl").read_bytes().endswith(b"\0"))
        process.kill(signal.SIGTERM)
        row.times += 1
        if process.wait(60) != 130 or "Traceback" in process.said():
            raise RuntimeError(process.said())
        row.outcomes.append(lab.continued(run, *TEACHER))
    for fault, message in (("raise", "the judge hung up"), ("malformed", "expected a value in [0, 1]")):
        with lab.row(f"teacher's answer: {fault}") as row:
            run = lab.new()
            row.times += 2
            row.outcomes.append(lab.error(fresh(run, *TEACHER), fault, message))
            row.outcomes.append(lab.error(resumed(run), fault, message))  # it is asked again
            row.outcomes.append(lab.continued(run, *TEACHER))


def numbers(lab: Laboratory) -> None:
    """NaN from outside and inside: named with its step, never in a checkpoint."""
    cases = [
        ("nan-obs", SIMULATOR, "non-finite observation at step"),
        ("nan-reward", SIMULATOR, "non-finite reward at step"),
        ("nan-critic", CALLBACK, "not finite|became nan"),
        ("nan-all", CALLBACK, "became nan"),
        ("nan-reward-gradient", UPDATER, "the learned reward diverged in session"),
    ]
    for fault, options, message in cases:
        with lab.row(f"NaN: {fault}") as row:
            run = lab.new()
            row.times += 1
            alternatives = message.split("|")
            outcome = lab.error(fresh(run, *options), fault)
            said = lab.output.read_text()
            row.outcomes.append(outcome if any(text in said for text in alternatives) else f"WRONG: {said[-1500:]}")
            row.detail = next((line for line in said.splitlines() if line.startswith("error at step")), "")[:160]
            for folder in (run / "checkpoints").glob("step_*"):
                loaded = load_latest(run)
                if non_finite(loaded.state):
                    row.outcomes.append(f"SAVED a diverged state in {folder.name}")
            row.outcomes.append(lab.continued(run, *options))


def files(lab: Laboratory, rng: np.random.Generator) -> None:
    """Damage to what lies on the disk between two processes."""
    with lab.row("damaged newest checkpoint") as row:
        for name in ("manifest.json", "run.json", "state.pt", "arrays.npz"):
            for kind in ("truncated", "a bit turned", "deleted"):
                run = _killed(lab, rng)
                newest = sorted((run / "checkpoints").glob("step_*"))[-1]
                _damage(newest / name, kind, rng)
                row.times += 1
                row.outcomes.append(lab.continued(run))
                if f"checkpoint {newest.name} cannot be used" not in lab.output.read_text():
                    row.outcomes.append(f"SILENT about {name} {kind}")
    with lab.row("torn last lines of answers.jsonl and metrics.jsonl") as row:
        for torn in (b'{"query": "ab', b"\0" * 500, b"\xff\xfe"):
            run = _killed(lab, rng)
            for name in ("answers.jsonl", "metrics.jsonl"):
                with (run / name).open("ab") as file:
                    file.write(torn)
            row.times += 1
            row.outcomes.append(lab.continued(run))


def _killed(lab: Laboratory, rng: np.random.Generator) -> Path:
    """A run killed some time after its second checkpoint."""
    run = lab.new()
    process = start(fresh(run), lab.output)
    process.wait_for(READY)
    _wait_for(lambda: len(list((run / "checkpoints").glob("step_*"))) > 1)
    time.sleep(rng.uniform(0, 0.5))
    if process.ended() is None:
        process.kill()
    process.wait()
    return run


def _damage(path: Path, kind: str, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    if kind == "deleted":
        path.unlink()
        return
    place = int(rng.integers(len(data)))
    if kind == "truncated":
        del data[place:]
    else:
        data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def wandb_dies(lab: Laboratory) -> None:
    """W&B's own process is killed in the middle of a run."""
    with lab.row("W&B's process killed (offline)") as row:
        run = lab.new()
        process = start(fresh(run, "logger=wandb", "logger.mode=offline"), lab.output, real=True)
        process.wait_for("session 2")
        for child in _descendants(process.pid):
            if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
                row.times += 1
        code, said = process.wait(), process.said()
        found = differences(lab.reference(), run)
        row.outcomes.append("same" if code == 0 and not found else f"exit code {code}, DIFFERS in {found[:4]}")
        _, found_text, rest = said.partition("logging to WandB stopped")
        row.detail = (found_text + rest).split("\n")[0] or "W&B noticed nothing"


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found


def write(rows: list[Row], out: Path) -> None:
    """table.csv and table.md; what they say of other faults stays."""
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, list[str]] = {}
    if (out / "table.csv").exists():
        with (out / "table.csv").open(newline="") as file:
            content = {row[0]: row for row in list(csv.reader(file))[1:]}
    content |= {row.fault: [row.fault, str(row.times), row.outcome, row.detail] for row in rows}
    with (out / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["fault", "times", "outcome", "detail"])
        table.writerows(content.values())
    text = "Written by `python -m experiments.faults`; what the outcomes mean: its first lines.\n\n"
    shown = [
        [fault, times, f"{outcome}{'. ' if detail else ''}{detail}".replace("\n", " ")]
        for fault, times, outcome, detail in content.values()
    ]
    (out / "table.md").write_text(text + markdown([["fault", "times", "outcome"], *shown]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=52, help="how many times kill -9")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/faults"))
    parser.add_argument("--only", default="", help="run only the groups whose name contains this: 'matrix, surf'")
    options = parser.parse_args()
    os.environ["WANDB_MODE"] = "offline"
    shipped()  # this and torch._dynamo are read once: the forks have them from here
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="pbrl-faults-", ignore_cleanup_errors=True) as folder:
        lab = Laboratory(Path(folder), options.out)
        groups: dict[str, Callable[[], None]] = {
            "kills": lambda: kills(lab, options.kills, rng),
            **{
                f"matrix, {name}": partial(kills, lab, min(options.kills, 10), rng, f", {name}", *more)
                for name, more in matrix()
            },
            "writes": lambda: writes(lab, options.kills, rng),
            "simulator": lambda: simulator(lab, min(options.kills, 10), rng),
            "interrupts": lambda: interrupts(lab, rng),
            "files": lambda: files(lab, rng),
            "teachers": lambda: teachers(lab),
            "numbers": lambda: numbers(lab),
            "disks": lambda: disks(lab),
            "wandb": lambda: wandb_dies(lab),
        }
        if os.geteuid() != 0:
            print("not root: no full and no read-only disk")
            del groups["disks"]
        for name, group in groups.items():
            if options.only in name:
                group()
    bad = [row for row in lab.rows if not row.good]
    print(json.dumps({"faults": sum(row.times for row in lab.rows), "bad": [row.fault for row in bad]}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
