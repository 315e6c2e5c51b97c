"""Generation and the training of SR networks on a fake GPU: no device is mixed, nothing waits."""

from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffusion
import extractors
import generate
from additions import Calibration
from bench import sr
from common.runtime import Runtime, make_generator
from generate import Sampler
from tests.fake_cuda import Memory, fake_cuda

pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available")
N = TypeVar("N", bound=nn.Module)
SOFTENED = (1.0, 0.95, 0.9, 0.8, 0.7)


def on_gpu(net: N) -> N:
    """The network, moved as a program does it: what is no parameter or buffer stays behind."""
    for module in net.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = nn.Parameter(p.to("cuda:0")) if p is not None else None
        for name, x in module._buffers.items():
            module._buffers[name] = x.to("cuda:0") if x is not None else None
    return net


def model(preset: str) -> diffusion.DecoupledDDPM:
    """The networks of a preset on the GPU."""
    stage_1 = extractors.Config(**extractors.PRESETS[preset])
    stage_2 = diffusion.Config(**diffusion.PRESETS[preset])
    net = on_gpu(diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, stage_2))
    net.calibration = Calibration(soften=SOFTENED)
    return net


# ---- generation ---------------------------------------------------------------------------------


def mean_degradation(net: diffusion.DecoupledDDPM, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """F_deg (D,) as generate.py takes it of three photos of a camera."""
    monkeypatch.setattr(generate, "load_pixels", lambda file: torch.zeros(3, 96, 80).byte())
    monkeypatch.setattr(generate, "is_gray", lambda photo: False)
    files = [Path(f"camera/{i}.png") for i in range(3)]
    references = generate.References(files, ["camera"], net, average=3)
    references.code(lambda: {0, 1, 2}, Runtime(torch.device("cuda:0")))
    return references.mean_degradation(0)[0]


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(),
        Sampler(t_start=20, num_steps=3, eta=1.0, candidates=2),
    ],
    ids=("default", "candidates"),
)
@pytest.mark.parametrize("side", [128, 640])
def test_generation_with_all_additions_stays_on_the_gpu_and_never_waits(sampler, side, monkeypatch):
    """Softening, a mean F_deg, grain; 640 pixels are read in tiles."""
    assert sampler.grain and sampler.average > 1
    softened = []
    soften = generate.additions.soften
    monkeypatch.setattr(
        generate.additions, "soften", lambda x, by: softened.append(by) or soften(x, by)
    )
    with fake_cuda() as launches, torch.no_grad():
        net = model("small")
        mean = mean_degradation(net, monkeypatch)
        with torch.device("cuda:0"):
            hr = torch.zeros(2, 3, side, side)
        mean = mean.to("cuda:0")  # which waits
        diffusion.alphas_cumprod(hr.device)  # copied once
        launches.waits.clear()
        candidates, scores = generate.generate(net, hr, [mean, mean], sampler, [3, 4], scored=True)
        assert not launches.waits
        lr = generate.chosen(candidates, scores)
    assert softened == [SOFTENED]
    assert {x.device.type for x in (candidates, lr, *scores.values())} == {"cuda"}
    assert lr.shape == (2, 3, side // 4, side // 4)


def test_a_batch_of_32_photos_with_the_paper_s_weights_takes_less_than_8_gib(monkeypatch):
    """In float32 and with attention of the U-Net as the fast kernels do it."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: v * 1)
    paper = generate.PRESETS["paper"] | {"start": "reconstruct", "num_steps": 1, "candidates": 1}
    with fake_cuda(), torch.no_grad(), Memory() as memory:
        net = model("paper")
        with torch.device("cuda:0"):
            hr = torch.zeros(32, 3, 512, 512)
            degradations = [torch.zeros(extractors.Config().deg_dim)] * 32
        memory.peak = memory.now
        generate.generate(net, hr, degradations, Sampler(**paper), range(32))
    assert 1 < memory.peak / 2**30 < 8


# ---- the step of an SR training -----------------------------------------------------------------


@pytest.mark.parametrize("source", ["recipe", "pairs"])
@pytest.mark.parametrize("name", ["swinir-l", "rrdb", "hat", "fsrcnn"])
def test_a_step_of_an_sr_training_stays_on_the_gpu_and_never_waits(name, source, monkeypatch):
    """All but the backward pass, which autograd refuses for fake tensors of another device."""
    monkeypatch.setattr(torch, "linspace", np.linspace)  # rates of dropped paths
    with fake_cuda() as launches, torch.no_grad():
        net = on_gpu(sr.sr_network(name))
        with torch.device("cuda:0"):
            hr, lr = torch.zeros(2, 3, 192, 192), torch.zeros(2, 3, 48, 48)
        if source == "recipe":
            lr = sr.degraded(hr, "realesrgan", 4, make_generator(0))
        else:
            hr, lr = sr.split(sr.join(hr, lr))
        losses = sr.sr_loss(net.train(), hr, lr, 0.0)
        launches.waits.clear()  # of D, whose generators are of the CPU here, and of the first step
        losses = sr.sr_loss(net, hr, lr, 0.0)
    assert {x.device.type for x in (lr, *losses.values())} == {"cuda"}
    # spandrel's HAT makes the mask of its attention on the CPU in each step.
    assert launches.waits == ({"cpu (9, 256, 256)": 1} if name == "hat" else {})
