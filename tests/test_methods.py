"""SURF, MRN, RIME, REED, RUNE and QPA: what pins each to its paper, and that options compose or are refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from envs.pointmass import PointMass
from pbrl.agent.exploration import StateEntropy
from pbrl.agent.replay import RelabelReplay
from pbrl.agent.sac import make_agent
from pbrl.bilevel.params import gradient, leaves
from pbrl.fitting import crops
from pbrl.launch.configuration import ConfigError
from pbrl.preferences import Preferences
from pbrl.reed import DynamicsAwareReward
from pbrl.reward import RewardEnsemble
from pbrl.types import Answer, Params, Query, Segments
from pbrl.updaters.mrn import critic_step, outer_loss, reward_weights
from pbrl.updaters.pebble import Pebble
from pbrl.updaters.rime import Rime, divergences
from pbrl.updaters.surf import Surf, pseudo_label_loss
from tests.conftest import TINY, config, finish, rows, tiny_loop


class Stateless(PointMass):
    """A simulator that cannot be set back."""

    def __init__(self, horizon: int = 50, seed: int | None = None) -> None:
        super().__init__(horizon, seed)
        self.state_size = 0


def segments(count: int, horizon: int, rng: np.random.Generator) -> Segments:
    obs, actions = (rng.normal(size=(count, horizon, 2)).astype(np.float32) for _ in range(2))
    return Segments(torch.from_numpy(obs), torch.from_numpy(np.tanh(actions)))


def answered(count: int, horizon: int = 6, margin: int = 0, wrong: int = 0, seed: int = 0) -> Preferences:
    """Pairs labelled by the sum of the first observation; the first `wrong` labels are turned."""
    rng = np.random.default_rng(seed)
    wide = segments(count, horizon + 2 * margin, rng), segments(count, horizon + 2 * margin, rng)
    first, second = (side.steps(margin, margin + horizon) for side in wide)
    labels = (first.obs[..., 0].sum(1) > second.obs[..., 0].sum(1)).float()
    labels[:wrong] = 1 - labels[:wrong]
    query = Query(first, second, torch.zeros(count, 2, horizon), context=wide if margin else None)
    preferences = Preferences()
    preferences.add(query, Answer(labels, torch.ones(count, dtype=torch.bool)), 0)
    return preferences


def session(new_pairs: int = 0, seed: int = 0) -> Any:
    """As much of a `Session` as these updaters use, on random steps whose next observation is obs + 0.1 action."""
    rng = np.random.default_rng(seed)

    def transitions(count: int) -> dict[str, Tensor]:
        steps = segments(count, 1, rng)
        obs, actions = steps.obs[:, 0], steps.actions[:, 0]
        return {"obs": obs, "actions": actions, "next_obs": obs + 0.1 * actions, "not_done": torch.ones(count)}

    return SimpleNamespace(
        rng=rng,
        env_step=5000,
        new_pairs=new_pairs,
        fresh_pairs=new_pairs,
        unlabelled=lambda count, horizon: (segments(count, horizon, rng), segments(count, horizon, rng)),
        transitions=transitions,
        novelty=lambda obs, nearest: obs.norm(dim=1),
    )


def small_reward(**options: Any) -> RewardEnsemble:
    return RewardEnsemble(2, 2, **{"members": 2, "hidden": [16], "seed": 0, **options})


# ------------------------------------------------------------------------------------------------ SURF


def test_surf_without_unlabelled_pairs_and_crops_equals_pebble_bit_for_bit() -> None:
    preferences = answered(40)
    trained = []
    for updater in (Pebble(epochs=5), Surf(epochs=5, crop=0, unlabelled_per_label=0)):
        reward = small_reward()
        metrics = updater.update(reward, preferences, session(new_pairs=40))
        trained.append((reward.state_dict(), metrics))
    assert trained[0][1] == trained[1][1]
    for name, weights in trained[0][0].items():
        assert torch.equal(weights, trained[1][0][name]), name


@pytest.mark.slow
def test_a_whole_surf_run_with_both_options_off_equals_a_pebble_run(tmp_path: Path) -> None:
    off = ("updater.crop=0", "updater.unlabelled_per_label=0", "updater.steps_per_label=null")
    finish(tiny_loop(tmp_path / "pebble", "updater=pebble-published"))
    finish(tiny_loop(tmp_path / "surf", "updater=surf", *off, "updater.stop_accuracy=0.97"))
    assert rows(tmp_path / "pebble") == rows(tmp_path / "surf")


def test_crops_have_the_published_lengths_and_can_lie_anywhere() -> None:
    first, second = crops(4000, 16, 7, 13, np.random.default_rng(0))
    lengths = first.sum(1)
    assert torch.equal(lengths, second.sum(1)), "both segments of a pair keep the same number of steps"
    assert set(lengths.tolist()) == set(range(7, 14))
    for kept in (first, second):
        edges = (kept[:, 1:] != kept[:, :-1]).sum(1) + kept[:, 0].int() + kept[:, -1].int()
        assert (edges == 2).all(), "one piece without holes"
        starts = kept.int().argmax(1)
        assert set(starts[lengths == 7].tolist()) == set(range(10)), "the first and the last start occur"
    assert (first != second).any()


def test_crops_never_exceed_what_is_stored() -> None:
    first, _ = crops(500, 10, 7, 13, np.random.default_rng(0))  # no margin: an imported data set
    assert set(first.sum(1).tolist()) == {7, 8, 9, 10}


def test_pseudo_labels_count_only_above_the_confidence() -> None:
    logits = torch.tensor([5.0, -5.0, 1.0])  # sigmoid(5) = 0.9933, sigmoid(1) = 0.73
    cropped = torch.tensor([2.0, 3.0, -4.0])
    loss, share = pseudo_label_loss(logits, cropped, confidence=0.99)
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(3))) / 3  # labels 1 and 0; the third row counts as zero
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(share) == pytest.approx(2 / 3)


def test_surf_draws_unlabelled_pairs_per_label_and_keeps_the_newest() -> None:
    surf, preferences = Surf(epochs=1, crop=2, unlabelled_per_label=3, unlabelled_kept=50), answered(10, margin=2)
    surf.update(small_reward(), preferences, session(new_pairs=10))
    assert surf.unlabelled is not None
    assert surf.unlabelled[0].obs.shape == (30, 10, 2), "with the margins around the six steps"
    old = surf.unlabelled[0].obs[-20:]
    surf.update(small_reward(), preferences, session(new_pairs=10, seed=1))
    assert len(surf.unlabelled[0]) == 50
    assert torch.equal(surf.unlabelled[0].obs[:20], old)


def test_surf_takes_the_published_number_of_gradient_steps() -> None:
    surf = Surf(steps_per_label=1000 / 128)
    assert surf._epochs(10) == 79  # ceil(1000 · 10 / 128) steps of one batch each
    assert surf._epochs(200) == math.ceil(1563 / 2)  # two batches an epoch


def test_surf_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    surf = Surf(epochs=1, unlabelled_per_label=2)
    surf.update(small_reward(), answered(5, 12, margin=5), session(new_pairs=5))
    torch.save(surf.state_dict(), tmp_path / "state.pt")
    other = Surf(epochs=1, unlabelled_per_label=2)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert surf.unlabelled is not None
    assert other.unlabelled is not None
    for side, restored in zip(surf.unlabelled, other.unlabelled, strict=True):
        assert torch.equal(side.obs, restored.obs)
        assert torch.equal(side.actions, restored.actions)
    fresh = Surf()
    fresh.load_state_dict(Surf().state_dict())
    assert fresh.unlabelled is None


# ------------------------------------------------------------------------------------------------ MRN


class Critics(nn.Module):
    """Two small smooth critics over 3 numbers, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x) for net in self.nets], dim=1).T


