"""The store of answered pairs, its file and command line; asking, checking and journalling answers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pbrl.asking import AnswerJournal, TeacherError, check_answer
from pbrl.preferences import Preferences, main, merge
from pbrl.types import Answer, Query, Segments
from tests.conftest import ask

generator = torch.Generator().manual_seed(0)


def segments(size: int, length: int = 4, obs_dim: int = 3, raw: bool = False) -> Segments:
    sample = torch.randn(size, length, 2, generator=generator)
    return Segments(torch.randn(size, length, obs_dim, generator=generator), sample.tanh(), sample if raw else None)


def query(size: int, length: int = 4, obs_dim: int = 3, raw: bool = False, states: bool = False) -> Query:
    first, second = segments(size, length, obs_dim, raw), segments(size, length, obs_dim, raw)
    kept = torch.randn(size, 2, 5, generator=generator).double() if states else None
    return Query(first, second, torch.full((size, 2, length), float("nan")), states=kept)


def wide_query(size: int, length: int = 4, margin: int = 3) -> Query:
    """A query that knows `margin` steps before and after its segments."""
    first, second = segments(size, length + 2 * margin), segments(size, length + 2 * margin)
    centre = margin, margin + length
    rewards = torch.zeros(size, 2, length)
    return Query(first.steps(*centre), second.steps(*centre), rewards, context=(first, second))


def all_given(labels: list[float]) -> Answer:
    return Answer(torch.tensor(labels), torch.ones(len(labels), dtype=torch.bool))


def filled(size: int = 6, about: dict[str, Any] | None = None, **kwargs: Any) -> Preferences:
    preferences = Preferences({"env": "pointmass", "teacher": "oracle"} if about is None else about)
    preferences.add(query(size, **kwargs), all_given([i / (size - 1) for i in range(size)]), session=2)
    return preferences


def same(one: Preferences, other: Preferences) -> bool:
    mine, theirs = one.state(), other.state()
    return mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)


# The store


def test_only_given_pairs_are_stored_and_all_are_counted() -> None:
    preferences, asked = Preferences(), query(4)
    answer = Answer(torch.tensor([1.0, float("nan"), 0.5, 0.0]), torch.tensor([True, False, True, True]))
    preferences.add(asked, answer, session=7)
    assert len(preferences) == 3
    assert torch.equal(preferences.first.obs, asked.first.obs[[0, 2, 3]])
    assert torch.equal(preferences.second.actions, asked.second.actions[[0, 2, 3]])
    assert preferences.prefers_first.tolist() == [1, 0.5, 0]
    assert preferences.session.tolist() == [7, 7, 7]
    assert preferences.counts == {"asked": 4, "given": 3, "skipped": 1, "equal": 1}


def test_many_additions_keep_their_order() -> None:
    preferences, parts = Preferences(), [query(size, raw=True, states=True) for size in (1, 5, 2, 9, 3)]
    for session, part in enumerate(parts):
        preferences.add(part, all_given([1.0] * len(part)), session)
    whole = Query.cat(parts)
    assert torch.equal(preferences.first.obs, whole.first.obs)
    assert preferences.second.raw_actions is not None and whole.second.raw_actions is not None
    assert torch.equal(preferences.second.raw_actions, whole.second.raw_actions)
    assert preferences.states is not None and whole.states is not None
    assert torch.equal(preferences.states, whole.states)
    assert preferences.session.tolist() == [0, 1, 1, 1, 1, 1, 2, 2, *[3] * 9, 4, 4, 4]


def test_reading_copies_nothing_and_growth_is_amortised() -> None:
    preferences = filled()
    assert preferences.first.obs.data_ptr() == preferences.first.obs.data_ptr()
    places = set()
    for _ in range(200):
        preferences.add(query(1), all_given([1.0]), 0)
        places.add(preferences.first.obs.data_ptr())
    assert len(places) < 10  # 6 · 2⁶ > 206: moved about six times


def test_no_task_reward_can_be_stored() -> None:
    arrays = filled(raw=True, states=True).state()  # its query's task rewards are NaN
    assert arrays.keys() == {
        "obs", "actions", "raw_actions", "states", "prefers_first", "session", "steps", "fresh", "metadata",
    }  # fmt: skip


def test_segments_are_the_centre_of_their_context() -> None:
    preferences, asked = Preferences(), wide_query(3)
    preferences.add(asked, all_given([1.0, 0.0, 1.0]), 0)
    assert asked.context is not None
    assert (preferences.margin, preferences.length) == (3, 4)
    assert torch.equal(preferences.first.obs, asked.first.obs)
    assert torch.equal(preferences.wide_second.actions, asked.context[1].actions)
    assert preferences.wide_first.length == 10


def test_what_not_every_pair_has_is_dropped() -> None:
    preferences = Preferences()
    first = wide_query(3)
    preferences.add(first, all_given([1.0] * 3), 0)
    preferences.add(query(2, raw=True, states=True), all_given([0.0] * 2), 1)
    assert preferences.margin == 0
    assert preferences.states is None and preferences.first.raw_actions is None
    assert torch.equal(preferences.first.obs[:3], first.first.obs)
    assert preferences.prefers_first.tolist() == [1, 1, 1, 0, 0]


def test_a_context_that_is_not_around_its_segments_is_refused() -> None:
    asked = wide_query(2)
    assert asked.context is not None
    shifted = Query(asked.context[0].steps(2, 6), asked.second, asked.task_rewards, context=asked.context)
    with pytest.raises(ValueError, match="first segments in its centre"):
        Preferences().add(shifted, all_given([1.0, 1.0]), 0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (query(2, length=5), "segments of 5 steps cannot join preferences about 4 steps"),
        (query(2, obs_dim=4), "obs of size 4 cannot join preferences with obs of size 3"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_store_unchanged(other: Query, message: str) -> None:
    preferences, before = filled(), filled().counts
    with pytest.raises(ValueError, match=message):
        preferences.add(other, all_given([1.0, 0.0]), 0)
    assert preferences.counts == before


def test_values_that_are_no_numbers_or_no_labels_are_refused_by_pair() -> None:
    preferences, asked = filled(), query(3)
    with pytest.raises(ValueError, match=r"prefers_first of pair 1 is 1\.5"):
        preferences.add(asked, all_given([1.0, 1.5, 0.0]), 0)
    asked.first.obs[2, 1, 0] = float("inf")
    with pytest.raises(ValueError, match="obs of pair 2 is not finite"):
        preferences.add(asked, all_given([1.0, 1.0, 0.0]), 0)
    assert len(preferences) == 6


def test_an_empty_store_says_so() -> None:
    with pytest.raises(ValueError, match="empty"):
        _ = Preferences().first
    assert Preferences().counts == {"asked": 0, "given": 0, "skipped": 0, "equal": 0}


def test_a_session_in_which_everything_was_skipped_counts() -> None:
    preferences = Preferences()
    preferences.add(query(3), Answer(torch.zeros(3), torch.zeros(3, dtype=torch.bool)), 0)
    assert preferences.counts == {"asked": 3, "given": 0, "skipped": 3, "equal": 0}
    assert same(Preferences.from_state(preferences.state()), preferences)


# The file


@pytest.mark.parametrize(
    "preferences",
    [Preferences({"env": "x"}), filled(), filled(raw=True, states=True)],
    ids=["empty", "plain", "everything"],
)
def test_saving_and_loading_gives_the_same_store(tmp_path: Path, preferences: Preferences) -> None:
    preferences.save(tmp_path / "p.npz")
    loaded = Preferences.load(tmp_path / "p.npz")
    assert same(loaded, preferences)
    assert loaded.about == preferences.about and loaded.counts == preferences.counts
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]
    loaded.add(query(2), all_given([1.0, 0.0]), 3)  # it can grow again


def test_margins_survive_the_file(tmp_path: Path) -> None:
    preferences = Preferences()
    preferences.add(wide_query(3), all_given([1.0] * 3), 0)
    preferences.save(tmp_path / "p.npz")
    assert Preferences.load(tmp_path / "p.npz").margin == 3


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    preferences = filled()
    preferences.save(tmp_path / "p.npz")
    before = (tmp_path / "p.npz").read_bytes()
    preferences.about["teacher"] = object()
    with pytest.raises(TypeError):
        preferences.save(tmp_path / "p.npz")
    assert (tmp_path / "p.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_saving_replaces_the_file_and_never_writes_into_the_old_one(tmp_path: Path) -> None:
    filled(3).save(tmp_path / "p.npz")
    before = (tmp_path / "p.npz").read_bytes()
    with (tmp_path / "p.npz").open("rb") as old:
        filled(5).save(tmp_path / "p.npz")
        assert old.read() == before
    assert len(Preferences.load(tmp_path / "p.npz")) == 5


def test_a_file_that_makes_zipfile_raise_oserror_is_refused_like_any_other(tmp_path: Path) -> None:
    """Found by flipping every single bit of a file: a bad offset makes zipfile seek before the start."""
    filled(3).save(tmp_path / "p.npz")
    content = bytearray((tmp_path / "p.npz").read_bytes())
    end = content.rindex(b"PK\x05\x06")
    content[end + 16 : end + 20] = b"\xff\xff\xff\x7f"  # where the list of members is said to start
    (tmp_path / "p.npz").write_bytes(content)
    loads_equal_or_refuses(tmp_path / "p.npz", filled(3))


def change(name: str, value: Any) -> Any:
    return lambda arrays: arrays.update({name: value})


def change_metadata(**values: Any) -> Any:
    def apply(arrays: dict[str, np.ndarray]) -> None:
        arrays["metadata"] = np.array(json.dumps({**json.loads(str(arrays["metadata"])), **values}))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda arrays: arrays.pop("metadata"), "no metadata"),
        (lambda arrays: arrays.pop("actions"), "'actions'.* missing"),
        (change("task_rewards", np.zeros(6)), "unknown arrays .*task_rewards"),
        (change("prefers_first", np.full(6, 1.25, np.float32)), "prefers_first of pair 0 is 1.25"),
        (change("prefers_first", np.full(6, np.nan, np.float32)), "prefers_first of pair 0 is not finite"),
        (change("prefers_first", np.zeros(6)), "prefers_first has dtype torch.float64"),
        (change("prefers_first", np.zeros(5, np.float32)), "prefers_first has shape"),
        (change("actions", np.zeros((6, 2, 3, 2), np.float32)), "actions has 3 steps and obs 4"),
        (change("raw_actions", np.zeros((6, 2, 4, 1), np.float32)), "raw_actions"),
        (change("obs", np.zeros((6, 2, 4), np.float32)), "obs has shape"),
        (change("session", np.array(["x"] * 6)), "session has dtype"),
        (change("metadata", np.array("[]")), "not written by pbrl"),
        (change("metadata", np.array("{")), "not an intact"),
        (change_metadata(version=3), "format version 3"),
        (change_metadata(horizon=0), "segments of 0 steps"),
        (change_metadata(horizon=3), "centre of 4"),
        (change_metadata(horizon="4"), "metadata horizon is '4'"),
        (change_metadata(pairs=7), "6 pairs; the metadata counts 7"),
        (change_metadata(asked=5), "5 asked"),
        (change_metadata(about=None), "about is not a table"),
        (change_metadata(about={"env_config": [1]}), "about.env_config is not a table"),
        (change_metadata(about={"env_config": {"_target_": 1}}), "about.env_config is not a table"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, damage: Any, message: str) -> None:
    arrays = filled().state()
    damage(arrays)
    np.savez(tmp_path / "p.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        Preferences.load(tmp_path / "p.npz")
    assert str(tmp_path / "p.npz") in str(caught.value)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    np.savez(tmp_path / "p.npz", **filled().state() | {"states": np.array([Trap()], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle"):
        Preferences.load(tmp_path / "p.npz")
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="export"):
        Preferences.load(tmp_path / "no.npz")


fuzz = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def loads_equal_or_refuses(path: Path, original: Preferences) -> None:
    try:
        loaded = Preferences.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert same(loaded, original)  # the damage hit a byte that means nothing


@fuzz
@given(st.data())
def test_damaged_files_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    original = filled(3, length=2, states=True)
    original.save(tmp_path / "p.npz")
    content = bytearray((tmp_path / "p.npz").read_bytes())
    if data.draw(st.booleans(), "truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
    else:
        for _ in range(data.draw(st.integers(1, 3), "flips")):
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "p.npz").write_bytes(content)
    loads_equal_or_refuses(tmp_path / "p.npz", original)


@fuzz
@given(st.binary(max_size=300))
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(ValueError, match="not an intact preference data set"):
        Preferences.load(tmp_path / "p.npz")


# Joining and the command line


def test_stores_join_and_keep_what_both_have() -> None:
    one, other = filled(4, states=True), filled(3, {"env": "pointmass", "teacher": "noisy"}, states=True)
    joined = merge([one, other])
    assert joined.counts == {"asked": 7, "given": 7, "skipped": 0, "equal": 1}
    assert torch.equal(joined.first.obs, torch.cat([one.first.obs, other.first.obs]))
    assert joined.states is not None
    assert joined.about == {"env": "pointmass", "teacher": ["oracle", "noisy"]}


def test_a_run_starts_from_a_data_set(tmp_path: Path) -> None:
    filled(4).save(tmp_path / "p.npz")
    run = Preferences({"env": "pointmass", "teacher": "mine"})
    run.extend(Preferences.load(tmp_path / "p.npz"))
    run.add(query(2), all_given([1.0, 1.0]), session=0)
    assert run.session.tolist() == [2, 2, 2, 2, 0, 0]
    assert run.about["teacher"] == "mine"


def test_the_command_line_exports_describes_and_joins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    original = filled(4, states=True)
    original.save(tmp_path / "run" / "preferences.npz")
    out, joined = str(tmp_path / "out.npz"), str(tmp_path / "joined.npz")
    assert main(["export", str(tmp_path / "run"), out]) == 0
    assert same(Preferences.load(out), original)
    assert main(["merge", out, out, joined]) == 0
    capsys.readouterr()
    assert main(["info", joined]) == 0
    shown = capsys.readouterr().out
    for expected in ("8 given", "segments of 4 steps", "3 observations and 2 actions", '"env": "pointmass"'):
        assert expected in shown


TASK = {"_target_": "envs.metaworld.MetaWorld", "task": "push", "horizon": 300, "action_repeat": 2}


def test_answers_about_one_task_join_whatever_its_episodes_and_about_another_do_not() -> None:
    def about(**config: Any) -> Preferences:
        return filled(about={"env": "metaworld", "env_config": {**TASK, **config}})

    assert len(merge([about(), about(horizon=500, action_repeat=1), filled(about={"env": "metaworld"})])) == 18
    for changed, message in (
        ({"task": "reach"}, "about env.task 'push', those to add about 'reach'"),
        ({"_target_": "my_env.Push"}, "about env._target_ 'envs.metaworld.MetaWorld', .* 'my_env.Push'"),
    ):
        with pytest.raises(ValueError, match=message):
            about().extend(about(**changed))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (filled(about={"env": "door-open"}), "env 'pointmass'.*'door-open'"),
        (filled(length=5), "5 steps cannot join preferences about 4 steps"),
        (filled(obs_dim=4), "obs of size 4"),
    ],
)
def test_the_command_line_refuses_to_join_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: Preferences, message: str
) -> None:
    filled().save(tmp_path / "a.npz")
    other.save(tmp_path / "b.npz")
    assert main(["merge", str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), str(tmp_path / "out.npz")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.npz").exists()


def test_the_command_line_overwrites_nothing_and_explains_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled().save(tmp_path / "preferences.npz")
    Preferences().save(tmp_path / "empty.npz")
    (tmp_path / "new-run").mkdir()
    (tmp_path / "new-run" / "config.yaml").touch()
    for arguments, message in (
        (["export", str(tmp_path), str(tmp_path / "preferences.npz")], "exists; name another file"),
        (["export", str(tmp_path / "no-run"), str(tmp_path / "out.npz")], "no-run: there is no run"),
        (["export", str(tmp_path / "new-run"), str(tmp_path / "out.npz")], "new-run has no answers yet"),
        (["info", str(tmp_path / "none.npz")], "`python -m pbrl.preferences export` makes one"),
        (["merge", str(tmp_path / "empty.npz"), str(tmp_path / "out.npz")], "no answered pairs"),
        (["export", str(tmp_path), str(tmp_path / "no-folder" / "out.npz")], "no-folder"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


# Asking


class Coin:
    """A teacher with memory that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, query: Query) -> Answer:
        self.calls += 1
        return Answer(torch.full((len(query),), 1 / (1 + self.calls)), torch.arange(len(query)) != 1)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def test_a_resumed_run_is_answered_from_the_journal(tmp_path: Path) -> None:
    teacher, queries = Coin(), [query(3), query(3), query(3)]
    before = [ask(teacher, asked, AnswerJournal(tmp_path / "j")) for asked in queries[:2]]
    resumed = Coin()
    resumed.calls = 1  # the checkpoint was written after the first query
    journal = AnswerJournal(tmp_path / "j", position=1)
    again = ask(resumed, queries[1], journal)
    assert torch.equal(again.prefers_first, before[1].prefers_first)
    assert torch.equal(again.given, before[1].given)
    assert resumed.calls == 2  # restored, not asked
    assert ask(resumed, queries[2], journal).prefers_first[0] == pytest.approx(1 / 4)
    assert len((tmp_path / "j").read_text().splitlines()) == 3


