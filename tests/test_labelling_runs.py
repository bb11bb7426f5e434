"""Whole runs that people teach: training that does not wait, kills and resumes; in a browser: test_labelling_page."""

from __future__ import annotations

import http.client
import itertools
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.faults.people import ask_page
from pbrl import label
from pbrl.labelling import teacher as teacher_module
from pbrl.labelling.store import FILE_NAME, LabelStore
from pbrl.labelling.teacher import HumanTeacher, pair_keys
from pbrl.launch.configuration import options
from pbrl.loop import Loop, Stopped
from pbrl.preferences import Preferences
from pbrl.preferences import main as preferences_main
from pbrl.types import Answer, Query
from tests.conftest import TINY, config, finish, rows, tiny_loop
from tests.people import Command, answers, wait_for
from tests.test_labelling import Clock, give, recorded

HUMAN = ("teacher=human", "teacher.repeats=0", "teacher.undo_seconds=0", "teacher.task=go", "teacher.size=64")
OPEN = "teacher.wait=false"


class NoService:
    """Instead of the page: the test answers in the store itself."""

    link = "http://127.0.0.1:1/#token"

    def __init__(self, settings: Any, port: int = 0) -> None:
        pass

    def tell(self, **said: Any) -> None:
        pass

    def keep_alive(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "Service", NoService)


def by_return(store: LabelStore, limit: int) -> None:
    """Answer up to `limit` pairs by the task's own returns."""
    for _ in range(limit):
        shown = store.next("you")
        if shown is None:
            return
        ((text,),) = store._all("SELECT returns FROM question WHERE id = ?", shown.question)
        first, second = map(float, text.strip("[]").split(","))
        store.answer(f"a{shown.question}", "you", shown, float(first > second), 1.0)


def scripted(loop: Loop, plan: dict[int, int], stop_at: int | None = None) -> Loop:
    """At these environment steps somebody answers so many pairs; the run is told to stop at another."""
    teacher: Any = loop.parts.teacher
    original, done = teacher.watch, set()

    def watch(row: Any) -> None:
        original(row)
        for step, count in plan.items():
            if row["env_step"] >= step and step not in done:
                done.add(step)
                by_return(teacher._open()[0], count)

    teacher.watch = watch
    if stop_at is not None:
        loop.stop = lambda: loop.step >= stop_at
    return loop


PLAN = {250: 2, 350: 4, 450: 1}  # sessions are at 200, 300, 400, 500, …


def open_run(run_dir: Path, *more: str) -> Loop:
    return tiny_loop(run_dir, *HUMAN, OPEN, "total_steps=550", "checkpoint_every=250", *more)


def test_training_goes_on_and_takes_answers_in_at_the_next_session(tmp_path: Path, no_page: None) -> None:
    finish(scripted(open_run(tmp_path / "run"), PLAN))
    sessions = [row for row in rows(tmp_path / "run") if "feedback/session" in row]
    assert [row["feedback/labels"] for row in sessions][:4] == [0, 2, 6, 7]
    assert sessions[0]["env_step"] == 200 and "reward/accuracy" not in sessions[0], "nobody has answered: no reward yet"
    assert "reward/accuracy" in sessions[1]
    # never more than a session's questions are open, and never more than the budget's 15 are asked
    assert [row["feedback/outstanding"] for row in sessions][:4] == [5.0, 5.0, 5.0, 5.0]
    store = LabelStore(tmp_path / "run" / FILE_NAME)
    used = store._all("SELECT id, session, step FROM question WHERE session IS NOT NULL ORDER BY id")
    assert [row[1:] for row in used] == [(1, 300)] * 2 + [(2, 400)] * 4 + [(3, 500)]


