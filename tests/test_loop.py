"""The loop: phases, schedules, determinism, what the teacher may do wrong, what a run leaves behind."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hydra import initialize_config_module
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

from pbrl.asking import TeacherError
from pbrl.interfaces import as_teacher
from pbrl.launch.configuration import ConfigError
from pbrl.launch.shipped import described
from pbrl.loop import Loop
from pbrl.preferences import Preferences
from pbrl.queries import QueryRule, Score, Uniform, most_novel, most_rewarded
from pbrl.records.evaluation import OracleCurve
from pbrl.reward import RewardEnsemble
from pbrl.schedule import Feedback
from pbrl.types import Answer, Query, Teacher
from tests.conftest import finish, rows, tiny_loop


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny_run: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)  # nothing may depend on the global generators
    np.random.seed(123)  # noqa: NPY002
    finish(tiny_loop(tmp_path / "again"))
    finish(tiny_loop(tmp_path / "other", "seed=1"))
    assert rows(tmp_path / "again") == rows(tiny_run)
    assert rows(tmp_path / "other") != rows(tiny_run)


@pytest.mark.slow
def test_evaluation_does_not_disturb_training(tiny_run: Path, tmp_path: Path) -> None:
    finish(tiny_loop(tmp_path / "often", "eval.every=70", "eval.episodes=3"))

    def training(run_dir: Path) -> list[dict]:
        return [row for row in rows(run_dir) if "eval/return" not in row]

    assert training(tmp_path / "often") == training(tiny_run)


def test_phases_happen_in_their_order_and_the_budget_is_kept(tiny_run: Path) -> None:
    sessions = [row for row in rows(tiny_run) if "feedback/session" in row]
    assert [row["env_step"] for row in sessions] == [200, 300, 400]
    assert [row["feedback/asked"] for row in sessions] == [5, 10, 15]
    evaluations = [row["env_step"] for row in rows(tiny_run) if "eval/return" in row]
    assert evaluations == [0, 250, 500, 600], "the last evaluation is at the end"


def test_an_evaluation_that_came_late_does_not_put_off_the_next(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "eval.every=100", "eval.episodes=1")
    loop.agent.num_timesteps = 130  # a session took steps
    loop._evaluate()
    assert loop.due.eval == 200
    loop.release()


@pytest.mark.parametrize(
    ("schedule", "counts"),
    [("constant", [10, 10, 10]), ("decay", [10, 5, 1]), ("increase", [9, 19, 40])],
)
def test_feedback_schedules(schedule: str, counts: list[int]) -> None:
    feedback = Feedback(budget=1000, per_session=10, schedule=schedule)
    assert [feedback.count(step, 1000, asked=0) for step in (0, 500, 999 if schedule == "decay" else 751)] == counts
    assert feedback.count(0, 1000, asked=997) == 3


def test_a_share_that_is_a_whole_number_is_not_rounded_down() -> None:
    feedback = Feedback(budget=1000, per_session=50, schedule="decay")
    assert feedback.count(31_500, 75_000, asked=0) == 29  # 50 · 0.58, which is 28.999… in float


def test_decay_ends_at_its_share_of_a_session() -> None:
    feedback = Feedback(budget=1000, per_session=25, schedule="decay", decay_to=0.36)
    assert [feedback.count(step, 1000, asked=0) for step in (0, 500, 600, 700, 999)] == [25, 12, 10, 9, 9]
    assert [feedback.count(999, 1000, asked=asked) for asked in (996, 1000)] == [4, 0]


def test_fresh_pairs_are_collected_without_learning_and_their_updates_made_up_for(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "updater.pairs=fresh", "feedback.fresh_steps=40")
    updates = []
    original = loop.session.collect_fresh

    def spy(steps: int) -> None:
        before = loop.agent._n_updates
        original(steps)
        updates.append((steps, loop.agent._n_updates - before))

    loop.session.collect_fresh = spy  # type: ignore[method-assign]
    finish(loop)
    assert updates == [(40, 0)] * 2, "the first session asks about what pretraining has seen"
    assert loop.step == loop.total_steps, "fresh steps are environment steps"
    assert (
        loop.agent._n_updates == loop.total_steps - 100 + 5
    )  # one per step after the random ones, 5 after pretraining


@pytest.mark.parametrize(
    ("share", "fresh"),
    [("0.4", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("1.0", 5), ("0.0", 0)))],
)
def test_a_share_of_the_questions_is_about_fresh_steps(tmp_path: Path, share: str, fresh: int) -> None:
    loop = tiny_loop(tmp_path / "run", "updater.pairs=fresh", f"feedback.fresh_share={share}", "total_steps=900")
    seen: list[int] = []
    teacher, session, rollouts = loop.parts.teacher, loop.session, loop.parts.rollouts

    def spy(query: Query) -> Answer:
        assert query.fresh is not None
        for side in (query.first, query.second):
            assert side.step is not None
            assert bool((side.step[query.fresh] >= session.fresh_from).all())
            assert np.array_equal(side.obs[:, 0].numpy(), rollouts.obs[side.step % rollouts.capacity])
        seen.append(int(query.fresh.sum()))
        return teacher(query)

    loop.parts.teacher = as_teacher(spy)
    finish(loop)
    assert seen == [0, fresh, fresh], "the first session has no fresh steps"
    stored = Preferences.load(tmp_path / "run" / "preferences.npz")
    assert [int(stored.fresh[stored.session == session].sum()) for session in range(3)] == seen


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["feedback.fresh_steps=0"], "feedback.fresh_steps=0; expected at least 10, .*feedback.fresh_share=0"),
        (["feedback.fresh_steps=9"], "feedback.fresh_steps=9; expected at least 10, "),
        (["feedback.memory_steps=9"], "feedback.memory_steps=9; expected at least 10, "),
        (["updater=surf", "feedback.memory_steps=10"], r"memory_steps=10; expected at least 1\d, .* on both sides"),
    ],
)
def test_too_few_steps_for_a_segment_are_refused_before_anything_starts(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny_loop(tmp_path / "run", "updater=aparl", *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("columns", "overrides", "said"),
    [
        ([], ["segment_length=20"], r"10 steps a segment \(segment_length\), this run 20; expected the same"),
        (["obs"], [], "1 observations a step, this run 2; expected the same"),
        (["actions", "raw_actions"], [], "1 actions a step, this run 2; expected the same"),
        (["states"], [], "3 numbers in a simulator's state, this run 4; expected the same"),
    ],
)
def test_imported_answers_of_other_sizes_are_refused_before_anything_starts(
    tiny_run: Path, tmp_path: Path, columns: list[str], overrides: list[str], said: str
) -> None:
    stored = Preferences.load(tiny_run / "preferences.npz")
    for name in columns:
        stored._columns[name] = stored._columns[name][..., :-1]
    stored.save(tmp_path / "other.npz")
    with pytest.raises(ConfigError, match=f"^import_preferences={tmp_path}/other.npz has {said}"):
        tiny_loop(tmp_path / "run", f"import_preferences={tmp_path}/other.npz", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_needs_no_imported_file_any_more(tiny_run: Path, tmp_path: Path) -> None:
    file = shutil.copy(tiny_run / "preferences.npz", tmp_path / "labels.npz")
    imported = len(Preferences.load(file))
    loop = tiny_loop(tmp_path / "run", f"import_preferences={file}", "feedback.budget=20")
    loop.release()  # before its first checkpoint
    Path(file).rename(tmp_path / "moved.npz")
    resume = [f"resume={tmp_path / 'run'}", f"trust=[{file}]"]
    with pytest.raises(ConfigError, match="import_preferences"):
        tiny_loop(tmp_path / "run", *resume)
    (tmp_path / "moved.npz").rename(file)
    loop = tiny_loop(tmp_path / "run", *resume)
    loop.save()
    loop.release()
    Path(file).unlink()
    loop = tiny_loop(tmp_path / "run", *resume)
    loop.release()
    assert len(loop.parts.preferences) == imported and loop.parts.preferences.about["env"] == "pointmass"


@pytest.mark.slow
def test_without_questions_about_fresh_steps_there_need_be_none(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "updater=aparl", "feedback.fresh_steps=0", "feedback.fresh_share=0")
    assert [len(query) for query in questions(loop)] == [5, 5, 5]


@pytest.mark.slow
def test_where_an_episode_ends_within_the_fresh_steps_the_questions_are_about_what_is_kept(tmp_path: Path) -> None:
    # The first session branches for 40 steps, so the second begins at the 45th of an episode: 5 and 7 steps are fresh.
    split = ["feedback.start=235", "feedback.fresh_steps=12"]
    loop = tiny_loop(tmp_path / "run", "updater.pairs=fresh", "query.branch_share=0.4", "total_steps=900", *split)
    asked = questions(loop)
    assert [len(query) for query in asked] == [5, 5, 5]
    fresh = [int(query.fresh.sum()) for query in asked if query.fresh is not None]
    assert fresh == [2, 2, 4], "at first and then branches alone"


def questions(loop: Loop) -> list[Query]:
    """What a run, run to its end, asks its teacher, by session."""
    asked: list[Query] = []
    teacher = loop.parts.teacher
    loop.parts.teacher = as_teacher(lambda query: (asked.append(query), teacher(query))[1])
    finish(loop)
    return asked


@pytest.mark.slow
def test_branch_pairs_share_their_first_state_and_count_as_steps(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "query.branch_share=1.0", "total_steps=900")
    asked = questions(loop)
    assert [len(query) for query in asked] == [5, 5, 5]
    for query in asked:
        assert torch.equal(query.first.obs[:, 0], query.second.obs[:, 0])
        assert not torch.equal(query.first.obs[:, 1:], query.second.obs[:, 1:])
    assert loop.step >= 600
    rollouts = loop.parts.rollouts
    assert rollouts.episodes - len(rollouts.asides) == rollouts.ended == 12, "branches are no episodes"


@pytest.mark.slow
def test_episodes_of_another_actor_are_not_among_the_recent_ones(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run")
    finish(loop)
    rollouts, count = loop.parts.rollouts, loop.parts.rollouts.ended
    before = rollouts.since_episodes(5, 10)
    loop.session.rollout(dict(loop.agent.actor.named_parameters()), 120)
    assert rollouts.ended == count + 2
    assert rollouts.since_episodes(6, 10) == before, "the rest of what they began is one more"


def test_what_is_said_of_the_present_policy_is_not_said_of_another_actor(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "query.recent_episodes=2")
    rollouts, diary = loop.parts.rollouts, loop.diary
    loop.agent.collect(220, updates=0)
    finished, paid = list(rollouts.finished), diary._over_optimisation()["reward/true_per_step"]
    assert diary._present() == 120, "feedback.every=100"
    loop.session.rollout(dict(loop.agent.actor.named_parameters()), 160)
    rollouts.task_rewards[220:380] = 1e6
    assert (diary._present(), list(rollouts.finished)) == (120, finished)
    assert diary._over_optimisation()["reward/true_per_step"] == paid
    assert loop.questions._choose(Uniform(), 50, 0, False).first.step.max() < 220
    loop.release()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["disagreement", "uniform"])
def test_a_share_of_the_questions_is_about_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """From the second session on; the others are the rule's, and all are different."""
    found: list[np.ndarray] = []

    def spy(candidates: Query, asked: Preferences, count: int) -> np.ndarray:
        assert len(candidates) == 50, "one of ten, also for a rule that itself looks at no others"
        found.append(candidates[most_novel(candidates, asked, count)].first.obs[:, 0].numpy())
        return most_novel(candidates, asked, count)

    monkeypatch.setattr("pbrl.questions.most_novel", spy)
    loop = tiny_loop(tmp_path / "run", f"query={rule}", "query.novel_share=0.4")
    asked = questions(loop)
    assert [len(query) for query in asked] == [5, 5, 5]
    assert len(found) == 2
    for query, novel in zip(asked[1:], found, strict=True):
        np.testing.assert_array_equal(query.first.obs[:2, 0], novel)
        starts = {(int(a), int(b)) for a, b in zip(query.first.step, query.second.step, strict=True)}
        assert len(starts) == 5


