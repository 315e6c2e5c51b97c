"""Does the content of the reference show in generated LR? Not in the paper.

In: aligned pairs, which were never trained on, and the generator. Out: the table leakage. It has
the share of the reference's detail in generated LR, and how much LR images of one content differ.

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
from common.images import to_uint8
from common.runtime import make_generator

# ---- scenes -------------------------------------------------------------------------------------

LEAST = 4  # scenes of a camera: two for each half


@dataclass(frozen=True)
class Scene:
    """The middle of a real LR photo, and the same place of its HR photo."""

    camera: str
    half: int  # 0 or 1: every other scene of a camera
    lr: Tensor  # (3, side, side) in [0, 1]
    hr: Tensor  # (3, 4 side, 4 side)


def scenes_of(folder: str, inputs: Inputs) -> tuple[list[Scene], list[str]]:
    """The scenes of a set, and its cameras with too few scenes, which are left out."""
    side, count = inputs.cfg.crop, Counter[str]()
    scenes: list[Scene] = []
    for pair in inputs.sets[folder]:
        camera, lr = camera_of(pair.name), load_lr(pair.lr, pair.full)
        if min(pair.size) < side:
            print(f"skipped: {folder} {pair.name} (its LR is under {side} x {side} pixels)")
            continue
        # Of HR not the middle, which rounding might shift, but 4 times the place in LR.
        top, left = (generate.SCALE * ((n - side) // 2) for n in pair.size)
        bottom, right = (start + generate.SCALE * side for start in (top, left))
        hr = load_hr(pair)[:, top:bottom, left:right]
        scenes.append(Scene(camera, count[camera] % 2, middle(lr, side), hr))
        count[camera] += 1
    left_out = [f"{folder} {camera or 'unnamed'} ({n})" for camera, n in count.items() if n < LEAST]
    return [scene for scene in scenes if count[scene.camera] >= LEAST], left_out


def contents_of(scenes: Sequence[Scene], images: int, seed: int) -> list[int]:
    """Numbers of random scenes, at most `images`, evenly from each half of each camera."""
    count: Counter[tuple[str, int]] = Counter()
    ranked = []
    order = torch.randperm(len(scenes), generator=make_generator(seed)).tolist()
    for place, i in enumerate(order):
        key = (scenes[i].camera, scenes[i].half)
        ranked.append((count[key], place, i))
        count[key] += 1
    return [i for _, _, i in sorted(ranked)[:images]]


def high_pass(x: Tensor) -> Tensor:
    """x (B, C, h, w) minus its mean over 5 x 5 pixels."""
    return x - F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 5, 1)


# ---- leakage and diversity ----------------------------------------------------------------------

BLENDED = 0.01  # share of the reference that is blended in, to see whether it is found
SAMPLES = 8  # references of each camera; also noises


def leak(lr: Sequence[Tensor], lr_ref: Sequence[Tensor]) -> tuple[float, float]:
    """Share of the references' detail in LR images, and how sure it is not 0.

    For each camera: lr (contents, n, D), made with n references (n, D). The mean over the
    references is subtracted from both. What then remains of an LR image depends on its reference,
    and the share is its regression on what remains of that reference. z: by how many standard
    deviations the share is larger than with permuted references. The deviation is that of all
    permutations, the same for all contents; it is exact, not sampled.
    """
    along = power = total = variance = 0.0
    for images, ref in zip(lr, lr_ref, strict=True):
        rest, detail = images - images.mean(1, keepdim=True), ref - ref.mean(0)
        M = rest.sum(0) @ detail.T  # (n, n); rows and columns have the mean 0
        along += M.trace().item()
        power += len(images) * detail.square().sum().item()
        total += M.square().sum().item()
        variance += M.square().sum().item() / (len(ref) - 1)
    if total <= 1e-18 * power * power:  # nothing depends on the reference
        return 0.0, 0.0
    return along / power, along / math.sqrt(variance)


@torch.no_grad()
def leakage(scenes: Sequence[Scene], inputs: Inputs) -> dict[str, dict[str, float]]:
    """For each method what leaks, and how much LR images of one content differ.

    References are of one half of each camera's scenes, contents of the other half.
    """
    seed = inputs.cfg.seed
    others = [scene for scene in scenes if scene.half == 1]
    contents = [others[i] for i in contents_of(others, max(2, inputs.cfg.images // 4), seed)]
    lr_ref: dict[str, list[Tensor]] = {}
    for scene in scenes:
        if scene.half == 0 and len(lr_ref.setdefault(scene.camera, [])) < SAMPLES:
            lr_ref[scene.camera].append(scene.lr)
    references = [torch.stack(same) for same in lr_ref.values()]
    rows: dict[str, dict[str, float]] = {}

    def made(method: Synthesis, content: Scene, ref: Sequence[Tensor], seeds: list[int]) -> Tensor:
        hr = content.hr.to(inputs.device).repeat(len(ref), 1, 1, 1)
        return to_uint8(method(hr, ref, seeds)).cpu() / 255  # (n, 3, side, side)

    def std(lr: Tensor) -> float:  # over the samples (n, 3, h, w), in levels of 255
        return (255 * lr.double()).var(0).mean().sqrt().item()

    def add(name: str, lr: Sequence[Tensor], noises: Sequence[float]) -> None:
        details = [torch.stack([high_pass(x).flatten(1) for x in of_camera]) for of_camera in lr]
        share, z = leak(details, [high_pass(ref).flatten(1) for ref in references])
        stds = [std(x) for of_camera in lr for x in of_camera]
        means = {"references": float(np.mean(stds)), "noises": float(np.mean(noises))}
        rows[name] = {"share": share, "z": z} | means

    for name, method in syntheses(inputs.net, inputs.sampler).items():
        lr, noises = [], []
        for camera, ref in enumerate(references):
            of_camera = []
            for i, content in enumerate(tqdm(contents, desc=name, unit="content", leave=False)):
                seeds = [((seed << 16 | i) << 8 | camera) << 16 | n for n in range(SAMPLES)]
                of_camera.append(made(method, content, list(ref), seeds[:1] * len(ref)))
                noises.append(std(made(method, content, [ref[0]] * SAMPLES, seeds)))
            lr.append(torch.stack(of_camera))  # (contents, n, 3, side, side)
        add(name, lr, noises)
    # The last method is RealDGen.
    blended = [
        to_uint8(torch.lerp(of_camera, ref.expand_as(of_camera), BLENDED)) / 255
        for of_camera, ref in zip(lr, references, strict=True)
    ]
    add(f"{name}, {BLENDED:.0%} of the reference blended in", blended, noises)
    return rows


# ---- the table ----------------------------------------------------------------------------------


def table_leakage(name: str, inputs: Inputs) -> Measure:
    """Leakage and diversity, for each set of pairs with enough scenes."""
    inputs.check_steps()
    sets, left_out = {}, []
    for folder in inputs.sets:
        scenes, cameras = scenes_of(folder, inputs)
        left_out += cameras
        if scenes:
            sets[folder] = scenes
    require(bool(sets), f"--pairs: leakage needs a set with a camera of {LEAST} scenes.")

    def measure() -> tuple[dict[str, Any], str]:
        values = {folder: leakage(scenes, inputs) for folder, scenes in sets.items()}
        rest = f"Cameras with under {LEAST} scenes are left out: {', '.join(left_out) or 'none'}."
        return values, f"{text_of_leakage(values)}{rest}\n"

    return measure


def text_of_leakage(values: dict[str, Any]) -> str:
    """The table of leakage and diversity, and how to read it."""
    heads = ["set", "method", "share of the reference's detail", "z", "std over references",
             "std over noises"]  # fmt: skip
    forms = {"share": "z.2%", "z": "z.1f", "references": ".2f", "noises": ".2f"}
    lines = [
        [folder, name, *(f"{row[key]:{form}}" for key, form in forms.items())]
        for folder, rows in values.items()
        for name, row in rows.items()
    ]
    return f"""## Does the reference's content show in generated LR? How much do outputs differ?

{table_text(heads, lines, words=2)}
Detail is an image minus its mean over 5 x 5 pixels. LR of each content is made with up to
{SAMPLES} references of a camera. Its detail is regressed on that of the reference, after the mean
over the references is subtracted from both: that is the share. z compares it with permuted
references; above 3 it is no accident. In the last row of each set {BLENDED:.0%} of the reference is
blended in, which must be found. The last columns are standard deviations of the LR images of one
content, in levels of 255: over the references of a camera with one noise, and over {SAMPLES} noises
with one reference. For Real-ESRGAN and BSRGAN a noise is a draw of parameters and noise.
"""