def test_the_same_question_asked_twice_in_one_run_is_asked_twice(tmp_path: Path) -> None:
    teacher, journal, asked = Coin(), AnswerJournal(tmp_path / "j"), query(3)
    answers = [float(ask(teacher, asked, journal).prefers_first[0]) for _ in range(2)]
    assert answers == pytest.approx([1 / 2, 1 / 3])
    journal = AnswerJournal(tmp_path / "j")
    assert [float(ask(Coin(), asked, journal).prefers_first[0]) for _ in range(2)] == pytest.approx(answers)


def test_another_question_is_not_answered_from_the_journal(tmp_path: Path) -> None:
    ask(Coin(), query(3), AnswerJournal(tmp_path / "j"))
    teacher = Coin()
    ask(teacher, query(3), AnswerJournal(tmp_path / "j"))
    assert teacher.calls == 1


def test_labels_of_skipped_pairs_do_not_get_through(tmp_path: Path) -> None:
    answer = Answer(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    assert ask(lambda query: answer, query(2), AnswerJournal(tmp_path / "j")).prefers_first.tolist() == [1, 0.5]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000), noise=st.binary(max_size=20))
def test_a_torn_last_line_is_cut_and_the_rest_kept(tmp_path: Path, cut: int, noise: bytes) -> None:
    path, queries = tmp_path / "j", [query(2), query(2)]
    path.unlink(missing_ok=True)
    for asked in queries:
        ask(Coin(), asked, AnswerJournal(path))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[: cut % len(second)] + noise.replace(b"\n", b""))
    resumed, teacher = AnswerJournal(path), Coin()
    ask(teacher, queries[0], resumed)
    assert path.read_bytes() == first
    ask(teacher, queries[1], resumed)
    assert len(AnswerJournal(path)._entries) == 2


