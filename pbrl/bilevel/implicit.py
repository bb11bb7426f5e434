"""The implicit hypergradient of A-PARL (PARL eq. 12–14, 28–31), and its cheap forms for robots.

    dG/dphi = ∂_phi G − ∂_phi ⟨∂_theta V, x⟩,     (∂²_theta V − damping · I) x = ∂_theta G

G and V are both maximised. Nothing of size dim(theta)² is ever formed. PARL: Chakraborty et al., ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg, minres
from torch import Tensor

from pbrl.bilevel.params import (
    Objective,
    check_dtypes,
    combine,
    cosine,
    dot,
    flatten,
    gradient,
    leaves,
    linearize,
    norm,
    unflatten,
)
from pbrl.bilevel.surrogates import Curvature
from pbrl.types import Params

SOLVERS = {"cg": cg, "minres": minres}


@dataclass(frozen=True)
class Diagnostics:
    """What a hypergradient's linear solve did."""

    iterations: int  # of the solver
    residual: float  # ‖A x − b‖ / ‖b‖, computed afresh from x; nan if anything was not finite
    converged: bool  # the residual is within tol, and everything is finite
    norm_direct: float = float("nan")  # ‖∂_phi G‖
    norm_implicit: float = float("nan")  # ‖∂_phi⟨∂_theta V, x⟩‖
    cosine: float = float("nan")  # between the direct term and the implicit term as added (with its minus)


def implicit_gradient(
    upper: Objective,
    lower: Objective,
    phi: Params,
    theta: Params,
    *,
    curvature: Curvature | None = None,
    solver: str = "minres",
    damping: float = 0.0,
    tol: float = 1e-8,
    max_iter: int = 100,
) -> tuple[Params, Diagnostics]:
    """Hypergradient d/dphi G(phi, theta*(phi)), theta* = argmax V(phi, ·), by the implicit function theorem.

    Args:
        upper, lower: G and V; (phi, theta) -> differentiable scalar, both maximised.
        phi, theta: parameters by name, float32 or float64, theta at its optimum; left untouched.
        curvature: v -> curvature · v in place of the Hessian-vector product of `lower` (`fisher_product`, say);
            negative semi-definite, with its sign.
        solver: "minres" (any symmetric system) or "cg" (needs ∂²_theta V − damping · I negative definite).
        damping: ≥ 0, in units of the curvature's eigenvalues.
        tol: the relative residual to reach; in effect never below what theta's dtype can hold (`attainable`).
        max_iter: of the solver.

    Returns:
        The hypergradient, shaped like phi, and the diagnostics. Where the implicit term is not finite it is left out
        and `converged` is False; an unconverged but finite solution is used, and reported as such.

    Raises:
        ValueError: for parameters, objectives, a solver or a damping that cannot be used.
    """
    phi, theta = leaves(phi, "phi"), leaves(theta, "theta")
    with torch.enable_grad():
        value = upper(phi, theta)
        right = gradient(value, {**_prefixed("phi", phi), **_prefixed("theta", theta)}, name="upper(phi, theta)")
        direct, g = _section("phi", right), _section("theta", right)
        ascent = gradient(lower(phi, theta), theta, keep_graph=True, name="lower(phi, theta)")
        x, solved = solve_curvature(
            curvature or (lambda v: gradient(dot(ascent, v), theta, keep_graph=True)),
            g,
            solver=solver,
            damping=damping,
            tol=tol,
            max_iter=max_iter,
        )
        implicit = gradient(-dot(ascent, x), phi)
    if not np.isfinite(norm(implicit)) or not np.isfinite(solved.residual):
        return direct, Diagnostics(solved.iterations, float("nan"), False, norm(direct))
    return combine(direct, implicit), Diagnostics(
        solved.iterations,
        solved.residual,
        solved.converged and bool(np.isfinite(norm(direct))),
        norm(direct),
        norm(implicit),
        cosine(direct, implicit),
    )


