"""Many runs from one command: `python -m pbrl.train -m launcher=local updater=pebble,aparl seed=range(5)`.

Hydra's launchers spread the runs over cores, a Ray cluster or Slurm. Here is what they leave open: a run's folder
follows from its overrides, so that the same command skips what is finished and resumes what is not; each run is a
process of its own, so that even a crash of one leaves the others alone; and a summary says which failed, and why.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pbrl.files import is_complete, open_in_place, read_yaml
from pbrl.launch.command import searched
from pbrl.launch.configuration import ConfigError, register_resolvers
from pbrl.launch.constructors import needs_trust
from pbrl.launch.stored import differences, lock

register_resolvers()  # a launcher's worker imports this module and not pbrl.train

PLUGINS = {  # launcher option: the plug-in behind it, and the extra that installs it
    "local": ("hydra_joblib_launcher", "sweeps"),
    "ray": ("hydra_ray_launcher", "ray"),
    "slurm": ("hydra_submitit_launcher", "sweeps"),
}
IN_PATH = ("env", "updater")  # chosen options that name the folders above a run's own
NOT_IN_NAME = (*IN_PATH, "launcher", "threads", "device", "trust", "replaced")  # where and how a run is computed
MAY_DIFFER = ("run_dir", "resume", "trust", "threads", "device", "logger")  # between two starts of one run
NAME_LENGTH = 120  # characters; file systems allow 255 bytes
LOCK_SECONDS = 60  # what is left of a killed sweep saves its runs and ends within this time


def launcher_error(arguments: list[str]) -> str | None:
    """One line if the command line asks for a launcher in vain, else None."""
    for argument in arguments:
        plugin, extra = PLUGINS.get(argument.removeprefix("launcher="), ("", ""))
        if not plugin or not argument.startswith("launcher="):
            continue
        if not {"-m", "--multirun"} & set(arguments):
            return f"{argument} is for sweeps; add -m, or leave it out"
        package = "hydra_plugins"  # shared by all plug-ins: not there before the first is installed
        if any(importlib.util.find_spec(name) is None for name in (package, f"{package}.{plugin}")):
            return f"{argument} needs {plugin.replace('_', '-')}: pip install -e '.[{extra}]'"
    return None


def run_folder(root: Path, choices: dict[str, str], overrides: list[str], swept: Sequence[str] = ()) -> Path:
    """root/<env>/<updater>/<the other overrides>: the seed, then what this sweep varies, then the rest, each sorted.

    The same run has one folder, whatever else is in its sweep: one that is there already with the same overrides in
    another order is taken.
    """
    typed = [o.lstrip("+") for o in overrides]
    emptied = {o.partition("._target_=")[0] + "=null" for o in typed if "._target_=" in o}
    named = [o for o in typed if o.lstrip("~").partition("=")[0] not in NOT_IN_NAME and o not in emptied]
    named.sort(key=lambda override: (not override.startswith("seed="), override))
    full = ",".join(named) or "default"
    digest = hashlib.sha256(full.encode()).hexdigest()[:8]
    named.sort(key=lambda override: (not override.startswith("seed="), override.partition("=")[0] not in swept))
    shown = ",".join(named) or "default"
    name = re.sub(r"[^\w.,=+~@\[\]-]", "_", shown)[:NAME_LENGTH]
    if name != shown:
        name += f"-{digest}"
    parent = root.joinpath(*(choices.get(group, "custom") for group in IN_PATH))
    if not (parent / name).exists():
        for other in parent.glob("*"):
            if other.name.endswith(f"-{digest}") or sorted(other.name.split(",")) == sorted(name.split(",")):
                return other
    return parent / name


def run_in_sweep(cfg: DictConfig, choices: dict[str, str], overrides: list[str], hydra: Any) -> dict[str, Any] | None:
    """Start, resume or skip one run of a sweep and wait for it; nothing that happens to it is raised.

    Returns:
        folder, status (finished, skipped, failed or stopped), the reason of the latter two, and the last true return
        and success; None if the sweep was stopped before.
    """
    if _stopping():
        return None
    cwd = Path(hydra.runtime.cwd)
    folder = run_folder(cwd / hydra.sweep.dir, choices, overrides, hydra.callbacks.summary.swept)
    _note({"folder": str(folder), "status": "running", "reason": ""})
    try:
        status, reason = _start_or_skip(cfg, choices, [*overrides, *searched(hydra.runtime)], folder, cwd)
    except (ConfigError, OSError, OmegaConfBaseException) as error:
        status, reason = "failed", str(error)
    shown = os.path.relpath(folder, cwd)
    print(f"{status:8} {shown}" + (f": {reason}" if reason else ""), flush=True)
    return _outcome(folder, status, reason)


def _outcome(folder: Path, status: str, reason: str) -> dict[str, Any]:
    try:
        last = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        last = {}
    numbers = {name: last.get(f"eval/{name}") for name in ("return", "success")}
    return {"folder": str(folder), "status": status, "reason": reason, **numbers}


def _start_or_skip(
    cfg: DictConfig, choices: dict[str, str], overrides: list[str], folder: Path, cwd: Path
) -> tuple[str, str]:
    if cfg.run_dir is not None or cfg.resume is not None:
        raise ConfigError("run_dir and resume name one run; those of a sweep lie in hydra.sweep.dir=… (default runs)")
    exists = (folder / "config.yaml").exists()
    if exists:
        wanted = OmegaConf.to_container(cfg, resolve=True)
        changed = [line for line in differences(folder / "config.yaml", wanted) if not _may_differ(line)]
        if changed:
            raise ConfigError(
                f"holds a run of another config ({'; '.join(changed)}); name another hydra.sweep.dir or remove it"
            )
        if _is_complete(folder):
            return "skipped", ""
    print(f"{'resuming' if exists else 'starting':8} {os.path.relpath(folder, cwd)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    return _run(pickle.dumps((cfg, choices, overrides, folder)), folder / "log.txt", cwd, cfg.threads)


def _may_differ(change: str) -> bool:
    return change.split(":")[0].split(".")[0] in MAY_DIFFER


def _is_complete(folder: Path) -> bool:
    try:
        return is_complete(json.loads((folder / "summary.json").read_text()), read_yaml(folder / "config.yaml"))
    except (FileNotFoundError, ValueError):
        return False


def _run(job: bytes, log: Path, cwd: Path, threads: int | None) -> tuple[str, str]:
    """Run `python -m pbrl.launch.sweep` on this job; its standard input stays open as long as we live."""
    environment = dict(os.environ) | {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with open_in_place(log) as output:
        start = output.seek(0, os.SEEK_END)
        command = [sys.executable, "-m", "pbrl.launch.sweep"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=cwd, env=environment
        )
        with process:
            assert process.stdin is not None
            process.stdin.write(job)
            process.stdin.flush()
            while (code := process.poll()) is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                if _stopping():
                    process.stdin.close()  # it saves and ends
    if code == 0:
        return "finished", ""
    if code < 0:
        return "failed", f"killed by {signal.Signals(-code).name} (is there enough memory?); see {log}"
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    if code == 130:
        return "stopped", "and saved"
    reasons = [line for line in lines if line.startswith("error")] or lines or [f"exit code {code}"]
    return "failed", f"{reasons[-1].removeprefix('error: ')}; see {log}"


class Summary(Callback):
    """Hydra's callback: collects the outcome of each run, wherever it was computed, and prints them at the end.

    It is pickled with the jobs, so `folder`, set before that, is known to all.

    Args:
        swept: the keys that this sweep varies.
    """

    def __init__(self, swept: Sequence[str] = ()) -> None:
        self.folder: Path | None = None
        self.swept = tuple(swept)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        hydra = config.hydra
        if "ray" in hydra.launcher and (Path.home() / ".ray/auth_token").exists():
            # a cluster of `ray start` then asks for the token, which Ray does not send by itself to an address
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.folder = Path(hydra.runtime.cwd) / hydra.sweep.dir / ".sweeps" / name
        self.folder.mkdir(parents=True)
        _current["folder"] = self.folder
        if "joblib" in hydra.launcher._target_:
            take_interrupts(self.folder)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.folder is not None:
            _current["folder"] = self.folder
            _current["note"] = self.folder / f"{config.hydra.job.num}.json"

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if self.folder is not None and job_return.return_value is not None:
            _note(job_return.return_value)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        stopped = _stopping()
        if print_summary():
            print(STOPPED if stopped else "the same command again resumes these and skips the others")
            raise SystemExit(130 if stopped else 1)


_current: dict[str, Path] = {}  # folder: of this process's sweep; note: of the run that it starts now
STOPPING = "\nstopping: the runs under way save and end (Ctrl-C again: leave at once)"
STOPPED = "stopped; the same command again goes on with what is left"


def take_interrupts(folder: Path) -> None:
    """Let a thread of ours see Ctrl-C. joblib would kill whatever its workers have started, before it has saved.

    The workers inherit that Ctrl-C does not reach them. They learn from the sweep's folder that it is to stop.
    """
    seen, tell = os.pipe()
    os.set_blocking(tell, False)

    def wait() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        _wait_for_interrupt(seen)
        print(STOPPING, file=sys.stderr)
        (folder / "stop").touch()
        _wait_for_interrupt(seen)
        os._exit(130)

    from joblib.externals.loky.backend import resource_tracker as joblibs

    for tracker in (resource_tracker, joblibs):
        tracker.ensure_running()  # its start would let Ctrl-C through again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # the system may give it to any thread, such as one of NumPy's: Python writes it to the pipe at once, and raises
    # nothing, as it has a handler
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.set_wakeup_fd(tell)
    threading.Thread(target=wait, daemon=True).start()


def _wait_for_interrupt(seen: int) -> None:
    while os.read(seen, 1) != bytes([signal.SIGINT]):
        pass


def _stopping() -> bool:
    """Whether this process's sweep was told to stop."""
    return "folder" in _current and (_current["folder"] / "stop").exists()


