"""The learned reward: an ensemble of small networks r_phi(s, a) or r_phi(s), with one optimiser (PEBBLE, B-Pref)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor, nn

from pbrl.checks import check
from pbrl.optimizers import restore_optimizer
from pbrl.pay import Pay
from pbrl.standardise import Standardise
from pbrl.types import Segments, Session

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True),  # in place: its input is a linear layer's own output
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
OUTPUTS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "linear": nn.Identity}
SLOPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of an output, by its value
    "tanh": lambda r: 1 - r**2,
    "sigmoid": lambda r: r * (1 - r),
    "linear": np.ones_like,
}
NEARLY_SATURATED = 0.1  # slope of an output that training hardly moves: a tanh's beyond ±0.95
BLOCK = 1024  # rows of one forward pass without gradients: activations stay in the second-level cache
PRECISIONS = ("fp32", "bf16")


class FromZero(nn.Linear):
    """A linear layer whose weights begin at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


ROWWISE: dict[type[nn.Module], Callable[[Any, np.ndarray], np.ndarray]] = {  # a layer on one row, float32 [n]
    nn.Linear: lambda layer, x: layer.weight.detach().numpy() @ x + layer.bias.detach().numpy(),
    FromZero: lambda layer, x: ROWWISE[nn.Linear](layer, x),
    nn.LeakyReLU: lambda layer, x: np.maximum(x, np.float32(layer.negative_slope) * x),
    nn.ReLU: lambda layer, x: np.maximum(x, np.float32(0)),
    nn.SiLU: lambda layer, x: x * expit(x),
    nn.Tanh: lambda layer, x: np.tanh(x),
    nn.Sigmoid: lambda layer, x: expit(x),
    nn.Identity: lambda layer, x: x,
}


class Layers(nn.Sequential):
    """A sequence that calls its layers' `forward` and none of their hooks, and knows a quick way for one row.

    With `bf16` the products of all but the last linear layer are computed in bfloat16; weights stay as they are.
    """

    bf16 = False

    def forward(self, inputs: Tensor) -> Tensor:
        layers: list[Any] = list(self)
        *hidden, last, output = layers
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            for layer in hidden:
                inputs = layer.forward(inputs)
        return output.forward(last.forward(inputs.to(last.weight.dtype)))

    def row(self, x: np.ndarray) -> np.ndarray:
        """The same for one row in full precision, float32 [n] to [m], without torch's calls: a third of the time."""
        for layer in self:
            x = ROWWISE[type(layer)](layer, x)
        return x


class Skip(nn.Module):
    """Layers and, beside them, a linear function of their inputs; an output of the sum of both."""

    def __init__(self, layers: Layers, skip: nn.Linear, output: nn.Module) -> None:
        super().__init__()
        self.layers, self.skip, self.output = layers, skip, output

    def forward(self, inputs: Tensor) -> Tensor:
        rewards: Tensor = self.output(self.layers(inputs) + self.skip(inputs))
        return rewards

    def row(self, x: np.ndarray) -> np.ndarray:
        """As `Layers.row`."""
        return ROWWISE[type(self.output)](self.output, self.layers.row(x) + ROWWISE[nn.Linear](self.skip, x))


