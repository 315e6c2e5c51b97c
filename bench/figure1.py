"""Figure 1: the nearer the training degradation, the better; and how near each method comes.

In: HR photos and real pairs. Out: figure1.png with two panels, and their numbers. (a) A network is
trained with each blur and noise of a grid, on the same photos, and tested with each of them on
photos held out, and on the real pairs, whose own blur and noise are measured. (b) Codes E_deg of
real LR and of what each method makes of HR images, in the plane where they differ most.

    python benchmark.py --table figure1 --hr data/hr --pairs data/RealSR --images 24
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

import degrade
import generate
from bench import factors
from bench.codes import EXACT
from bench.downstream import check_training, cost_text, enlarging, train_network
from bench.generated import syntheses
from bench.inputs import Inputs, Measure
from bench.pairs import (
    Pair,
    camera_of,
    evaluate,
    find_pairs,
    load_hr,
    load_lr,
    table_text,
    with_other_scenes,
)
from common import require
from common.files import replacing
from common.photos import save_image, to_uint8
from common.runtime import wait_for_all

Place = tuple[float, float]  # blur (LR pixels) and noise (levels of 255)
BLURS, NOISES = (0.3, 0.7, 1.1), (0.0, 6.0, 12.0)
GRID: list[Place] = [(blur, noise) for noise in NOISES for blur in BLURS]

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
        save_image(folder / "hr" / f"{i:04d}.png", photo)
        save_image(folder / "lr" / f"{i:04d}.png", lr)


@torch.no_grad()
def place_of(pairs: Sequence[Pair]) -> Place:
    """Blur and noise of real LR, measured by comparison with its HR images: the medians."""
    values = []
    for pair in pairs:
        bank, lr = factors.reductions(load_hr(pair)), load_lr(pair.lr, pair.full)[None]
        values.append([factors.blur_of(lr, bank).item(), factors.noise_of(lr, bank).item()])
    blur, noise = np.median(values, axis=0).tolist()
    return blur, noise


def name_of(place: Place) -> str:
    """A place as people read it."""
    return f"blur {place[0]:.2g}, noise {place[1]:.2g}"


def distances(place: Place) -> np.ndarray:
    """How far each place of the grid is from a place, in units of the grid's extent."""
    steps = (np.array(GRID) - np.array(place)) / np.ptp(np.array(GRID), axis=0)
    return np.sqrt((steps**2).sum(1))


def rank_correlation(tests: Sequence[dict[str, Any]]) -> float:
    """Spearman's, of the distance of a training set and what it loses to the test's best one."""
    x = np.concatenate([distances(test["place"]) for test in tests])
    y = np.concatenate([max(test["psnr"]) - np.array(test["psnr"]) for test in tests])
    return float(stats.spearmanr(x, y)[0]) if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0


def train_on_grid(photos: Tensor, root: Path, inputs: Inputs) -> dict[str, Any]:
    """Panel (a): PSNR of each training set on each test, and what each training cost.

    photos (N, 3, H, W): every fourth is held out to test on.
    """
    rt, seed = inputs.rt, inputs.cfg.seed
    folders = [f"blur{blur:g}-noise{noise:g}" for blur, noise in GRID]
    held_out = torch.arange(len(photos)) % 4 == 0
    for place, folder in zip(GRID, folders, strict=True) if rt.is_main else ():
        write_set(root / "train" / folder, photos[~held_out], place, seed)
        write_set(root / "test" / folder, photos[held_out], place, seed + 1)
    wait_for_all(rt)
    sets = {name_of(place): find_pairs(root / "test" / folder)[0]
            for place, folder in zip(GRID, folders, strict=True)} | inputs.sets  # fmt: skip

    def psnr(net: nn.Module | None) -> list[float]:
        return [
            evaluate(enlarging(net), pairs, ["PSNR Y"], inputs.device, upwards=True)["mean"][
                "PSNR Y"
            ]
            for pairs in sets.values()
        ]

    costs, values = [], []
    for folder in folders:
        source = {"pairs": str(root / "train" / folder)}
        net, cost = train_network(inputs.cfg.sr[-1], source, folder, seed, root, inputs)
        costs.append(cost)
        values += [psnr(net)] if rt.is_main else []
    if not rt.is_main:
        return {}
    places = [*GRID, *(place_of(pairs) for pairs in inputs.sets.values())]
    tests = [
        {"name": name, "place": places[k], "real": k >= len(GRID), "n": len(pairs),
         "psnr": [row[k] for row in values], "bicubic": bicubic}
        for k, ((name, pairs), bicubic) in enumerate(zip(sets.items(), psnr(None), strict=True))
    ]  # fmt: skip
    for test in tests:
        test["rank"] = rank_correlation([test])
    return {"tests": tests, "costs": costs, "rank": rank_correlation(tests[: len(GRID)])}


