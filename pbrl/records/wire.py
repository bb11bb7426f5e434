"""A query as plain arrays, for a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from pbrl.types import Query, Segments, tensor_fields


def pack_query(query: Query | None) -> dict[str, np.ndarray]:
    """The query's tensors by name; nothing for None."""
    if query is None:
        return {}
    packed = {name: tensor.numpy() for name, tensor in tensor_fields(query).items()}
    packed["mean_task_reward"] = np.float64(query.mean_task_reward)  # type: ignore[assignment]
    sides = {"first": query.first, "second": query.second}
    if query.context is not None:
        sides |= {"wide_first": query.context[0], "wide_second": query.context[1]}
    for side, segments in sides.items():
        packed |= {f"{side}/{name}": tensor.numpy() for name, tensor in tensor_fields(segments).items()}
    return packed


def unpack_query(arrays: Mapping[str, np.ndarray]) -> Query | None:
    """What `pack_query` packed."""
    if not arrays:
        return None

    def segments(side: str) -> Segments:
        names = [name.removeprefix(side + "/") for name in arrays if name.startswith(side + "/")]
        return Segments(**{name: torch.from_numpy(arrays[f"{side}/{name}"]) for name in names})

    return Query(
        first=segments("first"),
        second=segments("second"),
        task_rewards=torch.from_numpy(arrays["task_rewards"]),
        mean_task_reward=float(arrays["mean_task_reward"]),
        states=torch.from_numpy(arrays["states"]) if "states" in arrays else None,
        context=(segments("wide_first"), segments("wide_second")) if "wide_first/obs" in arrays else None,
        fresh=torch.from_numpy(arrays["fresh"]) if "fresh" in arrays else None,
    )
