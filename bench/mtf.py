"""The transfer function of real and of generated LR, by least squares. Not in the paper.

In: real pairs. Out: the table mtf, and the plot mtf.png.

    python benchmark.py --table mtf --pairs data/RealSR data/DRealSR
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import additions
import degrade
from bench.generated import all_methods, lr_of, mean_degradations, on_pairs
from bench.inputs import Inputs, Measure
from bench.kernels import fitted_kernel, normal_equations, transfer_function
from bench.pairs import Pair, camera_of, load_hr, load_lr, table_text
from common.files import replacing
from common.runtime import make_generator
from generate import SCALE

CURVE_AT = torch.linspace(0, 0.5, 21, dtype=torch.float64)  # frequencies, cycles per LR pixel
SHOWN = slice(0, None, 4)  # those in the table


@torch.no_grad()
def measure_mtf(pairs: Sequence[Pair], inputs: Inputs) -> dict[str, Any]:
    """Transfer functions of the real LR of a set and of each camera, and of each method's LR.

    Of the first pairs, as many as --images says; the mean F_deg is of all.
    """
    seed, synthesis = inputs.cfg.seed, all_methods(inputs)
    methods = {name: on_pairs(method, seed) for name, method in synthesis.items()}
    means = mean_degradations(pairs, inputs.net)
    by_mean = on_pairs(synthesis["RealDGen"], seed, means)
    equations: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for pair in tqdm(pairs[: inputs.cfg.images], unit="pair", leave=False):
        hr, camera = load_hr(pair), camera_of(pair.name) or "unnamed"
        images = {"real LR": load_lr(pair.lr, pair.full)}
        images |= {name: lr_of(method, pair, hr, inputs) for name, method in methods.items()}
        if pair.index in means:
            images["RealDGen, mean F_deg"] = lr_of(by_mean, pair, hr, inputs)
        AA, Ay = normal_equations(hr, torch.stack([*images.values()]))
        for name, y in zip(images, Ay, strict=True):
            equations.setdefault(name, []).append((AA, y))
            if name == "real LR":
                equations.setdefault(f"real LR, {camera}", []).append((AA, y))
    curves = {
        name: transfer_function(fitted_kernel(equations[name]), CURVE_AT).tolist()
        for name in sorted(equations, key=lambda name: not name.startswith("real"))
    }
    count = {name: len(sides) for name, sides in equations.items()}
    return {"curves": curves, "n": count}


def table_mtf(name: str, inputs: Inputs) -> Measure:
    """The transfer functions of each set, as a table and as mtf.png."""
    cfg = inputs.cfg
    inputs.check_steps(*inputs.t_starts)
    sets = inputs.other_scenes()

    def measure() -> tuple[dict[str, Any], str]:
        values = {name: measure_mtf(pairs, inputs) for name, pairs in sets.items()}
        draw_mtf(values, Path(cfg.out) / "mtf.png")
        return values, "".join(text_of_mtf(folder, v) for folder, v in values.items())

    return measure


def draw_mtf(values: dict[str, Any], path: Path) -> None:
    """Plot the transfer functions of each set, and the range that the recipe camera draws."""
    from matplotlib.figure import Figure

    theta = degrade.sample_degradation(1000, "camera", SCALE, make_generator(0))
    drawn = additions.effects_of(theta)[:, :5].quantile(torch.tensor([0.05, 0.95]), dim=0)
    figure = Figure(figsize=(6 * len(values), 4.5), layout="constrained")
    for axes, (folder, found) in zip(
        figure.subplots(1, len(values), squeeze=False)[0], values.items(), strict=True
    ):
        for name, curve in found["curves"].items():
            real = name.startswith("real")
            width, style = (2.5, "-") if name == "real LR" else (1, ":" if real else "-")
            axes.plot(CURVE_AT, curve, style, linewidth=width, label=name,
                      color="black" if name == "real LR" else None)  # fmt: skip
        axes.fill_between(additions.FREQUENCIES, *drawn, color="0.9", label="drawn by D, 5 to 95%")
        axes.set(title=folder, xlabel="cycles per LR pixel", ylabel="amplitude", ylim=(0, 2))
        axes.legend(fontsize="x-small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def text_of_mtf(folder: str, found: dict[str, Any]) -> str:
    """The table of one set."""
    heads = [f"{f:.1f}" for f in CURVE_AT[SHOWN].tolist()]
    rows = [
        [name, *(f"{v:.2f}" for v in curve[SHOWN]), str(found["n"][name])]
        for name, curve in found["curves"].items()
    ]
    return f"""## {folder}: transfer function, amplitude by cycles per LR pixel

{table_text(["LR", *heads, "n"], rows)}
A row is the transfer function of one kernel from HR to LR. It is fitted to all n images of the row
by least squares. RealDGen's reference is another scene of the camera, or the mean F_deg of all its
other scenes.

"""
