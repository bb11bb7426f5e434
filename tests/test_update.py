"""The agent's update: the written-out derivative against autograd's and against Stable-Baselines3's own `train`."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn

from envs.pointmass import PointMass
from pbrl.agent.fast_update import FastUpdate, FusedAdam, Perceptrons, supports
from pbrl.agent.networks import ResidualBlock, SquashedStdActor
from pbrl.agent.replay import Batch
from pbrl.agent.sac import METRICS, PreferenceSAC
from tests.conftest import option

SIZE = (
    64  # rows of a batch; with two action entries a multiple of 16: one normal draw of 2·SIZE rows equals two of SIZE
)


def agent(**options: Any) -> PreferenceSAC:
    """Small, with SB3's own initialisation and standard deviation, so that it can be compared with SB3's SAC."""
    small = {"seed": 3, "net_arch": [32, 24], "batch_size": SIZE, "buffer_size": 500, "learning_rate": 3e-4}
    as_sb3 = {"log_std_range": None, "orthogonal_init": False, "compile": False}
    made: PreferenceSAC = option("agent", "sac", env=PointMass(), **(small | as_sb3 | options))
    return made


def batches(count: int, of: PreferenceSAC, seed: int = 0) -> list[Batch]:
    """Random transitions of the agent's shapes, a tenth of them terminal."""
    draw = torch.Generator().manual_seed(seed)
    obs_dim, act_dim = of.observation_space.shape[0], of.action_space.shape[0]
    return [
        Batch(
            torch.randn(SIZE, obs_dim, generator=draw),
            torch.rand(SIZE, act_dim, generator=draw) * 2 - 1,
            torch.randn(SIZE, obs_dim, generator=draw),
            torch.randn(SIZE, generator=draw),
            (torch.rand(SIZE, generator=draw) > 0.1).float(),
        )
        for _ in range(count)
    ]


def distance(a: Any, b: Any) -> float:
    """The largest difference between two agents' parameters, the temperature's logarithm included."""
    pairs = [*zip(a.policy.parameters(), b.policy.parameters(), strict=True), (a.log_ent_coef, b.log_ent_coef)]
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize("log_std_range", [None, (-5, 2)])
@pytest.mark.parametrize("net_arch", [(32,), (32, 24), (16, 24, 32)])
def test_the_written_out_update_equals_autograds(log_std_range: Any, net_arch: tuple[int, ...]) -> None:
    fast, plain = (agent(log_std_range=log_std_range, net_arch=net_arch) for _ in range(2))
    plain._fast = None
    assert isinstance(fast._fast, FastUpdate)
    for step, batch in enumerate(batches(100, fast)):
        fast.update(batch)
        plain.update(batch)
        if step < 10:
            assert distance(fast, plain) < 1e-6
    assert distance(fast, plain) < 1e-4  # Adam divides tiny gradients by their own size: rounding may grow
    assert distance(fast, agent(log_std_range=log_std_range, net_arch=net_arch)) > 1e-3  # they did move
    ours, theirs = fast.metrics(), plain.metrics()
    assert list(ours) == list(METRICS)
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


