"""diffusion.py: the noise schedule and its steps in closed form, the U-Net, the training."""

import itertools
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import common
import diffusion
import extractors
from diffusion import ALPHAS_CUMPROD, BETAS, Config
from tests.fake_cuda import counted_memory, fake_cuda, really, training_memory

CPU = common.Runtime(torch.device("cpu"))
STAGE_1 = extractors.Config(
    compile=False,
    vq_channels=8,
    vq_multipliers=(1, 2, 2),
    vq_blocks=1,
    vq_codes=16,
    deg_channels=8,
    deg_blocks=1,
    deg_dim=16,
    mod_channels=8,
    as_printed=False,
)
TINY = Config(
    compile=False,
    batch_size=4,
    crop=16,
    widths=(8, 16),
    blocks=1,
    attention=(1,),
    mod_channels=8,
    cond_channels=4,
    recipes=("realesrgan", "light", "camera"),
    as_printed=False,
    bf16=False,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=common.generator(seed, *shape))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=common.generator(seed, *shape))


def generators(*seeds: int) -> list[torch.Generator]:
    return [common.generator(seed) for seed in seeds]


def built(**changes: object) -> diffusion.DecoupledDDPM:
    """A tiny model whose zero-initialised weights are moved."""
    torch.manual_seed(0)
    cfg = replace(TINY, **changes)  # type: ignore[arg-type]
    stage_1 = replace(STAGE_1, as_printed=cfg.as_printed)
    net = diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, cfg)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape)
    return net


# ---- noise schedule ---------------------------------------------------------------------------


def test_alphas_cumprod_matches_a_float64_product():
    betas = np.linspace(1e-4, 0.02, 1000)
    expected = np.concatenate([[1.0], np.exp(np.log1p(-betas).cumsum())])
    np.testing.assert_allclose(BETAS, betas, rtol=1e-12)
    assert ALPHAS_CUMPROD.shape == (1001,) and ALPHAS_CUMPROD.dtype == torch.float32
    np.testing.assert_allclose(ALPHAS_CUMPROD, expected, rtol=1e-6)
    assert ALPHAS_CUMPROD[-1] < 1e-4


def test_q_sample_without_noise_steps_is_the_image():
    x_0, eps = uniform(3, 3, 4, 5), normal(3, 3, 4, 5)
    assert torch.equal(diffusion.q_sample(x_0, torch.zeros(3, dtype=torch.long), eps), x_0)


def test_q_sample_matches_closed_form():
    x_0, eps, t = uniform(4, 3, 4, 5), normal(4, 3, 4, 5), torch.tensor([1, 30, 500, 1000])
    x_t = diffusion.q_sample(x_0, t, eps).numpy()
    for b, steps in enumerate(t.tolist()):
        alpha_bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:steps])
        expected = np.sqrt(alpha_bar) * x_0[b].numpy() + np.sqrt(1 - alpha_bar) * eps[b].numpy()
        np.testing.assert_allclose(x_t[b], expected, atol=1e-5)


def test_q_sample_equals_one_step_after_the_other_in_distribution():
    """Mean and variance of the chain x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise."""
    steps, x = 40, torch.full((200_000,), 0.8, dtype=torch.float64)
    gen = common.generator(3)
    for beta in BETAS[:steps]:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(len(x), generator=gen)
    x_0 = torch.full((1, 1, 1, 200_000), 0.8)
    ours = diffusion.q_sample(x_0, torch.tensor([steps]), normal(1, 1, 1, 200_000, seed=4))
    assert ours.mean().item() == pytest.approx(x.mean().item(), abs=4e-3)
    assert ours.var().item() == pytest.approx(x.var().item(), rel=0.02)
    assert ours.var().item() == pytest.approx(1 - ALPHAS_CUMPROD[steps].item(), rel=0.02)


def test_predict_x_0_inverts_q_sample_and_clamps():
    x_0, eps, t = uniform(3, 3, 4, 5) * 2 - 1, normal(3, 3, 4, 5), torch.tensor([1, 100, 500])
    x_t = diffusion.q_sample(x_0, t, eps)
    torch.testing.assert_close(diffusion.predict_x_0(x_t, t, eps), x_0, atol=1e-4, rtol=0)
    assert diffusion.predict_x_0(x_t * 100, t, eps).abs().max() == 1


