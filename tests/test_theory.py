"""Each of the papers' claims, in its quick version (`python -m experiments.theory --quick`), and its ingredients."""

import re

import numpy as np
import pytest
import torch

from experiments import tables
from experiments.theory import constants, gaming
from experiments.theory.__main__ import CLAIMS, main
from experiments.theory.examples import Maze, Taxes, Workbench, best_reply
from experiments.theory.hypergradient import penalised_optimum
from experiments.theory.mdp import random_mdp
from experiments.theory.newton import maximise
from experiments.theory.report import interval, slope
from pbrl.bilevel import gradient, leaves, norm

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "key",
    [pytest.param(key, marks=SLOW) if key in ("i", "ii", "v", "vi", "vii", "ix") else key for key in CLAIMS],
)
def test_the_claim_holds(key):
    findings = CLAIMS[key](True).findings
    assert any(finding.holds for finding in findings)
    assert not [finding for finding in findings if finding.holds is False]


def test_errors_away_from_the_optimum_do_not_depend_on_the_signs_of_eigenvectors(monkeypatch):
    _, rows = constants.measured(seed=1)
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (eigh(matrix)[0], -eigh(matrix)[1]))
    _, again = constants.measured(seed=1)
    assert [row["error"] for row in again] == pytest.approx([row["error"] for row in rows], rel=1e-6)
    assert slope([row["distance"] for row in rows], [row["error"] for row in rows]) == pytest.approx(1, abs=0.05)


def test_the_stored_results_are_of_all_claims_which_hold_and_of_the_stored_data():
    stored = tables.STORED / "theory"
    table = (stored / "table.md").read_text()
    assert re.findall(r"^## \((\w+)\)", table, re.M) == list(CLAIMS)
    assert re.findall(r"\]\((\S+)\)", table) == [f"claim_{key}.{kind}" for key in CLAIMS for kind in ("csv", "png")]
    assert all((stored / f"claim_{key}.{kind}").exists() for key in CLAIMS for kind in ("csv", "png"))
    assert "| **no** |" not in table and table.count("| yes |") == 25
    measured = [row[1] for row in tables.theory() if "slope" in row[1]]
    slopes = {number for text in measured for number in re.findall(r"-?\d\.\d\d", text)}
    written = re.findall(r"^\| [^|]*slope[^|]* \| (\S+) \|", table, re.M)
    assert len(slopes) == 10
    assert slopes <= {f"{float(number):.2f}" for number in written}, "the table and the CSVs are of different runs"


def test_the_command_writes_a_table_data_and_a_figure(tmp_path, capsys):
    assert main(["--quick", "--claims", "iv", "--out", str(tmp_path)]) == 0
    assert "| slope of the inner gap in k, c = 2 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "claim_iv.csv").read_text().startswith("seed,scale,k,gap\n")
    assert (tmp_path / "claim_iv.png").stat().st_size > 1000
    assert "(iv) normalised inner steps" in capsys.readouterr().out


@pytest.mark.parametrize("deterministic", [False, True])
def test_enumerated_trajectories_are_a_distribution_and_the_soft_optimum_is_stationary(deterministic):
    mdp, phi = random_mdp(4, deterministic=deterministic)
    theta = leaves(mdp.soft_optimal(phi))
    assert float(mdp.probabilities(theta).sum().detach()) == pytest.approx(1.0, abs=1e-12)
    assert norm(gradient(mdp.value(phi, theta), theta)) < 1e-12
    assert float(mdp.state_weights(theta).sum()) == pytest.approx(1 + 0.9 + 0.81, abs=1e-12)


def test_the_penalised_optimum_is_stationary_and_higher():
    mdp, phi = random_mdp(0)
    theta = leaves(penalised_optimum(mdp, phi, 0.5))

    def objective(theta):
        return mdp.value(phi, theta) + 0.5 * mdp.preference(phi, theta)

    assert norm(gradient(objective(theta), theta)) < 1e-11
    assert objective(theta) > objective(mdp.soft_optimal(phi))


def test_newton_climbs_out_of_a_convex_start():
    found = maximise(lambda x: -(x["x"].square() - 1).square().sum(), {"x": torch.tensor([0.1, -0.2]).double()})
    torch.testing.assert_close(found["x"], torch.tensor([1.0, -1.0]).double())


def objectives_by_autograd(world, phi, method):
    """The same objectives written down directly, with the policy differentiated through (`full`, `win_rate`) or not."""
    visits, prefers = torch.from_numpy(world.visits), torch.from_numpy(world.prefers)
    start, weight = torch.from_numpy(world.start), torch.from_numpy(world.log_count)
    phi = torch.from_numpy(phi).requires_grad_()

    def policy(phi):
        score = weight + visits @ phi / world.alpha
        return torch.cat([score[start == s].softmax(0) for s in range(2)]) / 2

    now = policy(phi.detach())
    moving = policy(phi)
    if method == "win_rate":
        same = (start[:, None] == start[None, :]).double()
        value = moving @ ((prefers * same) @ now / (same @ now))
    else:
        returns = visits @ phi
        difference = returns[:, None] - returns[None, :]
        f = prefers * torch.nn.functional.logsigmoid(difference)
        f = f + (1 - prefers) * torch.nn.functional.logsigmoid(-difference)
        p = {"off_policy": policy(torch.zeros_like(phi)), "on_policy": now, "full": moving}[method]
        value = p @ f @ p
    return torch.autograd.grad(value, phi)[0].numpy()


@pytest.mark.parametrize("teacher", ["exact", "noisy"])
@pytest.mark.parametrize("method", gaming.METHODS)
def test_the_grid_worlds_gradients_equal_automatic_ones(method, teacher):
    world = gaming.grid(0, teacher=teacher, horizon=3)
    phi = np.random.default_rng(0).normal(size=25)
    np.testing.assert_allclose(
        gaming.hypergradient(world, phi, method), objectives_by_autograd(world, phi, method), atol=1e-12
    )


def test_grid_trajectories_bump_into_walls_and_are_all_counted():
    corner = gaming.trajectories(0, 2)
    assert corner.shape == (16, 25) and (corner.sum(1) == 2).all()
    assert (corner[:, 0] == 2).sum() == 4  # two moves, each up or left: into the wall
    world = gaming.grid(0, horizon=3)
    assert np.exp(world.log_count).sum() == pytest.approx(2 * 4**3)


def test_the_true_return_is_scaled_between_the_uniform_and_the_best_policy():
    world = gaming.grid(0, horizon=3)
    assert world.true_return(world.policy(np.zeros(25))) == pytest.approx(0.0)
    assert world.true_return(world.policy(1e3 * world.task_reward)) == pytest.approx(1.0)


@pytest.mark.parametrize("problem", [Workbench(), Taxes(), Maze()], ids=lambda problem: problem.name)
def test_the_best_reply_of_each_example_is_stationary(problem):
    phi = {"phi": torch.tensor(problem.start, dtype=torch.float64)}
    theta = leaves(best_reply(problem, phi, problem.policy()))
    # the maze's gradient sums 6 steps of rounding; Newton stops at 1e-10
    assert norm(gradient(problem.lower(phi, theta), theta)) < 1e-9


def test_slope_and_interval_on_known_data():
    x = np.array([1.0, 10.0, 100.0])
    assert slope(x, 5 * x**-0.5) == pytest.approx(-0.5)
    mean, low, high = interval(np.random.default_rng(0).normal(size=400))
    assert low < mean < high
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.15)  # 1.96 standard errors, to the bootstrap's own error
