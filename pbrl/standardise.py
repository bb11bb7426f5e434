"""Network inputs in units of their own spread."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

CLIP = 10.0  # deviations, as in SB3's VecNormalize
CONSTANT = 1e-4  # a dimension with a deviation below it counts as constant (Meta-World's hidden goal): only centred


class Standardise(nn.Module):
    """(x − mean) / deviation, clipped to ±clip; mean 0 and deviation 1 until `set` has been called; if off, x itself.

    The statistics are buffers: they travel with the weights.

    Args:
        size: of one input. on: without it there are no buffers, and nothing is computed.
    """

    mean: Tensor
    deviation: Tensor
    known: Tensor
    clip = CLIP

    def __init__(self, size: int, on: bool) -> None:
        super().__init__()
        self.on = on
        if on:
            self.register_buffer("mean", torch.zeros(size))
            self.register_buffer("deviation", torch.ones(size))
            self.register_buffer("known", torch.zeros((), dtype=torch.int64))

    def set(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        """Take over these statistics, float [size] each; a constant dimension is centred and keeps its unit."""
        self.mean.copy_(torch.from_numpy(mean))
        self.deviation.copy_(torch.from_numpy(np.where(deviation < CONSTANT, 1.0, deviation)))
        self.known.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., size] to the same."""
        if not self.on:
            return x
        return ((x - self.mean) / self.deviation).clamp(-self.clip, self.clip)

    def row(self, x: np.ndarray) -> np.ndarray:
        """The same for one row in numpy, float32 [size]."""
        if not self.on:
            return x
        return np.clip((x - self.mean.numpy()) / self.deviation.numpy(), -self.clip, self.clip)
