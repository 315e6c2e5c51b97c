"""What is the LR alone worth? The table control (not in the paper).

In: real pairs. Out: PSNR on real LR. A network is trained on the HR images of one half of the
pairs, with their real LR, with bicubic LR, with each method's LR, and with LR of kernels fitted to
the real LR; it is tested on the other half. So nothing but the LR differs.

    python benchmark.py --table control --sr-steps 2000 --pairs data/RealSR data/DRealSR
"""

import functools
import re
from collections.abc import Sequence
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
    stored,
)
from bench.inputs import Inputs, Measure
from bench.kernels import TAPS, fitted_kernel, normal_equations, reduced_by, toned
from bench.pairs import (
    Method,
    Pair,
    camera_of,
    load_hr,
    load_lr,
    sets_with_other_scenes,
    table_text,
)
from common.images import save_image
from common.runtime import make_generator, wait_for_all

# ---- kinds of LR --------------------------------------------------------------------------------

KERNEL_NOISES = (0.0, 1.5, 3.0)  # std of the noise on LR of a fitted kernel, levels of 255
TONED = "kernel and tone of each pair*, noise 3"


def kinds_of_lr(pairs: Sequence[Pair], inputs: Inputs) -> dict[str, Method]:
    """The kinds of LR that networks are trained on, by name, for the pairs of a set."""
    seed = inputs.cfg.seed
    equations: dict[int, tuple[Tensor, Tensor]] = {}  # by index of the pair
    for pair in tqdm(pairs, desc="kernels", unit="pair", leave=False):
        AA, Ay = normal_equations(load_hr(pair), load_lr(pair.lr, pair.full)[None])
        equations[pair.index] = AA, Ay[0]

    @functools.cache
    def kernel(of: int | str) -> Tensor:  # index of a pair, or a camera
        alike = [p for p in pairs if of in (p.index, camera_of(p.name))]
        return fitted_kernel([equations[pair.index] for pair in alike])

    def by_kernel(
        hr: Tensor, batch: Sequence[Pair], of_pair: bool, noise: float, tone: bool = False
    ) -> Tensor:
        (pair,) = batch
        lr = reduced_by(kernel(pair.index if of_pair else camera_of(pair.name)), hr[0].cpu())
        if tone:
            lr = toned(lr, load_lr(pair.lr, pair.full))
        draw = make_generator(seed, pair.index)
        return (lr + noise / 255 * torch.randn(lr.shape, generator=draw))[None]

    methods = all_methods(inputs)
    means = mean_degradations(pairs, inputs.net, inputs.sampler.average)
    kinds: dict[str, Method] = {
        "real LR (oracle)": lambda hr, batch: load_lr(batch[0].lr, batch[0].full)[None],
        "bicubic": on_pairs(methods.pop("bicubic"), seed),
        "best Gaussian of each pair*": stored(best_blurs(pairs)[1]),
    }
    for unit in ("pair", "camera"):
        for noise in KERNEL_NOISES:
            label = f"kernel of each {unit}*, noise {noise:g}"
            kinds[label] = functools.partial(by_kernel, of_pair=unit == "pair", noise=noise)
    kinds[TONED] = functools.partial(by_kernel, of_pair=True, noise=KERNEL_NOISES[-1], tone=True)
    for name, method in methods.items():
        # Other weights have another F_deg, of which the paper takes that of one reference.
        kinds[name] = on_pairs(method, seed, None if name in OTHER_WEIGHTS else means)
        if name == "RealDGen":
            kinds[f"{name}, one reference"] = on_pairs(method, seed)
    return kinds


def write_training_pairs(
    folder: Path, name: str, pairs: Sequence[Pair], method: Method, inputs: Inputs
) -> None:
    """Write the pairs of a set with one kind of LR. All kinds share the same files of HR images."""
    hr_folder = folder.parent / "hr"
    for pair in tqdm(pairs, desc=folder.name, unit="pair", leave=False):
        file = f"{name}_{pair.name.replace('/', '_')}.png"
        hr = load_hr(pair)
        if not (hr_folder / file).is_file():
            save_image(hr_folder / file, hr)
        if not (folder / "lr" / file).is_file():
            save_image(folder / "lr" / file, lr_of(method, pair, hr, inputs))
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
    sets = sets_with_other_scenes(inputs.train, cfg.seed, {}, "three")
    assert inputs.tests  # found and checked now

    def measure() -> tuple[dict[str, Any], str]:
        out, network = folder_of(inputs), cfg.sr[-1]
        rows: dict[str, list[dict[str, Any]]] = {}
        kinds = {name: kinds_of_lr(pairs, inputs) for name, pairs in sets.items()}
        for label in kinds[next(iter(sets))]:
            folder = out / "control" / re.sub(r"[^\w.=]+", "-", label)
            for name, pairs in sets.items() if inputs.rt.is_main else ():
                write_training_pairs(folder, name, pairs, kinds[name][label], inputs)
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