def test_mrns_closed_form_equals_finite_differences_of_the_two_steps() -> None:
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
        target = (reward(x).squeeze(1) + 0.99 * following).detach()
        params = {name: value.clone().requires_grad_() for name, value in theta.items()}
        lower = sum(F.mse_loss(q, target) for q in values(params))
        moves = torch.autograd.grad(lower, list(params.values()))  # type: ignore[arg-type]
        moved = {name: p.detach() - step * g for (name, p), g in zip(params.items(), moves, strict=True)}
        return float(weight * sum(F.binary_cross_entropy_with_logits(z, labels) for z in logits(moved)))

    target = reward(x).squeeze(1).detach() + 0.99 * following
    moved = leaves(critic_step(values, theta, target, step))
    loss = weight * outer_loss(logits(moved), labels)
    weights = reward_weights(values, theta, gradient(loss, moved), step)
    (weights * reward(x).squeeze(1)).sum().backward()
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


# ------------------------------------------------------------------------------------------------ RIME


def test_divergences_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(1 / 3), 0.0]])  # means 0.5, 0.5
    assert divergences(logits, torch.tensor([1.0, 0.5])).tolist() == pytest.approx([math.log(2), 0.0], abs=1e-9)
    one = torch.tensor([[math.log(9.0)] * 3])  # p = 0.9
    expected = [-math.log(0.9), -math.log(0.1), 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)]
    assert divergences(one, torch.tensor([1.0, 0.0, 0.5])).tolist() == pytest.approx(expected, rel=1e-6)