KINDS: dict[str, dict[str, Any]] = {  # of networks and optimisers
    "critic-norm": {"critic_layer_norm": True},
    "both-norms": {"actor_layer_norm": True, "critic_layer_norm": True},
    "blocks": {"blocks": 2, "net_arch": (16,)},
    "simba": {
        "normalise": True,
        "actor_layer_norm": True,
        "critic_layer_norm": True,
        "blocks": 1,
        "net_arch": (16,),
        "critics": 1,
        "weight_decay": 1e-2,
        "target_entropy": -0.5,
    },
    "one-critic": {"critics": 1},
    "weight-decay": {"weight_decay": 0.1},
    "normalised": {"normalise": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_written_out_update_equals_autograds_for_each_kind(kind: str) -> None:
    fast, plain = (agent(**KINDS[kind]) for _ in range(2))
    plain._fast = None
    assert isinstance(fast, SAC) and isinstance(fast._fast, FastUpdate)
    for each in (fast, plain):
        if each.seen is not None:
            each.seen.update(np.random.default_rng(0).normal(1, 3, (100, 2)))
            each._standardise()
    untouched = copy.deepcopy(fast.policy.state_dict())
    for step, batch in enumerate(batches(60, fast)):
        fast.update(batch)
        plain.update(batch)
        if step < 10:
            assert distance(fast, plain) < 2e-6
    assert distance(fast, plain) < 1e-4
    moved = fast.policy.state_dict()
    still = [name for name, value in untouched.items() if torch.equal(value, moved[name])]
    assert all(".scale." in name for name in still), "every parameter learns"
    assert fast.metrics() == pytest.approx(plain.metrics(), rel=1e-4, abs=1e-5)


def test_norms_and_residual_blocks_have_autograds_derivatives_in_double_precision() -> None:
    torch.manual_seed(0)
    nets = [[nn.Linear(7, 9), ResidualBlock(9, True), nn.ReLU(), nn.LayerNorm(9), nn.Linear(9, 1)] for _ in range(2)]
    modules = [nn.Sequential(*layers).double() for layers in nets]
    with torch.no_grad():
        for module in modules:
            for param in module.parameters():
                param.copy_(torch.randn_like(param))
    inputs = torch.randn(13, 7, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([module(inputs) for module in modules])
    weights = torch.randn(2, 13, 1, dtype=torch.float64)
    for at_once in ([modules], [[module] for module in modules]):
        for group in at_once:
            which = slice(None) if len(group) == 2 else slice(modules.index(group[0]), modules.index(group[0]) + 1)
            net = Perceptrons([(list(m)[:-1], list(m)[-1:]) for m in group], torch.float64)
            wanted = torch.autograd.grad((expected[which] * weights[which]).sum(), net.params, retain_graph=True)
            by_input = [
                torch.autograd.grad((one * w).sum(), inputs, retain_graph=True)[0]
                for one, w in zip(expected[which], weights[which], strict=True)
            ]
            given = weights if len(group) == 2 else weights[which][0]
            with torch.no_grad():
                values, trace = net.forward(inputs)
                torch.testing.assert_close(values.reshape(-1, 13, 1), expected[which])
                for ours, theirs in zip(net.backward(trace, given), wanted, strict=True):
                    torch.testing.assert_close(ours, theirs)
                found = net.input_gradient(trace, given, first=5).reshape(-1, 13, 2)
                torch.testing.assert_close(found, torch.stack(by_input)[:, :, 5:])
                some = torch.tensor([2, 5])
                fewer = net.input_gradient(trace.rows(some), given[..., some, :], first=5).reshape(-1, 2, 2)
                torch.testing.assert_close(fewer, torch.stack(by_input)[:, some, 5:])


def test_a_hundred_updates_equal_sb3s_own_train() -> None:
    options = {"seed": 3, "batch_size": SIZE, "buffer_size": 500, "ent_coef": "auto_0.1", "learning_rate": 3e-4}
    stock = SAC("MlpPolicy", PointMass(), policy_kwargs={"net_arch": [32, 24]}, **options)
    stock.set_logger(Logger(None, []))
    ours = agent(learning_rate=3e-4, temperature_lr=3e-4, target_update_interval=1)
    ours.policy.load_state_dict(stock.policy.state_dict())
    ours.noise = torch.default_generator
    given = batches(100, ours)
    torch.manual_seed(1)
    for batch in given:
        ours.update(batch)
    feed = iter(given)
    stock.replay_buffer = SimpleNamespace(sample=lambda size, env: as_sb3(next(feed)))  # type: ignore[assignment]
    torch.manual_seed(1)
    for _ in given:
        stock.train(1, SIZE)
    assert distance(ours, stock) < 2e-6
    assert ours._n_updates == stock._n_updates == 100


def as_sb3(batch: Batch) -> SimpleNamespace:
    return SimpleNamespace(
        observations=batch.obs,
        actions=batch.actions,
        next_observations=batch.next_obs,
        rewards=batch.rewards.unsqueeze(1),
        dones=1 - batch.not_done.unsqueeze(1),
        discounts=None,
    )


def test_a_perceptrons_derivatives_equal_autograds_in_double_precision() -> None:
    torch.manual_seed(0)
    first, second, *heads = (nn.Linear(*s, dtype=torch.float64) for s in ((7, 9), (9, 11), (11, 2), (11, 3)))
    net = Perceptrons([([first, nn.ReLU(), second, nn.ReLU()], heads)], torch.float64)
    inputs = torch.randn(13, 7, dtype=torch.float64)
    hidden = second(first(inputs).relu()).relu()
    expected = torch.cat([head(hidden) for head in heads], dim=1)
    weights = torch.randn(8, 5, dtype=torch.float64)
    params = torch.autograd.grad((expected[:8] * weights).sum(), net.params)
    with torch.no_grad():
        values, trace = net.forward(inputs)
        torch.testing.assert_close(values, expected)
        grads = net.backward(trace.rows(slice(8)), weights)
    for ours, theirs in zip(grads, params, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_two_perceptrons_at_once_equal_autograds_of_each() -> None:
    torch.manual_seed(0)
    nets = [[nn.Linear(*s, dtype=torch.float64) for s in ((7, 9), (9, 11), (11, 1))] for _ in range(2)]
    both = Perceptrons([([a, nn.ReLU(), b, nn.ReLU()], [c]) for a, b, c in nets], torch.float64)
    inputs = torch.randn(13, 7, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([last(second(first(inputs).relu()).relu()) for first, second, last in nets])
    weights = torch.randn(2, 13, 1, dtype=torch.float64)
    *params, _ = torch.autograd.grad((expected * weights).sum(), [*both.params, inputs], retain_graph=True)
    by_input = [
        torch.autograd.grad((one * w).sum(), inputs, retain_graph=True)[0]
        for one, w in zip(expected, weights, strict=True)
    ]
    with torch.no_grad():
        values, trace = both.forward(inputs)
        torch.testing.assert_close(values, expected)
        for ours, theirs in zip(both.backward(trace, weights), params, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(both.input_gradient(trace, weights, first=5), torch.stack(by_input)[:, :, 5:])


def test_input_gradients_equal_autograds_in_the_chosen_rows() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(7, 9), nn.Linear(9, 1)
    net = Perceptrons([([first, nn.ReLU()], [last])], torch.float32)
    inputs = torch.randn(13, 7, requires_grad=True)
    expected = torch.autograd.grad(last(first(inputs).relu()).sum(), inputs)[0]
    rows = torch.tensor([1, 4, 12])
    with torch.no_grad():
        _, trace = net.forward(inputs)
        ours = net.input_gradient(trace.rows(rows), torch.ones(3, 1), first=5)
    torch.testing.assert_close(ours, expected[rows, 5:])


def test_fused_adam_equals_the_optimizer_through_clearing_and_loading() -> None:
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizers = [torch.optim.Adam([p], lr=0.1, fused=True) for p in (ours, theirs)]
    adam = FusedAdam(optimizers[0], [ours])
    saved: Any = None
    for step in range(12):
        grad = torch.full((5,), float(step) - 3.5)
        adam.step([grad])
        theirs.grad = grad
        optimizers[1].step()
        assert torch.equal(ours, theirs), step
        if step == 3:
            saved = copy.deepcopy(optimizers[0].state_dict())
        if step == 6:
            [optimizer.load_state_dict(copy.deepcopy(saved)) for optimizer in optimizers]
        if step == 8:
            [optimizer.state.clear() for optimizer in optimizers]
    assert float(optimizers[0].state[ours]["step"]) == 3


@pytest.mark.slow
def test_moments_of_dead_units_never_become_denormal() -> None:
    ours, plain = agent(), agent()
    plain._forget_tiny_moments = lambda: None  # type: ignore[method-assign]

    def moments(of: PreferenceSAC) -> Tensor:
        states = [s for o in (of.actor.optimizer, of.critic.optimizer) for s in o.state.values()]
        return torch.cat([s[name].flatten().abs() for s in states for name in ("exp_avg", "exp_avg_sq")])

    for each in (ours, plain):
        for batch in batches(5, each):
            each.update(batch)
        with torch.no_grad():
            each.actor.latent_pi[0].bias[:10] = -1e3  # ten of the actor's first units die
        for batch in batches(900, each, seed=1):  # 0.9^830 is denormal
            each.update(batch)
    smallest = torch.finfo(torch.float32).tiny
    assert ((moments(plain) > 0) & (moments(plain) < smallest)).any()
    assert not ((moments(ours) > 0) & (moments(ours) < smallest)).any()
    assert distance(ours, plain) == 0


def test_targets_move_every_second_update_across_calls() -> None:
    learner = agent(target_update_interval=2)
    moved = []
    for batch in batches(4, learner):
        before = [p.clone() for p in learner.critic_target.parameters()]
        learner.update(batch)
        moved.append(
            any(not torch.equal(a, b) for a, b in zip(before, learner.critic_target.parameters(), strict=True))
        )
    assert moved == [True, False, True, False]


class SlowerActor(SquashedStdActor):
    """An actor of the user's own: its distribution is not what the written-out update knows."""

    def get_action_dist_params(self, obs: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mean, log_std, extra = super().get_action_dist_params(obs)
        return mean / 2, log_std, extra


def test_networks_of_the_users_own_fall_back_to_autograd() -> None:
    learner = agent()
    assert supports(learner)
    learner.actor.__class__ = SlowerActor
    assert not supports(learner)
    smooth = PreferenceSAC(
        "MlpPolicy", PointMass(), policy_kwargs={"activation_fn": nn.Tanh, "net_arch": [8]}, buffer_size=100
    )
    smooth.set_logger(Logger(None, []))
    assert smooth._fast is None
    before = [p.clone() for p in smooth.actor.parameters()]
    smooth.update(batches(1, smooth)[0])
    assert all(not torch.equal(a, b) for a, b in zip(before, smooth.actor.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, KINDS["simba"], KINDS["both-norms"]])
def test_bf16_stays_close_and_keeps_float32_weights(options: dict[str, Any]) -> None:
    exact, rounded = agent(**options), agent(precision="bf16", **options)
    for batch in batches(50, exact):
        exact.update(batch)
        rounded.update(batch)
    assert {p.dtype for p in rounded.policy.parameters()} == {torch.float32}
    assert rounded.metrics() == pytest.approx(exact.metrics(), rel=0.05, abs=0.01)
    assert 0 < distance(exact, rounded) < 0.02


def test_multiplying_both_critics_at_once_changes_rounding_only() -> None:
    before = torch.get_num_threads()
    apart = agent(precision="bf16")
    try:
        torch.set_num_threads(2)
        together = agent(precision="bf16")
    finally:
        torch.set_num_threads(before)
    assert apart._fast is not None and together._fast is not None
    assert together._fast.together and not apart._fast.together
    for batch in batches(20, apart):
        apart.update(batch)
        together.update(batch)
    assert distance(apart, together) < 5e-3
    assert together.metrics() == pytest.approx(apart.metrics(), rel=1e-2, abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, KINDS["simba"]], ids=["plain", "simba"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_compiled_update_equals_the_eager_one(
    precision: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    eager, compiled = agent(precision=precision, **options), agent(precision=precision, compile=True, **options)
    noise, before = compiled.noise.get_state(), [p.clone() for p in compiled.policy.parameters()]
    compiled.prepare()
    assert "compiled the agent's update in" in capsys.readouterr().out
    assert torch.equal(noise, compiled.noise.get_state())  # warming up learns nothing and draws nothing
    assert all(torch.equal(a, b) for a, b in zip(before, compiled.policy.parameters(), strict=True))
    assert compiled._fast is not None and compiled._fast.critic_stage != compiled._fast._critic_stage
    for batch in batches(20, eager):
        eager.update(batch)
        compiled.update(batch)
    assert distance(eager, compiled) < (1e-5 if precision == "fp32" else 5e-3)
    assert compiled.metrics() == pytest.approx(eager.metrics(), rel=1e-2 if precision == "bf16" else 1e-4, abs=1e-2)


def test_without_a_compiler_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise OSError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: missing)
    learner, plain = agent(compile=True), agent()
    learner.prepare()
    assert "going on without, which is slower (OSError: no C++ compiler)" in capsys.readouterr().out
    [batch] = batches(1, learner)
    learner.update(batch)
    plain.update(batch)
    assert distance(learner, plain) == 0


def test_wrong_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"agent\.precision=fp8; expected one of fp32, bf16"):
        agent(precision="fp8")
    with pytest.raises(ValueError, match="ReLU networks of our kinds"):
        PreferenceSAC("MlpPolicy", PointMass(), precision="bf16", policy_kwargs={"activation_fn": nn.Tanh})


@pytest.mark.parametrize("options", [{}, KINDS["simba"]], ids=["plain", "simba"])
def test_a_saved_agent_goes_on_with_the_same_update(tmp_path: Any, options: dict[str, Any]) -> None:
    one = agent(**options)
    first, second = batches(2, one)
    one.update(first)
    if one.seen is not None:
        one.collect(20, updates=0)
    one.save(tmp_path / "agent.zip")
    two = PreferenceSAC.load(tmp_path / "agent.zip", env=PointMass())
    assert isinstance(two, SAC) and isinstance(two._fast, FastUpdate)
    two.noise.set_state(one.noise.get_state())
    one.update(second)
    two.update(second)
    assert distance(one, two) == 0
    obs = np.array([0.3, 5.0], np.float32)
    assert np.array_equal(one.predict(obs, deterministic=True)[0], two.predict(obs, deterministic=True)[0])
    if one.seen is not None and two.seen is not None:
        assert np.array_equal(one.seen.mean, two.seen.mean) and one.seen.count == two.seen.count == pytest.approx(20)
    assert np.isfinite(list(two.metrics().values())).all()
