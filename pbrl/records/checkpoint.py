"""Exact checkpoints: what a run needs to go on as if it had never stopped.

    RUN/checkpoints/step_000000012000/   manifest.json (sizes, checksums; written last), run.json, state.pt, arrays.npz,
                                         config.yaml (as it was then)
    RUN/steps/replay-00003.bin           append-only rows of the replay and the rollouts, shared by all checkpoints

A checkpoint is written beside and renamed; the last two are kept. Steps never change once taken, so they are appended
to files of their own (relabelled rewards, which do change, lie in the checkpoint): the disk holds the replay once and
a checkpoint costs what is new. A state with a number that is not finite is never written. Loading executes no code:
torch files are loaded with `weights_only=True`, npz with `allow_pickle=False`, everything else is JSON.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pbrl.files import (
    beside,
    check_archive,
    fsync_folder,
    make_folder,
    open_for_reading,
    open_in_place,
    printable,
    read_bounded,
    read_npz,
    remove_folder,
    write_all,
    write_atomically,
)

FORMAT = 2
KEPT = 2  # checkpoints
FILE_ROWS = 65_536  # rows in one append-only file
NAME = re.compile(r"step_\d{12}(\.\d{3})?")  # of a checkpoint's folder
LEFT_OVER = re.compile(r"\.step_\d{12}(\.\d{3})?\.[0-9a-f]{16}\.tmp|\.step_\d{12}(\.\d{3})?\.tmp")  # of a killed save
JSON_BYTES = 64 * 2**20  # of manifest.json and run.json: a thousand times what they hold


class CheckpointError(RuntimeError):
    """No checkpoint of the run can be used; the message says why, one by one."""


def non_finite(values: Any, name: str = "") -> str | None:
    """Path of the first number in nested dicts, lists and tensors that is NaN or infinite, such as policy/mu.weight."""
    if isinstance(values, torch.Tensor | float):
        value = torch.as_tensor(values)
        return None if bool(torch.isfinite(value).all()) else name
    if isinstance(values, Mapping):
        items = [(f"{name}/{key}" if name else str(key), value) for key, value in values.items()]
    elif isinstance(values, list | tuple):
        items = [(f"{name}[{index}]", value) for index, value in enumerate(values)]
    else:
        return None
    return next((found for key, value in items if (found := non_finite(value, key))), None)


def global_generators() -> dict[str, Any]:
    """States of the generators that belong to nobody (torch's, numpy's, Python's): a user's own part may draw there."""
    version, words, gauss = random.getstate()
    table: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    key = torch.from_numpy(table["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {**table, "state": {**table["state"], "key": key}},
        "python": [version, list(words), gauss],
    }


def restore_global_generators(state: Mapping[str, Any]) -> None:
    """Undo `global_generators`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    table = state["numpy"]
    key = table["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**table, "state": {**table["state"], "key": key}})  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


class StepLog:
    """The rows of a ring buffer, appended to files of `FILE_ROWS` rows each as they are taken.

    Args:
        folder, name: files are folder/name-00000.bin, …
        columns: the ring's arrays, each [capacity, ...]; row i of the run lies at i % capacity.
    """

    def __init__(self, folder: Path, name: str, columns: Sequence[np.ndarray]) -> None:
        self.folder, self.name, self.columns = folder, name, columns
        self.capacity = len(columns[0])
        self.row_bytes = sum(column[:1].nbytes for column in columns)
        self.written = 0  # rows
        self.sums: dict[int, int] = {}  # checksum of each file's rows so far

    def _path(self, index: int) -> Path:
        return self.folder / f"{self.name}-{index:05d}.bin"

    def _pack(self, first: int, last: int) -> bytes:
        ring = np.arange(first, last) % self.capacity
        parts = [np.ascontiguousarray(c[ring]).reshape(len(ring), -1) for c in self.columns]
        parts = [part.view(np.uint8).reshape(len(ring), -1) for part in parts if part.size]
        return np.concatenate(parts, axis=1).tobytes()

    def append(self, total: int) -> dict[str, Any]:
        """Write the rows taken since the last call, up to row `total`; returns what a manifest needs to check them.

        Raises:
            ValueError: if more rows were taken since than the ring holds.
        """
        if total - self.written > self.capacity:
            raise ValueError(
                f"{total - self.written} steps since the last checkpoint, but the {self.name} ring holds "
                f"{self.capacity}; lower checkpoint_every"
            )
        make_folder(self.folder)
        start = self.written
        while self.written < total:
            index = self.written // FILE_ROWS
            last = min(total, (index + 1) * FILE_ROWS)
            data = self._pack(self.written, last)
            with open_in_place(self._path(index)) as file:
                file.truncate((self.written - index * FILE_ROWS) * self.row_bytes)  # what a killed run left half done
                file.seek(0, os.SEEK_END)
                write_all(file, data)
                os.fsync(file.fileno())
            self.sums[index] = zlib.crc32(data, self.sums.get(index, 0))
            self.written = last
        if start < total:
            fsync_folder(self.folder)
        return {"rows": self.written, "row_bytes": self.row_bytes, "sums": {str(k): v for k, v in self.sums.items()}}

    def forget_before(self, row: int) -> None:
        """Delete the files whose rows all lie before `row`."""
        for index in [index for index in self.sums if (index + 1) * FILE_ROWS <= row]:
            self._path(index).unlink(missing_ok=True)
            del self.sums[index]

    def load(self, record: Mapping[str, Any]) -> None:
        """Fill the ring from the files as `append` described them.

        Raises:
            ValueError: if a file is missing, too short, changed, or its rows are of another width.
        """
        if record["row_bytes"] != self.row_bytes:
            raise ValueError(f"{self.name} rows have {record['row_bytes']} bytes; this run's have {self.row_bytes}")
        total = int(record["rows"])
        if total < 0:
            raise ValueError(f"{self.name} has {total} rows")
        self.sums = {int(index): int(value) for index, value in record["sums"].items()}
        first = max(total - self.capacity, 0)
        for index in range(first // FILE_ROWS, -(-total // FILE_ROWS)):
            start = index * FILE_ROWS
            size = (min(total, start + FILE_ROWS) - start) * self.row_bytes
            path = self._path(index)
            with open_for_reading(path) as file:
                data = file.read(size)
            if len(data) != size or zlib.crc32(data) != self.sums.get(index):
                raise ValueError(f"{path.name} is damaged")
            self._unpack(np.frombuffer(data, np.uint8).reshape(-1, self.row_bytes), start, first)
        self.written = total

    def _unpack(self, rows: np.ndarray, start: int, first: int) -> None:
        skip = max(first - start, 0)
        rows, ring = rows[skip:], np.arange(start + skip, start + len(rows)) % self.capacity
        offset = 0
        for column in self.columns:
            width = column[:1].nbytes
            if width:
                values = np.ascontiguousarray(rows[:, offset : offset + width]).view(column.dtype)
                column[ring] = values.reshape(len(ring), *column.shape[1:])
            offset += width


def save_checkpoint(
    run_dir: Path,
    step: int,
    run: Mapping[str, Any],
    state: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    logs: Sequence[tuple[StepLog, int]],
) -> Path:
    """Write a checkpoint and drop all but the last two.

    Args:
        step: environment step; names the folder.
        run: plain JSON values. state: tensors and plain values. arrays: numpy arrays without objects.
        logs: step logs with the number of rows each holds now.

    Raises:
        FloatingPointError: if a number in `state` is not finite; the checkpoints before it stay.
    """
    if found := non_finite(state):
        raise FloatingPointError(f"{found} is not finite at step {step}: the run diverged; it is not saved")
    folder = make_folder(run_dir / "checkpoints")
    for path in folder.iterdir():
        if LEFT_OVER.fullmatch(path.name):
            remove_folder(path)
    records = {log.name: log.append(total) for log, total in logs}
    target = _unused(folder, f"step_{step:012d}")
    new = beside(target)
    new.mkdir()  # and nobody else knows its name: what is in there is ours
    (new / "run.json").write_text(json.dumps(dict(run)))
    tensors = io.BytesIO()  # torch.save into a file on a full disk raises no OSError
    torch.save(dict(state), tensors)
    (new / "state.pt").write_bytes(tensors.getbuffer())
    with (new / "arrays.npz").open("wb") as file:
        np.savez(file, **dict(arrays))  # type: ignore[arg-type]
    if (run_dir / "config.yaml").exists():
        (new / "config.yaml").write_bytes((run_dir / "config.yaml").read_bytes())
    _write_manifest(new, step, records)
    new.rename(target)
    fsync_folder(folder)
    _drop_old(run_dir, [log for log, _ in logs])
    return target


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first; what else lies there is not looked at."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir())


def begun(run_dir: Path) -> bool:
    """Whether the run has ever saved a checkpoint, damaged ones included."""
    folder = run_dir / "checkpoints"
    return folder.is_dir() and any(NAME.match(path.name.removeprefix("damaged_")) for path in folder.iterdir())


def _unused(folder: Path, name: str) -> Path:
    """`name`, or where the run was saved at this step before, name.001, …: no checkpoint is ever replaced."""
    taken = sorted(path.name for path in folder.iterdir() if re.fullmatch(re.escape(name) + r"(\.\d{3})?", path.name))
    if not taken:
        return folder / name
    return folder / f"{name}.{int(taken[-1][len(name) + 1 :] or 0) + 1:03d}"


def _write_manifest(folder: Path, step: int, records: Mapping[str, Any]) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        files[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        with path.open("rb") as file:
            os.fsync(file.fileno())
    content = {"format": FORMAT, "step": step, "files": files, "steps": dict(records)}
    manifest = {**content, "sha256": _digest(content)}
    write_atomically(folder / "manifest.json", json.dumps(manifest).encode())


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = json.loads(read_bounded(folder / "manifest.json", JSON_BYTES))
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError("its manifest.json was not written by pbrl")
    if manifest["format"] != FORMAT:
        raise ValueError(f"it has format {manifest['format']!r}; this version of pbrl reads {FORMAT}")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise ValueError("manifest.json is damaged")
    return manifest


def _drop_old(run_dir: Path, logs: Sequence[StepLog]) -> None:
    kept = checkpoints(run_dir)
    for old in kept[:-KEPT]:
        remove_folder(old)
    oldest = _read_manifest(kept[-KEPT:][0])
    for log in logs:
        log.forget_before(oldest["steps"][log.name]["rows"] - log.capacity)


class Loaded:
    """A verified checkpoint: `run` (JSON), `state` (tensors), `arrays` (numpy), `folder`."""

    def __init__(self, folder: Path, logs: Sequence[StepLog]) -> None:
        self.folder = folder
        manifest = _read_manifest(folder)
        for name, expected in manifest["files"].items():
            data = read_bounded(folder / Path(name).name, int(expected["bytes"]))
            if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise ValueError(f"{Path(name).name} is damaged")
        self.run: dict[str, Any] = json.loads(read_bounded(folder / "run.json", JSON_BYTES))
        with open_for_reading(folder / "state.pt") as file:
            check_archive(file)
            self.state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
        with open_for_reading(folder / "arrays.npz") as file:
            self.arrays = read_npz(file)
        step = self.run["step"]
        if type(step) is not int or step != manifest["step"] or not folder.name.startswith(f"step_{step:012d}"):
            raise ValueError(f"run.json: step is {printable(step)}; expected that of the folder's name")
        if found := non_finite(self.state):
            raise ValueError(f"{found} is not finite")
        for log in logs:
            log.load(manifest["steps"][log.name])


def load_latest(run_dir: Path, logs: Sequence[StepLog] = (), restore: Callable[[Loaded], None] | None = None) -> Loaded:
    """The newest checkpoint that is whole; damaged ones are named on the console and passed over.

    Args:
        logs: step logs to fill.
        restore: takes the checkpoint over to go on from it; if it fails, the checkpoint counts as damaged. Damaged
            ones that are newer than the one restored are set aside as damaged_…, so that they never count as kept.

    Raises:
        CheckpointError: if there is none.
    """
    problems: list[str] = []
    passed_over: list[Path] = []
    for folder in reversed(checkpoints(run_dir)):
        try:
            loaded = Loaded(folder, logs)
            if restore is not None:
                restore(loaded)
        except Exception as error:  # any damage to any file must only lead to the previous checkpoint
            reason = printable(f"{error} is missing" if isinstance(error, KeyError) else str(error).split("\n")[0])
            problems.append(f"{folder.name}: {reason}")
            passed_over.append(folder)
            print(f"checkpoint {folder.name} cannot be used ({reason}); trying the one before")
            continue
        if restore is not None:
            for damaged in passed_over:
                damaged.rename(_unused(damaged.parent, f"damaged_{damaged.name}"))
        return loaded
    detail = "; ".join(problems) if problems else "it has none yet"
    raise CheckpointError(
        f"no usable checkpoint in {run_dir} ({detail}); start anew with another run_dir, and with "
        f"import_preferences={run_dir / 'preferences.npz'} if there is that file: no answer need be given twice"
    )
