"""Metrics of images (Section 3.1): generated or restored images against real ones.

In: images (B, 3, H, W) in [0, 1]. Out: numbers. METRICS compare image with image. SET_METRICS
compare two sets of images by the features of a network. The command compares two folders of images
by their names.

    python -m bench.metrics --compare out/restored data/RealSR/HR
"""

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import UserError, require
from common.cli import launch
from common.files import list_images
from common.images import load_image
from common.runtime import Runtime

# ---- two images, in closed form -----------------------------------------------------------------


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

    Gaussian window of 11 pixels, only where it lies inside the image (Wang et al., 2004). Equals
    scikit-image's structural_similarity with gaussian_weights and without use_sample_covariance.
    """
    assert x.shape == y.shape, f"images of different shapes: {x.shape} and {y.shape}"
    c_1, c_2 = 0.01**2, 0.03**2
    window = (-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2)).exp()
    taps = (window / window.sum()).tolist()

    def local_mean(x: Tensor) -> Tensor:  # conv2d in float64 takes four times as long
        for dim in (2, 3):
            size = x.shape[dim] - 10
            shifted = [x.narrow(dim, k, size) for k in range(11)]
            x = taps[0] * shifted[0]
            for tap, values in zip(taps[1:], shifted[1:], strict=True):
                x.add_(values, alpha=tap)
        return x

    x, y = x.double(), y.double()
    # From here on x and y are local means.
    x, y, xx, yy, xy = map(local_mean, (x, y, x * x, y * y, x * y))
    luminance = (2 * x * y + c_1) / (x * x + y * y + c_1)
    structure = (2 * (xy - x * y) + c_2) / (xx - x * x + yy - y * y + c_2)
    return (luminance * structure).mean((1, 2, 3))


# ---- weights of networks ------------------------------------------------------------------------

WEIGHTS = {  # of the networks whose features LPIPS, DISTS, FID, KID and the CLIP-Score compare
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "clip": "https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/main/"
    "open_clip_model.safetensors",
}


def weights_file(net: str) -> Path:
    """The file of a network's weights, present or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(WEIGHTS[net]).name


def missing_weights(net: str) -> str:
    """What the user must install or copy before a network can be loaded; "" if nothing."""
    file, todo = weights_file(net), []
    if net == "clip" and importlib.util.find_spec("open_clip") is None:
        todo.append("`pip install open_clip_torch`")
    if not file.is_file():
        todo.append(f"put {WEIGHTS[net]} into {file.parent} (or set TORCH_HOME)")
    return " and ".join(todo)


def import_torchvision() -> None:
    """Import torchvision, even where its compiled operators do not load.

    The PyPI wheel of torchvision is a CUDA build. Beside a CPU-only torch its import fails in the
    module that describes these operators to torch.compile. This project calls none of them.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        module = "torchvision._meta_registrations"
        sys.modules[module] = types.ModuleType(module)
        importlib.import_module("torchvision")


@contextlib.contextmanager
def loading(metric: str, net: str) -> Iterator[None]:
    """A block that loads a network; UserError if its weights are missing or damaged."""
    missing = missing_weights(net)
    require(not missing, f"no {metric}: {missing}.")
    import_torchvision()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the packages use torchvision's old options
            yield
    except ImportError:
        raise
    except Exception as error:  # torch raises errors of many types for a damaged file
        name = type(error).__name__
        raise UserError(f"{weights_file(net)}: no readable weights ({name}).") from None


# ---- two images, in deep features ---------------------------------------------------------------


@functools.cache
def perceptual_net(metric: str, net: str, device: torch.device) -> nn.Module:
    """The network of a metric ("LPIPS" or "DISTS"), frozen; UserError, never a download."""
    with loading(metric, net):
        if metric == "LPIPS":
            import lpips

            model = lpips.LPIPS(net=net, version="0.1", verbose=False)
        else:
            import DISTS_pytorch

            model = DISTS_pytorch.DISTS(load_weights=False)
            file = Path(DISTS_pytorch.__file__).with_name("weights.pt")  # alpha and beta
            model.load_state_dict(torch.load(file, "cpu", weights_only=True), strict=False)
    return model.to(device).eval().requires_grad_(False)


def lpips_distance(x: Tensor, y: Tensor, net: str = "alex") -> Tensor:
    """LPIPS v0.1 (B,) of images (B, 3, H, W) in [0, 1]; net: alex or vgg (1801.03924)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return perceptual_net("LPIPS", net, x.device)(x, y, normalize=True).flatten()


