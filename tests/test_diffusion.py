"""diffusion.py: the noise schedule and its steps in closed form, the U-Net, the training."""

import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import degrade
import diffusion
import extractors
from common import UserError
from common.checkpoint import load_checkpoint
from common.images import resized, save_image
from common.runtime import make_generator
from diffusion import ALPHAS_CUMPROD, BETAS, Config
from tests.fake_cuda import counted_memory, fake_cuda, training_memory
from tests.tiny import CPU, STAGE_1, built, config_of, equal, normal, uniform
from tests.tiny import STAGE_2 as TINY


def generators(*seeds: int) -> list[torch.Generator]:
    return [make_generator(seed) for seed in seeds]


# ---- noise schedule ---------------------------------------------------------------------------


def test_alphas_cumprod_matches_a_float64_product():
    betas = np.linspace(1e-4, 0.02, 1000)
    expected = np.concatenate([[1.0], np.exp(np.log1p(-betas).cumsum())])
    np.testing.assert_allclose(BETAS, betas, rtol=1e-12)
    assert ALPHAS_CUMPROD.shape == (1001,) and ALPHAS_CUMPROD.dtype == torch.float32
    np.testing.assert_allclose(ALPHAS_CUMPROD, expected, rtol=1e-6)
    assert ALPHAS_CUMPROD[-1] < 1e-4


def test_q_sample_matches_closed_form():
    x_0, eps, t = uniform(4, 3, 4, 5), normal(4, 3, 4, 5), torch.tensor([0, 30, 500, 1000])
    x_t = diffusion.q_sample(x_0, t, eps).numpy()
    for b, steps in enumerate(t.tolist()):
        alpha_bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:steps])
        expected = np.sqrt(alpha_bar) * x_0[b].numpy() + np.sqrt(1 - alpha_bar) * eps[b].numpy()
        np.testing.assert_allclose(x_t[b], expected, atol=1e-5)


def test_predict_x_0_inverts_q_sample_and_clamps():
    x_0, eps, t = uniform(3, 3, 4, 5) * 2 - 1, normal(3, 3, 4, 5), torch.tensor([1, 100, 500])
    x_t = diffusion.q_sample(x_0, t, eps)
    torch.testing.assert_close(diffusion.predict_x_0(x_t, t, eps), x_0, atol=1e-4, rtol=0)
    assert diffusion.predict_x_0(x_t * 100, t, eps).abs().max() == 1


# ---- sampling ---------------------------------------------------------------------------------


def test_ddim_step_with_eta_1_has_the_mean_and_variance_of_the_ddpm_posterior():
    """q(x_{t-1} | x_t, x_0) as the product of two Gaussians (arXiv:2006.11239, Eq. 6-7)."""
    x_0, eps, noise = uniform(4, 3, 4, 4) * 2 - 1, normal(4, 3, 4, 4), normal(4, 3, 4, 4, seed=1)
    t = torch.tensor([1, 2, 50, 400])
    x_t = diffusion.q_sample(x_0, t, eps)
    ours = diffusion.ddim_step(x_t, t, t - 1, x_0, 1.0, noise).numpy()
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(ours[0], x_0[0], atol=1e-4)  # t = 1: the posterior is x_0 itself
    for b, step in enumerate(t.tolist()[1:], start=1):
        beta, before = betas[step - 1], np.prod(1 - betas[: step - 1])
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = np.sqrt(1 - beta) / beta * x_t[b].numpy()
        mean = (mean + np.sqrt(before) / (1 - before) * x_0[b].numpy()) / precision
        expected = mean + noise[b].numpy() / np.sqrt(precision)
        np.testing.assert_allclose(ours[b], expected, atol=2e-3 if step == 2 else 1e-3)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=4), st.integers(1, 1000))
def test_steps_of_noise_fall_from_t_start_to_0(t_start, num_steps):
    """Each column in quadratic steps; a short chain begins with copies of its t_start."""
    table = diffusion.steps_of_noise(t_start, num_steps)
    assert len(table) == min(num_steps, max(t_start)) + 1
    assert table[0] == t_start and table[-1] == [0] * len(t_start)
    for T, column in zip(t_start, zip(*table, strict=True), strict=True):
        falls = [now - after for now, after in itertools.pairwise(column)]
        waiting = falls.count(0)
        assert len(falls) - waiting == min(num_steps, T) and not any(falls[:waiting])
        falls = falls[waiting:]
        assert all(now >= after - 1 for now, after in itertools.pairwise(falls))  # up to rounding
        assert falls == [1] * T or num_steps < T