# ---- sampling ---------------------------------------------------------------------------------


def test_p_sample_has_the_mean_and_variance_of_the_posterior():
    """q(x_{t-1} | x_t, x_0) as the product of two Gaussians (arXiv:2006.11239, Eq. 6-7)."""
    x_0, eps, noise = uniform(4, 3, 4, 4) * 2 - 1, normal(4, 3, 4, 4), normal(4, 3, 4, 4, seed=1)
    t = torch.tensor([1, 2, 50, 400])
    x_t = diffusion.q_sample(x_0, t, eps)
    ours = diffusion.p_sample(x_t, t, diffusion.predict_x_0(x_t, t, eps), noise).numpy()
    betas = np.linspace(1e-4, 0.02, 1000)
    for b, step in enumerate(t.tolist()):
        beta, before = betas[step - 1], np.prod(1 - betas[: step - 1])
        if step == 1:  # the posterior is x_0 itself
            np.testing.assert_allclose(ours[b], x_0[b], atol=1e-4)
            continue
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = np.sqrt(1 - beta) / beta * x_t[b].numpy()
        mean = (mean + np.sqrt(before) / (1 - before) * x_0[b].numpy()) / precision
        expected = mean + noise[b].numpy() / np.sqrt(precision)
        np.testing.assert_allclose(ours[b], expected, atol=2e-3 if step == 2 else 1e-3)


def test_p_sample_equals_ddim_step_with_eta_1():
    x_t, x_0, noise = normal(4, 3, 4, 4), uniform(4, 3, 4, 4), normal(4, 3, 4, 4, seed=2)
    t = torch.tensor([1, 2, 50, 400])
    ddim = diffusion.ddim_step(x_t, t, t - 1, x_0, 1.0, noise)
    torch.testing.assert_close(diffusion.p_sample(x_t, t, x_0, noise), ddim, atol=1e-3, rtol=0)


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_steps_of_noise_fall_from_t_start_to_0(t_start, num_steps):
    n = min(t_start, num_steps)
    ts = diffusion.steps_of_noise(t_start, n)
    assert (ts[0], ts[-1], len(ts)) == (t_start, 0, n + 1)
    falls = [now - after for now, after in itertools.pairwise(ts)]
    assert min(falls) >= 1
    assert all(now >= after - 1 for now, after in itertools.pairwise(falls))  # up to rounding
    assert diffusion.steps_of_noise(t_start, t_start) == list(range(t_start, -1, -1))


