"""From a config to a loop that is ready to run, or a `ConfigError` before any simulation starts."""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import re
import subprocess
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from stable_baselines3.common.utils import set_random_seed

from pbrl import ORACLES
from pbrl.asking import AnswerJournal, state_of
from pbrl.files import TEXT_BYTES, printable, read_bounded, write_atomically
from pbrl.fitting import Fitting
from pbrl.interfaces import Updater, as_environment, as_rule, as_teacher, as_updater, name_of
from pbrl.launch.command import command_line
from pbrl.launch.configuration import (
    ConfigError,
    check,
    check_arguments,
    check_own,
    find_target,
    is_role,
    resumed,
    resumed_changes,
)
from pbrl.launch.shipped import changed
from pbrl.launch.stored import changes, read_config, refuse_links
from pbrl.loop import Loop
from pbrl.parts import Parts
from pbrl.preferences import Preferences
from pbrl.queries import QueryRule
from pbrl.records.checkpoint import CheckpointError, begun, checkpoints
from pbrl.records.evaluation import OracleCurve
from pbrl.records.loggers import JsonLines, Loggers, Sink
from pbrl.reward import RewardEnsemble
from pbrl.rollouts import Rollouts
from pbrl.schedule import Evaluation, Feedback, Pretraining
from pbrl.types import Environment, Teacher

PACKAGES = ("torch", "stable-baselines3", "gymnasium", "metaworld", "mujoco", "dm-control", "numpy", "scipy")
MOST_THREADS = 1024
Made = TypeVar("Made")


def build(
    cfg: DictConfig,
    choices: dict[str, str],
    overrides: list[str],
    hold: Callable[[Path], object] = lambda run_dir: None,
) -> Loop:
    """Check the config, build the parts and the loop; a resumed run (`resume=RUN`) is restored.

    Args:
        hold: locks the folder of a new run; called when it has been made, before anything is written into it.

    Raises:
        ConfigError: one line naming the key, its value and what is expected.
    """
    resume = None
    if cfg.resume is None:
        check(cfg)
    else:  # composed of the default's options, which are none of the stored run's: what changes is checked with those
        check_own(cfg)
        resume, logger = Path(cfg.resume), choices.get("logger", "custom")
        stored, choices = read_config(resume, list(cfg.trust))
        cfg = resumed(stored, cfg, resumed_changes(overrides))
        choices |= {} if cfg.logger == stored.logger else {"logger": logger}
        check(cfg)
    if (cfg.threads or 1) > MOST_THREADS:  # torch would start them all
        raise ConfigError(f"threads={cfg.threads}; expected at most {MOST_THREADS}, or null for all cores")
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    set_random_seed(cfg.seed)  # the global generators: no part here uses them, a user's own may
    try:
        loop = _Builder(cfg, choices, resume, hold).loop()
    except MemoryError as error:
        raise ConfigError(f"not enough memory: {printable(error)}") from error
    run_dir = loop.run_dir
    try:
        state_of(loop.parts.teacher)
    except ValueError as error:  # else said when it has answered, and no checkpoint could be written
        loop.release()
        raise ConfigError(error) from error
    if resume is None:
        planned = plan_in_words(loop)
        _refuse(lambda: _write_origin(run_dir, cfg, choices, overrides))
    else:
        _compare_versions(run_dir)
        try:
            loop.load()
        except CheckpointError:
            loop.release()
            raise
        if cfg.total_steps < loop.step and cfg.total_steps != stored.total_steps:
            loop.release()
            raise ConfigError(f"total_steps={cfg.total_steps}: this run has done {loop.step}; give at least that many")
        _compare_configs(run_dir)
        if cfg != stored:  # `resume=RUN total_steps=…`: the next `resume=RUN` goes on to there as well
            _refuse(lambda: _write_config(run_dir, cfg, choices))
    named = [printable(choices.get(group, group), 60) for group in ("env", "updater")]
    print(
        f"{' · '.join(named)} · teacher {printable(_teacher(loop, choices), 60)} · "
        f"seed {cfg.seed} · {_device_in_words(cfg.device, loop.agent.device)}, {torch.get_num_threads()} thread(s) · "
        f"{run_dir}" + (f" · resumed at step {loop.step}" if resume else "")
    )
    if resume is None and planned:
        print(planned)
    return loop


def _teacher(loop: Loop, choices: dict[str, str]) -> str:
    if not loop.asks:
        return "none (the task's reward)"
    return choices.get("teacher", name_of(loop.parts.teacher))