# ---- (b) codes of E_deg -------------------------------------------------------------------------

CAMERAS = 6  # of a set with more, they are not told apart


@torch.no_grad()
def embed(inputs: Inputs) -> tuple[list[str], Tensor]:
    """Codes (N, D) of real LR, and of what each method makes of the HR images; whose each is."""
    labels, codes, seed = [], [], inputs.cfg.seed
    for name, pairs in inputs.sets.items():
        pairs = with_other_scenes(pairs, seed)
        pairs = pairs[:: -(-len(pairs) // inputs.cfg.images)]  # evenly spread
        methods = syntheses(inputs.net, inputs.sampler)
        few = len({camera_of(pair.name) for pair in pairs}) <= CAMERAS
        for pair in tqdm(pairs, desc=f"codes of {name}", unit="image", leave=False):
            camera = camera_of(pair.name) if few else ""
            labels.append(" ".join(filter(None, ["real", name, camera])))
            codes.append(generate.degradation_of(inputs.net, load_lr(pair.lr, pair.full)))
            hr, lr_ref = load_hr(pair)[None].to(inputs.device), load_lr(pair.reference, pair.full)
            for method, make in methods.items():
                lr = make(hr, [lr_ref], [seed << 32 | pair.index])[0]
                labels.append(method)
                codes.append(generate.degradation_of(inputs.net, to_uint8(lr) / 255))  # as in files
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
    table = torch.cdist(codes, codes[real], compute_mode=EXACT)
    table[real] += torch.full((int(real.sum()),), torch.inf, dtype=table.dtype).diag()
    nearest = table.min(1)[0]
    unit = nearest[real].median()
    if not unit.isfinite():
        return {}
    methods = dict.fromkeys(label for label in labels if not label.startswith("real"))
    return {m: (nearest[[label == m for label in labels]].median() / unit).item() for m in methods}


# ---- the picture and the table ------------------------------------------------------------------

WORST = 3.0  # dB of loss at which a box is white


def draw_panel_a(figure: Any, result: dict[str, Any]) -> None:
    """A map for each test: the PSNR of each training set, and a triangle where the test is.

    Maps of the grid's tests stand where they are in the plane, those of real sets to the right.
    """
    tests = result["tests"]
    real = [test for test in tests if test["real"]]
    rows = len(NOISES)
    columns = len(BLURS) + -(-len(real) // rows)
    maps = figure.subplots(rows, columns, squeeze=False)
    for axes in maps.flat:
        axes.axis("off")
    for k, test in enumerate(tests):
        row, column = divmod(k, len(BLURS))  # of the grid, the least noise below
        if test["real"]:
            column, row = divmod(k - len(GRID), rows)
            column, row = len(BLURS) + column, rows - 1 - row
        axes = maps[rows - 1 - row, column]
        loss = max(test["psnr"]) - np.array(test["psnr"]).reshape(rows, len(BLURS))
        axes.axis("on")
        axes.imshow(loss, cmap="Blues_r", vmin=0, vmax=WORST, origin="lower", aspect="auto")
        for (y, x), value in np.ndenumerate(loss):
            style = {"ha": "center", "va": "center", "fontsize": "small"}
            colour = "white" if value < WORST / 2 else "black"
            axes.text(x, y, f"{max(test['psnr']) - value:.2f}", color=colour, **style)
        x, y = (
            np.interp(test["place"][i], v, range(len(v))) for i, v in enumerate((BLURS, NOISES))
        )
        axes.plot(x, y + 0.3, "r^", markeredgecolor="white")
        place = f": {name_of(test['place'])}" if test["real"] else ""
        axes.set_title(test["name"] + place, fontsize="small")
        axes.set_xticks(range(len(BLURS)), BLURS, fontsize="small")
        axes.set_yticks(range(rows), NOISES, fontsize="small")
    figure.suptitle("(a) PSNR Y (dB) of a network trained on each box; triangle: the test's place")
    figure.supxlabel("blur, LR pixels", fontsize="medium")
    figure.supylabel("noise, levels of 255", fontsize="medium")


def draw_panel_b(figure: Any, result: dict[str, Any]) -> None:
    """A scatter of all codes: circles are real LR, triangles the methods'."""
    axes, points = figure.subplots(), np.array(result["points"])
    for name in sorted(set(result["labels"]), key=lambda name: (name.startswith("real"), name)):
        x, y = points[[label == name for label in result["labels"]]].T
        near = result["nearness"].get(name)
        label = name + (f": {near:.2f}" if near is not None else "")
        axes.scatter(x, y, 18, marker="o" if name.startswith("real") else "^", label=label)
    axes.set(**{
        f"{axis}label": f"component {i + 1} ({share:.0%} of the variance)"
        for i, (axis, share) in enumerate(zip("xy", result["shares"], strict=True))
    })  # fmt: skip
    title = "number: distance to the nearest real one (among real ones: 1)"
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", title=title)
    figure.suptitle("(b) E_deg's codes, principal components")


def save_figure(path: Path, result: dict[str, Any]) -> None:
    """Both panels side by side, as PNG: whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 7.5), layout="constrained")
    panels = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.5, 1))[0]
    draw_panel_a(panels[0], result)
    draw_panel_b(panels[1], result)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def table_figure1(name: str, inputs: Inputs) -> Measure:
    """The numbers of both panels, and figure1.png."""
    cfg = inputs.cfg
    check_training(inputs)
    inputs.check_steps(cfg.t_start)
    photos = inputs.photos
    for folder, pairs in inputs.sets.items():
        enough = bool(with_other_scenes(pairs, cfg.seed))
        require(enough, f"--pairs {folder}: no camera has two pairs.")

    def measure() -> tuple[dict[str, Any], str]:
        # What was trained on other photos is of no use to these.
        key = zlib.crc32(to_uint8(photos).numpy().tobytes())
        out = Path(cfg.out)
        result = train_on_grid(photos, out / "figure1" / f"{key:08x}-{cfg.seed}", inputs)
        if not inputs.rt.is_main:
            return {}, ""
        labels, codes = embed(inputs)
        points, shares = plane(codes)
        result |= {"labels": labels, "points": points.tolist(), "shares": shares}
        result |= {"nearness": nearness(labels, codes)}
        save_figure(out / "figure1.png", result)
        return result, text_of_figure1(result)

    return measure


def text_of_figure1(result: dict[str, Any]) -> str:
    """The numbers of Figure 1, and what a reader must know."""
    lines = []
    for test in result["tests"]:
        best = max(test["psnr"])
        cells = [f"{v:.2f}" if v < best else f"**{v:.2f}**" for v in test["psnr"]]
        cells += [f"{test['bicubic']:.2f}", f"{test['rank']:.2f}", str(test["n"])]
        label = test["name"] + (f" ({name_of(test['place'])})" if test["real"] else "")
        lines.append([label, *cells])
    heads = ["test", *map(name_of, GRID), "bicubic", "rank correlation", "n"]
    near = [[method, f"{value:.2f}"] for method, value in result["nearness"].items()]
    cost = ", ".join(cost_text(result["costs"], key) for key in ("parameters", "seconds", "memory"))
    return f"""## Figure 1: training sets of one blur and one noise each, PSNR Y

![Figure 1](figure1.png)

{table_text(heads, lines)}
Rank correlation (Spearman): of the distance between training set and test with the dB that the
training set loses to the test's best one; {result["rank"]:.3f} over all tests of the grid. Blur (of
a Gaussian) in LR pixels, noise in levels of 255; both in units of the grid's extent for the
distance. Columns are training sets. Blur and noise of real sets are medians of what is measured
with the help of the HR images; n is the number of images tested. A training: {cost}.

{table_text(["LR of", "distance of its codes to the nearest real one"], near)}
Codes E_deg; medians, in units of the same distance among real images. RealDGen's filter looks at
these codes, too, and E_deg's training has seen the recipes of D: a picture of what E_deg sees, no
proof. The plane shows {sum(result["shares"]):.0%} of the variance.
"""
