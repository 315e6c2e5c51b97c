"""Speed of D, of one training step and of generation, in images per second: the fastest run counts.

Each rate is also given as a ratio that carries over between machines. On a CPU it is relative to
Pillow's JPEG round trip of 256 x 256 pixels, on a GPU the operations per second are relative to
those of a product of bf16 matrices.

    python -m tools.speed
    python -m tools.speed --batch-size 8 --size paper --works stage
"""

import io
import sys
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import degrade
import diffusion
import extractors
import generate
from common import require
from common.cli import check_ranges, launch
from common.files import list_images
from common.images import load_image, to_uint8
from common.runtime import Runtime, make_generator


@dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    works: tuple[str, ...] = ("D", "stage", "generate")  # which rows, by the start of their names
    batch_size: int = 16  # images
    size: str = "small"  # of the networks in training: small or paper
    runs: int = 3  # of which the fastest counts, after one that warms up
    seed: int = 0
    device: str = "auto"


RANGES = {"batch_size": (8, 2**16), "runs": (1, 1000)}
Works = dict[str, Callable[[], object]]  # what is timed, by its name in the table


def best(work: Callable[[], object], runs: int, device: torch.device) -> float:
    """Seconds of the fastest run, after one that warms up."""

    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return min(timeit.repeat(run, number=1, repeat=1 + runs)[1:])


