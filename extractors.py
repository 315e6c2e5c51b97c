"""Stage 1: what a picture shows (E_cont), what the camera did to it (E_deg). Sections 2.1, A.1.

In: clean HR photos. Out: runs/extractors/last.pt with both extractors, and Rec_lr, which joins
them again. Three parts are trained one after the other: a VQ-VAE on HR photos; its encoder on
degraded photos against the frozen decoder (Eq. 1-2); E_deg together with Rec_lr (Eq. 3-6).

    python extractors.py
    torchrun --nproc_per_node=8 extractors.py --hr data/hr --preset paper
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import degrade

# ---- content extractor: the VQ-VAE, with the structure and keys of the public vq-f4 -------------


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm of 32 groups, fewer if narrow: a group of one channel loses contrast."""
    most = max(1, min(32, channels // 4))
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 convolution where the width changes."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.conv2.weight)  # start as the identity: trains faster

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Single-head self-attention over all pixels, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H*W, C)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


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
            group_norm(widths[-1]),
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
        self.norm_out, self.conv_out = group_norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

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

    def decode(self, z: Tensor) -> Tensor:
        """Rec_hr: image (B, 3, H, W) of latents (B, z, H/4, W/4); not clamped to [0, 1]."""
        return (self.decoder(self.post_quant_conv(z)) + 1) / 2


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


class DegradationExtractor(nn.Module):
    """E_deg (Fig. 7): a convolution, residual blocks, pooling, a mapping of four layers.

    Deviation: with `statistics`, those of `dct_statistics` are pooled, too. What a camera leaves
    in an image is mostly a matter of spreads at each frequency, and in the blocks of JPEG, which
    convolutions and means hardly see.
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
    """Read public first-stage weights: safetensors or a plain state dict, or a checkpoint of ours.

    UserError if a weight is missing or of another shape; what the VQ-VAE does not have is ignored.
    """
    state = common.load_checkpoint(path)
    state = state.get("state_dict", state.get("ema", state))
    state = {key.removeprefix("vqvae."): value for key, value in state.items()}
    own = vqvae.state_dict()
    wrong = [
        key for key, value in own.items() if key not in state or state[key].shape != value.shape
    ]
    common.require(
        not wrong,
        f"--vqvae {path}: {len(wrong)} of {len(own)} weights are missing or of another shape, for "
        f"instance {next(iter(wrong), '')}: --preset paper has the sizes of the public vq-f4.",
    )
    vqvae.load_state_dict({key: state[key] for key in own})


class Extractors(nn.Module):
    """The networks of stage 1: E_cont, E_deg, Rec_lr, and the head that names what E_deg sees."""

    def __init__(self, cfg: "Config") -> None:
        super().__init__()
        self.quantize_content, self.skip = cfg.quantize_content, cfg.skip
        self.head_trained = cfg.head_weight > 0
        self.vqvae = VQVAE(
            cfg.vq_channels, cfg.vq_multipliers, cfg.vq_blocks, cfg.vq_z, cfg.vq_codes
        )
        self.e_deg = DegradationExtractor(
            cfg.deg_channels, cfg.deg_blocks, cfg.deg_dim, cfg.statistics
        )
        c_in = cfg.vq_z + 3 * cfg.skip
        self.rec_lr = ModulationBlock(c_in, cfg.deg_dim, cfg.mod_channels, 3, cfg.jpeg_grid)
        self.kernel = nn.Linear(cfg.deg_dim, cfg.kernel**2) if cfg.skip and cfg.kernel else None
        if self.kernel is not None:
            nn.init.zeros_(self.kernel.weight)
            nn.init.zeros_(self.kernel.bias)
        self.head = nn.Sequential(  # codes are small: without the norm it hardly learns
            nn.LayerNorm(cfg.deg_dim), nn.Linear(cfg.deg_dim, 128), nn.SiLU(),
            nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 5),
        )  # fmt: skip

    def content(self, image: Tensor) -> Tensor:
        """F_cont = E_cont(X): (B, z, H/4, W/4) of images (B, 3, H, W) of HR size, in [0, 1]."""
        z = self.vqvae.encode(image)  # through the codebook, gradients pass straight
        return z + (self.vqvae.quantize(z)[0] - z).detach() if self.quantize_content else z

    def reconstruct(self, degradation: Tensor, hr: Tensor, content: Tensor) -> Tensor:
        """Rec_lr(F_deg, F_cont): the LR image (B, 3, H/4, W/4), not clamped. Eq. (5).

        Deviation: with `skip`, Rec_lr also sees the bicubic reduction of the HR image and adds its
        output to it. Stage 1 has true pairs, so this gives nothing away, and no detail is lost.
        With a `kernel`, the reduction is first filtered with one that F_deg names: most of what a
        lens and a camera's sharpening do is linear. Its sum is 1, so that no colour drifts.
        """
        if not self.skip:
            return self.rec_lr(degradation, content)
        reduced = resized(hr, *content.shape[2:])
        if self.kernel is not None:
            change = 0.1 * self.kernel(degradation).float()
            change = change - change.mean(1, keepdim=True)
            side = math.isqrt(change.shape[1])
            reduced = reduced + filtered(reduced, change.view(-1, side, side))
        return reduced + self.rec_lr(degradation, torch.cat([content, reduced], dim=1))

    def named(self, degradation: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (B,), a std on [0, 1], and JPEG quality (B,), 1..100, as the head reads them."""
        return degrade.noise_and_quality(self.head(degradation).float())


# ---- losses -----------------------------------------------------------------------------------


def vqvae_loss(
    net: Extractors, hr: Tensor, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Reconstruction, codebook and commitment terms of the VQ-VAE (arXiv:1711.00937, Eq. 3)."""
    z = net.vqvae.encode(hr)
    codes, number = net.vqvae.quantize(z)
    latents = z + (codes - z).detach()  # straight through
    # Not in the paper: every other image skips the codebook, because the content may, too.
    latents = torch.cat([latents[::2], z[1::2]])
    target = torch.cat([hr[::2], hr[1::2]])
    mse = F.mse_loss(net.vqvae.decode(latents).float(), target)
    codebook = F.mse_loss(codes, z.detach().float())
    commitment = F.mse_loss(z.float(), codes.detach())
    used = hr.new_zeros(len(net.vqvae.quantize.embedding.weight))
    used = used.index_fill_(0, number.flatten(), 1).sum()
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
    # Not in the paper: every fourth input stays clean, because generation reads content from HR.
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
    # Eq. (5) takes F_deg from the image that is reconstructed. Deviation: `across` scenes, the code
    # of the anchor must do for its positives, so that it can carry neither content nor one noise.
    lr = lr.view(n + 1, B, *lr.shape[1:])
    ks = range(1, n + 1) if cfg.across else range(1)
    chosen = torch.cat([image[k] for k in ks])
    target = torch.cat([lr[k] for k in ks])
    lr_hat = net.reconstruct(code[0].repeat(len(ks), 1), hr[chosen], content[chosen])
    mse = (lr_hat.float() - target).square().mean((1, 2, 3))  # Eq. (6), per image
    # Deviation: its logarithm, so that one noisy image does not outweigh all clean ones.
    reconstruction = (mse + 1e-5).log().mean() / 10 if cfg.log_mse else mse.mean()

    # Not in the paper: theta is known here, so a small head names it. Without it the code has
    # little to start from.
    physical = theta.to(hr.device).physical().repeat(n + 1, 1)
    read = net.head(code.flatten(0, 1)).float()  # of what a later resize hides, nothing is asked
    named = F.mse_loss(read, physical.where(physical.isfinite(), read.detach()))
    loss = cfg.contrastive_weight * contrastive + reconstruction + cfg.head_weight * named
    return {
        "loss": loss,
        "contrastive": contrastive,
        "psnr": psnr(mse).mean(),
        "head": named,
    }


# ---- looking at it ----------------------------------------------------------------------------


@torch.no_grad()
def vqvae_report(net: Extractors, hr: Tensor, path: Path) -> dict[str, float]:
    """Picture and PSNR of reconstructed photos, with and without the codebook, and its use."""
    z = net.vqvae.encode(hr)
    codes, number = net.vqvae.quantize(z)
    with_codes, without = (net.vqvae.decode(x).float().clamp(0, 1) for x in (codes, z))
    rows = list(zip(hr, with_codes, without, strict=True))[:4]
    common.save_sheet(path, ("HR", "with the codebook", "without"), rows)
    return {
        "shown psnr": float(psnr(F.mse_loss(with_codes, hr))),
        "without codebook": float(psnr(F.mse_loss(without, hr))),
        "codes used": number.unique().numel(),
    }


@torch.no_grad()
def swap_grid(net: Extractors, hr: Tensor, cfg: "Config", path: Path) -> dict[str, float]:
    """Picture of Rec_lr: content of the column, degradation of the row, whose LR comes first."""
    n = len(hr)
    lr = degrade.degrade(hr, sample_mixed(n, cfg.recipes, common.generator(cfg.seed)))
    code, content = net.e_deg(lr), net.content(hr)
    made = torch.stack([net.reconstruct(c.expand(n, -1), hr, content) for c in code]).float()
    side = lr.shape[2]
    rows = [
        [common.centre(image, side, 2 * side) for image in (first, *row.clamp(0, 1))]
        for first, row in zip(lr, made, strict=True)
    ]
    common.save_sheet(path, ("LR", "its degradation, other scenes", *[""] * (n - 1)), rows)
    own = made[range(n), range(n)]
    return {"shown psnr": float(psnr((own - lr).square().mean((1, 2, 3))).mean())}


# ---- configuration and training -----------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of stage 1 (A.1); the defaults are the paper's where it gives any."""

    hr: tuple[str, ...] = ()  # folders of HR photos (default: data/hr, else data/sample/hr)
    out: str = "runs/extractors"  # folder of checkpoints and log
    vqvae: str = ""  # start from these VQ-VAE weights (vq-f4 keys) instead of training them
    start_from: str = ""  # weights of all parts to go on from, of this file
    steps: tuple[int, ...] = (200_000, 200_000, 200_000)  # of the VQ-VAE, of E_cont, of E_deg
    batch_size: int = 8  # HR crops per process; 8 processes give the paper's 64
    crop: int = 256  # HR crop for E_deg, pixels
    vq_crop: int = 256  # HR crop for the VQ-VAE and E_cont, pixels
    vqvae_learning_rate: float = 1e-4
    content_learning_rate: float = 1e-5
    degradation_learning_rate: float = 1e-4  # of E_deg and Rec_lr; 0 freezes them
    head_learning_rate: float = 1e-4  # of the head that names theta
    vq_channels: int = 128
    vq_multipliers: tuple[int, ...] = (1, 2, 4)
    vq_blocks: int = 2
    vq_z: int = 3  # channels of the content
    vq_codes: int = 8192
    deg_channels: int = 64
    deg_blocks: int = 16
    deg_dim: int = 2048
    statistics: bool = True  # E_deg pools sizes of DCT coefficients, too; the paper: no
    kernel: int = 9  # Rec_lr filters the reduction, side in LR pixels; 0, the paper: no
    jpeg_grid: bool = False  # Rec_lr and M know JPEG's blocks of 8 x 8; the paper: no
    mod_channels: int = 64
    num_samples: int = 3  # n: positives and negatives per anchor
    margin: float = 0.01
    recipes: tuple[str, ...] = ("realesrgan", "light", "camera")  # of D; the paper: realesrgan
    hr_blur: float = 0.0  # HR photos are blurred by up to this width, pixels; the paper: 0
    across: bool = True  # reconstruct other scenes from a code; the paper: no
    skip: bool = True  # Rec_lr adds to the bicubic reduction; the paper: no
    log_mse: bool = True  # L_rl is the logarithm of each image's error; the paper: no
    head_weight: float = 0.1  # of the head that names theta; the paper: 0
    contrastive_weight: float = 0.02
    quantize_content: bool = False  # content passes the codebook
    ema_decay: float = 0.999
    cooldown: float = 0.0  # last share of the steps, in which the learning rate falls to 0
    grad_clip: float = 1.0
    bf16: bool = True  # where the device has it
    log_every: int = 50
    save_every: int = 500
    accumulate: int = 1  # batches per step and process
    compile: bool = True  # torch.compile
    tensorboard: bool = False  # log there, too
    seed: int = 0
    device: str = "auto"


PRESETS: dict[str, dict] = {
    "paper": {},
    "small": {
        "steps": (1500, 500, 2000),
        "crop": 192,
        "vq_crop": 96,
        "vqvae_learning_rate": 2e-3,
        "content_learning_rate": 3e-4,
        "degradation_learning_rate": 1e-3,
        "head_learning_rate": 1e-3,
        "vq_channels": 16,
        "vq_z": 4,
        "vq_codes": 1024,
        "deg_channels": 24,
        "deg_blocks": 4,
        "mod_channels": 48,
        "jpeg_grid": True,
        "deg_dim": 256,
        "batch_size": 16,
        "num_samples": 1,
        "recipes": ("realesrgan", "light", "camera", "wide"),
        "hr_blur": 1.5,
        "head_weight": 1.0,
        "ema_decay": 0.995,
        "compile": False,
        "save_every": 100,
    },
}


def train(cfg: Config, rt: common.Runtime) -> None:
    """The three parts of stage 1, each resuming from its own checkpoint."""
    steps = cfg.steps if len(cfg.steps) == 3 else cfg.steps[:1] * 3
    common.require(
        len(cfg.steps) in (1, 3), "--steps takes one number, or one for each of the parts."
    )
    for flag, crop in (("--crop", cfg.crop), ("--vq-crop", cfg.vq_crop)):
        common.require(crop > 0 and crop % 16 == 0, f"{flag} {crop}: must be a multiple of 16.")
    common.require(
        cfg.batch_size > cfg.num_samples,
        f"--batch-size {cfg.batch_size}: must be larger than --num-samples {cfg.num_samples}.",
    )
    common.require(cfg.num_samples >= 1, f"--num-samples {cfg.num_samples}: must be at least 1.")
    common.require(
        cfg.kernel == 0 or (cfg.kernel > 0 and cfg.kernel % 2 == 1),
        f"--kernel {cfg.kernel}: must be odd, or 0.",
    )
    common.require(0 <= cfg.hr_blur <= 4, f"--hr-blur {cfg.hr_blur}: must be in 0..4 pixels.")
    for recipe in cfg.recipes:
        common.require(
            recipe in degrade.RECIPES, f"--recipes {recipe}: no such recipe of degrade.py."
        )
    net, out = Extractors(cfg), Path(cfg.out)
    if cfg.start_from:
        common.load_weights(net, cfg.start_from, "--start-from")
    files = common.find_photos(cfg.hr, "hr", "--hr", packed=True)
    held_out = files[::50] if len(files) >= 50 else []  # looked at, not trained on
    files = [file for i, file in enumerate(files) if i % 50 or not held_out]
    data, vq_data = (
        [common.PhotoCrops(files, crop, cfg.batch_size, cfg.seed, rt)]
        for crop in (cfg.crop, cfg.vq_crop)
    )
    shown = common.PhotoCrops(held_out or files, cfg.crop, 8, cfg.seed, rt, stream=9)
    few = torch.stack([shown[i] for i in range(8)]).to(rt.device)
    if rt.is_main:
        print(cfg)
        print(f"{data[0].count} HR photos, {len(held_out)} held out; "
              f"VQ-VAE {common.count_parameters(net.vqvae)}, "
              f"E_deg {common.count_parameters(net.e_deg)}, "
              f"Rec_lr {common.count_parameters(net.rec_lr)}")  # fmt: skip

    vqvae = net.vqvae

    def revive(hr: Tensor, generator: torch.Generator) -> None:
        with torch.no_grad(), rt.autocast(cfg.bf16):
            vqvae.quantize.restart(vqvae.encode(hr), generator)

    look = functools.partial(vqvae_report, net, few)
    degradation = [net.e_deg, net.rec_lr, *([net.kernel] if net.kernel else [])]
    # name, loss, photos, trained modules and their learning rate, picture, refresh
    parts: list[tuple] = [
        ("vqvae", vqvae_loss, vq_data, [([vqvae], cfg.vqvae_learning_rate)], look, revive),
        (
            "content",
            functools.partial(content_loss, cfg=cfg),
            vq_data,
            [([vqvae.encoder, vqvae.quant_conv], cfg.content_learning_rate)],
            look,
            None,
        ),
        (
            "last",
            functools.partial(degradation_loss, cfg=cfg),
            data,
            [(degradation, cfg.degradation_learning_rate), ([net.head], cfg.head_learning_rate)],
            functools.partial(swap_grid, net, few[:4], cfg),
            None,
        ),
    ]
    if cfg.vqvae:
        load_vqvae(vqvae, cfg.vqvae)
        parts, steps = parts[1:], steps[1:]
    for (name, loss, photos, trained, picture, refresh), n in zip(parts, steps, strict=True):
        groups = [
            {"params": [p for m in modules for p in m.parameters() if rate > 0], "lr": rate}
            for modules, rate in trained
        ]
        common.fit(
            rt,
            net,
            loss,
            photos,
            groups,
            out / f"{name}.pt",
            cfg,
            n,
            asdict(cfg),
            compiled=[vqvae.encoder, vqvae.decoder, net.e_deg, net.rec_lr],
            preview=functools.partial(picture, out / f"{name}.png"),
            refresh=refresh,
        )


if __name__ == "__main__":
    common.launch(train, Config, PRESETS, __doc__)
