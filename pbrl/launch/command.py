"""The command line, before Hydra sees it: what Hydra would explain in a page is said in a line, and a `_target_` that
is given replaces the option it belongs to.

Rewritten are only the overrides:

    updater._target_=my.Own updater.rate=2   →   replaced=[updater] ++updater._target_=my.Own ++updater.rate=2
    updater.gate._target_=my.Gate            →   ++updater.gate=null ++updater.gate._target_=my.Gate
    feedback.budget=50                       →   ++feedback.budget=50

`replaced` (pbrl/conf/replaced) empties the node of a chosen option, so that its arguments do not reach another
constructor. With `++` Hydra takes any key; which exist is for `pbrl.launch.configuration.check` to say, which knows the
constructors that this command line really names.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pbrl.interfaces import Updater
from pbrl.launch.configuration import CONF, GROUPS, ConfigError, check, find_target, options, unknown

GRAMMAR = (
    "expected KEY=VALUE; a value with spaces, commas, brackets, = or letters beyond a to z is quoted twice: "
    "'KEY=\"VALUE\"'"
)
ALL_CHECKED = 32  # members of a sweep before its first run starts; of a larger one, each value of each swept key once
MODULE = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
PLAIN = re.compile(r"(?=.*/)[\w./-]+", re.ASCII)  # a path that Hydra's grammar reads as it stands


def prepare(arguments: Sequence[str]) -> list[str]:
    """The arguments for Hydra that these amount to; they compose, and every constructor takes what it is given.

    Raises:
        ConfigError: one line about what does not exist or cannot be.
    """
    flags = _flags(arguments)
    if flags.shell_completion or flags.experimental_rerun:
        return list(arguments)
    parser = OverridesParser.create()
    given = [_parse(parser, text) for text in flags.overrides]
    many = flags.multirun or any(o.key_or_group == "hydra.mode" and str(o.value()) == "MULTIRUN" for o in given)
    for override in given:
        if override.is_sweep_override() and not many:
            raise ConfigError(
                f"{override.input_line} names several values; add -m to run each of them, or quote a single one that "
                f"has a comma: '{override.key_or_group}=\"A,B\"'"
            )
    for override in given:
        _check_choice(override)
    overrides = rewrite(given)
    if flags.config_path is None and flags.config_name is None and not (flags.help or flags.hydra_help):
        where = [] if flags.config_dir is None else [f"file://{Path(flags.config_dir).resolve()}"]
        for member in members([_parse(parser, text) for text in overrides]) if many else [overrides]:
            cfg = composed(member, where)
            if cfg.get("resume") is None:  # the config of a resumed run is the stored one
                check(cfg, complete=flags.cfg is None and flags.info is None)
                _check_asked(cfg, given)
                _check_seen(cfg, many)
    if many:
        swept = [f"'{override.key_or_group}'" for override in given if override.is_sweep_override()]
        overrides.append(f"hydra.callbacks.summary.swept=[{','.join(swept)}]")
    kept = list(arguments)
    for text in reversed(flags.overrides):
        kept.reverse()
        kept.remove(text)  # its last occurrence: an equal value of a flag stands before it
        kept.reverse()
    return [*kept, *overrides]


def _flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags, and the overrides wherever they stand between them."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists groups and keys, --hydra-help the flags)")

    parser.error = refuse  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(list(arguments))
    chosen = [name for name in ("run", "multirun", "cfg", "info") if getattr(flags, name)]
    if len(chosen) > 1:
        raise ConfigError(f"--{chosen[0]} and --{chosen[1]} cannot be given together; leave one out")
    if flags.resolve and not (flags.cfg or flags.help):
        raise ConfigError("--resolve is for --cfg job; add that, or leave it out")
    if flags.config_dir is not None and not Path(flags.config_dir).is_dir():
        raise ConfigError(f"-cd {flags.config_dir}: there is no such folder; expected one with options of your own")
    return flags


def _parse(parser: OverridesParser, text: str) -> Override:
    try:
        override = parser.parse_override(text)
        if override.key_or_group:
            return override
    except HydraException as error:
        raise ConfigError(f"{text} cannot be read: {GRAMMAR}") from error
    raise ConfigError(f"{text} names no key: {GRAMMAR}")


def _check_choice(override: Override) -> None:
    """A group is chosen by one name."""
    group = override.key_or_group
    if group not in (*GROUPS, "experiment", "launcher") or override.is_sweep_override() or override.is_delete():
        return
    if not isinstance(override.value(), str) and not (group in ("experiment", "launcher") and not override.value()):
        own = f", or {group}._target_=my_module.MyClass" if group in GROUPS else ""
        raise ConfigError(f"{override.input_line}; expected one name of {', '.join(options(group))}{own}")


def _check_asked(cfg: DictConfig, given: Sequence[Override]) -> None:
    """A teacher is chosen for an updater that asks one. In a sweep over updaters, others may."""
    updater = find_target("updater", cfg.updater._target_)
    asks = not (inspect.isclass(updater) and issubclass(updater, Updater) and updater.pairs == "none")
    if asks or any(o.key_or_group == "updater" and o.is_sweep_override() for o in given):
        return
    for override in given:
        if override.key_or_group.split(".")[0] == "teacher":
            raise ConfigError(
                f"{override.input_line} has no effect: {updater.__name__} asks nobody, its agent is paid the task's "
                "own reward; leave it out, or choose another updater"
            )


def _check_seen(cfg: DictConfig, many: bool) -> None:
    """A sweep's runs write into files: nobody would see the link of a page, and its token would lie there."""
    if many and getattr(find_target("teacher", cfg.teacher._target_), "shows_link", False):
        raise ConfigError(
            f"teacher._target_={cfg.teacher._target_} prints a link for the person at the terminal, and a sweep's runs "
            "print into log.txt; leave out -m, and start the runs one by one"
        )


