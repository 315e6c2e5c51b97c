"""How near is one image to another, and one set of images to another? (Section 3.1, metrics.)

In: images (B, 3, H, W) in [0, 1], generated or restored ones and real ones. Out: numbers. METRICS
compare image with image; SET_METRICS compare two sets by the features of a network.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

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
    c_1, c_2 = 0.01**2, 0.03**2
    window = (-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2)).exp()
    taps = (window / window.sum()).tolist()

    def smoothed(x: Tensor) -> Tensor:  # a convolution in float64 takes four times as long
        for dim in (2, 3):
            size = x.shape[dim] - 10
            parts = [x.narrow(dim, k, size) for k in range(11)]
            x = taps[0] * parts[0]
            for tap, part in zip(taps[1:], parts[1:], strict=True):
                x.add_(part, alpha=tap)
        return x

    x, y = x.double(), y.double()
    # From here on x and y are local means.
    x, y, xx, yy, xy = (smoothed(moment) for moment in (x, y, x * x, y * y, x * y))
    luminance = (2 * x * y + c_1) / (x * x + y * y + c_1)
    structure = (2 * (xy - x * y) + c_2) / (xx - x * x + yy - y * y + c_2)
    return (luminance * structure).mean((1, 2, 3))


# ---- networks that judge images ----------------------------------------------------------------

WEIGHTS = {  # by network: the features that LPIPS, DISTS, FID and the CLIP-Score look at
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
    "inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "clip": "https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/main/"
    "open_clip_model.safetensors",
}


@functools.cache  # which also keeps the declarations alive
def import_torchvision() -> library.Library | None:
    """Import torchvision, even where its compiled operators do not load; nothing here calls them.

    The PyPI wheel of torchvision is a CUDA build: beside a CPU-only torch its operators are missing
    and the import fails. It is enough to declare them first, with any schema.
    """
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    both_ways = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    declared = library.Library("torchvision", "DEF")
    for name in ("nms", "qnms", "qroi_align", *both_ways, *(f"_{n}_backward" for n in both_ways)):
        declared.define(f"{name}() -> ()")
    importlib.import_module("torchvision")
    return declared


def weights_file(net: str) -> Path:
    """Where the weights of a network have to be."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(WEIGHTS[net]).name


def missing_weights(net: str) -> str:
    """What to do about the weights of a network; empty where they are in place."""
    file = weights_file(net)
    missing = f"put {WEIGHTS[net]} into {file.parent} (or set TORCH_HOME)"
    return "" if file.is_file() else missing


@functools.cache
def perceptual_net(metric: str, net: str, device: torch.device) -> nn.Module:
    """The network of a metric ("LPIPS" or "DISTS"), frozen; UserError instead of a download."""
    missing = missing_weights(net)
    common.require(not missing, f"{metric} needs weights: {missing}.")
    import_torchvision()
    import DISTS_pytorch
    import lpips

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both packages spell torchvision's options the old way
            if metric == "LPIPS":
                model = lpips.LPIPS(net=net, version="0.1", verbose=False)
            else:
                model = DISTS_pytorch.DISTS(load_weights=False)
    except Exception as error:  # torch raises errors of several kinds for a damaged file
        name = type(error).__name__
        raise common.UserError(f"{weights_file(net)}: no readable weights ({name}).") from None
    if metric == "DISTS":  # its own loader looks for them outside of the package
        file = Path(DISTS_pytorch.__file__).with_name("weights.pt")
        own = torch.load(file, map_location="cpu", weights_only=True)
        model.alpha.data, model.beta.data = own["alpha"].data, own["beta"].data
    return model.to(device).eval().requires_grad_(False)


# ---- distances of two images in deep features ---------------------------------------------------


def lpips_distance(x: Tensor, y: Tensor, net: str = "alex") -> Tensor:
    """LPIPS v0.1 (B,) of images (B, 3, H, W) in [0, 1]; net: alex, vgg or squeeze (1801.03924)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return perceptual_net("LPIPS", net, x.device)(x, y, normalize=True).flatten()


def dists_distance(x: Tensor, y: Tensor) -> Tensor:
    """DISTS (B,) of images (B, 3, H, W) in [0, 1], at their own size (arXiv:2004.07728)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return perceptual_net("DISTS", "vgg", x.device)(x, y).view(-1)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "PSNR RGB": psnr,
    "PSNR Y": lambda x, y: psnr(rgb_to_y(x), rgb_to_y(y)),
    "SSIM RGB": ssim,
    "SSIM Y": lambda x, y: ssim(rgb_to_y(x), rgb_to_y(y)),
    "LPIPS": lpips_distance,
    "DISTS": dists_distance,
}