def plan_in_words(loop: Loop) -> str:
    """What will be asked and when; empty for an updater that asks nobody.

    Raises:
        ConfigError: if nothing would be asked before the run ends: its agent would learn from no reward.
    """
    if not loop.asks:
        return ""
    feedback, start, total = loop.feedback, loop.due.feedback, loop.total_steps
    sessions = loop.questions.plan(start)
    if not sessions and loop.questions.left:
        loop.release()
        why = "feedback.start" if feedback.start is not None else "agent.learning_starts + pretraining.steps"
        raise ConfigError(
            f"total_steps={total}: no question would be asked, as the first session is due at step {start} ({why}) and "
            f"takes {loop.questions.steps(loop.questions.count(start), True)} steps; raise total_steps or ask earlier"
        )
    pairs = sum(count for _, count in sessions)
    if not sessions:
        return f"questions: none; import_preferences has used up feedback.budget={feedback.budget}"
    when = f"in {len(sessions)} session(s), steps {sessions[0][0]} to {sessions[-1][0]}"
    if pairs == loop.questions.left:
        return f"questions: {pairs} {when}"
    more = "it or feedback.decay_to" if feedback.schedule == "decay" else "it"
    return (
        f"questions: {pairs} of feedback.budget={feedback.budget} {when}: total_steps={total} leaves no room for more; "
        f"raise {more}, or lower feedback.every or feedback.fresh_steps"
    )


def _device_in_words(asked: str, got: Any) -> str:
    if asked != "auto":
        return str(got)
    return f"{got} (auto: {'CUDA is available' if torch.cuda.is_available() else 'no CUDA here'})"


def _refuse(make: Callable[[], Made], name: str = "", node: Any = None) -> Made:
    """What `make` returns; what it raises about a value becomes a ConfigError of one line that begins with its key.

    Args:
        name, node: of the config, if `make` calls what its `_target_` names.
    """
    try:
        return make()
    except ConfigError:
        raise
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        wrapped = isinstance(error, HydraException)  # by Hydra: what a constructor raised
        cause = (error.__cause__ or error) if wrapped else error
        found = re.search(r"full_key: (\S+)", str(error)) if wrapped else None
        raise ConfigError(_reason(found[1] if found else name, node, cause)) from error


def _reason(name: str, node: Any, cause: BaseException) -> str:
    """One line about what a constructor refuses: the whole key, as the config has it, then the constructor's words."""
    said = str(cause).strip().split("\n")[0] or type(cause).__name__
    if not name:
        return said
    parameter = re.match(r"(?:[a-z_]+\.)*([A-Za-z_]\w*)(?:=| is )", said)
    where = OmegaConf.select(OmegaConf.create({name.split(".")[0]: node}), name) if node is not None else None
    if parameter and isinstance(where, DictConfig) and parameter[1] in where:
        key, value = f"{name}.{parameter[1]}", said[parameter.end() :]
        written: Any = OmegaConf.to_container(node)
        origin = re.fullmatch(r"\$\{(?:oc\.select:)?([\w.]+)(?:,\w*)?\}", str(written.get(parameter[1])))
        return f"{origin[1] if origin else key}={value}"
    if isinstance(cause, ValueError | TypeError | OSError | ImportError) or type(cause).__module__ != "builtins":
        return said if said.startswith(f"{name}.") else f"{name}: {said}"
    trace = traceback.extract_tb(cause.__traceback__)[-1]
    return (
        f"{name}: {type(cause).__name__}: {said} ({Path(trace.filename).name}, line {trace.lineno}; "
        "HYDRA_FULL_ERROR=1 shows the calls)"
    )


def check_combination(
    cfg: DictConfig, env: Environment, reward: RewardEnsemble, query: QueryRule, updater: Updater, teacher: Teacher
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
        (
            asks and teacher.needs_states and not has_states,
            f"teacher={name_of(teacher)} shows clips, which needs an environment whose simulator state can be restored",
        ),
    ):
        if refused:
            raise ConfigError(reason)