def test_a_damaged_line_in_the_middle_is_an_error_not_a_loss(tmp_path: Path) -> None:
    for _ in range(2):
        ask(Coin(), query(2), AnswerJournal(tmp_path / "j"))
    content = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(b"x" + content)
    with pytest.raises(ValueError, match="line 1 is damaged"):
        AnswerJournal(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == b"x" + content


KILLED = """
import sys, torch
from pbrl.asking import AnswerJournal, ask
from pbrl.interfaces import as_teacher
from pbrl.types import Answer, Query, Segments

journal = AnswerJournal(sys.argv[1])
for i in range(10**6):
    side = Segments(torch.full((20, 2, 1), float(i)), torch.zeros(20, 2, 1))
    teacher = as_teacher(lambda query: Answer(torch.ones(20), torch.ones(20).bool()))
    ask(teacher, Query(side, side, torch.zeros(20, 2, 2)), journal)
    print(i, flush=True)
"""


@pytest.mark.slow
def test_no_answer_is_lost_when_the_run_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "j")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    acknowledged = [0, *map(int, process.stdout.read().split())][-1] + 1
    process.stdout.close()
    process.wait()
    assert acknowledged <= len(AnswerJournal(tmp_path / "j")._entries) <= acknowledged + 1


def ones(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(size, dtype=dtype)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "returned a NoneType; expected a pbrl.types.Answer"),
        (ones(3), "returned a Tensor"),
        (Answer(np.ones(3), ones(3).bool()), "prefers_first is a ndarray"),  # type: ignore[arg-type]
        (
            Answer(ones(3, torch.float64), ones(3).bool()),
            "prefers_first has dtype torch.float64; expected torch.float32",
        ),
        (Answer(ones(3), ones(3)), "given has dtype torch.float32; expected torch.bool"),
        (Answer(ones(2), ones(3).bool()), r"prefers_first has shape \[2\]; expected \[3\]"),
        (Answer(ones(3), ones(3).bool()[:, None]), r"given has shape \[3, 1\]"),
        (Answer(torch.tensor([1, 0, 1.5]), ones(3).bool()), "pair 2 is 1.5"),
        (Answer(torch.tensor([1, float("nan"), 2]), ones(3).bool()), "pair 1 is nan"),
        (Answer(torch.tensor([-0.1, 0, 1]), ones(3).bool()), "pair 0 is -0.1"),
    ],
)
def test_an_answer_that_is_none_is_refused_by_teacher_and_pair(tmp_path: Path, answer: Any, message: str) -> None:
    def odd_teacher(query: Query) -> Answer:
        return answer

    with pytest.raises(TeacherError, match=f"odd_teacher.*{message}"):
        ask(odd_teacher, query(3), AnswerJournal(tmp_path / "j"))
    assert (tmp_path / "j").read_text() == ""


