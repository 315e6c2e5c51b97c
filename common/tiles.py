"""Large images: compute a function in overlapping tiles."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from common.images import to_uint8

TILE, OVERLAP = 144, 32  # LR pixels; attention over a tile costs the fourth power of its side


def starts(n: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover n pixels; the last one ends with them."""
    return [*range(0, n - tile, tile - overlap), n - tile] if n > tile else [0]


def sides(h: int, w: int, tile: int, overlap: int) -> tuple[int, int, int]:
    """Height and width of the tiles of an image, and their overlap: 3/4 of a tile at most."""
    tile = tile or TILE
    return min(h, tile), min(w, tile), min(overlap or OVERLAP, 3 * tile // 4)


def rising(i: Tensor, overlap: int) -> Tensor:
    """Weights of pixels i = 1, 2, ... of an overlap: from almost 0 to 1 in its middle half.

    Pixels at the edge of a tile see too little of their surroundings.
    """
    x = (2 * i / overlap - 0.5).clamp(0.02, 1)
    return x.square() * (3 - 2 * x)


def in_tiles(
    function: Callable[..., Tensor],
    grid: Sequence[int],
    *inputs: Tensor,
    tile: int = 0,
    overlap: int = 0,
    gradient_of: int | None = None,
) -> Tensor:
    """function(*inputs) -> (B, C, h, w), computed in overlapping tiles to save memory.

    grid is (h, w); inputs (B, C', f h, f w) with whole factors f. tile and overlap are in pixels of
    the grid (default: TILE, OVERLAP). An image that is no larger than a tile is computed at once.
    With a random number `gradient_of`, only the tile of this number (modulo the number of tiles n)
    has a gradient, n times its own: an estimate that is exact in the mean.
    """
    h, w = grid
    th, tw, overlap = sides(h, w, tile, overlap)
    if (th, tw) == (h, w):
        return function(*inputs)

    def fade(start: int, side: int, n: int) -> Tensor:
        """Weights (side,), 1 at the edge of the image, because no tile sees more there."""
        i = torch.arange(1, side + 1, device=inputs[0].device)
        before, after = i + overlap * (start == 0), i.flip(0) + overlap * (start + side == n)
        return rising(torch.minimum(before, after), overlap)

    total, weight = None, torch.zeros(h, w, device=inputs[0].device)
    places = [*itertools.product(starts(h, th, overlap), starts(w, tw, overlap))]
    chosen = None if gradient_of is None else gradient_of % len(places)
    for i, (top, left) in enumerate(places):
        crops = []
        for x in inputs:
            f = x.shape[2] // h
            crops.append(x[:, :, top * f : (top + th) * f, left * f : (left + tw) * f])
        with torch.set_grad_enabled(torch.is_grad_enabled() and chosen in (None, i)):
            made = function(*crops).float()
        if chosen is not None and made.requires_grad:
            made.register_hook(lambda gradient: len(places) * gradient)
        mask = fade(top, th, h)[:, None] * fade(left, tw, w)
        total = made.new_zeros(*made.shape[:2], h, w) if total is None else total
        total[:, :, top : top + th, left : left + tw] += made * mask
        weight[top : top + th, left : left + tw] += mask
    assert total is not None
    return total / weight


def joined(
    piece: Callable[[int], Tensor], n: int, side: int, overlap: int, dim: int
) -> Iterator[Tensor]:
    """Parts of an image in their order, from pieces that are faded where they overlap.

    The image has n pixels along the dimension `dim`; piece(start), uint8, shows `side` of them,
    each as one or more pixels.
    """
    rest = None
    for start, end in itertools.pairwise([*starts(n, side, overlap), n]):
        new = piece(start)
        scale = new.shape[dim] // side
        if rest is not None:
            length = scale * overlap
            weights = rising(torch.arange(1, length + 1), length)[(..., *[None] * (2 - dim))]
            edge, before = new.narrow(dim, 0, length), rest.narrow(dim, 0, length)
            edge.copy_(torch.lerp(before.float(), edge.float(), weights).round_())
        done = scale * (end - start)
        rest = new.narrow(dim, done, min(scale * overlap, new.shape[dim] - done)).clone()
        yield new.narrow(dim, 0, done)


def in_bands(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int = 0, overlap: int = 0
) -> Iterator[Tensor]:
    """function(x) in bands of rows from top to bottom, computed in tiles, rounded to 8 bits.

    x (C, h, w) -> (C', rows, scale w) uint8 on the CPU. Memory holds no more than two bands of a
    tile's height. function maps (C, h, w) to (C', scale h, scale w) in [0, 1].
    """
    h, w = x.shape[1:]
    th, tw, overlap = sides(h, w, tile, overlap)

    def band(top: int) -> Tensor:
        def made(left: int) -> Tensor:
            return to_uint8(function(x[:, top : top + th, left : left + tw])).cpu()

        rows, right = torch.empty(0), 0
        for part in joined(made, w, tw, overlap, dim=2):
            if right == 0:
                rows = part.new_empty(*part.shape[:2], part.shape[1] // th * w)
            rows[..., right : right + part.shape[2]] = part
            right += part.shape[2]
        return rows

    return joined(band, h, th, overlap, dim=1)