def test_ddim_step_with_eta_0_moves_along_the_same_noise():
    x_0, eps = uniform(3, 3, 4, 4) * 2 - 1, normal(3, 3, 4, 4)
    t, t_next = torch.tensor([10, 100, 400]), torch.tensor([0, 50, 399])
    x_next = diffusion.ddim_step(diffusion.q_sample(x_0, t, eps), t, t_next, x_0)
    torch.testing.assert_close(x_next, diffusion.q_sample(x_0, t_next, eps), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("t_start", "num_steps", "eta"),
    [(300, 300, 1.0), (7, 3, 0.5), (1, 1, 0.0), (1000, 20, 0.0)],
)
def test_sampling_with_the_true_noise_finds_the_image(t_start, num_steps, eta):
    target, calls = uniform(2, 3, 4, 4), []

    def exact(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        calls.append(t.tolist())
        alpha_bar = diffusion.alpha_bar(t)
        return (x_t - alpha_bar.sqrt() * diffusion.to_signed(target)) / (1 - alpha_bar).sqrt()

    start, c = uniform(2, 3, 4, 4, seed=5), torch.zeros(2, 1, 4, 4)
    x = diffusion.sample(exact, start, c, [t_start] * 2, num_steps, generators(0, 1), eta)
    torch.testing.assert_close(x, target, atol=1e-4, rtol=0)
    assert len(calls) == num_steps and calls[0] == [t_start] * 2 and calls[-1][0] >= 1
    assert all(a[0] > b[0] for a, b in zip(calls, calls[1:], strict=False))


@pytest.mark.parametrize("num_steps", [10, 40])
def test_a_short_chain_makes_detail_of_the_right_size(num_steps):
    """Of pixels ~ N(0, .1^2), whose noise can be predicted exactly: the posterior is a Gaussian.

    With the variance of DDPM's step their std would be .074 after 10 steps, .091 after 40.
    """
    size, start = 0.1, (normal(1, 3, 128, 128) * 0.1 + 1) / 2

    def exact(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        alpha_bar = diffusion.alpha_bar(t)
        x_0 = alpha_bar.sqrt() * size**2 / (alpha_bar * size**2 + 1 - alpha_bar) * x_t
        return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()

    x = diffusion.sample(exact, start, start, [300], num_steps, generators(0), 1.0)
    assert diffusion.to_signed(x).std() == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(("num_steps", "eta"), [(5, 0.0), (5, 1.0), (300, 1.0)])
def test_rows_equal_each_row_alone_with_its_seed_and_its_t_start(num_steps, eta):
    """Short chains begin later; a row with t_start 0 is the start image in any company."""
    ts, start, c = [300, 0, 20, 3, 1], uniform(5, 3, 4, 4), uniform(5, 1, 4, 4, seed=1)
    evaluations = []

    def net(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert len(x_t) == len(t) == len(c)
        evaluations.append(t.tolist())
        return x_t / 2 + c * t.view(-1, 1, 1, 1) / 1000

    x = diffusion.sample(net, start, c, ts, num_steps, generators(*range(5)), eta)
    calls, evaluations = evaluations, []
    for b, t in enumerate(ts):
        facts = start[b : b + 1], c[b : b + 1], [t], num_steps, generators(b), eta
        assert torch.equal(diffusion.sample(net, *facts)[0], x[b])
    assert torch.equal(x[1], start[1])
    # As many evaluations of each row as alone, and as few calls as the longest chain has.
    assert len(calls) == num_steps
    assert sorted(sum(calls, [])) == sorted(sum(evaluations, []))
    assert 300 in calls[0] and all(1 <= t <= 300 for t in sum(calls, []))
    other = diffusion.sample(net, start, c, ts, num_steps, generators(*range(5, 10)), eta)
    assert [torch.equal(a, b) for a, b in zip(x, other, strict=True)] == [t == 0 for t in ts]


# ---- U-Net ------------------------------------------------------------------------------------


def test_timestep_embedding_separates_all_steps():
    embedding = diffusion.timestep_embedding(torch.arange(1001), 16)
    assert embedding.shape == (1001, 16)
    assert torch.equal(embedding[0], torch.tensor([1.0] * 8 + [0.0] * 8))
    distance = torch.cdist(embedding.double(), embedding.double()).fill_diagonal_(1)
    assert distance.min() > 1e-3


@pytest.mark.parametrize(("widths", "blocks"), [((8,), 1), ((8, 20, 12), 2)])
def test_unet_keeps_the_size_and_starts_at_zero(widths, blocks):
    net = diffusion.UNet(5, widths, blocks, (len(widths) - 1,))
    out = net(normal(2, 3, 8, 12), torch.tensor([1, 500]), normal(2, 5, 8, 12))
    assert out.shape == (2, 3, 8, 12) and out.abs().max() == 0


def test_every_input_of_the_unet_matters():
    net = built()
    x, t, c = normal(2, 3, 8, 8), torch.tensor([10, 400]), normal(2, 4, 8, 8)
    out = net(x, t, c)
    for other in (net(x + 0.5, t, c), net(x, t + 50, c), net(x, t, c + normal(2, 4, 8, 8, seed=1))):
        assert (out - other).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("as_printed", [False, True])
@pytest.mark.parametrize(
    "without", [(), ("degradation",), ("content",), ("degradation", "content")], ids=str
)
def test_condition_depends_on_what_an_ablation_leaves(without, as_printed):
    net = built(without=without, as_printed=as_printed)
    degradation, content, lr_hat = normal(2, 16), normal(2, 3, 8, 8), normal(2, 3, 8, 8)
    c = net.condition(degradation, content, lr_hat)
    assert c.shape == (2, 4, 8, 8)
    same_degradation = torch.equal(net.condition(degradation + 1, content, lr_hat), c)
    same_content = torch.equal(net.condition(degradation, content + 1, lr_hat), c)
    assert (same_degradation, same_content) == ("degradation" in without, "content" in without)
    # The output of Rec_lr shows both, so an ablation leaves it out.
    same_lr_hat = torch.equal(net.condition(degradation, content, lr_hat + 1), c)
    assert same_lr_hat == (bool(without) or as_printed)


# ---- training ---------------------------------------------------------------------------------


def test_real_example_reads_an_lr_image_at_four_times_its_size():
    net, lr = built(), uniform(2, 3, 16, 24)
    x_0, degradation, content, lr_hat = diffusion.real_example(net, lr)
    assert torch.equal(x_0, lr) and not lr_hat.any()
    assert degradation.shape == (2, 16) and content.shape == (2, 3, 16, 24)


def test_the_real_images_of_a_batch_have_f_deg_of_other_photos_and_their_own_coarse_content(
    monkeypatch,
):
    net, lr, hr, lr_ref = built(), *(uniform(4, 3, side, side) for side in (16, 64, 32))
    conditions = []
    monkeypatch.setattr(net, "condition", lambda *c: conditions.append(c) or real(*c))
    real = diffusion.DecoupledDDPM.condition.__get__(net)
    diffusion.decoupled_loss_with_additions(net, [lr, lr_ref, hr], TINY, make_generator(0))
    ((degradation, content, lr_hat),) = conditions
    assert len(content) == 4 + 2  # with the synthetic pairs
    torch.testing.assert_close(degradation[:4], net.extractors.e_deg(lr_ref))
    torch.testing.assert_close(content[:4], net.extractors.content(resized(lr, 64, 64)))
    assert torch.equal(lr_hat[:4], lr)


def test_m_sees_nothing_of_detail_as_fine_as_the_remainder():
    """A Gaussian of 1.5 pixels leaves 2 % at .3 cycles per pixel, and almost all below .03."""
    net, x = built(), torch.arange(64.0)
    for cycles, low, high in ((1 / 64, 0.98, 1), (0.3, 0, 0.025), (0.5, 0, 0.01)):
        wave = 0.5 + 0.3 * (2 * math.pi * cycles * x).cos().expand(1, 3, 64, 64)
        seen = net.seen_by_m(wave, wave)[..., 8:-8]
        for maps, full in zip(seen.split(3, 1), (wave, diffusion.to_signed(wave)), strict=True):
            assert low <= maps.std() / full[..., 8:-8].std() <= high
    assert torch.equal(built(as_printed=True).seen_by_m(wave, wave), wave)


def test_f_deg_in_training_is_the_mean_of_one_up_to_all_references(monkeypatch):
    net = built()
    monkeypatch.setattr(net.extractors.e_deg, "forward", lambda x: x.mean((2, 3)))
    image = 100 * torch.arange(9.0)[:, None, None, None]
    lr_refs = [6.0 * 2**k + image.expand(9, 3, 8, 8) for k in range(3)]  # 6, 12, 24
    means = diffusion.mean_degradation(net, lr_refs)
    assert (means - image[:, :, 0, 0])[:, 0].tolist() == [6, 6, 6, 9, 9, 9, 14, 14, 14]
    alone = diffusion.mean_degradation(net, [refs[:1] for refs in lr_refs])
    assert alone.tolist() == [[14] * 3]


def test_synthetic_example_takes_degradation_from_another_scene(monkeypatch):
    """Row k is D(X_2k, theta_k); its F_deg is read from D(X_{2k-1}, theta_k)."""
    net, hr, seen = built(), uniform(6, 3, 64, 64), []

    def means(lr: Tensor) -> Tensor:
        return lr.mean((2, 3)).repeat(1, 6)[:, :16]

    monkeypatch.setattr(net.extractors.e_deg, "forward", lambda lr: seen.append(lr) or means(lr))
    real = degrade.degrade

    def spy(image: Tensor, theta: object, generator: torch.Generator) -> Tensor:
        seen.extend([image, theta])
        return real(image, theta, generator)

    monkeypatch.setattr(degrade, "degrade", spy)
    lr, degradation, content, lr_hat = diffusion.synthetic_example(
        net, hr, TINY.recipes, make_generator(0)
    )
    image, theta, reference = seen
    assert torch.equal(image, torch.cat([hr[::2], hr[[5, 1, 3]]]))
    assert torch.equal(theta.blur_sigma[:3], theta.blur_sigma[3:])
    assert torch.equal(degradation, means(reference)) and not torch.equal(reference, lr)
    torch.testing.assert_close(content, net.extractors.content(hr[::2]))
    expected = net.extractors.reconstruct(degradation, hr[::2], content).clamp(0, 1)
    torch.testing.assert_close(lr_hat, expected)
    assert lr.shape == (3, 3, 16, 16) and 0 <= lr.min() and lr.max() <= 1


@pytest.mark.parametrize("small_t", [False, True])
@pytest.mark.parametrize("draws", [1, 2])
def test_ddpm_loss_of_an_exact_network_is_zero_and_all_steps_are_drawn(small_t, draws):
    x_0, steps = uniform(4000 // draws, 3, 1, 1), []

    def exact(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        steps.append(t)
        assert len(x_t) == len(t) == len(c) == 4000
        alpha_bar = diffusion.alpha_bar(t)
        return (x_t - alpha_bar.sqrt() * diffusion.to_signed(c)) / (1 - alpha_bar).sqrt()

    cfg = replace(TINY, t_max=20, small_t=small_t, draws=draws)
    loss = diffusion.ddpm_loss(exact, x_0, x_0, cfg, make_generator(0))["loss"]
    assert loss < 1e-6
    assert steps[0].unique().tolist() == list(range(1, 21))
    expected = math.log(6) / math.log(21) if small_t else 0.25
    assert (steps[0] <= 5).float().mean() == pytest.approx(expected, abs=0.03)


def test_loss_falls_on_one_batch():
    net, lr, hr = built(), uniform(2, 3, 8, 8), uniform(2, 3, 32, 32)
    opt = torch.optim.Adam([*net.modulation.parameters(), *net.unet.parameters()], 1e-2)
    values = []
    for _ in range(15):
        photos = lr, uniform(2, 3, 16, 16), hr
        losses = diffusion.decoupled_loss_with_additions(net, photos, TINY, make_generator(0))
        loss = losses["loss"]
        opt.zero_grad()
        loss.backward()
        opt.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]


@pytest.fixture
def cfg(tmp_path):
    """Settings of a training on three small photos of each kind, with weights of stage 1."""
    for name, size in (("hr", 72), ("lr", 40)):
        for i in range(3):
            save_image(tmp_path / name / f"{i}.png", uniform(3, size, size + 8, seed=i))
    weights = built().extractors.state_dict()
    state = {"step": 0, "net": weights, "ema": weights, "config": asdict(STAGE_1)}
    torch.save(state, tmp_path / "stage_1.pt")
    folders = {"hr": (str(tmp_path / "hr"),), "lr": (str(tmp_path / "lr"),)}
    checkpoint = str(tmp_path / "stage_1.pt")
    return replace(TINY, **folders, checkpoint=checkpoint, out=str(tmp_path / "out"))


def train(cfg: Config, **changes: object) -> dict:
    """Train from a fixed seed; the checkpoint that it leaves."""
    torch.manual_seed(0)
    cfg = replace(cfg, **changes)  # type: ignore[arg-type]
    diffusion.train(cfg, CPU)
    return load_checkpoint(f"{cfg.out}/last.pt")


def test_training_goes_on_from_given_weights_with_the_extractors_of_stage_1(tmp_path, cfg):
    """As somebody does who tunes the shipped weights to a camera, or has new extractors."""
    frozen = {"steps": 1, "learning_rate": 1e-12, "finetune_learning_rate": 0.0}
    before = train(cfg, **frozen)["ema"]
    changed = {k: v + 0.1 for k, v in before.items()}
    torch.save({"ema": changed, "config": config_of()}, tmp_path / "a.pt")
    given = frozen | {"start_from": str(tmp_path / "a.pt"), "out": str(tmp_path / "b")}
    for key, value in train(cfg, **given)["net"].items():
        expected = before if key.startswith("extractors.") else changed
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="--start-from .*another configuration"):
        train(cfg, **given | {"out": str(tmp_path / "c")}, mod_channels=12)


@pytest.mark.parametrize("changes", [{}, {"as_printed": True, "hr": ()}], ids=str)
def test_training_fine_tunes_the_layers_of_a_5_alone(cfg, changes):
    # Two steps: at the first one the zeroed last convolution lets no gradient through to M.
    # 1e-6 would be lost in rounding where a gradient of these tiny networks is tiny, too.
    after = train(cfg, steps=2, finetune_learning_rate=1e-3, **changes)["net"]
    assert Image.open(f"{cfg.out}/last.png").size == (4 * 36, 18 + 3 * 36)  # the swap grid
    before = load_checkpoint(cfg.checkpoint)["net"]
    changed = {k for k, v in before.items() if not torch.equal(v, after[f"extractors.{k}"])}
    nets = extractors.Extractors(STAGE_1)
    tuned = {id(p) for p in diffusion.finetuned(nets)}
    names = {k for k, p in nets.named_parameters() if id(p) in tuned}
    assert {k.rsplit(".", 2)[0] for k in names} == {"vqvae.encoder.down.0.block.0", "e_deg.mapping"}
    assert changed <= names and {k for k in names if k.endswith("weight")} <= changed


def test_training_resumes_exactly_and_its_checkpoint_rebuilds_the_model(tmp_path, cfg):
    cfg = replace(cfg, without=("degradation",))
    once = train(cfg, steps=2)
    train(cfg, steps=1, out=str(tmp_path / "twice"))
    twice = train(cfg, steps=2, out=str(tmp_path / "twice"))
    for kind in ("net", "ema"):
        assert equal(once[kind], twice[kind])
    net = diffusion.load(once, "last.pt")
    assert equal(net.state_dict(), once["ema"])
    assert net.without == ("degradation",)


@pytest.mark.parametrize(
    "change",
    [{"widths": [-1]}, {"t_max": "500"}, {"without": ["x"]}, {"extractors": None}, {"new": 1}],
    ids=str,
)
def test_a_checkpoint_s_configuration_is_not_believed(change):
    state = {"ema": built().state_dict(), "config": config_of() | change}
    with pytest.raises(UserError, match="x.pt: "):
        diffusion.load(state, "x.pt")


def test_a_run_is_not_continued_with_other_stage_1_weights(tmp_path, cfg):
    """The weights of the run would silently win."""
    train(cfg, steps=1)
    copied = tmp_path / "copied.pt"  # the same weights may lie elsewhere
    state = torch.load(cfg.checkpoint, weights_only=True)
    torch.save(state, copied)
    train(cfg, checkpoint=str(copied), steps=2)
    state["ema"]["e_deg.first.bias"][0] += 0.1
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="was trained from different weights"):
        train(cfg, checkpoint=str(tmp_path / "other.pt"), steps=2)


@pytest.mark.parametrize("changes", [{"as_printed": True}, {"without": ("content", "degradation")}])
def test_hr_photos_that_would_not_be_used_are_refused(cfg, changes):
    with pytest.raises(UserError, match="--hr: training"):
        train(cfg, steps=1, **changes)
    train(cfg, steps=1, hr=(), **changes)


# ---- devices and memory -------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["small", "as-printed"])
def test_no_operation_of_the_loss_and_the_picture_leaves_the_gpu(preset, tmp_path, monkeypatch):
    cfg = Config(**diffusion.PRESETS[preset])
    stage_1 = extractors.Config(**extractors.PRESETS[preset])
    sheets = []
    monkeypatch.setattr("common.images.save_image", lambda path, x: sheets.append(x))
    with fake_cuda(), torch.no_grad():
        with torch.device("cuda:0"):
            net = diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, cfg)
            lr, lr_ref = (torch.zeros(2, 3, n * cfg.crop, n * cfg.crop) for n in (1, 2))
            hr = torch.zeros(2, 3, 4 * cfg.crop, 4 * cfg.crop)
        draw = torch.Generator()
        if cfg.as_printed:
            losses = [diffusion.decoupled_loss(net, lr, cfg, draw)]
        else:
            losses = [diffusion.decoupled_loss_with_additions(net, [lr, lr_ref, hr], cfg, draw)]
        assert all(value["loss"].device == lr.device for value in losses)
        diffusion.sampled_swap_grid(net, lr[:1], hr, tmp_path / "grid.png")
    assert sheets[0].device.type == "cpu"


def paper() -> tuple[diffusion.DecoupledDDPM, list[nn.Parameter]]:
    """The paper's networks and what stage 2 trains of them."""
    stage_1, cfg = extractors.Config(), Config()
    net = diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, cfg)
    trained = [*net.modulation.parameters(), *net.unet.parameters()]
    return net, trained + diffusion.finetuned(net.extractors)


