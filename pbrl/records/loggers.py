"""Where numbers go: always a local metrics.jsonl, and as many more sinks as the user names.

A sink has `log(row)`, `table(name, columns, rows, env_step)`, `video(name, path, env_step)` and `close(summary)`; a row
is a flat dict with `env_step`.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pbrl.files import TEXT_BYTES, open_in_place, printable, read_bounded, write_all, write_atomically
from pbrl.records.checkpoint import checkpoints

Row = Mapping[str, float | int | str | None]


class Sink(Protocol):
    def log(self, row: Row) -> None: ...
    def table(self, name: str, columns: list[str], rows: list[list[Any]], env_step: int) -> None: ...
    def video(self, name: str, path: Path, env_step: int) -> None: ...
    def close(self, summary: Row) -> None: ...


def plain(value: Any) -> Any:
    """A JSON value: numpy and torch scalars become Python's, non-finite floats become None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(metrics: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What a part of the run reports, unchanged: numbers, as a checkpoint keeps and a curve shows them, or None.

    Raises:
        ValueError: naming the part, the key and the value.
    """
    for key, value in metrics.items():
        try:
            number = plain(value)
        except (ValueError, RuntimeError):  # an array or a tensor of several
            number = value
        if not isinstance(number, int | float | None):
            raise ValueError(f"{part} reports {key}={reprlib.repr(value)}; expected a number, or None if it has none")
    return dict(metrics)


class JsonLines:
    """`metrics.jsonl`: one flushed line per row, never rewritten, except that resuming cuts what lies after it."""

    def __init__(self, path: Path) -> None:
        self._file = open_in_place(path)  # unbuffered: nothing stays behind in memory when the disk is full
        self._file.seek(0, os.SEEK_END)

    def sync(self) -> int:
        """Make every row durable; returns the bytes written so far."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, size: int) -> None:
        """Cut what was written after the first `size` bytes: a resumed run writes it again."""
        held = self._file.seek(0, os.SEEK_END)
        if held < size:
            print(f"{self._file.name} has lost {size - held} bytes since the checkpoint; the rows in them are gone")
        else:
            self._file.truncate(size)
            self._file.seek(0, os.SEEK_END)

    def log(self, row: Row) -> None:
        line = json.dumps({key: plain(value) for key, value in row.items()}, allow_nan=False) + "\n"
        write_all(self._file, line.encode())

    def video(self, name: str, path: Path, env_step: int) -> None:
        self.log({"env_step": env_step, name: str(path)})

    def close(self, summary: Row) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


