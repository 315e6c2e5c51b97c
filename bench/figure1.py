"""Figure 1: the nearer the training degradation, the better; and how near each method comes.

In: HR photos and, if there are any, real pairs. Out: a picture of two panels, and their numbers.
(a) FSRCNN is trained with each blur and noise of a grid, on the same photos, and tested with each
of them on photos held out, and on the real pairs, whose own blur and noise are measured. (b) Codes
E_deg of real LR and of what each method makes of HR images, in the plane where they differ most.

    python benchmark.py --table figure1 --hr data/hr --pairs data/RealSR
    python benchmark.py --table figure1 --blurs 0.4 0.8 1.2 --noises 0 10 20 --sr-steps 1000
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

import common
import degrade
from bench import factors
from bench.downstream import MEMORY, Settings, cost_cells, super_resolved, train_network
from bench.pairs import (
    Method,
    Pair,
    camera_of,
    evaluate,
    find_pairs,
    load_hr,
    load_lr,
    with_other_scenes,
)

Place = tuple[float, float]  # blur (LR pixels) and noise (levels of 255)

# ---- (a) training sets and tests, each with one blur and one noise ------------------------------


def blurred_and_noisy(place: Place, seed: int) -> degrade.Degradation:
    """Parameters of D for one image: this blur, the reduction, this noise and nothing else."""
    theta = factors.only("blur", torch.tensor([place[0]]), noise=seed)
    theta.order[:, 2] = degrade.OPERATIONS.index("gaussian 2")
    theta.gaussian_std[:, 1] = place[1] / 255
    return theta


def write_set(folder: Path, hr: Tensor, place: Place, seed: int) -> None:
    """Pairs of photos (N, 3, H, W) and their LR of this blur and noise, as files in hr/ and lr/."""
    for i, photo in enumerate(hr):
        lr = degrade.degrade(photo[None], blurred_and_noisy(place, seed << 32 | i))[0]
        common.save_image(folder / "hr" / f"{i:04d}.png", photo)
        common.save_image(folder / "lr" / f"{i:04d}.png", lr)


@torch.no_grad()
def place_of(pairs: Sequence[Pair]) -> Place:
    """Blur and noise of real LR, measured by comparison with its HR images: the medians."""
    values = []
    for pair in pairs:
        bank, lr = factors.reductions(load_hr(pair)), load_lr(pair.lr, pair.shrink)[None]
        values.append([factors.blur_of(lr, bank).item(), factors.noise_of(lr, bank).item()])
    blur, noise = np.median(values, axis=0).tolist()
    return blur, noise


def name_of(place: Place) -> str:
    """A place as people read it."""
    return f"blur {place[0]:.2g}, noise {place[1]:.2g}"


def distances(here: Place, grid: Sequence[Place]) -> np.ndarray:
    """How far each place of a grid is from here, blur and noise in units of the grid's extent."""
    extent = np.ptp(np.array(grid), axis=0)
    steps = (np.array(grid) - np.array(here)) / np.where(extent > 0, extent, 1)
    return np.sqrt((steps**2).sum(1))


def rank_correlation(tests: Sequence[dict[str, Any]], grid: Sequence[Place]) -> float:
    """Spearman's, of the distance of a training set and what it loses to the test's best one."""
    x = np.concatenate([distances(test["place"], grid) for test in tests])
    y = np.concatenate([max(test["psnr"]) - np.array(test["psnr"]) for test in tests])
    return float(stats.spearmanr(x, y)[0]) if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0


STEPS = 300  # of FSRCNN with the preset smoke: enough to tell the training sets apart


