"""What generated LR takes over from its reference, and what not. Not in the paper.

In: aligned pairs of several cameras, which were never trained on, and the networks of stage 2.
Out: three tables that benchmark.py prints. Would a classifier of cameras take generated LR for the
reference's camera (transfer)? Does the reference's content show in it (leakage)? How much do
samples of one content differ (diversity)?

    python benchmark.py --table transfer leakage diversity --pairs data/RealSR data/DRealSR
    python benchmark.py --table transfer --pairs data/DRealSR --images 12 --crop 64
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
import degrade
import generate
from bench import factors
from bench.metrics import lpips_distance, missing_weights

# ---- the scenes, and the methods that make LR of them -------------------------------------------

LEAST = 4  # scenes of a camera: two for each half


@dataclass(frozen=True)
class Scene:
    """A real LR photo, its middle, and the HR photo of that middle."""

    set: str
    camera: str
    lr: Tensor  # (3, h, w) in [0, 1]
    middle: Tensor  # (3, side, side)
    hr: Tensor  # (3, 4 side, 4 side)
    half: int  # 0 or 1: of its camera's scenes every other one

    @property
    def source(self) -> tuple[str, str]:
        """Set and camera: a camera of another set is another one, whatever its name."""
        return self.set, self.camera


def gather(
    pairs: Iterable[tuple[str, str, str, Tensor, Tensor]], side: int
) -> tuple[list[Scene], list[str]]:
    """The scenes of (set, camera, name, hr, lr), and which cameras have too few and are left out.

    hr (3, 4 h, 4 w), lr (3, h, w) in [0, 1]; of both the same middle is cut, side x side LR pixels.
    """
    scenes: list[Scene] = []
    count: Counter[tuple[str, str]] = Counter()
    for group, camera, name, hr, lr in pairs:
        top, left = ((n - side) // 2 for n in lr.shape[1:])
        if min(top, left) < 0:
            print(f"skipped: {group} {name} (its LR is under {side} x {side} pixels)")
            continue
        box, big = (
            (slice(None), slice(f * top, f * (top + side)), slice(f * left, f * (left + side)))
            for f in (1, generate.SCALE)
        )
        half = count[group, camera] % 2
        count[group, camera] += 1
        scenes.append(Scene(group, camera, lr, lr[box], hr[big].clone(), half))
    few = sorted(source for source, n in count.items() if n < LEAST)
    scenes = [scene for scene in scenes if scene.source not in few]
    common.require(bool(scenes), f"--pairs: no camera has {LEAST} scenes, which this table needs.")
    return scenes, [
        f"{group} {camera or 'unnamed'} ({count[group, camera]})" for group, camera in few
    ]


def contents_of(scenes: Sequence[Scene], images: int, seed: int) -> list[int]:
    """Numbers of so many scenes, drawn evenly from each half of each camera."""
    count: Counter[tuple[str, str, int]] = Counter()
    ranked = []
    order = torch.randperm(len(scenes), generator=common.generator(seed)).tolist()
    for place, i in enumerate(order):
        key = (*scenes[i].source, scenes[i].half)
        ranked.append((count[key], place, i))
        count[key] += 1
    return [i for _, _, i in sorted(ranked)[:images]]


# hr (B, 3, H, W), B references, B seeds -> lr (B, 3, H/4, W/4)
Method = Callable[[Tensor, list[Tensor], list[int]], Tensor]


def methods(net: Any, cfg: generate.Config) -> dict[str, Method]:
    """What is compared; the first three do not look at the reference."""

    def plain(hr: Tensor, lr_ref: list[Tensor], seeds: list[int]) -> Tensor:
        return degrade.degrade(hr, degrade.bicubic(len(hr), generate.SCALE))

    def synthetic(recipe: str) -> Method:
        def make(hr: Tensor, lr_ref: list[Tensor], seeds: list[int]) -> Tensor:
            theta = [
                degrade.sample_degradation(
                    1, recipe, generate.SCALE, generator=common.generator(seed)
                )
                for seed in seeds
            ]
            return degrade.degrade(hr, degrade.Degradation.cat(theta))

        return make

    def network(sampler: generate.Sampler) -> Method:
        def make(hr: Tensor, lr_ref: list[Tensor], seeds: list[int]) -> Tensor:
            return generate.chosen(*generate.generate(net, hr, lr_ref, sampler, seeds))

        return make

    return {
        "bicubic": plain,
        "Real-ESRGAN": synthetic("realesrgan"),
        "BSRGAN": synthetic("bsrgan"),
        "Rec_lr with grain (T=0)": network(replace(cfg, t_start=0, start="reconstruct")),
        "RealDGen": network(cfg),
    }


@torch.no_grad()
def answers(
    method: Method,
    content: Scene,
    lr_ref: Sequence[Tensor],
    seeds: Sequence[int],
    device: torch.device,
) -> Tensor:
    """LR (n, 3, side, side) of a content for each reference and seed, in 8 bits as in files."""
    hr = content.hr.to(device).repeat(len(lr_ref), 1, 1, 1)
    return common.to_uint8(method(hr, list(lr_ref), list(seeds))).cpu() / 255


# ---- which camera is it from? -------------------------------------------------------------------

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
    y = detail(y)
    patches = F.unfold(y, 3).double()  # (B, 27, hw)
    covariance = patches @ patches.transpose(1, 2) / patches.shape[2]
    covariance = covariance + 0.05 * torch.eye(27, dtype=torch.float64)  # of rounding to 8 bits
    power = covariance.diagonal(dim1=1, dim2=2)
    correlation = covariance / (power[:, :, None] * power[:, None]).sqrt()
    above = torch.ones(27, 27, dtype=torch.bool).triu(1)
    return torch.cat([correlation[:, above], power[:, ::9].log() / 2], dim=1)


def detail(x: Tensor) -> Tensor:
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
    sources: Sequence[tuple[str, str]],
    half: int,
    gen: torch.Generator,
) -> Classifier:
    """The classifier of these cameras, of their scenes in one half; seen: windows' features.

    A random scene of each camera is left out, where three remain: so classifiers differ.
    """
    classes = []
    for source in sources:
        own = [i for i, s in enumerate(scenes) if s.source == source and s.half == half]
        order = torch.randperm(len(own), generator=gen).tolist()
        classes.append(torch.cat([seen[own[k]] for k in order[len(own) > 3 :]]))
    return discriminant(classes)


def references(
    scenes: Sequence[Scene], content: int, sources: Sequence[tuple[str, str]], seed: int
) -> list[int]:
    """A reference of each camera for a content: another scene, of the same half as the content."""
    found = []
    for k, source in enumerate(sources):
        half = scenes[content].half
        own = [i for i, s in enumerate(scenes) if s.source == source and s.half == half]
        own = [i for i in own if i != content]
        draw = common.generator(seed, content, k)
        found.append(own[int(torch.randint(len(own), (), generator=draw))])
    return found


def mean_over(values: Tensor, of: Sequence[Any]) -> float:
    """Mean over the groups that `of` names of the mean within each."""
    groups = [torch.tensor([o == group for o in of]) for group in dict.fromkeys(of)]
    return torch.stack([values.double()[group].mean() for group in groups]).mean().item()


def judge(
    scenes: Sequence[Scene],
    own: Sequence[tuple[str, str]],
    seen: Sequence[Tensor],
    real: Tensor,
    contents: Sequence[int],
    made: dict[str, Tensor],
    gen: torch.Generator,
) -> dict[str, tuple[float, float, int]]:
    """What one pair of classifiers says of real LR, and of each method's: shares of the reference's
    camera and of the content's, and the number of images.

    own: the C cameras to choose from; features: seen, of the windows of each scene; real (N, 354);
    made (contents, C, 354) by method. The classifier trained on one half judges the other half.
    """
    judges = [train(scenes, seen, own, 1 - half, gen) for half in (0, 1)]
    inside = [i for i, scene in enumerate(scenes) if scene.source in own]
    right = [judges[scenes[i].half](real[i]) == own.index(scenes[i].source) for i in inside]
    of = [scenes[i].source for i in inside]
    share = mean_over(torch.stack(right), of)
    result = {"real LR": (share, share, len(inside))}
    from_ = [scenes[i].source for i in contents]
    numbers = torch.tensor([own.index(source) for source in from_])
    for name, x in made.items():
        said = [judges[scenes[i].half](row) for i, row in zip(contents, x, strict=True)]
        table = torch.stack(said)  # (contents, C)
        hits = (table == torch.arange(len(own))).double()
        same = (table == numbers[:, None]).double().mean(1)
        result[name] = (hits.mean().item(), mean_over(same, from_), table.numel())
    return result


def table_transfer(
    scenes: Sequence[Scene],
    compared: dict[str, Method],
    images: int,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """The share of generated LR that is taken for LR of the reference's camera.

    Each content gets a reference of every camera in turn, so that a method which ignores it, or a
    classifier that sees nothing, gets 1 / cameras exactly. Contents and references are of the half
    of the scenes that the classifier has not seen.
    """
    names = list(dict.fromkeys(scene.set for scene in scenes))
    sources = list(dict.fromkeys(scene.source for scene in scenes))
    groups = {name: [source for source in sources if source[0] == name] for name in names}
    groups |= {"all sets": sources} if len(names) > 1 else {}
    groups = {name: own for name, own in groups.items() if len(own) > 1}
    common.require(bool(groups), f"--pairs: transfer needs two cameras of {LEAST} scenes.")
    contents = contents_of(scenes, images, seed)
    refs = [references(scenes, i, sources, seed) for i in contents]
    made: dict[str, Tensor] = {}
    for name, method in compared.items():
        found = []
        for i, chosen in zip(tqdm(contents, desc=name, unit="content"), refs, strict=True):
            given = [scenes[r].lr for r in chosen]
            draws = [seed << 32 | i] * len(chosen)  # so references are the only difference
            found.append(features(answers(method, scenes[i], given, draws, device)))
        made[name] = torch.stack(found)  # (contents, cameras, 354)
    real = features(torch.stack([scene.middle for scene in scenes]))
    side = 2 * scenes[0].middle.shape[1] // 3
    values: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for number in range(CLASSIFIERS):
        gen = common.generator(seed, -1 - number)
        seen = [features(windows(scene.lr, side, gen)) for scene in scenes]
        for group, own in groups.items():
            columns = [sources.index(source) for source in own]
            places = [c for c, i in enumerate(contents) if scenes[i].source in own]
            inside = {name: x[places][:, columns] for name, x in made.items() if places}
            found_here = judge(scenes, own, seen, real, [contents[c] for c in places], inside, gen)
            for name, three in found_here.items():
                values.setdefault((group, name), []).append(three)
    rows = []
    for (group, name), judged in values.items():
        shares, content, n = zip(*judged, strict=True)
        known = content if name != "real LR" else ()
        row = {"set": group, "method": name, "n": n[0], "share": shares, "content": known}
        rows.append(row)
    cameras = {
        group: {" ".join(s): sum(scene.source == s for scene in scenes) for s in own}
        for group, own in groups.items()
    }
    return {"cameras": cameras, "contents": len(contents), "rows": rows}


def with_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation as percentages; a dash for no values."""
    return f"{np.mean(values):.1%} ± {100 * np.std(values):.1f}" if values else "-"


