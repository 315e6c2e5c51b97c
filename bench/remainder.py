"""The remainder: what real LR has and no kernel explains. Tables remainder and leak, ours.

In: real pairs. A kernel is fitted from HR to each LR image; the remainder is what is left. The
table remainder compares that of generated LR with that of real LR. The table leak tells how much
of the real remainder a small network can predict from the diffusion's condition: what it can
predict there, the diffusion does not learn to make.

    python benchmark.py --table remainder leak --pairs data/RealSR data/DRealSR
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import diffusion
from additions import local_detail, noise_by_detail
from bench.generated import lr_of, mean_degradations, on_pairs, realdgen, without_diffusion
from bench.inputs import Inputs, Measure
from bench.kernels import fitted_kernel, normal_equations, reduced_by
from bench.pairs import Pair, load_hr, load_lr, table_text
from common.images import to_uint8
from common.runtime import make_generator

EDGE = 4  # LR pixels at the edge that are left out
PROBE_STEPS = 200  # of the small networks
DETAIL = (0.0, 1.0, 2.5, 6.0, 14.0, 100.0)  # limits of local detail, levels
CYCLES = (0.05, 0.15, 0.25, 0.35, 0.5)  # limits of frequency, cycles per LR pixel


def fine_part(x: Tensor) -> Tensor:
    """Images (..., 3, h, w) without their means over 5 x 5 pixels."""
    return x - F.avg_pool2d(x, 5, 1, padding=2, count_include_pad=False)


def remainders(hr: Tensor, lr: Tensor) -> Tensor:
    """What the best kernel of each image leaves: hr (3, 4h, 4w), lr (K, 3, h, w) -> as lr."""
    AA, Ay = normal_equations(hr, lr)
    return torch.stack(
        [y - reduced_by(fitted_kernel([(AA, side)]), hr) for y, side in zip(lr, Ay, strict=True)]
    )


def cropped(pairs: Sequence[Pair]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """HR (3, 4h, 4w), LR (3, h, w) and remainders of pairs, cut to the smallest of their sizes."""
    h, w = (min(pair.size[k] for pair in pairs) for k in (0, 1))
    hr = [load_hr(pair)[:, : 4 * h, : 4 * w] for pair in pairs]
    lr = [load_lr(pair.lr, pair.full)[:, :h, :w] for pair in pairs]
    return hr, lr, [remainders(x, y[None])[0] for x, y in zip(hr, lr, strict=True)]


def measures(remainder: Tensor, lr: Tensor) -> dict[str, list[float]]:
    """Numbers of a remainder (3, h, w), in levels of 255, of the LR image lr (3, h, w).

    detail: std of its fine part where the local detail is within DETAIL, NaN under 50 pixels;
    spectrum: amplitude within CYCLES; channels: correlation of its fine parts; std: of all of it.
    """
    inner = (..., slice(EDGE, -EDGE), slice(EDGE, -EDGE))
    levels, detail = 255 * remainder, 255 * local_detail(lr[None])[0][inner][0]
    fine, all_of_it = fine_part(levels)[inner], levels[inner]
    places = [(detail >= a) & (detail < b) for a, b in zip(DETAIL, DETAIL[1:], strict=False)]
    by_detail = [fine[:, p].std().item() if p.sum() > 50 else np.nan for p in places]
    h, w = all_of_it.shape[1:]
    window = torch.hann_window(h)[:, None] * torch.hann_window(w)
    power = torch.fft.fft2(all_of_it * window).abs().square().mean(0) / window.square().sum()
    radius = torch.fft.fftfreq(h)[:, None].hypot(torch.fft.fftfreq(w))
    rings = [(radius >= a) & (radius < b) for a, b in zip(CYCLES, CYCLES[1:], strict=False)]
    spectrum = [power[ring].mean().sqrt().item() for ring in rings]
    red, green, blue = fine.flatten(1)
    channels = [torch.corrcoef(torch.stack(two))[0, 1] for two in ((red, green), (green, blue))]
    return {
        "detail": by_detail,
        "spectrum": spectrum,
        "channels": [float(sum(channels) / 2)],
        "std": [all_of_it.std().item()],
    }


def histogram_kld(real: Tensor, other: Tensor) -> float:
    """Kullback-Leibler divergence of the histograms of two remainders, in bins of one level."""
    p, q = ((255 * x).flatten().histc(129, -64.5, 64.5) + 0.5 for x in (real, other))
    p, q = p / p.sum(), q / q.sum()
    return float((p * (p / q).log()).sum())


def told_apart(real: Tensor, other: Tensor, seed: int) -> float:
    """How often a small network tells crops of real LR from those of other LR: .5 is by chance.

    real, other (N, 3, h, w): LR of the same scenes. It learns from every other image, in crops of
    32 x 32 pixels, and is tested on the rest.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 24), (24, 24), (24, 48)):
        layers += [nn.Conv2d(c_in, c_out, 3, 2 if c_in > 3 else 1, 1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 1))
    opt, draw = torch.optim.Adam(net.parameters(), 3e-3), make_generator(seed)
    x = torch.stack([real, other])  # (2, N, 3, h, w)
    fine = 8 * fine_part(x.flatten(0, 1)).view_as(x)
    label = torch.tensor([1.0, 0.0]).repeat_interleave(16)

    def crops(images: Tensor) -> Tensor:  # the same places of real and other LR
        n, top, left = (
            torch.randint(size, (16,), generator=draw).tolist()
            for size in (images.shape[1], images.shape[3] - 31, images.shape[4] - 31)
        )
        places = zip(n, top, left, strict=True)
        return torch.stack([images[:, i, :, y : y + 32, x : x + 32] for i, y, x in places], 1)

    for _ in range(PROBE_STEPS):
        logits = net(crops(fine[:, ::2]).flatten(0, 1))[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, label)
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        answers = [net(crops(fine[:, 1::2]).flatten(0, 1))[:, 0] > 0 for _ in range(40)]
    return float(torch.stack(answers).eq(label > 0).float().mean())