@pytest.mark.slow
def test_a_share_of_the_rules_questions_is_about_the_best_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the most novel one, half of the other four are the rule's among the best fifth; all differ."""
    best: list[list[int]] = []

    def spy(candidates: Query, reward: RewardEnsemble, count: int) -> np.ndarray:
        found = most_rewarded(candidates, reward, count)
        assert count == 2 and len(found) == round(0.2 * len(candidates)) < len(candidates)
        among = candidates[found]
        chosen = among[Score()(among, count, reward, Preferences(), np.random.default_rng(0))]
        best.append(list(map(int, chosen.first.step)))
        return found

    monkeypatch.setattr("pbrl.questions.most_rewarded", spy)
    loop = tiny_loop(tmp_path / "run", "query=disagreement", "query.novel_share=0.2", "query.best_share=0.5")
    asked = questions(loop)
    assert [len(query) for query in asked] == [5, 5, 5]
    assert len(best) == 2
    for query, expected in zip(asked[1:], best, strict=True):
        assert list(map(int, query.first.step[1:3])) == expected
        starts = {(int(a), int(b)) for a, b in zip(query.first.step, query.second.step, strict=True)}
        assert len(starts) == 5


@pytest.mark.parametrize(
    ("picks", "message"),
    [
        (
            lambda candidates, count: np.arange(len(candidates)),
            r"of shape \[50\]; expected 5 different ones from 0 to 49",
        ),
        (lambda candidates, count: np.arange(0), r"of shape \[0\]"),
        (lambda candidates, count: np.arange(len(candidates)) < count, r"of shape \[50\]"),
        (lambda candidates, count: np.ones(count), "of float64"),
        (lambda candidates, count: np.zeros(count, int), "some of them twice"),
        (lambda candidates, count: np.arange(count) - 1, "from -1 to 3"),
        (lambda candidates, count: len(candidates) - np.arange(count), "from 46 to 50"),
    ],
)
def test_what_is_no_answer_of_a_query_rule_is_refused_by_name(tmp_path: Path, picks, message: str) -> None:
    class Picking(QueryRule):
        from_the_start = True

        def __call__(self, candidates, count, reward, asked, rng) -> Any:
            return picks(candidates, count)

    loop = tiny_loop(tmp_path / "run")
    loop.parts.query = Picking()
    loop.agent.collect(100)
    with pytest.raises(ValueError, match=rf"^query [\w.<>]+Picking returned indices {message}"):
        loop.questions.select(True)
    picks = lambda candidates, count: list(range(count))  # noqa: E731
    assert len(loop.questions.select(True)) == 5
    loop.release()


