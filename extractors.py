"""Stage 1: what a picture shows (E_cont), what the camera did to it (E_deg). Sections 2.1, A.1.

In: clean HR photos. Out: runs/extractors/last.pt with both extractors, and Rec_lr, which joins
them again. Three parts are trained one after the other: a VQ-VAE on HR photos; its encoder on
degraded photos against the frozen decoder (Eq. 1-2); E_deg together with Rec_lr (Eq. 3-6).

    python extractors.py
    torchrun --nproc_per_node=8 extractors.py --hr data/hr --preset paper

What is ours and not the paper's, which --as-printed and so --preset paper take out:

    VQ-VAE     half of the images skip the codebook, as the content does
    E_cont     a quarter of the inputs is clean, as in generation
    E_deg      also pools the sizes of DCT coefficients; a head names its theta
    Rec_lr     adds to the reduced HR image, filtered with a kernel that the code names
    Rec_lr, M  are told where the blocks of JPEG are
    Eq. (5)    the code of one scene must reconstruct other scenes
    Eq. (6)    is the logarithm of each image's error
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import common
import degrade
from data.pack import Crops, Photos

# ---- content extractor: the VQ-VAE, with the structure and keys of the public vq-f4 -------------


class GroupNorm(nn.GroupNorm):
    """Group norm of 32 groups, fewer if narrow: a group of one channel loses contrast.

    It keeps bf16, where autocast would store its input and output in float32.
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
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.conv2.weight)  # start as the identity: trains faster

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Self-attention over all pixels, added to its input; vq-f4 has a single head."""

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
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(2, 3).reshape(x.shape))


class Middle(nn.Module):
    """The two residual blocks and the attention at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = ResBlock(channels, channels), Attention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.block_2(self.attn_1(self.block_1(x)))


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


