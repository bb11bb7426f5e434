"""What may stand in a config, and what it must not ask for: checked before anything starts.

Hydra refuses misspelt keys, but accepts anything behind a `+`; here every node with a `_target_` is held against the
signature of what it names, and every other key against the default config.
"""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import logging
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from pbrl.files import printable

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it prints what we raise

GROUPS = ("env", "agent", "reward", "query", "teacher", "updater", "logger")
CONF = Path(__file__).parent.parent / "conf"
# arguments that are known only at run time and passed in code
PASSED = {
    "agent": {"env", "seed", "device"},
    "reward": {"obs_dim", "act_dim", "seed"},
    "logger": {"run_dir", "run_config", "choices"},
}
TYPES = {  # of train.yaml's own keys, with the smallest value allowed
    "total_steps": (int, 1),
    "seed": (int, 0),
    "run_dir": (str | None, None),
    "resume": (str | None, None),
    "device": (str, None),
    "threads": (int | None, 1),
    "segment_length": (int, 1),
    "checkpoint_every": (int, 1),
    "log_every": (int, 1),
    "oracle": (str | None, None),
    "import_preferences": (str | None, None),
    "trust": (list[str], None),
    "callbacks": (list[Any], None),
}
LARGEST_SEED = 2**32 - 1
# parameters that the loop passes to a function that is itself the teacher, the query rule or the updater
ROLES = {
    "teacher": ("query",),
    "query": ("candidates", "count", "reward", "asked", "rng"),
    "updater": ("reward", "preferences", "session"),
}
LONGEST_MESSAGE = 4000  # characters of an error
LONGEST_LIST = 600  # characters of a list of names in an error
MAY_CHANGE = (  # when a run is resumed
    *("total_steps", "checkpoint_every", "threads", "device", "eval.episodes"),
    # where and how its teacher is reached: no answer given is another for it
    *("teacher.url", "teacher.timeout", "teacher.retries", "teacher.backoff"),
    *("teacher.host", "teacher.port", "teacher.lease", "teacher.undo_seconds", "teacher.task"),
)


class ConfigError(ValueError):
    """The config asks for something that does not exist or cannot work; the message is one line, also of odd values."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message, length=LONGEST_MESSAGE))


def suite(target: str) -> str:
    """Environment family of an `env._target_`: metaworld, dm_control or other."""
    module = target.split(".")
    return next((name for name in ("metaworld", "dm_control") if name in module), "other")


def register_resolvers() -> None:
    """`${by_suite:{metaworld:1,other:2}}`, `${by_task:{walker-walk:1},default}`, `${at_least:3,2}` for YAML files."""

    def by_suite(values: Mapping[str, Any], *, _root_: DictConfig) -> Any:
        name = suite(_root_.env._target_)
        return _node(values[name] if name in values else values["other"])

    def by_task(values: Mapping[str, Any], default: Any, *, _root_: DictConfig) -> Any:
        env = _root_.env
        kind = str(env.get("_target_")).rpartition(".")[2]
        names = [str(env.get("task")), f"{env.get('domain')}-{env.get('task')}", kind]
        return _node(next((values[name] for name in names if name in values), default))

    def at_least(value: Any, bound: float) -> bool:
        return isinstance(value, int | float) and value >= bound  # what is no number is refused later, by name

    OmegaConf.register_new_resolver("at_least", at_least, replace=True)
    OmegaConf.register_new_resolver("by_suite", by_suite, replace=True)
    OmegaConf.register_new_resolver("by_task", by_task, replace=True)


def _node(value: Any) -> Any:
    """A list or table as OmegaConf's own, which alone it can put in the place of an interpolation."""
    return OmegaConf.create(value) if isinstance(value, list | dict) else value


def options(group: str) -> list[str]:
    """The shipped options of a group."""
    folder = CONF / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that does not exist, with the closest one and all there are."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    there = f"there are: {', '.join(known)}" if known else "there are none here"
    if len(there) > LONGEST_LIST:
        near = difflib.get_close_matches(name, known, n=8, cutoff=0.4)
        there = f"there are {len(known)}, such as {', '.join(near or known[:8])}; python -m pbrl.listing names all"
    return ConfigError(f"{what} {name} does not exist; {hint}{there}")


