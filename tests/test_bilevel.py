"""The hypergradients, against enumeration, finite differences and closed forms, in float64."""

import numpy as np
import pytest
import torch

from experiments.theory.mdp import central_difference, random_mdp, total_gradient
from pbrl import bilevel
from pbrl.bilevel.params import flatten

# Central differences with derivatives of order one: step² + eps/step is 2e-10 at step 1e-5; ten times that.
FINITE_DIFFERENCE = 2e-9
ROUNDING = 1e-11  # a few hundred operations on numbers of order one in float64, with room


@pytest.fixture
def tiny():
    """A random MDP with 2 states, 2 actions, 3 steps; a reward; and a policy that is *not* optimal for it."""
    mdp, phi = random_mdp(3, n_states=2)
    generator = torch.Generator().manual_seed(0)
    return mdp, phi, {"logits": torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)}


def relative(found, truth):
    return bilevel.norm(bilevel.combine(found, truth, -1.0)) / bilevel.norm(truth)


def derivatives(value, phi, theta):
    """Value, gradients, and the second derivatives in theta and mixed, of a function of leaves, as float64 arrays."""
    first = bilevel.gradient(value, theta, keep_graph=True)
    by_phi = bilevel.gradient(value, phi, keep_graph=True)
    rows = torch.cat([g.reshape(-1) for g in first.values()])
    second = [bilevel.gradient(row, {"p": phi["r"], "t": theta["logits"]}, keep_graph=True) for row in rows]
    return [value.detach().numpy(), flatten(first), flatten(by_phi), np.stack([flatten(row) for row in second])]


def test_the_value_surrogate_has_the_value_and_all_derivatives_of_the_enumerated_value(tiny):
    mdp, phi, theta = tiny
    phi, theta = bilevel.leaves(phi), bilevel.leaves(theta)
    p = mdp.probabilities(theta).detach()
    lp, reward, mask = mdp.log_prob(theta), mdp.rewards(phi), mdp.mask
    rows = [
        bilevel.value_surrogate(lp[j : j + 1], reward[j : j + 1], mask[j : j + 1], mdp.gamma, mdp.alpha)
        for j in range(len(p))
    ]
    found = derivatives(p @ torch.stack(rows), phi, theta)
    for ours, exact in zip(found, derivatives(mdp.value(phi, theta), phi, theta), strict=True):
        np.testing.assert_allclose(ours, exact, atol=ROUNDING)


def test_the_preference_surrogate_has_the_value_and_all_derivatives_of_the_enumerated_objective(tiny):
    mdp, phi, theta = tiny
    phi, theta = bilevel.leaves(phi), bilevel.leaves(theta)
    p, lp = mdp.probabilities(theta).detach(), mdp.log_prob(theta)
    first, second = torch.cartesian_prod(torch.arange(len(p)), torch.arange(len(p))).T
    f = mdp.log_likelihood(phi, first, second)
    weight = p[first] * p[second]
    # weights times N turn the surrogate's mean into the expectation; they enter with the baseline taken off
    b = float(weight @ f.detach())
    weighted = (f - b) * weight * len(first)
    found = bilevel.preference_surrogate(lp[first], lp[second], weighted, baseline=0.0) + b
    for ours, exact in zip(
        derivatives(found, phi, theta), derivatives(mdp.preference(phi, theta), phi, theta), strict=True
    ):
        np.testing.assert_allclose(ours, exact, atol=ROUNDING)


def test_the_default_baseline_is_the_batch_mean_and_changes_no_value(tiny):
    mdp, phi, theta = tiny
    theta = bilevel.leaves(theta)
    lp = mdp.log_prob(theta)
    first, second = torch.arange(8), torch.arange(8, 16)
    f = mdp.log_likelihood(phi, first, second)
    default = bilevel.preference_surrogate(lp[first], lp[second], f)
    stated = bilevel.preference_surrogate(lp[first], lp[second], f, baseline=f.mean())
    without = bilevel.preference_surrogate(lp[first], lp[second], f, baseline=0.0)
    torch.testing.assert_close(default, f.mean())
    torch.testing.assert_close(without, f.mean())
    torch.testing.assert_close(
        bilevel.gradient(default, theta, keep_graph=True), bilevel.gradient(stated, theta, keep_graph=True)
    )
    assert relative(bilevel.gradient(default, theta, keep_graph=True), bilevel.gradient(without, theta)) > 0.1


