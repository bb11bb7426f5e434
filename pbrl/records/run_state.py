"""Everything in a run that changes, into a checkpoint and back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pbrl.agent.exploration import StateEntropy
from pbrl.asking import state_of
from pbrl.files import printable
from pbrl.parts import Parts
from pbrl.preferences import Preferences
from pbrl.records.checkpoint import Loaded, StepLog, global_generators, restore_global_generators, save_checkpoint
from pbrl.records.diary import Diary
from pbrl.records.wire import pack_query, unpack_query
from pbrl.rollouts import Rollouts
from pbrl.schedule import NEVER, Due
from pbrl.types import Query, Segments


class Fresh(Protocol):
    """Where this session's fresh rollouts lie; see `pbrl.session.AgentSession`."""

    fresh_from: int
    fresh_to: int


class Open(Protocol):
    """The questions that have no answer yet; see `pbrl.dialogue.Dialogue`."""

    pending: Query | None
    outstanding: Query | None


class Running(Protocol):
    """A run in progress: the loop, as far as it is stored."""

    parts: Parts
    run_dir: Path
    due: Due
    sessions: int
    pretrained: bool
    rngs: list[np.random.Generator]  # the loop's own, in a fixed order
    step_logs: list[StepLog]

    @property
    def diary(self) -> Diary: ...
    @property
    def entropy(self) -> StateEntropy: ...
    @property
    def session(self) -> Fresh: ...
    @property
    def dialogue(self) -> Open: ...


def save(loop: Running) -> None:
    """Write a checkpoint from which `restore` continues bit for bit."""
    parts, agent = loop.parts, loop.parts.agent
    replay = agent.replay_buffer
    run = {
        "step": agent.num_timesteps,
        "due": vars(loop.due),
        "sessions": loop.sessions,
        "pretrained": loop.pretrained,
        "last": loop.diary.last,
        "rollouts": parts.rollouts.state(),
        "entropy": loop.entropy.state(),
        "fresh": [loop.session.fresh_from, loop.session.fresh_to],
        "rngs": [rng.bit_generator.state for rng in loop.rngs],
        "teacher": state_of(parts.teacher),
        "journal": parts.journal.position,
        "metrics_bytes": parts.loggers.local.sync(),
        "seconds": loop.diary.seconds,
        "replay": [replay.pos, replay.full],
    }
    state = {
        "agent": agent.state(),
        "reward": parts.reward.state(),
        "updater": parts.updater.state_dict(),
        "generators": global_generators(),
    }
    arrays = {f"preferences/{key}": value for key, value in parts.preferences.state().items()}
    arrays["replay_rewards"] = replay.rewards[: replay.size(), 0]
    if replay.deviations is not None:
        arrays["replay_deviations"] = replay.deviations[: replay.size(), 0]
    arrays |= {f"pending/{key}": value for key, value in pack_query(loop.dialogue.pending).items()}
    arrays |= {f"outstanding/{key}": value for key, value in pack_query(loop.dialogue.outstanding).items()}
    total = parts.rollouts.total
    save_checkpoint(loop.run_dir, agent.num_timesteps, run, state, arrays, [(log, total) for log in loop.step_logs])
    if len(parts.preferences):
        parts.preferences.save(loop.run_dir / "preferences.npz")