def test_a_step_of_the_paper_fits_into_20_gib(monkeypatch):
    """Counted; the batch of a process, at the paper's crop of 256."""
    cfg = Config()
    with counted_memory():
        net, trained = paper()
        encode = net.extractors.vqvae.encode

        def only_with_gradient(x: Tensor, again: bool = False) -> Tensor:  # others leave nothing
            if torch.is_grad_enabled():
                return encode(x, again)
            return x.new_zeros(len(x), 3, x.shape[2] // 4, x.shape[3] // 4)

        monkeypatch.setattr(net.extractors.vqvae, "encode", only_with_gradient)
        lr, draw = torch.zeros(cfg.batch_size, 3, cfg.crop, cfg.crop), torch.Generator()
        used = training_memory(net, trained, lambda: diffusion.decoupled_loss(net, lr, cfg, draw))
        assert 8 < used < 20


def test_an_image_of_the_paper_takes_less_than_14_tflop():
    """Counted, with attention by products of matrices."""
    counter = FlopCounterMode(display=False)
    with counted_memory(), counter, pytest.MonkeyPatch.context() as patch:
        by_products = extractors.attention_by_products
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", by_products)
        net, trained = paper()
        net.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
        lr = torch.zeros(1, 3, 256, 256)
        diffusion.decoupled_loss(net, lr, Config(), torch.Generator())["loss"].backward()
        assert 10e12 < counter.get_total_flops() < 14e12


def test_a_learning_rate_of_0_freezes_and_saves_the_work(cfg, monkeypatch):
    """No gradient goes through E_cont, which takes most of the work here."""
    monkeypatch.setattr(diffusion, "sampled_swap_grid", lambda *_: {})
    counts, before = [], load_checkpoint(cfg.checkpoint)["net"]
    cfg = replace(cfg, as_printed=True, hr=(), widths=(8,), attention=(), steps=2)
    for rate in (1e-6, 0.0):
        with FlopCounterMode(display=False) as counter:
            after = train(cfg, finetune_learning_rate=rate, out=f"{cfg.out}{rate}")["net"]
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.6 * counts[0]
    assert all(torch.equal(v, after[f"extractors.{k}"]) for k, v in before.items())
