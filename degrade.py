"""D: hand-made degradation of clean HR images into synthetic LR (Section 2.1 uses Real-ESRGAN's).

In: HR images and one row of parameters per image. Out: LR images, 1/scale of the size. Two rounds
of blur, resize, noise and JPEG (Real-ESRGAN, arXiv:2107.10833), then a sinc filter and the resize
to LR. A batch is one canvas: images of different intermediate sizes sit in its top left corners,
and every operation takes the true `size` of each image, so that no image sees its neighbours.

    python degrade.py
    python degrade.py --hr data/hr --out out/realesrgan --seed 1
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common

# ---- the published options --------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One round of blur, resize, noise, JPEG; pairs are ranges that are drawn from uniformly."""

    blur_prob: float = 1.0
    blur_sigma: tuple[float, float] = (0.2, 3.0)  # pixels, of each axis
    sinc_prob: float = 0.1
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)  # up, down, keep
    resize: tuple[float, float] = (0.15, 1.5)  # in stage 2: of the LR size
    gaussian_prob: float = 0.5  # otherwise Poisson
    gaussian: tuple[float, float] = (1.0, 30.0)  # std in levels of 255
    poisson: tuple[float, float] = (0.05, 3.0)
    gray_prob: float = 0.4
    jpeg: tuple[int, int] = (30, 95)


# fmt: off
RECIPES = {
    # Real-ESRGAN x4plus, as published.
    "realesrgan": (
        Stage(),
        Stage(blur_prob=0.8, blur_sigma=(0.2, 1.5), resize_prob=(0.3, 0.4, 0.3), resize=(0.3, 1.2),
              gaussian=(1.0, 25.0), poisson=(0.05, 2.5)),
    ),
    # The lighter settings of SynDiff (arXiv:2303.06994).
    "light": (
        Stage(resize=(0.3, 1.5), gaussian=(1.0, 15.0), poisson=(0.05, 2.0), jpeg=(60, 95)),
        Stage(blur_prob=0.5, blur_sigma=(0.2, 1.5), resize_prob=(0.3, 0.4, 0.3), resize=(0.6, 1.2),
              gaussian=(1.0, 12.0), poisson=(0.05, 1.0), jpeg=(60, 100)),
    ),
    # Not in the paper: one lens blur, then little noise and compression, as modern cameras have.
    # The two above hardly ever draw an LR this clean, and what E_deg never saw it can't tell apart.
    "camera": (
        Stage(blur_sigma=(0.3, 4.0), sinc_prob=0.0, resize_prob=(0.0, 0.0, 1.0),
              gaussian_prob=1.0, gaussian=(0.0, 0.5), jpeg=(100, 100)),
        Stage(blur_prob=0.0, resize_prob=(0.0, 0.0, 1.0), gaussian=(0.0, 8.0), poisson=(0.0, 0.8),
              jpeg=(70, 100)),
    ),
}
# Six kinds of kernel: two axes or one (isotropic), times three profiles.
KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
KIND_PROB = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
# fmt: on
MODES = ("area", "bilinear", "bicubic")
KERNEL_SIZE = 21  # of all kernels; smaller ones are padded with zeros
FINAL_SINC_PROB = 0.8