def solve_curvature(
    curvature: Curvature,
    g: Params,
    *,
    solver: str = "minres",
    damping: float = 0.0,
    tol: float = 1e-8,
    max_iter: int = 100,
) -> tuple[Params, Diagnostics]:
    """x with (curvature − damping · I) x = g, by scipy on float64 vectors; the products run in g's dtype.

    The negated system is handed over, which is positive definite where cg needs it. minres stops on a criterion of its
    own, so the residual is computed afresh and the solver restarted on what is left (iterative refinement) while that
    still helps. Arguments as for `implicit_gradient`.

    Returns:
        x shaped like g (zeros if anything was not finite), and the diagnostics of the solve.

    Raises:
        ValueError: for an argument that cannot be used; g must be float32 or float64.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; expected one of {sorted(SOLVERS)}")
    if damping < 0 or tol <= 0 or max_iter < 1:
        raise ValueError(f"damping {damping}, tol {tol}, max_iter {max_iter}; expected ≥ 0, > 0 and ≥ 1")
    check_dtypes(g, "g")
    b = -flatten(g)
    if not np.isfinite(b).all():
        return unflatten(np.zeros_like(b), g), Diagnostics(0, float("nan"), False)
    scale = float(np.linalg.norm(b))
    if scale == 0.0:
        return unflatten(b, g), Diagnostics(0, 0.0, True)

    def negated(v: np.ndarray) -> np.ndarray:
        product = damping * v - flatten(curvature(unflatten(v, g)))
        if not np.isfinite(product).all():
            raise FloatingPointError("the curvature product is not finite")
        return product

    tol = max(tol, max(attainable(value.dtype) for value in g.values()))
    try:
        x, residual, iterations = _refine(negated, b / scale, SOLVERS[solver], tol, max_iter)
    except FloatingPointError:
        return unflatten(np.zeros_like(b), g), Diagnostics(0, float("nan"), False)
    return unflatten(scale * x, g), Diagnostics(iterations, residual, residual <= tol)


def attainable(dtype: torch.dtype) -> float:
    """The relative residual below which a solve with products in this dtype cannot be expected to go: 100 epsilon."""
    return 100 * torch.finfo(dtype).eps


def traces(
    log_prob_fn: Callable[[Params], Tensor],
    theta: Params,
    x: Params,
    mask: Tensor,
    *,
    center: bool = True,
    trace_decay: float = 1.0,
) -> Tensor:
    """c_h = Σ_{k≤h} trace_decay^(h−k) ⟨∇_theta lp_k, x⟩ by one Jacobian-vector product: float [B, H], without a graph.

    Args:
        log_prob_fn: theta -> log π_theta of the recorded actions, float [B, H].
        theta, x: where to differentiate, and in which direction.
        mask: bool [B, H]; ended trajectories add nothing to their trace, and their c_h is to be used with the mask.
        center: take off the mean over the B trajectories at each h. E[c_h] = 0 (a martingale), so only variance goes;
            scaled by B / (B − 1) to stay unbiased. Needs B ≥ 2.
        trace_decay: 1 is exact; less forgets the scores of earlier steps (less variance, some bias).
    """
    slope = linearize(log_prob_fn, theta)[1](x)[0]
    slope = torch.where(mask, slope, 0.0)
    if trace_decay == 1.0:
        c = slope.cumsum(1)
    else:
        steps = [slope[:, 0]]
        for h in range(1, slope.shape[1]):
            steps.append(trace_decay * steps[-1] + slope[:, h])
        c = torch.stack(steps, 1)
    if not center:
        return c
    if len(c) < 2:
        raise ValueError(f"center=True with {len(c)} trajectory; expected at least 2 (or center=False)")
    return (c - c.mean(0)) * (len(c) / (len(c) - 1))


def mixed_term(
    log_prob_fn: Callable[[Params], Tensor],
    theta: Params,
    x: Params,
    reward: Tensor,
    mask: Tensor,
    gamma: float,
    *,
    center: bool = True,
    trace_decay: float = 1.0,
) -> Tensor:
    """A scalar whose phi-gradient is ∂_phi⟨∂_theta V̂, x⟩: the reward, weighted with the traces (PARL 17 times x).

        mean_j Σ_h gamma^h c_h r_phi(s_h, a_h)

    The hypergradient's second term is **minus** its gradient. With center=False and trace_decay=1 it equals the double
    backward through `value_surrogate`. `x` and these rollouts must come from disjoint data (cross-fitting): the same
    rollouts in both factors manufacture a reproducible false term.

    Args:
        reward: r_phi of the recorded steps, float [B, H], with a graph to phi.
        gamma: discount per step.
        log_prob_fn, theta, x, mask, center, trace_decay: see `traces`.
    """
    c = traces(log_prob_fn, theta, x, mask, center=center, trace_decay=trace_decay)
    discounts = gamma ** torch.arange(c.shape[1], dtype=c.dtype, device=c.device)
    return (discounts * c * torch.where(mask, reward, 0.0)).sum(1).mean()


def covariance_term(f_bar: Tensor, returns: Tensor, alpha: float) -> Tensor:
    """A scalar whose phi-gradient is the implicit term at a soft-optimal policy, without solve or score function.

        Term 2 = (2 / alpha) E_s0 Cov( f̄(τ), dR_phi(τ)/dphi | s0 )

    Exact where trajectories from s0 are distributed as exp(R_phi / alpha): soft-optimal policy, deterministic dynamics,
    R_phi the undiscounted sum. Added to Term 1 with a **plus**. The covariance is the unbiased one (n − 1).

    Args:
        f_bar: mean log-likelihood of a branch's labels over its opponents, float [starts, branches]; a constant.
        returns: R_phi of each branch, float [starts, branches], with a graph to phi.
        alpha: weight of the entropy bonus.
    """
    if f_bar.shape != returns.shape or f_bar.ndim != 2 or f_bar.shape[1] < 2:
        raise ValueError(
            f"f_bar {list(f_bar.shape)} and returns {list(returns.shape)}; expected the same [starts, branches ≥ 2]"
        )
    centred = f_bar.detach() - f_bar.detach().mean(1, keepdim=True)
    return (2 / alpha) * (centred * returns).sum(1).mean() / (f_bar.shape[1] - 1)


def win_rate_term(returns_first: Tensor, returns_second: Tensor, prefers_first: Tensor, alpha: float) -> Tensor:
    """A scalar whose phi-gradient is the whole hypergradient of the teacher's win rate over the present policy.

        dG_win/dphi = 1/(2 alpha) E[ (y − ½)(dR_phi(τ0)/dphi − dR_phi(τ1)/dphi) ]

    Exact under the assumptions of `covariance_term`, for pairs drawn by the present policy from one start state each.

    Args:
        returns_first, returns_second: R_phi of the two segments, float [N], with graphs to phi.
        prefers_first: labels in [0, 1], float [N]; 1 means the first is preferred.
        alpha: weight of the entropy bonus.
    """
    if not returns_first.shape == returns_second.shape == prefers_first.shape:
        raise ValueError(
            f"returns_first {list(returns_first.shape)}, returns_second {list(returns_second.shape)} and prefers_first "
            f"{list(prefers_first.shape)} differ; expected [N] for all three"
        )
    return ((prefers_first.detach() - 0.5) * (returns_first - returns_second)).mean() / (2 * alpha)


def mean_eigenvalue(curvature: Curvature, theta: Params, generator: torch.Generator, probes: int = 8) -> float:
    """Mean of −curvature's eigenvalues by Hutchinson's estimate: `probes` random sign vectors, one product each.

    The scale to choose a damping by: the Fisher matrix of a policy network has eigenvalues of 1e3 times the mean.
    """
    total = 0.0
    for _ in range(probes):
        v = {
            key: torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1 for key, value in theta.items()
        }
        total -= float(dot(v, curvature(v)))
    return total / (probes * sum(value.numel() for value in theta.values()))


def _refine(product, b: np.ndarray, solve, tol: float, max_iter: int) -> tuple[np.ndarray, float, int]:
    """x, relative residual and iterations; b has norm 1."""
    operator = LinearOperator((len(b), len(b)), matvec=product, dtype=np.float64)
    x, left, residual, iterations = np.zeros_like(b), b, 1.0, 0

    def count(_: np.ndarray) -> None:
        nonlocal iterations
        iterations += 1

    while residual > tol and iterations < max_iter:
        with np.errstate(divide="ignore", invalid="ignore"):  # cg, if indefinite: `product` then raises
            step, _ = solve(operator, left, rtol=0.1 * tol / residual, maxiter=max_iter - iterations, callback=count)
        remaining = b - product(x + step)
        if not np.linalg.norm(remaining) < 0.5 * residual:  # no progress: singular, indefinite under cg, or rounding
            if np.linalg.norm(remaining) < residual:
                x, residual = x + step, float(np.linalg.norm(remaining))
            break
        x, left, residual = x + step, remaining, float(np.linalg.norm(remaining))
    return x, residual, iterations


def _prefixed(prefix: str, params: Params) -> Params:
    return {f"{prefix}:{key}": value for key, value in params.items()}


def _section(prefix: str, params: Params) -> Params:
    return {key[len(prefix) + 1 :]: value for key, value in params.items() if key.startswith(prefix + ":")}
