"""Everything in a run that changes, into a checkpoint and back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from pbrl.preferences import Preferences
from pbrl.records.checkpoint import Loaded, global_generators, restore_global_generators, save_checkpoint
from pbrl.records.wire import pack_query, unpack_query
from pbrl.schedule import Due

if TYPE_CHECKING:
    from pbrl.loop import Loop


def save(loop: Loop) -> None:
    """Write a checkpoint from which `restore` continues bit for bit."""
    parts, agent = loop.parts, loop.agent
    replay = agent.replay_buffer
    run = {
        "step": loop.step,
        "due": vars(loop.due),
        "sessions": loop.sessions,
        "pretrained": loop.pretrained,
        "last": loop.last,
        "rollouts": parts.rollouts.state(),
        "entropy": loop.entropy.state(),
        "fresh": [loop.session.fresh_from, loop.session.fresh_to, loop.session.fresh_asked],
        "rngs": [rng.bit_generator.state for rng in loop.rngs()],
        "teacher": parts.teacher.state_dict() if hasattr(parts.teacher, "state_dict") else None,
        "journal": parts.journal.position,
        "metrics_bytes": parts.loggers.local.sync(),
        "seconds": loop.seconds_before + time.monotonic() - loop.started,
        "replay": [replay.pos, replay.full],
    }
    state = {"agent": agent.state(), "reward": parts.reward.state(), "generators": global_generators()}
    if hasattr(parts.updater, "state_dict"):
        state["updater"] = parts.updater.state_dict()
    arrays = {f"preferences/{key}": value for key, value in parts.preferences.state().items()}
    arrays["replay_rewards"] = replay.rewards[: replay.size(), 0]
    arrays |= {f"pending/{key}": value for key, value in pack_query(loop.pending).items()}
    total = parts.rollouts.total
    save_checkpoint(loop.run_dir, loop.step, run, state, arrays, [(log, total) for log in loop.step_logs])
    if len(parts.preferences):
        parts.preferences.save(loop.run_dir / "preferences.npz")


def restore(loop: Loop, loaded: Loaded) -> None:
    """Put everything back where `save` found it."""
    parts, agent = loop.parts, loop.agent
    run, replay = loaded.run, agent.replay_buffer
    parts.rollouts.load_state(run["rollouts"])
    if not agent.load_state(loaded.state["agent"]):
        parts.rollouts.interrupt()
        print("this simulator cannot restore its state: its episode starts anew")
    replay.pos, replay.full = run["replay"]
    replay.rewards[: replay.size(), 0] = loaded.arrays["replay_rewards"]
    parts.reward.load_state(loaded.state["reward"])
    if hasattr(parts.updater, "load_state_dict"):
        parts.updater.load_state_dict(loaded.state["updater"])
    parts.preferences = Preferences.from_state(_part(loaded.arrays, "preferences/"))
    loop.pending = unpack_query(_part(loaded.arrays, "pending/"))
    loop.due, loop.sessions, loop.pretrained = Due(**run["due"]), run["sessions"], run["pretrained"]
    loop.last, loop.seconds_before = run["last"], run["seconds"]
    loop.entropy.load_state(run["entropy"])
    loop.session.fresh_from, loop.session.fresh_to, loop.session.fresh_asked = run["fresh"]
    for rng, rng_state in zip(loop.rngs(), run["rngs"], strict=True):
        rng.bit_generator.state = rng_state
    if run["teacher"] is not None and hasattr(parts.teacher, "load_state_dict"):
        parts.teacher.load_state_dict(run["teacher"])
    restore_global_generators(loaded.state["generators"])
    parts.journal.position = run["journal"]
    parts.loggers.local.truncate(run["metrics_bytes"])


def _part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
