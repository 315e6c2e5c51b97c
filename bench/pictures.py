"""LR of each method side by side, and real LR enlarged. Figures 3, 4, 9 and 10.

In: real pairs; or, with --lr or without pairs, HR photos and real LR photos. Out: enlarged.png:
real LR enlarged by one network, trained on each kind of pairs. Of pairs also pictures.png: the LR
of each method. Each row shows the crop in which the methods differ most.

    python benchmark.py --table pictures --sr-steps 2000 --pairs data/RealSR data/DRealSR
    python benchmark.py --table pictures --sr-steps 2000 --hr data/hr --lr data/lr/my-phone
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.downstream import (
    LABEL,
    Row,
    check_training,
    folder_with_references,
    key_of,
    make_pairs,
    meaningless,
    steps_of,
    train_network,
    training_source,
)
from bench.generated import lr_of, mean_degradations, on_pairs, other_methods, realdgen, synthetic
from bench.inputs import Inputs, Measure
from bench.pairs import load_hr, load_lr
from bench.sr import enlarging
from common import require
from common.checkpoint import find_checkpoint, fingerprint
from common.files import find_photos, outside
from common.images import load_image, resized, save_sheet
from generate import SCALE

ROWS = 4  # of a picture
WHOLE = 256  # side of the middle of an image in which the crop is chosen, LR pixels
CROP, SHOWN = 48, 192  # side of a crop in LR pixels, and as it is shown
TRAINED_ON = ("bicubic", "realesrgan", "realdgen", "paired")  # of inputs.SOURCES
Place = tuple[int, int]  # top and left of a crop, LR pixels
Scene = dict[str, Tensor]  # title -> image: LR (3, h, w), or of HR size (3, 4h, 4w), in [0, 1]
T = TypeVar("T")

# ---- crops and cells ----------------------------------------------------------------------------


def spread(items: Sequence[T], number: int) -> list[T]:
    """At most so many of the items, at even distances."""
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]


def crop_at(image: Tensor, place: Place, side: int, scale: int = 1) -> Tensor:
    """A square of an image (3, scale h, scale w); place and side are in LR pixels."""
    rows, columns = (slice(scale * n, scale * (n + side)) for n in place)
    return image[:, rows, columns]


def crop_of(image: Tensor, scale: int = 1) -> Tensor:
    """The middle of an image (3, scale h, scale w): at most WHOLE LR pixels a side."""
    top, left = (max(0, n // scale - WHOLE) // 2 for n in image.shape[1:])
    return crop_at(image, (top, left), WHOLE, scale)


def most_different(images: Sequence[Tensor], scale: int = 1) -> Place:
    """Where images (3, scale h, scale w) differ most: the crop with the largest mean variance."""
    variance = torch.stack([*images]).double().var(0, correction=0).mean(0)[None, None]
    variance = F.avg_pool2d(variance, scale)
    sides = [min(CROP, n) for n in variance.shape[2:]]
    of_crops = F.avg_pool2d(variance, sides, stride=1)[0, 0]  # at the top left pixel of each
    top, left = divmod(int(of_crops.argmax()), of_crops.shape[1])
    return top, left


def cell(image: Tensor) -> Tensor:
    """An image, resized to the longest side SHOWN, on white: (3, SHOWN, SHOWN)."""
    longest = max(image.shape[1:])
    h, w = (max(1, n * SHOWN // longest) for n in image.shape[1:])
    if SHOWN % longest == 0:  # pixels become squares
        x = F.interpolate(image[None], (h, w), mode="nearest")[0]
    else:
        x = resized(image[None], h, w)[0].clamp(0, 1)
    return F.pad(x, (0, SHOWN - w, 0, SHOWN - h), value=1.0)


def framed(image: Tensor, place: Place, scale: int) -> Tensor:
    """A whole image (3, scale h, scale w) as a cell, with a red frame around the crop."""
    x, factor = cell(image), scale * SHOWN / max(image.shape[1:])
    top, left, side = (round(n * factor) for n in (*place, CROP))
    inner = x[:, top + 2 : top + side - 2, left + 2 : left + side - 2].clone()
    x[:, top : top + side, left : left + side] = x.new_tensor([1, 0, 0])[:, None, None]
    x[:, top + 2 : top + side - 2, left + 2 : left + side - 2] = inner
    return x


def save_scenes(path: Path, scenes: dict[str, Scene], compared: Sequence[str]) -> dict[str, Place]:
    """Write a row for each scene: its first image as a whole, then a crop of each.

    It is the crop in which the images with the titles `compared` differ most. Returns its places.
    """
    rows, places, titles = [], {}, [*next(iter(scenes.values()))]
    for name, scene in scenes.items():
        h = min(image.shape[1] for image in scene.values())
        scale = {title: image.shape[1] // h for title, image in scene.items()}
        alike = [scene[title] for title in compared]
        place = places[name] = most_different(alike, scale[compared[0]])
        crops = [cell(crop_at(scene[title], place, CROP, scale[title])) for title in titles]
        rows.append([framed(scene[titles[0]], place, scale[titles[0]]), *crops])
    save_sheet(path, ["", *titles], rows)
    return places


# ---- LR of each method, and real LR enlarged ----------------------------------------------------


@torch.no_grad()
def lr_of_pairs(inputs: Inputs, each: int) -> dict[str, Scene]:
    """HR, LR of each method and real LR of a few pairs; F_deg is of other scenes of the camera."""
    seed, scenes = inputs.cfg.seed, {}
    others = {"BSRGAN": synthetic("bsrgan"), "Real-ESRGAN": synthetic("realesrgan")}
    others |= other_methods(inputs, ["SynDiff"])
    methods = {name: on_pairs(method, seed) for name, method in others.items()}
    for folder, pairs in inputs.other_scenes().items():
        means = mean_degradations(pairs, inputs.net, inputs.sampler.average)
        # The others are given the reference: F_deg is of the weights of RealDGen alone.
        methods["RealDGen"] = on_pairs(realdgen(inputs.net, inputs.sampler), seed, means)
        for pair in spread(pairs, each):
            hr, real = crop_of(load_hr(pair), SCALE), crop_of(load_lr(pair.lr, pair.full))
            made = {name: lr_of(method, pair, hr, inputs) for name, method in methods.items()}
            scenes[f"{folder} {pair.name}"] = {"HR": hr, **made, "real LR": real}
    return scenes


@torch.no_grad()
def enlarged(scene: Scene, nets: dict[str, nn.Module], device: torch.device) -> Scene:
    """The real LR of a scene, what a bicubic resize and each network make of it, and HR, if any."""
    x = scene["real LR"][None].to(device)
    images = {"real LR": x, "bicubic resize": enlarging(None)(x, [])}
    images |= {f"trained on {name}": enlarging(net)(x, []) for name, net in nets.items()}
    return {title: image[0].cpu() for title, image in images.items()} | scene


# ---- the table pictures -------------------------------------------------------------------------


def scenes_to_enlarge(inputs: Inputs, files: Sequence[Path], each: int) -> dict[str, Scene]:
    """Real LR with HR, of a few tested pairs of each set; or without HR, of photos."""
    scenes: dict[str, Scene] = {}
    if not files:
        inputs.other_scenes()  # checks
        for folder, pairs in inputs.tests.items():
            for pair in spread(pairs, each):
                lr, hr = crop_of(load_lr(pair.lr, pair.full)), crop_of(load_hr(pair), SCALE)
                scenes[f"{folder} {pair.name}"] = {"real LR": lr, "HR": hr}
    for file in spread(files, ROWS):
        try:
            scenes[file.stem] = {"real LR": crop_of(load_image(file))}
        except ValueError as error:
            print(f"skipped: {error}")
    require(bool(scenes), "--lr: none of its photos can be read.")
    return scenes


def pairs_of_photos(files: Sequence[Path], inputs: Inputs) -> Path:
    """Make pairs of the HR photos, in a folder whose name depends on all that they depend on."""
    cfg = inputs.cfg
    weights = (cfg.checkpoint or find_checkpoint("", "diffusion", ""), *cfg.sr_start_from)
    facts = asdict(inputs.sampler) | {"seed": cfg.seed, "sr_preset": cfg.sr_preset}
    facts["files"] = [fingerprint(file) for file in (*inputs.hr_files, *files, *weights)]
    folder = Path(cfg.out) / "pictures" / key_of(facts)
    make_pairs(folder / "pairs", inputs, lr_ref=cfg.lr)
    return folder


def table_pictures(name: str, inputs: Inputs) -> Measure:
    """enlarged.png, and of pairs also pictures.png."""
    cfg, network = inputs.cfg, inputs.cfg.sr[-1]
    inputs.check_steps(inputs.sampler.t_start)
    of_photos = bool(cfg.lr) or not cfg.pairs
    possible = [data for data in TRAINED_ON if data != "paired" or not of_photos]
    sources = [data for data in possible if data in cfg.data]
    require(bool(sources), f"--data {' '.join(cfg.data)}: choose among {', '.join(possible)}.")
    check_training(inputs, [network], len(sources), "pictures")
    assert inputs.hr_files  # found and checked now
    files = outside(find_photos(cfg.lr, "lr", "--lr"), cfg.out, "--lr") if of_photos else []
    each = max(1, ROWS // len(cfg.pairs or "1"))
    scenes = scenes_to_enlarge(inputs, files, each)

    def measure() -> tuple[dict[str, Any], str]:
        out = pairs_of_photos(files, inputs) if of_photos else folder_with_references(inputs)
        nets = {}
        for data in sources:
            flags: dict[str, Any] = {"pairs": str(out / "pairs")}
            if data != "realdgen" or not of_photos:
                flags = training_source(Row(LABEL[data], network, data), out, inputs)
            label = Path(flags.get("pairs", data)).name
            nets[LABEL[data]] = train_network(network, flags, label, cfg.seed, out, inputs)[0]
        if not inputs.rt.is_main:
            return {}, ""
        images = {name: enlarged(scene, nets, inputs.device) for name, scene in scenes.items()}
        trained = [f"trained on {label}" for label in nets]
        values = {"enlarged": save_scenes(Path(cfg.out) / "enlarged.png", images, trained)}
        if not of_photos:
            images = lr_of_pairs(inputs, each)
            lr = [title for title in next(iter(images.values())) if title != "HR"]
            values["pictures"] = save_scenes(Path(cfg.out) / "pictures.png", images, lr)
        return values, text_of_pictures(values, inputs)

    return measure


def text_of_pictures(values: dict[str, dict[str, Place]], inputs: Inputs) -> str:
    """The pictures, and how they were made."""
    network = inputs.cfg.sr[-1]
    shown = "".join(
        f"![{picture}]({picture}.png)\n\nFrom above: {', '.join(places)}.\n\n"
        for picture, places in values.items()
    )
    return f"""## Pictures of real LR enlarged, and of the LR of each method

{shown}A row shows a whole image (of a larger one the middle, {WHOLE} LR pixels a side), and of each
image the crop in the red frame, {CROP} LR pixels a side. Among all crops it has the largest
variance over the networks, or over the methods and the real LR. The network is {network}, trained
for {steps_of(network, inputs.cfg)} steps on each kind of pairs.
{meaningless(network, inputs.cfg)}"""
