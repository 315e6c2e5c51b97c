"""How fast is it here? D, a step of each training, generation; images per second, best of several.

Each rate is also given as a ratio that carries over between machines: on a CPU to Pillow's JPEG
round trip of 256 x 256 pixels, on a GPU a step's operations to a product of bf16 matrices.

    python -m bench.speed
    python -m bench.speed --batch-size 256 --size paper --works stage
"""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import common
import degrade
import diffusion
import extractors
import generate


@dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    works: tuple[str, ...] = ("D", "stage", "generate")  # which rows: beginnings of their names
    batch_size: int = 16  # images; at least 8
    size: str = "small"  # of the networks in training: small or paper
    runs: int = 3  # of which the best counts, behind one that warms up
    bf16: bool = True  # where the device has it
    seed: int = 0
    device: str = "auto"


Work = Callable[[], object]
Rows = dict[str, tuple[Work, int]]  # by name: what is timed, and how many images it makes


def best(work: Work, runs: int, device: torch.device) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(1 + runs):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def sample_photos(kind: str, count: int, side: int, device: torch.device) -> Tensor:
    """Crops (count, 3, side, side) of the sample photos, enlarged where they are too small."""
    files = common.list_images([str(Path(__file__).parents[1] / "data/sample" / kind)], "")
    photos = []
    for i in range(count):
        photo = common.load_image(files[i % len(files)])[None]
        scale = max(1, side / min(photo.shape[2:]))
        sizes = [round(n * scale) for n in photo.shape[2:]]
        photo = F.interpolate(photo, sizes, mode="bicubic").clamp(0, 1) if scale > 1 else photo
        photos.append(photo[0, :, :side, :side])
    return torch.stack(photos).to(device, memory_format=torch.channels_last)


def pillow_jpeg(hr: Tensor) -> None:
    """Pillow's round trip of each image."""
    for photo in common.to_uint8(hr).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(photo).save(file, "JPEG", quality=60)
        Image.open(file).load()


