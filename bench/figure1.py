"""Figure 1: the nearer the training degradation, the better; and how near each method comes.

In: HR photos and real pairs. Out: figure1.png with two panels, and their numbers. (a) A network is
trained on photos with each blur and noise of a grid. It is tested on other photos with each of
them, and on the real pairs, whose blur and noise are measured. (b) F_deg of real LR and of each
method's LR, in the plane where they differ most.

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
from bench.downstream import check_training, cost_text, meaningless, tested, train_network
from bench.generated import left_out_text, lr_of, on_pairs, other_methods, syntheses
from bench.inputs import Config, Inputs, Measure
from bench.pairs import (
    Pair,
    camera_of,
    find_pairs,
    load_hr,
    load_lr,
    table_text,
)
from bench.separation import EXACT
from common.files import replacing
from common.images import save_image, to_uint8
from common.runtime import wait_for_all

Place = tuple[float, float]  # blur (LR pixels) and noise (levels of 255)
NETWORK = "fsrcnn"  # as in the paper
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
    """Write photos (N, 3, H, W) to hr/, and their LR of this blur and noise to lr/."""
    for i, photo in enumerate(hr):
        lr = degrade.degrade(photo[None], blurred_and_noisy(place, seed << 32 | i))[0]
        save_image(folder / "hr" / f"{i:04d}.png", photo)
        save_image(folder / "lr" / f"{i:04d}.png", lr)


@torch.no_grad()
def place_of(pairs: Sequence[Pair]) -> Place:
    """Blur and noise of real LR: the medians of what comparison with its HR images gives."""
    values = []
    for pair in pairs:
        bank, lr = factors.reductions(load_hr(pair)), load_lr(pair.lr, pair.full)[None]
        values.append([factors.blur_of(lr, bank).item(), factors.noise_of(lr, bank).item()])
    blur, noise = np.median(values, axis=0).tolist()
    return blur, noise


def name_of(place: Place) -> str:
    """A place in words."""
    return f"blur {place[0]:.2g}, noise {place[1]:.2g}"


def distances(place: Place) -> np.ndarray:
    """Distance of each place of the grid from a place, in units of the grid's extent."""
    steps = (np.array(GRID) - np.array(place)) / np.ptp(np.array(GRID), axis=0)
    return np.sqrt((steps**2).sum(1))


def rank_correlation(tests: Sequence[dict[str, Any]]) -> float:
    """Spearman's, of the distance of training set and test, and the dB lost to the best set."""
    x = np.concatenate([distances(test["place"]) for test in tests])
    y = np.concatenate([max(test["psnr"]) - np.array(test["psnr"]) for test in tests])
    return float(stats.spearmanr(x, y)[0]) if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0


def train_on_grid(photos: Tensor, root: Path, inputs: Inputs) -> dict[str, Any]:
    """Panel (a): PSNR of each training set on each test, and what each training cost.

    photos (N, 3, H, W): every fourth is held out to test on.
    """
    rt, seed = inputs.rt, inputs.cfg.seed
    folders = {place: f"blur{place[0]:g}-noise{place[1]:g}" for place in GRID}
    held_out = torch.arange(len(photos)) % 4 == 0
    for place, folder in folders.items() if rt.is_main else ():
        write_set(root / "train" / folder, photos[~held_out], place, seed)
        write_set(root / "test" / folder, photos[held_out], place, seed + 1)
    wait_for_all(rt)
    drawn = {place: find_pairs(root / "test" / folder)[0] for place, folder in folders.items()}
    sets = {name_of(place): pairs for place, pairs in drawn.items()} | inputs.sets

    def psnr_of_tests(net: nn.Module | None) -> list[float]:
        found = tested(net, sets, ["PSNR Y"], inputs)
        return [of_set["mean"]["PSNR Y"] for of_set in found.values()]

    costs, values = [], []
    for folder in folders.values():
        flags = {"pairs": str(root / "train" / folder)}
        net, cost = train_network(NETWORK, flags, folder, seed, root, inputs)
        costs.append(cost)
        values.append(psnr_of_tests(net))
    if not rt.is_main:
        return {}
    places = [*GRID, *(place_of(pairs) for pairs in inputs.sets.values())]
    bicubic = psnr_of_tests(None)
    tests: list[dict[str, Any]] = []
    for k, (name, pairs) in enumerate(sets.items()):
        test = {"name": name, "place": places[k], "real": k >= len(GRID), "n": len(pairs)}
        test |= {"psnr": [row[k] for row in values], "bicubic": bicubic[k]}
        tests.append(test | {"rank": rank_correlation([test])})
    return {"tests": tests, "costs": costs, "rank": rank_correlation(tests[: len(GRID)])}


