"""Malicious files that cannot be written down as text: each builder changes a copy of a good run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sqlite3
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pbrl.records.checkpoint
from pbrl.labelling.store import LabelStore, Pair

BOMB = 2**25  # bytes that a bomb of some 30 kB unpacks to


class Payload:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def poison(run: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change this file of every checkpoint, with sums that fit: a stranger can compute them too."""
    for folder in (run / "checkpoints").iterdir():
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").unlink()
        pbrl.records.checkpoint._write_manifest(folder, manifest["step"], manifest["steps"])


def edit_manifest(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change every manifest, with a digest that fits."""
    for folder in (run / "checkpoints").iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest.pop("sha256")
        change(manifest)
        manifest["sha256"] = pbrl.records.checkpoint._digest(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))


def npz(compression: int = zipfile.ZIP_STORED, **members: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, value in members.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asanyarray(value))
            archive.writestr(f"{name}.npy", member.getvalue())
    return buffer.getvalue()


def alias_bomb(run: Path, mark: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with (run / "config.yaml").open("a") as file:
        file.write("\n".join(lines) + "\n")


def pickle_state(run: Path, mark: Path) -> None:
    poison(run, "state.pt", lambda data: pickle.dumps(Payload(mark)))


def torch_state(run: Path, mark: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"agent": Payload(mark)}, buffer)
    poison(run, "state.pt", lambda data: buffer.getvalue())


def bomb_state(run: Path, mark: Path) -> None:
    """Every record of the torch file deflated; one of them unpacks to BOMB zeros."""

    def deflated(data: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
            for member in old.infolist():
                new.writestr(member.filename, old.read(member))
            new.writestr(old.namelist()[0].partition("/")[0] + "/data/999", bytes(BOMB))
        return buffer.getvalue()

    poison(run, "state.pt", deflated)


def script_state(run: Path, mark: Path) -> None:
    """TorchScript, which `torch.load` would hand on to its own interpreter."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    poison(run, "state.pt", lambda data: buffer.getvalue())


def edit_state(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of every checkpoint."""

    def changed(data: bytes) -> bytes:
        state = torch.load(io.BytesIO(data), weights_only=True)
        change(state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    poison(run, "state.pt", changed)


def nan_weights(run: Path, mark: Path) -> None:
    def poisoned(state: dict[str, Any]) -> None:
        for part in (state["agent"]["policy"], state["reward"]):
            for value in part.values():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    value.fill_(float("nan"))

    edit_state(run, poisoned)


def _moments(run: Path, change: Callable[[torch.Tensor], Any]) -> None:
    def changed(state: dict[str, Any]) -> None:
        for held in state["agent"]["critic_optimizer"]["state"].values():
            held["exp_avg_sq"] = change(held["exp_avg_sq"])

    edit_state(run, changed)


def short_moments(run: Path, mark: Path) -> None:
    """An optimiser's state of one number, behind whose end a fused kernel would read and write."""
    _moments(run, lambda moments: torch.zeros(1))


def repeated_moments(run: Path, mark: Path) -> None:
    """The same, seen in the right shape."""
    _moments(run, lambda moments: torch.zeros(1).expand(moments.shape))


def moments_of_text(run: Path, mark: Path) -> None:
    _moments(run, lambda moments: "../../x")


def endless_state(run: Path, mark: Path) -> None:
    """One number, seen as ten billions: sixteen bytes of the file."""

    def expanded(state: dict[str, Any]) -> None:
        state["agent"]["policy"] = {name: torch.zeros(1).expand(10**13) for name in state["agent"]["policy"]}

    edit_state(run, expanded)


def other_step(run: Path, mark: Path) -> None:
    """A checkpoint that sorts behind all that will ever be saved."""
    *old, newest = sorted((run / "checkpoints").iterdir())
    for folder in old:
        shutil.rmtree(folder)
    newest.rename(newest.with_name("step_999999999999"))


def recalled_text(run: Path, mark: Path) -> None:
    """The answers that a run will look for, known in advance from its seed, with other things in their places."""
    lines = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    (run / "answers.jsonl").write_text("".join(json.dumps({**line, "prefers_first": "x"}) + "\n" for line in lines))
    _begin_anew(run)


def recalled_state(run: Path, mark: Path) -> None:
    lines = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    (run / "answers.jsonl").write_text("".join(json.dumps({**line, "teacher": [1, "x"]}) + "\n" for line in lines))
    _begin_anew(run)


def _begin_anew(run: Path) -> None:
    for name in ("checkpoints", "steps"):
        shutil.rmtree(run / name)
    (run / "metrics.jsonl").unlink()


def object_arrays(run: Path, mark: Path) -> None:
    poison(run, "arrays.npz", lambda data: npz(replay_rewards=np.array([Payload(mark)], dtype=object)))


def bomb_arrays(run: Path, mark: Path) -> None:
    poison(run, "arrays.npz", lambda data: npz(zipfile.ZIP_DEFLATED, replay_rewards=np.zeros(BOMB, np.uint8)))


def overlapping_arrays(run: Path, mark: Path) -> None:
    """A thousand entries of the directory that all name the same bytes."""

    def overlapped(data: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.npy", bytes(10_000))
            (member,) = archive.infolist()
            for _ in range(1000):
                archive.filelist.append(member)
        return buffer.getvalue()

    poison(run, "arrays.npz", overlapped)


def huge_array(run: Path, mark: Path) -> None:
    """A header that promises an exabyte."""
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000, 100), }"
    text = header.ljust(117).encode() + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text

    def promised(data: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("replay_rewards.npy", member)
        return buffer.getvalue()

    poison(run, "arrays.npz", promised)


def manifest_elsewhere(run: Path, mark: Path) -> None:
    def elsewhere(manifest: dict[str, Any]) -> None:
        manifest["files"]["../../../../../../etc/passwd"] = manifest["files"].pop("state.pt")

    edit_manifest(run, elsewhere)


def manifest_nested(run: Path, mark: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("[" * 200_000)


def manifest_rows(run: Path, mark: Path) -> None:
    edit_manifest(run, lambda manifest: manifest["steps"]["replay"].update(rows=10**30))


def manifest_negative(run: Path, mark: Path) -> None:
    edit_manifest(run, lambda manifest: manifest["steps"]["replay"].update(rows=-5))


def other_shapes(run: Path, mark: Path) -> None:
    def reshaped(data: bytes) -> bytes:
        state = torch.load(io.BytesIO(data), weights_only=True)
        state["agent"]["policy"] = {name: torch.zeros(3) for name in state["agent"]["policy"]}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    poison(run, "state.pt", reshaped)


def object_preferences(run: Path, mark: Path) -> None:
    (run / "preferences.npz").write_bytes(npz(obs=np.array([Payload(mark)], dtype=object), metadata="{}"))


def _store(run: Path, change: str, *values: Any) -> None:
    """A sound store of labels with two answers, beside which `change` was done in SQL."""
    with contextlib.closing(LabelStore(run / "labels.npz.sqlite3", repeats=0.0)) as store:
        store.post([Pair(f"k{i}", b"clips", (0.0, 1.0)) for i in range(2)])
        for i in range(2):
            shown = store.next("you")
            assert shown is not None
            store.answer(f"a{i}", "you", shown, 1.0, 1.0)
    with contextlib.closing(sqlite3.connect(run / "labels.npz.sqlite3")) as db, db:
        assert db.execute(change, values).rowcount != 0


def store_rubbish(run: Path, mark: Path) -> None:
    (run / "labels.npz.sqlite3").write_bytes(b"nothing of the kind" * 1000)


def store_of_other_tables(run: Path, mark: Path) -> None:
    with contextlib.closing(sqlite3.connect(run / "labels.npz.sqlite3")) as db, db:
        db.execute("CREATE TABLE question (id, key, open, returns, session)")


def store_with_a_trigger(run: Path, mark: Path) -> None:
    _store(run, "CREATE TRIGGER t AFTER INSERT ON answer BEGIN DELETE FROM question; END")


def store_with_a_view(run: Path, mark: Path) -> None:
    _store(run, "CREATE VIEW v AS SELECT load_extension('payload')")


def store_with_an_odd_name(run: Path, mark: Path) -> None:
    _store(run, "UPDATE answer SET rater = ?", "\x1b]0;owned\x07<script>")


def store_with_odd_labels(run: Path, mark: Path) -> None:
    _store(run, "UPDATE answer SET label = 'yes'")


def store_with_a_label_beyond_one(run: Path, mark: Path) -> None:
    _store(run, "UPDATE question SET label = 1e300")


def store_with_endless_seconds(run: Path, mark: Path) -> None:
    _store(run, "UPDATE answer SET seconds = 9e999")


def store_with_a_text_for_a_time(run: Path, mark: Path) -> None:
    _store(run, "UPDATE answer SET given = 'soon'")


def store_with_odd_returns(run: Path, mark: Path) -> None:
    _store(run, "UPDATE question SET returns = ?", "[" * 100_000)


def store_with_returns_that_are_no_numbers(run: Path, mark: Path) -> None:
    _store(run, "UPDATE question SET returns = '[NaN, 1]'")


def _replaced_table(run: Path, name: str, create: str) -> None:
    """A store with another table, or index, of this name."""
    with contextlib.closing(LabelStore(run / "labels.npz.sqlite3")):
        pass
    with contextlib.closing(sqlite3.connect(run / "labels.npz.sqlite3")) as db, db:
        db.execute(f"DROP {'INDEX' if 'INDEX' in create else 'TABLE'} IF EXISTS {name}")
        db.execute(create)


def store_with_a_virtual_table(run: Path, mark: Path) -> None:
    _replaced_table(run, "lease", "CREATE VIRTUAL TABLE lease USING fts5(rater, question, repeat, until)")


def store_with_a_generated_column(run: Path, mark: Path) -> None:
    create = "CREATE TABLE intake (session INTEGER PRIMARY KEY, step INTEGER, x AS (zeroblob(1000000000)))"
    _replaced_table(run, "intake", create)


def store_with_a_check(run: Path, mark: Path) -> None:
    _replaced_table(run, "intake", "CREATE TABLE intake (session INTEGER PRIMARY KEY, step INTEGER CHECK (step < 0))")


def store_with_a_default(run: Path, mark: Path) -> None:
    _replaced_table(run, "intake", "CREATE TABLE intake (session INTEGER PRIMARY KEY, step INTEGER DEFAULT 7)")


def store_with_an_index_of_its_own(run: Path, mark: Path) -> None:
    _replaced_table(run, "x", "CREATE INDEX x ON answer (hex(zeroblob(100000000)))")


def store_without_its_index(run: Path, mark: Path) -> None:
    """In which one person could answer a pair twice."""
    _replaced_table(run, "once", "CREATE INDEX once ON answer (question)")


def store_of_answers_to_nothing(run: Path, mark: Path) -> None:
    _store(run, "UPDATE answer SET question = 99 WHERE id = 'a0'")


def odd_names(run: Path, mark: Path) -> None:
    folder = run / "checkpoints"
    for name in ("step_evil", "step_000000000999.evil", "step_99999999999999999999", ".step_evil.tmp", "damaged_step"):
        (folder / name).mkdir()
        (folder / name / "kept").write_text("kept")
    (folder / "step_000000000998").write_text("a file")
    (folder / "step_\x1b[2J").mkdir()