# ---- distances of two sets of features ----------------------------------------------------------


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians: means (D,), covariances (D, D) (1706.08500).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)). The last trace is the sum of the roots of the
    eigenvalues of A^(1/2) B A^(1/2), which is symmetric: nothing complex, and A may be singular.
    """
    mean_a, cov_a, mean_b, cov_b = (x.double() for x in (mean_a, cov_a, mean_b, cov_b))

    def roots(eigenvalues: Tensor) -> Tensor:  # the root of what rounding left of a 0 is not small
        noise = eigenvalues.max() * len(eigenvalues) * torch.finfo(torch.float64).eps
        return eigenvalues.where(eigenvalues > noise, 0.0).sqrt()

    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * roots(values) @ vectors.T
    cross = roots(torch.linalg.eigvalsh(root @ cov_b @ root)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.item()


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy of features (N, D) and (M, D), unbiased (1801.01401).

    The kernel is (x.y / D + 1)^3. Of the whole sets at once; for sets of thousands others average
    over random subsets of 1,000, which has the same expectation.
    """
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:  # without an image's similarity to itself
        k, n = kernel(x, x), len(x)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


# ---- distances of two sets of images ------------------------------------------------------------

Images = Iterable[Tensor]  # batches (B, 3, H, W) in [0, 1], each of any size
Features = Callable[[Tensor], Tensor]  # one such batch -> (B, D)


@functools.cache
def inception(device: torch.device) -> nn.Module:
    """pytorch-fid's InceptionV3 up to its last pooling, frozen; UserError, never a download."""
    missing = missing_weights("inception")
    common.require(not missing, f"FID and KID need weights: {missing}.")
    import_torchvision()
    from pytorch_fid.inception import InceptionV3

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return InceptionV3().to(device).eval()
    except Exception as error:  # torch raises errors of several kinds for a damaged file
        file, name = weights_file("inception"), type(error).__name__
        raise common.UserError(f"{file}: no readable weights ({name}).") from None


def inception_features(x: Tensor) -> Tensor:
    """Inception's last pooling (B, 2048) of images (B, 3, H, W) in [0, 1], resized to 299 x 299."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return inception(x.device)(x)[0].flatten(1)


@functools.cache
def clip(device: torch.device) -> Any:
    """CLIP ViT-B/32 with OpenAI's weights, frozen; UserError, never a download."""
    missing = missing_for("clip")
    common.require(not missing, f"the CLIP-Score needs more: {missing}.")
    import_torchvision()
    import open_clip

    file = weights_file("clip")
    try:
        # Not in the paper: which of the CLIP networks.
        return open_clip.create_model("ViT-B-32-quickgelu", str(file), device=device).eval()
    except Exception as error:
        name = type(error).__name__
        raise common.UserError(f"{file}: no readable weights ({name}).") from None


def clip_features(x: Tensor) -> Tensor:
    """CLIP's embeddings (B, 512) of whole images (B, 3, H, W) in [0, 1], made 224 x 224."""
    net = clip(x.device)
    mean, std = (
        x.new_tensor(v)[:, None, None] for v in (net.visual.image_mean, net.visual.image_std)
    )
    x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    return net.encode_image((x - mean) / std)


@torch.no_grad()
def stacked(images: Images, features: Features) -> Tensor:
    """The features (N, D) of all images, in float64."""
    return torch.cat([features(x).double().cpu() for x in images])


def fid(a: Images, b: Images, features: Features = inception_features) -> float:
    """Frechet Inception distance of two sets of images (1706.08500); too large for small sets."""
    x, y = stacked(a, features), stacked(b, features)
    return frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())


def kid(a: Images, b: Images, features: Features = inception_features) -> float:
    """Kernel Inception distance of two sets of images, right on average for sets of any size."""
    return kernel_distance(stacked(a, features), stacked(b, features))


def clip_score(x: Images, y: Images, features: Features = clip_features) -> float:
    """Mean cosine of the embeddings of images and their counterparts in y, in the same order."""
    return F.cosine_similarity(stacked(x, features), stacked(y, features)).mean().item()


SET_METRICS: dict[str, Callable[[Images, Images], float]] = {
    "FID": fid,
    "KID": kid,
    "CLIP-Score": clip_score,
}

# ---- what can be measured here ------------------------------------------------------------------


def missing_for(net: str) -> str:
    """What to do before a network of WEIGHTS can be loaded; empty if nothing."""
    needs = [missing_weights(net)]
    if net == "clip" and importlib.util.find_spec("open_clip") is None:
        needs.insert(0, "`pip install open_clip_torch`")
    return " and ".join(need for need in needs if need)


def available_metrics(device: torch.device) -> list[str]:
    """METRICS and SET_METRICS without those whose networks are missing, saying what to do."""
    networks: tuple[tuple[str, tuple[str, ...], Callable[[], Any]], ...] = (
        ("alex", ("LPIPS",), lambda: perceptual_net("LPIPS", "alex", device)),
        ("vgg", ("DISTS",), lambda: perceptual_net("DISTS", "vgg", device)),
        ("inception", ("FID", "KID"), lambda: inception(device)),
        ("clip", ("CLIP-Score",), lambda: clip(device)),
    )
    names = [*METRICS, *SET_METRICS]
    for net, of, load in networks:
        if missing := missing_for(net):
            print(f"no {', '.join(of)}: {missing}")
            names = [name for name in names if name not in of]
        else:
            load()  # a damaged file is said now
    return names
