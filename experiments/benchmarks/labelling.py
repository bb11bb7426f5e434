"""What a person at the labelling page takes from training that goes on meanwhile (teacher.wait=false).

    python -m experiments.benchmarks labelling

One run on walker-walk with all its processes on one core. Windows of equally many environment steps follow each
other as A B B A: in A the page's processes are stopped; in B they run and somebody looks, as the browser does it: asks
for the state every 0.4 s, loads each clip, answers every two seconds. A row is one pair of windows, milliseconds per
step: `cpu` is the training process's own time, `beside` that of the server and the drawing on the same core, `wall`
what passes between two steps (other people's load on the core is in it). `ratio_cpu` and `ratio_wall` are B by A;
`taken` is `beside` as a share of the core that training has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from experiments.faults.people import ask_page
from pbrl.launch.build import build
from pbrl.launch.configuration import register_resolvers

STEPS, PAIRS, FIRST = 150, 5, 1050  # steps of a window, pairs of windows, and the step from which on they are measured
OVERRIDES = [
    *("env=walker-walk", "teacher=human", "teacher.wait=false", "threads=1", "agent.learning_starts=500"),
    *("pretraining.steps=500", "pretraining.updates=10", "feedback.start=1000", "feedback.every=1000000"),
    *("feedback.per_session=200", "feedback.budget=200", "eval.every=1000000", "eval.episodes=1"),
    *("checkpoint_every=1000000", "log_every=100", f"total_steps={FIRST + STEPS * (2 * PAIRS + 1)}"),
]


def look(link: str) -> None:
    """Sit at the page: poll, load clips, answer every two seconds. Never returns."""
    ask, (base, _, token) = ask_page(link), link.partition("/#")
    seen, since = None, 0.0
    while True:
        with contextlib.suppress(OSError):
            question = ask("state")["question"]
            if question is not None and question != seen:
                address = f"{base}/api/clip?number={question['number']}&repeat={str(question['repeat']).lower()}"
                request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
                with urllib.request.urlopen(request, timeout=60) as reply:
                    reply.read()
                seen, since = question, time.monotonic()
            elif question is not None and time.monotonic() > since + 2:
                ask("answer", answer=f"{question}", **question, label=1, seconds=2.0)
        time.sleep(0.4)


def descendants(pid: int) -> list[int]:
    """Process numbers of a process and all its children."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *(found for child in children for found in descendants(int(child)))]
    return []


def used(pid: int) -> float:
    """Seconds of CPU used by a process and its children, those that have ended too."""
    ticks = 0
    for one in descendants(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def run() -> list[dict[str, Any]]:
    """One row for each pair of windows."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    register_resolvers()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _run(Path(folder))
    finally:
        os.sched_setaffinity(0, before)


def _run(folder: Path) -> list[dict[str, Any]]:
    overrides = [*OVERRIDES, f"run_dir={folder}/run"]
    with initialize_config_module("pbrl.conf", version_base="1.3"):
        cfg = compose("train", overrides=overrides)
    loop = build(cfg, {"env": "walker-walk"}, overrides)
    service = loop.parts.teacher._open()[1]  # type: ignore[attr-defined]
    person = os.fork()
    if not person:
        look(service.link)
    os.kill(person, signal.SIGSTOP)
    windows: list[dict[str, Any]] = []
    marks: list[tuple[float, float, float]] = []
    order = [looks for pair in range(PAIRS) for looks in ((False, True), (True, False))[pair % 2]]

    def hook() -> bool:
        window, rest = divmod(loop.step - FIRST, STEPS)
        if window != len(marks) or rest or window > len(order):  # once at the end of each window
            return False
        if marks:
            wall, cpu, beside = (now - then for now, then in zip(_now(service), marks[-1], strict=True))
            row = {"looked_at": order[window - 1], "wall": wall, "cpu": cpu, "beside": beside}
            windows.append({k: v if k == "looked_at" else v / STEPS * 1e3 for k, v in row.items()})
        if window < len(order):
            for process in (person, *descendants(service._process.pid)):
                os.kill(process, signal.SIGCONT if order[window] else signal.SIGSTOP)
        marks.append(_now(service))
        return False

    loop.stop = hook
    try:
        loop.run()
    finally:
        for process in descendants(service._process.pid):
            os.kill(process, signal.SIGCONT)
        os.kill(person, signal.SIGKILL)
        os.waitpid(person, 0)
        loop.close(True)
    rows = []
    for pair in range(PAIRS):
        alone, looked = sorted(windows[2 * pair : 2 * pair + 2], key=lambda row: row.pop("looked_at"))
        ratios = {f"ratio_{name}": looked[name] / alone[name] for name in ("cpu", "wall")}
        columns = {f"{name}_alone_ms": value for name, value in alone.items() if name != "beside"}
        columns |= {f"{name}_ms": value for name, value in looked.items()}
        rows.append({"pair": pair, **columns, **ratios, "taken": looked["beside"] / looked["cpu"]})
    return rows


def _now(service: Any) -> tuple[float, float, float]:
    return time.perf_counter(), time.process_time(), used(service._process.pid)