class RewardEnsemble(nn.Module):
    """M independent reward networks over the concatenated observation and action, or over the observation alone.

    Args:
        obs_dim, act_dim: sizes of one observation and one action.
        members: M ≥ 1.
        hidden: widths of the hidden layers.
        skip: add a linear function of the inputs to what the hidden layers say, which begins at zero: a member is
            linear at first and bends where answers ask for it. Wants a hidden layer.
        activation: one of leaky_relu, relu, silu, tanh. Smooth ones (silu, tanh) where a mixed second derivative is
            taken pathwise: kinks make it wrong.
        output: tanh (rewards in (−1, 1), as published), sigmoid or linear.
        learning_rate: of the one Adam over all members.
        seed: of the initial weights.
        precision: fp32, or bf16: hidden layers' products in bfloat16, in training and for more than one row.
        normalise: standardise observations and actions by their mean and deviation over the replay when the first
            answers are fitted, and by the same from then on (see `pretrain`).
        sees_actions: whether its inputs are observation and action, r(s, a); else the observation alone, r(s).
        pessimism, pessimism_decay, lowest_of, disagreement_bonus, disagreement_decay, convexity: see `pbrl.pay.Pay`.

    Raises:
        ValueError: for fewer than one member or an unknown activation, output or precision.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        members: int = 3,
        hidden: Sequence[int] = (256, 256, 256),
        activation: str = "leaky_relu",
        output: str = "tanh",
        learning_rate: float = 3e-4,
        seed: int = 0,
        precision: str = "fp32",
        normalise: bool = False,
        sees_actions: bool = True,
        pessimism: float = 0.0,
        pessimism_decay: float = 0.0,
        lowest_of: int = 1,
        disagreement_bonus: float = 0.0,
        disagreement_decay: float = 1e-5,
        convexity: float = 0.0,
        skip: bool = False,
    ) -> None:
        super().__init__()
        check(
            "reward",
            members=(members, members >= max(lowest_of, 1), f"at least {max(lowest_of, 1)}"),
            hidden=(list(hidden), min(hidden, default=1) >= 1, "widths of at least 1"),
            skip=(skip, not skip or len(hidden) > 0, "false where there is no hidden layer"),
            learning_rate=(learning_rate, learning_rate > 0, "a positive number"),
            activation=(activation, activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
            output=(output, output in OUTPUTS, f"one of {', '.join(OUTPUTS)}"),
            precision=(precision, precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        )
        self.slope, self.sees_actions = SLOPES[output], sees_actions
        self.pay = Pay(pessimism, pessimism_decay, lowest_of, disagreement_bonus, disagreement_decay, convexity)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            size = obs_dim + act_dim if sees_actions else obs_dim
            self.members = nn.ModuleList(
                self._build(size, hidden, ACTIVATIONS[activation], OUTPUTS[output], skip) for _ in range(members)
            )
        for layers in self.modules():
            if isinstance(layers, Layers):
                layers.bf16 = precision == "bf16"
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        self.obs_scale = Standardise(obs_dim, normalise)
        self.action_scale = Standardise(act_dim, normalise and sees_actions)

    @staticmethod
    def _build(
        size: int,
        hidden: Sequence[int],
        activation: Callable[[], nn.Module],
        output: Callable[[], nn.Module],
        skip: bool,
    ) -> Layers | Skip:
        layers: list[nn.Module] = []
        widths = [size, *hidden]
        for before, width in itertools.pairwise(widths):
            layers += [nn.Linear(before, width), activation()]
        if skip:
            return Skip(Layers(*layers, FromZero(widths[-1], 1), nn.Identity()), nn.Linear(size, 1), output())
        return Layers(*layers, nn.Linear(widths[-1], 1), output())

    @property
    def device(self) -> torch.device:
        return next(self.members[0].parameters()).device

    def member(self, index: int, obs: Tensor, actions: Tensor) -> Tensor:
        """Rewards by one member: float32 [...] for obs [..., obs_dim] and actions [..., act_dim]."""
        return self.members[index](self._inputs(obs, actions)).squeeze(-1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Rewards by every member: float32 [M, ...]."""
        inputs = self._inputs(obs, actions)
        return torch.cat([member(inputs) for member in self.members], dim=-1).movedim(-1, 0)

    def mean(self, obs: Tensor, actions: Tensor) -> Tensor:
        """The ensemble's reward, float32 [...]."""
        return self.forward(obs, actions).mean(dim=0)

    @torch.no_grad()
    def predict(self, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Every member's reward for many rows, in cache-sized blocks: float32 [M, N] for obs [N, ·], actions [N, ·]."""
        device = self.device
        if len(obs) == 1 and device.type == "cpu":
            x = self._row(obs[0], actions[0])
            return np.stack([member.row(x) for member in self.members])  # type: ignore[operator]
        blocks = [
            self(torch.from_numpy(some).to(device), torch.from_numpy(acts).to(device)).cpu()
            for some, acts in ((obs[i : i + BLOCK], actions[i : i + BLOCK]) for i in range(0, max(len(obs), 1), BLOCK))
        ]
        return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)).numpy()

    def _inputs(self, obs: Tensor, actions: Tensor) -> Tensor:
        """The members' inputs: float32 [..., obs_dim + act_dim], or [..., obs_dim] if they do not see actions."""
        if not self.sees_actions:
            return self.obs_scale(obs)
        return torch.cat([self.obs_scale(obs), self.action_scale(actions)], dim=-1)

    def _row(self, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The members' inputs at one step."""
        if not self.sees_actions:
            return self.obs_scale.row(obs)
        return np.concatenate([self.obs_scale.row(obs), self.action_scale.row(actions)])

    @torch.no_grad()
    def returns(self, segments: Segments) -> Tensor:
        """Undiscounted learned return of each segment by each member: float32 [M, B]."""
        size, length, _ = segments.obs.shape
        rewards = self.predict(segments.obs.flatten(0, 1).numpy(), segments.actions.flatten(0, 1).numpy())
        return torch.from_numpy(rewards).unflatten(1, (size, length)).sum(dim=2)

    def preference_logits(self, first: Segments, second: Segments) -> Tensor:
        """Each member's log-odds that first is preferred, float32 [M, B], without gradients."""
        return self.returns(first) - self.returns(second)

    def pretrain(self, session: Session) -> dict[str, float]:
        """What a reward learns without answers, before each update; returns metrics.

        Here: what its inputs' mean and deviation are, if it standardises them; before the first update only. Moved
        later they would change every reward that was fitted to the answers, without any answer asking for it.
        """
        if self.obs_scale.on and not self.obs_scale.known:
            for scale, moments in zip((self.obs_scale, self.action_scale), session.moments(), strict=True):
                if scale.on:
                    scale.set(*moments)
        return {}

    def renew_saturated(self, segments: Segments, rng: np.random.Generator) -> int:
        """Give new weights to every member whose output is nearly saturated at one end at ¾ of these steps.

        Where the slope is below `NEARLY_SATURATED` answers hardly move a member any more, so it would stay like that,
        unable to tell the policy's steps apart; with new weights, fitted to the same answers, it can. A member that is
        saturated everywhere also disagrees with the others where they are sure: rules that ask where members disagree
        then ask what is known.

        Args:
            segments: of the newest answers, so that it is seen where questions are asked now.
            rng: used only if there is such a member.

        Returns:
            how many there were.
        """
        rewards = self.predict(segments.obs.flatten(0, 1).numpy(), segments.actions.flatten(0, 1).numpy())
        low, high = np.quantile(rewards, (0.25, 0.75), axis=1)
        found = self.slope(np.stack([low, (low + high) / 2, high])).max(axis=0) < NEARLY_SATURATED  # at the same end
        for member in np.flatnonzero(found):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(rng.integers(2**31)))
                for layer in self.members[int(member)].modules():
                    if isinstance(layer, nn.Linear):
                        layer.reset_parameters()
            for parameter in self.members[int(member)].parameters():
                self.optimizer.state.pop(parameter, None)
        return int(found.sum())

    def state(self) -> dict[str, Any]:
        """Weights and optimiser, for a checkpoint."""
        return {"weights": self.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.load_state_dict(state["weights"])
        restore_optimizer(self.optimizer, state["optimizer"])