def markdown_transfer(result: dict[str, Any]) -> str:
    """The table of transfer, and what one must know to read it."""
    lines = ["## Is generated LR taken for LR of the reference's camera?", ""]
    lines += ["| set | method | reference's camera | content's camera | chance | n |"]
    lines += ["| --- | --- |" + " ---: |" * 4]
    for row in result["rows"]:
        chance = f"{1 / len(result['cameras'][row['set']]):.1%}"
        cells = [with_spread(row["share"]), with_spread(row["content"]), chance]
        lines += [f"| {row['set']} | {row['method']} | {' | '.join(cells)} | {row.get('n', 0)} |"]
    cameras = [
        f"{group}: " + ", ".join(f"{camera} {n}" for camera, n in own.items())
        for group, own in result["cameras"].items()
        if group != "all sets"
    ]
    lines += [
        "",
        "A linear classifier, trained on the real LR of half of each camera's scenes;",
        f"{CLASSIFIERS} of them, each without another scene: mean ± standard deviation. real LR:",
        "photos of the other half, mean over cameras. Contents and references are of that other",
        "half, too, and never of the same scene; then the halves change places. Each content has a",
        "reference of every camera, so a method that ignores it gets chance exactly. The content's",
        "camera is found, if at all, by what its HR photo shows. Scenes: "
        + "; ".join(cameras)
        + ".",
    ]
    return "\n".join(lines) + left_out(result)


