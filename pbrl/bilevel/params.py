"""Arithmetic on named parameters: what `named_parameters` gives, treated as one vector."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pbrl.types import Params

Objective = Callable[[Params, Params], Tensor]  # (phi, theta) -> differentiable scalar, maximised


def leaves(params: Params, name: str = "params") -> Params:
    """Detached copies that record gradients, so that the caller's tensors and graphs stay untouched.

    Raises:
        ValueError: see `check_dtypes`.
    """
    check_dtypes(params, name)
    return {key: value.detach().clone().requires_grad_() for key, value in params.items()}


def check_dtypes(params: Params, name: str) -> None:
    """Refuse what second derivatives cannot be taken in.

    Half precision is refused: rounded to it, a product with the curvature and its residual agree with each other but
    not with the truth, and a hypergradient that is 18 % off calls itself converged.

    Raises:
        ValueError: if there is no tensor, or one is neither float32 nor float64.
    """
    if not params:
        raise ValueError(f"{name} is empty; expected a dict of tensors, e.g. dict(module.named_parameters())")
    for key, value in params.items():
        if value.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}[{key!r}] has dtype {value.dtype}; expected float32 or float64: pass value.float()"
            )


def gradient(value: Tensor, params: Params, *, keep_graph: bool = False, name: str = "the objective") -> Params:
    """Gradient of a scalar in `params` (leaves); zeros where it does not depend on them.

    Args:
        keep_graph: the result is differentiable itself, and the graph may be walked again.
        name: what the error calls the scalar.

    Raises:
        ValueError: if `value` is not a scalar tensor.
    """
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} returned {got}; expected a scalar tensor (shape []), e.g. a mean")
    if not value.requires_grad:
        return {key: torch.zeros_like(tensor) for key, tensor in params.items()}
    found = torch.autograd.grad(
        value, list(params.values()), create_graph=keep_graph, retain_graph=keep_graph, materialize_grads=True
    )
    return dict(zip(params, found, strict=True))


def linearize(
    function: Callable[[Params], Tensor | tuple[Tensor, ...]], params: Params
) -> tuple[tuple[Tensor, ...], Callable[[Params], tuple[Tensor, ...]], Callable[[tuple[Tensor, ...]], Params]]:
    """The function's outputs at `params`, its Jacobian as v -> J v, and the transpose as w -> Jᵀ w; all detached.

    The forward product is the derivative of Jᵀ u in u, so one graph serves any number of products and every operation
    with a double backward will do. (torch.func.jvp would evaluate the function anew each time, and its first call warns
    of its own use of the deprecated torch.jit.)
    """
    free = leaves(params)
    with torch.enable_grad():
        found = function(free)
        outputs = found if isinstance(found, tuple) else (found,)
        probes = tuple(torch.zeros_like(output, requires_grad=True) for output in outputs)
        pulled = torch.autograd.grad(outputs, list(free.values()), probes, create_graph=True, materialize_grads=True)

    def forward(v: Params) -> tuple[Tensor, ...]:
        used = [(p, v[key]) for key, p in zip(free, pulled, strict=True) if p.requires_grad]
        return torch.autograd.grad([p for p, _ in used], probes, [d for _, d in used], retain_graph=True)

    def transposed(w: tuple[Tensor, ...]) -> Params:
        rows = torch.autograd.grad(outputs, list(free.values()), w, retain_graph=True, materialize_grads=True)
        return dict(zip(free, rows, strict=True))

    return tuple(output.detach() for output in outputs), forward, transposed


def combine(a: Params, b: Params, factor: float = 1.0) -> Params:
    """a + factor * b, tensor by tensor."""
    return {key: value + factor * b[key] for key, value in a.items()}


def dot(a: Params, b: Params) -> Tensor:
    """Inner product over all tensors, scalar []; differentiable."""
    return torch.stack([(value * b[key]).sum() for key, value in a.items()]).sum()


def norm(a: Params) -> float:
    """Euclidean norm over all tensors, accumulated in float64."""
    return float(np.linalg.norm(flatten(a)))


def cosine(a: Params, b: Params) -> float:
    """Cosine between two parameter vectors; nan if either is zero."""
    flat_a, flat_b = flatten(a), flatten(b)
    product = float(np.linalg.norm(flat_a) * np.linalg.norm(flat_b))
    return float(flat_a @ flat_b) / product if product != 0.0 else float("nan")


def flatten(params: Params) -> np.ndarray:
    """All entries, in order, as float64 [D]."""
    return torch.cat([value.detach().reshape(-1).double() for value in params.values()]).cpu().numpy()


def unflatten(vector: np.ndarray, like: Params) -> Params:
    """The inverse of `flatten`, with the shapes, dtypes and devices of `like`."""
    parts = torch.from_numpy(np.asarray(vector, dtype=np.float64)).split([value.numel() for value in like.values()])
    return {
        key: part.reshape(value.shape).to(dtype=value.dtype, device=value.device, copy=True)
        for (key, value), part in zip(like.items(), parts, strict=True)
    }
