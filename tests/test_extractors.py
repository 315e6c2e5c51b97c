"""extractors.py: the VQ-VAE's structure, each network, Eq. (4) by hand, losses and gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage
from scipy.fft import dctn
from torch import Tensor, nn

import common
import degrade
import extractors
from extractors import Config, Extractors
from tests.fake_cuda import counted_memory, fake_cuda, really, training_memory

CPU = common.Runtime(torch.device("cpu"))
TINY = Config(
    compile=False,
    batch_size=4,
    crop=64,
    vq_crop=64,
    vq_channels=8,
    vq_multipliers=(1, 2, 2),
    vq_blocks=1,
    vq_codes=16,
    deg_channels=8,
    deg_blocks=1,
    deg_dim=16,
    mod_channels=8,
    num_samples=2,
    recipes=("realesrgan", "light", "camera"),
    as_printed=False,
    bf16=False,
)


def drawn_batch(batch: int, height: int, width: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1]: a wave each, and a little noise."""
    gen = common.generator(batch, height, width)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    period = 3 + 20 * torch.rand(batch, 3, 2, 1, 1, generator=gen)
    waves = 0.5 + 0.3 * torch.sin(y / period[:, :, 0] + x / period[:, :, 1])
    return (waves + 0.03 * torch.randn(waves.shape, generator=gen)).clamp(0, 1)


