"""Simulated teachers against hand-computed answers and closed-form rates; recorded and custom teachers; configs."""

import json
import math
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pbrl.preferences import Preferences
from pbrl.types import Answer, Query, Segments
from teachers.recorded import RecordedTeacher
from teachers.simulated import SimulatedTeacher

PAIRS = 10_000


def query(task_rewards: Tensor, mean_task_reward: float = float("nan")) -> Query:
    """A query with these task rewards [N, 2, H] and meaningless observations."""
    size, _, length = task_rewards.shape
    generator = torch.Generator().manual_seed(size)
    first, second = (
        Segments(torch.randn(size, length, 3, generator=generator), torch.zeros(size, length, 2)) for _ in range(2)
    )
    return Query(first, second, task_rewards.float(), mean_task_reward)


def one_step(*pairs: tuple[float, float], mean_task_reward: float = float("nan")) -> Query:
    """Segments of one step with these returns."""
    return query(torch.tensor(pairs).reshape(-1, 2, 1), mean_task_reward)


def uniform(seed: int = 0) -> Tensor:
    """Returns, independent and uniform in [0, 1]."""
    return torch.rand(PAIRS, 2, 1, generator=torch.Generator().manual_seed(seed))


def near(rate: float, probability: float) -> bool:
    """Within five standard deviations of a binomial share: a right teacher fails once in two million seeds."""
    return abs(rate - probability) < 5 * math.sqrt(probability * (1 - probability) / PAIRS)


# Each step of the order, by hand


def test_the_oracle_prefers_the_larger_sum_and_the_first_of_two_equals() -> None:
    answer = SimulatedTeacher()(query(torch.tensor([[[1.0, 2], [4, 0]], [[1, 2], [2, 0]], [[1, 2], [0, 3]]])))
    assert answer.prefers_first.tolist() == [0, 1, 1]
    assert answer.given.tolist() == [True] * 3
    assert answer.prefers_first.dtype == torch.float32


def test_a_pair_is_skipped_unless_the_better_return_is_above_the_threshold() -> None:
    # threshold 0.25 · 2 per step · 1 step = 0.5; the third reaches it without exceeding it
    pairs = [(0.1, 0.45), (0.1, 0.55), (0.0, 0.5)]
    answer = SimulatedTeacher(skip=0.25)(one_step(*pairs, mean_task_reward=2.0))
    assert answer.given.tolist() == [False, True, False]


def test_a_pair_is_equal_if_the_returns_differ_by_less_than_the_threshold() -> None:
    # 0.25 · 2 = 0.5; the second pair differs by just that
    answer = SimulatedTeacher(equal=0.25)(one_step((1.0, 1.25), (1.0, 1.5), (2.0, 1.0), mean_task_reward=2.0))
    assert answer.prefers_first.tolist() == [0.5, 0, 1]


def test_thresholds_grow_with_the_segment() -> None:
    # base = 2 per step · 4 steps; equal below 0.8
    rewards = torch.zeros(2, 2, 4)
    rewards[:, 0, 0] = torch.tensor([0.75, 0.85])
    answer = SimulatedTeacher(equal=0.1)(query(rewards, mean_task_reward=2.0))
    assert answer.prefers_first.tolist() == [0.5, 1]


def test_the_forgetful_teacher_weighs_the_last_step_fully() -> None:
    # weights 0.25, 0.5, 1: 4·0.25 = 1 against 1.5·1
    rewards = torch.tensor([[[4.0, 0, 0], [0, 0, 1.5]]])
    assert SimulatedTeacher()(query(rewards)).prefers_first.tolist() == [1]
    assert SimulatedTeacher(gamma=0.5)(query(rewards)).prefers_first.tolist() == [0]


def test_equality_is_judged_on_undiscounted_sums() -> None:
    rewards = torch.tensor([[[4.0, 0, 0], [0, 0, 4.0]], [[4.0, 0, 0], [0, 0, 1.0]]])
    answer = SimulatedTeacher(gamma=0.5, equal=0.1)(query(rewards, mean_task_reward=1.0))
    assert answer.prefers_first.tolist() == [0.5, 1]  # forgetful sums: 1 against 4, and 1 against 1


def test_mistakes_turn_answers_but_never_equal_pairs() -> None:
    answer = SimulatedTeacher(mistake=1.0, equal=0.1)(one_step((1, 2), (2, 1), (2, 2), mean_task_reward=1.0))
    assert answer.prefers_first.tolist() == [1, 0, 0.5]


