"""A resumed run equals the uninterrupted one, bit for bit, wherever it was stopped."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

import pbrl.dialogue
from experiments.faults.runs import TINY
from experiments.faults.same import differences, metrics
from pbrl.labelling import teacher as labelling
from pbrl.labelling.teacher import HumanTeacher
from pbrl.launch.build import build, processor, versions
from pbrl.launch.configuration import options
from pbrl.loop import Loop, Stopped
from pbrl.records import checkpoint as stored_checkpoint
from pbrl.records.checkpoint import load_latest
from pbrl.types import Answer, Query, Teacher
from tests.people import AnsweredPage, answers

WRAPPED = [  # often stored, and its rings wrap
    *TINY,
    "device=cpu",
    "checkpoint_every=25",
    "log_every=30",
    "pretraining.steps=60",
    "agent.learning_starts=60",
    "agent.net_arch=[8,8]",
    "agent.batch_size=16",
    "agent.buffer_size=300",
    "reward.hidden=[8]",
    "updater.fit.epochs=4",
    "updater.fit.least_steps=6",
    "feedback.every=60",
    "feedback.budget=40",
    "feedback.per_session=6",
    "feedback.memory_steps=280",
    "eval.every=100",
]
MORE = {
    "aparl": ["reward.activation=silu"],
    "penalty": ["reward.activation=silu", "updater.walk.rollout_steps=40"],  # by default most of this run
    "fresh": ["updater.pairs=fresh"],
    "qpa": ["updater.fit.steps_per_label=null"],  # fewer steps than it takes by default
    "rime": ["updater.epochs=4", "updater.least_epochs=2", "updater.warm_updates=20"],
    "surf": ["updater.fit.steps_per_label=null"],  # likewise
}

LONG = {"aparl": 2000, "fresh": 2000, "penalty": 2400}  # steps: their sessions take some

REMEMBERING = "teacher._target_=experiments.faults.parts.Remembering"
TEACHERS = {
    "noisy": ["teacher=noisy"],
    "mistake": ["teacher=mistake", "teacher.mistake=0.3"],
    "remembering": [REMEMBERING],
    "function": ["teacher._target_=experiments.faults.parts.prefers_less_motion"],
    "people": ["teacher=human", "teacher.task=go", "teacher.undo_seconds=0"],
}


class Crash(BaseException):
    """Stands for a kill: nothing is saved after it, and nobody handles it."""


def made(run_dir: Path, *more: str, resume: bool = False) -> Loop:
    """A loop that is ready to run."""
    fits = not {"updater=oracle", "updater=rime"} & {*more}  # others do: they have updater.fit
    tiny = [option for option in WRAPPED if fits or not option.startswith("updater.")]
    there = (
        [f"resume={run_dir}", "trust=[tests.test_resume,experiments.faults.parts]"]
        if resume
        else [*tiny, f"run_dir={run_dir}"]
    )
    overrides = [*there, *more]
    cfg = composed(*([] if resume else overrides)).copy()
    if resume:
        cfg.resume, cfg.trust = str(run_dir), ["tests.test_resume", "experiments.faults.parts"]
    return build(cfg, {"env": "pointmass", "teacher": "mistake"}, overrides)


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """The config of these overrides."""
    with initialize_config_module("pbrl.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides))


def finish(loop: Loop) -> Path:
    """Run to the end."""
    try:
        loop.run()
    finally:
        loop.close(True)
    return loop.run_dir


def raising(function: Callable[..., Any], error: BaseException, calls: int = 0, after: bool = False) -> Any:
    """`function`, but from its call number `calls` on it raises (after having done its work, if `after`)."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls and not after:
            raise error
        result = function(*args, **kwargs)
        if count > calls:
            raise error
        return result

    return wrapped


