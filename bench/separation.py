"""Does F_deg tell degradations apart, and F_cont contents? Not in the paper.

In: HR photos, real LR photos in a sub-folder for each device, and the generator; no pairs. Out: the
table extractors.

    python benchmark.py --table extractors --hr data/hr --lr data/lr
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import additions
import degrade
import extractors
import generate
from bench.inputs import Inputs, Measure, middle
from bench.metrics import psnr
from bench.pairs import table_text
from common.files import find_photos
from common.images import load_image, resized
from common.runtime import make_generator

EXACT = "donot_use_mm_for_euclid_dist"  # mode of cdist in which equal rows have the distance 0


def retrieval(queries: Tensor, candidates: Tensor) -> dict[str, float]:
    """Share of queries whose candidate is the nearest, or among the 5 nearest.

    Candidate i (of N, D) is the right one for query i (of N, D).
    """
    table = torch.cdist(queries.double(), candidates.double(), compute_mode=EXACT)
    nearer = (table <= table.diagonal()[:, None]).sum(1) - 1  # a tie counts as nearer
    return {f"top-{k}": (nearer < k).double().mean().item() for k in (1, 5)}


def nearest_scene(degraded: Tensor, clean: Tensor) -> dict[str, float]:
    """How often row i of degraded (N, ...) is nearer to row i of clean than to any other row.

    ratio: median of the distance to row i, divided by that to the nearest other row.
    """
    table = torch.cdist(degraded.flatten(1), clean.flatten(1))
    same = table.diagonal()
    other = (table + table.new_full((len(table),), math.inf).diag()).min(1)[0]
    return {"top-1": (same < other).float().mean().item(), "ratio": (same / other).median().item()}


def device_crops(files: list[Path], side: int, images: int, seed: int) -> list[Tensor]:
    """Queries and candidates (N, 3, side, side): the middles of two photos of each of N devices.

    A device is a sub-folder. Its first and its last file are taken: if files are crops, these are
    most likely of different photos. Empty unless there are two devices with two files.
    """
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)
    devices = [inside for inside in folders.values() if len(inside) > 1]
    order = torch.randperm(len(devices), generator=make_generator(seed)).tolist()
    crops = []
    for device in order if len(devices) > 1 else []:
        with contextlib.suppress(ValueError):
            both = [middle(load_image(devices[device][i]), side) for i in (0, -1)]
            crops.append(torch.stack(both))
    return list(torch.stack(crops[:images], dim=1)) if len(crops) > 1 else []


AMPLITUDES = [f"at {f:.1f}" for f in additions.FREQUENCIES.tolist()]
EFFECTS = [*AMPLITUDES, "noise low", "mid", "high", "JPEG"]


def head_errors(
    nets: extractors.Extractors, lr: Tensor, theta: degrade.Degradation
) -> dict[str, list[float]]:
    """Root mean square error (9,) of the head on lr (N, 3, h, w), and the spread of the truth."""
    true = additions.effects_of(theta)
    error = nets.head(torch.cat([nets.e_deg(x[None]) for x in lr])).float().cpu() - true
    square = error.square().nanmean(0), (true - true.nanmean(0)).square().nanmean(0)
    return dict(zip(("error", "spread"), (x.sqrt().tolist() for x in square), strict=True))


def table_extractors(name: str, inputs: Inputs) -> Measure:
    """Retrieval by F_deg and by F_cont, decoded contents, and errors of the head."""
    cfg, hr = inputs.cfg, inputs.photos.to(inputs.device)
    nets = inputs.net.extractors
    files = find_photos(cfg.lr, "lr", "--lr")
    devices = device_crops(files, cfg.crop, cfg.images, cfg.seed)

    def each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([function(rows).float() for rows in x.split(cfg.batch_size)])

    def retrieved(task: str, queries: Tensor, candidates: Tensor) -> dict[str, Any]:
        shares = retrieval(each(nets.e_deg, queries), each(nets.e_deg, candidates))
        return {"task": task, "n": len(queries)} | shares

    @torch.no_grad()
    def measure() -> tuple[dict[str, Any], str]:
        N, _, H, W = hr.shape
        content = each(nets.vqvae.encode, hr)
        quantised, entries = nets.vqvae.quantize(content)
        images = {"clean, without codebook": each(nets.vqvae.decode, content)}
        images |= {"clean, with codebook": each(nets.vqvae.decode, quantised)}
        rows, contents, heads = [], [], []
        for recipe in ("realesrgan", "camera"):
            draw = make_generator(cfg.seed, degrade.RECIPES.index(recipe))
            theta = degrade.sample_degradation(N, recipe, generate.SCALE, generator=draw)
            lr = degrade.degrade(hr, theta, draw)
            # The right candidate has the query's theta and another scene; the query's scene is
            # among the candidates with another theta.
            candidates = degrade.degrade(hr.roll(N // 2, 0), theta, draw)
            rows.append(retrieved(f"theta, {recipe}", lr, candidates))
            if not nets.as_printed:
                heads.append({"recipe": recipe} | head_errors(nets, lr, theta))
            enlarged = resized(lr, H, W)
            lr_content = each(nets.content, enlarged)
            for of, a, b in (("E_cont", lr_content, content), ("pixels", enlarged, hr)):
                contents.append({"recipe": recipe, "of": of} | nearest_scene(a, b))
            images[f"{recipe}, enlarged"] = enlarged
            images[f"{recipe}, its content decoded"] = each(nets.vqvae.decode, lr_content)
        if devices:
            rows.append(retrieved("device", *(x.to(inputs.device) for x in devices)))
        values = {key: psnr(x.clamp(0, 1), hr).mean().item() for key, x in images.items()}
        used = [int(entries.unique().numel()), len(nets.vqvae.quantize.embedding.weight)]
        result: dict[str, Any] = {"images": N, "retrieval": rows, "content": contents}
        result |= {"psnr": values, "used": used, "head": heads}
        return result, text_of_extractors(result)

    return measure


def text_of_extractors(result: dict[str, Any]) -> str:
    """The four tables of the extractors, and how to read them."""
    shares = [
        [row["task"], f"{row['top-1']:.0%}", f"{row['top-5']:.0%}", f"{1 / row['n']:.1%}",
         str(row["n"])]
        for row in result["retrieval"]
    ]  # fmt: skip
    contents = [
        [row["recipe"], row["of"], f"{row['top-1']:.0%}", f"{row['ratio']:.2f}"]
        for row in result["content"]
    ]
    images = [[name, f"{value:.2f}"] for name, value in result["psnr"].items()]
    errors = [[row["recipe"], of, *(f"{value:.2f}" for value in row[of])]
              for row in result["head"] for of in ("error", "spread")]  # fmt: skip
    heads = ["degraded with", "nearest by", "own scene is nearest", "own / nearest other"]
    return f"""## Do the extractors tell degradation and content apart? {result["images"]} contents

{table_text(["same, by F_deg", "top-1", "top-5", "chance top-1", "n"], shares)}
{table_text(heads, contents, words=2)}
{table_text(["image", "PSNR to the clean photo"], images)}
{table_text(["head, fresh draws", "", *EFFECTS], errors, words=2)}
Theta: the query is D(X, theta). The right candidate is D(X', theta) of another scene X'; the others
have another theta. Device: query and right candidate are two files of one sub-folder of --lr.
own / nearest other: D(X) is enlarged, and the distance of its content to that of its own clean
photo is divided by the distance to the nearest other one; the median. Head: root mean square error
of each number of additions.effects_of, and below it the spread of the true numbers. The clean
photos use {result["used"][0]} of the {result["used"][1]} entries of the codebook.
"""