@pytest.mark.parametrize("mean", [float("nan"), 0.0, -3.0])
def test_without_a_positive_mean_reward_nothing_is_skipped_or_equal(mean: float) -> None:
    answer = SimulatedTeacher(skip=0.5, equal=0.5)(one_step((-1, -1.01), (0, 0), mean_task_reward=mean))
    assert answer.given.all()
    assert answer.prefers_first.tolist() == [1, 1]


def test_the_compatible_teacher_squares_its_share_from_the_second_query_on() -> None:
    asked = one_step((1.0, 1.05), (1.0, 1.005), mean_task_reward=1.0)  # thresholds 0.1, then 0.01
    compatible, published = SimulatedTeacher(equal=0.1, bpref_compat=True), SimulatedTeacher(equal=0.1)
    assert [compatible(asked).prefers_first.tolist() for _ in range(3)] == [[0.5, 0.5], [0, 0.5], [0, 0.5]]
    assert [published(asked).prefers_first.tolist() for _ in range(3)] == [[0.5, 0.5]] * 3


# Rates over 10⁴ pairs against their formulas


def test_the_oracle_makes_no_error() -> None:
    teacher = SimulatedTeacher()
    teacher(query(uniform()))
    assert teacher.metrics() == {"teacher/skip_rate": 0, "teacher/equal_rate": 0, "teacher/error_rate": 0}


def test_mistakes_come_at_their_rate_in_both_directions() -> None:
    teacher, asked = SimulatedTeacher(mistake=0.1), query(uniform())
    answer = teacher(asked)
    assert near(teacher.metrics()["teacher/error_rate"], 0.1)
    better = asked.task_rewards[:, 0, 0] > asked.task_rewards[:, 1, 0]
    for side in (better, ~better):
        wrong = (answer.prefers_first == 1)[side] != better[side]
        assert abs(wrong.float().mean() - 0.1) < 5 * math.sqrt(0.09 / side.sum())


@pytest.mark.parametrize("beta", [0.3, 1.0, 10.0])
def test_noise_follows_bradley_terry(beta: float) -> None:
    teacher, rewards = SimulatedTeacher(beta=beta), 3 * uniform()
    teacher(query(rewards))
    error = torch.sigmoid(-beta * (rewards[:, 0, 0] - rewards[:, 1, 0]).abs().double())  # of each pair
    tolerance = 5 * float((error * (1 - error)).sum().sqrt()) / PAIRS
    assert abs(teacher.metrics()["teacher/error_rate"] - float(error.mean())) < tolerance


def test_relative_noise_does_not_know_the_scale_of_rewards() -> None:
    rewards = uniform()
    answers = [SimulatedTeacher(beta=2.0, beta_per_std=True)(query(rewards * scale)) for scale in (1e-3, 1.0, 1e3)]
    assert torch.equal(answers[0].prefers_first, answers[1].prefers_first)
    assert torch.equal(answers[2].prefers_first, answers[1].prefers_first)
    deviation = float(rewards.double().std(unbiased=False))
    absolute = SimulatedTeacher(beta=2.0 / deviation)(query(rewards))
    assert (absolute.prefers_first == answers[1].prefers_first).float().mean() > 0.999


def test_relative_noise_between_equal_segments_is_a_fair_coin() -> None:
    answer = SimulatedTeacher(beta=1.0, beta_per_std=True)(query(torch.ones(PAIRS, 2, 1)))
    assert near(float(answer.prefers_first.mean()), 0.5)


def test_skips_come_at_their_rate() -> None:
    teacher = SimulatedTeacher(skip=0.1)
    teacher(query(uniform(), mean_task_reward=5.0))  # threshold 0.5: both of two uniform returns below it
    assert near(teacher.metrics()["teacher/skip_rate"], 0.25)


def test_equal_answers_come_at_their_rate_and_leave_mistakes_theirs() -> None:
    teacher = SimulatedTeacher(equal=0.1, mistake=0.2)
    teacher(query(uniform(), mean_task_reward=3.0))  # two uniform returns within 0.3: 2·0.3 − 0.3²
    assert near(teacher.metrics()["teacher/equal_rate"], 0.51)
    assert abs(teacher.metrics()["teacher/error_rate"] - 0.2) < 5 * math.sqrt(0.16 / (0.49 * PAIRS))


def test_forgetting_errs_at_the_rate_of_an_angle() -> None:
    # differences of iid normal rewards are an isotropic plane; the signs of its projections on (1, 1) and (0.5, 1)
    # disagree with probability angle / π
    teacher = SimulatedTeacher(gamma=0.5)
    teacher(query(torch.randn(PAIRS, 2, 2, generator=torch.Generator().manual_seed(0))))
    angle = math.acos(1.5 / math.sqrt(2 * 1.25))
    assert near(teacher.metrics()["teacher/error_rate"], angle / math.pi)


