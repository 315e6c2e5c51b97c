"""Why do networks trained on generated pairs fall behind? Two tables (not in the paper).

In: real pairs; HR photos. Out: control: a network is trained on the HR images of one half of the
pairs, with their real LR, with bicubic LR, with each method's LR, and with LR of kernels fitted to
the real LR; it is tested on the other half. So nothing but the LR differs. mtf: the transfer
function of real and of generated LR, by least squares, and as it can be estimated without pairs.

    python benchmark.py --table control mtf --sr-steps 2000 --pairs data/RealSR data/DRealSR
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
import degrade
import generate
from bench.downstream import check_training, folder_of, spread_text, steps_of, tested, train_network
from bench.generated import (
    Synthesis,
    best_blurs,
    mean_codes,
    realdgen,
    syntheses,
)
from bench.inputs import Inputs, Measure, middle
from bench.metrics import rgb_to_y
from bench.pairs import (
    Pair,
    camera_of,
    halves,
    load_hr,
    load_lr,
    resized,
    table_text,
    with_other_scenes,
)

SCALE = generate.SCALE

# ---- the kernel between an HR and an LR image ---------------------------------------------------

TAPS = 24  # HR pixels, 6 LR pixels
BEFORE = (TAPS - SCALE) // 2  # of them to the left of an LR pixel
RIDGE = 1e-4  # pull towards the bicubic kernel, for pixel values in [0, 1]


def bicubic_kernel() -> Tensor:
    """The kernel (TAPS, TAPS) of a bicubic reduction by 4, as Pillow does it (a = -0.5)."""
    centre = BEFORE + (SCALE - 1) / 2
    x = ((torch.arange(TAPS, dtype=torch.float64) - centre) / SCALE).abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    taps = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    taps = taps / taps.sum()
    return taps[:, None] * taps


def normal_equations(hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
    """A'A (576, 576) and A'y (K, 576) of the LR pixels y = A k, per pixel, all colours together.

    hr (3, 4h, 4w), lr (K, 3, h, w) in [0, 1]; three LR pixels at each edge are left out.
    """
    start = 3 * SCALE - BEFORE
    A = F.unfold(hr[:, None, start:, start:], TAPS, stride=SCALE)  # (3, 576, n)
    A = A.transpose(0, 1).flatten(1)  # (576, 3n)
    y = lr[:, :, 3:-3, 3:-3].flatten(1)  # (K, 3n)
    return (A @ A.T / len(A.T)).double(), (y @ A.T / len(A.T)).double()


def fitted_kernel(equations: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The kernel (TAPS, TAPS) that explains the LR of some pairs best, by least squares."""
    AA, Ay = (torch.stack(parts).mean(0) for parts in zip(*equations, strict=True))
    ridge = RIDGE * torch.eye(len(Ay), dtype=Ay.dtype)
    k = torch.linalg.solve(AA + ridge, Ay + RIDGE * bicubic_kernel().flatten())
    return k.view(TAPS, TAPS)


def reduced_by(kernel: Tensor, hr: Tensor) -> Tensor:
    """hr (3, 4h, 4w) through a kernel (TAPS, TAPS), every fourth pixel: (3, h, w) in [0, 1]."""
    padded = F.pad(hr[:, None], (BEFORE, BEFORE, BEFORE, BEFORE), mode="reflect")
    return F.conv2d(padded, kernel.float()[None, None], stride=SCALE)[:, 0].clamp(0, 1)


def transfer_function(kernel: Tensor, frequencies: Tensor) -> Tensor:
    """Amplitude of a kernel at frequencies in cycles per LR pixel, the mean over all angles."""
    place = (torch.arange(TAPS) - BEFORE - (SCALE - 1) / 2) / SCALE  # LR pixels
    angle = torch.arange(24) * torch.pi / 24
    f = frequencies.double()[:, None, None]
    rows, columns = (torch.exp(-2j * torch.pi * f * part[:, None] * place)  # (n, 24, TAPS)
                     for part in (angle.sin(), angle.cos()))  # fmt: skip
    waves = torch.einsum("nar,rc,nac->na", rows, kernel.to(rows.dtype), columns)
    return waves.abs().mean(1)


# ---- control ------------------------------------------------------------------------------------

NOISES = (0.0, 1.5, 3.0)  # levels of white noise behind a fitted kernel
Answers = dict[str, Callable[[str, Pair, Tensor], Tensor]]  # set, pair, hr (3, 4h, 4w) -> lr


