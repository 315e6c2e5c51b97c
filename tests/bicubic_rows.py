"""The rows "bicubic" of Table 2 and "bicubic enlargement" of Table 1, by independent code.

It imports nothing of the project: Pillow resizes, scikit-image measures.

    python tests/bicubic_rows.py data/RealSR data/DRealSR
"""

import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

COLUMNS = ("PSNR RGB", "PSNR Y", "SSIM RGB", "SSIM Y")


def compare(real: Image.Image, resized: Image.Image) -> list[float]:
    """COLUMNS of a resized image against the real one."""
    rgb = [np.asarray(image, np.float64) for image in (real, resized)]
    y = [rgb2ycbcr(x / 255)[..., 0] for x in rgb]
    psnr = functools.partial(peak_signal_noise_ratio, data_range=255)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim = functools.partial(structural_similarity, data_range=255, **window)
    return [psnr(*rgb), psnr(*y), ssim(*rgb, channel_axis=2), ssim(*y)]


def rows(folder: Path, step: int = 1) -> dict[str, np.ndarray]:
    """Means over every step-th pair of a folder (HR/ and LR/ of the same names), (4,) each."""
    found: dict[str, list[list[float]]] = {"bicubic": [], "bicubic enlargement": []}
    larger = {file.stem: file for file in (folder / "HR").iterdir()}

    def of(file: Path) -> tuple[list[float], list[float]]:
        hr, lr = (Image.open(f).convert("RGB") for f in (larger[file.stem], file))
        small, large = (a.resize(b.size, Image.Resampling.BICUBIC) for a, b in ((hr, lr), (lr, hr)))
        return compare(lr, small), compare(hr, large)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for reduced, enlarged in pool.map(of, sorted((folder / "LR").iterdir())[::step]):
            found["bicubic"].append(reduced)
            found["bicubic enlargement"].append(enlarged)
    return {name: np.mean(values, axis=0) for name, values in found.items()}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for name, values in rows(Path(argument)).items():
            numbers = "  ".join(f"{c} {v:.3f}" for c, v in zip(COLUMNS, values, strict=True))
            print(f"{Path(argument).name}, {name}: {numbers}")
