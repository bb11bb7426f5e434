"""The first-order penalty hypergradient (BRL eq. 10–14) and its inner loop.

BRL, "On the Sample Complexity Bounds of Bilevel Reinforcement Learning" (Gaur et al., NeurIPS 2025), minimises; here
G and V are maximised: its upper objective is −G, its J is −V. Its eq. (11) then reads as below. Algorithms 1 (line 15)
and 3 (line 9) print the bracket with the other sign, which finite differences refute (experiments.theory, claim iii).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pbrl.bilevel.params import Objective, combine, gradient, leaves, norm
from pbrl.types import Params


def penalty_gradient(
    upper: Objective, lower: Objective, phi: Params, theta: Params, theta_sigma: Params, sigma: float
) -> Params:
    """First-order estimate of d/dphi G(phi, theta*(phi)), with an error of O(sigma).

        ∂_phi G(phi, theta) − [∂_phi V(phi, theta) − ∂_phi V(phi, theta_sigma)] / sigma

    Args:
        upper, lower: G and V; (phi, theta) -> differentiable scalar, both maximised.
        phi: parameters of the reward.
        theta: argmax V(phi, ·).
        theta_sigma: argmax V(phi, ·) + sigma G(phi, ·).
        sigma: penalty strength, > 0. Small values divide the noise of the bracket.

    Returns:
        The hypergradient, shaped like phi.
    """
    if sigma <= 0:
        raise ValueError(f"sigma is {sigma}; expected a positive penalty strength")
    phi = leaves(phi, "phi")
    with torch.enable_grad():
        direct = gradient(upper(phi, theta), phi, name="upper(phi, theta)")
        at_optimum = gradient(lower(phi, theta), phi, name="lower(phi, theta)")
        at_penalised = gradient(lower(phi, theta_sigma), phi, name="lower(phi, theta_sigma)")
    return combine(direct, combine(at_optimum, at_penalised, -1.0), -1.0 / sigma)


def normalized_ascent(objective: Callable[[Params], Tensor], theta: Params, steps: int, scale: float) -> Params:
    """`steps` ascent steps of length scale / k:   theta ← theta + (scale / k) g / ‖g‖,   k = 1 … steps (BRL Lemma 1).

    Args:
        objective: theta -> scalar to be maximised; called afresh at each step, so it may draw new samples.
        theta: start; left untouched.
        scale: length of the first step, in units of theta. The steps sum to about scale · log(steps): the optimum must
            lie within that reach.

    Returns:
        The last iterate, detached. A zero gradient leaves theta where it is.

    Raises:
        FloatingPointError: if a gradient is not finite.
    """
    if steps < 0 or scale <= 0:
        raise ValueError(f"steps {steps}, scale {scale}; expected steps ≥ 0 and scale > 0")
    theta = leaves(theta, "theta")
    for k in range(1, steps + 1):
        with torch.enable_grad():
            g = gradient(objective(theta), theta)
        length = norm(g)
        if not np.isfinite(length):
            raise FloatingPointError(f"the gradient's norm is {length} at step {k} of {steps}; try a smaller scale")
        if length > 0:
            theta = leaves(combine(theta, g, scale / (k * length)))
    return {key: value.detach() for key, value in theta.items()}
