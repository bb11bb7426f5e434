"""The papers' algorithms on problems small enough to check every step."""

import pytest
import torch

from experiments.theory.algorithms import NoisyQuadratic, algorithm_3
from experiments.theory.mdp import random_mdp, total_gradient
from pbrl.bilevel import a_parl, combine, first_order_bilevel, first_order_brl, fitted_q, norm


def quadratic():
    """theta* = phi, G = −½ (theta − 3)²: best phi 3, hypergradient 3 − phi."""
    return (
        lambda phi, theta: -0.5 * (theta["t"] - 3).square().sum(),
        lambda phi, theta: -0.5 * (theta["t"] - phi["w"]).square().sum(),
        {"w": torch.zeros(1, dtype=torch.float64)},
        {"t": torch.zeros(1, dtype=torch.float64)},
    )


def test_a_parl_takes_k_lower_steps_then_one_step_along_the_implicit_gradient():
    upper, lower, phi, theta = quadratic()
    asked = []

    def sample(phi, theta):
        asked.append((float(phi["w"]), float(theta["t"])))
        return upper, lower

    run = a_parl(sample, phi, theta, outer_steps=2, inner_steps=lambda t: t + 1, outer_lr=0.5, inner_lr=1.0)
    # lr 1 on this V jumps to phi at once; hypergradient 3 − theta: phi = 0 → 1.5 → 2.25
    assert asked == [(0, 0), (0, 0), (1.5, 0), (1.5, 1.5), (1.5, 1.5)]
    assert [float(visited["w"]) for visited in run.path] == pytest.approx([0, 1.5, 2.25])
    assert run.norms == pytest.approx([3.0, 1.5])
    assert all(report.converged for report in run.diagnostics)
    assert float(phi["w"]) == 0.0 and float(theta["t"]) == 0.0


def test_phi_is_projected_after_each_step():
    upper, lower, phi, theta = quadratic()

    def project(phi):
        return {"w": phi["w"].clamp(max=1.0)}

    for run in (
        a_parl(
            lambda *_: (upper, lower), phi, theta, outer_steps=3, inner_steps=1, outer_lr=1, inner_lr=1, project=project
        ),
        first_order_bilevel(
            upper,
            lower,
            phi,
            theta,
            sigma=0.1,
            outer_steps=3,
            inner_steps=30,
            outer_lr=1,
            inner_scale=1,
            project=project,
        ),
    ):
        assert [float(visited["w"]) for visited in run.path[1:]] == [1.0, 1.0, 1.0]


def test_first_order_brl_samples_each_policy_with_its_own_rollouts():
    """The bracket's two values must come from the data of the two policies; here each sampler call is tagged."""
    upper, _, phi, theta = quadratic()

    def sample(phi, theta):
        drawn_with = theta["t"].detach().clone()

        def lower(phi, theta):
            assert torch.equal(theta["t"].detach(), drawn_with)
            return -0.5 * (theta["t"] - phi["w"]).square().sum()

        return upper, lower

    run = first_order_brl(sample, phi, theta, sigma=0.5, outer_steps=1, inner_steps=200, outer_lr=1.0, inner_scale=1.0)
    # theta_sigma = (phi + sigma 3) / (1 + sigma) = 1; (theta − phi) − (theta_sigma − phi) = −1; / −sigma = 2
    # each inner loop ends within one step, 1/200, of its optimum; divided by sigma
    assert float(run.phi["w"]) == pytest.approx(2.0, abs=2 * (1 / 200) / 0.5)


def test_both_policies_of_algorithm_1_start_from_the_present_one():
    upper, lower, phi, theta = quadratic()
    asked = []

    def sample(phi, theta):
        asked.append(float(theta["t"].detach()))
        return upper, lower

    first_order_brl(
        sample, {"w": phi["w"] + 1}, theta, sigma=1.0, outer_steps=1, inner_steps=2, outer_lr=1.0, inner_scale=0.5
    )
    # theta: 0, ½, then ¾; theta_sigma from 0 again (from ¾ it would be ¾, 1¼); last the two rollouts
    assert asked == pytest.approx([0, 0.5, 0, 0.5, 0.75, 0.75])


@pytest.mark.slow
def test_algorithm_3_finds_the_penalised_optimum_of_a_quadratic():
    problem = NoisyQuadratic(0, noise=0.0)
    found, expected = algorithm_3(problem, sigma=1.0), problem.best(sigma=1.0)
    assert float((found - expected).norm() / expected.norm()) < 0.01  # inner step 0.3/80 over sigma, with room


def test_algorithm_1_climbs_the_preference_objective():
    mdp, phi = random_mdp(0)
    run = first_order_brl(
        mdp.exact, phi, mdp.soft_optimal(phi), sigma=0.1, outer_steps=5, inner_steps=30, outer_lr=1.0, inner_scale=1.0
    )
    values = [float(mdp.preference(visited, mdp.soft_optimal(visited))) for visited in run.path]
    assert values == sorted(values) and len(set(values)) == 6
    assert norm(total_gradient(mdp, run.phi)) < norm(total_gradient(mdp, phi))


def two_state_q(**settings):
    """A → B → A …, rewards 1 and 0, gamma ½: Q = (4/3, 2/3)."""
    batch = (torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), torch.tensor([1, 0]))

    def value(params, index):
        return params["q"][index]

    return fitted_q(value, {"q": torch.zeros(2)}, lambda: batch, value, gamma=0.5, **settings)["q"]


def test_fitted_q_reaches_the_fixed_point():
    torch.testing.assert_close(two_state_q(rounds=26, steps=2, lr=2.0), torch.tensor([4 / 3, 2 / 3]))


def test_fitted_q_returns_the_average_of_the_inner_iterates():
    # one round, target 0: q_0 = 1 − ½^l after l steps of lr 1 (the mean over two rows halves the gradient)
    found = two_state_q(rounds=1, steps=3, lr=1.0)
    torch.testing.assert_close(found, torch.tensor([(0.5 + 0.75 + 0.875) / 3, 0.0]))


def test_fitted_q_stays_in_the_ball_around_the_start():
    found = two_state_q(rounds=5, steps=5, lr=1.0, radius=0.3)
    assert float(found.norm()) == pytest.approx(0.3, rel=1e-5)


def test_fitted_q_freezes_the_target_within_a_round():
    # with the target frozen at zero, B's value stays zero for the whole first round
    assert float(two_state_q(rounds=1, steps=50, lr=1.0)[1]) == 0.0
    assert float(two_state_q(rounds=2, steps=50, lr=1.0)[1]) > 0.2


def test_algorithms_refuse_impossible_settings():
    with pytest.raises(ValueError, match="rounds 0"):
        two_state_q(rounds=0, steps=1, lr=1.0)


def test_the_noise_of_the_quadratic_is_unbiased():
    problem = NoisyQuadratic(0, noise=0.5)
    quiet = NoisyQuadratic(0, noise=0.0)
    phi = {"w": torch.ones(2, dtype=torch.float64)}
    total, count = torch.zeros(4, dtype=torch.float64), 400
    for _ in range(count):
        theta = {"t": torch.zeros(4, dtype=torch.float64, requires_grad=True)}
        total += torch.autograd.grad(problem.lower(phi, theta), theta["t"])[0] / count
    theta = {"t": torch.zeros(4, dtype=torch.float64, requires_grad=True)}
    exact = torch.autograd.grad(quiet.lower(phi, theta), theta["t"])[0]
    assert norm(combine({"t": total}, {"t": exact}, -1.0)) < 4 * 0.5 * 4**0.5 / count**0.5