@dataclass
class Degradation:
    """Parameters theta of D, one row per image; columns are rounds (the last sinc is a third)."""

    blur_sigma: Tensor  # (B, 2, 2) widths along both axes, pixels
    blur_angle: Tensor  # (B, 2) radians
    blur_shape: Tensor  # (B, 2) exponent beta; 1 is a Gaussian
    blur_plateau: Tensor  # (B, 2) bool: 1 / (1 + q^beta) instead of exp(-q^beta / 2)
    blur_size: Tensor  # (B, 3) kernel size, odd; 1 is no blur
    sinc_cutoff: Tensor  # (B, 3) radians per pixel; 0 is no sinc
    resize: Tensor  # (B, 2) factors: of the HR size, of the LR size
    resize_mode: Tensor  # (B, 3) index into MODES; the last one is the resize to LR
    gaussian_std: Tensor  # (B, 2) on [0, 1]; 0 is none
    poisson_scale: Tensor  # (B, 2); 0 is none
    gray_noise: Tensor  # (B, 2) bool: the same noise in all channels
    jpeg_quality: Tensor  # (B, 2) 1..100; 0 is no compression
    jpeg_last: Tensor  # (B,) bool: the resize to LR comes before the last JPEG
    scale: Tensor  # (B,) HR size / LR size
    seed: Tensor  # (B,) of the noise

    def __len__(self) -> int:
        """Number of images."""
        return len(self.seed)

    def __getitem__(self, rows: "slice | Tensor | list[int]") -> "Degradation":
        """Select rows: a slice, an index tensor, a mask or a list."""
        return Degradation(*(getattr(self, f.name)[rows] for f in fields(self)))

    def repeat(self, times: int) -> "Degradation":
        """Every row `times` times, in place: a, a, b, b."""
        rows = torch.arange(len(self)).repeat_interleave(times)
        return self[rows]

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
        rows = zip(*columns.values(), strict=True)
        return [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]

    @staticmethod
    def from_json(lines: list[str]) -> "Degradation":
        """Read what to_json wrote."""
        rows = [json.loads(line) for line in lines]
        columns = (torch.tensor([row[f.name] for row in rows]) for f in fields(Degradation))
        return Degradation(*columns)

    def physical(self) -> Tensor:
        """What theta means for the LR image: (B, 5), each about in [0, 1].

        Blur width (log LR pixels), resolution lost by resizing (log), ringing, noise, JPEG loss.
        """
        scale = self.scale.float()
        first, second = self.blur_sigma.square().mean(-1).unbind(1)  # (B,) pixels^2
        blurred = (self.blur_size[:, :2] > 1) & (self.sinc_cutoff[:, :2] == 0)
        lr_factor = self.resize[:, 1]  # pixels of the second canvas per LR pixel
        variance = first * blurred[:, 0] / scale**2 + second * blurred[:, 1] / lr_factor**2
        lost = torch.stack([self.resize[:, 0] * scale, lr_factor], 1).amin(1).clamp(max=1)
        ringing = (math.pi - self.sinc_cutoff.where(self.sinc_cutoff > 0, math.pi)).amax(1)
        poisson = self.poisson_scale * 0.04  # the std that scale has at a mid gray of 8 bits
        noise = (self.gaussian_std + poisson) * self.gaussian_std.new_tensor([0.4, 1.0])
        quality = self.jpeg_quality.where(self.jpeg_quality > 0, 100)
        return torch.stack(
            [
                (variance + 0.01).log() / 4.6 + 1,
                -lost.log(),
                ringing / math.pi,
                (noise.square().sum(1).sqrt() * 255 + 1).log() / 3.5,
                1 - quality.amin(1) / 100,
            ],
            dim=1,
        )


# ---- drawing theta ----------------------------------------------------------------------------


