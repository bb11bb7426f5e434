"""The second term of a hypergradient beside the first: as a weighted reward gradient, measured, gated and clipped.

Whatever the method, its second term has the form Σ_i w_i ∂_phi r_phi(s_i, a_i) with weights fixed for one update. It is
evaluated anew at the present phi at every optimiser step, so it follows the reward as it changes. Every member of an
ensemble is treated as though it were the reward alone; the weights come from the members' mean. An agent that is paid a
convex function of the reward follows that: r_phi here is then the function of it (caution and curiosity are left out).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pbrl.bilevel.params import cosine, norm
from pbrl.second_term.gate import Gate
from pbrl.types import Params

if TYPE_CHECKING:
    from pbrl.reward import RewardEnsemble


@dataclass(frozen=True)
class WeightedRows:
    """Two disjoint estimates of a term Σ_i w_i ∂_phi r_phi(s_i, a_i), r_phi as it is paid; the term is their mean."""

    obs: Tensor  # float32 [R, obs_dim]
    actions: Tensor  # float32 [R, act_dim]
    weights: Tensor  # float32 [2, R]

    @staticmethod
    def of_half(obs: Tensor, actions: Tensor, weights: Tensor, half: int) -> WeightedRows:
        """One half's estimate, with weights float [R]."""
        both = torch.zeros(2, len(weights), device=weights.device)
        both[half] = weights.float()
        return WeightedRows(obs, actions, both)

    @staticmethod
    def cat(parts: list[WeightedRows]) -> WeightedRows:
        """The sum of several terms."""
        return WeightedRows(
            torch.cat([part.obs for part in parts]),
            torch.cat([part.actions for part in parts]),
            torch.cat([part.weights for part in parts], dim=1),
        )

    def gradient(self, reward: RewardEnsemble, group: Group, weights: Tensor) -> Params:
        """Σ_i weights_i ∂ r(s_i, a_i) in the group's parameters, r the sum of its members' convex pay; weights [R]."""
        used = torch.nonzero(weights)[:, 0]
        if len(used) == 0:
            return {name: torch.zeros_like(value) for name, value in group.parameters.items()}
        with torch.enable_grad():
            rewards = [reward.member(m, self.obs[used], self.actions[used]) for m in group.members]
            value = (weights[used] * reward.pay.convex(torch.stack(rewards)).sum(0)).sum()
            found = torch.autograd.grad(value, list(group.parameters.values()), materialize_grads=True)
        return dict(zip(group.parameters, found, strict=True))

    def gradients(self, reward: RewardEnsemble, weights: Tensor) -> Params:
        """The same in all parameters that are fitted to answers."""
        return {
            name: value for group in groups(reward) for name, value in self.gradient(reward, group, weights).items()
        }


@dataclass(frozen=True)
class Group:
    """Members of an ensemble that are clipped together, and the parameters they have."""

    members: list[int]
    parameters: Params  # by their names in the ensemble


def groups(reward: RewardEnsemble) -> list[Group]:
    """Each member alone; all in one where they share parameters (REED's encoder), which then get their share too."""
    fitted = {id(value) for settings in reward.optimizer.param_groups for value in settings["params"]}
    named: Params = {name: value for name, value in reward.named_parameters() if id(value) in fitted}
    everyone = list(range(len(reward.members)))
    if any(not name.startswith("members.") for name in named):
        return [Group(everyone, named)]
    return [
        Group([m], {name: value for name, value in named.items() if name.startswith(f"members.{m}.")}) for m in everyone
    ]


@dataclass(frozen=True)
class Estimate:
    """An updater's second term for one session."""

    rows: WeightedRows | None  # None: there was too little data for two disjoint estimates
    converged: bool = True  # every linear solve reached its tolerance
    metrics: dict[str, float] = field(default_factory=dict)  # what the solver did, without a group


