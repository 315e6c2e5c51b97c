"""Stage 2: a DDPM that generates LR images from content and degradation. Section 2.2.

In: real LR photos, clean HR photos, the extractors of stage 1. Out: runs/diffusion/last.pt. The
condition c = M(F_deg, F_cont) joins degradation and content; the U-Net denoises an LR image under
this condition. M and the U-Net are trained, small parts of the extractors fine-tuned (A.5).

    python diffusion.py
    torchrun --nproc_per_node=8 diffusion.py --lr data/lr --preset paper

--as-printed, which --preset paper sets, removes these additions to the paper:

    Algorithm 1  half of a batch are synthetic pairs: content from HR, F_deg from another scene
    M            also sees the output of Rec_lr, and the position in the 8 x 8 blocks of JPEG
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
    """One step from t to any t_next < t (arXiv:2010.02502, Eq. 12), with the predicted x_0.

    With eta = 1 and t_next = t - 1 this is the step of DDPM, as in Algorithm 2.
    """
    now, after = alpha_bar(t), alpha_bar(t_next)
    eps = (x_t - now.sqrt() * x_0) / (1 - now).sqrt()
    variance = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
    x_next = after.sqrt() * x_0 + (1 - after - variance).clamp(min=0).sqrt() * eps
    return x_next if noise is None else x_next + variance.sqrt() * noise


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
        c_in = stage_1.vq_z + 4 * (not cfg.as_printed)
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

        lr_hat (B, 4, h, w) is the output of Rec_lr, in the form of masked(). The ablations (Table
        4) replace F_deg or F_cont by zeros; without both this is the diffusion of SynDiff
        (arXiv:2303.06994).
        """
        degradation = degradation * ("degradation" not in self.without)
        content = content * ("content" not in self.without)
        # Deviation: M also sees the output of Rec_lr, so that the U-Net has only to correct it.
        if not self.as_printed:
            content = torch.cat([content, lr_hat * (not self.without)], dim=1)
        return self.modulation(degradation, content)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """eps_theta(x_t, t, c)."""
        return self.unet(x_t, t, c)


def finetuned(nets: extractors.Extractors) -> list[nn.Parameter]:
    """What stage 2 fine-tunes of the extractors: E_cont's first block, E_deg's last layer. A.5."""
    first = nets.vqvae.encoder.down[0].get_submodule("block.0")
    return [*first.parameters(), *nets.e_deg.mapping[-1].parameters()]


# x_0 (B, 3, h, w) in [0, 1], F_deg (B, D), F_cont (B, z, h, w), lr_hat of masked() (B, 4, h, w)
Example = tuple[Tensor, Tensor, Tensor, Tensor]


def masked(lr_hat: Tensor) -> Tensor:
    """The output of Rec_lr (B, 3, h, w) in [-1, 1], plus a mask: 1 present, 0 absent."""
    x = to_signed(lr_hat.float().clamp(0, 1))
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def real_example(
    net: DecoupledDDPM, lr: Tensor, generator: torch.Generator | None = None
) -> Example:
    """Algorithm 1: content and degradation are those of the real LR image to be generated.

    There is no HR image, so there is no output of Rec_lr.
    """
    h, w = lr.shape[2:]
    # Not in the paper: E_cont reads an LR image at 4 times its size, as in stage 1.
    content = net.content(resized(lr, 4 * h, 4 * w), generator)
    return lr, net.extractors.e_deg(lr), content, lr.new_zeros(len(lr), 4, h, w)


@torch.no_grad()
def synthetic_example(
    net: DecoupledDDPM, hr: Tensor, recipes: Sequence[str], generator: torch.Generator
) -> Example:
    """A synthetic pair as in generation: content from HR, degradation from another scene's LR."""
    both = torch.cat([hr, hr.roll(1, dims=0)])
    lr, reference = extractors.degrade_randomly(both, recipes, generator, groups=2)[0].chunk(2)
    degradation, content = net.extractors.e_deg(reference), net.content(hr)
    lr_hat = net.extractors.reconstruct(degradation, hr, content)
    return lr, degradation, content, masked(lr_hat)


def ddpm_loss(
    net: DecoupledDDPM, x_0: Tensor, c: Tensor, cfg: "Config", generator: torch.Generator
) -> dict[str, Tensor]:
    """Mean of (eps - eps_theta(x_t, t, c))^2 over random t and eps. Algorithm 1."""
    # Not in the paper: a t_power above 1 draws more of the small t; 1 is uniform.
    u = torch.rand(len(x_0), generator=generator, device=x_0.device) ** cfg.t_power
    t = 1 + (u * cfg.t_max).long().clamp(max=cfg.t_max - 1)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    x_t = q_sample(to_signed(x_0), t, eps)
    eps_pred = net(x_t, t, c).float()
    return {"loss": F.mse_loss(eps_pred, eps)}


def decoupled_loss(
    net: DecoupledDDPM, lr: Tensor, hr: Tensor | None, cfg: "Config", generator: torch.Generator
) -> dict[str, Tensor]:
    """The loss of stage 2: on real LR images and, if HR images are given, on synthetic pairs."""
    examples = [real_example(net, lr, generator)]
    # Deviation: half of the batch are synthetic pairs, where Algorithm 1 has real LR images alone,
    # because the content of a real LR image already contains its blur and noise: the U-Net could
    # ignore F_deg.
    if hr is not None:
        examples.append(synthetic_example(net, hr, cfg.recipes, generator))
    x_0, degradation, content, lr_hat = map(torch.cat, zip(*examples, strict=True))
    return ddpm_loss(net, x_0, net.condition(degradation, content, lr_hat), cfg, generator)