def test_padded_steps_contribute_nothing_whatever_they_hold():
    generator = torch.Generator().manual_seed(1)
    lp, reward = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [4]])
    clean = bilevel.value_surrogate(lp, reward, mask, 0.9, 0.2)
    lp_bad, reward_bad = (torch.where(mask, x, torch.nan).requires_grad_() for x in (lp, reward))
    dirty = bilevel.value_surrogate(lp_bad, reward_bad, mask, 0.9, 0.2)
    torch.testing.assert_close(clean, dirty)
    dirty.backward()
    assert (lp_bad.grad[~mask] == 0).all() and (reward_bad.grad[~mask] == 0).all()
    short = [
        bilevel.value_surrogate(lp[j : j + 1, :n], reward[j : j + 1, :n], mask[j : j + 1, :n], 0.9, 0.2)
        for j, n in enumerate([6, 3, 1, 4])
    ]
    torch.testing.assert_close(clean, torch.stack(short).mean())


@pytest.mark.parametrize("solver", ["minres", "cg"])
@pytest.mark.parametrize("seed", range(3))
def test_the_implicit_gradient_equals_central_differences(solver, seed):
    mdp, phi = random_mdp(seed)
    found, report = bilevel.implicit_gradient(
        mdp.preference, mdp.value, phi, mdp.soft_optimal(phi), solver=solver, tol=1e-12
    )
    assert report.converged and report.residual <= 1e-12 and 0 < report.iterations <= 18
    assert relative(found, central_difference(mdp, phi)) < FINITE_DIFFERENCE
    assert relative(found, total_gradient(mdp, phi)) < 1e-10  # condition number (< 100) times the solve's 1e-12


def test_the_fisher_product_is_the_hessian_at_the_soft_optimum_and_only_there():
    mdp, phi = random_mdp(0)
    generator = torch.Generator().manual_seed(0)
    optimal = mdp.soft_optimal(phi)
    v = {"logits": torch.randn(3, 3, 2, generator=generator, dtype=torch.float64)}
    for theta, same in ((optimal, True), (bilevel.combine(optimal, v), False)):
        fisher = bilevel.fisher_product(
            lambda theta: theta["logits"].reshape(-1, 2), theta, mdp.state_weights(theta).reshape(-1), mdp.alpha
        )
        free = bilevel.leaves(theta)
        hessian = bilevel.hessian_product(mdp.value(phi, free), free)
        assert (relative(fisher(v), hessian(v)) < ROUNDING) == same


def gaussian(theta, obs):
    hidden = torch.tanh(obs @ theta["in"])
    return hidden @ theta["mean"], hidden @ theta["log_std"]


def test_the_fisher_product_of_a_gaussian_is_the_second_derivative_of_its_kl():
    generator = torch.Generator().manual_seed(0)
    shapes = {"in": (3, 4), "mean": (4, 2), "log_std": (4, 2)}
    theta, v = (
        {k: 0.5 * torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()} for _ in range(2)
    )
    obs = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(5, generator=generator, dtype=torch.float64)
    fisher = bilevel.fisher_product(lambda theta: gaussian(theta, obs), theta, weights, 0.3)
    free = bilevel.leaves(theta)
    mean, log_std = gaussian(theta, obs)
    other_mean, other_log_std = gaussian(free, obs)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(other_mean, other_log_std.exp())
    )
    exact = bilevel.hessian_product(-0.3 * weights @ kl.sum(-1), free)
    assert relative(fisher(v), exact(v)) < ROUNDING


def test_discounted_weights_sum_to_the_discounted_length_of_a_trajectory():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    weights = bilevel.discounted_weights(mask, 0.5)
    expected = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)


