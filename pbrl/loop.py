"""The whole algorithm.

    act ─► rollouts ─► query ─► teacher ─► preferences ─► updater ─► reward ─► relabel ─► act …

with pretraining before the first question, an evaluation now and then, and a checkpoint at every moment at which the
run could be stopped: between two steps, and while the teacher thinks.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from pbrl.agent.exploration import StateEntropy
from pbrl.agent.sac import PreferenceSAC
from pbrl.asking import AnswerJournal, TeacherError, ask
from pbrl.preferences import Preferences
from pbrl.queries import Choose, QueryRule, Uniform
from pbrl.records import run_state
from pbrl.records.checkpoint import StepLog, load_latest, non_finite, write_atomically
from pbrl.records.evaluation import (
    PAIR_COLUMNS,
    OracleCurve,
    evaluate,
    over_optimisation,
    pair_rows,
    rank_correlation,
    reward_health,
)
from pbrl.records.loggers import Loggers, plain
from pbrl.records.videos import film_pairs, film_states
from pbrl.reward import RewardEnsemble
from pbrl.rollouts import Rollouts
from pbrl.schedule import NEVER, Due, Evaluation, Feedback, Pretraining
from pbrl.session import AgentSession
from pbrl.types import Answer, Query, RewardUpdater, Teacher

CHUNK = 100  # environment steps between two looks at the progress bar
FILMED_PAIRS = 5  # of a session
HEALTH_PAIRS = 100  # pairs of fresh segments for the rank correlation
HEALTH_STEPS = 4000  # steps at most, for what the learned reward pays and the task would


class Stopped(Exception):
    """The run was asked to stop and has been saved; resuming continues it."""


@dataclass
class Parts:
    """What the loop is made of; `pbrl.train` builds them from the config."""

    agent: PreferenceSAC
    eval_env: Any
    reward: RewardEnsemble
    rollouts: Rollouts
    query: Any  # a pbrl.queries.QueryRule that is also a Choose
    teacher: Teacher
    updater: RewardUpdater
    preferences: Preferences
    loggers: Loggers
    journal: AnswerJournal


@dataclass
class Loop:
    """One run. Everything that changes while it runs is restored by `load`; `seed` decides all the rest."""

    parts: Parts
    run_dir: Path
    total_steps: int
    segment_length: int
    seed: int
    feedback: Feedback
    evaluation: Evaluation
    pretraining: Pretraining
    checkpoint_every: int
    log_every: int = 1000
    oracle: OracleCurve | None = None
    callback: BaseCallback | None = None
    stop: Callable[[], bool] = lambda: False
    on_asking: Callable[[bool], None] = lambda asking: None

    pending: Query | None = field(default=None, init=False)  # selected, not yet answered
    sessions: int = field(default=0, init=False)
    pretrained: bool = field(default=False, init=False)
    last: dict[str, Any] = field(default_factory=dict, init=False)  # latest value of each metric
    seconds_before: float = field(default=0.0, init=False)  # of wall time before the last resume

    def __post_init__(self) -> None:
        agent, parts = self.agent, self.parts
        agent.rollouts = parts.rollouts
        *seeds, critic_seed = np.random.SeedSequence((self.seed, 1)).spawn(4)
        self.query_rng, updater_rng, self.health_rng = (np.random.default_rng(seed) for seed in seeds)
        self.critic_seed = int(critic_seed.generate_state(1)[0])
        self.session = AgentSession(agent, updater_rng)
        self.entropy = StateEntropy(agent.replay_buffer, self.pretraining.nearest, self.pretraining.bounded)
        self.asks = parts.updater.pairs != "none"
        pretraining_ends = agent.learning_starts + self.pretraining.steps
        start = pretraining_ends if self.feedback.start is None else self.feedback.start
        self.due = Due(feedback=start, checkpoint=self.checkpoint_every, log=self.log_every)
        self.step_logs = [
            StepLog(self.run_dir / "steps", "replay", [agent.replay_buffer.rows]),
            StepLog(self.run_dir / "steps", "rollouts", parts.rollouts.columns),
        ]
        self.started = time.monotonic()

    @property
    def agent(self) -> PreferenceSAC:
        return self.parts.agent

    @property
    def step(self) -> int:
        """Environment steps taken so far."""
        return self.agent.num_timesteps

    # ------------------------------------------------------------------------------------------------ the algorithm

    def run(self) -> dict[str, Any]:
        """From where it stands to the end. Returns the summary.

        Raises:
            Stopped: if it was asked to stop, after saving. TeacherError: if the teacher failed, after saving.
        """
        if self.due.eval == 0 and hasattr(self.parts.updater, "start"):  # nothing has happened yet
            self.parts.updater.start(self.session)
        self.agent.prepare()
        with tqdm(total=self.total_steps, initial=self.step, unit="step", mininterval=1, smoothing=0.05) as self.bar:
            while True:
                self._choose_pay()
                resumed = self.pending is not None  # in the middle of a session: that one first
                if self.step >= self.due.eval and not resumed:
                    self._evaluate()
                if self.step >= self.total_steps and not resumed:
                    if self.due.log < self.step + self.log_every:  # else a finished run was resumed
                        self._log_training()
                    break
                if self.asks and self.step >= self.due.feedback:
                    self._feedback_session()
                if self.step >= self.due.between:
                    self._between_sessions()
                if self.step >= self.due.log:
                    self._log_training()
                if self.step >= self.due.checkpoint:
                    self.due.checkpoint = self.step + self.checkpoint_every
                    self.save()
                self._act()
        self.save()
        return self.summary(complete=True)

    def _choose_pay(self) -> None:
        """What the agent is paid now: the task (oracle), novelty (pretraining), or the learned reward."""
        agent = self.agent
        if not self.asks:
            return
        agent.reward_fn = self._pay
        agent.batch_reward = self.entropy if not self.pretrained else None

    def _pay(self, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return self.parts.reward.pay(self.parts.reward.predict(obs, actions), self.step)

    def _act(self) -> None:
        self.agent.replay_buffer.hybrid = bool(self._left())
        until = min(self.due.eval, self.due.checkpoint, self.due.log, self.total_steps)
        if self.asks:
            until = min(until, self.due.feedback, self.due.between)
        while self.step < until and not self.stop():
            self.agent.collect(min(CHUNK, until - self.step), callback=self.callback, stop=self.stop)
            self.bar.n = self.step
            self.bar.update(0)
        if self.stop():
            self._save_and_stop()

    def _feedback_session(self) -> None:
        """Select pairs, ask, learn from the answers, pay the replay anew."""
        parts = self.parts
        metrics: dict[str, float] = {}
        self._log_steps()  # a session's own steps may be many: the rings must hold them beside those before and after
        if self.pending is None:
            self.session.fresh_from = self.session.fresh_to = parts.rollouts.total
        if self._left():  # imported answers may have used the budget up
            if self.pending is None:
                self.pending = self._select()
            answer = self._ask(self.pending)
            metrics |= reward_health(parts.reward, self.pending, answer)
            self._show_pairs(self.pending, answer)
            parts.preferences.add(self.pending, answer, self.sessions)
            self.session.new_pairs = int(answer.given.sum())
            self.session.fresh_pairs = int(answer.given[len(answer.given) - self.session.fresh_asked :].sum())
            self.pending = None
        self.sessions += 1
        if len(parts.preferences):
            metrics |= parts.reward.pretrain(self.session)
            metrics |= parts.updater.update(parts.reward, parts.preferences, self.session)
            if found := non_finite(parts.reward.state_dict()):
                raise FloatingPointError(
                    f"the learned reward diverged in session {self.sessions}: {found} is not finite"
                )
            self.agent.replay_buffer.relabel(self._pay)
        self._after_update()
        self._log_steps()
        metrics |= self._feedback_metrics()
        following = max(self.due.feedback + self.feedback.every, self.step)  # fresh steps count towards the interval
        self.due.feedback = following if self._left() else NEVER
        self.due.between = self._next_between()
        self._log(metrics)

    def _next_between(self) -> int:
        every = getattr(self.parts.updater, "between_every", None)
        return (self.step // every + 1) * every if every and self._left() and len(self.parts.preferences) else NEVER

    def _between_sessions(self) -> None:
        """What some updaters do while questions are left, beside the sessions; then the replay is paid anew."""
        parts: Any = self.parts
        metrics = parts.updater.between(parts.reward, parts.preferences, self.session)
        self.agent.replay_buffer.relabel(self._pay)
        self.due.between = self._next_between()
        self._log(metrics)

    def _left(self) -> int:
        """Pairs that the budget still allows."""
        return max(self.feedback.budget - self.parts.preferences.asked, 0)

    def _select(self) -> Query:
        """This session's questions; updaters that want fresh pairs get the present policy rolled out first.

        Those about everything kept come first, then those about the present policy: its fresh steps and branches.
        The first session asks about everything seen so far: before any reward there is no policy to be fresh about,
        and what pretraining has visited covers more.
        """
        parts, session = self.parts, self.session
        count = self.feedback.count(self.step, self.total_steps, parts.preferences.asked)
        horizon, margin = self.segment_length, getattr(parts.updater, "margin", 0)
        fresh = parts.updater.pairs == "fresh" and self.sessions > 0
        if fresh:
            steps = self.feedback.fresh_steps
            session.collect_fresh(2 * count * horizon if steps is None else steps)
        rule: QueryRule = parts.query if self.sessions else Uniform()  # first session: the reward knows nothing yet
        branched = round(getattr(parts.query, "branch_share", 0.0) * count)
        about_fresh = round(self.feedback.fresh_share * (count - branched)) if fresh else 0
        questions = [
            self._choose(rule, number, since, margin)
            for number, since in ((count - branched - about_fresh, 0), (about_fresh, session.fresh_from))
            if number
        ]
        if branched:
            questions.append(session.branch_query(branched, horizon, self.query_rng, margin))
        session.fresh_asked = about_fresh + branched
        return Query.cat(questions)

    def _choose(self, rule: QueryRule, count: int, since: int, margin: int) -> Query:
        """The rule's choice of `count` questions about what happened from step index `since` on."""
        parts, since = self.parts, max(since, self._recent(self.parts.query))
        candidates = parts.rollouts.query(count * rule.pool, self.segment_length, self.query_rng, since, margin)
        choose: Choose = rule  # type: ignore[assignment]
        return candidates[choose(candidates, count, parts.reward, parts.preferences, self.query_rng)]

    def _recent(self, rule: QueryRule) -> int:
        return 0 if rule.recent_episodes is None else self.parts.rollouts.since_episodes(rule.recent_episodes)

    def _ask(self, query: Query) -> Answer:
        """The answer, unless asking fails or is interrupted: then the questions are saved and will be asked again."""
        teacher: Any = self.parts.teacher
        if self.stop():
            self._save_and_stop()
        before = teacher.state_dict() if hasattr(teacher, "state_dict") else None
        try:
            return ask(teacher, query, self.parts.journal, self.on_asking)
        except (TeacherError, KeyboardInterrupt) as error:
            if before is not None and hasattr(teacher, "load_state_dict"):
                teacher.load_state_dict(before)  # it may have drawn random numbers before it failed
            if isinstance(error, KeyboardInterrupt):
                self._save_and_stop()
            self.save()
            raise

    def _save_and_stop(self) -> NoReturn:
        self.save()
        raise Stopped

    def _after_update(self) -> None:
        """The agent's answer to a new reward: a fresh start after pretraining, and the updates that fresh steps owe."""
        if not self.pretrained:
            self.pretrained = True
            if self.pretraining.steps and self.pretraining.reset_critic:
                self.agent.reset_critic(self.critic_seed)
            self._choose_pay()
            self.agent.train(self.pretraining.updates, self.agent.batch_size)
        owed = self.parts.rollouts.total - self.session.fresh_from  # fresh steps, branches, the updater's rollouts
        if owed and self.feedback.catch_up:
            self.agent.train(owed, self.agent.batch_size)

    def _evaluate(self) -> None:
        following = self.step + self.evaluation.every
        self.due.eval = following if self.step >= self.total_steps else min(following, self.total_steps)
        states: list[np.ndarray] | None = [] if self.evaluation.video else None
        env = self.parts.eval_env
        metrics = evaluate(self.agent, env, self.evaluation.episodes, self.evaluation.seed, states)
        if self.oracle is not None:
            metrics |= self.oracle.metrics(self.step, metrics["eval/return"])
        if self.asks and self.sessions:
            metrics |= self._over_optimisation()
        self._log(metrics)
        if states is not None:
            self._film("eval/video", lambda path: film_states(env, states, path))

    def _show_pairs(self, query: Query, answer: Answer) -> None:
        """A table of the pairs just answered, where a logger takes tables, and a video if one is wanted."""
        loggers = self.parts.loggers
        if loggers.takes_tables:
            rows = pair_rows(self.parts.reward, query, answer, self.sessions + 1)
            loggers.table("feedback/pairs", PAIR_COLUMNS, rows, self.step)
        if self.feedback.video:
            shown = slice(0, FILMED_PAIRS)
            filmed = Answer(answer.prefers_first[shown], answer.given[shown])
            self._film("feedback/video", lambda path: film_pairs(self.parts.eval_env, query[shown], filmed, path))

    def _film(self, name: str, film: Callable[[Path], None]) -> None:
        """Make a video and hand it to the loggers; a machine that cannot draw trains on without."""
        path = self.run_dir / "videos" / f"{name.split('/')[0]}_{self.step:09d}.mp4"
        try:
            film(path)
        except (RuntimeError, OSError) as error:
            self.bar.write(f"no video at step {self.step}: {error}")
        else:
            self.parts.loggers.video(name, path, self.step)

    # ------------------------------------------------------------------------------------------------ numbers

    def _feedback_metrics(self) -> dict[str, float]:
        parts = self.parts
        counts = parts.preferences.counts
        metrics: dict[str, float] = {
            "feedback/session": self.sessions,
            "feedback/asked": counts["asked"],
            "feedback/labels": counts["given"],
            "feedback/skipped": counts["skipped"],
            "feedback/equal": counts["equal"],
            "feedback/stored_pairs": len(parts.preferences),
        }
        recent = self._of_present_policy()
        if len(parts.rollouts.starts(self.segment_length, recent)):
            fresh = parts.rollouts.query(HEALTH_PAIRS, self.segment_length, self.health_rng, recent)
            metrics["reward/rank_correlation"] = rank_correlation(parts.reward, fresh)
        metrics |= self._over_optimisation()
        if hasattr(parts.teacher, "metrics"):
            metrics |= parts.teacher.metrics()
        return metrics

    def _of_present_policy(self) -> int:
        """Index of the first step that counts as the present policy's: those of one interval between sessions."""
        return max(self.parts.rollouts.total - min(self.step, self.feedback.every), 0)

    def _over_optimisation(self) -> dict[str, float]:
        rollouts, reward = self.parts.rollouts, self.parts.reward
        recent, kept = rollouts.steps(self._of_present_policy(), HEALTH_STEPS), rollouts.steps(0, HEALTH_STEPS)
        return over_optimisation(reward, self.step, recent, kept)

    def _log_training(self) -> None:
        self.due.log = self.step + self.log_every
        metrics = self.agent.metrics()
        if self.parts.rollouts.finished:
            metrics["rollout/return"] = float(np.mean([total for total, _ in self.parts.rollouts.finished]))
        self._log(metrics)

    def _log(self, metrics: dict[str, Any]) -> None:
        seconds = self.seconds_before + time.monotonic() - self.started
        row = {"env_step": self.step, **metrics, "time/wall": seconds, "time/steps_per_second": self.step / seconds}
        self.parts.loggers.log(row)
        self.last |= {key: plain(value) for key, value in row.items()}
        labels = f"{self.parts.preferences.asked}/{self.feedback.budget}" if self.asks else "none"
        self.bar.set_postfix({"return": _short(self.last.get("eval/return")), "labels": labels}, refresh=False)
        if "eval/return" in metrics or "feedback/session" in metrics:
            self.bar.write(f"step {self.step:>8}  " + "  ".join(self._console(metrics, labels)))

    def _console(self, metrics: dict[str, Any], labels: str) -> list[str]:
        if "eval/return" in metrics:
            success = f"success {metrics['eval/success']:.0%}" if "eval/success" in metrics else ""
            return [f"eval     return {metrics['eval/return']:.1f} ± {metrics['eval/return_std']:.1f}", success]
        shown = {
            "held-out accuracy": "reward/holdout_accuracy",
            "training accuracy": "reward/accuracy",
            "rank correlation": "reward/rank_correlation",
            "teacher's error": "teacher/error_rate",
            "skip": "teacher/skip_rate",
            "tie": "teacher/equal_rate",
        }
        values = [f"{name} {_short(metrics[key])}" for name, key in shown.items() if metrics.get(key) is not None]
        return [f"session {self.sessions}  labels {labels}", *values]

    def summary(self, complete: bool) -> dict[str, Any]:
        """Latest value of each metric, and whether the run reached its end."""
        return {"complete": complete, "total_steps": self.total_steps, **self.last}

    def close(self, complete: bool) -> None:
        """Write summary.json, close logs and simulators."""
        summary = self.summary(complete)
        write_atomically(self.run_dir / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
        self.release(summary)

    def release(self, summary: dict[str, Any] | None = None) -> None:
        """Close logs and simulators."""
        self.parts.loggers.close(summary or {})
        self.agent.training_env.close()
        self.parts.eval_env.close()

    # ------------------------------------------------------------------------------------------------ exact resume

    def save(self) -> None:
        """Write a checkpoint from which `load` continues bit for bit."""
        run_state.save(self)

    def _log_steps(self) -> None:
        """Write down the steps taken so far; a checkpoint will point at them."""
        for log in self.step_logs:
            log.append(self.parts.rollouts.total)

    def load(self) -> None:
        """Restore the newest usable checkpoint of `run_dir` (see pbrl.records.checkpoint).

        A run that was killed before its first one starts at step 0 again; its answers are in the journal.

        Raises:
            CheckpointError: if there are checkpoints and none can be used.
        """
        if any((self.run_dir / "checkpoints").glob("[sd]*")):  # step_… and damaged_…, not the .tmp of a killed save
            load_latest(self.run_dir, self.step_logs, partial(run_state.restore, self))
        else:
            print(f"{self.run_dir} was stopped before its first checkpoint: from step 0 again, with the answers given")
            self.parts.loggers.local.truncate(0)
        self.started = time.monotonic()

    def rngs(self) -> list[np.random.Generator]:
        """The loop's own generators, in a fixed order."""
        return [self.query_rng, self.session.rng, self.health_rng]


def _short(value: Any) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"
