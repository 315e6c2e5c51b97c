"""The results: how close is generated LR to the LR that a real camera took? (Section 3.2, Table 2.)

In: folders of aligned pairs, HR/ and LR/ with the same file names, which were never trained on.
Out: a table on the screen and in out/benchmark/table2.md; every single value in results.json.
RealDGen answers twice: with the pair's own LR as reference, as in the paper, and with another
photo of the same camera, as in use, where nobody has the LR image that is to be generated.

    python benchmark.py --pairs data/RealSR data/DRealSR
    python benchmark.py --pairs data/RealSR --table 2 --candidates 1 --seed 1
"""

import dataclasses
import functools
import importlib
import json
import math
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import common
import degrade
import extractors
import generate

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

WEIGHTS = {  # torchvision's feature weights by network
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


@functools.cache  # which also keeps the declarations alive
def import_torchvision() -> torch.library.Library | None:
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
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms", "qroi_align", *both_ways, *(f"_{n}_backward" for n in both_ways)):
        library.define(f"{name}() -> ()")
    importlib.import_module("torchvision")
    return library


def missing_weights(net: str) -> str:
    """What to do about torchvision's weights of a network; empty where they are in place."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if (folder / WEIGHTS[net]).is_file():
        return ""
    file = f"https://download.pytorch.org/models/{WEIGHTS[net]}"
    return f"put {file} into {folder} (or set TORCH_HOME)"


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
        file = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS[net]
        raise common.UserError(f"{file}: no readable weights ({type(error).__name__}).") from None
    if metric == "DISTS":  # its own loader looks for them outside of the package
        file = Path(DISTS_pytorch.__file__).with_name("weights.pt")
        own = torch.load(file, map_location="cpu", weights_only=True)
        model.alpha.data, model.beta.data = own["alpha"].data, own["beta"].data
    return model.to(device).eval().requires_grad_(False)


def lpips_distance(x: Tensor, y: Tensor, net: str = "alex") -> Tensor:
    """LPIPS v0.1 (B,) of images (B, 3, H, W) in [0, 1]; net is a key of WEIGHTS (1801.03924)."""
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

# ---- pairs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """An HR image and the real LR image of the same scene."""

    index: int  # among all pairs of the folder, readable or not: random draws depend on it
    name: str  # below LR/, without suffix
    hr: Path
    lr: Path
    size: tuple[int, int]  # of LR, (h, w)
    scale: int  # HR size / LR size
    reference: Path  # real LR whose degradation RealDGen is to imitate


def camera_of(name: str) -> str:
    """The camera in a name below LR/: its sub-folder, else the leading letters of the file name."""
    folder, slash, _ = name.partition("/")
    return folder if slash else re.split(r"[\W\d_]", name, maxsplit=1)[0]


def find_pairs(folder: Path) -> tuple[list[Pair], int]:
    """The readable pairs of a folder, and the number of the others; UserError if they don't fit."""
    here, files = f"--pairs {folder}", {}
    for kind in ("HR", "LR"):
        below = folder / kind
        common.require(below.is_dir(), f"{here}: there is no folder {kind}/ in it.")
        found = common.list_images([str(below)], "--pairs")
        files[kind] = {file.relative_to(below).with_suffix("").as_posix(): file for file in found}
        unique = len(found) == len(files[kind])
        common.require(unique, f"{here}: {kind}/ has files that differ in their suffix only.")
    alone = sorted(files["HR"].keys() ^ files["LR"].keys())
    names = f"{len(alone)} names are only in one of HR/ and LR/, such as {', '.join(alone[:2])}"
    common.require(not alone, f"{here}: {names}.")
    pairs: list[Pair] = []
    for index, (name, file) in enumerate(sorted(files["LR"].items())):
        try:
            H, W = common.load_image(files["HR"][name]).shape[1:]
            h, w = common.load_image(file).shape[1:]
        except ValueError as error:
            print(f"skipped: {error}")
            continue
        scale = pairs[0].scale if pairs else max(2, H // h)
        sizes = f"{name} has {W} x {H} and {w} x {h} pixels, which is not a scale of {scale}"
        common.require((H, W) == (scale * h, scale * w), f"{here}: {sizes}.")
        common.require(min(h, w) >= 32, f"{here}: the LR image {name} is under 32 x 32 pixels.")
        pairs.append(Pair(index, name, files["HR"][name], file, (h, w), scale, file))
    common.require(bool(pairs), f"{here}: none of its pairs can be read.")
    return pairs, len(files["LR"]) - len(pairs)


def other_scenes(cameras: Sequence[str], seed: int) -> dict[int, int]:
    """For each image another one of the same camera, each used once; no entry where there is none.

    The images of a camera are put in a random order, and each is given its successor.
    """
    other = {}
    for number, camera in enumerate(sorted(set(cameras))):
        members = [i for i, c in enumerate(cameras) if c == camera]
        order = torch.randperm(len(members), generator=common.generator(seed, number)).tolist()
        for here, successor in zip(order, order[1:] + order[:1], strict=True):
            if here != successor:
                other[members[here]] = members[successor]
    return other


# ---- the methods: hr (B, 3, H, W) in [0, 1] of some pairs -> lr (B, 3, h, w) --------------------


def bicubic(hr: Tensor, batch: Sequence[Pair]) -> Tensor:
    """Pillow's bicubic reduction of the 8-bit HR image."""
    h, w = batch[0].size
    images = [Image.fromarray(x) for x in common.to_uint8(hr).permute(0, 2, 3, 1).cpu().numpy()]
    reduced = [np.asarray(im.resize((w, h), Image.Resampling.BICUBIC)) for im in images]
    return torch.from_numpy(np.stack(reduced)).permute(0, 3, 1, 2).to(hr.device) / 255


def synthetic(hr: Tensor, batch: Sequence[Pair], recipe: str, seed: int) -> Tensor:
    """A recipe of degrade.py, each image with parameters and noise from (seed, its index)."""
    draws = [common.generator(seed, pair.index) for pair in batch]
    scale = batch[0].scale
    theta = [degrade.sample_degradation(1, recipe, scale, generator=draw) for draw in draws]
    return degrade.degrade(hr, degrade.Degradation.cat(theta))


def realdgen(hr: Tensor, batch: Sequence[Pair], net: Any, cfg: "Config") -> Tensor:
    """The candidate that RealDGen keeps, with the degradation of each pair's reference."""
    if batch[0].scale != generate.SCALE:  # content and LR meet at this scale only
        hr = extractors.resized(hr, *(generate.SCALE * side for side in batch[0].size))
    lr, scores = generate.generate(
        net,
        hr,
        [common.load_image(pair.reference) for pair in batch],
        t_start=cfg.t_start,
        num_steps=cfg.num_steps,
        candidates=cfg.candidates,
        start=cfg.start,
        eta=cfg.eta,
        seeds=[cfg.seed << 32 | pair.index for pair in batch],
        bf16=cfg.bf16,
    )
    return lr[torch.arange(len(lr)), scores["kept"].cpu()]


# ---- Table 2 ------------------------------------------------------------------------------------

# The paper's RealDGen on all crops of a benchmark.
PAPER = {
    "RealSR": "PSNR 26.16, SSIM 0.794, LPIPS 0.223, DISTS 0.187",
    "DRealSR": "PSNR 28.66, SSIM 0.836, LPIPS 0.150, DISTS 0.157",
}
Method = Callable[[Tensor, list[Pair]], Tensor]


@torch.no_grad()
def evaluate(
    name: str,
    method: Method,
    pairs: list[Pair],
    metrics: list[str],
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """One row of a table: the LR that a method makes of each HR image, against the real LR."""
    seconds, images = 0.0, {}
    pending = sorted(pairs, key=lambda pair: pair.size)
    bar = tqdm(total=len(pairs), desc=name, unit="image")
    while pending:
        batch = [pair for pair in pending[:batch_size] if pair.size == pending[0].size]
        pending = pending[len(batch) :]
        hr = torch.stack([common.load_image(pair.hr) for pair in batch]).to(device)
        lr = torch.stack([common.load_image(pair.lr) for pair in batch]).to(device)
        began = time.perf_counter()
        made = common.to_uint8(method(hr, batch)).cpu()  # 8 bits, as in the files of real use
        seconds += time.perf_counter() - began
        made = made.to(device) / 255
        values = torch.stack([METRICS[m](made, lr).double().cpu() for m in metrics], dim=1)
        values = values.clamp(max=100.0)  # equal images: 100 dB, so that there is a mean
        for pair, row in zip(batch, values.tolist(), strict=True):
            images[pair.name] = dict(zip(metrics, row, strict=True))
        bar.update(len(batch))
    bar.close()
    mean = {m: sum(row[m] for row in images.values()) / len(images) for m in metrics if images}
    return {"method": name, "n": len(pairs), "seconds": seconds, "mean": mean, "images": images}


def table_2(
    own: list[Pair], net: Any, metrics: list[str], cfg: "Config", device: torch.device
) -> dict[str, Any]:
    """All rows for the pairs of one folder: how close is generated LR to the real one? Table 2."""
    cameras = [camera_of(pair.name) for pair in own]
    successor = other_scenes(cameras, cfg.seed)
    other = [dataclasses.replace(own[i], reference=own[j].lr) for i, j in successor.items()]
    alone = dataclasses.replace(cfg, t_start=0, start="reconstruct")
    rec_lr = functools.partial(realdgen, net=net, cfg=alone)
    diffusion = functools.partial(realdgen, net=net, cfg=cfg)
    rows: list[tuple[str, Method, list[Pair]]] = [
        ("bicubic", bicubic, own),
        ("Real-ESRGAN", functools.partial(synthetic, recipe="realesrgan", seed=cfg.seed), own),
        ("BSRGAN", functools.partial(synthetic, recipe="bsrgan", seed=cfg.seed), own),
        ("RealDGen T=0, own LR", rec_lr, own),
        ("RealDGen T=0, other scene", rec_lr, other),
        ("RealDGen, own LR", diffusion, own),
        ("RealDGen, other scene", diffusion, other),
    ]
    return {
        "cameras": dict(Counter(cameras)),
        "rows": [evaluate(*row, metrics, cfg.batch_size, device) for row in rows],
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of one folder of pairs, and what one must know to read it."""
    name, n = Path(result["pairs"]).resolve().name, result["rows"][0]["n"]
    lines = [f"## {name}: generated LR against the real LR of {n} pairs", ""]
    lines += [f"| method | {' | '.join(METRICS)} | n | seconds |"]
    lines += ["| --- |" + " ---: |" * (len(METRICS) + 2)]
    for row in result["rows"]:
        cells = [f"{row['mean'].get(m, math.nan):.{2 if 'PSNR' in m else 3}f}" for m in METRICS]
        text = " | ".join(cells).replace("nan", "-")
        lines += [f"| {row['method']} | {text} | {row['n']} | {row['seconds']:.1f} |"]
    cameras = ", ".join(f"{camera or 'unnamed'} {k}" for camera, k in result["cameras"].items())
    lines += [
        "",
        "bicubic is Pillow's, of the 8-bit HR image; T=0 is Rec_lr without diffusion; n is",
    ]
    lines += [
        "the number of pairs, seconds the time to generate them. The LR reference is the pair's"
    ]
    lines += [f"own LR, or another scene of the same camera ({cameras})."]
    lines += [f"Pairs without another scene, left out there: {n - result['rows'][-1]['n']}."]
    lines += [f"Pairs that can't be read, left out everywhere: {result['skipped']}."]
    if name in PAPER:
        lines += ["", f"RealDGen (paper), on the whole {name} benchmark: {PAPER[name]}."]
    return "\n".join(lines) + "\n"


def git_commit() -> str:
    """The commit of this code, marked -dirty where files differ; empty where git can't say."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    pairs: tuple[str, ...] = ()  # folders with HR/ and LR/ of the same file names
    table: int = 2  # of the paper; 2 is the accuracy of generated LR
    checkpoint: str = ""  # generator (default: runs/diffusion, else data/pretrained)
    out: str = "out/benchmark"  # folder that gets table2.md and results.json
    start: str = generate.Config.start  # start image: reconstruct (Rec_lr) or degrade
    t_start: int = generate.Config.t_start  # T, from which generation starts
    num_steps: int = generate.Config.num_steps  # network evaluations of the sampler
    eta: float = generate.Config.eta  # 0 is DDIM, 1 is DDPM
    candidates: int = generate.Config.candidates  # K, of which the best is kept
    batch_size: int = 8  # images at a time; no draw depends on it
    bf16: bool = generate.Config.bf16  # where the device has it
    seed: int = 0  # image i draws from (seed, i)
    device: str = "auto"  # cpu, cuda or auto


def main(cfg: Config, rt: common.Runtime) -> None:
    """Check all that can be wrong, then measure folder by folder and write after each."""
    if not rt.is_main:  # a matter of minutes for one process
        return
    began = time.time()
    example = "name folders with HR/ and LR/, as in `python benchmark.py --pairs data/RealSR`"
    common.require(bool(cfg.pairs), f"--pairs is missing: {example}.")
    common.require(cfg.table == 2, f"--table {cfg.table}: only table 2 can be made.")
    for flag, value, low in (
        ("--t-start", cfg.t_start, 0),
        ("--num-steps", cfg.num_steps, 1),
        ("--candidates", cfg.candidates, 1),
        ("--batch-size", cfg.batch_size, 1),
        ("--seed", cfg.seed, 0),
    ):
        common.require(low <= value < 2**31, f"{flag} {value}: must be at least {low}.")
    common.require(cfg.start in generate.STARTS, f"--start {cfg.start}: not a start image.")
    sets = {folder: find_pairs(Path(folder)) for folder in cfg.pairs}
    net = generate.load_generator(cfg.checkpoint, rt.device)
    metrics = list(METRICS)
    for metric, backbone in (("LPIPS", "alex"), ("DISTS", "vgg")):
        if missing := missing_weights(backbone):
            print(f"no {metric}: {missing}")
            metrics.remove(metric)
        else:
            perceptual_net(metric, backbone, rt.device)
    print(cfg)
    gpu = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else ""
    results: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "config": dataclasses.asdict(cfg),
        "commit": git_commit(),
        "torch": torch.__version__,
        "device": gpu or f"{rt.device}, {torch.get_num_threads()} threads",
        "sets": [],
    }
    tables = []
    for folder, (pairs, skipped) in sets.items():
        result = table_2(pairs, net, metrics, cfg, rt.device)
        results["sets"].append({"pairs": folder, "skipped": skipped} | result)
        results["seconds"] = time.time() - began
        tables.append(markdown(results["sets"][-1]))
        print("\n" + tables[-1])
        report, values = "\n".join(tables), json.dumps(results, indent=1)
        for name, text in (("table2.md", report), ("results.json", values)):
            with common.replacing(Path(cfg.out) / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    print(f"written: {cfg.out}/table2.md and {cfg.out}/results.json")


if __name__ == "__main__":
    common.launch(main, Config, generate.PRESETS, __doc__)
