"""Stage 2: a DDPM that generates LR images from content and degradation. Section 2.2.

In: real LR photos, clean HR photos, the extractors of stage 1. Out: runs/diffusion/last.pt. The
condition c = M(F_deg, F_cont) joins degradation and content; the U-Net denoises an LR image under
this condition. M and the U-Net are trained, small parts of the extractors fine-tuned (A.5).

    python diffusion.py
    torchrun --nproc_per_node=8 diffusion.py --lr data/lr --preset paper

--as-printed, which --preset paper sets, removes these additions to the paper:

    Algorithm 1  a real LR image gets F_deg of other photos in its folder; a third of a batch are
                 synthetic pairs, with F_deg from another scene
    M            sees F_cont without fine detail; also the output of Rec_lr without fine detail,
                 and the position in the 8 x 8 blocks of JPEG
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import additions
import extractors
from additions import Calibration
from common import require
from common.checkpoint import (
    count_parameters,
    find_checkpoint,
    fingerprint,
    load_checkpoint,
    load_weights,
    put_weights,
)
from common.cli import check_ranges, from_dict, launch
from common.files import find_photos, outside
from common.images import resized
from common.photos import Crops, Photos
from common.run import (
    TRAINING_RANGES,
    Run,
    TrainingConfig,
    check_micro_batches,
    compile_networks,
    lock_runs,
)
from common.runtime import Runtime, make_generator, randn_rows

# ---- noise schedule -----------------------------------------------------------------------------

# t counts steps of noise: x_0 is the image, x_1000 almost pure noise.
# Not in the paper: the schedule is the linear one of DDPM (arXiv:2006.11239), of which training and
# generation use the steps up to the "maximum diffusion step" of A.3.
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHAS_CUMPROD = torch.cat([torch.ones(1, dtype=torch.float64), (1 - BETAS).cumprod(0)]).float()


def to_signed(image: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], the range in which the diffusion works."""
    return image * 2 - 1