def sample_degradation(
    batch: int,
    recipe: str = "realesrgan",
    scale: int = 4,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Degradation:
    """Draw parameters of D for a number of images, all independent (Real-ESRGAN's distributions).

    `generator` is a CPU generator: theta is drawn on the CPU, so it is the same for any device.
    """
    if recipe not in RECIPES:
        raise common.UserError(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}.")

    def uniform(low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator)

    def chance(probability: float) -> Tensor:
        return uniform() < probability

    def choice(probabilities: tuple[float, ...]) -> Tensor:
        edges = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)[:-1].float()
        return torch.bucketize(uniform(), edges, right=True)

    def one_of(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (batch,), generator=generator)]

    def around_one(low: float, high: float) -> Tensor:
        return torch.where(chance(0.5), uniform(low, 1.0), uniform(1.0, high))

    rounds = []
    for stage in RECIPES[recipe]:
        kind = choice(KIND_PROB)
        size = one_of(*range(7, KERNEL_SIZE + 1, 2))
        sinc = chance(stage.sinc_prob)
        blur = chance(stage.blur_prob)
        isotropic = kind % 2 == 0
        width = uniform(*stage.blur_sigma)
        height = torch.where(isotropic, width, uniform(*stage.blur_sigma))
        gaussian_shape = kind < KINDS.index("generalized_iso")
        plateau = kind >= KINDS.index("plateau_iso")
        shape = torch.where(plateau, around_one(1.0, 2.0), around_one(0.5, 4.0))
        lowest = torch.where(size < 13, math.pi / 3, math.pi / 5)
        direction = choice(stage.resize_prob)
        up, down = uniform(1.0, stage.resize[1]), uniform(stage.resize[0], 1.0)
        gaussian = chance(stage.gaussian_prob)
        rounds.append(
            {
                "blur_sigma": torch.stack([width, height], 1),
                "blur_angle": torch.where(isotropic, 0.0, uniform(-math.pi, math.pi)),
                "blur_shape": torch.where(gaussian_shape, 1.0, shape),
                "blur_plateau": plateau,
                "blur_size": torch.where(blur, size, 1),
                "sinc_cutoff": torch.where(blur & sinc, uniform(lowest, math.pi), 0.0),
                "resize": torch.stack([up, down, torch.ones(batch)]).gather(0, direction[None])[0],
                "resize_mode": one_of(0, 1, 2),
                "gaussian_std": torch.where(gaussian, uniform(*stage.gaussian) / 255, 0.0),
                "poisson_scale": torch.where(gaussian, 0.0, uniform(*stage.poisson)),
                "gray_noise": chance(stage.gray_prob),
                "jpeg_quality": one_of(*range(stage.jpeg[0], stage.jpeg[1] + 1)),
            }
        )
    columns = {key: [r[key] for r in rounds] for key in rounds[0]}
    final = chance(FINAL_SINC_PROB if recipe == "realesrgan" else 0.0)
    columns["blur_size"].append(torch.where(final, one_of(*range(7, KERNEL_SIZE + 1, 2)), 1))
    columns["sinc_cutoff"].append(torch.where(final, uniform(math.pi / 3, math.pi), 0.0))
    columns["resize_mode"].append(one_of(0, 1, 2))
    theta = Degradation(
        **{key: torch.stack(value, 1) for key, value in columns.items()},
        jpeg_last=chance(0.5),
        scale=torch.full((batch,), scale),
        seed=torch.randint(2**62, (batch,), generator=generator),
    )
    return theta.to(device)


# ---- blur -------------------------------------------------------------------------------------