class _Builder:
    """Builds each part from its node of the config; `resume` and `hold`: see `build`."""

    def __init__(
        self, cfg: DictConfig, choices: dict[str, str], resume: Path | None, hold: Callable[[Path], object]
    ) -> None:
        self.cfg, self.choices, self.resume, self.hold = cfg, choices, resume, hold

    def make(self, group: str, **passed: Any) -> Any:
        node = self.cfg[group]
        if is_role(group, node):  # a function that is the part itself: its other parameters are in the node
            arguments: Any = OmegaConf.to_container(node, resolve=True)
            given = {key: value for key, value in arguments.items() if not key.startswith("_")}
            return functools.partial(find_target(group, node["_target_"]), **given)
        recursive = group != "logger" and not getattr(find_target(group, node["_target_"]), "takes_configs", False)
        return _refuse(lambda: instantiate(node, _convert_="all", _recursive_=recursive, **passed), group, node)

    def adopt(self, group: str, wrap: Callable[[Any], Made]) -> Made:
        made = self.make(group)
        return _refuse(lambda: wrap(made), group)

    def section(self, name: str, kind: Callable[..., Made]) -> Made:
        values: Any = OmegaConf.to_container(self.cfg[name], resolve=True)
        check_arguments(name, OmegaConf.create({"_target_": f"pbrl.schedule.{kind.__name__}", **values}))
        return _refuse(lambda: kind(**values), name, self.cfg[name])

    def loop(self) -> Loop:
        cfg = self.cfg
        feedback = self.section("feedback", Feedback)
        evaluation, pretraining = self.section("eval", Evaluation), self.section("pretraining", Pretraining)
        query, updater = self.adopt("query", as_rule), self.adopt("updater", as_updater)
        teacher = self.adopt("teacher", as_teacher)
        env, eval_env = self.adopt("env", as_environment), self.adopt("env", as_environment)
        self._check_horizon(env, updater)
        self._check_pieces(updater)
        self._check_memory(updater)
        obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
        reward = self.make("reward", obs_dim=obs_dim, act_dim=act_dim, seed=self._seed(2))
        agent = self.make("agent", env=env, seed=self._seed(3), device=self._device())
        check_combination(cfg, env, reward, query, updater, teacher)
        capacity = feedback.memory_steps
        restored = self.resume is not None and begun(self.resume)  # imported ones among them: no file is needed
        preferences = Preferences() if restored else self._preferences(env)
        oracle, callback = self._oracle(), self._callback()
        self.run_dir = self.resume or self._new_folder()
        refuse_links(self.run_dir)
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

    def _new_folder(self) -> Path:
        """The folder of a new run, made and held; a second one of the default name gets a number."""
        named = Path(self.cfg.run_dir or _default_folder(self.cfg, self.choices))
        folder = named
        for number in itertools.count(2):
            try:
                folder.mkdir(parents=True, exist_ok=self.cfg.run_dir is not None)
                break
            except FileExistsError as error:
                if self.cfg.run_dir is not None:  # a file
                    raise ConfigError(f"run_dir={folder}: {error}; name a folder") from error
                folder = named.with_name(f"{named.name}-{number}")
            except OSError as error:
                raise ConfigError(str(error)) from error
        self.hold(folder)
        if (folder / "config.yaml").exists():
            raise ConfigError(f"run_dir={folder} already holds a run; continue it with resume={folder} or name another")
        return folder

    def _seed(self, part: int) -> int:
        return int(np.random.SeedSequence((self.cfg.seed, part)).generate_state(1)[0])

    def _device(self) -> str:
        name = self.cfg.device
        if name == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise ConfigError(f"device={name}; expected auto, cpu, cuda or cuda:N")
        if name != "cpu":
            there = torch.cuda.device_count()
            if not torch.cuda.is_available() or int(name.partition(":")[2] or 0) >= there:
                raise ConfigError(f"device={name}: torch finds {there or 'no'} CUDA device(s) here; use cpu or auto")
        return str(name)

    def _check_horizon(self, env: Environment, updater: Updater) -> None:
        horizon, needed = env.horizon, self.cfg.segment_length + 2 * updater.margin
        if horizon is not None and needed > horizon:
            raise ConfigError(f"segment_length={needed} is longer than an episode of {horizon} steps; shorten it")

    def _check_pieces(self, updater: Updater) -> None:
        for part in (updater, getattr(updater, "inner", None)):
            fit = getattr(part, "fit", None)
            if isinstance(fit, Fitting) and fit.margin(self.cfg.segment_length) > updater.margin:
                raise ConfigError(
                    f"updater.fit.crop={list(fit.crop or ())}; expected shares up to 1, or updater=surf, which alone "
                    "keeps the steps around a segment that longer pieces reach into"
                )

    def _check_memory(self, updater: Updater) -> None:
        feedback, needed = self.cfg.feedback, self.cfg.segment_length + 2 * updater.margin
        what = f"expected at least {needed}, the steps of a segment (segment_length"
        what += f" and {updater.margin} on both sides)" if updater.margin else ")"
        if updater.pairs != "none" and feedback.memory_steps < needed:
            raise ConfigError(f"feedback.memory_steps={feedback.memory_steps}; {what}")
        fresh = feedback.fresh_steps if updater.pairs == "fresh" and feedback.fresh_share > 0 else None
        if fresh is not None and fresh < needed:
            raise ConfigError(f"feedback.fresh_steps={fresh}; {what}, null, or feedback.fresh_share=0")

    def _preferences(self, env: Environment) -> Preferences:
        about = {
            "env": self.choices.get("env"),
            "env_config": OmegaConf.to_container(self.cfg.env, resolve=True),
            "teacher": self.cfg.teacher._target_,
            "seed": self.cfg.seed,
        }
        preferences = Preferences(about)
        if self.cfg.import_preferences is not None:
            imported = _refuse(lambda: Preferences.load(self.cfg.import_preferences), "import_preferences")
            _refuse(lambda: preferences.extend(imported), "import_preferences")
            if len(imported):
                self._check_sizes(imported, env)
        return preferences

    def _check_sizes(self, imported: Preferences, env: Environment) -> None:
        sizes = [
            ("steps a segment (segment_length)", imported.length, self.cfg.segment_length),
            ("observations a step", imported.first.obs.shape[2], env.observation_space.shape[0]),
            ("actions a step", imported.first.actions.shape[2], env.action_space.shape[0]),
        ]
        if imported.states is not None:
            sizes.append(("numbers in a simulator's state", imported.states.shape[2], env.state_size))
        differing = "; ".join(f"{there} {what}, this run {here}" for what, there, here in sizes if there != here)
        if differing:
            raise ConfigError(
                f"import_preferences={self.cfg.import_preferences} has {differing}; expected the same: import another "
                "file, or give this run the segments and environment of this one"
            )

    def _loggers(self) -> Loggers:
        remote: list[Sink] = []
        if self.cfg.logger.get("_target_") is not None:
            config = OmegaConf.to_container(self.cfg, resolve=True)
            remote.append(self.make("logger", run_dir=self.run_dir, run_config=config, choices=self.choices))
        return Loggers(_refuse(lambda: JsonLines(self.run_dir / "metrics.jsonl")), remote)

    def _oracle(self) -> OracleCurve | None:
        given = self.cfg.oracle
        task = str(self.choices.get("env"))
        path = Path(given) if given else ORACLES / f"{task}.csv"
        if given is None and (not path.exists() or changed(self.cfg.env, task)):
            return None
        if not path.exists():
            raise ConfigError(
                f"oracle={given}: there is no such file; expected a CSV with env_step,return, the folder of a run with "
                "updater=oracle, or null"
            )
        return _refuse(lambda: OracleCurve(path), "oracle")

    def _callback(self) -> Any:
        from stable_baselines3.common.callbacks import BaseCallback, CallbackList

        callbacks = []
        for i, node in enumerate(self.cfg.callbacks):
            callback = _refuse(lambda: instantiate(node, _convert_="all"), f"callbacks[{i}]")  # noqa: B023
            if not isinstance(callback, BaseCallback):
                raise ConfigError(
                    f"callbacks[{i}]._target_={node['_target_']} makes a {type(callback).__name__}; expected a "
                    "callback of Stable-Baselines3 (a subclass of BaseCallback)"
                )
            callbacks.append(callback)
        return CallbackList(callbacks) if callbacks else None