def test_the_paper_curvature_is_the_hessian_without_the_outer_product_of_the_scores(tiny):
    """One-step trajectories: Hessian of box(lp) r = r (∇²lp + ∇lp ∇lpᵀ); the paper keeps r ∇²lp."""
    mdp, phi, theta = tiny
    theta = bilevel.leaves(theta)
    lp, reward, mask = mdp.log_prob(theta)[:1, :1], mdp.rewards(phi)[:1, :1], mdp.mask[:1, :1]
    v = {"logits": torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    score = bilevel.gradient(lp.sum(), theta, keep_graph=True)
    outer = {"logits": reward.sum() * bilevel.dot(score, v) * score["logits"]}
    full = bilevel.hessian_product(bilevel.value_surrogate(lp, reward, mask, 1.0, 0.0), theta)(v)
    paper = bilevel.paper_curvature(lp, reward, mask, 1.0, theta)(v)
    assert relative(bilevel.combine(paper, outer), full) < ROUNDING
    assert bilevel.norm(outer) > 0.01


def double_backward(mdp, phi, theta, x, index):
    phi, theta = bilevel.leaves(phi), bilevel.leaves(theta)
    v = bilevel.value_surrogate(
        mdp.log_prob(theta, index), mdp.rewards(phi, index), mdp.mask[index], mdp.gamma, mdp.alpha
    )
    return bilevel.gradient(bilevel.dot(bilevel.gradient(v, theta, keep_graph=True), x), phi)


@pytest.mark.parametrize("center", [False, True])
def test_the_weighted_reward_gradient_equals_the_double_backward(tiny, center):
    mdp, phi, theta = tiny
    x = {"logits": torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)}
    index = torch.arange(10)
    free = bilevel.leaves(phi)
    term = bilevel.mixed_term(
        lambda theta: mdp.log_prob(theta, index),
        theta,
        x,
        mdp.rewards(free, index),
        mdp.mask[index],
        mdp.gamma,
        center=center,
    )
    same = relative(bilevel.gradient(term, free), double_backward(mdp, phi, theta, x, index)) < ROUNDING
    assert same != center


def test_centring_the_traces_leaves_the_expectation_and_takes_off_variance(tiny):
    """Over many small batches the centred term has the exact mean (within 4 standard errors) and less scatter."""
    mdp, phi, theta = tiny
    generator = torch.Generator().manual_seed(0)
    x = {"logits": torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)}
    free, exact_theta = bilevel.leaves(phi), bilevel.leaves(theta)
    slope = bilevel.gradient(mdp.value(free, exact_theta), exact_theta, keep_graph=True)
    exact = bilevel.gradient(bilevel.dot(slope, x), free)["r"]
    found = {True: [], False: []}
    for _ in range(150):
        index = mdp.draw(theta, 8, generator)
        for center, terms in found.items():
            term = bilevel.mixed_term(
                lambda theta, index=index: mdp.log_prob(theta, index),
                theta,
                x,
                mdp.rewards(free, index),
                mdp.mask[index],
                mdp.gamma,
                center=center,
            )
            terms.append(bilevel.gradient(term, free)["r"])
    spread = {}
    for center, terms in found.items():
        sample = torch.stack(terms)
        spread[center] = float(sample.var(0).sum())
        assert ((sample.mean(0) - exact).abs() < 4 * sample.std(0) / len(sample) ** 0.5 + 1e-12).all()
    assert spread[True] < spread[False]


def test_trace_decay_forgets_earlier_scores(tiny):
    mdp, _, theta = tiny
    x = {"logits": torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)}
    whole, half, none = (
        bilevel.traces(mdp.log_prob, theta, x, mdp.mask, center=False, trace_decay=decay) for decay in (1.0, 0.5, 0.0)
    )
    torch.testing.assert_close(whole, none.cumsum(1))
    torch.testing.assert_close(half[:, 2], none[:, 2] + 0.5 * none[:, 1] + 0.25 * none[:, 0])


