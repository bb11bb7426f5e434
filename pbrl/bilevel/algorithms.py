"""The papers' algorithms as printed (errata corrected), on any problem that can be sampled.

PARL Algorithm 1 is `a_parl`; BRL Algorithms 1, 2 and 3 are `first_order_brl`, `fitted_q` and `first_order_bilevel`.
They are for tabular and small continuous problems, where a claim can be checked; the robot updaters use the same
pieces. Both levels are maximised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pbrl.bilevel.implicit import Diagnostics, implicit_gradient
from pbrl.bilevel.params import Objective, combine, gradient, leaves, norm
from pbrl.bilevel.penalty import normalized_ascent, penalty_gradient
from pbrl.bilevel.surrogates import Curvature
from pbrl.types import Params

# (phi, theta) -> (upper, lower): draws fresh data with the policy theta and returns the two surrogates on it
Sampler = Callable[[Params, Params], tuple[Objective, Objective]]
# A number, or one per outer iteration t = 0, 1, …
Steps = int | Callable[[int], int]
Rate = float | Callable[[int], float]
Batch = tuple[Tensor, Tensor, Tensor]  # inputs [B, ...], rewards [B], what `next_value` needs [B, ...]


@dataclass(frozen=True)
class Outcome:
    """Where a bilevel algorithm ended, and every phi it visited (the last included)."""

    phi: Params
    theta: Params
    path: list[Params]
    norms: list[float]  # of the hypergradient estimate, one per outer iteration
    diagnostics: list[Diagnostics]  # of the linear solves; empty for first-order methods


def a_parl(
    sample: Sampler,
    phi: Params,
    theta: Params,
    *,
    outer_steps: int,
    inner_steps: Steps,
    outer_lr: Rate,
    inner_lr: Rate,
    curvature: Callable[[Params, Params], Curvature] | None = None,
    solver: str = "minres",
    damping: float = 0.0,
    tol: float = 1e-8,
    max_iter: int = 100,
    project: Callable[[Params], Params] | None = None,
) -> Outcome:
    """PARL Algorithm 1: K lower ascent steps, then one implicit-gradient step on phi, on data drawn by the policy.

    Args:
        sample: called before each lower and each upper step; on exact problems it returns the same pair always. The two
            objectives it returns must not share rollouts (cross-fitting).
        phi, theta: start; left untouched.
        inner_steps: K, or t -> K_t; PARL's Theorem 1 takes K = t + 1.
        outer_lr, inner_lr: step lengths per unit of gradient, or t -> rate.
        curvature: (phi, theta) -> curvature product, in place of the Hessian of `lower`.
        solver, damping, tol, max_iter: see `implicit_gradient`.
        project: phi -> the nearest admissible phi.
    """
    phi, theta, path = _copy(phi), _copy(theta), [_copy(phi)]
    norms: list[float] = []
    diagnostics: list[Diagnostics] = []
    for t in range(outer_steps):
        for _ in range(_at(inner_steps, t)):
            _, lower = sample(phi, theta)
            theta = _ascend(lower, phi, theta, _at(inner_lr, t))
        upper, lower = sample(phi, theta)
        g, solved = implicit_gradient(
            upper,
            lower,
            phi,
            theta,
            curvature=None if curvature is None else curvature(phi, theta),
            solver=solver,
            damping=damping,
            tol=tol,
            max_iter=max_iter,
        )
        phi = _move(phi, g, _at(outer_lr, t), project)
        path.append(phi)
        norms.append(norm(g))
        diagnostics.append(solved)
    return Outcome(phi, theta, path, norms, diagnostics)


def first_order_brl(
    sample: Sampler,
    phi: Params,
    theta: Params,
    *,
    sigma: Rate,
    outer_steps: int,
    inner_steps: Steps,
    outer_lr: Rate,
    inner_scale: float,
    project: Callable[[Params], Params] | None = None,
) -> Outcome:
    """BRL Algorithm 1: two policies, normalised diminishing steps, one penalty step on phi.

    Both policies start each outer iteration from the present theta; theta climbs V, theta_sigma climbs V + sigma G. The
    errata are corrected: gradients are taken where the iterate is, and the bracket has eq. (11)'s sign.

    Args:
        sample: (phi, theta) -> (upper, lower) on data drawn with that theta; its `lower` may hold a fitted Q
            (`fitted_q`), as in the paper.
        phi, theta: start; left untouched.
        sigma: penalty strength, or t -> sigma_t.
        inner_steps: K, or t -> K_t, for each of the two policies.
        outer_lr: step length per unit of gradient, or t -> rate.
        inner_scale: length of the first inner step (`normalized_ascent`).
        project: phi -> the nearest admissible phi.
    """
    phi, theta, path, norms = _copy(phi), _copy(theta), [_copy(phi)], []
    for t in range(outer_steps):
        strength, steps, here, start = _at(sigma, t), _at(inner_steps, t), phi, theta

        def value(policy: Params, here: Params = here) -> Tensor:
            return sample(here, policy)[1](here, policy)

        def penalised(policy: Params, here: Params = here, strength: float = strength) -> Tensor:
            upper, lower = sample(here, policy)
            return lower(here, policy) + strength * upper(here, policy)

        theta = normalized_ascent(value, start, steps, inner_scale)
        theta_sigma = normalized_ascent(penalised, start, steps, inner_scale)
        upper, lower = sample(phi, theta)
        _, lower_sigma = sample(phi, theta_sigma)
        g = penalty_gradient(upper, _either(theta_sigma, lower_sigma, lower), phi, theta, theta_sigma, strength)
        phi = _move(phi, g, _at(outer_lr, t), project)
        path.append(phi)
        norms.append(norm(g))
    return Outcome(phi, theta, path, norms, [])


def first_order_bilevel(
    upper: Objective,
    lower: Objective,
    phi: Params,
    theta: Params,
    *,
    sigma: Rate,
    outer_steps: int,
    inner_steps: Steps,
    outer_lr: Rate,
    inner_scale: float,
    project: Callable[[Params], Params] | None = None,
) -> Outcome:
    """BRL Algorithm 3: the same for a plain bilevel problem  max_phi G(phi, theta*(phi)),  theta* = argmax V(phi, ·).

    Args:
        upper, lower: G and V; called afresh for each gradient, which may be stochastic but must be unbiased.

    The other arguments are those of `first_order_brl`.
    """
    return first_order_brl(
        lambda phi, theta: (upper, lower),
        phi,
        theta,
        sigma=sigma,
        outer_steps=outer_steps,
        inner_steps=inner_steps,
        outer_lr=outer_lr,
        inner_scale=inner_scale,
        project=project,
    )


def fitted_q(
    q: Callable[[Params, Tensor], Tensor],
    params: Params,
    sample: Callable[[], Batch],
    next_value: Callable[[Params, Tensor], Tensor],
    *,
    gamma: float,
    rounds: int,
    steps: int,
    lr: float,
    radius: float = float("inf"),
) -> Params:
    """BRL Algorithm 2: fitted Q with a frozen target, the average of the inner iterates, and a projection.

    Each round freezes the target y = r + gamma · next_value(target), takes `steps` stochastic gradient steps on
    ½ mean (q − y)², each projected to the ball of `radius` around the *initial* parameters, and goes on from the
    average of those iterates.

    Args:
        q: (params, inputs) -> values, float [B].
        params: start and centre of the ball; left untouched.
        sample: -> (inputs, rewards [B], successors), a fresh batch of transitions of the policy.
        next_value: (target params, successors) -> value of the successor state, float [B]; 0 where it is terminal.
        gamma: discount per step.
        lr: step length per unit of gradient.
        radius: of the ball, in units of the parameters; inf for no projection.
    """
    if rounds < 1 or steps < 1 or radius <= 0:
        raise ValueError(f"rounds {rounds}, steps {steps}, radius {radius}; expected at least 1, at least 1, and > 0")
    centre = _copy(params)
    present = centre
    for _ in range(rounds):
        target, iterate = present, present
        total = {key: torch.zeros_like(value) for key, value in centre.items()}
        for _ in range(steps):
            inputs, rewards, successors = sample()
            with torch.no_grad():
                aim = rewards + gamma * next_value(target, successors)
            free = leaves(iterate)
            with torch.enable_grad():
                g = gradient(0.5 * (q(free, inputs) - aim).square().mean(), free)
            iterate = _to_ball(combine(iterate, g, -lr), centre, radius)
            total = combine(total, iterate)
        present = {key: value / steps for key, value in total.items()}
    return present


def _to_ball(params: Params, centre: Params, radius: float) -> Params:
    offset = combine(params, centre, -1.0)
    length = norm(offset)
    return params if length <= radius else combine(centre, offset, radius / length)


def _ascend(objective: Objective, phi: Params, theta: Params, lr: float) -> Params:
    free = leaves(theta, "theta")
    with torch.enable_grad():
        g = gradient(objective(phi, free), free, name="lower(phi, theta)")
    return combine(_copy(theta), g, lr)


def _move(phi: Params, g: Params, lr: float, project: Callable[[Params], Params] | None) -> Params:
    moved = combine(phi, g, lr)
    return moved if project is None else project(moved)


def _either(theta_sigma: Params, there: Objective, elsewhere: Objective) -> Objective:
    """The lower objective on the rollouts of the policy it is asked about."""
    return lambda phi, theta: (there if theta is theta_sigma else elsewhere)(phi, theta)


def _copy(params: Params) -> Params:
    return {key: value.detach().clone() for key, value in params.items()}


def _at(setting, t: int):
    return setting(t) if callable(setting) else setting
