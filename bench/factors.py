"""Does generated LR follow its reference, one factor at a time? Not in the paper.

In: HR photos and the generator; no pairs. Out: the table factors.

    python benchmark.py --table factors --hr data/hr
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from tqdm import tqdm

import additions
import degrade
import diffusion
import generate
from bench.inputs import AS_PRINTED, Inputs, Measure
from bench.pairs import table_text
from common.images import to_uint8
from common.runtime import make_generator

# ---- references with one factor -----------------------------------------------------------------

LEVELS = 8
# For each factor the operations of D, the lowest and the highest level.
FACTORS: dict[str, tuple[tuple[str, ...], float, float]] = {
    "blur": (("blur 1", "resize 3"), 0.4, 1.6),  # width of a Gaussian, LR pixels
    "noise": (("resize 3", "gaussian 2"), 0.0, 20.0),  # std, levels of 255
    "sharpen": (("resize 3", "blur 3"), 0.0, 1.5),  # amount
    "jpeg": (("resize 3", "jpeg 2"), 5.0, 70.0),  # 100 - quality
}


def only(factor: str, levels: Tensor, noise: int = 0) -> degrade.Degradation:
    """Parameters of D for the reduction and one factor, at these levels (L,)."""
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


# ---- measures of LR, by comparison with its HR image --------------------------------------------


def gray(x: Tensor) -> Tensor:
    """Gray in levels of 255, (B, 1, H, W) in float64, of RGB (B, 3, H, W) in [0, 1]."""
    weights = x.new_tensor(additions.YCC[0])
    return 255 * torch.einsum("c,bchw->bhw", weights, x)[:, None].double()


def correlated(x: Tensor, kernel: Sequence[Sequence[float]]) -> Tensor:
    """Correlate every channel of x (B, C, h, w) with a kernel, without padding."""
    weight = x.new_tensor(kernel)[None, None]
    return F.conv2d(x.flatten(0, 1)[:, None], weight).unflatten(0, x.shape[:2])[:, :, 0]


LAPLACIAN = ((0, 1, 0), (1, -4, 1), (0, 1, 0))
# It removes what is smooth, and keeps the std of white noise.
NOISE = ((1 / 6, -1 / 3, 1 / 6), (-1 / 3, 2 / 3, -1 / 3), (1 / 6, -1 / 3, 1 / 6))
WIDTHS = torch.linspace(0, 2, 21)  # of the Gaussians in a bank, LR pixels


def reductions(hr: Tensor, widths: Tensor = WIDTHS) -> Tensor:
    """The bank of an HR image (3, H, W): blurred by each width, reduced: (21, 3, H/4, W/4).

    One after the other, since a whole photo may have 20 million pixels.
    """
    return torch.cat([degrade.degrade(hr[None], only("blur", width[None])) for width in widths])


def blur_of(lr: Tensor, bank: Tensor) -> Tensor:
    """Width (B,) in LR pixels of the Gaussian that fits lr (B, 3, h, w) best."""
    centred = [gray(x) - gray(x).mean((2, 3), keepdim=True) for x in (lr, bank)]
    error = torch.cdist(centred[0].flatten(1), centred[1].flatten(1)).square()  # (B, 21)
    best = error.argmin(1).clamp(1, len(WIDTHS) - 2)[:, None]
    # The minimum of a parabola through the smallest error and its two neighbours.
    left, centre, right = (error.gather(1, best + i)[:, 0] for i in (-1, 0, 1))
    vertex = ((left - right) / (2 * (left - 2 * centre + right)).clamp(min=1e-12)).clamp(-1, 1)
    return (best[:, 0] + vertex) * (WIDTHS[1] - WIDTHS[0])


def sharpening_of(lr: Tensor, bank: Tensor) -> Tensor:
    """Amount (B,) of unsharp masking that fits lr (B, 3, h, w) best; negative if lr is softer."""
    taps = (-torch.arange(-4, 5).square() / 2).exp()  # a Gaussian of 1 LR pixel, as in only()
    kernel = (taps[:, None] * taps / taps.sum().square()).to(bank)
    detail = gray(bank[:1] - degrade.blur(bank[:1], F.pad(kernel, (8, 8, 8, 8))[None]))
    return ((gray(lr) - gray(bank[:1])) * detail).mean((1, 2, 3)) / detail.square().mean()


def residual(lr: Tensor, bank: Tensor) -> Tensor:
    """lr (B, 3, h, w) minus the best linear filter of the HR image, in levels of 255.

    The filter is a combination of a few Gaussians, fitted to each channel.
    """
    columns = [bank[::5].flatten(2), torch.ones_like(bank[:1]).flatten(2)]
    A = 255 * torch.cat(columns).permute(1, 2, 0).double()  # (3, hw, 6)
    y = 255 * lr.flatten(2).permute(1, 2, 0).double()  # (3, hw, B)
    return (y - A @ torch.linalg.lstsq(A, y).solution).permute(2, 0, 1).view(lr.shape)


def noise_of(lr: Tensor, bank: Tensor) -> Tensor:
    """Robust std (B,) of the residual where the HR image is flat, in levels of 255."""
    texture = correlated(gray(bank[:1]), LAPLACIAN)[0, 0].abs()
    flat = texture <= texture.median()
    return correlated(residual(lr, bank), NOISE)[:, :, flat].abs().flatten(1).median(1)[0] * 1.4826


def blockiness(x: Tensor) -> Tensor:
    """Mean step across the borders of 8 x 8 blocks, divided by the mean step elsewhere: (B,)."""
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


# ---- the table factors --------------------------------------------------------------------------

REPEATS = 2  # for each content, if LR has random noise
# hr (L, 3, H, W), references, their parameters, seeds -> lr (L, 3, H/4, W/4)
LRMaker = Callable[[Tensor, list[Tensor], degrade.Degradation, list[int]], Tensor]


@torch.no_grad()
def follow(
    hr: Tensor, banks: list[Tensor], make_lr: LRMaker, factor: str, seed: int, noise: int = 0
) -> dict[str, Any]:
    """How LR changes when one factor rises in its references, for contents hr (N, 3, H, W).

    banks: the `reductions` of each content. The reference of level l is D(X', theta_l). Each level
    has another scene X', as far as there are enough, so that only theta rises. Returns "rank",
    Spearman's correlation of level and measured value for each content; "measured" (N, L); and
    "detail" (N, L), the fine detail relative to D(X, theta_l).
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
        lr = to_uint8(make_lr(same, lr_ref, theta, seeds)) / 255  # 8 bits, as in a file
        measured = MEASURES[factor](lr, banks[i])
        rank = stats.spearmanr(levels, measured.cpu())[0] if measured.std() > 0 else 0.0
        detail = fine_detail(lr) / fine_detail(degrade.degrade(same, theta)).clamp(min=0.01)
        result["rank"].append(float(rank))
        result["measured"].append(measured.tolist())
        result["detail"].append(detail.tolist())
    return result


def table_factors(name: str, inputs: Inputs) -> Measure:
    """D(X, theta) itself, then RealDGen from each T with K = 1; T = 0 has no diffusion."""
    cfg, hr = inputs.cfg, inputs.photos.to(inputs.device)
    inputs.check_steps(*inputs.t_starts)

    def generating(net: diffusion.DecoupledDDPM, sampler: generate.Sampler) -> LRMaker:
        # D makes these references, so they have no unexplained detail, for which LR is softened.
        bare = copy.copy(net)
        bare.calibration = replace(net.calibration, soften=additions.Calibration.soften)
        sampler = replace(sampler, candidates=1)
        return lambda hr, lr_ref, theta, seeds: generate.chosen(
            *generate.generate(bare, hr, lr_ref, sampler, seeds)
        )

    def starting(t_start: int) -> generate.Sampler:
        start = inputs.sampler.start if t_start else "reconstruct"
        return replace(inputs.sampler, start=start, t_start=t_start)

    def measure() -> tuple[dict[str, Any], str]:
        banks = [reductions(x) for x in hr]
        # D(X, theta) follows its reference exactly. Its row shows how well the measures work.
        kinds: dict[str, LRMaker] = {
            "truth": lambda hr, lr_ref, theta, seeds: degrade.degrade(hr, theta)
        }
        kinds |= {f"T={t}": generating(inputs.net, starting(t)) for t in inputs.t_starts}
        if AS_PRINTED in inputs.other_weights:
            kinds["as printed"] = generating(inputs.other_weights[AS_PRINTED], inputs.printed)
        rows = []
        for factor in FACTORS:
            for kind, make_lr in kinds.items():
                noisy = kind != "truth" and (inputs.sampler.grain or kind != "T=0")
                repeats = range(REPEATS if noisy else 1)
                runs = [follow(hr, banks, make_lr, factor, cfg.seed, noise) for noise in repeats]
                values = {key: [v for run in runs for v in run[key]] for key in runs[0]}
                rows.append({"factor": factor, "lr": kind, **values})
        result = {"images": len(hr), "rows": rows}
        return result, text_of_factors(result)

    return measure


def text_of_factors(result: dict[str, Any]) -> str:
    """The table of factors, and how to read it."""
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
(LR pixels; levels of 255; amount; 100 - quality). Rank correlation is Spearman's, of the level and
the value measured in LR. It is computed for each content and noise; the table has the mean and the
lowest. The next two columns are means of the measured values; of jpeg that is blockiness, 1 for
none. Fine detail is the median |Laplacian|, relative to D(X, theta). The row truth is D(X, theta)
itself. T=0 is Rec_lr without diffusion, with grain unless --no-grain is given. No row is
softened. The row as printed has weights of {AS_PRINTED}, and the sampler of
--preset paper; without this file there is no such row.
"""
