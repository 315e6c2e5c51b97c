"""Tiny networks of both stages, and drawn tensors, which many tests share."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import diffusion
import extractors
from common.runtime import Runtime, make_generator

REPO = Path(__file__).resolve().parents[1]
CPU = Runtime(torch.device("cpu"))
STAGE_1 = extractors.Config(
    compile=False, batch_size=6, crop=64, vq_crop=64, vq_channels=8, vq_multipliers=(1, 2, 2),
    vq_blocks=1, vq_codes=16, deg_channels=8, deg_blocks=1, deg_dim=16, mod_channels=8,
    num_samples=2, recipes=("realesrgan", "light", "camera"), as_printed=False, bf16=False,
)  # fmt: skip
STAGE_2 = diffusion.Config(
    compile=False, batch_size=4, crop=16, widths=(8, 16), blocks=1, attention=(1,), mod_channels=8,
    cond_channels=4, recipes=("realesrgan", "light", "camera"), as_printed=False, bf16=False,
)  # fmt: skip


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=make_generator(seed, *shape))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=make_generator(seed, *shape))


def moved(net: nn.Module, size: float = 0.05) -> nn.Module:
    """The network with no weight that is zero, so that every layer has an effect."""
    with torch.no_grad():
        for p in net.parameters():
            p += size * torch.randn(p.shape)
    return net


def settings(**changes: object) -> tuple[extractors.Config, diffusion.Config]:
    """The tiny settings of both stages, with changes of the second one."""
    stage_2 = replace(STAGE_2, **changes)  # type: ignore[arg-type]
    return replace(STAGE_1, as_printed=stage_2.as_printed), stage_2


def untrained(**changes: object) -> diffusion.DecoupledDDPM:
    """A tiny model as it is before training, always the same."""
    torch.manual_seed(0)
    stage_1, stage_2 = settings(**changes)
    return diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, stage_2)


def built(**changes: object) -> diffusion.DecoupledDDPM:
    """A tiny model in which every layer has an effect."""
    return moved(untrained(**changes))


def config_of(**changes: object) -> dict:
    """What a checkpoint stores of the settings."""
    stage_1, stage_2 = settings(**changes)
    return asdict(stage_2) | {"extractors": asdict(stage_1)}


CONFIG = config_of()


def save_net(path: Path, net: nn.Module, config: dict) -> Path:
    """Write a checkpoint of stage 2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"ema": net.state_dict(), "config": config}, path)
    return path


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether the weights of b have the values that a has."""
    return all(torch.equal(value, b[key]) for key, value in a.items())


def small_net() -> nn.Module:
    """One convolution that enlarges: a pixel depends on its neighbours only."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.PixelShuffle(4))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.abs() / 5)
    return net