@pytest.mark.slow
def test_a_run_that_does_not_wait_resumes_bit_for_bit(tmp_path: Path, no_page: None) -> None:
    finish(scripted(open_run(tmp_path / "whole"), PLAN))
    with pytest.raises(Stopped):
        finish(scripted(open_run(tmp_path / "cut"), PLAN, stop_at=470))
    for checkpoint in sorted((tmp_path / "cut" / "checkpoints").glob("step_*"))[1:]:  # what a kill -9 leaves
        for path in sorted(checkpoint.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        checkpoint.rmdir()
    loop = tiny_loop(tmp_path / "unused", *HUMAN, f"resume={tmp_path / 'cut'}")
    assert loop.step < 300, "before answers were taken in"
    finish(loop)  # all that was answered is in the store, the answer after the last session too
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert answers(tmp_path / "cut") == answers(tmp_path / "whole")


def test_an_environment_without_states_is_refused_before_anything_starts(tmp_path: Path, no_page: None) -> None:
    with pytest.raises(Exception, match="shows clips"):
        tiny_loop(tmp_path / "run", *HUMAN, "env._target_=tests.test_labelling_runs.Stateless")


def Stateless(horizon: int = 50) -> Any:
    """The point mass without restorable states."""
    from envs.pointmass import PointMass

    env = PointMass(horizon)
    env.state_size = 0
    return env


@pytest.mark.slow
def test_kill_9_of_training_in_the_middle_of_a_session_loses_and_doubles_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = [
        *(
            "env=pointmass",
            "updater=pebble",
            "threads=1",
            "total_steps=400",
            "segment_length=10",
            "pretraining.steps=50",
        ),
        *("agent.learning_starts=50", "agent.net_arch=[16,16]", "agent.batch_size=32", "agent.buffer_size=10000"),
        *("reward.hidden=[16,16]", "pretraining.updates=5", "feedback.budget=8", "feedback.per_session=4"),
        *("feedback.every=150", "eval.every=400", "eval.episodes=1", "checkpoint_every=200", f"run_dir={run_dir}"),
    ]
    command = Command(*settings, *HUMAN)
    given = 0
    try:
        for _ in range(8):
            page = ask_page(command.link())
            state = wait_for(lambda page=page: (s := page("state"))["question"] and s, 60)
            page("answer", answer=f"a{given}", **state["question"], label=1, seconds=1.0)
            given += 1
            command.process.send_signal(signal.SIGKILL)
            command.wait()
            assert len(answers(run_dir)) == given
            command = Command(f"resume={run_dir}")
        assert command.wait(120) == 0, command.output
    finally:
        if command.process.poll() is None:
            command.process.kill()
    found = answers(run_dir)
    assert len(found) == 8 and len({row[0] for row in found}) == 8, "each once, no question twice"
    assert '"feedback/labels": 8' in (run_dir / "summary.json").read_text()


def attacks(link: str) -> Iterator[tuple[int, bytes]]:
    """What the page's server says to somebody without its token, from elsewhere, or with rubbish, over and over."""
    address, _, token = link.partition("/#")
    host = address.removeprefix("http://")
    own = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    good = b'{"rater": "mallory", "answer": "x", "number": 1, "repeat": false, "label": 1, "seconds": 1.0}'
    wrong: list[tuple[str, str, dict[str, str], bytes]] = [
        ("POST", "/api/answer", own | {"Authorization": "Bearer wrong"}, good),
        ("POST", "/api/answer", own | {"Host": "evil.example"}, good),
        ("POST", "/api/answer", own | {"Origin": "http://evil.example"}, good),
        ("POST", "/api/answer", own, good[:-5]),
        ("POST", "/api/answer", own, b"[" * 4000),
        ("POST", "/api/answer", own, b" " * 100_000),
        ("GET", "/../../../../etc/passwd", own, b""),
        ("GET", "/%2e%2e/labelling.sqlite3", own, b""),
        ("GET", "/api/clip?number=../../config.yaml", own, b""),
    ]
    for method, path, headers, body in itertools.cycle(wrong):
        connection = http.client.HTTPConnection(host, timeout=30)
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            yield reply.status, reply.read()
        except OSError:  # it hangs up on too long a body
            yield 413, b"\n"
        finally:
            connection.close()


@pytest.mark.slow
def test_attacks_on_the_page_of_a_running_training_change_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = Command(*TINY, *HUMAN, f"run_dir={run_dir}")
    try:
        link = command.link()
        page, said, idle = ask_page(link), list[tuple[int, bytes]](), 0
        slow = [socket.create_connection(link.split("/")[2].split(":"), timeout=30) for _ in range(30)]
        for connection in slow:
            connection.sendall(b"POST /api/answer HTTP/1.1\r\nContent-Length: 9999\r\nX-A: ")
        for status in attacks(link):
            if command.process.poll() is not None:
                break
            said.append(status)
            if len(said) % 20:
                continue
            try:
                question = page("state")["question"]
                if question is not None:
                    page("answer", answer=f"{question}", **question, label=1, seconds=1.0)
            except OSError:  # refused with the rest of the flood: somebody who has the token tries again
                idle += 1
        for connection in slow:
            connection.close()
        assert command.wait() == 0, command.output
    finally:
        if command.process.poll() is None:
            command.process.kill()
    assert "Traceback" not in command.output
    assert len(said) > 100 and {status for status, _ in said} <= {400, 403, 404, 413, 421, 429}, said[:20]
    assert all(text.count(b"\n") == 1 and len(text) < 200 for _, text in said)
    assert [row[1] for row in answers(run_dir)] == ["you"] * 15, "each of the budget's, and nobody else's"


def test_shipped_settings_for_people_compose() -> None:
    for name in ("teach-pointmass", "teach-walker"):
        cfg, choices = config(f"experiment={name}")
        assert choices["teacher"] == "human" and cfg.teacher.task and choices["query"] == "distinct"


@pytest.mark.parametrize(
    "env", [name for name in options("env") if name not in ("metaworld", "dm_control", "gymnasium")]
)
def test_each_shipped_task_has_its_words(env: str) -> None:
    assert len(config(f"env={env}", "teacher=human")[0].teacher.task.split()) >= 2


def test_a_page_without_words_says_so(tmp_path: Path, no_page: None, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_loop(tmp_path / "run", *HUMAN[:1], "teacher.task=null").release()
    assert "teacher.task=" in capsys.readouterr().out


def exported(path: Path, count: int = 4) -> Path:
    """A file of answered pairs of the point mass."""
    stored = Preferences({"env": "pointmass", "teacher": "oracle"})
    stored.add(recorded(count), Answer(torch.ones(count), torch.ones(count, dtype=torch.bool)), 1)
    stored.save(path)
    return path


def test_labels_replace_no_file_but_their_own(
    tmp_path: Path, no_page: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def two(teacher: Any, query: Query) -> None:
        teacher.post(query)
        for _ in range(2):
            give(teacher._open()[0], "you", 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(label, "_until_answered", two)
    source, out = exported(tmp_path / "labels.npz"), tmp_path / "labels-people.npz"
    before, other = source.read_bytes(), exported(tmp_path / "other.npz")
    for given, message in (
        (source, "is the file whose pairs are asked"),
        (tmp_path / "." / "labels.npz", "is the file whose pairs are asked"),
        (other, "exists, and no other.npz.sqlite3 beside it"),
        (tmp_path / "no-folder" / "people.npz", "there is no folder"),
    ):
        assert label.main([str(source), f"--out={given}"]) == 1
        assert message in capsys.readouterr().err
    for answered in (2, 4):  # the same command goes on
        assert label.main([str(source), "--repeats=0"]) == 0
        assert len(Preferences.load(out)) == answered
    assert source.read_bytes() == before and other.read_bytes() == before


def test_labelling_ends_when_nothing_can_be_undone_any_more(
    tmp_path: Path, no_page: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pass_time(seconds: float) -> None:
        clock.now += seconds
        if clock.now > 1001 and not undone:
            undone.append(store.last("you"))
            store.undo("you", undone[0])
        elif clock.now > 1010 and store.next("you"):
            give(store, "you", 0.0)

    clock, undone = Clock(), list[Any]()
    teacher = HumanTeacher({}, "go", repeats=0.0, undo_seconds=3.0)
    teacher.open(tmp_path, 10)
    store = teacher._open()[0]
    store.clock = clock
    query = recorded(2)
    teacher.post(query)
    for _ in range(2):
        give(store, "you", 1.0)
    monkeypatch.setattr(label, "time", SimpleNamespace(sleep=pass_time))
    label._until_answered(teacher, query)
    assert store.finished(pair_keys(query), 0.0) == 2 and clock.now > 1013
    teacher.close(complete=True)


def test_an_answer_taken_back_before_the_labels_are_collected_is_asked_again(
    tmp_path: Path, no_page: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answered(teacher: Any, query: Query) -> None:
        teacher.post(query)
        store = teacher._open()[0]
        while store.next("you"):
            give(store, "you", 1.0)
        if not rounds:
            store.undo("you", store.last("you"))
        rounds.append(len(query))

    rounds = list[int]()
    monkeypatch.setattr(label, "_until_answered", answered)
    assert label.main([str(exported(tmp_path / "pairs.npz")), "--repeats=0"]) == 0
    assert len(rounds) == 2 and len(Preferences.load(tmp_path / "pairs-people.npz")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("folder", [True, False])
def test_a_runs_pairs_are_labelled_offline_and_start_another_run(tiny_run: Path, tmp_path: Path, folder: bool) -> None:
    source, out = tmp_path / "oracle.npz", tmp_path / "people.npz"
    if folder:
        source = shutil.copytree(tiny_run, tmp_path / "labelled")
        out = source / "labels.npz"
    else:
        assert preferences_main(["export", str(tiny_run), str(source)]) == 0
    for stop_after in (6, 9):
        command = Command(str(source), *([] if folder else [f"--out={out}"]), "--repeats=0", module="pbrl.label")
        try:
            page = ask_page(command.link())
            for i in range(stop_after):
                state = wait_for(lambda page=page: (s := page("state"))["question"] and s, 60)
                assert state["task"] == "bring the blue point into the green circle"
                assert state["training"]["phase"] in ("starting", "labelling"), "nothing trains"
                label = None if i == 2 else 0.5
                page("answer", answer=f"{stop_after}-{i}", **state["question"], label=label, seconds=1.0)
            if stop_after == 6:
                command.process.send_signal(signal.SIGINT)
            assert command.wait(60) == 0, command.output
        finally:
            if command.process.poll() is None:
                command.process.kill()
    labelled = Preferences.load(out)
    assert labelled.counts == {"asked": 15, "given": 13, "skipped": 2, "equal": 13}
    assert labelled.about["raters"]["you"]["answers"] == 15.0
    finish(tiny_loop(tmp_path / "run", f"import_preferences={out}", "feedback.budget=20"))
    assert Preferences.load(tmp_path / "run" / "preferences.npz").counts["asked"] == 20
    if folder:  # and what it has is read by the tools for files, and labelled once more
        assert preferences_main(["merge", str(out), str(tmp_path / "again.npz")]) == 0
        finish(tiny_loop(source, f"resume={source}"))
