"""The first-order penalty method (Gaur et al., "On the Sample Complexity Bounds of Bilevel Reinforcement Learning",
NeurIPS 2025, Algorithm 1) on robots: fresh pairs, and a second actor in place of second derivatives, guarded.

Term 1 is PEBBLE's cross-entropy; with `sigma=0` so is the whole update. Term 2 is the difference in discounted rewards
between rollouts of a policy that also climbs G and the present one, over sigma. SAC plays the paper's first policy: its
actor is theta, its critic gives the actor gradient of V (Algorithm 2's part), its temperature weighs the entropy bonus.
"""

from __future__ import annotations

from typing import Any

from pbrl.bilevel.params import combine, norm
from pbrl.fitting import Fitting
from pbrl.interfaces import Updater
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.second_term.fresh import LABELLED_SHARE, Trajectories, check_share, cut, divide, training_rows
from pbrl.second_term.gate import Gate, as_gate, as_limit
from pbrl.second_term.guard import Estimate, Safeguard, WeightedRows
from pbrl.second_term.penalty import Walk, bracket, climb, copied, divergence_from, draw
from pbrl.second_term.upper import Regulariser, ScoreRows, Utility, check_upper, direct, pair_scores, utility_scores
from pbrl.types import Params, Session

REFERENCES = ("none", "initial", "pretrained")