def dists_distance(x: Tensor, y: Tensor) -> Tensor:
    """DISTS (B,) of images (B, 3, H, W) in [0, 1], which it does not resize (arXiv:2004.07728)."""
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


DECIMALS = {"PSNR RGB": 2, "PSNR Y": 2, "FID": 2, "KID": 4}  # 3 for all others
COMPARED = ("PSNR Y", "SSIM Y", "LPIPS", "DISTS")  # by the commands


def metric_text(mean: dict[str, float], metric: str) -> str:
    """A metric's value; a dash if it was not measured."""
    return f"{mean[metric]:z.{DECIMALS.get(metric, 3)}f}" if metric in mean else "-"


# ---- two sets of features -----------------------------------------------------------------------


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians: means (D,), covariances (D, D) (1706.08500).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)). The trace of (A B)^(1/2) is the sum of the
    roots of the eigenvalues of A^(1/2) B A^(1/2). That matrix is symmetric, so all are real.
    """
    mean_a, cov_a, mean_b, cov_b = (x.double() for x in (mean_a, cov_a, mean_b, cov_b))

    def roots(eigenvalues: Tensor) -> Tensor:  # the root of a rounding error would be large
        noise = eigenvalues.max() * len(eigenvalues) * torch.finfo(torch.float64).eps
        return eigenvalues.where(eigenvalues > noise, 0.0).sqrt()

    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * roots(values) @ vectors.T
    cross = roots(torch.linalg.eigvalsh(root @ cov_b @ root)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.item()


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy of features (N, D) and (M, D), unbiased (1801.01401).

    The kernel is (x.y / D + 1)^3. All features are compared at once; the common mean over random
    subsets of 1,000 has the same expectation.
    """
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:  # without an image's similarity to itself
        k, n = kernel(x, x), len(x)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


# ---- two sets of images -------------------------------------------------------------------------

Images = Iterable[Tensor]  # batches (B, 3, H, W) in [0, 1]; H and W may differ between batches
Features = Callable[[Tensor], Tensor]  # a batch -> (B, D)


@functools.cache
def inception(device: torch.device) -> nn.Module:
    """pytorch-fid's InceptionV3 up to its last pooling, frozen; UserError, never a download."""
    with loading("FID, KID", "inception"):
        from pytorch_fid.inception import InceptionV3

        return InceptionV3().to(device).eval()


def inception_features(x: Tensor) -> Tensor:
    """Inception's last pooling (B, 2048) of images (B, 3, H, W) in [0, 1], resized to 299 x 299."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return inception(x.device)(x)[0].flatten(1)


@functools.cache
def clip(device: torch.device) -> Any:
    """CLIP ViT-B/32 with OpenAI's weights, frozen; UserError, never a download."""
    with loading("CLIP-Score", "clip"):
        import open_clip

        # Not in the paper: which of the CLIP networks.
        file = str(weights_file("clip"))
        return open_clip.create_model("ViT-B-32-quickgelu", file, device=device).eval()


def clip_features(x: Tensor) -> Tensor:
    """CLIP's embeddings (B, 512) of images (B, 3, H, W) in [0, 1], resized to 224 x 224."""
    net = clip(x.device)
    moments = net.visual.image_mean, net.visual.image_std
    mean, std = (x.new_tensor(moment)[:, None, None] for moment in moments)
    x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    return net.encode_image((x - mean) / std)


@torch.no_grad()
def stacked(images: Images, features: Features) -> Tensor:
    """The features (N, D) of all images, in float64."""
    return torch.cat([features(x).double().cpu() for x in images])


def fid(a: Images, b: Images, features: Features = inception_features) -> float:
    """Frechet Inception distance of two sets of images (1706.08500), too large for small sets."""
    x, y = stacked(a, features), stacked(b, features)
    return frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())


