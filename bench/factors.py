"""Does generated LR follow its reference, one factor at a time? Not in the paper.

In: HR photos and the generator; no pairs. Out: the table factors.

    python benchmark.py --table factors --hr data/hr
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from tqdm import tqdm

import degrade
import generate
from bench.inputs import Inputs, Measure
from bench.pairs import table_text
from common.photos import to_uint8
from common.runtime import make_generator

# ---- does generated LR follow its reference, one factor at a time? ------------------------------

LEVELS = 8
# What varies: the operations of D, the lowest and the highest level.
FACTORS: dict[str, tuple[tuple[str, ...], float, float]] = {
    "blur": (("blur 1", "resize 3"), 0.4, 1.6),  # width of a Gaussian, LR pixels
    "noise": (("resize 3", "gaussian 2"), 0.0, 20.0),  # std, levels of 255
    "sharpen": (("resize 3", "blur 3"), 0.0, 1.5),  # amount
    "jpeg": (("resize 3", "jpeg 2"), 5.0, 70.0),  # 100 - quality
}
LRMaker = Callable[[Tensor, list[Tensor], degrade.Degradation, list[int]], Tensor]


def only(factor: str, levels: Tensor, noise: int = 0) -> degrade.Degradation:
    """Parameters of D with this factor at these levels (L,), and nothing else but the reduction."""
    theta = degrade.bicubic_reduction(len(levels), generate.SCALE)
    operations = [degrade.OPERATIONS.index(name) for name in FACTORS[factor][0]]
    theta.order[:, : len(operations)] = torch.tensor(operations)
    theta.blur_size[:] = degrade.KERNEL_SIZE
    theta.seed = torch.randint(2**31, (len(levels),), generator=make_generator(noise))
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


def correlated(x: Tensor, kernel: Sequence[Sequence[float]]) -> Tensor:
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
    texture = correlated(gray(bank[:1]), LAPLACIAN)[0, 0].abs()
    flat = texture <= texture.median()
    return correlated(residual(lr, bank), NOISE)[:, :, flat].abs().flatten(1).median(1)[0] * 1.4826


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
    return correlated(gray(lr), LAPLACIAN).abs().flatten(1).median(1)[0]


@torch.no_grad()
def follow(
    hr: Tensor, banks: list[Tensor], make_lr: LRMaker, factor: str, seed: int, noise: int = 0
) -> dict[str, Any]:
    """How LR changes when its references rise in one factor, for contents hr (N, 3, H, W).

    banks: the `reductions` of each. The reference of level l is D(X', theta_l) of a scene X' that
    is another one for each level (as far as there are), so that only theta rises. rank: Spearman's
    correlation of level and measured value for each content; measured (N, L); detail (N, L): fine
    detail relative to D(X, theta_l).
    """
    N = len(hr)
    levels = torch.linspace(*FACTORS[factor][1:], LEVELS)
    result: dict[str, Any] = {"rank": [], "measured": [], "detail": []}
    for i, content in enumerate(tqdm(hr, desc=factor, unit="scene", leave=False)):
        theta = only(factor, levels, noise=seed << 32 | i)
        others = (i + 1 + torch.arange(LEVELS) % (N - 1)) % N
        lr_ref = list(degrade.degrade(hr[others], theta))
        same = content.repeat(LEVELS, 1, 1, 1)
        seeds = [((seed << 16 | noise) << 16 | i) << 16 | level for level in range(LEVELS)]
        lr = to_uint8(make_lr(same, lr_ref, theta, seeds)) / 255  # as in files
        measured = MEASURES[factor](lr, banks[i])
        rank = stats.spearmanr(levels, measured.cpu())[0] if measured.std() > 0 else 0.0
        detail = fine_detail(lr) / fine_detail(degrade.degrade(same, theta)).clamp(min=0.01)
        result["rank"].append(float(rank))
        result["measured"].append(measured.tolist())
        result["detail"].append(detail.tolist())
    return result


REPEATS = 2  # noises that each content is generated with


def table_factors(name: str, inputs: Inputs) -> Measure:
    """The truth, then RealDGen from each T with K = 1; T = 0 has no diffusion."""
    cfg, net, hr = inputs.cfg, inputs.net, inputs.photos.to(inputs.device)
    inputs.check_steps(*cfg.t_starts)

    def realdgen(t_start: int) -> LRMaker:
        start = cfg.start if t_start else "reconstruct"
        # These references are made by D, and have no remainder.
        bare = replace(inputs.sampler, soften=generate.NOT_SOFTENED, remainder=0.0)
        plain = replace(bare, start=start, candidates=1)
        sampler = replace(plain, t_start=t_start)
        return lambda hr, lr_ref, theta, seeds: generate.chosen(
            *generate.generate(net, hr, lr_ref, sampler, seeds)
        )

    def measure() -> tuple[dict[str, Any], str]:
        banks = [reductions(x) for x in hr]
        # The truth is what is looked for: it shows what the measures can see at all.
        kinds: dict[str, LRMaker] = {
            "truth": lambda hr, lr_ref, theta, seeds: degrade.degrade(hr, theta)
        }
        kinds |= {f"T={t}": realdgen(t) for t in cfg.t_starts}
        rows = []
        for factor in FACTORS:
            for kind, make_lr in kinds.items():
                drawn = kind != "truth" and (cfg.grain or kind != "T=0")
                repeats = range(REPEATS if drawn else 1)
                runs = [follow(hr, banks, make_lr, factor, cfg.seed, noise) for noise in repeats]
                values = {key: [v for run in runs for v in run[key]] for key in runs[0]}
                rows.append({"factor": factor, "lr": kind, **values})
        result = {"images": len(hr), "rows": rows}
        return result, text_of_factors(result)

    return measure


def text_of_factors(result: dict[str, Any]) -> str:
    """The table of factors, and what a reader must know."""
    lines = []
    for row in result["rows"]:
        rank, measured = np.array(row["rank"]), np.array(row["measured"]).mean(0)
        numbers = [rank.mean(), rank.min(), measured[0], measured[-1], np.median(row["detail"])]
        cells = [f"{number:.2f}" for number in numbers]
        lines.append([row["factor"], row["lr"], *cells, str(len(rank))])
    heads = ["factor", "LR", "rank correlation", "lowest", "at the lowest level",
             "at the highest", "fine detail", "n"]  # fmt: skip
    ranges = [f"{factor} {low:g}..{high:g}" for factor, (_, low, high) in FACTORS.items()]
    return f"""## Does generated LR follow its reference? {result["images"]} contents

{table_text(heads, lines, words=2)}
References are other scenes, degraded with one factor at {LEVELS} levels:
{", ".join(ranges)}
(LR pixels; levels of 255; amount; 100 - quality). Rank correlation (Spearman's) of the level and
the value measured in the LR, for each content and noise: mean and lowest; mean measured values
(JPEG: blockiness, 1 is none). Fine detail: median |Laplacian| relative to the true D(X, theta).
truth is D(X, theta) itself; T=0 is Rec_lr without diffusion, with grain unless --no-grain. All
without --remainder and --soften.
"""