@torch.no_grad()
def images_of(pairs: Sequence[Pair], inputs: Inputs) -> dict[str, tuple[Tensor, Tensor]]:
    """LR images and their remainders, (N, 3, h, w) both, by the kind of LR."""
    seed, net, sampler = inputs.cfg.seed, inputs.net, inputs.sampler
    hr, real, left = cropped(pairs)
    means = mean_degradations(pairs, net, sampler.average)
    methods = {
        "RealDGen T=0": on_pairs(realdgen(net, without_diffusion(sampler)), seed, means),
        "RealDGen": on_pairs(realdgen(net, sampler), seed, means),
        "RealDGen, another seed": on_pairs(realdgen(net, sampler), seed + 1, means),
    }
    kinds: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for i, pair in enumerate(tqdm(pairs, unit="pair", leave=False)):
        linear = real[i] - left[i]
        draw = make_generator(seed, pair.index)
        white = left[i].std() * torch.randn(linear.shape, generator=draw)
        lr = {
            "real LR": real[i],
            "kernel": linear,
            "kernel, white noise": linear + white,
            "kernel, white noise by detail": noise_by_detail(linear[None], draw)[0],
            "kernel, remainder of another scene": linear + left[(i + 1) % len(pairs)],
        }
        lr |= {name: lr_of(method, pair, hr[i], inputs) for name, method in methods.items()}
        rounded = to_uint8(torch.stack([*lr.values()])) / 255
        for name, *both in zip(lr, rounded, remainders(hr[i], rounded), strict=True):
            kinds.setdefault(name, []).append((both[0], both[1]))
    return {
        name: (torch.stack([a for a, _ in both]), torch.stack([b for _, b in both]))
        for name, both in kinds.items()
    }


def measure_remainder(pairs: Sequence[Pair], inputs: Inputs) -> dict[str, Any]:
    """The rows of the table remainder, and how much LR of two seeds differs, in levels."""
    kinds = images_of(pairs, inputs)
    real, real_left = kinds["real LR"]
    rows = {}
    for name, (lr, left) in kinds.items():
        each = [measures(r, x) for r, x in zip(left, lr, strict=True)]
        row: dict[str, Any] = {
            key: np.nanmean([numbers[key] for numbers in each], axis=0).tolist() for key in each[0]
        }
        row["kld"] = histogram_kld(real_left, left)
        row["told apart"] = told_apart(real, lr, inputs.cfg.seed)
        rows[name] = row
    two = [kinds[name][0] for name in ("RealDGen", "RealDGen, another seed")]
    seeds = float(255 * (two[0] - two[1]).square().mean().sqrt())
    return {"rows": rows, "n": len(pairs), "between seeds": seeds}


def text_of_remainder(folder: str, found: dict[str, Any]) -> str:
    """The table of one set."""
    heads = [f"detail {a:g}-{b:g}" for a, b in zip(DETAIL, DETAIL[1:], strict=False)]
    heads += [f"{(a + b) / 2:.2g} cycles" for a, b in zip(CYCLES, CYCLES[1:], strict=False)]
    lines = []
    for name, row in found["rows"].items():
        numbers = (*row["detail"], *row["spectrum"])
        cells = [f"{v:.1f}".replace("nan", "-") for v in numbers]
        cells += [f"{row['channels'][0]:.2f}", f"{row['std'][0]:.1f}"]
        lines.append([name, *cells, f"{row['kld']:.3f}", f"{row['told apart']:.0%}"])
    return f"""## {folder}: what no kernel explains, in levels of 255

{table_text(["LR", *heads, "channels", "std", "KLD", "told apart"], lines)}
{found["n"]} pairs. A kernel is fitted to each LR image; the rest is its remainder. First columns:
std of its fine part where the LR image has so much detail (std over 5 x 5 pixels, levels), and its
amplitude by frequency (cycles per LR pixel). Channels: correlation of its fine part. KLD: of its
histogram, from the real one. Told apart: how often a small network tells 32 x 32 crops of this LR
from real LR (50% is chance). LR of two seeds differs by {found["between seeds"]:.1f} levels.

"""


