"""What happens when, in environment steps: questions, evaluations, pretraining."""

from __future__ import annotations

from dataclasses import dataclass

from pbrl.checks import check

SCHEDULES = ("constant", "decay", "increase")
NEVER = 2**62  # an environment step that does not come, even if total_steps is raised later


@dataclass(frozen=True)
class Feedback:
    """When and how much the teacher is asked.

    Args:
        budget: pairs put to the teacher in all, skipped ones included.
        per_session: pairs per session, before the schedule changes it.
        every: environment steps between sessions.
        start: environment step of the first session; null: when pretraining ends.
        schedule: constant, decay (per_session · max((T − t)/T, decay_to)) or increase (per_session · T/(T − t + 1)),
            T = total_steps.
        decay_to: share of `per_session`, in [0, 1], at which decay ends.
        fresh_steps: on-policy steps rolled out before each session by updaters that want fresh pairs; null: as many
            as the session's segments have.
        fresh_share: share of such an updater's questions, in [0, 1], that are about the fresh steps; the others are
            about everything kept.
        catch_up: do the gradient steps that were left out during a session's environment steps after its update.
        memory_steps: recent environment steps kept for questions.
        video: film the first five pairs of each session, with their answers.
    """

    budget: int = 1000
    per_session: int = 10
    every: int = 5000
    start: int | None = None
    schedule: str = "constant"
    decay_to: float = 0.0
    fresh_steps: int | None = None
    fresh_share: float = 0.5
    catch_up: bool = True
    memory_steps: int = 100_000
    video: bool = False

    def __post_init__(self) -> None:
        check(
            "feedback",
            budget=(self.budget, self.budget >= 1, "at least 1"),
            per_session=(self.per_session, self.per_session >= 1, "at least 1"),
            every=(self.every, self.every >= 1, "at least 1"),
            decay_to=(self.decay_to, 0 <= self.decay_to <= 1, "a share in [0, 1]"),
            memory_steps=(self.memory_steps, self.memory_steps >= 1, "at least 1"),
            schedule=(self.schedule, self.schedule in SCHEDULES, "constant, decay or increase"),
            fresh_steps=(self.fresh_steps, self.fresh_steps is None or self.fresh_steps >= 0, "at least 0, or null"),
            fresh_share=(self.fresh_share, 0 <= self.fresh_share <= 1, "a share in [0, 1]"),
        )
        if self.budget < self.per_session:
            raise ValueError(
                f"feedback.budget={self.budget} is smaller than feedback.per_session={self.per_session}; "
                "raise the one or lower the other"
            )

    def count(self, step: int, total_steps: int, asked: int) -> int:
        """Pairs of the session at this step: at least one, and no more than the budget has left after `asked`."""
        share = {
            "constant": 1.0,
            "decay": max((total_steps - step) / total_steps, self.decay_to),
            "increase": total_steps / (total_steps - step + 1),
        }[self.schedule]
        pairs = int(self.per_session * share + 1e-9)  # 50 · 0.58 is 28.999… in float
        return min(max(pairs, 1), self.budget - asked)


@dataclass(frozen=True)
class Evaluation:
    """True returns of the mean policy.

    every: environment steps; episodes: per evaluation; seed: of the first one; video: film that one afterwards.
    """

    every: int = 10_000
    episodes: int = 10
    seed: int = 1_000_000
    video: bool = False

    def __post_init__(self) -> None:
        check(
            "eval",
            every=(self.every, self.every >= 1, "at least 1"),
            episodes=(self.episodes, self.episodes >= 1, "at least 1"),
        )


@dataclass(frozen=True)
class Pretraining:
    """State-entropy pretraining after the random steps (PEBBLE §4.1).

    Args:
        steps: environment steps; 0: none. nearest: k of the k-nearest-neighbour bonus.
        reset_critic: new critics when it ends. updates: gradient steps at once on the first learned reward.
        bounded, whiten: see `StateEntropy`.
    """

    steps: int = 9000
    nearest: int = 5
    reset_critic: bool = True
    updates: int = 100
    bounded: bool = False
    whiten: bool = False

    def __post_init__(self) -> None:
        check(
            "pretraining",
            steps=(self.steps, self.steps >= 0, "at least 0"),
            nearest=(self.nearest, self.nearest >= 1, "at least 1"),
            updates=(self.updates, self.updates >= 0, "at least 0"),
        )


@dataclass
class Due:
    """The next environment step at which each thing happens."""

    feedback: int
    checkpoint: int
    log: int
    between: int = NEVER
    eval: int = 0
    evaluated: int = -1  # the step of the last evaluation; -1: none yet
