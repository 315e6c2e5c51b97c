"""Drawn photos and folders of pairs; a stand-in for the generator; the noise in an image."""

import importlib
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

import additions
import degrade
from bench.inputs import Config, Inputs, resolved
from common.images import save_image
from common.runtime import Runtime, make_generator


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photo(number, height, width=None):
    """A smooth image, uint8 (height, width, 3)."""
    sides = np.arange(height), np.arange(width or height), np.arange(3)
    y, x, c = np.meshgrid(*sides, indexing="ij")
    waves = np.sin(x / (9 + number) + c), np.cos(y / (7 + number))
    return (127 + 60 * waves[0] + 60 * waves[1]).astype(np.uint8)


def scenes(batch=3, size=192):
    """Photos (B, 3, size, size): shapes with edges at all scales, and a little grain."""
    images = []
    for number in range(batch):
        gen = make_generator(number)
        noise = [torch.randn(3, size, size, generator=gen).numpy() for _ in range(4)]
        shapes = [
            ndimage.gaussian_filter(x, (0, s, s)) > 0
            for x, s in zip(noise, (2, 4, 8, 24), strict=True)
        ]
        image = 0.25 + 0.12 * np.sum(shapes, axis=0) + 0.01 * noise[0]
        images.append(torch.from_numpy(image).float())
    return torch.stack(images).clamp(0, 1)


def write_pairs(folder, names=("Canon_1", "Canon_2", "Nikon_1", "Nikon_2", "Sony_1")):
    """Pairs of smooth images and their box average; returns the folder."""
    for number, name in enumerate(names):
        hr = photo(number, 192)
        write(folder / "HR" / f"{name}.png", hr)
        lr = Image.fromarray(hr).resize((48, 48), Image.Resampling.BOX)
        write(folder / "LR" / f"{name}.png", np.asarray(lr))
    return folder


def write_sharpened_pairs(folder):
    """Pairs of two cameras whose LR is a sharpened bicubic reduction; returns the folder."""
    for number, hr in enumerate(scenes(6, 128)):
        name = f"{'AB'[number % 2]}_{number}"
        lr = degrade.degrade(hr[None], degrade.bicubic_reduction(1, 4))[0]
        blurred = torch.from_numpy(ndimage.gaussian_filter(lr, (0, 1, 1)))
        save_image(folder / f"HR/{name}.png", hr)
        save_image(folder / f"LR/{name}.png", (lr + 0.5 * (lr - blurred)).clamp(0, 1))
    return folder


def fake_net():
    """What tables ask of a generator beside images, as of the shipped weights."""
    head = SimpleNamespace(as_printed=False)
    return SimpleNamespace(t_max=500, as_printed=False, extractors=head, calibration=None)


def bicubic_for_realdgen(monkeypatch):
    """Pillow's bicubic reduction stands in for RealDGen. Returns the samplers that it was given."""
    generated, samplers = importlib.import_module("bench.generated"), []

    def fake_generate(net, hr, lr_ref, sampler, seeds):
        samplers.append(sampler)
        lr = generated.bicubic(hr, lr_ref, seeds)
        return lr[:, None], {"kept": torch.zeros(len(hr)).long()}

    monkeypatch.setattr("generate.load_generator", lambda *_: fake_net())
    monkeypatch.setattr("generate.generate", fake_generate)
    monkeypatch.setattr("generate.degradation_of", lambda net, lr: lr.mean((1, 2))[None])
    return samplers


def inputs_of(**flags):
    """What the tables of the benchmark get with these flags, on a CPU."""
    rt = Runtime(torch.device("cpu"))
    return Inputs(resolved(Config(**flags), rt), rt)


def few_draws_of_theta(monkeypatch):
    """At most 99 in a call; mtf.png shows the range of 1000, which takes seconds."""
    drawn = degrade.sample_degradation
    monkeypatch.setattr(
        degrade, "sample_degradation", lambda n, *a, **k: drawn(min(n, 99), *a, **k)
    )


def psnr_y(a, b):
    """PSNR of luma of 8-bit images (H, W, 3), by numpy."""
    luma = (a.astype(float) - b.astype(float)) @ np.array([65.481, 128.553, 24.966]) / 255
    return 20 * np.log10(255) - 10 * np.log10((luma**2).mean())


def noise_in_bands(noise):
    """std (B, 3) of noise (B, C, h, w) in additions.BANDS, as of white noise of that power."""
    power = torch.fft.fft2(noise, norm="ortho").abs().square().mean(1)
    down, across = (torch.fft.fftfreq(n) for n in noise.shape[2:])
    ring = (torch.hypot(down[:, None], across) / additions.RINGS[0]).round() - 1  # the nearest
    bands = [power[:, (band.start <= ring) & (ring < band.stop)] for band in additions.BANDS]
    return torch.stack([band.mean(1).sqrt() for band in bands], dim=1)
