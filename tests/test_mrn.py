"""MRN: its closed form is the derivative of the two steps, taken between sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pbrl.bilevel.params import gradient, leaves
from pbrl.pay import Pay
from pbrl.reward import RewardEnsemble
from pbrl.types import Params
from pbrl.updaters.mrn import critic_step, outer_loss, reward_weights
from tests.conftest import PaidMean, finish, rows, tiny_loop


class Critics(nn.Module):
    """Two small smooth critics over 3 numbers, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x) for net in self.nets], dim=1).T


@pytest.mark.parametrize("convexity", [0.0, 2.0])
def test_mrns_closed_form_equals_finite_differences_of_the_two_steps(convexity: float) -> None:
    pay = Pay(convexity=convexity).convex
    torch.manual_seed(0)
    critics, reward = Critics(), nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, following = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    first, second = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    theta: Params = {name: value.detach() for name, value in critics.named_parameters()}
    step, weight = 0.3, 0.1

    def values(params: Params) -> Tensor:
        return functional_call(critics, params, (x,))

    def logits(params: Params) -> Tensor:
        return functional_call(critics, params, (first,)) - functional_call(critics, params, (second,))

    def outer() -> float:
        """U(psi), computed the long way: the critics' step by autograd, then both cross-entropies."""
        target = (pay(reward(x).squeeze(1)) + 0.99 * following).detach()
        params = {name: value.clone().requires_grad_() for name, value in theta.items()}
        lower = sum(F.mse_loss(q, target) for q in values(params))
        moves = torch.autograd.grad(lower, list(params.values()))  # type: ignore[arg-type]
        moved = {name: p.detach() - step * g for (name, p), g in zip(params.items(), moves, strict=True)}
        return float(weight * sum(F.binary_cross_entropy_with_logits(z, labels) for z in logits(moved)))

    target = pay(reward(x).squeeze(1)).detach() + 0.99 * following
    moved = leaves(critic_step(values, theta, target, step))
    loss = weight * outer_loss(logits(moved), labels)
    weights = reward_weights(values, theta, gradient(loss, moved), step)
    (weights * pay(reward(x).squeeze(1))).sum().backward()
    assert float(loss.detach()) == pytest.approx(outer(), rel=1e-12)
    largest = max(float(p.grad.abs().max()) for p in reward.parameters() if p.grad is not None)
    assert largest > 1e-4
    for parameter in reward.parameters():
        assert parameter.grad is not None
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(len(flat)):
            kept, ends = float(flat[i]), []
            for shift in (1e-5, -1e-5):
                flat[i] = kept + shift
                ends.append(outer())
            flat[i] = kept
            assert float(grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-6 * largest, rel=1e-5)


@pytest.mark.slow
def test_mrns_step_is_that_of_a_convex_pay(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "updater=mrn")
    finish(loop)
    moved = []
    for make, convexity in ((RewardEnsemble, 2.0), (PaidMean, 0.0), (RewardEnsemble, 0.0)):
        reward = make(2, 2, members=3, hidden=(8,), convexity=convexity)
        loop.session.rng = np.random.default_rng(0)
        loop.parts.updater.between(reward, loop.parts.preferences, loop.session)  # type: ignore[attr-defined]
        moved.append(torch.cat([p.grad.flatten() for p in reward.parameters() if p.grad is not None]))
    assert moved[0].equal(moved[1]) and not moved[0].equal(moved[2])


@pytest.mark.slow
def test_a_meta_step_on_a_sessions_step_comes_after_it(tmp_path: Path) -> None:
    """As on door-open, where sessions are 5000 steps apart and meta-steps 10000. None after the last question."""
    loop = tiny_loop(tmp_path / "run", "updater=mrn", "updater.meta_every=200", "feedback.budget=25")
    finish(loop)
    written = [row for row in rows(tmp_path / "run") if "feedback/session" in row or "mrn/outer_loss" in row]
    steps = [(row["env_step"], "mrn/outer_loss" in row) for row in written]
    assert steps == [(200, False), (300, False), (400, False), (400, True), (500, False)]


def test_mrn_steps_between_sessions_while_questions_are_left(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "updater=mrn", "updater.meta_every=40")
    seen, between = [], loop.parts.updater.between  # type: ignore[attr-defined]

    def spied(reward: Any, *args: Any) -> dict[str, float]:
        before = [p.detach().clone() for p in reward.parameters()]
        metrics = between(reward, *args)
        moved = any(not torch.equal(a, b) for a, b in zip(before, reward.parameters(), strict=True))
        seen.append((loop.step, moved))
        return metrics

    loop.parts.updater.between = spied  # type: ignore[attr-defined]
    finish(loop)
    # sessions at 200, 300 and 400; the last one spends the budget
    assert seen == [(240, True), (280, True), (320, True), (360, True), (400, True)][: len(seen)]
    assert len(seen) >= 4
    replay = loop.agent.replay_buffer
    paid = loop._pay(replay.observations[:200, 0].copy(), replay.actions[:200, 0].copy())
    np.testing.assert_allclose(replay.rewards[:200, 0], paid, rtol=1e-5, atol=1e-6)
