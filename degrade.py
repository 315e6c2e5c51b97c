"""D: hand-made degradation of clean HR images into synthetic LR (Section 2.1 uses Real-ESRGAN's).

In: HR images (B, 3, H, W) in [0, 1] and one row of parameters theta for each. Out: LR images,
1/scale of the size. Each image goes through its own operations (blur, resize, noise, JPEG) in its
own order: two rounds for Real-ESRGAN (arXiv:2107.10833), shuffled for BSRGAN (arXiv:2103.14006).

    python degrade.py --hr data/hr --out out/realesrgan
    python degrade.py --hr data/hr --out out/bsrgan --recipe bsrgan --per-image 4 --seed 1
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common

# ---- the published options --------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One round of blur, resize, noise, JPEG; pairs are ranges that are drawn from uniformly."""

    blur_prob: float = 1.0
    blur_sigma: tuple[float, float] = (0.2, 3.0)  # pixels, of each axis
    sinc_prob: float = 0.1
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)  # up, down, keep
    resize: tuple[float, float] = (0.15, 1.5)  # in round 2: of the LR size
    modes: tuple[str, ...] = ("area", "bilinear", "bicubic")  # of resizing
    sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)  # of the kernels
    gaussian_prob: float = 0.5  # otherwise Poisson
    gaussian: tuple[float, float] = (1.0, 30.0)  # std in levels of 255
    poisson: tuple[float, float] = (0.05, 3.0)
    gray_prob: float = 0.4
    jpeg: tuple[int, int] = (30, 95)  # 0 is none
    jpeg_prob: float = 1.0


@dataclass(frozen=True)
class Final:
    """What comes with the resize to LR, before or after the last JPEG."""

    sinc_prob: float = 0.8
    sharpen_prob: float = 0.0  # otherwise
    sharpen: tuple[float, float] = (0.0, 1.5)  # amount of unsharp masking


# fmt: off
ROUNDS = {
    # Real-ESRGAN x4plus, as published. Deviation: the public code sharpens HR before D (a matter
    # of its training, not of D), its sizes drift by rounding, its JPEG is not libjpeg's and takes
    # fractional qualities. With the same theta this LR is .26 dB nearer to bicubic than theirs.
    "realesrgan": (
        Round(),
        Round(blur_prob=0.8, blur_sigma=(0.2, 1.5), resize_prob=(0.3, 0.4, 0.3), resize=(0.3, 1.2),
              gaussian=(1.0, 25.0), poisson=(0.05, 2.5)),
        Final(),
    ),
    # The lighter settings of SynDiff (arXiv:2303.06994).
    "light": (
        Round(resize=(0.3, 1.5), gaussian=(1.0, 15.0), poisson=(0.05, 2.0), jpeg=(60, 95)),
        Round(blur_prob=0.5, blur_sigma=(0.2, 1.5), resize_prob=(0.3, 0.4, 0.3), resize=(0.6, 1.2),
              gaussian=(1.0, 12.0), poisson=(0.05, 1.0), jpeg=(60, 100)),
        Final(sinc_prob=0.0),
    ),
    # Not in the paper: one lens blur, then little noise, sharpening and compression, as modern
    # cameras have. The others hardly ever draw an LR this clean, and none is sharpened; what E_deg
    # never saw it can't tell apart.
    "camera": (
        Round(blur_sigma=(0.3, 4.0), sinc_prob=0.0, resize_prob=(0.0, 0.0, 1.0),
              gaussian_prob=1.0, gaussian=(0.0, 0.0), jpeg=(0, 0)),
        Round(blur_prob=0.0, resize_prob=(0.0, 0.0, 1.0), gaussian=(0.0, 8.0), poisson=(0.0, 0.8),
              jpeg=(70, 100)),
        Final(sinc_prob=0.0, sharpen_prob=0.5),
    ),
    # Not in the paper: as `camera`, but each of its factors up to what a bad camera does, and often
    # not there at all. Elsewhere a wide blur always comes with noise, and the last resize and JPEG
    # hide most noise; what E_deg has not seen alone it takes for something else.
    "wide": (
        Round(blur_prob=0.8, blur_sigma=(0.3, 7.5), sinc_prob=0.0, sizes=(25,),
              resize_prob=(0.0, 0.0, 1.0), gaussian_prob=1.0, gaussian=(0.0, 0.0), jpeg=(0, 0)),
        Round(blur_prob=0.0, resize_prob=(0.0, 0.0, 1.0),
              modes=("area", "bilinear", "bicubic", "antialiased"), gaussian=(0.0, 25.0),
              poisson=(0.0, 0.0), jpeg=(25, 95), jpeg_prob=0.5),
        Final(sinc_prob=0.0, sharpen_prob=0.5),
    ),
}
# Six kinds of kernel: two axes or one (isotropic), times three profiles.
KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
KIND_PROB = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
GENERALIZED_SHAPE, PLATEAU_SHAPE = (0.5, 4.0), (1.0, 2.0)

# BSRGAN: the same seven operations for every image, in random order, then a JPEG. `s` is the scale
# that is left: at scale 4 the image is halved first with this probability.
BSRGAN_HALVE_PROB = 0.25
BSRGAN_SIZES = (7, 9, 11, 13, 15, 17, 19, 21, 23, 25)
BSRGAN_ANISO_PROB = 0.5          # eigenvalues of the covariance U(0, 4 + s)
BSRGAN_ISO_SIGMA = (2.0, 0.2)    # otherwise sigma U(0, 2 + 0.2 s)
BSRGAN_MODES = ("coverage", "bilinear", "bicubic")  # OpenCV's INTER_AREA, _LINEAR, _CUBIC
BSRGAN_RESIZE_PROB = 0.75        # downsample 2 by U(1, 2 s)
BSRGAN_SHIFTED_SIGMA = (0.1, 0.6)  # otherwise by s, behind a Gaussian of sigma U(0.1, 0.6 s)
BSRGAN_NOISE = (2, 25)           # whole levels of 255
BSRGAN_NOISE_PROB = (0.4, 0.4, 0.2)  # colour, gray, correlated over channels (at the highest level)
BSRGAN_JPEG_PROB, BSRGAN_JPEG = 0.9, (30, 95)
# fmt: on
RECIPES = (*ROUNDS, "bsrgan", "bicubic")

KERNEL_SIZE = 25  # of all kernels; smaller ones are padded with zeros
# Of resizing: torch's area, bilinear, bicubic; Pillow's bicubic; OpenCV's area, by coverage.
MODES = ("area", "bilinear", "bicubic", "antialiased", "coverage")
# What `order` is made of; the number says which column of the parameters an operation reads.
OPERATIONS = ("", "blur 1", "blur 2", "blur 3", "resize 1", "resize 2", "resize 3",
              "gaussian 1", "gaussian 2", "poisson 1", "poisson 2", "jpeg 1", "jpeg 2")  # fmt: skip
STEPS = 10

# ---- D ----------------------------------------------------------------------------------------


