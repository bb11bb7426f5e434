"""The part of a MuJoCo simulation that must be stored so that it continues bit for bit."""

from __future__ import annotations

from typing import Any

from envs.base import State
from envs.rendering import import_mujoco


class PhysicsState:
    """Reads and writes the moving parts of a simulation as one row of float64 numbers.

    Stored: time, positions, velocities, activations, mocap bodies, the solver's warm start, plugins; and the sensors,
    which cannot be computed afterwards where they measure accelerations. Not stored: controls, set anew at each step,
    and applied forces (six numbers per body), which no task here uses.

    Args:
        model, data: mujoco.MjModel and mujoco.MjData of the simulation.
        derived: further float64 arrays of `data` that the task reads before it steps and that lag behind the positions.
    """

    def __init__(self, model: Any, data: Any, derived: tuple[str, ...] = ()) -> None:
        self._mujoco = import_mujoco()
        flags = self._mujoco.mjtState
        forces = flags.mjSTATE_CTRL | flags.mjSTATE_QFRC_APPLIED | flags.mjSTATE_XFRC_APPLIED
        self._flags = int(flags.mjSTATE_INTEGRATION) & ~int(forces)
        self._model, self._data = model, data
        self._copied = [getattr(data, name).reshape(-1) for name in ("sensordata", *derived)]  # views, not copies
        self._core = self._mujoco.mj_stateSize(model, self._flags)
        self.size = self._core + sum(view.size for view in self._copied)  # float64 numbers

    def save(self, out: State) -> None:
        """Write the state into `out`, float64 [size]."""
        self._mujoco.mj_getState(self._model, self._data, out[: self._core], self._flags)
        start = self._core
        for view in self._copied:
            out[start : start + view.size] = view
            start += view.size

    def load(self, saved: State) -> None:
        """Restore what `save` wrote, float64 [size], and compute what follows from it (contacts, body poses, …)."""
        self._mujoco.mj_setState(self._model, self._data, saved[: self._core], self._flags)
        self._mujoco.mj_forward(self._model, self._data)
        # mj_forward may move the warm start
        self._mujoco.mj_setState(self._model, self._data, saved[: self._core], self._flags)
        start = self._core
        for view in self._copied:
            view[:] = saved[start : start + view.size]
            start += view.size