def test_rime_thresholds_follow_the_paper() -> None:
    rime = Rime(Pebble(), beta_epochs=10)
    assert rime.lower_threshold == math.inf, "at first everything is trusted"
    rime.largest, rime.variance, rime.done = 0.7, 0.4, 5
    assert rime.lower_threshold == pytest.approx(-math.log(0.7) + 0.5 * 0.7 + (3.0 - 0.5 * 2.0) * 0.4)
    rime.variance, rime.done = 9.0, 100
    assert rime.lower_threshold == pytest.approx(-math.log(0.7) + 0.35 + 3.0), "the uncertainty term is capped"


def test_rime_flips_and_distrusts_wrong_labels() -> None:
    preferences = answered(300, wrong=30)
    reward = small_reward(hidden=[64])
    Pebble(epochs=60, stop_accuracy=0.999).update(reward, answered(300), session())  # it knows the truth
    rime = Rime(Pebble(epochs=1, stop_accuracy=1.1), warm_updates=0, flip=0.2)
    rime.largest, rime.variance, rime.done = 0.7, 0.1, 60
    trusted, flipped = rime._denoise(reward, preferences)
    assert trusted[30:].float().mean() > 0.9
    assert trusted[:30].float().mean() < 0.4
    assert flipped[30:].sum() == 0
    assert flipped[:30].sum() > 5
    assert not (trusted & flipped).any()


def test_rime_survives_equal_labels_and_epochs_without_trusted_pairs() -> None:
    preferences = answered(20)
    preferences.prefers_first[:5] = 0.5
    reward = small_reward()
    rime = Rime(Pebble(epochs=1, stop_accuracy=1.1), epochs=3, least_epochs=1, warm_updates=0)
    metrics = rime.update(reward, preferences, session())
    assert metrics["rime/trusted"] > 0
    rime.largest, rime.variance, rime.done = 2.0, -100.0, 0  # a threshold below every divergence
    before = [p.detach().clone() for p in reward.parameters()]
    metrics = rime.update(reward, preferences, session())
    assert metrics["rime/trusted"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, reward.parameters(), strict=True))


def test_rime_trains_its_inner_updater_on_the_flipped_labels() -> None:
    seen: list[tuple[Tensor, int]] = []

    class Inner:
        pairs = "buffer"

        def update(self, reward: Any, preferences: Preferences, session: Any) -> dict[str, float]:
            seen.append((preferences.prefers_first.clone(), session.new_pairs))
            return {"reward/accuracy": 0.0}

    preferences = answered(40, wrong=10)
    reward = small_reward(hidden=[64])
    Pebble(epochs=150, stop_accuracy=0.9999).update(reward, answered(40), session())
    rime = Rime(Inner(), epochs=2, warm_updates=0, flip=0.45)
    rime.largest, rime.variance, rime.done = 2.0, 0.0, 60  # tau_low = −ln 2 + 1 = 0.31; tau_high = −ln 0.45 = 0.80
    kl = divergences(reward.preference_logits(preferences.first, preferences.second), preferences.prefers_first)
    now = session(new_pairs=35)
    rime.update(reward, preferences, now)
    given = preferences.prefers_first
    trusted, flipped = kl < 1 - math.log(2), kl > -math.log(0.45)
    assert trusted.any()
    assert flipped.any()
    kept = trusted | flipped
    assert torch.equal(seen[0][0], torch.where(flipped, 1 - given, given)[kept])
    assert [new for _, new in seen] == [int(kept[-35:].sum()), 0], "new pairs are shown as new once"
    assert (now.new_pairs, now.fresh_pairs) == (35, 35)


def test_rime_starts_warm_from_the_novelty() -> None:
    reward, now = small_reward(hidden=[32, 32], learning_rate=3e-3), session()
    metrics = Rime(Pebble(epochs=1), epochs=1, warm_updates=400)._warm_start(reward, now)
    batch = now.transitions(500)
    with torch.no_grad():
        paid = reward.mean(batch["obs"], batch["actions"])
    assert np.corrcoef(paid, now.novelty(batch["obs"], 5))[0, 1] > 0.9
    assert metrics["rime/warm_start_loss"] > 0


def test_rime_refuses_what_it_cannot_wrap() -> None:
    from pbrl.updaters.mrn import Mrn
    from pbrl.updaters.oracle import Oracle

    with pytest.raises(ValueError, match="nothing to denoise"):
        Rime(Oracle())
    with pytest.raises(ValueError, match="between sessions"):
        Rime(Mrn())