class SecondTerm:
    """Adds one session's second term to the gradients of a loss, as `train_epochs(extra_gradient=...)` wants it.

    Args:
        rows: the term, in the direction in which the upper objective grows.
        expected: its gradient at the phi of the first call, to be measured against Term 1.
        admitted: add it; otherwise only measure.
        clip: at most this multiple of the norm of Term 1's gradient, for each of `groups` at each step; inf: no limit.
    """

    def __init__(
        self, reward: RewardEnsemble, rows: WeightedRows, expected: Params, admitted: bool, clip: float
    ) -> None:
        self.reward, self.rows, self.expected, self.admitted, self.clip = reward, rows, expected, admitted, clip
        self.weights, self.groups = rows.weights.mean(0), groups(reward)
        self.steps, self.refused, self.shrunk = 0, 0, 0.0
        self.norm_first = self.cosine_first = float("nan")

    def __call__(self) -> None:
        if self.steps == 0:
            ascent = {name: -_grad(value) for group in self.groups for name, value in group.parameters.items()}
            self.norm_first, self.cosine_first = norm(ascent), cosine(ascent, self.expected)
        self.steps += 1
        if self.admitted:
            for group in self.groups:
                self._add(group)

    def _add(self, group: Group) -> None:
        parameters = group.parameters
        term = self.rows.gradient(self.reward, group, self.weights)
        length = norm(term)
        if not math.isfinite(length):
            self.refused += 1
            return
        limit = self.clip * norm({k: _grad(p) for k, p in parameters.items()}) if math.isfinite(self.clip) else length
        factor = 1.0 if length <= limit else limit / length
        self.shrunk += factor / len(self.groups)
        for name, parameter in parameters.items():
            parameter.grad = _grad(parameter) - factor * term[name]  # the optimiser descends


class Safeguard:
    """Decides whether a second term may be used, and keeps the account.

    A term is refused, and the update is Term 1 alone, where there is no estimate, where anything in it is not finite,
    where a linear solve did not converge (all counted as fallbacks), and while the gate is closed.

    Args:
        gate: None applies every term that can be computed, as the papers do.
        clip: see `SecondTerm`.
    """

    def __init__(self, gate: Gate | None, clip: float) -> None:
        self.gate, self.clip = gate, clip
        self.updates = self.opened = self.fallbacks = 0

    def admit(self, reward: RewardEnsemble, estimate: Estimate) -> tuple[SecondTerm | None, dict[str, float]]:
        """The term to train with (None: there is none), and what was found out about it, keys without a group."""
        self.updates += 1
        rows, usable, split, size, whole = estimate.rows, False, float("nan"), float("nan"), None
        if rows is not None:
            halves = [rows.gradients(reward, weights) for weights in rows.weights]
            whole = {name: (value + halves[1][name]) / 2 for name, value in halves[0].items()}
            size, split = norm(whole), cosine(*halves)
            usable = math.isfinite(size) and estimate.converged
        opened = self.gate is None or self.gate.observe(split if usable else float("nan"))
        self.opened += opened
        self.fallbacks += not usable
        metrics = {"term2_norm": size, "split_cosine": split, "gate_open": float(opened), "usable": float(usable)}
        metrics |= {} if self.gate is None else {"evidence": self.gate.evidence}
        metrics |= estimate.metrics | self.totals()
        if rows is None or whole is None:
            return None, metrics
        return SecondTerm(reward, rows, whole, opened and usable, self.clip), metrics

    def train(
        self,
        reward: RewardEnsemble,
        estimate: Estimate | None,
        direct: Callable[[], None] | None,
        fit: Callable[[Callable[[], None]], dict[str, float]],
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One reward update.

        Args:
            estimate: of Term 2; None: the method's Term 2 is switched off, and nothing is counted.
            direct: adds to the gradients whatever else belongs to the direct term (`upper.direct`).
            fit: trains on Term 1, calling its argument before each optimiser step.

        Returns:
            `fit`'s metrics, and those of Term 2, keys without a group.
        """
        term, found = (None, {}) if estimate is None else self.admit(reward, estimate)

        def extra_gradient() -> None:
            if direct is not None:
                direct()
            if term is not None:
                term()

        return fit(extra_gradient), found | self._settle(term)

    def _settle(self, term: SecondTerm | None) -> dict[str, float]:
        """After the training: what the term met and did. A step at which it was not finite makes it a fallback."""
        if term is None:
            return {}
        self.fallbacks += term.refused > 0
        return {
            "term1_norm": term.norm_first,
            "cosine": term.cosine_first,
            "applied": float(term.admitted),
            "scale": term.shrunk / term.steps if term.steps else 0.0,
            **self.totals(),
        }

    def totals(self) -> dict[str, float]:
        """Over the run so far: share of updates with an open gate, and how many fell back to Term 1."""
        return {"gate_open_share": self.opened / max(self.updates, 1), "fallbacks": float(self.fallbacks)}

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for an exact resume."""
        evidence = 1.0 if self.gate is None else self.gate.evidence
        return {"updates": self.updates, "opened": self.opened, "fallbacks": self.fallbacks, "evidence": evidence}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.updates, self.opened, self.fallbacks = state["updates"], state["opened"], state["fallbacks"]
        if self.gate is not None:
            self.gate.evidence = state.get("evidence", 1.0)  # absent where the gate still counted agreements


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
