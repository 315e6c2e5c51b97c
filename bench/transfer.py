"""What generated LR takes over from its reference, and what not. Not in the paper.

In: aligned pairs of several cameras, which were never trained on, and the generator. Out: two
tables. Does a classifier of cameras take generated LR for LR of the reference's camera (transfer)?
Does the content of the reference show in it, and how much do outputs differ (leakage)?

    python benchmark.py --table transfer leakage --pairs data/RealSR data/DRealSR --images 12
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
import generate
from bench.generated import Synthesis, syntheses
from bench.inputs import Inputs, Measure, middle
from bench.pairs import camera_of, load_hr, load_lr, table_text

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
    order = torch.randperm(len(scenes), generator=common.generator(seed)).tolist()
    for place, i in enumerate(order):
        key = (scenes[i].camera, scenes[i].half)
        ranked.append((count[key], place, i))
        count[key] += 1
    return [i for _, _, i in sorted(ranked)[:images]]


@torch.no_grad()
def answers(
    method: Synthesis,
    content: Scene,
    lr_ref: Sequence[Tensor],
    seeds: Sequence[int],
    device: torch.device,
) -> Tensor:
    """LR (n, 3, side, side) of a content for each reference and seed, in 8 bits as in files."""
    hr = content.hr.to(device).repeat(len(lr_ref), 1, 1, 1)
    return common.to_uint8(method(hr, lr_ref, seeds)).cpu() / 255


# ---- transfer: which camera is it from? ---------------------------------------------------------

CLASSIFIERS = 5  # trained on other windows, and without another scene of each camera
WINDOWS = 24  # of each scene
SHRINK = 0.02  # share of the identity in the covariance within cameras
YCC = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))


def features(x: Tensor) -> Tensor:
    """Numbers (B, 354) about the noise and the sharpness of x (B, 3, h, w) in [0, 1].

    Luma and chroma without what is smooth; then the correlations of all neighbours in 3 x 3 pixels
    and three channels, which a scene changes less than it changes the power, and the log power.
    """
    y = 255 * torch.einsum("ij,bjhw->bihw", x.new_tensor(YCC), x)
    y = high_pass(y)
    patches = F.unfold(y, 3).double()  # (B, 27, hw)
    covariance = patches @ patches.transpose(1, 2) / patches.shape[2]
    covariance = covariance + 0.05 * torch.eye(27, dtype=torch.float64)  # of rounding to 8 bits
    power = covariance.diagonal(dim1=1, dim2=2)
    correlation = covariance / (power[:, :, None] * power[:, None]).sqrt()
    above = torch.ones(27, 27, dtype=torch.bool).triu(1)
    return torch.cat([correlation[:, above], power[:, ::9].log() / 2], dim=1)


def high_pass(x: Tensor) -> Tensor:
    """x (B, C, h, w) minus its mean over 5 x 5 pixels."""
    return x - F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 5, 1)


def windows(lr: Tensor, side: int, gen: torch.Generator) -> Tensor:
    """Random windows of an LR photo (3, h, w), half of them mirrored: (WINDOWS, 3, side, side)."""
    found = []
    for _ in range(WINDOWS):
        top, left = (int(torch.randint(n - side + 1, (), generator=gen)) for n in lr.shape[1:])
        window = lr[:, top : top + side, left : left + side]
        found.append(window.flip(2) if torch.rand((), generator=gen) < 0.5 else window)
    return torch.stack(found)


Classifier = Callable[[Tensor], Tensor]  # features (..., 354) -> number of the class (...)


def discriminant(classes: Sequence[Tensor]) -> Classifier:
    """Fisher's linear discriminant of the features (n, 354) of each class, all equally likely.

    A few scenes of each camera are too few for a CNN: on unseen scenes of DRealSR a small one on
    such windows was right less than half as often.
    """
    everything = torch.cat([*classes])
    mean, std = everything.mean(0), everything.std(0).clamp(min=1e-9)
    known = [(x - mean) / std for x in classes]
    centres = torch.stack([x.mean(0) for x in known])  # (C, 354)
    rest = torch.cat([x - centre for x, centre in zip(known, centres, strict=True)])
    within = rest.T @ rest / len(rest)
    identity = torch.eye(len(within), dtype=within.dtype) * within.trace() / len(within)
    weight = torch.linalg.solve(torch.lerp(within, identity, SHRINK), centres.T)  # (354, C)
    bias = -(centres * weight.T).sum(1) / 2
    return lambda x: ((x - mean) / std @ weight + bias).argmax(-1)


def train(
    scenes: Sequence[Scene],
    seen: Sequence[Tensor],
    cameras: Sequence[str],
    half: int,
    gen: torch.Generator,
) -> Classifier:
    """The classifier of these cameras from their scenes in one half; seen: windows' features.

    A random scene of each camera is left out, where three remain: so classifiers differ.
    """
    classes = []
    for camera in cameras:
        same = [i for i, s in enumerate(scenes) if s.camera == camera and s.half == half]
        order = torch.randperm(len(same), generator=gen).tolist()
        classes.append(torch.cat([seen[same[k]] for k in order[len(same) > 3 :]]))
    return discriminant(classes)


def references(
    scenes: Sequence[Scene], content: int, cameras: Sequence[str], seed: int
) -> list[int]:
    """A reference of each camera for a content: another scene, of the same half as the content."""
    found = []
    for k, camera in enumerate(cameras):
        half = scenes[content].half
        same = [i for i, s in enumerate(scenes) if s.camera == camera and s.half == half]
        same = [i for i in same if i != content]
        draw = common.generator(seed, content, k)
        found.append(same[int(torch.randint(len(same), (), generator=draw))])
    return found


def judge(
    scenes: Sequence[Scene],
    contents: Sequence[int],
    made: dict[str, Tensor],
    side: int,
    gen: torch.Generator,
) -> dict[str, float]:
    """What one pair of classifiers says: the share of images taken for the right camera.

    made: features (contents, C, 354) by method, of LR with a reference of each of the C cameras.
    The classifier trained on one half judges the other half. Of real LR the mean over cameras.
    """
    cameras = list(dict.fromkeys(scene.camera for scene in scenes))
    seen = [features(windows(scene.lr, side, gen)) for scene in scenes]
    judges = [train(scenes, seen, cameras, 1 - half, gen) for half in (0, 1)]
    right: dict[str, list[bool]] = {}
    for scene in scenes:
        answer = judges[scene.half](features(scene.middle[None])[0])
        right.setdefault(scene.camera, []).append(cameras[int(answer)] == scene.camera)
    shares = {"real LR": float(np.mean([np.mean(values) for values in right.values()]))}
    for name, x in made.items():
        said = [judges[scenes[i].half](row) for i, row in zip(contents, x, strict=True)]
        hits = torch.stack(said) == torch.arange(len(cameras))  # (contents, C)
        shares[name] = hits.double().mean().item()
    return shares


def transfer(scenes: Sequence[Scene], inputs: Inputs) -> dict[str, list[float]]:
    """For each method the share of LR taken for LR of the reference's camera, by each classifier.

    Each content gets a reference of every camera in turn, so that a method which ignores it, or a
    classifier that sees nothing, gets 1 / cameras exactly. Contents and references are of the half
    of the scenes that the classifier has not seen.
    """
    seed = inputs.cfg.seed
    cameras = list(dict.fromkeys(scene.camera for scene in scenes))
    contents = contents_of(scenes, inputs.cfg.images, seed)
    made: dict[str, Tensor] = {}
    for name, method in syntheses(inputs.net, inputs.sampler).items():
        found = []
        for i in tqdm(contents, desc=name, unit="content", leave=False):
            lr_ref = [scenes[r].lr for r in references(scenes, i, cameras, seed)]
            seeds = [seed << 32 | i] * len(cameras)  # so references are the only difference
            found.append(features(answers(method, scenes[i], lr_ref, seeds, inputs.device)))
        made[name] = torch.stack(found)  # (contents, C, 354)
    side = 2 * inputs.cfg.crop // 3
    shares: dict[str, list[float]] = {}
    for number in range(CLASSIFIERS):
        gen = common.generator(seed, -1 - number)
        for name, share in judge(scenes, contents, made, side, gen).items():
            shares.setdefault(name, []).append(share)
    return shares


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
                made.append(answers(*given, list(ref), [draw] * len(ref), inputs.device))
                seeds = [draw | n for n in range(SAMPLES)]
                noises.append(std(answers(*given, [ref[0]] * SAMPLES, seeds, inputs.device)))
            outputs.append(torch.stack(made))  # (contents, n, 3, side, side)
        add(name, outputs, noises)
    blended = [
        common.to_uint8(torch.lerp(made, ref.expand_as(made), BLENDED)) / 255
        for made, ref in zip(outputs, references, strict=True)
    ]
    add(f"{name}, {BLENDED:.0%} of the reference blended in", blended, noises)
    return rows


# ---- the tables ---------------------------------------------------------------------------------


def table_transfer(name: str, inputs: Inputs) -> Measure:
    """transfer or leakage, for each set of pairs with enough scenes."""
    inputs.check_steps(inputs.cfg.t_start)
    sets, left_out = {}, []
    for folder in inputs.sets:
        scenes, few = scenes_of(folder, inputs)
        cameras = {scene.camera for scene in scenes}
        left_out += few
        if len(cameras) >= (2 if name == "transfer" else 1):
            sets[folder] = scenes
    needs = f"{'two cameras' if name == 'transfer' else 'a camera'} of {LEAST} scenes"
    common.require(bool(sets), f"--pairs: {name} needs a set with {needs}.")

    def measure() -> tuple[dict[str, Any], str]:
        of = transfer if name == "transfer" else leakage
        values = {folder: of(scenes, inputs) for folder, scenes in sets.items()}
        text = text_of_transfer if name == "transfer" else text_of_leakage
        few = f"Cameras with under {LEAST} scenes, left out: {', '.join(left_out) or 'none'}."
        return values, f"{text(values, sets)}{few}\n"

    return measure


def text_of_transfer(values: dict[str, Any], sets: dict[str, list[Scene]]) -> str:
    """The table of transfer, and what a reader must know."""
    count = {folder: Counter(s.camera or "unnamed" for s in sets[folder]) for folder in sets}
    heads = ["taken for the reference's camera", *(f"{f}, {len(count[f])} cameras" for f in sets)]
    first = next(iter(values.values()))
    lines = [
        [name, *(f"{np.mean(v[name]):.1%} ± {100 * np.std(v[name]):.1f}" for v in values.values())]
        for name in first
    ]
    lines.append(["chance", *(f"{1 / len(count[folder]):.1%}" for folder in sets)])
    scenes = "; ".join(
        f"{folder}: {', '.join(f'{camera} {n}' for camera, n in count[folder].items())}"
        for folder in sets
    )
    return f"""## Is generated LR taken for LR of the reference's camera?

{table_text(heads, lines)}
A linear classifier, trained on the real LR of half of each camera's scenes; {CLASSIFIERS} of them,
each without another scene: mean ± standard deviation. real LR: photos of the other half, mean over
cameras. Contents and references are of that other half, too, and never of the same scene; then the
halves change places. Each content has a reference of every camera, so a method that ignores it gets
chance exactly. Scenes: {scenes}.
"""


def text_of_leakage(values: dict[str, Any], sets: dict[str, list[Scene]]) -> str:
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
