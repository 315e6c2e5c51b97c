"""D: degrade clean HR images into synthetic LR (Section 2.1 takes Real-ESRGAN's degradation).

In: HR images (B, 3, H, W) in [0, 1] and one row of parameters theta for each. Out: LR images of
1/scale the size. Each image passes through blur, resize, noise and JPEG in an order of its own: two
rounds for Real-ESRGAN (arXiv:2107.10833), a shuffled sequence for BSRGAN (arXiv:2103.14006).

    python degrade.py --hr data/hr --out out/realesrgan
    python degrade.py --hr data/hr --out out/bsrgan --recipe bsrgan --per-image 4 --seed 1
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import UserError, require
from common.cli import check_ranges, launch
from common.files import copy_file, find_photos, keys_of, outside, photo_names
from common.images import (
    centre,
    crop_to_multiple,
    load_image,
    lost_sentence,
    save_image,
    save_sheet,
    to_uint8,
)
from common.pairs import PairFolder
from common.runtime import Runtime, in_parallel, make_generator

# ---- theta ------------------------------------------------------------------------------------

KERNEL_SIZE = 25  # of all kernels; smaller ones are padded with zeros
# Ways to resize: torch's area, bilinear, bicubic; Pillow's bicubic; OpenCV's INTER_AREA.
MODES = ("area", "bilinear", "bicubic", "antialiased", "coverage")
# Entries of theta.order. "blur 2" reads column 1 of theta's columns for blur.
OPERATIONS = ("", "blur 1", "blur 2", "blur 3", "resize 1", "resize 2", "resize 3",
              "gaussian 1", "gaussian 2", "poisson 1", "poisson 2", "jpeg 1", "jpeg 2")  # fmt: skip
STEPS = 10  # the most operations that an image passes through


@dataclass
class Degradation:
    """Parameters theta of D, one row per image; unused columns are ignored."""

    order: Tensor  # (B, 10) indices into OPERATIONS; 0 does nothing
    blur_sigma: Tensor  # (B, 3, 2) widths along both axes, pixels
    blur_angle: Tensor  # (B, 3) radians
    blur_shape: Tensor  # (B, 3) exponent beta; 1 is a Gaussian
    blur_plateau: Tensor  # (B, 3) bool: 1 / (1 + q^beta) instead of exp(-q^beta / 2)
    blur_spectral: Tensor  # (B, 3) bool: shape and width are those of the transfer function
    blur_shift: Tensor  # (B, 3, 2) of a spectral kernel, pixels
    blur_size: Tensor  # (B, 3) kernel size, odd
    sinc_cutoff: Tensor  # (B, 3) radians per pixel; 0 is no sinc
    sharpen: Tensor  # (B, 3) amount: adds that times what the blur removes; 0 is a blur
    resize: Tensor  # (B, 2) new size / HR size; the third resize is to LR
    resize_mode: Tensor  # (B, 3) index into MODES
    gaussian_std: Tensor  # (B, 2) on [0, 1]
    poisson_scale: Tensor  # (B, 2)
    gray_noise: Tensor  # (B, 2) bool: the same noise in all channels
    colour_mix: Tensor  # (B, 3, 3) mixes the channels of Gaussian noise
    jpeg_quality: Tensor  # (B, 2) 1..100
    scale: Tensor  # (B,) HR size / LR size
    seed: Tensor  # (B,) of the noise

    def __len__(self) -> int:
        return len(self.seed)

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Degradation:
        """Select rows: a slice, an index tensor, a mask or a list."""
        return Degradation(*(column[rows] for column in vars(self).values()))

    def to(self, device: torch.device | str) -> Degradation:
        """Move all tensors; does not synchronise the GPU."""
        wait = torch.device(device).type == "cpu"
        columns = vars(self).values()
        return Degradation(*(column.to(device, non_blocking=not wait) for column in columns))

    @staticmethod
    def cat(thetas: list[Degradation]) -> Degradation:
        columns = zip(*(vars(theta).values() for theta in thetas), strict=True)
        return Degradation(*map(torch.cat, columns))

    def to_json(self) -> list[str]:
        """One JSON object per row; floats survive the round trip exactly."""
        columns = {name: column.tolist() for name, column in vars(self).items()}
        columns["order"] = [[OPERATIONS[i] for i in row] for row in columns["order"]]
        rows = zip(*columns.values(), strict=True)
        return [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]

    @staticmethod
    def from_json(lines: list[str]) -> Degradation:
        """Read what to_json wrote."""
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["order"] = [OPERATIONS.index(name) for name in row["order"]]
        return Degradation(**{name: torch.tensor([row[name] for row in rows]) for name in rows[0]})


def bicubic_reduction(batch: int, scale: int) -> Degradation:
    """Parameters of a plain bicubic reduction to LR, from which every recipe starts."""

    def full(value: float, *shape: int) -> Tensor:
        return torch.full((batch, *shape), value)

    theta = Degradation(
        order=full(0, STEPS), blur_sigma=full(1.0, 3, 2), blur_angle=full(0.0, 3),
        blur_shape=full(1.0, 3), blur_plateau=full(False, 3), blur_spectral=full(False, 3),
        blur_shift=full(0.0, 3, 2), blur_size=full(1, 3), sinc_cutoff=full(0.0, 3),
        sharpen=full(0.0, 3), resize=full(1.0, 2),
        resize_mode=full(MODES.index("antialiased"), 3), gaussian_std=full(0.0, 2),
        poisson_scale=full(0.0, 2), gray_noise=full(False, 2),
        colour_mix=torch.eye(3).repeat(batch, 1, 1), jpeg_quality=full(100, 2),
        scale=full(scale), seed=full(0),
    )  # fmt: skip
    theta.order[:, 0] = OPERATIONS.index("resize 3")
    return theta


# ---- the recipes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One round of blur, resize, noise and JPEG; a pair is the range of a uniform draw."""

    blur_prob: float = 1.0
    blur_sigma: tuple[float, float] = (0.2, 3.0)  # along each axis, pixels
    sinc_prob: float = 0.1
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)  # up, down, keep
    resize: tuple[float, float] = (0.15, 1.5)  # new size / HR size; in round 2: / LR size
    modes: tuple[str, ...] = ("area", "bilinear", "bicubic")
    sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)  # of the kernels
    gaussian_prob: float = 0.5  # otherwise Poisson noise
    gaussian: tuple[float, float] = (1.0, 30.0)  # std in levels of 255
    poisson: tuple[float, float] = (0.05, 3.0)
    gray_prob: float = 0.4
    jpeg: tuple[int, int] = (30, 95)
    final_sinc_prob: float = 0.8  # in round 2: of a sinc filter after the resize to LR