def built(**changes: object) -> Extractors:
    """A tiny network whose zero-initialised weights are moved, so that every part takes part."""
    torch.manual_seed(0)
    net = Extractors(replace(TINY, **changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in net.parameters():
            p += 0.02 * torch.randn(p.shape)
    return net


def with_gradient(net: nn.Module) -> set[str]:
    """Names of the parameters whose gradient is there and not zero; all must be finite."""
    found = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in found.values())
    return {k for k, g in found.items() if g.abs().max() > 0}


def named(net: nn.Module, *prefixes: str) -> set[str]:
    return {k for k, _ in net.named_parameters() if k.startswith(prefixes)}


def test_softened_photos_are_scipy_s_gaussians_of_each_width():
    hr = drawn_batch(3, 20, 24)
    soft = extractors.softened(hr, 1.5, common.generator(5))
    widths = (1.5 * torch.rand(3, 1, generator=common.generator(5))).flatten().tolist()
    assert max(widths) < 1.5 and min(widths) > 0.1
    for image, result, width in zip(hr, soft, widths, strict=True):
        options = {"mode": "nearest", "radius": (0, 5, 5)}
        expected = ndimage.gaussian_filter(image.numpy(), (0, width, width), **options)
        np.testing.assert_allclose(result, expected, atol=1e-5)


# ---- VQ-VAE -----------------------------------------------------------------------------------


def test_vqvae_has_the_keys_and_shapes_of_the_public_vq_f4(shared):
    table = shared / "vq-f4-keys.tsv"
    if not table.is_file():
        pytest.skip(f"no {table}")
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    expected = {key: tuple(map(int, shape.split("x"))) for key, shape in rows}
    assert len(expected) == 205
    with torch.device("meta"):
        net = extractors.VQVAE(128, (1, 2, 4), 2, 3, 8192)
    assert {key: tuple(v.shape) for key, v in net.state_dict().items()} == expected


def test_vqvae_of_the_paper_has_55_million_parameters():
    with torch.device("meta"):
        net = extractors.VQVAE(128, (1, 2, 4), 2, 3, 8192)
    assert common.count_parameters(net).startswith("55.3")


def test_vqvae_reduces_by_four_and_back():
    net = built().vqvae
    z = net.encode(drawn_batch(2, 32, 48))
    assert z.shape == (2, 3, 8, 12)
    assert net.decode(z).shape == (2, 3, 32, 48)


def test_residual_blocks_start_as_the_identity():
    x = torch.randn(2, 8, 5, 7, generator=common.generator(0))
    block = extractors.ResBlock(8, 8)
    nn.init.zeros_(block.conv2.bias)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_matches_a_softmax_written_out(heads):
    torch.manual_seed(0)
    net, x = extractors.Attention(8, heads), torch.randn(2, 8, 3, 4)
    h = net.norm(x)
    q, k, v = (f(h).view(2 * heads, 8 // heads, 12) for f in (net.q, net.k, net.v))  # (., C', N)
    weight = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / (8 / heads) ** 0.5, dim=2)
    expected = x + net.proj_out(torch.einsum("bqk,bck->bcq", weight, v).reshape(2, 8, 3, 4))
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_is_torch_s_and_keeps_the_type(dtype):
    norm = extractors.GroupNorm(24)
    assert norm.num_groups == 6  # of four channels each
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 24, 5, 7, generator=common.generator(0))
    expected = nn.functional.group_norm(x, 6, norm.weight, norm.bias, 1e-6)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = norm(x.to(dtype))
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("height", "width"), [(48, 200), (160, 152)])
def test_large_content_is_read_in_tiles_with_the_same_gradient(height, width, monkeypatch):
    """Also where the backward pass computes each tile again; far from seams it is E_cont's."""
    monkeypatch.setattr(extractors, "TILE", 33)
    net, hr = built(), drawn_batch(2, height, width)
    seen, encode = [], net.vqvae.encode

    def spy(image: Tensor) -> Tensor:
        seen.append(image.shape)
        return encode(image)

    monkeypatch.setattr(net.vqvae, "encode", spy)
    with torch.no_grad():
        plain = net.content(hr)
    assert plain.shape == (2, 3, height // 4, width // 4)
    assert all(shape[0] == 1 and max(shape[2:]) <= 88 for shape in seen)
    content = net.content(hr)
    assert torch.equal(content, plain)
    seen.clear()
    first = net.vqvae.encoder.conv_in.weight
    found = torch.autograd.grad(content.square().sum(), first)[0]
    assert len(seen) > 0  # computed once more
    monkeypatch.setattr(extractors, "checkpoint", lambda function, x, use_reentrant: function(x))
    expected = torch.autograd.grad(net.content(hr).square().sum(), first)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_an_image_no_larger_than_a_tile_is_read_at_once():
    net, hr = built(), drawn_batch(2, 64, 48)
    assert torch.equal(net.content(hr), net.vqvae.encode(hr))


def test_quantizer_returns_the_nearest_code():
    torch.manual_seed(0)
    quantizer, z = extractors.Quantizer(50, 3), torch.randn(2, 3, 40, 60)  # more than one split
    nn.init.normal_(quantizer.embedding.weight)
    codes, number = quantizer(z)
    table = quantizer.embedding.weight.detach().numpy().astype(np.float64)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 1, 3).numpy().astype(np.float64)
    distance = np.square(flat - table).sum(2)
    chosen = number.flatten().numpy()
    # The two nearest codes may tie within float32.
    gap = distance[np.arange(len(chosen)), chosen] - distance.min(1)
    assert codes.shape == z.shape and number.shape == (2, 40, 60)
    assert gap.max() < 1e-4 and (chosen == distance.argmin(1)).mean() > 0.999
    picked = codes.detach().permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    np.testing.assert_array_equal(picked, quantizer.embedding.weight.detach().numpy()[chosen])


def test_gradient_passes_straight_through_the_codebook():
    """The encoder's gradient is the one of the decoder's input, plus that of the commitment."""
    net, hr = built(), drawn_batch(1, 32, 32)  # one image alone takes the codebook
    latents, encode, decode = [], net.vqvae.encode, net.vqvae.decode

    def kept(x: Tensor) -> Tensor:
        x.retain_grad()
        latents.append(x)
        return x

    net.vqvae.encode = lambda image: kept(encode(image))
    net.vqvae.decode = lambda z: decode(kept(z))
    extractors.vqvae_loss(net, hr)["loss"].backward()
    z, into_decoder = latents
    codes = net.vqvae.quantize(z)[0]
    commitment = 0.25 * 2 * (z - codes).detach() / z.numel()
    torch.testing.assert_close(z.grad, into_decoder.grad + commitment)
    assert into_decoder.grad.abs().max() > 0


def test_restart_moves_only_unused_codes_and_onto_latents():
    torch.manual_seed(0)
    quantizer, z = extractors.Quantizer(200, 3), torch.randn(1, 3, 2, 2)
    before = quantizer.embedding.weight.detach().clone()
    chosen = torch.zeros(200, dtype=torch.bool)
    chosen[quantizer(z)[1].flatten()] = True
    quantizer.restart(z, common.generator(0))
    after = quantizer.embedding.weight.detach()
    moved = (before != after).any(1)
    assert torch.equal(moved, ~chosen)
    latents = z.permute(0, 2, 3, 1).reshape(-1, 3)
    assert (after[moved][:, None] == latents).all(-1).any(1).all()