def train_on_grid(
    photos: Tensor, real: dict[str, list[Pair]], root: Path, cfg: Settings, rt: common.Runtime
) -> dict[str, Any]:
    """Panel (a): PSNR of each training set on each test, and what each training cost.

    photos (N, 3, H, W): every fourth is held out to test on.
    """
    grid: list[Place] = [(blur, noise) for noise in cfg.noises for blur in cfg.blurs]
    folders = [f"blur{blur:g}-noise{noise:g}" for blur, noise in grid]
    held_out = torch.arange(len(photos)) % 4 == 0
    for place, folder in zip(grid, folders, strict=True) if rt.is_main else ():
        write_set(root / "train" / folder, photos[~held_out], place, cfg.seed)
        write_set(root / "test" / folder, photos[held_out], place, cfg.seed + 1)
    common.wait_for_all(rt)
    few = STEPS if cfg.sr_preset == "smoke" else 0
    cfg = dataclasses.replace(cfg, out=str(root), sr_steps=cfg.sr_steps or few)
    sets = [*(find_pairs(root / "test" / folder)[0] for folder in folders), *real.values()]
    every = [  # all tests at once, under names that tell them apart
        dataclasses.replace(pair, name=f"{number}/{pair.name}")
        for number, pairs in enumerate(sets)
        for pair in pairs
    ]

    def measure(name: str, net: nn.Module | None) -> list[float]:
        method = functools.partial(super_resolved, net=net, bf16=cfg.bf16)
        images = evaluate(name, method, every, ["PSNR Y"], 1, rt.device, True)["images"]
        values: list[list[float]] = [[] for _ in sets]
        for key, value in images.items():
            values[int(key.split("/")[0])].append(value["PSNR Y"])
        return [float(np.mean(v)) for v in values]

    costs, psnr = [], []
    for place, folder in zip(grid, folders, strict=True):
        source = {"pairs": str(root / "train" / folder)}
        net, cost = train_network("fsrcnn", source, folder, cfg.seed, cfg, rt)
        costs.append(cost)
        psnr += [measure(name_of(place), net)] if rt.is_main else []
    if not rt.is_main:
        return {}
    bicubic = measure("bicubic", None)
    places = [*grid, *(place_of(pairs) for pairs in real.values())]
    labels = [*map(name_of, grid), *real]
    tests = [
        {"name": labels[k], "place": places[k], "real": k >= len(grid), "n": len(sets[k]),
         "psnr": [values[k] for values in psnr], "bicubic": bicubic[k]}
        for k in range(len(sets))
    ]  # fmt: skip
    return {"grid": grid, "tests": tests, "costs": costs, "steps": cfg.sr_steps,
            "memory": MEMORY[rt.device.type]}  # fmt: skip


# ---- (b) codes of E_deg -------------------------------------------------------------------------


