"""Does the content of the reference show in generated LR? Not in the paper.

In: aligned pairs, which were never trained on, and the generator. Out: the table leakage: the share
of the reference's detail in generated LR, and how much outputs of one content differ.

    python benchmark.py --table leakage --pairs data/RealSR data/DRealSR --images 12
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import generate
from bench.generated import Synthesis, syntheses
from bench.inputs import Inputs, Measure, middle
from bench.pairs import camera_of, load_hr, load_lr, table_text
from common import require
from common.photos import to_uint8
from common.runtime import make_generator

# ---- scenes -------------------------------------------------------------------------------------

LEAST = 4  # scenes of a camera: two for each half


@dataclass(frozen=True)
class Scene:
    """A real LR photo, its middle, and the HR photo of that middle."""

    camera: str
    half: int  # 0 or 1: every other scene of a camera
    lr: Tensor  # (3, h, w) in [0, 1]
    middle: Tensor  # (3, side, side)
    hr: Tensor  # (3, 4 side, 4 side)


def scenes_of(folder: str, inputs: Inputs) -> tuple[list[Scene], list[str]]:
    """The scenes of a set, and which of its cameras have too few and are left out."""
    side, count = inputs.cfg.crop, Counter[str]()
    scenes: list[Scene] = []
    for pair in inputs.sets[folder]:
        camera, lr = camera_of(pair.name), load_lr(pair.lr, pair.full)
        if min(pair.size) < side:
            print(f"skipped: {folder} {pair.name} (its LR is under {side} x {side} pixels)")
            continue
        # The middle of HR at the place of the middle of LR, wherever rounding puts that.
        top, left = (generate.SCALE * ((n - side) // 2) for n in pair.size)
        hr = load_hr(pair)[
            :, top : top + generate.SCALE * side, left : left + generate.SCALE * side
        ]
        scenes.append(Scene(camera, count[camera] % 2, lr, middle(lr, side), hr))
        count[camera] += 1
    left_out = [f"{folder} {camera or 'unnamed'} ({n})" for camera, n in count.items() if n < LEAST]
    return [scene for scene in scenes if count[scene.camera] >= LEAST], left_out


def contents_of(scenes: Sequence[Scene], images: int, seed: int) -> list[int]:
    """Numbers of at most so many scenes, drawn evenly from each half of each camera."""
    count: Counter[tuple[str, int]] = Counter()
    ranked = []
    order = torch.randperm(len(scenes), generator=make_generator(seed)).tolist()
    for place, i in enumerate(order):
        key = (scenes[i].camera, scenes[i].half)
        ranked.append((count[key], place, i))
        count[key] += 1
    return [i for _, _, i in sorted(ranked)[:images]]


@torch.no_grad()
def lr_from_each(
    method: Synthesis,
    content: Scene,
    lr_ref: Sequence[Tensor],
    seeds: Sequence[int],
    device: torch.device,
) -> Tensor:
    """LR (n, 3, side, side) of a content for each reference and seed, in 8 bits as in files."""
    hr = content.hr.to(device).repeat(len(lr_ref), 1, 1, 1)
    return to_uint8(method(hr, lr_ref, seeds)).cpu() / 255


def high_pass(x: Tensor) -> Tensor:
    """x (B, C, h, w) minus its mean over 5 x 5 pixels."""
    return x - F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 5, 1)


# ---- leakage and diversity ----------------------------------------------------------------------

BLENDED = 0.01  # share of the reference in outputs where it must be found
SAMPLES = 8  # references of each camera, and noises


def leak(made: Sequence[Tensor], lr_ref: Sequence[Tensor]) -> tuple[float, float]:
    """Share of the references' detail in what was made of them, and how sure it is not 0.

    For each camera: made (contents, n, D) with n references (n, D). Of both the mean over the
    references is taken off, so that what remains of an output depends on its reference; the share
    is its regression on that reference. z: by how many standard deviations this is more than with
    the references permuted (of all permutations, the same for all contents; exact, not sampled).
    """
    along = power = total = variance = 0.0
    for out, ref in zip(made, lr_ref, strict=True):
        rest, detail = out - out.mean(1, keepdim=True), ref - ref.mean(0)
        M = rest.sum(0) @ detail.T  # (n, n); rows and columns have the mean 0
        along += M.trace().item()
        power += len(out) * detail.square().sum().item()
        total += M.square().sum().item()
        variance += M.square().sum().item() / (len(ref) - 1)
    if total <= 1e-18 * power * power:  # nothing depends on the reference
        return 0.0, 0.0
    return along / power, along / math.sqrt(variance)


def leakage(scenes: Sequence[Scene], inputs: Inputs) -> dict[str, dict[str, float]]:
    """For each method what leaks, and how much outputs of one content differ.

    References are of one half of each camera's scenes, contents of the other.
    """
    seed = inputs.cfg.seed
    others = [scene for scene in scenes if scene.half == 1]
    contents = [others[i] for i in contents_of(others, max(2, inputs.cfg.images // 4), seed)]
    lr_ref: dict[str, list[Tensor]] = {}
    for scene in scenes:
        if scene.half == 0 and len(lr_ref.setdefault(scene.camera, [])) < SAMPLES:
            lr_ref[scene.camera].append(scene.middle)
    references = [torch.stack(same) for same in lr_ref.values()]
    rows: dict[str, dict[str, float]] = {}

    def std(lr: Tensor) -> float:  # of values over the samples (n, 3, h, w), levels of 255
        return (255 * lr.double()).var(0).mean().sqrt().item()

    def add(name: str, outputs: Sequence[Tensor], noises: Sequence[float]) -> None:
        views = [[high_pass(x).flatten(1) for x in made] for made in outputs]
        share, z = leak([torch.stack(v) for v in views],
                        [high_pass(ref).flatten(1) for ref in references])  # fmt: skip
        spread = float(np.mean([std(x) for made in outputs for x in made]))
        rows[name] = {
            "share": share,
            "z": z,
            "references": spread,
            "noises": float(np.mean(noises)),
        }

    for name, method in syntheses(inputs.net, inputs.sampler).items():
        outputs, noises = [], []
        for camera, ref in enumerate(references):
            made = []
            for i, content in enumerate(tqdm(contents, desc=name, unit="content", leave=False)):
                draw = ((seed << 16 | i) << 8 | camera) << 16
                given = (method, content)
                made.append(lr_from_each(*given, list(ref), [draw] * len(ref), inputs.device))
                seeds = [draw | n for n in range(SAMPLES)]
                noises.append(std(lr_from_each(*given, [ref[0]] * SAMPLES, seeds, inputs.device)))
            outputs.append(torch.stack(made))  # (contents, n, 3, side, side)
        add(name, outputs, noises)
    blended = [
        to_uint8(torch.lerp(made, ref.expand_as(made), BLENDED)) / 255
        for made, ref in zip(outputs, references, strict=True)
    ]
    add(f"{name}, {BLENDED:.0%} of the reference blended in", blended, noises)
    return rows


# ---- the table ----------------------------------------------------------------------------------


def table_leakage(name: str, inputs: Inputs) -> Measure:
    """leakage, for each set of pairs with enough scenes."""
    inputs.check_steps(inputs.cfg.t_start)
    sets, left_out = {}, []
    for folder in inputs.sets:
        scenes, few = scenes_of(folder, inputs)
        left_out += few
        if scenes:
            sets[folder] = scenes
    require(bool(sets), f"--pairs: leakage needs a set with a camera of {LEAST} scenes.")

    def measure() -> tuple[dict[str, Any], str]:
        values = {folder: leakage(scenes, inputs) for folder, scenes in sets.items()}
        few = f"Cameras with under {LEAST} scenes, left out: {', '.join(left_out) or 'none'}."
        return values, f"{text_of_leakage(values)}{few}\n"

    return measure


def text_of_leakage(values: dict[str, Any]) -> str:
    """The table of leakage and diversity, and what a reader must know."""
    heads = ["set", "method", "share of the reference's detail", "z", "std over references",
             "std over noises"]  # fmt: skip
    lines = [
        [folder, name, f"{row['share']:z.2%}", f"{row['z']:z.1f}", f"{row['references']:.2f}",
         f"{row['noises']:.2f}"]
        for folder, rows in values.items()
        for name, row in rows.items()
    ]  # fmt: skip
    return f"""## Does the reference's content show in generated LR? How much do outputs differ?

{table_text(heads, lines, words=2)}
Outputs of one content with up to {SAMPLES} references of one camera, minus their mean, regressed on
the reference, minus the mean reference (both without what is smooth over 5 x 5 pixels). z: against
permuted references; beyond 3 it is no accident. In the last row of each set {BLENDED:.0%} of the
reference is blended in, which must be found. Standard deviations (levels of 255) of outputs of one
content over the references of a camera with one noise, and over {SAMPLES} noises with one reference
(Real-ESRGAN, BSRGAN: parameters and noise).
"""
