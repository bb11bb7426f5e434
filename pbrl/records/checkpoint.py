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
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = 2
KEPT = 2  # checkpoints
FILE_ROWS = 65_536  # rows in one append-only file


class CheckpointError(RuntimeError):
    """No checkpoint of the run can be used; the message says why, one by one."""


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside and rename: the file is either the old one or the new one, whole."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    fsync_folder(path.parent)


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
        self.folder.mkdir(exist_ok=True)
        start = self.written
        while self.written < total:
            index = self.written // FILE_ROWS
            last = min(total, (index + 1) * FILE_ROWS)
            data = self._pack(self.written, last)
            with self._path(index).open("r+b" if self._path(index).exists() else "w+b") as file:
                file.truncate((self.written - index * FILE_ROWS) * self.row_bytes)  # what a killed run left half done
                file.seek(0, os.SEEK_END)
                file.write(data)
                file.flush()
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
        self.sums = {int(index): int(value) for index, value in record["sums"].items()}
        first = max(total - self.capacity, 0)
        for index in range(first // FILE_ROWS, -(-total // FILE_ROWS)):
            start = index * FILE_ROWS
            size = (min(total, start + FILE_ROWS) - start) * self.row_bytes
            path = self._path(index)
            with path.open("rb") as file:
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
    folder = run_dir / "checkpoints"
    folder.mkdir(exist_ok=True)
    for left_over in folder.glob(".*.tmp"):  # of a save that was killed
        shutil.rmtree(left_over)
    records = {log.name: log.append(total) for log, total in logs}
    target = _unused(folder, f"step_{step:012d}")
    beside = folder / f".{target.name}.tmp"
    beside.mkdir()
    (beside / "run.json").write_text(json.dumps(dict(run)))
    tensors = io.BytesIO()  # torch.save into a file on a full disk raises no OSError
    torch.save(dict(state), tensors)
    (beside / "state.pt").write_bytes(tensors.getbuffer())
    with (beside / "arrays.npz").open("wb") as file:
        np.savez(file, **dict(arrays))  # type: ignore[arg-type]
    if (run_dir / "config.yaml").exists():
        shutil.copyfile(run_dir / "config.yaml", beside / "config.yaml")
    _write_manifest(beside, step, records)
    beside.rename(target)
    fsync_folder(folder)
    _drop_old(folder, [log for log, _ in logs])
    return target


def _unused(folder: Path, name: str) -> Path:
    """`name`, or where the run was saved at this step before, name.001, …: no checkpoint is ever replaced."""
    taken = sorted(path.name for path in folder.glob(f"{name}*"))
    if not taken:
        return folder / name
    return folder / f"{name}.{int(taken[-1].partition('.')[2] or 0) + 1:03d}"


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
    manifest = json.loads((folder / "manifest.json").read_text())
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError("its manifest.json was not written by pbrl")
    if manifest["format"] != FORMAT:
        raise ValueError(f"it has format {manifest['format']!r}; this version of pbrl reads {FORMAT}")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise ValueError("manifest.json is damaged")
    return manifest


def _drop_old(folder: Path, logs: Sequence[StepLog]) -> None:
    kept = sorted(folder.glob("step_*"))
    for old in kept[:-KEPT]:
        shutil.rmtree(old)
    oldest = _read_manifest(kept[-KEPT:][0])
    for log in logs:
        log.forget_before(oldest["steps"][log.name]["rows"] - log.capacity)


class Loaded:
    """A verified checkpoint: `run` (JSON), `state` (tensors), `arrays` (numpy), `folder`."""

    def __init__(self, folder: Path, logs: Sequence[StepLog]) -> None:
        self.folder = folder
        manifest = _read_manifest(folder)
        for name, expected in manifest["files"].items():
            data = (folder / Path(name).name).read_bytes()
            if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise ValueError(f"{name} is damaged")
        self.run: dict[str, Any] = json.loads((folder / "run.json").read_text())
        self.state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        with np.load(folder / "arrays.npz", allow_pickle=False) as stored:
            self.arrays = {key: stored[key] for key in stored.files}
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
    for folder in sorted((run_dir / "checkpoints").glob("step_*"), reverse=True):
        try:
            loaded = Loaded(folder, logs)
            if restore is not None:
                restore(loaded)
        except Exception as error:  # any damage to any file must only lead to the previous checkpoint
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).split("\n")[0]
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
