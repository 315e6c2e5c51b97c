"""What is not in the paper: additions of ours that the stages call in one line each.

A reader of the paper can skip this file. --as-printed takes all of it out of training and of the
weights; the preset paper of generate.py turns off the grain.

    effects of theta   nine measurable effects of theta on LR; E_deg's head learns to read them
    DCT statistics     pooled beside the features of E_deg
    JPEG grid          the place of each pixel in its block, for Rec_lr and M
    kernels            filters with a given transfer function, for Rec_lr
    coarse             content without fine detail, for M
    noise by detail    in place of what no filter of HR explains, for the calibration
    grain              noise and JPEG on generated LR
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import degrade
from common.runtime import randn_rows
from degrade import DCT, KERNEL_SIZE, MODES, OPERATIONS, STEPS, Degradation, blur_kernels, cubic

# ---- effects of theta on LR -------------------------------------------------------------------

RINGS = torch.linspace(0.05, 0.5, 10)  # frequencies, cycles per LR pixel
FREQUENCIES = RINGS[1::2]  # of the transfer function
BANDS = (slice(0, 3), slice(3, 6), slice(6, 10))  # of RINGS, in which it gives noise
ANGLES = 8


def waves(grid: Tensor) -> Tensor:
    """Frequencies along x and y, cycles per pixel, of RINGS at 8 angles: (..., 2, ANGLES, RINGS).

    grid (...): pixels per LR pixel.
    """
    angle = torch.arange(ANGLES, device=grid.device)[:, None] * (math.pi / ANGLES)
    both = torch.stack([angle.cos(), angle.sin()]) * RINGS.to(grid.device, non_blocking=True)
    return both / grid[..., None, None, None]


def kernel_gain(kernel: Tensor, grid: Tensor) -> Tensor:
    """Amplitude (B, ANGLES, RINGS) of kernels (B, 25, 25) on grids (B,) of pixels per LR pixel."""
    place = torch.arange(KERNEL_SIZE, device=grid.device) - KERNEL_SIZE // 2
    phase = -2j * math.pi * waves(grid)[..., None] * place  # (B, 2, ANGLES, RINGS, 25)
    across, down = phase.exp().unbind(1)
    return torch.einsum("byx,barx,bary->bar", kernel.to(across.dtype), across, down).abs()


def resize_gain(mode: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Amplitude (B, n, ANGLES, RINGS) of resizes of these MODES between these grids (B, n)."""
    # bilinear and bicubic do not widen their kernel when they reduce
    narrow = (mode == MODES.index("bilinear")) | (mode == MODES.index("bicubic"))
    # area takes all pixels that it touches: one more where the new size does not divide the old
    touched = 1 / (1 / before + 1 / after)
    wide = touched.where((mode == MODES.index("area")) & (before % after > 1e-3), after)
    f = waves(before.where(narrow, torch.minimum(before, wide)))  # cycles per pixel of the kernel
    gain, mode = torch.sinc(f), mode[..., None, None, None]
    distance = torch.linspace(-2, 2, 65, device=f.device)
    for name, a in (("bicubic", -0.75), ("antialiased", -0.5)):
        weight = cubic(distance.abs(), a) / 16
        wave = ((2 * math.pi * f)[..., None] * distance).cos() @ weight
        gain = wave.where(mode == MODES.index(name), gain)
    gain = gain.square().where(mode == MODES.index("bilinear"), gain)
    return gain.prod(2).abs()


