"""The schedule, samplers, U-Net and losses of stage 2."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import common
import diffusion
import extractors

STAGE_1 = extractors.Config(
    vq_channels=8, vq_codes=16, deg_channels=8, deg_blocks=1, deg_dim=16, mod_channels=8
)
STAGE_2 = diffusion.Config(
    widths=(8, 16),
    attention=(1,),
    mod_channels=8,
    cond_channels=4,
    batch_size=4,
    crop=16,
    bf16=False,
)


@pytest.fixture
def net() -> diffusion.DecoupledDDPM:
    torch.manual_seed(0)
    return diffusion.DecoupledDDPM(extractors.Extractors(STAGE_1), 16, STAGE_1.vq_z, STAGE_2)


def draws(*seeds: int) -> list[torch.Generator]:
    return [common.generator(s) for s in seeds]


def test_alphas_cumprod_is_the_product_of_the_linear_schedule() -> None:
    expected = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])
    np.testing.assert_allclose(diffusion.ALPHAS_CUMPROD.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("t", [0, 1, 300, 1000])
def test_q_sample_matches_closed_form(t: int) -> None:
    x_0, eps = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    abar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:t])
    expected = np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * eps
    x_t = diffusion.q_sample(x_0, torch.full((2,), t), eps)
    torch.testing.assert_close(x_t, expected.float(), atol=2e-4, rtol=1e-4)


def test_p_sample_is_the_ddim_step_of_eta_one() -> None:
    x_t, noise = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    eps, t = 0.1 * torch.randn(3, 3, 8, 8), torch.tensor([1, 40, 900])
    one = diffusion.p_sample(x_t, t, eps, noise)
    # p_sample uses eps only through x_0, ddim_step recomputes it: equal where x_0 is clamped, too.
    two = diffusion.ddim_step(x_t, t, t - 1, eps, 1.0, noise)
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_with_the_true_eps_recovers_x_0(eta: float) -> None:
    x_0 = torch.rand(2, 3, 8, 8) * 2 - 1

    def truth(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        abar = diffusion.alpha_bar(t)
        return (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()

    out = diffusion.sample(truth, torch.rand(2, 3, 8, 8), x_0, 400, 20, draws(0, 1), eta)
    torch.testing.assert_close(out, diffusion.to_image(x_0), atol=2e-3, rtol=0)


def test_sampling_no_steps_returns_the_start_and_is_deterministic(
    net: diffusion.DecoupledDDPM,
) -> None:
    start, c = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 16, 16)
    assert torch.equal(diffusion.sample(net, start, c, 0, 5, draws(0, 1)), start)
    with torch.no_grad():
        one = diffusion.sample(net, start, c, 50, 3, draws(0, 1))
        two = diffusion.sample(net, start, c, 50, 3, draws(0, 1))
        alone = diffusion.sample(net, start[1:], c[1:], 50, 3, draws(1))
    assert torch.equal(one, two)
    torch.testing.assert_close(one[1:], alone)


def test_unet_starts_at_zero_and_listens_to_every_input(net: diffusion.DecoupledDDPM) -> None:
    x, t, c = torch.randn(2, 3, 16, 24), torch.tensor([5, 400]), torch.randn(2, 4, 16, 24)
    assert net.unet(x, t, c).abs().max() == 0 and net.unet(x, t, c).shape == x.shape
    for p in net.unet.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    out = net.unet(x, t, c)
    for other in (net.unet(x + 1, t, c), net.unet(x, t + 90, c), net.unet(x, t, c + 1)):
        assert (other - out).abs().max() > 1e-4


def photos(tmp_path: Path, name: str, size: int, share: int) -> common.PhotoCrops:
    path = tmp_path / f"{name}.png"
    common.save_image(path, torch.rand(3, size, size, generator=common.generator(size)))
    rt = common.Runtime(torch.device("cpu"))
    return common.PhotoCrops([path], size, share, 0, rt)


def test_a_step_changes_exactly_what_is_trained_and_fine_tuned(
    net: diffusion.DecoupledDDPM, tmp_path: Path
) -> None:
    before = {k: v.clone() for k, v in net.named_parameters()}
    tuned = diffusion.finetuned(net.extractors)
    ids = {id(p) for p in tuned}
    names = {k for k, p in net.named_parameters() if id(p) in ids}
    assert {k.rsplit(".", 2)[0] for k in names} == {
        "extractors.vqvae.encoder.down.0.block.0", "extractors.e_deg.mapping"}  # fmt: skip
    lr, hr = photos(tmp_path, "lr", 16, 2), photos(tmp_path, "hr", 64, 2)
    groups = [
        {"params": [*net.modulation.parameters(), *net.unet.parameters()], "lr": 1e-3},
        {"params": tuned, "lr": 1e-4},
    ]

    def loss(
        net: diffusion.DecoupledDDPM, lr: Tensor, hr: Tensor, generator: torch.Generator
    ) -> dict:
        return diffusion.decoupled_loss(net, lr, hr, STAGE_2, generator)

    # Three steps: zero-initialised layers pass gradients on only after they have moved.
    rt = common.Runtime(torch.device("cpu"))
    common.fit(rt, net, loss, [lr, hr], groups, tmp_path / "last.pt", STAGE_2, 4, {})
    after = torch.load(tmp_path / "last.pt", weights_only=True)["net"]
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    trained = {k for k in before if k.startswith(("modulation.", "unet."))}
    frozen = {k for k in before if k not in names | trained}
    assert not changed & frozen, sorted(changed & frozen)
    assert names <= changed and trained <= changed, sorted((names | trained) - changed)


def test_the_loss_falls_on_one_batch(net: diffusion.DecoupledDDPM) -> None:
    x_0, c = torch.full((4, 3, 16, 16), 0.3), torch.zeros(4, 4, 16, 16)
    opt = torch.optim.Adam(net.unet.parameters(), 3e-3)
    values = []
    for _ in range(40):
        value = diffusion.ddpm_loss(net, x_0, c, STAGE_2, common.generator(0))
        opt.zero_grad()
        value.backward()
        opt.step()
        values.append(value.item())
    assert values[0] == pytest.approx(1, abs=0.1) and values[-1] < 0.6 * values[0]
