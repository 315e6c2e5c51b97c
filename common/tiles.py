"""Large images: compute a function in overlapping tiles."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TILE, OVERLAP = 144, 32  # LR pixels; attention over a tile costs the fourth power of its side


def in_tiles(
    function: Callable[..., Tensor],
    grid: Sequence[int],
    *inputs: Tensor,
    tile: int = 0,
    overlap: int = 0,
) -> Tensor:
    """function(*inputs) -> (B, C, h, w), computed in overlapping tiles to save memory.

    grid is (h, w); inputs (B, C', f h, f w) with whole factors f. tile and overlap are in pixels of
    the grid (default: TILE, OVERLAP). An image that is no larger than a tile is computed at once.
    """
    h, w = grid
    th, tw, overlap = min(h, tile or TILE), min(w, tile or TILE), overlap or OVERLAP
    if (th, tw) == (h, w):
        return function(*inputs)

    def starts(n: int, side: int) -> list[int]:
        return [*range(0, n - side, side - overlap), n - side]

    def fade(start: int, side: int, n: int) -> Tensor:
        """Weights (side,) that rise from almost 0 to 1 in the middle half of the overlap.

        Pixels at the edge of a tile see too little of their surroundings. At the edge of the image
        the weight stays 1, because no tile sees more there.
        """
        i = torch.arange(1, side + 1, device=inputs[0].device)
        before, after = i + overlap * (start == 0), i.flip(0) + overlap * (start + side == n)
        rising = (2 * torch.minimum(before, after) / overlap - 0.5).clamp(0.02, 1)
        return rising.square() * (3 - 2 * rising)

    total, weight = None, torch.zeros(h, w, device=inputs[0].device)
    for top, left in itertools.product(starts(h, th), starts(w, tw)):
        crops = []
        for x in inputs:
            f = x.shape[2] // h
            crops.append(x[:, :, top * f : (top + th) * f, left * f : (left + tw) * f])
        made = function(*crops).float()
        mask = fade(top, th, h)[:, None] * fade(left, tw, w)
        total = made.new_zeros(*made.shape[:2], h, w) if total is None else total
        total[:, :, top : top + th, left : left + tw] += made * mask
        weight[top : top + th, left : left + tw] += mask
    assert total is not None
    return total / weight
