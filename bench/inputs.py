"""What the tables of the benchmark share: the command's settings, pairs, photos, the generator.

All inputs are checked before any measurement starts.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import degrade
import diffusion
import generate
from bench import sr
from bench.metrics import available_metrics
from bench.pairs import Pair, find_pairs, halves, sets_with_other_scenes
from common import require
from common.cli import check_ranges
from common.files import DATA, find_photos, list_images
from common.images import crop_to_multiple, load_image, save_image
from common.runtime import Runtime, make_generator

SYNDIFF = Path("runs/syndiff/last.pt")  # made by diffusion.py --without content degradation
AS_PRINTED = Path("runs/as-printed/diffusion/last.pt")  # both stages with --preset as-printed
SAMPLE = DATA / "sample/hr"
# What SR networks are trained on.
SOURCES = ("bicubic", "bsrgan", "realesrgan", "syndiff", "realdgen", "paired")


@dataclass(frozen=True)
class Config(generate.Sampler):
    """Settings of the benchmark; every field is a flag."""

    table: tuple[str, ...] = ()  # tables to print (default: 2 and 1; with --sr only 1)
    pairs: tuple[str, ...] = ()  # folders of pairs (default: data/RealSR, data/DRealSR, or samples)
    sr: tuple[str, ...] = ()  # networks: swinir, swinir-l, rrdb, hat, fsrcnn (default: fsrcnn)
    data: tuple[str, ...] = SOURCES  # what they are trained on
    sr_preset: str = ""  # of bench.sr (default: paper on a GPU with real pairs, else smoke)
    sr_steps: int = 0  # training steps of each network (0: those of its preset)
    sr_start_from: tuple[str, ...] = ()  # networks of bench.sr to train further, for all data
    seeds: int = 1  # trainings of each network, with the seeds --seed, --seed + 1, ...
    perceptual_weight: float = 0.0  # of LPIPS; above 0, Table 1 also has networks trained with it
    hr: tuple[str, ...] = ()  # HR photos to make training pairs of (default: data/hr or samples)
    lr: tuple[str, ...] = ()  # extractors: real LR, a sub-folder for each device (default: data/lr)
    images: int = 64  # the most that factors, extractors, figure1, mtf, leak(age), remainder take
    crop: int = 96  # side of the LR crops of factors, extractors, figure1, leakage; pixels
    t_starts: tuple[int, ...] = ()  # T of 3 (default: the paper's four), of others (default: 0 200)
    checkpoint: str = ""  # generator (default: runs/diffusion, else data/pretrained)
    out: str = "out/benchmark"  # folder of results.json and of a .md for each table
    batch_size: int = 8  # images that 2, 6 and extractors take at once; no draw depends on it
    seed: int = 0  # image i draws from (seed, i)
    device: str = "auto"  # cpu, cuda or auto


RANGES = {"t_starts": (0, 1000), "batch_size": (1, 2**20), "images": (2, 2**20), "seed": (0, 2**31),
          "crop": (32, 2**14), "seeds": (1, 1000), "sr_steps": (0, 2**31),
          "perceptual_weight": (0, 1e6)}  # fmt: skip
PRESETS: dict[str, dict] = {
    "fast": {},
    # Not in the paper: the weight of the perceptual loss.
    "paper": generate.PRESETS["paper"]
    | {"table": ("2", "1"), "sr": ("swinir", "rrdb", "hat", "swinir-l"), "sr_preset": "paper",
       "perceptual_weight": 1.0},
}  # fmt: skip
# The tables on which a flag acts, where these are not all of them.
OF_PHOTOS = ("1", "3", "4", "5", "7", "pictures", "figure1")  # networks trained on pairs of --hr
ACTS_ON = {
    # The other tables take one reference, as the paper does everywhere.
    "average": ("1", "3", "5", "7", "control", "pictures", "remainder", "leak"),
    "pairs": (*OF_PHOTOS, "control", "2", "6", "mtf", "remainder", "leak", "leakage"),
    "batch_size": ("2", "6", "extractors"),
    "hr": (*OF_PHOTOS, "factors", "extractors"),
    "lr": ("pictures", "extractors"),
    "images": ("figure1", "mtf", "remainder", "leak", "factors", "extractors", "leakage"),
    "crop": ("figure1", "factors", "extractors", "leakage"),
    "t_starts": ("3", "control", "mtf", "factors"),
    "data": ("1", "5", "pictures"),
    "sr": ("1", "3", "4", "5", "7", "control", "pictures"),
    "seeds": ("1", "3", "4", "5", "7", "control"),
    **dict.fromkeys(("sr_preset", "sr_steps", "sr_start_from"), (*OF_PHOTOS, "control")),
    "perceptual_weight": ("1",),
}


def resolved(cfg: Config, rt: Runtime) -> Config:
    """The settings with the defaults that depend on other settings; UserError for a wrong flag."""
    check_ranges(cfg, RANGES)
    require(cfg.crop % 8 == 0, f"--crop {cfg.crop}: must be a multiple of 8.")
    generate.check_config(generate.Config(**asdict(sampler_of(cfg))))
    folders = [DATA / name for name in ("RealSR", "DRealSR")]
    pairs = cfg.pairs or tuple(str(folder) for folder in folders if folder.is_dir())
    preset = cfg.sr_preset or ("paper" if rt.device.type == "cuda" and pairs else "smoke")
    data = cfg.data
    if data == SOURCES and not SYNDIFF.is_file():  # named by the default, not by the user
        data = tuple(name for name in data if name != "syndiff")
    for flag, names, choices in (
        ("--sr", cfg.sr, sr.NETWORKS),
        ("--data", data, SOURCES),
        ("--sr-preset", (preset,), tuple(sr.PRESETS)),
    ):
        for name in names:
            require(name in choices, f"{flag} {name}: choose among {', '.join(choices)}.")
    table = cfg.table or (("1",) if cfg.sr else ("2", "1"))
    networks = cfg.sr or ("fsrcnn",)
    return replace(cfg, table=table, pairs=pairs, sr=networks, sr_preset=preset, data=data)


def check_flags(given: Config, table: Sequence[str]) -> None:
    """UserError for a flag, as given by the user, that acts on none of these tables."""
    for name, tables in ACTS_ON.items():
        flag, which = f"--{name.replace('_', '-')}", ", ".join(tables)
        wrong = f"{flag} acts on none of the tables {', '.join(table)}, only on {which}."
        # A value of a preset was not given for any one table.
        usual = [values.get(name, getattr(Config, name)) for values in PRESETS.values()]
        require(getattr(given, name) in usual or not {*tables}.isdisjoint(table), wrong)


def sampler_of(cfg: Config) -> generate.Sampler:
    """How RealDGen makes LR, by the flags."""
    names = [field.name for field in fields(generate.Sampler)]
    return generate.Sampler(**{name: getattr(cfg, name) for name in names})


# A table checks its inputs, and returns the function that measures: values and text.
Measure = Callable[[], tuple[dict[str, Any], str]]


class Inputs:
    """Pairs, photos and the generator of a run, each loaded and checked when it is first used."""

    def __init__(self, cfg: Config, rt: Runtime) -> None:
        self.cfg, self.rt, self.device = cfg, rt, rt.device
        self.t_starts = cfg.t_starts or (0, 200)

    @cached_property
    def folders(self) -> list[Path]:
        """The folders of pairs; if there are none, a folder of sample photos degraded by D."""
        if self.cfg.pairs:
            return [Path(folder) for folder in self.cfg.pairs]
        if self.rt.is_main:
            print("no --pairs, no data/RealSR, no data/DRealSR: testing on sample photos degraded "
                  "by D. That shows only that everything works.")  # fmt: skip
        self.temporary = tempfile.TemporaryDirectory(prefix="realdgen-")
        folder = Path(self.temporary.name) / "sample"
        for i, file in enumerate(list_images([str(SAMPLE)], "--hr")):
            hr = crop_to_multiple(load_image(file), generate.SCALE, file)
            theta = degrade.sample_degradation(1, "camera", generator=make_generator(i))
            save_image(folder / "HR" / f"sample_{i}.png", hr)
            lr = degrade.degrade(hr[None], theta)[0]
            save_image(folder / "LR" / f"sample_{i}.png", lr)
        return [folder]

    @cached_property
    def found(self) -> dict[str, tuple[list[Pair], int]]:
        """The readable pairs of each folder, by its name, without Train; how many can't be read."""
        names = [folder.resolve().name for folder in self.folders]
        for name in names:
            require(names.count(name) == 1, f"--pairs: two folders have the name {name}.")
        return dict(zip(names, map(find_pairs, self.folders), strict=True))

    @cached_property
    def sets(self) -> dict[str, list[Pair]]:
        """All pairs of each set on which methods are compared."""
        return {name: pairs for name, (pairs, _) in self.found.items()}

    @cached_property
    def released_train(self) -> dict[str, list[Pair]]:
        """The pairs in Train of each set; none unless it is a release that has it."""
        parts = [find_pairs(folder, "Train")[0] for folder in self.folders]
        return dict(zip(self.sets, parts, strict=True))

    @cached_property
    def train(self) -> dict[str, list[Pair]]:
        """The pairs of each set that give references: Train of a release, else one half."""
        return {
            name: self.released_train[name] or halves(pairs)[0] for name, pairs in self.sets.items()
        }

    def other_scenes(self, most: int | None = None) -> dict[str, list[Pair]]:
        """The first pairs of each set that have other scenes: of Train, else of each other."""
        sets = {name: pairs[:most] for name, pairs in self.sets.items()}
        return sets_with_other_scenes(sets, self.cfg.seed, self.released_train)

    @cached_property
    def tests(self) -> dict[str, list[Pair]]:
        """The pairs of each set to test networks on: the others, Test of a release whole."""
        tests = {}
        for name, pairs in self.sets.items():
            half = halves(pairs)
            tests[name] = half[1] if self.train[name] == half[0] else pairs
            require(bool(tests[name]), f"--pairs {name}: no camera has two scenes.")
        return tests

    def split_text(self) -> str:
        """A sentence for each set: which pairs give references, and which are tested."""
        lines = []
        for name, pairs in self.tests.items():
            whole = len(pairs) == len(self.sets[name])
            train, rest = ("Train", "all of Test") if whole else ("every other scene", "the others")
            lines.append(f"{name}: references are of {train} ({len(self.train[name])}), "
                         f"tested are {rest} ({len(pairs)}).\n")  # fmt: skip
        return "".join(lines)

    @cached_property
    def net(self) -> diffusion.DecoupledDDPM:
        """The generator."""
        return generate.load_generator(self.cfg.checkpoint, self.device)

    @cached_property
    def sampler(self) -> generate.Sampler:
        """How RealDGen makes LR: by the flags, or without any as the weights want it."""
        name = self.cfg.checkpoint or "runs/diffusion/last.pt"
        return generate.with_sampler_of(self.net, sampler_of(self.cfg), name)

    @cached_property
    def printed(self) -> generate.Sampler:
        """The paper's sampler for AS_PRINTED, with as many evaluations as --num-steps."""
        paper = generate.Sampler(**generate.PRESETS["paper"])
        return replace(paper, num_steps=self.cfg.num_steps)

    @cached_property
    def other_weights(self) -> dict[Path, diffusion.DecoupledDDPM]:
        """The models of SYNDIFF and AS_PRINTED, where they exist."""
        paths = [path for path in (SYNDIFF, AS_PRINTED) if path.is_file()]
        return {path: generate.load_generator(str(path), self.device) for path in paths}

    def check_steps(self, *t_starts: int) -> None:
        """UserError for the sampler's T or one of these if the generator was not trained for it."""
        assert self.other_weights is not None  # read and checked now
        T, t_max = max([self.sampler.t_start, *t_starts]), self.net.t_max
        require(T <= t_max, f"T = {T}: the weights know {t_max} steps.")

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics whose networks have weights here; prints what is missing."""
        return available_metrics(self.device)

    @cached_property
    def hr_files(self) -> list[Path]:
        """The files of the HR photos."""
        return find_photos(self.cfg.hr, "hr", "--hr")

    @cached_property
    def photos(self) -> Tensor:
        """The middles (N, 3, 4 crop, 4 crop) of N > 1 HR photos, in [0, 1], in random order."""
        side, files = generate.SCALE * self.cfg.crop, self.hr_files
        crops = [*itertools.islice(middles(files, side, self.cfg.seed), self.cfg.images)]
        found = f"of {len(files)} files, {len(crops)} are photos of {side} x {side} pixels or more"
        require(len(crops) > 1, f"--hr: {found}; two are needed.")
        return torch.stack(crops)


def middle(image: Tensor, side: int) -> Tensor:
    """The middle side x side pixels of an image (3, H, W); ValueError if it is smaller."""
    top, left = ((n - side) // 2 for n in image.shape[1:])
    if min(top, left) < 0:
        raise ValueError(f"an image is under {side} x {side} pixels")
    return image[:, top : top + side, left : left + side]


def middles(files: Sequence[Path], side: int, seed: int) -> Iterator[Tensor]:
    """The middles (3, side, side) of photos in random order, without those that are smaller."""
    for i in torch.randperm(len(files), generator=make_generator(seed)).tolist():
        try:
            yield middle(load_image(files[i]), side)
        except ValueError as error:
            print(f"skipped: {files[i]} ({error})")
