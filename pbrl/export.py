"""`python -m pbrl.export RUN --to DIR`: a run's policy and learned reward for use elsewhere, and a model card.

    DIR/README.md         model card in the Hugging Face form, with curve.png and the run's config.yaml
    DIR/policy.onnx       obs [N, obs_dim] → action [N, act_dim], the mean policy; actions in [−1, 1] as in training
    DIR/policy.pt2        the same for torch (`torch.export.load`)
    DIR/policy.zip        the same for Stable-Baselines3 (`SAC.load`), with critics
    DIR/reward.onnx, .pt2 obs, actions → pay [N] as the run paid at its last checkpoint, members [M, N]
    DIR/*.safe.pt         weights alone (`torch.load(…, weights_only=True)`)
    DIR/film.mp4          an episode

Every exported network is run on random inputs and must give what the run's own gives. bf16 runs are exported in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pbrl.agent.stock import stock_sac
from pbrl.comparing.report import save_figure
from pbrl.comparing.runs import LONGEST, Run, read_run, shown
from pbrl.evaluate import FRESH_SEED, load_parts, record
from pbrl.files import TEXT_BYTES, read_bounded
from pbrl.launch.stored import command_of
from pbrl.records.checkpoint import CheckpointError
from pbrl.records.evaluation import act, episode
from pbrl.reward import Layers

CHECKED = 256  # random inputs on which an export must agree
TOLERANCE = 1e-5
COMMAND = 10_000  # characters of a run's command on its card: all of it, unless it is a stranger's joke


class ExportError(RuntimeError):
    """What was exported does not do what the run does, or what is needed for it is not installed."""


class MeanPolicy(nn.Module):
    """obs [N, obs_dim] → actions [N, act_dim] in the agent's action space, float32: what `act` does, for a batch."""

    low: Tensor
    range: Tensor
    actor: Any

    def __init__(self, agent: Any) -> None:
        super().__init__()
        self.actor = _static(agent.actor)
        low, high = (torch.from_numpy(end.copy()) for end in (agent.action_space.low, agent.action_space.high))
        self.register_buffer("low", low)
        self.register_buffer("range", high - low)

    def forward(self, obs: Tensor) -> Tensor:
        mean, _, _ = self.actor.get_action_dist_params(obs)
        return self.low + 0.5 * (torch.tanh(mean) + 1.0) * self.range


class PaidReward(nn.Module):
    """obs [N, obs_dim], actions [N, act_dim] → pay [N] at environment step `step` of the run, and members [M, N]."""

    shares: Tensor

    def __init__(self, reward: Any, step: int) -> None:
        super().__init__()
        self.reward = _static(reward)
        self.register_buffer("shares", torch.from_numpy(reward.pay.shares(len(reward.members))))
        self.weight, self.convex = float(reward.pay.weight(step)), reward.pay.convex

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        members = self.reward(obs, actions)
        pay = self.shares @ torch.sort(members, dim=0).values
        if self.weight:
            pay = pay + self.weight * members.std(dim=0, correction=0)
        return self.convex(pay), members


def _static(module: nn.Module) -> nn.Module:
    """A copy in full precision."""
    copied = copy.deepcopy(module)
    for child in copied.modules():
        if isinstance(child, Layers):
            child.bf16 = False
    return copied.eval().requires_grad_(False)


