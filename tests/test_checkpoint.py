"""Checkpoint files: whole or recognised as damaged, at any moment of writing and after any accident."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pbrl.records.checkpoint
from pbrl.asking import AnswerJournal, TeacherError
from pbrl.records.checkpoint import CheckpointError, StepLog, load_latest, non_finite, save_checkpoint
from pbrl.types import Answer, Query, Segments
from tests.conftest import ask, tiny_loop


class Ring:
    """A run of numbers in a ring: row i holds i, in two columns."""

    def __init__(self, folder: Path, capacity: int = 50) -> None:
        self.total = 0
        self.columns = [np.zeros((capacity, 2), np.float32), np.zeros(capacity, np.int64)]
        self.log = StepLog(folder / "steps", "ring", self.columns)

    def take(self, count: int) -> None:
        for _ in range(count):
            i = self.total % len(self.columns[0])
            self.columns[0][i], self.columns[1][i] = self.total + 0.5, self.total
            self.total += 1

    def check(self, total: int) -> None:
        """The ring holds the last rows of the first `total`."""
        kept = np.arange(max(0, total - len(self.columns[1])), total)
        assert np.array_equal(self.columns[1][kept % len(self.columns[1])], kept)
        assert np.array_equal(self.columns[0][kept % len(self.columns[1]), 1], kept + np.float32(0.5))


def save(run: Path, ring: Ring, value: float = 0.0) -> Path:
    state = {"weight": torch.full((3,), value), "list": [1, 2.0, None]}
    arrays = {"a": np.arange(5), "b": np.full(4, value, np.float32)}
    return save_checkpoint(run, ring.total, {"step": ring.total}, state, arrays, [(ring.log, ring.total)])


def saved_twice(run: Path) -> Ring:
    """A run with checkpoints at 30 and 70 steps."""
    ring = Ring(run)
    for steps in (30, 40):
        ring.take(steps)
        save(run, ring, float(ring.total))
    return ring


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    saved_twice(tmp_path)
    ring = Ring(tmp_path)
    loaded = load_latest(tmp_path, [ring.log])
    assert loaded.run == {"step": 70}
    assert torch.equal(loaded.state["weight"], torch.full((3,), 70.0))
    assert loaded.state["list"] == [1, 2.0, None]
    assert loaded.arrays["a"].tolist() == [0, 1, 2, 3, 4]
    ring.check(70)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=12), st.integers(1, 9))
def test_rings_survive_any_order_of_steps_saves_and_loads(
    tmp_path_factory: pytest.TempPathFactory, capacity: int, events: list[tuple[int, bool]], rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pbrl.records.checkpoint, "FILE_ROWS", rows)
        run = tmp_path_factory.mktemp("ring")
        ring = Ring(run, capacity)
        for steps, reload in events:
            ring.take(min(steps, capacity))
            save(run, ring)
            if reload:
                total = ring.total
                ring.take(steps // 2)  # lost
                ring = Ring(run, capacity)
                load_latest(run, [ring.log])
                ring.total = total
            ring.check(ring.total)
        held = len(list((run / "steps").glob("*"))) if events else 0
        assert held <= (2 * capacity) // rows + 3  # one ring, and what the checkpoint before needs


def test_more_steps_than_the_ring_holds_are_refused(tmp_path: Path) -> None:
    ring = Ring(tmp_path, capacity=10)
    ring.take(11)
    with pytest.raises(ValueError, match="11 steps since the last checkpoint, but the ring ring holds 10"):
        save(tmp_path, ring)


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def turned(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def emptied(data: bytes) -> bytes:
    return b""


def foreign(data: bytes) -> bytes:
    return b'{"format": 2, "step": 3}'


@pytest.mark.parametrize("damage", [truncated, turned, emptied, foreign])
@pytest.mark.parametrize("name", ["manifest.json", "run.json", "state.pt", "arrays.npz"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[bytes], bytes]
) -> None:
    saved_twice(tmp_path)
    path = tmp_path / "checkpoints" / "step_000000000070" / name
    path.write_bytes(damage(path.read_bytes()))
    ring = Ring(tmp_path)
    assert load_latest(tmp_path, [ring.log]).run == {"step": 30}
    ring.check(30)
    assert "checkpoint step_000000000070 cannot be used" in capsys.readouterr().out


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_turned_bit_is_recognised(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    run = tmp_path_factory.getbasetemp() / "bits"
    if not run.exists():
        saved_twice(run_made(run))
    files = sorted((run / "checkpoints" / "step_000000000070").iterdir()) + sorted((run / "steps").iterdir())
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    first = 0 if path.parent.name != "steps" else 30 * 16  # later rows are the second checkpoint's only
    place = data.draw(st.integers(first, len(before) - 1))
    bit = data.draw(st.integers(0, 7))
    path.write_bytes(before[:place] + bytes([before[place] ^ 1 << bit]) + before[place + 1 :])
    try:
        assert load_latest(run, [Ring(run).log]).run == {"step": 30}
    finally:
        path.write_bytes(before)


def run_made(run: Path) -> Path:
    run.mkdir()
    return run


def test_without_a_usable_checkpoint_every_reason_is_given(tmp_path: Path) -> None:
    saved_twice(tmp_path)
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "state.pt").unlink()
    with pytest.raises(CheckpointError, match=r"step_000000000070: .*No such file.*step_000000000030.*import_prefer"):
        load_latest(tmp_path)


def test_an_older_format_is_said_to_be_one(tmp_path: Path) -> None:
    saved_twice(tmp_path)
    for folder in (tmp_path / "checkpoints").iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(CheckpointError, match="it has format 1; this version of pbrl reads 2"):
        load_latest(tmp_path)


def test_a_checkpoint_of_another_run_is_recognised(tmp_path: Path) -> None:
    ours, theirs = run_made(tmp_path / "ours"), run_made(tmp_path / "theirs")
    saved_twice(ours)
    ring = Ring(theirs)
    for _ in range(2):
        ring.take(40)
        ring.columns[1] += 1000  # other steps
        save(theirs, ring)
    shutil.copytree(theirs / "checkpoints" / "step_000000000080", ours / "checkpoints" / "step_000000000080")
    assert load_latest(ours, [Ring(ours).log]).run == {"step": 70}


def test_what_cannot_be_restored_counts_as_damaged_and_is_set_aside(tmp_path: Path) -> None:
    saved_twice(tmp_path)

    def restore(loaded: Any) -> None:
        if loaded.run["step"] == 70:
            raise KeyError("sessions")

    ring = Ring(tmp_path)
    assert load_latest(tmp_path, [ring.log], restore).run == {"step": 30}
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["damaged_step_000000000070", "step_000000000030"]
    ring.total = 30
    ring.take(10)
    save(tmp_path, ring)  # and the good ones are what is kept
    assert load_latest(tmp_path, [Ring(tmp_path).log]).run == {"step": 40}
    assert (tmp_path / "checkpoints" / "step_000000000030").exists()


@pytest.mark.parametrize("key", ["rollouts", "journal"])
def test_a_key_missing_in_run_json_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    loop = tiny_loop(tmp_path / "run", "total_steps=250", "eval.every=1000")
    loop.save()
    loop.save()
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    run = json.loads((newest / "run.json").read_text())
    del run[key]
    (newest / "run.json").write_text(json.dumps(run))
    records = json.loads((newest / "manifest.json").read_text())["steps"]
    (newest / "manifest.json").unlink()
    pbrl.records.checkpoint._write_manifest(newest, 0, records)  # as a version without this key would have written it
    loop.load()
    loop.close(False)
    printed = capsys.readouterr().out
    assert f"checkpoint {newest.name} cannot be used ('{key}' is missing); trying the one before" in printed


@pytest.mark.parametrize(
    "function", ["torch.save", "np.savez", "_write_manifest", "fsync_folder", "_drop_old", "remove_folder"]
)
@pytest.mark.parametrize("again", [False, True])
def test_a_save_that_fails_anywhere_leaves_a_usable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, again: bool
) -> None:
    ring = saved_twice(tmp_path)
    ring.take(0 if again else 5)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"pbrl.records.checkpoint.{function}", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, ring)
    restored = Ring(tmp_path)
    step = load_latest(tmp_path, [restored.log]).run["step"]
    assert step in (70, ring.total)
    restored.total = step
    restored.check(step)
    restored.take(20)
    save(tmp_path, restored)  # and the run can go on
    assert load_latest(tmp_path, [Ring(tmp_path).log]).run["step"] == restored.total
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_no_checkpoint_is_ever_replaced(tmp_path: Path) -> None:
    ring = saved_twice(tmp_path)
    names = [save(tmp_path, ring, value).name for value in range(12)]
    assert names[0] == "step_000000000070.001"
    assert names[-1] == "step_000000000070.012"
    assert torch.equal(load_latest(tmp_path).state["weight"], torch.full((3,), 11.0))


def test_a_diverged_state_is_never_saved(tmp_path: Path) -> None:
    ring = saved_twice(tmp_path)
    ring.take(1)
    with pytest.raises(FloatingPointError, match="weight is not finite at step 71: the run diverged; it is not saved"):
        save(tmp_path, ring, float("nan"))
    assert load_latest(tmp_path, [Ring(tmp_path).log]).run == {"step": 70}


def test_what_is_not_finite_is_named() -> None:
    assert non_finite({"a": [1, {"b": torch.ones(2)}], "c": None}) is None
    assert non_finite({"a": [1, {"b": torch.tensor([1.0, float("inf")])}]}) == "a[1]/b"
    assert non_finite({"a": {"b": float("nan")}}) == "a/b"


# Durable answers


def query(size: int) -> Query:
    sides = [Segments(torch.randn(size, 3, 2), torch.zeros(size, 3, 1)) for _ in range(2)]
    return Query(*sides, task_rewards=torch.zeros(size, 2, 3))


def test_without_room_for_the_answer_the_teacher_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, asked = AnswerJournal(tmp_path / "answers.jsonl"), []

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def teacher(question: Query) -> Answer:
        asked.append(question)
        return Answer(torch.ones(len(question)), torch.ones(len(question), dtype=torch.bool))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ask(teacher, query(3), journal)
    assert asked == []
    assert journal.path.read_bytes() == b""
    ask(teacher, query(3), journal)
    assert len(AnswerJournal(journal.path)._entries) == 1


def test_the_room_for_an_answer_is_given_back(tmp_path: Path) -> None:
    journal, sizes = AnswerJournal(tmp_path / "answers.jsonl"), []

    def teacher(question: Query) -> Answer:
        sizes.append(journal.path.stat().st_size)
        raise ConnectionError("gone")

    with pytest.raises(TeacherError, match="gone"):
        ask(teacher, query(100), journal)
    assert sizes[0] > 16_384 + 6_400 - 1
    assert journal.path.read_bytes() == b""


def test_the_room_of_a_killed_run_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    journal = AnswerJournal(path)
    ask(lambda q: Answer(torch.ones(2), torch.ones(2, dtype=torch.bool)), query(2), journal)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 999)
    assert len(AnswerJournal(path)._entries) == 1
    assert path.read_bytes() == whole