@torch.no_grad()
def degrade(hr: Tensor, theta: Degradation, generator: torch.Generator | None = None) -> Tensor:
    """D(X, theta): hr (B, 3, H, W) -> lr (B, 3, H/scale, W/scale), in [0, 1]; lr has 8-bit values.

    Row i is degraded with row i of theta. With a generator the noise is drawn anew for the whole
    batch. Without one each row is degraded alone with the noise of its theta.seed: theta replays
    the image, on a CPU byte for byte in any batch and run, with any number of threads. Elsewhere
    (on a GPU, or beside other images) the last bit of the arithmetic may differ, so that now and
    then a rounding falls the other way. ValueError for sizes that do not fit and for hr outside
    [0, 1]; while noise is drawn anew a GPU is not waited for: there a device assertion fails.
    """
    (B, _, H, W), theta = hr.shape, theta.to("cpu")
    if len(theta) != B:
        raise ValueError(f"{B} images, but {len(theta)} rows of parameters")
    scales = set(theta.scale.tolist())
    if len(scales) != 1:
        raise ValueError("a batch needs at least one image, and the same scale for all")
    if H % max(scales) or W % max(scales):
        raise ValueError(f"images of {H} x {W} pixels can't be degraded by scale {max(scales)}")
    hr = hr.float().contiguous()
    low, high = hr.aminmax()
    in_range = (low >= -1e-3) & (high <= 1 + 1e-3)  # but for rounding
    if generator is not None and hr.device.type != "cpu":
        torch._assert_async(in_range, "HR images must lie in [0, 1]")
    elif not in_range:
        raise ValueError("HR images must lie in [0, 1]: divide 8-bit values by 255")
    with plain_float32(hr.device):
        if generator is not None:
            return on_canvas(hr, theta, common.generator_on(hr.device, generator))
        draws = map(common.generator, theta.seed.tolist())
        rows = [on_canvas(hr[[b]], theta[b : b + 1], draw) for b, draw in enumerate(draws)]
        return torch.cat(rows)


def on_canvas(hr: Tensor, theta: Degradation, generator: torch.Generator) -> Tensor:
    """D for a batch: each operation is applied at once to all images that wait for it.

    On the way images have sizes of their own: they sit in the top left corners of one canvas, and
    what lies beyond their sizes has no effect. Noise is drawn on the generator's device.
    """
    (B, _, H, W), device = hr.shape, hr.device
    turns = plan(theta, H, W, CPU_CANVAS if device.type == "cpu" else 2**62)
    # The host knows all numbers beforehand: they go to the device together, and none comes back.
    steps = [step for _, steps in turns for step in steps]
    numbers = torch.tensor([step[:5] for step in steps], dtype=torch.float64)
    numbers = numbers.to(device, non_blocking=True)
    row, column, size = (part.squeeze(1) for part in numbers[:, :4].long().split([1, 1, 2], dim=1))
    longest = fast_length(max(max(step.height, step.width) for step in steps))
    kernels = blur_kernels(theta, device)[row, column]
    mix = theta.colour_mix.to(device, non_blocking=True)[row]
    each = (row, size, numbers[:, 4].float(), kernels, mirrored(size, longest), mix)
    each_turn = zip(*(part.split([len(steps) for _, steps in turns]) for part in each), strict=True)
    weights = resize_weights([steps for kind, steps in turns if kind == "resize"], device)
    x = hr.clone()
    for (kind, steps), (row, size, value, kernel, index, mix) in zip(turns, each_turn, strict=True):
        first, last = steps[0].row, steps[-1].row
        here = slice(first, last + 1) if last - first < len(steps) else row  # a view, or a copy
        h, w = largest([(step.height, step.width) for step in steps])
        y = x[here, :, :h, :w]
        gray = [step.gray for step in steps]
        if kind == "blur":
            y = blur(y, kernel, index)
        elif kind == "resize":
            y = resize(y, *next(weights))
        elif kind == "gaussian":
            y = gaussian(y, value, gray, mix, generator)
        elif kind == "poisson":
            y = poisson(y, value, gray, size, generator)
        else:
            y = jpeg_round_trip(y, value.long(), "4:2:0", size)
        x = y if len(steps) == B else replaced(x, here, y)
    h, w = steps[0].new
    return (x[:, :, :h, :w].clamp(0, 1) * 255).round() / 255


CPU_CANVAS = 2**16  # pixels that the images of a turn may have together: a cache holds them
Size = tuple[int, int]  # height and width


class Step(NamedTuple):
    """What one image goes through in a turn, as the host knows it beforehand."""

    row: int  # of the batch
    column: int  # of theta, that it reads
    height: int  # before
    width: int
    value: float  # the kind's of VALUES
    gray: bool  # the same noise in all channels
    new: Size  # afterwards


VALUES = {"blur": "blur_size", "resize": "resize_mode", "gaussian": "gaussian_std",
          "poisson": "poisson_scale", "jpeg": "jpeg_quality"}  # fmt: skip
TOGETHER = (("blur",), ("resize",), ("gaussian", "poisson"))


