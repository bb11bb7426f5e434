"""Newton's method for the small lower levels whose optimum has no closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pbrl.bilevel.params import flatten
from pbrl.types import Params


def maximise(objective: Callable[[Params], Tensor], start: Params, tol: float = 1e-10) -> Params:
    """A maximum of `objective` near `start`, to a gradient of norm `tol`; float64.

    Steps are taken with the absolute eigenvalues of the Hessian (flat directions left out), so they always climb, and
    halved until they do.
    """

    def value(x: Tensor) -> Tensor:
        return objective(_named(x, start))

    x = torch.from_numpy(flatten(start))
    slope = float("inf")
    for _ in range(100):
        free = x.clone().requires_grad_()
        now = value(free)
        (g,) = torch.autograd.grad(now, [free])
        slope = float(g.norm())
        if slope < tol:
            return _named(x, start)
        eigenvalues, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(value, x))
        kept = eigenvalues.abs() > 1e-9 * eigenvalues.abs().max()
        step = vectors[:, kept] @ ((vectors[:, kept].T @ g) / eigenvalues[kept].abs())
        length = 1.0
        # the allowance is for rounding near the maximum
        while length > 1e-9 and not value(x + length * step) >= now.detach() - 1e-14 * (1 + now.detach().abs()):
            length /= 2
        x = x + length * step
    raise RuntimeError(f"Newton's method ended with a gradient of norm {slope:.1e}; expected below {tol:.0e}")


def _named(x: Tensor, like: Params) -> Params:
    parts = x.split([value.numel() for value in like.values()])
    return {key: part.view_as(value) for (key, value), part in zip(like.items(), parts, strict=True)}