class Tantrum(Teacher):
    """Answers once, then does what it is told to."""

    def __init__(self, bad) -> None:
        self.bad, self.calls = bad, 0

    def __call__(self, query: Query) -> Answer:
        self.calls += 1
        good = Answer(torch.ones(len(query)), torch.ones(len(query), dtype=torch.bool))
        return good if self.calls == 1 else self.bad(good)


def raises(_: Answer) -> Answer:
    raise KeyError("lost my glasses")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (raises, "lost my glasses"),
        pytest.param(lambda good: Answer(good.prefers_first[:2], good.given[:2]), "shape", marks=pytest.mark.slow),
        pytest.param(lambda good: Answer(good.prefers_first + 1, good.given), "pair 0 is 2", marks=pytest.mark.slow),
        pytest.param(lambda good: Answer(good.prefers_first.double(), good.given), "float64", marks=pytest.mark.slow),
    ],
)
def test_a_teacher_that_fails_stops_the_run_by_name_after_saving(tmp_path: Path, bad, message: str) -> None:
    loop = tiny_loop(tmp_path / "run")
    loop.parts.teacher = Tantrum(bad)
    with pytest.raises(TeacherError, match="Tantrum") as caught:
        finish(loop)
    assert message in str(caught.value)
    resumed = tiny_loop(tmp_path / "run2", f"resume={tmp_path / 'run'}")
    assert resumed.step == 300
    assert len(resumed.parts.preferences) == 5, "the first session's answers are kept"
    assert resumed.dialogue.pending is not None, "the questions will be asked again"
    assert finish(resumed)["complete"]


