"""How near is generated LR to the LR that a real camera took of the same scene? Tables 2 and 6.

In: real pairs, which were never trained on. Out: distances of each method's LR to the real LR.
RealDGen is given the pair's own LR as reference, as in the paper, and another photo of the same
camera, as in real use, where nobody has the LR image that is to be generated.

    python benchmark.py --table 2 6 --pairs data/RealSR data/DRealSR
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import degrade
import diffusion
import generate
from bench.factors import WIDTHS, reductions
from bench.inputs import AS_PRINTED, SYNDIFF, Inputs, Measure
from bench.metrics import METRICS, SET_METRICS, metric_text, psnr
from bench.pairs import (
    Method,
    Pair,
    camera_of,
    evaluate,
    load_hr,
    load_lr,
    resized_by_pillow,
    table_text,
    with_other_scenes,
)
from common.images import to_uint8
from common.runtime import make_generator

# ---- methods: hr (B, 3, H, W), B references (3, h, w) or F_deg (D,), B seeds -> lr --------------

Synthesis = Callable[[Tensor, Sequence[Tensor], Sequence[int]], Tensor]  # lr (B, 3, H/4, W/4)


def bicubic(hr: Tensor, lr_ref: Sequence[Tensor], seeds: Sequence[int]) -> Tensor:
    """The HR images, reduced by Pillow."""
    return resized_by_pillow(hr, *(side // generate.SCALE for side in hr.shape[2:]))


def synthetic(recipe: str) -> Synthesis:
    """A recipe of degrade.py; each image has parameters and noise of its own."""

    def make(hr: Tensor, lr_ref: Sequence[Tensor], seeds: Sequence[int]) -> Tensor:
        theta = [
            degrade.sample_degradation(1, recipe, generate.SCALE, make_generator(seed))
            for seed in seeds
        ]
        return degrade.degrade(hr, degrade.Degradation.cat(theta))

    return make


def realdgen(net: diffusion.DecoupledDDPM, sampler: generate.Sampler) -> Synthesis:
    """RealDGen: the candidate that its filter keeps."""
    return lambda hr, lr_ref, seeds: generate.chosen(
        *generate.generate(net, hr, lr_ref, sampler, seeds)
    )


def without_diffusion(sampler: generate.Sampler) -> generate.Sampler:
    """The sampler with T = 0: the output of Rec_lr, with grain."""
    return replace(sampler, t_start=0, start="reconstruct")


def syntheses(net: diffusion.DecoupledDDPM, sampler: generate.Sampler) -> dict[str, Synthesis]:
    """All methods, by name; the first three do not look at the reference."""
    return {
        "bicubic": bicubic,
        "Real-ESRGAN": synthetic("realesrgan"),
        "BSRGAN": synthetic("bsrgan"),
        "RealDGen T=0": realdgen(net, without_diffusion(sampler)),
        "RealDGen": realdgen(net, sampler),
    }


STAGE_1 = AS_PRINTED.parents[1] / "extractors"
MAKE_PRINTED = f"python diffusion.py --preset as-printed --checkpoint {STAGE_1}/last.pt"
OTHER_WEIGHTS = {
    "SynDiff": (
        SYNDIFF,
        f"python diffusion.py --preset as-printed --without content degradation --out "
        f"{SYNDIFF.parent}",
    ),
    "RealDGen as printed": (
        AS_PRINTED,
        f"python extractors.py --preset as-printed --out {STAGE_1}` and `{MAKE_PRINTED} --out "
        f"{AS_PRINTED.parent}",
    ),
}  # with the commands that make them


def other_methods(inputs: Inputs, names: Collection[str] = OTHER_WEIGHTS) -> dict[str, Synthesis]:
    """Those of these methods whose weights exist."""
    syndiff = generate.Sampler(**generate.PRESETS["syndiff"])
    return {
        name: realdgen(inputs.other_weights[path], syndiff if path == SYNDIFF else inputs.printed)
        for name, (path, _) in OTHER_WEIGHTS.items()
        if name in names and path in inputs.other_weights
    }


def left_out_text(names: Collection[str] = OTHER_WEIGHTS) -> str:
    """A sentence for each of these methods whose weights are missing."""
    return "".join(
        f"{name} is left out: {path} is missing (make it by `{make}`).\n"
        for name, (path, make) in OTHER_WEIGHTS.items()
        if name in names and not path.is_file()
    )


def all_methods(inputs: Inputs) -> dict[str, Synthesis]:
    """All methods, with those of other weights, and RealDGen from the other T."""
    return syntheses(inputs.net, inputs.sampler) | other_methods(inputs) | {
        f"RealDGen T={t}": realdgen(inputs.net, replace(inputs.sampler, t_start=t))
        for t in inputs.t_starts
        if t > 0
    }  # fmt: skip


def on_pairs(method: Synthesis, seed: int, degradations: dict[int, Tensor] | None = None) -> Method:
    """A method as evaluate() takes it, with the references of the pairs.

    degradations: F_deg (D,) by index of the pair, which replaces its reference. Image i draws from
    (seed, i).
    """

    def make(hr: Tensor, batch: Sequence[Pair]) -> Tensor:
        lr_ref = [
            degradations[p.index] if degradations else load_lr(p.reference, p.full) for p in batch
        ]
        return method(hr, lr_ref, [seed << 32 | pair.index for pair in batch])

    return make


def lr_of(method: Method, pair: Pair, hr: Tensor, inputs: Inputs) -> Tensor:
    """LR (3, h, w) that a method makes of hr (3, 4h, 4w), of 8 bits as in a file, on the CPU."""
    return to_uint8(method(hr[None].to(inputs.device), [pair])[0]).cpu() / 255


def best_blurs(pairs: Sequence[Pair]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """LR made by the best Gaussian fitted to the real LR: of the whole set, and of each pair.

    Both are LR (3, h, w) by index of the pair. They show what blur alone can do. No method has to
    reach them, because no method sees the real LR.
    """
    of_pair, values = {}, []
    for pair in pairs:
        bank = to_uint8(reductions(load_hr(pair))) / 255  # (21, 3, h, w)
        lr = load_lr(pair.lr, pair.full).expand(len(bank), -1, -1, -1)
        values.append(psnr(bank, lr).clamp(max=100))
        of_pair[pair.index] = bank[values[-1].argmax()].clone()
    best = int(torch.stack(values).mean(0).argmax())
    width = WIDTHS[best : best + 1]
    of_set = {p.index: to_uint8(reductions(load_hr(p), width))[0] / 255 for p in pairs}
    return of_set, of_pair


def stored(lr: dict[int, Tensor]) -> Method:
    """A method that returns LR made earlier, by index of the pair."""
    return lambda hr, batch: torch.stack([lr[pair.index] for pair in batch]).to(hr.device)


@torch.no_grad()
def mean_degradations(
    pairs: Sequence[Pair], net: diffusion.DecoupledDDPM, average: int | None = None
) -> dict[int, Tensor]:
    """For each pair (by index) the mean F_deg (D,) of LR of other scenes of its camera, if any.

    pairs: of with_other_scenes(). average: the most images that are taken, from the reference on;
    None takes all.
    """

    @functools.cache
    def degradation(file: Path, full: bool) -> Tensor:
        return generate.degradation_of(net, load_lr(file, full))[0]

    return {
        pair.index: torch.stack([degradation(f, pair.full) for f in pair.others[:average]]).mean(0)
        for pair in pairs
        if pair.others
    }


# ---- Table 2 ------------------------------------------------------------------------------------

# The paper's RealDGen, by the release whose Test it was measured on.
PAPER_2 = {
    "RealSR": "PSNR 26.16, SSIM 0.794, LPIPS 0.223, DISTS 0.187, FID 107.24, CLIP-Score 0.824",
    "DRealSR": "PSNR 28.66, SSIM 0.836, LPIPS 0.150, DISTS 0.157, FID 30.01, CLIP-Score 0.858",
}
Rows = list[tuple[str, Method, Sequence[Pair]]]  # label, method, pairs


def rows_of_table_2(pairs: list[Pair], other: list[Pair], inputs: Inputs) -> Rows:
    """All methods, and the best Gaussians; other: those of the pairs that have other scenes."""
    seed, net = inputs.cfg.seed, inputs.net
    rec_lr = realdgen(net, replace(without_diffusion(inputs.sampler), grain=False))
    full = realdgen(net, inputs.sampler)
    means = mean_degradations(other, net)
    of_set, of_pair = best_blurs(pairs)
    rows: Rows = [
        ("bicubic", on_pairs(bicubic, seed), pairs),
        ("best Gaussian of the set*", stored(of_set), pairs),
        ("best Gaussian of each pair*", stored(of_pair), pairs),
        ("Real-ESRGAN", on_pairs(synthetic("realesrgan"), seed), pairs),
        ("BSRGAN", on_pairs(synthetic("bsrgan"), seed), pairs),
    ]
    more = other_methods(inputs)
    if syndiff := more.pop("SynDiff", None):
        rows += [("SynDiff", on_pairs(syndiff, seed), pairs)]
    for name, method in {"RealDGen T=0": rec_lr, "RealDGen": full, **more}.items():
        rows += [(f"{name}, own LR", on_pairs(method, seed), pairs)]
        if other:
            rows += [(f"{name}, other scene", on_pairs(method, seed), other)]
        if other and name not in more:  # whose F_deg is of other weights
            rows += [(f"{name}, all other scenes", on_pairs(method, seed, means), other)]
    return rows


def rows_of_table_6(pairs: list[Pair], other: list[Pair], inputs: Inputs) -> Rows:
    """RealDGen with and without the filter, with references of other scenes; SynDiff."""
    K = max(inputs.cfg.candidates, generate.CANDIDATES)
    methods = {
        name: realdgen(inputs.net, replace(inputs.sampler, candidates=candidates))
        for name, candidates in (("without filter", 1), (f"with filter, K={K}", K))
    }
    methods |= other_methods(inputs, ["SynDiff"])
    return [(name, on_pairs(method, inputs.cfg.seed), other) for name, method in methods.items()]


TITLES = {
    "2": "generated LR against the real LR",
    "6": "Table 6, generated LR with and without the filter, against the real LR",
}


def table_generated(name: str, inputs: Inputs) -> Measure:
    """Table 2 or Table 6, for each set of pairs."""
    cfg = inputs.cfg
    rows_of = rows_of_table_2 if name == "2" else rows_of_table_6
    inputs.check_steps()
    metrics = inputs.metrics
    train = inputs.released_train
    if name == "6":
        inputs.other_scenes()  # checks

    def measure() -> tuple[dict[str, Any], str]:
        values, text = {}, ""
        for folder, pairs in inputs.sets.items():
            other = with_other_scenes(pairs, cfg.seed, train[folder])
            values[folder] = [
                {"method": label} | evaluate(method, rows, metrics, inputs.device, cfg.batch_size)
                for label, method, rows in rows_of(pairs, other, inputs)
            ]
            text += f"## {folder}: {TITLES[name]}\n\n" + method_table(values[folder])
            if name == "2":
                text += notes_of_table_2(folder, other, inputs) + left_out_text()
            text += ("\n" + left_out_text(["SynDiff"]) if name == "6" else "") + "\n"
        return values, text

    return measure


def method_table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each method, with the number of pairs and images per second."""
    columns = [*METRICS, *SET_METRICS]
    lines = []
    for row in rows:
        rate = row["n"] / max(row["seconds"], 1e-9)
        speed = f"{rate:.3g}" if rate < 1000 else "-"  # of images made earlier it means nothing
        cells = [metric_text(row["mean"], metric) for metric in columns]
        lines.append([row["method"], *cells, str(row["n"]), speed])
    return table_text(["method", *columns, "n", "images/s"], lines)


def notes_of_table_2(folder: str, other: list[Pair], inputs: Inputs) -> str:
    """How to read Table 2."""
    (pairs, skipped), train = inputs.found[folder], inputs.released_train[folder]
    cameras = Counter(camera_of(pair.name) or "unnamed" for pair in pairs)
    release, of_train = pairs[0].release, f", of Train ({len(train)})" if train else ""
    paper = f"\nRealDGen (paper), on Test of {release}: {PAPER_2.get(release)}.\n\n"
    return f"""
bicubic is Pillow's, of the 8-bit HR image. T=0 is Rec_lr without diffusion and grain. n
is the number of pairs. The reference is the pair's own LR, another scene of the same
camera ({", ".join(f"{camera} {n}" for camera, n in cameras.items())}), or all
other scenes (mean F_deg){of_train}. * The best Gaussian
fitted to the real LR: what blur alone can do. FID is too large for few images, by an amount
that depends on n; KID is unbiased.
Pairs without another scene, missing in the rows of other scenes: {len(pairs) - len(other)}.
Pairs that can't be read, missing in all rows: {skipped}.
{paper if release in PAPER_2 else ""}"""
