"""What a run tells: rows of metrics, lines and a bar on the console, tables and films. Nothing here trains anything."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pbrl.files import write_atomically
from pbrl.interfaces import name_of
from pbrl.parts import Parts
from pbrl.records.evaluation import (
    PAIR_COLUMNS,
    OracleCurve,
    evaluate,
    over_optimisation,
    pair_accuracy,
    pair_rows,
    rank_correlation,
)
from pbrl.records.loggers import numbers, plain
from pbrl.records.videos import film_pairs, film_states
from pbrl.schedule import Evaluation, Feedback
from pbrl.types import Answer, Query

FILMED_PAIRS = 5  # of a session
HEALTH_PAIRS = 100  # pairs of fresh segments for the rank correlation
HEALTH_STEPS = 4000  # steps at most, for what the learned reward pays and the task would
LARGE_GAP = 1.0  # of reward/gap, in standard deviations of a step's reward
MOSTLY_SATURATED = 0.5  # of reward/saturated, a share of the policy's steps
SHOWN = {  # on the console, of a session; the teacher's where there are any
    "right on random pairs": "reward/recent_accuracy",
    "on asked ones": "reward/holdout_accuracy",
    "wrong answers": "teacher/error_rate",
    "skipped": "teacher/skip_rate",
    "ties": "teacher/equal_rate",
}


class Diary:
    """Collects what is told about a run and hands it to the loggers, the console and a teacher who watches.

    Args:
        parts: the run's. run_dir: films go to its folder `videos`.
        total_steps, segment_length: environment steps.
        feedback, evaluation: what is filmed, and when. oracle: the curve that returns are compared with.
        rng: draws the segments on which the learned reward is compared with the task's.
    """

    def __init__(
        self,
        parts: Parts,
        run_dir: Path,
        total_steps: int,
        segment_length: int,
        feedback: Feedback,
        evaluation: Evaluation,
        oracle: OracleCurve | None,
        rng: np.random.Generator,
    ) -> None:
        self.parts, self.run_dir, self.total_steps, self.segment_length = parts, run_dir, total_steps, segment_length
        self.feedback, self.evaluation, self.oracle, self.rng = feedback, evaluation, oracle, rng
        self.last: dict[str, Any] = {}  # latest value of each metric
        self.seconds_before = 0.0  # of wall time before the last resume
        self.started = time.monotonic()
        self.bar: Any = tqdm(disable=True)

    @property
    def step(self) -> int:
        """Environment steps taken so far."""
        return self.parts.agent.num_timesteps

    @property
    def seconds(self) -> float:
        """Wall time of the run, the parts before a resume included."""
        return self.seconds_before + time.monotonic() - self.started

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Within the block a bar shows how far the run is."""
        with tqdm(total=self.total_steps, initial=self.step, unit="step", mininterval=1, smoothing=0.05) as self.bar:
            self._tell({"env_step": self.step})
            yield

    def advance(self) -> None:
        """Some steps were taken."""
        self.bar.n = self.step
        self.bar.update(0)
        self._tell({"env_step": self.step})

    def continues(self, last: dict[str, Any], seconds: float) -> None:
        """A run is resumed: the latest metrics of before, and its wall time."""
        self.last, self.seconds_before, self.started = last, seconds, time.monotonic()

    # ------------------------------------------------------------------------------------------------ entries

    def evaluate(self, learned: bool) -> None:
        """The policy's true returns now, filmed if that is wanted; `learned`: it follows a learned reward already."""
        env = self.parts.eval_env
        states: list[np.ndarray] | None = [] if self.evaluation.video else None
        metrics = evaluate(self.parts.agent, env, self.evaluation.episodes, self.evaluation.seed, states)
        if self.oracle is not None:
            metrics |= self.oracle.metrics(self.step, metrics["eval/return"])
        if learned:
            metrics |= self._over_optimisation()
        success = f"success {metrics['eval/success']:.0%}" if "eval/success" in metrics else ""
        self.last["eval_step"] = self.step
        returns = f"eval     return {metrics['eval/return']:.1f} ± {metrics['eval/return_std']:.1f}"
        self.log(metrics, returns, success, *_told(metrics))
        if states is not None:
            self._film("eval/video", lambda path: film_states(env, states, path))

    def session(self, metrics: dict[str, float], sessions: int) -> None:
        """What came of the session with this number, and how well the reward knows the task now."""
        teacher = self.parts.teacher
        told = numbers(teacher.metrics(), f"teacher {name_of(teacher)}")
        metrics = metrics | self._counts(sessions) | self._health() | told
        if raters := teacher.raters():
            self.parts.preferences.about["raters"] = raters
        values = [
            f"{name} {_share(metrics[key])}"
            for name, key in SHOWN.items()
            if metrics.get(key) is not None and (metrics[key] or not key.startswith("teacher/"))
        ]
        if renewed := metrics.get("reward/renewed"):
            values.append(f"saturated members that start anew: {renewed:.0f}")
        self.log(metrics, f"session {sessions}", *(f"{name} {count}" for name, count in self._labels.items()), *values)

        self._show_steps()

    def _show_steps(self) -> None:
        """Let the teacher see the agent's last steps, where the simulator can show them again."""
        rollouts, length = self.parts.rollouts, self.segment_length
        starts = rollouts.starts(length, max(rollouts.total - 2 * length, 0))[-1:]
        if len(starts) and rollouts.states.shape[1]:
            steps = rollouts.query_at(starts, starts, length)
            assert steps.states is not None
            self.parts.teacher.show(steps.states[0, 0].numpy(), steps.first.actions[0].numpy())

    def training(self) -> None:
        """The agent's own numbers."""
        metrics, finished = self.parts.agent.metrics(), self.parts.rollouts.finished
        if finished:
            metrics["rollout/return"] = float(np.mean([total for total, _ in finished]))
        self.log(metrics)

    def pairs(self, query: Query, answer: Answer, session: int) -> None:
        """A table of the pairs just answered, where a logger takes tables, and a video if one is wanted."""
        loggers = self.parts.loggers
        if loggers.takes_tables:
            loggers.table(
                "feedback/pairs", PAIR_COLUMNS, pair_rows(self.parts.reward, query, answer, session), self.step
            )
        if self.feedback.video:
            shown = slice(0, FILMED_PAIRS)
            filmed = Answer(answer.prefers_first[shown], answer.given[shown])
            self._film("feedback/video", lambda path: film_pairs(self.parts.eval_env, query[shown], filmed, path))

    def log(self, metrics: dict[str, Any], *lines: str) -> None:
        """One row of metrics for all who read them; `lines` go to the console, side by side."""
        seconds = self.seconds
        row = {"env_step": self.step, **metrics, "time/wall": seconds, "time/steps_per_second": self.step / seconds}
        self.parts.loggers.log(row)
        self._tell(row)
        self.last |= {key: plain(value) for key, value in row.items()}
        self.bar.set_postfix({"return": _short(self.last.get("eval/return")), **self._labels}, refresh=False)
        if lines:
            self.bar.write(f"step {self.step:>7}  " + "  ".join(line for line in lines if line))

    def _tell(self, row: dict[str, Any]) -> None:
        """Let the teacher hear a row, and how much of the run and of the budget is over."""
        asked, budget = self.parts.preferences.asked, self.feedback.budget
        known = {"total_steps": self.total_steps, "feedback/asked": asked, "feedback/budget": budget}
        self.parts.teacher.watch({**known, **row})

    def summary(self, complete: bool) -> dict[str, Any]:
        """Latest value of each metric, and whether the run reached its end."""
        return {"complete": complete, "total_steps": self.total_steps, **self.last}

    def write_summary(self, complete: bool) -> None:
        """The summary as summary.json."""
        summary = json.dumps(self.summary(complete), indent=1)
        write_atomically(self.run_dir / "summary.json", (summary + "\n").encode())

    # ------------------------------------------------------------------------------------------------ numbers

    @property
    def _labels(self) -> dict[str, str]:
        """Answers so far, and how much of the budget was asked, for the console."""
        preferences = self.parts.preferences
        asked = f"{preferences.asked}/{self.feedback.budget}"
        return {"labels": str(len(preferences)), "asked": asked} if self.parts.asks else {"labels": "none"}

    def _counts(self, sessions: int) -> dict[str, float]:
        counts = self.parts.preferences.counts
        return {
            "feedback/session": sessions,
            "feedback/asked": counts["asked"],
            "feedback/labels": counts["given"],
            "feedback/skipped": counts["skipped"],
            "feedback/equal": counts["equal"],
            "feedback/stored_pairs": len(self.parts.preferences),
        }

    def _present(self) -> int:
        """Index of the first step that counts as the present policy's: as many as in an interval between sessions."""
        return self.parts.rollouts.since_steps(self.feedback.every)

    def _health(self) -> dict[str, float]:
        """How the learned reward orders the present policy's segments, against the task's, and what it pays for."""
        rollouts, length, recent = self.parts.rollouts, self.segment_length, self._present()
        metrics: dict[str, float] = {}
        if len(rollouts.starts(length, recent, own=True)):
            pairs = rollouts.query(HEALTH_PAIRS, length, self.rng, recent, own=True)
            metrics["reward/rank_correlation"] = rank_correlation(self.parts.reward, pairs)
            metrics["reward/recent_accuracy"] = pair_accuracy(self.parts.reward, pairs)
        return metrics | self._over_optimisation()

    def _over_optimisation(self) -> dict[str, float]:
        rollouts = self.parts.rollouts
        recent, kept = rollouts.steps(self._present(), HEALTH_STEPS, own=True), rollouts.steps(0, HEALTH_STEPS)
        return over_optimisation(self.parts.reward, self.step, recent, kept) if len(recent[0]) else {}

    def _film(self, name: str, film: Callable[[Path], None]) -> None:
        """Make a video and hand it to the loggers; a machine that cannot draw trains on without."""
        path = self.run_dir / "videos" / f"{name.split('/')[0]}_{self.step:09d}.mp4"
        try:
            film(path)
        except (RuntimeError, OSError) as error:
            self.bar.write(f"no video at step {self.step}: {error}")
        else:
            self.parts.loggers.video(name, path, self.step)


def _told(metrics: dict[str, float]) -> list[str]:
    """`reward/gap` and `reward/saturated` in words, from where on they are worth some."""
    told, gap, saturated = [], metrics.get("reward/gap", math.nan), metrics.get("reward/saturated", math.nan)
    if gap > LARGE_GAP:  # not NaN
        told.append(f"gap {gap:.1f}: by the learned reward the policy looks better than it is (docs/agent.md)")
    if saturated > MOSTLY_SATURATED:
        told.append(f"saturated at {saturated:.0%} of its steps: answers hardly move the reward there (docs/agent.md)")
    return told


def _share(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:.0%}"


def _short(value: Any) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"