def test_the_covariance_form_is_the_implicit_term_when_its_assumptions_hold():
    """No discount, no chance in the dynamics: docs/theory.md against the solve; branches repeated by probability."""
    mdp, phi = random_mdp(1, deterministic=True, gamma=1.0)
    theta, free = mdp.soft_optimal(phi), bilevel.leaves(phi)
    p, every = mdp.probabilities(theta), torch.arange(len(mdp.states))
    f_bar = (mdp.log_likelihood(phi, every[:, None], every[None, :]) @ p).detach()
    direct = bilevel.gradient(mdp.preference(free, theta), free)
    total = total_gradient(mdp, phi)
    returns = mdp.rewards(free).sum(1)
    # the unbiased covariance of a batch of weights p needs (n − 1) / n once, and p n in place of repetitions
    n = len(p)
    weight, centred = p * n, f_bar - p @ f_bar
    exact = bilevel.gradient((2 / mdp.alpha) * (p * centred) @ returns, free)
    assert relative(bilevel.combine(direct, exact), total) < 1e-10
    counts = (weight * 2000).round().long()
    index = torch.repeat_interleave(every, counts)
    sampled = bilevel.gradient(
        bilevel.covariance_term(f_bar[None, index], mdp.rewards(free)[index].sum(1)[None], mdp.alpha), free
    )
    # counts are rounded to one in weight · 2000: relative error of a probability below n / (2000 n p) ~ 5e-4 / (p n)
    assert relative(sampled, exact) < float(5e-4 * (1 / weight).max())


def test_the_covariance_term_is_unbiased_on_two_branches():
    """E over all ordered pairs of two values of the (n − 1)-covariance is the population covariance."""
    f, r = torch.tensor([1.0, 3.0]), torch.tensor([2.0, -2.0])
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    found = bilevel.covariance_term(f[pairs], r[pairs], alpha=2.0)
    torch.testing.assert_close(found, torch.tensor(((1 - 2) * (2 - 0) + (3 - 2) * (-2 - 0)) / 2))


def test_the_win_rate_term_is_the_whole_hypergradient_of_the_win_rate():
    """G_win(phi) = E_{τ ~ π*(phi)}[w(τ)] with w frozen, by autograd through the closed-form policy (docs/theory.md)."""
    mdp, phi = random_mdp(1, deterministic=True, gamma=1.0)
    free = bilevel.leaves(phi)
    now = mdp.probabilities(mdp.soft_optimal(phi)).detach()
    win_rate = mdp.labels @ now
    exact = bilevel.gradient(mdp.probabilities(mdp.soft_optimal(free)) @ win_rate, free)
    first, second = torch.cartesian_prod(torch.arange(len(now)), torch.arange(len(now))).T
    returns = mdp.rewards(free).sum(1)
    weight = now[first] * now[second] * len(first)
    found = bilevel.gradient(
        bilevel.win_rate_term(
            returns[first], returns[second], 0.5 + weight * (mdp.labels[first, second] - 0.5), mdp.alpha
        ),
        free,
    )
    assert relative(found, exact) < 1e-10


