"""Train a super-resolution (SR) network on LR/HR pairs, to measure their worth. Section 3.1.

In: a folder of pairs (of generate.py, degrade.py or a camera), or HR photos that degrade.py reduces
during training. Out: runs/sr/NAME.pt, to continue the training, and runs/sr/NAME.safetensors, the
averaged weights. The networks are the paper's four, trained from scratch, and FSRCNN, which a CPU
can train. spandrel reads the .safetensors of the paper's four, and --start-from takes published
weights that spandrel reads. --upscale enlarges images with a trained network; --test compares it
with bicubic enlargement on aligned pairs. Both take any published network of --start-from.

    python -m bench.sr --sr swinir-l --pairs out/generated
    python -m bench.sr --sr swinir-l --pairs out/generated --upscale data/lr
    python -m bench.sr --start-from runs/sr/swinir-l-generated.safetensors --test data/RealSR
    python -m bench.sr --sr fsrcnn --recipe bicubic --preset smoke
"""

import functools
import math
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import degrade
import extractors
from bench import metrics
from bench.pairs import (
    Method,
    Pair,
    evaluate,
    find_files,
    find_pairs,
    resized_by_pillow,
    stored_sizes,
    table_text,
)
from common import require
from common.checkpoint import (
    count_parameters,
    fingerprint,
    load_checkpoint,
    put_weights,
    save_weights,
)
from common.cli import check_ranges, launch
from common.files import find_photos, list_images, outside, photo_names
from common.folder import out_folder
from common.images import is_gray, load_pixels, lost_sentence, save_png, to_uint8
from common.photos import Crops, Photos, dihedral
from common.run import (
    TRAINING_RANGES,
    Run,
    TrainingConfig,
    check_micro_batches,
    compile_networks,
    lock_runs,
)
from common.runtime import Runtime, make_generator, wait_for_all
from common.tiles import in_bands, in_tiles
from generate import SCALE

# ---- networks: lr (B, 3, h, w) in [0, 1] -> hr (B, 3, scale h, scale w) --------------------------