def blur_kernel(
    sigma: Tensor, angle: Tensor, shape: Tensor, plateau: Tensor, size: Tensor, cutoff: Tensor
) -> Tensor:
    """Blur kernels (B, 21, 21), each summing to 1; sigma (B, 2), all else (B,).

    With q = x^T Sigma^-1 x: exp(-q^beta / 2) (Gaussian for beta = 1), the plateau 1 / (1 + q^beta),
    or, where cutoff > 0, the circular sinc cutoff J_1(cutoff r) / (2 pi r) (arXiv:2107.10833, Eq.
    2-6).
    """
    half = KERNEL_SIZE // 2
    axis = torch.arange(-half, half + 1, device=sigma.device, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    sigma, angle, shape, cutoff = (v.double() for v in (sigma, angle, shape, cutoff))
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = x * cos + y * sin, y * cos - x * sin  # (B, 21, 21)
    q = (along / sigma[:, :1, None]).square() + (across / sigma[:, 1:, None]).square()
    q = q.pow(shape[:, None, None])
    smooth = torch.where(plateau[:, None, None], 1 / (1 + q), (-q / 2).exp())
    r = (x.square() + y.square()).sqrt()
    omega = cutoff[:, None, None]
    sinc = omega * torch.special.bessel_j1(omega * r) / (2 * math.pi * r)
    sinc[:, half, half] = cutoff.square() / (4 * math.pi)
    kernel = torch.where(omega > 0, sinc, smooth)
    inside = torch.maximum(x.abs(), y.abs()) <= (size[:, None, None] // 2)
    kernel = kernel * inside
    return (kernel / kernel.sum((1, 2), keepdim=True)).float()


def pick(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x[b, :, rows[b], columns[b]] for every image b: (B, C, H', W')."""
    b = torch.arange(len(x), device=x.device)[:, None, None]
    return x.transpose(0, 1)[:, b, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


def mirrored(length: int, margin: int, n: Tensor) -> Tensor:
    """Indices -margin .. length + margin - 1, mirrored into [0, n[b]): (B, length + 2 margin)."""
    period = (2 * n[:, None] - 2).clamp(min=1)
    i = torch.arange(-margin, length + margin, device=n.device) % period
    return torch.minimum(i, period - i).clamp(max=n[:, None] - 1)


def blur(x: Tensor, kernel: Tensor, size: Tensor) -> Tensor:
    """Correlate image b (its top left size[b] pixels) with kernel[b] (K, K), edges mirrored."""
    B, C, H, W = x.shape
    half = kernel.shape[-1] // 2
    padded = pick(x, mirrored(H, half, size[:, 0]), mirrored(W, half, size[:, 1]))
    weight = kernel.repeat_interleave(C, 0)[:, None]  # (B*C, 1, K, K)
    return F.conv2d(padded.reshape(1, B * C, *padded.shape[2:]), weight, groups=B * C).view_as(x)


# ---- resize -----------------------------------------------------------------------------------


def resize_matrix(n_in: Tensor, n_out: Tensor, mode: Tensor, columns: int, rows: int) -> Tensor:
    """Weights (B, rows, columns) that resize n_in[b] pixels to n_out[b]; zero outside of them.

    Equals torch.nn.functional.interpolate without antialiasing, for each mode of MODES.
    """
    n_in, n_out, mode = n_in.double()[:, None], n_out.double()[:, None], mode[:, None]
    i = torch.arange(rows, device=n_in.device, dtype=torch.float64)  # (rows,)
    centre = (i + 0.5) * n_in / n_out - 0.5  # (B, rows), where output i looks in the input
    left = centre.floor()
    weights = torch.zeros(len(n_in), rows, columns, device=n_in.device, dtype=torch.float64)
    for tap in (-1, 0, 1, 2):
        d = (centre - left - tap).abs()
        # Keys' cubic with a = -0.75, split at distance 1.
        near = ((1.25 * d - 2.25) * d) * d + 1
        far = -0.75 * (((d - 5) * d + 8) * d - 4)
        cubic = torch.where(d <= 1, near, far)
        value = torch.where(mode == MODES.index("bicubic"), cubic, (1 - d).clamp(min=0))
        at = (left + tap).clamp(min=0).minimum(n_in - 1).long()
        weights.scatter_add_(2, at[..., None].clamp(max=columns - 1), value[..., None])
    j = torch.arange(columns, device=n_in.device, dtype=torch.float64)
    first = (i * n_in / n_out).floor()[..., None]
    last = ((i + 1) * n_in / n_out).ceil()[..., None]
    area = ((j >= first) & (j < last)) / (last - first)
    weights = torch.where((mode == MODES.index("area"))[..., None], area, weights)
    return (weights * (i[:, None] < n_out[..., None])).float()


def resize(x: Tensor, size: Tensor, new_size: Tensor, mode: Tensor) -> Tensor:
    """Resize image b from size[b] to new_size[b] as two matrix products: (B, C, max H', max W')."""
    H, W = new_size.amax(0).tolist()
    vertical = resize_matrix(size[:, 0], new_size[:, 0], mode, x.shape[2], H)
    horizontal = resize_matrix(size[:, 1], new_size[:, 1], mode, x.shape[3], W)
    return vertical[:, None] @ x @ horizontal[:, None].transpose(2, 3)


# ---- noise ------------------------------------------------------------------------------------


def noise(x: Tensor, size: Tensor, theta: Degradation, stage: int, seed: Tensor) -> Tensor:
    """Add Gaussian or Poisson noise; image b draws from seed[b], whatever the rest of the batch."""
    out = x.clone()
    for b, (h, w) in enumerate(size.tolist()):
        image = x[b, :, :h, :w]
        gray = bool(theta.gray_noise[b, stage])
        std, scale = float(theta.gaussian_std[b, stage]), float(theta.poisson_scale[b, stage])
        draw = common.generator(int(seed[b]), stage, device=x.device)
        if std > 0:
            eps = torch.randn(1 if gray else 3, h, w, generator=draw, device=x.device)
            out[b, :, :h, :w] += std * eps
        if scale > 0:
            luma = image.new_tensor([0.2989, 0.5870, 0.1140])
            source = torch.einsum("c,chw->hw", luma, image)[None] if gray else image
            source = (source.clamp(0, 1) * 255).round() / 255
            # Photons per unit: as many levels as the image has, rounded up to a power of two.
            used = torch.bincount((source * 255).round().long().flatten()).count_nonzero()
            levels = 2.0 ** math.ceil(math.log2(int(used)))
            photons = torch.poisson(source * levels, generator=draw) / levels
            out[b, :, :h, :w] += scale * (photons - source)
    return out.clamp(0, 1)


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
    return ((base.to(quality.device) * percent + 50) // 100).clamp(1, 255).double()


def shift(x: Tensor, bits: int) -> Tensor:
    """Divide whole numbers by 2^bits, rounded half up: libjpeg's DESCALE."""
    return (x + 2 ** (bits - 1)).mul_(2.0**-bits).floor_()


def quantised(plane: Tensor, table: Tensor) -> Tensor:
    """A plane (B, H, W) after the DCT, quantisation by table (B, 8, 8) and the inverse DCT."""
    B, H, W = plane.shape
    M = dct_matrix().to(plane.device)
    rows, columns = (B, H, W // 8, 8), (B, H // 8, 8, W)
    y = shift((plane - 128).view(rows) @ M.T, 11)
    y = shift(M @ y.view(columns), 15).view(B, H // 8, 8, W // 8, 8)  # 8 times the coefficients
    table = table[:, None, :, None, :]
    y = y.sign() * ((y.abs() + 4 * table) / (8 * table)).floor_() * table
    y = shift(M.T @ y.view(columns), 11)
    y = shift(y.view(rows) @ M, 18)
    return (y.view(B, H, W) + 128).clamp_(0, 255)


def clamped(length: int, n: Tensor) -> Tensor:
    """Indices 0 .. length - 1, clamped into [0, n[b]): (B, length)."""
    return torch.arange(length, device=n.device).minimum(n[:, None] - 1)


def halve(chroma: Tensor, rows: Tensor) -> Tensor:
    """Average 2 x 2 pixels as libjpeg does (bias 1, 2, 1, 2, ...), then repeat row rows[b] - 1."""
    total = F.avg_pool2d(chroma, 2, divisor_override=1)  # (B, 2, H/2, W/2)
    bias = 1.0 + torch.arange(total.shape[3], device=total.device) % 2
    total = (total + bias).mul_(0.25).floor_()
    every = torch.arange(total.shape[3], device=rows.device).expand(len(rows), -1)
    return pick(total, clamped(total.shape[2], rows), every)


def double(chroma: Tensor, size: Tensor) -> Tensor:
    """libjpeg's "fancy" upsampling: 3/4 of the nearer, 1/4 of the farther sample along each axis.

    Chroma of one or two columns is repeated instead, as in jdsample.c.
    """
    B, C, H, W = chroma.shape

    def neighbours(n: Tensor, length: int, step: int) -> Tensor:
        i = torch.arange(length, device=n.device) + step
        return i.clamp(min=0).minimum(n[:, None] - 1)

    here_y, here_x = neighbours(size[:, 0], H, 0), neighbours(size[:, 1], W, 0)
    centre = 3 * pick(chroma, here_y, here_x)
    above = centre + pick(chroma, neighbours(size[:, 0], H, -1), here_x)
    below = centre + pick(chroma, neighbours(size[:, 0], H, 1), here_x)
    y = torch.stack([above, below], 3).view(B, C, 2 * H, W)
    every = torch.arange(2 * H, device=size.device).expand(B, -1)
    left = pick(y, every, neighbours(size[:, 1], W, -1))
    right = pick(y, every, neighbours(size[:, 1], W, 1))
    y = torch.stack([(3 * y + left + 8), (3 * y + right + 7)], 4).mul_(1 / 16).floor_()
    plain = chroma.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return y.view(B, C, 2 * H, 2 * W).where(size[:, 1, None, None, None] > 2, plain)


def jpeg(
    x: Tensor, quality: Tensor | int, subsampling: str = "4:2:0", size: Tensor | None = None
) -> Tensor:
    """Compress and decompress images as Pillow (libjpeg) does, bit for bit.

    x (B, 3, H, W) in [0, 1], first rounded to 8 bits; quality (B,) in 1..100, 0 leaves the image
    alone; `size` (B, 2) are the true sizes on a canvas, default all of it. Returns (B, 3, H, W).
    """
    if subsampling not in ("4:2:0", "4:4:4"):
        raise ValueError(f"subsampling {subsampling!r}: 4:2:0 and 4:4:4 are supported.")
    B, _, H, W = x.shape
    if B == 0:
        return x
    quality = torch.as_tensor(quality, device=x.device).expand(B).long()
    size = x.new_tensor([H, W]).long().expand(B, 2) if size is None else size
    H16, W16 = -(-H // 16) * 16, -(-W // 16) * 16
    rgb = pick(x, clamped(H16, size[:, 0]), clamped(W16, size[:, 1]))
    r, g, b = (rgb.clamp(0, 1) * 255).round().double().unbind(1)  # (B, H16, W16)
    luma = shift(19595 * r + 38470 * g + 7471 * b, 16)
    # Rounding of chroma differs by one unit of 2^-16 from rounding half up.
    blue = shift(-11059 * r - 21709 * g + 32768 * b + 2**23 - 1, 16)
    red = shift(32768 * r - 27439 * g - 5329 * b + 2**23 - 1, 16)
    luma = quantised(luma, scaled_table(LUMA_TABLE, quality))
    chroma = torch.stack([blue, red], 1)  # (B, 2, H16, W16)
    half = (size + 1) // 2
    if subsampling == "4:2:0":
        chroma = halve(chroma, half[:, 0])
    extra = chroma.shape[2] % 8, chroma.shape[3] % 8
    assert extra == (0, 0), "chroma must consist of whole blocks"
    table = scaled_table(CHROMA_TABLE, quality).repeat_interleave(2, 0)
    chroma = quantised(chroma.flatten(0, 1), table).view_as(chroma)
    if subsampling == "4:2:0":
        chroma = double(chroma, half)
    blue, red = (chroma - 128).unbind(1)
    rgb = torch.stack(
        [
            luma + shift(91881 * red, 16),
            luma + shift(-22554 * blue - 46802 * red, 16),
            luma + shift(116130 * blue, 16),
        ],
        dim=1,
    )
    rgb = rgb[:, :, :H, :W].clamp(0, 255).float() / 255
    return torch.where(quality[:, None, None, None] > 0, rgb, x)


# ---- D ----------------------------------------------------------------------------------------


@torch.no_grad()
def degrade(hr: Tensor, theta: Degradation, generator: torch.Generator | None = None) -> Tensor:
    """D(X, theta): hr (B, 3, H, W) -> lr (B, 3, H/scale, W/scale), in [0, 1]; lr has 8-bit values.

    Row i is degraded with row i of theta. Without a generator the noise is that of theta.seed, so
    that theta replays the image; with one it is drawn anew.
    """
    if len(hr) != len(theta):
        raise ValueError(f"{len(hr)} images, but {len(theta)} rows of parameters")
    theta = theta.to("cpu")
    seed = theta.seed
    if generator is not None:
        seed = torch.randint(2**62, (len(hr),), generator=generator, device=generator.device).cpu()
    # Images of similar intermediate size share a canvas: less of it is empty.
    chunk = 4 if hr.device.type == "cpu" else len(hr)
    H, W = (side // int(theta.scale[0]) for side in hr.shape[2:])
    lr = torch.empty(len(hr), 3, H, W, device=hr.device)
    with torch.autocast(hr.device.type, enabled=False):
        for rows in theta.resize[:, 0].argsort(stable=True).split(chunk):
            at = rows.to(hr.device)
            lr[at] = degrade_canvas(hr[at], theta[rows], seed[rows])
    return lr


def degrade_canvas(hr: Tensor, theta: Degradation, seed: Tensor) -> Tensor:
    """degrade() for images that share one canvas."""
    B, _, H, W = hr.shape
    scale, device = int(theta.scale[0]), hr.device
    lr_size = torch.tensor([[H // scale, W // scale]]).expand(B, 2)
    if bool((theta.scale != scale).any()) or H % scale or W % scale:
        raise ValueError(f"images of {H} x {W} pixels can't be degraded by scale {scale}")
    hr_size = torch.tensor([[H, W]]).expand(B, 2)
    # Sizes stay on the CPU, where canvases are planned; their copies go to the device once.
    middle = [
        (base * theta.resize[:, stage, None]).floor().long().clamp(min=1)
        for stage, base in enumerate([hr_size, lr_size])
    ]
    on, mode = theta.to(device), theta.resize_mode.to(device)

    def blurred(x: Tensor, size: Tensor, stage: int) -> Tensor:
        if bool((theta.blur_size[:, stage] == 1).all()):
            return x
        shape = min(stage, 1)  # the final filter is a sinc or nothing: it has no shape of its own
        kernel = blur_kernel(
            on.blur_sigma[:, shape],
            on.blur_angle[:, shape],
            on.blur_shape[:, shape],
            on.blur_plateau[:, shape],
            on.blur_size[:, stage],
            on.sinc_cutoff[:, stage],
        )
        return blur(x, kernel, size)

    x, size = hr, hr_size
    for stage, new_size in enumerate(middle):
        x = blurred(x, size.to(device), stage)
        x, size = resize(x, size.to(device), new_size.to(device), mode[:, stage]), new_size
        x = noise(x, size, theta, stage, seed)
        if stage == 0:
            x = jpeg(x, on.jpeg_quality[:, 0], size=size.to(device))
    # The last JPEG comes before or after the resize to LR and its filter.
    before, after = (~theta.jpeg_last).nonzero()[:, 0], theta.jpeg_last.nonzero()[:, 0]
    x[before] = jpeg(x[before], on.jpeg_quality[before, 1], size=size[before].to(device))
    x = resize(x, size.to(device), lr_size.to(device), mode[:, 2])
    x = blurred(x, lr_size.to(device), 2).clamp(0, 1)
    x[after] = jpeg(x[after], on.jpeg_quality[after, 1])
    return (x * 255).round() / 255


# ---- the command ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    hr: tuple[str, ...] = ()  # folders or files of HR photos (else data/hr, else data/sample/hr)
    out: str = "out/degraded"  # folder that gets hr/, lr/ and pairs.jsonl
    recipe: str = "realesrgan"  # which published options: realesrgan, light, camera
    scale: int = 4  # HR size / LR size
    seed: int = 0  # image i is degraded with draws from (seed, i)
    device: str = "auto"  # cpu, cuda or auto


def main(cfg: Config, rt: common.Runtime) -> None:
    """Degrade a folder: out/hr, out/lr with the same names, out/pairs.jsonl with theta."""
    common.require(cfg.recipe in RECIPES, f"--recipe {cfg.recipe}: choose of {', '.join(RECIPES)}.")
    common.require(cfg.scale > 0, f"--scale {cfg.scale}: must be positive.")
    files, out = common.find_photos(cfg.hr, "hr", "--hr"), Path(cfg.out)
    table, lines, skipped = out / "pairs.jsonl", [], 0
    done = set(table.read_text(encoding="utf-8").splitlines()) if table.is_file() else set()
    for i, file in enumerate(tqdm(files, unit="image", disable=not rt.is_main)):
        draw = common.generator(cfg.seed, i)
        theta = sample_degradation(1, cfg.recipe, cfg.scale, draw)
        name = f"{i:06d}_{file.stem}.png"
        try:
            photo = common.crop_to_multiple(common.load_image(file), cfg.scale, file)
        except ValueError as error:
            skipped += 1
            tqdm.write(f"skipped: {error}")
            continue
        row = {"hr": f"hr/{name}", "lr": f"lr/{name}", "source": str(file)}
        lines.append(json.dumps(row | {"theta": json.loads(theta.to_json()[0])}))
        # Only a row of an earlier run with these very parameters spares the work.
        if not (lines[-1] in done and (out / row["hr"]).is_file() and (out / row["lr"]).is_file()):
            hr = common.to_uint8(photo).float() / 255  # as it is written, also of a 16-bit photo
            common.save_image(out / row["hr"], hr)
            common.save_image(out / row["lr"], degrade(hr[None].to(rt.device), theta)[0])
    with common.replacing(table) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} pairs in {out}, {skipped} images skipped")


if __name__ == "__main__":
    common.launch(main, Config, {}, __doc__)
