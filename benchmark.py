"""The results: how close is generated LR to the LR that a real camera took? (Section 3.2, Table 2.)

In: folders of aligned pairs, HR/ and LR/ with the same file names, which were never trained on.
Out: a table on the screen and in out/benchmark/table2.md; every single value in results.json.
RealDGen answers twice: with the pair's own LR as reference, as in the paper, and with another
photo of the same camera, as in use, where nobody has the LR image that is to be generated.

Two tables more look inside, and need HR photos only: does generated LR follow its reference,
one factor at a time (factors), and does E_deg see what E_cont must not see (extractors).

    python benchmark.py --pairs data/RealSR data/DRealSR
    python benchmark.py --pairs data/RealSR --table 2 --candidates 1 --seed 1
    python benchmark.py --table factors extractors --hr data/hr --lr data/lr
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import Tensor
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
        solver=cfg.solver,
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


def table_sampling(
    own: list[Pair], net: Any, metrics: list[str], cfg: "Config", device: torch.device
) -> dict[str, Any]:
    """What start image, solver, number of evaluations and candidates are worth, other scenes."""
    cameras = [camera_of(pair.name) for pair in own]
    pairs = [
        dataclasses.replace(own[i], reference=own[j].lr)
        for i, j in other_scenes(cameras, cfg.seed).items()
    ][: cfg.images]
    T = cfg.t_start
    rows: list[tuple[str, dict[str, Any]]] = [("Rec_lr alone", {"t_start": 0})]
    for solver in ("ddim", "dpm"):
        for n in (1, 2, 5, 10) if solver == "ddim" else (2, 5, 10):
            rows.append((f"{solver}, {n} evaluations", {"solver": solver, "num_steps": n}))
    rows += [
        (f"ddpm, all {T} steps", {"eta": 1.0, "num_steps": T}),
        ("ddim, 5 evaluations, start degrade", {"start": "degrade", "num_steps": 5}),
        (
            f"ddim, 5 evaluations, K={cfg.candidates}",
            {"candidates": cfg.candidates, "num_steps": 5},
        ),
    ]
    plain = dataclasses.replace(cfg, candidates=1, eta=0.0, solver="ddim", start="reconstruct")
    results = []
    for name, changes in rows:
        method = functools.partial(realdgen, net=net, cfg=dataclasses.replace(plain, **changes))
        results.append(evaluate(name, method, pairs, metrics, cfg.batch_size, device))
    return {"t_start": T, "rows": results}


def markdown_sampling(result: dict[str, Any]) -> str:
    """The table of settings of one folder of pairs."""
    name = Path(result["pairs"]).resolve().name
    lines = [f"## {name}: settings of the sampler from T={result['t_start']}, K=1 unless said", ""]
    return "\n".join(lines + method_rows(result["rows"])) + "\n"


def method_rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a table with a row for each method."""
    lines = [f"| method | {' | '.join(METRICS)} | n | seconds |"]
    lines += ["| --- |" + " ---: |" * (len(METRICS) + 2)]
    for row in rows:
        cells = [f"{row['mean'].get(m, math.nan):.{2 if 'PSNR' in m else 3}f}" for m in METRICS]
        text = " | ".join(cells).replace("nan", "-")
        lines += [f"| {row['method']} | {text} | {row['n']} | {row['seconds']:.1f} |"]
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table of one folder of pairs, and what one must know to read it."""
    name, n = Path(result["pairs"]).resolve().name, result["rows"][0]["n"]
    lines = [f"## {name}: generated LR against the real LR of {n} pairs", ""]
    lines += method_rows(result["rows"])
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


# ---- does generated LR follow its reference, one factor at a time? ------------------------------

LEVELS = 8
# What varies: the operations of D, the lowest and the highest level.
FACTORS: dict[str, tuple[tuple[str, ...], float, float]] = {
    "blur": (("blur 1", "resize 3"), 0.4, 1.6),  # width of a Gaussian, LR pixels
    "noise": (("resize 3", "gaussian 2"), 0.0, 20.0),  # std, levels of 255
    "sharpen": (("resize 3", "blur 3"), 0.0, 1.5),  # amount
    "jpeg": (("resize 3", "jpeg 2"), 5.0, 70.0),  # 100 - quality
}
Answer = Callable[[Tensor, list[Tensor], degrade.Degradation, list[int]], Tensor]


def only(factor: str, levels: Tensor, noise: int = 0) -> degrade.Degradation:
    """Parameters of D with this factor at these levels (L,), and nothing else but the reduction."""
    theta = degrade.bicubic(len(levels), generate.SCALE)
    operations = [degrade.OPERATIONS.index(name) for name in FACTORS[factor][0]]
    theta.order[:, : len(operations)] = torch.tensor(operations)
    theta.blur_size[:] = degrade.KERNEL_SIZE
    theta.seed = torch.randint(2**31, (len(levels),), generator=common.generator(noise))
    if factor == "blur":
        theta.blur_sigma[:, 0] = generate.SCALE * levels[:, None]
    elif factor == "noise":
        theta.gaussian_std[:, 1] = levels / 255
    elif factor == "sharpen":
        theta.sharpen[:, 2] = levels.clamp(min=1e-6)  # D takes 0 for a blur
    else:
        theta.jpeg_quality[:, 1] = (100 - levels).round().long()
    return theta


def gray(x: Tensor) -> Tensor:
    """Gray in levels of 255, (B, 1, H, W) in float64, of RGB (B, 3, H, W) in [0, 1]."""
    weights = x.new_tensor([0.299, 0.587, 0.114])
    return 255 * torch.einsum("c,bchw->bhw", weights, x)[:, None].double()


def filtered(x: Tensor, kernel: Sequence[Sequence[float]]) -> Tensor:
    """Correlate every channel of (B, C, h, w) with a kernel, where it fits whole."""
    weight = x.new_tensor(kernel)[None, None]
    return F.conv2d(x.flatten(0, 1)[:, None], weight).unflatten(0, x.shape[:2])[:, :, 0]


LAPLACIAN = ((0, 1, 0), (1, -4, 1), (0, 1, 0))
NOISE = ((1 / 6, -1 / 3, 1 / 6), (-1 / 3, 2 / 3, -1 / 3), (1 / 6, -1 / 3, 1 / 6))  # keeps its std
WIDTHS = torch.linspace(0, 2, 21)  # of the Gaussians that are tried, LR pixels


def reductions(hr: Tensor) -> Tensor:
    """The HR image (3, H, W) blurred with each of WIDTHS and reduced: (21, 3, H/4, W/4)."""
    return degrade.degrade(hr.repeat(len(WIDTHS), 1, 1, 1), only("blur", WIDTHS))


def blur_of(lr: Tensor, bank: Tensor) -> Tensor:
    """Width (B,) in LR pixels of the Gaussian that explains lr (B, 3, h, w) best."""
    centred = [gray(x) - gray(x).mean((2, 3), keepdim=True) for x in (lr, bank)]
    error = torch.cdist(centred[0].flatten(1), centred[1].flatten(1)).square()  # (B, 21)
    best = error.argmin(1).clamp(1, len(WIDTHS) - 2)[:, None]
    left, here, right = (error.gather(1, best + i)[:, 0] for i in (-1, 0, 1))
    vertex = ((left - right) / (2 * (left - 2 * here + right)).clamp(min=1e-12)).clamp(-1, 1)
    return (best[:, 0] + vertex) * (WIDTHS[1] - WIDTHS[0])  # of the parabola through the three


def sharpening_of(lr: Tensor, bank: Tensor) -> Tensor:
    """Amount (B,) of unsharp masking (negative: softer) that explains lr (B, 3, h, w) best."""
    taps = (-torch.arange(-4, 5).square() / 2).exp()  # of 1 LR pixel, as `only` sharpens
    kernel = (taps[:, None] * taps / taps.sum().square()).to(bank)
    detail = gray((bank[0] - degrade.blur(bank[0], kernel))[None])
    return ((gray(lr) - gray(bank[:1])) * detail).mean((1, 2, 3)) / detail.square().mean()


def residual(lr: Tensor, bank: Tensor) -> Tensor:
    """What no linear filter of the HR image explains in lr (B, 3, h, w), in levels of 255.

    The filters are combinations of a few Gaussians, fitted to each channel.
    """
    columns = [bank[::5].flatten(2), torch.ones_like(bank[:1]).flatten(2)]
    A = 255 * torch.cat(columns).permute(1, 2, 0).double()  # (3, hw, 6)
    y = 255 * lr.flatten(2).permute(1, 2, 0).double()  # (3, hw, B)
    return (y - A @ torch.linalg.lstsq(A, y).solution).permute(2, 0, 1).view(lr.shape)


def noise_of(lr: Tensor, bank: Tensor) -> Tensor:
    """Robust noise std (B,) in levels of 255: of the residual, where the HR image is flat."""
    texture = filtered(gray(bank[:1]), LAPLACIAN)[0, 0].abs()
    flat = texture <= texture.median()
    return filtered(residual(lr, bank), NOISE)[:, :, flat].abs().flatten(1).median(1)[0] * 1.4826


def blockiness(x: Tensor) -> Tensor:
    """Mean step across the borders of 8 x 8 blocks over the mean step elsewhere, (B,)."""
    steps = [x.diff(dim=dim).abs().mean((1, 5 - dim)) for dim in (2, 3)]  # (B, h - 1), (B, w - 1)
    border = torch.cat([torch.arange(s.shape[1]) % 8 == 7 for s in steps])
    both = torch.cat(steps, dim=1)
    return both[:, border].mean(1) / both[:, ~border].mean(1).clamp(min=1e-12)


MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "blur": blur_of,
    "noise": noise_of,
    "sharpen": sharpening_of,
    "jpeg": lambda lr, bank: blockiness(residual(lr, bank)),
}


def fine_detail(lr: Tensor) -> Tensor:
    """Median absolute Laplacian (B,) of gray, in levels of 255."""
    return filtered(gray(lr), LAPLACIAN).abs().flatten(1).median(1)[0]


def truth(hr: Tensor, lr_ref: list[Tensor], theta: degrade.Degradation, seeds: list[int]) -> Tensor:
    """The answer that is looked for: what the measures can see at all."""
    return degrade.degrade(hr, theta)


@torch.no_grad()
def follow(
    hr: Tensor, banks: list[Tensor], answer: Answer, factor: str, seed: int, noise: int = 0
) -> dict[str, Any]:
    """How an answer to references of rising levels rises itself, for contents hr (N, 3, H, W).

    banks: the `reductions` of each. The reference of level l is D(X', theta_l) of a scene X' that
    is another one for each level (as far as there are), so that only theta rises. rank: Spearman's
    correlation of level and measured value for each content; measured (N, L); detail (N, L),
    relative to D(X, theta_l).
    """
    N = len(hr)
    levels = torch.linspace(*FACTORS[factor][1:], LEVELS)
    result: dict[str, Any] = {"rank": [], "measured": [], "detail": []}
    for i, own in enumerate(tqdm(hr, desc=factor, unit="scene", leave=False)):
        theta = only(factor, levels, noise=seed << 32 | i)
        others = (i + 1 + torch.arange(LEVELS) % (N - 1)) % N
        lr_ref = list(degrade.degrade(hr[others], theta))
        same = own.repeat(LEVELS, 1, 1, 1)
        draws = [((seed << 16 | noise) << 16 | i) << 16 | level for level in range(LEVELS)]
        lr = common.to_uint8(answer(same, lr_ref, theta, draws)) / 255  # as in files
        measured = MEASURES[factor](lr, banks[i])
        rank = stats.spearmanr(levels, measured.cpu())[0] if measured.std() > 0 else 0.0
        detail = fine_detail(lr) / fine_detail(degrade.degrade(same, theta)).clamp(min=0.01)
        result["rank"].append(float(rank))
        result["measured"].append(measured.tolist())
        result["detail"].append(detail.tolist())
    return result


def table_factors(hr: Tensor, net: Any, cfg: "Config") -> dict[str, Any]:
    """All rows: the truth, then the network from each T, with K = 1; T = 0 is Rec_lr alone."""

    def network(t_start: int) -> Answer:
        start = cfg.start if t_start else "reconstruct"
        return lambda hr, lr_ref, theta, seeds: generate.generate(
            net, hr, lr_ref, t_start, cfg.num_steps, 1, start, cfg.eta, seeds, cfg.bf16
        )[0][:, 0]

    banks = [reductions(x) for x in hr]
    answers = {"truth": truth} | {f"T={t}": network(t) for t in cfg.t_starts}
    rows = []
    for factor in FACTORS:
        for name, answer in answers.items():
            repeats = 1 if name in ("truth", "T=0") else cfg.repeats  # those draw nothing
            parts = [follow(hr, banks, answer, factor, cfg.seed, noise) for noise in range(repeats)]
            values = {key: [v for part in parts for v in part[key]] for key in parts[0]}
            rows.append({"factor": factor, "answer": name, **values})
    return {"images": len(hr), "rows": rows}


def markdown_factors(result: dict[str, Any]) -> str:
    """The table of factors, and what one must know to read it."""
    lines = [f"## Does generated LR follow its reference? {result['images']} contents", ""]
    lines += ["| factor | answer | rank correlation | lowest | at the lowest level | at the highest"
              " | fine detail | n |"]  # fmt: skip
    lines += ["| --- | --- |" + " ---: |" * 6]
    for row in result["rows"]:
        rank, measured = np.array(row["rank"]), np.array(row["measured"]).mean(0)
        cells = [f"{rank.mean():.3f}", f"{rank.min():.2f}", f"{measured[0]:.2f}"]
        cells += [f"{measured[-1]:.2f}", f"{np.median(row['detail']):.2f}", str(len(rank))]
        lines += [f"| {row['factor']} | {row['answer']} | {' | '.join(cells)} |"]
    ranges = [f"{factor} {low:g}..{high:g}" for factor, (_, low, high) in FACTORS.items()]
    lines += [
        "",
        f"References are other scenes, degraded with one factor at {LEVELS} levels: "
        f"{', '.join(ranges)}",
        "(LR pixels; levels of 255; amount; 100 - quality). Spearman's correlation of level and",
        "measured value, for each content and noise: mean and lowest; the mean measured values",
        "(JPEG: blockiness, 1 is none). Fine detail: median |Laplacian| relative to the true D(X,",
        "theta). truth is D(X, theta) itself; T=0 is Rec_lr without diffusion.",
    ]
    return "\n".join(lines) + "\n"


# ---- do the extractors tell degradation and content apart? --------------------------------------


def statistics(lr: Tensor) -> Tensor:
    """What E_deg has to beat: 12 plain numbers (B, 12) about LR images (B, 3, h, w)."""
    x = gray(lr)
    half = F.avg_pool2d(x, 2)
    energy = [sum(v.diff(dim=dim).square().mean((1, 2, 3)) for dim in (2, 3)) for v in (x, half)]
    noise = filtered(x, NOISE).abs().flatten(1).median(1)[0]
    power = torch.fft.rfft2(x - x.mean((2, 3), keepdim=True)).abs().square()[:, 0]
    fy, fx = torch.fft.fftfreq(x.shape[2]), torch.fft.rfftfreq(x.shape[3])
    radius = (fy[:, None].square() + fx.square()).sqrt().to(x.device)
    bands = [power[:, (radius > b / 16) & (radius <= (b + 1) / 16)].mean(1) for b in range(8)]
    scales = energy[0] / (energy[1] + 1e-6)
    texture = filtered(x, LAPLACIAN).var((1, 2, 3))
    return torch.stack(
        [*((v + 1e-2).log() for v in (texture, scales, noise, *bands)), blockiness(x)], 1
    )


def retrieval(queries: Tensor, candidates: Tensor, standardise: bool = False) -> dict[str, float]:
    """Share of queries (N, D) whose own candidate (N, D) is the nearest, or among the 5 nearest."""
    queries, candidates = queries.double(), candidates.double()
    if standardise:
        mean, std = candidates.mean(0), candidates.std(0).clamp(min=1e-12)
        queries, candidates = (queries - mean) / std, (candidates - mean) / std
    result: dict[str, float] = {}
    for distance in ("L2", "cosine"):
        a, b = queries, candidates
        if distance == "cosine":
            a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        table = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        before = (table <= table.diagonal()[:, None]).sum(1) - 1  # ties count against us
        result |= {f"{distance} top-{k}": (before < k).double().mean().item() for k in (1, 5)}
    return result


def nearest_scene(degraded: Tensor, clean: Tensor) -> dict[str, float]:
    """How often, and by how much, row i (N, ...) is nearer to its own clean row than to others."""
    table = torch.cdist(degraded.flatten(1), clean.flatten(1))
    own, other = (
        table.diagonal(),
        (table + table.new_full((len(table),), math.inf).diag()).min(1)[0],
    )
    return {"top-1": (own < other).float().mean().item(), "ratio": (own / other).median().item()}


def device_crops(files: list[Path], side: int, images: int, seed: int) -> list[Tensor]:
    """Queries and candidates (N, 3, side, side) from two files of a device each; none, if fewer.

    A device is a sub-folder; its first and its last file are the most likely to be two photos.
    """
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)
    devices = [f for f in folders.values() if len(f) > 1]
    order = torch.randperm(len(devices), generator=common.generator(seed)).tolist()
    crops = []
    for device in order if len(devices) > 1 else []:
        with contextlib.suppress(ValueError):
            two = [middle(common.load_image(devices[device][i]), side) for i in (0, -1)]
            crops.append(torch.stack(two))
    return list(torch.stack(crops[:images], dim=1)) if len(crops) > 1 else []


@torch.no_grad()
def table_extractors(
    hr: Tensor, devices: list[Tensor], nets: extractors.Extractors, cfg: "Config"
) -> dict[str, Any]:
    """Retrieval by degradation and by content, and the images that Rec_hr finds in the content."""

    def each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([function(part).float() for part in x.split(cfg.batch_size)])

    def codes(task: str, queries: Tensor, candidates: Tensor) -> list[dict[str, Any]]:
        found = retrieval(each(nets.e_deg, queries), each(nets.e_deg, candidates))
        plain = retrieval(each(statistics, queries), each(statistics, candidates), standardise=True)
        row = {"task": task, "n": len(queries)}
        return [row | {"code": "E_deg"} | found, row | {"code": "plain"} | plain]

    N, _, H, W = hr.shape
    latents = each(nets.vqvae.encode, hr)
    quantised, numbers = nets.vqvae.quantize(latents)
    content = quantised if nets.quantize_content else latents
    clean = {"without codebook": latents, "with codebook": quantised}
    images = {f"clean, {name}": each(nets.vqvae.decode, z) for name, z in clean.items()}
    rows, contents = [], []
    for recipe in ("realesrgan", "camera"):
        draw = common.generator(cfg.seed, degrade.RECIPES.index(recipe))
        theta = degrade.sample_degradation(N, recipe, generate.SCALE, generator=draw)
        lr = degrade.degrade(hr, theta, draw)
        # Another scene with the same theta; the query's own scene is there with another theta.
        rows += codes(f"theta, {recipe}", lr, degrade.degrade(hr.roll(N // 2, 0), theta, draw))
        up = extractors.resized(lr, H, W)
        seen = each(nets.content, up)
        for name, a, b in (("E_cont", seen, content), ("pixels", up, hr)):
            contents.append({"recipe": recipe, "of": name} | nearest_scene(a, b))
        images[f"{recipe}, enlarged"] = up
        images[f"{recipe}, its content decoded"] = each(nets.vqvae.decode, seen)
    if devices:
        rows += codes("device", *(x.to(hr.device) for x in devices))
    found = {name: psnr(x.clamp(0, 1), hr).mean().item() for name, x in images.items()}
    total, used = len(nets.vqvae.quantize.embedding.weight), int(numbers.unique().numel())
    result: dict[str, Any] = {"images": N, "retrieval": rows, "content": contents}
    return result | {"psnr": found, "used": [used, total]}


def markdown_extractors(result: dict[str, Any]) -> str:
    """The three tables of the extractors, and what one must know to read them."""
    n, top = result["images"], [f"{d} top-{k}" for d in ("L2", "cosine") for k in (1, 5)]
    lines = [f"## Do the extractors tell degradation and content apart? {n} contents", ""]
    lines += [f"| same | code | {' | '.join(top)} | chance top-1 | n |"]
    lines += ["| --- | --- |" + " ---: |" * 6]
    for row in result["retrieval"]:
        cells = " | ".join(f"{row[key]:.0%}" for key in top)
        lines += [f"| {row['task']} | {row['code']} | {cells} | {1 / row['n']:.1%} | {row['n']} |"]
    lines += ["", "| degraded with | nearest by | own scene is nearest | own / nearest other |"]
    lines += ["| --- | --- | ---: | ---: |"]
    for row in result["content"]:
        lines += [f"| {row['recipe']} | {row['of']} | {row['top-1']:.0%} | {row['ratio']:.2f} |"]
    lines += ["", "| image | PSNR to the clean photo |", "| --- | ---: |"]
    lines += [f"| {name} | {value:.2f} |" for name, value in result["psnr"].items()]
    used, total = result["used"]
    lines += [
        "",
        "Same theta: the query is D(X, theta), candidates D(X', theta') of other scenes, one of",
        "them with the query's theta. Same device: two files of each sub-folder of --lr. plain:",
        "standardised statistics of the image. own / nearest other: median ratio of the distances",
        "from the content of D(X), enlarged, to that of its own clean photo and of another one.",
        f"Codes in use on the clean photos: {used} of {total}.",
    ]
    return "\n".join(lines) + "\n"


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    pairs: tuple[str, ...] = ()  # folders with HR/ and LR/ of the same file names
    table: tuple[str, ...] = ("2",)  # 2 (the paper's), sampling, factors, extractors
    hr: tuple[str, ...] = ()  # HR photos of the other tables (default: data/hr, else data/sample)
    lr: tuple[str, ...] = ()  # real LR photos in a sub-folder for each device (default: data/lr)
    images: int = 64  # HR photos and devices in use
    crop: int = 96  # side of the LR images of the other tables, pixels
    t_starts: tuple[int, ...] = (0, 15, 120)  # rows of the table factors
    repeats: int = 2  # noises for each of its contents
    extractors: str = ""  # stage-1 weights (default: runs/extractors, else data/pretrained)
    checkpoint: str = ""  # generator (default: runs/diffusion, else data/pretrained)
    out: str = "out/benchmark"  # folder that gets results.json and a .md for each table
    start: str = generate.Config.start  # start image: reconstruct (Rec_lr) or degrade
    t_start: int = generate.Config.t_start  # T, from which generation starts
    num_steps: int = generate.Config.num_steps  # network evaluations of the sampler
    eta: float = generate.Config.eta  # 0 is DDIM, 1 is DDPM
    solver: str = generate.Config.solver  # ddim or dpm
    candidates: int = generate.Config.candidates  # K, of which the best is kept
    batch_size: int = 8  # images at a time; no draw depends on it
    bf16: bool = generate.Config.bf16  # where the device has it
    seed: int = 0  # image i draws from (seed, i)
    device: str = "auto"  # cpu, cuda or auto


TABLES = {
    "2": "table2.md",
    "sampling": "sampling.md",
    "factors": "factors.md",
    "extractors": "extractors.md",
}


def check(cfg: Config) -> None:
    """UserError for what is wrong with the flags alone."""
    for table in cfg.table:
        common.require(table in TABLES, f"--table {table}: choose among {', '.join(TABLES)}.")
    if {"2", "sampling"} & set(cfg.table):
        example = "name folders with HR/ and LR/, as in `python benchmark.py --pairs data/RealSR`"
        common.require(bool(cfg.pairs), f"--pairs is missing: {example}.")
    for flag, value, low in (
        ("--t-start", cfg.t_start, 0),
        ("--t-starts", min(cfg.t_starts), 0),
        ("--num-steps", cfg.num_steps, 1),
        ("--candidates", cfg.candidates, 1),
        ("--batch-size", cfg.batch_size, 1),
        ("--images", cfg.images, 2),
        ("--crop", cfg.crop, 32),
        ("--repeats", cfg.repeats, 1),
        ("--seed", cfg.seed, 0),
    ):
        common.require(low <= value < 2**31, f"{flag} {value}: must be at least {low}.")
    common.require(cfg.crop % 8 == 0, f"--crop {cfg.crop}: must be a multiple of 8.")
    common.require(cfg.start in generate.STARTS, f"--start {cfg.start}: not a start image.")
    given = cfg.extractors
    common.require(not given or Path(given).is_file(), f"--extractors {given}: no such file.")


def middle(image: Tensor, side: int) -> Tensor:
    """The middle side x side pixels of an image (3, H, W); ValueError if it is smaller."""
    top, left = ((n - side) // 2 for n in image.shape[1:])
    if min(top, left) < 0:
        raise ValueError(f"an image is under {side} x {side} pixels")
    return image[:, top : top + side, left : left + side]


def load_photos(files: list[Path], side: int, images: int, seed: int) -> Tensor:
    """The middle (3, side, side) of so many photos, drawn from the files: (N, 3, side, side)."""
    crops: list[Tensor] = []
    order = torch.randperm(len(files), generator=common.generator(seed)).tolist()
    for file in (files[i] for i in order):
        if len(crops) < images:
            try:
                crops.append(middle(common.load_image(file), side))
            except ValueError as error:
                print(f"skipped: {file} ({error})")
    enough = (
        f"--hr: of {len(files)} files, {len(crops)} are photos of {side} x {side} pixels or more"
    )
    common.require(len(crops) > 1, f"{enough}; two are needed.")
    return torch.stack(crops)


def load_extractors(checkpoint: str, device: torch.device) -> extractors.Extractors:
    """The networks of stage 1; "" looks in runs/extractors, then in data/pretrained."""
    path = common.find_checkpoint(checkpoint, "extractors", "python extractors.py")
    state = common.load_checkpoint(path)
    config = state.get("config", {})
    fits = "deg_dim" in config and "ema" in state
    common.require(fits, f"{path}: not a checkpoint of extractors.py (give that one).")
    nets = extractors.Extractors(common.from_dict(extractors.Config, config))
    nets.load_state_dict(state["ema"])
    return nets.to(device).eval().requires_grad_(False)


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


def main(cfg: Config, rt: common.Runtime) -> None:
    """Check all that can be wrong, then measure, and write whenever a table has grown."""
    if not rt.is_main:  # a matter of minutes for one process
        return
    began = time.time()
    check(cfg)
    on_pairs = {"2": (table_2, markdown), "sampling": (table_sampling, markdown_sampling)}
    used = set(cfg.table)
    sets = {f: find_pairs(Path(f)) for f in cfg.pairs} if used & on_pairs.keys() else {}
    if {"factors", "extractors"} & set(cfg.table):
        files, side = common.find_photos(cfg.hr, "hr", "--hr"), generate.SCALE * cfg.crop
        hr = load_photos(files, side, cfg.images, cfg.seed).to(rt.device)
    if "extractors" in cfg.table:
        real = common.find_photos(cfg.lr, "lr", "--lr")
        devices = device_crops(real, cfg.crop, cfg.images, cfg.seed)
        nets = load_extractors(cfg.extractors, rt.device)
    if used - {"extractors"}:
        net = generate.load_generator(cfg.checkpoint, rt.device)
    metrics = available_metrics(rt.device) if sets else []
    print(cfg)
    gpu = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else ""
    results: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "config": dataclasses.asdict(cfg),
        "commit": git_commit(),
        "torch": torch.__version__,
        "device": gpu or f"{rt.device}, {torch.get_num_threads()} threads",
        "sets": [],  # of Table 2
    }

    def write(table: str, text: str) -> None:
        results["seconds"] = time.time() - began
        for name, content in (
            (TABLES[table], text),
            ("results.json", json.dumps(results, indent=1)),
        ):
            with common.replacing(Path(cfg.out) / name) as temporary:
                temporary.write_text(content, encoding="utf-8")

    for table, (measure, text_of) in on_pairs.items():
        found = results["sets"] if table == "2" else results.setdefault(table, [])
        tables = []
        for folder, (pairs, skipped) in sets.items() if table in used else ():
            result = measure(pairs, net, metrics, cfg, rt.device)
            found.append({"pairs": folder, "skipped": skipped} | result)
            tables.append(text_of(found[-1]))
            print("\n" + tables[-1])
            write(table, "\n".join(tables))
    if "factors" in cfg.table:
        results["factors"] = table_factors(hr, net, cfg)
        print("\n" + (text := markdown_factors(results["factors"])))
        write("factors", text)
    if "extractors" in cfg.table:
        results["extractors"] = table_extractors(hr, devices, nets, cfg)
        print("\n" + (text := markdown_extractors(results["extractors"])))
        write("extractors", text)
    names = [TABLES[table] for table in TABLES if table in cfg.table]
    print(f"written: {', '.join(names)} and results.json in {cfg.out}")


if __name__ == "__main__":
    common.launch(main, Config, generate.PRESETS, __doc__)