def check(cfg: DictConfig, complete: bool = True) -> None:
    """Refuse keys that nothing reads, values that are missing, and values of the wrong type.

    Args:
        complete: whether values that must be given (`???`) may not be missing.

    Raises:
        ConfigError: naming the key, its value, what is expected, and for a misspelt key all that exist.
    """
    default = OmegaConf.load(CONF / "train.yaml")
    assert isinstance(default, DictConfig)
    top = ({str(key) for key in default} - {"defaults", "hydra"}) | set(GROUPS)
    _check_all_there(top, cfg)
    _check_resolves(cfg)
    plain = OmegaConf.to_container(cfg)  # what refers to a missing value is not itself missing
    missing = next((name for name, value in leaves("", plain) if value == "???"), None)
    if missing is not None and complete:
        raise ConfigError(f"{missing} must be given: {missing}=…")
    for key in map(str, cfg):
        if key not in top:
            raise unknown("key", key, top)
    check_own(cfg)
    for section in ("feedback", "pretraining", "eval"):
        if not isinstance(cfg[section], DictConfig):
            raise ConfigError(
                f"{section}={shown(cfg[section])}; expected keys such as {section}.{next(iter(default[section]))}"
            )
        for key in map(str, cfg[section]):
            if key not in default[section]:
                raise unknown("key", f"{section}.{key}", [f"{section}.{name}" for name in default[section]])
        _check_all_there(default[section], cfg[section], f"{section}.")
    for group in GROUPS:
        if not isinstance(cfg[group], DictConfig) or (group != "logger" and "_target_" not in cfg[group]):
            raise ConfigError(
                f"{group}={shown(cfg[group])}; expected one of {', '.join(options(group))}, or a class of your own: "
                f"{group}._target_=my_module.MyClass"
            )
        check_arguments(group, cfg[group])
    for i, callback in enumerate(cfg.callbacks):
        if not isinstance(callback, DictConfig) or not isinstance(callback.get("_target_"), str):
            raise ConfigError(
                f"callbacks[{i}]={shown(callback)}; expected a table: callbacks=[{{_target_: my_module.MyCallback}}]"
            )
        check_arguments(f"callbacks[{i}]", callback)


def _check_all_there(needed: Iterable[Any], section: DictConfig, prefix: str = "") -> None:
    for name in sorted({str(key) for key in needed} - {str(key) for key in section}):
        key = f"{prefix}{name}"
        raise ConfigError(f"{key} is missing; it cannot be taken out with ~{key}, only set to another value")


def check_own(cfg: DictConfig) -> None:
    """Refuse values of train.yaml's own keys that are of the wrong type, or too small.

    Raises:
        ConfigError: naming the key, its value and what is expected.
    """
    for key, (kind, least) in TYPES.items():
        _check_type(key, cfg[key], kind, builds=False)
        if least is not None and cfg[key] is not None and cfg[key] < least:
            null = ", or null" if type(None) in typing.get_args(kind) else ""
            raise ConfigError(f"{key}={cfg[key]}; expected at least {least}{null}")
    if cfg.seed > LARGEST_SEED:
        raise ConfigError(f"seed={cfg.seed}; expected 0 to {LARGEST_SEED}")


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """All values of nested tables and lists with their dotted names."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(f"{name}.{key}" if name else str(key), item)
    else:
        yield name, value


def _check_resolves(cfg: DictConfig) -> None:
    """Each value that refers to another one, `${…}`, must lead somewhere."""
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except InterpolationToMissingValueError:
        pass  # said by name of what is missing
    except OmegaConfBaseException as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"{error.full_key} cannot be resolved: {reason}; expected a plain value") from error


def check_arguments(name: str, node: Any) -> None:
    """Hold a `_target_` node, and those inside it, against the signature of what it names."""
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node and not OmegaConf.is_missing(node, "_target_"):
        if node["_target_"] is not None:
            _check_target(name, node)
        elif len(node) > 1:
            first = next(key for key in node if key != "_target_")
            raise ConfigError(f"key {name}.{first!s} does not exist: the chosen option of {name} takes none")
    for key in node:
        if not OmegaConf.is_missing(node, key):
            check_arguments(f"{name}.{key!s}", node[key])


def find_target(name: str, target: Any) -> Any:
    """The class or function that a `_target_` names.

    Raises:
        ConfigError: if there is none.
    """
    key = f"{name}._target_={shown(target)}"
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{key}; expected a class or function with its module, such as my_module.MyClass")
    try:
        found = get_object(target)
    except Exception as error:  # Hydra wraps whatever the import raises
        cause = error.__cause__ or error
        reason = str(cause).split("\n")[0] or type(cause).__name__
        raise ConfigError(
            f"{key} cannot be imported: {reason}; expected module.Name, with the module in this folder or installed"
        ) from error
    if not callable(found):
        raise ConfigError(f"{key} is a {type(found).__name__}; expected a class or function in it")
    return found


def is_role(name: str, node: DictConfig) -> bool:
    """Whether this `_target_` is a function that is the part itself, such as `def teacher(query)`, and builds none.

    It is one if it asks for the parameters that the loop passes to such a part: its first ones have no default value
    and are not given in the config.
    """
    target = find_target(name, node["_target_"])
    if name not in ROLES or not inspect.isroutine(target):
        return False
    parameters = list(_parameters(target).values())
    needed = parameters[: len(ROLES[name])]
    return len(needed) == len(ROLES[name]) and all(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in node
        for p in needed
    )


def _parameters(target: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except (ValueError, TypeError):  # written in C: what it takes is not known before it is called
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def _check_target(name: str, node: DictConfig) -> None:
    target = find_target(name, node["_target_"])
    parameters = dict(_parameters(target))
    if is_role(name, node):
        for parameter in list(parameters)[: len(ROLES[name])]:
            parameters.pop(parameter)
    kinds = {p.kind for p in parameters.values()}
    known = {key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - PASSED.get(
        name, set()
    )
    hints = type_hints(target)
    for key in map(str, node):
        if key.startswith("_"):
            continue
        if key not in known and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise unknown("key", f"{name}.{key}", [f"{name}.{parameter}" for parameter in known])
        if not OmegaConf.is_missing(node, key):
            _check_type(f"{name}.{key}", node[key], hints.get(key, Any))
    for key in sorted(known - {str(key) for key in node}):
        if parameters[key].default is inspect.Parameter.empty:
            raise ConfigError(f"{name}.{key} must be given, {node['_target_']} needs it: {name}.{key}=…")


def type_hints(target: Any) -> dict[str, Any]:
    """Annotations of what a call of `target` takes, resolved; empty where they cannot be."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}


