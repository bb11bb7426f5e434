"""The agent as Stable-Baselines3's own SAC."""

from __future__ import annotations

from typing import Any

from stable_baselines3 import SAC

from pbrl.agent.sac import PreferenceSAC


def stock_sac(agent: PreferenceSAC, env: Any) -> SAC:
    """A SAC of Stable-Baselines3 with the agent's networks: the same mean actions; its noise may be scaled otherwise.

    Where the policy holds what SB3's does not (standardised observations), it has this project's policy class, and
    whoever loads its zip needs pbrl.
    """
    own, options = agent.policy.state_dict(), dict(agent.policy_kwargs)
    common: dict[str, Any] = {"buffer_size": 1, "gamma": agent.gamma, "tau": agent.tau, "device": "cpu"}
    model = SAC("MlpPolicy", env, agent.learning_rate, policy_kwargs={"net_arch": options["net_arch"]}, **common)
    if set(model.policy.state_dict()) != set(own):
        model = SAC(type(agent.policy), env, agent.learning_rate, policy_kwargs=options, **common)
    model.policy.load_state_dict(own)
    model.num_timesteps = agent.num_timesteps
    return model