class Unstorable(Teacher):
    """Remembers a tensor."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, query: Query) -> Answer:
        self.calls += 1
        return Answer(torch.ones(len(query)), torch.ones(len(query), dtype=torch.bool))

    def state_dict(self) -> dict[str, Any]:
        return {"w": torch.zeros(2)}


def test_a_teacher_whose_state_cannot_be_stored_is_refused_before_it_is_asked(tmp_path: Path) -> None:
    message = r"^state_dict\(\) of teacher tests.test_loop.Unstorable is not plain JSON: .*Tensor"
    with pytest.raises(ConfigError, match=message):
        tiny_loop(tmp_path / "run", "replaced=[teacher]", "++teacher._target_=tests.test_loop.Unstorable")
    assert not (tmp_path / "run/config.yaml").exists()
    loop = tiny_loop(tmp_path / "run")
    loop.parts.teacher = teacher = Unstorable()
    with pytest.raises(ValueError, match=message):
        finish(loop)
    assert teacher.calls == 0


class Telling(Tantrum):
    """Reports a word."""

    def metrics(self) -> dict[str, Any]:
        return {"own/mode": "strict"}


@pytest.mark.parametrize("part", ["teacher", "updater"])
def test_a_metric_that_is_no_number_is_refused_by_name_before_it_is_stored(tmp_path: Path, part: str) -> None:
    loop = tiny_loop(tmp_path / "run", "total_steps=250")
    if part == "teacher":
        loop.parts.teacher = Telling(raises)
    else:
        loop.parts.updater.update = lambda reward, preferences, session: {"own/mode": "strict"}
    with pytest.raises(ValueError, match=rf"^{part} [\w.]+ reports own/mode='strict'; expected a number"):
        finish(loop)


@pytest.mark.slow
def test_a_teacher_that_skips_everything_is_survived(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run")
    loop.parts.teacher = as_teacher(lambda query: Answer(torch.zeros(len(query)), torch.zeros(len(query)) > 0))
    summary = finish(loop)
    assert summary["feedback/labels"] == 0
    assert summary["feedback/skipped"] == 15


def test_pretraining_goes_on_until_somebody_has_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = tiny_loop(tmp_path / "run", "query=disagreement")
    teacher, asked, seen, choose = loop.parts.teacher, [], [], loop.questions._choose

    def skips_at_first(query: Query) -> Answer:
        asked.append(loop.pretrained)
        answer = teacher(query)
        return Answer(answer.prefers_first, answer.given & (len(asked) > 1))

    def chosen(rule: QueryRule, *arguments: Any) -> Query:
        seen.append((type(rule) is Uniform, loop.agent.batch_reward is None))
        return choose(rule, *arguments)

    loop.parts.teacher, loop.questions._choose = as_teacher(skips_at_first), chosen
    assert finish(loop)["feedback/labels"] == 10
    assert asked == [False, False, True], "nothing was learned from the first session"
    assert seen == [(True, False), (True, False), (False, True)], "a random reward neither chooses nor pays"
    told = capsys.readouterr()
    assert "session 1  labels 0  asked 5/15" in told.out + told.err


def test_a_run_folder_stands_alone(tiny_run: Path) -> None:
    assert {path.name for path in tiny_run.iterdir()} >= {
        "config.yaml",
        "command.txt",
        "versions.json",
        "metrics.jsonl",
        "summary.json",
        "answers.jsonl",
        "preferences.npz",
        "checkpoints",
        "steps",
    }
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert summary["complete"] is True
    assert summary["env_step"] == 600
    assert {"eval/return", "eval/success", "feedback/labels", "reward/holdout_accuracy"} <= summary.keys()
    assert "torch" in json.loads((tiny_run / "versions.json").read_text())


@pytest.mark.slow
def test_normalised_returns_are_absent_without_an_oracle_and_right_with_one(tiny_run: Path, tmp_path: Path) -> None:
    assert not any("eval/oracle_return" in row for row in rows(tiny_run))
    curve = tmp_path / "oracle.csv"
    curve.write_text("env_step,return,success\n0,10,0\n1000,50,1\n")
    finish(tiny_loop(tmp_path / "run", f"oracle={curve}"))
    last = [row for row in rows(tmp_path / "run") if "eval/return" in row][-1]
    assert last["eval/oracle_return"] == pytest.approx(10 + 40 * 0.6)
    assert last["eval/normalized_return"] == pytest.approx(last["eval/return"] / 50)


@pytest.mark.parametrize(
    ("option", "there"), [("env.camera=1", True), ("env.action_repeat=2", False), ("env.horizon=100", False)]
)
def test_the_shipped_oracle_is_that_of_the_shipped_environment(tmp_path: Path, option: str, there: bool) -> None:
    loop = tiny_loop(tmp_path / "run", "env=walker-walk", option)
    assert (loop.oracle is not None) == there
    loop.close(False)


def test_a_shipped_option_is_described_also_within_the_command_line() -> None:
    with initialize_config_module("pbrl.conf", version_base="1.3"):
        assert described.__wrapped__("env", "walker-walk", "walker-walk")["horizon"] == 1000


def test_the_oracle_may_be_a_run(tiny_run: Path) -> None:
    curve = OracleCurve(tiny_run)
    evaluations = [row for row in rows(tiny_run) if "eval/return" in row]
    assert curve.steps.tolist() == [row["env_step"] for row in evaluations]
    last = evaluations[-1]
    assert curve.metrics(600, last["eval/return"])["eval/oracle_return"] == last["eval/return"]


def test_there_is_no_share_of_an_oracle_whose_return_is_not_positive(tmp_path: Path) -> None:
    (tmp_path / "oracle.csv").write_text("env_step,return\n0,-400\n1000,-100\n")
    assert math.isnan(OracleCurve(tmp_path / "oracle.csv").metrics(1000, -200.0)["eval/normalized_return"])


def test_an_oracle_that_still_trains_is_read_up_to_its_last_whole_row(tmp_path: Path) -> None:
    row = '{"env_step": 10, "eval/return": 2.0}'
    (tmp_path / "metrics.jsonl").write_text(f"{row}\n{row[:20]}")
    curve = OracleCurve(tmp_path)
    assert (curve.steps.tolist(), curve.returns.tolist()) == ([10], [2])


def test_a_broken_oracle_curve_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("step,return\n1,2\n")
    with pytest.raises(ValueError, match=r"bad\.csv: expected columns env_step and return"):
        OracleCurve(tmp_path / "bad.csv")


class Counting(BaseCallback):
    """An SB3 callback of the user's."""

    seen = 0
    heard: ClassVar[list[str]] = []

    def _init_callback(self) -> None:
        self.heard.append("init")

    def _on_training_start(self) -> None:
        assert self.locals["total_timesteps"] == 600 and self.training_env is not None
        self.heard.append("start")

    def _on_step(self) -> bool:
        type(self).seen += 1
        return True

    def _on_training_end(self) -> None:
        self.heard.append(f"end after {self.seen}")


