"""The agent: Stable-Baselines3's SAC, paid by a learned reward, with its own generators and a lean update.

What differs from SB3's defaults, and why (B-Pref `agent/sac.py` and `config/agent/sac.yaml`):

* the temperature has a learning rate and an initial value of its own (1e-4, 0.1);
* `target_update_interval` counts updates across calls (SB3 tests the step *within* a call to `train`, so with one
  gradient step per call its interval is ignored);
* `log_std_range` squashes the log standard deviation into a range by tanh (SB3 clamps it to [−20, 2]);
* `orthogonal_init` as published; `reset_critic` for the change from pretraining to the learned reward;
* standardised observations, LayerNorm, residual blocks, one critic, weight decay, n-step returns, exploration with a
  memory: each an option;
* every random draw comes from the agent's own generators: nothing else can disturb it, and it can be resumed.

`isinstance(agent, SAC)` holds; SB3's callbacks, `learn`, `predict`, `save` and `load` work as they do there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from pbrl.agent.exploration import ColoredNoise
from pbrl.agent.fast_update import FastUpdate, FusedAdam, supports
from pbrl.agent.networks import PreferencePolicy, Standardised, initialise, lowest, squash
from pbrl.agent.replay import Batch, RelabelReplay, RewardFunction
from pbrl.checks import check
from pbrl.optimizers import restore_optimizer
from pbrl.rollouts import Rollouts
from pbrl.types import Params

DIVERGED = 1e8  # |Q|: no task here pays more than 1e5 an episode
UNKNOWN_HORIZON = 1000  # environment steps, of colored noise where episodes have no limit
TINY, TINY_EVERY = 1e-30, 128  # of Adam's moments, and updates between two looks: 1e-30 · 0.9^128 is not denormal yet
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
METRICS = ("train/critic_loss", "train/actor_loss", "train/temperature", "train/entropy", "train/q_mean")


class _Heard:
    """Passes everything on to a callback; its wish to stop waits until the step it saw is stored (SB3 drops it)."""

    def __init__(self, callback: BaseCallback) -> None:
        self._callback, self.stops = callback, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)

    def on_step(self) -> bool:
        self.stops |= not self._callback.on_step()
        return True


class PreferenceSAC(SAC):
    """SAC whose reward is a function of observation and action, learned elsewhere.

    By itself it is paid the task's reward; `attach` and `pay_by` join it to a run. None of what they set is saved in
    SB3's zip.

    Args:
        temperature_lr: of the temperature; None: the learning rate.
        precision: of the update's hidden layers, fp32 or bf16.
        compiles: whether `prepare` compiles the update.
        relabel_updates, reset_above, noise_color: see `make_agent`.
    """

    replay_buffer: RelabelReplay

    def __init__(
        self,
        policy: Any,
        env: Any,
        temperature_lr: float | None = None,
        precision: str = "fp32",
        compiles: bool = False,
        relabel_updates: int = 0,
        reset_above: float | None = None,
        noise_color: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"agent.precision={precision}; expected one of {', '.join(PRECISIONS)}")
        self.temperature_lr, self.precision = temperature_lr, precision
        self.reward_fn: RewardFunction | None = None
        self.batch_reward: Callable[[Tensor], Tensor] | None = None
        self.rollouts: Rollouts | None = None
        self.weight: Callable[[int], float] | None = None  # of a transition's deviation, at an environment step
        self.compiles = compiles
        self.relabel_updates, self.reset_above = relabel_updates, reset_above
        self.noise_color = noise_color
        self._branching = self._on_policy = False
        self.told_to_stop = False  # by a callback, in the last `collect`
        self.seen: RunningMeanStd | None = None  # observations, if actor and critics see them standardised
        kwargs.setdefault("replay_buffer_class", RelabelReplay)
        super().__init__(policy, env, **kwargs)

    def _setup_model(self) -> None:
        with torch.random.fork_rng(devices=[]):
            super()._setup_model()
        seeds = np.random.SeedSequence(self.seed).spawn(3)
        self.replay_rng = np.random.default_rng(seeds[0])  # replay indices and random actions
        self.noise = torch.Generator(self.device).manual_seed(int(seeds[1].generate_state(1, np.uint64)[0] >> 1))
        self.colored: ColoredNoise | None = None
        if self.noise_color:
            steps = getattr(self.env.envs[0], "horizon", None) if self.env else None  # type: ignore[attr-defined]
            dims = self.action_space.shape[0]  # type: ignore[index]
            self.colored = ColoredNoise(self.noise_color, steps or UNKNOWN_HORIZON, dims, seeds[2])
        if self.ent_coef_optimizer is not None:
            rate = self.temperature_lr or self.lr_schedule(1)
            temperature: Any = self.log_ent_coef
            self.ent_coef_optimizer = torch.optim.Adam([temperature], lr=rate, fused=True)
            self._temperature_adam = FusedAdam(self.ent_coef_optimizer, [temperature])
        scales = [getattr(m.features_extractor, "scale", None) for m in (self.actor, self.critic, self.critic_target)]
        self._scales = [scale for scale in scales if scale is not None]
        if self._scales and self.seen is None:  # else it was loaded
            self.seen = RunningMeanStd(1e-8, self.observation_space.shape)  # type: ignore[arg-type]
        self._critic_params: list[Tensor] = list(self.critic.parameters())
        self._target_params: list[Tensor] = list(self.critic_target.parameters())
        self._fast = FastUpdate(self, PRECISIONS[self.precision]) if supports(self) else None
        if self._fast is None and self.precision != "fp32":
            raise ValueError(f"agent.precision={self.precision} needs ReLU networks of our kinds; use fp32 for these")
        self._sums = torch.zeros(len(METRICS), device=self.device)
        self._summed = 0

    def _excluded_save_params(self) -> list[str]:
        own = ["reward_fn", "batch_reward", "rollouts", "weight", "replay_rng", "noise", "colored", "_sums"]
        own += ["_pending", "_fast", "_temperature_adam", "_critic_params", "_target_params", "_scales"]
        return super()._excluded_save_params() + own

    def attach(self, rollouts: Rollouts, weight: Callable[[int], float] | None = None) -> None:
        """Record every step of the training environment from now on.

        `weight`, if given, is what a transition's deviation is paid times at the updates of an environment step; what
        `pay_by` sets then returns rewards and deviations, float32 [2, N].
        """
        self.rollouts, self.weight = rollouts, weight
        if weight is not None:
            self.replay_buffer.keep_deviations()

    def pay_by(self, reward: RewardFunction | None, of_batches: Callable[[Tensor], Tensor] | None = None) -> None:
        """Be paid by `reward` for each new transition from now on; None: the task's own (the oracle).

        `of_batches`, if given, replaces the rewards of every sampled batch (state-entropy pretraining): observations
        float32 [B, obs_dim] to float32 [B].
        """
        self.reward_fn, self.batch_reward = reward, of_batches

    # ------------------------------------------------------------------------------------------------ collecting

    @contextlib.contextmanager
    def heard_by(self, callback: BaseCallback | None, total_steps: int) -> Iterator[None]:
        """Tell a callback that training begins and ends, as SB3's `learn` does; in between `collect` may have it."""
        if callback is None:
            yield
            return
        self._setup_learn(0, None, reset_num_timesteps=False)
        callback.init_callback(self)
        callback.on_training_start({"self": self, "total_timesteps": total_steps}, globals())
        try:
            yield
        finally:
            callback.on_training_end()

    def collect(
        self,
        steps: int,
        updates: int | None = None,
        callback: BaseCallback | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> int:
        """Act for `steps` environment steps, with `updates` gradient steps after each (None: `gradient_steps`; none
        before `learning_starts`). With none, what is taken are rollouts of the present policy, whose noise is white.

        SB3's `learn` without its chunking effects: collecting 3 and then 4 steps equals collecting 7. `stop` is asked
        before each step. A callback (see `heard_by`) that asks for the end ends it after the step that it saw, which
        is kept and learned from; `told_to_stop` says so.

        Returns:
            How many steps were taken.
        """
        updates = self.gradient_steps if updates is None else updates
        _, nobody = self._setup_learn(steps, None, reset_num_timesteps=False)
        taken, heard, self._on_policy = 0, _Heard(callback or nobody), updates == 0
        for _ in range(steps):
            if stop() or heard.stops:
                break
            self._step(heard)
            taken += 1
            if updates and self.num_timesteps > self.learning_starts:
                self.train(updates, self.batch_size)
        self.told_to_stop, self._on_policy = heard.stops, False
        return taken

    def _step(self, callback: _Heard) -> None:
        assert self.env is not None
        self.collect_rollouts(
            self.env,
            callback,  # type: ignore[arg-type]
            self.train_freq,  # type: ignore[arg-type]
            self.replay_buffer,
            learning_starts=self.learning_starts,
        )

    @torch.no_grad()
    def _sample_action(
        self, learning_starts: int, action_noise: Any = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        assert isinstance(self._last_obs, np.ndarray)
        size = (n_envs, self.action_space.shape[0])  # type: ignore[index]
        if self.num_timesteps < learning_starts:
            scaled = self.replay_rng.uniform(-1, 1, size).astype(np.float32)
            raw = np.arctanh(scaled * (1 - 1e-6))
        else:
            mean, log_std, _ = self.actor.get_action_dist_params(torch.from_numpy(self._last_obs).to(self.device))
            if self.colored is not None and not self._on_policy:
                draw = torch.from_numpy(self.colored.next()).to(self.device)
            else:
                draw = torch.normal(torch.zeros_like(mean), torch.ones_like(mean), generator=self.noise)
            raw_tensor = mean + log_std.exp() * draw
            raw, scaled = raw_tensor.cpu().numpy(), torch.tanh(raw_tensor).cpu().numpy()
            if not np.isfinite(scaled).all():
                raise self._diverged("the policy's action", float("nan"))
        state = self.training_env.get_state() if self.rollouts is not None and self._has_states else np.zeros(0)
        self._pending = (raw, state)
        return self.policy.unscale_action(scaled), scaled

    def _store_transition(
        self,
        replay_buffer: Any,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        obs = self._last_obs
        assert isinstance(obs, np.ndarray)
        if not (np.isfinite(new_obs).all() and np.isfinite(reward).all()):
            what = "reward" if np.isfinite(new_obs).all() else "observation"
            raise FloatingPointError(f"the simulator returned a non-finite {what} at step {self.num_timesteps}")
        if self.rollouts is not None:
            raw, state = self._pending
            self.rollouts.add(
                obs[0], buffer_action[0], raw[0], float(reward[0]), state, bool(dones[0]), counted=not self._branching
            )
        if dones[0] and self.colored is not None and not self._branching:
            self.colored.restart()
        if self.seen is not None:
            self.seen.update(obs.astype(np.float64))
            self._standardise()
        if self.reward_fn is not None:
            reward = self.reward_fn(obs, buffer_action)
            if not np.isfinite(reward).all():
                raise self._diverged("the learned reward", float(reward.flat[0]))
            if replay_buffer.deviations is not None:
                reward, replay_buffer.deviations[replay_buffer.pos] = reward
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _standardise(self) -> None:
        """The statistics of what was seen so far, into actor, critics and targets."""
        assert self.seen is not None
        for scale in self._scales:
            scale.set(self.seen.mean, np.sqrt(self.seen.var))

    @property
    def training_env(self) -> Any:
        """The one training environment: a `pbrl.types.Environment`."""
        assert self.env is not None
        return self.env.envs[0]  # type: ignore[attr-defined]

    @property
    def _has_states(self) -> bool:
        return bool(self.training_env.state_size)

    def branch(self, state: np.ndarray, steps: int) -> bool:
        """Continue from a stored simulator state for `steps` steps of the present policy, then return to where it was.

        The steps are counted, kept in the replay and recorded as a piece of their own in the rollouts.

        Returns:
            Whether the branch lasted for all its steps (False: it terminated early).
        """
        assert self.rollouts is not None
        rollouts = self.rollouts
        env, here, last_obs = self.training_env, self.training_env.get_state(), self._last_obs
        self._branching = True
        try:
            with rollouts.aside():
                self._last_obs = np.asarray(env.set_state(state), np.float32)[None]
                before = rollouts.episodes
                taken = self.collect(steps, updates=0, stop=lambda: rollouts.episodes != before)
        finally:
            self._branching = False
            env.set_state(here)
            self._last_obs = last_obs
        return taken == steps

    @contextlib.contextmanager
    def acting_with(self, theta: Params) -> Iterator[None]:
        """Within the block the actor has the parameters `theta`; afterwards its own again."""
        own = {name: value.detach().clone() for name, value in self.actor.named_parameters()}
        try:
            self._set_actor(theta)
            yield
        finally:
            self._set_actor(own)

    @torch.no_grad()
    def _set_actor(self, theta: Params) -> None:
        for name, value in self.actor.named_parameters():
            value.copy_(theta[name])

    # ------------------------------------------------------------------------------------------------ the update

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """`gradient_steps` SAC updates. The numbers are those of `SAC.train`; only wasted work is left out."""
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer])
        self._weigh()
        for _ in range(gradient_steps):
            reach = self.replay_buffer.n_steps if self.batch_reward is None else 1
            batch = self.replay_buffer.draw(batch_size, self.replay_rng, reach)
            if self.batch_reward is not None:
                batch = batch._replace(rewards=self.batch_reward(batch.obs))
            self.update(batch)

    def _weigh(self) -> None:
        """The replay pays by the weight of this environment step from now on."""
        if self.weight is not None:
            self.replay_buffer.weight = self.weight(self.num_timesteps)

    def squashed_sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """A reparameterised action in (−1, 1) and its log-probability: float32 [B, act_dim], [B]."""
        mean, log_std, _ = self.actor.get_action_dist_params(obs)
        noise = torch.normal(torch.zeros_like(mean), torch.ones_like(mean), generator=self.noise)
        return squash(mean, log_std, noise)

    def update(self, batch: Batch) -> None:
        """One SAC update (Haarnoja et al., 2018) of temperature, critics, actor and target critics, in this order."""
        self._sums += (self._fast or self.autograd_update)(batch)
        self._summed += 1
        if self._n_updates % self.target_update_interval == 0:
            self._move_targets()
        if self._n_updates % TINY_EVERY == 0:
            self._forget_tiny_moments()
        self._n_updates += 1

    def prepare(self) -> None:
        """Compile the update if `compiles` says so, and say how long that took; where it cannot be, say why."""
        if not self.compiles:
            return
        self.compiles = False
        if self._fast is None:
            print("agent.compile: networks of other kinds than ours are updated by autograd, not compiled")
            return
        try:
            print(f"compiled the agent's update in {self._fast.compile(self.batch_size):.0f} s")
        except RuntimeError as error:
            print(f"agent.compile: going on without, which is slower ({error})")

    def autograd_update(self, batch: Batch) -> Tensor:
        """`update` without the targets, in its readable form, for any networks; returns the values of METRICS, [5]."""
        actions, log_prob = self.squashed_sample(batch.obs)
        alpha = self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef.detach().exp().squeeze()
        self.move_temperature(log_prob)
        with torch.no_grad():
            next_actions, next_log_prob = self.squashed_sample(batch.next_obs)
            next_q = lowest(self.critic_target(batch.next_obs, next_actions)).squeeze(1)
            target = batch.rewards + batch.not_done * self.gamma * (next_q - alpha * next_log_prob)
        values = self.critic(batch.obs, batch.actions)
        critic_loss = 0.5 * torch.stack([(q.squeeze(1) - target).square().mean() for q in values]).sum()
        self.critic.optimizer.zero_grad(set_to_none=True)
        critic_loss.backward()
        self.critic.optimizer.step()

        self.critic.requires_grad_(False)  # the actor's loss needs dQ/da only
        q = lowest(self.critic(batch.obs, actions)).squeeze(1)
        actor_loss = (alpha * log_prob - q).mean()
        self.actor.optimizer.zero_grad(set_to_none=True)
        actor_loss.backward()
        self.actor.optimizer.step()
        self.critic.requires_grad_(True)
        with torch.no_grad():
            return torch.stack([critic_loss, actor_loss, alpha.squeeze(), -log_prob.mean(), q.mean()])

    def move_temperature(self, log_prob: Tensor) -> None:
        """One step on the temperature, if it is learned; log_prob: of present actions, float32 [B]."""
        if self.ent_coef_optimizer is not None:
            self._temperature_adam.step([-(log_prob.detach().mean() + float(self.target_entropy)).reshape(1)])

    @torch.no_grad()
    def _move_targets(self) -> None:
        torch._foreach_lerp_(self._target_params, self._critic_params, self.tau)

    @torch.no_grad()
    def _forget_tiny_moments(self) -> None:
        """Set Adam's moments below TINY to zero, which no weight notices: Adam's eps is 1e-8.

        A unit that has died (ReLU) gets no gradient any more, and its moments decay into denormal numbers, with which
        processors are slow: in a window-open run half of the actor's were, and the run was a third slower.
        (`torch.set_flush_denormal` would reach the calling thread only, and disturb numpy in it.)
        """
        for optimizer in (self.actor.optimizer, self.critic.optimizer):
            for state in optimizer.state.values():
                for moment in (state.get("exp_avg"), state.get("exp_avg_sq")):
                    if moment is not None:
                        moment.masked_fill_(moment.abs() < TINY, 0)

    def reset_critic(self, seed: int) -> None:
        """New critics, targets and critic optimiser; actor and temperature are kept (B-Pref, after pretraining)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            initialise(self.critic, getattr(self.policy, "orthogonal_init", False))
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic.optimizer.state.clear()

    @torch.no_grad()
    def overestimation(self, steps: int = 2000, reach: int = 40) -> float:
        """By how much per step the lower critic expects more than the last stored steps brought; NaN if they are few.

            mean [Q_t − Σ_{i<N} γ^i r_{t+i} + α Σ_{i=n,2n,…,N} γ^i log π(a_{t+i} | s_{t+i}) − γ^N Q_{t+N}]
                · (1 − γ) / (1 − γ^N)

        with Q_t = Q(s_t, a_t) and N = `reach`, or the nearest multiple of n = `n_steps` below (the target has an
        entropy once in n steps), over pieces without an episode's end: critics that are c / (1 − γ) too high everywhere
        give c.
        """
        replay, n = self.replay_buffer, self.replay_buffer.n_steps
        reach = max(reach // n, 1) * n
        self._weigh()
        rows = np.arange(-min(steps, replay.size()), 0) + replay.pos
        rows %= replay.buffer_size
        obs, actions = (torch.from_numpy(one[rows, 0]) for one in (replay.observations, replay.actions))
        joined = (replay.next_observations[rows[:-1], 0] == replay.observations[rows[1:], 0]).all(axis=1)
        breaks = np.concatenate([[0], np.cumsum(~joined)])
        starts = np.flatnonzero(breaks[reach:] == breaks[:-reach]) if len(rows) > reach else np.zeros(0, np.int64)
        if len(starts) == 0:
            return float("nan")
        device = self.device
        q = lowest(self.critic(obs.to(device), actions.to(device))).squeeze(1).cpu().double().numpy()
        mean, log_std, _ = self.actor.get_action_dist_params(obs.to(device))
        raw = torch.atanh(actions.to(device).clamp(-1 + 1e-6, 1 - 1e-6))
        _, log_prob = squash(mean, log_std, (raw - mean) / log_std.exp())
        alpha = self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef.exp()
        entropy = -float(alpha) * log_prob.cpu().double().numpy()
        paid = replay.paid(rows)[:, 0].astype(np.float64)
        powers = self.gamma ** np.arange(reach + 1)
        index = starts[:, None] + np.arange(reach + 1)
        brought = (paid[index[:, :-1]] * powers[:-1]).sum(1) + (entropy[index[:, n::n]] * powers[n::n]).sum(1)
        gap = q[starts] - brought - powers[-1] * q[starts + reach]
        return float(gap.mean() * (1 - self.gamma) / (1 - powers[-1]))

    def after_relabelling(self, seed: int) -> dict[str, float]:
        """What the agent does about a new reward: new critics if the old ones expect too much, and updates at once.

        Returns:
            train/overestimation (see `overestimation`), train/critic_reset (1: they were reset; else 0).
        """
        found = self.overestimation()
        reset = self.reset_above is not None and found > self.reset_above
        if reset:
            self.reset_critic(seed)
        self.train(self.relabel_updates, self.batch_size)
        return {"train/overestimation": found, "train/critic_reset": float(reset)}

    def metrics(self) -> dict[str, float]:
        """Means over the updates since the last call.

        Raises:
            FloatingPointError: if one of them is not finite, or the critics' values left every sensible range.
        """
        if not self._summed:
            return {}
        values = dict(zip(METRICS, (self._sums / self._summed).tolist(), strict=True))
        self._sums.zero_()
        self._summed = 0
        for name, value in values.items():
            if not math.isfinite(value) or (name == "train/q_mean" and abs(value) > DIVERGED):
                raise self._diverged(name, value)
        return values

    def _diverged(self, name: str, value: float) -> FloatingPointError:
        return FloatingPointError(
            f"{name} became {value:g} before update {self._n_updates} (environment step {self.num_timesteps}): "
            "the agent diverged; a new run with a lower agent.learning_rate or reward.output=tanh usually helps"
        )

    # ------------------------------------------------------------------------------------------------ exact resume

    def state(self) -> dict[str, Any]:
        """Everything but the replay: tensors and plain values, for `torch.save`."""
        env = self.training_env
        begun = self._last_obs is not None
        state = {
            "policy": self.policy.state_dict(),
            "actor_optimizer": self.actor.optimizer.state_dict(),
            "critic_optimizer": self.critic.optimizer.state_dict(),
            "noise": self.noise.get_state(),
            "replay_rng": self.replay_rng.bit_generator.state,
            "env_rng": env.np_random.bit_generator.state,
            "env_state": torch.from_numpy(env.get_state().copy()) if begun and self._has_states else None,
            "last_obs": torch.from_numpy(np.array(self._last_obs)) if begun else None,
            "num_timesteps": self.num_timesteps,
            "n_updates": self._n_updates,
            "episode_num": self._episode_num,
            "sums": self._sums.clone(),
            "summed": self._summed,
        }
        if self.seen is not None:
            moments = torch.from_numpy(np.stack([self.seen.mean, self.seen.var]))
            state["seen"] = {"count": float(self.seen.count), "moments": moments}
        if self.colored is not None:
            state["colored"] = self.colored.state()
        if self.ent_coef_optimizer is not None and self.log_ent_coef is not None:
            state["log_ent_coef"] = self.log_ent_coef.detach().clone()
            state["ent_coef_optimizer"] = self.ent_coef_optimizer.state_dict()
        return state

    def load_learned(self, state: dict[str, Any]) -> None:
        """Of what `state` returned: the networks, the temperature, and the statistics of what was seen."""
        self.policy.load_state_dict(state["policy"])
        if self.seen is not None:
            self.seen.count = state["seen"]["count"]
            self.seen.mean, self.seen.var = (one.copy() for one in state["seen"]["moments"].numpy())
        if self.ent_coef_optimizer is not None and self.log_ent_coef is not None:
            with torch.no_grad():
                self.log_ent_coef.copy_(state["log_ent_coef"])

    def load_state(self, state: dict[str, Any]) -> bool:
        """Restore what `state` returned; the environment stands in the middle of its episode again.

        Returns:
            False if the simulator cannot restore its state: its episode then starts anew.
        """
        self.load_learned(state)
        restore_optimizer(self.actor.optimizer, state["actor_optimizer"])
        restore_optimizer(self.critic.optimizer, state["critic_optimizer"])
        self.noise.set_state(state["noise"])
        if self.colored is not None:
            self.colored.load_state(state["colored"])
        self.replay_rng.bit_generator.state = state["replay_rng"]
        self.num_timesteps, self._n_updates = state["num_timesteps"], state["n_updates"]
        self._episode_num, self._summed = state["episode_num"], state["summed"]
        self._sums.copy_(state["sums"])
        if self.ent_coef_optimizer is not None:
            restore_optimizer(self.ent_coef_optimizer, state["ent_coef_optimizer"])
        assert self.env is not None
        if state["last_obs"] is None:
            self.training_env.np_random.bit_generator.state = state["env_rng"]
            return True
        self._last_obs = self.env.reset()  # type: ignore[assignment]
        self.training_env.np_random.bit_generator.state = state["env_rng"]
        if state["env_state"] is None:
            if self.colored is not None:
                self.colored.restart()
            return False
        self.training_env.set_state(state["env_state"].numpy())
        self._last_obs = state["last_obs"].numpy()
        return True


def make_agent(
    env: gym.Env,
    *,
    seed: int,
    device: str = "cpu",
    learning_rate: float,
    temperature_lr: float,
    initial_temperature: float,
    net_arch: Sequence[int],
    batch_size: int,
    gradient_steps: int,
    buffer_size: int,
    learning_starts: int,
    gamma: float,
    tau: float,
    target_update_interval: int,
    log_std_range: Sequence[float] | None,
    orthogonal_init: bool,
    hybrid_ratio: float,
    hybrid_steps: int,
    precision: str,
    compile: bool,
    normalise: bool,
    actor_layer_norm: bool,
    critic_layer_norm: bool,
    blocks: int,
    critics: int,
    weight_decay: float,
    target_entropy: float,
    n_steps: int,
    relabel_updates: int,
    reset_above: float | None,
    noise_color: float,
) -> PreferenceSAC:
    """A `PreferenceSAC` on one environment.

    Args:
        env: float32 vector observations, actions in [−1, 1].
        seed: of the networks, the action noise, the replay draws and the environment.
        device: a torch device.
        learning_rate: of actor and critics; temperature_lr: of the temperature, which starts at initial_temperature.
        net_arch: hidden widths of actor and critics.
        batch_size: transitions per update. gradient_steps: updates after each environment step.
        buffer_size: transitions kept. learning_starts: random steps at the start.
        gamma: discount. tau: target step, every target_update_interval updates.
        log_std_range: see `SquashedStdActor`. orthogonal_init: as published.
        hybrid_ratio, hybrid_steps: see `RelabelReplay`.
        precision: of the update's hidden layers: fp32, or bf16 (faster where the processor multiplies it).
        compile: the update, when `prepare` is called.
        normalise: actor and critics see observations standardised by the mean and deviation of all so far.
        actor_layer_norm, critic_layer_norm, blocks: see `pbrl.agent.networks.hidden_layers`; blocks need one width in
            net_arch.
        critics: 1 or 2; of two the lower counts.
        weight_decay: of actor and critics, decoupled (AdamW); 0: Adam.
        target_entropy: of the policy, in nats per entry of the action (SAC: -1).
        n_steps: rewards summed before the critic is asked, at the most; 1 in pretraining.
        relabel_updates: updates at once after the replay was paid anew.
        reset_above: new critics after a session in which `overestimation` exceeds this; null: never.
        noise_color: of the noise in the training environment (see `ColoredNoise`; 1: pink); 0: drawn anew at each
            step. Fresh rollouts and branches, which stand for the policy as it is, have the latter.

    Raises:
        ValueError: for a number out of range.
    """
    check(
        "agent",
        learning_rate=(learning_rate, learning_rate > 0, "a positive number"),
        temperature_lr=(temperature_lr, temperature_lr > 0, "a positive number"),
        initial_temperature=(initial_temperature, initial_temperature > 0, "a positive number"),
        net_arch=(net_arch, min(net_arch, default=1) >= 1, "widths of at least 1"),
        buffer_size=(buffer_size, buffer_size >= 1, "at least 1"),
        learning_starts=(learning_starts, learning_starts >= 0, "at least 0"),
        batch_size=(batch_size, batch_size > 0, "at least 1"),
        gradient_steps=(gradient_steps, gradient_steps >= 1, "at least 1"),
        gamma=(gamma, 0 < gamma < 1, "a number above 0 and below 1"),
        tau=(tau, 0 < tau <= 1, "a number above 0, at most 1"),
        target_update_interval=(target_update_interval, target_update_interval >= 1, "at least 1"),
        hybrid_ratio=(hybrid_ratio, 0 <= hybrid_ratio <= 1, "a share in [0, 1]"),
        hybrid_steps=(hybrid_steps, hybrid_steps > 0, "at least 1"),
        blocks=(blocks, blocks >= 0, "at least 0"),
        critics=(critics, critics in (1, 2), "1 or 2"),
        weight_decay=(weight_decay, weight_decay >= 0, "at least 0"),
        n_steps=(n_steps, n_steps >= 1, "at least 1"),
        noise_color=(noise_color, 0 <= noise_color <= 2, "a number from 0 (white) to 2 (red)"),
        relabel_updates=(relabel_updates, relabel_updates >= 0, "at least 0"),
        log_std_range=(
            log_std_range,
            log_std_range is None or log_std_range[0] < log_std_range[1],
            "the smaller number first, or null",
        ),
    )
    if blocks and len(net_arch) != 1:
        raise ValueError(f"agent.net_arch={list(net_arch)}: with agent.blocks expected one width, such as [256]")
    agent = PreferenceSAC(
        PreferencePolicy,
        DummyVecEnv([lambda: env]),
        temperature_lr=temperature_lr,
        precision=precision,
        compiles=compile,
        relabel_updates=relabel_updates,
        reset_above=reset_above,
        noise_color=noise_color,
        learning_rate=learning_rate,
        ent_coef=f"auto_{initial_temperature}",
        batch_size=batch_size,
        gradient_steps=gradient_steps,
        buffer_size=buffer_size,
        learning_starts=learning_starts,
        gamma=gamma,
        tau=tau,
        target_update_interval=target_update_interval,
        replay_buffer_kwargs={
            "hybrid_ratio": hybrid_ratio,
            "hybrid_steps": hybrid_steps,
            "n_steps": n_steps,
            "gamma": gamma,
        },
        target_entropy=target_entropy * env.action_space.shape[0],  # type: ignore[index]
        policy_kwargs={
            "net_arch": list(net_arch),
            "log_std_range": log_std_range,
            "orthogonal_init": orthogonal_init,
            "actor_layer_norm": actor_layer_norm,
            "critic_layer_norm": critic_layer_norm,
            "blocks": blocks,
            "n_critics": critics,
            "optimizer_class": torch.optim.AdamW if weight_decay else torch.optim.Adam,
            "optimizer_kwargs": {"fused": True} | ({"weight_decay": weight_decay} if weight_decay else {}),
        }
        | ({"features_extractor_class": Standardised} if normalise else {}),
        seed=seed,
        device=device,
    )
    agent.set_logger(Logger(folder=None, output_formats=[]))
    return agent
