"""Two scalars whose automatic derivatives are every derivative that PARL and BRL print, and two curvatures.

With lp_h = log π_theta(a_h | s_h) on *recorded* states and actions, S_h = Σ_{k≤h} lp_k and
box(x) = exp(x − stop_gradient(x)), which is 1 in value and a likelihood ratio in every derivative:

    V̂ = mean_j Σ_h gamma^h box(S_h) [ r_phi(s_h, a_h) − alpha lp_h ]
    Ĝ = mean_i box(S(τ0_i) + S(τ1_i)) (f_i − b) + b

∂_theta V̂ is PARL (15), ∂²_{phi,theta} V̂ PARL (17), ∂²_theta V̂ the true Hessian; ∂_phi Ĝ is Term 1 and ∂_theta Ĝ the
score-function part of Term 2 in PARL (28)–(31). PARL: Chakraborty et al., ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pbrl.bilevel.params import dot, gradient, linearize
from pbrl.types import Params

Curvature = Callable[[Params], Params]  # v -> (curvature of the lower objective, negative semi-definite) v


def value_surrogate(log_prob: Tensor, reward: Tensor, mask: Tensor, gamma: float, alpha: float) -> Tensor:
    """Entropy-regularised discounted value of recorded trajectories, right in value and in all derivatives.

        V̂ = mean_j Σ_h gamma^h box(S_h) [ r_h − alpha lp_h ]

    For a KL to a reference policy instead of the entropy, pass reward + alpha · log π_ref.

    Args:
        log_prob: log π_theta of the recorded actions, float [B, H], in nats, with a graph to theta.
        reward: r_phi of the recorded states and actions, float [B, H], with a graph to phi.
        mask: bool [B, H]; False where a trajectory had ended: those steps contribute nothing, whatever they hold.
        gamma: discount per step.
        alpha: weight of the entropy bonus, reward units per nat.

    Returns:
        Scalar [].

    Raises:
        ValueError: if the shapes differ or the mask is not bool.
    """
    _check(log_prob, reward, mask)
    log_prob = torch.where(mask, log_prob, 0.0)
    score = log_prob.cumsum(1)
    soft_reward = torch.where(mask, reward, 0.0) - alpha * log_prob
    return (_discounts(log_prob, gamma) * _box(score) * soft_reward).sum(1).mean()


def preference_surrogate(
    log_prob_first: Tensor, log_prob_second: Tensor, log_likelihood: Tensor, baseline: float | Tensor | None = None
) -> Tensor:
    """Expected log-likelihood of the teacher's labels on the policy's own pairs, right in all derivatives.

        Ĝ = mean_i box(S(τ0_i) + S(τ1_i)) (f_i − b) + b

    Padded steps and fixed factors (a segment's start, say) need log-probability 0 on entry.

    Args:
        log_prob_first, log_prob_second: log π_theta along the two segments, float [N, H], with graphs to theta.
        log_likelihood: f_i = y log P + (1 − y) log(1 − P), float [N], in nats, with a graph to phi.
        baseline: b, a constant; by default the batch mean of f, which costs a relative bias of 1/N in ∂_theta Ĝ
            (so it is zero for N = 1); 0.0 switches it off.

    Returns:
        Scalar [].
    """
    if log_prob_first.ndim != 2 or log_prob_second.ndim != 2 or log_likelihood.shape != log_prob_first.shape[:1]:
        raise ValueError(
            f"log_prob_first {list(log_prob_first.shape)}, log_prob_second {list(log_prob_second.shape)} and "
            f"log_likelihood {list(log_likelihood.shape)} do not fit; expected [N, H], [N, H], [N]"
        )
    if len(log_prob_second) != len(log_prob_first) or len(log_prob_first) == 0:
        raise ValueError(f"{len(log_prob_first)} first, {len(log_prob_second)} second segments; expected N > 0 pairs")
    b = log_likelihood.detach().mean() if baseline is None else baseline
    score = log_prob_first.sum(1) + log_prob_second.sum(1)
    return (_box(score) * (log_likelihood - b)).mean() + b


def hessian_product(value: Tensor, params: Params) -> Curvature:
    """v -> (∂² value / ∂params²) v by double backward, in the memory of a few gradients.

    Args:
        value: scalar [] with a graph to `params`.
        params: tensors that record gradients.
    """
    first = gradient(value, params, keep_graph=True)
    return lambda v: _detached(gradient(dot(first, v), params, keep_graph=True))


def paper_curvature(log_prob: Tensor, reward: Tensor, mask: Tensor, gamma: float, theta: Params) -> Curvature:
    """The "Hessian" printed in PARL (16), as a product: Σ_h gamma^h r_h Σ_{k≤h} ∇² lp_k, averaged over trajectories.

    It omits the outer product of the scores and is therefore **not** the Hessian of V: on 4 in 10 random
    MDPs the hypergradient built on it is worse than Term 1 alone (`python -m experiments.theory`, claim i). Kept as the
    paper's own variant.

    Args:
        log_prob: float [B, H] with a graph to `theta`.
        reward: float [B, H], taken as a constant; with an entropy bonus pass r_h − alpha lp_h.
        mask: bool [B, H].
        gamma: discount per step.
        theta: the tensors of `log_prob`'s graph.
    """
    _check(log_prob, reward, mask)
    score = torch.where(mask, log_prob, 0.0).cumsum(1)
    weighted = _discounts(log_prob, gamma) * torch.where(mask, reward.detach(), 0.0) * score
    return hessian_product(weighted.sum(1).mean(), theta)


def fisher_product(
    distribution_params: Callable[[Params], Tensor | tuple[Tensor, ...]],
    theta: Params,
    weights: Tensor,
    alpha: float,
) -> Curvature:
    """v -> −alpha Σ_m w_m F(s_m) v, with F the Fisher information of the policy in theta.

    At the soft-optimal policy this is exactly the Hessian of the maximum-entropy objective (V(π') = V(π*) − alpha
    E_{d'} KL(π' ‖ π*)); everywhere it is negative semi-definite. One product is a JVP into the distribution's
    parameters, a product with their own Fisher matrix, and a VJP back, on a graph that is built once.

    Args:
        distribution_params: theta -> (mean, log_std), float [M, A] each, of a diagonal Gaussian at M states; or
            theta -> logits, float [M, A], of a categorical policy.
        theta: where to evaluate.
        weights: float [M], of the states; `discounted_weights` gives those of the value surrogate.
        alpha: weight of the entropy bonus.

    Returns:
        The product, −alpha included: pass it as `curvature`.
    """
    outputs, forward, transposed = linearize(distribution_params, theta)
    weights = (-alpha * weights.detach()).unsqueeze(-1).to(outputs[0].dtype)
    return lambda v: transposed(_distribution_fisher(outputs, forward(v), weights))


def discounted_weights(mask: Tensor, gamma: float) -> Tensor:
    """gamma^h / B at the valid steps of B trajectories, 0 elsewhere: float64 [B, H] for a mask of bool [B, H]."""
    return _discounts(mask.double(), gamma) * mask / len(mask)


def _distribution_fisher(
    outputs: tuple[Tensor, ...], tangent: tuple[Tensor, ...], weights: Tensor
) -> tuple[Tensor, ...]:
    """weights · (Fisher matrix of the distribution in its own parameters) · tangent."""
    if len(outputs) == 1:  # logits: diag(p) − p pᵀ
        p = outputs[0].softmax(-1)
        return (weights * p * (tangent[0] - (p * tangent[0]).sum(-1, keepdim=True)),)
    log_std = outputs[1]  # Gaussian: 1/σ² for the mean, 2 for log σ
    return weights * tangent[0] * torch.exp(-2 * log_std), weights * 2 * tangent[1]


def _box(x: Tensor) -> Tensor:
    return torch.exp(x - x.detach())


def _discounts(like: Tensor, gamma: float) -> Tensor:
    """gamma^h, float [H]."""
    return gamma ** torch.arange(like.shape[1], dtype=like.dtype, device=like.device)


def _detached(params: Params) -> Params:
    return {key: value.detach() for key, value in params.items()}


def _check(log_prob: Tensor, reward: Tensor, mask: Tensor) -> None:
    if log_prob.ndim != 2 or log_prob.shape != reward.shape or log_prob.shape != mask.shape:
        raise ValueError(
            f"log_prob {list(log_prob.shape)}, reward {list(reward.shape)} and mask {list(mask.shape)} differ; "
            "expected [B, H] for all three"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; expected torch.bool, True at steps that happened")
