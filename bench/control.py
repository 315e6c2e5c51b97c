"""What is the LR alone worth? The table control (not in the paper).

In: real pairs. Out: PSNR on real LR. A network is trained on the HR images of one half of the
pairs, with their real LR, with bicubic LR, with each method's LR, and with LR of kernels fitted to
the real LR; it is tested on the other half. So nothing but the LR differs.

    python benchmark.py --table control --sr-steps 2000 --pairs data/RealSR data/DRealSR
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.downstream import (
    check_training,
    folder_of,
    meaningless,
    spread_text,
    steps_of,
    train_and_test,
)
from bench.generated import (
    OTHER_WEIGHTS,
    all_methods,
    best_blurs,
    left_out_text,
    lr_of,
    mean_degradations,
    on_pairs,
)
from bench.inputs import Inputs, Measure
from bench.kernels import TAPS, fitted_kernel, normal_equations, reduced_by, toned
from bench.pairs import Pair, camera_of, load_hr, load_lr, sets_with_other_scenes, table_text
from common.images import save_image
from common.runtime import make_generator, wait_for_all

# ---- kinds of LR --------------------------------------------------------------------------------

KERNEL_NOISES = (0.0, 1.5, 3.0)  # std of the noise on LR of a fitted kernel, levels of 255
TONED = "kernel and tone of each pair*, noise 3"
KindOfLR = Callable[[str, Pair, Tensor], Tensor]  # name of the set, pair, hr (3, 4h, 4w) -> lr


def kinds_of_lr(sets: dict[str, list[Pair]], inputs: Inputs) -> dict[str, KindOfLR]:
    """The kinds of LR that networks are trained on, by name."""
    seed = inputs.cfg.seed
    all_pairs = [(folder, pair) for folder, pairs in sets.items() for pair in pairs]
    equations: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for folder, pair in tqdm(all_pairs, desc="kernels", unit="pair", leave=False):
        AA, Ay = normal_equations(load_hr(pair), load_lr(pair.lr, pair.full)[None])
        equations[folder, pair.index] = AA, Ay[0]

    @functools.cache
    def kernel(folder: str, camera: str, index: int | None) -> Tensor:
        return fitted_kernel([
            equations[folder, pair.index] for pair in sets[folder]
            if pair.index == index or (index is None and camera_of(pair.name) == camera)
        ])  # fmt: skip

    def by_kernel(
        folder: str, pair: Pair, hr: Tensor, of_pair: bool, noise: float, tone: bool = False
    ) -> Tensor:
        lr = reduced_by(kernel(folder, camera_of(pair.name), pair.index if of_pair else None), hr)
        if tone:
            lr = toned(lr, load_lr(pair.lr, pair.full))
        draw = make_generator(seed, pair.index)
        return lr + noise / 255 * torch.randn(lr.shape, generator=draw)

    def by_method(folder: str, pair: Pair, hr: Tensor, name: str, mean: bool = True) -> Tensor:
        method = on_pairs(methods[name], seed, degradations[folder] if mean else None)
        return lr_of(method, pair, hr, inputs)

    blurs = {folder: best_blurs(pairs)[1] for folder, pairs in sets.items()}
    degradations = {
        name: mean_degradations(pairs, inputs.net, inputs.sampler.average)
        for name, pairs in sets.items()
    }
    methods = all_methods(inputs)
    kinds: dict[str, KindOfLR] = {
        "real LR (oracle)": lambda folder, pair, hr: load_lr(pair.lr, pair.full),
        "bicubic": functools.partial(by_method, name="bicubic"),
        "best Gaussian of each pair*": lambda folder, pair, hr: blurs[folder][pair.index],
    }
    for unit in ("pair", "camera"):
        for noise in KERNEL_NOISES:
            label = f"kernel of each {unit}*, noise {noise:g}"
            kinds[label] = functools.partial(by_kernel, of_pair=unit == "pair", noise=noise)
    kinds[TONED] = functools.partial(by_kernel, of_pair=True, noise=KERNEL_NOISES[-1], tone=True)
    for name in [*methods][1:]:  # the first is bicubic
        # Other weights have another F_deg, of which the paper takes that of one reference.
        kinds[name] = functools.partial(by_method, name=name, mean=name not in OTHER_WEIGHTS)
        if name == "RealDGen":
            kinds[f"{name}, one reference"] = functools.partial(by_method, name=name, mean=False)
    return kinds


def write_training_set(folder: Path, sets: dict[str, list[Pair]], make_lr: KindOfLR) -> None:
    """Write pairs with one kind of LR. All kinds share the same files of HR images."""
    hr_folder = folder.parent / "hr"
    for name, pairs in sets.items():
        for pair in tqdm(pairs, desc=folder.name, unit="pair", leave=False):
            file = f"{name}_{pair.name.replace('/', '_')}.png"
            hr = load_hr(pair)
            if not (hr_folder / file).is_file():
                save_image(hr_folder / file, hr)
            if not (folder / "lr" / file).is_file():
                save_image(folder / "lr" / file, make_lr(name, pair, hr))
    if not (folder / "hr").exists():
        (folder / "hr").symlink_to(hr_folder.resolve(), target_is_directory=True)


# ---- the table control --------------------------------------------------------------------------


def table_control(name: str, inputs: Inputs) -> Measure:
    """PSNR on real LR of networks that differ in nothing but the LR they were trained on."""
    cfg = inputs.cfg
    count = 9 + 2 * len(KERNEL_NOISES) + sum(t > 0 for t in inputs.t_starts)
    count += len(inputs.other_weights)
    check_training(inputs, cfg.sr[-1:], count * cfg.seeds, "control")
    inputs.check_steps(*inputs.t_starts)
    sets = sets_with_other_scenes(inputs.train, cfg.seed, "three")
    assert inputs.tests  # found and checked now

    def measure() -> tuple[dict[str, Any], str]:
        out, network = folder_of(inputs), cfg.sr[-1]
        rows: dict[str, list[dict[str, Any]]] = {}
        kinds = kinds_of_lr(sets, inputs)
        for label, make_lr in kinds.items():
            folder = out / "control" / re.sub(r"[^\w.=]+", "-", label)
            if inputs.rt.is_main:
                write_training_set(folder, sets, make_lr)
            wait_for_all(inputs.rt)
            flags, stem = {"pairs": str(folder)}, f"control-{folder.name}"
            rows[label] = train_and_test(network, flags, stem, out, inputs, ["PSNR Y"])["runs"]
        count = {folder: len(pairs) for folder, pairs in sets.items()}
        result = {"network": network, "trained": count, "rows": rows}
        return result, text_of_control(result, inputs) if inputs.rt.is_main else ""

    return measure


def text_of_control(result: dict[str, Any], inputs: Inputs) -> str:
    """PSNR Y of each kind of LR, and its share of the gap from bicubic to real LR."""
    network, rows = result["network"], result["rows"]
    sets = [*result["trained"]]
    psnr = {
        label: [[run[folder]["mean"]["PSNR Y"] for run in runs] for folder in sets]
        for label, runs in rows.items()
    }
    low, high = ([np.mean(v) for v in psnr[label]] for label in ("bicubic", "real LR (oracle)"))
    lines = []
    for label, values in psnr.items():
        cells = []
        for value, bottom, top in zip(values, low, high, strict=True):
            share = (np.mean(value) - bottom) / (top - bottom) if top > bottom else np.nan
            cells += [spread_text(value, "PSNR Y"), f"{share:z.0%}".replace("nan%", "-")]
        lines.append([label, *cells])
    heads = ["LR of the same HR images"]
    heads += [head for folder in sets for head in (f"{folder} PSNR Y", "share of the gap")]
    trained = ", ".join(f"{folder} {n}" for folder, n in result["trained"].items())
    steps, seeds = steps_of(network, inputs.cfg), inputs.cfg.seeds
    return f"""## Control: {network} trained on the same HR images with different LR, on real LR

{table_text(heads, lines)}
{inputs.split_text()}Trained on the pairs that give references and have another scene ({trained}).
Steps: {steps}; seeds: {seeds}. {meaningless(network, inputs.cfg)}The share of the gap is
(x - bicubic) / (real - bicubic). RealDGen takes the mean F_deg of up to {inputs.sampler.average}
other scenes of the same camera, or F_deg of one of them. T=0 has no diffusion.
* is fitted to the real LR: a Gaussian, or a kernel of {TAPS} x {TAPS} HR pixels by least squares.
Noise is added to LR of a kernel; its std is in levels of 255. Tone is a polynomial of third degree
in the colours: how the two photos of a pair differ, which no unpaired photo can tell.
{left_out_text()}"""
