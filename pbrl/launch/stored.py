"""The config of a run found on the disk, read as what it may be: a stranger's file.

It is read within bounds, completed with default values, and held against a closed list (`constructors`): what it names
outside this project must be named again, `resume=RUN trust=[my_module]`. Every command reads it here.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pbrl.files import TEXT_BYTES, foreign_entry, open_in_place, read_bounded, read_yaml
from pbrl.launch.configuration import CONF, GROUPS, ConfigError, check_own, leaves
from pbrl.launch.constructors import check_stored, needs_trust
from pbrl.upgrade import upgrade

MOVED = {  # modules whose classes stored configs name by their places of before version 0.2
    "pbrl.agent": "pbrl.agent.sac",
    "pbrl.bilevel.estimators": "pbrl.second_term.implicit",
    "pbrl.bilevel.gate": "pbrl.second_term.gate",
    "pbrl.bilevel.second_actor": "pbrl.second_term.penalty",
    "pbrl.bilevel.upper": "pbrl.second_term.upper",
    "pbrl.loggers": "pbrl.records.loggers",
}


@contextlib.contextmanager
def lock(run_dir: Path, seconds: int = 0) -> Iterator[None]:
    """Within the block no other process works in this run's folder; a killed one's lock is free at once.

    Args:
        seconds: how long to wait for another process to end.

    Raises:
        ConfigError: if another process is still at work there, or the folder cannot be written to.
    """
    try:
        file = open_in_place(run_dir / "lock")
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be worked in: {error}") from error
    with file:
        for left in range(seconds, -1, -1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise ConfigError(f"another process is at work in {run_dir}; wait for it or stop it") from None
                time.sleep(1)
        yield


def read_config(
    run_dir: Path, trust: Sequence[str] = (), parts: Sequence[str] = GROUPS
) -> tuple[DictConfig, dict[str, str]]:
    """The config stored in a run folder and the names of its chosen options; keys it lacks have their default values.

    Args:
        trust: modules, files and addresses outside this project that it may name; see `constructors`.
        parts: the groups that the caller builds; the others are left out of the config.

    Raises:
        ConfigError: if there is none, it is damaged, it asks for what a stored config must not, or the folder holds
            links.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir}: there is no run (no config.yaml in it)")
    refuse_links(run_dir)
    stored, choices = _parse(path)
    for group in set(GROUPS) - set(parts):
        del stored[group]
    stored.pop("trust", None)
    check_stored(stored, path, trust, run_dir)
    cfg = _with_defaults(stored)
    check_own(cfg)
    return cfg, choices


def command_of(run_dir: Path) -> str:
    """The line that started a run, as command.txt has it; empty if there is none."""
    path = run_dir / "command.txt"
    line = read_bounded(path, TEXT_BYTES).decode(errors="replace").strip() if path.is_file() else ""
    first, _, rest = line.partition(" ")
    return f"python -m pbrl.train {rest}" if first.endswith(".py") else line  # as it was stored before version 0.2


def refuse_links(run_dir: Path) -> None:
    """A folder that holds links, pipes or devices is not worked in: writing could reach elsewhere.

    Raises:
        ConfigError: naming the first one.
    """
    try:
        found = foreign_entry(run_dir)
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be worked in: {error}") from error
    if found:
        raise ConfigError(f"{found}; a run's folder holds plain files only: put the file itself there, or remove it")


def _with_defaults(stored: dict[str, Any]) -> DictConfig:
    default = OmegaConf.load(CONF / "train.yaml")
    assert isinstance(default, DictConfig)
    for key in ("defaults", "hydra"):
        default.pop(key)
    try:
        merged = OmegaConf.merge(default, OmegaConf.create(stored))
    except OmegaConfBaseException as error:
        raise ConfigError(f"a stored config does not fit the default one: {' '.join(str(error).split())}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        stored: Any = read_yaml(path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored):
        raise ConfigError(f"{path} is damaged: it holds no table of keys")
    choices = stored.pop("choices", {})
    if not isinstance(choices, dict) or not all(isinstance(name, str | None) for name in choices.values()):
        raise ConfigError(f"{path} is damaged: choices is not a table of names")
    for group in GROUPS:
        node = stored.get(group)
        if not isinstance(node, dict) or (group != "logger" and not isinstance(node.get("_target_"), str)):
            raise ConfigError(f"{path} is damaged: it has no table {group} with a _target_")
    _rename_moved(stored)
    _move_pay(stored["agent"], stored["reward"])
    upgrade(stored)
    return stored, {str(group): str(name) for group, name in choices.items()}


def _rename_moved(node: Any) -> None:
    """Let each `_target_` of a module that has moved name its present place."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict | list):
            _rename_moved(value)
        elif key == "_target_" and isinstance(value, str):
            module, _, name = value.rpartition(".")
            node[key] = f"{MOVED.get(module, module)}.{name}"
    if isinstance(node, dict) and node.get("_target_") == "pbrl.second_term.gate.Gate" and "consecutive" in node:
        del node["threshold"], node["consecutive"]  # before 0.2 it counted agreements; its test has defaults


def _move_pay(agent: dict[str, Any], reward: dict[str, Any]) -> None:
    """RUNE's bonus was a key of the agent before version 0.2."""
    bonus, decay = agent.pop("disagreement_bonus", 0.0), agent.pop("disagreement_decay", 0.0)
    if bonus:
        reward |= {"disagreement_bonus": bonus, "disagreement_decay": decay}


def trust_of(run_dir: Path, parts: Sequence[str] = ()) -> list[str]:
    """What `trust=[…]` must hold for the run in this folder to be resumed, or for these parts of it to be built."""
    stored = _parse(run_dir / "config.yaml")[0]
    return needs_trust({key: stored[key] for key in parts or stored}, run_dir)


def changes(before: Path, after: Path) -> list[str]:
    """The values that differ between two stored configs, as `key: old → new`."""
    return _changes(_parse(before)[0], _parse(after)[0])


def differences(path: Path, config: Any) -> list[str]:
    """Where a stored config, completed with default values, differs from this one (resolved), as `key: old → new`.

    Raises:
        ConfigError: if the stored one is damaged.
    """
    old = OmegaConf.to_container(_with_defaults(_parse(path)[0]))
    return _changes(old, OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(config)))))


def _changes(before: Any, after: Any) -> list[str]:
    old, new = dict(leaves("", before)), dict(leaves("", after))
    return [
        f"{key}: {old.get(key, 'absent')} → {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "absent") != new.get(key, "absent")
    ]
