"""Off-screen pictures of MuJoCo simulations, and the choice of the OpenGL backend they need.

Import mujoco, or anything that imports it, only after `import_mujoco()`: the backend is fixed at its first import.
"""

from __future__ import annotations

import os
import sys
import weakref
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_OPENGL = (
    "no OpenGL for off-screen rendering (MUJOCO_GL={}). On Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri, "
    "then MUJOCO_GL=egl; MUJOCO_GL=disabled trains without pictures"
)


def import_mujoco() -> ModuleType:
    """Import mujoco with a backend that works here; safe to call again.

    Without a display, EGL is chosen; if that is missing too, "disabled": simulation works, pictures raise. A MUJOCO_GL
    that the user has set is respected.

    Raises:
        RuntimeError: if the backend the user asked for cannot be loaded.
    """
    chosen = os.environ.get("MUJOCO_GL")
    if chosen is None and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ["MUJOCO_GL"] = "egl"
    try:
        import mujoco
    except (ImportError, AttributeError) as error:  # PyOpenGL: AttributeError if there is no libEGL at all
        if chosen is not None or "MUJOCO_GL" not in os.environ:
            raise RuntimeError(NO_OPENGL.format(chosen)) from error
        os.environ["MUJOCO_GL"] = "disabled"
        import mujoco
    return mujoco


class Camera:
    """Draws a simulation from one viewpoint.

    It draws from a copy of the physics state, brought up to date by itself. So a picture is a function of the state
    alone (a restored state gives the same pixels) and drawing cannot disturb the simulation.

    Args:
        model: mujoco.MjModel; its layout may change between pictures, its meshes and textures may not.
        camera: name or number of the model's camera; -1 is the free camera.
        upside_down: turn the picture by 180 degrees.
    """

    def __init__(self, model: Any, camera: str | int, upside_down: bool = False) -> None:
        self._mujoco = import_mujoco()
        self._model, self._camera, self._upside_down = model, camera, upside_down
        self._scratch: Any = None
        self._renderer: Any = None
        self._free: Any = None

    def render(self, data: Any, width: int, height: int) -> NDArray[np.uint8]:
        """The scene of `data` (mujoco.MjData), uint8 [height, width, 3].

        Raises:
            RuntimeError: if there is no OpenGL.
        """
        if self._renderer is None or (self._renderer.width, self._renderer.height) != (width, height):
            self.close()
            self._open(width, height)
        physics = self._mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(self._mujoco.mj_stateSize(self._model, physics))
        self._mujoco.mj_getState(self._model, data, state, physics)
        self._mujoco.mj_setState(self._model, self._scratch, state, physics)
        self._mujoco.mj_forward(self._model, self._scratch)
        self._renderer.update_scene(self._scratch, self._camera)
        # neither is worth its time: 256 x 256 pixels in 32 ms instead of 176 (llvmpipe)
        self._renderer.scene.flags[self._mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._renderer.scene.flags[self._mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        frame = self._renderer.render()
        return np.ascontiguousarray(frame[::-1, ::-1]) if self._upside_down else frame

    def close(self) -> None:
        """Free the OpenGL context; the next picture opens a new one."""
        if self._free is not None:
            self._free()
        self._renderer = None

    def _open(self, width: int, height: int) -> None:
        visual = self._model.vis
        visual.quality.offsamples = 0  # no multisampling: half of the time
        visual.global_.offwidth = max(visual.global_.offwidth, width)
        visual.global_.offheight = max(visual.global_.offheight, height)
        renderer = self._mujoco.Renderer.__new__(self._mujoco.Renderer)
        renderer._gl_context = renderer._mjr_context = None  # its __del__ needs them even if its __init__ fails
        try:
            _check_egl()
            renderer.__init__(self._model, height, width)
        except (self._mujoco.FatalError, RuntimeError, ImportError, AttributeError) as error:
            raise RuntimeError(NO_OPENGL.format(os.environ.get("MUJOCO_GL"))) from error
        self._renderer = renderer
        self._scratch = self._mujoco.MjData(self._model)
        self._free = weakref.finalize(self, self._renderer.close)  # at exit, EGL is gone before its contexts otherwise


def _check_egl() -> None:
    """Raise ImportError if EGL is chosen and has no driver; mujoco's own attempt would also print a traceback."""
    if os.environ.get("MUJOCO_GL") == "egl":
        from mujoco import egl

        if egl.create_initialized_egl_device_display() == egl.EGL.EGL_NO_DISPLAY:
            raise ImportError("EGL finds no device to draw on")
