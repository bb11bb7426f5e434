"""Bilevel reward learning as pure functions: how  G(phi, theta*(phi)),  theta* = argmax V(phi, ·),  changes with phi.

`phi` and `theta` are dicts of tensors, G (upper) and V (lower) differentiable callables of both; each is maximised. To
build an updater of your own, make the two objectives with `preference_surrogate` and `value_surrogate` on recorded
rollouts, then call `implicit_gradient` or `penalty_gradient`. Sources and errata: the module docstrings.
"""

from pbrl.bilevel.adjoint import adjoint_weights, linear_values, projected, upper_traces
from pbrl.bilevel.algorithms import Outcome, a_parl, first_order_bilevel, first_order_brl, fitted_q
from pbrl.bilevel.implicit import (
    Diagnostics,
    covariance_term,
    implicit_gradient,
    mean_eigenvalue,
    mixed_term,
    solve_curvature,
    traces,
    win_rate_term,
)
from pbrl.bilevel.params import Objective, combine, cosine, dot, gradient, leaves, norm
from pbrl.bilevel.penalty import normalized_ascent, penalty_gradient
from pbrl.bilevel.surrogates import (
    Curvature,
    discounted_weights,
    fisher_product,
    hessian_product,
    paper_curvature,
    preference_surrogate,
    value_surrogate,
)
from pbrl.types import Params

__all__ = [
    "Curvature",
    "Diagnostics",
    "Objective",
    "Outcome",
    "Params",
    "a_parl",
    "adjoint_weights",
    "combine",
    "cosine",
    "covariance_term",
    "discounted_weights",
    "dot",
    "first_order_bilevel",
    "first_order_brl",
    "fisher_product",
    "fitted_q",
    "gradient",
    "hessian_product",
    "implicit_gradient",
    "leaves",
    "linear_values",
    "mean_eigenvalue",
    "mixed_term",
    "norm",
    "normalized_ascent",
    "paper_curvature",
    "penalty_gradient",
    "preference_surrogate",
    "projected",
    "solve_curvature",
    "traces",
    "upper_traces",
    "value_surrogate",
    "win_rate_term",
]
