"""The kernel between HR and LR images, by least squares, its transfer function, and the tone."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from generate import SCALE

TAPS = 24  # side of a kernel in HR pixels: 6 LR pixels
BEFORE = (TAPS - SCALE) // 2  # HR pixels of the kernel to the left of an LR pixel
RIDGE = 1e-4  # weight that pulls the fit towards the bicubic kernel, for pixels in [0, 1]


def bicubic_kernel() -> Tensor:
    """The kernel (TAPS, TAPS) of a bicubic reduction by 4, as Pillow does it (a = -0.5)."""
    centre = BEFORE + (SCALE - 1) / 2
    x = ((torch.arange(TAPS, dtype=torch.float64) - centre) / SCALE).abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    taps = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    taps = taps / taps.sum()
    return taps[:, None] * taps


def normal_equations(hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
    """A'A (576, 576) and A'y (K, 576) of the LR pixels y = A k, divided by their number.

    hr (3, 4h, 4w), lr (K, 3, h, w) in [0, 1]. All colours share the kernel k. Three LR pixels at
    each edge are left out.
    """
    start = 3 * SCALE - BEFORE
    A = F.unfold(hr[:, None, start:, start:], TAPS, stride=SCALE)  # (3, 576, n)
    A = A.transpose(0, 1).flatten(1)  # (576, 3n)
    y = lr[:, :, 3:-3, 3:-3].flatten(1)  # (K, 3n)
    return (A @ A.T / len(A.T)).double(), (y @ A.T / len(A.T)).double()


def fitted_kernel(equations: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The kernel (TAPS, TAPS) that fits the LR of all these pairs best, by least squares."""
    AA, Ay = (torch.stack(sides).mean(0) for sides in zip(*equations, strict=True))
    ridge = RIDGE * torch.eye(len(Ay), dtype=Ay.dtype)
    k = torch.linalg.solve(AA + ridge, Ay + RIDGE * bicubic_kernel().flatten())
    return k.view(TAPS, TAPS)


def reduced_by(kernel: Tensor, hr: Tensor) -> Tensor:
    """hr (3, 4h, 4w) filtered by a kernel (TAPS, TAPS) and reduced by 4: (3, h, w) in [0, 1]."""
    padded = F.pad(hr[:, None], (BEFORE, BEFORE, BEFORE, BEFORE), mode="reflect")
    return F.conv2d(padded, kernel.float()[None, None], stride=SCALE)[:, 0].clamp(0, 1)


def toned(image: Tensor, target: Tensor) -> Tensor:
    """The polynomial of third degree in an image's colours (3, h, w) nearest to a target."""
    colours = torch.cat([torch.ones_like(image[:1]), image]).flatten(1).double()  # 1, R, G, B
    products = itertools.combinations_with_replacement(range(4), 3)
    A = torch.stack([colours[list(three)].prod(0) for three in products])  # (20, h w)
    ridge = 1e-6 * len(A.T) * torch.eye(len(A), dtype=A.dtype)
    weights = torch.linalg.solve(A @ A.T + ridge, A @ target.flatten(1).T.double())
    return (weights.T @ A).view_as(image).float()


def transfer_function(kernel: Tensor, frequencies: Tensor) -> Tensor:
    """Amplitude (n,) of a kernel at frequencies (n,) in cycles per LR pixel, mean over angles."""
    place = (torch.arange(TAPS) - BEFORE - (SCALE - 1) / 2) / SCALE  # LR pixels
    angle = torch.arange(24) * torch.pi / 24
    f = frequencies.double()[:, None, None]
    rows, columns = (torch.exp(-2j * torch.pi * f * side[:, None] * place)  # (n, 24, TAPS)
                     for side in (angle.sin(), angle.cos()))  # fmt: skip
    waves = torch.einsum("nar,rc,nac->na", rows, kernel.to(rows.dtype), columns)
    return waves.abs().mean(1)
