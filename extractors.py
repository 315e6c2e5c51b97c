"""Stage 1: extractors of content (E_cont) and of degradation (E_deg). Sections 2.1, A.1, A.2.

In: clean HR photos, and real LR photos. Out: runs/extractors/last.pt, which holds E_cont, E_deg and
Rec_lr. Training has three phases: a VQ-VAE on HR photos; its encoder E_cont on degraded photos,
with the decoder frozen (Eq. 1-2); E_deg together with Rec_lr (Eq. 3-6).

    python extractors.py
    torchrun --nproc_per_node=8 extractors.py --hr data/hr --preset paper

--as-printed, which --preset paper sets, removes these additions to the paper (additions.py):

    VQ-VAE     half of the images skip the codebook, because F_cont does
    E_cont     a quarter of the inputs is clean, as in generation
    E_deg      also pools the sizes of DCT coefficients; a head reads effects of theta from F_deg;
               two corners of a real LR photo must have the same F_deg; D also takes real photos
    Rec_lr     corrects the bicubic reduction of the HR image, filtered as the head says
    Rec_lr, M  also see the position of each pixel in its 8 x 8 block of JPEG
    Eq. (5)    F_deg of one scene must reconstruct other scenes
    Eq. (6)    is the logarithm of each image's error
"""

import contextlib
import functools
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import additions
import degrade
from common import require
from common.checkpoint import (
    before,
    count_parameters,
    fingerprint,
    load_checkpoint,
    load_weights,
    put_weights,
)
from common.cli import check_ranges, from_dict, launch
from common.files import find_photos, outside
from common.images import centre, resized, save_sheet
from common.photos import Crops, Photos
from common.run import (
    TRAINING_RANGES,
    Run,
    TrainingConfig,
    check_micro_batches,
    compile_networks,
    lock_runs,
)
from common.runtime import Runtime, make_generator, together
from common.tiles import TILE, in_tiles
from degrade import Degradation

# ---- content extractor: a VQ-VAE with the structure and the keys of the public vq-f4 ------------