# ---- the table leak -----------------------------------------------------------------------------


def predicted_share(condition: Tensor, linear: Tensor, remainder: Tensor, seed: int) -> float:
    """R^2 of a small network that predicts remainders (N, 3, h, w) from conditions (N, C, h, w).

    It also sees the rest of the LR, `linear` (N, 3, h, w): without it, it could not find the
    remainder even in the LR itself. It learns from every other image and is tested on the others.
    1: the condition shows the remainder; 0: nothing of it.
    """
    torch.manual_seed(seed)
    x = torch.cat([condition, fine_part(linear)], dim=1)
    x = x - x.mean((0, 2, 3), keepdim=True)
    x = x / x.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
    y = remainder / remainder.std()
    layers: list[nn.Module] = []
    for c_in, c_out, taps in ((x.shape[1], 32, 5), (32, 32, 3)):
        layers += [nn.Conv2d(c_in, c_out, taps, padding=taps // 2), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Conv2d(32, 3, 3, padding=1))
    side, draw = min(48, *x.shape[2:]), make_generator(seed)
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(PROBE_STEPS):
        opt.param_groups[0]["lr"] = 3e-3 * min(1, 2 * (1 - step / PROBE_STEPS))
        i = 2 * torch.randint((len(x) + 1) // 2, (8,), generator=draw)
        top, left = (int(torch.randint(n - side + 1, (), generator=draw)) for n in x.shape[2:])
        place = (i, slice(None), slice(top, top + side), slice(left, left + side))
        loss = F.mse_loss(net(x[place]), y[place])
        opt.zero_grad()
        loss.backward()
        opt.step()
    inner = (slice(1, None, 2), slice(None), slice(EDGE, -EDGE), slice(EDGE, -EDGE))
    with torch.no_grad():
        wrong = torch.cat([net(one[None]) for one in x])[inner] - y[inner]
    return 1 - float(wrong.square().sum() / y[inner].square().sum())


@torch.no_grad()
def conditions(
    net: diffusion.DecoupledDDPM, hr: Tensor, lr: Tensor, degradation: Tensor
) -> dict[str, Tensor]:
    """What M may see (1, C, h, w) of a pair hr (1, 3, 4h, 4w), lr (1, 3, h, w)."""
    content = diffusion.real_example(net, lr)[2]
    generating = diffusion.content_and_lr_hat(net, hr, degradation)
    return {
        "content of HR (generation)": net.seen_by_m(*generating),
        "content of real LR (training)": net.seen_by_m(content, lr),
        "the same, with fine detail": torch.cat([content, lr], dim=1),
    }


def measure_leak(pairs: Sequence[Pair], inputs: Inputs) -> dict[str, Any]:
    """R^2 of the remainder, all of it and its fine part, for each kind of condition."""
    means = mean_degradations(pairs, inputs.net, inputs.sampler.average)
    hr, lr, left = cropped(pairs)
    read: dict[str, list[Tensor]] = {}
    for i, pair in enumerate(tqdm(pairs, unit="pair", leave=False)):
        batch = (x[None].to(inputs.device) for x in (hr[i], lr[i], means[pair.index]))
        for name, x in conditions(inputs.net, *batch).items():
            read.setdefault(name, []).append(x.cpu())
    y = torch.stack(left)
    linear = torch.stack(lr) - y
    shown = {"nothing": linear[:, :0]} | {name: torch.cat(x) for name, x in read.items()}
    return {
        name: [predicted_share(x, linear, of, inputs.cfg.seed) for of in (y, fine_part(y))]
        for name, x in shown.items()
    }


def text_of_leak(folder: str, found: dict[str, Any]) -> str:
    """The table of one set."""
    rows = [[name, *(f"{v:.2f}" for v in values)] for name, values in found.items()]
    return f"""## {folder}: how much of the real remainder does the condition show?

{table_text(["what M sees", "R^2, all of it", "R^2, its fine part"], rows)}
R^2 of a small network that also sees what a kernel explains. It learns from every other pair and
is tested on the rest. What nothing, or the content of HR, shows is determined by the scene. More
than that is the remainder itself: a diffusion trained so copies it, and does not learn to make it.

"""


TABLES: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., str]]] = {
    "remainder": (measure_remainder, text_of_remainder),
    "leak": (measure_leak, text_of_leak),
}


def table_remainder(name: str, inputs: Inputs) -> Measure:
    """The table remainder or leak, of each set."""
    cfg, (measure_set, text_of) = inputs.cfg, TABLES[name]
    inputs.check_steps(cfg.t_start)
    sets = inputs.other_scenes(cfg.images)

    def measure() -> tuple[dict[str, Any], str]:
        values = {folder: measure_set(pairs, inputs) for folder, pairs in sets.items()}
        return values, "".join(text_of(folder, found) for folder, found in values.items())

    return measure
