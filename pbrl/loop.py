"""The whole algorithm.

    act ─► rollouts ─► query ─► teacher ─► preferences ─► updater ─► reward ─► relabel ─► act …

with pretraining before the first question, an evaluation now and then, and a checkpoint at every moment at which the
run could be stopped: between two steps, and while the teacher thinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from pbrl.agent.exploration import StateEntropy
from pbrl.agent.sac import PreferenceSAC
from pbrl.asking import TeacherError
from pbrl.dialogue import BrokenOff, Dialogue
from pbrl.interfaces import name_of
from pbrl.parts import Parts
from pbrl.questions import Questions
from pbrl.records import run_state
from pbrl.records.checkpoint import StepLog, begun, load_latest, non_finite
from pbrl.records.diary import Diary
from pbrl.records.evaluation import OracleCurve
from pbrl.records.loggers import numbers
from pbrl.schedule import NEVER, Due, Evaluation, Feedback, Pretraining
from pbrl.session import AgentSession

CHUNK = 100  # environment steps between two looks at the progress bar


class Stopped(Exception):
    """The run was asked to stop and has been saved; resuming continues it."""


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

    sessions: int = field(default=0, init=False)  # finished or begun
    pretrained: bool = field(default=False, init=False)  # a first reward was learned
    ended: bool = field(default=False, init=False)  # by a callback, before total_steps

    def __post_init__(self) -> None:
        parts, agent, total, length = self.parts, self.parts.agent, self.total_steps, self.segment_length
        agent.attach(parts.rollouts, parts.reward.pay.weight if parts.asks and parts.reward.pay.moves else None)
        *seeds, critic_seed = np.random.SeedSequence((self.seed, 1)).spawn(4)
        query_rng, updater_rng, health_rng = self.rngs = [np.random.default_rng(seed) for seed in seeds]
        self.critic_seed = int(critic_seed.generate_state(1)[0])
        pretraining = self.pretraining
        self.entropy = StateEntropy(agent.replay_buffer, pretraining.nearest, pretraining.bounded, pretraining.whiten)
        self.session = AgentSession(agent, updater_rng, self.entropy)
        self.questions = Questions(parts, self.session, self.feedback, total, length, query_rng)
        self.diary = Diary(parts, self.run_dir, total, length, self.feedback, self.evaluation, self.oracle, health_rng)
        self.dialogue = Dialogue(parts, self.questions, self.diary, lambda: self.stop(), self.on_asking)
        self.asks = parts.asks
        self.session.watch = self.diary.advance
        pretraining_ends = agent.learning_starts + self.pretraining.steps
        start = pretraining_ends if self.feedback.start is None else self.feedback.start
        self.due = Due(feedback=start, checkpoint=self.checkpoint_every, log=self.log_every)
        self.step_logs = [
            StepLog(self.run_dir / "steps", "replay", [agent.replay_buffer.rows]),
            StepLog(self.run_dir / "steps", "rollouts", parts.rollouts.columns),
        ]
        parts.rollouts.write_every = min(log.capacity for log in self.step_logs)
        parts.rollouts.write_down = self._log_steps

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
        if self.due.eval == 0:  # nothing has happened yet
            self.parts.updater.start(self.session)
        self.agent.prepare()
        with self.diary.progress(), self.agent.heard_by(self.callback, self.total_steps):
            while True:
                self._choose_pay()
                resumed = self.dialogue.pending is not None  # in the middle of a session: that one first
                if self.step >= self.due.eval and not resumed:
                    self._evaluate()
                if (self.step >= self.total_steps or self.ended) and not resumed:
                    if self.due.evaluated != self.step:  # a callback's end, or a finished run that was made longer
                        self._evaluate()
                    if self.due.log < self.step + self.log_every:  # else a finished run was resumed
                        self._log_training()
                    break
                if resumed or self.step >= self._next_session():
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
        return self.diary.summary(complete=True)

    def _choose_pay(self) -> None:
        """What the agent is paid now: the task (oracle), novelty (pretraining), or the learned reward."""
        if self.asks:
            self.agent.pay_by(self._pay, None if self.pretrained else self.entropy)

    def _pay(self, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        members, pay = self.parts.reward.predict(obs, actions), self.parts.reward.pay
        return pay(members, self.step) if self.agent.weight is None else pay.apart(members)

    def _act(self) -> None:
        self.agent.replay_buffer.hybrid = self.asks and bool(self.questions.left)
        until = min(self.due.eval, self.due.checkpoint, self.due.log, self.total_steps, self._next_session())
        if self.asks:
            until = min(until, self.due.between)
        while self.step < until and not self.stop() and not self.ended:
            self.agent.collect(min(CHUNK, until - self.step), callback=self.callback, stop=self.stop)
            self.ended = self.agent.told_to_stop
            self.diary.advance()
        if self.stop():
            self._save_and_stop()

    def _next_session(self) -> int:
        """Environment step of the next session; NEVER if what it takes does not fit into total_steps any more."""
        due = self.due.feedback
        if not self.asks or due >= self.total_steps:
            return NEVER
        needed = self.questions.steps(self.questions.count(due), first=not self.pretrained)
        return due if due + needed <= self.total_steps else NEVER

    def _feedback_session(self) -> None:
        """Select pairs, ask, learn from the answers, pay the replay anew."""
        if self.dialogue.pending is None:
            self.session.begin()
        metrics = self._ask()
        self.sessions += 1
        metrics |= self._learn()
        if len(self.parts.preferences):  # else nobody has answered yet: pretraining goes on
            self._after_update()
        following = max(self.due.feedback + self.feedback.every, self.step)  # fresh steps count towards the interval
        self.due.feedback = following if self.questions.left else NEVER
        overdue = self.due.between <= self.step  # it fell on this session's step, and comes after it
        self.due.between = min(self._next_between(), self.due.between if overdue and self.questions.left else NEVER)
        self.diary.session(metrics, self.sessions)

    def _ask(self) -> dict[str, float]:
        """This session's questions and their answers; what is open when asking fails or is interrupted is saved."""
        try:
            return self.dialogue.session(self.sessions, self.step, first=not self.pretrained)
        except BrokenOff:
            self._save_and_stop()
        except TeacherError:
            self.save()
            raise

    def _learn(self) -> dict[str, float]:
        """Let the reward learn from all answers, and pay the replay anew."""
        parts = self.parts
        if not len(parts.preferences):
            return {}
        metrics = parts.reward.pretrain(self.session)
        told = parts.updater.update(parts.reward, parts.preferences, self.session)
        metrics |= numbers(told, f"updater {name_of(parts.updater)}")
        if found := non_finite(parts.reward.state_dict()):
            raise FloatingPointError(f"the learned reward diverged in session {self.sessions}: {found} is not finite")
        self.agent.replay_buffer.relabel(self._pay)
        if self.pretrained:  # of the first reward there is nothing to overestimate yet: it has a start of its own
            metrics |= self.agent.after_relabelling(self.critic_seed + self.sessions)
        return metrics

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
            self.agent.train(owed * self.agent.gradient_steps, self.agent.batch_size)

    def _next_between(self) -> int:
        every = self.parts.updater.between_every
        left = self.questions.left and len(self.parts.preferences)
        return (self.step // every + 1) * every if every and left else NEVER

    def _between_sessions(self) -> None:
        """What some updaters do while questions are left, beside the sessions; then the replay is paid anew."""
        parts = self.parts
        told = parts.updater.between(parts.reward, parts.preferences, self.session)
        metrics = numbers(told, f"updater {name_of(parts.updater)}")
        self.agent.replay_buffer.relabel(self._pay)
        self.due.between = self._next_between()
        self.diary.log(metrics)

    def _evaluate(self) -> None:
        every = self.evaluation.every
        following = (self.step // every + 1) * every  # sessions take steps: one may have come late
        self.due.eval = following if self.step >= self.total_steps else min(following, self.total_steps)
        self.due.evaluated = self.step
        self.diary.evaluate(learned=self.asks and self.pretrained)

    def _log_training(self) -> None:
        self.due.log = self.step + self.log_every
        self.diary.training()

    # ------------------------------------------------------------------------------------------------ exact resume

    def save(self) -> None:
        """Write a checkpoint from which `load` continues bit for bit."""
        run_state.save(self)

    def _save_and_stop(self) -> NoReturn:
        self.save()
        raise Stopped

    def _log_steps(self) -> None:
        """Write down the steps taken so far, before the rings overwrite them; a checkpoint will point at them."""
        for log in self.step_logs:
            log.append(self.parts.rollouts.total)

    def load(self) -> None:
        """Restore the newest usable checkpoint of `run_dir` (see pbrl.records.checkpoint).

        A run that was killed before its first one starts at step 0 again; its answers are in the journal.

        Raises:
            CheckpointError: if there are checkpoints and none can be used.
        """
        if begun(self.run_dir):
            load_latest(self.run_dir, self.step_logs, partial(run_state.restore, self))
        else:
            print(f"{self.run_dir} was stopped before its first checkpoint: from step 0 again, with the answers given")
            self.parts.loggers.local.truncate(0)

    def close(self, complete: bool) -> None:
        """Write summary.json, close logs, teacher and simulators."""
        self.diary.write_summary(complete)
        self.release(complete)

    def release(self, complete: bool = False) -> None:
        """Close logs, teacher and simulators."""
        self.parts.loggers.close(self.diary.summary(complete))
        self.parts.teacher.close(complete)
        self.agent.training_env.close()
        self.parts.eval_env.close()