def steps_of_kind(theta: Degradation, kind: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Which steps are of this kind, and which of values (B, n) each reads: (B, 10) both."""
    column, n = theta.order - OPERATIONS.index(f"{kind} 1"), values.shape[1]
    return (column >= 0) & (column < n), values.gather(1, column.clamp(0, n - 1))


def effects_of(theta: Degradation) -> Tensor:
    """Nine measurable effects of theta on LR: (B, 9).

    The amplitude of the transfer function from HR to LR at FREQUENCIES; noise in BANDS, as
    log(1 + std in levels of white noise of this power) / 3; 1 - quality / 100 of the JPEG, NaN
    where a later resize hides it. Amplitudes are means over angles; aliasing, and what JPEG
    does to noise, are left out.
    """
    scale = theta.scale.float()[:, None]
    factors = torch.cat([theta.resize * scale, torch.ones_like(scale)], dim=1)
    resized, factor = steps_of_kind(theta, "resize", factors)
    last = torch.arange(STEPS, device=scale.device).where(resized, -1).cummax(1).values
    after = factor.gather(1, last.clamp(min=0)).where(last >= 0, scale)  # pixels per LR pixel
    before = torch.cat([scale, after[:, :-1]], dim=1)
    mode = steps_of_kind(theta, "resize", theta.resize_mode)[1]
    gain = torch.ones(*theta.order.shape, ANGLES, len(RINGS), device=scale.device)  # of steps
    gain = resize_gain(mode, before, after).where((before != after)[..., None, None], gain)
    kernels = blur_kernels(theta)
    for i in range(3):
        step = theta.order == OPERATIONS.index(f"blur {i + 1}")  # at most one of an image
        grid = (before * step).sum(1).where(step.any(1), 1.0)
        gain = kernel_gain(kernels[:, i], grid)[:, None].where(step[..., None, None], gain)
    to_lr = gain.flip(1).cumprod(1).flip(1)  # (B, 10, ANGLES, RINGS), of a step and all later
    gaussian, std = steps_of_kind(theta, "gaussian", theta.gaussian_std)
    poisson, mid_gray_std = steps_of_kind(theta, "poisson", theta.poisson_scale * 0.04)
    std = std.where(gaussian, mid_gray_std * poisson) / before  # of as much noise per LR pixel
    noise = (std[..., None, None] * to_lr).square().sum(1).mean(1)  # (B, RINGS)
    area = RINGS.to(noise)  # of a ring
    bands = [(noise * area)[:, band].sum(1) / area[band].sum() for band in BANDS]
    levels = (255 * torch.stack(bands, 1).sqrt() + 1).log() / 3
    compressed, quality = steps_of_kind(theta, "jpeg", theta.jpeg_quality)
    on_lr = compressed & (after == 1)
    hidden = compressed.any(1) & ~on_lr.any(1)
    lost = 1 - quality.where(on_lr, 100).amin(1) / 100
    transfer = to_lr[:, 0].mean(1)[:, 1::2]
    return torch.cat([transfer, levels, lost.where(~hidden, math.nan)[:, None]], dim=1).float()


class Effects(NamedTuple):
    """What the nine numbers of effects_of() say, within their range."""

    transfer: Tensor  # (B, 5) amplitude of the transfer function at FREQUENCIES
    noise_std: Tensor  # (B, 3) on [0, 1], in BANDS
    quality: Tensor  # (B,) of JPEG, 1..100


def effects_from(numbers: Tensor) -> Effects:
    """The effects that nine numbers (B, 9), as of effects_of(), stand for."""
    noise = (3 * numbers[:, 5:8]).exp().sub(1).div(255).clamp(min=0)
    quality = (100 * (1 - numbers[:, 8])).round().clamp(1, 100).long()
    return Effects(numbers[:, :5].clamp(min=0), noise, quality)


def effects_head(dim: int) -> nn.Sequential:
    """The head that reads nine numbers from F_deg (B, D): (B, 9)."""
    return nn.Sequential(  # F_deg is small: without the norm the head hardly learns
        nn.LayerNorm(dim), nn.Linear(dim, 128), nn.SiLU(),
        nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 9),
    )  # fmt: skip


def effects_loss(predicted: Tensor, theta: Degradation) -> Tensor:
    """Mean square error () of predicted effects (n B, 9), in n groups with the same theta (B)."""
    true = effects_of(theta.to(predicted.device)).repeat(len(predicted) // len(theta), 1)
    visible = true.isfinite()  # a later resize hides some of it
    return F.mse_loss(predicted, true.where(visible, predicted.detach()))


# ---- further inputs of E_deg, Rec_lr and M ----------------------------------------------------

YCC = ((0.299, 0.587, 0.114), (-0.1687, -0.3313, 0.5), (0.5, -0.4187, -0.0813))  # of RGB, BT.601


def dct_statistics(lr: Tensor) -> Tensor:
    """Sizes of the DCT coefficients of LR (B, 3, h, w) in [0, 1]: (B, 384) in about [-1, 1].

    For each of Y, Cb, Cr and each of the 64 frequencies of 8 x 8 blocks: the mean logarithm of the
    size, and the logarithm of its root mean square, in levels of 255. Blur lowers them towards high
    frequencies, noise raises the lowest of them, JPEG sets coefficients to 0.
    """
    with torch.autocast(lr.device.type, enabled=False):
        to_ycc = torch.tensor(YCC).to(lr.device, non_blocking=True)
        ycc = 255 * torch.einsum("oc,bchw->bohw", to_ycc, lr.float())
        below, right = (max(0, 8 - side) for side in lr.shape[2:])  # at least one block
        ycc = F.pad(ycc, (0, right, 0, below), mode="replicate")
        rows = DCT.to(ycc, non_blocking=True) / (8192 * math.sqrt(8))  # orthonormal
        basis = torch.einsum("uy,vx->uvyx", rows, rows).reshape(64, 1, 8, 8)
        size = F.conv2d(ycc.flatten(0, 1)[:, None], basis, stride=8).abs()  # (3B, 64, h/8, w/8)
        typical = (size + 0.5).log().mean((2, 3)).view(len(lr), -1)
        spread = (size.square().mean((2, 3)) + 0.25).log().view(len(lr), -1) / 2
        return (torch.cat([typical, spread], dim=1) - 1.5) / 1.5


def place_in_block(height: int, width: int, device: torch.device) -> Tensor:
    """Sine and cosine of a pixel's place in its block of 8 x 8, along both axes: (1, 4, h, w)."""
    y, x = (torch.arange(n, device=device) * (2 * math.pi / 8) for n in (height, width))
    rows = torch.stack([y.sin(), y.cos()])[:, :, None].expand(2, height, width)
    columns = torch.stack([x.sin(), x.cos()])[:, None].expand(2, height, width)
    return torch.cat([rows, columns])[None]


# ---- filters with a given transfer function ---------------------------------------------------


def filtered(image: Tensor, kernels: Tensor) -> Tensor:
    """Image b (3, h, w) correlated with kernels[b] (k, k), k odd; edges are repeated."""
    B, C, h, w = image.shape
    weight = kernels.to(image)[:, None].repeat_interleave(C, dim=0)
    padded = F.pad(image, [kernels.shape[-1] // 2] * 4, mode="replicate").flatten(0, 1)
    with torch.autocast(image.device.type, enabled=False):  # bf16 would round the image itself
        return F.conv2d(padded[None], weight, groups=B * C).view(B, C, h, w)


def radial_kernels(gain: Tensor) -> Tensor:
    """Kernels (B, 15, 15) that amplify FREQUENCIES by gain (B, 5), and frequency 0 by 1.

    Between these frequencies the gain is interpolated, beyond them it stays as it is.
    """
    place = torch.fft.fftfreq(15, device=gain.device)
    radius = (place.square() + place[:, None].square()).sqrt()  # cycles per pixel
    knots = torch.cat([torch.ones_like(gain[:, :1]), gain, gain[:, -1:]], dim=1)  # at 0, .1, ... .6
    below = (10 * radius).long().clamp(max=5)
    share = (10 * radius - below).clamp(max=1)
    amplitude = knots[:, below].lerp(knots[:, below + 1], share)  # (B, 15, 15)
    return torch.fft.fftshift(torch.fft.ifft2(amplitude).real, dim=(1, 2))


COARSE = 1.5  # std of the Gaussian, LR pixels: of 1, 1.5, 2, 3 the first to pass the table leak


def coarse(maps: Tensor) -> Tensor:
    """Maps (B, C, h, w) without fine detail: blurred by a Gaussian."""
    place = torch.arange(-5, 6, device=maps.device) / COARSE
    weight = (-place.square() / 2).exp()
    kernel = weight[:, None] * weight / weight.sum().square()
    return filtered(maps.float(), kernel.expand(len(maps), -1, -1))


# Amplitude of a bicubic reduction by 4 at FREQUENCIES
BICUBIC = effects_of(degrade.bicubic_reduction(1, 4))[:, :5]  # (1, 5)


def with_transfer(lr: Tensor, transfer: Tensor) -> Tensor:
    """Give a bicubic reduction (B, 3, h, w) another transfer function (B, 5), at FREQUENCIES."""
    gain = transfer / BICUBIC.to(lr.device, non_blocking=True)
    return filtered(lr, radial_kernels(gain.clamp(max=4)))


def soften(lr_hat: Tensor, amplitudes: Sequence[float]) -> Tensor:
    """Filter images (B, 3, h, w) by five amplitudes at FREQUENCIES.

    Real LR has detail that no filter of HR explains; E_deg mistakes it for sharpness. This undoes
    the mistake on average.
    """
    if all(amplitude == 1 for amplitude in amplitudes):
        return lr_hat
    gain = torch.tensor([[*amplitudes]] * len(lr_hat)).to(lr_hat.device, non_blocking=True)
    return filtered(lr_hat, radial_kernels(gain))


# ---- noise and JPEG on generated LR -----------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """What tools/calibrate.py measured on weights and stored with them; the defaults do nothing."""

    soften: tuple[float, ...] = (1.0,) * 5  # amplitudes for soften()
    faint: float = 0.0  # noise std in levels of 255 that the head can't tell from none
    uncompressed: int = 100  # JPEG quality that the head can't tell from no compression


def local_detail(image: Tensor) -> Tensor:
    """Std of brightness in windows of 5 x 5 pixels, of images (B, 3, h, w): (B, 1, h, w)."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 5, 1, padding=2, count_include_pad=False)

    y = image.mean(1, keepdim=True)
    return mean((y - mean(y)).square()).sqrt()


def noise_by_detail(lr: Tensor, draw: torch.Generator) -> Tensor:
    """Add noise to LR (B, 3, h, w) of the size that the remainder of real LR has.

    The remainder is what no filter of HR explains. Measured on RealSR and DRealSR, its std above
    .15 cycles per pixel is 1.1 times the root of the local std of brightness, both in levels, from
    flat surfaces to edges; its channels have a correlation of .7.
    """
    std = 1.1 / 255 * (255 * local_detail(lr)).sqrt()
    colour, gray = (
        torch.randn(len(lr), n, *lr.shape[2:], generator=draw, device=lr.device) for n in (3, 1)
    )
    return (lr + std * (math.sqrt(0.3) * colour + math.sqrt(0.7) * gray)).clamp(0, 1)


def coloured(eps: Tensor, std: Tensor) -> Tensor:
    """White noise (B, 3, h, w) with the std (B, 3) in BANDS, interpolated between them."""
    h, w = eps.shape[2:]
    down, across = torch.fft.fftfreq(h), torch.fft.rfftfreq(w)
    radius = (down[:, None].square() + across.square()).sqrt()  # cycles per pixel
    low, middle, high = (RINGS[band].mean() for band in BANDS)
    first, second = ((radius - low) / (middle - low)), (radius - middle) / (high - middle)
    shares = torch.stack([first, second]).clamp(0, 1).to(eps.device, non_blocking=True)
    knots = std[:, :, None, None]  # (B, 3, 1, 1)
    amplitude = knots[:, 0] + shares[0] * (knots[:, 1] - knots[:, 0])
    amplitude = amplitude + shares[1] * (knots[:, 2] - knots[:, 1])  # (B, h, w/2 + 1)
    return torch.fft.irfft2(torch.fft.rfft2(eps) * amplitude[:, None], (h, w))


def add_grain(
    lr: Tensor,
    wanted: Effects,
    read: Callable[[Tensor], Effects],
    calibration: Calibration,
    draws: Sequence[torch.Generator],
) -> Tensor:
    """Give images (B, 3, h, w) the noise and the JPEG compression that E_deg reads in references.

    The output of Rec_lr is an average over all noise, a short chain adds little noise, and a
    network hardly learns to round in blocks of 8 x 8. E_deg takes some compression for noise, so
    the noise that is missing is what it does not `read` in the compressed image.
    """
    noisy = wanted.noise_std.mean(1) > calibration.faint / 255
    compressed = wanted.quality < calibration.uncompressed
    if lr.device.type == "cpu" and not (noisy | compressed).any():  # a GPU would be synchronised
        return lr

    def compress(x: Tensor) -> Tensor:
        return torch.where(compressed[:, None, None, None], degrade.jpeg(x, wanted.quality), x)

    found = read(compress(lr)).noise_std
    missing = noisy[:, None] * (wanted.noise_std.square() - found.square()).clamp(min=0).sqrt()
    noise = coloured(randn_rows(lr, draws), missing)
    return compress((lr + noise).clamp(0, 1))