def test_rates_without_a_denominator_are_absent() -> None:
    teacher = SimulatedTeacher(skip=1.0)
    teacher(one_step((0.1, 0.2), mean_task_reward=1.0))
    assert teacher.metrics() == {"teacher/skip_rate": 1.0}
    assert SimulatedTeacher().metrics() == {}


# Its behaviour as a part


def test_a_restored_teacher_goes_on_as_if_never_stopped() -> None:
    rewards = uniform()
    make = lambda: SimulatedTeacher(beta=1.0, mistake=0.1, equal=0.1, bpref_compat=True, seed=5)  # noqa: E731
    whole = make()
    whole(query(rewards, 1.0))
    kept = json.loads(json.dumps(whole.state_dict()))
    resumed = make()
    resumed.load_state_dict(kept)
    for _ in range(2):
        assert torch.equal(whole(query(rewards, 1.0)).prefers_first, resumed(query(rewards, 1.0)).prefers_first)


def test_seeds_differ_and_repeat() -> None:
    labels = [SimulatedTeacher(beta=1.0, seed=seed)(query(uniform())).prefers_first for seed in (1, 1, 2)]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


@pytest.mark.parametrize(
    "option",
    [{"beta": 0.0}, {"beta": math.inf}, {"gamma": 0.0}, {"gamma": 1.1}, {"mistake": -0.1}, {"skip": 2}, {"equal": 9}],
)
def test_impossible_options_are_refused_by_name(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        SimulatedTeacher(**option)  # type: ignore[arg-type]


def test_a_task_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="pair 1"):
        SimulatedTeacher()(one_step((0, 0), (0, float("nan"))))


options = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([-1.0, 1e-3, 1.0, 1e6]),
        "gamma": st.floats(0.1, 1),
        "mistake": st.floats(0, 1),
        "skip": st.floats(0, 1),
        "equal": st.floats(0, 1),
        "beta_per_std": st.booleans(),
        "bpref_compat": st.booleans(),
    }
)
returns = st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 2), max_size=5)


@settings(deadline=None, max_examples=100)
@given(options, returns, st.floats(allow_infinity=False))
def test_every_teacher_answers_every_query_with_labels(
    option: dict, pairs: list[tuple[float, float]], mean: float
) -> None:
    answer = SimulatedTeacher(**option)(query(torch.tensor(pairs).reshape(-1, 2, 1), mean))
    assert len(answer) == len(answer.given) == len(pairs)
    assert set(answer.prefers_first.tolist()) <= {0, 0.5, 1}
    assert answer.given.dtype == torch.bool


# Recorded


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, Query]:
    """A stored data set of eight pairs, the second of which was skipped."""
    asked = query(uniform()[:8])
    labels = torch.tensor([1, 0, 0.5, 0, 1, 0.75, 0, 1])
    preferences = Preferences({"env": "pointmass"})
    preferences.add(asked, Answer(labels, torch.arange(8) != 1), session=0)
    preferences.save(tmp_path / "preferences.npz")
    return tmp_path / "preferences.npz", asked


def test_a_recorded_teacher_repeats_what_was_said(recorded: tuple[Path, Query]) -> None:
    path, asked = recorded
    teacher = RecordedTeacher(path)
    answer = teacher(asked[[5, 1, 0]])
    assert answer.given.tolist() == [True, False, True]
    assert answer.prefers_first.tolist() == [0.75, 0.5, 1]
    assert teacher.metrics() == {"teacher/known_rate": pytest.approx(2 / 3)}


def test_a_recorded_pair_is_known_in_either_order(recorded: tuple[Path, Query]) -> None:
    path, asked = recorded
    swapped = Query(asked.second, asked.first, asked.task_rewards.flip(1))
    assert RecordedTeacher(path)(swapped).prefers_first.tolist() == [0, 0.5, 0.5, 1, 0, 0.25, 1, 0]


def test_a_recorded_pair_is_found_within_its_margins(tmp_path: Path) -> None:
    wide = query(uniform()[:4].expand(-1, -1, 6))
    asked = Query(wide.first.steps(2, 4), wide.second.steps(2, 4), wide.task_rewards[:, :, 2:4])
    asked = Query(asked.first, asked.second, asked.task_rewards, context=(wide.first, wide.second))
    preferences = Preferences()
    preferences.add(asked, Answer(torch.tensor([1.0, 0, 1, 1]), torch.ones(4).bool()), session=0)
    preferences.save(tmp_path / "wide.npz")
    assert RecordedTeacher(tmp_path / "wide.npz")(asked).prefers_first.tolist() == [1, 0, 1, 1]


