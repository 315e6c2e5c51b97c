"""Downstream: train a super-resolution network on LR/HR pairs, to see their worth. Section 3.1.

In: a folder of pairs (of generate.py, degrade.py or a camera), or HR photos that a recipe of
degrade.py reduces while training. Out: runs/sr/NAME.pt to continue the training, and
runs/sr/NAME.safetensors with the averaged weights. The networks are the paper's four, trained from
scratch, and FSRCNN, which a CPU can train. spandrel and programs built on it read the .safetensors
of the paper's four (a .pt gives them the weights before averaging); they do not know FSRCNN.
--upscale enlarges images with any of the five.

    python -m bench.sr --sr swinir-l --pairs out/generated
    python -m bench.sr --sr swinir-l --pairs out/generated --upscale data/lr
    python -m bench.sr --sr fsrcnn --recipe bicubic --preset smoke
"""

import functools
import json
import math
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import common
import degrade
import extractors
from bench import metrics
from bench.pairs import find_files, stored_sizes
from data.pack import Crops, Photos

# ---- networks: lr (B, 3, h, w) in [0, 1] -> hr (B, 3, scale h, scale w) --------------------------


class FSRCNN(nn.Module):
    """Extract, shrink, map, expand, all at LR size, then one deconvolution (arXiv:1608.00367)."""

    def __init__(self, scale: int, d: int = 56, s: int = 12, m: int = 4) -> None:
        super().__init__()
        self.scale = scale
        # Deviation: RGB in and out; the original works on luma and leaves chroma to bicubic.
        sizes = [(3, d, 5), (d, s, 1), *[(s, s, 3)] * m, (s, d, 1)]
        layers: list[nn.Module] = []
        for c_in, c_out, size in sizes:
            layers += [nn.Conv2d(c_in, c_out, size, padding=size // 2), nn.PReLU(c_out)]
        self.body = nn.Sequential(*layers)
        self.last = nn.ConvTranspose2d(d, 3, 9, scale, padding=4, output_padding=scale - 1)
        for layer in layers[::2]:
            nn.init.kaiming_normal_(layer.get_parameter("weight"), a=0.25)  # PReLU's first slope
            nn.init.zeros_(layer.get_parameter("bias"))
        nn.init.normal_(self.last.weight, std=0.001)
        nn.init.zeros_(self.last.get_parameter("bias"))

    def forward(self, lr: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 3, scale h, scale w)."""
        # Deviation: what it adds to bicubic, so that a minute of training is enough to be of use.
        large = F.interpolate(lr, scale_factor=self.scale, mode="bicubic")
        return large + self.last(self.body(lr))


NETWORKS = ("swinir", "swinir-l", "rrdb", "hat", "fsrcnn")
# SwinIR and HAT (arXiv:2108.10257, arXiv:2205.04437), and SwinIR for lightweight SR.
MEDIUM = {"embed_dim": 180, "depths": [6] * 6, "num_heads": [6] * 6, "mlp_ratio": 2}
LIGHT = {"embed_dim": 60, "depths": [6] * 4, "num_heads": [6] * 4}


def sr_network(name: str, scale: int = 4) -> nn.Module:
    """An untrained network, (B, 3, h, w) in [0, 1] -> (B, 3, scale h, scale w), not clamped."""
    common.require(name in NETWORKS, f"--sr {name}: choose {', '.join(NETWORKS)}.")
    common.require(scale in (2, 4), f"--scale {scale}: choose 2 or 4.")
    if name == "fsrcnn":
        return FSRCNN(scale)
    metrics.import_torchvision()  # which spandrel imports, too
    from spandrel.architectures import ESRGAN, HAT, SwinIR

    if name == "hat":
        options = {"window_size": 16, "overlap_ratio": 0.5, "conv_scale": 0.01} | MEDIUM
        return HAT.HAT(upscale=scale, compress_ratio=3, squeeze_factor=30, **options)
    if name == "rrdb":
        net = ESRGAN.ESRGAN(scale=scale, num_filters=64, num_blocks=23)
        for part, layer in net.named_modules():
            if ".RDB" in part and isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)  # made small: arXiv:1809.00219, Section 3.1
                layer.weight.data *= 0.1
                nn.init.zeros_(layer.get_parameter("bias"))
        return net
    options, upsampler = {"img_size": 48, "window_size": 8} | MEDIUM, "pixelshuffle"
    if name == "swinir-l":
        options, upsampler = options | LIGHT, "pixelshuffledirect"
    return SwinIR.SwinIR(upscale=scale, upsampler=upsampler, **options)


def mirrored(n: int, multiple: int) -> Tensor:
    """Indices 0..n-1, and on by reflection to a multiple, however short the image."""
    i = torch.arange(math.ceil(n / multiple) * multiple) % max(1, 2 * n - 2)
    return torch.minimum(i, 2 * n - 2 - i) if n > 1 else i


@torch.no_grad()
def super_resolve(net: nn.Module, lr: Tensor, tile: int = 256) -> Tensor:
    """lr (B, 3, h, w) of any size -> (B, 3, scale h, scale w), both in [0, 1].

    Images larger than a tile (pixels of LR) are cut into overlapping ones, so that the memory the
    network needs does not grow with them. Windows that do not fit in are filled up by reflection.
    """
    common.require(tile > extractors.OVERLAP, f"tiles of {tile} pixels are all overlap.")

    def whole(x: Tensor) -> Tensor:
        (h, w), multiple = x.shape[2:], getattr(net, "window_size", 1)
        rows, columns = (mirrored(n, multiple).to(x.device) for n in (h, w))
        sr = net(x[:, :, rows][..., columns])
        scale = sr.shape[2] // len(rows)
        return F.pixel_unshuffle(sr[:, :, : scale * h, : scale * w], scale)  # (B, 3 scale^2, h, w)

    sr = extractors.in_tiles(whole, (lr.shape[2], lr.shape[3]), lr, tile=tile)
    return F.pixel_shuffle(sr, math.isqrt(sr.shape[1] // 3)).float().clamp(0, 1)


def read_network(path: str | Path) -> dict[str, Any]:
    """What a .pt or .safetensors of this file holds; its config names the network ("sr")."""
    state = common.load_checkpoint(path)
    trained_here = "sr" in state.get("config", {})
    common.require(trained_here, f"{path}: not a network of bench.sr (give one of runs/sr).")
    return state


def load_network(path: str | Path) -> nn.Module:
    """The averaged weights of a .pt or .safetensors of this file, ready to super_resolve."""
    state = read_network(path)
    net = sr_network(state["config"]["sr"], state["config"]["scale"])
    common.put_weights(net, state, str(path))
    return net.eval().requires_grad_(False)


# ---- pairs --------------------------------------------------------------------------------------


def dihedral(x: np.ndarray, draw: int) -> np.ndarray:
    """An image (..., n, n) turned by a multiple of 90 degrees and perhaps flipped: 8 ways."""
    x = np.rot90(x, draw % 4, (-2, -1))
    return x[..., ::-1] if draw % 8 >= 4 else x


def join(hr: Tensor, lr: Tensor) -> Tensor:
    """A pair as one image at LR size: hr (B, 3, s h, s w), lr (B, 3, h, w) -> (B, 3 s^2 + 3, h, w).

    Cropping it crops both at the same place.
    """
    return torch.cat([F.pixel_unshuffle(hr, hr.shape[2] // lr.shape[2]), lr], dim=1)


def split(pair: Tensor) -> tuple[Tensor, Tensor]:
    """hr and lr of a pair: the inverse of join()."""
    return F.pixel_shuffle(pair[:, :-3], math.isqrt(pair.shape[1] // 3 - 1)), pair[:, -3:]


def find_pairs(folder: str, scale: int, rt: common.Runtime) -> dict[Path, Path]:
    """HR file of each LR file of a folder; UserError where they do not belong together.

    HR may be up to scale - 1 pixels larger than scale times LR. Pairs without an image's header, or
    of which EXIF turns one, are left out and counted.
    """
    files, published = find_files(Path(folder), scale)
    common.require(not published, f"--pairs {folder}: this set is there to test on.")
    found, bad = {}, []
    for name, (hr, lr) in files.items():
        try:
            large, small = stored_sizes(hr, lr)
        except ValueError as error:
            bad.append(str(error))
            continue
        sizes = f"{name} has {large[0]} x {large[1]} and {small[0]} x {small[1]} pixels"
        fits = (large[0] // scale, large[1] // scale) == small
        common.require(fits, f"--pairs {folder}: {sizes}, which is not --scale {scale}.")
        found[lr] = hr
    if bad and rt.is_main:
        print(f"skipped {len(bad)} of {len(files)} pairs (the first: {bad[0]})")
    common.require(bool(found), f"--pairs {folder}: none of its pairs can be read.")
    return found


def read_pair(files: tuple[Path, Path], scale: int) -> np.ndarray:
    """The LR and HR files of a pair, joined, as uint8 (3 scale^2 + 3, h, w)."""
    lr, hr = (common.to_uint8(common.load_image(f))[None] for f in files)
    h, w = (scale * side for side in lr.shape[2:])
    if hr.shape[2] < h or hr.shape[3] < w:  # in spite of the headers
        raise ValueError(f"{files[1]}: is smaller than {scale} times its LR image")
    return join(hr[:, :, :h, :w], lr)[0].numpy()


class PairCrops(Crops):
    """Crops of pairs, joined: (3 scale^2 + 3, size, size)."""

    grid = 1  # crops begin anywhere: no recipe follows that could mistake the blocks of a JPEG

    def turned(self, crop: np.ndarray, draw: int) -> np.ndarray:
        """Both images of a pair, turned alike."""
        hr, lr = split(torch.from_numpy(crop.copy())[None])
        hr, lr = (torch.from_numpy(dihedral(x.numpy(), draw).copy()) for x in (hr, lr))
        return join(hr, lr)[0].numpy()


class HRCrops(Crops):
    """Crops of HR photos, to be degraded while training."""

    def turned(self, crop: np.ndarray, draw: int) -> np.ndarray:
        """A crop (3, size, size), turned one of 8 ways."""
        return dihedral(crop, draw)


# ---- loss ---------------------------------------------------------------------------------------


@torch.no_grad()
def degraded(hr: Tensor, recipe: str, scale: int, generator: torch.Generator) -> Tensor:
    """LR of an HR batch (B, 3, H, W): each image with its own draw of a recipe of D."""
    draw = common.generator(generator.initial_seed())  # on the CPU, so that no GPU is waited for
    theta = degrade.sample_degradation(len(hr), recipe, scale, draw)
    return degrade.degrade(hr, theta, draw)


def sr_loss(net: nn.Module, hr: Tensor, lr: Tensor, perceptual_weight: float) -> dict[str, Tensor]:
    """L1 for the PSNR-oriented networks of Table 1; a perceptual loss is added for the others.

    hr (B, 3, s h, s w), lr (B, 3, h, w), both in [0, 1].
    Deviation: L1 and LPIPS-VGG (arXiv:1801.03924), whose weights the metrics need anyway. The paper
    cites losses on VGG's features, two of them with a GAN, and gives no layers and no weights.
    """
    sr = net(lr).float()
    loss, psnr = F.l1_loss(sr, hr), extractors.psnr(F.mse_loss(sr.detach().clamp(0, 1), hr))
    if perceptual_weight == 0:
        return {"loss": loss, "psnr": psnr}
    with torch.autocast(hr.device.type, enabled=False):
        vgg = metrics.perceptual_net("LPIPS", "vgg", hr.device)
        perceptual = vgg(sr, hr, normalize=True).mean()
    return {"loss": loss + perceptual_weight * perceptual, "perceptual": perceptual, "psnr": psnr}


# ---- configuration and training -----------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of SR training, the same for all networks.

    The paper names BasicSR and no numbers; the defaults are BasicSR's for SwinIR x4.
    """

    sr: str = "swinir-l"  # network: swinir, swinir-l, rrdb, hat or fsrcnn
    pairs: str = ""  # folder of pairs with the same names in hr/ and lr/
    recipe: str = ""  # without --pairs: of degrade.py, as wide (default: realesrgan)
    hr: tuple[str, ...] = ()  # folders of HR photos to degrade (else data/hr, else data/sample/hr)
    start_from: str = ""  # file of weights of this network, to train further or to enlarge with
    out: str = "runs/sr"  # folder of checkpoints and log
    name: str = ""  # of the files in it (default: network and source)
    scale: int = 4  # HR size / LR size, 2 or 4
    upscale: tuple[str, ...] = ()  # images to enlarge with the trained network, into OUT/NAME
    perceptual_weight: float = 0.0  # of LPIPS-VGG; above 0 for perceptual-oriented networks
    steps: int = 500_000
    batch_size: int = 32  # per process; BasicSR: 32 in all
    crop: int = 48  # LR crop, pixels
    learning_rate: float = 2e-4
    betas: tuple[float, ...] = (0.9, 0.99)  # of Adam
    ema_decay: float = 0.999
    cooldown: float = 0.0  # last share of the steps, in which the learning rate falls to 0
    bf16: bool = True  # where the device has it
    log_every: int = 100
    save_every: int = 5000
    accumulate: int = 0  # parts into which a batch is divided; 0: as many as memory asks for
    compile: bool = True  # torch.compile
    seed: int = 0
    device: str = "auto"


PRESETS: dict[str, dict] = {
    "small": {
        "steps": 4000,
        "batch_size": 8,
        "crop": 32,
        "learning_rate": 5e-4,
        "compile": False,
        "save_every": 500,
    },
    "paper": {},
    "smoke": {
        "sr": "fsrcnn",
        "steps": 300,
        "batch_size": 8,
        "crop": 24,
        "learning_rate": 2e-3,
        "ema_decay": 0.99,
        "compile": False,
        "save_every": 500,
    },
}
RANGES = common.TRAINING_RANGES | {
    "crop": (16, 2**14), "batch_size": (1, 2**20), "steps": (1, 2**31), "learning_rate": (0, 1),
    "betas": (0, 1), "perceptual_weight": (0, 1e6),
}  # fmt: skip


def resolved(cfg: Config) -> Config:
    """The settings with their recipe and name; UserError for what is wrong with the flags alone."""
    common.require(
        not (cfg.pairs and (cfg.recipe or cfg.hr)),
        "--pairs is a source of its own: give it without --recipe and --hr.",
    )
    recipe = "" if cfg.pairs else cfg.recipe or "realesrgan"
    known = ", ".join(degrade.RECIPES)
    common.require(not recipe or recipe in degrade.RECIPES, f"--recipe {recipe}: choose {known}.")
    common.check_ranges(cfg, RANGES)
    common.check_parts(cfg)
    common.require(len(cfg.betas) == 2, "--betas takes two numbers.")
    kind = ["perceptual"] if cfg.perceptual_weight > 0 else []
    name = "-".join([cfg.sr, recipe or Path(cfg.pairs).resolve().name, *kind])
    return replace(cfg, recipe=recipe, name=cfg.name or name)


def save_network(path: Path, net: nn.Module, cfg: Config) -> None:
    """Write weights under plain keys, by which spandrel knows the network, and the settings."""
    weights = {key: value.contiguous().cpu() for key, value in net.state_dict().items()}
    with common.replacing(path) as temporary:
        save_file(weights, temporary, {"config": json.dumps(asdict(cfg))})


def upscale(cfg: Config, rt: common.Runtime) -> None:
    """Enlarge images with a trained network; images that can't be read are skipped and counted."""
    weights = Path(cfg.start_from or Path(cfg.out) / f"{cfg.name}.safetensors")
    missing = f"{weights} is missing: train it without --upscale, or name a file with --start-from."
    common.require(weights.is_file(), missing)
    net, skipped = load_network(weights).to(rt.device), 0
    files = common.list_images(cfg.upscale, "--upscale")
    out = Path(cfg.out) / weights.stem
    names = common.photo_names(files, cfg.upscale)
    for file, name in zip(tqdm(files, unit="image"), names, strict=True):
        try:
            lr = common.load_image(file)[None].to(rt.device)
        except ValueError as error:
            tqdm.write(f"skipped: {error}")
            skipped += 1
            continue
        with rt.autocast(cfg.bf16):
            common.save_image(out / f"{name}.png", super_resolve(net, lr)[0])
    print(f"{len(files) - skipped} images in {out}, {skipped} skipped")


def train(cfg: Config, rt: common.Runtime) -> Path:
    """Train one network on one source; returns the file of its averaged weights."""
    cfg = resolved(cfg)
    torch.manual_seed(cfg.seed)  # the same network, whichever was trained before it
    net = sr_network(cfg.sr, cfg.scale)
    if cfg.start_from:
        common.load_weights(net, cfg.start_from, "--start-from")
    if cfg.perceptual_weight > 0:
        metrics.perceptual_net("LPIPS", "vgg", rt.device)  # fails early where weights are missing
    path = Path(cfg.out) / f"{cfg.name}.pt"
    source = f"pairs-{zlib.crc32(cfg.pairs.encode()):08x}" if cfg.pairs else "hr"
    folder = Path(cfg.out) / "photos" / source
    crops: Crops
    if cfg.pairs:
        pairs = [(lr, hr) for lr, hr in find_pairs(cfg.pairs, cfg.scale, rt).items()]
        read = functools.partial(read_pair, scale=cfg.scale)
        crops = PairCrops(Photos(pairs, folder, rt, read), cfg.crop, cfg.batch_size, cfg.seed)
    else:
        photos = Photos(common.find_photos(cfg.hr, "hr", "--hr", packed=True), folder, rt)
        crops = HRCrops(photos, cfg.crop, cfg.batch_size, cfg.seed, scale=cfg.scale)
    if rt.is_main:
        print(cfg)
        print(f"{cfg.name}: {common.count_parameters(net)}, {len(crops.rows)} images, "
              f"{crops.left_out} smaller than the crop")  # fmt: skip
    if cfg.compile:
        common.compile_networks([net], rt)
    # Deviation: a constant learning rate, as in all stages; BasicSR halves it four times. The
    # average of the weights stands in for that.
    groups = [{"params": [*net.parameters()], "lr": cfg.learning_rate, "betas": cfg.betas}]
    run = common.Run(cfg, rt, net, groups, path, cfg.steps,
                     began=common.fingerprint(net) if cfg.start_from else "")  # fmt: skip
    for batch, draw in run.batches(crops):
        with rt.autocast(cfg.bf16):
            hr, lr = split(batch) if cfg.pairs else (batch, None)
            lr = degraded(hr, cfg.recipe, cfg.scale, draw) if lr is None else lr
            torch.manual_seed(draw.initial_seed())  # the transformers drop paths by its draws
            losses = sr_loss(net, hr, lr, cfg.perceptual_weight)
        run.update(losses)
    target = path.with_suffix(".safetensors")
    if rt.is_main:
        save_network(target, net, cfg)
        print(f"averaged weights: {target}")
    common.wait_for_all(rt)
    return target


def main(cfg: Config, rt: common.Runtime) -> None:
    """Train, or enlarge images with what was trained."""
    if not cfg.upscale:
        train(cfg, rt)
    elif rt.is_main:
        upscale(resolved(cfg), rt)


if __name__ == "__main__":
    common.launch(main, Config, PRESETS, __doc__)