class InterruptedTeacher(Teacher):
    """Ctrl-C while the teacher thinks: it has drawn random numbers already."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher
        for name in ("state_dict", "load_state_dict", "close", "durable"):
            setattr(self, name, getattr(teacher, name))

    def __call__(self, query: Query) -> Answer:
        self.teacher(query)
        raise KeyboardInterrupt


def stop(loop: Loop, after: int, patch: pytest.MonkeyPatch) -> None:
    target = loop.step + after
    loop.stop = lambda: loop.step >= target


def interrupt_teacher(loop: Loop, after: int, patch: pytest.MonkeyPatch) -> None:
    loop.parts.teacher = InterruptedTeacher(loop.parts.teacher)


def crash_in_update(loop: Loop, after: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loop.agent, "update", raising(loop.agent.update, Crash(), after, after=True))


def crash_in_session(loop: Loop, after: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loop.parts.updater, "update", raising(loop.parts.updater.update, Crash(), after % 2, after=True))


def crash_after_answer(loop: Loop, after: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("pbrl.dialogue.reward_health", raising(pbrl.dialogue.reward_health, Crash(), after % 2))


def crash_in_evaluation(loop: Loop, after: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loop.parts.eval_env, "step", raising(loop.parts.eval_env.step, Crash(), after))


def crash_in_save(loop: Loop, after: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        stored_checkpoint,
        "_write_manifest",
        raising(stored_checkpoint._write_manifest, Crash(), 1 + after % 3),
    )


def crash_after_save(loop: Loop, after: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stored_checkpoint, "_drop_old", raising(stored_checkpoint._drop_old, Crash(), 1 + after % 3))


def crash_while_people_answer(loop: Loop, after: int, patch: pytest.MonkeyPatch) -> None:
    loop.parts.teacher._service.keep_alive = raising(lambda: None, Crash(), after // 3)  # type: ignore[attr-defined]


WAYS = [
    stop,
    interrupt_teacher,
    crash_in_update,
    crash_in_session,
    crash_after_answer,
    crash_in_evaluation,
    crash_in_save,
    crash_after_save,
]


IN_SESSIONS = [interrupt_teacher, crash_in_session, crash_after_answer]


def interrupted(run_dir: Path, rng: np.random.Generator, points: int, *more: str) -> int:
    """The run with these options, interrupted at up to `points` random points; how many there were."""
    loop, count = made(run_dir, *more), 0
    ways = [way for way in WAYS if loop.asks or way not in IN_SESSIONS]
    if isinstance(loop.parts.teacher, HumanTeacher):
        ways[:0] = [crash_while_people_answer] * 2
    while count < points:
        way = ways[count % len(ways)]
        with pytest.MonkeyPatch.context() as patch:
            way(loop, int(rng.integers(3, 28)), patch)
            try:
                loop.run()
                break
            except (Stopped, Crash):
                count += 1
            finally:
                loop.close(False)
        loop = made(run_dir, resume=True)
    else:
        finish(loop)
    return count


def test_a_run_interrupted_again_and_again_equals_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_checkpoint, "FILE_ROWS", 128)  # several step files, and old ones to drop
    more = ["teacher=mistake", "teacher.mistake=0.3", "total_steps=480"]
    reference = finish(made(tmp_path / "a", *more))
    assert interrupted(tmp_path / "b", np.random.default_rng(0), len(WAYS), *more) == len(WAYS)  # 20 times: below
    assert differences(reference, tmp_path / "b") == []


def asked(run: Path) -> list[str]:
    """The queries of the journal, in order."""
    return [json.loads(line)["query"] for line in (run / "answers.jsonl").read_text().splitlines()]


UPDATERS = [*sorted(set(options("updater")) - {"oracle"}), "fresh"]
# Each updater with one teacher, by turns, and with people also pebble and those that ask about fresh steps: what an
# updater and what a teacher store is stored apart, and where the two meet is what is asked about.
MET = {*zip(UPDATERS, itertools.cycle(TEACHERS)), *((name, "people") for name in (*LONG, "pebble"))}


@pytest.mark.slow
@pytest.mark.parametrize(("updater", "teacher"), sorted(MET))
def test_every_updater_and_every_teacher_resume_exactly(
    tmp_path: Path, updater: str, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)  # these kills leave the machine up
    monkeypatch.setattr(labelling, "Service", AnsweredPage)
    monkeypatch.setattr(labelling, "LOOK", 0.005)
    name = "pebble" if updater == "fresh" else updater
    more = [f"updater={name}", *TEACHERS[teacher], "query=k-center-entropy", *MORE.get(updater, [])]
    more += [f"total_steps={LONG.get(updater, 1200)}", "feedback.budget=100"]
    reference = finish(made(tmp_path / "a", *more))
    assert interrupted(tmp_path / "b", np.random.default_rng(len(updater)), 11, *more) >= 10
    assert differences(reference, tmp_path / "b") == []
    given = answers if teacher == "people" else asked
    assert given(tmp_path / "b") == given(reference)
    assert len(set(given(reference))) == len(given(reference)) > 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [["query=branch"], ["updater=oracle"], ["agent.hybrid_ratio=0.5"], ["query=near-policy"]]
)
def test_other_parts_resume_exactly(tmp_path: Path, more: list[str]) -> None:
    reference = finish(made(tmp_path / "a", *more))
    assert interrupted(tmp_path / "b", np.random.default_rng(1), 10, *more) > 3
    assert differences(reference, tmp_path / "b") == []


@pytest.mark.slow
@pytest.mark.parametrize("env", ["walker-walk", "door-open"])
def test_real_simulators_resume_in_the_middle_of_an_episode(tmp_path: Path, env: str) -> None:
    more = [f"env={env}", "env.horizon=120", "total_steps=250", "updater.fit.epochs=5"]
    reference = finish(made(tmp_path / "a", *more))
    loop = made(tmp_path / "b", *more)
    for step in (50, 171, 203):  # episodes begin at multiples of 120
        loop.stop = lambda loop=loop, step=step: loop.step >= step
        with pytest.raises(Stopped):
            loop.run()
        loop.close(False)
        loop = made(tmp_path / "b", resume=True)
        assert loop.step == step
    finish(loop)
    assert differences(reference, tmp_path / "b") == []


@pytest.mark.slow
def test_a_real_simulator_survives_kill_9(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.faults", "--only=simulator", "--kills=10", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    with (tmp_path / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["outcome"].startswith("same") for row in table] == [True] and int(table[0]["times"]) >= 10, table


class GlobalTeacher:
    """A user's teacher who draws from the generators that belong to nobody."""

    def __call__(self, query: Query) -> Answer:
        draws = [random.random() + np.random.rand() + float(torch.rand(())) for _ in range(len(query))]  # noqa: NPY002
        return Answer((torch.tensor(draws) > 1.5).float(), torch.ones(len(query), dtype=torch.bool))