def _default_folder(cfg: DictConfig, choices: dict[str, str]) -> str:
    for group, choice in choices.items():
        if ".." in Path(str(choice)).parts or Path(str(choice)).is_absolute():
            raise ConfigError(f"{group}={choice} would lead out of the folder of runs; name an option of this group")
    name = f"{choices.get('updater', 'custom')}-s{cfg.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return f"runs/{choices.get('env', 'custom')}/{name}"


def processor() -> str:
    """This machine's model of processor, as far as Linux tells it, and the instructions that torch uses on it: what
    the rounding of sums, and with it a run's course, depends on besides the versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = told.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {told[key]}" for key in ("cpu family", "model") if key in told]
    return ", ".join([name, *numbers, torch.backends.cpu.get_cpu_capability()])


def versions() -> dict[str, str]:
    """Python's and the main packages' versions, the processor, and the commit of this code where git knows it."""
    found = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    found["processor"] = processor()
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found


def _write_origin(run_dir: Path, cfg: DictConfig, choices: dict[str, str], overrides: list[str]) -> None:
    write_atomically(run_dir / "command.txt", (command_line(overrides) + "\n").encode())
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
        before = dict(json.loads(read_bounded(path, TEXT_BYTES)))
    except (OSError, ValueError, TypeError) as error:
        print(f"{path} cannot be used ({printable(error)}): the versions this run began with are unknown")
        return
    now = versions()
    before.setdefault("processor", now["processor"])  # which earlier runs do not name
    changed = [f"{name} {before.get(name)} → {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        print(f"resuming with other versions or processor, so not bit for bit: {printable(', '.join(changed))}")


def _compare_configs(run_dir: Path) -> None:
    """Say which values of config.yaml were edited since the newest checkpoint."""
    stored = [folder / "config.yaml" for folder in checkpoints(run_dir)]
    changed = changes(stored[-1], run_dir / "config.yaml") if stored and stored[-1].exists() else []
    if changed:
        print(f"config.yaml was edited since the checkpoint, so not bit for bit: {printable(', '.join(changed))}")
