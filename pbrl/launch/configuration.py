"""What may stand in a config, and what it must not ask for: checked before anything starts.

Hydra refuses misspelt keys, but accepts anything behind a `+`; here every node with a `_target_` is held against the
signature of what it names, and every other key against the default config.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it prints what we raise

GROUPS = ("env", "agent", "reward", "query", "teacher", "updater", "logger")
CONF = Path(__file__).parent.parent / "conf"
# arguments that are known only at run time and passed in code
PASSED = {
    "agent": {"env", "seed", "device"},
    "reward": {"obs_dim", "act_dim", "seed"},
    "logger": {"run_dir", "run_config", "choices"},
}
TYPES = {
    "total_steps": int,
    "seed": int,
    "run_dir": str | None,
    "resume": str | None,
    "device": str,
    "threads": int | None,
    "segment_length": int,
    "checkpoint_every": int,
    "log_every": int,
    "oracle": str | None,
    "import_preferences": str | None,
}
MAY_CHANGE = ("total_steps", "checkpoint_every", "threads", "device", "eval.episodes")  # when a run is resumed


class ConfigError(ValueError):
    """The config asks for something that does not exist or cannot work; the message is one line."""


def suite(target: str) -> str:
    """Environment family of an `env._target_`: metaworld, dm_control or other."""
    module = target.split(".")
    return next((name for name in ("metaworld", "dm_control") if name in module), "other")


def register_resolvers() -> None:
    """`${by_suite:{metaworld:1,other:2}}`, `${by_task:{walker-walk:1},default}`, `${at_least:3,2}` for YAML files."""

    def by_suite(values: Mapping[str, Any], *, _root_: DictConfig) -> Any:
        name = suite(_root_.env._target_)
        return values[name] if name in values else values["other"]

    def by_task(values: Mapping[str, Any], default: Any, *, _root_: DictConfig) -> Any:
        env = _root_.env
        names = [str(env.get("task")), f"{env.get('domain')}-{env.get('task')}"]
        return next((values[name] for name in names if name in values), default)

    def at_least(value: Any, bound: float) -> bool:
        return isinstance(value, int | float) and value >= bound  # what is no number is refused later, by name

    OmegaConf.register_new_resolver("at_least", at_least, replace=True)
    OmegaConf.register_new_resolver("by_suite", by_suite, replace=True)
    OmegaConf.register_new_resolver("by_task", by_task, replace=True)


def options(group: str) -> list[str]:
    """The shipped options of a group."""
    folder = CONF / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return ConfigError(f"{what} {name} does not exist; {hint}there are: {', '.join(known)}")


def check(cfg: DictConfig) -> None:
    """Refuse keys that nothing reads, values that are missing, and values of the wrong type.

    Raises:
        ConfigError: naming the key, its value, what is expected, and for a misspelt key all that exist.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} must be given: {missing[0]}=…")
    default = OmegaConf.load(CONF / "train.yaml")
    assert isinstance(default, DictConfig)
    top = ({str(key) for key in default} - {"defaults", "hydra"}) | set(GROUPS)
    for key in map(str, cfg):
        if key not in top:
            raise _unknown("key", key, top)
    for key, kind in TYPES.items():
        _check_type(key, cfg.get(key), kind)
    for section in ("feedback", "pretraining", "eval"):
        if not isinstance(cfg[section], DictConfig):
            raise ConfigError(
                f"{section}={cfg[section]}; expected keys such as {section}.{next(iter(default[section]))}"
            )
        for key in map(str, cfg[section]):
            if key not in default[section]:
                raise _unknown("key", f"{section}.{key}", [f"{section}.{name}" for name in default[section]])
    for group in GROUPS:
        check_arguments(group, cfg[group])


def check_arguments(name: str, node: Any) -> None:
    """Hold a `_target_` node, and those inside it, against the signature of what it names."""
    if not isinstance(node, DictConfig):
        return
    if node.get("_target_") is not None:
        _check_target(name, node)
    for key, value in node.items():
        check_arguments(f"{name}.{key!s}", value)


def _check_target(name: str, node: DictConfig) -> None:
    try:
        target = get_object(node["_target_"])
    except Exception as error:  # Hydra wraps whatever the import raises
        reason = str(error.__cause__ or error).split("\n")[0]
        raise ConfigError(f"{name}._target_={node['_target_']} cannot be imported: {reason}") from error
    parameters = inspect.signature(target).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = set(parameters) - PASSED.get(name, set())
    hints = type_hints(target)
    for key, value in node.items():
        if str(key).startswith("_"):
            continue
        if key not in known and not open_ended:
            raise _unknown("key", f"{name}.{key!s}", [f"{name}.{parameter}" for parameter in known])
        _check_type(f"{name}.{key!s}", value, hints.get(str(key), Any))


def type_hints(target: Any) -> dict[str, Any]:
    """Annotations of what a call of `target` takes, resolved; empty where they cannot be."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


def _check_type(key: str, value: Any, kind: Any) -> None:
    """Compare a plain value with int, float, bool, str, None and unions of them; other annotations are left alone."""
    kinds = (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )
    if not all(k in (int, float, bool, str, type(None)) for k in kinds):
        return
    accepted = set(kinds) | ({int} if float in kinds else set())
    if type(value) not in accepted:
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise ConfigError(f"{key}={value} is a {type(value).__name__}; expected {names}")


def first_error(arguments: list[str]) -> str | None:
    """One line about what Hydra would refuse in these command-line overrides, or None.

    Hydra explains a wrong option in a page; this composes the config beforehand to say it in a line.
    """
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException

    try:
        with initialize_config_module("pbrl.conf", version_base="1.3"):
            compose("train", overrides=arguments)
    except MissingConfigException as error:
        if error.options is None or error.missing_cfg_file is None:
            return str(error).split("\n")[0]
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return str(_unknown(f"{group} option", name, error.options))
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line for line in str(error.__cause__ or error).split("\n") if line]
        if isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError):
            key = str(error.__cause__.full_key)
            with initialize_config_module("pbrl.conf", version_base="1.3"):
                section = OmegaConf.select(compose("train"), key.rpartition(".")[0]) if "." in key else compose("train")
            prefix = key.rpartition(".")[0]
            known = [f"{prefix}.{name!s}" if prefix else str(name) for name in section]
            return str(_unknown("key", key, known))
        return lines[0]
    finally:
        GlobalHydra.instance().clear()
    return None


def check_resumed(stored: DictConfig, overrides: list[str]) -> DictConfig:
    """The stored config with what may change when a run is resumed (`resume=RUN total_steps=…`).

    Raises:
        ConfigError: naming each key that may not change.
    """
    not_stored = ("resume=", "run_dir=", "trust=")
    changes = [override for override in overrides if not override.lstrip("+").startswith(not_stored)]
    refused = [c for c in changes if c.lstrip("+").split("=")[0] not in MAY_CHANGE and not c.startswith("logger")]
    if refused:
        raise ConfigError(
            f"a resumed run keeps its config; these cannot change: {', '.join(refused)} "
            f"(these can: {', '.join(MAY_CHANGE)}, logger). Start a new run instead"
        )
    plain = [change.lstrip("+") for change in changes if not change.startswith("logger=")]
    return OmegaConf.merge(stored, OmegaConf.from_dotlist(plain))  # type: ignore[return-value]