PLAIN = (int, float, bool, str, type(None))


def shown(value: Any) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(shown, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _check_type(key: str, value: Any, kind: Any, builds: bool = True) -> None:
    """Compare a value with int, float, bool, str, None, lists of them, Literal and unions of all these.

    Other annotations are left alone, and where the value is built (`builds`) so are tables that build an object.
    """
    accepted = _members(kind)
    if accepted is None or (builds and isinstance(value, DictConfig) and "_target_" in value):
        return
    if not any(_fits(value, member) for member in accepted):
        got = "null" if value is None else _article(_word(type(value)))
        hint = ""
        if isinstance(value, float) and value.is_integer() and int in accepted:
            hint = f": {key}={int(value)}"
        raise ConfigError(f"{key}={shown(value)} is {got}; expected {' or '.join(map(_name, accepted))}{hint}")


def _members(kind: Any) -> list[Any] | None:
    """The kinds of a union, or the one kind; None if one of them says nothing that could be compared."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        parts = [_members(part) for part in typing.get_args(kind)]
        return None if any(part is None for part in parts) else [k for part in parts if part for k in part]
    if typing.get_origin(kind) is typing.Literal or kind in PLAIN:
        return [kind]
    if typing.get_origin(kind) in (list, collections.abc.Sequence):
        return [kind]
    return None


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind))
    if kind in PLAIN:
        return type(value) is kind or (kind is float and type(value) is int)
    members = _members(typing.get_args(kind)[0]) if typing.get_args(kind) else None
    return isinstance(value, ListConfig) and (
        members is None or all(any(_fits(item, member) for member in members) for item in value)
    )


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(shown, typing.get_args(kind)))
    if kind in PLAIN:
        return _word(kind)
    items = [_name(member) for member in _members(typing.get_args(kind)[0]) or []]
    example = {"int": ", such as [256,256]", "str": ", such as [a,b]"}.get(items[0] if items else "", "")
    return f"a list{' of ' + ' or '.join(items) if items else ''}{example}"


def _article(word: str) -> str:
    return f"an {word}" if word == "int" else f"a {word}"


def _word(kind: type) -> str:
    return {type(None): "null", ListConfig: "list", DictConfig: "table"}.get(kind, kind.__name__)


def resumed_changes(overrides: list[str]) -> list[str]:
    """Of the overrides of a resumed run those that change its config.

    Raises:
        ConfigError: naming each key that may not change.
    """
    typed = [override.lstrip("+") for override in overrides]
    changes = [o for o in typed if not o.startswith(("resume=", "run_dir=", "trust=", "replaced="))]
    refused = [c for c in changes if c.split("=")[0] not in MAY_CHANGE and not c.startswith("logger")]
    if refused:
        raise ConfigError(
            f"a resumed run keeps its config; these cannot change: {', '.join(refused)} "
            f"(these can: {', '.join(MAY_CHANGE)}, logger). Start a new run instead"
        )
    return changes


def resumed(stored: DictConfig, composed: DictConfig, changes: list[str]) -> DictConfig:
    """The stored config with what changes when a run is resumed (`resume=RUN total_steps=…`).

    Args:
        composed: what the overrides make of the default config; its logger is taken if they name one.
        changes: see `resumed_changes`.
    """
    plain = [change for change in changes if not change.startswith("logger")]
    merged = OmegaConf.merge(stored, OmegaConf.from_dotlist(plain))
    assert isinstance(merged, DictConfig)
    if plain != changes:
        merged.logger = composed.logger
    return merged
