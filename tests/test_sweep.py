"""Sweeps: folders, what is skipped and resumed, launchers, kills, failures, missing plug-ins."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from pbrl.launch.sweep import _is_complete, launcher_error, run_folder
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent
BASE = [override for override in TINY if not override.startswith(("updater=", "threads="))]
NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="pip install -e '.[ray]'")
POPULATION = ["updater=pebble,oracle", "seed=0,1"]


def start(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "pbrl.train", "-m", *BASE, *arguments]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def sweep(cwd: Path, *arguments: str) -> tuple[int, str]:
    process = start(cwd, *arguments)
    try:
        shown, _ = process.communicate()
    finally:  # also at a test's time limit
        kill(process)
    skip_if_starved(shown)
    return process.returncode, shown


def skip_if_starved(shown: str) -> None:
    if "The current node timed out during startup" in shown:
        pytest.skip("Ray gives itself 30 s to start, too little on a machine as busy as this one")


def kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home and a folder for Ray, where a cluster of `ray start` was killed."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as name:  # sockets: short
        monkeypatch.setenv("HOME", name)
        monkeypatch.setenv("RAY_TMPDIR", name)
        for variable in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
            monkeypatch.delenv(variable, raising=False)
        (Path(name) / "ray").mkdir()
        (Path(name) / "ray/ray_current_cluster").write_text("127.0.0.1:9")
        yield Path(name)


def complete(folder: Path) -> bool:
    path = folder / "summary.json"
    return path.exists() and json.loads(path.read_text())["complete"]


def runs(cwd: Path) -> list[Path]:
    return sorted(path.parent for path in (cwd / "runs").rglob("config.yaml") if "checkpoints" not in path.parts)


def test_a_folder_follows_from_the_overrides_in_any_order() -> None:
    choices = {"env": "walker-walk", "updater": "surf"}
    first = run_folder(Path("runs"), choices, ["env=walker-walk", "seed=3", "updater=surf", "feedback.budget=50"])
    other = run_folder(Path("runs"), choices, ["feedback.budget=50", "threads=2", "launcher=ray", "seed=3"])
    assert str(first) == "runs/walker-walk/surf/seed=3,feedback.budget=50"
    assert other == first


def test_long_and_strange_names_stay_distinct_and_legal() -> None:
    choices = {"env": "pointmass", "updater": "pebble"}
    names = [run_folder(Path("r"), choices, [f"a={'x' * 300}", f"seed={i}", "p=a/b"]).name for i in range(2)]
    assert names[0] != names[1]
    for name in [*names, run_folder(Path("r"), choices, ["p=../../etc"]).name]:
        assert len(name) < 140
        assert "/" not in name
    assert run_folder(Path("r"), choices, ["p=a/b"]) != run_folder(Path("r"), choices, ["p=a b"])


def test_a_launcher_without_a_sweep_or_without_its_plugin_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher_error(["env=pointmass", "seed=1"]) is None
    assert "add -m" in str(launcher_error(["launcher=local"]))
    with monkeypatch.context() as no_plugin_at_all:
        no_plugin_at_all.setitem(sys.modules, "hydra_plugins", None)  # as after the README's install
        before_any = launcher_error(["-m", "launcher=local"])
    monkeypatch.setattr("importlib.util.find_spec", {"hydra_plugins": "another plug-in's"}.get)
    for message in (before_any, launcher_error(["-m", "launcher=local"])):
        assert "pip install -e '.[sweeps]'" in str(message)
        assert "\n" not in str(message)


def test_a_run_whose_end_was_moved_is_not_complete(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("total_steps: 200\n")
    for summary, expected in (
        ({"complete": True, "total_steps": 200}, True),
        ({"complete": True, "total_steps": 100}, False),  # resume=RUN total_steps=200, and killed
        ({"complete": False, "total_steps": 200}, False),
        ([], False),
    ):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        assert _is_complete(tmp_path) is expected


@pytest.mark.slow
def test_one_failed_run_does_not_stop_the_others_and_another_config_is_refused(tmp_path: Path) -> None:
    code, shown = sweep(tmp_path, "updater=oracle", "segment_length=10,900")
    assert code == 1
    assert "2 runs: 1 finished, 1 failed" in shown
    assert "longer than an episode of 50 steps" in shown
    [done] = [folder for folder in runs(tmp_path) if complete(folder)]
    stored = (done / "config.yaml").read_text()
    (done / "config.yaml").write_text(stored.replace("total_steps: 600", "total_steps: 500"))
    code, shown = sweep(tmp_path, "updater=oracle", "segment_length=10")
    assert code == 1
    assert "holds a run of another config (total_steps: 500 → 600)" in shown


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=NEEDS_RAY)])
def test_a_sweep_killed_in_the_middle_and_started_again_repeats_nothing(
    tmp_path: Path, launcher: str, ray_folder: Path
) -> None:
    arguments = [f"launcher={launcher}", *POPULATION]
    process = start(tmp_path, *arguments)
    try:
        while not any(complete(folder) for folder in runs(tmp_path)):
            if process.poll() is not None:
                shown, _ = process.communicate()
                skip_if_starved(shown)
                raise AssertionError(shown)
            time.sleep(0.1)
    finally:
        kill(process)
    process.communicate()
    before = {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in runs(tmp_path) if complete(folder)}
    code, shown = sweep(tmp_path, *arguments)
    assert code == 0, shown
    folders = runs(tmp_path)
    assert len(folders) == 4
    for folder in folders:
        assert complete(folder)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        evaluated = [row["env_step"] for row in rows if "eval/return" in row]
        assert evaluated == sorted(set(evaluated)), "an evaluation was done twice"
        assert evaluated[-1] == rows[-1]["env_step"]
    for folder, written in before.items():
        assert (folder / "metrics.jsonl").stat().st_mtime_ns == written, "a finished run was touched"
    found = re.search(r"4 runs: .*?(\d) skipped", shown)
    assert found, shown
    assert int(found[1]) >= len(before)  # Ray's workers live a moment longer than the command that is killed


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), ("launcher=local", "hydra.launcher.n_jobs=2")], ids=["basic", "local"])
def test_ctrl_c_on_a_sweep_saves_its_runs_and_says_how_to_go_on(
    tmp_path: Path, launcher: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # of NumPy, in the command itself: the signal may come to any of them
    arguments = [*launcher, "updater=oracle", "seed=0,1,2", "threads=1"]
    under_way = 2 if launcher else 1
    process = start(tmp_path, *arguments, "total_steps=90000")
    try:
        while len(list((tmp_path / "runs").rglob("checkpoints/*/config.yaml"))) < under_way:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to every process of the command
        shown, _ = process.communicate(timeout=60)
    finally:
        kill(process)
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert f"{under_way} run{'s' * (under_way > 1)}: {under_way} stopped" in shown
    assert shown.splitlines()[-1] == "stopped; the same command again goes on with what is left"
    for folder in runs(tmp_path):
        assert "stopped at step" in (folder / "log.txt").read_text()
    assert shown.rpartition("success\n")[2].count(": and saved") == under_way


@pytest.mark.slow
@NEEDS_RAY
@pytest.mark.timeout(900)
def test_a_sweep_joins_a_ray_cluster_that_asks_for_a_token(tmp_path: Path, ray_folder: Path) -> None:
    ray = str(Path(sys.executable).parent / "ray")
    subprocess.run([ray, "get-auth-token", "--generate"], check=True, capture_output=True)
    folder = ray_folder / "head"
    command = [ray, "start", "--head", "--block", "--port=0", "--num-cpus=2", "--include-dashboard=false"]
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    log = ray_folder / "head.txt"
    with log.open("w") as output:
        head = subprocess.Popen(
            [*command, f"--temp-dir={folder}"],
            env=environment,
            text=True,
            start_new_session=True,
            stdout=output,
            stderr=output,
        )
    try:
        while not (folder / "ray_current_cluster").exists():
            if head.poll() is not None:
                skip_if_starved(log.read_text())
                raise AssertionError(log.read_text())
            time.sleep(0.1)
        port = (folder / "ray_current_cluster").read_text().rpartition(":")[2]
        address = f"hydra.launcher.ray.init.address=127.0.0.1:{port}"
        code, shown = sweep(tmp_path, "launcher=ray", address, "updater=oracle", "seed=0,1")
        assert code == 0, shown
        assert "2 runs: 2 finished" in shown
        assert "Started a local Ray instance" not in shown
        assert len([run for run in runs(tmp_path) if complete(run)]) == 2
    finally:
        head.terminate()  # ends the cluster's other processes too
        try:
            head.wait(60)
        finally:
            kill(head)


@pytest.mark.slow
def test_submitit_runs_a_sweep_as_jobs(tmp_path: Path) -> None:
    arguments = ["hydra/launcher=submitit_local", "threads=1", "updater=oracle", "seed=0,1"]
    code, shown = sweep(tmp_path, *arguments)
    assert code == 0, shown
    assert "2 runs: 2 finished" in shown
    assert len([folder for folder in runs(tmp_path) if complete(folder)]) == 2