def quadratic(dtype):
    """V = −½ (θ − A φ)ᵀ P (θ − A φ), G = −½‖θ − b‖² − ½ 0.1 ‖φ‖²: theta* = A φ and dG/dphi in closed form."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 3, generator=generator, dtype=dtype)
    b = torch.randn(6, generator=generator, dtype=dtype)
    root = torch.randn(6, 6, generator=generator, dtype=dtype)
    p = root @ root.T + torch.eye(6, dtype=dtype)

    def lower(phi, theta):
        gap = torch.cat([theta["a"], theta["b"].reshape(-1)]) - a @ phi["w"]
        return -0.5 * gap @ p @ gap

    def upper(phi, theta):
        theta = torch.cat([theta["a"], theta["b"].reshape(-1)])
        return -0.5 * (theta - b).square().sum() - 0.05 * phi["w"].square().sum()

    phi = {"w": torch.randn(3, generator=generator, dtype=dtype)}
    best = a @ phi["w"]
    theta = {"a": best[:2], "b": best[2:].reshape(2, 2)}
    return upper, lower, phi, theta, {"w": a.T @ (b - best) - 0.1 * phi["w"]}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_float32_and_float64_both_solve_to_what_they_can_hold(dtype, tolerance):
    """Error ≤ condition number (about 50) × the residual reached (1.2e-5 or 1e-8·… in float32 and float64)."""
    upper, lower, phi, theta, exact = quadratic(dtype)
    found, report = bilevel.implicit_gradient(upper, lower, phi, theta, tol=1e-12)
    assert report.converged
    assert found["w"].dtype == dtype
    assert relative(found, exact) < tolerance
    assert not phi["w"].requires_grad and theta["a"].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_by_name(dtype):
    """In bfloat16 the gradient of this problem is wrong by a fifth, and its rounded residual says that it converged."""
    upper, lower, phi, theta, _ = quadratic(torch.float64)
    rough = {key: value.to(dtype) for key, value in theta.items()}
    with pytest.raises(ValueError, match=rf"theta\['a'\] has dtype {dtype}; expected float32 or float64"):
        bilevel.implicit_gradient(upper, lower, phi, rough)
    with pytest.raises(ValueError, match=rf"phi\['w'\] has dtype {dtype}"):
        bilevel.penalty_gradient(upper, lower, {"w": phi["w"].to(dtype)}, theta, theta, 0.1)
    with pytest.raises(ValueError, match=rf"g\['w'\] has dtype {dtype}"):
        bilevel.solve_curvature(lambda v: v, {"w": torch.ones(2, dtype=dtype)})


def test_damping_shifts_the_system_towards_the_direct_term():
    upper, lower, phi, theta, _ = quadratic(torch.float64)
    strong, report = bilevel.implicit_gradient(upper, lower, phi, theta, damping=1e9)
    direct = bilevel.gradient(upper(free := bilevel.leaves(phi), theta), free)
    assert report.converged and relative(strong, direct) < 1e-6
    identity = lambda v: {key: -value for key, value in v.items()}  # noqa: E731
    by_identity, _ = bilevel.solve_curvature(identity, {"g": torch.ones(3, dtype=torch.float64)}, damping=3.0)
    torch.testing.assert_close(by_identity["g"], torch.full((3,), -0.25, dtype=torch.float64))


def test_too_few_iterations_are_reported():
    upper, lower, phi, theta, _ = quadratic(torch.float64)
    found, report = bilevel.implicit_gradient(upper, lower, phi, theta, max_iter=2)
    assert not report.converged and report.residual > 1e-8 and report.iterations == 2
    assert torch.isfinite(found["w"]).all()


def test_cg_on_an_indefinite_system_is_reported_and_minres_solves_it():
    sign = torch.tensor([1.0, -1.0, 2.0, -3.0], dtype=torch.float64)
    product = lambda v: {"g": sign * v["g"]}  # noqa: E731
    g = {"g": torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)}
    _, cg = bilevel.solve_curvature(product, g, solver="cg")
    x, minres = bilevel.solve_curvature(product, g, solver="minres")
    assert not cg.converged and minres.converged
    torch.testing.assert_close(x["g"], g["g"] / sign)


def test_cg_that_divides_by_zero_is_reported_without_a_warning():
    product = lambda v: {"g": v["g"].flip(0)}  # noqa: E731  # its first direction's curvature is 0 · 1 + 1 · 0
    g = {"g": torch.tensor([1.0, 0.0], dtype=torch.float64)}
    found, cg = bilevel.solve_curvature(product, g, solver="cg")
    assert not cg.converged and np.isnan(cg.residual) and not found["g"].any()
    x, minres = bilevel.solve_curvature(product, g, solver="minres")
    assert minres.converged
    torch.testing.assert_close(x["g"], g["g"].flip(0))


def test_a_non_finite_implicit_term_is_left_out_and_reported():
    upper, lower, phi, theta, _ = quadratic(torch.float64)
    poisoned = lambda v: {key: value * torch.nan for key, value in v.items()}  # noqa: E731
    found, report = bilevel.implicit_gradient(upper, lower, phi, theta, curvature=poisoned)
    direct = bilevel.gradient(upper(free := bilevel.leaves(phi), theta), free)
    assert not report.converged and np.isnan(report.residual)
    torch.testing.assert_close(found, direct)


def test_objectives_that_ignore_a_level_have_zero_derivatives_there():
    phi, theta = {"w": torch.ones(2)}, {"t": torch.ones(3)}
    found, report = bilevel.implicit_gradient(
        lambda phi, theta: phi["w"].sum(), lambda phi, theta: -theta["t"].square().sum(), phi, theta
    )
    torch.testing.assert_close(found["w"], torch.ones(2))
    assert report.converged and report.norm_implicit == 0.0


def test_errors_name_the_value_and_the_way_out():
    upper, lower, phi, theta, _ = quadratic(torch.float64)
    with pytest.raises(ValueError, match=r"solver is 'lu'; expected one of"):
        bilevel.implicit_gradient(upper, lower, phi, theta, solver="lu")
    with pytest.raises(ValueError, match=r"upper\(phi, theta\) returned \[3\]"):
        bilevel.implicit_gradient(lambda phi, theta: phi["w"], lower, phi, theta)
    with pytest.raises(ValueError, match="theta is empty"):
        bilevel.implicit_gradient(upper, lower, phi, {})
    with pytest.raises(ValueError, match=r"phi\['w'\] has dtype torch.int64"):
        bilevel.implicit_gradient(upper, lower, {"w": torch.ones(3, dtype=torch.int64)}, theta)
    with pytest.raises(ValueError, match="sigma is 0"):
        bilevel.penalty_gradient(upper, lower, phi, theta, theta, 0.0)
    with pytest.raises(ValueError, match=r"mask has dtype torch.float32"):
        bilevel.value_surrogate(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), 0.9, 0.1)
    with pytest.raises(ValueError, match=r"log_likelihood \[3\]"):
        bilevel.preference_surrogate(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3))


def test_the_penalty_gradient_errs_linearly_in_sigma_and_the_printed_sign_does_not_converge():
    """Quadratic: theta_sigma = (P + sigma I)⁻¹ (P A φ + sigma b) solves V + sigma G exactly."""
    upper, lower, phi, theta, exact = quadratic(torch.float64)
    free = bilevel.leaves(theta)
    size = 6
    curvature = bilevel.hessian_product(lower(phi, free), free)
    eye = torch.eye(size, dtype=torch.float64)
    unit = [{"a": row[:2], "b": row[2:].reshape(2, 2)} for row in eye]
    p = -torch.from_numpy(np.stack([flatten(curvature(v)) for v in unit]))
    g = torch.from_numpy(flatten(bilevel.gradient(upper(phi, free), free)))
    errors, flipped = [], []
    for sigma in (1e-2, 1e-3, 1e-4):
        step = torch.linalg.solve(p + sigma * eye, sigma * g)  # G's Hessian is −I
        theta_sigma = {"a": theta["a"] + step[:2], "b": theta["b"] + step[2:].reshape(2, 2)}
        found = bilevel.penalty_gradient(upper, lower, phi, theta, theta_sigma, sigma)
        direct = bilevel.gradient(upper(here := bilevel.leaves(phi), theta), here)
        errors.append(relative(found, exact))
        flipped.append(relative(bilevel.combine(bilevel.combine(direct, direct), found, -1.0), exact))
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.02) and errors[2] / errors[1] == pytest.approx(
        0.1, rel=0.02
    )
    assert min(flipped) > 0.5


def test_normalized_ascent_takes_steps_of_length_scale_over_k():
    seen = []

    def objective(theta):
        seen.append(theta["t"].detach().clone())
        return 100.0 * theta["t"] @ torch.tensor([3.0, 4.0])

    start = {"t": torch.zeros(2)}
    last = bilevel.normalized_ascent(objective, start, steps=4, scale=2.0)
    path = torch.stack([*seen, last["t"]])
    torch.testing.assert_close((path[1:] - path[:-1]).norm(dim=1), 2.0 / torch.arange(1, 5))
    torch.testing.assert_close(last["t"] / last["t"].norm(), torch.tensor([0.6, 0.8]))
    assert not last["t"].requires_grad and (start["t"] == 0).all()


def test_normalized_ascent_stays_at_a_stationary_point_and_refuses_nan():
    at_rest = bilevel.normalized_ascent(lambda theta: -theta["t"].square().sum(), {"t": torch.zeros(2)}, 3, 1.0)
    assert (at_rest["t"] == 0).all()
    with pytest.raises(FloatingPointError, match="at step 1 of 3"):
        bilevel.normalized_ascent(lambda theta: theta["t"].sum() * torch.nan, {"t": torch.zeros(2)}, 3, 1.0)


def test_mean_eigenvalue_estimates_the_scale_of_the_damping():
    values = torch.linspace(1, 9, 5)
    found = bilevel.mean_eigenvalue(
        lambda v: {"t": -values * v["t"]}, {"t": torch.zeros(5)}, torch.Generator().manual_seed(0), probes=1
    )
    assert found == pytest.approx(5.0)  # sign probes are exact on a diagonal matrix
