"""`python -m pbrl.evaluate RUN`: reload a run's agent, print returns and success over fresh seeds, make a video."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate

from pbrl.agent.sac import PreferenceSAC
from pbrl.episodes import play
from pbrl.interfaces import as_environment
from pbrl.launch.command import look_here
from pbrl.launch.configuration import ConfigError, check_arguments
from pbrl.launch.stored import read_config
from pbrl.records.checkpoint import CheckpointError, load_latest
from pbrl.records.evaluation import act, episode, rank_correlation
from pbrl.records.videos import video_writer
from pbrl.reward import RewardEnsemble
from pbrl.types import Query, Segments

PARTS = ("env", "agent", "reward")  # of the config: what is built here
FRESH_SEED = 2_000_000  # training and its evaluations never see these episodes


def load_run(run_dir: str | Path, trust: Sequence[str] = ()) -> tuple[PreferenceSAC, Any]:
    """The agent of a run's newest usable checkpoint, and a new environment of its task, as it was trained in.

    Args:
        trust: modules of your own that the run's config may name.

    Raises:
        ConfigError: if there is no run. CheckpointError: if no checkpoint can be used.
    """
    agent, env, _ = load_parts(Path(run_dir), trust)
    return agent, env


def load_parts(run_dir: Path, trust: Sequence[str] = ()) -> tuple[PreferenceSAC, Any, RewardEnsemble]:
    """As `load_run`, and the learned reward.

    Args:
        trust: see `pbrl.launch.stored.read_config`.
    """
    cfg, _ = read_config(run_dir, trust, PARTS)
    for part in PARTS:
        check_arguments(part, cfg[part])
    loaded = load_latest(run_dir)
    try:
        env = as_environment(instantiate(cfg.env, _convert_="all"))
        agent = instantiate(cfg.agent, env=env, seed=0, device="cpu", _convert_="all")
        agent.load_learned(loaded.state["agent"])
        agent.num_timesteps = loaded.run["step"]
        sizes = {"obs_dim": env.observation_space.shape[0], "act_dim": env.action_space.shape[0]}
        reward = instantiate(cfg.reward, **sizes, seed=0, _convert_="all")
        reward.load_state(loaded.state["reward"])
    except (
        Exception
    ) as error:  # a constructor, or weights that do not fit it: whatever a damaged folder makes them raise
        cause = error.__cause__ or error
        raise ConfigError(f"{run_dir} cannot be loaded: {' '.join(str(cause).split())[:200]}") from error
    return agent, env, reward


def record(agent: PreferenceSAC, env: Any, seed: int, path: Path, size: int = 256) -> float:
    """Write one episode of the mean policy as an mp4 (h264); returns its true return.

    Raises:
        RuntimeError: if this machine cannot render (the message names what to install).
    """
    with video_writer(path) as video:
        return play(env, partial(act, agent), seed, lambda: video.append_data(env.render(size, size))).task_return


def agreement(agent: PreferenceSAC, env: Any, reward: RewardEnsemble, seed: int, length: int) -> float:
    """Rank correlation of learned and true return over the segments of one episode of the mean policy."""
    played = play(env, partial(act, agent), seed)
    count = len(played) // length // 2 * 2
    if count < 4:
        return float("nan")
    columns = (np.array(column, np.float32) for column in (played.obs, played.actions, played.rewards))
    parts = [torch.from_numpy(column[: count * length]) for column in columns]
    observations, actions, rewards = (part.reshape(count, length, *part.shape[1:]) for part in parts)
    segments, half = Segments(observations, actions), count // 2
    paired = torch.stack([rewards[:half], rewards[half:]], dim=1)
    return rank_correlation(reward, Query(segments[:half], segments[half:], paired))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    look_here()
    parser = argparse.ArgumentParser(prog="python -m pbrl.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, runs/<env>/<name>")
    parser.add_argument("--episodes", type=int, default=20, help="episodes (default 20)")
    parser.add_argument("--seed", type=int, default=FRESH_SEED, help="seed of the first one, then counting up")
    parser.add_argument("--video", nargs="?", const="", help="also write an mp4 (default RUN/videos/step_….mp4)")
    parser.add_argument("--trust", nargs="*", default=[], help="modules of your own that the run's config may name")
    options = parser.parse_args(arguments)
    if options.episodes < 1:
        parser.error(f"--episodes {options.episodes}: expected at least 1")
    try:
        agent, env, reward = load_parts(options.run, options.trust)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        _report(agent, env, reward, options)
    except RuntimeError as error:  # no OpenGL to render with
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        env.close()
    return 0


def _report(agent: PreferenceSAC, env: Any, reward: RewardEnsemble, options: argparse.Namespace) -> None:
    results = [episode(agent, env, options.seed + i) for i in range(options.episodes)]
    returns = np.array([total for total, _ in results])
    spread = returns.std(ddof=1) / len(returns) ** 0.5 if len(returns) > 1 else float("nan")
    print(f"step {agent.num_timesteps}, {options.episodes} episodes of the mean policy, seeds from {options.seed}")
    print(f"  true return   {returns.mean():.1f} ± {spread:.1f} (standard error)")
    if results[0][1] is not None:
        print(f"  success       {np.mean([bool(success) for _, success in results]):.0%}")
    cfg, choices = read_config(options.run, options.trust, PARTS)
    if choices.get("updater") != "oracle":
        correlation = agreement(agent, env, reward, options.seed, cfg.segment_length)
        known = f"{correlation:.2f}" if np.isfinite(correlation) else "unknown (fewer than four segments, or all alike)"
        print(f"  learned reward and true return of one episode's segments: rank correlation {known}")
    if options.video is not None:
        path = Path(options.video or options.run / "videos" / f"step_{agent.num_timesteps:09d}.mp4")
        total = record(agent, env, options.seed, path)
        print(f"  video         {path} (return {total:.1f})")


if __name__ == "__main__":
    raise SystemExit(main())