def some(items: Sequence[Any], count: int) -> list[Any]:
    """So many of them, evenly spread; all, if there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def with_references(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """Some of the pairs, each with the LR of another scene of its camera as reference."""
    return some(with_other_scenes(pairs, seed), count)


def unpaired(hr: Sequence[Pair], files: Sequence[Path], root: Path, side: int) -> list[Pair]:
    """Where there are no real pairs: HR photos, with the middles of real LR photos as references.

    The camera is the photo's folder.
    """
    crops = []
    for number, file in enumerate(some(files, len(hr))):
        try:
            image = common.load_image(file)
        except ValueError as error:
            print(f"skipped: {error}")
            continue
        crops.append((f"{file.parent.name}/{number}", root / f"{number:04d}.png"))
        common.save_image(crops[-1][1], factors.middle(image, min(side, *image.shape[1:])))
    common.require(bool(crops), "--lr: none of its photos can be read.")
    return [
        dataclasses.replace(pair, index=i, name=name, lr=crop, reference=crop)
        for i, (pair, (name, crop)) in enumerate(zip(hr, itertools.cycle(crops), strict=False))
    ]


CAMERAS = 6  # of a set with more, they are not told apart


@torch.no_grad()
def embed(
    sets: dict[str, list[Pair]],
    methods: dict[str, Method],
    code: Callable[[Tensor], Tensor],
    device: torch.device,
) -> tuple[list[str], Tensor]:
    """Codes (N, D) of real LR, and of what each method makes of the HR images; whose each is.

    code: an LR image (3, h, w) -> its F_deg (1, D).
    """
    labels, codes, seen = [], [], set()
    for name, pairs in sets.items():
        few = len({camera_of(pair.name) for pair in pairs}) <= CAMERAS
        for pair in tqdm(pairs, desc=f"codes of {name}", unit="image"):
            if pair.lr not in seen:
                seen.add(pair.lr)
                camera = camera_of(pair.name) if few else ""
                labels.append(" ".join(filter(None, ["real", name, camera])))
                codes.append(code(load_lr(pair.lr, pair.shrink)))
            for method, make in methods.items():
                lr = make(load_hr(pair)[None].to(device), [pair])[0]
                labels.append(method)
                codes.append(code(common.to_uint8(lr) / 255))  # as in files
    return labels, torch.cat(codes).double().cpu()


def plane(codes: Tensor) -> tuple[Tensor, list[float]]:
    """Principal components: codes (N, D) -> (N, 2), and the shares of variance they show."""
    centred = codes - codes.mean(0)
    _, widths, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
    share = widths.square() / widths.square().sum()
    return centred @ axes.T, share[:2].tolist()


def nearness(labels: Sequence[str], codes: Tensor) -> dict[str, float]:
    """Median distance of each method's codes (of N, D) to the nearest real one.

    In units of the same distance among real ones, to another one; nothing, if there is but one.
    """
    real = torch.tensor([label.startswith("real") for label in labels])
    table = torch.cdist(codes, codes[real], compute_mode="donot_use_mm_for_euclid_dist")
    table[real] += torch.full((int(real.sum()),), torch.inf, dtype=table.dtype).diag()
    nearest = table.min(1)[0]
    unit = nearest[real].median()
    if not unit.isfinite():
        return {}
    methods = dict.fromkeys(label for label in labels if not label.startswith("real"))
    return {m: (nearest[[label == m for label in labels]].median() / unit).item() for m in methods}


# ---- the picture --------------------------------------------------------------------------------

COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0),
           (86, 180, 233), (90, 90, 90), (150, 90, 40))  # fmt: skip
RED, EDGE, WHITE = (220, 0, 0), (120, 120, 120), (255, 255, 255)
WORST = 3.0  # dB of loss at which a box is white
MARKS = (
    ((0, -1.2), (-1.2, 1), (1.2, 1)),
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
    ((0, 1.2), (-1.2, -1), (1.2, -1)),
)
CELL = (62, 40)  # pixels of a box


def write_text(
    draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int = 15, anchor: str = "la",
    fill: tuple[int, int, int] = (0, 0, 0),
) -> None:  # fmt: skip
    """Text at a point, of which the anchor says where in the text it is (Pillow's letters)."""
    draw.text((x, y), text, fill, ImageFont.load_default(size), anchor)


def write_upwards(picture: Image.Image, x: int, y: int, text: str) -> None:
    """Text centred at a point, turned to be read from below to above."""
    length = int(ImageFont.load_default(15).getlength(text)) + 4
    line = Image.new("RGB", (length, 22), "white")
    write_text(ImageDraw.Draw(line), length / 2, 11, text, anchor="mm")
    picture.paste(line.rotate(90, expand=True), (x - 11, y - length // 2))


def shade(loss: float) -> tuple[int, int, int]:
    """Dark blue for the best training set, white for one that loses WORST or more."""
    light = min(1.0, loss / WORST) ** 0.7
    red, green, blue = (round(a + light * (255 - a)) for a in (16, 78, 139))
    return red, green, blue


def place_in(
    box: tuple[int, int], place: Place, blurs: Sequence[float], noises: Sequence[float]
) -> tuple[float, float]:
    """Where a place is in a map whose boxes are the grid; beyond the grid: at its edge."""
    column = np.interp(place[0], blurs, np.arange(len(blurs))) if len(blurs) > 1 else 0.0
    row = np.interp(place[1], noises, np.arange(len(noises))) if len(noises) > 1 else 0.0
    w, h = CELL
    return box[0] + (column + 0.5) * w, box[1] + (len(noises) - 1 - row + 0.5) * h


def draw_map(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], test: dict[str, Any], grid: Sequence[Place]
) -> None:
    """One test: a box for each training set with its PSNR, and a red triangle where the test is."""
    blurs, noises = (sorted(set(values)) for values in zip(*grid, strict=True))
    w, h = CELL
    best = max(test["psnr"])
    for place, value in zip(grid, test["psnr"], strict=True):
        x, y = place_in(at, place, blurs, noises)
        fill = shade(best - value)
        draw.rectangle((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill, WHITE)
        ink = WHITE if sum(fill) < 420 else (0, 0, 0)
        write_text(draw, x, y + 7, f"{value:.2f}", 14, "mm", ink)
    draw.rectangle((*at, at[0] + w * len(blurs), at[1] + h * len(noises)), None, EDGE)
    x, y = place_in(at, test["place"], blurs, noises)
    y -= 9
    draw.polygon([(x, y - 7), (x - 7, y + 5), (x + 7, y + 5)], RED, WHITE)
    write_text(draw, at[0], at[1] - 5, test["name"], 14, "ld")


def draw_panel_a(picture: Image.Image, result: dict[str, Any]) -> None:
    """Maps of the grid's tests where they are in the plane, those of the real sets to the right."""
    draw, grid = ImageDraw.Draw(picture), result["grid"]
    blurs, noises = (sorted(set(values)) for values in zip(*grid, strict=True))
    step = (CELL[0] * len(blurs) + 26, CELL[1] * len(noises) + 44)
    left, top = 70, 100
    write_text(draw, left, 22, "(a) PSNR Y (dB) of FSRCNN trained on each box", 20)
    for test in [test for test in result["tests"] if not test["real"]]:
        column, row = blurs.index(test["place"][0]), noises.index(test["place"][1])
        at = (left + column * step[0], top + (len(noises) - 1 - row) * step[1])
        draw_map(draw, at, test, grid)
        for blur in blurs if row == 0 else ():  # numbers at the lower and the left edge of all
            x, y = place_in(at, (blur, noises[0]), blurs, noises)
            write_text(draw, x, y + CELL[1] // 2 + 4, f"{blur:g}", 13, "mt")
        for noise in noises if column == 0 else ():
            x, y = place_in(at, (blurs[0], noise), blurs, noises)
            write_text(draw, x - CELL[0] // 2 - 6, y, f"{noise:g}", 13, "rm")
    real = [test for test in result["tests"] if test["real"]]
    for number, test in enumerate(real):
        column, row = divmod(number, len(noises))
        at = (left + 20 + (len(blurs) + column) * step[0], top + row * step[1])
        title = f"{test['name']}: {name_of(test['place'])}"
        draw_map(draw, at, test | {"name": title}, grid)
    bottom = top + len(noises) * step[1] - 16
    middle = left + (len(blurs) * step[0] - 26) // 2
    write_text(draw, middle, bottom, "blur, LR pixels: maps are tests, boxes training sets",
               anchor="mt")  # fmt: skip
    write_upwards(picture, left - 44, top + (bottom - top) // 2 - 14, "noise, levels of 255")
    bottom += 36
    corners = [(left + 7, bottom + 2), (left, bottom + 14), (left + 14, bottom + 14)]
    draw.polygon(corners, RED)
    write_text(draw, left + 22, bottom, "where the test is")
    for i in range(151):
        draw.line((left + 190 + i, bottom, left + 190 + i, bottom + 16), shade(WORST * i / 150))
    draw.rectangle((left + 190, bottom, left + 341, bottom + 16), None, EDGE)
    write_text(draw, left + 350, bottom, f"loss to the best box: 0 to {WORST:g} dB or more")
    text = f"rank correlation of distance and loss: {result['rank']:.2f}"
    write_text(draw, left, bottom + 30, text + f" (tests of the grid, n = {len(grid) ** 2})")


def draw_mark(draw: ImageDraw.ImageDraw, x: float, y: float, number: int, label: str) -> None:
    """A circle for a real photo; a triangle, square, diamond or another triangle for a method."""
    colour, r = COLOURS[number % len(COLOURS)], 5.0
    if label.startswith("real"):
        draw.ellipse((x - r, y - r, x + r, y + r), colour, WHITE)
        return
    corners = MARKS[number % len(MARKS)]
    draw.polygon([(x + r * a, y + r * b) for a, b in corners], colour, WHITE)


def draw_panel_b(picture: Image.Image, left: int, result: dict[str, Any]) -> None:
    """A scatter of all codes with a legend below: circles are real LR, other marks the methods'."""
    draw, top, side = ImageDraw.Draw(picture), 80, 480
    points, labels = np.array(result["points"]), result["labels"]
    low, high = points.min(0), points.max(0)
    margin = 0.06 * np.maximum(high - low, 1e-9)
    low, high = low - margin, high + margin
    write_text(draw, left, 22, "(b) E_deg's codes, principal components", 20)
    draw.rectangle((left, top, left + side, top + side), None, EDGE)
    names = list(dict.fromkeys(labels))  # in order of the legend: real ones first
    names = sorted(names, key=lambda name: not name.startswith("real"))
    for label, (x, y) in sorted(
        zip(labels, ((points - low) / (high - low)).tolist(), strict=True),
        key=lambda item: item[0].startswith("real"),
    ):
        draw_mark(draw, left + x * side, top + (1 - y) * side, names.index(label), label)
    shares = [
        f"component {i + 1} ({share:.0%} of variance)" for i, share in enumerate(result["shares"])
    ]
    write_text(draw, left + side // 2, top + side + 10, shares[0], anchor="mt")
    write_upwards(picture, left - 18, top + side // 2, shares[1])
    for number, name in enumerate(names):
        x, y = left + 10 + number % 2 * 260, top + side + 48 + number // 2 * 24
        draw_mark(draw, x, y + 9, number, name)
        near = result["nearness"].get(name)
        write_text(draw, x + 14, y, name + (f": {near:.2f}" if near else ""))
    text = "numbers: median distance to the nearest real one (among real ones: 1)"
    write_text(draw, left, top + side + 54 + (len(names) + 1) // 2 * 24, text)


def save_figure(path: Path, result: dict[str, Any]) -> None:
    """Both panels side by side, as PNG: whole or not at all."""
    blurs, noises = (len(set(values)) for values in zip(*result["grid"], strict=True))
    real = sum(test["real"] for test in result["tests"])
    columns = blurs + -(-real // noises)
    left = 70 + columns * (CELL[0] * blurs + 26) + 80
    legend = -(-len(set(result["labels"])) // 2) * 24
    height = max(100 + noises * (CELL[1] * noises + 44) + 80, 650 + legend)
    picture = Image.new("RGB", (max(left, 740) + 540, height), "white")
    draw_panel_a(picture, result)
    draw_panel_b(picture, max(left, 740), result)
    with common.replacing(path) as temporary:
        picture.save(temporary, format="PNG")


# ---- the table ----------------------------------------------------------------------------------


def table_figure1(
    photos: Tensor,
    sets: dict[str, list[Pair]],
    lr: Sequence[Path],
    methods: dict[str, Method],
    code: Callable[[Tensor], Tensor],
    cfg: Settings,
    rt: common.Runtime,
) -> dict[str, Any]:
    """The numbers of both panels, and figure1.png.

    photos (N, 3, H, W) to train on and to test; sets of real pairs by name, or none, and then real
    LR photos; methods that make LR of HR; code: (3, h, w) -> F_deg (1, D).
    """
    # What was trained on other photos is of no use to these.
    key = zlib.crc32(common.to_uint8(photos).numpy().tobytes())
    root = Path(cfg.out) / "figure1" / f"{key:08x}-{cfg.seed}"
    result = train_on_grid(photos, sets, root, cfg, rt)
    if not rt.is_main:
        return {}
    real = {name: with_references(pairs, cfg.images, cfg.seed) for name, pairs in sets.items()}
    if not sets:
        one = f"blur{cfg.blurs[0]:g}-noise{cfg.noises[0]:g}"  # all have the same HR images
        hr = [pair for kind in ("train", "test") for pair in find_pairs(root / kind / one)[0]]
        real = {"": unpaired(hr, lr, root / "real", cfg.crop)}
    labels, codes = embed(real, methods, code, rt.device)
    points, shares = plane(codes)
    result |= {"labels": labels, "points": points.tolist(), "shares": shares}
    result |= {"nearness": nearness(labels, codes)}
    tests = [test for test in result["tests"] if not test["real"]]
    result["rank"] = rank_correlation(tests, result["grid"])
    for test in result["tests"]:
        test["rank"] = rank_correlation([test], result["grid"])
    save_figure(Path(cfg.out) / "figure1.png", result)
    return result


def markdown_figure1(result: dict[str, Any]) -> str:
    """The numbers of Figure 1, and what one must know to read them."""
    grid, tests = result["grid"], result["tests"]
    size, seconds, memory = cost_cells(result["costs"], ("parameters", "seconds", "memory"))
    lines = ["## Figure 1: training sets of one blur and one noise each, FSRCNN, PSNR Y", ""]
    lines += ["![Figure 1](figure1.png)", ""]
    lines += [f"| test | {' | '.join(map(name_of, grid))} | bicubic | rank correlation | n |"]
    lines += ["| --- |" + " ---: |" * (len(grid) + 3)]
    for test in tests:
        best = max(test["psnr"])
        cells = [f"{v:.2f}" if v < best else f"**{v:.2f}**" for v in test["psnr"]]
        cells += [f"{test['bicubic']:.2f}", f"{test['rank']:.2f}", str(test["n"])]
        name = test["name"] + (f" ({name_of(test['place'])})" if test["real"] else "")
        lines += [f"| {name} | {' | '.join(cells)} |"]
    lines += [
        "",
        "Rank correlation (Spearman): of the distance between training set and test with the dB",
        "that the training set loses to the test's best one;",
        f"{result['rank']:.3f} over all tests of the grid.",
        "Blur (of a Gaussian) in LR pixels, noise in levels of 255; both in units of the grid's",
        "extent for the distance. Columns are training sets. Blur and noise of real sets are",
        f"medians of what is measured with the help of the HR images. {result['steps'] or 'All'}",
        "steps of training; n is the number of images tested.",
        f"A network: {size} parameters, {seconds} s of training, {memory} ({result['memory']}).",
        "",
        "| LR of | distance of its codes to the nearest real one |",
        "| --- | ---: |",
        *(f"| {name} | {value:.2f} |" for name, value in result["nearness"].items()),
        "",
        "Codes E_deg; medians, in units of the same distance among real images. RealDGen's filter",
        "looks at these codes, too, and E_deg's training has seen the recipes of D: a picture of",
        f"what E_deg sees, no proof. The plane shows {sum(result['shares']):.0%} of the variance.",
    ]
    return "\n".join(lines) + "\n"