@pytest.mark.slow
def test_a_teacher_interrupted_while_answering_goes_on_from_before_that_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = finish(made(tmp_path / "a", REMEMBERING, "total_steps=260"))
    loop = made(tmp_path / "b", REMEMBERING, "total_steps=260")
    for _ in range(3):
        interrupt_teacher(loop, 0, monkeypatch)
        with pytest.raises(Stopped):
            loop.run()
        loop.close(False)
        loop = made(tmp_path / "b", resume=True)
    finish(loop)
    assert differences(reference, tmp_path / "b") == []


@pytest.mark.slow
def test_the_global_generators_go_on_where_they_were(tmp_path: Path) -> None:
    more = ["teacher._target_=tests.test_resume.GlobalTeacher", "total_steps=400"]
    reference = finish(made(tmp_path / "a", *more))
    loop = made(tmp_path / "b", *more)
    loop.stop = lambda: loop.step >= 190
    with pytest.raises(Stopped):
        loop.run()
    loop.close(False)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    finish(made(tmp_path / "b", resume=True))
    assert differences(reference, tmp_path / "b") == []


@pytest.mark.slow
def test_the_comparison_sees_a_difference(tmp_path: Path) -> None:
    runs = [finish(made(tmp_path / f"{seed}", f"seed={seed}", "total_steps=200")) for seed in (0, 1)]
    found = differences(*runs)
    assert any(name.startswith("row") for name in found)
    assert ".state.agent.policy.actor.mu.weight" in found
    assert ".state.reward.optimizer.state.0.exp_avg" in found
    assert ".arrays.preferences/obs" in found


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_keeps_its_answers(tmp_path: Path) -> None:
    more = ["total_steps=200", "checkpoint_every=190", "teacher=mistake"]
    reference = finish(made(tmp_path / "a", *more))
    loop = made(tmp_path / "b", *more)
    loop.parts.updater.update = raising(loop.parts.updater.update, Crash())
    with pytest.raises(Crash):
        loop.run()
    loop.close(False)
    answers = (tmp_path / "b" / "answers.jsonl").read_bytes()
    assert answers.count(b"\n") == 1
    assert not (tmp_path / "b" / "checkpoints").exists()
    finish(made(tmp_path / "b", resume=True))
    assert (tmp_path / "b" / "answers.jsonl").read_bytes().startswith(answers)
    assert differences(reference, tmp_path / "b") == []


