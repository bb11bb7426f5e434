"""What the shipped options describe, built outside a run: for tests, experiments and notebooks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pbrl.launch.configuration import register_resolvers


def make(group: str, option: str, task: str = "pointmass", **changes: Any) -> Any:
    """The object that a shipped option describes, in a run on this task (an option of `env`), some values changed.

    Nested values are given as tables: `make("updater", "aparl", fit={"epochs": 3}, implicit={"estimator": "off"})`;
    arguments that are known only at run time (`configuration.PASSED`) alike.

    Raises:
        what the object's constructor raises.
    """
    try:
        return instantiate(OmegaConf.create(described(group, option, task)), _convert_="all", **changes)
    except InstantiationException as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


@functools.cache
def described(group: str, option: str, task: str) -> Any:
    """The node of a shipped option in a run on this task: plain tables, lists and values."""
    register_resolvers()
    begun = GlobalHydra.instance().is_initialized()  # within `python -m pbrl.train`
    with contextlib.nullcontext() if begun else initialize_config_module("pbrl.conf", version_base="1.3"):
        cfg = compose("train", overrides=[f"env={task}", f"{group}={option}"])
    return OmegaConf.to_container(cfg[group], resolve=True)


def changed(env: Mapping[str, Any], task: str) -> bool:
    """Whether a run's environment is another than the shipped one, whose oracle then says nothing about it."""
    shipped = described("env", task, task)
    return any(key in env and env[key] != shipped[key] for key in shipped if key != "camera")  # old runs have fewer