class GroupNorm(nn.GroupNorm):
    """Group norm with 32 groups, fewer in narrow layers: one-channel groups remove contrast.

    The output has the type of the input: autocast would turn bf16 into float32.
    """

    def __init__(self, channels: int) -> None:
        most = max(1, min(32, channels // 4))
        groups = next(g for g in range(most, 0, -1) if channels % g == 0)
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 convolution where the width changes."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.conv2.weight)  # the block starts as the identity and trains faster

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


WIDEST_HEAD = 256  # channels of a head that the fast kernels of a GPU take
SCORES = 2**27  # of attention by products, in memory at a time


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of queries, keys and values (B, heads, N, d)."""
    # Not in the paper: the one wide head of vq-f4 is computed by plain matrix products.
    if q.device.type == "cuda" and q.shape[-1] > WIDEST_HEAD:
        return attention_by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attention() written out, for heads that no fast kernel takes.

    Under autocast the products are of 16 bits; softmax adds in float32, whatever type it is given.
    """
    B, heads, N, d = q.shape
    parts = []
    for rows in (q * d**-0.5).split(max(1, SCORES // (B * heads * N)), dim=2):
        scores = rows @ k.transpose(2, 3)  # (B, heads, rows, N)
        with torch.autocast(q.device.type, enabled=False):
            weights = scores.softmax(3)
        parts.append(weights @ v)
    return torch.cat(parts, dim=2)


class Attention(nn.Module):
    """Self-attention over all pixels, added to its input; vq-f4 has one head."""

    def __init__(self, channels: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(x)
        q, k, v = (
            f(h).flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)  # (B, heads, H*W, C')
            for f in (self.q, self.k, self.v)
        )
        h = attention(q, k, v)
        return x + self.proj_out(h.transpose(2, 3).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the resolution with a strided convolution, padded at the right and the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(c_in: int, c_out: int, blocks: int) -> nn.Sequential:
    """The residual blocks of one resolution; Encoder and Decoder add the step to the next one."""
    layers = (ResBlock(c_out if i else c_in, c_out) for i in range(blocks))
    return nn.Sequential(OrderedDict(block=nn.Sequential(*layers)))


def middle_blocks(channels: int) -> nn.Sequential:
    """Two residual blocks with attention between them, at the lowest resolution."""
    layers = ResBlock(channels, channels), Attention(channels), ResBlock(channels, channels)
    return nn.Sequential(OrderedDict(zip(("block_1", "attn_1", "block_2"), layers, strict=True)))


class Encoder(nn.Module):
    """The encoder of the VQ-VAE: one resolution for each width."""

    def __init__(self, widths: Sequence[int], blocks: int, z: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.Sequential(level(widths[0], widths[0], blocks))
        for wide, wider in itertools.pairwise(widths):
            self.down[-1].add_module("downsample", Downsample(wide))
            self.down.append(level(wide, wider, blocks))
        self.mid, self.norm_out = middle_blocks(widths[-1]), GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z, 3, padding=1)

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, z, H/4, W/4).

        With `again` the backward pass computes `down` again, whose activations take most memory.
        """
        x = self.conv_in(x)
        if again:
            x = checkpoint(self.down, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = self.down(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """The mirror image of the encoder, with one more residual block per resolution."""

    def __init__(self, widths: Sequence[int], blocks: int, z: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
        self.mid = middle_blocks(widths[-1])
        self.up = nn.ModuleList()  # from fine to coarse, as in the public weights
        for wide, wider in itertools.pairwise([*widths, widths[-1]]):
            self.up.append(level(wider, wide, blocks + 1))
            if len(self.up) > 1:
                self.up[-1].add_module("upsample", Upsample(wide))
        self.norm_out, self.conv_out = GroupNorm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z, H/4, W/4) -> (B, 3, H, W) in about [-1, 1]."""
        x = self.mid(self.conv_in(z))
        for resolution in reversed(self.up):  # from coarse to fine
            x = resolution(x)
        return self.conv_out(F.silu(self.norm_out(x)))


@torch.no_grad()
def nearest(z: Tensor, entries: Tensor) -> Tensor:
    """For each latent (N, z) the number of its nearest entry of (n, z): (N,).

    Without a matrix product, which a GPU computes in TF32, and in parts that save memory.
    """
    numbers = []
    for part in z.split(max(1, 2**22 // len(entries))):
        distance = z.new_zeros(len(part), len(entries))
        for a, b in zip(part.unbind(1), entries.unbind(1), strict=True):
            difference = a[:, None] - b
            distance.addcmul_(difference, difference)
        numbers.append(distance.argmin(1))
    return torch.cat(numbers)


class Quantizer(nn.Module):
    """The codebook: replaces each latent vector by its nearest entry."""

    def __init__(self, entries: int, z: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(entries, z)
        nn.init.uniform_(self.embedding.weight, -1 / entries, 1 / entries)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, z, h, w) -> nearest entries (B, z, h, w) and their numbers (B, h, w)."""
        flat = z.float().permute(0, 2, 3, 1).flatten(0, 2)
        number = nearest(flat, self.embedding.weight).view(z.shape[0], *z.shape[2:])
        return self.embedding(number).permute(0, 3, 1, 2), number

    def used(self, number: Tensor) -> Tensor:
        """For each entry 1 if it is among these numbers, else 0: (entries,)."""
        return number.new_zeros(len(self.embedding.weight)).index_fill_(0, number.flatten(), 1)


class VQVAE(nn.Module):
    """VQ-VAE whose encoder is E_cont and whose decoder is Rec_hr (A.1, A.2)."""

    def __init__(self, widths: Sequence[int], blocks: int, z: int, entries: int) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(widths, blocks, z), Decoder(widths, blocks, z)
        self.quantize = Quantizer(entries, z)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, z, 1), nn.Conv2d(z, z, 1)

    def encode(self, image: Tensor, again: bool = False) -> Tensor:
        """Latents (B, z, H/4, W/4) before the codebook, of images (B, 3, H, W) in [0, 1]."""
        return self.quant_conv(self.encoder(image * 2 - 1, again))

    def decode(self, z: Tensor) -> Tensor:
        """Rec_hr: images (B, 3, H, W) of latents (B, z, H/4, W/4); not clamped to [0, 1]."""
        return (self.decoder(self.post_quant_conv(z)) + 1) / 2

    @torch.no_grad()
    def restart_entries(self, image: Tensor, generator: torch.Generator) -> None:
        """Move the entries that are nearest to no latent of the images onto random latents."""
        # Not in the paper: without it most entries of the codebook are never used.
        z, weight = self.encode(image).float(), self.quantize.embedding.weight
        unused = self.quantize.used(self.quantize(z)[1]) == 0
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        chosen = torch.randint(len(flat), (len(weight),), generator=generator, device=z.device)
        weight.copy_(torch.where(unused[:, None], flat[chosen], weight))
        if dist.is_initialized():  # the same entries in all processes
            with together():
                dist.broadcast(weight, 0)


# ---- degradation extractor and modulation block -------------------------------------------------


class PlainBlock(nn.Module):
    """x + conv(act(conv(x))), without normalisation, which would remove the noise level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.conv2(F.relu(self.conv1(x), inplace=True))


class DegradationExtractor(nn.Module):
    """E_deg (Fig. 7): a convolution, residual blocks, pooling, a mapping of four layers."""

    def __init__(self, channels: int, blocks: int, dim: int, statistics: bool) -> None:
        super().__init__()
        self.statistics = statistics
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(PlainBlock(channels) for _ in range(blocks)))
        layers: list[nn.Module] = []
        for i in range(4):
            c_in = dim if i else channels + 384 * statistics
            layers += [nn.Conv2d(c_in, dim, 1), nn.LeakyReLU(0.1)]
        self.mapping = nn.Sequential(*layers[:-1])

    def forward(self, lr: Tensor) -> Tensor:
        """F_deg (B, D) of LR images (B, 3, h, w) in [0, 1]."""
        pooled = self.body(self.first(lr - 0.5)).float().mean((2, 3))
        # Deviation: the sizes of DCT coefficients join the means, which hardly show noise and JPEG.
        if self.statistics:
            pooled = torch.cat([pooled, additions.dct_statistics(lr)], dim=1)
        return self.mapping(pooled[:, :, None, None]).flatten(1)


class ModulationBlock(nn.Module):
    """M (Fig. 8): four layers of convolution, activation, modulation unit; then a convolution.

    A modulation unit maps F_deg to a scale and a shift of every channel. Eq. (7), A.4.
    """

    def __init__(self, c_in: int, dim: int, channels: int, c_out: int, jpeg_grid: bool) -> None:
        super().__init__()
        self.jpeg_grid = jpeg_grid
        self.convs = nn.ModuleList(
            nn.Conv2d(channels if i else c_in + 4 * jpeg_grid, channels, 3, padding=1)
            for i in range(4)
        )
        self.units = nn.ModuleList(nn.Linear(dim, 2 * channels) for _ in range(4))
        self.last = nn.Conv2d(channels, c_out, 3, padding=1)

    def forward(self, degradation: Tensor, content: Tensor) -> Tensor:
        """F_deg (B, D) and F_cont (B, C, h, w) -> (B, c_out, h, w)."""
        x = content
        # Deviation: each pixel also gets its position in its block of JPEG, to compress there.
        if self.jpeg_grid:
            place = additions.place_in_block(x.shape[2], x.shape[3], x.device).to(x.dtype)
            x = torch.cat([x, place.expand(len(x), -1, -1, -1)], dim=1)
        for conv, unit in zip(self.convs, self.units, strict=True):
            scale, shift = unit(degradation)[:, :, None, None].chunk(2, dim=1)
            x = F.silu(conv(x)) * (1 + scale) + shift
        return self.last(x)


# ---- the networks of stage 1 --------------------------------------------------------------------

VALUES = 2**28  # of the first layer of E_cont, which limit the images that it reads at a time


class Extractors(nn.Module):
    """The networks of stage 1: E_cont, E_deg, Rec_lr, and a head that reads effects of theta."""

    def __init__(self, cfg: "Config") -> None:
        super().__init__()
        ours = not cfg.as_printed
        self.as_printed = cfg.as_printed
        widths = [cfg.vq_channels * m for m in cfg.vq_multipliers]
        self.vqvae = VQVAE(widths, cfg.vq_blocks, cfg.vq_z, cfg.vq_codes)
        self.e_deg = DegradationExtractor(cfg.deg_channels, cfg.deg_blocks, cfg.deg_dim, ours)
        c_in = cfg.vq_z + 3 * ours
        self.rec_lr = ModulationBlock(c_in, cfg.deg_dim, cfg.mod_channels, 3, ours)
        if ours:
            self.head = additions.effects_head(cfg.deg_dim)

    def content(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """F_cont = E_cont(X): (B, z, H/4, W/4) of images (B, 3, H, W) of HR size, in [0, 1].

        Large images are read in tiles, and the backward pass computes most of each tile again. With
        a generator it does so for one random tile of each image, and multiplies its gradient by the
        number of tiles: an estimate that is exact in the mean. F_cont itself is always exact.
        """
        # Not in the paper: F_cont is what the encoder gives, before the codebook.
        grid = (image.shape[2] // 4, image.shape[3] // 4)
        if max(grid) <= TILE:
            values = image[0, 0].numel() * self.vqvae.encoder.conv_in.out_channels
            parts = image.split(max(1, VALUES // values))
            return torch.cat([self.vqvae.encode(part) for part in parts])
        learns = torch.is_grad_enabled() and any(
            p.requires_grad for p in self.vqvae.encoder.parameters()
        )
        encode = functools.partial(self.vqvae.encode, again=learns)
        # Not in the paper: one tile. A.5 fine-tunes the first block of E_cont, so the backward pass
        # goes through all of E_cont; through all tiles it takes half of the time of stage 2.
        seeds: list[int | None] = [None] * len(image)
        if generator is not None:
            draws = [make_generator(generator.initial_seed(), b) for b in range(len(image))]
            seeds = [draw.initial_seed() for draw in draws]
        # 256 x 256 LR pixels in 9 tiles take a third of the work of attention over all of them.
        made = [
            in_tiles(encode, grid, x, tile=2 * TILE // 3, overlap=16, gradient_of=seed)
            for x, seed in zip(image.split(1), seeds, strict=True)
        ]
        return torch.cat(made)

    def reconstruct(self, degradation: Tensor, hr: Tensor, content: Tensor) -> Tensor:
        """Rec_lr(F_deg, F_cont): the LR image (B, 3, H/4, W/4), not clamped. Eq. (5)."""
        if self.as_printed:
            return self.rec_lr(degradation, content)
        # Deviation: Rec_lr corrects the bicubic reduction of the HR image, filtered so that it gets
        # the transfer function that the head reads: no detail is lost in F_cont.
        lr = resized(hr, *content.shape[2:])
        lr = additions.with_transfer(lr, self.effects(degradation).transfer)
        return lr + self.rec_lr(degradation, torch.cat([content, lr], dim=1))

    def effects(self, degradation: Tensor) -> additions.Effects:
        """What the head reads in F_deg (B, D): transfer function, noise, JPEG."""
        return additions.effects_from(self.head(degradation).float())


def load_vqvae(vqvae: VQVAE, path: str) -> None:
    """Read weights with the keys of vq-f4, or those in a checkpoint of this file; ignore others."""
    # Deviation: the public vq-f4 was trained with a GAN, which A.1 rejects.
    weights = load_checkpoint(path)["ema"]
    weights = {key.removeprefix("vqvae."): value for key, value in weights.items()}
    needed = vqvae.state_dict().keys()
    weights = {key: value for key, value in weights.items() if key in needed}
    put_weights(vqvae, {"ema": weights}, f"--vqvae {path}")


# ---- losses -------------------------------------------------------------------------------------


def psnr_of(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error on [0, 1]."""
    return -10 * mse.detach().log10()


def vqvae_loss(net: Extractors, hr: Tensor) -> dict[str, Tensor]:
    """Reconstruction, codebook and commitment terms of the VQ-VAE (arXiv:1711.00937, Eq. 3)."""
    z = net.vqvae.encode(hr)
    entries, number = net.vqvae.quantize(z)
    latents, target = z + (entries - z).detach(), hr  # straight through
    if not net.as_printed:  # Deviation: every other image skips the codebook, because F_cont does.
        latents, target = torch.cat([latents[::2], z[1::2]]), torch.cat([hr[::2], hr[1::2]])
    mse = F.mse_loss(net.vqvae.decode(latents).float(), target)
    codebook = F.mse_loss(entries, z.detach().float())
    commitment = F.mse_loss(z.float(), entries.detach())
    used = net.vqvae.quantize.used(number).sum()
    return {"loss": mse + codebook + 0.25 * commitment, "psnr": psnr_of(mse), "entries": used}


def sample_mixed(batch: int, recipes: Sequence[str], generator: torch.Generator) -> Degradation:
    """Parameters theta for a batch, an equal share from each recipe; a generator of the CPU."""
    first, thetas = int(torch.randint(len(recipes), (), generator=generator)), []
    for i, share in enumerate(torch.arange(batch).tensor_split(len(recipes))):
        recipe = recipes[(first + i) % len(recipes)]
        thetas.append(degrade.sample_degradation(len(share), recipe, generator=generator))
    return Degradation.cat(thetas)


def degrade_randomly(
    hr: Tensor, recipes: Sequence[str], generator: torch.Generator, groups: int = 1
) -> tuple[Tensor, Degradation]:
    """D(X, theta) with theta drawn from the recipes: lr (B, 3, H/4, W/4), theta of B / groups rows.

    hr (B, 3, H, W) consists of groups of equal size; image b of each group gets theta b.
    """
    draw = make_generator(generator.initial_seed())  # of the CPU: does not synchronise the GPU
    theta = sample_mixed(len(hr) // groups, recipes, draw)
    return degrade.degrade(hr, Degradation.cat([theta] * groups), draw), theta


def content_loss(
    net: Extractors, hr: Tensor, cfg: "Config", generator: torch.Generator
) -> dict[str, Tensor]:
    """L_rh: the frozen decoder must find the clean image in degraded content. Eq. (1)-(2)."""
    lr, _ = degrade_randomly(hr, cfg.recipes, generator)
    # Deviation: Eq. (1) gives E_cont the LR image; here it is first enlarged bicubically to the
    # size of HR, because a VQ-VAE returns images of the size that it is given.
    degraded = resized(lr, *hr.shape[2:])
    if not net.as_printed:  # Deviation: every fourth input is clean, as HR is in generation.
        degraded[::4] = hr[::4]
    hr_hat = net.vqvae.decode(net.content(degraded)).float()  # Eq. (1)
    mse = F.mse_loss(hr_hat, hr)  # Eq. (2)
    return {"loss": mse, "psnr": psnr_of(mse)}


def contrastive_samples(
    hr: Tensor, cfg: "Config", generator: torch.Generator
) -> tuple[Tensor, Tensor, Degradation]:
    """One batch gives anchors, positives and negatives. Eq. (3).

    hr (B, 3, H, W) -> lr (n+1, B, 3, H/4, W/4), scene (n+1, B), theta of B rows, n = num_samples:
    lr[k, b] = D(X_{b+k}, theta_b), whose scene is b + k modulo B.
    """
    B, n = len(hr), cfg.num_samples
    assert n < B, "the batch must be larger than the number of samples n"
    scene = (torch.arange(n + 1)[:, None] + torch.arange(B)) % B
    scene = scene.to(hr.device, non_blocking=True)
    lr, theta = degrade_randomly(hr[scene.flatten()], cfg.recipes, generator, groups=n + 1)
    return lr.unflatten(0, (n + 1, B)), scene, theta


def contrastive_loss(anchor: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """L_cl of F_deg (B, D), (n, B, D), (n, B, D): a hinge on L2 distances, mean over B. Eq. (4)."""
    to_positive = (anchor - positives).square().sum(-1).add(1e-12).sqrt()  # (n, B)
    to_negative = (anchor - negatives).square().sum(-1).add(1e-12).sqrt()
    return (to_positive - to_negative + margin).clamp(min=0).sum(0).mean()


def by_role(degradation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors (B, D), positives and negatives (n, B, D) among F_deg of contrastive_samples().

    degradation[0, b] is an anchor. degradation[k, b] is a positive of it (same theta, another
    scene), degradation[k, b-k] a negative (same scene, another theta).
    """
    negatives = [degradation[k].roll(k, dims=0) for k in range(1, len(degradation))]
    return degradation[0], degradation[1:], torch.stack(negatives)


def reconstruction_errors(lr_hat: Tensor, lr: Tensor) -> Tensor:
    """L_rl of each image (B,): the mean square error of Rec_lr's output (B, 3, h, w). Eq. (6)."""
    return (lr_hat.float() - lr).square().mean((1, 2, 3))


def degradation_loss(
    net: Extractors, hr: Tensor, cfg: "Config", generator: torch.Generator
) -> dict[str, Tensor]:
    """L_cl + L_rl for E_deg and Rec_lr, as printed. Eq. (3)-(6)."""
    lr, _, _ = contrastive_samples(hr, cfg, generator)  # Eq. (3)
    degradation = net.e_deg(lr.flatten(0, 1)).float().unflatten(0, lr.shape[:2])  # (n+1, B, D)
    contrastive = contrastive_loss(*by_role(degradation), cfg.margin)  # Eq. (4)
    with torch.no_grad():
        content = net.content(hr)
    lr_hat = net.reconstruct(degradation[0], hr, content)  # Eq. (5)
    mse = reconstruction_errors(lr_hat, lr[0])  # Eq. (6)
    # Not in the paper: how to weight L_cl and L_rl; here they are summed.
    loss = contrastive + mse.mean()
    return {"loss": loss, "contrastive": contrastive, "psnr": psnr_of(mse).mean()}


# ---- the same with our additions ----------------------------------------------------------------


def same_photo_loss(net: Extractors, real_lr: Tensor, h: int, w: int, margin: float) -> Tensor:
    """L_cl of two corners of h x w pixels of real LR photos (B, 3, H, W); negatives: other photos.

    Corners begin where blocks of JPEG begin.
    """
    y, x = (side // 4 * 3 // 8 * 8 for side in real_lr.shape[2:])
    corners = torch.cat([real_lr[:, :, :h, :w], real_lr[:, :, y : y + h, x : x + w]])
    anchor, positive = net.e_deg(corners).float().chunk(2)
    return contrastive_loss(anchor, positive[None], positive.roll(1, dims=0)[None], margin)


def degradation_loss_with_additions(
    net: Extractors, hr: Tensor, real_lr: Tensor, cfg: "Config", generator: torch.Generator
) -> dict[str, Tensor]:
    """degradation_loss() with what the docstring of this file lists; real_lr like hr (B, 3, H, W).

    real_lr are crops of real LR photos.
    """
    # Not in the paper: real photos are scenes for D, too, since D takes a quarter of their size.
    hr = torch.stack([hr, real_lr], dim=1).flatten(0, 1)
    lr, scene, theta = contrastive_samples(hr, cfg, generator)
    degradation = net.e_deg(lr.flatten(0, 1)).float().unflatten(0, lr.shape[:2])  # (n+1, B, D)
    contrastive = contrastive_loss(*by_role(degradation), cfg.margin)
    # Not in the paper: two corners of a real photo are positives, one of another a negative.
    contrastive += same_photo_loss(net, real_lr, lr.shape[3], lr.shape[4], cfg.margin)

    # Not in the paper: a quarter is enough, and E_cont takes most time.
    hr, lr = (x[..., : x.shape[-2] // 2, : x.shape[-1] // 2] for x in (hr, lr))
    with torch.no_grad():
        content = net.content(hr)
    # Deviation: Eq. (5) reconstructs the image whose F_deg it is given; here F_deg of an anchor
    # must reconstruct its positives, so that it cannot memorise the image or its noise.
    positive = scene[1:].flatten()
    anchor = degradation[0].repeat(cfg.num_samples, 1)
    lr_hat = net.reconstruct(anchor, hr[positive], content[positive])
    mse = reconstruction_errors(lr_hat, lr[1:].flatten(0, 1))
    # Deviation: the logarithm of Eq. (6), with a floor of 1e-5, so that noisy images do not
    # outweigh clean ones.
    reconstruction = (mse + 1e-5).log().mean()
    # Not in the paper: a head predicts effects of theta, which is known in training; without it
    # E_deg hardly learns.
    effects = additions.effects_loss(net.head(degradation.flatten(0, 1)).float(), theta)
    # Not in the paper: the weights 0.02, 1/10 and 1 of the three terms.
    loss = 0.02 * contrastive + reconstruction / 10 + effects
    numbers = {"contrastive": contrastive, "psnr": psnr_of(mse).mean(), "head": effects}
    return {"loss": loss, **numbers}


# ---- previews -----------------------------------------------------------------------------------


@torch.no_grad()
def vqvae_report(net: Extractors, hr: Tensor, path: Path) -> dict[str, Tensor]:
    """A picture of reconstructed photos with and without the codebook; PSNR and entries in use."""
    z = net.vqvae.encode(hr)
    entries, number = net.vqvae.quantize(z)
    quantised, without = (net.vqvae.decode(x).float().clamp(0, 1) for x in (entries, z))
    rows = list(zip(hr, quantised, without, strict=True))[:4]
    save_sheet(path, ("HR", "with the codebook", "without"), rows)
    return {
        "shown psnr": psnr_of(F.mse_loss(quantised, hr)),
        "without codebook": psnr_of(F.mse_loss(without, hr)),
        "entries used": net.vqvae.quantize.used(number).sum(),
    }


def save_swap_grid(path: Path, references: Tensor, made: Sequence[Tensor]) -> None:
    """Picture of LR: rows of a reference (3, h, w) and scenes (B, 3, h, w) with its F_deg."""
    side = references.shape[2]
    rows = [
        [centre(image, side, 2 * side) for image in (reference, *row.float().clamp(0, 1))]
        for reference, row in zip(references, made, strict=True)
    ]
    titles = ("LR", "its degradation, other scenes", *[""] * (len(made[0]) - 1))
    save_sheet(path, titles, rows)


@torch.no_grad()
def swap_grid(net: Extractors, hr: Tensor, cfg: "Config", path: Path) -> dict[str, Tensor]:
    """Picture of Rec_lr: the degradation of each row's LR, the content of each column."""
    draw = make_generator(cfg.seed)
    lr = degrade.degrade(hr, sample_mixed(len(hr), cfg.recipes, draw), draw)
    content = net.content(hr)
    made = [net.reconstruct(d.expand(len(hr), -1), hr, content) for d in net.e_deg(lr)]
    save_swap_grid(path, lr, made)
    same_scene = torch.stack(made)[range(len(hr)), range(len(hr))]
    return {"shown psnr": psnr_of(reconstruction_errors(same_scene, lr)).mean()}


# ---- configuration and training -----------------------------------------------------------------


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings of stage 1 (A.1); the defaults are the paper's where it gives any."""

    hr: tuple[str, ...] = ()  # folders of HR photos (default: data/hr, else data/sample/hr)
    lr: tuple[str, ...] = ()  # folders of real LR photos (default: data/lr, else data/sample/lr)
    out: str = "runs/extractors"  # folder of checkpoints and log
    vqvae: str = ""  # start from these VQ-VAE weights; those of vq-f4 need --preset paper
    start_from: str = ""  # weights of all networks of this file, to train further
    steps: tuple[int, ...] = (200_000, 200_000, 200_000)  # of the VQ-VAE, of E_cont, of E_deg
    batch_size: int = 8  # HR crops per process, 8 of which give 64; 0: 256 on a GPU, else 16
    crop: int = 256  # HR crop for E_deg, pixels
    vq_crop: int = 256  # HR crop for the VQ-VAE and E_cont, pixels
    vqvae_learning_rate: float = 1e-4
    content_learning_rate: float = 1e-5
    degradation_learning_rate: float = 1e-4  # of E_deg, Rec_lr and the head
    vq_channels: int = 128
    vq_multipliers: tuple[int, ...] = (1, 2, 4)
    vq_blocks: int = 2
    vq_z: int = 3  # channels of the content
    vq_codes: int = 8192  # entries of the codebook
    deg_channels: int = 64
    deg_blocks: int = 16
    deg_dim: int = 2048
    mod_channels: int = 64
    num_samples: int = 3  # n: positives and negatives per anchor
    margin: float = 0.01
    recipes: tuple[str, ...] = ("realesrgan",)  # of D
    as_printed: bool = True  # losses and networks of the paper, without the additions listed above

    MAY_CHANGE: ClassVar[tuple[str, ...]] = (*TrainingConfig.MAY_CHANGE, "vqvae")


# Deviation: the small presets take one positive and one negative per anchor, the paper three.
SMALL: dict = {
    "steps": (700, 150, 1250), "batch_size": 0, "crop": 192, "vq_crop": 96,
    "vqvae_learning_rate": 2e-3, "content_learning_rate": 3e-4, "degradation_learning_rate": 1e-3,
    "vq_channels": 16, "vq_z": 4, "vq_codes": 1024, "deg_channels": 48, "deg_blocks": 8,
    "deg_dim": 256, "mod_channels": 48, "num_samples": 1, "ema_decay": 0.995, "compile": False,
    "save_every": 100,
}  # fmt: skip
# Deviation: preset small also degrades with other recipes than the paper's Real-ESRGAN.
PRESETS: dict[str, dict] = {
    "small": SMALL
    | {
        "as_printed": False,
        "recipes": ("realesrgan", "camera", "wide"),
        "crop": 256,
        "cooldown": 0.7,
    },
    "paper": {},
    "as-printed": SMALL,
}
RANGES = TRAINING_RANGES | {
    "steps": (0, 2**31), "batch_size": (2, 2**20), "crop": (16, 2**14), "vq_crop": (16, 2**14),
    "vqvae_learning_rate": (0, 1), "content_learning_rate": (0, 1),
    "degradation_learning_rate": (0, 1), "vq_channels": (1, 2**12), "vq_multipliers": (1, 64),
    "vq_blocks": (1, 64), "vq_z": (1, 1024), "vq_codes": (1, 2**20), "deg_channels": (1, 2**12),
    "deg_blocks": (0, 256), "deg_dim": (1, 2**14), "mod_channels": (1, 2**12),
    "num_samples": (1, 2**10), "margin": (0, 1e6),
}  # fmt: skip


THREE = "--vq-multipliers takes three, because content has a quarter of the size of HR."


def default_batch(rt: Runtime) -> int:
    """The batch size of the small presets on this device."""
    return 256 if rt.device.type == "cuda" else 16


def stored_config(config: dict, name: str) -> Config:
    """The settings in the checkpoint `name`; UserError if they are of another stage, or wrong."""
    is_stage_1 = isinstance(config, dict) and "deg_dim" in config
    require(is_stage_1, f"{name}: not a checkpoint of extractors.py (give that one).")
    settings = {key: value for key, value in config.items() if key != "began"}
    cfg = from_dict(Config, settings, name)
    check_ranges(cfg, RANGES, f"{name}: ")
    require(len(cfg.vq_multipliers) == 3, f"{name}: {THREE}")
    return cfg


def load(state: dict, name: str) -> Extractors:
    """The networks in a checkpoint of this stage, on the CPU; UserError if they can't be used."""
    cfg = stored_config(state["config"], name)
    with torch.device("meta"):  # nothing is allocated before the shapes are checked
        net = Extractors(cfg)
    put_weights(net, state, name)
    return net


def step_of(path: Path) -> int:
    """The step that a phase goes on from, without reading its weights; 0 if there is none."""
    for file in (path, before(path)):
        with contextlib.suppress(Exception):  # missing or damaged, which raises many types
            return torch.load(file, mmap=True, weights_only=True)["step"]
    return 0


def check_recipes(recipes: Sequence[str]) -> None:
    """UserError for a recipe that degrade.py does not have."""
    unknown = " ".join(set(recipes) - set(degrade.RECIPES))
    require(not unknown, f"--recipes {unknown}: no such recipe of degrade.py.")


def checked(cfg: Config, rt: Runtime) -> Config:
    """The settings with the batch size of this device, and three numbers of steps, or UserError."""
    numbers = "--steps takes one number, or one for each of the three phases."
    require(len(cfg.steps) in (1, 3), numbers)
    steps = cfg.steps if len(cfg.steps) == 3 else cfg.steps * 3
    cfg = replace(cfg, steps=steps, batch_size=cfg.batch_size or default_batch(rt))
    check_ranges(cfg, RANGES)
    require(len(cfg.vq_multipliers) == 3, THREE)
    for flag, crop in (("--crop", cfg.crop), ("--vq-crop", cfg.vq_crop)):
        require(crop % 16 == 0, f"{flag} {crop}: must be a multiple of 16.")
    more = f"--batch-size {cfg.batch_size}: must be larger than --num-samples {cfg.num_samples}."
    require(cfg.batch_size > cfg.num_samples, more)
    require(not (cfg.as_printed and cfg.lr), "--lr: training as printed takes no real LR.")
    check_micro_batches(cfg, least=cfg.num_samples + 1, sources=1 if cfg.as_printed else 2)
    check_recipes(cfg.recipes)
    files = [Path(cfg.out) / f"{phase}.pt" for phase in ("vqvae", "content", "last")]
    for (i, earlier), (_, later) in itertools.combinations(enumerate(files), 2):
        goes_on = step_of(earlier) < steps[i] and not (cfg.vqvae and i == 0)
        began = f"{later} was trained from a different {earlier.name}"
        way_out = "delete it to train that phase again, or give another --out"
        require(not (goes_on and later.is_file()), f"{began}: {way_out}.")
    return cfg


def prepare(cfg: Config, rt: Runtime) -> tuple[Extractors, Crops, list[Crops], Tensor]:
    """The networks, crops for the VQ-VAE and E_cont, crops of HR and LR for E_deg, 8 photos."""
    net, out = Extractors(cfg), Path(cfg.out)
    if cfg.start_from:
        load_weights(net, cfg.start_from, "--start-from")
    if cfg.vqvae:
        load_vqvae(net.vqvae, cfg.vqvae)
    files = outside(find_photos(cfg.hr, "hr", "--hr", packed=True), out, "--hr")
    photos = Photos(files, out / "photos/hr", rt)
    rows = np.arange(len(photos.table))
    held_out = rows[::50] if len(rows) >= 50 else rows[:0]  # shown, not trained on
    rows = np.setdiff1d(rows, held_out)
    vq_crops = Crops(photos, cfg.vq_crop, cfg.batch_size, cfg.seed, flag="--vq-crop", rows=rows)
    share = cfg.batch_size // (1 if cfg.as_printed else 2)
    crops = [Crops(photos, cfg.crop, share, cfg.seed, rows=rows)]
    shown_rows = held_out if len(held_out) else rows
    shown = Crops(photos, cfg.crop, 8, cfg.seed, stream=9, rows=shown_rows).batch(0, 8)
    if not cfg.as_printed:
        files = outside(find_photos(cfg.lr, "lr", "--lr", packed=True), out, "--lr")
        crops.append(
            Crops(Photos(files, out / "photos/lr", rt), cfg.crop, share, cfg.seed, stream=1)
        )
    if rt.is_main:
        print(cfg)
        counts = [f"{len(c.rows)} ({c.left_out} smaller than the crop)" for c in crops]
        print(f"photos, HR and real LR: {', '.join(counts)}, {len(held_out)} held out; "
              f"VQ-VAE {count_parameters(net.vqvae)}, "
              f"E_deg {count_parameters(net.e_deg)}, "
              f"Rec_lr {count_parameters(net.rec_lr)}")  # fmt: skip
    if cfg.compile:
        networks = [net.vqvae.encoder, net.vqvae.decoder, net.e_deg, net.rec_lr]
        compile_networks(networks, rt)
    return net, vq_crops, crops, shown.to(rt.device).float() / 255


def train(cfg: Config, rt: Runtime) -> None:
    """The three phases of stage 1, each of which resumes from its own checkpoint."""
    cfg = checked(cfg, rt)
    lock_runs(cfg.out, ("vqvae", "content", "last"), rt)
    net, vq_crops, crops, shown = prepare(cfg, rt)
    out, vqvae = Path(cfg.out), net.vqvae
    steps_vqvae, steps_content, steps_degradation = cfg.steps

    # Not in the paper: in all trainings Run takes AdamW, clips the norm of the gradient at 1
    # and averages the weights over the steps (EMA).
    if not cfg.vqvae:  # phase 1: the VQ-VAE on HR photos
        groups = [{"params": [*vqvae.parameters()], "lr": cfg.vqvae_learning_rate}]
        began = fingerprint(net) if cfg.start_from else ""
        run = Run(
            cfg, rt, net, groups, out / "vqvae.pt", steps_vqvae, began=began,
            preview=lambda: vqvae_report(net, shown, out / "vqvae.png"),
        )  # fmt: skip
        for hr, draw in run.batches(vq_crops, least=2):
            if run.step % 10 == 0 and run.micro_batch == 0:  # a message to all, so not in update()
                with rt.autocast(cfg.bf16):
                    vqvae.restart_entries(hr, draw)
            run.update(vqvae_loss, net, hr)

    # Phase 2: E_cont, the encoder, on degraded photos, against the frozen decoder. Eq. (1)-(2).
    tuned = [*vqvae.encoder.parameters(), *vqvae.quant_conv.parameters()]
    groups = [{"params": tuned, "lr": cfg.content_learning_rate}]
    run = Run(
        cfg, rt, net, groups, out / "content.pt", steps_content, began=fingerprint(vqvae),
        preview=lambda: vqvae_report(net, shown, out / "content.png"),
    )  # fmt: skip
    for hr, draw in run.batches(vq_crops, least=1 if cfg.as_printed else 4):  # a quarter is clean
        run.update(content_loss, net, hr, cfg, draw)

    # Phase 3: E_deg, Rec_lr and the head; E_cont stays as it is. Eq. (3)-(6).
    tuned = [p for name, p in net.named_parameters() if not name.startswith("vqvae.")]
    groups = [{"params": tuned, "lr": cfg.degradation_learning_rate}]
    run = Run(
        cfg, rt, net, groups, out / "last.pt", steps_degradation, began=fingerprint(vqvae),
        preview=lambda: swap_grid(net, shown[:4], cfg, out / "last.png"),
    )  # fmt: skip
    loss = degradation_loss if cfg.as_printed else degradation_loss_with_additions
    for *photos, draw in run.batches(*crops, least=cfg.num_samples + 1):
        run.update(loss, net, *photos, cfg, draw)


if __name__ == "__main__":
    launch(train, Config, PRESETS, __doc__)