class TensorBoard:
    """TensorBoard event files in RUN/tensorboard (needs `pip install pbrl[tensorboard]`)."""

    def __init__(self, run_dir: Path, **_: Any) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("logger=tensorboard needs the tensorboard package: pip install tensorboard") from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, row: Row) -> None:
        for key, value in row.items():
            if isinstance(value, int | float) and key != "env_step":
                self._writer.add_scalar(key, value, int(row["env_step"] or 0))

    def table(self, name: str, columns: list[str], rows: list[list[Any]], env_step: int) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self._writer.add_text(name, "\n".join("|".join(map(str, line)) for line in lines), env_step)

    def video(self, name: str, path: Path, env_step: int) -> None:
        self._writer.add_text(name, str(path), env_step)

    def close(self, summary: Row) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases: online when logged in, otherwise offline with one line that says so; never prompts or blocks.

    Groups runs by env/updater/teacher; `env_step` is the x-axis of everything. An offline run that is resumed goes on
    in a new offline folder of the same id (W&B cannot append to one); metrics.jsonl stays whole.

    Args:
        run_dir: W&B's files go to RUN/wandb. run_config: the run's config, plain. choices: names of env, updater, ….
        project, entity: as in W&B. mode: auto, online, offline or disabled (WANDB_MODE wins over auto).
        tags: beside env, updater, teacher and seed. artifacts: upload the last checkpoint at the end.
        init_timeout: seconds to wait for the server before going offline.
    """

    def __init__(
        self,
        run_dir: Path,
        run_config: dict[str, Any],
        choices: dict[str, str],
        project: str = "pbrl",
        entity: str | None = None,
        mode: str = "auto",
        tags: Sequence[str] = (),
        artifacts: bool = False,
        init_timeout: float = 30,
    ) -> None:
        if mode not in ("auto", "online", "offline", "disabled"):
            raise ValueError(f"logger.mode={mode}; expected auto, online, offline or disabled")
        import wandb

        self._wandb, self._run_dir, self._artifacts = wandb, run_dir, artifacts
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            write_atomically(id_file, secrets.token_hex(4).encode())
        names = [choices.get(key, "custom") for key in ("env", "updater", "teacher")]
        options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "dir": str(run_dir),
            "id": read_bounded(id_file, TEXT_BYTES).decode().strip(),
            "resume": "allow",
            "group": "/".join(names),
            "job_type": "train",
            "name": f"{names[0]}-{names[1]}-s{run_config.get('seed')}",
            "tags": [tag[:64] for tag in [*names, f"seed:{run_config.get('seed')}", *tags]],
            "config": {**run_config, "choices": dict(choices)},  # as in config.yaml: pbrl.compare reads both
        }
        mode = self._mode(mode)
        earlier = len(list((run_dir / "wandb").glob("offline-run-*")))
        try:
            self._run = self._start(options, mode, init_timeout)
        except wandb.errors.CommError:
            self._run = self._start(options, "offline", init_timeout)
        if self._run.offline:
            print(f"W&B is offline; the run is kept in {run_dir / 'wandb'} (upload it with `wandb sync`)")
            if earlier:
                print(
                    f"  in a new offline folder of the same id, beside {earlier} from before it was resumed; sync all"
                )
        self._run.define_metric("env_step")
        self._run.define_metric("*", step_metric="env_step")

    def _mode(self, mode: str) -> str:
        if mode != "auto":
            return mode
        if "WANDB_MODE" in os.environ:
            return os.environ["WANDB_MODE"]
        return "online" if self._wandb.login(prompt=False, verify=False) else "offline"

    def _start(self, options: dict[str, Any], mode: str, timeout: float) -> Any:
        if mode == "offline":
            options = {key: value for key, value in options.items() if key != "resume"}
        settings = self._wandb.Settings(init_timeout=timeout, silent=True, console="off")
        return self._wandb.init(**options, mode=mode, settings=settings)  # type: ignore[arg-type]

    def log(self, row: Row) -> None:
        self._run.log({key: plain(value) for key, value in row.items() if value is not None})

    def table(self, name: str, columns: list[str], rows: list[list[Any]], env_step: int) -> None:
        data = [[plain(value) for value in row] for row in rows]
        self._run.log({name: self._wandb.Table(columns=list(columns), data=data), "env_step": env_step})

    def video(self, name: str, path: Path, env_step: int) -> None:
        self._run.log({name: self._wandb.Video(str(path), format="mp4"), "env_step": env_step})

    def close(self, summary: Row) -> None:
        self._run.summary.update({key: plain(value) for key, value in summary.items()})
        if self._artifacts:
            newest = checkpoints(self._run_dir)[-1]
            artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", type="checkpoint")
            artifact.add_dir(str(newest))
            self._run.log_artifact(artifact)
        self._run.finish()


class Loggers:
    """All sinks of a run. A remote sink that fails is dropped with one line; the local log goes on."""

    def __init__(self, local: JsonLines, remote: list[Sink]) -> None:
        self.local, self._remote = local, remote

    def _each(self, action: str, *args: Any) -> None:
        for sink in list(self._remote):
            try:
                getattr(sink, action)(*args)
            except Exception as error:  # whatever a remote service throws must not stop a run
                self._remote.remove(sink)
                print(f"logging to {type(sink).__name__} stopped ({printable(error)}); metrics.jsonl goes on")

    def log(self, row: Row) -> None:
        self.local.log(row)
        self._each("log", row)

    @property
    def takes_tables(self) -> bool:
        """The local log takes none: what a table would hold is in answers.jsonl and preferences.npz."""
        return bool(self._remote)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], env_step: int) -> None:
        self._each("table", name, columns, rows, env_step)

    def video(self, name: str, path: Path, env_step: int) -> None:
        self.local.video(name, path, env_step)
        self._each("video", name, path, env_step)

    def close(self, summary: Row) -> None:
        self.local.close(summary)
        self._each("close", summary)
