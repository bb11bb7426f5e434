"""What the config in a run's folder may call, and with what: a closed list.

The user typed a new run's config; the one in a folder may have been written by anybody. On its word only the
constructors are called that the shipped options name, each where the options name it, with plain arguments of the
types its signature wants. What reaches further must be named again in `trust=[…]`: objects of other modules,
environments that gymnasium would import, files elsewhere, addresses.
"""

from __future__ import annotations

import collections.abc
import functools
import importlib.util
import inspect
import types
import typing
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.utils import get_object

from pbrl.files import printable
from pbrl.launch.configuration import CONF, PASSED, ConfigError, leaves, type_hints

# Stable-Baselines3's callbacks that take neither a path nor an environment nor the name of one
CALLBACKS = frozenset(
    f"stable_baselines3.common.callbacks.{name}"
    for name in ("StopTrainingOnMaxEpisodes", "EveryNTimesteps", "LogEveryNTimesteps")
)
SAME_AS = {"inner": "updater", "callback": "callbacks"}  # keys that hold what others hold
LOOPBACK = {"localhost", "127.0.0.1", "::1"}  # hosts that only this machine reaches
REACHING = {"url", "host", "path", "entity", "oracle", "import_preferences"}  # keys of texts that name what is outside
PLAIN = (int, float, bool, str, type(None))


class Reach(NamedTuple):
    """One thing outside this project and the run's folder that a config names."""

    key: str  # dotted
    value: str
    trust: str  # what `trust=[…]` must hold
    module: bool  # or a module that it lies in

    def within(self, trust: Sequence[str]) -> bool:
        return self.trust in trust or (self.module and (within(self.value, trust) or within(self.trust, trust)))


@functools.cache
def shipped() -> Mapping[str, frozenset[str]]:
    """The constructors that the shipped options name, by the key they stand at: env, updater, gate, …"""
    found: dict[str, set[str]] = defaultdict(set, {"callbacks": set(CALLBACKS)})

    def visit(key: str, node: Any) -> None:
        for name, value in (
            node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        ):
            if name == "_target_" and isinstance(value, str):
                found[key].add(value)
            elif name != "hydra":
                visit(key if isinstance(node, list) else str(name), value)

    for path in CONF.rglob("*.yaml"):
        if path.relative_to(CONF).parts[0] not in ("hydra", "launcher"):
            visit(path.parent.name, yaml.safe_load(path.read_text()))
    return {key: frozenset(names) for key, names in found.items()}


def _is_shipped(key: str, target: str) -> bool:
    """Whether the options name `target` at `key`, and its package is the one that lies beside this one."""
    if target not in shipped().get(SAME_AS.get(key, key), ()):
        return False
    if target in CALLBACKS:
        return True
    package = target.partition(".")[0]
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return [Path(place) for place in places] == [CONF.parents[1] / package]


def reaches(config: Any, run_dir: Path | None = None, name: str = "", key: str = "") -> Iterator[Reach]:
    """What a config (plain tables and lists) names outside this project; nothing is imported to find out.

    Args:
        run_dir: files in there are inside.
    """
    for part, value in config.items() if isinstance(config, dict) else enumerate(config):
        path = f"{name}.{part}" if name else str(part)
        if isinstance(value, dict | list):
            yield from reaches(value, run_dir, path, str(part) if isinstance(config, dict) else key)
        elif part == "_target_" and isinstance(value, str):
            if not _is_shipped(key, value):
                yield Reach(path, value, value.rpartition(".")[0] or value, True)
        elif isinstance(value, str) and (key, part) == ("env", "id") and ":" in value:
            yield Reach(path, value, value.partition(":")[0], True)  # gymnasium imports what stands before the colon
        elif isinstance(value, str) and part in REACHING and not _inside(part, value, run_dir):
            yield Reach(path, value, value, False)


def _inside(part: Any, value: str, run_dir: Path | None) -> bool:
    if part == "host":
        return value in LOOPBACK
    return run_dir is not None and Path(value).resolve().is_relative_to(run_dir.resolve())


def needs_trust(config: Any, run_dir: Path | None = None) -> list[str]:
    """What `trust=[…]` must hold for a run with this config (plain tables and lists) to be resumed; sorted."""
    return sorted({reach.trust for reach in reaches(config, run_dir)})


def check_stored(config: Any, where: Path, trust: Sequence[str], run_dir: Path | None = None) -> None:
    """Refuse what a stored config must not ask for; nothing is imported before all of it has been looked at.

    Args:
        where: the file that holds it. trust, run_dir: see `reaches`.

    Raises:
        ConfigError: naming the key, its value and what would allow it.
    """
    for name, value in leaves("", config):
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{where}: {printable(name)}={printable(value)}; a stored config holds plain values only")
    for reach in reaches(config, run_dir):
        if not reach.within(trust):
            what = "is not among" if reach.key.endswith("_target_") else "is outside"
            name = printable(reach.trust)
            raise ConfigError(
                f"{where}: {reach.key}={printable(reach.value)} {what} what a stored config may name; if you know "
                f"and trust it, add trust=[{name}] (commands other than pbrl.train: --trust {name})"
            )
    for part, node in config.items():
        _check_node(where, part, part, node, trust, set(PASSED.get(part, ())))


def within(name: str, trust: Sequence[str]) -> bool:
    """Whether `name` is one of these modules (objects) or lies in one."""
    return any(name == module or name.startswith((module + ".", module + ":")) for module in trust)


def _check_node(where: Path, name: str, key: str, node: Any, trust: Sequence[str], passed: set[str]) -> None:
    for part, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        _check_node(where, f"{name}.{part}", str(part) if isinstance(node, dict) else key, value, trust, set())
    if not isinstance(node, dict) or node.get("_target_") is None:
        return
    target = node["_target_"]
    if not isinstance(target, str):
        raise ConfigError(f"{where}: {name}._target_ is a {type(target).__name__}; expected the name of a class")
    found = _imported(where, name, target)
    if not _is_shipped(key, target):  # trusted, then; but only for what it is itself, not for what it imports
        if not within(getattr(found, "__module__", None) or "", trust):
            raise ConfigError(
                f"{where}: {name}._target_={target} is defined elsewhere; trust=[…] must name that module"
            )
        return
    hints = type_hints(found)
    known = set(inspect.signature(found).parameters) - passed
    for part, value in node.items():
        if part == "_target_":
            continue
        if part not in known:
            raise ConfigError(f"{where}: {printable(target)} takes no {name}.{printable(part)} from a stored config")
        if not fits(value, hints.get(part)):
            raise ConfigError(
                f"{where}: {name}.{part}={printable(value)} is not what {target} takes from a stored config"
            )


def _imported(where: Path, name: str, target: str) -> Any:
    try:
        return get_object(target)
    except Exception as error:  # Hydra wraps whatever the import raises
        raise ConfigError(f"{where}: {name}._target_={printable(target)} cannot be imported") from error


def fits(value: Any, hint: Any) -> bool:
    """Whether a stored value is of an annotated type; a class wants a table with a `_target_`, and so do other types.

    Texts fit where `str` stands and nowhere else: not for paths, environments, policies or anything unannotated.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint in PLAIN or hint is None:
        return type(value) is hint or (hint is float and type(value) is int) or (hint is None and value is None)
    if origin in (list, collections.abc.Sequence):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if isinstance(value, dict) and isinstance(value.get("_target_"), str):
        return True  # it has been checked on its own
    if origin in (dict, collections.abc.Mapping):
        key, held = arguments
        return isinstance(value, dict) and all(fits(k, key) and fits(v, held) for k, v in value.items())
    return value is None