# ---- degradation extractor, modulation, Rec_lr --------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (32, 17)])
def test_degradation_extractor_takes_any_size(size):
    assert built().e_deg(drawn_batch(2, *size)).shape == (2, 16)


def test_degradation_extractor_of_the_paper_gives_2048_numbers():
    cfg = Config()
    net = extractors.DegradationExtractor(cfg.deg_channels, cfg.deg_blocks, cfg.deg_dim, False)
    assert len(net.body) == 16
    assert sum(isinstance(layer, nn.Conv2d) for layer in net.mapping) == 4
    assert net(drawn_batch(2, 12, 12)).shape == (2, 2048)


def test_degradation_extractor_sees_the_noise_level():
    net, x = built().e_deg, torch.full((1, 3, 32, 32), 0.5)
    noise = torch.randn(x.shape, generator=common.generator(1))
    assert (net(x) - net(x + 0.1 * noise)).abs().max() > 1e-6


def test_modulation_depends_on_degradation_and_content():
    torch.manual_seed(0)
    net = extractors.ModulationBlock(3, 16, 8, 5, False)
    degradation, content = torch.randn(2, 16), torch.randn(2, 3, 6, 7)
    degradation.requires_grad_(True)
    content.requires_grad_(True)
    out = net(degradation, content)
    assert out.shape == (2, 5, 6, 7)
    assert len(net.convs) == len(net.units) == 4
    for other in (net(degradation + 1, content), net(degradation, content + 1)):
        assert (out - other).abs().max() > 1e-4
    out.square().mean().backward()
    assert with_gradient(net) == named(net, "")
    assert degradation.grad.abs().max() > 0 and content.grad.abs().max() > 0


def test_modulation_with_zero_units_is_the_plain_convolutions():
    torch.manual_seed(0)
    net, content = extractors.ModulationBlock(3, 16, 8, 5, False), torch.randn(2, 3, 6, 7)
    for unit in net.units:
        nn.init.zeros_(unit.weight)
        nn.init.zeros_(unit.bias)
    x = content
    for conv in net.convs:
        x = nn.functional.silu(conv(x))
    torch.testing.assert_close(net(torch.randn(2, 16), content), net.last(x))


def test_resized_matches_pillow():
    image = drawn_batch(1, 37, 50)
    for height, width in ((9, 12), (148, 200), (37, 50)):
        expected = [
            np.asarray(Image.fromarray(c.numpy()).resize((width, height), Image.Resampling.BICUBIC))
            for c in image[0]
        ]
        ours = extractors.resized(image, height, width)[0]
        np.testing.assert_allclose(ours, np.stack(expected), atol=1e-3)


def test_reconstruct_with_nothing_to_add_is_the_bicubic_reduction():
    net, hr = built(), drawn_batch(2, 32, 48)
    for layer in (net.rec_lr.last, net.kernel):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    lr = net.reconstruct(torch.randn(2, 16), hr, net.content(hr)).detach()
    for b in range(2):
        for c in range(3):
            plane = Image.fromarray(hr[b, c].numpy()).resize((12, 8), Image.Resampling.BICUBIC)
            np.testing.assert_allclose(lr[b, c], np.asarray(plane), atol=1e-3)


@pytest.mark.parametrize("as_printed", [True, False])
def test_reconstruct_depends_on_degradation_and_content(as_printed):
    net, hr = built(as_printed=as_printed), drawn_batch(2, 32, 48)
    code, content = torch.randn(2, 16, generator=common.generator(0)), net.content(hr)
    lr = net.reconstruct(code, hr, content)
    assert lr.shape == (2, 3, 8, 12)
    assert (lr - net.reconstruct(code + 1, hr, content)).abs().max() > 1e-5
    assert (lr - net.reconstruct(code, hr, content + 1)).abs().max() > 1e-5
    assert torch.equal(lr, net.reconstruct(code, 1 - hr, content)) == as_printed


# ---- losses -----------------------------------------------------------------------------------