def all_methods(inputs: Inputs) -> dict[str, Synthesis]:
    """All methods, and RealDGen from the other T."""
    return syntheses(inputs.net, inputs.sampler) | {
        f"RealDGen T={t}": realdgen(inputs.net, replace(inputs.sampler, t_start=t))
        for t in inputs.cfg.t_starts
        if t > 0
    }


def answers_of_control(sets: dict[str, list[Pair]], inputs: Inputs) -> Answers:
    """Each kind of LR of the HR images of some pairs."""
    seed = inputs.cfg.seed
    every = [(folder, pair) for folder, pairs in sets.items() for pair in pairs]
    equations: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for folder, pair in tqdm(every, desc="kernels", unit="pair", leave=False):
        AA, Ay = normal_equations(load_hr(pair), load_lr(pair.lr, pair.full)[None])
        equations[folder, pair.index] = AA, Ay[0]

    @functools.cache
    def kernel(folder: str, camera: str, index: int | None) -> Tensor:
        return fitted_kernel([
            equations[folder, pair.index] for pair in sets[folder]
            if pair.index == index or (index is None and camera_of(pair.name) == camera)
        ])  # fmt: skip

    def by_kernel(folder: str, pair: Pair, hr: Tensor, one: bool, noise: float) -> Tensor:
        lr = reduced_by(kernel(folder, camera_of(pair.name), pair.index if one else None), hr)
        draw = common.generator(seed, pair.index)
        return lr + noise / 255 * torch.randn(lr.shape, generator=draw)

    def by_method(folder: str, pair: Pair, hr: Tensor, name: str, one: bool = False) -> Tensor:
        seeds = [seed << 32 | pair.index]
        lr_ref = load_lr(pair.reference, pair.full) if one else codes[folder][pair.index]
        return methods[name](hr[None].to(inputs.device), [lr_ref], seeds)[0].cpu()

    blurs = {folder: best_blurs(pairs)[1] for folder, pairs in sets.items()}
    average = inputs.sampler.average
    codes = {name: mean_codes(pairs, inputs.net, average) for name, pairs in sets.items()}
    methods = all_methods(inputs)
    answers: Answers = {
        "real LR (oracle)": lambda folder, pair, hr: load_lr(pair.lr, pair.full),
        "bicubic": functools.partial(by_method, name="bicubic"),
        "best Gaussian of each pair*": lambda folder, pair, hr: blurs[folder][pair.index],
    }
    for one, what in ((True, "pair"), (False, "camera")):
        for noise in NOISES:
            label = f"kernel of each {what}*, noise {noise:g}"
            answers[label] = functools.partial(by_kernel, one=one, noise=noise)
    for name in [name for name in methods if name != "bicubic"]:
        answers[name] = functools.partial(by_method, name=name)
        if name == "RealDGen":
            answers[f"{name}, one reference"] = functools.partial(by_method, name=name, one=True)
    return answers


def write_training_set(folder: Path, sets: dict[str, list[Pair]], answer: Any) -> None:
    """Pairs of the HR images and one kind of LR; the HR images are written once for all kinds."""
    hr_folder = folder.parent / "hr"
    for name, pairs in sets.items():
        for pair in tqdm(pairs, desc=folder.name, unit="pair", leave=False):
            file = f"{name}_{pair.name.replace('/', '_')}.png"
            hr = load_hr(pair)
            if not (hr_folder / file).is_file():
                common.save_image(hr_folder / file, hr)
            if not (folder / "lr" / file).is_file():
                common.save_image(folder / "lr" / file, answer(name, pair, hr))
    if not (folder / "hr").exists():
        (folder / "hr").symlink_to(hr_folder.resolve(), target_is_directory=True)


