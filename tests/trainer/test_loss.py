import pytest
import torch

from mimicmotion import loss as losses
from mimicmotion.diffusion import preconditioning


def denoising_loss(*inputs):
    """Of all clips."""
    return losses.denoising_loss(*inputs).clips.mean()


def _case(B=3):
    torch.manual_seed(0)
    latents, noisy, output = torch.randn(3, B, 2, 4, 5, 6).unbind()
    return output, noisy, latents, torch.tensor([0.1, 1.0, 30.0])[:B]


def test_loss_is_the_error_of_the_networks_target():
    output, noisy, latents, sigma = (t.double() for t in _case())
    got = preconditioning(sigma.view(-1, 1, 1, 1, 1))
    target = (latents - got.c_skip * noisy) / got.c_out
    wanted = ((output - target) ** 2).mean()
    loss = denoising_loss(output, noisy, latents, sigma, torch.ones(3, 2, 1, 5, 6))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)


def test_the_loss_in_hands_is_a_plain_sum_there_and_a_count_that_is_zero_without_hands():
    output, noisy, latents, sigma = _case()
    region = torch.zeros(3, 2, 1, 5, 6)
    region[0, 1, 0, 1:3, 2:5] = region[2, :, :, 4] = 1
    output.requires_grad_()
    found = losses.denoising_loss(output, noisy, latents, sigma, 1 + 9 * region).hands
    got = preconditioning(sigma.view(-1, 1, 1, 1, 1))
    error = (output - (latents - got.c_skip * noisy) / got.c_out).detach() ** 2
    for clip in (0, 2):
        wanted = error[clip][region[clip].expand(2, 4, 5, 6) == 1].mean()
        torch.testing.assert_close(found[clip, 0] / found[clip, 1], wanted, rtol=1e-4, atol=0)
    assert found[:, 1].tolist() == [4 * 6, 0, 4 * 2 * 6] and found[1, 0] == 0 and not found.requires_grad


def test_hand_region_weighs_ten_before_the_mean():
    output, noisy, latents, sigma = _case(1)
    ones, region = torch.ones(1, 2, 1, 5, 6), torch.zeros(1, 2, 1, 5, 6)
    region[:, :, :, 1:3, 2:4] = 1
    whole = denoising_loss(output, noisy, latents, sigma, ones)
    inside = denoising_loss(output, noisy, latents, sigma, region)
    weighted = denoising_loss(output, noisy, latents, sigma, ones + 9 * region)
    torch.testing.assert_close(weighted, whole + 9 * inside)


def test_parts_of_a_batch_average_to_the_whole():
    output, noisy, latents, sigma = _case()
    weight = 1 + 9 * (torch.rand(3, 2, 1, 5, 6) < 0.2).float()
    whole = denoising_loss(output, noisy, latents, sigma, weight)
    parts = [denoising_loss(*(t[i : i + 1] for t in (output, noisy, latents, sigma, weight))) for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_parts_of_a_clip_add_up_to_its_loss():
    """Of two frames of nine and the seven others, as ranks have them."""
    torch.manual_seed(1)
    latents, noisy, output = torch.randn(3, 3, 9, 4, 5, 6, dtype=torch.float64).unbind()
    sigma, weight = torch.tensor([0.1, 1.0, 30.0]).double(), 1 + 9 * (torch.rand(3, 9, 1, 5, 6) < 0.2).double()
    whole = losses.denoising_loss(output, noisy, latents, sigma, weight)
    parts = [
        losses.denoising_loss(output[:, own], noisy[:, own], latents[:, own], sigma, weight[:, own], share=share)
        for own, share in ((slice(0, 2), 2 / 9), (slice(2, 9), 7 / 9))
    ]
    torch.testing.assert_close(parts[0].clips + parts[1].clips, whole.clips, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts[0].hands + parts[1].hands, whole.hands, rtol=1e-12, atol=0)


def test_min_snr_is_the_velocitys_loss_times_min_snr_over_snr_plus_one():
    """As the paper has it for a model that predicts v (arXiv 2303.09556, section 3.4)."""
    output, noisy, latents, sigma = (t.double() for t in _case())
    got = preconditioning(sigma.view(-1, 1, 1, 1, 1))
    velocity_loss = ((output - (latents - got.c_skip * noisy) / got.c_out) ** 2).flatten(1).mean(1)
    snr = 1 / sigma**2
    ones = torch.ones(3, 2, 1, 5, 6)
    found = losses.denoising_loss(output, noisy, latents, sigma, ones, min_snr_gamma=5.0).clips
    torch.testing.assert_close(found, velocity_loss * snr.clamp(max=5) / (snr + 1), rtol=1e-5, atol=0)


def test_half_precision_output_is_judged_in_float32():
    output, noisy, latents, sigma = _case()
    loss = denoising_loss(output.bfloat16(), noisy, latents, sigma, torch.ones(3, 2, 1, 5, 6))
    assert loss.dtype == torch.float32
    assert torch.equal(
        loss, denoising_loss(output.bfloat16().float(), noisy, latents, sigma, torch.ones(3, 2, 1, 5, 6))
    )


def test_not_finite_stays_not_finite():
    output, noisy, latents, sigma = _case()
    output[0, 0, 0, 0, 0] = torch.nan
    assert denoising_loss(output, noisy, latents, sigma, torch.ones(3, 2, 1, 5, 6)).isnan()


def test_loss_weight_of_another_shape_is_refused():
    output, noisy, latents, sigma = _case()
    with pytest.raises(ValueError, match="loss_weight"):
        denoising_loss(output, noisy, latents, sigma, torch.ones(3, 2, 4, 5, 6))