# fmt: off
ROUNDS = {
    # Real-ESRGAN x4plus, as published. Deviation: the public code also sharpens HR before D, lets
    # sizes drift by rounding, and has another JPEG than libjpeg's, with fractional qualities. With
    # the same theta our LR is 0.26 dB nearer to bicubic LR than theirs.
    "realesrgan": (
        Round(),
        Round(blur_prob=0.8, blur_sigma=(0.2, 1.5), resize_prob=(0.3, 0.4, 0.3), resize=(0.3, 1.2),
              gaussian=(1.0, 25.0), poisson=(0.05, 2.5)),
    ),
    # The lighter settings of SynDiff (arXiv:2303.06994).
    "light": (
        Round(resize=(0.3, 1.5), gaussian=(1.0, 15.0), poisson=(0.05, 2.0), jpeg=(60, 95)),
        Round(blur_prob=0.5, blur_sigma=(0.2, 1.5), resize_prob=(0.3, 0.4, 0.3), resize=(0.6, 1.2),
              gaussian=(1.0, 12.0), poisson=(0.05, 1.0), jpeg=(60, 100),
              final_sinc_prob=0.0),
    ),
}
# fmt: on


@dataclass(frozen=True)
class Camera:
    """Not in the paper: reduction, lens, noise, sharpening, noise, JPEG, as in a camera.

    The recipes above hardly ever make an LR as clean as a modern camera's, and never sharpen; E_deg
    cannot recognise what it was not trained on. A pair is the range of a uniform draw.
    """

    lens_prob: float = 1.0
    cutoff: tuple[float, float] = (0.12, 0.42)  # half the amplitude is left, cycles per LR pixel
    steepness: tuple[float, float] = (1.0, 2.0)  # 1 falls like a Gaussian, 2 as exp(-f^4)
    shift: float = 0.125  # of the lens along each axis, LR pixels
    noise_prob: float = 0.7
    noise: tuple[float, float] = (0.0, 6.0)  # before sharpening: std in levels of 255, Gaussian
    poisson: tuple[float, float] = (0.0, 0.6)  # or of Poisson noise
    sharpen_prob: float = 0.8
    radius: tuple[float, float] = (0.5, 3.0)  # of the unsharp mask, LR pixels
    amount: tuple[float, float] = (0.0, 2.0)  # small ones are drawn more often
    late_noise_prob: float = 0.5
    late_noise: tuple[float, float] = (0.0, 3.0)  # after sharpening
    jpeg_prob: float = 0.8
    jpeg: tuple[int, int] = (70, 100)


CAMERAS = {
    "camera": Camera(),
    # What a bad camera does, each factor often absent. In Real-ESRGAN's recipe a wide blur always
    # comes with noise, and the last resize and JPEG hide most noise: E_deg confuses the factors.
    "wide": Camera(lens_prob=0.7, cutoff=(0.08, 0.5), noise_prob=0.5, noise=(0.0, 20.0),
                   poisson=(0.0, 2.0), sharpen_prob=0.5, late_noise_prob=0.3,
                   late_noise=(0.0, 20.0), jpeg_prob=0.5, jpeg=(25, 95)),
}  # fmt: skip
RECIPES = (*ROUNDS, *CAMERAS, "bsrgan", "bicubic")

