"""Does E_deg see what E_cont must not see, and the reverse? Not in the paper.

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
from common.photos import load_image, resized
from common.runtime import make_generator


def retrieval(queries: Tensor, candidates: Tensor) -> dict[str, float]:
    """Share of queries (N, D) whose candidate (of N, D) is the nearest, or of the 5 nearest."""
    table = torch.cdist(queries.double(), candidates.double(), compute_mode=EXACT)
    before = (table <= table.diagonal()[:, None]).sum(1) - 1  # ties count against us
    return {f"top-{k}": (before < k).double().mean().item() for k in (1, 5)}


EXACT = "donot_use_mm_for_euclid_dist"  # of equal rows the distance is 0


def nearest_scene(degraded: Tensor, clean: Tensor) -> dict[str, float]:
    """How often, and by how much, row i (N, ...) is nearer to its own clean row than to others."""
    table = torch.cdist(degraded.flatten(1), clean.flatten(1))
    own, other = (
        table.diagonal(),
        (table + table.new_full((len(table),), math.inf).diag()).min(1)[0],
    )
    return {"top-1": (own < other).float().mean().item(), "ratio": (own / other).median().item()}


def device_crops(files: list[Path], side: int, images: int, seed: int) -> list[Tensor]:
    """Queries and candidates (N, 3, side, side) from two files of a device each; none, if fewer.

    A device is a sub-folder; its first and its last file are the most likely to be two photos.
    """
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)
    devices = [f for f in folders.values() if len(f) > 1]
    order = torch.randperm(len(devices), generator=make_generator(seed)).tolist()
    crops = []
    for device in order if len(devices) > 1 else []:
        with contextlib.suppress(ValueError):
            two = [middle(load_image(devices[device][i]), side) for i in (0, -1)]
            crops.append(torch.stack(two))
    return list(torch.stack(crops[:images], dim=1)) if len(crops) > 1 else []


EFFECTS = [f"at {f:.1f}" for f in additions.FREQUENCIES.tolist()] + [
    "noise low",
    "mid",
    "high",
    "JPEG",
]


def head_errors(
    nets: extractors.Extractors, lr: Tensor, theta: degrade.Degradation
) -> dict[str, list[float]]:
    """Error (9,) of what the head reads in lr (N, 3, h, w), and the spread of the truth."""
    truth = additions.effects_of(theta)
    error = nets.head(torch.cat([nets.e_deg(x[None]) for x in lr])).float().cpu() - truth
    square = error.square().nanmean(0), (truth - truth.nanmean(0)).square().nanmean(0)
    return dict(zip(("error", "spread"), (x.sqrt().tolist() for x in square), strict=True))


def table_extractors(name: str, inputs: Inputs) -> Measure:
    """Retrieval by degradation and by content, and what Rec_hr makes of the content."""
    cfg, hr = inputs.cfg, inputs.photos.to(inputs.device)
    nets = inputs.net.extractors
    files = find_photos(cfg.lr, "lr", "--lr")
    devices = device_crops(files, cfg.crop, cfg.images, cfg.seed)

    def each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([function(rows).float() for rows in x.split(cfg.batch_size)])

    def found(task: str, queries: Tensor, candidates: Tensor) -> dict[str, Any]:
        shares = retrieval(each(nets.e_deg, queries), each(nets.e_deg, candidates))
        return {"task": task, "n": len(queries)} | shares

    @torch.no_grad()
    def measure() -> tuple[dict[str, Any], str]:
        N, _, H, W = hr.shape
        content = each(nets.vqvae.encode, hr)
        quantised, numbers = nets.vqvae.quantize(content)
        images = {"clean, without codebook": each(nets.vqvae.decode, content)}
        images |= {"clean, with codebook": each(nets.vqvae.decode, quantised)}
        rows, contents, heads = [], [], []
        for recipe in ("realesrgan", "camera"):
            draw = make_generator(cfg.seed, degrade.RECIPES.index(recipe))
            theta = degrade.sample_degradation(N, recipe, generate.SCALE, generator=draw)
            lr = degrade.degrade(hr, theta, draw)
            # Another scene with the same theta; the query's scene is there with another theta.
            rows.append(
                found(f"theta, {recipe}", lr, degrade.degrade(hr.roll(N // 2, 0), theta, draw))
            )
            if not nets.as_printed:
                heads.append({"recipe": recipe} | head_errors(nets, lr, theta))
            enlarged = resized(lr, H, W)
            seen = each(nets.content, enlarged)
            for of, a, b in (("E_cont", seen, content), ("pixels", enlarged, hr)):
                contents.append({"recipe": recipe, "of": of} | nearest_scene(a, b))
            images[f"{recipe}, enlarged"] = enlarged
            images[f"{recipe}, its content decoded"] = each(nets.vqvae.decode, seen)
        if devices:
            rows.append(found("device", *(x.to(inputs.device) for x in devices)))
        values = {key: psnr(x.clamp(0, 1), hr).mean().item() for key, x in images.items()}
        used = [int(numbers.unique().numel()), len(nets.vqvae.quantize.embedding.weight)]
        result: dict[str, Any] = {"images": N, "retrieval": rows, "content": contents}
        result |= {"psnr": values, "used": used, "head": heads}
        return result, text_of_extractors(result)

    return measure


def text_of_extractors(result: dict[str, Any]) -> str:
    """The three tables of the extractors, and what a reader must know."""
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
    numbers = [[row["recipe"], of, *(f"{value:.2f}" for value in row[of])]
               for row in result["head"] for of in ("error", "spread")]  # fmt: skip
    heads = ["degraded with", "nearest by", "own scene is nearest", "own / nearest other"]
    return f"""## Do the extractors tell degradation and content apart? {result["images"]} contents

{table_text(["same, by F_deg", "top-1", "top-5", "chance top-1", "n"], shares)}
{table_text(heads, contents, words=2)}
{table_text(["image", "PSNR to the clean photo"], images)}
{table_text(["head, fresh draws", "", *EFFECTS], numbers, words=2)}
Same theta: the query is D(X, theta), candidates D(X', theta') of other scenes, one of them with the
query's theta. Same device: two files of each sub-folder of --lr. own / nearest other: median ratio
of the distances from the content of D(X), enlarged, to that of its clean photo and of another one.
Head: root mean square error of each number of additions.effects_of, beside its spread among the
draws. Of {result["used"][1]} entries of the codebook the clean photos use {result["used"][0]}.
"""
