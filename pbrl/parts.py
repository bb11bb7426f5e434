"""What a run is made of."""

from __future__ import annotations

from dataclasses import dataclass

from pbrl.agent.sac import PreferenceSAC
from pbrl.asking import AnswerJournal
from pbrl.interfaces import Updater
from pbrl.preferences import Preferences
from pbrl.queries import QueryRule
from pbrl.records.loggers import Loggers
from pbrl.reward import RewardEnsemble
from pbrl.rollouts import Rollouts
from pbrl.types import Environment, Teacher


@dataclass
class Parts:
    """The parts of one run; `pbrl.launch.build` makes them from the config."""

    agent: PreferenceSAC
    eval_env: Environment
    reward: RewardEnsemble
    rollouts: Rollouts
    query: QueryRule
    teacher: Teacher
    updater: Updater
    preferences: Preferences
    loggers: Loggers
    journal: AnswerJournal

    @property
    def asks(self) -> bool:
        """Whether the reward is learned from answers; False: the agent is paid the task's own."""
        return self.updater.pairs != "none"
