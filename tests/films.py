"""Reading films back.

imageio's reader leaves ffmpeg's pipes open when ffmpeg has ended before the reader is closed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np


def read_film(path: Path, height: int, width: int) -> np.ndarray:
    """All pictures of a film of this size, uint8 [T, height, width, 3]."""
    output = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), *output]
    frames = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
    return np.frombuffer(frames, np.uint8).reshape(-1, height, width, 3)