@torch.no_grad()
def sampled_swap_grid(net: DecoupledDDPM, lr: Tensor, hr: Tensor, path: Path) -> dict[str, Tensor]:
    """Picture of LR from a short chain: degradation of each row's LR, content of each column."""
    nets, B = net.extractors, len(hr)
    content, t_start = nets.content(hr), [min(net.t_max, 100)] * B
    made = []
    for degradation in nets.e_deg(lr)[:, None].expand(-1, B, -1):
        start = nets.reconstruct(degradation, hr, content).float()
        c, draws = net.condition(degradation, content, masked(start)), map(make_generator, range(B))
        made.append(sample(net, start, c, t_start, 10, [*draws]))
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
    crop: int = 256  # LR crop, pixels
    learning_rate: float = 1e-4  # of M and the U-Net
    finetune_learning_rate: float = 1e-6  # of parts of the extractors; 0 freezes them
    t_max: int = 500  # largest step of noise
    t_power: float = 1.0  # t = t_max * u^t_power, u uniform
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
        "t_power": 2.0,
        "cooldown": 0.5,
    },
    "paper": {},
    "as-printed": SMALL,
}
RANGES = TRAINING_RANGES | {
    "steps": (0, 2**31), "batch_size": (2, 2**20), "crop": (16, 2**12), "learning_rate": (0, 1),
    "finetune_learning_rate": (0, 1), "t_max": (1, 1000), "t_power": (0.01, 100),
    "widths": (1, 2**12), "blocks": (1, 64), "attention": (0, 15), "mod_channels": (1, 2**12),
    "cond_channels": (1, 2**12),
}  # fmt: skip


def check(cfg: Config, name: str = "") -> None:
    """UserError for a wrong setting, naming its flag and the file `name` that it comes from."""
    check_ranges(cfg, RANGES, name)
    check_micro_batches(cfg, sources=1 if cfg.as_printed else 2)
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
    settings = {key: value for key, value in config.items() if key not in ("extractors", "began")}
    cfg = from_dict(Config, settings, name)
    check(cfg, f"{name}: ")
    stage_1 = extractors.stored_config(config["extractors"], name)
    with torch.device("meta"):  # nothing is allocated before the shapes are checked
        net = DecoupledDDPM(extractors.Extractors(stage_1), stage_1, cfg)
    put_weights(net, state, name)
    net.calibration = from_dict(Calibration, state["calibration"], name)
    return net


def train(cfg: Config, rt: Runtime) -> None:
    """Train M and the U-Net, fine-tune parts of the extractors. Algorithm 1."""
    cfg = replace(cfg, batch_size=cfg.batch_size or extractors.default_batch(rt))
    check(cfg)
    unconditional = set(cfg.without) == {"degradation", "content"}  # SynDiff: of real LR alone
    use_hr = not cfg.as_printed and not unconditional
    why = "as printed" if cfg.as_printed else "without a condition"
    require(use_hr or not cfg.hr, f"--hr: training {why} takes real LR photos alone.")
    path = find_checkpoint(cfg.checkpoint, "extractors", "python extractors.py")
    state = load_checkpoint(path)
    nets = extractors.load(state, str(path))
    stage_1 = extractors.stored_config(state["config"], str(path))
    net, out = DecoupledDDPM(nets, stage_1, cfg), Path(cfg.out)
    if cfg.start_from:
        load_weights(net, cfg.start_from, "--start-from")
        nets.load_state_dict(state["ema"])
    began = fingerprint(net if cfg.start_from else nets)

    lock_runs(out, ["last"], rt)
    share = cfg.batch_size // (1 + use_hr)
    files = outside(find_photos(cfg.lr, "lr", "--lr", packed=True), out, "--lr")
    photos = Photos(files, out / "photos/lr", rt)
    crops = [Crops(photos, cfg.crop, share, cfg.seed)]
    if use_hr:
        files = outside(find_photos(cfg.hr, "hr", "--hr", packed=True), out, "--hr")
        photos = Photos(files, out / "photos/hr", rt)
        crops.append(Crops(photos, cfg.crop, share, cfg.seed, stream=1, scale=4))
    shown = [c.batch(10**9, 3).to(rt.device).float() / 255 for c in crops]
    shown_hr = shown[1] if use_hr else resized(shown[0], 4 * cfg.crop, 4 * cfg.crop)
    tuned = finetuned(nets)
    groups = [
        {"params": [*net.modulation.parameters(), *net.unet.parameters()], "lr": cfg.learning_rate},
        {"params": tuned, "lr": cfg.finetune_learning_rate},
    ]
    if rt.is_main:
        counts = [f"{len(c.rows)} ({c.left_out} smaller than the crop)" for c in crops]
        print(cfg)
        print(f"stage-1 weights: {path}; photos, real LR and HR: {', '.join(counts)}")
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
        preview=lambda: sampled_swap_grid(net, shown[0], shown_hr, out / "last.png"),
    )  # fmt: skip
    for lr, *hr, draw in run.batches(*crops):
        with rt.autocast(cfg.bf16):
            losses = decoupled_loss(net, lr, hr[0] if use_hr else None, cfg, draw)
        run.update(losses)


if __name__ == "__main__":
    launch(train, Config, PRESETS, __doc__)
