"""extractors.py: the VQ-VAE's structure, each network, the equations, training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import additions
import degrade
import extractors
from common import UserError
from common.checkpoint import count_parameters, load_checkpoint
from common.images import resized, save_image
from common.runtime import make_generator
from extractors import Config, Extractors
from tests.commands import assert_refused, run
from tests.fake_cuda import counted_memory, fake_cuda, training_memory
from tests.tiny import CPU, equal, moved
from tests.tiny import STAGE_1 as TINY

TRAINED_WITH_E_DEG = ("e_deg.", "rec_lr.", "head.")


def drawn_batch(batch: int, height: int, width: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1]: a wave each, and a little noise."""
    gen = make_generator(batch, height, width)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    period = 3 + 20 * torch.rand(batch, 3, 2, 1, 1, generator=gen)
    waves = 0.5 + 0.3 * torch.sin(y / period[:, :, 0] + x / period[:, :, 1])
    return (waves + 0.03 * torch.randn(waves.shape, generator=gen)).clamp(0, 1)


def built(**changes: object) -> Extractors:
    """A tiny network in which no weight is zero, so that every layer has an effect."""
    torch.manual_seed(0)
    return moved(Extractors(replace(TINY, **changes)), 0.02)  # type: ignore[arg-type]


def named(net: nn.Module, *prefixes: str) -> set[str]:
    return {k for k, _ in net.named_parameters() if k.startswith(prefixes)}


def set_to_zero(*layers: nn.Module) -> None:
    for layer in layers:
        for p in layer.parameters():
            nn.init.zeros_(p)


# ---- VQ-VAE -------------------------------------------------------------------------------------


def test_vqvae_has_the_keys_and_shapes_of_the_public_vq_f4(shared):
    with torch.device("meta"):
        net = extractors.VQVAE((128, 256, 512), 2, 3, 8192)
    assert count_parameters(net).startswith("55.3")
    table = shared / "vq-f4-keys.tsv"
    if not table.is_file():
        pytest.skip(f"no {table}")
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    expected = {key: tuple(map(int, shape.split("x"))) for key, shape in rows}
    assert len(expected) == 205
    assert {key: tuple(v.shape) for key, v in net.state_dict().items()} == expected


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_matches_a_softmax_written_out(heads):
    torch.manual_seed(0)
    net, x = extractors.Attention(8, heads), torch.randn(2, 8, 3, 4)
    h = net.norm(x)
    q, k, v = (f(h).view(2 * heads, 8 // heads, 12) for f in (net.q, net.k, net.v))  # (., C', N)
    weight = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / (8 / heads) ** 0.5, dim=2)
    expected = x + net.proj_out(torch.einsum("bqk,bck->bcq", weight, v).reshape(2, 8, 3, 4))
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attention_by_products_is_the_same_attention(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(extractors, "SCORES", 1000)  # 6 queries at a time
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 1, 80, 512).to(dtype)
    found = extractors.attention_by_products(q, k, v)
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("preset", "fast"), [("paper", False), ("small", True)])
def test_on_a_gpu_the_wide_head_of_the_paper_is_computed_by_products(preset, fast, monkeypatch):
    calls = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape[-1])
        return v * 1

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", kernel)
    with fake_cuda() as launches, torch.no_grad():
        with torch.device("cuda:0"):
            net = Extractors(Config(**extractors.PRESETS[preset]))
            hr = torch.zeros(1, 3, 1024, 1024)
        assert net.content(hr).shape[2:] == (256, 256)
    assert calls == ([64] * 9 if fast else [])  # of 9 tiles
    assert launches.names["bmm"] == (0 if fast else 18)


