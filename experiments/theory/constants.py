"""Claim (viii): the constants in PARL's lemmas, computed on exact problems, and the bounds that are made of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from experiments.theory.mdp import EnumeratedMDP, random_mdp
from experiments.theory.report import Finding, Result, lines, slope
from pbrl.bilevel import combine, gradient, implicit_gradient, leaves, norm
from pbrl.types import Params

DISTANCES = (0.3, 0.1, 0.03, 0.01)  # of theta from theta*, in logits


def derivatives(mdp: EnumeratedMDP, phi: Params, theta: Params) -> tuple[Tensor, Tensor]:
    """∂²_theta V [D, D] and ∂²_{theta, phi} V [D, dim phi], float64."""
    shape = theta["logits"].shape

    def slope_of(x: Tensor, r: Tensor) -> Tensor:
        value = mdp.value({"r": r.reshape(phi["r"].shape)}, {"logits": x.reshape(shape)})
        return torch.autograd.grad(value, x, create_graph=True)[0]

    x, r = (value.detach().reshape(-1).clone().requires_grad_() for value in (theta["logits"], phi["r"]))
    rows = [torch.autograd.grad(g, (x, r), retain_graph=True) for g in slope_of(x, r)]
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def measured(seed: int) -> tuple[dict, list[dict]]:
    """The constants of one random MDP, and the hypergradient's error at policies away from theta*."""
    mdp, phi = random_mdp(seed)
    theta = mdp.soft_optimal(phi)
    hessian, mixed = derivatives(mdp, phi, theta)
    values, vectors = torch.linalg.eigh(-hessian)
    real = values > 1e-9 * values.max()  # adding a constant to a state's logits changes no policy
    mu, smooth = float(values[real].min()), float(values.max())
    response = vectors[:, real] @ ((vectors[:, real].T @ mixed) / values[real][:, None])
    bound = float(torch.linalg.matrix_norm(mixed, 2)) / mu
    exact, _ = implicit_gradient(mdp.preference, mdp.value, phi, theta, tol=1e-12)
    drawn = torch.from_numpy(np.random.default_rng(seed).standard_normal(len(vectors)))
    direction = vectors[:, real] @ (vectors[:, real].T @ drawn)  # not drawn in the basis: its signs differ by processor
    rows = []
    for distance in DISTANCES:
        away = {"logits": theta["logits"] + distance * (direction / direction.norm()).reshape(theta["logits"].shape)}
        found, _ = implicit_gradient(mdp.preference, mdp.value, phi, away, tol=1e-12, max_iter=500)
        error = norm(combine(found, exact, -1.0))
        rows.append({"measurement": "error", "seed": seed, "distance": distance, "error": error})
    contraction = _contraction(mdp, phi, theta, vectors[:, real][:, 0], smooth)
    constants = {
        "measurement": "constants",
        "seed": seed,
        "mu": mu,
        "smoothness": smooth,
        "response": float(torch.linalg.matrix_norm(response, 2)),
        "response_bound": bound,
        "contraction": contraction,
        "contraction_bound": 1 - mu / smooth,
    }
    return constants, rows


def _contraction(mdp: EnumeratedMDP, phi: Params, theta: Params, slowest: Tensor, smooth: float) -> float:
    """Factor by which a step of length 1 / smoothness shrinks the gradient, from 1e-3 away in the slowest direction."""
    at = {"logits": theta["logits"] + 1e-3 * slowest.reshape(theta["logits"].shape)}
    sizes = []
    for _ in range(2):
        free = leaves(at)
        g = gradient(mdp.value(phi, free), free)
        sizes.append(norm(g))
        at = combine({"logits": free["logits"].detach()}, g, 1 / smooth)
    return sizes[1] / sizes[0]


def claim_viii(quick: bool = False) -> Result:
    """PARL's lemmas: how theta* and the hypergradient move, with the constants that the bounds are made of."""
    found = [measured(seed) for seed in range(3 if quick else 20)]
    constants = [one for one, _ in found]
    errors = [row for _, rows in found for row in rows]
    medians = [float(np.median([r["error"] for r in errors if r["distance"] == d])) for d in DISTANCES]
    tight = [one["response"] / one["response_bound"] for one in constants]
    excess = max(abs(one["contraction"] - one["contraction_bound"]) for one in constants)
    fitted = slope(DISTANCES, medians)
    mus = [one["mu"] for one in constants]
    findings = [
        Finding(
            "smallest curvature mu of V at theta*: median [least]",
            f"{np.median(mus):.1e} [{min(mus):.1e}]",
            "> 0",
            min(mus) > 0,
        ),
        Finding(
            "‖dtheta*/dphi‖ over its bound ‖∂²_{theta phi} V‖ / mu: median [largest]",
            f"{np.median(tight):.2f} [{max(tight):.2f}]",
            "≤ 1",
            max(tight) <= 1 + 1e-9,
        ),
        Finding(
            "slope of the hypergradient's error in ‖theta − theta*‖",
            f"{fitted:.2f}",
            "1 ± 0.2",
            abs(fitted - 1) < 0.2,
        ),
        Finding(
            "contraction of a lower step 1/L near theta* less 1 − mu/L, largest",
            f"{excess:.1e}",
            "0 ± 0.01",
            excess < 0.01,
        ),
    ]
    words = (
        "PARL's lemmas bound how far theta* moves with phi, and how wrong the hypergradient is at a policy that is not "
        "yet theta*, by the curvature mu. Both bounds hold, the first with a factor of about ten to spare. The "
        "lower level contracts at the rate 1 − mu/L that the theorem's K presumes; with mu this small beside L, K "
        "must be large. Directions in which no policy changes (a state's logits plus a constant) are left out."
    )
    curves = {"hypergradient's error (median)": (DISTANCES, medians)}
    return Result(
        "viii",
        "constants of PARL's lemmas",
        findings,
        constants + errors,
        words,
        lambda axes: lines(axes, curves, "‖theta − theta*‖", "error"),
    )