def left_out(result: dict[str, Any]) -> str:
    """The last lines of a table: which cameras are not in it."""
    few = ", ".join(result.get("left out", [])) or "none"
    return f"\nCameras with under {LEAST} scenes, left out: {few}.\n"


# ---- does the reference's content show? ---------------------------------------------------------

BLENDED = (0.01, 0.05)  # shares of the reference in the outputs that must be found out
# What is looked for of a reference (n, 3, h, w) in the output: (n, D), in levels of 255.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "detail": lambda x: 255 * detail(x).flatten(1).double(),
    "colour": lambda x: 255 * x.mean((2, 3)).double(),
}


def leak(made: Sequence[Tensor], lr_ref: Sequence[Tensor]) -> dict[str, float]:
    """Share of the reference in what was made of it, and how sure it is that it is not 0.

    For each camera: made (contents, n, D) with n references (n, D). Of both the mean over the
    references is taken off, so that what remains of an output depends on its reference; the share
    is its regression on that reference. z: by how many standard deviations this is more than with
    the references permuted (of all permutations, the same for all contents; exact, not sampled).
    """
    along = power = total = variance = 0.0
    for out, ref in zip(made, lr_ref, strict=True):
        n = len(ref)
        rest, own = out - out.mean(1, keepdim=True), ref - ref.mean(0)
        M = rest.sum(0) @ own.T  # (n, n), rows and columns have the mean 0
        along += M.trace().item()
        power += len(out) * own.square().sum().item()
        total += M.square().sum().item()
        variance += M.square().sum().item() / (n - 1)
    still = total <= 1e-18 * power * power  # nothing depends on the reference
    return {
        "share": 0.0 if still else along / power,
        "z": 0.0 if still else along / math.sqrt(variance),
    }