@pytest.mark.slow
def test_a_session_may_take_more_steps_than_fit_beside_those_since_the_last_checkpoint(tmp_path: Path) -> None:
    # 120 fresh steps a session, and 190 between checkpoints, in rings of 200
    more = ["updater.pairs=fresh", "checkpoint_every=190", "feedback.memory_steps=200", "agent.buffer_size=200"]
    more.append("total_steps=500")
    reference = finish(made(tmp_path / "a", *more))
    loop = made(tmp_path / "b", *more)
    loop.stop = lambda: loop.step >= 411
    with pytest.raises(Stopped):
        loop.run()
    loop.close(False)
    finish(made(tmp_path / "b", resume=True))
    assert differences(reference, tmp_path / "b") == []


@pytest.mark.slow
def test_rings_smaller_than_a_session_and_than_the_checkpoints_distance_are_written_down_in_time(
    tmp_path: Path,
) -> None:
    # 240 fresh steps a session, and 1000 between checkpoints, in rings of 150 and 200
    more = ["updater.pairs=fresh", "checkpoint_every=1000", "feedback.memory_steps=150", "agent.buffer_size=200"]
    more += ["feedback.per_session=12", "total_steps=800"]
    reference = finish(made(tmp_path / "a", *more))
    loop = made(tmp_path / "b", *more)
    loop.stop = lambda: loop.step >= 700
    with pytest.raises(Stopped):
        loop.run()
    loop.close(False)
    finish(made(tmp_path / "b", resume=True))
    assert differences(reference, tmp_path / "b") == []


@pytest.mark.slow
def test_a_run_killed_inside_its_first_save_starts_again(tmp_path: Path) -> None:
    reference = finish(made(tmp_path / "a", "total_steps=140"))
    loop = made(tmp_path / "b", "total_steps=140")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_checkpoint, "_write_manifest", raising(stored_checkpoint._write_manifest, Crash()))
        with pytest.raises(Crash):
            loop.run()
    loop.close(False)
    assert [path.suffix for path in (tmp_path / "b" / "checkpoints").iterdir()] == [".tmp"]
    finish(made(tmp_path / "b", resume=True))
    assert differences(reference, tmp_path / "b") == []


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    run = finish(made(tmp_path / "a", "total_steps=200"))
    before = metrics(run)
    finish(made(run, resume=True))
    assert metrics(run) == before


@pytest.mark.slow
def test_a_later_end_is_remembered_by_the_next_resume(tmp_path: Path) -> None:
    run = finish(made(tmp_path / "a", "total_steps=140"))
    loop = made(run, "total_steps=170", resume=True)
    loop.stop = lambda: loop.step >= 150
    with pytest.raises(Stopped):
        loop.run()
    loop.close(False)
    assert metrics(finish(made(run, resume=True)))[-1]["env_step"] == 170


