"""Fair timings on a shared machine: variants take turns, medians are compared, foreign CPU use is measured and told."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent.parent / "results" / "benchmarks"
CROWDED = 0.15  # share of all cores used by others above which a sample is taken again
PATIENCE = 5.0  # seconds that one comparison may spend on taking crowded samples again; then they are kept and told
rounds_and_seconds = [7, 0.2]  # samples of each variant, length of one; set by the command line


def busy() -> float:
    """Seconds that all cores have worked since boot (Linux; 0 elsewhere)."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, soft, steal = (int(value) for value in fields[:8])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


class Sample:
    """`with Sample() as s: …`: afterwards `s.wall`, `s.cpu` (of this process) in seconds and `s.foreign` (0 to 1)."""

    def __enter__(self) -> Sample:
        self._start = busy(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        busy_before, cpu_before, wall_before = self._start
        self.wall, self.cpu = time.perf_counter() - wall_before, time.process_time() - cpu_before
        self.foreign = max(busy() - busy_before - self.cpu, 0) / max(self.wall * (os.cpu_count() or 1), 1e-9)


def interleaved(variants: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Time the variants in turn.

    Args:
        variants: what to call, by name; each is called twice before.

    Returns:
        For each variant: ms (median wall time of a call), cpu_ms (median processor time of a call, all threads),
        crowded (share of samples during which others used more than CROWDED of the cores, after PATIENCE).
    """
    rounds, seconds = rounds_and_seconds
    calls = {}
    for name, call in variants.items():
        call()
        began = time.process_time()
        call()
        calls[name] = max(int(seconds / max(time.process_time() - began, 1e-6)), 1)
    spare = PATIENCE
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    for _ in range(int(rounds)):
        for name, call in variants.items():
            while True:
                with Sample() as sample:
                    for _ in range(calls[name]):
                        call()
                spare -= sample.wall if sample.foreign >= CROWDED else 0
                if sample.foreign < CROWDED or spare < 0:
                    break
            samples[name].append(sample)
    return {
        name: {
            "ms": float(np.median([s.wall for s in taken])) / calls[name] * 1e3,
            "cpu_ms": float(np.median([s.cpu for s in taken])) / calls[name] * 1e3,
            "crowded": float(np.mean([s.foreign >= CROWDED for s in taken])),
        }
        for name, taken in samples.items()
    }


def machine() -> dict[str, Any]:
    """Where and when: processor, cores, versions, load."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def store(name: str, results: Any) -> None:
    """Write `results` with the machine's description to experiments/results/benchmarks/<name>.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "results": results}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
