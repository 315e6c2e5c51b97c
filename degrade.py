"""D: hand-made degradation of clean HR images into synthetic LR (Section 2.1 uses Real-ESRGAN's).

In: HR images and one row of parameters per image. Out: LR images, 1/scale of the size. Each image
goes through its own operations (blur, resize, noise, JPEG) in its own order: two rounds and a sinc
filter for Real-ESRGAN (arXiv:2107.10833), shuffled for BSRGAN (arXiv:2103.14006). On the way they
have sizes of their own too, so a batch is a list of images; what can be done for several of them at
once is done on a canvas, in whose top left corners they sit.

    python degrade.py --hr data/hr --out out/realesrgan
    python degrade.py --hr data/hr --out out/bsrgan --recipe bsrgan --per-image 4 --seed 1
"""

import contextlib
import functools
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
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
    modes: int = 3  # of resizing: the first so many of MODES
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
    # Real-ESRGAN x4plus, as published.
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
        Round(blur_prob=0.0, resize_prob=(0.0, 0.0, 1.0), modes=4, gaussian=(0.0, 25.0),
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
BSRGAN_RESIZE_PROB = 0.75        # downsample 2 by U(1, 2 s)
BSRGAN_SHIFTED_SIGMA = (0.1, 0.6)  # otherwise by s, behind a Gaussian of sigma U(0.1, 0.6 s)
BSRGAN_NOISE = (2, 25)           # whole levels of 255
BSRGAN_NOISE_PROB = (0.4, 0.4, 0.2)  # colour, gray, correlated over channels (at the highest level)
BSRGAN_JPEG_PROB, BSRGAN_JPEG = 0.9, (30, 95)
# fmt: on
RECIPES = (*ROUNDS, "bsrgan", "bicubic")

MODES = ("area", "bilinear", "bicubic", "antialiased")  # the last one: bicubic, as Pillow has it
CPU_CANVAS = 3 * 2**16  # values
KERNEL_SIZE = 25  # of all kernels; smaller ones are padded with zeros
# What `order` is made of; the number says which column of the parameters an operation reads.
OPERATIONS = ("", "blur 1", "blur 2", "blur 3", "resize 1", "resize 2", "resize 3",
              "gaussian 1", "gaussian 2", "poisson 1", "poisson 2", "jpeg 1", "jpeg 2")  # fmt: skip
STEPS = 10


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

    def __getitem__(self, rows: "slice | Tensor | list[int]") -> "Degradation":
        """Select rows: a slice, an index tensor, a mask or a list."""
        return Degradation(*(getattr(self, f.name)[rows] for f in fields(self)))

    def repeat(self, times: int) -> "Degradation":
        """Each row `times` times in a row: a, a, b, b."""
        rows = torch.arange(len(self)).repeat_interleave(times)
        return self[rows]

    def operations(self, step: int) -> list[str]:
        """What each image goes through at this step, for instance "blur 1" or "resize 2 area"."""
        names = [OPERATIONS[code] for code in self.order[:, step].tolist()]
        modes = self.resize_mode.tolist()
        return [
            f"{name} {MODES[row[int(name[-1]) - 1]]}" if name.startswith("resize") else name
            for name, row in zip(names, modes, strict=True)
        ]

    def to(self, device: torch.device | str) -> "Degradation":
        """Move all tensors."""
        return Degradation(*(getattr(self, f.name).to(device) for f in fields(self)))

    @staticmethod
    def cat(parts: "list[Degradation]") -> "Degradation":
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
    def from_json(lines: list[str]) -> "Degradation":
        """Read what to_json wrote."""
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["order"] = [OPERATIONS.index(name) for name in row["order"]]
        columns = (torch.tensor([row[f.name] for row in rows]) for f in fields(Degradation))
        return Degradation(*columns)

    def physical(self) -> Tensor:
        """What theta means for the LR image: (B, 5), each about in [0, 1].

        Blur width (log LR pixels), resolution lost by resizing (log), ringing, noise, JPEG loss.
        Noise and JPEG that all came before a resize can't be told from the image: NaN.
        """
        grid = self.scale.float()  # pixels per LR pixel at the current step
        lost, blur_variance, noise_variance = grid, torch.zeros_like(grid), torch.zeros_like(grid)
        ringing, quality = torch.zeros_like(grid), torch.full_like(grid, 100.0)
        hidden = torch.zeros_like(torch.stack([grid, grid]), dtype=torch.bool)  # noise, JPEG
        # Of the kernels as they are: a wide one of few pixels is cut off.
        squares = (torch.arange(KERNEL_SIZE, device=grid.device) - KERNEL_SIZE // 2).square()
        moment = (blur_kernels(self) * (squares + squares[:, None])).sum((2, 3)) / 2  # (B, 3)
        for codes in self.order.unbind(1):
            here = {name: codes == i for i, name in enumerate(OPERATIONS)}
            for i in range(3):
                cutoff, amount = self.sinc_cutoff[:, i], self.sharpen[:, i]
                width = moment[:, i] / grid.square()
                width = width.where((cutoff == 0) & (amount == 0), 0.0)
                edges = (1 - cutoff / math.pi).where(cutoff > 0, amount)
                blur_variance = blur_variance + width.where(here[f"blur {i + 1}"], 0.0)
                ringing = torch.maximum(ringing, edges.where(here[f"blur {i + 1}"], 0.0))
            for i in range(2):
                grid = torch.where(here[f"resize {i + 1}"], self.resize[:, i] * self.scale, grid)
            grid = grid.where(~here["resize 3"], 1.0)
            lost = torch.minimum(lost, grid)
            for i in range(2):
                # Poisson: the std that scale has at a mid gray of 8 bits.
                std = self.gaussian_std[:, i].where(
                    here[f"gaussian {i + 1}"], self.poisson_scale[:, i] * 0.04
                )
                noisy = here[f"gaussian {i + 1}"] | here[f"poisson {i + 1}"]
                seen = grid == 1
                noise_variance = noise_variance + std.square() * (noisy & seen)
                loss = self.jpeg_quality[:, i].where(here[f"jpeg {i + 1}"] & seen, 100)
                quality = torch.minimum(quality, loss)
                hidden |= torch.stack([noisy, here[f"jpeg {i + 1}"]]) & ~seen
        noise_variance[hidden[0] & (noise_variance == 0)] = math.nan
        quality[hidden[1] & (quality == 100)] = math.nan
        return torch.stack(
            [
                (blur_variance + 0.01).log() / 4.6 + 1,
                -lost.clamp(max=1).log(),
                ringing,
                (noise_variance.sqrt() * 255 + 1).log() / 3.5,
                1 - quality / 100,
            ],
            dim=1,
        )


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

    def around_one(self, low: float, high: float) -> Tensor:
        """Below or above one with even chance."""
        return torch.where(self.chance(0.5), self.uniform(low, 1.0), self.uniform(1.0, high))


def step(name: str, performed: Tensor) -> Tensor:
    """The code of an operation where it is performed, else 0: (B,)."""
    return OPERATIONS.index(name) * performed.long()


def bicubic(batch: int, scale: int) -> Degradation:
    """Parameters of a plain reduction to LR: what the recipes start from."""
    theta = Degradation(
        order=torch.zeros(batch, STEPS, dtype=torch.long),
        blur_sigma=torch.ones(batch, 3, 2),
        blur_angle=torch.zeros(batch, 3),
        blur_shape=torch.ones(batch, 3),
        blur_plateau=torch.zeros(batch, 3, dtype=torch.bool),
        blur_size=torch.ones(batch, 3, dtype=torch.long),
        sinc_cutoff=torch.zeros(batch, 3),
        sharpen=torch.zeros(batch, 3),
        resize=torch.ones(batch, 2),
        resize_mode=torch.full((batch, 3), MODES.index("antialiased")),
        gaussian_std=torch.zeros(batch, 2),
        poisson_scale=torch.zeros(batch, 2),
        gray_noise=torch.zeros(batch, 2, dtype=torch.bool),
        colour_mix=torch.eye(3).repeat(batch, 1, 1),
        jpeg_quality=torch.full((batch, 2), 100),
        scale=torch.full((batch,), scale),
        seed=torch.zeros(batch, dtype=torch.long),
    )
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
        theta.resize_mode[:, i] = draw.one_of(range(options.modes))
        gaussian = draw.chance(options.gaussian_prob)
        std, scale = draw.uniform(*options.gaussian) / 255, draw.uniform(*options.poisson)
        theta.gaussian_std[:, i] = torch.where(gaussian, std, 0.0)
        theta.poisson_scale[:, i] = torch.where(gaussian, 0.0, scale)
        theta.gray_noise[:, i] = draw.chance(options.gray_prob)
        theta.jpeg_quality[:, i] = draw.one_of(range(options.jpeg[0], options.jpeg[1] + 1))
        compressed = always if options.jpeg_prob == 1 else draw.chance(options.jpeg_prob)
        steps += [
            step(f"blur {i + 1}", draw.chance(options.blur_prob)),
            step(f"resize {i + 1}", (direction < 2) | (i > 0)),
            step(f"gaussian {i + 1}", theta.gaussian_std[:, i] > 0)
            + step(f"poisson {i + 1}", theta.poisson_scale[:, i] > 0),
            step(f"jpeg {i + 1}", (theta.jpeg_quality[:, i] > 0) & compressed),
        ]
    theta.resize_mode[:, 2] = draw.one_of(range(3))
    theta.blur_size[:, 2] = draw.one_of(Round.sizes)
    sinc, cutoff = draw.chance(final.sinc_prob), draw.uniform(math.pi / 3, math.pi)
    sharpen = ~sinc & draw.chance(final.sharpen_prob)
    theta.sinc_cutoff[:, 2] = torch.where(sinc, cutoff, 0.0)
    theta.sharpen[:, 2] = torch.where(sharpen, draw.uniform(*final.sharpen), 0.0)
    jpeg, to_lr, filtered = steps.pop(), step("resize 3", always), step("blur 3", sinc | sharpen)
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
    halving = torch.where(draw.chance(0.5), draw.one_of(range(3)), MODES.index("antialiased"))
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
    second = torch.where(resized, draw.one_of(range(3)), MODES.index("bilinear"))
    theta.resize_mode[:] = torch.stack([halving, second, draw.one_of(range(3))], 1)
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
    codes = torch.stack(
        [
            step("blur 1", always),
            step("blur 2", always),
            step("blur 3", ~resized),
            step("resize 2", always),
            step("resize 3", always),
            step("gaussian 1", always),
            step("jpeg 1", draw.chance(BSRGAN_JPEG_PROB)),
        ],
        dim=1,
    )
    shuffled = place[:, [0, 1, 2, 2, 3, 4, 5]].argsort(dim=1, stable=True)
    theta.order[:, 0] = step("resize 1", halved)
    theta.order[:, 1:8] = codes.gather(1, shuffled)
    theta.order[:, 8] = step("jpeg 2", always)


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


# ---- images of different sizes -----------------------------------------------------------------


def sizes(images: list[Tensor]) -> Tensor:
    """Heights and widths (B, 2), on the CPU."""
    return torch.tensor([image.shape[1:] for image in images])


def canvas(images: list[Tensor]) -> Tensor:
    """Images (3, H, W) in the top left corners of one tensor (B, 3, max H, max W)."""
    if len(images) == 1:
        return images[0][None]
    H, W = sizes(images).amax(0).tolist()
    return torch.stack([F.pad(x, (0, W - x.shape[2], 0, H - x.shape[1])) for x in images])


def cut(x: Tensor, size: Tensor) -> list[Tensor]:
    """The images of a canvas: the inverse of canvas()."""
    return [image[:, :h, :w] for image, (h, w) in zip(x, size.tolist(), strict=True)]


# ---- blur -------------------------------------------------------------------------------------


def blur_kernels(theta: Degradation) -> Tensor:
    """The kernels (B, 3, 25, 25) of theta's three blurs, each summing to 1.

    With q = x^T Sigma^-1 x: exp(-q^beta / 2) (Gaussian for beta = 1), the plateau 1 / (1 + q^beta),
    or, where cutoff > 0, the circular sinc cutoff J_1(cutoff r) / (2 pi r) (arXiv:2107.10833, Eq.
    2-6). Sharpening by `amount` is (1 + amount) delta - amount kernel.
    """
    half = KERNEL_SIZE // 2
    axis = torch.arange(-half, half + 1, device=theta.seed.device, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")  # (25, 25)

    def pixels(column: Tensor) -> Tensor:
        return column.double()[..., None, None]  # (B, 3, 1, 1)

    width, height = (pixels(s) for s in theta.blur_sigma.clamp(min=1e-3).unbind(2))
    cos, sin = pixels(theta.blur_angle).cos(), pixels(theta.blur_angle).sin()
    along, across = x * cos + y * sin, y * cos - x * sin
    q = (along / width).square() + (across / height).square()
    q = q.pow(pixels(theta.blur_shape))
    kernel = torch.where(theta.blur_plateau[..., None, None], 1 / (1 + q), (-q / 2).exp())
    radius, cutoff = (x.square() + y.square()).sqrt(), pixels(theta.sinc_cutoff)
    sinc = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    sinc[..., half, half] = cutoff[..., 0, 0].square() / (4 * math.pi)
    kernel = torch.where(cutoff > 0, sinc, kernel)
    kernel = kernel * (torch.maximum(x.abs(), y.abs()) <= pixels(theta.blur_size // 2))
    kernel = kernel / kernel.sum((2, 3), keepdim=True)
    amount, delta = pixels(theta.sharpen), (radius == 0).double()
    return torch.where(amount > 0, (1 + amount) * delta - amount * kernel, kernel).float()


def mirrored(length: int, margin: int, n: int) -> Tensor:
    """Indices -margin .. length + margin - 1, mirrored into [0, n)."""
    period = max(2 * n - 2, 1)
    i = torch.arange(-margin, length + margin) % period
    return torch.minimum(i, period - i).clamp(max=n - 1)


def blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Correlate an image (3, H, W) with a kernel (K, K), edges mirrored."""
    _, H, W = image.shape
    K, s = len(kernel), 4
    h, w = -(-H // s), -(-W // s)
    rows, columns = (
        mirrored(n * s, K // 2, side).to(image.device, non_blocking=True)
        for n, side in ((h, H), (w, W))
    )
    padded = image.index_select(1, rows).index_select(2, columns)
    # One convolution of stride 4 gives the 4 x 4 pixels of a cell as its channels, each with the
    # kernel in another place: two to four times as fast as a depthwise convolution.
    cell = torch.eye(s * s, device=image.device).view(s * s, 1, s, s)
    weight = F.conv_transpose2d(cell, kernel[None, None])  # (16, 1, K + 3, K + 3)
    y = F.conv2d(padded[:, None], weight, stride=s)  # (3, 16, h, w)
    return F.pixel_shuffle(y, s)[:, 0, :H, :W]


# ---- resize -----------------------------------------------------------------------------------


def cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' kernel, 1 at 0 and 0 beyond 2 pixels."""
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


def resize_weights(old: Tensor, new: Tensor, mode: str, device: torch.device) -> Tensor:
    """Weights (B, 2, N, M) that resize the two sides of image b from old[b] to new[b] pixels.

    old, new (B, 2) on the CPU; N and M are their largest. Equals torch's interpolate of that mode
    ("antialiased" is its bicubic with antialias=True, the others are without).
    """
    M, N, largest = int(old.max()), int(new.max()), float((old / new).max())
    matrix = torch.zeros(*old.shape, N, M, device=device)
    old, new = (
        n.to(device, non_blocking=True).double()[..., None, None] for n in (old, new)
    )  # (B, 2, 1, 1)
    i = torch.arange(N, device=old.device, dtype=torch.float64)[:, None]
    centre = (i + 0.5) * old / new - 0.5  # (B, 2, N, 1), where output i looks in the input
    # The inputs of one output: `taps` at most, from `first` on.
    if mode == "area":
        first, last = (i * old / new).floor(), ((i + 1) * old / new).ceil()
        taps = math.ceil(largest) + 1
    elif mode == "antialiased":
        support = 2 * (old / new).clamp(min=1)
        first, taps = (centre - support).ceil(), math.ceil(4 * max(largest, 1)) + 1
    else:
        first, taps = centre.floor() - 1, 4
    j = first + torch.arange(taps, device=old.device)  # (B, 2, N, taps)
    if mode == "area":
        weight = ((j < last) & (j < old)) / (last - first)
    elif mode == "antialiased":
        weight = cubic((j - centre) * 2 / support, -0.5) * ((j >= 0) & (j < old))
        weight = weight / weight.sum(3, keepdim=True)
    elif mode == "bicubic":
        weight = cubic(j - centre, -0.75)
    else:
        weight = (1 - (j - centre).abs()).clamp(min=0)
    at = j.clamp(min=0).minimum(old - 1).long()
    return matrix.scatter_add_(3, at, weight.float())


def resize(images: list[Tensor], new: Tensor, mode: str) -> list[Tensor]:
    """Resize image b (3, H, W) to new[b] = (H', W') as two matrix products."""
    weights = resize_weights(sizes(images), new, mode, images[0].device)
    return [
        (weights[b, 0, :H, : x.shape[1]].contiguous() @ x)
        @ weights[b, 1, :W, : x.shape[2]].contiguous().mT
        for b, (x, (H, W)) in enumerate(zip(images, new.tolist(), strict=True))
    ]


# ---- noise ------------------------------------------------------------------------------------


def gaussian(
    images: list[Tensor], std: Tensor, gray: Tensor, mix: Tensor, draws: list[torch.Generator]
) -> list[Tensor]:
    """Add Gaussian noise of std[b] from draws[b]: gray, or colours correlated by mix[b] (3, 3).

    Parameters of images may stay on the CPU here and below: a GPU is never waited for.
    """
    x, device = canvas(images), images[0].device
    std, mix = (part.to(device, non_blocking=True) for part in (std, mix))
    shapes = [(1 if g else 3, *i.shape[1:]) for i, g in zip(images, gray.tolist(), strict=True)]
    drawn = zip(shapes, draws, strict=True)
    eps = canvas([torch.randn(s, generator=g, device=device).expand(3, -1, -1) for s, g in drawn])
    noise = ((std[:, None, None] * mix) @ eps.flatten(2)).view_as(x)
    return cut(noise.add_(x).clamp_(0, 1), sizes(images))


@functools.cache
def photon_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Alias tables (Walker 1977) of the Poisson counts at all rates v / 255 * 2^n, v < 256, n < 9.

    With u uniform in [0, K[n]), the count is j = floor(u) if u - j < threshold, else alias, both at
    first[n] + v * K[n] + j. Returns threshold and alias (flat), K (9,), first (9,).
    """
    thresholds, aliases = [], []
    for n in range(9):
        rate = torch.arange(256, dtype=torch.float64)[:, None] / 255 * 2**n
        count = torch.arange(2**n + 12 * math.isqrt(2**n) + 12, dtype=torch.float64)
        K = len(count)
        # Buckets of mean height 1: the lowest open one is filled up by the highest, and closed.
        height = (torch.special.xlogy(count, rate) - torch.lgamma(count + 1)).softmax(1) * K
        threshold, alias = torch.ones_like(height), count.repeat(256, 1)
        is_open = torch.ones_like(height, dtype=torch.bool)
        for _ in range(K - 1):
            low = height.where(is_open, math.inf).argmin(1, keepdim=True)
            high = height.where(is_open, -math.inf).argmax(1, keepdim=True)
            share = height.gather(1, low)
            threshold.scatter_(1, low, share)
            alias.scatter_(1, low, high.double())
            is_open.scatter_(1, low, False)
            height.scatter_add_(1, high, share - 1)
        thresholds.append(threshold)
        aliases.append(alias)
    lengths = torch.tensor([t.numel() for t in thresholds])
    tables = (torch.cat([t.flatten() for t in parts]).float() for parts in (thresholds, aliases))
    threshold, alias = (table.to(device) for table in tables)
    return threshold, alias, (lengths // 256).to(device), (lengths.cumsum(0) - lengths).to(device)


def poisson(
    images: list[Tensor], scale: Tensor, gray: Tensor, draws: list[torch.Generator]
) -> list[Tensor]:
    """Add scale[b] times the shot noise of an image with as many photons per unit as it has levels.

    The levels (values of 8 bits that occur) are rounded up to a power of two.
    """
    x, device = canvas(images), images[0].device
    shapes = [(1 if g else 3, *i.shape[1:]) for i, g in zip(images, gray.tolist(), strict=True)]
    scale, gray = (part.to(device, non_blocking=True) for part in (scale, gray))
    luma = 0.2989 * x[:, :1] + 0.5870 * x[:, 1:2] + 0.1140 * x[:, 2:]
    source = torch.where(gray[:, None, None, None], luma, x)
    source = source.clamp_(0, 1).mul_(255).round_()  # (B, 3, H, W) whole numbers
    values = source
    if len(images) > 1:  # outside of an image its first pixel, which adds no level
        here = canvas([torch.ones_like(image[:1]) for image in images])
        values = torch.where(here > 0, source, source[:, :, :1, :1])
    used = torch.zeros(len(x), 256, device=device).scatter_(1, values.long().flatten(1), 1.0).sum(1)
    n = used.log2().ceil().long()
    threshold, alias, K, first = photon_tables(device)
    K, first = K[n][:, None, None, None], first[n][:, None, None, None]
    drawn = zip(shapes, draws, strict=True)
    u = canvas([torch.rand(s, generator=g, device=device).expand(3, -1, -1) for s, g in drawn]) * K
    j = u.floor().minimum(K - 1)
    at = (source * K + j + first).int().flatten()
    chosen = (u - j).flatten() < threshold.index_select(0, at)
    photons = torch.where(chosen, j.flatten(), alias.index_select(0, at)).view_as(x)
    noise = photons / torch.exp2(n)[:, None, None, None] - source / 255
    return cut(noise.mul_(scale[:, None, None, None]).add_(x).clamp_(0, 1), sizes(images))


# ---- JPEG: libjpeg's integer arithmetic, followed exactly in float64 ---------------------------

# fmt: off
LUMA_TABLE = torch.tensor([
    16, 11, 10, 16,  24,  40,  51,  61,  12, 12, 14, 19,  26,  58,  60,  55,
    14, 13, 16, 24,  40,  57,  69,  56,  14, 17, 22, 29,  51,  87,  80,  62,
    18, 22, 37, 56,  68, 109, 103,  77,  24, 35, 55, 64,  81, 104, 113,  92,
    49, 64, 78, 87, 103, 121, 120, 101,  72, 92, 95, 98, 112, 100, 103,  99]).view(8, 8)
CHROMA_TABLE = torch.tensor([
    17, 18, 24, 47, 99, 99, 99, 99,  18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99,  47, 66, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99,  99, 99, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99,  99, 99, 99, 99, 99, 99, 99, 99]).view(8, 8)
# fmt: on


@functools.cache
def dct_matrix() -> Tensor:
    """The 8x8 integer matrix of one pass of libjpeg's slow integer DCT (jfdctint.c), float64.

    The butterfly of Loeffler, Ligtenberg and Moschytz with 13-bit constants, run on the identity.
    """
    x = torch.eye(8, dtype=torch.float64)
    t0, t1, t2, t3 = (x[i] + x[7 - i] for i in range(4))
    t7, t6, t5, t4 = (x[i] - x[7 - i] for i in range(4))
    even = (t1 - t2 + t0 - t3) * 4433
    z1, z2, z3, z4 = t4 + t7, t5 + t6, t4 + t6, t5 + t7
    z5 = (z3 + z4) * 9633
    z3, z4 = z5 - z3 * 16069, z5 - z4 * 3196
    z1, z2 = -z1 * 7373, -z2 * 20995
    return torch.stack(
        [
            (t0 + t1 + t2 + t3) * 8192,
            t7 * 12299 + z1 + z4,
            even + (t0 - t3) * 6270,
            t6 * 25172 + z2 + z3,
            (t0 - t1 - t2 + t3) * 8192,
            t5 * 16819 + z2 + z4,
            even - (t1 - t2) * 15137,
            t4 * 2446 + z1 + z3,
        ]
    )


def scaled_table(base: Tensor, quality: Tensor) -> Tensor:
    """libjpeg's quantisation table (B, 8, 8) for qualities 1..100 (B,)."""
    quality = quality.clamp(min=1)
    percent = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)[:, None, None]
    return (
        ((base.to(quality.device, non_blocking=True) * percent + 50) // 100).clamp(1, 255).double()
    )


def along_columns(matrix: Tensor, plane: Tensor) -> Tensor:
    """Multiply every column of every 8 x 8 block of a plane (B, H, W)."""
    B, H, W = plane.shape
    return (matrix @ plane.view(B, H // 8, 8, W)).view(B, H, W)


def quantised(plane: Tensor, table: Tensor) -> Tensor:
    """A plane (B, H, W) after the DCT, quantisation by table (B, 8, 8) and the inverse DCT.

    libjpeg runs each pass in integers and shifts them right by 11, 15, 11 and 18 bits, rounding
    half up. Rows come first, then columns; in the inverse the other way around.
    """
    B, H, W = plane.shape
    M = dct_matrix().to(plane.device, non_blocking=True)
    y = along_columns(M * 2.0**-11, (plane.double() - 128).mT.contiguous()).add_(0.5).floor_()
    y = along_columns(M * 2.0**-15, y.mT.contiguous()).add_(0.5).floor_()  # 8 times the coefficient
    # Halves are rounded away from zero: a nudge that is far less than 1 / (8 q) brings them there.
    divisor, table = 8 / (1 + 2.0**-40) * table[:, None, :, None], table[:, None, :, None]
    y.view(B, H // 8, 8, W // 8, 8).div_(divisor).round_().mul_(table)
    y = along_columns(M.T * 2.0**-11, y).add_(0.5).floor_()
    y = along_columns(M.T * 2.0**-18, y.mT.contiguous()).add_(128.5).floor_()
    return y.mT.contiguous().clamp_(0, 255).float()


def combined(planes: tuple[Tensor, ...], factors: tuple[int, ...], bias: int = 2**15) -> Tensor:
    """The sum of factors times whole planes plus the bias, shifted right by 16 bits.

    All of it stays below 2^24, so float32 is exact.
    """
    total = planes[0] * (factors[0] * 2.0**-16)
    for plane, factor in zip(planes[1:], factors[1:], strict=True):
        total.add_(plane, alpha=factor * 2.0**-16)
    return total.add_(bias * 2.0**-16).floor_()


def pick(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x[b, :, rows[b], columns[b]] for every image b: (B, C, H', W')."""
    if len(x) == 1:  # ten times as fast on a CPU
        return x.index_select(2, rows[0]).index_select(3, columns[0])
    b = torch.arange(len(x), device=x.device)[:, None, None]
    return x.transpose(0, 1)[:, b, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


def clamped(margin: int, length: int, n: Tensor) -> Tensor:
    """Indices -margin .. length + margin - 1, clamped into [0, n[b]): (B, length + 2 margin)."""
    i = torch.arange(-margin, length + margin, device=n.device)
    return i.clamp(min=0).minimum(n[:, None] - 1)


def halve(chroma: Tensor, size: Tensor) -> Tensor:
    """Average 2 x 2 pixels as libjpeg does (bias 1, 2, 1, 2, ...); repeat the last true row."""
    total = chroma[:, :, ::2] + chroma[:, :, 1::2]
    bias = 1.0 + torch.arange(total.shape[3] // 2, device=total.device) % 2
    total = (total[..., ::2] + total[..., 1::2] + bias).mul_(0.25).floor_()  # (B, 2, H/2, W/2)
    H, W = total.shape[2:]
    return pick(total, clamped(0, H, size[:, 0]), clamped(0, W, size[:, 1].clamp(min=W)))


def double(chroma: Tensor, size: Tensor, narrow: Tensor) -> Tensor:
    """libjpeg's "fancy" upsampling: 3/4 of the nearer, 1/4 of the farther sample along each axis.

    Where it is `narrow` (B,), on the CPU, of one or two columns, it is repeated, as in jdsample.c.
    """
    B, C, H, W = chroma.shape
    x = pick(chroma, clamped(1, H, size[:, 0]), clamped(1, W, size[:, 1]))  # (B, C, H+2, W+2)
    near = 3 * x[:, :, 1:-1]
    x = torch.stack([near + x[:, :, :-2], near + x[:, :, 2:]], 3).view(B, C, 2 * H, W + 2)
    near = 3 * x[..., 1:-1]
    y = torch.empty(B, C, 2 * H, 2 * W, device=x.device)
    y[..., ::2] = near.add(x[..., :-2]).add_(8)
    y[..., 1::2] = near.add_(x[..., 2:]).add_(7)
    y.mul_(1 / 16).floor_()
    if narrow.any():
        narrow = narrow[:, None, None, None].to(y.device)
        y = torch.where(narrow, chroma.repeat_interleave(2, 2).repeat_interleave(2, 3), y)
    return y


@torch.no_grad()
def jpeg_round_trip(x: Tensor, quality: Tensor, subsampling: str, size: Tensor) -> Tensor:
    """jpeg() for checked arguments, without a gradient."""
    B, _, H, W = x.shape
    H16, W16 = -(-H // 16) * 16, -(-W // 16) * 16
    narrow = size[:, 1] <= 4
    quality, size = (part.to(x.device, non_blocking=True) for part in (quality, size))
    rgb = pick(x, clamped(0, H16, size[:, 0]), clamped(0, W16, size[:, 1]))
    planes = rgb.clamp_(0, 1).mul_(255).round_().unbind(1)  # (B, H16, W16) each
    luma = combined(planes, (19595, 38470, 7471))
    # Chroma is rounded a unit of 2^-16 lower.
    blue = combined(planes, (-11059, -21709, 32768), 2**23 + 2**15 - 1)
    red = combined(planes, (32768, -27439, -5329), 2**23 + 2**15 - 1)
    luma = quantised(luma, scaled_table(LUMA_TABLE, quality))
    chroma, half = torch.stack([blue, red], 1), (size + 1) // 2  # (B, 2, H16, W16)
    if subsampling == "4:2:0":
        chroma = halve(chroma, half)
    table = scaled_table(CHROMA_TABLE, quality).repeat_interleave(2, 0)
    chroma = quantised(chroma.flatten(0, 1), table).view_as(chroma) - 128
    if subsampling == "4:2:0":
        chroma = double(chroma, half, narrow)
    blue, red = chroma.unbind(1)
    torch.add(luma, combined((red,), (91881,)), out=rgb[:, 0])
    torch.add(luma, combined((blue, red), (-22554, -46802)), out=rgb[:, 1])
    torch.add(luma, combined((blue,), (116130,)), out=rgb[:, 2])
    return rgb[:, :, :H, :W].clamp(0, 255).div_(255)


def jpeg(
    x: Tensor, quality: Tensor | int, subsampling: str = "4:2:0", size: Tensor | None = None
) -> Tensor:
    """Compress and decompress images as Pillow (libjpeg) does, bit for bit.

    x (B, 3, H, W) in [0, 1], first rounded to 8 bits; quality (B,) in 1..100; `size` (B, 2) are the
    true sizes on a canvas, default all of it. Returns (B, 3, H, W); gradients pass
    straight through. ValueError for another quality or subsampling.
    """
    if subsampling not in ("4:2:0", "4:4:4"):
        raise ValueError(f"subsampling {subsampling!r}: 4:2:0 and 4:4:4 are supported.")
    B, _, H, W = x.shape
    if B == 0:
        return x
    quality = torch.as_tensor(quality).cpu().expand(B).long()
    if int(quality.min()) < 1 or int(quality.max()) > 100:
        raise ValueError(f"JPEG quality {quality.tolist()}: must be in 1..100.")
    size = torch.tensor([[H, W]]).expand(B, 2) if size is None else size.cpu()
    y = jpeg_round_trip(x.float(), quality, subsampling, size)
    return y + (x - x.detach()) if x.requires_grad else y


# ---- D ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """Neither bf16 nor TF32 inside, whatever the training around it allows itself."""
    matmul = torch.backends.cuda.matmul
    allowed, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        matmul.allow_tf32 = allowed


@torch.no_grad()
def degrade(hr: Tensor, theta: Degradation, generator: torch.Generator | None = None) -> Tensor:
    """D(X, theta): hr (B, 3, H, W) -> lr (B, 3, H/scale, W/scale), in [0, 1]; lr has 8-bit values.

    Row i is degraded with row i of theta. Without a generator the noise is that of theta.seed, so
    that theta replays the image; with one it is drawn anew.
    """
    (B, _, H, W), theta = hr.shape, theta.to("cpu")
    if len(theta) != B:
        raise ValueError(f"{B} images, but {len(theta)} rows of parameters")
    if B == 0 or bool((theta.scale != theta.scale[0]).any()):
        raise ValueError("a batch needs at least one image, and the same scale for all")
    scale = int(theta.scale[0])
    if H % scale or W % scale:
        raise ValueError(f"images of {H} x {W} pixels can't be degraded by scale {scale}")
    seed = theta.seed
    if generator is not None:
        seed = torch.randint(2**62, (B,), generator=generator, device=generator.device).cpu()
    images = list(hr.float().contiguous())  # channels_last would slow down every operation
    with plain_float32(hr.device):
        kernels = blur_kernels(theta).to(hr.device, non_blocking=True)
        for i in range(STEPS):
            operations = theta.operations(i)
            for operation in set(operations) - {""}:
                same = [row for row in range(B) if operations[row] == operation]
                for rows in together(same, images):
                    before = [images[row] for row in rows]
                    after = operate(operation, before, rows, theta, (H, W), kernels, seed)
                    for row, image in zip(rows, after, strict=True):
                        images[row] = image
    return (torch.stack(images).clamp_(0, 1) * 255).round_() / 255


def together(rows: list[int], images: list[Tensor]) -> Iterator[list[int]]:
    """Split rows into groups that share a canvas, on a CPU one that its cache can hold."""
    room = CPU_CANVAS if images[0].device.type == "cpu" else math.inf
    group: list[int] = []
    for row in sorted(rows, key=lambda row: images[row].numel()):
        if group and images[row].numel() * (len(group) + 1) > room:
            yield group
            group = []
        group.append(row)
    yield group


def operate(
    operation: str,
    images: list[Tensor],
    rows: list[int],
    theta: Degradation,
    hr_size: tuple[int, int],
    kernels: Tensor,
    seed: Tensor,
) -> list[Tensor]:
    """One operation, with the parameters in these rows of theta, kernels and seed."""
    kind, number, *mode = operation.split()
    i, device = int(number) - 1, images[0].device

    def draws() -> list[torch.Generator]:
        return [common.generator(int(seed[row]), i, device=device) for row in rows]

    if kind == "blur":
        margins = ((KERNEL_SIZE - theta.blur_size[rows, i]) // 2).tolist()
        return [
            blur(image, kernels[row, i, m : KERNEL_SIZE - m, m : KERNEL_SIZE - m])
            for image, row, m in zip(images, rows, margins, strict=True)
        ]
    if kind == "resize":
        size = torch.tensor([hr_size] * len(rows))
        exact = size // theta.scale[rows, None]
        new = exact if i == 2 else (size * theta.resize[rows, i, None]).floor().long().clamp(min=1)
        return resize(images, new, *mode)
    if kind == "jpeg":
        size = sizes(images)
        return cut(jpeg(canvas(images), theta.jpeg_quality[rows, i], size=size), size)
    gray = theta.gray_noise[rows, i]
    if kind == "poisson":
        return poisson(images, theta.poisson_scale[rows, i], gray, draws())
    return gaussian(images, theta.gaussian_std[rows, i], gray, theta.colour_mix[rows], draws())


# ---- the command ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    hr: tuple[str, ...] = ()  # folders or files of HR photos (else data/hr, else data/sample/hr)
    out: str = "out/degraded"  # folder that gets hr/, lr/, pairs.jsonl and preview.png
    recipe: str = "realesrgan"  # realesrgan, bsrgan, light, camera, wide or bicubic
    per_image: int = 1  # pairs to make of every photo
    scale: int = 4  # HR size / LR size
    seed: int = 0  # pair k of photo i is degraded with draws from (seed, i, k)
    bench: bool = False  # only measure the speed of every operation and recipe
    device: str = "auto"  # cpu, cuda or auto


BENCH_RUNS = 16


def bench(files: list[Path], device: torch.device) -> None:
    """Print images per second, best of several runs, for 16 photos of 256 x 256 pixels."""
    photos = [common.load_image(file)[:, :256, :256] for file in files]
    photos = [photo for photo in photos if photo.shape[1:] == (256, 256)]
    common.require(bool(photos), "--bench needs --hr photos of at least 256 x 256 pixels.")
    hr = torch.stack([photos[i % len(photos)] for i in range(16)]).to(device)
    images, few = list(hr), Draw(16, common.generator(0))
    draws = [common.generator(i, device=device) for i in range(16)]
    std, gray, mix = torch.full((16,), 0.05), few.chance(0.4), torch.eye(3).expand(16, 3, 3)
    theta, half = sample_degradation(16, generator=few.generator), torch.full((16, 2), 128)
    kernels = blur_kernels(theta).to(device)[:, 0, 2:-2, 2:-2]

    def pillow() -> None:
        for photo in common.to_uint8(hr).permute(0, 2, 3, 1).cpu().numpy():
            file = io.BytesIO()
            Image.fromarray(photo).save(file, "JPEG", quality=60)
            Image.open(file).load()

    works: dict[str, Callable[[], object]] = {
        "draw theta": lambda: sample_degradation(16),
        "kernels": lambda: blur_kernels(theta),
        "blur 21 x 21": lambda: [blur(x, k) for x, k in zip(images, kernels, strict=True)],
        "resize to half": lambda: resize(images, half, "bicubic"),
        "Gaussian noise": lambda: gaussian(images, std, gray, mix, draws),
        "Poisson noise": lambda: poisson(images, std, gray, draws),
        "JPEG by Pillow": pillow,
        "JPEG": lambda: (
            [jpeg(x[None], 60) for x in images] if device.type == "cpu" else jpeg(hr, 60)
        ),
    }

    def whole(recipe: str) -> None:
        for i in range(4):
            degrade(hr, sample_degradation(16, recipe, generator=common.generator(i)))

    works |= {f"all of {recipe}": functools.partial(whole, recipe) for recipe in RECIPES}
    print(f"16 x 256 x 256 pixels on {device}, {torch.get_num_threads()} threads")
    for name, work in works.items():
        seconds = []
        for _ in range(BENCH_RUNS):  # the first one warms up
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        images_done = 16 * (4 if name.startswith("all") else 1)
        print(f"{name:<18} {images_done / min(seconds[1:]):8.0f} images/s")


def save_preview(path: Path, out: Path, rows: list[dict]) -> None:
    """Write a picture of a few pairs: the middle of HR | LR."""
    pairs = [[common.load_image(out / row[side]) for side in ("hr", "lr")] for row in rows]
    pictures = [
        [common.centre(hr, 96 * hr.shape[1] // lr.shape[1], 384), common.centre(lr, 96, 384)]
        for hr, lr in pairs
    ]
    common.save_sheet(path, ("HR", "LR"), pictures)


def main(cfg: Config, rt: common.Runtime) -> None:
    """Degrade a folder: out/hr, out/lr with the same names, out/pairs.jsonl with theta."""
    common.require(cfg.recipe in RECIPES, f"--recipe {cfg.recipe}: choose of {', '.join(RECIPES)}.")
    for flag, value in (("--scale", cfg.scale), ("--per-image", cfg.per_image)):
        common.require(value > 0, f"{flag} {value}: must be positive.")
    common.require(
        rt.world_size == 1, "degrade.py takes every core by itself: start it without torchrun."
    )
    files, out = common.find_photos(cfg.hr, "hr", "--hr"), Path(cfg.out)
    if cfg.bench:
        return bench(files, rt.device)
    table = out / "pairs.jsonl"
    done = set(table.read_text(encoding="utf-8").splitlines()) if table.is_file() else set()

    def work(i: int) -> list[str] | str:
        """Lines for the table, once photo i's pairs are there; or why it can't be used."""
        rows, thetas = [], []
        for k in range(cfg.per_image):
            name = f"{i:06d}_{files[i].stem}" + (f"_{k}" if cfg.per_image > 1 else "") + ".png"
            draw = common.generator(cfg.seed, i, k)
            thetas.append(sample_degradation(1, cfg.recipe, cfg.scale, draw))
            row = {"hr": f"hr/{name}", "lr": f"lr/{name}", "source": str(files[i])}
            rows.append(row | {"theta": json.loads(thetas[k].to_json()[0])})
        lines = [json.dumps(row) for row in rows]
        # Only rows of an earlier run with these very parameters spare the work.
        if done.issuperset(lines) and all(
            (out / str(row[side])).is_file() for row in rows for side in ("hr", "lr")
        ):
            return lines
        try:
            photo = common.crop_to_multiple(common.load_image(files[i]), cfg.scale, files[i])
        except ValueError as error:
            return f"skipped: {error}"
        photo = common.to_uint8(photo).float() / 255  # as it is written, also of a 16-bit photo
        common.save_image(out / rows[0]["hr"], photo)
        for row, theta in zip(rows, thetas, strict=True):
            common.save_image(out / row["lr"], degrade(photo[None].to(rt.device), theta)[0])
            if row is not rows[0]:
                common.copy_file(out / rows[0]["hr"], out / row["hr"])
        return lines

    lines: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread below has a core to itself
    with plain_float32(rt.device):
        results = common.in_parallel(work, range(len(files)), threads)
        for result in tqdm(results, total=len(files), unit="photo"):
            if isinstance(result, str):
                tqdm.write(result)
                continue
            lines += result
            if not done.issuperset(result):  # so that a killed run goes on; put in order at the end
                with open(table, "a", encoding="utf-8") as file:
                    file.write("".join(line + "\n" for line in result))
    common.require(bool(lines), "none of the HR images could be used; see the files named above.")
    text, preview = "".join(line + "\n" for line in lines), out / "preview.png"
    if not preview.is_file() or table.read_text(encoding="utf-8") != text:
        with common.replacing(table) as temporary:
            temporary.write_text(text, encoding="utf-8")
        few = lines[: 4 * cfg.per_image : cfg.per_image]
        save_preview(preview, out, [json.loads(line) for line in few])
    skipped = len(files) - len(lines) // cfg.per_image
    print(f"{len(lines)} pairs in {out}, {skipped} images skipped; look at {preview}")


if __name__ == "__main__":
    common.launch(main, Config, {}, __doc__)
