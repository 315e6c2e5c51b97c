"""How near is one image to another, and one set of images to another? (Section 3.1, metrics.)

In: images (B, 3, H, W) in [0, 1], generated or restored ones against real ones. Out: numbers.
METRICS compare image with image.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import common

# ---- distances of two images in closed form -----------------------------------------------------


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (B,) of images (B, C, H, W) in [0, 1]; inf where equal."""
    assert x.shape == y.shape, f"images of different shapes: {x.shape} and {y.shape}"
    return -10 * (x.double() - y.double()).square().mean((1, 2, 3)).log10()


def rgb_to_y(x: Tensor) -> Tensor:
    """Luma (B, 1, H, W) in [16, 235] / 255 of RGB (B, 3, H, W) in [0, 1], not rounded (BT.601)."""
    weights = x.new_tensor([65.481, 128.553, 24.966]) / 255
    return 16 / 255 + torch.einsum("c,bchw->bhw", weights, x)[:, None]


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (B,) of images (B, C, H, W) in [0, 1], mean over channels.

    Gaussian window of 11 pixels, where it fits whole (Wang et al., 2004). Equals scikit-image's
    structural_similarity with gaussian_weights and without use_sample_covariance.
    """
    assert x.shape == y.shape, f"images of different shapes: {x.shape} and {y.shape}"
    B, C, H, W = x.shape
    c_1, c_2 = 0.01**2, 0.03**2
    taps = torch.arange(-5, 6, device=x.device, dtype=torch.float64)
    window = (-taps.square() / (2 * 1.5**2)).exp()
    window = window / window.sum()
    x, y = x.double(), y.double()
    moments = torch.stack([x, y, x * x, y * y, x * y]).view(-1, 1, H, W)  # (5BC, 1, H, W)
    moments = F.conv2d(F.conv2d(moments, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    x, y, xx, yy, xy = moments.view(5, B, C, H - 10, W - 10)  # x and y are local means now
    luminance = (2 * x * y + c_1) / (x * x + y * y + c_1)
    structure = (2 * (xy - x * y) + c_2) / (xx - x * x + yy - y * y + c_2)
    return (luminance * structure).mean((1, 2, 3))


# ---- distances of deep features -----------------------------------------------------------------


def lpips_distance(x: Tensor, y: Tensor, net: str = "alex") -> Tensor:
    """LPIPS v0.1 (B,) of images (B, 3, H, W) in [0, 1]; net is a key of WEIGHTS (1801.03924)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return common.perceptual_net("LPIPS", net, x.device)(x, y, normalize=True).flatten()


def dists_distance(x: Tensor, y: Tensor) -> Tensor:
    """DISTS (B,) of images (B, 3, H, W) in [0, 1], at their own size (arXiv:2004.07728)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return common.perceptual_net("DISTS", "vgg", x.device)(x, y).view(-1)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "PSNR RGB": psnr,
    "PSNR Y": lambda x, y: psnr(rgb_to_y(x), rgb_to_y(y)),
    "SSIM RGB": ssim,
    "SSIM Y": lambda x, y: ssim(rgb_to_y(x), rgb_to_y(y)),
    "LPIPS": lpips_distance,
    "DISTS": dists_distance,
}


def available_metrics(device: torch.device) -> list[str]:
    """METRICS without those whose weights are missing, saying which."""
    metrics = list(METRICS)
    for metric, backbone in (("LPIPS", "alex"), ("DISTS", "vgg")):
        if missing := common.missing_weights(backbone):
            print(f"no {metric}: {missing}")
            metrics.remove(metric)
        else:
            common.perceptual_net(metric, backbone, device)
    return metrics
