"""What the networks have learned, seen from outside; needs HR photos only, no aligned pairs.

In: HR photos and the networks of stages 1 and 2. Out: two tables that benchmark.py prints. Does
generated LR follow its reference, one factor at a time (factors)? Does E_deg see what E_cont must
not see (extractors)? Not in the paper.

    python benchmark.py --table factors extractors --hr data/hr --lr data/lr
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from tqdm import tqdm

import common
import degrade
import extractors
import generate
from bench.metrics import psnr

# ---- the photos and the networks ----------------------------------------------------------------


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
    nets = extractors.load(common.load_checkpoint(path), str(path))
    return nets.to(device).eval().requires_grad_(False)


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
    detail = gray(bank[:1] - degrade.blur(bank[:1], F.pad(kernel, (8, 8, 8, 8))[None]))
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


def table_factors(
    hr: Tensor,
    net: Any,
    t_starts: Sequence[int],
    repeats: int,
    sampler: generate.Sampler,
    seed: int,
) -> dict[str, Any]:
    """All rows: the truth, then the network from each T, with K = 1; T = 0 has no diffusion.

    hr (N, 3, H, W) in [0, 1]: the contents; repeats: noises that each is generated with.
    """

    def network(t_start: int) -> Answer:
        start = sampler.start if t_start else "reconstruct"
        own = replace(sampler, t_start=t_start, start=start, candidates=1)
        return lambda hr, lr_ref, theta, seeds: generate.generate(net, hr, lr_ref, own, seeds)[0][
            :, 0
        ]

    banks = [reductions(x) for x in hr]
    answers = {"truth": truth} | {f"T={t}": network(t) for t in t_starts}
    rows = []
    for factor in FACTORS:
        for name, answer in answers.items():
            drawn = name != "truth" and (sampler.grain or name != "T=0")
            noises = range(repeats if drawn else 1)
            parts = [follow(hr, banks, answer, factor, seed, noise) for noise in noises]
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
        "theta). truth is D(X, theta) itself; T=0 is Rec_lr without diffusion, with grain unless",
        "--no-grain.",
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
    hr: Tensor, devices: list[Tensor], nets: extractors.Extractors, batch_size: int, seed: int
) -> dict[str, Any]:
    """Retrieval by degradation and by content, and the images that Rec_hr finds in the content.

    hr (N, 3, H, W) in [0, 1]; devices: the `device_crops`, or none.
    """

    def each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([function(part).float() for part in x.split(batch_size)])

    def codes(task: str, queries: Tensor, candidates: Tensor) -> list[dict[str, Any]]:
        found = retrieval(each(nets.e_deg, queries), each(nets.e_deg, candidates))
        plain = retrieval(each(statistics, queries), each(statistics, candidates), standardise=True)
        row = {"task": task, "n": len(queries)}
        return [row | {"code": "E_deg"} | found, row | {"code": "plain"} | plain]

    N, _, H, W = hr.shape
    latents = each(nets.vqvae.encode, hr)
    quantised, numbers = nets.vqvae.quantize(latents)
    content = latents
    clean = {"without codebook": latents, "with codebook": quantised}
    images = {f"clean, {name}": each(nets.vqvae.decode, z) for name, z in clean.items()}
    rows, contents = [], []
    for recipe in ("realesrgan", "camera"):
        draw = common.generator(seed, degrade.RECIPES.index(recipe))
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
