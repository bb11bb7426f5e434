"""What bfloat16 does to the critics of trained agents: `python -m experiments.precision RUNS… [--out CSV]`.

For observations of one episode and several of the policy's actions in each, Q with its hidden layers' products in
bfloat16 (as `agent.precision=bf16` computes them) is compared with Q in float32. What matters to the actor is the error
beside the spread of Q over actions, which is small where all rewards have a large common level.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.curves import write
from pbrl.episodes import play
from pbrl.evaluate import load_run
from pbrl.launch.configuration import ConfigError
from pbrl.records.checkpoint import CheckpointError
from pbrl.reward import Layers

EVERY = 4  # environment steps between the observations used
ACTIONS = 32  # per observation


def over_actions(numbers: Tensor) -> float:
    """Standard deviation of [N, K] numbers around each row's mean."""
    return float((numbers - numbers.mean(1, keepdim=True)).square().mean().sqrt())


@torch.no_grad()
def measured(run: Path) -> dict[str, Any]:
    """Level of Q, its spread over actions, and that of bfloat16's error, for the newest checkpoint of a run."""
    agent, env = load_run(run)
    torch.manual_seed(0)  # SB3 draws actions from the global generator
    seen = play(env, lambda obs: agent.predict(obs)[0], seed=0).obs
    env.close()
    observations = torch.from_numpy(np.array(seen[::EVERY], np.float32)).repeat_interleave(ACTIONS, 0)
    actions, _ = agent.actor.action_log_prob(observations)
    inputs = torch.cat([observations, actions], dim=1)
    network: Any = agent.critic.q_networks[0]
    in_bf16 = Layers(*network, nn.Identity())
    in_bf16.bf16 = True
    exact, rounded = (values(inputs).reshape(-1, ACTIONS) for values in (network, in_bf16))
    spread, error = over_actions(exact), over_actions(rounded - exact)
    numbers = {"mean": float(exact.mean()), "spread": spread, "error": error, "share": error / spread}
    return {"run": run.name} | {name: round(number, 4) for name, number in numbers.items()}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.precision", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders with checkpoints")
    parser.add_argument("--out", type=Path, help="CSV")
    options = parser.parse_args(arguments)
    rows = []
    for run in options.runs:
        try:
            rows.append(row := measured(run))
        except (ConfigError, CheckpointError) as error:
            parser.error(str(error))
        print(
            "{run}: Q {mean:.1f}, over actions ± {spread:.3f}; error of bf16 ± {error:.3f} ({share:.0%})".format(**row)
        )
    if options.out:
        write(options.out, tuple(rows[0]), rows)


if __name__ == "__main__":
    main()