def restore(loop: Running, loaded: Loaded) -> None:
    """Put everything back where `save` found it."""
    parts, agent = loop.parts, loop.parts.agent
    run, replay = loaded.run, agent.replay_buffer
    _check(run, replay.buffer_size, [log.written for log in loop.step_logs])
    parts.rollouts.load_state(run["rollouts"])
    if not agent.load_state(loaded.state["agent"]):
        parts.rollouts.lose()
        print("this simulator cannot restore its state: its episode starts anew")
    replay.pos, replay.full = run["replay"]
    replay.rewards[: replay.size(), 0] = loaded.arrays["replay_rewards"]
    parts.reward.load_state(loaded.state["reward"])
    if replay.deviations is not None and "replay_deviations" in loaded.arrays:
        replay.deviations[: replay.size(), 0] = loaded.arrays["replay_deviations"]
    elif replay.deviations is not None:  # before they were kept: what was paid at the last session's weight
        replay.relabel(lambda obs, actions: parts.reward.pay.apart(parts.reward.predict(obs, actions)))
    if "updater" in loaded.state:  # before version 0.2 not for updaters that remember nothing
        parts.updater.load_state_dict(loaded.state["updater"])
    parts.preferences = Preferences.from_state(_part(loaded.arrays, "preferences/"))
    loop.dialogue.pending = unpack_query(_part(loaded.arrays, "pending/"))
    loop.dialogue.outstanding = unpack_query(_part(loaded.arrays, "outstanding/"))
    loop.due, loop.sessions, loop.pretrained = Due(**run["due"]), run["sessions"], run["pretrained"]
    loop.diary.continues(run["last"], run["seconds"])
    loop.entropy.load_state(run["entropy"])
    loop.session.fresh_from, loop.session.fresh_to, *fresh_asked = run["fresh"]
    if loop.dialogue.pending is not None and fresh_asked:  # before version 0.2
        loop.dialogue.pending = _found_again(loop.dialogue.pending, parts.rollouts, *fresh_asked)
    for rng, rng_state in zip(loop.rngs, run["rngs"], strict=True):
        rng.bit_generator.state = rng_state
    if run["teacher"] is not None:
        parts.teacher.load_state_dict(run["teacher"])
    restore_global_generators(loaded.state["generators"])
    parts.journal.position = run["journal"]
    parts.loggers.local.truncate(run["metrics_bytes"])


def _check(run: dict[str, Any], replay_size: int, written: list[int]) -> None:
    """Refuse what no run can have written, rather than fail on it hours later.

    Raises:
        ValueError: naming the number of run.json.
    """
    rollouts, (pos, full) = run["rollouts"], run["replay"]
    counts = {name: run[name] for name in ("sessions", "journal", "metrics_bytes")} | run["due"]
    counts |= {name: rollouts[name] for name in ("total", "episodes", "running_length")} | {"replay": pos}
    counts |= {f"fresh[{index}]": value for index, value in enumerate(run["fresh"])}
    for name, value in counts.items():
        if type(value) is not int or not -1 <= value <= NEVER:  # −1: never yet
            raise ValueError(f"run.json: {name} is {printable(value)}; expected a count")
    for name in ("asides", "others"):  # not before version 0.2
        found, last = rollouts.get(name, []), rollouts["episodes"]
        if not isinstance(found, list) or any(type(x) is not int or not 0 <= x <= last for x in found):
            raise ValueError(f"run.json: {name} is no list of episodes")
    if any(rows != rollouts["total"] for rows in written):
        raise ValueError(f"run.json counts {rollouts['total']} steps, the manifest {written}")
    numbers = {"seconds": run["seconds"], "running_return": rollouts["running_return"]}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"run.json: {name} is {printable(value)}; expected a number")
    if pos >= replay_size or type(full) is not bool or type(run["pretrained"]) is not bool:
        raise ValueError(f"run.json: replay is {printable(run['replay'])}, pretrained {printable(run['pretrained'])}")
    if not isinstance(run["last"], dict) or any(not isinstance(x, int | float | None) for x in run["last"].values()):
        raise ValueError("run.json: last is no table of numbers")


def _part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def _found_again(query: Query, rollouts: Rollouts, fresh: int) -> Query:
    """A pending query of before version 0.2, which knew neither its steps nor that its last `fresh` pairs are fresh."""

    def located(segments: Segments) -> Segments:
        assert segments.raw_actions is not None
        kept = np.arange(max(rollouts.total - rollouts.capacity, 0), rollouts.total)
        rows = np.concatenate([rollouts.obs, rollouts.raw_actions], 1)[kept % rollouts.capacity]
        wanted = torch.cat([segments.obs[:, 0], segments.raw_actions[:, 0]], 1).numpy()
        hits = [np.flatnonzero((rows == row).all(1)) for row in wanted]
        return replace(segments, step=torch.tensor([int(kept[hit[0]]) if len(hit) else -1 for hit in hits]))

    return replace(
        query,
        first=located(query.first),
        second=located(query.second),
        fresh=torch.arange(len(query)) >= len(query) - fresh,
    )
