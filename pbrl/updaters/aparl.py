"""A-PARL (Chakraborty et al., ICLR 2024, Algorithm 1) on robots: fresh pairs, and an implicit term that is guarded.

Term 1, the cross-entropy on the answers, is PEBBLE's; with `implicit.estimator=off` so is the whole update. Half of its
pairs are fresh (`feedback.fresh_share`). Term 2, by which the reward accounts for the policy's answer to it, is
estimated on two disjoint halves of the rollouts, used only while they agree (`gate`) and up to `clip` times Term 1;
`gate=off clip=.inf` is the paper's raw update. SAC's updates between two sessions are the paper's K lower steps, its
temperature is the weight of the entropy bonus.
"""

from __future__ import annotations

from typing import Any

from pbrl.fitting import Fitting
from pbrl.interfaces import Updater
from pbrl.preferences import Preferences
from pbrl.reward import RewardEnsemble
from pbrl.second_term.estimators import check_estimator, estimate
from pbrl.second_term.fresh import check_share, training_rows
from pbrl.second_term.gate import Gate, as_gate, as_limit
from pbrl.second_term.guard import Estimate, Safeguard
from pbrl.second_term.implicit import Implicit
from pbrl.second_term.upper import Regulariser, Utility, check_upper, direct
from pbrl.types import Session


class APARL(Updater):
    """Cross-entropy on fresh pairs, and the implicit term behind a gate.

    The implicit term's weights are computed once per update, with the policy and the ensemble's mean reward as they are
    then; its gradient is taken anew at every optimiser step. A reward network with kinks (leaky_relu) is fine: no
    pathwise mixed derivative is taken here.

    Args:
        fit: Term 1, how the answers are fitted.
        earlier_share: see `training_rows`; null: all pairs, as PEBBLE.
        upper: `preference` (the paper's) or `win_rate`; see `pbrl.second_term.upper`.
        utility, regulariser: added to the upper objective: E[U_phi(τ)] over fresh trajectories, and Z(phi).
        implicit: how Term 2 is estimated.
        gate: when it is used; off: always.
        clip: at most this multiple of Term 1's norm, for each member at each step; .inf: no limit.

    Raises:
        ValueError: for an unknown upper objective or a number out of range.
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
        implicit: Implicit,
        gate: Gate | str | bool,
        clip: float | str,
    ) -> None:
        check_upper(upper)
        check_share(earlier_share)
        self.fit, self.implicit = fit, implicit
        self.earlier_share, self.upper, self.utility, self.regulariser = earlier_share, upper, utility, regulariser
        check_estimator(self.implicit, upper, utility)
        self.safeguard = Safeguard(as_gate(gate), as_limit(clip))

    def own_steps(self, pairs: int, length: int) -> int:
        """Those of the continuations that the covariance estimator asks for."""
        return 2 * pairs * self.implicit.branches * length if self.implicit.estimator == "covariance" else 0

    def update(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> dict[str, float]:
        """Train every member; returns `train_epochs`' metrics and what became of Term 2 (`aparl/…`)."""
        rows = training_rows(preferences.new, self.earlier_share, session.rng)
        new = bool(preferences.new.any())  # else the gate would count one session's estimate twice
        off = self.implicit.estimator == "off" or not new
        metrics, found = self.safeguard.train(
            reward,
            None if off else self.second_term(reward, preferences, session),
            direct(self.utility, self.regulariser, reward, session.fresh(), self.implicit.trajectory_length),
            lambda extra: self.fit(reward, preferences, session.rng, rows, extra),
        )
        return metrics | {f"aparl/{name}": value for name, value in found.items()}

    def second_term(self, reward: RewardEnsemble, preferences: Preferences, session: Session) -> Estimate:
        """This session's estimate of Term 2, before it is judged."""
        return estimate(self.implicit, self.upper, self.utility, reward, preferences, session)

    # ------------------------------------------------------------------------------------------------ exact resume

    def state_dict(self) -> dict[str, Any]:
        return self.safeguard.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.safeguard.load_state_dict(state)