class FSRCNN(nn.Module):
    """Extract, shrink, map and expand at LR size, then one deconvolution (arXiv:1608.00367)."""

    def __init__(self, scale: int, d: int = 56, s: int = 12, m: int = 4) -> None:
        super().__init__()
        self.scale = scale
        # Deviation: RGB in and out; the paper's network sees luma, and chroma is resized.
        self.body = nn.Sequential()
        for c_in, c_out, size in [(3, d, 5), (d, s, 1), *[(s, s, 3)] * m, (s, d, 1)]:
            self.body.append(nn.Conv2d(c_in, c_out, size, padding=size // 2))
            self.body.append(nn.PReLU(c_out))
        self.last = nn.ConvTranspose2d(d, 3, 9, scale, padding=4, output_padding=scale - 1)
        for layer in self.body.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=0.25)  # the slope at which PReLU starts
                nn.init.zeros_(layer.get_parameter("bias"))
        nn.init.normal_(self.last.weight, std=0.001)
        nn.init.zeros_(self.last.get_parameter("bias"))

    def forward(self, lr: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 3, scale h, scale w)."""
        # Deviation: the network adds to a bicubic enlargement, so that a minute of training helps.
        large = F.interpolate(lr, scale_factor=self.scale, mode="bicubic")
        return large + self.last(self.body(lr))


NETWORKS = ("swinir", "swinir-l", "rrdb", "hat", "fsrcnn")
# HAT (arXiv:2205.04437), SwinIR, and SwinIR for lightweight SR (arXiv:2108.10257)
HAT_MEDIUM = {"embed_dim": 180, "depths": [6] * 6, "num_heads": [6] * 6, "mlp_ratio": 2}
SWINIR = HAT_MEDIUM | {"img_size": 48, "window_size": 8, "upsampler": "pixelshuffle"}
LIGHT = {"embed_dim": 60, "depths": [6] * 4, "num_heads": [6] * 4}
SWINIR_L = SWINIR | LIGHT | {"upsampler": "pixelshuffledirect"}


def check_network(name: str, scale: int) -> None:
    """UserError unless there is such a network."""
    require(name in NETWORKS, f"--sr {name}: choose {', '.join(NETWORKS)}.")
    require(scale in (2, 4), f"--scale {scale}: choose 2 or 4.")


def sr_network(name: str, scale: int = 4) -> nn.Module:
    """An untrained network, (B, 3, h, w) in [0, 1] -> (B, 3, scale h, scale w), not clamped."""
    check_network(name, scale)
    if name == "fsrcnn":
        return FSRCNN(scale)
    metrics.import_torchvision()  # spandrel imports it, too
    from spandrel.architectures import ESRGAN, HAT, SwinIR

    if name in ("swinir", "swinir-l"):
        return SwinIR.SwinIR(upscale=scale, **(SWINIR if name == "swinir" else SWINIR_L))
    if name == "hat":
        options = {"window_size": 16, "overlap_ratio": 0.5, "conv_scale": 0.01} | HAT_MEDIUM
        return HAT.HAT(upscale=scale, compress_ratio=3, squeeze_factor=30, **options)
    net = ESRGAN.ESRGAN(scale=scale, num_filters=64, num_blocks=23)
    for module, layer in net.named_modules():
        if ".RDB" in module and isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # made small: arXiv:1809.00219, Section 3.1
            layer.weight.data *= 0.1
            nn.init.zeros_(layer.get_parameter("bias"))
    return net


@torch.no_grad()
def super_resolve(net: nn.Module, lr: Tensor, tile: int = 256) -> Tensor:
    """lr (B, 3, h, w) of any size -> (B, 3, scale h, scale w), both in [0, 1].

    Larger images are computed in overlapping tiles of `tile` LR pixels a side, to save memory. An
    image is extended by reflection to a multiple of the network's window.
    """
    window = getattr(net, "window_size", 1)

    def network(x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        rows, columns = (np.pad(np.arange(n), (0, -n % window), "reflect") for n in (h, w))
        sr = net(x[:, :, rows][..., columns])
        scale = sr.shape[2] // len(rows)
        return F.pixel_unshuffle(sr[:, :, : scale * h, : scale * w], scale)  # (B, 3 scale^2, h, w)

    sr = in_tiles(network, (lr.shape[2], lr.shape[3]), lr, tile=tile)
    return F.pixel_shuffle(sr, math.isqrt(sr.shape[1] // 3)).float().clamp(0, 1)


def enlarging(net: nn.Module | None) -> Method:
    """The method of evaluate() that enlarges LR by a network; by Pillow's bicubic without one."""

    def make(lr: Tensor, batch: Sequence[Pair]) -> Tensor:
        if net is None:
            return resized_by_pillow(lr, *(SCALE * side for side in lr.shape[2:]))
        return super_resolve(net, lr)

    return make


def super_resolved_photo(net: nn.Module, lr: Tensor, tile: int = 256) -> Image.Image:
    """SR of a photo (3, h, w) in [0, 1] or of 8 bits, by super_resolve() in tiles; gray stays gray.

    Memory holds a tile, two rows of tiles in 8 bits, and the result. ValueError if that is not
    finite.
    """
    device, gray, (h, w) = next(net.parameters()).device, is_gray(lr), lr.shape[1:]

    def enlarged(crop: Tensor) -> Tensor:
        x = crop[None].to(device)
        sr = super_resolve(net, x if x.is_floating_point() else x.float() / 255, tile)[0]
        if not sr.isfinite().all():
            raise ValueError("the output of the network is not finite")
        return sr.mean(0, keepdim=True).expand_as(sr) if gray else sr

    image, top = None, 0
    for band in in_bands(enlarged, lr, tile):
        image = image or Image.new("RGB", (band.shape[2], band.shape[2] // w * h))
        for rows in band.split(64, dim=1):  # few, to save memory
            image.paste(Image.fromarray(rows.permute(1, 2, 0).numpy()), (0, top))
            top += rows.shape[1]
    assert image is not None
    return image


def read_network(path: str | Path) -> dict[str, Any]:
    """The checkpoint in a .pt or .safetensors of this file; its config names the network ("sr")."""
    state = load_checkpoint(path)
    wrong = f"{path}: not a network of bench.sr (give one of runs/sr)."
    require("sr" in state.get("config", {}), wrong)
    return state


def load_network(path: str | Path) -> nn.Module:
    """The network in a .pt or .safetensors of this file, with its averaged weights."""
    state = read_network(path)
    net = sr_network(state["config"]["sr"], state["config"]["scale"])
    put_weights(net, state, str(path))
    return net.eval().requires_grad_(False)


MAY_DIFFER = {"img_size", "drop_path_rate"}  # of hyper-parameters: they change no parameter


def recognised(weights: Any) -> Any:
    """What spandrel takes the weights of a network for: its ModelDescriptor; None if for nothing.

    No code of the file is run: the architecture is read off the names and shapes of the weights.
    """
    metrics.import_torchvision()
    import spandrel

    if not isinstance(weights, dict):
        return None
    renamed = {re.sub(r"^(module|netG)\.", "", str(key)): v for key, v in weights.items()}
    try:
        return spandrel.ModelLoader("cpu").load_from_state_dict(renamed)
    except Exception:  # of many types
        return None


def put_start(net: nn.Module, path: str) -> None:
    """Give a network the weights of --start-from, which may be published ones, read by spandrel.

    UserError for another architecture, or other hyper-parameters of the same.
    """
    flag = f"--start-from {path}"
    require(Path(path).is_file(), f"{flag}: no such file.")
    weights, own = load_checkpoint(path)["ema"], net.state_dict()
    require(isinstance(weights, dict), f"{flag}: holds no weights by name.")
    shapes = {key: getattr(value, "shape", None) for key, value in weights.items()}
    ours = shapes == {key: value.shape for key, value in own.items()}
    if not ours and (found := recognised(weights)):
        read = f"{flag}: spandrel reads it as {found.architecture.name} x{found.scale}"
        other = f"{read}, but --sr names another network ({type(net).__name__})."
        require(type(found.model) is type(net), other)
        given, needed = (getattr(m, "hyperparameters", {}) for m in (found.model, net))
        differing = [k for k in needed if k not in MAY_DIFFER and given[k] != needed[k]]
        facts = ", ".join(f"{key} {given[key]} (here {needed[key]})" for key in differing)
        require(not differing, f"{read} with other hyper-parameters: {facts}.")
        parameters = {name for name, _ in net.named_parameters()}
        weights = own | {k: v for k, v in found.model.state_dict().items() if k in parameters}
    put_weights(net, {"ema": weights}, flag)


class Published(nn.Module):
    """A network that spandrel reads, of any architecture: lr (B, 3, h, w) -> hr, in [0, 1]."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found, self.model = found, found.model

    def forward(self, lr: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 3, scale h, scale w); spandrel extends lr to sizes that fit."""
        return self.found(lr)


# ---- pairs --------------------------------------------------------------------------------------


def join(hr: Tensor, lr: Tensor) -> Tensor:
    """A pair as one image of LR size: hr (B, 3, s h, s w), lr (B, 3, h, w) -> (B, 3 s^2 + 3, h, w).

    A crop of it is a crop of both images at the same place.
    """
    return torch.cat([F.pixel_unshuffle(hr, hr.shape[2] // lr.shape[2]), lr], dim=1)


def split(pair: Tensor) -> tuple[Tensor, Tensor]:
    """hr and lr of a pair: the inverse of join()."""
    return F.pixel_shuffle(pair[:, :-3], math.isqrt(pair.shape[1] // 3 - 1)), pair[:, -3:]


def training_files(folder: str, scale: int, rt: Runtime) -> list[tuple[Path, Path]]:
    """LR and HR file of each pair; UserError if names or sizes do not fit together.

    HR may be up to scale - 1 pixels larger than scale times LR. A pair is skipped and counted if
    the header of an image can't be read, or if EXIF turns the two images differently. Of a release
    Train is taken.
    """
    files = find_files(Path(folder), scale, "Train")[0]
    if not files:
        files, release = find_files(Path(folder), scale)
        require(not release, f"--pairs {folder}: of {release} only Test is there, to be tested on.")
    pairs, errors = [], []
    for name, (hr, lr) in files.items():
        try:
            (W, H), (w, h) = stored_sizes(hr, lr)
        except ValueError as error:
            errors.append(str(error))
            continue
        sizes = f"{name} has {W} x {H} and {w} x {h} pixels"
        wrong = f"--pairs {folder}: {sizes}, which is not --scale {scale}."
        require((W // scale, H // scale) == (w, h), wrong)
        pairs.append((lr, hr))
    if errors and rt.is_main:
        print(f"skipped {len(errors)} of {len(files)} pairs (the first: {errors[0]})")
    require(bool(pairs), f"--pairs {folder}: none of its pairs can be read.")
    return pairs


def read_pair(files: tuple[Path, Path], scale: int) -> np.ndarray:
    """The LR and HR files of a pair, joined, as uint8 (3 scale^2 + 3, h, w)."""
    lr, hr = (to_uint8(load_pixels(file))[None] for file in files)
    h, w = (scale * side for side in lr.shape[2:])
    return join(hr[:, :, :h, :w], lr)[0].numpy()


class PairCrops(Crops):
    """Crops of joined pairs, (3 scale^2 + 3, size, size)."""

    grid = 1  # crops may begin at any pixel: LR is given, so the JPEG of D does not follow

    def turned(self, crop: Tensor, draw: int) -> Tensor:
        """A crop with both images turned alike."""
        hr, lr = split(crop[None])
        return join(dihedral(hr, draw), dihedral(lr, draw))[0]


# ---- loss ---------------------------------------------------------------------------------------


@torch.no_grad()
def degraded(hr: Tensor, recipe: str, scale: int, generator: torch.Generator) -> Tensor:
    """LR of HR images (B, 3, H, W); each image draws its own parameters of a recipe of D."""
    draw = make_generator(generator.initial_seed())  # on the CPU: does not synchronise the GPU
    theta = degrade.sample_degradation(len(hr), recipe, scale, draw)
    return degrade.degrade(hr, theta, draw)


def sr_loss(net: nn.Module, hr: Tensor, lr: Tensor, perceptual_weight: float) -> dict[str, Tensor]:
    """L1 for the PSNR-oriented networks of Table 1, and a perceptual loss for the others.

    hr (B, 3, s h, s w), lr (B, 3, h, w), both in [0, 1].
    Deviation: LPIPS-VGG (arXiv:1801.03924), since the metrics need its weights, too. The paper
    cites losses on VGG's features, two of them with a GAN, and gives no layers and no weights.
    """
    sr = net(lr).float()
    loss, psnr = F.l1_loss(sr, hr), extractors.psnr_of(F.mse_loss(sr.detach().clamp(0, 1), hr))
    if perceptual_weight == 0:
        return {"loss": loss, "psnr": psnr}
    with torch.autocast(hr.device.type, enabled=False):
        vgg = metrics.perceptual_net("LPIPS", "vgg", hr.device)
        perceptual = vgg(sr, hr, normalize=True).mean()
    return {"loss": loss + perceptual_weight * perceptual, "perceptual": perceptual, "psnr": psnr}


def loss_of_batch(
    net: nn.Module, batch: Tensor, cfg: "Config", generator: torch.Generator
) -> dict[str, Tensor]:
    """sr_loss() of a batch of HR crops, which a recipe degrades, or of pairs as PairCrops joins."""
    if cfg.pairs:
        hr, lr = split(batch)
    else:
        hr, lr = batch, degraded(batch, cfg.recipe, cfg.scale, generator)
    torch.manual_seed(generator.initial_seed())  # transformers draw which paths they drop
    return sr_loss(net, hr, lr, cfg.perceptual_weight)


# ---- configuration and training -----------------------------------------------------------------


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings of the training, the same for all networks.

    The paper names BasicSR and no numbers: these are BasicSR's for SwinIR x4.
    """

    sr: str = "swinir-l"  # network: swinir, swinir-l, rrdb, hat or fsrcnn
    pairs: str = ""  # folder of pairs with the same names in hr/ and lr/
    recipe: str = ""  # without --pairs: recipe of degrade.py (default: realesrgan)
    hr: tuple[str, ...] = ()  # folders of HR photos to degrade (else data/hr, else data/sample/hr)
    start_from: str = ""  # file of weights, ours or published, to train further or to enlarge with
    out: str = "runs/sr"  # folder of checkpoints and log
    name: str = ""  # of the files in it (default: network and source)
    scale: int = 4  # HR size / LR size, 2 or 4
    upscale: tuple[str, ...] = ()  # images to enlarge with the trained network, into OUT/NAME
    test: tuple[str, ...] = ()  # folders of aligned pairs to test the trained network on
    perceptual_weight: float = 0.0  # of LPIPS-VGG; above 0 for perceptual-oriented networks
    steps: int = 500_000
    batch_size: int = 32  # per process; BasicSR: 32 in all
    crop: int = 48  # LR crop, pixels
    learning_rate: float = 2e-4
    betas: tuple[float, ...] = (0.9, 0.99)  # of Adam
    log_every: int = 100
    save_every: int = 5000
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (*TrainingConfig.MAY_CHANGE, "test")


SHORT = {"batch_size": 8, "compile": False, "save_every": 500}
MINUTE = {"steps": 300, "crop": 24, "learning_rate": 2e-3, "ema_decay": 0.99}
PRESETS: dict[str, dict] = {
    "small": SHORT | {"steps": 4000, "crop": 32, "learning_rate": 5e-4},
    "paper": {},
    "smoke": SHORT | MINUTE | {"sr": "fsrcnn"},
}
RANGES = TRAINING_RANGES | {
    "scale": (2, 4), "crop": (16, 2**14), "batch_size": (1, 2**20), "steps": (1, 2**31),
    "learning_rate": (0, 1), "betas": (0, 0.99999), "perceptual_weight": (0, 1e6),
    "seed": (0, 2**63 - 1),
}  # fmt: skip
MOST_PIXELS = 2**28  # of the HR crops of a batch


def completed(cfg: Config) -> Config:
    """The settings with the recipe and the name that they imply; UserError for a wrong flag."""
    one_source = not (cfg.pairs and (cfg.recipe or cfg.hr))
    require(one_source, "--pairs and --recipe or --hr are two sources: give one.")
    recipe = "" if cfg.pairs else cfg.recipe or "realesrgan"
    wrong = f"--recipe {recipe}: choose {', '.join(degrade.RECIPES)}."
    require(recipe in ("", *degrade.RECIPES), wrong)
    check_ranges(cfg, RANGES)
    check_network(cfg.sr, cfg.scale)
    check_micro_batches(cfg)
    require(len(cfg.betas) == 2, "--betas takes two numbers.")
    most = max(1, MOST_PIXELS // (cfg.scale * cfg.crop) ** 2)
    wrong = f"--batch-size {cfg.batch_size} is too large: with --crop {cfg.crop}, at most {most}."
    require(cfg.batch_size <= most, wrong)
    words = [cfg.sr, recipe or Path(cfg.pairs).resolve().name]
    words += ["perceptual"] * (cfg.perceptual_weight > 0)
    return replace(cfg, recipe=recipe, name=cfg.name or "-".join(words))


MEASURED = 6  # steps; networks are compiled in the first one


def duration(times: dict[int, float], steps: int) -> str:
    """About how long the other steps take, by the times at which the first ones ended."""
    step = max(times)
    seconds = (times[step] - times[min(times)]) / (step - min(times)) * (steps - step)
    unit, size = next(u for u in (("h", 3600), ("min", 60), ("s", 0)) if seconds >= u[1])
    return f"about {seconds / max(1, size):.2g} {unit} for the other {steps - step} steps"


def train(cfg: Config, rt: Runtime) -> Path:
    """Train one network on one source of pairs; returns the file of its averaged weights."""
    cfg = completed(cfg)
    lock_runs(cfg.out, [cfg.name], rt)
    out_folder(cfg.out, rt).check([Path(cfg.out) / f"{cfg.name}.safetensors"])
    torch.manual_seed(cfg.seed)  # the weights do not depend on earlier trainings of this process
    net = sr_network(cfg.sr, cfg.scale)
    if cfg.start_from:
        put_start(net, cfg.start_from)
    if cfg.perceptual_weight > 0:
        metrics.perceptual_net("LPIPS", "vgg", rt.device)  # fails early where weights are missing
    path, decoded = Path(cfg.out) / f"{cfg.name}.pt", Path(cfg.out) / "photos"
    crops: Crops
    if cfg.pairs:
        pairs = training_files(cfg.pairs, cfg.scale, rt)
        read = functools.partial(read_pair, scale=cfg.scale)
        folder = decoded / f"pairs-{zlib.crc32(cfg.pairs.encode()):08x}"
        crops = PairCrops(Photos(pairs, folder, rt, read), cfg.crop, cfg.batch_size, cfg.seed)
    else:
        files = outside(find_photos(cfg.hr, "hr", "--hr", packed=True), cfg.out, "--hr")
        photos = Photos(files, decoded / "hr", rt)
        crops = Crops(photos, cfg.crop, cfg.batch_size, cfg.seed, scale=cfg.scale)
    if rt.is_main:
        print(cfg)
        images = f"{len(crops.rows)} images, {crops.left_out} smaller than the crop"
        print(f"{cfg.name}: {count_parameters(net)}, {images}")
    if cfg.compile:
        compile_networks([net], rt)
    # Deviation: a constant learning rate, averaged weights and clipped gradients, as in all stages.
    # BasicSR halves the learning rate four times, averages too, and does not clip.
    groups = [{"params": [*net.parameters()], "lr": cfg.learning_rate, "betas": cfg.betas}]
    began = fingerprint(net) if cfg.start_from else ""  # a run resumes only from equal weights
    run = Run(cfg, rt, net, groups, path, cfg.steps, began=began)
    times: dict[int, float] = {}  # at which each of the first steps ended
    for batch, draw in run.batches(crops):
        run.update(loss_of_batch, net, batch, cfg, draw)
        if 0 < run.step < cfg.steps and len(times) < MEASURED:
            times.setdefault(run.step, time.monotonic())
            if rt.is_main and len(times) == MEASURED:
                print(f"{cfg.name}: {duration(times, cfg.steps)}", flush=True)
    target = path.with_suffix(".safetensors")
    if rt.is_main:
        save_weights(target, net.state_dict(), config=asdict(cfg))
        print(f"averaged weights: {target}")
    wait_for_all(rt)
    return target


# ---- a trained network --------------------------------------------------------------------------


def trained_network(cfg: Config, flag: str) -> tuple[Path, nn.Module]:
    """The file of --start-from, else of the training with these flags, and its network.

    Without a configuration in the file, spandrel names the network, else the flags do.
    """
    cfg = completed(cfg)
    path = Path(cfg.start_from or Path(cfg.out) / f"{cfg.name}.safetensors")
    missing = f"{path} is missing: train it without {flag}, or name a file with --start-from."
    require(path.is_file(), missing)
    state, given = load_checkpoint(path), f"--start-from {path}"
    if state["config"]:
        return path, load_network(path)
    found = recognised(state["ema"])
    if found is None or found.purpose == "Inpainting":
        net = sr_network(cfg.sr, cfg.scale)
        put_start(net, str(path))
    else:
        channels = (found.input_channels, found.output_channels)
        require(channels == (3, 3), f"{given}: {found.architecture.name} is not for RGB images.")
        net = Published(found)
        whole = all(bool(v.isfinite().all()) for v in net.state_dict().values())
        require(whole, f"{given}: its weights are not finite: do not use it.")
    return path, net.eval().requires_grad_(False)


def upscale(cfg: Config, rt: Runtime) -> None:
    """Enlarge images with a trained network; those that can't be are skipped and counted."""
    weights, net = trained_network(cfg, "--upscale")
    net, out, skipped = net.to(rt.device), Path(cfg.out) / weights.stem, 0
    files = outside(list_images(cfg.upscale, "--upscale"), out, "--upscale")
    targets = [out / f"{name}.png" for name in photo_names(files, cfg.upscale)]
    out_folder(out, rt).check(targets)
    for file, target in zip(tqdm(files, unit="image"), targets, strict=True):
        try:
            lr = load_pixels(file)
            with rt.autocast(cfg.bf16):
                image = super_resolved_photo(net, lr)
        except (ValueError, MemoryError) as error:
            tqdm.write(f"skipped: {file}: {str(error).removeprefix(f'{file}: ')}")
            skipped += 1
            continue
        save_png(target, image)
    if sentence := lost_sentence():
        print(sentence)
    print(f"{len(files) - skipped} images in {out}, {skipped} skipped")


def print_test(cfg: Config, rt: Runtime) -> None:
    """Print how near the enlarged LR of aligned pairs is to HR, with a row for bicubic.

    Figures are means over the pairs of a folder, without autocast, of images rounded to 8 bits.
    """
    weights, net = trained_network(cfg, "--test")
    net = net.to(rt.device)
    scale = super_resolve(net, torch.rand(1, 3, 32, 32, device=rt.device)).shape[2] // 32
    wrong = f"{weights}: a network of scale {scale}; --test reads pairs of scale {SCALE}."
    require(scale == SCALE, wrong)
    methods = {"bicubic": enlarging(None), weights.name: enlarging(net)}
    sets = {folder: find_pairs(Path(folder))[0] for folder in cfg.test}
    columns, rows = metrics.COMPARED, []
    names = metrics.available_metrics(rt.device, columns)
    for folder, pairs in sets.items():
        for label, method in methods.items():
            mean = evaluate(method, pairs, names, rt.device, upwards=True)["mean"]
            cells = [metrics.metric_text(mean, metric) for metric in columns]
            rows.append([folder, label, *cells, str(len(pairs))])
    print(table_text(["pairs", "enlarged by", *columns, "n"], rows, words=2), end="")


def main(cfg: Config, rt: Runtime) -> None:
    """Train, or use a trained network: enlarge images, or test it on pairs."""
    require(not (cfg.upscale and cfg.test), "--upscale and --test are two tasks: give one.")
    if not (cfg.upscale or cfg.test):
        train(cfg, rt)
    elif rt.is_main:
        (upscale if cfg.upscale else print_test)(cfg, rt)


if __name__ == "__main__":
    launch(main, Config, PRESETS, __doc__)
