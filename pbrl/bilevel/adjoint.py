"""Second terms without score functions: how a function of values changes with the reward, by one linear solve.

With K[(s, a), (s', a')] = P(s' | s, a) π(a' | s') of the soft-optimal policy, the envelope theorem gives
∂Q*/∂r = (I − gamma K)⁻¹, so a function L of Q* changes by Σ λ ∂r_phi with the adjoint λ = (I − gamma Kᵀ)⁻¹ ∂L/∂Q.
Features ψ in place of the state-action table make that a solve of their size (the transpose of LSTD's: Bradtke and
Barto, Machine Learning 1996). Where ψ is one-hot and every pair is covered it is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adjoint_weights(features: Tensor, following: Tensor, target: Tensor, discount: float, ridge: float = 0.0) -> Tensor:
    """Weights λ_b with Σ_b λ_b ∂r_b = ∂(target · w): w are the coefficients of the value of the rows' rewards r_b.

        λ_b = ψ_b · z / B,   z = A⁻ᵀ target,   A = mean_b ψ_b (ψ_b − discount ψ'_b)ᵀ + ridge · mean(ψ²) · I

    Args:
        features: ψ of B transitions' states and actions, float [B, D].
        following: ψ' of the successors under the policy, or their expectation; 0 where an episode ended. float [B, D].
        target: Σ_i g_i ψ(s_i, a_i) for a function with ∂L/∂Q(s_i, a_i) = g_i: float [D].
        discount: per step; gamma times a decay in [0, 1) forgets late effects.
        ridge: ≥ 0, in units of the features' mean square. A constant feature is free of it, like a regression's
            intercept: without ends of episodes the weights then sum to 0 where the target's do (a constant reward
            changes no difference of values), however large the ridge is.

    Returns:
        float64 [B].

    Raises:
        ValueError: for shapes that do not fit.
    """
    matrix, psi = _system(features, following, discount, ridge)
    if target.shape != psi.shape[1:]:
        raise ValueError(f"target {list(target.shape)}; expected {list(psi.shape[1:])}, as the features")
    return psi @ torch.linalg.solve(matrix.T, target.double()) / len(psi)


def linear_values(features: Tensor, following: Tensor, rewards: Tensor, discount: float, ridge: float = 0.0) -> Tensor:
    """Coefficients w of the discounted value Q = ψ · w of these rewards, float64 [D]: LSTD, one solve.

    Args:
        rewards: float [B]. Else as for `adjoint_weights`.
    """
    matrix, psi = _system(features, following, discount, ridge)
    return torch.linalg.solve(matrix, psi.T @ rewards.double() / len(psi))


def upper_traces(advantage: Tensor, mask: Tensor, gamma: float, discount: float) -> Tensor:
    """w_h = Σ_{k≤h} gamma^k discount^(h−k) A(s_k, a_k), float [B, H].

    For an upper value U = E Σ gamma^k u_k, additive in steps, with A its advantage under the soft-optimal policy,

        ∂U/∂phi = (1/alpha) E Σ_h w_h ∂r_phi(s_h, a_h).

    Args:
        advantage: of the recorded actions, float [B, H].
        mask: bool [B, H]; steps that happened. Others add nothing.
        gamma: discount of U.
        discount: of the lower level, for exactness; less (times a decay) has less variance and some bias.
    """
    if advantage.shape != mask.shape or advantage.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(
            f"advantage {list(advantage.shape)}, mask {list(mask.shape)} {mask.dtype}; expected bool [B, H]"
        )
    present = torch.where(mask, advantage, 0.0)
    trace, found = torch.zeros_like(present[:, 0]), []
    for h in range(present.shape[1]):
        trace = discount * trace + gamma**h * present[:, h]
        found.append(trace)
    return torch.where(mask, torch.stack(found, 1), 0.0)


def projected(weights: Tensor, directions: Tensor) -> Tensor:
    """The smallest weights that change the upper value alike along each direction of reward: float64 [B].

    A term Σ_b weights_b ∂r_b says what each reward change does; of that, only what happens along the K directions is
    kept, K numbers in place of B.

    Args:
        weights: float [B]. directions: change of the reward at each row, float [B, K]; may be dependent.
    """
    basis = directions.double()
    return basis @ torch.linalg.lstsq(basis, weights.double()[:, None], driver="gelsd").solution[:, 0]


def _system(features: Tensor, following: Tensor, discount: float, ridge: float) -> tuple[Tensor, Tensor]:
    """A and ψ in float64."""
    if features.ndim != 2 or features.shape != following.shape or len(features) == 0:
        raise ValueError(
            f"features {list(features.shape)} and following {list(following.shape)}; expected the same [B > 0, D]"
        )
    if ridge < 0:
        raise ValueError(f"ridge={ridge}; expected at least 0")
    psi = features.double()
    matrix = psi.T @ (psi - discount * following.double()) / len(psi)
    shrunk = torch.ones_like(psi[0])
    constant = torch.nonzero((psi == psi[0]).all(0) & (psi[0] != 0))[-1:]  # one intercept; dead units are zeros
    shrunk[constant] = 0.0
    return matrix + ridge * psi.square().mean() * torch.diag(shrunk), psi