# ---- drawing theta ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """Independent random numbers for each image of a batch: (B,) each; uniform in [low, high)."""

    batch: int
    generator: torch.Generator | None

    def uniform(self, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(self.batch, generator=self.generator)

    def chance(self, probability: float) -> Tensor:
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
        """The index of one of these MODES, all equally likely."""
        return self.one_of(tuple(map(MODES.index, modes)))

    def around_one(self, low: float, high: float) -> Tensor:
        """In [low, 1) or in [1, high), with even chance."""
        return torch.where(self.chance(0.5), self.uniform(low, 1.0), self.uniform(1.0, high))


def operation(name: str, performed: Tensor) -> Tensor:
    """The number of an operation where it is performed (B,), else 0."""
    return OPERATIONS.index(name) * performed.long()


def draw_kernel(theta: Degradation, draw: Draw, i: int, options: Round) -> None:
    """The blur of round i of Real-ESRGAN, written into theta."""
    # Gaussian, generalized Gaussian and plateau, each isotropic and anisotropic.
    kind = draw.choice((0.45, 0.25, 0.12, 0.03, 0.12, 0.03))
    isotropic, gaussian, plateau = kind % 2 == 0, kind < 2, kind >= 4
    size = draw.one_of(options.sizes)
    width, height = draw.uniform(*options.blur_sigma), draw.uniform(*options.blur_sigma)
    angle = draw.uniform(-math.pi, math.pi)
    generalized_shape, plateau_shape = draw.around_one(0.5, 4.0), draw.around_one(1.0, 2.0)
    shape = torch.where(plateau, plateau_shape, generalized_shape)
    theta.blur_size[:, i] = size
    theta.blur_sigma[:, i] = torch.stack([width, torch.where(isotropic, width, height)], 1)
    theta.blur_angle[:, i] = torch.where(isotropic, 0.0, angle)
    theta.blur_shape[:, i] = torch.where(gaussian, 1.0, shape)
    theta.blur_plateau[:, i] = plateau
    sinc = draw.chance(options.sinc_prob)
    cutoff = draw.uniform(torch.where(size < 13, math.pi / 3, math.pi / 5), math.pi)
    theta.sinc_cutoff[:, i] = torch.where(sinc, cutoff, 0.0)


def draw_rounds(theta: Degradation, draw: Draw, first: Round, second: Round) -> None:
    """Real-ESRGAN's two rounds (arXiv:2107.10833), written into theta."""
    steps = []
    for i, options in enumerate((first, second)):
        draw_kernel(theta, draw, i, options)
        direction = draw.choice(options.resize_prob)
        up, down = draw.uniform(1.0, options.resize[1]), draw.uniform(options.resize[0], 1.0)
        factor = torch.where(direction == 0, up, torch.where(direction == 1, down, 1.0))
        theta.resize[:, i] = factor / (1 if i == 0 else theta.scale)
        theta.resize_mode[:, i] = draw.mode(options.modes)
        gaussian = draw.chance(options.gaussian_prob)
        std, scale = draw.uniform(*options.gaussian) / 255, draw.uniform(*options.poisson)
        theta.gaussian_std[:, i] = torch.where(gaussian, std, 0.0)
        theta.poisson_scale[:, i] = torch.where(gaussian, 0.0, scale)
        theta.gray_noise[:, i] = draw.chance(options.gray_prob)
        low, high = options.jpeg
        theta.jpeg_quality[:, i] = draw.one_of(range(low, high + 1))
        steps += [
            operation(f"blur {i + 1}", draw.chance(options.blur_prob)),
            operation(f"resize {i + 1}", (direction < 2) | (i > 0)),
            operation(f"gaussian {i + 1}", theta.gaussian_std[:, i] > 0)
            + operation(f"poisson {i + 1}", theta.poisson_scale[:, i] > 0),
            operation(f"jpeg {i + 1}", torch.full_like(direction, True)),
        ]
    theta.resize_mode[:, 2] = draw.mode(Round.modes)
    theta.blur_size[:, 2] = draw.one_of(Round.sizes)
    sinc, cutoff = draw.chance(second.final_sinc_prob), draw.uniform(math.pi / 3, math.pi)
    theta.sinc_cutoff[:, 2] = torch.where(sinc, cutoff, 0.0)
    # The last JPEG comes before or after the resize to LR and its filter.
    jpeg, filtered = steps.pop(), operation("blur 3", sinc)
    to_lr = torch.full_like(jpeg, OPERATIONS.index("resize 3"))
    jpeg_last = draw.chance(0.5)
    steps += [
        torch.where(jpeg_last, to_lr, jpeg),
        torch.where(jpeg_last, filtered, to_lr),
        torch.where(jpeg_last, jpeg, filtered),
    ]
    theta.order[:] = torch.stack(steps, 1)


def draw_camera(theta: Degradation, draw: Draw, options: Camera) -> None:
    """A camera, written into theta. All but the reduction happens on the LR grid."""
    theta.resize_mode[:, 2] = draw.mode(("area", "antialiased"))
    # The lens: amplitude exp(-(2 pi width f)^(2 beta) / 2), half of it at the cut-off.
    beta, cutoff = draw.uniform(*options.steepness), draw.uniform(*options.cutoff)
    width = (2 * math.log(2)) ** (1 / (2 * beta)) / (2 * math.pi * cutoff)
    theta.blur_spectral[:, 1] = True
    theta.blur_shape[:, 1] = beta
    theta.blur_sigma[:, 1] = torch.stack([width, width * draw.around_one(0.6, 1.0)], 1)
    theta.blur_angle[:, 1] = draw.uniform(0, math.pi)
    shift = [draw.uniform(-options.shift, options.shift) for _ in range(2)]
    theta.blur_shift[:, 1] = torch.stack(shift, 1)
    theta.blur_sigma[:, 2] = draw.uniform(*options.radius)[:, None]
    low, high = options.amount
    theta.sharpen[:, 2] = low + (high - low) * draw.uniform() ** 2
    theta.blur_size[:] = KERNEL_SIZE
    theta.gaussian_std[:, 0] = draw.uniform(*options.noise) / 255
    theta.gaussian_std[:, 1] = draw.uniform(*options.late_noise) / 255
    theta.poisson_scale[:, 0] = draw.uniform(*options.poisson)
    theta.gray_noise[:] = torch.stack([draw.chance(0.4) for _ in range(2)], 1)
    theta.jpeg_quality[:, 1] = draw.one_of(range(options.jpeg[0], options.jpeg[1] + 1))
    noisy, gaussian = draw.chance(options.noise_prob), draw.chance(0.5)
    steps = [
        operation("resize 3", torch.full_like(noisy, True)),
        operation("blur 2", draw.chance(options.lens_prob)),
        operation("gaussian 1", noisy & gaussian) + operation("poisson 1", noisy & ~gaussian),
        operation("blur 3", draw.chance(options.sharpen_prob)),
        operation("gaussian 2", draw.chance(options.late_noise_prob)),
        operation("jpeg 2", draw.chance(options.jpeg_prob)),
    ]
    theta.order[:, : len(steps)] = torch.stack(steps, 1)


def draw_bsrgan(theta: Degradation, draw: Draw) -> None:
    """BSRGAN's seven operations (arXiv:2103.14006), shuffled, then a JPEG; written into theta.

    Its camera pipeline is left out: the model was never released. Deviation: the overshoot of a
    bicubic resize is clipped in the next noise or JPEG, not at once.
    """
    B, opencv = len(theta), ("coverage", "bilinear", "bicubic")  # INTER_AREA, _LINEAR, _CUBIC
    halved = draw.chance(0.25) & (theta.scale == 4)
    halving = torch.where(draw.chance(0.5), draw.mode(opencv), MODES.index("antialiased"))
    s = theta.scale / torch.where(halved, 2.0, 1.0)  # the scale that is left
    for i in range(2):
        anisotropic = draw.chance(0.5)
        eigenvalues = torch.stack([draw.uniform(0, 4 + s), draw.uniform(0, 4 + s)], 1)
        radius = draw.uniform(0, 2 + 0.2 * s)[:, None]
        theta.blur_sigma[:, i] = torch.where(anisotropic[:, None], eigenvalues.sqrt(), radius)
        theta.blur_angle[:, i] = torch.where(anisotropic, draw.uniform(0, math.pi), 0.0)
        theta.blur_size[:, i] = draw.one_of(range(7, 26, 2))
    # "Downsample 2" resizes by U(1, 2s), or keeps every s-th pixel behind a Gaussian shifted by
    # (s - 1) / 2. The latter equals bilinear resizing by s behind a centred Gaussian.
    resized = draw.chance(0.75)
    theta.blur_sigma[:, 2] = draw.uniform(0.1, 0.6 * s)[:, None]
    theta.blur_size[:, 2] = KERNEL_SIZE
    factor = torch.where(resized, draw.uniform(1, 2 * s), s)
    theta.resize[:, 0] = 0.5
    theta.resize[:, 1] = torch.where(halved, 0.5, 1.0) / factor
    second = torch.where(resized, draw.mode(opencv), MODES.index("bilinear"))
    theta.resize_mode[:] = torch.stack([halving, second, draw.mode(opencv)], 1)
    colour = draw.choice((0.4, 0.4, 0.2))  # independent channels, gray, correlated channels
    level = torch.where(colour == 2, 25, draw.one_of(range(2, 26)))
    theta.gaussian_std[:, 0] = level / 255
    theta.gray_noise[:, 0] = colour == 1
    # Correlated channels have the covariance |U^T diag(d) U|. NumPy's sampler, which BSRGAN uses,
    # makes it valid by taking absolute values of the eigenvalues.
    U = torch.linalg.svd(torch.rand(B, 3, 3, generator=draw.generator).double()).U
    d = torch.rand(B, 3, generator=draw.generator).double()
    value, vector = torch.linalg.eigh((U.mT @ torch.diag_embed(d) @ U).abs())
    mix = (vector * value.abs().sqrt()[:, None]) @ vector.mT
    theta.colour_mix[:] = mix.float().where((colour == 2)[:, None, None], torch.eye(3))
    theta.jpeg_quality[:] = torch.stack([draw.one_of(range(30, 96)) for _ in range(2)], 1)
    place = torch.stack([draw.uniform() for _ in range(6)], 1)  # (B, 6)
    place[:, 2:4] = place[:, 2:4].sort(1).values  # downsample 3 comes after downsample 2
    shuffled = place[:, [0, 1, 2, 2, 3, 4, 5]].argsort(dim=1, stable=True)
    names = ("blur 1", "blur 2", "blur 3", "resize 2", "resize 3", "gaussian 1", "jpeg 1")
    operations = torch.tensor([OPERATIONS.index(name) for name in names]).repeat(B, 1)
    operations[:, 2] *= ~resized
    operations[:, 6] *= draw.chance(0.9)
    theta.order[:, 0] = operation("resize 1", halved)
    theta.order[:, 1:8] = operations.gather(1, shuffled)
    theta.order[:, 8] = OPERATIONS.index("jpeg 2")


def sample_degradation(
    batch: int, recipe: str = "realesrgan", scale: int = 4, generator: torch.Generator | None = None
) -> Degradation:
    """Draw parameters of D for a number of images, all independent; UserError for another recipe.

    theta and its generator are on the CPU, so that theta does not depend on the device.
    """
    if recipe not in RECIPES:
        raise UserError(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}.")
    theta, draw = bicubic_reduction(batch, scale), Draw(batch, generator)
    if recipe == "bsrgan":
        draw_bsrgan(theta, draw)
    elif recipe in ROUNDS:
        draw_rounds(theta, draw, *ROUNDS[recipe])
    elif recipe in CAMERAS:
        draw_camera(theta, draw, CAMERAS[recipe])
    theta.seed = torch.randint(2**62, (batch,), generator=generator)
    return theta


# ---- what all operations share ----------------------------------------------------------------

Size = tuple[int, int]  # height and width


class Step(NamedTuple):
    """What happens to one image in one operation."""

    row: int  # of the batch
    column: int  # of theta
    size: Size  # before
    new_size: Size  # afterwards
    value: float  # kernel size, mode of resizing, std, scale or quality


def canvas_size(sizes: list[Size]) -> Size:
    """The size of a canvas that holds images of these sizes."""
    return max(h for h, _ in sizes), max(w for _, w in sizes)


def pick(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x[b, :, rows[b], columns[b]] of every image b: (B, C, H', W')."""
    index = rows[:, :, None] * x.shape[3] + columns[:, None]  # (B, H', W')
    picked = x.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1))
    return picked.unflatten(2, index.shape[1:])


def check_on_device(condition: Tensor, sentence: str) -> None:
    """ValueError unless the condition () holds; on a GPU a device assertion, not awaited."""
    if condition.device.type != "cpu":
        torch._assert_async(condition, sentence)
    elif not condition:
        raise ValueError(sentence)


@contextlib.contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """Compute in float32, without bf16 and TF32, whatever the training around it uses."""
    matmul = torch.backends.cuda.matmul
    allowed, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32 = allowed


# ---- blur -------------------------------------------------------------------------------------


def blur_kernels(theta: Degradation, device: torch.device | None = None) -> Tensor:
    """The kernels (B, 3, 25, 25) of theta's three blurs, each of sum 1. arXiv:2107.10833, Eq. 2-6.

    With q = x^T Sigma^-1 x: exp(-q^beta / 2) (a Gaussian for beta = 1), the plateau
    1 / (1 + q^beta) or, where cutoff > 0, the circular sinc cutoff J_1(cutoff r) / (2 pi r).
    Spectral kernels have the transfer function exp(-q^beta / 2), q = (2 pi)^2 f^T Sigma f.
    Sharpening by `amount` is (1 + amount) delta - amount kernel.
    """
    columns = [*theta.blur_sigma.unbind(2), theta.blur_angle, theta.blur_shape, theta.blur_plateau,
               theta.blur_size, theta.sinc_cutoff, theta.sharpen, theta.blur_spectral,
               *theta.blur_shift.unbind(2)]  # fmt: skip
    numbers = torch.stack([column.double() for column in columns])
    numbers = numbers.to(device or numbers.device, non_blocking=True)[..., None, None]
    width, height, angle, beta, plateau, size, cutoff, amount, spectral, *shift = numbers
    half = KERNEL_SIZE // 2  # the numbers above are (B, 3, 1, 1) each
    x = torch.arange(-half, half + 1, device=numbers.device, dtype=torch.float64)
    y = x[:, None]
    frequency = 2 * math.pi * x / KERNEL_SIZE  # radians per pixel
    phase = frequency * shift[0] + frequency[:, None] * shift[1]
    u, v = frequency.where(spectral > 0, x), frequency[:, None].where(spectral > 0, y)
    along, across = u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()
    width, height = (n.clamp(min=1e-3).pow(1 - 2 * spectral) for n in (width, height))
    q = ((along / width).square() + (across / height).square()).pow(beta)  # (B, 3, 25, 25)
    kernel = torch.where(plateau > 0, 1 / (1 + q), (q / -2).exp())
    transfer = torch.fft.ifftshift(torch.polar(kernel, -phase), (2, 3))
    kernel = torch.fft.fftshift(torch.fft.ifft2(transfer), (2, 3)).real.where(spectral > 0, kernel)
    radius = (x.square() + y.square()).sqrt()
    sinc = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    sinc = torch.where(radius > 0, sinc, cutoff.square() / (4 * math.pi))
    kernel = torch.where(cutoff > 0, sinc, kernel)
    kernel = kernel * (torch.maximum(x.abs(), y.abs()) <= size // 2)
    kernel = kernel / kernel.sum((2, 3), keepdim=True)
    sharp = (1 + amount) * (radius == 0) - amount * kernel
    return torch.where(amount > 0, sharp, kernel).float()


def mirrored(size: Tensor, length: int) -> Tensor:
    """Indices -12, -11, ... mirrored into [0, n) for sizes n (B, 2): (B, 2, length)."""
    margin = KERNEL_SIZE // 2
    period = (2 * size - 2).clamp(min=1)[..., None]
    i = torch.arange(-margin, length - margin, device=size.device) % period
    return torch.minimum(i, period - i)


@functools.cache
def fast_length(n: int) -> int:
    """The shortest length for a fast FFT, of prime factors up to 7, of n pixels and margins."""
    n += KERNEL_SIZE - 1
    return next(m for m in range(n, 2 * n) if 210**16 % m == 0)


def blur(x: Tensor, kernel: Tensor, index: Tensor | None = None) -> Tensor:
    """Correlate images (B, 3, H, W) with kernels (B, 25, 25), edges mirrored.

    `index` is mirrored() of the sizes of images on a canvas; without it each fills the canvas.
    """
    H, W = x.shape[2:]
    lengths = fast_length(H), fast_length(W)
    if index is None:
        index = mirrored(torch.tensor([[H, W]], device=x.device).expand(len(x), 2), max(lengths))
    x = pick(x, index[:, 0, : lengths[0]], index[:, 1, : lengths[1]])
    spectrum = torch.fft.rfft2(x) * torch.fft.rfft2(kernel, lengths).conj()[:, None]
    return torch.fft.irfft2(spectrum, lengths)[:, :, :H, :W]


# ---- resize -----------------------------------------------------------------------------------


def cubic(d: Tensor, a: float) -> Tensor:
    """Keys' kernel of a distance d >= 0: 1 at 0, and 0 from 2 pixels on."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


def overlap(d: Tensor, ratio: Tensor) -> Tensor:
    """The part of an input pixel at distance d that an output pixel, `ratio` wide, covers."""
    return torch.minimum((1 + ratio) / 2 - d, ratio).clamp(0, 1)


# Weight of an input pixel by its distance from the centre of the output pixel and by the size of an
# output pixel, both in input pixels.
PROFILES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "area": lambda d, ratio: (overlap(d, ratio) > 1e-6).float(),
    "bilinear": lambda d, ratio: (1 - d).clamp(min=0),
    "bicubic": lambda d, ratio: cubic(d, -0.75),
    "antialiased": lambda d, ratio: cubic(d / ratio.clamp(min=1), -0.5),
    "coverage": overlap,
}
REPEATS_EDGES = ("bilinear", "bicubic")  # the other modes ignore pixels outside of the image


def resize_weights(
    turns: list[list[Step]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Size]]:
    """The arguments of resize() for each turn: input pixels and weights (n, 2, N, taps), new size.

    Pixel i of side s of image b becomes the sum over k of weight[b, s, i, k] times pixel
    at[b, s, i, k]. Equals torch's interpolate, Pillow's bicubic (antialiased), OpenCV's INTER_AREA.
    """
    steps = [step for turn in turns for step in turn]
    old, new = np.array([(step.size, step.new_size) for step in steps]).swapaxes(0, 1)  # (n, 2)
    mode = np.array([[step.value] * 2 for step in steps]).astype(int)
    # How far an output pixel looks to each side in the input, by mode.
    covered, one, wide = (1 + old / new) / 2, np.ones(old.shape), 2 * (old / new).clip(min=1)
    reach = np.choose(mode, [covered, one, 2 * one, wide, covered])
    taps, N = int(2 * reach.max()) + 1, int(new.max())
    numbers = torch.tensor(np.stack([old, new, reach, mode], axis=2)).to(device, non_blocking=True)
    length, new_length, half, index = numbers[..., None, None].unbind(2)  # (n, 2, 1, 1) each
    i = torch.arange(N, dtype=torch.float64, device=device)[:, None].minimum(new_length - 1)
    centre = (i + 0.5) * (length / new_length) - 0.5  # (n, 2, N, 1) in the input
    j = (centre - half).ceil() + torch.arange(taps, device=device)  # (n, 2, N, taps)
    distance, ratio = (j - centre).abs().float(), (length / new_length).float()
    weight, outside = torch.zeros_like(distance), (j < 0) | (j >= length)
    for number in np.unique(mode).tolist():
        profile = PROFILES[MODES[number]](distance, ratio)
        if MODES[number] not in REPEATS_EDGES:
            profile = profile.masked_fill(outside, 0.0)
        weight = torch.where(index == number, profile, weight)
    weight = weight / weight.sum(3, keepdim=True)
    at = j.clamp(min=0).minimum(length - 1).long()
    counts = [len(turn) for turn in turns]
    sizes = [canvas_size([step.new_size for step in turn]) for turn in turns]
    return zip(at.split(counts), weight.split(counts), sizes, strict=True)


def resize(x: Tensor, at: Tensor, weight: Tensor, size: Size) -> Tensor:
    """Resize images (B, 3, H, W) with what resize_weights returns, onto a canvas of this size."""
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
    """Add noise of std (B,) to x (B, 3, H, W) in [0, 1]: gray, or mixed by mix (B, 3, 3)."""
    shape = (len(x), 1 if all(gray) else 3, *x.shape[2:])
    eps = torch.randn(shape, generator=generator, device=generator.device).to(x.device)
    noise = (std[:, None, None] * mix) @ where_gray(gray, eps[:, :1], eps).expand_as(x).flatten(2)
    return noise.view_as(x).add_(x).clamp_(0, 1)


def poisson(
    x: Tensor, scale: Tensor, gray: list[bool], size: Tensor, generator: torch.Generator
) -> Tensor:
    """Add scale (B,) times shot noise to x (B, 3, H, W) in [0, 1]; photon count = number of levels.

    Levels are the 8-bit values that occur in the image of size[b] (2,). Their number is rounded up
    to a power of two.
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


def quantisation_tables() -> Tensor:
    """libjpeg's tables of luma and chroma for qualities 1 to 100: (100, 2, 8, 8)."""
    quality = torch.arange(1, 101)
    percent = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return ((BASE_TABLES * percent[:, None, None, None] + 50) // 100).clamp(1, 255)


JPEG_TABLES = quantisation_tables()
# The passes over rows and columns, forward and inverse; libjpeg shifts right by so many bits.
PASSES = torch.stack([DCT * 2.0**-11, DCT * 2.0**-15, DCT.T * 2.0**-11, DCT.T * 2.0**-18])


def quantised(plane: Tensor, table: Tensor) -> Tensor:
    """A plane (B, H, W) after the DCT, quantisation by table (B, H/8, 8, 8) and the inverse DCT.

    Each pass is rounded, half up. The DCT passes over rows first, the inverse over columns.
    """
    B, H, W = plane.shape
    rows, columns, columns_back, rows_back = PASSES.to(plane.device, non_blocking=True)

    def along_columns(matrix: Tensor, y: Tensor) -> Tensor:
        return (matrix @ y.unflatten(1, (-1, 8))).flatten(1, 2)

    y = along_columns(rows, (plane.double() - 128).mT.contiguous()).add_(0.5).floor_()
    y = along_columns(columns, y.mT.contiguous()).add_(0.5).floor_()  # 8 times the coefficient
    # libjpeg rounds halves away from zero. Dividing by slightly less moves them just past the half.
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
    """Average 2 x 2 pixels as libjpeg does (bias 1, 2, 1, 2, ...); repeat the image's last row."""
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
def jpeg(x: Tensor, quality: Tensor | int, size: Tensor | None = None) -> Tensor:
    """Compress and decompress images as Pillow (libjpeg, 4:2:0) does, bit for bit.

    x (B, 3, H, W) in [0, 1], first rounded to 8 bits; quality (B,) in 1..100; `size` (B, 2) are the
    sizes of images on a canvas, which by default they fill. Returns (B, 3, H, W) without a
    gradient. ValueError for another quality; on a GPU, which is not synchronised, a device
    assertion.
    """
    H, W = x.shape[2:]
    H16, W16 = -(-H // 16) * 16, -(-W // 16) * 16
    quality = torch.as_tensor(quality).to(x.device, non_blocking=True).expand(len(x)).long()
    check_on_device(((quality >= 1) & (quality <= 100)).all(), "JPEG quality must lie in 1..100")
    size = torch.tensor([[H, W]]).expand(len(x), 2) if size is None else size
    size = size.to(x.device, non_blocking=True)
    with plain_float32(x.device):
        index = clamped(size, max(H16, W16))
        rgb = pick(x.float(), index[:, 0, :H16], index[:, 1, :W16]).clamp_(0, 1).mul_(255).round_()
        luma, chroma = converted(rgb, TO_YCC).split([1, 2], dim=1)
        halved = (size + 1) // 2
        chroma = halve(chroma, halved)  # (B, 2, H16/2, W16/2)
        # One plane for the DCT: luma and, below it, both planes of chroma side by side.
        plane = torch.cat([luma[:, 0], chroma.movedim(1, 2).flatten(2)], dim=1)
        is_chroma = (torch.arange(H16 // 8 + H16 // 16, device=x.device) >= H16 // 8).long()
        tables = JPEG_TABLES.to(x.device, non_blocking=True)
        table = tables[quality[:, None] - 1, is_chroma].double()  # (B, rows of blocks, 8, 8)
        luma, chroma = quantised(plane, table).split([H16, H16 // 2], dim=1)
        chroma = double(chroma.unflatten(2, (2, -1)).movedim(2, 1) - 128, halved)
        rgb = converted(chroma, TO_RGB).add_(luma[:, None])
        return rgb[:, :, :H, :W].clamp(0, 255).div_(255)


# ---- D: many images on one canvas -------------------------------------------------------------

CPU_PIXELS = 2**16  # of the images of one turn on a CPU, so that they fit into its cache


def plan(theta: Degradation, H: int, W: int, room: int) -> list[tuple[str, list[Step]]]:
    """The turns in which a batch is degraded: a kind of operation, and a step for each image.

    Images do not depend on each other. So a turn runs the operation that most images need next, and
    JPEG, the slowest, when all need it: the number of turns hardly grows with the batch. The images
    of a turn have at most `room` pixels together, unless there is only one.
    """
    columns = {"blur": theta.blur_size, "resize": theta.resize_mode, "gaussian": theta.gaussian_std,
               "poisson": theta.poisson_scale, "jpeg": theta.jpeg_quality}  # fmt: skip
    values = {kind: column.tolist() for kind, column in columns.items()}
    factors, scale = theta.resize.tolist(), theta.scale.tolist()[0]
    waiting = [[OPERATIONS[k].split() for k in row if k] for row in theta.order.tolist()]
    sizes, turns = [(H, W)] * len(theta), []

    def step(b: int) -> Step:
        """The next step of image b."""
        (kind, number), size = waiting[b].pop(0), sizes[b]
        i = int(number) - 1
        if kind == "resize" and i == 2:
            sizes[b] = (H // scale, W // scale)
        elif kind == "resize":
            h, w = (int(np.float32(n) * np.float32(factors[b][i])) for n in (H, W))
            sizes[b] = (max(1, h), max(1, w))
        return Step(b, i, size, sizes[b], values[kind][b][i])

    while any(waiting):
        needed = [operations[0][0] if operations else "" for operations in waiting]
        kind = max(("blur", "resize", "gaussian", "poisson"), key=needed.count)
        kind = kind if kind in needed else "jpeg"
        rows = [b for b, name in enumerate(needed) if name == kind]
        rows.sort(key=lambda b: -math.prod(sizes[b]))  # images of similar size share a canvas
        while rows:
            n = max(1, room // math.prod(sizes[rows[0]]))
            turns.append((kind, [step(b) for b in sorted(rows[:n])]))
            rows = rows[n:]
    if not turns or set(sizes) != {(H // scale, W // scale)}:
        raise ValueError("the last resize in each row of theta.order must be that to LR, resize 3")
    return turns


def on_canvas(hr: Tensor, theta: Degradation, generator: torch.Generator) -> Tensor:
    """D for a batch: each turn applies one kind of operation to several images at once.

    On the way images differ in size. Each lies in the top left corner of its row of one canvas
    (B, 3, H', W'); the pixels beyond it have no effect. Noise is drawn on the generator's device.
    """
    (B, _, H, W), device = hr.shape, hr.device
    turns = plan(theta, H, W, CPU_PIXELS if device.type == "cpu" else 2**62)
    # The host knows all numbers in advance. They go to the device together; none comes back.
    table = [(s.row, s.column, *s.size, s.value) for _, steps in turns for s in steps]
    numbers = torch.tensor(table, dtype=torch.float64).to(device, non_blocking=True)
    row, column, size = (n.squeeze(1) for n in numbers[:, :4].long().split([1, 1, 2], dim=1))
    kernel = blur_kernels(theta, device)[row, column]
    index = mirrored(size, max(fast_length(max(step.size)) for _, steps in turns for step in steps))
    mix = theta.colour_mix.to(device, non_blocking=True)[row]
    counts = [len(steps) for _, steps in turns]
    columns = (row, size, numbers[:, 4].float(), kernel, index, mix)
    of_turns = zip(*(column.split(counts) for column in columns), strict=True)
    weights = resize_weights([steps for kind, steps in turns if kind == "resize"], device)
    gray_noise = theta.gray_noise.tolist()
    x = hr.clone()
    for (kind, steps), (row, size, value, kernel, index, mix) in zip(turns, of_turns, strict=True):
        first, last = steps[0].row, steps[-1].row
        rows = slice(first, last + 1) if last - first < len(steps) else row  # a slice is faster
        h, w = canvas_size([step.size for step in steps])
        y = x[rows, :, :h, :w]
        if kind == "blur":
            y = blur(y, kernel, index)
        elif kind == "resize":
            y = resize(y, *next(weights))
        elif kind == "jpeg":
            y = jpeg(y, value, size)
        else:
            gray = [gray_noise[step.row][step.column] for step in steps]
            if kind == "gaussian":
                y = gaussian(y, value, gray, mix, generator)
            else:
                y = poisson(y, value, gray, size, generator)
        h, w = y.shape[2:]
        if len(steps) == B:
            x = y
        else:
            right, below = max(0, w - x.shape[3]), max(0, h - x.shape[2])
            x = F.pad(x, (0, right, 0, below)) if right or below else x
            x[rows, :, :h, :w] = y
    h, w = steps[0].new_size
    return (x[:, :, :h, :w].clamp(0, 1) * 255).round() / 255


def generator_on(device: torch.device, source: torch.Generator) -> torch.Generator:
    """The given generator if it is on this device, else one on the device that it seeds."""
    if source.device.type == device.type:
        return source
    seed = torch.randint(2**62, (), generator=source, device=source.device)
    return torch.Generator(device).manual_seed(int(seed))


@torch.no_grad()
def degrade(hr: Tensor, theta: Degradation, generator: torch.Generator | None = None) -> Tensor:
    """D(X, theta): hr (B, 3, H, W) -> lr (B, 3, H/scale, W/scale), both in [0, 1]; lr is 8-bit.

    Row i of theta degrades image i. With a generator, noise is drawn anew for the whole batch.
    Without one, each image is degraded alone with the noise of its theta.seed: on a CPU the result
    is the same in every byte, in any batch and with any number of threads. A GPU, or a batch with
    a generator, may differ in the last bit of the arithmetic, so that a few pixels round the other
    way. ValueError for sizes that do not fit and for hr outside [0, 1]; with a generator hr outside
    [0, 1] is a device assertion on a GPU, which is then not synchronised.
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
    in_range = (low >= -1e-3) & (high <= 1 + 1e-3)  # allows for rounding
    in_range = in_range if generator is not None else in_range.cpu()
    check_on_device(in_range, "HR images must lie in [0, 1]: divide 8-bit values by 255")
    with plain_float32(hr.device):
        if generator is not None:
            return on_canvas(hr, theta, generator_on(hr.device, generator))
        draws = map(make_generator, theta.seed.tolist())
        rows = [on_canvas(hr[[b]], theta[b : b + 1], draw) for b, draw in enumerate(draws)]
        return torch.cat(rows)


# ---- the command ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    hr: tuple[str, ...] = ()  # folders or files of HR photos (else data/hr, else data/sample/hr)
    out: str = "out/degraded"  # folder that gets hr/, lr/, pairs.jsonl and preview.png
    recipe: str = "realesrgan"  # realesrgan, bsrgan, light, camera, wide or bicubic
    per_image: int = 1  # pairs to make of every photo
    scale: int = 4  # HR size / LR size
    seed: int = 0  # pair k of a photo is drawn from (seed, name of the photo, k)
    device: str = "auto"  # cpu, cuda or auto


RANGES = {"per_image": (1, 10**6), "scale": (1, 16)}


def save_hr_beside_lr(path: Path, out: Path, rows: list[dict]) -> None:
    """Write a picture of these pairs: the middle of HR beside that of LR."""
    pictures = []
    for row in rows:
        hr, lr = (load_image(out / row[side]) for side in ("hr", "lr"))
        scale = hr.shape[1] // lr.shape[1]
        pictures.append([centre(hr, 96 * scale, 384), centre(lr, 96, 384)])
    save_sheet(path, ("HR", "LR"), pictures)


def main(cfg: Config, rt: Runtime) -> None:
    """Degrade photos: write out/hr and out/lr with the same names, and out/pairs.jsonl with theta.

    A second run makes only the pairs that are missing and sets aside those not asked for any more.
    """
    require(cfg.recipe in RECIPES, f"--recipe {cfg.recipe}: choose of {', '.join(RECIPES)}.")
    check_ranges(cfg, RANGES)
    one_process = "degrade.py uses all CPU cores by itself: start it without torchrun."
    require(rt.world_size == 1, one_process)
    out = Path(cfg.out)
    files = outside(find_photos(cfg.hr, "hr", "--hr"), out, "--hr")
    ends = [""] if cfg.per_image == 1 else [f"_{k}" for k in range(cfg.per_image)]
    photos = list(zip(files, photo_names(files, cfg.hr), keys_of(files, cfg.hr), strict=True))
    names = [name + end for _, name, _ in photos for end in ends]
    folder = PairFolder(out, names, "theta", ("source",), rt)

    def drawn(photo: tuple[Path, str, str]) -> tuple[list[Degradation], list[dict]]:
        """The parameters of the pairs of a photo, and their rows of the table."""
        file, name, key = photo
        draws = [make_generator(cfg.seed, name, k) for k in range(cfg.per_image)]
        thetas = [sample_degradation(1, cfg.recipe, cfg.scale, draw) for draw in draws]
        facts = {"source": str(file), "photo": folder.facts("photo", key, file)}
        return thetas, [
            folder.row(name + end, theta=json.loads(theta.to_json()[0]), **facts)
            for end, theta in zip(ends, thetas, strict=True)
        ]

    def verdicts(photo: tuple[Path, str, str]) -> list[tuple[dict, str]]:
        """The rows of a photo's pairs that were made before, and why they are made again."""
        rows = [row for row in drawn(photo)[1] if Path(row["hr"]).stem in folder.before]
        return [(row, folder.reason(row)) for row in rows]

    def work(photo: tuple[Path, str, str]) -> list[dict] | str:
        """Make the pairs of a photo; return their rows of the table, or why it was skipped."""
        try:
            hr = crop_to_multiple(load_image(photo[0]), cfg.scale, photo[0])
            thetas, rows = drawn(photo)
        except (ValueError, OSError) as error:
            return f"skipped: {error}"
        hr = to_uint8(hr).float() / 255  # as written to the file, also of a 16-bit photo
        save_image(out / rows[0]["hr"], hr)
        for row, theta in zip(rows, thetas, strict=True):
            save_image(out / row["lr"], degrade(hr[None].to(rt.device), theta)[0])
            if row is not rows[0]:
                copy_file(out / rows[0]["hr"], out / row["hr"])
        return rows

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread below has one core
    earlier = [p for p in photos if any(p[1] + end in folder.before for end in ends)]
    folder.start(itertools.chain.from_iterable(in_parallel(verdicts, earlier, threads)))
    missing = [p for p in photos if any(p[1] + end not in folder.kept for end in ends)]
    with plain_float32(rt.device):  # for all threads: the setting is global
        results = in_parallel(work, missing, threads)
        for result in tqdm(results, total=len(missing), unit="photo"):
            if isinstance(result, str):
                tqdm.write(result)
            else:
                folder.add(result)
    rows = folder.finish()
    preview = out / "preview.png"
    if not preview.is_file():
        save_hr_beside_lr(preview, out, rows[: 4 * cfg.per_image : cfg.per_image])
    folder.close()
    if sentence := lost_sentence():
        print(sentence)
    skipped = len(files) - len(rows) // cfg.per_image
    print(f"{len(rows)} pairs in {out}, {skipped} images skipped; look at {preview}")


if __name__ == "__main__":
    launch(main, Config, {}, __doc__)