# ------------------------------------------------------------------------------------------------ REED


def test_reeds_encoder_learns_the_dynamics_and_moves_the_reward() -> None:
    reward = DynamicsAwareReward(2, 2, members=2, hidden=[16], embedding=32, max_updates=300, dynamics_batch_size=64)
    batch = session(seed=9).transitions(500)
    obs, actions, following = batch["obs"], batch["actions"], batch["next_obs"]

    def loss(next_obs: Tensor) -> float:
        return float(reward.dynamics_loss(obs, actions, next_obs).detach())

    before, paid = loss(following), reward.mean(obs, actions).detach()
    reward.pretrain(session())
    assert loss(following) < min(before - 0.3, -0.9)
    assert loss(following.flip(0)) > loss(following) + 0.3, "it tells next states apart: no collapse"
    assert not torch.equal(reward.mean(obs, actions).detach(), paid), "the heads stand on the same encoder"


def test_reeds_members_share_the_encoder_and_answers_train_it() -> None:
    reward = DynamicsAwareReward(2, 2, members=3, hidden=[16], embedding=16, seed=3, learning_rate=3e-3)
    steps = segments(4, 5, np.random.default_rng(0))
    both = reward(steps.obs, steps.actions)
    assert both.shape == (3, 4, 5)
    for m in range(3):
        torch.testing.assert_close(both[m], reward.member(m, steps.obs, steps.actions))
    before = reward.joint[0].weight.detach().clone()  # type: ignore[union-attr]
    metrics = Pebble(epochs=30).update(reward, answered(60), session())
    assert not torch.equal(before, reward.joint[0].weight)  # type: ignore[union-attr]
    assert metrics["reward/accuracy"] > 0.8


def test_reeds_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    one = DynamicsAwareReward(2, 2, hidden=[8], embedding=8, seed=5).state_dict()
    torch.manual_seed(2)
    two = DynamicsAwareReward(2, 2, hidden=[8], embedding=8, seed=5).state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


# ------------------------------------------------------------------------------------------------ RUNE and QPA


def test_runes_bonus_is_stored_and_relabelled(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "reward.disagreement_bonus=0.5", "total_steps=210")
    loop.run()
    replay = loop.agent.replay_buffer
    obs, actions = replay.observations[:150, 0].copy(), replay.actions[:150, 0].copy()
    predicted = loop.parts.reward.predict(obs, actions)
    expected = predicted.mean(0) + 0.5 * (1 - 1e-5) ** 200 * predicted.std(0)  # relabelled at step 200
    assert predicted.std(0).max() > 1e-3
    np.testing.assert_allclose(replay.rewards[:150, 0], expected, rtol=1e-5, atol=1e-6)
    loop.close(True)


def test_hybrid_replay_draws_the_published_share_from_recent_steps() -> None:
    agent = make_agent(PointMass(seed=0), seed=0, hybrid_ratio=0.5, hybrid_steps=100, buffer_size=1000)
    replay: RelabelReplay = agent.replay_buffer
    replay.rows[:, 0] = np.arange(1000)  # obs[0] tells which row was drawn
    replay.pos, replay.full = 250, True  # rows 150…249 are the newest hundred
    drawn = replay.draw(1000, np.random.default_rng(0)).obs[:, 0].numpy()
    recent = (drawn >= 150) & (drawn < 250)
    assert recent[:500].all()
    assert recent[500:].mean() == pytest.approx(0.1, abs=0.05), "the rest from everything"
    replay.hybrid = False
    drawn = replay.draw(1000, np.random.default_rng(0)).obs[:, 0].numpy()
    assert ((drawn >= 150) & (drawn < 250)).mean() == pytest.approx(0.1, abs=0.05)


def test_hybrid_replay_ends_with_the_budget(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "agent.hybrid_ratio=0.5", "total_steps=260")
    loop.run()
    assert loop.agent.replay_buffer.hybrid, "questions are left after the session at step 200"
    loop.close(True)
    loop = tiny_loop(tmp_path / "spent", "agent.hybrid_ratio=0.5", "feedback.budget=5", "total_steps=260")
    loop.run()
    assert not loop.agent.replay_buffer.hybrid
    loop.close(True)


@pytest.mark.parametrize(("env", "episodes"), [("walker-walk", 10), ("drawer-open", 30), ("door-open", 60)])
def test_near_policy_queries_look_back_as_far_as_published(env: str, episodes: int) -> None:
    cfg, _ = config("query=near-policy", f"env={env}")
    assert cfg.query.recent_episodes == episodes