def to_image(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped."""
    return ((x + 1) / 2).clamp(0, 1)


@functools.cache
def alphas_cumprod(device: torch.device) -> Tensor:
    """ALPHAS_CUMPROD on a device, copied there once."""
    return ALPHAS_CUMPROD.to(device)


def alpha_bar(t: Tensor) -> Tensor:
    """alphas_cumprod at steps t (B,), shaped (B, 1, 1, 1)."""
    return alphas_cumprod(t.device)[t][:, None, None, None]


def q_sample(x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The forward process: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t (B,) in 0..1000."""
    return alpha_bar(t).sqrt() * x_0 + (1 - alpha_bar(t)).sqrt() * eps


def predict_x_0(x_t: Tensor, t: Tensor, eps_pred: Tensor) -> Tensor:
    """Solve q_sample for x_0, clamped to [-1, 1]; t >= 1."""
    x_0 = (x_t - (1 - alpha_bar(t)).sqrt() * eps_pred) / alpha_bar(t).sqrt()
    # Not in the paper: the predicted image is clamped to the range of images.
    return x_0.clamp(-1, 1)


def ddim_step(
    x_t: Tensor,
    t: Tensor,
    t_next: Tensor,
    x_0: Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """One step from t to any t_next < t, both (B,), with the predicted x_0.

    x_t, x_0, noise: (B, 3, h, w), images in [-1, 1]. Without noise this is DDIM (arXiv:2010.02502,
    Eq. 12); with eta = 1 and t_next = t - 1 the step of DDPM, as in Algorithm 2.
    """
    now, after = alpha_bar(t), alpha_bar(t_next)
    eps = (x_t - now.sqrt() * x_0) / (1 - now).sqrt()
    variance = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
    along = (1 - after - variance).clamp(min=0).sqrt()
    x_next = after.sqrt() * x_0 + along * eps
    if noise is None:
        return x_next
    # Not in the paper: Eq. 12 takes the predicted x_0 for certain, so long steps make too little
    # detail. The variance of x_0 given x_t is added (arXiv:2201.06503, Theorem 1, with the mean
    # over one image as the expectation).
    x_0_variance = (1 - now) / now * (1 - eps.square().mean((1, 2, 3), keepdim=True)).clamp(min=0)
    share = (after.sqrt() - along * (now / (1 - now)).sqrt()).square()
    several = ((t_next > 0) & (t - t_next > 1))[:, None, None, None]
    return x_next + (variance + eta**2 * several * share * x_0_variance).sqrt() * noise


def steps_of_noise(t_start: Sequence[int], num_steps: int) -> list[list[int]]:
    """A table of the steps t at which a sampler stops: num_steps + 1 rows, from t_start (B) to 0.

    Where t_start is smaller than num_steps, the chain is shorter: the column begins with copies of
    t_start, so that all chains end together.
    """
    # Not in the paper: fewer than t_start steps, at quadratic distances (arXiv:2010.02502, D.3);
    # the last one must be small, because it removes all detail that is weaker than its noise.
    num_steps = min(num_steps, max(t_start))
    columns = []
    for T in t_start:
        n = min(num_steps, T)
        chain = [max(i, round(T * (i / max(1, n)) ** 2)) for i in range(n, -1, -1)]
        columns.append([T] * (num_steps - n) + chain)
    return [list(row) for row in zip(*columns, strict=True)]


def sample(
    net: Callable[[Tensor, Tensor, Tensor], Tensor],
    start: Tensor,
    c: Tensor,
    t_start: Sequence[int],
    num_steps: int,
    generators: Sequence[torch.Generator],
    eta: float = 0.0,
) -> Tensor:
    """Algorithm 2: add noise to the start images up to t_start, denoise under the condition c.

    start (B, 3, h, w) in [0, 1]; c (B, C, h, w); t_start: B numbers; num_steps evaluations of
    net(x_t, t, c) -> eps_pred, fewer where t_start is smaller; num_steps = t_start and eta = 1 give
    the full chain of DDPM. Row b draws from generators[b]. Returns (B, 3, h, w) in [0, 1].
    """

    def on_device(values: Sequence) -> Tensor:
        return torch.tensor(values).to(start.device, non_blocking=True)

    x = to_signed(start)
    x = q_sample(x, on_device(t_start), randn_rows(x, generators))
    for now, after in itertools.pairwise(steps_of_noise(t_start, num_steps)):
        active = [b for b in range(len(x)) if after[b] < now[b]]  # a short chain begins later
        t, t_next = (on_device([steps[b] for b in active]) for steps in (now, after))
        rows = on_device(active)
        x_t = x[rows]
        x_0 = predict_x_0(x_t, t, net(x_t, t, c[rows]).float())
        noise = randn_rows(x_t, [generators[b] for b in active]) if eta > 0 else None
        x[rows] = ddim_step(x_t, t, t_next, x_0, eta, noise)
    unchanged = on_device([t == 0 for t in t_start])[:, None, None, None]
    return torch.where(unchanged, start.clamp(0, 1), to_image(x))


# ---- U-Net --------------------------------------------------------------------------------------


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of t (B,) at geometric frequencies: (B, dim)."""
    k = torch.arange(dim // 2, device=t.device)
    frequencies = torch.exp(-math.log(10_000) * k / (dim // 2))
    angle = t.float()[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeResBlock(nn.Module):
    """A residual block whose second norm is scaled and shifted by the embedding of t."""

    def __init__(self, c_in: int, c_out: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = extractors.GroupNorm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = extractors.GroupNorm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(embedding, 2 * c_out)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, c_in, h, w), (B, E) -> (B, c_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.shortcut(x) + h


class UNet(nn.Module):
    """eps_theta(x_t, t, c): the U-Net of DDPM (arXiv:2006.11239)."""

    def __init__(
        self, c_cond: int, widths: Sequence[int], blocks: int, attention: Sequence[int]
    ) -> None:
        super().__init__()
        self.dim = widths[0]
        E, top = 4 * self.dim, len(widths) - 1
        self.embed = nn.Sequential(nn.Linear(widths[0], E), nn.SiLU(), nn.Linear(E, E), nn.SiLU())
        self.first = nn.Conv2d(3 + c_cond, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]
        for i, w in enumerate(widths):
            for _ in range(blocks):
                self.down.append(self.stack(skips[-1], w, E, i in attention))
                skips.append(w)
            if i < top:
                self.down.append(extractors.Downsample(w))
                skips.append(w)
        self.middle = nn.ModuleList([self.stack(w, w, E, True), self.stack(w, w, E, False)])
        below = widths[-1]
        for i, w in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(self.stack(below + skips.pop(), w, E, i in attention))
                below = w
            if i > 0:
                self.up.append(extractors.Upsample(w))
        self.norm, self.last = extractors.GroupNorm(below), nn.Conv2d(below, 3, 3, padding=1)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    @staticmethod
    def stack(c_in: int, c_out: int, embedding: int, attention: bool) -> nn.ModuleList:
        """A residual block, then attention or nothing."""
        # Not in the paper: heads of 64 channels where one head is too wide for the fast kernels.
        heads = c_out // 64 if c_out > 256 else 1
        after = extractors.Attention(c_out, heads) if attention else nn.Identity()
        return nn.ModuleList([TimeResBlock(c_in, c_out, embedding), after])

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """x_t (B, 3, h, w) in about [-1, 1], t (B,), c (B, C, h, w) -> eps_pred (B, 3, h, w)."""
        embedding = self.embed(timestep_embedding(t, self.dim))

        def run(layers: nn.Module, x: Tensor) -> Tensor:
            if isinstance(layers, nn.ModuleList):
                return layers[1](layers[0](x, embedding))
            return layers(x)

        # Not in the paper: c enters the U-Net as further channels, stacked on x_t.
        x = self.first(torch.cat([x_t, c.to(x_t.dtype)], dim=1))
        skips = [x]
        for layers in self.down:
            x = run(layers, x)
            skips.append(x)
        for layers in self.middle:
            x = run(layers, x)
        for layers in self.up:
            if isinstance(layers, nn.ModuleList):
                x = torch.cat([x, skips.pop()], dim=1)
            x = run(layers, x)
        return self.last(F.silu(self.norm(x)))


# ---- the model ----------------------------------------------------------------------------------


class DecoupledDDPM(nn.Module):
    """The extractors, the modulation block M and the U-Net."""

    def __init__(
        self, nets: extractors.Extractors, stage_1: extractors.Config, cfg: "Config"
    ) -> None:
        super().__init__()
        self.extractors, self.widths, self.t_max = nets, cfg.widths, cfg.t_max
        self.without, self.as_printed, self.z = cfg.without, cfg.as_printed, stage_1.vq_z
        self.calibration = Calibration()  # load() gives that of the weights
        c_in = stage_1.vq_z + 3 * (not cfg.as_printed)
        self.modulation = extractors.ModulationBlock(
            c_in, stage_1.deg_dim, cfg.mod_channels, cfg.cond_channels, not cfg.as_printed
        )
        self.unet = UNet(cfg.cond_channels, cfg.widths, cfg.blocks, cfg.attention)

    def content(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """F_cont (B, z, H/4, W/4) of images (B, 3, H, W); zeros in the ablation without it.

        A generator chooses tiles whose gradient is computed: see Extractors.content().
        """
        if "content" in self.without:
            return image.new_zeros(len(image), self.z, image.shape[2] // 4, image.shape[3] // 4)
        return self.extractors.content(image, generator)

    def condition(self, degradation: Tensor, content: Tensor, lr_hat: Tensor) -> Tensor:
        """c = M(F_deg, F_cont): (B, D), (B, z, h, w) -> (B, C, h, w). Eq. (7)-(8).

        lr_hat (B, 3, h, w) in [0, 1] is the output of Rec_lr. The ablations (Table 4) replace F_deg
        or F_cont by zeros, and lr_hat, which depends on both; without both this is the diffusion of
        SynDiff (arXiv:2303.06994).
        """
        degradation = degradation * ("degradation" not in self.without)
        return self.modulation(degradation, self.seen_by_m(content, lr_hat))

    def seen_by_m(self, content: Tensor, lr_hat: Tensor) -> Tensor:
        """What M sees: F_cont and, unless as printed, lr_hat, both without fine detail.

        Deviation: the content of a real LR image shows the noise and the detail that the U-Net has
        to make, so it would learn to copy them. The fine detail of a scene is in x_t, below noise.
        The table leak measures how much is shown.
        """
        content = content * ("content" not in self.without)
        if self.as_printed:
            return content
        lr_hat = to_signed(lr_hat.float()) * (not self.without)
        return additions.coarse(torch.cat([content, lr_hat], dim=1))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """eps_theta(x_t, t, c)."""
        return self.unet(x_t, t, c)


def finetuned(nets: extractors.Extractors) -> list[nn.Parameter]:
    """What stage 2 fine-tunes of the extractors: E_cont's first block, E_deg's last layer. A.5."""
    first = nets.vqvae.encoder.down[0].get_submodule("block.0")
    return [*first.parameters(), *nets.e_deg.mapping[-1].parameters()]


# x_0 (B, 3, h, w) in [0, 1], F_deg (B, D), F_cont (B, z, h, w), output of Rec_lr (B, 3, h, w)
Example = tuple[Tensor, Tensor, Tensor, Tensor]


def real_example(
    net: DecoupledDDPM, lr: Tensor, generator: torch.Generator | None = None
) -> Example:
    """Algorithm 1 as printed: content and degradation are those of the LR image to be generated."""
    h, w = lr.shape[2:]
    # Not in the paper: E_cont reads an LR image at 4 times its size, as in stage 1.
    content = net.content(resized(lr, 4 * h, 4 * w), generator)
    return lr, net.extractors.e_deg(lr), content, torch.zeros_like(lr)


def ddpm_loss(
    net: DecoupledDDPM, x_0: Tensor, c: Tensor, cfg: "Config", generator: torch.Generator
) -> dict[str, Tensor]:
    """Mean of (eps - eps_theta(x_t, t, c))^2 over random t and eps. Algorithm 1."""
    # Not in the paper: a condition serves several draws, because it costs more than the U-Net.
    x_0, c = (v.repeat_interleave(cfg.draws, dim=0) for v in (x_0, c))
    u = torch.rand(len(x_0), generator=generator, device=x_0.device)
    t = u * cfg.t_max + 1
    if cfg.small_t:  # Not in the paper: log t is uniform, since generation needs the small t.
        t = (cfg.t_max + 1) ** u
    t = t.long().clamp(1, cfg.t_max)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    x_t = q_sample(to_signed(x_0), t, eps)
    eps_pred = net(x_t, t, c).float()
    return {"loss": F.mse_loss(eps_pred, eps)}


def decoupled_loss(
    net: DecoupledDDPM, lr: Tensor, cfg: "Config", generator: torch.Generator
) -> dict[str, Tensor]:
    """The loss of stage 2 as printed: real LR images, from their own content. Algorithm 1."""
    x_0, degradation, content, lr_hat = real_example(net, lr, generator)
    return ddpm_loss(net, x_0, net.condition(degradation, content, lr_hat), cfg, generator)


# ---- the same with our additions ----------------------------------------------------------------


def content_and_lr_hat(
    net: DecoupledDDPM, hr: Tensor, degradation: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """F_cont (B, z, h, w), and the output of Rec_lr (B, 3, h, w) in [0, 1], softened."""
    content = net.content(hr, generator)
    lr_hat = net.extractors.reconstruct(degradation, hr, content).float()
    return content, additions.soften(lr_hat, net.calibration.soften).clamp(0, 1)


REFERENCES = 4  # the most that give the F_deg of a real LR image


def mean_degradation(net: DecoupledDDPM, lr_refs: Sequence[Tensor]) -> Tensor:
    """Mean F_deg (B, D) of references of each image, each (B, 3, h, w).

    Equal shares of the batch take one, two, ... and all of them; an image alone takes all.
    """
    R, B = len(lr_refs), len(lr_refs[0])
    starts = [B * k // R for k in range(R)]  # image b takes reference k if b >= starts[k]
    number = [sum(b >= start for start in starts) for b in range(B)]
    taken = torch.cat([refs[start:] for refs, start in zip(lr_refs, starts, strict=True)])
    codes = net.extractors.e_deg(taken).split([B - start for start in starts])
    total = sum(F.pad(code, (0, 0, B - len(code), 0)) for code in codes)
    return total / torch.tensor(number)[:, None].to(taken.device, non_blocking=True)


@torch.no_grad()
def synthetic_example(
    net: DecoupledDDPM, hr: Tensor, recipes: Sequence[str], generator: torch.Generator
) -> Example:
    """Synthetic pairs of every other HR image: its content, degradation from another scene's LR.

    hr (B, 3, H, W), B > 1. Row k is D(hr[2k], theta_k), its F_deg that of D(hr[2k-1], theta_k).
    """
    both = torch.cat([hr[::2], hr.roll(1, dims=0)[::2]])
    lr, reference = extractors.degrade_randomly(both, recipes, generator, groups=2)[0].chunk(2)
    degradation = net.extractors.e_deg(reference)
    return lr, degradation, *content_and_lr_hat(net, hr[::2], degradation)


def decoupled_loss_with_additions(
    net: DecoupledDDPM, photos: Sequence[Tensor], cfg: "Config", generator: torch.Generator
) -> dict[str, Tensor]:
    """The loss on real LR images and on synthetic pairs, half as many.

    photos: lr (B, 3, h, w); other photos of the same cameras, each (B, 3, h', w'), which give
    F_deg; hr (B, 3, 4h, 4w), unrelated.
    """
    lr, *lr_refs, hr = photos
    content = real_example(net, lr, generator)[2]
    examples = [
        (lr, mean_degradation(net, lr_refs), content, lr),
        synthetic_example(net, hr, cfg.recipes, generator),
    ]
    x_0, degradation, content, lr_hat = map(torch.cat, zip(*examples, strict=True))
    return ddpm_loss(net, x_0, net.condition(degradation, content, lr_hat), cfg, generator)


# ---- preview ------------------------------------------------------------------------------------


@torch.no_grad()
def sampled_swap_grid(net: DecoupledDDPM, lr: Tensor, hr: Tensor, path: Path) -> dict[str, Tensor]:
    """Picture of LR from a short chain: degradation of each row's LR, content of each column."""
    B, made = len(hr), []
    for degradation in net.extractors.e_deg(lr)[:, None].expand(-1, B, -1):
        content, lr_hat = content_and_lr_hat(net, hr, degradation)
        c, draws = net.condition(degradation, content, lr_hat), map(make_generator, range(B))
        made.append(sample(net, lr_hat, c, [min(net.t_max, 100)] * B, 10, [*draws]))
    extractors.save_swap_grid(path, lr, made)
    return {}


# ---- configuration and training -----------------------------------------------------------------


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings of stage 2 (A.3-A.5); the defaults are the paper's where it gives any."""

    lr: tuple[str, ...] = ()  # folders of real LR photos (default: data/lr, else data/sample/lr)
    hr: tuple[str, ...] = ()  # folders of HR photos (default: data/hr, else data/sample/hr)
    out: str = "runs/diffusion"  # folder of checkpoints and log
    checkpoint: str = ""  # stage-1 weights (default: runs/extractors, else data/pretrained)
    start_from: str = ""  # weights of M and the U-Net, to train further
    as_printed: bool = True  # Algorithm 1 and M of the paper, without the additions listed above
    recipes: tuple[str, ...] = ("realesrgan",)  # of D, for synthetic pairs
    without: tuple[str, ...] = ()  # ablation: degradation, content or both are not given
    steps: int = 240_000  # 100 epochs of 152,000 crops in batches of 64
    # A.3 says 8 on 8 GPUs, Section 3.1 says 16 on 16, and neither says whether for one GPU or for
    # all. Here it is A.3's, for one.
    batch_size: int = 8  # per process, 8 of which give the paper's 64; 0: 256 on a GPU, else 16
    crop: int = 256  # LR crop, pixels; with our additions LR photos need twice, HR 4 times as many
    learning_rate: float = 1e-4  # of M and the U-Net
    finetune_learning_rate: float = 1e-6  # of parts of the extractors; 0 freezes them
    t_max: int = 500  # largest step of noise
    small_t: bool = False  # draw log t uniformly, not t
    draws: int = 1  # of noise for each image in a step
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of the U-Net per resolution
    blocks: int = 2  # residual blocks per resolution
    attention: tuple[int, ...] = (2, 3)  # resolutions with attention
    mod_channels: int = 128
    cond_channels: int = 64  # channels of c
    ema_decay: float = 0.9999

    MAY_CHANGE: ClassVar[tuple[str, ...]] = (*TrainingConfig.MAY_CHANGE, "checkpoint")


SMALL: dict = {
    "steps": 1000, "batch_size": 0, "crop": 48, "learning_rate": 5e-4, "widths": (32, 64, 128),
    "attention": (2,), "mod_channels": 48, "cond_channels": 16, "ema_decay": 0.998,
    "compile": False, "save_every": 100,
}  # fmt: skip
PRESETS: dict[str, dict] = {
    "small": SMALL
    | {
        "as_printed": False,
        "recipes": ("realesrgan", "camera", "wide"),
        "small_t": True,
        "draws": 4,
        "cooldown": 0.5,
    },
    "paper": {},
    "as-printed": SMALL,
}
RANGES = TRAINING_RANGES | {
    "steps": (0, 2**31), "batch_size": (2, 2**20), "crop": (16, 2**12), "learning_rate": (0, 1),
    "finetune_learning_rate": (0, 1), "t_max": (1, 1000), "draws": (1, 256),
    "widths": (1, 2**12), "blocks": (1, 64), "attention": (0, 15), "mod_channels": (1, 2**12),
    "cond_channels": (1, 2**12),
}  # fmt: skip


def check(cfg: Config, name: str = "") -> None:
    """UserError for a wrong setting, naming its flag and the file `name` that it comes from."""
    check_ranges(cfg, RANGES, name)
    unknown = " ".join(set(cfg.without) - {"degradation", "content"})
    require(not unknown, f"{name}--without {unknown}: choose degradation, content.")
    require(len(cfg.widths) > 0, f"{name}--widths: give at least one.")
    odd = f"{name}--widths {cfg.widths[0]}: the first must be even, for sines and cosines of t."
    require(cfg.widths[0] % 2 == 0, odd)
    for width in cfg.widths:
        heads = (
            f"{name}--widths {width}: above 256 it must be a multiple of 64, the width of a head."
        )
        require(width <= 256 or width % 64 == 0, heads)
    multiple = 2 ** (len(cfg.widths) - 1)
    wrong = f"{name}--crop {cfg.crop}: must be a multiple of {multiple}."
    require(cfg.crop % multiple == 0, wrong)


def load(state: dict, name: str) -> DecoupledDDPM:
    """The model in a checkpoint of this stage, on the CPU; UserError if it can't be used."""
    config = state["config"]
    is_stage_2 = isinstance(config, dict) and "extractors" in config
    require(is_stage_2, f"{name}: not a checkpoint of diffusion.py (give that one).")
    facts = ("extractors", "began", "calibration")
    settings = {key: value for key, value in config.items() if key not in facts}
    cfg = from_dict(Config, settings, name)
    check(cfg, f"{name}: ")
    stage_1 = extractors.stored_config(config["extractors"], name)
    with torch.device("meta"):  # nothing is allocated before the shapes are checked
        net = DecoupledDDPM(extractors.Extractors(stage_1), stage_1, cfg)
    put_weights(net, state, name)
    net.calibration = from_dict(Calibration, config.get("calibration", {}), name)
    return net


def training_crops(cfg: Config, rt: Runtime, use_hr: bool) -> list[Crops]:
    """Crops of real LR photos; with use_hr also of references, of twice the size, and of HR."""
    share, out = cfg.batch_size // (1 + use_hr), Path(cfg.out)
    files = outside(find_photos(cfg.lr, "lr", "--lr", packed=True), out, "--lr")
    lr_photos = Photos(files, out / "photos/lr", rt)
    lr_crops = functools.partial(Crops, lr_photos, cfg.crop, share, cfg.seed)
    if not use_hr:
        return [lr_crops()]
    references = [lr_crops(scale=2, other=k) for k in range(1, REFERENCES + 1)]
    files = outside(find_photos(cfg.hr, "hr", "--hr", packed=True), out, "--hr")
    hr_photos = Photos(files, out / "photos/hr", rt)
    hr = Crops(hr_photos, cfg.crop, share, cfg.seed, stream=1, scale=4)
    return [lr_crops(rows=references[0].rows), *references, hr]


def train(cfg: Config, rt: Runtime) -> None:
    """Train M and the U-Net, fine-tune parts of the extractors. Algorithm 1."""
    cfg = replace(cfg, batch_size=cfg.batch_size or extractors.default_batch(rt))
    check(cfg)
    extractors.check_recipes(cfg.recipes)
    # As printed, and for SynDiff (arXiv:2303.06994), real LR photos alone.
    use_hr = not cfg.as_printed and set(cfg.without) != {"degradation", "content"}
    check_micro_batches(cfg, least=1 + use_hr, sources=1 + use_hr)
    why = "as printed" if cfg.as_printed else "without a condition"
    require(use_hr or not cfg.hr, f"--hr: training {why} takes real LR photos alone.")
    path = find_checkpoint(cfg.checkpoint, "extractors", "python extractors.py")
    state = load_checkpoint(path)
    nets = extractors.load(state, str(path))
    stage_1 = extractors.stored_config(state["config"], str(path))
    net, out = DecoupledDDPM(nets, stage_1, cfg), Path(cfg.out)
    net.calibration = from_dict(Calibration, state["calibration"], str(path))
    if cfg.start_from:
        load_weights(net, cfg.start_from, "--start-from")
        nets.load_state_dict(state["ema"])
    began = fingerprint(net if cfg.start_from else nets)

    lock_runs(out, ["last"], rt)
    crops = training_crops(cfg, rt, use_hr)
    ends = (crops[0], crops[-1])
    shown_lr, shown_hr = (c.batch(10**9, 3).to(rt.device).float() / 255 for c in ends)
    shown_hr = shown_hr if use_hr else resized(shown_lr, 4 * cfg.crop, 4 * cfg.crop)
    tuned = finetuned(nets)
    groups = [
        {"params": [*net.modulation.parameters(), *net.unet.parameters()], "lr": cfg.learning_rate},
        {"params": tuned, "lr": cfg.finetune_learning_rate},
    ]
    if rt.is_main:
        used = [crops[1], crops[-1]] if use_hr else crops  # LR photos need room for a reference
        counts = [f"{len(c.rows)} ({c.left_out} too small)" for c in used]
        print(cfg)
        print(f"stage-1 weights: {path}; photos, real LR{' and HR' * use_hr}: {', '.join(counts)}")
        print(f"M {count_parameters(net.modulation)}, "
              f"U-Net {count_parameters(net.unet)}, "
              f"fine-tuned: {sum(p.numel() for p in tuned)} parameters")  # fmt: skip
    if cfg.compile:
        encoder = nets.vqvae.encoder
        networks = [net.unet, net.modulation, nets.e_deg, encoder.down, encoder.mid]
        compile_networks(networks, rt)
    # Not in the paper: Run takes AdamW, clipped gradients and an average of the weights.
    run = Run(
        cfg, rt, net, groups, out / "last.pt", cfg.steps, began=began, extractors=state["config"],
        calibration=state["calibration"],
        preview=lambda: sampled_swap_grid(net, shown_lr, shown_hr, out / "last.png"),
    )  # fmt: skip
    for *images, draw in run.batches(*crops, least=1 + use_hr):
        if use_hr:
            run.update(decoupled_loss_with_additions, net, images, cfg, draw)
        else:
            run.update(decoupled_loss, net, *images, cfg, draw)


if __name__ == "__main__":
    launch(train, Config, PRESETS, __doc__)