def kid(a: Images, b: Images, features: Features = inception_features) -> float:
    """Kernel Inception distance of two sets of images (1801.01401), unbiased for small sets."""
    return kernel_distance(stacked(a, features), stacked(b, features))


def clip_score(x: Images, y: Images, features: Features = clip_features) -> float:
    """Mean cosine of the embeddings of images and of their counterparts in y, in equal order."""
    return F.cosine_similarity(stacked(x, features), stacked(y, features)).mean().item()


SET_METRICS: dict[str, Callable[[Images, Images], float]] = {
    "FID": fid,
    "KID": kid,
    "CLIP-Score": clip_score,
}


def available_metrics(
    device: torch.device, wanted: Collection[str] = (*METRICS, *SET_METRICS)
) -> list[str]:
    """The wanted metrics that can be computed here; for each missing network it prints why not.

    It loads the networks: damaged weights are a UserError before the work starts.
    """
    networks: list[tuple[str, list[str], Callable[[], object]]] = [
        ("alex", ["LPIPS"], lambda: perceptual_net("LPIPS", "alex", device)),
        ("vgg", ["DISTS"], lambda: perceptual_net("DISTS", "vgg", device)),
        ("inception", ["FID", "KID"], lambda: inception(device)),
        ("clip", ["CLIP-Score"], lambda: clip(device)),
    ]
    names = [name for name in (*METRICS, *SET_METRICS) if name in wanted]
    for net, metrics, load in networks:
        if not set(metrics) & set(names):
            continue
        if missing := missing_weights(net):
            print(f"no {', '.join(metrics)}: {missing}")
            names = [name for name in names if name not in metrics]
        else:
            load()
    return names


# ---- two folders of images ----------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    compare: tuple[str, ...] = ()  # two folders that hold images of the same names and sizes
    device: str = "auto"  # cpu, cuda or auto
    seed: ClassVar[int] = 0


def same_names(folders: tuple[str, ...]) -> list[tuple[str, Path, Path]]:
    """The images of two folders by their path without suffix; UserError unless all have both."""
    flag, found = f"--compare {' '.join(folders)}", []
    require(len(folders) == 2, f"{flag}: name two folders.")
    for folder in folders:
        require(Path(folder).is_dir(), f"{flag}: {folder} is no folder.")
        images: dict[str, Path] = {}
        for file in list_images([folder], "--compare"):
            name = file.relative_to(folder).with_suffix("").as_posix()
            require(name not in images, f"{file}: {images.get(name)} has the same name.")
            images[name] = file
        found.append(images)
    a, b = found
    alone = sorted(a.keys() ^ b.keys())
    require(not alone, f"{flag}: {len(alone)} names are in one folder only, such as "
                       f"{', '.join(alone[:2])}.")  # fmt: skip
    return [(name, a[name], b[name]) for name in sorted(a)]


@torch.no_grad()
def main(cfg: Config, rt: Runtime) -> None:
    """Print the mean metrics of the images of one folder against those of the other."""
    images, rows = same_names(cfg.compare), []
    names = available_metrics(rt.device, COMPARED)
    for name, *files in tqdm(images, unit="image", leave=False):
        try:
            x, y = (load_image(file)[None].to(rt.device) for file in files)
        except ValueError as error:
            tqdm.write(f"skipped: {error}")
            continue
        sizes = " and ".join(f"{v.shape[3]} x {v.shape[2]}" for v in (x, y))
        require(x.shape == y.shape, f"--compare: {name} has {sizes} pixels.")
        require(min(x.shape[2:]) >= 32, f"--compare: {name} is under 32 x 32 pixels.")
        # Equal images get 100 dB, so that there is a mean.
        rows.append([min(100.0, METRICS[metric](x, y).item()) for metric in names])
    require(bool(rows), f"--compare {' '.join(cfg.compare)}: none of the images can be read.")
    mean = dict(zip(names, torch.tensor(rows, dtype=torch.float64).mean(0).tolist(), strict=True))
    texts = [f"{m} {metric_text(mean, m)}" + " dB" * (m == "PSNR Y") for m in COMPARED]
    print(f"{len(rows)} images: {', '.join(texts)}")


if __name__ == "__main__":
    launch(main, Config, {}, __doc__)
