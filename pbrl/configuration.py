"""What may stand in a config, and what it must not ask for: checked before anything starts.

Hydra refuses misspelt keys, but accepts anything behind a `+`; here every node with a `_target_` is held against the
signature of what it names, and every other key against the default config.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

GROUPS = ("env", "agent", "reward", "query", "teacher", "updater", "logger")
CONF = Path(__file__).parent / "conf"
# arguments that are known only at run time and passed in code
PASSED = {
    "agent": {"env", "seed", "device"},
    "reward": {"obs_dim", "act_dim", "seed"},
    "logger": {"run_dir", "config", "choices"},
}
MAY_CHANGE = ("total_steps", "checkpoint_every", "threads", "device", "eval.episodes")  # when a run is resumed


class ConfigError(ValueError):
    """The config asks for something that does not exist or cannot work; the message is one line."""


def suite(target: str) -> str:
    """Environment family of an `env._target_`: metaworld, dm_control or other."""
    module = target.split(".")
    return next((name for name in ("metaworld", "dm_control") if name in module), "other")


def register_resolvers() -> None:
    """`${by_suite:{metaworld:1,other:2}}` and `${by_task:{walker-walk:1},default}` for YAML files."""

    def by_suite(values: Mapping[str, Any], *, _root_: DictConfig) -> Any:
        name = suite(_root_.env._target_)
        return values[name] if name in values else values["other"]

    def by_task(values: Mapping[str, Any], default: Any, *, _root_: DictConfig) -> Any:
        env = _root_.env
        names = [str(env.get("task")), f"{env.get('domain')}-{env.get('task')}"]
        return next((values[name] for name in names if name in values), default)

    OmegaConf.register_new_resolver("by_suite", by_suite, replace=True)
    OmegaConf.register_new_resolver("by_task", by_task, replace=True)


def options(group: str) -> list[str]:
    """The shipped options of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return ConfigError(f"{what} {name} does not exist; {hint}there are: {', '.join(known)}")


def check_keys(cfg: DictConfig) -> None:
    """Refuse keys that nothing reads.

    Raises:
        ConfigError: naming the key, the nearest one that exists, and all that exist.
    """
    default = OmegaConf.load(CONF / "train.yaml")
    assert isinstance(default, DictConfig)
    top = ({str(key) for key in default} - {"defaults", "hydra"}) | set(GROUPS)
    for key in map(str, cfg):
        if key not in top:
            raise _unknown("key", key, top)
    for section in ("feedback", "pretraining", "eval"):
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
        check_arguments(f"{name}.{key}", value)


def _check_target(name: str, node: DictConfig) -> None:
    try:
        target = get_object(node["_target_"])
    except Exception as error:  # Hydra wraps whatever the import raises
        raise ConfigError(f"{name}._target_={node['_target_']} cannot be imported: {error}".split("\n")[0]) from error
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = set(parameters) - PASSED.get(name, set())
    for key in map(str, node):
        if not key.startswith("_") and key not in known:
            raise _unknown("key", f"{name}.{key}", [f"{name}.{parameter}" for parameter in known])


def check_resumed(stored: DictConfig, overrides: list[str]) -> DictConfig:
    """The stored config with what may change when a run is resumed (`resume=RUN total_steps=…`).

    Raises:
        ConfigError: naming each key that may not change.
    """
    changes = [override for override in overrides if not override.lstrip("+").startswith(("resume=", "run_dir="))]
    refused = [c for c in changes if c.lstrip("+").split("=")[0] not in MAY_CHANGE and not c.startswith("logger")]
    if refused:
        raise ConfigError(
            f"a resumed run keeps its config; these cannot change: {', '.join(refused)} "
            f"(these can: {', '.join(MAY_CHANGE)}, logger). Start a new run instead"
        )
    plain = [change.lstrip("+") for change in changes if not change.startswith("logger=")]
    return OmegaConf.merge(stored, OmegaConf.from_dotlist(plain))  # type: ignore[return-value]