def table_leakage(
    scenes: Sequence[Scene],
    compared: dict[str, Method],
    images: int,
    samples: int,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """How much of the reference's content each method shows, and a method that shows some must.

    References are of one half of each camera's scenes (at most `samples`), contents of the other.
    """
    kept = ["bicubic", "Real-ESRGAN", "Rec_lr with grain (T=0)", "RealDGen"]
    result: dict[str, Any] = {"rows": [], "sets": {}}
    for group in dict.fromkeys(scene.set for scene in scenes):
        own = [scene for scene in scenes if scene.set == group]
        others = [scene for scene in own if scene.half == 1]
        contents = [others[i] for i in contents_of(others, images, seed)]
        lr_ref: dict[str, list[Tensor]] = {}
        for scene in own:
            if scene.half == 0 and len(lr_ref.setdefault(scene.camera, [])) < samples:
                lr_ref[scene.camera].append(scene.middle)
        refs = [torch.stack(found) for found in lr_ref.values()]
        result["sets"][group] = [len(contents), [len(found) for found in refs]]
        outputs: dict[str, list[Tensor]] = {}
        for name in [name for name in kept if name in compared]:
            bar = tqdm(total=len(refs) * len(contents), desc=f"{group}, {name}", unit="content")
            for camera, ref in enumerate(refs):
                made = []
                for i, content in enumerate(contents):
                    draws = [((seed << 16 | i) << 8 | camera) << 16 | r for r in range(len(ref))]
                    made.append(answers(compared[name], content, list(ref), draws, device))
                    bar.update()
                outputs.setdefault(name, []).append(torch.stack(made))
            bar.close()
        base = next(reversed(outputs))
        for part in BLENDED:
            outputs[f"{base}, {part:.0%} of the reference blended in"] = [
                common.to_uint8(torch.lerp(made, ref.expand_as(made), part)) / 255
                for made, ref in zip(outputs[base], refs, strict=True)
            ]
        for name, found in outputs.items():
            values = {
                view: leak(
                    [torch.stack([of(x) for x in made]) for made in found], [of(x) for x in refs]
                )
                for view, of in VIEWS.items()
            }
            n = sum(made.shape[0] * made.shape[1] for made in found)
            result["rows"].append({"set": group, "method": name, "n": n} | values)
    return result


def markdown_leakage(result: dict[str, Any]) -> str:
    """The table of leakage, and what one must know to read it."""
    lines = ["## Does the content of the reference show in generated LR?", ""]
    lines += ["| set | method | share of its detail | z | share of its mean colour | z | n |"]
    lines += ["| --- | --- |" + " ---: |" * 5]
    for row in result["rows"]:
        cells = [f"{row[view]['share']:z.2%} | {row[view]['z']:z.1f}" for view in VIEWS]
        lines += [f"| {row['set']} | {row['method']} | {' | '.join(cells)} | {row['n']} |"]
    sets = [
        f"{group}: {contents}, {' + '.join(map(str, refs))}"
        for group, (contents, refs) in result["sets"].items()
    ]
    lines += [
        "",
        "Outputs of one content with several references of one camera, minus their mean, regressed",
        "on the reference, minus the mean reference: on its pixels without what is smooth, and on",
        "its mean RGB. z: against permuted references; beyond 3 it is no accident; n references",
        "of each of C cameras give no more than (n - 1) sqrt(C). Real-ESRGAN has a new draw for",
        "each reference and can't leak. In the last rows of each set a share is blended in, which",
        f"must be found. Contents, references of each camera: {'; '.join(sets)}.",
    ]
    return "\n".join(lines) + left_out(result)


# ---- how much do samples differ? ----------------------------------------------------------------


def spread(lr: Tensor) -> dict[str, float]:
    """How much samples (n, 3, h, w) of one content differ: std in levels of 255, and LPIPS.

    std: root of the mean variance of a value; LPIPS: mean over each sample and the next one. Both
    are nan of one sample, LPIPS also without its weights.
    """
    if len(lr) < 2:
        return {"std": math.nan, "LPIPS": math.nan}
    std = (255 * lr.double()).var(0).mean().sqrt().item()
    return {"std": std, "LPIPS": distance(lr, lr.roll(1, 0)).mean().item()}


def distance(x: Tensor, y: Tensor) -> Tensor:
    """LPIPS (B,); nan without its weights."""
    known = not missing_weights("alex")
    return lpips_distance(x, y) if known else x.new_full((len(x),), math.nan)


KINDS = ("noise", "references", "cameras")


def table_diversity(
    scenes: Sequence[Scene],
    compared: dict[str, Method],
    images: int,
    samples: int,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """How much samples of one content differ when one thing changes: noise, reference, camera."""
    result: dict[str, Any] = {"rows": [], "samples": samples, "sets": {}}
    for group in dict.fromkeys(scene.set for scene in scenes):
        own = [scene for scene in scenes if scene.set == group]
        contents = contents_of(own, images, seed)
        result["sets"][group] = len(contents)
        plans, banks = [], []
        for i in contents:
            cameras: dict[str, list[Tensor]] = {own[i].camera: []}
            order = torch.randperm(len(own), generator=common.generator(seed, i)).tolist()
            for k in order:
                if k != i:
                    cameras.setdefault(own[k].camera, []).append(own[k].lr)
            same = cameras[own[i].camera][:samples]
            # One of every camera, then a second one, as far as there are.
            ranked = sorted(
                (
                    (place, c)
                    for c, found in enumerate(cameras.values())
                    for place in range(len(found))
                )
            )
            turn = [[*cameras.values()][c][place] for place, c in ranked][:samples]
            turn = turn if len(cameras) > 1 else turn[:1]
            plans.append({"noise": same[:1] * samples, "references": same, "cameras": turn})
            banks.append(factors.reductions(own[i].hr))
        for name, method in compared.items():
            values: dict[str, list[float]] = {}
            for i, plan, bank in zip(
                tqdm(contents, desc=f"{group}, {name}", unit="content"), plans, banks, strict=True
            ):
                for kind in KINDS:
                    changing = kind == "noise"
                    draws = [(seed << 16 | i) << 16 | n * changing for n in range(len(plan[kind]))]
                    lr = answers(method, own[i], plan[kind], draws, device)
                    for key, value in spread(lr).items():
                        values.setdefault(f"{kind} {key}", []).append(value)
                    if changing:
                        far = distance(lr, own[i].middle.expand_as(lr))
                        values.setdefault("measured", []).append(
                            factors.noise_of(lr, bank).mean().item()
                        )
                        values.setdefault("to real", []).append(far.mean().item())
                        values.setdefault("nearest", []).append(far.min().item())
            result["rows"].append({"set": group, "method": name, **values})
        real = [
            factors.noise_of(own[i].middle[None], bank).item()
            for i, bank in zip(contents, banks, strict=True)
        ]
        result["rows"].append({"set": group, "method": "real LR", "measured": real})
    return result


def markdown_diversity(result: dict[str, Any]) -> str:
    """The table of diversity, and what one must know to read it."""
    columns = [f"{kind} {key}" for kind in KINDS for key in ("std", "LPIPS")]
    columns += ["measured", "to real", "nearest"]
    heads = ["noise: std", "LPIPS", "reference: std", "LPIPS", "camera: std", "LPIPS"]
    heads += ["measured noise", "LPIPS to the real LR", "of the nearest"]
    lines = ["## How much do samples of one content differ?", ""]
    lines += [f"| set | method | {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * len(heads)]
    for row in result["rows"]:
        cells = []
        for column in columns:
            value = np.mean(row.get(column, [math.nan]))
            text = f"{value:.2f}" if column.endswith(("std", "measured")) else f"{value:.3f}"
            cells.append("-" if math.isnan(value) else text)
        lines += [f"| {row['set']} | {row['method']} | {' | '.join(cells)} |"]
    sets = ", ".join(f"{group} {n}" for group, n in result["sets"].items())
    samples = result["samples"]
    lines += [
        "",
        f"Standard deviation over {samples} samples (levels of 255; fewer where there are",
        "fewer references) and LPIPS between two, when only the noise changes (of Real-ESRGAN and",
        "BSRGAN the parameters, too), only the reference within the content's camera, or only the",
        "reference among the cameras of the set. Measured noise: robust std of what no filter of",
        "the HR image explains; if samples are like draws of the camera, it is that of the real",
        "LR, and their std over the noise is not less. There is one real LR of each content, so it",
        "has no spread, but a distance to the samples: the mean, and that of the nearest sample.",
        f"Contents: {sets}.",
    ]
    return "\n".join(lines) + left_out(result)


# ---- what benchmark.py calls --------------------------------------------------------------------

TABLES = ("transfer", "leakage", "diversity")


def measure(
    table: str,
    scenes: Sequence[Scene],
    few: list[str],
    net: Any,
    cfg: generate.Config,
    images: int,
    samples: int,
    device: torch.device,
) -> tuple[dict[str, Any], str]:
    """One of TABLES, as values and as text; few: the cameras that are left out.

    Leakage and diversity take several outputs of each content, and a quarter of the contents.
    """
    compared = methods(net, cfg)
    if table == "transfer":
        result = table_transfer(scenes, compared, images, cfg.seed, device)
        result["left out"] = few
        return result, markdown_transfer(result)
    leaking = table == "leakage"
    of = table_leakage if leaking else table_diversity
    result = of(scenes, compared, max(2, images // 4), samples, cfg.seed, device)
    result["left out"] = few
    return result, markdown_leakage(result) if leaking else markdown_diversity(result)