def sample_photos(kind: str, count: int, side: int, device: torch.device) -> Tensor:
    """Crops (count, 3, side, side) of the sample photos, which are repeated where too small."""
    files = list_images([str(Path(__file__).parents[1] / "data/sample" / kind)], "")
    crops = []
    for i in range(count):
        photo = load_image(files[i % len(files)])
        repeats = [1 + side // n for n in photo.shape[1:]]
        crops.append(photo.repeat(1, *repeats)[:, :side, :side])
    return torch.stack(crops).to(device, memory_format=torch.channels_last)


def pillow_jpeg(hr: Tensor) -> None:
    """Pillow's JPEG round trip of each image."""
    for photo in to_uint8(hr).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(photo).save(file, "JPEG", quality=60)
        Image.open(file).load()


def degrading(cfg: Config, rt: Runtime) -> Works:
    """D at 256 x 256 pixels: each recipe, a replay of stored parameters, its draws, its JPEG."""
    hr = sample_photos("hr", cfg.batch_size, 256, rt.device)
    draw = make_generator(cfg.seed)

    def batch(recipe: str) -> Callable[[], object]:
        theta = degrade.sample_degradation(len(hr), recipe, generator=draw)
        return lambda: degrade.degrade(hr, theta, draw)

    theta = degrade.sample_degradation(len(hr), generator=draw)
    return {f"D {recipe}": batch(recipe) for recipe in degrade.RECIPES} | {
        "D realesrgan, replayed": lambda: degrade.degrade(hr, theta),
        "D drawing theta": lambda: degrade.sample_degradation(len(hr), generator=draw),
        "D JPEG": lambda: degrade.jpeg(hr, 60),
    }


Loss = Callable[[], dict[str, Tensor]]


def step(
    net: nn.Module, parameters: Sequence[nn.Parameter], loss: Loss, rt: Runtime
) -> Callable[[], object]:
    """A training step of these parameters of a network; all others are frozen."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def work() -> None:
        net.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        with rt.autocast(bf16=True):
            value = loss()["loss"]
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def training(cfg: Config, rt: Runtime) -> Works:
    """One training step of each phase: loss, gradient, AdamW."""
    stage_1 = extractors.Config(**extractors.PRESETS[cfg.size])
    stage_2 = diffusion.Config(**diffusion.PRESETS[cfg.size])
    nets = extractors.Extractors(stage_1)
    net = diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, stage_2)
    for module in (nets, net):
        module.to(rt.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    B, draw = cfg.batch_size, make_generator(cfg.seed, device=rt.device)
    large, small, hr = (
        sample_photos("hr", B, side, rt.device)
        for side in (stage_1.vq_crop, stage_1.crop, 4 * stage_2.crop)
    )
    lr, half = sample_photos("lr", B, stage_2.crop, rt.device), slice(0, B // 2)
    lr_ref = sample_photos("lr", B // 2, 2 * stage_2.crop, rt.device)
    photos: tuple[Tensor, ...] = (small,)
    e_deg: Callable[..., dict[str, Tensor]] = extractors.degradation_loss
    if not stage_1.as_printed:
        photos = small[: B // 2], sample_photos("lr", B // 2, stage_1.crop, rt.device)
        e_deg = extractors.degradation_loss_with_additions

    losses: dict[str, Loss] = {
        "stage 1 VQ-VAE": lambda: extractors.vqvae_loss(nets, large),
        "stage 1 E_cont": lambda: extractors.content_loss(nets, large, stage_1, draw),
        "stage 1 E_deg": lambda: e_deg(nets, *photos, stage_1, draw),
        "stage 2": lambda: diffusion.decoupled_loss_with_additions(
            net, [lr[half], lr_ref, hr[half]], stage_2, draw
        ),
    }
    vqvae, unet = nets.vqvae, [*net.modulation.parameters(), *net.unet.parameters()]
    trained = {
        "stage 1 VQ-VAE": [*vqvae.parameters()],
        "stage 1 E_cont": [*vqvae.encoder.parameters(), *vqvae.quant_conv.parameters()],
        "stage 1 E_deg": [p for k, p in nets.named_parameters() if not k.startswith("vqvae.")],
        "stage 2": unet + diffusion.finetuned(net.extractors),
    }
    if stage_2.as_printed:
        losses["stage 2"] = lambda: diffusion.decoupled_loss(net, lr, stage_2, draw)
    return {
        name: step(net if "2" in name else nets, trained[name], loss, rt)
        for name, loss in losses.items()
    }


def generating(cfg: Config, rt: Runtime) -> Works:
    """Generation with the shipped weights from 512 x 512 pixels."""
    net = generate.load_generator("", rt.device)
    hr = sample_photos("hr", cfg.batch_size, 512, rt.device)
    lr_ref, seeds = list(sample_photos("lr", len(hr), 128, rt.device)), range(len(hr))

    def work(sampler: generate.Sampler) -> Callable[[], object]:
        return lambda: generate.generate(net, hr, lr_ref, sampler, seeds)

    slow = generate.Sampler(t_start=200, num_steps=10)
    return {
        "generate, default": work(generate.Sampler()),
        "generate, T = 200, 10 steps": work(slow),
    }


GROUPS = {"D": degrading, "stage": training, "generate": generating}


def main(cfg: Config, rt: Runtime) -> None:
    """Print the table."""
    for name in cfg.works:
        require(name in GROUPS, f"--works {name}: choose among {', '.join(GROUPS)}.")
    require(cfg.size in ("small", "paper"), f"--size {cfg.size}: small or paper.")
    check_ranges(cfg, RANGES)
    device, on_gpu = rt.device, rt.device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads"
    print(f"{device} ({name}), torch {torch.__version__}, batches of {cfg.batch_size}")
    photos = sample_photos("hr", 16, 256, device)
    jpeg_rate = 16 / best(lambda: pillow_jpeg(photos), cfg.runs, device)
    print(f"Pillow's JPEG: {jpeg_rate:.0f} images/s")
    if on_gpu:
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        matrix_rate = 2 * 8192**3 / best(lambda: a @ a, cfg.runs, device)
        print(f"bf16 matrices: {matrix_rate / 1e12:.0f} TFLOP/s")
    ratio = "of the matrix rate | GiB" if on_gpu else "of Pillow's JPEG"
    print(f"\n| work | images/s | ms | {ratio} |\n|---|---|---|---|" + "---|" * on_gpu)
    for group in cfg.works:
        # Two images are enough on a CPU, which generates them one by one.
        images = 2 if group == "generate" and not on_gpu else cfg.batch_size
        for row, work in GROUPS[group](replace(cfg, batch_size=images), rt).items():
            if on_gpu:
                with FlopCounterMode(display=False) as counter:
                    work()
                torch.cuda.reset_peak_memory_stats(device)
            seconds = best(work, cfg.runs, device)
            if on_gpu:  # operations are those of matrix products and convolutions
                memory = torch.cuda.max_memory_allocated(device) / 2**30
                last = f"{counter.get_total_flops() / seconds / matrix_rate:.3f} | {memory:.1f}"
            else:
                last = f"{images / seconds / jpeg_rate:.3f}"
            print(f"| {row} | {images / seconds:.1f} | {1000 * seconds:.1f} | {last} |", flush=True)


if __name__ == "__main__":
    launch(main, Config, {}, __doc__)