def test_contrastive_loss_matches_a_case_by_hand():
    anchor = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    positives = torch.tensor([[[3.0, 4.0], [1.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    negatives = torch.tensor([[[0.0, 2.0], [4.0, 0.0]], [[1.0, 0.0], [1.0, 0.5]]])
    # b = 0: max(5 - 2 + 1, 0) + max(1 - 1 + 1, 0) = 5; b = 1: max(1 - 3 + 1, 0) + (0 - 0.5 + 1)
    loss = extractors.contrastive_loss(anchor, positives, negatives, margin=1.0)
    assert loss.item() == pytest.approx((5.0 + 0.5) / 2, abs=1e-5)


def test_contrastive_loss_is_zero_for_equal_positives_and_far_negatives():
    anchor = torch.randn(4, 8, generator=common.generator(0)).requires_grad_(True)
    loss = extractors.contrastive_loss(
        anchor, anchor.expand(3, 4, 8), anchor.expand(3, 4, 8) + 10, 0.01
    )
    loss.backward()
    assert loss.item() == 0 and anchor.grad.isfinite().all()


def test_contrastive_loss_is_the_margin_where_all_codes_are_equal():
    same = torch.ones(4, 8, requires_grad=True)
    loss = extractors.contrastive_loss(same, same.expand(3, 4, 8), same.expand(3, 4, 8), 0.01)
    loss.backward()
    assert loss.item() == pytest.approx(0.03) and same.grad.isfinite().all()


def test_degradation_loss_pairs_codes_as_equation_4_says(monkeypatch):
    """With codes that name (image, theta), positives share theta and negatives share the image."""
    net, hr, seen = built(), drawn_batch(4, 64, 64), {}

    def fake_degrade(image: Tensor, theta: object, generator: object) -> Tensor:
        which = (image[:, None] - hr[None]).abs().amax((2, 3, 4)).argmin(1)
        codes = torch.stack([which, torch.arange(len(image)) % 4, which], 1).float()
        return codes[..., None, None].expand(-1, 3, 16, 16)

    def fake_loss(anchor: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
        seen.update(anchor=anchor, positives=positives, negatives=negatives)
        return anchor.sum() * 0

    class Reads(nn.Module):
        def forward(self, lr: Tensor) -> Tensor:
            return torch.cat([lr[:, :2, 0, 0], torch.zeros(len(lr), 14)], 1)

    net.e_deg = Reads()
    monkeypatch.setattr(extractors.degrade, "degrade", fake_degrade)
    monkeypatch.setattr(extractors, "contrastive_loss", fake_loss)
    extractors.degradation_loss(net, hr, TINY, common.generator(0))
    assert seen["positives"].shape == seen["negatives"].shape == (TINY.num_samples, 4, 16)
    (image, theta), (p_image, p_theta), (n_image, n_theta) = (
        (seen[name][..., 0], seen[name][..., 1]) for name in ("anchor", "positives", "negatives")
    )
    assert torch.equal(p_theta, theta.expand(2, 4)) and (p_image != image).all()
    assert torch.equal(n_image, image.expand(2, 4)) and (n_theta != theta).all()


def test_vqvae_loss_trains_the_vqvae_alone():
    net = built()
    values = extractors.vqvae_loss(net, drawn_batch(4, 32, 32))
    values["loss"].backward()
    assert values["loss"].isfinite() and 1 <= values["codes"] <= TINY.vq_codes
    assert with_gradient(net) == named(net, "vqvae.")


@pytest.mark.parametrize("as_printed", [False, True])
def test_content_loss_reaches_the_encoder_and_no_degradation(as_printed):
    net = built(as_printed=as_printed)
    net.vqvae.decoder.requires_grad_(False)
    net.vqvae.post_quant_conv.requires_grad_(False)
    loss = extractors.content_loss(net, drawn_batch(4, 64, 64), TINY, common.generator(0))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert with_gradient(net) == named(net, "vqvae.encoder.", "vqvae.quant_conv.")


@pytest.mark.parametrize("as_printed", [False, True])
def test_degradation_loss_trains_e_deg_and_rec_lr_but_not_the_content(as_printed):
    net, cfg = built(as_printed=as_printed), replace(TINY, as_printed=as_printed)
    values = extractors.degradation_loss(net, drawn_batch(4, 64, 64), cfg, common.generator(0))
    values["loss"].backward()
    assert all(value.isfinite() for value in values.values())
    assert with_gradient(net) == named(net, "e_deg.", "rec_lr.", "kernel.", "head.")


def test_as_printed_the_losses_are_the_equations_and_nothing_else(monkeypatch):
    """Eq. (1)-(2): all content from degraded images; Eq. (3)-(6): L_cl + L_rl of one scene."""
    net, hr, given = built(as_printed=True), drawn_batch(4, 64, 64), []
    assert named(net, "kernel.", "head.") == set() and not net.e_deg.statistics
    assert not net.rec_lr.jpeg_grid
    monkeypatch.setattr(
        net, "content", lambda image: given.append(image) or net.vqvae.encode(image)
    )
    cfg = replace(TINY, as_printed=True)
    loss = extractors.content_loss(net, hr, cfg, common.generator(0))["loss"]
    draw = common.generator(common.generator(0).initial_seed())
    lr = degrade.degrade(hr, extractors.sample_mixed(4, cfg.recipes, draw), draw)
    torch.testing.assert_close(given[0], extractors.resized(lr, 64, 64))
    expected = (net.vqvae.decode(net.vqvae.encode(given[0])) - hr).square().mean()
    torch.testing.assert_close(loss, expected)

    made, codes = [], []
    real, e_deg = degrade.degrade, net.e_deg.forward
    monkeypatch.setattr(degrade, "degrade", lambda *args: made.append(real(*args)) or made[0])
    monkeypatch.setattr(net.e_deg, "forward", lambda x: codes.append(e_deg(x)) or codes[0])
    values = extractors.degradation_loss(net, hr, cfg, common.generator(0))
    anchors, code = made[0][:4], codes[0].view(3, 4, -1)
    negatives = torch.stack([code[k].roll(k, dims=0) for k in (1, 2)])
    l_cl = extractors.contrastive_loss(code[0], code[1:], negatives, cfg.margin)
    l_rl = (net.rec_lr(code[0], net.vqvae.encode(hr)) - anchors).square().mean()
    torch.testing.assert_close(values["loss"], l_cl + l_rl)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_sample_mixed_gives_one_theta_per_image(batch):
    theta = extractors.sample_mixed(batch, TINY.recipes, common.generator(0))
    assert len(theta.seed) == batch


def test_losses_fall_on_one_batch():
    hr = drawn_batch(4, 64, 64)
    losses = {
        "vqvae": lambda net, gen: extractors.vqvae_loss(net, hr)["loss"],
        "degradation": lambda net, gen: extractors.degradation_loss(net, hr, TINY, gen)["loss"],
    }
    for name, loss in losses.items():
        net = built()
        opt = torch.optim.Adam(net.parameters(), 2e-3)
        values = []
        for _ in range(30):
            value = loss(net, common.generator(0))
            opt.zero_grad()
            value.backward()
            opt.step()
            values.append(value.item())
        assert values[-1] < values[0] - 0.1 * abs(values[0]), name


# ---- training ---------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for i, image in enumerate(drawn_batch(3, 80, 96)):
        common.save_image(folder / f"{i}.png", image)
    return folder


def test_training_resumes_exactly_and_each_part_moves_its_own_weights(tmp_path, photos):
    cfg = replace(TINY, hr=(str(photos),))
    for out, runs in {"once": [(2, 2, 2)], "twice": [(1, 0, 0), (2, 0, 0)]}.items():
        for steps in runs:
            torch.manual_seed(0)
            extractors.train(replace(cfg, out=str(tmp_path / out), steps=steps), CPU)
    once, twice = (common.load_checkpoint(tmp_path / out / "vqvae.pt") for out in ("once", "twice"))
    for kind in ("net", "ema"):
        assert all(torch.equal(v, twice[kind][k]) for k, v in once[kind].items())
    # Each part starts from the average of the one before it.
    files = [tmp_path / "once" / f"{name}.pt" for name in ("vqvae", "content", "last")]
    parts = [common.load_checkpoint(file) for file in files]
    names = named(Extractors(cfg), "")
    content, degradation = (
        {k for k in names if not torch.equal(before["ema"][k], after["net"][k])}
        for before, after in zip(parts, parts[1:], strict=False)
    )
    assert content and content <= named(Extractors(cfg), "vqvae.encoder.", "vqvae.quant_conv.")
    assert degradation and degradation <= named(
        Extractors(cfg), "e_deg.", "rec_lr.", "kernel.", "head."
    )


def test_training_goes_on_from_given_weights(tmp_path, photos):
    """As somebody does who has other photos, or another camera in D's recipes."""
    cfg = replace(TINY, hr=(str(photos),))
    extractors.train(replace(cfg, steps=(1,), out=str(tmp_path / "a")), CPU)
    torch.manual_seed(9)
    start = str(tmp_path / "a/last.pt")
    given = {"steps": (0, 0, 1), "start_from": start}
    extractors.train(replace(cfg, **given, out=str(tmp_path / "b")), CPU)
    before, after = (common.load_checkpoint(tmp_path / f"{x}/last.pt") for x in "ab")
    moved = {k for k, v in before["ema"].items() if not torch.equal(v, after["net"][k])}
    assert moved and moved <= named(Extractors(cfg), "e_deg.", "rec_lr.", "kernel.", "head.")
    drift = (before["ema"]["e_deg.first.weight"] - after["net"]["e_deg.first.weight"]).abs().max()
    assert drift <= 1.01 * cfg.degradation_learning_rate  # one step of Adam, not another start
    nothing = replace(cfg, **given, degradation_learning_rate=0.0, out=str(tmp_path / "d"))
    with pytest.raises(common.UserError, match="nothing to train"):
        extractors.train(nothing, CPU)
    for given in ({"start_from": str(tmp_path / "none.pt")}, {"deg_dim": 8, "start_from": start}):
        with pytest.raises(common.UserError, match="--start-from"):
            extractors.train(replace(cfg, **given, out=str(tmp_path / "c")), CPU)


def test_vqvae_weights_can_be_given(tmp_path, photos):
    cfg = replace(TINY, hr=(str(photos),), steps=(1,))
    torch.manual_seed(0)
    weights = tmp_path / "vq.pt"
    given = built().vqvae.state_dict()
    torch.save({"ema": given}, weights)
    extractors.train(replace(cfg, vqvae=str(weights), out=str(tmp_path / "out")), CPU)
    assert not (tmp_path / "out" / "vqvae.pt").exists()
    trained = common.load_checkpoint(tmp_path / "out" / "last.pt")["net"]
    for key, value in given.items():
        if key.startswith(("decoder.", "post_quant_conv.", "quantize.")):
            assert torch.equal(trained[f"vqvae.{key}"], value), key


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": (1, 2)},
        {"crop": 40},
        {"vq_crop": 0},
        {"num_samples": 4},
        {"recipes": ("nonsense",)},
        {"hr_blur": -1.0},
        {"cooldown": 1.5},
        {"vq_channels": 0},
        {"vq_channels": 10**6},
        {"deg_blocks": -1},
        {"log_every": 0},
        {"save_every": 0},
        {"accumulate": -1},
        {"hr": ("missing",)},
    ],
)
def test_senseless_settings_end_in_one_sentence(tmp_path, changes):
    with pytest.raises(common.UserError, match="--"):
        extractors.train(replace(TINY, out=str(tmp_path / "out"), **changes), CPU)
    assert not (tmp_path / "out").exists()


def test_dct_statistics_agree_with_scipy():
    lr = drawn_batch(2, 24, 33)  # the last column is in no whole block
    found = 1.5 * extractors.dct_statistics(lr) + 1.5
    r, g, b = (255 * lr.double()[..., :32]).unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    for channel, plane in enumerate((y, 0.564 * (b - y), 0.713 * (r - y))):  # BT.601
        blocks = plane.unflatten(2, (4, 8)).unflatten(1, (3, 8)).transpose(2, 3)  # (B, 3, 4, 8, 8)
        size = np.abs(dctn(blocks.numpy(), axes=(3, 4), norm="ortho"))
        expected = np.log(size + 0.5).mean((1, 2)), np.log((size**2).mean((1, 2)) + 0.25) / 2
        for part, values in enumerate(expected):
            ours = found[:, 192 * part + 64 * channel :][:, :64]
            np.testing.assert_allclose(ours.view(2, 8, 8), values, atol=0.02)


def test_dct_statistics_show_each_factor_where_it_belongs():
    sharp = common.to_uint8(torch.rand(1, 3, 64, 64, generator=common.generator(0))) / 255
    image = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1)

    def shown(lr: Tensor) -> Tensor:
        """Typical size of Y's coefficients (8, 8) by frequency."""
        return extractors.dct_statistics(common.to_uint8(lr) / 255)[0, :64].view(8, 8)

    plain = shown(image)
    noise = 0.04 * torch.randn(image.shape, generator=common.generator(1))
    blurred = torch.nn.functional.avg_pool2d(image, 3, 1, 1)
    assert shown(image + noise)[7, 7] > plain[7, 7] + 0.3
    assert shown(blurred)[3, 3] < plain[3, 3] - 0.1
    qualities = [30, 60, 90]
    jpegs = [shown(degrade.jpeg(image, torch.tensor([q]))).mean() for q in qualities]
    assert jpegs[0] < jpegs[1] < jpegs[2] < plain.mean()


def test_without_statistics_e_deg_sees_means_only():
    """Features linear in the pixels: their mean can't tell noise of mean 0 from none."""
    flat = torch.full((1, 3, 32, 32), 0.5)
    noise = 0.1 * (torch.rand(1, 3, 32, 32, generator=common.generator(0)) > 0.5).float()
    noisy = flat + noise - noise.mean((2, 3), keepdim=True)
    for statistics in (False, True):
        torch.manual_seed(0)
        net = extractors.DegradationExtractor(8, 1, 16, statistics)
        for p in net.body.parameters():
            torch.nn.init.zeros_(p)  # no block: features are linear in the pixels
        centre = net.first.weight.data[..., 1:2, 1:2].clone()
        net.first.weight.data.zero_()[..., 1:2, 1:2] = centre
        assert torch.allclose(net(flat), net(noisy), atol=1e-5) != statistics


def test_filtered_agrees_with_scipy_for_every_image():
    image = drawn_batch(2, 12, 9)
    kernels = torch.randn(2, 5, 5, generator=common.generator(0))
    found = extractors.filtered(image, kernels)
    for b in range(2):
        for c in range(3):
            expected = ndimage.correlate(image[b, c].numpy(), kernels[b].numpy(), mode="nearest")
            np.testing.assert_allclose(found[b, c], expected, atol=1e-5)


def test_the_kernel_changes_sharpness_and_no_colour():
    net = built()
    assert net.kernel is not None
    for p in net.rec_lr.last.parameters():
        torch.nn.init.zeros_(p)  # the kernel alone
    code, flat = torch.randn(1, TINY.deg_dim), torch.rand(1, 3, 1, 1).expand(1, 3, 64, 64)
    with torch.no_grad():
        net.kernel.weight.mul_(50)
        made = net.reconstruct(code, flat, net.content(flat))
        torch.testing.assert_close(made, flat[..., ::4, ::4])
        hr = drawn_batch(1, 64, 64)
        made = net.reconstruct(code, hr, net.content(hr))
        assert (made - extractors.resized(hr, 16, 16)).abs().max() > 0.01


def test_modulation_knows_the_place_in_a_block():
    place = extractors.place_in_block(16, 24, torch.device("cpu"))
    torch.testing.assert_close(place[..., :8, 8:16], place[..., 8:, 16:])
    assert torch.cdist(*[place[..., :8, :8].flatten(2)[0].T] * 2).add(torch.eye(64)).min() > 0.5
    torch.manual_seed(0)
    net, flat = extractors.ModulationBlock(3, 16, 8, 5, True), torch.ones(2, 3, 32, 32)
    inner = net(torch.randn(2, 16), flat)[..., 5:-5, 5:-5]  # away from the borders
    assert inner.std((2, 3)).min() > 1e-4
    torch.testing.assert_close(inner[..., :8, :8], inner[..., 8:16, 8:16])


# ---- public weights, pictures, held-out photos --------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "plain", "wrapped"])
def test_public_weights_are_read_from_any_plain_file(tmp_path, form):
    source, target = built(), built()
    for p in source.parameters():
        torch.nn.init.normal_(p)
    state = dict(source.vqvae.state_dict()) | {"loss.discriminator": torch.ones(3)}
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.ckpt")
    if form == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save({"state_dict": state} if form == "wrapped" else state, path)
    extractors.load_vqvae(target.vqvae, str(path))
    for key, value in source.vqvae.state_dict().items():
        assert torch.equal(target.vqvae.state_dict()[key], value)


def test_public_weights_of_another_size_are_refused(tmp_path):
    state = dict(built().vqvae.state_dict())
    state["quantize.embedding.weight"] = torch.zeros(7, 3)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(common.UserError, match=r"1 of \d+ weights.*quantize.embedding.weight"):
        extractors.load_vqvae(built().vqvae, str(tmp_path / "weights.pt"))


def test_reports_tell_the_truth_and_draw_a_picture(tmp_path):
    net, hr = built(), drawn_batch(4, 32, 32)
    values = extractors.vqvae_report(net, hr, tmp_path / "a.png")
    made = net.vqvae.decode(net.vqvae.encode(hr)).clamp(0, 1)
    expected = -10 * np.log10((made - hr).square().mean().item())
    assert values["without codebook"].item() == pytest.approx(expected, abs=1e-3)
    assert 1 <= values["codes used"] <= TINY.vq_codes
    assert Image.open(tmp_path / "a.png").size == (3 * 36, 18 + 4 * 36)
    values = extractors.swap_grid(net, hr, TINY, tmp_path / "b.png")
    assert values["shown psnr"].isfinite()
    assert Image.open(tmp_path / "b.png").size == (5 * 20, 18 + 4 * 20)


def test_every_50th_photo_is_held_out(tmp_path, capsys):
    for i in range(51):
        common.save_image(tmp_path / "hr" / f"{i:02d}.png", drawn_batch(1, 32, 32)[0])
    cfg = replace(
        TINY, hr=(str(tmp_path / "hr"),), out=str(tmp_path), steps=(1,), crop=32, vq_crop=16
    )
    extractors.train(cfg, common.Runtime(torch.device("cpu")))
    printed = capsys.readouterr().out
    assert "49 HR photos, 2 held out" in printed and "shown psnr" in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "vqvae.png",
        "content.png",
        "last.png",
    }


@pytest.mark.parametrize("preset", ["small", "paper", "as-printed"])
def test_no_operation_of_the_losses_and_pictures_leaves_the_gpu(preset, tmp_path, monkeypatch):
    cfg = Config(**extractors.PRESETS[preset])
    monkeypatch.setattr(extractors, "sample_mixed", really(extractors.sample_mixed))
    draw, sheets = torch.Generator(), []
    monkeypatch.setattr(common, "save_image", lambda path, x: sheets.append(x))
    with fake_cuda(), torch.no_grad():
        with torch.device("cuda:0"):
            nets = Extractors(cfg)
            photos = torch.zeros(8, 3, cfg.vq_crop, cfg.vq_crop)
            crops = torch.zeros(8, 3, cfg.crop, cfg.crop)
        for numbers in (
            extractors.vqvae_loss(nets, photos),
            extractors.content_loss(nets, photos, cfg, draw),
            extractors.degradation_loss(nets, crops, cfg, draw),
        ):
            assert {value.device for value in numbers.values()} == {crops.device}
        extractors.swap_grid(nets, crops[:4], cfg, tmp_path / "grid.png")
        extractors.vqvae_report(nets, crops[:4], tmp_path / "report.png")
        assert [sheet.device.type for sheet in sheets] == ["cpu", "cpu"]


@pytest.mark.parametrize("part", ["vqvae", "content", "degradation"])
def test_a_step_of_the_paper_fits_into_16_gib(part):
    """Counted; the batch of a process, at the paper's size."""
    cfg = Config(compile=False)
    with counted_memory():
        net, hr = Extractors(cfg), torch.zeros(cfg.batch_size, 3, cfg.crop, cfg.crop)
        losses = {
            "vqvae": lambda: extractors.vqvae_loss(net, hr),
            "content": lambda: extractors.content_loss(net, hr, cfg, torch.Generator()),
            "degradation": lambda: extractors.degradation_loss(net, hr, cfg, torch.Generator()),
        }
        trained = [*(net.e_deg if part == "degradation" else net.vqvae).parameters()]
        assert 1 < training_memory(net, trained, losses[part]) < 16