def _note(outcome: dict[str, Any]) -> None:
    """Tell the sweep, on the disk, what became of the run that this process starts."""
    if "note" in _current:
        beside = _current["note"].with_suffix(".tmp")
        beside.write_text(json.dumps(outcome))
        beside.replace(_current["note"])


def print_summary() -> bool:
    """The table of this process's sweep; whether the same command again has something left to do."""
    folder = _current.pop("folder")
    paths = sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    outcomes = [json.loads(path.read_text()) for path in paths]
    shutil.rmtree(folder)
    counts = Counter(outcome["status"] for outcome in outcomes)
    runs = "run" if len(outcomes) == 1 else "runs"
    print(f"\n{len(outcomes)} {runs}: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    shown = [os.path.relpath(outcome["folder"]) for outcome in outcomes]
    width = max(map(len, shown), default=0)
    print(f"  {'':8}  {'':{width}}  {'return':>9}  {'success':>7}")
    for outcome, name in zip(outcomes, shown, strict=True):
        value, success = outcome.get("return"), outcome.get("success")
        numbers = f"{'–' if value is None else f'{value:.1f}':>9}  {'–' if success is None else f'{success:.0%}':>7}"
        print(f"  {outcome['status']:8}  {name:{width}}  {numbers}")
    unfinished = [i for i, outcome in enumerate(outcomes) if outcome["status"] not in ("finished", "skipped")]
    for i in unfinished:
        if outcomes[i]["reason"]:
            print(f"  {outcomes[i]['status']} {shown[i]}: {outcomes[i]['reason']}")
    return bool(unfinished)


def end_interrupted() -> None:
    """After Ctrl-C on a sweep: wait until its runs have saved, print the summary and how to go on, and exit."""
    if "folder" not in _current:
        raise SystemExit(130)
    print(STOPPING, file=sys.stderr)
    for path in _current["folder"].glob("*.json"):
        outcome = json.loads(path.read_text())
        if outcome["status"] != "running":
            continue
        folder = Path(outcome["folder"])
        status, reason = "stopped", "its last checkpoint is kept"
        try:
            with lock(folder, LOCK_SECONDS):
                if _is_complete(folder):
                    status, reason = "finished", ""
                elif "stopped at step" in (folder / "log.txt").read_text(errors="replace")[-2000:]:
                    reason = "and saved"
        except ConfigError:
            status, reason = "running", "elsewhere; it goes on"
        path.write_text(json.dumps(_outcome(folder, status, reason)))
    print_summary()
    print(STOPPED)
    raise SystemExit(130)


def main() -> None:
    """One run of a sweep: the job comes on standard input, whose end means that nobody waits for it any more."""
    from pbrl.launch.one_run import run
    from pbrl.records.checkpoint import CheckpointError

    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked in joblib's workers: take_interrupts
    cfg, choices, overrides, folder = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_stop_when_alone, daemon=True).start()
    try:
        with lock(folder, LOCK_SECONDS):
            if _is_complete(folder):  # by whoever held the lock
                return
            if (folder / "config.yaml").exists():
                # who typed this config trusts what it names, and the stored one equals it
                cfg.resume, cfg.trust = str(folder), needs_trust(OmegaConf.to_container(cfg, resolve=True))
                overrides = [f"{key}={'null' if cfg[key] is None else cfg[key]}" for key in ("threads", "device")]
            else:
                cfg.run_dir = str(folder)
            run(cfg, choices, overrides, locked=True)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _stop_when_alone() -> None:
    while os.read(0, 1024):
        pass
    print("the sweep has ended", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)  # stops after this step and saves


if __name__ == "__main__":
    main()