def table_control(name: str, inputs: Inputs) -> Measure:
    """PSNR on real LR of networks that differ in nothing but the LR they were trained on."""
    cfg = inputs.cfg
    check_training(inputs)
    inputs.check_steps(cfg.t_start, *cfg.t_starts)
    sets = {
        folder: with_other_scenes(halves(pairs)[0], cfg.seed)
        for folder, pairs in inputs.sets.items()
    }
    for folder, pairs in sets.items():
        common.require(bool(pairs), f"--pairs {folder}: no camera has three pairs.")
    assert inputs.tests  # found and checked now

    def measure() -> tuple[dict[str, Any], str]:
        out, network = folder_of(inputs), cfg.sr[-1]
        rows: dict[str, list[dict[str, Any]]] = {}
        answers = answers_of_control(sets, inputs)
        for label, answer in answers.items():
            folder = out / "control" / re.sub(r"[^\w.=]+", "-", label)
            if inputs.rt.is_main:
                write_training_set(folder, sets, answer)
            common.wait_for_all(inputs.rt)
            source, rows[label] = {"pairs": str(folder)}, []
            for seed in range(cfg.seed, cfg.seed + cfg.seeds):
                net, _ = train_network(network, source, folder.name, seed, out, inputs)
                rows[label].append(tested(net, inputs, ["PSNR Y"]))
        count = {folder: len(pairs) for folder, pairs in sets.items()}
        result = {"network": network, "trained": count, "rows": rows}
        return result, text_of_control(result, inputs) if inputs.rt.is_main else ""

    return measure


def text_of_control(result: dict[str, Any], inputs: Inputs) -> str:
    """The table of the control: PSNR Y, and the share of the gap from bicubic to real LR."""
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
    return f"""## Control: {network} trained on the same HR images with different LR, on real LR

{table_text(heads, lines)}
Trained on pairs of one half ({trained}), {steps_of(network, inputs.cfg)} steps, {inputs.cfg.seeds}
seeds; tested on the other half. Share of the gap: (x - bicubic) / (real - bicubic). RealDGen gets
the mean code of up to {inputs.sampler.average} other scenes of the same camera in the first half,
or the code of one. * looks at the real LR: a Gaussian of each pair, or a kernel of {TAPS} x {TAPS}
HR pixels by least squares; noise in levels.
"""


# ---- mtf: the transfer function -----------------------------------------------------------------

FREQUENCIES = torch.linspace(0, 0.5, 21, dtype=torch.float64)  # cycles per LR pixel
SHOWN = slice(0, None, 4)  # of them in the table
RING = 0.025  # half width of a ring of the spectrum


def log_spectrum(lr: Tensor) -> Tensor:
    """Mean log power of luma of an image (3, n, n) on rings around FREQUENCIES (without 0)."""
    y = rgb_to_y(lr[None])[0, 0].double()
    n = len(y)
    hann = torch.hann_window(n, periodic=False, dtype=torch.float64)
    power = torch.fft.rfft2((y - y.mean()) * hann[:, None] * hann).abs().square()
    radius = (torch.fft.fftfreq(n)[:, None] ** 2 + torch.fft.rfftfreq(n) ** 2).sqrt()
    rings = [(radius - f).abs() <= RING for f in FREQUENCIES[1:]]
    return torch.stack([power[ring].mean().clamp(min=1e-12).log() for ring in rings])


def amplitude_ratio(of: Sequence[Tensor], to: Sequence[Tensor]) -> Tensor:
    """Amplitude of the mean log-spectrum of some images over that of others, 1 at .05 cycles."""
    difference = (torch.stack([*of]).mean(0) - torch.stack([*to]).mean(0)) / 2
    at = int((FREQUENCIES[1:] - 0.05).abs().argmin())
    return torch.cat([torch.ones(1), (difference - difference[at]).exp()])


@torch.no_grad()
def measure_mtf(pairs: Sequence[Pair], inputs: Inputs) -> dict[str, Any]:
    """Transfer functions of real LR, of each camera's, and of each method's LR, for one set."""
    cfg = inputs.cfg
    methods, codes = all_methods(inputs), mean_codes(pairs, inputs.net)
    equations: dict[str, list[tuple[Tensor, Tensor]]] = {}
    spectra: dict[str, list[Tensor]] = {}
    for pair in tqdm(pairs, unit="pair", leave=False):
        hr, camera = load_hr(pair), camera_of(pair.name) or "unnamed"
        lr_ref, seeds = [load_lr(pair.reference, pair.full)], [cfg.seed << 32 | pair.index]
        images = {"real LR": load_lr(pair.lr, pair.full)}
        for name, method in methods.items():
            lr = method(hr[None].to(inputs.device), lr_ref, seeds)[0].cpu()
            images[name] = common.to_uint8(lr) / 255
        lr = methods["RealDGen"](hr[None].to(inputs.device), [codes[pair.index]], seeds)[0].cpu()
        images["RealDGen, mean code"] = common.to_uint8(lr) / 255
        AA, Ay = normal_equations(hr, torch.stack([*images.values()]))
        for (name, lr), y in zip(images.items(), Ay, strict=True):
            equations.setdefault(name, []).append((AA, y))
            if name == "real LR":
                equations.setdefault(f"real LR, {camera}", []).append((AA, y))
            side = min(cfg.crop, *pair.size)
            spectra.setdefault(name, []).append(log_spectrum(middle(lr, side)))
    curves = {
        name: transfer_function(fitted_kernel(equations[name]), FREQUENCIES).tolist()
        for name in sorted(equations, key=lambda name: not name.startswith("real"))
    }
    ratios = {
        f"{name}, same scenes": amplitude_ratio(found, spectra["bicubic"]).tolist()
        for name, found in spectra.items()
        if name != "bicubic"
    }
    photos = [log_spectrum(resized(x[None], cfg.crop, cfg.crop)[0]) for x in inputs.photos]
    for name in [name for name in ("real LR", "RealDGen") if name in spectra]:
        ratios[f"{name}, HR photos of others"] = amplitude_ratio(spectra[name], photos).tolist()
    count = {name: len(found) for name, found in equations.items()}
    return {"curves": curves, "ratios": ratios, "n": count, "photos": len(photos)}