def write_network(module: nn.Module, inputs: dict[str, int], outputs: Sequence[str], stem: Path, seed: int = 0) -> None:
    """Write `stem`.pt2, .onnx and .safe.pt, and run the first two on random inputs.

    Args:
        inputs: name and size of each; float32 [N, size], in the order of `forward`.

    Raises:
        ExportError: if one of them differs from the module, or onnx, onnxscript or onnxruntime is missing.
    """
    generator = torch.Generator().manual_seed(seed)
    random = [torch.randn(CHECKED, size, generator=generator) for size in inputs.values()]
    expected = _as_tuple(module(*random))
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in inputs)
    program = torch.export.export(module, tuple(x[:2] for x in random), dynamic_shapes=shapes)
    torch.export.save(program, stem.with_suffix(".pt2"))
    torch.save(module.state_dict(), stem.with_suffix(".safe.pt"))
    _require_same(
        stem.with_suffix(".pt2"), expected, _as_tuple(torch.export.load(stem.with_suffix(".pt2")).module()(*random))
    )
    try:
        import onnxruntime

        with _quiet():
            onnx = torch.onnx.export(program, input_names=list(inputs), output_names=list(outputs), verbose=False)
        assert onnx is not None
        onnx.save(stem.with_suffix(".onnx"))
    except ImportError as error:
        raise ExportError(f"{error}: pip install 'pbrl[export]'") from error
    session = onnxruntime.InferenceSession(stem.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    found = session.run(list(outputs), {name: x.numpy() for name, x in zip(inputs, random, strict=True)})
    _require_same(stem.with_suffix(".onnx"), expected, tuple(torch.from_numpy(np.asarray(x)) for x in found))


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _require_same(path: Path, expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    worst = max(float((x - y).abs().max()) for x, y in zip(expected, found, strict=True))
    if not worst <= TOLERANCE:
        raise ExportError(f"{path} differs from the run by up to {worst:.2g} on random inputs; please report this")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about torchvision and about its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class Measured:
    """What the exported policy did in fresh episodes."""

    returns: np.ndarray  # float [episodes], task units
    success: float | None  # share; None where the task does not define it


def measure(agent: Any, env: Any, episodes: int) -> Measured:
    """Episodes of the mean policy whose seeds training and its evaluations never saw."""
    totals, successes = zip(*(episode(agent, env, FRESH_SEED + i) for i in range(episodes)), strict=True)
    known = [bool(success) for success in successes if success is not None]
    return Measured(np.array(totals), float(np.mean(known)) if known else None)


def export(run_dir: Path, to: Path, episodes: int = 10, film: bool = True, trust: Sequence[str] = ()) -> list[str]:
    """Write the folder `to`. Returns what could not be made (a film without OpenGL), a line each.

    Raises:
        ConfigError, CheckpointError: as `pbrl.evaluate.load_run`. ExportError: see there; also if `to` is not empty.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ExportError(f"--to {to}: expected a new or empty folder")
    agent, env, reward = load_parts(run_dir, trust)
    run, notes = read_run(run_dir), []
    try:
        to.mkdir(parents=True, exist_ok=True)
        obs, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
        policy = MeanPolicy(agent)
        some = np.random.default_rng(0).normal(size=(CHECKED, obs)).astype(np.float32)
        acted = np.stack([act(agent, row) for row in some])
        _require_same(to / "the policy", (torch.from_numpy(acted),), (policy(torch.from_numpy(some)),))
        write_network(policy, {"obs": obs}, ["action"], to / "policy")
        stock_sac(agent, env).save(to / "policy.zip")
        if run.updater != "oracle":
            paid = PaidReward(reward, agent.num_timesteps)
            actions = np.clip(some[:, :1].repeat(act_dim, axis=1), -1, 1)
            rows = [
                reward.predict(some[i : i + 1], actions[i : i + 1]) for i in range(len(some))
            ]  # one row: never bf16
            expected = reward.pay(np.concatenate(rows, axis=1), agent.num_timesteps)
            found = paid(torch.from_numpy(some), torch.from_numpy(actions))[0]
            _require_same(to / "the reward", (torch.from_numpy(expected),), (found,))
            write_network(paid, {"obs": obs, "actions": act_dim}, ["pay", "members"], to / "reward")
        measured = measure(agent, env, episodes)
        if film:
            try:
                record(agent, env, FRESH_SEED, to / "film.mp4")
            except (RuntimeError, OSError) as error:
                notes.append(f"no film: {error}")
    finally:
        env.close()
    save_figure(curve(run), to / "curve.png")
    (to / "config.yaml").write_bytes((run_dir / "config.yaml").read_bytes())
    (to / "README.md").write_text(
        card(run, run_dir, measured, agent.num_timesteps, (to / "film.mp4").exists()), encoding="utf-8"
    )
    return notes


def curve(run: Run) -> Figure:
    """True return against environment steps, as the run logged it."""
    figure = Figure(figsize=(4.5, 2.8), layout="constrained")
    panel = figure.add_subplot()
    panel.plot(*run.series("eval/return"), color="#0072B2", marker="o", markersize=3)
    panel.set_xlabel("environment steps")
    panel.set_ylabel("true return per episode")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def card(run: Run, run_dir: Path, measured: Measured, step: int, film: bool) -> str:
    """The model card: front matter in the Hugging Face form, results, use, origin, limits. A run's texts stay text."""
    task, method = (_plain(run.setting(name)) for name in ("env", "updater"))
    spread = measured.returns.std(ddof=1) if len(measured.returns) > 1 else float("nan")
    score = f"{measured.returns.mean():.2f} +/- {spread:.2f}"
    results = f"{len(measured.returns)} fresh episodes at step {step}: true return {score} (standard deviation)"
    if measured.success is not None:
        results += f", success in {measured.success:.0%}"
    versions = _json(run_dir / "versions.json")
    learned = method != "oracle"
    labels, asked = (np.nan_to_num(run.last(f"feedback/{name}")) for name in ("labels", "asked"))
    origin = {
        "method": method,
        "teacher": _plain(run.setting("teacher")) if learned else "none: the task's own reward",
        "labels used": f"{labels:.0f} of {asked:.0f} asked" if learned else "0",
        "environment steps": f"{step} of {_plain(run.setting('total_steps'))}",
        "seed": str(run.seed),
        "commit": _plain(versions.get("commit", "unknown")),
        "command": f"`{_plain(command_of(run_dir), COMMAND)}`",
        "versions": ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in list(versions.items())[:20] if k != "commit"),
    }
    return CARD.format(
        task=task,
        method=method,
        score=score,
        results=results,
        origin="\n".join(f"| {name} | {value} |" for name, value in origin.items()),
        film="An episode: [film.mp4](film.mp4)." if film else "",
        reward=REWARD_USE if learned else "",
        limits=LEARNED_LIMITS if learned else "",
    )


def _plain(value: Any, longest: int = LONGEST) -> str:
    """A text of the run without what Markdown, YAML or HTML would read as their own."""
    return "".join("'" if letter in '`"|<>{}[]\\' else letter for letter in shown(value, longest))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bounded(path, TEXT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


REWARD_USE = """
The learned reward says what the policy was paid (`pay`) and what each member of the ensemble says (`members`):

```python
pay, members = ort.InferenceSession("reward.onnx").run(None, {"obs": obs, "actions": action})
```
"""

LEARNED_LIMITS = """\
* The reward was learned from comparisons of short segments. It is right about what the policy and the questions have
  visited, and can be anything elsewhere; a policy that is trained on it further may climb its errors.
"""

CARD = """---
library_name: stable-baselines3
tags:
- reinforcement-learning
- preference-based-reinforcement-learning
- stable-baselines3
- pbrl
model-index:
- name: "{method} on {task}"
  results:
  - task:
      type: reinforcement-learning
      name: reinforcement-learning
    dataset:
      name: "{task}"
      type: "{task}"
    metrics:
    - type: mean_reward
      value: "{score}"
      name: mean_reward
      verified: false
---

# {method} on {task}

A SAC policy trained from preferences by pbrl, with the settings in [config.yaml](config.yaml). {results}.

![true return against environment steps](curve.png)

{film}

## Use

```python
import numpy as np
import onnxruntime as ort

policy = ort.InferenceSession("policy.onnx")
obs = np.zeros((1, policy.get_inputs()[0].shape[1]), np.float32)  # of the environment
(action,) = policy.run(None, {{"obs": obs}})
```
Actions are in [−1, 1], as in training: an environment with other limits gets low + (action + 1) / 2 · (high − low).
{reward}
`policy.zip` is the same policy for Stable-Baselines3 (`SAC.load("policy.zip")`, `predict(obs, deterministic=True)`).
Such a zip holds a pickle, which runs code when it is loaded: load those you made yourself or trust. `policy.pt2` is for
`torch.export.load`, `policy.safe.pt` holds the weights alone.

## Origin

| | |
|---|---|
{origin}

## Limits

* One run of one seed, in simulation. Nothing here was tried on a robot.
* The mean policy is exported; for exploration use the zip.
{limits}"""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pbrl.export", description="A run's policy and reward, to be used.")
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--to", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--episodes", type=int, default=10, help="fresh episodes for the card (default 10)")
    parser.add_argument("--no-film", action="store_true", help="do not film an episode")
    parser.add_argument("--trust", nargs="*", default=[], help="modules of your own that the run's config may name")
    options = parser.parse_args(arguments)
    if options.episodes < 1:
        parser.error(f"--episodes {options.episodes}: expected at least 1")
    try:
        notes = export(options.run, options.to, options.episodes, not options.no_film, options.trust)
    except (CheckpointError, ExportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in notes:
        print(note)
    print(f"{options.to}: {', '.join(sorted(path.name for path in options.to.iterdir()))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