def test_a_skipped_pair_may_carry_any_label() -> None:
    check_answer(Answer(torch.tensor([9.0, 1.0]), torch.tensor([False, True])), query(2), "t")


def test_a_teacher_that_raises_is_named_and_an_interrupt_passes(tmp_path: Path) -> None:
    def failing(query: Query) -> Answer:
        raise raised

    raised: BaseException = KeyError("lost")
    with pytest.raises(TeacherError, match=r"failing failed on a query of 3 pairs: .*lost") as caught:
        ask(failing, query(3), AnswerJournal(tmp_path / "j"))
    assert caught.value.__cause__ is raised
    raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ask(failing, query(3), AnswerJournal(tmp_path / "j"))


def test_a_state_that_is_no_json_is_the_teacher_s_fault(tmp_path: Path) -> None:
    teacher, asked = Coin(), query(2)
    teacher.state_dict = lambda: {"rng": torch.zeros(2)}  # type: ignore[method-assign]
    with pytest.raises(TeacherError, match=r"state_dict\(\) of teacher .*Coin is not plain JSON"):
        ask(teacher, asked, AnswerJournal(tmp_path / "j"))
    ask(teacher, asked, AnswerJournal(tmp_path / "j"))
    assert teacher.calls == 1, "its answer was written down nevertheless"