class Penalty(Updater):
    """Cross-entropy on fresh pairs, and the penalty bracket behind a gate.

    Args:
        fit: Term 1, how the answers are fitted.
        earlier_share: see `training_rows`; null: all pairs, as PEBBLE.
        upper: `preference` (the paper's) or `win_rate`; see `pbrl.second_term.upper`.
        utility, regulariser: added to the upper objective: E[U_phi(τ)] over fresh trajectories, and Z(phi).
        sigma: penalty strength at the first session, ≥ 0; 0: no second actor. Small: less bias, more noise.
        sigma_decay: factor per session with new answers, in (0, 1].
        walk: how the second actor is found and rolled out; its steps are environment steps.
        reference: policy from which a KL is taken off the second actor's objective: none, initial (before the first
            step) or pretrained (at the first session). SAC's own objective has the entropy bonus only.
        reference_weight: of that KL, reward units per nat.
        gate: when Term 2 is used; off: always.
        clip: at most this multiple of Term 1's norm, for each member at each step; .inf: no limit.

    Raises:
        ValueError: for an unknown name or a number out of range.
    """

    pairs = "fresh"

    def __init__(
        self,
        *,
        fit: Fitting,
        earlier_share: float | None,
        upper: str,
        utility: Utility | None,
        regulariser: Regulariser | None,
        sigma: float,
        sigma_decay: float,
        walk: Walk,
        reference: str,
        reference_weight: float,
        gate: Gate | str | bool,
        clip: float | str,
    ) -> None:
        check_upper(upper)
        check_share(earlier_share)
        if reference not in REFERENCES:
            raise ValueError(f"updater.reference={reference}; expected one of {', '.join(REFERENCES)}")
        if sigma < 0 or not 0 < sigma_decay <= 1 or reference_weight < 0:
            raise ValueError(
                f"updater.sigma={sigma}, sigma_decay={sigma_decay}, reference_weight={reference_weight}; "
                "expected ≥ 0, in (0, 1] and ≥ 0"
            )
        self.fit, self.walk = fit, walk
        self.earlier_share, self.upper, self.utility, self.regulariser = earlier_share, upper, utility, regulariser
        self.first_sigma, self.sigma_decay = sigma, sigma_decay
        self.reference, self.reference_weight = reference, reference_weight
        self.safeguard = Safeguard(as_gate(gate), as_limit(clip))
        self.sessions = 0
        self.reference_policy: Params | None = None

    @property
    def sigma(self) -> float:
        """Penalty strength of the session to come."""
        return self.first_sigma * self.sigma_decay**self.sessions

    def start(self, session: Session) -> None:
        """Before the first step of a run: keep the initial policy if it is the reference."""
        if self.reference == "initial":
            self.reference_policy = copied(session.policy.parameters())

    def own_steps(self, pairs: int, length: int) -> int:
        """Those of the second actors, which need two pairs."""
        return self.walk.rollout_steps if self.first_sigma and pairs >= 2 else 0

    def update(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        """Train every member; returns `train_epochs`' metrics and what became of Term 2 (`penalty/…`)."""
        if self.reference == "pretrained" and self.reference_policy is None:
            self.reference_policy = copied(session.policy.parameters())
        rows, new = training_rows(preferences.new, self.earlier_share, session.rng), bool(preferences.new.any())
        metrics, found = self.safeguard.train(
            reward,
            self.second_term(reward, preferences, session) if self.first_sigma and new else None,
            direct(self.utility, self.regulariser, reward, session.fresh(), self.walk.trajectory_length),
            lambda extra: self.fit(reward, preferences, session.rng, rows, extra),
        )
        self.sessions += new  # rime shows new pairs in a session's first epoch alone
        return metrics | {f"penalty/{name}": value for name, value in found.items()}

    # ------------------------------------------------------------------------------------------------ Term 2

    def second_term(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> Estimate:
        """This session's estimate of Term 2, before it is judged."""
        episodes = session.fresh()
        if len(preferences.current) < 2 or not episodes:
            return Estimate(None)
        rolls = self.walk.twin and self.utility is None  # its own rollouts are all it needs
        share = 1.0 if rolls else LABELLED_SHARE
        fresh = divide(preferences, episodes, self.walk.trajectory_length, share)
        if not fresh.enough(pieces=not rolls):
            return Estimate(None)
        scores = [pair_scores(self.upper, reward, fresh.pairs)]
        if self.utility is not None:
            scores.append(utility_scores(self.utility, reward, fresh.pieces))
        together, policy = ScoreRows.cat(scores).to(reward.device), session.policy
        halves, lengths = [], []
        for half in (0, 1):
            try:
                walked = self._walk(together, half, session)
            except FloatingPointError:  # counted as a fallback to Term 1
                return Estimate(None)
            own = fresh.pieces.half(half)
            rolled = self._roll(walked, half, session) if self.walk.twin else [own, *self._roll(walked, half, session)]
            present, penalised = (part.to(reward.device) for part in rolled)
            halves.append(bracket(present, penalised, half, policy.gamma, self.sigma))
            lengths.append(norm(combine(walked[-1], policy.parameters(), -1.0)))
        metrics = {"sigma": self.sigma, "walk_length": sum(lengths) / 2, "pairs": float(len(fresh.pairs))}
        return Estimate(WeightedRows.cat(halves), metrics=metrics)

    def _walk(self, scores: ScoreRows, half: int, session: Session) -> list[Params]:
        """The twin's parameters, if there is one, and theta_sigma's."""
        sigma, policy, apart = self.sigma, session.policy, None
        if self.reference_policy is not None:
            apart = divergence_from(self.reference_policy, policy, self.reference_weight)
        draws = draw(self.walk, session, scores.raw_actions.shape[1], scores.obs.device)
        theta_sigma = climb(
            self.walk, policy, draws, lambda theta: sigma * scores.ascent(policy, theta, scores.half(half)), apart
        )
        return [climb(self.walk, policy, draws, None, apart), theta_sigma] if self.walk.twin else [theta_sigma]

    def _roll(self, policies: list[Params], half: int, session: Session) -> list[Trajectories]:
        """Each policy's trajectories. The second half rolls out in reverse order: where in an episode a policy's turn
        comes then has opposite signs in the two estimates, and cannot pass for agreement."""
        order = list(range(len(policies)))[:: 1 if half == 0 else -1]
        steps = self.walk.rollout_steps // (2 * len(policies))
        rolled = {i: cut(session.rollout(policies[i], steps), self.walk.trajectory_length) for i in order}
        return [rolled[i] for i in range(len(policies))]

    # ------------------------------------------------------------------------------------------------ exact resume

    def state_dict(self) -> dict[str, Any]:
        return {"guard": self.safeguard.state_dict(), "sessions": self.sessions, "reference": self.reference_policy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.safeguard.load_state_dict(state["guard"])
        self.sessions, self.reference_policy = state["sessions"], state["reference"]
