"""What each kind of agent's networks costs beside the lean ones, and beside stock SB3's update of networks as large."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger

from experiments.benchmarks.timing import interleaved
from experiments.benchmarks.update import TRANSITIONS, Still, fill
from pbrl.agent.networks import PreferencePolicy
from pbrl.agent.sac import PreferenceSAC
from pbrl.launch.shipped import make

OBS, ACT, BATCH = 24, 6, 256
NORMS = {"normalise": True, "actor_layer_norm": True, "critic_layer_norm": True}
SIMBA = NORMS | {"blocks": 1, "net_arch": (128,), "weight_decay": 1e-2}
KINDS: dict[str, dict[str, Any]] = {
    "lean": {},
    "normalised, critics' LayerNorm": {"normalise": True, "critic_layer_norm": True},
    "normalised, LayerNorm": NORMS,
    "SimBa, two critics": SIMBA,
    "SimBa, one critic": SIMBA | {"critics": 1},
}
NETWORKS = ("actor_layer_norm", "critic_layer_norm", "blocks")


def ours(options: dict[str, Any], precision: str) -> PreferenceSAC:
    """An agent of this kind on random transitions, its update compiled."""
    made: dict[str, Any] = {"seed": 0, "compile": False, "buffer_size": TRANSITIONS, "precision": precision, **options}
    agent: PreferenceSAC = make("agent", "sac", env=Still(OBS, ACT), **made)
    assert agent._fast is not None
    agent._fast.compile(BATCH)
    return agent


def stock(options: dict[str, Any]) -> SAC:
    """SB3's own SAC and its own `train`, with the same networks and optimiser."""
    networks: dict[str, Any] = {name: options[name] for name in NETWORKS if name in options}
    networks |= {"net_arch": list(options.get("net_arch", (256, 256))), "n_critics": options.get("critics", 2)}
    if "weight_decay" in options:
        networks |= {"optimizer_class": torch.optim.AdamW, "optimizer_kwargs": {"weight_decay": 1e-2}}
    agent = SAC(PreferencePolicy, Still(OBS, ACT), buffer_size=TRANSITIONS, policy_kwargs=networks, seed=0)
    agent.set_logger(Logger(None, []))
    return agent


def run() -> list[dict[str, Any]]:
    """One row per kind: milliseconds of SB3's update and of ours, compiled; ratios of processor time; one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    agents: dict[str, SAC] = {}
    for kind, options in KINDS.items():
        agents[f"{kind}, stock"] = stock(options)
        for precision in ("fp32", "bf16"):
            agents[f"{kind}, {precision}"] = ours(options, precision)
    for agent in agents.values():
        fill(agent.replay_buffer, np.random.default_rng(0))
    times = interleaved({key: partial(agent.train, 1, BATCH) for key, agent in agents.items()})
    torch.set_num_threads(before)
    rows = []
    for kind in KINDS:
        took = {variant: times[f"{kind}, {variant}"] for variant in ("stock", "fp32", "bf16")}
        row: dict[str, Any] = {"kind": kind}
        row["parameters"] = sum(p.numel() for p in agents[f"{kind}, fp32"].policy.parameters())
        row |= {f"{variant}_ms": took[variant]["ms"] for variant in took}
        lean = times["lean, fp32"]["cpu_ms"]
        row["ratio_stock_to_fp32"] = took["stock"]["cpu_ms"] / took["fp32"]["cpu_ms"]
        row |= {f"ratio_{variant}_to_lean_fp32": took[variant]["cpu_ms"] / lean for variant in ("fp32", "bf16")}
        rows.append(row)
    return rows