def matrix_rate(device: torch.device, runs: int) -> float:
    """Operations per second of a product of bf16 matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / best(lambda: a @ a, runs, device)


def degrading(cfg: Config, device: torch.device) -> Rows:
    """Rows of D at 256 x 256 pixels: each recipe in a batch, one replayed image, JPEG."""
    hr = sample_photos("hr", cfg.batch_size, 256, device)
    draw = common.generator(cfg.seed)

    def batch(recipe: str) -> Work:
        theta = degrade.sample_degradation(len(hr), recipe, generator=draw)
        return lambda: degrade.degrade(hr, theta, draw)

    works: dict[str, Work] = {f"D {recipe}": batch(recipe) for recipe in degrade.RECIPES}
    theta = degrade.sample_degradation(len(hr), generator=draw)
    works["D realesrgan, replayed"] = lambda: degrade.degrade(hr, theta)
    works["D drawing theta"] = lambda: degrade.sample_degradation(len(hr), generator=draw)
    works["D JPEG"] = lambda: degrade.jpeg(hr, 60)
    return {name: (work, len(hr)) for name, work in works.items()}


def training(cfg: Config, rt: common.Runtime) -> Rows:
    """Rows of a training step: loss, gradient, AdamW."""
    stage_1 = extractors.Config(**extractors.PRESETS[cfg.size])
    stage_2 = diffusion.Config(**diffusion.PRESETS[cfg.size])
    nets = extractors.Extractors(stage_1)
    nets.to(rt.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    net = diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, stage_2)
    net.to(rt.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    B, draw = cfg.batch_size, common.generator(cfg.seed, device=rt.device)
    photos = {side: sample_photos("hr", B, side, rt.device)
              for side in {stage_1.vq_crop, stage_1.crop, 4 * stage_2.crop}}  # fmt: skip
    lr = sample_photos("lr", B, stage_2.crop, rt.device)

    def step(part: nn.Module, loss: Callable[[], dict[str, Tensor]]) -> Work:
        parameters = [*part.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

        def work() -> None:
            with rt.autocast(cfg.bf16):
                loss()["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return work

    works = {
        "stage 1 VQ-VAE": step(
            nets.vqvae, lambda: extractors.vqvae_loss(nets, photos[stage_1.vq_crop])
        ),
        "stage 1 E_cont": step(
            nets.vqvae,
            lambda: extractors.content_loss(nets, photos[stage_1.vq_crop], stage_1, draw),
        ),
        "stage 1 E_deg": step(
            nets, lambda: extractors.degradation_loss(nets, photos[stage_1.crop], stage_1, draw)
        ),
        "stage 2": step(
            net,
            lambda: diffusion.decoupled_loss(
                net,
                lr if stage_2.as_printed else lr[: B // 2],
                None if stage_2.as_printed else photos[4 * stage_2.crop][B // 2 :],
                stage_2,
                draw,
            ),
        ),
    }
    return {name: (work, B) for name, work in works.items()}


def generating(cfg: Config, rt: common.Runtime) -> Rows:
    """Rows of generation with the shipped weights, 512 x 512 pixels."""
    net = generate.load_generator("", rt.device, grain=True)
    batch = cfg.batch_size if rt.device.type == "cuda" else 2  # a CPU takes them one by one
    hr = sample_photos("hr", batch, 512, rt.device)
    lr_ref, seeds = list(sample_photos("lr", len(hr), 128, rt.device)), range(len(hr))

    def work(sampler: generate.Sampler) -> Work:
        return lambda: generate.generate(net, hr, lr_ref, sampler, seeds)

    return {
        "generate, default": (work(generate.Sampler()), batch),
        "generate, T = 200, 10 steps": (work(generate.Sampler(t_start=200, num_steps=10)), batch),
    }


def operations(work: Work) -> int:
    """Floating-point operations of the matrix products and convolutions in a work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def main(cfg: Config, rt: common.Runtime) -> None:
    """Print the table."""
    known: dict[str, Callable[[], Rows]]
    known = {"D": lambda: degrading(cfg, rt.device), "stage": lambda: training(cfg, rt),
             "generate": lambda: generating(cfg, rt)}  # fmt: skip
    for name in cfg.works:
        common.require(name in known, f"--works {name}: choose of {', '.join(known)}.")
    common.require(cfg.size in ("small", "paper"), f"--size {cfg.size}: small or paper.")
    for flag, value, least in (("--batch-size", cfg.batch_size, 8), ("--runs", cfg.runs, 1)):
        common.require(value >= least, f"{flag} {value}: must be at least {least}.")
    on_gpu = rt.device.type == "cuda"
    photos = sample_photos("hr", 16, 256, rt.device)
    jpeg_rate = 16 / best(lambda: pillow_jpeg(photos), cfg.runs, rt.device)
    matrix = matrix_rate(rt.device, cfg.runs) if on_gpu else 0.0
    name = torch.cuda.get_device_name(rt.device) if on_gpu else f"{torch.get_num_threads()} threads"
    print(f"{rt.device} ({name}), torch {torch.__version__}, batches of {cfg.batch_size}")
    print(f"Pillow's JPEG: {jpeg_rate:.0f} images/s", end="")
    print(f"; bf16 matrices: {matrix / 1e12:.0f} TFLOP/s" if on_gpu else "")
    ratio = "of the matrix rate" if on_gpu else "of Pillow's JPEG"
    print(f"\n| work | images/s | ms | {ratio} |{' GiB |' if on_gpu else ''}")
    print(f"|---|---|---|---|{'---|' if on_gpu else ''}")
    for group in cfg.works:
        for row, (work, images) in known[group]().items():
            flops = operations(work) if on_gpu and group != "D" else 0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(rt.device)
            seconds = best(work, cfg.runs, rt.device)
            rate = images / seconds
            share = flops / seconds / matrix if on_gpu else rate / jpeg_rate
            memory = (
                f" {torch.cuda.max_memory_allocated(rt.device) / 2**30:.1f} |" if on_gpu else ""
            )
            print(
                f"| {row} | {rate:.1f} | {1000 * seconds:.1f} | {share:.3f} |{memory}", flush=True
            )


if __name__ == "__main__":
    common.launch(main, Config, {}, __doc__)