@pytest.mark.slow
def test_stopping_twice_at_one_step_before_any_row_is_logged_keeps_the_log_whole(tmp_path: Path) -> None:
    loop = made(tmp_path / "a")
    loop.stop = lambda: loop.step >= 95
    for _ in range(4):
        with pytest.raises(Stopped):
            loop.run()
        loop.close(False)
        loop = made(tmp_path / "a", resume=True)
        loop.stop = lambda: True
    loop.close(False)
    assert [row["env_step"] for row in metrics(tmp_path / "a")] == [0, 30, 60, 90]
    names = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == ["step_000000000095.002", "step_000000000095.003"]


@pytest.mark.slow
def test_a_run_stopped_before_its_first_step_resumes_exactly(tmp_path: Path) -> None:
    reference = finish(made(tmp_path / "a", "total_steps=140"))
    loop = made(tmp_path / "b", "total_steps=140")
    loop.stop = lambda: True
    with pytest.raises(Stopped):
        loop.run()
    loop.close(False)
    finish(made(tmp_path / "b", resume=True))
    assert differences(reference, tmp_path / "b") == []


def test_no_answer_is_asked_for_while_the_run_is_asked_to_stop(tmp_path: Path) -> None:
    loop = made(tmp_path / "a")
    loop.stop = lambda: loop.dialogue.pending is not None
    with pytest.raises(Stopped):
        loop.run()
    loop.close(False)
    assert (tmp_path / "a" / "answers.jsonl").read_bytes() == b""
    assert made_pending(tmp_path / "a")


@pytest.mark.slow
def test_pending_questions_remember_which_of_them_are_about_fresh_steps(tmp_path: Path) -> None:
    loop = made(tmp_path / "a", "updater.pairs=fresh", "feedback.fresh_share=0.4")
    loop.stop = lambda: loop.sessions > 0 and loop.dialogue.pending is not None
    with pytest.raises(Stopped):
        loop.run()
    loop.close(False)
    assert loop.dialogue.pending is not None
    assert loop.dialogue.pending.fresh is not None
    assert 0 < int(loop.dialogue.pending.fresh.sum()) < len(loop.dialogue.pending)
    resumed = made(tmp_path / "a", resume=True)
    assert resumed.dialogue.pending is not None
    assert torch.equal(resumed.dialogue.pending.fresh, loop.dialogue.pending.fresh)  # type: ignore[arg-type]
    assert torch.equal(resumed.dialogue.pending.second.step, loop.dialogue.pending.second.step)  # type: ignore[arg-type]
    resumed.stop = lambda: resumed.sessions > 1
    with pytest.raises(Stopped):
        resumed.run()
    resumed.close(False)
    latest = resumed.parts.preferences.session == 1
    assert torch.equal(resumed.parts.preferences.fresh[latest], loop.dialogue.pending.fresh)


def made_pending(run: Path) -> bool:
    """Whether the questions of an unfinished session are in the newest checkpoint."""
    return "pending/first/obs" in load_latest(run).arrays


def test_new_versions_and_an_edited_config_are_explained_key_by_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = made(tmp_path / "a")
    loop.stop = lambda: loop.step >= 30
    with pytest.raises(Stopped):
        loop.run()
    loop.close(False)
    config = tmp_path / "a" / "config.yaml"
    config.write_text(config.read_text().replace("tau: 0.005", "tau: 0.01"))
    path = tmp_path / "a" / "versions.json"
    stored = json.loads(path.read_text())
    assert stored["processor"] == processor()
    path.write_text(json.dumps(stored | {"torch": "1.0", "processor": "Z80"}))
    made(tmp_path / "a", resume=True).close(False)
    printed = capsys.readouterr().out
    assert f"so not bit for bit: torch 1.0 → {versions()['torch']}, processor Z80 → {processor()}" in printed
    assert "config.yaml was edited since the checkpoint, so not bit for bit: agent.tau: 0.005 → 0.01" in printed
    del stored["processor"]  # as in runs that began before it was named
    path.write_text(json.dumps(stored))
    made(tmp_path / "a", resume=True).close(False)
    assert "processor" not in capsys.readouterr().out