def test_pairs_remember_their_steps_and_which_are_fresh_and_new(tmp_path: Path) -> None:
    asked = query(4)
    asked = replace(
        asked,
        first=replace(asked.first, step=torch.tensor([5, 6, -1, 8])),
        second=replace(asked.second, step=torch.tensor([50, 60, 70, 80])),
        fresh=torch.tensor([False, True, False, True]),
    )
    store = Preferences()
    given = Answer(torch.ones(4), torch.tensor([True, True, True, False]))
    store.add(asked, given, 0)
    assert store.new.tolist() == [True] * 3
    store.add(asked, given, 1)
    assert store.new.tolist() == [False] * 3 + [True] * 3
    assert store.fresh.tolist() == [False, True, False] * 2
    assert store.first.step.tolist() == [5, 6, -1] * 2  # type: ignore[union-attr]
    store.save(tmp_path / "p.npz")
    again = Preferences.load(tmp_path / "p.npz")
    assert again.second.step.tolist() == [50, 60, 70] * 2  # type: ignore[union-attr]
    assert again.fresh.tolist() == store.fresh.tolist()
    assert not again.new.any()
    picked = store.select(torch.tensor([1, 4]), torch.zeros(2))
    assert (picked.new.tolist(), picked.fresh.tolist()) == ([False, True], [True, True])
    assert not store.select(torch.tensor([1, 4]), torch.zeros(2), new=False).new.any()
    store.begin_session()
    assert store.new.tolist() == [False] * 6
    elsewhere = Preferences()
    elsewhere.extend(again)
    assert not elsewhere.fresh.any()
    assert set(elsewhere.first.step.tolist()) == {-1}  # type: ignore[union-attr]