def test_ddim_step_with_eta_0_moves_along_the_same_noise():
    x_0, eps = uniform(3, 3, 4, 4) * 2 - 1, normal(3, 3, 4, 4)
    t, t_next = torch.tensor([10, 100, 400]), torch.tensor([0, 50, 399])
    x_next = diffusion.ddim_step(diffusion.q_sample(x_0, t, eps), t, t_next, x_0)
    torch.testing.assert_close(x_next, diffusion.q_sample(x_0, t_next, eps), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("t_start", "num_steps", "eta"),
    [(300, 300, 1.0), (30, 10, 0.0), (7, 3, 0.5), (1, 1, 0.0), (500, 7, 0.0), (1000, 20, 0.0)],
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


def test_the_ode_of_ddim_is_of_first_order():
    """Of images N(mu, s^2) the ideal eps_pred is known, and where a chain from T would end, too.

    The ODE keeps (x_t - sqrt(abar_t) mu) / sqrt(abar_t s^2 + 1 - abar_t) as it is; mu and s are
    small enough that no prediction of x_0 is clamped.
    """
    mu, s, T = 0.1, 0.1, 400
    start = uniform(2, 3, 8, 8)

    def error(num_steps: int) -> float:
        states = {}

        def ideal(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
            alpha_bar, states[int(t[0])] = diffusion.alpha_bar(t), x_t
            sigma = (1 - alpha_bar).sqrt()
            return sigma * (x_t - alpha_bar.sqrt() * mu) / (alpha_bar * s**2 + sigma**2)

        diffusion.sample(ideal, start, start, [T] * 2, num_steps, generators(0, 1))
        mean_std = []
        for t in (T, 100):
            alpha_bar = ALPHAS_CUMPROD[t]
            mean_std.append((mu * alpha_bar.sqrt(), (s**2 * alpha_bar + 1 - alpha_bar).sqrt()))
        (mean_start, std_start), (mean, std) = mean_std
        exact = mean + std * (states[T] - mean_start) / std_start
        return (states[100] - exact).square().mean().sqrt().item()

    errors = [error(n) for n in (10, 20, 40)]
    for coarse, fine in itertools.pairwise(errors):
        assert 1.8 < coarse / fine < 2.2


def test_no_noise_steps_give_the_start_image():
    start = uniform(2, 3, 4, 4)
    x = diffusion.sample(lambda *_: 1 / 0, start, start, [0, 0], 10, generators(0, 1))
    assert torch.equal(x, start)


@pytest.mark.parametrize(("num_steps", "eta"), [(5, 0.0), (5, 1.0), (300, 1.0)])
def test_rows_of_different_t_start_equal_each_row_alone(num_steps, eta):
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


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_depends_on_the_seeds_alone(eta):
    start, c = uniform(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)

    def run(*seeds: int) -> Tensor:
        return diffusion.sample(
            lambda x, t, c: 0.9 * x, start, c, [20] * 2, 5, generators(*seeds), eta
        )

    assert torch.equal(run(1, 2), run(1, 2))
    assert not torch.equal(run(1, 2)[0], run(3, 2)[0])


def test_the_draws_of_a_row_do_not_depend_on_the_batch():
    together = diffusion.randn_rows(torch.zeros(3, 3, 4, 5), generators(1, 2, 3))
    for b, seed in enumerate((1, 2, 3)):
        assert torch.equal(
            together[b], diffusion.randn_rows(torch.zeros(1, 3, 4, 5), generators(seed))[0]
        )
    start, c = uniform(3, 3, 4, 4), torch.zeros(3, 1, 4, 4)

    def run(*rows: int) -> Tensor:
        draws = generators(*rows)
        rows_ = list(rows)
        return diffusion.sample(
            lambda x, t, c: x / 2, start[rows_], c[rows_], [20] * len(rows), 5, draws, 1.0
        )

    assert torch.equal(run(0, 1, 2)[1], run(1)[0])


def test_signed_and_image_ranges_are_inverse():
    x = uniform(2, 3, 4, 4)
    torch.testing.assert_close(diffusion.to_image(diffusion.to_signed(x)), x)
    assert diffusion.to_image(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]


# ---- U-Net ------------------------------------------------------------------------------------


def test_timestep_embedding_separates_all_steps():
    embedding = diffusion.timestep_embedding(torch.arange(1001), 16)
    assert embedding.shape == (1001, 16)
    assert torch.equal(embedding[0], torch.tensor([1.0] * 8 + [0.0] * 8))
    distance = torch.cdist(embedding.double(), embedding.double()).fill_diagonal_(1)
    assert distance.min() > 1e-3


@pytest.mark.parametrize("widths", [(8,), (8, 16), (8, 16, 16), (8, 12, 16, 16)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_unet_keeps_the_size_and_starts_at_zero(widths, blocks):
    net = diffusion.UNet(5, widths, blocks, (len(widths) - 1,))
    torch.nn.init.zeros_(net.last.bias)
    out = net(normal(2, 3, 16, 24), torch.tensor([1, 500]), normal(2, 5, 16, 24))
    assert out.shape == (2, 3, 16, 24)
    assert out.abs().max() == 0


def test_unet_starts_near_zero():
    """Only the bias of the last convolution, which the zeroed weight leaves alone."""
    torch.manual_seed(0)
    net = diffusion.UNet(5, (8, 16), 1, ())
    out = net(normal(2, 3, 8, 8), torch.tensor([1, 500]), normal(2, 5, 8, 8))
    torch.testing.assert_close(out, net.last.bias[:, None, None].expand(2, 3, 8, 8))


def test_unet_of_the_paper_can_be_built():
    cfg = Config()
    with torch.device("meta"):
        net = diffusion.UNet(cfg.cond_channels, cfg.widths, cfg.blocks, cfg.attention)
    assert sum(p.numel() for p in net.parameters()) > 50e6


def test_every_input_of_the_unet_matters():
    net = built()
    x, t, c = normal(2, 3, 8, 8), torch.tensor([10, 400]), normal(2, 4, 8, 8)
    out = net(x, t, c)
    for other in (net(x + 0.5, t, c), net(x, t + 50, c), net(x, t, c + normal(2, 4, 8, 8, seed=1))):
        assert (out - other).abs().amax((1, 2, 3)).min() > 1e-4


def test_condition_depends_on_degradation_and_content():
    for as_printed in (False, True):
        net, known = built(as_printed=as_printed), normal(2, 4, 8, 8)
        degradation, content = normal(2, 16), normal(2, 3, 8, 8)
        c = net.condition(degradation, content, known)
        assert c.shape == (2, 4, 8, 8)
        assert (c - net.condition(degradation + 1, content, known)).abs().max() > 1e-4
        assert (c - net.condition(degradation, content + 1, known)).abs().max() > 1e-4
        seen = (c - net.condition(degradation, content, known + 1)).abs().max() > 1e-4
        assert seen != as_printed


# ---- training ---------------------------------------------------------------------------------


def test_real_example_reads_an_lr_image_at_four_times_its_size():
    net, lr = built(), uniform(2, 3, 16, 24)
    x_0, degradation, content, answer = diffusion.real_example(net, lr)
    assert torch.equal(x_0, lr) and not answer.any()
    assert degradation.shape == (2, 16) and content.shape == (2, 3, 16, 24)


def test_synthetic_example_takes_degradation_from_another_scene(monkeypatch):
    """Row b is D(X_b, theta_b); its code is read from D(X_{b-1}, theta_b)."""
    net, hr, seen = built(), uniform(3, 3, 64, 64), []

    def means(lr: Tensor) -> Tensor:
        return lr.mean((2, 3)).repeat(1, 6)[:, :16]

    monkeypatch.setattr(net.extractors.e_deg, "forward", lambda lr: seen.append(lr) or means(lr))
    real = diffusion.degrade.degrade

    def spy(image: Tensor, theta: object, generator: torch.Generator) -> Tensor:
        seen.extend([image, theta])
        return real(image, theta, generator)

    monkeypatch.setattr(diffusion.degrade, "degrade", spy)
    lr, degradation, content, answer = diffusion.synthetic_example(
        net, hr, TINY.recipes, common.generator(0)
    )
    image, theta, reference = seen
    assert torch.equal(image, torch.cat([hr, hr.roll(1, 0)]))
    assert torch.equal(theta.blur_sigma[:3], theta.blur_sigma[3:])
    assert torch.equal(degradation, means(reference)) and not torch.equal(reference, lr)
    torch.testing.assert_close(content, net.extractors.content(hr))
    rec_lr = net.extractors.reconstruct(degradation, hr, content).clamp(0, 1)
    torch.testing.assert_close(answer[:, :3], 2 * rec_lr - 1)
    assert (answer[:, 3] == 1).all()
    assert lr.shape == (3, 3, 16, 16) and 0 <= lr.min() and lr.max() <= 1


@pytest.mark.parametrize("t_power", [1.0, 2.0])
def test_ddpm_loss_of_an_exact_network_is_zero_and_all_steps_are_drawn(t_power):
    x_0, steps = uniform(4000, 3, 1, 1), []

    def exact(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        steps.append(t)
        alpha_bar = diffusion.alpha_bar(t)
        return (x_t - alpha_bar.sqrt() * diffusion.to_signed(x_0)) / (1 - alpha_bar).sqrt()

    cfg = replace(TINY, t_max=20, t_power=t_power)
    loss = diffusion.ddpm_loss(exact, x_0, x_0, cfg, common.generator(0))["loss"]
    assert loss < 1e-6
    assert steps[0].unique().tolist() == list(range(1, 21))
    assert (steps[0] <= 5).float().mean() == pytest.approx(0.25 ** (1 / t_power), abs=0.03)


def test_ddpm_loss_of_a_zero_network_is_the_variance_of_the_noise():
    x_0 = uniform(64, 3, 8, 8)
    zero = lambda x, t, c: x * 0  # noqa: E731
    loss = diffusion.ddpm_loss(zero, x_0, x_0, TINY, common.generator(0))["loss"]
    assert loss.item() == pytest.approx(1, abs=0.05)


def test_loss_falls_on_one_batch():
    net, lr, hr = built(), uniform(2, 3, 16, 16), uniform(2, 3, 64, 64)
    opt = torch.optim.Adam([*net.modulation.parameters(), *net.unet.parameters()], 3e-3)
    values = []
    for _ in range(30):
        loss = diffusion.decoupled_loss(net, lr, hr, TINY, common.generator(0))["loss"]
        opt.zero_grad()
        loss.backward()
        opt.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]


def test_without_a_part_the_condition_ignores_it():
    code, content, answer = normal(2, 16), normal(2, 3, 4, 4), normal(2, 4, 4, 4)
    for without in ((), ("degradation",), ("content",), ("degradation", "content")):
        net = built(without=without)
        c = net.condition(code, content, answer)
        same_code = torch.equal(net.condition(code + 1, content, answer), c)
        same_content = torch.equal(net.condition(code, content + 1, answer), c)
        assert (same_code, same_content) == ("degradation" in without, "content" in without)
        # The answer would tell of both.
        assert torch.equal(net.condition(code, content, answer + 1), c) == bool(without)


def test_a_unet_takes_any_widths():
    x, c = normal(1, 3, 8, 8), normal(1, TINY.cond_channels, 8, 8)
    for widths in ((48, 96), (8, 20, 12)):  # 48 + 96 are not a multiple of 32
        net = built(widths=widths, attention=(1,))
        assert net(x, torch.tensor([5]), c).shape == x.shape


def test_without_content_nothing_is_asked_of_e_cont(monkeypatch):
    """It would be most of the time of SynDiff's training."""
    net, ablated = built(), built(without=("content",))
    lr, hr = uniform(2, 3, 16, 24), uniform(2, 3, 64, 96)
    for x in (ablated, net):
        monkeypatch.setattr(x.extractors.vqvae.encoder, "forward", None)
    for share in (lr, None), (lr, hr):
        loss = diffusion.decoupled_loss(ablated, *share, TINY, common.generator(0))["loss"]
        assert loss.isfinite()
        with pytest.raises(TypeError):
            diffusion.decoupled_loss(net, *share, TINY, common.generator(0))


def test_an_ablation_is_stored_and_comes_back(tmp_path, data):
    cfg = replace(TINY, **data, out=str(tmp_path), steps=1, without=("degradation",))
    diffusion.train(cfg, CPU)
    state = common.load_checkpoint(tmp_path / "last.pt")
    assert diffusion.load(state, "last.pt").without == ("degradation",)
    with pytest.raises(common.UserError, match="--without foo"):
        diffusion.train(replace(cfg, without=("foo",)), CPU)


@pytest.fixture
def data(tmp_path):
    """Flags for photos and stage-1 weights."""
    for name, size in (("hr", 72), ("lr", 24)):
        for i in range(3):
            common.save_image(tmp_path / name / f"{i}.png", uniform(3, size, size + 8, seed=i))
    weights = built().extractors.state_dict()
    state = {"step": 0, "net": weights, "ema": weights, "config": asdict(STAGE_1)}
    torch.save(state, tmp_path / "stage_1.pt")
    return {
        "hr": (str(tmp_path / "hr"),),
        "lr": (str(tmp_path / "lr"),),
        "checkpoint": str(tmp_path / "stage_1.pt"),
    }


def test_training_goes_on_from_given_weights_with_the_extractors_of_stage_1(tmp_path, data):
    """As somebody does who tunes the shipped weights to a camera, or has new extractors."""
    frozen = {"steps": 1, "learning_rate": 1e-12, "finetune_learning_rate": 0.0}
    cfg = replace(TINY, **data, **frozen)
    torch.manual_seed(1)
    diffusion.train(replace(cfg, out=str(tmp_path / "a")), CPU)
    before = common.load_checkpoint(tmp_path / "a/last.pt")
    altered = {k: v + 1 * k.startswith("extractors.") for k, v in before["ema"].items()}
    torch.save(before | {"ema": altered}, tmp_path / "a.pt")
    torch.manual_seed(2)
    start = str(tmp_path / "a.pt")
    diffusion.train(replace(cfg, out=str(tmp_path / "b"), start_from=start), CPU)
    after = common.load_checkpoint(tmp_path / "b/last.pt")["net"]
    assert all(torch.allclose(v, after[k], rtol=0, atol=1e-9) for k, v in before["ema"].items())
    other = replace(cfg, out=str(tmp_path / "c"), start_from=start, mod_channels=12)
    with pytest.raises(common.UserError, match="--start-from .*another configuration"):
        diffusion.train(other, CPU)


@pytest.mark.parametrize("as_printed", [False, True])
def test_training_changes_the_fine_tuned_layers_and_no_other_of_stage_1(tmp_path, data, as_printed):
    # Two steps: at the first one the zeroed last convolution lets no gradient through to M.
    data |= {"hr": ()} if as_printed else {}
    cfg = replace(TINY, **data, out=str(tmp_path), steps=2, as_printed=as_printed)
    diffusion.train(cfg, CPU)
    after = common.load_checkpoint(tmp_path / "last.pt")["net"]
    before = common.load_checkpoint(data["checkpoint"])["net"]
    changed = {k for k, v in before.items() if not torch.equal(v, after[f"extractors.{k}"])}
    nets = extractors.Extractors(STAGE_1)
    tuned = {id(p) for p in diffusion.finetuned(nets)}
    names = {k for k, p in nets.named_parameters() if id(p) in tuned}
    assert {k.rsplit(".", 2)[0] for k in names} == {"vqvae.encoder.down.0.block.0", "e_deg.mapping"}
    assert changed and changed <= names
    assert {k for k in names if k.endswith("weight")} <= changed


def test_stage_1_stays_as_it_is_where_nothing_is_fine_tuned(tmp_path, data):
    cfg = replace(TINY, **data, out=str(tmp_path), steps=2, finetune_learning_rate=0.0)
    diffusion.train(cfg, CPU)
    assert Image.open(tmp_path / "last.png").size == (4 * 36, 18 + 3 * 36)  # the swap grid
    after = common.load_checkpoint(tmp_path / "last.pt")["net"]
    before = common.load_checkpoint(data["checkpoint"])["net"]
    assert all(torch.equal(v, after[f"extractors.{k}"]) for k, v in before.items())
    assert after["unet.last.weight"].abs().max() > 0


def test_training_resumes_exactly(tmp_path, data):
    cfg = replace(TINY, **data)
    for out, runs in {"once": [2], "twice": [1, 2]}.items():
        for steps in runs:
            torch.manual_seed(0)
            diffusion.train(replace(cfg, out=str(tmp_path / out), steps=steps), CPU)
    once, twice = (common.load_checkpoint(tmp_path / out / "last.pt") for out in ("once", "twice"))
    for kind in ("net", "ema"):
        assert all(torch.equal(v, twice[kind][k]) for k, v in once[kind].items())


def test_a_checkpoint_rebuilds_the_model(tmp_path, data):
    diffusion.train(replace(TINY, **data, out=str(tmp_path), steps=1), CPU)
    state = common.load_checkpoint(tmp_path / "last.pt")
    net = diffusion.load(state, "last.pt")
    assert all(torch.equal(v, state["ema"][k]) for k, v in net.state_dict().items())
    assert next(net.parameters()).device == CPU.device


@pytest.mark.parametrize(
    "change",
    [
        {"widths": []}, {"widths": [-1]}, {"widths": ["a"]}, {"widths": None}, {"blocks": 2.5},
        {"blocks": 10**6}, {"widths": [10**6]}, {"t_max": 10**9}, {"t_max": "500"}, {"crop": 15},
        {"extractors": []}, {"extractors": None}, {"without": ["x"]}, {"cond_channels": 4096},
        {"of_another_version": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_s_configuration_is_not_believed(change):
    net = built()
    config = asdict(TINY) | {"extractors": asdict(STAGE_1)} | change
    with pytest.raises(common.UserError, match="x.pt: "):
        diffusion.load({"ema": net.state_dict(), "config": config}, "x.pt")
    stage_1 = asdict(STAGE_1) | {"deg_dim": "16"}
    config = asdict(TINY) | {"extractors": stage_1}
    with pytest.raises(common.UserError, match="x.pt: deg_dim = '16'"):
        diffusion.load({"ema": net.state_dict(), "config": config}, "x.pt")


def test_weights_that_are_not_finite_make_no_model():
    weights = built().state_dict()
    weights["unet.last.bias"][0] = float("nan")
    config = asdict(TINY) | {"extractors": asdict(STAGE_1)}
    with pytest.raises(common.UserError, match="unet.last.bias is not finite"):
        diffusion.load({"ema": weights, "config": config}, "x.pt")


def test_a_run_is_not_continued_with_other_stage_1_weights(tmp_path, data):
    """The weights of the run would silently win."""
    cfg = replace(TINY, **data, out=str(tmp_path), steps=1)
    diffusion.train(cfg, CPU)
    state = torch.load(data["checkpoint"], weights_only=True)
    state["ema"]["e_deg.first.bias"][0] += 0.1
    torch.save(state, tmp_path / "other.pt")
    for steps in (1, 2):
        other = replace(cfg, checkpoint=str(tmp_path / "other.pt"), steps=steps)
        with pytest.raises(common.UserError, match="began from other weights"):
            diffusion.train(other, CPU)
    copied = tmp_path / "copied.pt"  # the same weights may lie elsewhere
    copied.write_bytes(open(data["checkpoint"], "rb").read())
    diffusion.train(replace(cfg, checkpoint=str(copied), steps=2), CPU)


@pytest.mark.parametrize("changes", [{"as_printed": True}, {"without": ("content", "degradation")}])
def test_hr_photos_that_would_not_be_used_are_refused(tmp_path, data, changes):
    with pytest.raises(common.UserError, match="--hr: training"):
        diffusion.train(replace(TINY, **data, out=str(tmp_path), steps=1, **changes), CPU)
    diffusion.train(replace(TINY, **data | {"hr": ()}, out=str(tmp_path), steps=1, **changes), CPU)


@pytest.mark.parametrize(
    "changes",
    [
        {"widths": ()},
        {"widths": (0, 8)},
        {"accumulate": 3},
        {"save_every": 0},
        {"t_max": 0},
        {"t_max": 1001},
        {"crop": 15},
        {"batch_size": 1},
        {"checkpoint": "missing.pt"},
        {"lr": ("missing",)},
    ],
)
def test_senseless_settings_end_in_one_sentence(tmp_path, data, changes):
    cfg = replace(TINY, **(data | {"out": str(tmp_path / "out")} | changes))
    with pytest.raises(common.UserError, match="--"):
        diffusion.train(cfg, CPU)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", ["small", "paper", "as-printed"])
def test_no_operation_of_the_loss_and_the_picture_leaves_the_gpu(preset, tmp_path, monkeypatch):
    cfg = Config(**diffusion.PRESETS[preset])
    stage_1 = extractors.Config(**extractors.PRESETS[preset])
    monkeypatch.setattr(extractors, "sample_mixed", really(extractors.sample_mixed))
    sheets = []
    monkeypatch.setattr(common, "save_image", lambda path, x: sheets.append(x))
    with fake_cuda(), torch.no_grad():
        with torch.device("cuda:0"):
            net = diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, cfg)
            lr = torch.zeros(2, 3, cfg.crop, cfg.crop)
            hr = torch.zeros(2, 3, 4 * cfg.crop, 4 * cfg.crop)
        for scenes in (hr, None):
            loss = diffusion.decoupled_loss(net, lr, scenes, cfg, torch.Generator())["loss"]
            assert loss.device == lr.device
        diffusion.swap_grid(net, lr, hr, tmp_path / "grid.png")
        assert sheets[0].device.type == "cpu"


def test_a_step_of_the_paper_fits_into_24_gib():
    """Counted; the batch of a process, at the paper's crop of 256: content is read in tiles."""
    stage_1, cfg = extractors.Config(), Config()
    with counted_memory():
        net = diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, cfg)
        lr, draw = torch.zeros(cfg.batch_size, 3, cfg.crop, cfg.crop), torch.Generator()
        trained = [*net.modulation.parameters(), *net.unet.parameters()]
        trained += diffusion.finetuned(net.extractors)
        used = training_memory(
            net, trained, lambda: diffusion.decoupled_loss(net, lr, None, cfg, draw)
        )
        assert 8 < used < 24