def test_near_policy_queries_come_from_the_last_episodes(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "query=near-policy", "query.recent_episodes=2", "total_steps=250")
    loop.run()
    query = loop.questions.select(first=False)
    recent = loop.parts.rollouts.obs[200:250]  # episodes of 50 steps; the sixth has not begun
    assert {tuple(o) for o in query.first.obs[:, 0].tolist()} <= {tuple(o) for o in recent.tolist()}
    loop.close(True)


def test_bounded_novelty_is_centred_and_clipped() -> None:
    agent = make_agent(PointMass(seed=0), seed=0, learning_starts=300)
    agent.collect(200)
    bonus = StateEntropy(agent.replay_buffer, nearest=5, bounded=True)
    stored = torch.from_numpy(agent.replay_buffer.observations[:200, 0].copy())
    paid = bonus(stored)
    assert abs(float(paid.mean())) < 0.1
    assert float(paid.std()) == pytest.approx(1 / 3, abs=0.1)
    assert float(bonus(torch.full((1, 2), 50.0))) <= 1.0


# ------------------------------------------------------------------------------------------------ together


@pytest.mark.parametrize(
    "options",
    [
        ("updater=aparl", "query=disagreement", "agent.hybrid_ratio=0.5", "teacher=mistake"),
        ("updater=surf", "query=k-center-disagreement", "reward=reed", "teacher=equal"),
        ("updater=mrn", "updater.meta_every=50", "query=near-policy", "reward.disagreement_bonus=0.05"),
        ("updater=rime", "updater.warm_updates=20", "query=branch", "teacher=skip", "agent.hybrid_ratio=0.5"),
    ],
    ids=lambda options: options[0].split("=")[1],
)
def test_options_compose(tmp_path: Path, options: tuple[str, ...]) -> None:
    fast = ("reward.embedding=16", "reward.max_updates=20") if "reward=reed" in options else ()
    surf = ("updater.steps_per_label=0.5", "updater.unlabelled_per_label=4") if "updater=surf" in options else ()
    summary = finish(tiny_loop(tmp_path / "run", *options, *fast, *surf))
    assert summary["complete"]
    assert summary["feedback/asked"] >= 10, "steps of fresh rollouts and branches are environment steps too"
    assert math.isfinite(summary["eval/return"])


def test_rime_wraps_another_updater(tmp_path: Path) -> None:
    inner = ("updater@updater.inner=surf", "updater.inner.crop=2", "updater.inner.steps_per_label=null")
    options = ("updater=rime", *inner, "updater.warm_updates=5", "updater.epochs=3", "updater.least_epochs=1")
    loop = tiny_loop(tmp_path / "run", *options, "total_steps=350")
    finish(loop)
    assert loop.parts.preferences.margin == 2, "the inner updater's margins are asked for"


RESUMED = {
    "surf": ("updater=surf", "updater.steps_per_label=0.5", "updater.unlabelled_per_label=4"),
    "mrn": ("updater=mrn", "updater.meta_every=30"),
    "rime": ("updater=rime", "updater.warm_updates=20", "updater.epochs=3"),
    "reed": ("reward=reed", "reward.embedding=16", "reward.max_updates=20"),
    "rune-qpa": ("reward.disagreement_bonus=0.1", "agent.hybrid_ratio=0.5", "query=near-policy"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    from pbrl.launch.build import build
    from pbrl.loop import Stopped

    finish(tiny_loop(tmp_path / "whole", *RESUMED[name]))
    loop = tiny_loop(tmp_path / "halves", *RESUMED[name])
    loop.stop = lambda: loop.step >= 330
    with pytest.raises(Stopped):
        loop.run()
    loop.close(False)
    cfg, choices = config(*TINY, f"resume={tmp_path / 'halves'}")
    finish(build(cfg, choices, []))
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("updater=oracle", "reward.disagreement_bonus=0.05"), "learns no reward"),
        (("reward.disagreement_bonus=0.05", "reward.members=1", "query=uniform"), "members of at least 2"),
        (("reward.members=1",), "query.score=disagreement"),
        (("query=branch", "env._target_=tests.test_methods.Stateless"), "branch_share"),
        (("updater=oracle", "import_preferences=some.npz"), "import_preferences"),
        (("agent.hybrid_ratio=2",), "hybrid_ratio"),
        (("updater=surf", "updater.crop=25"), "segment_length"),
    ],
)
def test_senseless_combinations_are_refused_before_anything_starts(
    tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        tiny_loop(tmp_path / "run", *options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