def test_sb3_callbacks_see_every_step_and_one_beginning_and_end(tmp_path: Path) -> None:
    Counting.seen, Counting.heard = 0, []
    finish(tiny_loop(tmp_path / "run", "callbacks=[{_target_: tests.test_loop.Counting}]"))
    assert Counting.seen == 600
    assert Counting.heard == ["init", "start", "end after 600"]


def test_the_agent_is_an_sac_that_saves_and_loads(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run")
    finish(loop)
    assert isinstance(loop.agent, SAC)
    loop.agent.save(tmp_path / "agent.zip")
    again = type(loop.agent).load(tmp_path / "agent.zip")
    obs = np.zeros((1, 2), np.float32)
    np.testing.assert_array_equal(
        loop.agent.predict(obs, deterministic=True)[0], again.predict(obs, deterministic=True)[0]
    )


class AwayInTheThirdSession(Teacher):
    """Training does not wait for its answers."""

    wait = False

    def __call__(self, query: Query) -> Answer:
        raise NotImplementedError

    def post(self, query: Query) -> None:
        """It looks when it is there."""

    def collect(self, query: Query, session: int, step: int) -> tuple[torch.Tensor, Answer]:
        done = torch.full((len(query),), session != 2)
        count = int(done.sum())
        return done, Answer(torch.ones(count), torch.ones(count, dtype=torch.bool))


def test_nothing_is_new_in_a_session_without_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = tiny_loop(tmp_path / "run", "teacher._target_=tests.test_loop.AwayInTheThirdSession")
    new, update = [], loop.parts.updater.update

    def heard(reward: RewardEnsemble, preferences: Preferences, session: Any) -> dict[str, float]:
        new.append((loop.sessions, int(preferences.new.sum())))
        return update(reward, preferences, session)

    monkeypatch.setattr(loop.parts.updater, "update", heard)
    finish(loop)
    of = dict(new)
    assert of[3] == 0 and len(of) >= 3 and all(count > 0 for session, count in new if session != 3), new


def test_what_an_updaters_own_steps_take_is_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = tiny_loop(tmp_path / "run")
    monkeypatch.setattr(loop.parts.updater, "own_steps", lambda pairs, length: 70 * bool(pairs))
    assert [loop.questions.steps(10, first) for first in (True, False)] == [70, 70]
    assert loop.questions.steps(0, first=False) == 0
    monkeypatch.setattr(loop.parts.updater, "pairs", "fresh")
    assert loop.questions.steps(10, first=True) == 0, "the first answers are about the replay"
    loop.close(False)
