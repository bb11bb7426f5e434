"""Checks of what comes from outside: ranges of a config's values, an optimiser's state in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch


def check(where: str, **values: tuple[Any, bool, str]) -> None:
    """Refuse the first value that is not as it should be, by its key.

        check("feedback", budget=(budget, budget >= 1, "at least 1"))

    Args:
        where: the config's node, such as feedback.
        values: by name: the value, whether it is good, and what is expected.

    Raises:
        ValueError: naming the key, the value and what is expected.
    """
    for name, (value, good, expected) in values.items():
        if not good:
            raise ValueError(f"{where}.{name}={'null' if value is None else value}; expected {expected}")


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state whose moments are of their parameters' sizes: the fused kernels write without looking.

    Its settings stay those it was built with, which the config holds.

    Raises:
        ValueError: naming what does not fit.
    """
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, held in optimizer.state.items():
        for name, value in held.items():
            one = name == "step" and isinstance(value, torch.Tensor) and value.shape == ()
            if not one and not (
                isinstance(value, torch.Tensor)
                and (value.shape, value.stride(), value.dtype) == (parameter.shape, parameter.stride(), parameter.dtype)
            ):
                raise ValueError(f"an optimiser's {name} does not fit its parameter")