def rewrite(overrides: Sequence[Override]) -> list[str]:
    """The overrides as text, with those in front that empty the nodes whose `_target_` is given (see above)."""
    emptied = [
        override.key_or_group.removesuffix("._target_")
        for override in overrides
        if override.key_or_group.endswith("._target_") and _is_value(override) and not override.is_delete()
    ]
    groups = [node for node in GROUPS if node in emptied]
    nested = sorted(set(emptied) - set(groups))  # an outer node before those in it
    front = [f"replaced=[{','.join(groups)}]"] if groups else []
    front += [f"++{node}=null" for node in nested]
    return front + [_forced(override) for override in overrides]


def _is_value(override: Override) -> bool:
    """Whether it sets a value of ours, rather than choosing an option of a group or configuring Hydra."""
    key = override.key_or_group
    is_group = override.package is not None or "/" in key or (CONF / key).is_dir()
    return not is_group and not key.startswith("hydra.")


def _forced(override: Override) -> str:
    text = str(override.input_line)
    return "++" + text.lstrip("+") if _is_value(override) and not override.is_delete() else text


def members(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """The overrides of the runs of this sweep that are worth checking; none if they are drawn by another sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if any(o.key_or_group.startswith("hydra/sweeper") or isinstance(o.value(), Glob) for o in overrides):
        return
    try:
        values = [BasicSweeper.split_arguments([override], None)[0] for override in overrides]
    except HydraException as error:
        raise ConfigError(
            f"{str(error).strip()}; expected values with commas, choice(…), range(…) or glob(…)"
        ) from error
    choices = [[member[0] for member in alternatives] for alternatives in values]
    total = 1
    for alternatives in choices:
        total *= len(alternatives)
    if total <= ALL_CHECKED:
        yield from (list(chosen) for chosen in itertools.product(*choices))
        return
    first = [alternatives[0] for alternatives in choices]
    yield first
    for i, alternatives in enumerate(choices):
        yield from ([*first[:i], other, *first[i + 1 :]] for other in alternatives[1:])


def composed(overrides: Sequence[str], where: Sequence[str] = ()) -> DictConfig:
    """The config that these overrides make, with further folders to look for options in (`file://…`).

    Raises:
        ConfigError: one line, if Hydra refuses them.
    """
    try:
        return _compose(overrides, where)
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if error.options is None or not group:
            raise ConfigError(_first_line(error)) from error
        raise unknown(f"{group} option", name, error.options) from error
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
        raise ConfigError(f"{_culprit(overrides, where)} cannot be: {_first_line(cause)}") from error


def _compose(overrides: Sequence[str], where: Sequence[str]) -> DictConfig:
    search = [f"hydra.searchpath=[{','.join(quoted(place) for place in where)}]"] if where else []
    try:
        with initialize_config_module("pbrl.conf", version_base="1.3"):
            return compose("train", overrides=[*overrides, *search])
    finally:
        GlobalHydra.instance().clear()


def _culprit(overrides: Sequence[str], where: Sequence[str]) -> str:
    """The override without which the others compose, as it was typed; else all of them."""
    for override in overrides:
        try:
            _compose([other for other in overrides if other is not override], where)
        except Exception:  # whatever it is, this one alone is not to blame
            continue
        return override.removeprefix("++")
    return " ".join(override.removeprefix("++") for override in overrides)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).split("\n") if line.strip()), type(error).__name__)


def quoted(value: str) -> str:
    """A string as Hydra's grammar reads it back."""
    if PLAIN.fullmatch(value):
        return value
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)  # backslashes count only before a quote
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped).replace("${", "\\${")
    return f'"{escaped}"'


def command_line(overrides: Sequence[str]) -> str:
    """The line that starts a run with these overrides, for a shell."""
    typed = [override.removeprefix("++") for override in overrides if not override.startswith("replaced=")]
    return shlex.join(["python", "-m", "pbrl.train", *typed])


def searched(runtime: Any) -> list[str]:
    """The override that looks for options where `-cd` did; `runtime`: Hydra's."""
    places = [f"file://{source.path}" for source in runtime.config_sources if source.provider == "command-line"]
    return [f"hydra.searchpath=[{','.join(map(quoted, places))}]"] if places else []


def train_command(run_dir: Path, trust: Sequence[str] = ()) -> str:
    """The line that goes on with a run, for a shell; `trust`: what its config names (`pbrl.launch.constructors`)."""
    words = [f"resume={quoted(str(run_dir))}"]
    if trust:
        words.append(f"trust=[{','.join(name if MODULE.fullmatch(name) else quoted(name) for name in trust)}]")
    return shlex.join(["python", "-m", "pbrl.train", *words])


def evaluate_command(run_dir: Path, trust: Sequence[str] = (), *options: str) -> str:
    """The line that evaluates a run, for a shell."""
    named = ["--trust", *trust] if trust else []
    return shlex.join(["python", "-m", "pbrl.evaluate", str(run_dir), *options, *named])


def own_names(choices: dict[str, str], cfg: Any, overrides: Sequence[str]) -> dict[str, str]:
    """The chosen options by name; one whose `_target_` was given goes by the name of that."""
    replaced = {o.lstrip("+").partition("._target_=")[0] for o in overrides if "._target_=" in o}
    return {
        group: str(cfg[group]["_target_"]).rpartition(".")[2] if group in replaced & set(GROUPS) else choice
        for group, choice in choices.items()
        if group != "replaced"
    }


def look_here() -> None:
    """Let modules in the present folder be imported, as `python -m` does, whatever the command is called by."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