def test_contradictory_records_are_averaged(tmp_path: Path, recorded: tuple[Path, Query]) -> None:
    asked = recorded[1][[0]]
    preferences = Preferences()
    for label in (1.0, 1.0, 0.0, 1.0):
        preferences.add(asked, Answer(torch.tensor([label]), torch.tensor([True])), session=0)
    preferences.save(tmp_path / "twice.npz")
    assert RecordedTeacher(tmp_path / "twice.npz")(asked).prefers_first.tolist() == [0.75]


def test_strangers_are_skipped_with_a_warning(recorded: tuple[Path, Query], caplog: pytest.LogCaptureFixture) -> None:
    assert not RecordedTeacher(recorded[0])(query(uniform()[:3])).given.any()
    assert "holds none of the 3 pairs" in caplog.text


def test_a_missing_or_foreign_record_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pbrl\.preferences export"):
        RecordedTeacher(tmp_path / "no.npz")
    (tmp_path / "text.npz").write_text("no data set")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name in ("text.npz", "other.npz"):
        with pytest.raises(ValueError, match=f"{name} is not a preference data set"):
            RecordedTeacher(tmp_path / name)


# Configs and a user's own


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("oracle", {}),
        ("simulated", {}),
        ("noisy", {"beta": 1.0}),
        ("mistake", {"mistake": 0.1}),
        ("skip", {"skip": 0.1}),
        ("equal", {"equal": 0.1}),
        ("myopic", {"gamma": 0.9}),
    ],
)
def test_the_configs_are_the_published_teachers(name: str, changed: dict[str, float]) -> None:
    with hydra.initialize_config_module("pbrl.conf", version_base="1.3"):
        config = hydra.compose(f"teacher/{name}", overrides=["+seed=3"])
    teacher = hydra.utils.instantiate(config.teacher)
    published = {"beta": -1.0, "gamma": 1.0, "mistake": 0.0, "skip": 0.0, "equal": 0.0} | changed
    assert {option: getattr(teacher, option) for option in published} == published
    assert not (teacher.beta_per_std or teacher.bpref_compat)
    if name != "oracle":
        assert config.teacher.seed == 3


def test_the_configs_of_remote_and_recorded_teachers_ask_for_their_source(recorded: tuple[Path, Query]) -> None:
    for name, given_by_user in (("recorded", f"path={recorded[0]}"), ("http", "url=http://127.0.0.1:1/label")):
        with hydra.initialize_config_module("pbrl.conf", version_base="1.3"):
            config = hydra.compose(f"teacher/{name}")
            with pytest.raises(Exception, match=f"Missing mandatory value: teacher.{given_by_user.split('=')[0]}"):
                hydra.utils.instantiate(config.teacher)
            config = hydra.compose(f"teacher/{name}", overrides=[f"teacher.{given_by_user}"])
            assert callable(hydra.utils.instantiate(config.teacher))


MY_TEACHER = '''
import torch

from pbrl.types import Answer, Query


class Lazy:
    """Prefers the segment that spends less energy; calls equal what differs by less than 5 %."""

    def __init__(self, tolerance: float = 0.05):
        self.tolerance = tolerance

    def __call__(self, query: Query) -> Answer:
        first, second = (side.actions.square().sum((1, 2)) for side in (query.first, query.second))
        prefers_first = (first < second).float()
        prefers_first[(first - second).abs() < self.tolerance * (first + second) / 2] = 0.5
        return Answer(prefers_first, given=torch.ones(len(query), dtype=torch.bool))
'''


def test_the_readme_s_own_teacher_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_teacher.py").write_text(MY_TEACHER)
    monkeypatch.syspath_prepend(tmp_path)
    with hydra.initialize_config_module("pbrl.conf", version_base="1.3"):
        config = hydra.compose("teacher/oracle", overrides=["teacher._target_=my_teacher.Lazy"])
    asked = Query(
        Segments(torch.zeros(3, 2, 1), torch.tensor([0.1, 0.5, 0.5]).reshape(3, 1, 1).expand(-1, 2, -1)),
        Segments(torch.zeros(3, 2, 1), torch.tensor([0.5, 0.1, 0.5]).reshape(3, 1, 1).expand(-1, 2, -1)),
        torch.zeros(3, 2, 2),
    )
    answer = hydra.utils.instantiate(config.teacher)(asked)
    assert answer.prefers_first.tolist() == [1, 0, 0.5]
    assert answer.given.all()
