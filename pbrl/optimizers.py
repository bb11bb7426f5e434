"""An optimiser's state, out of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch


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