def test_margins_shift_the_remembered_steps() -> None:
    wide = query(2, length=6)
    sides = [replace(side, step=torch.tensor([10, -1])) for side in (wide.first, wide.second)]
    asked = replace(
        wide,
        first=sides[0].steps(1, 5),
        second=sides[1].steps(1, 5),
        context=(sides[0], sides[1]),
        task_rewards=wide.task_rewards[:, :, 1:5],
    )
    store = Preferences()
    store.add(asked, Answer(torch.ones(2), torch.ones(2) > 0), 0)
    assert store.first.step.tolist() == [11, -1]  # type: ignore[union-attr]
    assert store.wide_first.step.tolist() == [10, -1]  # type: ignore[union-attr]


def test_a_file_of_before_steps_were_kept_is_read(tmp_path: Path) -> None:
    store = Preferences()
    store.add(query(3), Answer(torch.ones(3), torch.ones(3) > 0), 2)
    arrays = store.state()
    metadata = {**json.loads(str(arrays["metadata"])), "version": 1}
    old = {name: value for name, value in arrays.items() if name not in ("steps", "fresh", "metadata")}
    np.savez(tmp_path / "old.npz", **old, metadata=np.array(json.dumps(metadata)))
    again = Preferences.load(tmp_path / "old.npz")
    assert set(again.first.step.tolist()) == {-1}  # type: ignore[union-attr]
    assert not again.fresh.any()
