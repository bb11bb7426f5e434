"""From a config to a loop that is ready to run, or a `ConfigError` before any simulation starts."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from stable_baselines3.common.utils import set_random_seed

from pbrl.asking import AnswerJournal
from pbrl.interfaces import Updater, as_environment, as_rule, as_teacher, as_updater
from pbrl.launch.configuration import ConfigError, check, check_arguments, check_resumed
from pbrl.launch.stored import changes, read_config
from pbrl.loop import Loop
from pbrl.parts import Parts
from pbrl.preferences import Preferences
from pbrl.queries import QueryRule
from pbrl.records.checkpoint import CheckpointError, write_atomically
from pbrl.records.evaluation import OracleCurve
from pbrl.records.loggers import JsonLines, Loggers, Sink
from pbrl.reward import RewardEnsemble
from pbrl.rollouts import Rollouts
from pbrl.schedule import Evaluation, Feedback, Pretraining
from pbrl.types import Environment

PACKAGES = ("torch", "stable-baselines3", "gymnasium", "metaworld", "mujoco", "dm-control", "numpy", "scipy")
Made = TypeVar("Made")


def build(cfg: DictConfig, choices: dict[str, str], overrides: list[str]) -> Loop:
    """Check the config, build the parts and the loop; a resumed run (`resume=RUN`) is restored.

    Raises:
        ConfigError: one line naming the key, its value and what is expected.
    """
    check(cfg)
    resume = None if cfg.resume is None else Path(cfg.resume)
    if resume is not None:
        stored, choices = read_config(resume, list(cfg.trust))
        cfg = check_resumed(stored, overrides)
        check(cfg)
    run_dir = resume or _run_dir(cfg, choices)
    if not 0 <= cfg.seed < 2**32:
        raise ConfigError(f"seed={cfg.seed}; expected 0 to {2**32 - 1}")
    if cfg.threads is not None and cfg.threads < 1:
        raise ConfigError(f"threads={cfg.threads}; expected at least 1, or null for all cores")
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    set_random_seed(cfg.seed)  # the global generators: no part here uses them, a user's own may
    parts_of = _Builder(cfg, choices, run_dir)
    loop = parts_of.loop()
    if resume is None:
        _refuse(lambda: _write_origin(run_dir, cfg, choices))
    else:
        _compare_versions(run_dir)
        try:
            loop.load()
        except CheckpointError:
            loop.release()
            raise
        _compare_configs(run_dir)
        if cfg != stored:  # `resume=RUN total_steps=…`: the next `resume=RUN` goes on to there as well
            _refuse(lambda: _write_config(run_dir, cfg, choices))
    print(
        f"{choices.get('env', 'env')} · {choices.get('updater', 'updater')} · teacher {cfg.teacher._target_} · "
        f"seed {cfg.seed} · {loop.agent.device} with {torch.get_num_threads()} thread(s) · {run_dir}"
        + (f" · resumed at step {loop.step}" if resume else "")
    )
    return loop


def _refuse(make: Callable[[], Made]) -> Made:
    """What `make` returns; what it raises about a value becomes a ConfigError of one line."""
    try:
        return make()
    except (ValueError, TypeError, OSError, OmegaConfBaseException) as error:
        raise ConfigError(str(error).strip().split("\n")[0]) from error
    except Exception as error:
        cause = error.__cause__ or error  # Hydra wraps what a constructor raises
        if isinstance(cause, ValueError | TypeError | OSError | ImportError):
            raise ConfigError(str(cause).strip().split("\n")[0]) from error
        raise


def check_combination(
    cfg: DictConfig, env: Environment, reward: RewardEnsemble, query: QueryRule, updater: Updater
) -> None:
    """Refuse options that would have no effect, or fail hours later, in each other's company.

    Raises:
        ConfigError: naming both options and why they do not go together.
    """
    members, pay = len(reward.members), reward.pay
    asks, has_states = updater.pairs != "none", bool(env.state_size)
    for refused, reason in (
        (
            pay.disagreement_bonus and not asks,
            "reward.disagreement_bonus: this updater learns no reward, so no ensemble can disagree",
        ),
        (
            pay.compares and members == 1,
            "reward.pessimism and reward.disagreement_bonus need reward.members of at least 2 to disagree",
        ),
        (
            asks and members == 1 and query.compares_members,
            "query.score=disagreement needs reward.members of at least 2, or another query",
        ),
        (not asks and cfg.import_preferences is not None, "import_preferences: this updater learns from no answers"),
        (
            (cfg.eval.video or cfg.feedback.video) and not has_states,
            "eval.video and feedback.video need an environment whose simulator state can be restored",
        ),
        (
            query.branch_share > 0 and not has_states,
            "query.branch_share needs an environment whose simulator state can be restored",
        ),
    ):
        if refused:
            raise ConfigError(reason)


class _Builder:
    """Builds each part from its node of the config."""

    def __init__(self, cfg: DictConfig, choices: dict[str, str], run_dir: Path) -> None:
        self.cfg, self.choices, self.run_dir = cfg, choices, run_dir
        if cfg.total_steps < 1 or cfg.segment_length < 1 or cfg.checkpoint_every < 1 or cfg.log_every < 1:
            raise ConfigError("total_steps, segment_length, checkpoint_every and log_every must be at least 1")

    def make(self, group: str, **passed: Any) -> Any:
        node = self.cfg[group]
        return _refuse(lambda: instantiate(node, _convert_="all", _recursive_=group != "logger", **passed))

    def adopt(self, group: str, wrap: Callable[[Any], Made]) -> Made:
        made = self.make(group)
        return _refuse(lambda: wrap(made))

    def section(self, name: str, kind: Callable[..., Made]) -> Made:
        check_arguments(name, OmegaConf.merge({"_target_": f"pbrl.schedule.{kind.__name__}"}, self.cfg[name]))
        values = OmegaConf.to_container(self.cfg[name], resolve=True)
        return _refuse(lambda: kind(**values))  # type: ignore[arg-type]

    def loop(self) -> Loop:
        cfg = self.cfg
        feedback = self.section("feedback", Feedback)
        evaluation, pretraining = self.section("eval", Evaluation), self.section("pretraining", Pretraining)
        query, updater = self.adopt("query", as_rule), self.adopt("updater", as_updater)
        teacher = self.adopt("teacher", as_teacher)
        env, eval_env = self.adopt("env", as_environment), self.adopt("env", as_environment)
        self._check_horizon(env, updater)
        obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
        reward = self.make("reward", obs_dim=obs_dim, act_dim=act_dim, seed=self._seed(2))
        agent = self.make("agent", env=env, seed=self._seed(3), device=self._device())
        check_combination(cfg, env, reward, query, updater)
        capacity = feedback.memory_steps
        if cfg.checkpoint_every > min(capacity, agent.buffer_size) and cfg.total_steps > capacity:
            raise ConfigError(
                f"checkpoint_every={cfg.checkpoint_every} is more than the {min(capacity, agent.buffer_size)} steps "
                "kept (feedback.memory_steps, agent.buffer_size); lower it"
            )
        preferences, oracle, callback = self._preferences(), self._oracle(), self._callback()
        _refuse(lambda: self.run_dir.mkdir(parents=True, exist_ok=True))
        parts = Parts(
            agent=agent,
            eval_env=eval_env,
            reward=reward.to(agent.device),
            rollouts=Rollouts(capacity, obs_dim, act_dim, env.state_size),
            query=query,
            teacher=teacher,
            updater=updater,
            preferences=preferences,
            journal=_refuse(lambda: AnswerJournal(self.run_dir / "answers.jsonl")),
            loggers=self._loggers(),
        )
        if parts.asks:
            _refuse(lambda: teacher.open(self.run_dir, cfg.segment_length))
        return Loop(
            parts=parts,
            run_dir=self.run_dir,
            total_steps=cfg.total_steps,
            segment_length=cfg.segment_length,
            seed=cfg.seed,
            feedback=feedback,
            evaluation=evaluation,
            pretraining=pretraining,
            checkpoint_every=cfg.checkpoint_every,
            log_every=cfg.log_every,
            oracle=oracle,
            callback=callback,
        )

    def _seed(self, part: int) -> int:
        return int(np.random.SeedSequence((self.cfg.seed, part)).generate_state(1)[0])

    def _device(self) -> str:
        name = self.cfg.device
        if name == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            return str(torch.device(name))
        except RuntimeError as error:
            raise ConfigError(f"device={name}; expected auto, cpu, cuda or cuda:N") from error

    def _check_horizon(self, env: Environment, updater: Updater) -> None:
        horizon, needed = env.horizon, self.cfg.segment_length + 2 * updater.margin
        if horizon is not None and needed > horizon:
            raise ConfigError(f"segment_length={needed} is longer than an episode of {horizon} steps; shorten it")

    def _preferences(self) -> Preferences:
        about = {"env": self.choices.get("env"), "teacher": self.cfg.teacher._target_, "seed": self.cfg.seed}
        preferences = Preferences(about)
        if self.cfg.import_preferences is not None:
            imported = _refuse(lambda: Preferences.load(self.cfg.import_preferences))
            _refuse(lambda: preferences.extend(imported))
        return preferences

    def _loggers(self) -> Loggers:
        remote: list[Sink] = []
        if self.cfg.logger.get("_target_") is not None:
            config = OmegaConf.to_container(self.cfg, resolve=True)
            remote.append(self.make("logger", run_dir=self.run_dir, run_config=config, choices=self.choices))
        return Loggers(_refuse(lambda: JsonLines(self.run_dir / "metrics.jsonl")), remote)

    def _oracle(self) -> OracleCurve | None:
        given = self.cfg.oracle
        path = Path(given or f"experiments/results/oracle/{self.choices.get('env')}.csv")
        if given is None and not path.exists():
            return None
        return _refuse(lambda: OracleCurve(path))

    def _callback(self) -> Any:
        from stable_baselines3.common.callbacks import CallbackList

        callbacks = _refuse(lambda: [instantiate(node) for node in self.cfg.callbacks])
        return CallbackList(callbacks) if callbacks else None


def _run_dir(cfg: DictConfig, choices: dict[str, str]) -> Path:
    for group, choice in choices.items():
        if ".." in Path(str(choice)).parts or Path(str(choice)).is_absolute():
            raise ConfigError(f"{group}={choice} would lead out of the folder of runs; name an option of this group")
    name = f"{choices.get('updater', 'custom')}-s{cfg.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(cfg.run_dir or f"runs/{choices.get('env', 'custom')}/{name}")
    if (run_dir / "config.yaml").exists():
        raise ConfigError(f"run_dir={run_dir} already holds a run; continue it with resume={run_dir} or name another")
    return run_dir


def versions() -> dict[str, str]:
    """Python's and the main packages' versions, and the commit of this code where git knows it."""
    found = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found


def _write_origin(run_dir: Path, cfg: DictConfig, choices: dict[str, str]) -> None:
    write_atomically(run_dir / "command.txt", (" ".join(sys.argv) + "\n").encode())
    write_atomically(run_dir / "versions.json", json.dumps(versions(), indent=1).encode())
    _write_config(run_dir, cfg, choices)


def _write_config(run_dir: Path, cfg: DictConfig, choices: dict[str, str]) -> None:
    stored = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(stored, dict)
    config = OmegaConf.create({**stored, "resume": None, "choices": choices})
    write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(config).encode())


def _compare_versions(run_dir: Path) -> None:
    path = run_dir / "versions.json"
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        print(f"{path} cannot be used ({error}): the versions this run began with are unknown")
        return
    now = versions()
    changed = [f"{name} {before.get(name)} → {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        print(f"resuming with other versions, so not bit for bit: {', '.join(changed)}")


def _compare_configs(run_dir: Path) -> None:
    """Say which values of config.yaml were edited since the newest checkpoint."""
    stored = [folder / "config.yaml" for folder in sorted((run_dir / "checkpoints").glob("step_*"))]
    changed = changes(stored[-1], run_dir / "config.yaml") if stored and stored[-1].exists() else []
    if changed:
        print(f"config.yaml was edited since the checkpoint, so not bit for bit: {', '.join(changed)}")