def table_mtf(name: str, inputs: Inputs) -> Measure:
    """The transfer functions of each set, as a table and as mtf.png."""
    cfg = inputs.cfg
    inputs.check_steps(cfg.t_start, *cfg.t_starts)
    sets = {}
    for folder, pairs in inputs.sets.items():
        sets[folder] = with_other_scenes(pairs, cfg.seed)[: cfg.images]
        common.require(bool(sets[folder]), f"--pairs {folder}: no camera has two pairs.")
    assert len(inputs.photos) > 1  # found and checked now

    def measure() -> tuple[dict[str, Any], str]:
        values = {folder: measure_mtf(pairs, inputs) for folder, pairs in sets.items()}
        draw_mtf(values, Path(cfg.out) / "mtf.png")
        return values, "".join(text_of_mtf(folder, v) for folder, v in values.items())

    return measure


def draw_mtf(values: dict[str, Any], path: Path) -> None:
    """A plot of the transfer functions for each set, and of what the recipe `camera` draws."""
    from matplotlib.figure import Figure

    theta = degrade.sample_degradation(1000, "camera", SCALE, common.generator(0))
    drawn = theta.physical()[:, :5].quantile(torch.tensor([0.05, 0.95]), dim=0)
    figure = Figure(figsize=(6 * len(values), 4.5), layout="constrained")
    for axes, (folder, found) in zip(
        figure.subplots(1, len(values), squeeze=False)[0], values.items(), strict=True
    ):
        for name, curve in found["curves"].items():
            real = name.startswith("real")
            width, style = (2.5, "-") if name == "real LR" else (1, ":" if real else "-")
            axes.plot(FREQUENCIES, curve, style, linewidth=width, label=name,
                      color="black" if name == "real LR" else None)  # fmt: skip
        bicubic = np.array(found["curves"]["bicubic"])
        estimate = bicubic * found["ratios"]["real LR, HR photos of others"]
        axes.plot(FREQUENCIES, estimate, "k--", label="real LR, estimated without pairs")
        axes.fill_between(degrade.FREQUENCIES, *drawn, color="0.9", label="drawn by D, 5 to 95%")
        axes.set(title=folder, xlabel="cycles per LR pixel", ylabel="amplitude", ylim=(0, 2))
        axes.legend(fontsize="x-small")
    with common.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def text_of_mtf(folder: str, found: dict[str, Any]) -> str:
    """The tables of transfer functions of one set."""
    heads = [f"{f:.1f}" for f in FREQUENCIES[SHOWN].tolist()]

    def rows(curves: dict[str, list[float]]) -> list[list[str]]:
        return [[name, *(f"{v:.2f}" for v in curve[SHOWN])] for name, curve in curves.items()]

    curves = [[*row, str(found["n"][row[0]])] for row in rows(found["curves"])]
    return f"""## {folder}: transfer function, amplitude by cycles per LR pixel

{table_text(["by least squares", *heads, "n"], curves)}
{table_text(["ratio to bicubic, by spectra", *heads], rows(found["ratios"]))}
By least squares: of one kernel from HR to all LR images of the row. By spectra: the mean
log-spectrum of LR over that of bicubic LR, of the same scenes, or, without pairs, of
{found["photos"]} HR photos of others; 1 at .05 cycles. Noise counts as amplitude there. RealDGen's
references are other scenes.

"""