def plan(theta: Degradation, H: int, W: int, room: int) -> list[tuple[str, list[Step]]]:
    """The turns in which a batch is degraded; the images of a turn share `room` pixels.

    Images do not depend on each other. So each turn takes what most of them wait for, and JPEG,
    the dearest, comes when all wait for it: the number of turns hardly grows with the batch.
    """
    values = {kind: getattr(theta, column).tolist() for kind, column in VALUES.items()}
    factor, gray, scale = (part.tolist() for part in (theta.resize, theta.gray_noise, theta.scale))
    waiting = [[OPERATIONS[code].split() for code in row if code] for row in theta.order.tolist()]
    for operations in waiting:
        if [column for kind, column in operations if kind == "resize"][-1:] != ["3"]:
            raise ValueError("the last resize in a row of theta.order must be that to LR, resize 3")
    sizes, turns = [(H, W)] * len(theta), []

    def step(kind: str, b: int) -> Step:
        i, (h, w) = int(waiting[b].pop(0)[1]) - 1, sizes[b]
        if kind == "resize" and i == 2:
            sizes[b] = (H // scale[b], W // scale[b])
        elif kind == "resize":
            h_new, w_new = (int(np.float32(n) * np.float32(factor[b][i])) for n in (H, W))
            sizes[b] = (max(1, h_new), max(1, w_new))
        return Step(b, i, h, w, values[kind][b][i], gray[b][i % 2], sizes[b])

    while any(waiting):
        first = [row[0][0] if row else "" for row in waiting]
        most = max(TOGETHER, key=lambda kinds: sum(map(first.count, kinds)))
        for kind in [kind for kind in most if kind in first] or ["jpeg"]:
            # A canvas is as large as its largest image: those of about one size share it.
            rows = [b for b, name in enumerate(first) if name == kind]
            rows.sort(key=lambda b: -math.prod(sizes[b]))
            while rows:
                fitting = max(1, room // math.prod(sizes[rows[0]]))
                turns.append((kind, [step(kind, b) for b in sorted(rows[:fitting])]))
                rows = rows[fitting:]
    return turns


def largest(sizes: list[Size]) -> Size:
    """The size of a canvas that holds them all."""
    return max(h for h, _ in sizes), max(w for _, w in sizes)


def replaced(canvas: Tensor, rows: Tensor | slice, images: Tensor) -> Tensor:
    """The canvas, enlarged if need be, with new images in these rows."""
    right, below = (max(0, images.shape[d] - canvas.shape[d]) for d in (3, 2))
    if right or below:
        canvas = F.pad(canvas, (0, right, 0, below))
    canvas[:, :, : images.shape[2], : images.shape[3]][rows] = images
    return canvas


def pick(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x[b, :, rows[b], columns[b]] for every image b: (B, C, H', W')."""
    index = rows[:, :, None] * x.shape[3] + columns[:, None]  # (B, H', W')
    picked = x.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1))
    return picked.unflatten(2, index.shape[1:])


@contextlib.contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """Neither bf16 nor TF32 inside, whatever the training around it allows itself."""
    matmul = torch.backends.cuda.matmul
    allowed, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32 = allowed


# ---- theta ------------------------------------------------------------------------------------


@dataclass
class Degradation:
    """Parameters theta of D, one row per image; only what an operation in `order` reads counts."""

    order: Tensor  # (B, 10) indices into OPERATIONS; 0 does nothing
    blur_sigma: Tensor  # (B, 3, 2) widths along both axes, pixels
    blur_angle: Tensor  # (B, 3) radians
    blur_shape: Tensor  # (B, 3) exponent beta; 1 is a Gaussian
    blur_plateau: Tensor  # (B, 3) bool: 1 / (1 + q^beta) instead of exp(-q^beta / 2)
    blur_size: Tensor  # (B, 3) kernel size, odd
    sinc_cutoff: Tensor  # (B, 3) radians per pixel; 0 is no sinc
    sharpen: Tensor  # (B, 3) amount: adds that times what the blur takes away; 0 is a blur
    resize: Tensor  # (B, 2) new size / HR size; the third resize is to LR
    resize_mode: Tensor  # (B, 3) index into MODES
    gaussian_std: Tensor  # (B, 2) on [0, 1]
    poisson_scale: Tensor  # (B, 2)
    gray_noise: Tensor  # (B, 2) bool: the same noise in all channels
    colour_mix: Tensor  # (B, 3, 3) mixes the channels of coloured Gaussian noise
    jpeg_quality: Tensor  # (B, 2) 1..100
    scale: Tensor  # (B,) HR size / LR size
    seed: Tensor  # (B,) of the noise

    def __len__(self) -> int:
        """Number of images."""
        return len(self.seed)

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Degradation:
        """Select rows: a slice, an index tensor, a mask or a list."""
        return Degradation(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device | str) -> Degradation:
        """Move all tensors; a GPU is not waited for."""
        wait = torch.device(device).type == "cpu"
        columns = (getattr(self, f.name) for f in fields(self))
        return Degradation(*(column.to(device, non_blocking=not wait) for column in columns))

    @staticmethod
    def cat(parts: list[Degradation]) -> Degradation:
        """Join rows."""
        columns = (torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Degradation))
        return Degradation(*columns)

    def to_json(self) -> list[str]:
        """One JSON object per row; floats survive the round trip exactly."""
        columns = {f.name: getattr(self, f.name).tolist() for f in fields(self)}
        columns["order"] = [[OPERATIONS[i] for i in row] for row in columns["order"]]
        rows = zip(*columns.values(), strict=True)
        return [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]

    @staticmethod
    def from_json(lines: list[str]) -> Degradation:
        """Read what to_json wrote."""
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["order"] = [OPERATIONS.index(name) for name in row["order"]]
        columns = (torch.tensor([row[f.name] for row in rows]) for f in fields(Degradation))
        return Degradation(*columns)

    def performed(self, kind: str) -> tuple[Tensor, Tensor]:
        """Which steps are of this kind, and the column of theta that each reads: (B, 10) each."""
        codes = [i for i, name in enumerate(OPERATIONS) if name.startswith(kind)]
        column = self.order - codes[0]
        return (column >= 0) & (column < len(codes)), column.clamp(0, len(codes) - 1)

    def physical(self) -> Tensor:
        """What theta means for the LR image: (B, 5), each about in [0, 1].

        Blur width (log LR pixels), resolution lost by resizing (log), ringing, noise, JPEG loss.
        Noise and JPEG that all came before a resize can't be told from the image: NaN.
        """
        scale = self.scale.float()[:, None]
        resized, column = self.performed("resize")
        to_lr = torch.ones_like(scale)
        factor = torch.cat([self.resize * scale, to_lr], dim=1).gather(1, column)
        step = torch.arange(STEPS, device=scale.device)
        last = step.where(resized, -1).cummax(1).values  # the last resize up to this step
        grid = factor.gather(1, last.clamp(min=0)).where(last >= 0, scale)  # pixels per LR pixel
        seen = grid == 1
        # Of the kernels as they are: a wide one of few pixels is cut off.
        squares = (torch.arange(KERNEL_SIZE, device=scale.device) - KERNEL_SIZE // 2).square()
        moment = (blur_kernels(self) * (squares + squares[:, None])).sum((2, 3)) / 2  # (B, 3)
        edges = (1 - self.sinc_cutoff / math.pi).where(self.sinc_cutoff > 0, self.sharpen)
        blurred, column = self.performed("blur")
        smooth = blurred & ((self.sinc_cutoff == 0) & (self.sharpen == 0)).gather(1, column)
        blur_variance = (moment.gather(1, column) / grid.square()).where(smooth, 0.0).sum(1)
        ringing = edges.gather(1, column).where(blurred, 0.0).amax(1)
        gaussian, column = self.performed("gaussian")
        std = self.gaussian_std.gather(1, column)
        poisson, column = self.performed("poisson")
        # Poisson: the std that scale has at a mid gray of 8 bits.
        std = std.where(gaussian, self.poisson_scale.gather(1, column) * 0.04)
        noisy = gaussian | poisson
        noise_variance = std.square().where(noisy & seen, 0.0).sum(1)
        compressed, column = self.performed("jpeg")
        quality = self.jpeg_quality.gather(1, column).where(compressed & seen, 100).amin(1).float()
        noise_hidden = (noisy & ~seen).any(1) & (noise_variance == 0)
        jpeg_hidden = (compressed & ~seen).any(1) & (quality == 100)
        meaning = [
            (blur_variance + 0.01).log() / 4.6 + 1,
            -torch.minimum(grid.amin(1), scale[:, 0]).clamp(max=1).log(),
            ringing,
            ((noise_variance.sqrt() * 255 + 1).log() / 3.5).where(~noise_hidden, math.nan),
            (1 - quality / 100).where(~jpeg_hidden, math.nan),
        ]
        return torch.stack(meaning, dim=1)


def noise_and_quality(physical: Tensor) -> tuple[Tensor, Tensor]:
    """Noise, a std on [0, 1], and JPEG quality 1..100 (B,) of Degradation.physical's (B, 5)."""
    noise = (3.5 * physical[:, 3]).exp().sub(1).div(255).clamp(min=0)
    return noise, (100 * (1 - physical[:, 4])).round().clamp(1, 100).long()


# ---- drawing theta ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """Independent random numbers for each image of a batch: (B,) each."""

    batch: int
    generator: torch.Generator | None

    def uniform(self, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
        """In [low, high)."""
        return low + (high - low) * torch.rand(self.batch, generator=self.generator)

    def chance(self, probability: float) -> Tensor:
        """True with this probability."""
        return self.uniform() < probability

    def choice(self, probabilities: tuple[float, ...]) -> Tensor:
        """An index with these probabilities."""
        edges = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)[:-1].float()
        return torch.bucketize(self.uniform(), edges, right=True)

    def one_of(self, values: tuple[int, ...] | range) -> Tensor:
        """One of these values, all equally likely."""
        index = torch.randint(len(values), (self.batch,), generator=self.generator)
        return torch.tensor(values)[index]

    def mode(self, modes: tuple[str, ...]) -> Tensor:
        """The place in MODES of one of these."""
        return self.one_of(tuple(map(MODES.index, modes)))

    def around_one(self, low: float, high: float) -> Tensor:
        """Below or above one with even chance."""
        return torch.where(self.chance(0.5), self.uniform(low, 1.0), self.uniform(1.0, high))


def coded(name: str, performed: Tensor) -> Tensor:
    """The code of an operation where it is performed, else 0: (B,)."""
    return OPERATIONS.index(name) * performed.long()


def bicubic(batch: int, scale: int) -> Degradation:
    """Parameters of a plain reduction to LR: what the recipes start from."""

    def full(value: float, *shape: int) -> Tensor:
        return torch.full((batch, *shape), value)

    theta = Degradation(
        order=full(0, STEPS), blur_sigma=full(1.0, 3, 2), blur_angle=full(0.0, 3),
        blur_shape=full(1.0, 3), blur_plateau=full(False, 3), blur_size=full(1, 3),
        sinc_cutoff=full(0.0, 3), sharpen=full(0.0, 3), resize=full(1.0, 2),
        resize_mode=full(MODES.index("antialiased"), 3), gaussian_std=full(0.0, 2),
        poisson_scale=full(0.0, 2), gray_noise=full(False, 2),
        colour_mix=torch.eye(3).repeat(batch, 1, 1), jpeg_quality=full(100, 2),
        scale=full(scale), seed=full(0),
    )  # fmt: skip
    theta.order[:, 0] = OPERATIONS.index("resize 3")
    return theta


def draw_rounds(theta: Degradation, draw: Draw, first: Round, second: Round, final: Final) -> None:
    """Real-ESRGAN's two rounds (arXiv:2107.10833), written into theta."""
    always = torch.ones(len(theta), dtype=torch.bool)
    steps = []
    for i, options in enumerate((first, second)):
        kind, size = draw.choice(KIND_PROB), draw.one_of(options.sizes)
        isotropic = kind % 2 == 0
        gaussian_shape = kind < KINDS.index("generalized_iso")
        plateau = kind >= KINDS.index("plateau_iso")
        width, height = draw.uniform(*options.blur_sigma), draw.uniform(*options.blur_sigma)
        turn = draw.uniform(-math.pi, math.pi)
        shape = draw.around_one(*GENERALIZED_SHAPE)
        shape = torch.where(plateau, draw.around_one(*PLATEAU_SHAPE), shape)
        lowest = torch.where(size < 13, math.pi / 3, math.pi / 5)
        theta.blur_sigma[:, i] = torch.stack([width, torch.where(isotropic, width, height)], 1)
        theta.blur_angle[:, i] = torch.where(isotropic, 0.0, turn)
        theta.blur_shape[:, i] = torch.where(gaussian_shape, 1.0, shape)
        theta.blur_plateau[:, i] = plateau
        theta.blur_size[:, i] = size
        sinc = draw.chance(options.sinc_prob)
        theta.sinc_cutoff[:, i] = torch.where(sinc, draw.uniform(lowest, math.pi), 0.0)
        direction = draw.choice(options.resize_prob)
        up, down = draw.uniform(1.0, options.resize[1]), draw.uniform(options.resize[0], 1.0)
        factor = torch.stack([up, down, torch.ones(len(theta))]).gather(0, direction[None])[0]
        theta.resize[:, i] = factor / (1 if i == 0 else theta.scale)
        theta.resize_mode[:, i] = draw.mode(options.modes)
        gaussian = draw.chance(options.gaussian_prob)
        std, scale = draw.uniform(*options.gaussian) / 255, draw.uniform(*options.poisson)
        theta.gaussian_std[:, i] = torch.where(gaussian, std, 0.0)
        theta.poisson_scale[:, i] = torch.where(gaussian, 0.0, scale)
        theta.gray_noise[:, i] = draw.chance(options.gray_prob)
        theta.jpeg_quality[:, i] = draw.one_of(range(options.jpeg[0], options.jpeg[1] + 1))
        compressed = always if options.jpeg_prob == 1 else draw.chance(options.jpeg_prob)
        steps += [
            coded(f"blur {i + 1}", draw.chance(options.blur_prob)),
            coded(f"resize {i + 1}", (direction < 2) | (i > 0)),
            coded(f"gaussian {i + 1}", theta.gaussian_std[:, i] > 0)
            + coded(f"poisson {i + 1}", theta.poisson_scale[:, i] > 0),
            coded(f"jpeg {i + 1}", (theta.jpeg_quality[:, i] > 0) & compressed),
        ]
    theta.resize_mode[:, 2] = draw.mode(Round.modes)
    theta.blur_size[:, 2] = draw.one_of(Round.sizes)
    sinc, cutoff = draw.chance(final.sinc_prob), draw.uniform(math.pi / 3, math.pi)
    sharpen = ~sinc & draw.chance(final.sharpen_prob)
    theta.sinc_cutoff[:, 2] = torch.where(sinc, cutoff, 0.0)
    theta.sharpen[:, 2] = torch.where(sharpen, draw.uniform(*final.sharpen), 0.0)
    jpeg, to_lr, filtered = steps.pop(), coded("resize 3", always), coded("blur 3", sinc | sharpen)
    jpeg_last = draw.chance(0.5)
    steps += [
        torch.where(jpeg_last, to_lr, jpeg),
        torch.where(jpeg_last, filtered, to_lr),
        torch.where(jpeg_last, jpeg, filtered),
    ]
    theta.order[:] = torch.stack(steps, 1)


def draw_bsrgan(theta: Degradation, draw: Draw) -> None:
    """BSRGAN's shuffled operations (arXiv:2103.14006), written into theta.

    Left out is its camera pipeline, whose model was never released. Deviation: the overshoot of a
    bicubic resize is clipped not there but in the next noise or JPEG.
    """
    B = len(theta)
    always = torch.ones(B, dtype=torch.bool)
    halved = draw.chance(BSRGAN_HALVE_PROB) & (theta.scale == 4)
    halving = torch.where(draw.chance(0.5), draw.mode(BSRGAN_MODES), MODES.index("antialiased"))
    left = theta.scale / torch.where(halved, 2.0, 1.0)
    for i in range(2):
        aniso = draw.chance(BSRGAN_ANISO_PROB)[:, None]
        axes = torch.stack([draw.uniform(0, 4 + left), draw.uniform(0, 4 + left)], 1).sqrt()
        base, more = BSRGAN_ISO_SIGMA
        radius = draw.uniform(0, base + more * left)[:, None]
        theta.blur_sigma[:, i] = torch.where(aniso, axes, radius)
        theta.blur_angle[:, i] = torch.where(aniso[:, 0], draw.uniform(0, math.pi), 0.0)
        theta.blur_size[:, i] = draw.one_of(BSRGAN_SIZES)
    # Downsample 2. Its second form keeps every s-th pixel of the image under a Gaussian shifted by
    # (s - 1) / 2: just what bilinear resizing by s does behind a centred one.
    resized = draw.chance(BSRGAN_RESIZE_PROB)
    base, more = BSRGAN_SHIFTED_SIGMA
    theta.blur_sigma[:, 2] = draw.uniform(base, more * left)[:, None]
    theta.blur_size[:, 2] = KERNEL_SIZE
    factor = torch.where(resized, draw.uniform(1, 2 * left), left)
    theta.resize[:, 0] = 0.5
    theta.resize[:, 1] = torch.where(halved, 0.5, 1.0) / factor
    second = torch.where(resized, draw.mode(BSRGAN_MODES), MODES.index("bilinear"))
    theta.resize_mode[:] = torch.stack([halving, second, draw.mode(BSRGAN_MODES)], 1)
    colour, low, high = draw.choice(BSRGAN_NOISE_PROB), *BSRGAN_NOISE
    level = torch.where(colour == 2, high, draw.one_of(range(low, high + 1)))
    theta.gaussian_std[:, 0] = level / 255
    theta.gray_noise[:, 0] = colour == 1
    # Correlated channels: the covariance |U^T diag(d) U| is made valid as NumPy does, by taking its
    # eigenvalues' absolute values.
    U = torch.linalg.svd(torch.rand(B, 3, 3, generator=draw.generator).double()).U
    d = torch.rand(B, 3, generator=draw.generator).double()
    value, vector = torch.linalg.eigh((U.mT @ torch.diag_embed(d) @ U).abs())
    mix = (vector * value.abs().sqrt()[:, None]) @ vector.mT
    theta.colour_mix[:] = mix.float().where((colour == 2)[:, None, None], torch.eye(3))
    low, high = BSRGAN_JPEG
    theta.jpeg_quality[:] = torch.stack([draw.one_of(range(low, high + 1)) for _ in range(2)], 1)
    place = torch.stack([draw.uniform() for _ in range(6)], 1)  # (B, 6) of the six operations
    place[:, 2:4] = place[:, 2:4].sort(1).values  # downsample 3 comes after downsample 2
    jpeg = coded("jpeg 1", draw.chance(BSRGAN_JPEG_PROB))
    names = ("blur 1", "blur 2", "blur 3", "resize 2", "resize 3", "gaussian 1")
    steps = [coded(name, ~resized if name == "blur 3" else always) for name in names]
    codes = torch.stack([*steps, jpeg], dim=1)
    shuffled = place[:, [0, 1, 2, 2, 3, 4, 5]].argsort(dim=1, stable=True)
    theta.order[:, 0] = coded("resize 1", halved)
    theta.order[:, 1:8] = codes.gather(1, shuffled)
    theta.order[:, 8] = coded("jpeg 2", always)


def sample_degradation(
    batch: int,
    recipe: str = "realesrgan",
    scale: int = 4,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Degradation:
    """Draw parameters of D for a number of images, all independent; UserError for another recipe.

    `generator` is a CPU generator: theta is drawn on the CPU, so it is the same for any device.
    """
    if recipe not in RECIPES:
        raise common.UserError(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}.")
    theta, draw = bicubic(batch, scale), Draw(batch, generator)
    if recipe == "bsrgan":
        draw_bsrgan(theta, draw)
    elif recipe != "bicubic":
        draw_rounds(theta, draw, *ROUNDS[recipe])
    theta.seed = torch.randint(2**62, (batch,), generator=generator)
    return theta if device is None else theta.to(device)


# ---- blur -------------------------------------------------------------------------------------


def blur_kernels(theta: Degradation, device: torch.device | None = None) -> Tensor:
    """The kernels (B, 3, 25, 25) of theta's three blurs, each summing to 1.

    With q = x^T Sigma^-1 x: exp(-q^beta / 2) (Gaussian for beta = 1), the plateau 1 / (1 + q^beta),
    or, where cutoff > 0, the circular sinc cutoff J_1(cutoff r) / (2 pi r) (arXiv:2107.10833, Eq.
    2-6). Sharpening by `amount` is (1 + amount) delta - amount kernel.
    """
    columns = [*theta.blur_sigma.unbind(2), theta.blur_angle, theta.blur_shape, theta.blur_plateau,
               theta.blur_size, theta.sinc_cutoff, theta.sharpen]  # fmt: skip
    numbers = torch.stack([column.double() for column in columns])
    numbers = numbers.to(device or numbers.device, non_blocking=True)[..., None, None]
    width, height, angle, beta, plateau, size, cutoff, amount = numbers  # (B, 3, 1, 1) each
    half = KERNEL_SIZE // 2
    axis = torch.arange(-half, half + 1, device=numbers.device, dtype=torch.float64)
    y, x = axis[:, None], axis
    cos, sin = angle.cos(), angle.sin()
    along, across = x * cos + y * sin, y * cos - x * sin  # (B, 3, 25, 25)
    q = (along / width.clamp(min=1e-3)).square() + (across / height.clamp(min=1e-3)).square()
    q = q.pow(beta)
    kernel = torch.where(plateau > 0, 1 / (1 + q), (q / -2).exp())
    radius = (x.square() + y.square()).sqrt()
    sinc = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    sinc = torch.where(radius > 0, sinc, cutoff.square() / (4 * math.pi))
    kernel = torch.where(cutoff > 0, sinc, kernel)
    kernel = kernel * (torch.maximum(x.abs(), y.abs()) <= size // 2)
    kernel = kernel / kernel.sum((2, 3), keepdim=True)
    sharp = (1 + amount) * (radius == 0) - amount * kernel
    return torch.where(amount > 0, sharp, kernel).float()


def mirrored(size: Tensor, length: int) -> Tensor:
    """Indices -12, -11, ... of pixels, mirrored into [0, n) for sizes n (B, 2): (B, 2, length)."""
    i = torch.arange(length, device=size.device) - KERNEL_SIZE // 2
    period = (2 * size - 2).clamp(min=1)[..., None]
    i = i % period
    return torch.minimum(i, period - i)


def fast_length(n: int) -> int:
    """The shortest length for the FFT, without prime factors above 7, of n pixels and margins."""
    n += KERNEL_SIZE - 1
    return next(m for m in range(n, 2 * n) if 210**16 % m == 0)


def blur(x: Tensor, kernel: Tensor, index: Tensor | None = None) -> Tensor:
    """Correlate images (B, 3, H, W) with kernels (B, 25, 25), edges mirrored.

    `index` is mirrored() of the true sizes on a canvas, default all of it.
    """
    H, W = x.shape[2:]
    lengths = fast_length(H), fast_length(W)
    if index is None:
        index = mirrored(torch.tensor([[H, W]], device=x.device).expand(len(x), 2), max(lengths))
    x = pick(x, index[:, 0, : lengths[0]], index[:, 1, : lengths[1]])
    spectrum = torch.fft.rfft2(x) * torch.fft.rfft2(kernel, lengths).conj()[:, None]
    return torch.fft.irfft2(spectrum, lengths)[:, :, :H, :W]


# ---- resize -----------------------------------------------------------------------------------


def cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' kernel of a distance >= 0: 1 at 0, and 0 from 2 pixels on."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


def overlap(distance: Tensor, ratio: Tensor) -> Tensor:
    """How much of an input pixel is under an output pixel, which is `ratio` of them wide."""
    return torch.minimum((1 + ratio) / 2 - distance, ratio).clamp(0, 1)


# Weight of an input pixel by its distance from the centre of the output pixel, in input pixels.
PROFILES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "area": lambda d, ratio: (overlap(d, ratio) > 1e-6).float(),
    "bilinear": lambda d, ratio: (1 - d).clamp(min=0),
    "bicubic": lambda d, ratio: cubic(d, -0.75),
    "antialiased": lambda d, ratio: cubic(d / ratio.clamp(min=1), -0.5),
    "coverage": overlap,
}
REPEATS_EDGES = ("bilinear", "bicubic")  # the others leave out what lies outside of the image


def resize_weights(
    turns: list[list[Step]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Size]]:
    """How both sides of the images are resized, for each turn: at, weight (n, 2, N, taps), size.

    Pixel i of side s of image b becomes the sum over k of weight[b, s, i, k] times pixel
    at[b, s, i, k]. Equals torch's interpolate, Pillow's bicubic (antialiased), OpenCV's INTER_AREA.
    """
    steps = [step for turn in turns for step in turn]
    old, new = np.array([[(step.height, step.width), step.new] for step in steps]).swapaxes(0, 1)
    mode = np.array([[step.value] * 2 for step in steps])
    # How far an output pixel looks to each side in the input, by mode.
    covered, one, wide = (1 + old / new) / 2, np.ones_like(old), 2 * (old / new).clip(min=1)
    reach = np.choose(mode, [covered, one, 2 * one, wide, covered])
    taps, N = int(2 * reach.max()) + 1, int(new.max())
    numbers = torch.tensor(np.stack([old, new, reach, mode], axis=2)).to(device, non_blocking=True)
    length, new_length, half, index = numbers[..., None, None].unbind(2)  # (n, 2, 1, 1)
    i = torch.arange(N, dtype=torch.float64, device=device)[:, None].minimum(new_length - 1)
    centre = (i + 0.5) * (length / new_length) - 0.5  # (n, 2, N, 1) in the input
    j = (centre - half).ceil() + torch.arange(taps, device=device)  # (n, 2, N, taps)
    distance, ratio = (j - centre).abs().float(), (length / new_length).float()
    weight, outside = torch.zeros_like(distance), (j < 0) | (j >= length)
    for number in {int(step.value) for step in steps}:
        profile = PROFILES[MODES[number]](distance, ratio)
        if MODES[number] not in REPEATS_EDGES:
            profile = profile.masked_fill(outside, 0.0)
        weight = torch.where(index == number, profile, weight)
    at = j.clamp(min=0).minimum(length - 1).long()
    weight = weight / weight.sum(3, keepdim=True)
    counts = [len(turn) for turn in turns]
    sizes = [largest([step.new for step in turn]) for turn in turns]
    return zip(at.split(counts), weight.split(counts), sizes, strict=True)


def resize(x: Tensor, at: Tensor, weight: Tensor, size: Size) -> Tensor:
    """Resize images (B, 3, H, W) as resize_weights says, on a new canvas of this size."""
    (H, W), N = x.shape[2:], max(size)
    matrix = x.new_zeros(len(x), 2, N, max(H, W))
    matrix.scatter_add_(3, at[:, :, :N], weight[:, :, :N])
    down, across = matrix[:, None].unbind(2)  # (B, 1, N, max(H, W)) each
    x = (down[:, :, : size[0], :H] @ x).flatten(1, 2)  # (B, 3 H', W)
    return (x @ across[:, 0, : size[1], :W].mT).unflatten(1, (3, -1))


# ---- noise ------------------------------------------------------------------------------------


def where_gray(gray: list[bool], x: Tensor, y: Tensor) -> Tensor:
    """x[b] (B, 1, H, W) where image b has gray noise, else y[b] (B, 3, H, W)."""
    if all(gray) or not any(gray):
        return x if all(gray) else y
    mask = torch.tensor(gray).to(x.device, non_blocking=True)
    return torch.where(mask[:, None, None, None], x, y)


def gaussian(
    x: Tensor, std: Tensor, gray: list[bool], mix: Tensor, generator: torch.Generator
) -> Tensor:
    """Add Gaussian noise of std[b]: the same for all channels, or mixed by mix[b] (3, 3)."""
    shape = (len(x), 1 if all(gray) else 3, *x.shape[2:])
    eps = torch.randn(shape, generator=generator, device=generator.device).to(x.device)
    noise = (std[:, None, None] * mix) @ where_gray(gray, eps[:, :1], eps).expand_as(x).flatten(2)
    return noise.view_as(x).add_(x).clamp_(0, 1)


def poisson(
    x: Tensor, scale: Tensor, gray: list[bool], size: Tensor, generator: torch.Generator
) -> Tensor:
    """Add scale[b] times the shot noise of an image with as many photons per unit as it has levels.

    The levels (8-bit values that occur in the image of size[b]) are rounded up to a power of two.
    """
    H, W = x.shape[2:]
    luma = 0.2989 * x[:, :1] + 0.5870 * x[:, 1:2] + 0.1140 * x[:, 2:]
    levels = where_gray(gray, luma, x).clamp(0, 1).mul_(255).round_()  # (B, 1 or 3, H, W)
    down, across = (torch.arange(n, device=x.device) for n in (H, W))
    inside = (down[:, None] < size[:, 0, None, None]) & (across < size[:, 1, None, None])
    inside = inside[:, None]  # (B, 1, H, W)
    found = torch.where(inside, levels, 256.0).long().flatten(1)
    number = x.new_zeros(len(x), 257).scatter_(1, found, 1.0)[:, :256].sum(1)  # of levels
    photons = torch.exp2(number.log2().ceil())[:, None, None, None] / 255  # per level
    rate = (levels * photons).mul_(inside).to(generator.device)
    counts = torch.poisson(rate, generator=generator).to(x.device)
    noise = (counts / photons).sub_(levels).mul_((scale / 255)[:, None, None, None])
    return (x + where_gray(gray, noise[:, :1], noise)).clamp_(0, 1)


# ---- JPEG: libjpeg's integer arithmetic, followed exactly in floating point --------------------

# fmt: off
BASE_TABLES = torch.tensor([[  # of luma
    16, 11, 10, 16,  24,  40,  51,  61,  12, 12, 14, 19,  26,  58,  60,  55,
    14, 13, 16, 24,  40,  57,  69,  56,  14, 17, 22, 29,  51,  87,  80,  62,
    18, 22, 37, 56,  68, 109, 103,  77,  24, 35, 55, 64,  81, 104, 113,  92,
    49, 64, 78, 87, 103, 121, 120, 101,  72, 92, 95, 98, 112, 100, 103,  99], [  # of chroma
    17, 18, 24, 47, 99, 99, 99, 99,  18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99,  47, 66, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99,  99, 99, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99,  99, 99, 99, 99, 99, 99, 99, 99]]).view(2, 8, 8)
# One pass of libjpeg's slow DCT (jfdctint.c): its butterfly of 13-bit constants, on the identity.
DCT = torch.tensor([
    [  8192,   8192,   8192,   8192,   8192,   8192,   8192,   8192],
    [ 11363,   9633,   6437,   2260,  -2260,  -6437,  -9633, -11363],
    [ 10703,   4433,  -4433, -10703, -10703,  -4433,   4433,  10703],
    [  9633,  -2259, -11362,  -6436,   6436,  11362,   2259,  -9633],
    [  8192,  -8192,  -8192,   8192,   8192,  -8192,  -8192,   8192],
    [  6437, -11362,   2261,   9633,  -9633,  -2261,  11362,  -6437],
    [  4433, -10704,  10704,  -4433,  -4433,  10704, -10704,   4433],
    [  2260,  -6436,   9633, -11363,  11363,  -9633,   6436,  -2260]]).double()
# Colours in 16-bit fixed point: the last column is added, and all is shifted right by 16 bits.
# Chroma is rounded a unit of 2^-16 lower.
TO_YCC = torch.tensor([[ 19595.,  38470.,   7471., 2**15],
                       [-11059., -21709.,  32768., 2**23 + 2**15 - 1],
                       [ 32768., -27439.,  -5329., 2**23 + 2**15 - 1]]) / 2**16
TO_RGB = torch.tensor([[     0.,  91881., 2**15],  # of chroma about 0, to be added to luma
                       [-22554., -46802., 2**15],
                       [116130.,      0., 2**15]]) / 2**16
# fmt: on


def scaled_tables() -> Tensor:
    """libjpeg's quantisation tables of luma and chroma for qualities 1 to 100: (100, 2, 8, 8)."""
    quality = torch.arange(1, 101)
    percent = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return ((BASE_TABLES * percent[:, None, None, None] + 50) // 100).clamp(1, 255)


# The passes of DCT and inverse, which libjpeg runs in integers and shifts right by so many bits.
PASSES = torch.stack([DCT * 2.0**-11, DCT * 2.0**-15, DCT.T * 2.0**-11, DCT.T * 2.0**-18])
TABLES = scaled_tables()


def quantised(plane: Tensor, table: Tensor) -> Tensor:
    """A plane (B, H, W) after the DCT, quantisation by table (B, H/8, 8, 8) and the inverse DCT.

    Each pass is rounded, half up. Rows come first, then columns; in the inverse the other way.
    """
    B, H, W = plane.shape
    rows, columns, columns_back, rows_back = PASSES.to(plane.device, non_blocking=True)

    def along_columns(matrix: Tensor, y: Tensor) -> Tensor:
        return (matrix @ y.unflatten(1, (-1, 8))).flatten(1, 2)

    y = along_columns(rows, (plane.double() - 128).mT.contiguous()).add_(0.5).floor_()
    y = along_columns(columns, y.mT.contiguous()).add_(0.5).floor_()  # 8 times the coefficient
    # Halves are rounded away from zero: a nudge that is far less than 1 / (8 q) brings them there.
    table = table[:, :, :, None]  # (B, H/8, 8, 1, 8)
    y.view(B, H // 8, 8, W // 8, 8).div_(8 / (1 + 2.0**-40) * table).round_().mul_(table)
    y = along_columns(columns_back, y).add_(0.5).floor_()
    y = along_columns(rows_back, y.mT.contiguous()).add_(128.5).floor_()
    return y.clamp_(0, 255).mT.float()


def converted(planes: Tensor, matrix: Tensor) -> Tensor:
    """TO_YCC or TO_RGB of whole planes (B, C, H, W). All stays below 2^24: float32 is exact."""
    matrix = matrix.to(planes.device, non_blocking=True)
    result = torch.matmul(matrix[:, :-1], planes.flatten(2)).add_(matrix[:, -1:]).floor_()
    return result.unflatten(2, planes.shape[2:])


def clamped(size: Tensor, length: int, margin: int = 0) -> Tensor:
    """Indices -margin .. length + margin - 1, clamped into [0, n) for sizes n (B, 2): (B, 2, L)."""
    i = torch.arange(-margin, length + margin, device=size.device).clamp(min=0)
    return i.minimum(size[..., None] - 1)


def halve(chroma: Tensor, size: Tensor) -> Tensor:
    """Average 2 x 2 pixels as libjpeg does (bias 1, 2, 1, 2, ...); repeat the last true row."""
    total = chroma[:, :, ::2] + chroma[:, :, 1::2]
    total = total[..., ::2] + total[..., 1::2]  # (B, 2, H/2, W/2)
    H, W = total.shape[2:]
    column = torch.arange(W, device=total.device)
    total = total.add_(1 + column % 2).mul_(0.25).floor_()
    return pick(total, clamped(size, H)[:, 0], column.expand(len(size), W))


def double(chroma: Tensor, size: Tensor) -> Tensor:
    """libjpeg's "fancy" upsampling: 3/4 of the nearer, 1/4 of the farther sample along each axis.

    Images of one or two columns are repeated, as in jdsample.c.
    """
    H, W = chroma.shape[2:]
    index = clamped(size, max(H, W), margin=1)
    x = pick(chroma, index[:, 0, : H + 2], index[:, 1, : W + 2])  # (B, 2, H + 2, W + 2)
    far = (size[:, 1] > 2).float()[:, None, None, None]
    nearer = 4 - far
    near = x[:, :, 1:-1] * nearer
    x = torch.stack([near.addcmul(far, x[:, :, :-2]), near.addcmul(far, x[:, :, 2:])], dim=3)
    x = x.flatten(2, 3)  # (B, 2, 2H, W + 2)
    near = x[..., 1:-1] * nearer
    left, right = near.addcmul(far, x[..., :-2]).add_(8), near.addcmul(far, x[..., 2:]).add_(7)
    return torch.stack([left, right], dim=4).flatten(3).mul_(1 / 16).floor_()


@torch.no_grad()
def jpeg_round_trip(x: Tensor, quality: Tensor, subsampling: str, size: Tensor) -> Tensor:
    """jpeg() for checked arguments on one device, without a gradient."""
    H, W = x.shape[2:]
    H16, W16 = -(-H // 16) * 16, -(-W // 16) * 16
    index = clamped(size, max(H16, W16))
    rgb = pick(x, index[:, 0, :H16], index[:, 1, :W16]).clamp_(0, 1).mul_(255).round_()
    luma, chroma = converted(rgb, TO_YCC).split([1, 2], dim=1)
    # One plane for the DCT (B, rows, W16): luma and, below it, both of chroma.
    if subsampling == "4:2:0":
        halved = (size + 1) // 2
        chroma = halve(chroma, halved)
        below = chroma.movedim(1, 2).flatten(2)  # side by side
    else:
        below = chroma.flatten(1, 2)
    rows = [H16, below.shape[1]]
    tables = TABLES.to(x.device, non_blocking=True)[quality - 1].double().split(1, dim=1)
    table = torch.cat([t.expand(-1, n // 8, -1, -1) for t, n in zip(tables, rows, strict=True)], 1)
    luma, below = quantised(torch.cat([luma[:, 0], below], dim=1), table).split(rows, dim=1)
    if subsampling == "4:2:0":
        chroma = double(below.unflatten(2, (2, -1)).movedim(2, 1) - 128, halved)
    else:
        chroma = below.unflatten(1, (2, -1)) - 128
    rgb = converted(chroma, TO_RGB).add_(luma[:, None])
    return rgb[:, :, :H, :W].clamp(0, 255).div_(255)


def jpeg(
    x: Tensor, quality: Tensor | int, subsampling: str = "4:2:0", size: Tensor | None = None
) -> Tensor:
    """Compress and decompress images as Pillow (libjpeg) does, bit for bit.

    x (B, 3, H, W) in [0, 1], first rounded to 8 bits; quality (B,) in 1..100; `size` (B, 2) are the
    true sizes on a canvas, default all of it. Returns (B, 3, H, W); gradients pass straight
    through. ValueError for another quality or subsampling; a quality that is on a GPU, which is not
    waited for, is a failed assertion of the device.
    """
    if subsampling not in ("4:2:0", "4:4:4"):
        raise ValueError(f"subsampling {subsampling!r}: 4:2:0 and 4:4:4 are supported.")
    if isinstance(quality, Tensor) and quality.device.type != "cpu":
        torch._assert_async(((quality >= 1) & (quality <= 100)).all(), "JPEG quality: 1..100")
    else:
        found = {*quality.flatten().tolist()} if isinstance(quality, Tensor) else {quality}
        if not all(1 <= q <= 100 for q in found):
            raise ValueError(f"JPEG quality {sorted(found)}: must be in 1..100.")
    quality = torch.as_tensor(quality).expand(len(x)).long()
    size = torch.tensor([x.shape[2:]]).expand(len(x), 2) if size is None else size
    quality, size = (part.to(x.device, non_blocking=True) for part in (quality, size))
    with plain_float32(x.device):
        y = jpeg_round_trip(x.float(), quality, subsampling, size) if len(x) else x
    return y + (x - x.detach()) if x.requires_grad else y


# ---- the command ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    hr: tuple[str, ...] = ()  # folders or files of HR photos (else data/hr, else data/sample/hr)
    out: str = "out/degraded"  # folder that gets hr/, lr/, pairs.jsonl and preview.png
    recipe: str = "realesrgan"  # realesrgan, bsrgan, light, camera, wide or bicubic
    per_image: int = 1  # pairs to make of every photo
    scale: int = 4  # HR size / LR size
    seed: int = 0  # pair k of a photo is degraded with draws from (seed, name of the photo, k)
    device: str = "auto"  # cpu, cuda or auto


def save_preview(path: Path, out: Path, rows: list[dict]) -> None:
    """Write a picture of a few pairs: the middle of HR | LR."""
    pairs = [[common.load_image(out / row[side]) for side in ("hr", "lr")] for row in rows]
    pictures = [
        [common.centre(hr, 96 * hr.shape[1] // lr.shape[1], 384), common.centre(lr, 96, 384)]
        for hr, lr in pairs
    ]
    common.save_sheet(path, ("HR", "LR"), pictures)


def main(cfg: Config, rt: common.Runtime) -> None:
    """Degrade a folder: out/hr, out/lr with the same names, out/pairs.jsonl with theta.

    Started again, it makes only what is missing and removes pairs that it would not make.
    """
    common.require(cfg.recipe in RECIPES, f"--recipe {cfg.recipe}: choose of {', '.join(RECIPES)}.")
    for flag, value in (("--scale", cfg.scale), ("--per-image", cfg.per_image)):
        common.require(value > 0, f"{flag} {value}: must be positive.")
    alone = "degrade.py takes every core by itself: start it without torchrun."
    common.require(rt.world_size == 1, alone)
    out = Path(cfg.out)
    files = common.outside(common.find_photos(cfg.hr, "hr", "--hr"), out, "--hr")
    ends = [""] if cfg.per_image == 1 else [f"_{k}" for k in range(cfg.per_image)]
    photos = list(zip(files, common.photo_names(files, cfg.hr), strict=True))
    names = [name + end for _, name in photos for end in ends]
    folder = common.PairFolder(out, names, "theta", rt)

    def work(photo: tuple[Path, str]) -> list[dict] | str:
        """Rows for the table, once the photo's pairs are there; or why it can't be used."""
        file, name = photo
        draws = [common.generator(cfg.seed, name, k) for k in range(cfg.per_image)]
        thetas = [sample_degradation(1, cfg.recipe, cfg.scale, draw) for draw in draws]
        rows = [
            folder.row(name + end, source=str(file), theta=json.loads(theta.to_json()[0]))
            for end, theta in zip(ends, thetas, strict=True)
        ]
        if all(folder.earlier(row, [file]) for row in rows):
            return rows
        try:
            hr = common.crop_to_multiple(common.load_image(file), cfg.scale, file)
        except ValueError as error:
            return f"skipped: {error}"
        hr = common.to_uint8(hr).float() / 255  # as it is written, also of a 16-bit photo
        folder.begin()
        common.save_image(out / rows[0]["hr"], hr)
        for row, theta in zip(rows, thetas, strict=True):
            common.save_image(out / row["lr"], degrade(hr[None].to(rt.device), theta)[0])
            if row is not rows[0]:
                common.copy_file(out / rows[0]["hr"], out / row["hr"])
        return rows

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread below has a core to itself
    with plain_float32(rt.device):
        results = common.in_parallel(work, photos, threads)
        for result in tqdm(results, total=len(photos), unit="photo"):
            if isinstance(result, str):
                tqdm.write(result)
            else:
                folder.add(result)
    rows = folder.finish()
    preview = out / "preview.png"
    if not preview.is_file():
        save_preview(preview, out, rows[: 4 * cfg.per_image : cfg.per_image])
    folder.unlock()
    skipped = len(files) - len(rows) // cfg.per_image
    print(f"{len(rows)} pairs in {out}, {skipped} images skipped; look at {preview}")


if __name__ == "__main__":
    common.launch(main, Config, {}, __doc__)