# ---- (b) F_deg of real and of generated LR ------------------------------------------------------

MOST_CAMERAS = 6  # the cameras of a set with more get one label


@torch.no_grad()
def embed(inputs: Inputs) -> tuple[list[str], Tensor]:
    """F_deg (N, D) of real LR and of each method's LR, and the label of each."""
    labels: list[str] = []
    degradations, seed = [], inputs.cfg.seed
    methods = syntheses(inputs.net, inputs.sampler) | other_methods(inputs, ["SynDiff"])
    for name, pairs in inputs.other_scenes().items():
        pairs = pairs[:: -(-len(pairs) // inputs.cfg.images)]  # evenly spread
        labelled = len({camera_of(pair.name) for pair in pairs}) <= MOST_CAMERAS
        for pair in tqdm(pairs, desc=f"F_deg of {name}", unit="image", leave=False):
            camera = camera_of(pair.name) if labelled else ""
            images = {" ".join(filter(None, ["real", name, camera])): load_lr(pair.lr, pair.full)}
            hr = load_hr(pair)
            for method, make in methods.items():
                images[method] = lr_of(on_pairs(make, seed), pair, hr, inputs)
            labels += images
            degradations += [generate.degradation_of(inputs.net, lr) for lr in images.values()]
    return labels, torch.cat(degradations).double().cpu()


def plane(degradations: Tensor) -> tuple[Tensor, list[float]]:
    """The first two principal components (N, 2) of F_deg (N, D), and their shares of variance."""
    centred = degradations - degradations.mean(0)
    _, widths, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
    share = widths.square() / widths.square().sum()
    return centred @ axes.T, share[:2].tolist()


def nearness(labels: Sequence[str], degradations: Tensor) -> dict[str, float]:
    """Median distance of each method's F_deg (of N, D) to the nearest real one.

    The unit is the median distance of a real one to the nearest other real one. Empty for a single
    real image.
    """
    real = torch.tensor([label.startswith("real") for label in labels])
    table = torch.cdist(degradations, degradations[real], compute_mode=EXACT)
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
    """A map for each test: the PSNR of each training set, and a triangle at the test's place.

    The maps of the grid's tests are arranged as the grid; those of real sets are on the right.
    """
    tests, rows, columns = result["tests"], len(NOISES), len(BLURS)
    maps = figure.subplots(rows, -(-len(tests) // rows), squeeze=False)
    of_grid, of_real = maps[::-1, :columns], maps[:, columns:].T  # the least noise is below
    places = [*of_grid.flat, *of_real.flat]
    for axes in places[len(tests) :]:
        axes.axis("off")
    for axes, test in zip(places, tests, strict=False):
        loss = max(test["psnr"]) - np.array(test["psnr"]).reshape(rows, columns)
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
        axes.set_xticks(range(columns), BLURS, fontsize="small")
        axes.set_yticks(range(rows), NOISES, fontsize="small")
    figure.suptitle("(a) PSNR Y (dB) of a network trained on each box; triangle: the test's place")
    figure.supxlabel("blur, LR pixels", fontsize="medium")
    figure.supylabel("noise, levels of 255", fontsize="medium")


def draw_panel_b(figure: Any, result: dict[str, Any]) -> None:
    """A scatter plot of F_deg: circles are real LR, triangles are generated LR."""
    axes, points = figure.subplots(), np.array(result["points"])
    for name in sorted(set(result["labels"]), key=lambda name: (name.startswith("real"), name)):
        x, y = points[[label == name for label in result["labels"]]].T
        near = result["nearness"].get(name)
        label = name + (f": {near:.2f}" if near is not None else "")
        axes.scatter(x, y, 18, marker="o" if name.startswith("real") else "^", label=label)
    for k, (share, axis) in enumerate(zip(result["shares"], (axes.xaxis, axes.yaxis), strict=True)):
        axis.set_label_text(f"component {k + 1} ({share:.0%} of the variance)")
    title = "number: distance to the nearest real image (between real images: 1)"
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", title=title)
    figure.suptitle("(b) F_deg, principal components")


def save_figure(path: Path, result: dict[str, Any]) -> None:
    """Write both panels, side by side, as PNG."""
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
    check_training(inputs, [NETWORK], len(GRID), "figure1")
    inputs.check_steps()
    photos = inputs.photos
    inputs.other_scenes()  # checks

    def measure() -> tuple[dict[str, Any], str]:
        # The folder's name depends on the photos, so that networks of other photos are not reused.
        key = zlib.crc32(to_uint8(photos).numpy().tobytes())
        out = Path(cfg.out)
        result = train_on_grid(photos, out / "figure1" / f"{key:08x}-{cfg.seed}", inputs)
        if not inputs.rt.is_main:
            return {}, ""
        labels, degradations = embed(inputs)
        points, shares = plane(degradations)
        result |= {"labels": labels, "points": points.tolist(), "shares": shares}
        result |= {"nearness": nearness(labels, degradations)}
        save_figure(out / "figure1.png", result)
        return result, text_of_figure1(result, cfg)

    return measure


def text_of_figure1(result: dict[str, Any], cfg: Config) -> str:
    """The numbers of Figure 1, and how to read them."""
    lines = []
    for test in result["tests"]:
        best = max(test["psnr"])
        cells = [f"{v:.2f}" if v < best else f"**{v:.2f}**" for v in test["psnr"]]
        cells += [f"{test['bicubic']:.2f}", f"{test['rank']:.2f}", str(test["n"])]
        label = test["name"] + (f" ({name_of(test['place'])})" if test["real"] else "")
        lines.append([label, *cells])
    heads = ["test", *map(name_of, GRID), "bicubic", "rank correlation", "n"]
    near = [[method, f"{value:.2f}"] for method, value in result["nearness"].items()]
    parameters, seconds, memory = (
        cost_text(result["costs"], key) for key in ("parameters", "seconds", "memory")
    )
    return f"""## Figure 1: training sets of one blur and one noise each, PSNR Y

![Figure 1](figure1.png)

{table_text(heads, lines)}
Columns are training sets. Blur is the width of a Gaussian in LR pixels, noise is in levels of 255.
Those of real sets are medians, measured by comparison with the HR images. Rank correlation is
Spearman's, of the distance between training set and test, and the dB that the training set loses to
the test's best one. For the distance, blur and noise are divided by the grid's extent. It is
{result["rank"]:.3f} over all tests of the grid. n is the number of images tested. A network has
{parameters} parameters; its training takes {seconds} and {memory}. {meaningless(NETWORK, cfg)}

{table_text(["LR of", "distance of F_deg to the nearest real one"], near)}
Distances are medians, in units of the same distance between real images. They show what E_deg sees,
and prove nothing: the filter of RealDGen compares F_deg, too, and E_deg was trained on recipes of
D. The plane shows {sum(result["shares"]):.0%} of the variance.
{left_out_text(["SynDiff"])}"""
