"""What each kind of agent's networks costs beside the lean ones, and beside stock SB3's update of networks as large."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger

from experiments.benchmarks.timing import interleaved
from experiments.benchmarks.update import TRANSITIONS, Still, fill
from pbrl.agent.networks import PreferencePolicy
from pbrl.agent.sac import PreferenceSAC, make_agent

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
    agent = make_agent(Still(OBS, ACT), **({"seed": 0, "buffer_size": TRANSITIONS, "precision": precision} | options))
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
    """One row per kind: milliseconds of SB3's update and of ours, and ratios, one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    agents: dict[tuple[str, str], SAC] = {}
    for kind, options in KINDS.items():
        agents[kind, "stock"] = stock(options)
        agents |= {(kind, precision): ours(options, precision) for precision in ("fp32", "bf16")}
    for agent in agents.values():
        fill(agent.replay_buffer, np.random.default_rng(0))
    variants: dict[Any, Any] = {key: (lambda agent=agent: agent.train(1, BATCH)) for key, agent in agents.items()}
    times = interleaved(variants)
    torch.set_num_threads(before)
    lean = times["lean", "fp32"]
    return [
        {
            "kind": kind,
            "parameters": sum(p.numel() for p in agents[kind, "fp32"].policy.parameters()),
            **{f"{variant}_ms": times[kind, variant]["ms"] for variant in ("stock", "fp32", "bf16")},
            "ratio_cpu_ms_stock_to_fp32": times[kind, "stock"]["cpu_ms"] / times[kind, "fp32"]["cpu_ms"],
            "ratio_cpu_ms_to_lean_fp32": times[kind, "fp32"]["cpu_ms"] / lean["cpu_ms"],
            "ratio_cpu_ms_of_bf16_to_lean_fp32": times[kind, "bf16"]["cpu_ms"] / lean["cpu_ms"],
        }
        for kind in KINDS
    ]