def test_group_norm_is_torch_s_in_float32_and_keeps_bf16():
    norm, x = extractors.GroupNorm(24), torch.randn(2, 24, 5, 7, generator=make_generator(0))
    nn.init.normal_(norm.weight)
    expected = nn.functional.group_norm(x, 6, norm.weight, norm.bias, 1e-6)  # four channels each
    torch.testing.assert_close(norm(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_large_content_is_read_in_tiles_with_the_same_gradient(monkeypatch):
    """Also where the backward pass computes each tile again."""
    monkeypatch.setattr(extractors, "TILE", 33)
    net, hr, seen = built(), drawn_batch(2, 152, 136), []
    down, first = net.vqvae.encoder.down.forward, net.vqvae.encoder.conv_in.weight
    monkeypatch.setattr(
        net.vqvae.encoder.down, "forward", lambda x: seen.append(x.shape) or down(x)
    )
    content = net.content(hr)
    assert content.shape == (2, 3, 38, 34)
    assert all(shape[0] == 1 and max(shape[2:]) <= 88 for shape in seen)
    with torch.no_grad():
        assert torch.equal(content, net.content(hr))
    seen.clear()
    found = torch.autograd.grad(content.square().sum(), first)[0]
    assert len(seen) > 0  # computed again
    monkeypatch.setattr(extractors, "checkpoint", lambda function, x, **_: function(x))
    expected = torch.autograd.grad(net.content(hr).square().sum(), first)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def gradient_of_content(net: Extractors, hr: Tensor, *seed: int) -> Tensor:
    """Of a sum over F_cont, for the first convolution; a seed makes it an estimate."""
    content = net.content(hr, *map(make_generator, seed)).square()
    return torch.autograd.grad(content.sum(), net.vqvae.encoder.conv_in.weight)[0]


def test_the_gradient_through_one_random_tile_is_exact_in_the_mean(monkeypatch):
    monkeypatch.setattr(extractors, "TILE", 33)
    net, hr, seeds = built(), drawn_batch(1, 152, 136), range(60)
    exact = gradient_of_content(net, hr)
    estimates = [gradient_of_content(net, hr, seed) for seed in seeds]
    of_tiles = {x.sum().item(): x for x in estimates}
    assert 9 <= len(of_tiles) < 60  # the draws fall on all tiles
    size = exact.abs().max().item()
    mean = torch.stack([*of_tiles.values()]).mean(0)
    torch.testing.assert_close(mean, exact, rtol=1e-4, atol=1e-5 * size)
    error = (torch.stack(estimates).mean(0) - exact).norm() / exact.norm()
    single = torch.stack([(x - exact).norm() / exact.norm() for x in of_tiles.values()]).mean()
    assert error < single / 2  # and about equally often on each


def test_one_random_tile_changes_no_value_and_each_image_draws_its_own(monkeypatch):
    monkeypatch.setattr(extractors, "TILE", 33)
    net, hr, trained = built(), drawn_batch(4, 152, 136), []
    encode = net.vqvae.encode

    def spy(tile: Tensor, again: bool = False) -> Tensor:
        trained.append(torch.is_grad_enabled())
        return encode(tile, again)

    expected = net.content(hr)
    monkeypatch.setattr(net.vqvae, "encode", spy)
    assert torch.equal(net.content(hr, make_generator(0)), expected)
    rows = torch.tensor(trained).view(4, -1)  # images, tiles
    assert rows.sum(1).tolist() == [1] * 4 and len(rows.unique(dim=0)) > 1
    trained.clear()
    assert torch.equal(
        net.content(hr[..., :128, :128], make_generator(0)), encode(hr[..., :128, :128])
    )
    assert trained == [True]  # an image of one tile has its whole gradient


def test_the_tile_has_a_gradient_under_autocast_too(monkeypatch):
    """Autocast must not reuse weights that it has converted for a tile without gradient."""
    monkeypatch.setattr(extractors, "TILE", 33)
    net, hr = built(), drawn_batch(1, 152, 136)
    for seed in range(4):
        exact = gradient_of_content(net, hr, seed)
        with torch.autocast("cpu", torch.bfloat16):
            found = gradient_of_content(net, hr, seed)
        assert (found - exact).norm() < 0.2 * exact.norm()


def test_a_frozen_encoder_builds_no_graph_and_computes_nothing_again(monkeypatch):
    monkeypatch.setattr(extractors, "TILE", 33)
    monkeypatch.setattr(extractors, "checkpoint", None)
    net = built().requires_grad_(False)
    net.e_deg.requires_grad_(True)
    for generator in (None, make_generator(0)):
        assert not net.content(drawn_batch(1, 152, 136), generator).requires_grad


def test_a_batch_is_read_a_few_images_at_a_time_with_the_same_content(monkeypatch):
    net, hr, seen = built(), drawn_batch(5, 32, 48), []
    encode = net.vqvae.encode
    expected = torch.cat([encode(x) for x in hr.split(2)])
    monkeypatch.setattr(net.vqvae, "encode", lambda x: seen.append(len(x)) or encode(x))
    monkeypatch.setattr(extractors, "VALUES", 2 * 8 * 32 * 48 + 5)
    assert torch.equal(net.content(hr), expected) and seen == [2, 2, 1]
    monkeypatch.setattr(extractors, "VALUES", 7)  # less than an image has
    assert net.content(hr).shape == expected.shape and seen[3:] == [1] * 5


def rounded(x: Tensor) -> Tensor:
    """The 10 bits of a mantissa that TF32 keeps."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def distances_by_product(a: Tensor, b: Tensor) -> Tensor:
    """What cdist computes of more than 25 rows: |a|^2 - 2 a b + |b|^2 as one product."""
    ones_a, ones_b = torch.ones_like(a[:, :1]), torch.ones_like(b[:, :1])
    left = torch.cat([-2 * a, a.square().sum(1, keepdim=True), ones_a], dim=1)
    right = torch.cat([b, ones_b, b.square().sum(1, keepdim=True)], dim=1)
    return (rounded(left) @ rounded(right).T).clamp(min=0).sqrt()


class TF32(TorchDispatchMode):
    """Rounds the factors of all matrix products, as a GPU does where TF32 is allowed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_euclidean_dist", "_cdist_forward"):
            return distances_by_product(*args[:2])
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            args = [rounded(x.contiguous()) if isinstance(x, Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))


def test_tf32_gives_no_latent_a_wrong_entry():
    """As many entries as the paper's; the distances of cdist give many latents another one."""
    torch.manual_seed(0)
    quantizer, z = extractors.Quantizer(8192, 3), 1 + 0.3 * torch.randn(1, 3, 40, 60)
    nn.init.normal_(quantizer.embedding.weight, mean=1, std=0.3)
    flat, table = z.permute(0, 2, 3, 1).flatten(0, 2), quantizer.embedding.weight.detach()
    exact = torch.cdist(
        flat.double(), table.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).argmin(1)
    with TF32():
        number = quantizer(z)[1].flatten()
        by_cdist = torch.cdist(flat, table).argmin(1)
    assert (by_cdist != exact).float().mean() > 0.3
    assert (number != exact).sum() == 0


def test_quantizer_returns_the_nearest_code():
    torch.manual_seed(0)
    quantizer, z = extractors.Quantizer(50, 3), torch.randn(2, 3, 40, 60)  # more than one split
    nn.init.normal_(quantizer.embedding.weight)
    entries, number = quantizer(z)
    table = quantizer.embedding.weight.detach().double()
    distance = (z.double()[:, None] - table[:, :, None, None]).square().sum(2)  # (2, 50, 40, 60)
    chosen = distance.gather(1, number[:, None])
    assert (chosen - distance.amin(1, keepdim=True)).max() < 1e-4  # two entries may tie in float32
    assert torch.equal(entries.double(), table[number].permute(0, 3, 1, 2))
    assert torch.equal(quantizer.used(number), (number.flatten().bincount(minlength=50) > 0).long())


def test_gradient_passes_straight_through_the_codebook():
    """The encoder's gradient is the one of the decoder's input, plus that of the commitment."""
    net, hr = built(as_printed=True), drawn_batch(1, 32, 32)
    latents, encode, decode = [], net.vqvae.encode, net.vqvae.decode

    def kept(x: Tensor) -> Tensor:
        x.retain_grad()
        latents.append(x)
        return x

    net.vqvae.encode = lambda image: kept(encode(image))
    net.vqvae.decode = lambda z: decode(kept(z))
    extractors.vqvae_loss(net, hr)["loss"].backward()
    z, into_decoder = latents
    entries = net.vqvae.quantize(z)[0]
    commitment = 0.25 * 2 * (z - entries).detach() / z.numel()
    torch.testing.assert_close(z.grad, into_decoder.grad + commitment)
    assert into_decoder.grad.abs().max() > 0


def test_restart_moves_only_unused_entries_and_onto_latents():
    net, hr = built(vq_codes=200).vqvae, drawn_batch(1, 8, 8)
    latents = net.encode(hr).detach()
    before = net.quantize.embedding.weight.detach().clone()
    used = net.quantize.used(net.quantize(latents)[1]) > 0
    net.restart_entries(hr, make_generator(0))
    after = net.quantize.embedding.weight.detach()
    moved = (before != after).any(1)
    assert torch.equal(moved, ~used) and moved.any()
    latents = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    assert (after[moved][:, None] == latents).all(-1).any(1).all()


# ---- degradation extractor, modulation, Rec_lr --------------------------------------------------


def test_degradation_extractor_has_the_layers_of_the_paper_and_takes_any_size():
    cfg = Config()
    net = extractors.DegradationExtractor(cfg.deg_channels, cfg.deg_blocks, cfg.deg_dim, False)
    assert len(net.body) == 16
    assert sum(isinstance(layer, nn.Conv2d) for layer in net.mapping) == 4
    for size in ((1, 1), (5, 9)):
        assert net(drawn_batch(2, *size)).shape == (2, 2048)
        assert built().e_deg(drawn_batch(2, *size)).shape == (2, 16)


def test_dct_statistics_agree_with_scipy():
    lr = drawn_batch(2, 24, 33)  # the last column is in no whole block
    found = 1.5 * additions.dct_statistics(lr) + 1.5
    r, g, b = (255 * lr.double()[..., :32]).unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    for channel, plane in enumerate((y, 0.564 * (b - y), 0.713 * (r - y))):  # BT.601
        blocks = plane.unflatten(2, (4, 8)).unflatten(1, (3, 8)).transpose(2, 3)  # (B, 3, 4, 8, 8)
        size = np.abs(dctn(blocks.numpy(), axes=(3, 4), norm="ortho"))
        expected = np.log(size + 0.5).mean((1, 2)), np.log((size**2).mean((1, 2)) + 0.25) / 2
        for kind, values in enumerate(expected):
            ours = found[:, 192 * kind + 64 * channel :][:, :64]
            np.testing.assert_allclose(ours.view(2, 8, 8), values, atol=0.02)


def test_modulation_with_zero_units_is_the_plain_convolutions():
    torch.manual_seed(0)
    net, content = extractors.ModulationBlock(3, 16, 8, 5, False), torch.randn(2, 3, 6, 7)
    assert len(net.convs) == len(net.units) == 4
    set_to_zero(net.units)
    x = content
    for conv in net.convs:
        x = nn.functional.silu(conv(x))
    torch.testing.assert_close(net(torch.randn(2, 16), content), net.last(x))


def test_modulation_sees_the_position_in_a_block_of_jpeg():
    place = additions.place_in_block(16, 24, torch.device("cpu"))
    torch.testing.assert_close(place[..., :8, 8:16], place[..., 8:, 16:])
    first = place[..., :8, :8].flatten(2)[0].T  # (64, 4)
    assert torch.cdist(first, first).add(torch.eye(64)).min() > 0.5
    torch.manual_seed(0)
    net, flat = extractors.ModulationBlock(3, 16, 8, 5, True), torch.ones(2, 3, 32, 32)
    assert net(torch.randn(2, 16), flat)[..., 5:-5, 5:-5].std((2, 3)).min() > 1e-4


@pytest.mark.parametrize(("height", "width"), [(9, 12), (148, 200)])
def test_resized_matches_pillow(height, width):
    image = drawn_batch(1, 37, 50)
    ours = resized(image, height, width)[0]
    for plane, found in zip(image[0], ours, strict=True):
        expected = Image.fromarray(plane.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(found, np.asarray(expected), atol=1e-3)


def test_radial_kernels_amplify_each_frequency_by_its_gain():
    gain = torch.tensor([[1.0] * 5, [1.0, 0.8, 0.4, 0.1, 0.1], [1.2, 1.5, 1.7, 1.7, 1.6]])
    kernels = additions.radial_kernels(gain)
    assert kernels[0, 7, 7].item() == kernels[0].abs().sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(3))
    waves = (2 * np.pi * additions.FREQUENCIES[:, None] * (torch.arange(15) - 7)).cos()  # (5, 15)
    for axis in (1, 2):
        torch.testing.assert_close(kernels.sum(axis) @ waves.T, gain, atol=0.05, rtol=0)


def test_rec_lr_starts_from_a_reduction_with_the_transfer_function_that_the_head_reads():
    net, hr, degradation = built(), drawn_batch(2, 64, 48), torch.randn(2, 16)
    set_to_zero(net.rec_lr.last)
    flat = torch.rand(2, 3, 1, 1).expand(2, 3, 64, 48)
    with torch.no_grad():
        net.head[-1].bias[:5] = torch.tensor([0.9, 0.8, 0.6, 0.4, 0.3])
        reduced, content = resized(hr, 16, 12), net.content(hr)
        assert (net.reconstruct(degradation, hr, content) - reduced).abs().max() > 0.01
        torch.testing.assert_close(net.reconstruct(degradation, flat, content), flat[..., ::4, ::4])
        set_to_zero(net.head[-1])
        net.head[-1].bias[:5] = additions.BICUBIC[0]
        torch.testing.assert_close(net.reconstruct(degradation, hr, content), reduced)


@pytest.mark.parametrize("as_printed", [True, False])
def test_reconstruct_depends_on_degradation_and_content(as_printed):
    net, hr = built(as_printed=as_printed), drawn_batch(2, 32, 48)
    degradation, content = torch.randn(2, 16, generator=make_generator(0)), net.content(hr)
    lr = net.reconstruct(degradation, hr, content)
    assert lr.shape == (2, 3, 8, 12)
    assert (lr - net.reconstruct(degradation + 1, hr, content)).abs().max() > 1e-5
    assert (lr - net.reconstruct(degradation, hr, content + 1)).abs().max() > 1e-5
    assert torch.equal(lr, net.reconstruct(degradation, 1 - hr, content)) == as_printed


# ---- losses -------------------------------------------------------------------------------------


def test_contrastive_loss_matches_a_case_by_hand():
    anchor = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    positives = torch.tensor([[[3.0, 4.0], [1.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    negatives = torch.tensor([[[0.0, 2.0], [4.0, 0.0]], [[1.0, 0.0], [1.0, 0.5]]])
    # b = 0: max(5 - 2 + 1, 0) + max(1 - 1 + 1, 0) = 5; b = 1: max(1 - 3 + 1, 0) + (0 - 0.5 + 1)
    loss = extractors.contrastive_loss(anchor, positives, negatives, margin=1.0)
    assert loss.item() == pytest.approx((5.0 + 0.5) / 2, abs=1e-5)


def test_contrastive_loss_has_a_gradient_where_f_deg_is_equal():
    anchor = torch.randn(4, 8, generator=make_generator(0)).requires_grad_(True)
    same = anchor.expand(3, 4, 8)
    loss = extractors.contrastive_loss(anchor, same, same, 0.01)
    loss.backward()
    assert loss.item() == pytest.approx(0.03) and anchor.grad.isfinite().all()


def test_degradation_loss_pairs_f_deg_as_equation_4_says(monkeypatch):
    """With F_deg that names (image, theta), positives share theta and negatives share the image."""
    net, hr, seen = built(as_printed=True), drawn_batch(4, 64, 64), {}

    def fake_degrade(image: Tensor, theta: object, generator: object) -> Tensor:
        which = (image[:, None] - hr[None]).abs().amax((2, 3, 4)).argmin(1)
        names = torch.stack([which, torch.arange(len(image)) % 4, which], 1).float()
        return names[..., None, None].expand(-1, 3, 16, 16)

    def fake_loss(anchor: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
        seen.update(anchor=anchor, positives=positives, negatives=negatives)
        return anchor.sum() * 0

    monkeypatch.setattr(net.e_deg, "forward", lambda lr: lr[:, :2, 0, 0].repeat(1, 8))
    monkeypatch.setattr(degrade, "degrade", fake_degrade)
    monkeypatch.setattr(extractors, "contrastive_loss", fake_loss)
    extractors.degradation_loss(net, hr, TINY, make_generator(0))
    assert seen["positives"].shape == seen["negatives"].shape == (TINY.num_samples, 4, 16)
    (image, theta), (p_image, p_theta), (n_image, n_theta) = (
        (seen[name][..., 0], seen[name][..., 1]) for name in ("anchor", "positives", "negatives")
    )
    assert torch.equal(p_theta, theta.expand(2, 4)) and (p_image != image).all()
    assert torch.equal(n_image, image.expand(2, 4)) and (n_theta != theta).all()


def test_as_printed_the_losses_are_the_equations_and_nothing_else(monkeypatch):
    """Eq. (1)-(2): all content from degraded images; Eq. (3)-(6): L_cl + L_rl of one scene."""
    net, cfg = built(as_printed=True), replace(TINY, as_printed=True)
    hr, e_deg, real_degrade = drawn_batch(4, 64, 64), net.e_deg.forward, degrade.degrade
    made, found = [], []
    assert named(net, "head.") == set()
    assert not net.e_deg.statistics and not net.rec_lr.jpeg_grid

    def kept(values: list, value: Tensor) -> Tensor:
        values.append(value)
        return value

    monkeypatch.setattr(degrade, "degrade", lambda *args: kept(made, real_degrade(*args)))
    monkeypatch.setattr(net.e_deg, "forward", lambda x: kept(found, e_deg(x)))
    loss = extractors.content_loss(net, hr, cfg, make_generator(0))["loss"]
    enlarged = resized(made[0], 64, 64)
    expected = (net.vqvae.decode(net.vqvae.encode(enlarged)) - hr).square().mean()
    torch.testing.assert_close(loss, expected)

    loss = extractors.degradation_loss(net, hr, cfg, make_generator(0))["loss"]
    anchors, degradation = made[1][:4], found[0].view(3, 4, -1)
    negatives = torch.stack([degradation[k].roll(k, dims=0) for k in (1, 2)])
    l_cl = extractors.contrastive_loss(degradation[0], degradation[1:], negatives, cfg.margin)
    l_rl = (net.rec_lr(degradation[0], net.vqvae.encode(hr)) - anchors).square().mean()
    torch.testing.assert_close(loss, l_cl + l_rl)


def test_two_corners_of_a_real_photo_must_have_the_same_f_deg(monkeypatch):
    """Equal corners cost nothing where F_deg of two photos differs by more than the margin."""
    net, flat = built(), 0.2 * torch.ones(1, 3, 64, 64)
    monkeypatch.setattr(net.e_deg, "forward", lambda x: 9 * x.mean((2, 3)).repeat(1, 6)[:, :16])
    other = flat.clone()
    other[:, :, :16, :16] = 0.8  # one corner is that of the second photo
    same, swapped = (
        extractors.same_photo_loss(net, torch.cat([one, 4 * flat]), 16, 16, TINY.margin)
        for one in (flat, other)
    )
    distance = 9 * 0.6 * math.sqrt(16)
    assert same == 0 and distance > TINY.margin
    torch.testing.assert_close(swapped, torch.tensor((distance + TINY.margin) / 2))


@pytest.mark.parametrize("side", [48, 64])
def test_both_corners_begin_where_blocks_of_jpeg_begin(monkeypatch, side):
    """Also where three quarters of the crop are no multiple of 8."""
    net, seen, x = built(), [], torch.arange(side) / 255
    monkeypatch.setattr(net.e_deg, "forward", lambda x: seen.append(x) or torch.ones(len(x), 16))
    hr, real = drawn_batch(2, side, side), (x + 0 * x[:, None]).expand(2, 3, -1, -1)
    extractors.degradation_loss_with_additions(net, hr, real, TINY, make_generator(0))
    starts = (255 * seen[1].amin((1, 2, 3))).round().int().tolist()
    assert starts == [0, 0, side * 3 // 4 // 8 * 8, side * 3 // 4 // 8 * 8]
    assert seen[1].shape[2:] == (side // 4, side // 4)


def test_real_photos_are_scenes_too_beside_those_of_hr(monkeypatch):
    net, seen = built(), []
    hr, real = drawn_batch(2, 64, 64), 1 - drawn_batch(2, 64, 64)
    degraded = degrade.degrade
    monkeypatch.setattr(degrade, "degrade", lambda x, *a: seen.append(x) or degraded(x, *a))
    extractors.degradation_loss_with_additions(net, hr, real, TINY, make_generator(0))
    anchors = seen[0][:4]
    assert torch.equal(anchors, torch.stack([hr[0], real[0], hr[1], real[1]]))


def loss_of(phase: str, net: Extractors, hr: Tensor, cfg: Config = TINY) -> dict[str, Tensor]:
    """The loss of a phase of training; always with the same draws."""
    draw = torch.Generator().manual_seed(0)
    if phase == "vqvae":
        return extractors.vqvae_loss(net, hr)
    if phase == "content":
        return extractors.content_loss(net, hr, cfg, draw)
    if cfg.as_printed:
        return extractors.degradation_loss(net, hr, cfg, draw)
    return extractors.degradation_loss_with_additions(net, hr, hr.flip(0), cfg, draw)


@pytest.mark.parametrize("as_printed", [False, True])
@pytest.mark.parametrize(
    ("phase", "trained"),
    [
        ("vqvae", ["vqvae."]),
        ("content", ["vqvae.encoder.", "vqvae.quant_conv."]),
        ("degradation", TRAINED_WITH_E_DEG),
    ],
)
def test_each_loss_is_finite_and_reaches_its_networks_alone(phase, trained, as_printed):
    net, cfg = built(as_printed=as_printed), replace(TINY, as_printed=as_printed)
    if phase == "content":
        net.vqvae.decoder.requires_grad_(False)
        net.vqvae.post_quant_conv.requires_grad_(False)
    values = loss_of(phase, net, drawn_batch(4, 64, 64), cfg)
    values["loss"].backward()
    assert all(value.isfinite() for value in values.values())
    gradients = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in gradients.values())
    assert {k for k, g in gradients.items() if g.abs().max() > 0} == named(net, *trained)


@pytest.mark.parametrize("phase", ["vqvae", "degradation"])
def test_the_loss_falls_on_one_batch(phase):
    net, hr, values = built(), drawn_batch(4, 32, 32), []
    opt = torch.optim.Adam(net.parameters(), 4e-3)
    for _ in range(12):
        value = loss_of(phase, net, hr)["loss"]
        opt.zero_grad()
        value.backward()
        opt.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.1 * abs(values[0])


# ---- training -----------------------------------------------------------------------------------


@pytest.fixture
def cfg(tmp_path):
    """Settings of a training on three small photos."""
    for i, image in enumerate(drawn_batch(3, 80, 96)):
        save_image(tmp_path / f"photos/{i}.png", image)
    folder = (str(tmp_path / "photos"),)
    return replace(TINY, hr=folder, lr=folder, out=str(tmp_path / "out"))


def test_training_resumes_exactly_and_each_phase_moves_its_own_weights(tmp_path, cfg):
    for out, runs in {"once": [(2, 2, 2)], "twice": [(1, 0, 0), (2, 0, 0)]}.items():
        for steps in runs:
            torch.manual_seed(0)
            extractors.train(replace(cfg, out=str(tmp_path / out), steps=steps), CPU)
    once, twice = (load_checkpoint(tmp_path / out / "vqvae.pt") for out in ("once", "twice"))
    for kind in ("net", "ema"):
        assert equal(once[kind], twice[kind])
    # Each phase starts from the average of the one before it.
    files = [tmp_path / "once" / f"{name}.pt" for name in ("vqvae", "content", "last")]
    phases, net = [load_checkpoint(file) for file in files], Extractors(cfg)
    for i, prefixes in enumerate((("vqvae.encoder.", "vqvae.quant_conv."), TRAINED_WITH_E_DEG)):
        before, after = phases[i]["ema"], phases[i + 1]["net"]
        moved = {k for k in named(net, "") if not torch.equal(before[k], after[k])}
        assert moved and moved <= named(net, *prefixes)


def test_training_goes_on_from_given_weights(tmp_path, cfg):
    """As somebody does who has other photos, or another camera in D's recipes."""
    extractors.train(replace(cfg, steps=(1,), out=str(tmp_path / "a")), CPU)
    torch.manual_seed(9)
    given = {"steps": (0, 0, 1), "start_from": str(tmp_path / "a/last.pt")}
    extractors.train(replace(cfg, **given), CPU)
    before = load_checkpoint(tmp_path / "a/last.pt")["ema"]
    after = load_checkpoint(tmp_path / "out/last.pt")["net"]
    moved = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert moved and moved <= named(Extractors(cfg), *TRAINED_WITH_E_DEG)
    drift = (before["e_deg.first.weight"] - after["e_deg.first.weight"]).abs().max()
    assert drift <= 1.01 * cfg.degradation_learning_rate  # one step of Adam, not another start
    for change, sentence in (
        ({"degradation_learning_rate": 0.0}, "nothing to train"),
        ({"deg_dim": 8}, "--start-from"),
        ({"steps": (1, 2)}, "--steps"),
    ):
        with pytest.raises(UserError, match=sentence):
            extractors.train(replace(cfg, **given | change, out=str(tmp_path / "b")), CPU)


def test_vqvae_weights_can_be_given_instead_of_training_them(tmp_path, cfg):
    """Other weights in the file are ignored, as those of a discriminator."""
    given, path = built().vqvae.state_dict(), str(tmp_path / "vqvae.ckpt")
    torch.save({"state_dict": given | {"loss.discriminator": torch.ones(3)}}, path)
    extractors.train(replace(cfg, vqvae=path, steps=(5, 0, 1)), CPU)
    assert not (tmp_path / "out/vqvae.pt").exists()
    trained = load_checkpoint(tmp_path / "out/last.pt")["net"]
    assert all(torch.equal(trained[f"vqvae.{key}"], value) for key, value in given.items())
    del given["quantize.embedding.weight"]
    torch.save(given, path)
    with pytest.raises(UserError, match="--vqvae .*vqvae.ckpt: weights of another"):
        extractors.load_vqvae(built().vqvae, path)


def test_reports_tell_the_truth_and_draw_a_picture(tmp_path):
    net, hr = built(), drawn_batch(4, 32, 32)
    values = extractors.vqvae_report(net, hr, tmp_path / "a.png")
    made = net.vqvae.decode(net.vqvae.encode(hr)).clamp(0, 1)
    expected = -10 * np.log10((made - hr).square().mean().item())
    assert values["without codebook"].item() == pytest.approx(expected, abs=1e-3)
    assert 1 <= values["entries used"] <= TINY.vq_codes
    assert Image.open(tmp_path / "a.png").size == (3 * 36, 18 + 4 * 36)


def test_every_50th_photo_is_held_out(tmp_path, capsys):
    for i in range(51):
        save_image(tmp_path / f"hr/{i:02d}.png", drawn_batch(1, 32, 32)[0])
    folders = {
        "hr": (str(tmp_path / "hr"),),
        "lr": (str(tmp_path / "hr"),),
        "out": str(tmp_path / "out"),
    }
    extractors.train(replace(TINY, **folders, steps=(1,), crop=32, vq_crop=16), CPU)
    printed = capsys.readouterr().out
    assert "HR and real LR: 49 (0 smaller than the crop), 51 (0" in printed
    assert "2 held out" in printed and "shown psnr" in printed
    assert {path.stem for path in tmp_path.glob("out/*.png")} == {"vqvae", "content", "last"}


def test_training_as_printed_takes_no_real_lr(tmp_path):
    (tmp_path / "lr").mkdir()
    done = run("extractors.py", "--as-printed", "--lr", "lr", cwd=tmp_path)
    assert_refused(done, "--lr: training as printed takes no real LR")


# ---- devices and memory -------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["small", "as-printed"])
def test_no_operation_of_the_losses_and_pictures_leaves_the_gpu(preset, tmp_path, monkeypatch):
    cfg = Config(**extractors.PRESETS[preset])
    sheets = []
    monkeypatch.setattr("common.images.save_image", lambda path, x: sheets.append(x))
    with fake_cuda(), torch.no_grad():
        with torch.device("cuda:0"):
            net, hr = Extractors(cfg), torch.zeros(4, 3, cfg.crop, cfg.crop)
        for phase in ("vqvae", "content", "degradation"):
            values = loss_of(phase, net, hr, cfg).values()
            assert {value.device for value in values} == {hr.device}
        extractors.swap_grid(net, hr, cfg, tmp_path / "grid.png")
        extractors.vqvae_report(net, hr, tmp_path / "report.png")
    assert [sheet.device.type for sheet in sheets] == ["cpu", "cpu"]


@pytest.mark.parametrize("phase", ["vqvae", "content", "degradation"])
def test_a_step_of_the_paper_fits_into_16_gib(phase):
    """Counted; the batch of a process, at the paper's size."""
    cfg = Config(compile=False)
    with counted_memory():
        net, hr = Extractors(cfg), torch.zeros(cfg.batch_size, 3, cfg.crop, cfg.crop)
        trained = [*(net.e_deg if phase == "degradation" else net.vqvae).parameters()]
        assert 1 < training_memory(net, trained, lambda: loss_of(phase, net, hr, cfg)) < 16