class Level(nn.Module):
    """The residual blocks of one resolution and the step to the next one."""

    def __init__(self, c_in: int, c_out: int, blocks: int, change: type[nn.Module] | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_out if i else c_in, c_out) for i in range(blocks))
        if change is Downsample:
            self.downsample = Downsample(c_out)
        elif change is Upsample:
            self.upsample = Upsample(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H', W')."""
        for block in self.block:
            x = block(x)
        x = self.downsample(x) if hasattr(self, "downsample") else x
        return self.upsample(x) if hasattr(self, "upsample") else x


class Encoder(nn.Module):
    """The encoder of the VQ-VAE; one halving less than there are widths."""

    def __init__(self, widths: Sequence[int], blocks: int, z: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[max(i - 1, 0)], w, blocks, Downsample if i < last else None)
            for i, w in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = (
            GroupNorm(widths[-1]),
            nn.Conv2d(widths[-1], z, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, z, H/4, W/4)."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """The mirror image of the encoder, with one residual block more per resolution."""

    def __init__(self, widths: Sequence[int], blocks: int, z: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        # Stored from fine to coarse, as in the public weights; run from coarse to fine.
        wider = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level(wider[i], w, blocks + 1, Upsample if i > 0 else None)
            for i, w in enumerate(widths)
        )
        self.norm_out, self.conv_out = GroupNorm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z, H/4, W/4) -> (B, 3, H, W) in about [-1, 1]."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The codebook: replaces each latent vector by the nearest of its codes."""

    def __init__(self, codes: int, z: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, z)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, z, h, w) -> nearest codes (B, z, h, w) and their numbers (B, h, w)."""
        with torch.autocast(z.device.type, enabled=False):
            flat = z.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
            number = torch.cat(
                [torch.cdist(f, self.embedding.weight).argmin(1) for f in flat.split(4096)]
            )
        number = number.view(z.shape[0], *z.shape[2:])
        return self.embedding(number).permute(0, 3, 1, 2), number

    def used(self, number: Tensor) -> Tensor:
        """How many different codes there are among these numbers."""
        seen = number.new_zeros(len(self.embedding.weight))
        return seen.index_fill_(0, number.flatten(), 1).sum()

    @torch.no_grad()
    def restart(self, z: Tensor, generator: torch.Generator) -> None:
        """Move codes that are nearest to none of the latents (B, z, h, w) onto some of those."""
        codes = len(self.embedding.weight)
        unused = torch.bincount(self(z)[1].flatten(), minlength=codes) == 0
        flat = z.float().permute(0, 2, 3, 1).flatten(0, 2)
        chosen = torch.randint(len(flat), (codes,), generator=generator, device=z.device)
        weight = self.embedding.weight
        weight.copy_(torch.where(unused[:, None], flat[chosen], weight))
        common.broadcast(weight)


class VQVAE(nn.Module):
    """VQ-VAE whose encoder is E_cont and whose decoder is Rec_hr (A.1, A.2)."""

    def __init__(
        self, channels: int, multipliers: Sequence[int], blocks: int, z: int, codes: int
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.encoder, self.decoder = Encoder(widths, blocks, z), Decoder(widths, blocks, z)
        self.quantize = Quantizer(codes, z)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, z, 1), nn.Conv2d(z, z, 1)

    def encode(self, image: Tensor) -> Tensor:
        """Latents (B, z, H/4, W/4) before the codebook, of an image (B, 3, H, W) in [0, 1]."""
        return self.quant_conv(self.encoder(image * 2 - 1))

    @torch.no_grad()
    def restart_codes(self, image: Tensor, generator: torch.Generator) -> None:
        """Move unused codes onto latents of images (B, 3, H, W) in [0, 1]."""
        self.quantize.restart(self.encode(image), generator)

    def decode(self, z: Tensor) -> Tensor:
        """Rec_hr: image (B, 3, H, W) of latents (B, z, H/4, W/4); not clamped to [0, 1]."""
        return (self.decoder(self.post_quant_conv(z)) + 1) / 2


TILE, OVERLAP = 144, 32  # LR pixels; attention grows with the fourth power of a side


def in_tiles(
    function: Callable[..., Tensor],
    grid: tuple[int, int],
    *inputs: Tensor,
    tile: int = 0,
    overlap: int = 0,
) -> Tensor:
    """function(*inputs) -> (B, C, h, w) tile by tile, so that memory does not grow with the image.

    Inputs (B, C', f h, f w) with whole factors f; grid is (h, w). Tiles overlap and fade into each
    other; an image no larger than a tile (of TILE pixels, unless told) is computed at once.
    """
    h, w = grid
    th, tw, overlap = min(h, tile or TILE), min(w, tile or TILE), overlap or OVERLAP
    if (th, tw) == (h, w):
        return function(*inputs)

    def starts(n: int, side: int) -> list[int]:
        return [*range(0, n - side, side - overlap), n - side]

    def fade(start: int, side: int, n: int) -> Tensor:
        """Smoothly from almost 0 to 1 over the middle half of the overlap: edges see too little.

        The edges of the image itself do not fade: there, all tiles see the same.
        """
        i = torch.arange(1, side + 1, device=inputs[0].device)
        before, after = i + overlap * (start == 0), i.flip(0) + overlap * (start + side == n)
        rising = (2 * torch.minimum(before, after) / overlap - 0.5).clamp(0.02, 1)
        return rising.square() * (3 - 2 * rising)

    total, weight = None, torch.zeros(h, w, device=inputs[0].device)
    for top in starts(h, th):
        for left in starts(w, tw):
            parts = []
            for x in inputs:
                f = x.shape[2] // h
                parts.append(x[:, :, top * f : (top + th) * f, left * f : (left + tw) * f])
            mask = fade(top, th, h)[:, None] * fade(left, tw, w)
            part = function(*parts).float()
            total = part.new_zeros(*part.shape[:2], h, w) if total is None else total
            total[:, :, top : top + th, left : left + tw] += part * mask
            weight[top : top + th, left : left + tw] += mask
    assert total is not None
    return total / weight


# ---- degradation extractor and modulation block -------------------------------------------------


class PlainBlock(nn.Module):
    """x + conv(act(conv(x))), without normalisation, which would remove the noise level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.conv2(F.relu(self.conv1(x)))


YCC = ((0.299, 0.587, 0.114), (-0.1687, -0.3313, 0.5), (0.5, -0.4187, -0.0813))  # of RGB, BT.601


def dct_statistics(lr: Tensor) -> Tensor:
    """How large the coefficients are that JPEG would quantise, (B, 384), of LR (B, 3, h, w).

    For each of Y, Cb, Cr and each of the 64 frequencies of blocks of 8 x 8 pixels: the mean
    logarithm of the size and the logarithm of the root mean square, both in levels of 255 and
    brought to about [-1, 1]. Blur shows as their decline with frequency, noise as the floor they
    end on, compression as coefficients that are nothing at all.
    """
    with torch.autocast(lr.device.type, enabled=False):
        to_ycc = torch.tensor(YCC).to(lr.device, non_blocking=True)
        ycc = 255 * torch.einsum("oc,bchw->bohw", to_ycc, lr.float())
        short = [max(0, 8 - side) for side in lr.shape[2:]]  # an image smaller than a block
        ycc = F.pad(ycc, (0, short[1], 0, short[0]), mode="replicate")
        dct = degrade.DCT.to(ycc.device, ycc.dtype, non_blocking=True)
        rows = dct / (8192 * math.sqrt(8))  # orthonormal
        basis = torch.einsum("uy,vx->uvyx", rows, rows).reshape(64, 1, 8, 8)
        size = F.conv2d(ycc.flatten(0, 1)[:, None], basis, stride=8).abs()  # (3B, 64, h/8, w/8)
        typical = (size + 0.5).log().mean((2, 3)).view(len(lr), -1)
        spread = (size.square().mean((2, 3)) + 0.25).log().view(len(lr), -1) / 2
        return (torch.cat([typical, spread], dim=1) - 1.5) / 1.5


KERNEL = 9  # side of the kernel that F_deg names, LR pixels


class DegradationExtractor(nn.Module):
    """E_deg (Fig. 7): a convolution, residual blocks, pooling, a mapping of four layers.

    Deviation: with `statistics`, those of `dct_statistics` are pooled, too. A camera leaves its
    traces mostly in spreads at each frequency and in the blocks of JPEG, which means hardly see.
    """

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
        if self.statistics:
            pooled = torch.cat([pooled, dct_statistics(lr)], dim=1)
        return self.mapping(pooled[:, :, None, None]).flatten(1)


def place_in_block(height: int, width: int, device: torch.device) -> Tensor:
    """Sine and cosine of a pixel's place in its block of 8 x 8, along both axes: (1, 4, h, w)."""
    y, x = (torch.arange(n, device=device) * (2 * math.pi / 8) for n in (height, width))
    rows = torch.stack([y.sin(), y.cos()])[:, :, None].expand(2, height, width)
    columns = torch.stack([x.sin(), x.cos()])[:, None].expand(2, height, width)
    return torch.cat([rows, columns])[None]


class ModulationBlock(nn.Module):
    """M (Fig. 8): four layers of convolution, activation, modulation unit; then a last convolution.

    A modulation unit maps F_deg to a scale and a shift of every channel. Eq. (7), A.4.
    Deviation: with `jpeg_grid` it is told where the 8 x 8 blocks of JPEG are, to compress there.
    """

    def __init__(
        self, c_in: int, dim: int, channels: int, c_out: int, jpeg_grid: bool, layers: int = 4
    ) -> None:
        super().__init__()
        self.jpeg_grid = jpeg_grid
        c_in += 4 * jpeg_grid
        self.convs = nn.ModuleList(
            nn.Conv2d(channels if i else c_in, channels, 3, padding=1) for i in range(layers)
        )
        self.units = nn.ModuleList(nn.Linear(dim, 2 * channels) for _ in range(layers))
        self.last = nn.Conv2d(channels, c_out, 3, padding=1)

    def forward(self, degradation: Tensor, content: Tensor) -> Tensor:
        """F_deg (B, D) and F_cont (B, C, h, w) -> (B, c_out, h, w)."""
        x = content
        if self.jpeg_grid:
            place = place_in_block(x.shape[2], x.shape[3], x.device).to(x.dtype)
            x = torch.cat([x, place.expand(len(x), -1, -1, -1)], dim=1)
        for conv, unit in zip(self.convs, self.units, strict=False):
            scale, shift = unit(degradation)[:, :, None, None].chunk(2, dim=1)
            x = F.silu(conv(x)) * (1 + scale) + shift
        return self.last(x)


def filtered(image: Tensor, kernels: Tensor) -> Tensor:
    """Image b (3, h, w) filtered with kernels[b] (k, k), k odd; the border is continued."""
    B, C, h, w = image.shape
    weight = kernels.to(image)[:, None].repeat_interleave(C, dim=0)
    padded = F.pad(image, [kernels.shape[-1] // 2] * 4, mode="replicate")
    rows = padded.reshape(1, B * C, *padded.shape[2:])
    return F.conv2d(rows, weight, groups=B * C).view(B, C, h, w)


def softened(hr: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Photos (B, 3, H, W) as soft as cameras take them: Gaussians of up to `most` pixels.

    Not in the paper: HR photos from the web are often reduced ones, sharper than any camera's. From
    them E_deg learns to see a blur in LR photos which their own HR photos have, too.
    """
    width = (most * torch.rand(len(hr), 1, generator=generator)).clamp(min=0.1)
    half = math.ceil(3 * most)
    taps = (-(torch.arange(-half, half + 1) / width).square() / 2).exp()
    taps = (taps / taps.sum(1, keepdim=True)).to(hr.device, non_blocking=True)  # (B, 2 half + 1)
    return filtered(hr, taps[:, :, None] * taps[:, None])


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """Resize (B, 3, H, W) bicubically with antialiasing, as Pillow does but without rounding."""
    return F.interpolate(image.float(), (height, width), mode="bicubic", antialias=True)


def load_vqvae(vqvae: VQVAE, path: str) -> None:
    """Read public first-stage weights, or those in a checkpoint of ours; others in it are ignored.

    UserError if a weight is missing or of another shape.
    """
    weights = common.load_checkpoint(path)["ema"]
    weights = {key.removeprefix("vqvae."): value for key, value in weights.items()}
    needed = vqvae.state_dict()
    missing = [key for key, value in needed.items()
               if getattr(weights.get(key), "shape", None) != value.shape]  # fmt: skip
    common.require(
        not missing,
        f"--vqvae {path}: {len(missing)} of {len(needed)} weights are missing or of another shape, "
        f"as {next(iter(missing), '')}: --preset paper has the sizes of the public vq-f4.",
    )
    common.put_weights(vqvae, {"ema": {key: weights[key] for key in needed}}, f"--vqvae {path}")


class Extractors(nn.Module):
    """The networks of stage 1: E_cont, E_deg, Rec_lr, and the head that names what E_deg sees."""

    def __init__(self, cfg: "Config") -> None:
        super().__init__()
        ours = not cfg.as_printed
        self.as_printed = cfg.as_printed
        self.vqvae = VQVAE(
            cfg.vq_channels, cfg.vq_multipliers, cfg.vq_blocks, cfg.vq_z, cfg.vq_codes
        )
        self.e_deg = DegradationExtractor(cfg.deg_channels, cfg.deg_blocks, cfg.deg_dim, ours)
        c_in = cfg.vq_z + 3 * ours
        self.rec_lr = ModulationBlock(c_in, cfg.deg_dim, cfg.mod_channels, 3, ours)
        if ours:
            self.kernel = nn.Linear(cfg.deg_dim, KERNEL**2)
            nn.init.zeros_(self.kernel.weight)
            nn.init.zeros_(self.kernel.bias)
            self.head = nn.Sequential(  # codes are small: without the norm it hardly learns
                nn.LayerNorm(cfg.deg_dim), nn.Linear(cfg.deg_dim, 128), nn.SiLU(),
                nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 5),
            )  # fmt: skip

    def content(self, image: Tensor) -> Tensor:
        """F_cont = E_cont(X): (B, z, H/4, W/4) of images (B, 3, H, W) of HR size, in [0, 1].

        Large images are read in tiles, one at a time, which the backward pass computes once more.
        """
        grid = (image.shape[2] // 4, image.shape[3] // 4)
        if max(grid) <= TILE:
            return self.vqvae.encode(image)

        def encode(tile: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return checkpoint(self.vqvae.encode, tile, use_reentrant=False)
            return self.vqvae.encode(tile)

        # Of 256 x 256 LR pixels 9 tiles: a third of the work that attention over all of them is.
        parts = [in_tiles(encode, grid, x, tile=2 * TILE // 3, overlap=16) for x in image.split(1)]
        return torch.cat(parts)

    def reconstruct(self, degradation: Tensor, hr: Tensor, content: Tensor) -> Tensor:
        """Rec_lr(F_deg, F_cont): the LR image (B, 3, H/4, W/4), not clamped. Eq. (5).

        Deviation: Rec_lr also sees the bicubic reduction of the HR image, filtered with a kernel
        that F_deg names (most of what a lens and sharpening do is linear; its sum is 1), and adds
        to it. Stage 1 has true pairs, so this gives nothing away, and no detail is lost.
        """
        if self.as_printed:
            return self.rec_lr(degradation, content)
        reduced = resized(hr, *content.shape[2:])
        change = 0.1 * self.kernel(degradation).float()
        change = (change - change.mean(1, keepdim=True)).view(-1, KERNEL, KERNEL)
        lr = reduced + filtered(reduced, change)
        return lr + self.rec_lr(degradation, torch.cat([content, lr], dim=1))

    def named(self, degradation: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (B,), a std on [0, 1], and JPEG quality (B,), 1..100, as the head reads them."""
        return degrade.noise_and_quality(self.head(degradation).float())


# ---- losses -----------------------------------------------------------------------------------


def vqvae_loss(net: Extractors, hr: Tensor) -> dict[str, Tensor]:
    """Reconstruction, codebook and commitment terms of the VQ-VAE (arXiv:1711.00937, Eq. 3)."""
    z = net.vqvae.encode(hr)
    codes, number = net.vqvae.quantize(z)
    latents, target = z + (codes - z).detach(), hr  # straight through
    if not net.as_printed:  # every other image skips the codebook, because the content does, too
        latents, target = torch.cat([latents[::2], z[1::2]]), torch.cat([hr[::2], hr[1::2]])
    mse = F.mse_loss(net.vqvae.decode(latents).float(), target)
    codebook = F.mse_loss(codes, z.detach().float())
    commitment = F.mse_loss(z.float(), codes.detach())
    used = net.vqvae.quantize.used(number)
    return {"loss": mse + codebook + 0.25 * commitment, "psnr": psnr(mse), "codes": used}


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error on [0, 1]."""
    return -10 * mse.detach().log10()


def content_loss(
    net: Extractors, hr: Tensor, cfg: "Config", generator: torch.Generator
) -> dict[str, Tensor]:
    """L_rh: the frozen decoder must find the clean image in degraded content. Eq. (1)-(2)."""
    draw = common.generator(generator.initial_seed())  # on the CPU, so that no GPU is waited for
    lr = degrade.degrade(hr, sample_mixed(len(hr), cfg.recipes, draw), draw)
    degraded = resized(lr, *hr.shape[2:])
    if not net.as_printed:  # every fourth input stays clean: generation reads content from HR
        degraded[::4] = hr[::4]
    mse = F.mse_loss(net.vqvae.decode(net.content(degraded)).float(), hr)  # Eq. (2)
    return {"loss": mse, "psnr": psnr(mse)}


def contrastive_loss(anchor: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """L_cl of codes (B, D), (n, B, D), (n, B, D): a hinge on L2 distances, mean over B. Eq. (4)."""
    to_positive = (anchor - positives).square().sum(-1).add(1e-12).sqrt()  # (n, B)
    to_negative = (anchor - negatives).square().sum(-1).add(1e-12).sqrt()
    return (to_positive - to_negative + margin).clamp(min=0).sum(0).mean()


def sample_mixed(
    batch: int, recipes: Sequence[str], generator: torch.Generator
) -> degrade.Degradation:
    """Parameters for a batch, from each recipe an equal share; a generator of the CPU."""
    first = int(torch.randint(len(recipes), (), generator=generator))  # gets what is left over
    recipes = [*recipes[first:], *recipes[:first]]
    counts = [len(part) for part in torch.arange(batch).tensor_split(len(recipes))]
    parts = zip(counts, recipes, strict=True)
    return degrade.Degradation.cat(
        [degrade.sample_degradation(n, r, generator=generator) for n, r in parts]
    )


def degradation_loss(
    net: Extractors, hr: Tensor, cfg: "Config", generator: torch.Generator
) -> dict[str, Tensor]:
    """L_cl + L_rl for E_deg and Rec_lr. Eq. (3)-(6).

    One batch gives it all: lr[k, b] = D(X_{b+k}, theta_b), indices modulo B. Row k = 0 are the
    anchors, lr[k, b] is a positive of anchor b (same theta, another image), and
    lr[k, b-k] = D(X_b, theta_{b-k}) a negative (same image, another theta).
    """
    B, n = len(hr), cfg.num_samples
    assert n < B, "the batch must be larger than the number of samples n"
    draw = common.generator(generator.initial_seed())  # on the CPU, so that no GPU is waited for
    theta = sample_mixed(B, cfg.recipes, draw)
    if cfg.hr_blur > 0:
        hr = softened(hr, cfg.hr_blur, draw)
    image = (torch.arange(n + 1)[:, None] + torch.arange(B)) % B  # (n+1, B), b + k
    pairs = degrade.Degradation.cat([theta] * (n + 1))
    image = image.to(hr.device, non_blocking=True)
    lr = degrade.degrade(hr[image.flatten()], pairs, draw)  # Eq. (3)
    code = net.e_deg(lr).float().view(n + 1, B, -1)
    negatives = torch.stack([code[k].roll(k, dims=0) for k in range(1, n + 1)])
    contrastive = contrastive_loss(code[0], code[1:], negatives, cfg.margin)

    with torch.no_grad():
        content = net.content(hr)
    # Eq. (5) takes F_deg from the image that is reconstructed. Deviation: the code of the anchor
    # must do for its positives, other scenes, so that it can carry neither content nor one noise.
    ks = range(1) if net.as_printed else range(1, n + 1)
    lr = lr.view(n + 1, B, *lr.shape[1:])
    chosen = torch.cat([image[k] for k in ks])
    target = torch.cat([lr[k] for k in ks])
    lr_hat = net.reconstruct(code[0].repeat(len(ks), 1), hr[chosen], content[chosen])
    mse = (lr_hat.float() - target).square().mean((1, 2, 3))  # Eq. (6), per image
    numbers = {"contrastive": contrastive, "psnr": psnr(mse).mean()}
    if net.as_printed:
        return {"loss": contrastive + mse.mean(), **numbers}

    # Deviation: its logarithm, so that one noisy image does not outweigh all clean ones; and theta
    # is known here, so a head names it: without it the code has little to start from.
    reconstruction = (mse + 1e-5).log().mean() / 10
    physical = theta.to(hr.device).physical().repeat(n + 1, 1)
    read = net.head(code.flatten(0, 1)).float()  # of what a later resize hides, nothing is asked
    named = F.mse_loss(read, physical.where(physical.isfinite(), read.detach()))
    return {"loss": 0.02 * contrastive + reconstruction + named, **numbers, "head": named}


# ---- looking at it ----------------------------------------------------------------------------


@torch.no_grad()
def vqvae_report(net: Extractors, hr: Tensor, path: Path) -> dict[str, Tensor]:
    """Picture and PSNR of reconstructed photos, with and without the codebook, and its use."""
    z = net.vqvae.encode(hr)
    codes, number = net.vqvae.quantize(z)
    with_codes, without = (net.vqvae.decode(x).float().clamp(0, 1) for x in (codes, z))
    rows = list(zip(hr, with_codes, without, strict=True))[:4]
    common.save_sheet(path, ("HR", "with the codebook", "without"), rows)
    return {
        "shown psnr": psnr(F.mse_loss(with_codes, hr)),
        "without codebook": psnr(F.mse_loss(without, hr)),
        "codes used": net.vqvae.quantize.used(number),
    }


@torch.no_grad()
def swap_grid(net: Extractors, hr: Tensor, cfg: "Config", path: Path) -> dict[str, Tensor]:
    """Picture of Rec_lr: content of the column, degradation of the row, whose LR comes first."""
    n = len(hr)
    draw = common.generator(cfg.seed)
    lr = degrade.degrade(hr, sample_mixed(n, cfg.recipes, draw), draw)
    code, content = net.e_deg(lr), net.content(hr)
    made = torch.stack([net.reconstruct(c.expand(n, -1), hr, content) for c in code]).float()
    side = lr.shape[2]
    rows = [
        [common.centre(image, side, 2 * side) for image in (first, *row.clamp(0, 1))]
        for first, row in zip(lr, made, strict=True)
    ]
    common.save_sheet(path, ("LR", "its degradation, other scenes", *[""] * (n - 1)), rows)
    own = made[range(n), range(n)]
    return {"shown psnr": psnr((own - lr).square().mean((1, 2, 3))).mean()}


# ---- configuration and training -----------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of stage 1 (A.1); the defaults are the paper's where it gives any."""

    hr: tuple[str, ...] = ()  # folders of HR photos (default: data/hr, else data/sample/hr)
    out: str = "runs/extractors"  # folder of checkpoints and log
    vqvae: str = ""  # start from these VQ-VAE weights (vq-f4 keys) instead of training them
    start_from: str = ""  # weights of all parts to go on from, of this file
    steps: tuple[int, ...] = (200_000, 200_000, 200_000)  # of the VQ-VAE, of E_cont, of E_deg
    batch_size: int = 8  # HR crops per process, 8 of which give the paper's 64; 0: see BATCH
    crop: int = 256  # HR crop for E_deg, pixels
    vq_crop: int = 256  # HR crop for the VQ-VAE and E_cont, pixels
    vqvae_learning_rate: float = 1e-4
    content_learning_rate: float = 1e-5
    degradation_learning_rate: float = 1e-4  # of E_deg, Rec_lr and the head
    vq_channels: int = 128
    vq_multipliers: tuple[int, ...] = (1, 2, 4)
    vq_blocks: int = 2
    vq_z: int = 3  # channels of the content
    vq_codes: int = 8192
    deg_channels: int = 64
    deg_blocks: int = 16
    deg_dim: int = 2048
    mod_channels: int = 64
    num_samples: int = 3  # n: positives and negatives per anchor
    margin: float = 0.01
    recipes: tuple[str, ...] = ("realesrgan",)  # of D
    hr_blur: float = 0.0  # HR photos are blurred by up to this width, pixels
    as_printed: bool = True  # the losses and networks of the paper, without what is ours (above)
    ema_decay: float = 0.999
    cooldown: float = 0.0  # last share of the steps, in which the learning rate falls to 0
    bf16: bool = True  # where the device has it
    log_every: int = 50
    save_every: int = 500
    accumulate: int = 0  # parts into which a batch is divided; 0: as many as memory asks for
    compile: bool = True  # torch.compile
    seed: int = 0
    device: str = "auto"


SMALL: dict = {
    "steps": (1500, 500, 2000), "batch_size": 0, "crop": 192, "vq_crop": 96,
    "vqvae_learning_rate": 2e-3, "content_learning_rate": 3e-4, "degradation_learning_rate": 1e-3,
    "vq_channels": 16, "vq_z": 4, "vq_codes": 1024, "deg_channels": 24, "deg_blocks": 4,
    "deg_dim": 256, "mod_channels": 48, "num_samples": 1, "ema_decay": 0.995, "compile": False,
    "save_every": 100,
}  # fmt: skip
PRESETS: dict[str, dict] = {
    "small": SMALL
    | {"as_printed": False, "recipes": ("realesrgan", "light", "camera", "wide"), "hr_blur": 1.5},
    "paper": {},
    "as-printed": SMALL,
}
BATCH = {"cuda": 256, "cpu": 16}  # by device, of the presets for small machines
RANGES = common.TRAINING_RANGES | {
    "steps": (0, 2**31), "batch_size": (2, 2**20), "crop": (16, 2**14), "vq_crop": (16, 2**14),
    "vqvae_learning_rate": (0, 1), "content_learning_rate": (0, 1),
    "degradation_learning_rate": (0, 1), "vq_channels": (1, 2**12), "vq_multipliers": (1, 64),
    "vq_blocks": (1, 64), "vq_z": (1, 1024), "vq_codes": (1, 2**20), "deg_channels": (1, 2**12),
    "deg_blocks": (0, 256), "deg_dim": (1, 2**14), "mod_channels": (1, 2**12),
    "num_samples": (1, 2**10), "margin": (0, 1e6), "hr_blur": (0, 4),
}  # fmt: skip


def stored_config(config: dict, name: str) -> Config:
    """The settings in the checkpoint `name`; UserError if they are not of this stage, or wrong."""
    is_stage_1 = isinstance(config, dict) and "deg_dim" in config
    common.require(is_stage_1, f"{name}: not a checkpoint of extractors.py (give that one).")
    own = {key: value for key, value in config.items() if key != "began"}
    cfg = common.from_dict(Config, own, name)
    common.check_ranges(cfg, RANGES, f"{name}: ")
    return cfg


def load(state: dict, name: str) -> Extractors:
    """The networks in a checkpoint of this stage, on the CPU; UserError if they can't be used."""
    cfg = stored_config(state["config"], name)
    with torch.device("meta"):  # nothing is allocated before the shapes are found to be right
        net = Extractors(cfg)
    common.put_weights(net, state, name)
    return net


def checked(cfg: Config, rt: common.Runtime) -> Config:
    """The settings with the batch of this device and three numbers of steps; UserError if wrong."""
    three = cfg.steps if len(cfg.steps) == 3 else cfg.steps[:1] * 3
    cfg = replace(cfg, batch_size=cfg.batch_size or BATCH.get(rt.device.type, 16))
    numbers = "--steps takes one number, or one for each of the parts."
    common.require(len(cfg.steps) in (1, 3), numbers)
    common.check_ranges(cfg, RANGES)
    for flag, crop in (("--crop", cfg.crop), ("--vq-crop", cfg.vq_crop)):
        common.require(crop % 16 == 0, f"{flag} {crop}: must be a multiple of 16.")
    more = f"--batch-size {cfg.batch_size}: must be larger than --num-samples {cfg.num_samples}."
    common.require(cfg.batch_size > cfg.num_samples, more)
    common.check_parts(cfg, least=cfg.num_samples + 1)
    for recipe in cfg.recipes:
        known = recipe in degrade.RECIPES
        common.require(known, f"--recipes {recipe}: no such recipe of degrade.py.")
    files = [Path(cfg.out) / f"{part}.pt" for part in ("vqvae", "content", "last")]
    for i, (earlier, steps) in enumerate(zip(files, three, strict=True)):
        goes_on = common.step_of(earlier) < steps and not (cfg.vqvae and i == 0)
        for later in files[i + 1 :] if goes_on else ():
            began = f"{later} began from another {earlier.name} than this command would leave"
            way_out = "delete it to train that part again, or give another --out"
            common.require(not later.is_file(), f"{began}: {way_out}.")
    return replace(cfg, steps=three)


def train_vqvae(
    cfg: Config, rt: common.Runtime, net: Extractors, crops: Crops, few: Tensor
) -> None:
    """Part 1: the VQ-VAE on HR photos."""
    path, vqvae = Path(cfg.out) / "vqvae.pt", net.vqvae
    groups = [{"params": [*vqvae.parameters()], "lr": cfg.vqvae_learning_rate}]
    began = common.fingerprint(net) if cfg.start_from else ""
    run = common.Run(cfg, rt, net, groups, path, cfg.steps[0], began=began,
                     preview=lambda: vqvae_report(net, few, path.with_suffix(".png")))  # fmt: skip
    for hr, draw in run.batches(crops, least=2):
        with rt.autocast(cfg.bf16):
            if run.step % 10 == 0 and run.part == 0:
                vqvae.restart_codes(hr, draw)
            losses = vqvae_loss(net, hr)
        run.update(losses)


def train_content(
    cfg: Config, rt: common.Runtime, net: Extractors, crops: Crops, few: Tensor
) -> None:
    """Part 2: E_cont, the encoder, on degraded photos, against the frozen decoder. Eq. (1)-(2)."""
    path, vqvae = Path(cfg.out) / "content.pt", net.vqvae
    tuned = [*vqvae.encoder.parameters(), *vqvae.quant_conv.parameters()]
    groups = [{"params": tuned, "lr": cfg.content_learning_rate}]
    run = common.Run(cfg, rt, net, groups, path, cfg.steps[1], began=common.fingerprint(vqvae),
                     preview=lambda: vqvae_report(net, few, path.with_suffix(".png")))  # fmt: skip
    for hr, draw in run.batches(crops):
        with rt.autocast(cfg.bf16):
            losses = content_loss(net, hr, cfg, draw)
        run.update(losses)


def train_degradation(
    cfg: Config, rt: common.Runtime, net: Extractors, crops: Crops, few: Tensor
) -> None:
    """Part 3: E_deg and Rec_lr; E_cont stays as it is. Eq. (3)-(6)."""
    path, began = Path(cfg.out) / "last.pt", common.fingerprint(net.vqvae)
    tuned = [p for name, p in net.named_parameters() if not name.startswith("vqvae.")]
    groups = [{"params": tuned, "lr": cfg.degradation_learning_rate}]
    run = common.Run(
        cfg, rt, net, groups, path, cfg.steps[2], began=began,
        preview=lambda: swap_grid(net, few[:4], cfg, path.with_suffix(".png")),
    )  # fmt: skip
    for hr, draw in run.batches(crops, least=cfg.num_samples + 1):
        with rt.autocast(cfg.bf16):
            losses = degradation_loss(net, hr, cfg, draw)
        run.update(losses)


def train(cfg: Config, rt: common.Runtime) -> None:
    """The three parts of stage 1, each resuming from its own checkpoint."""
    cfg = checked(cfg, rt)
    net, out = Extractors(cfg), Path(cfg.out)
    if cfg.start_from:
        common.load_weights(net, cfg.start_from, "--start-from")
    if cfg.vqvae:
        load_vqvae(net.vqvae, cfg.vqvae)
    photos = Photos(common.find_photos(cfg.hr, "hr", "--hr", packed=True), out / "photos/hr", rt)
    rows = np.arange(len(photos.table))
    held_out = rows[::50] if len(rows) >= 50 else rows[:0]  # looked at, not trained on
    rows = np.setdiff1d(rows, held_out)
    vq_crops = Crops(photos, cfg.vq_crop, cfg.batch_size, cfg.seed, flag="--vq-crop", rows=rows)
    crops = Crops(photos, cfg.crop, cfg.batch_size, cfg.seed, rows=rows)
    looked_at = held_out if len(held_out) else rows
    shown = Crops(photos, cfg.crop, 8, cfg.seed, stream=9, rows=looked_at)
    few = shown.batch(0, 8).to(rt.device).float() / 255
    if rt.is_main:
        print(cfg)
        print(f"{len(crops.rows)} HR photos, {len(held_out)} held out, {crops.left_out} smaller "
              f"than the crop; VQ-VAE {common.count_parameters(net.vqvae)}, "
              f"E_deg {common.count_parameters(net.e_deg)}, "
              f"Rec_lr {common.count_parameters(net.rec_lr)}")  # fmt: skip
    if cfg.compile:
        networks = [net.vqvae.encoder, net.vqvae.decoder, net.e_deg, net.rec_lr]
        common.compile_networks(networks, rt)
    if not cfg.vqvae:
        train_vqvae(cfg, rt, net, vq_crops, few)
    train_content(cfg, rt, net, vq_crops, few)
    train_degradation(cfg, rt, net, crops, few)


if __name__ == "__main__":
    common.launch(train, Config, PRESETS, __doc__)
