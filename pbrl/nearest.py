"""How far observations are from the nearest of many others."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4096  # stored observations compared at a time: the block of distances stays in cache


def nearest_distances(queries: Tensor, stored: Tensor, k: int) -> Tensor:
    """Euclidean distance of each query to its (k+1)-th nearest stored observation (itself counts as the first).

    Distances by |a|² + |b|² − 2ab with a partial top-k per chunk; both are centred first, which keeps the digits that
    large common offsets would eat.

    Args:
        queries: float32 [B, obs_dim]. stored: float32 [N, obs_dim], N > k.
        k: neighbours.

    Returns:
        float32 [B], ≥ 0.
    """
    center = queries.mean(dim=0)
    queries = queries - center
    best = torch.full((len(queries), k + 1), torch.inf)
    for chunk in stored.split(CHUNK):
        chunk = chunk - center
        squares = torch.addmm(chunk.square().sum(1)[None], queries, chunk.T, alpha=-2)
        nearest = squares.topk(min(k + 1, len(chunk)), dim=1, largest=False).values
        best = torch.cat([best, nearest], dim=1).topk(k + 1, dim=1, largest=False).values
    return (best[:, -1] + queries.square().sum(1)).clamp_min(0).sqrt()
