import math

import pytest
import torch

from mimicmotion.diffusion import denoised, draw, log_sigma_mean, noise_batch, preconditioning, time_ids
from mimicmotion.sampling.sampler import euler_scheduler

SETTINGS = {"mean": 0.7, "std": 1.6, "reference_mean": -3.0, "reference_std": 0.5, "dropout": 0.1}
SHAPE = (2, 4, 3, 3)


def _draws(num, **changes):
    return [draw(0, step, 0, (1, 1, 1, 1), **(SETTINGS | changes)) for step in range(num)]


def test_preconditioning_by_hand():
    got = preconditioning(torch.tensor([2.0], dtype=torch.float64))
    root = math.sqrt(5)
    wanted = {"c_skip": 1 / 5, "c_out": -2 / root, "c_in": 1 / root, "c_noise": math.log(2) / 4, "weight": 5 / 4}
    for name, value in wanted.items():
        assert float(getattr(got, name)) == pytest.approx(value, abs=1e-12)


def test_weight_makes_the_networks_own_target_have_unit_weight():
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    got = preconditioning(sigma)
    torch.testing.assert_close(got.weight * got.c_out**2, torch.ones_like(sigma))


def test_denoised_is_what_the_scheduler_takes_for_the_clean_sample():
    scheduler = euler_scheduler()
    scheduler.set_timesteps(5)
    output, noisy = torch.randn(1, 2, 4, 3, 3), torch.randn(1, 2, 4, 3, 3) * 700
    timestep = scheduler.timesteps[0]
    scaled = scheduler.scale_model_input(noisy, timestep)
    sigma = scheduler.sigmas[:1]
    torch.testing.assert_close(scaled, preconditioning(sigma).c_in * noisy)
    torch.testing.assert_close(timestep, preconditioning(sigma).c_noise[0])
    wanted = scheduler.step(output, timestep, noisy, return_dict=False)[1]
    torch.testing.assert_close(denoised(output, noisy, sigma), wanted)


def test_mean_and_spread_of_log_sigma_are_not_swapped():
    log_sigma = torch.stack([d.sigma for d in _draws(4000)]).log()
    assert float(log_sigma.mean()) == pytest.approx(0.7, abs=4 * 1.6 / math.sqrt(4000))
    assert float(log_sigma.std()) == pytest.approx(1.6, rel=0.05)
    reference = torch.stack([d.reference_sigma for d in _draws(4000)]).log()
    assert float(reference.mean()) == pytest.approx(-3.0, abs=4 * 0.5 / math.sqrt(4000))
    assert float(reference.std()) == pytest.approx(0.5, rel=0.05)


def test_log_sigma_mean_by_resolution():
    assert log_sigma_mean(320, 576) == pytest.approx(0.7)
    assert log_sigma_mean(576, 1024) == log_sigma_mean(1024, 576) == pytest.approx(1.0)
    assert log_sigma_mean(64, 64) == pytest.approx(0.7) and log_sigma_mean(2160, 3840) == pytest.approx(1.0)
    between = log_sigma_mean(448, 768)
    share = math.log(448 * 768 / (320 * 576)) / math.log(576 * 1024 / (320 * 576))
    assert between == pytest.approx(0.7 + 0.3 * share)


def test_draw_depends_on_seed_step_and_sample_alone():
    torch.manual_seed(1)
    first = draw(3, 5, 7, SHAPE, **SETTINGS)
    torch.manual_seed(2)
    again = draw(3, 5, 7, SHAPE, **SETTINGS)
    for name in ("sigma", "reference_sigma", "is_dropped", "noise", "reference_noise"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    for other in ((4, 5, 7), (3, 6, 7), (3, 5, 8), (5, 3, 7), (3, 7, 5)):
        assert not torch.equal(draw(*other, SHAPE, **SETTINGS).noise, first.noise)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_dropout_rate(rate):
    share = float(torch.stack([d.is_dropped for d in _draws(4000, dropout=rate)]).mean())
    assert share == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / 4000))


def _batch(draws):
    torch.manual_seed(0)
    B = len(draws)
    inputs = {
        "latents": torch.randn(B, *SHAPE),
        "reference": torch.randn(B, *SHAPE[1:]),
        "pixel_sigma": torch.zeros(B),
        "image_embedding": torch.randn(B, 1, 8),
    }
    return inputs, noise_batch(**inputs, draws=draws, fps=7, motion_bucket=127)


def test_conditions_are_dropped_together_and_only_where_drawn():
    kept, dropped = (
        draw(0, 0, 0, SHAPE, **(SETTINGS | {"dropout": 0.0})),
        draw(0, 0, 1, SHAPE, **(SETTINGS | {"dropout": 1.0})),
    )
    inputs, noised = _batch([kept, dropped])
    assert torch.equal(noised.keep, torch.tensor([1.0, 0.0]))
    assert not noised.image_embedding[1].any() and not noised.reference[1].any()
    assert torch.equal(noised.image_embedding[0], inputs["image_embedding"][0])
    assert noised.reference[0].all()


def test_each_sample_of_a_batch_has_its_own_noise_scale():
    draws = [draw(0, 0, i, SHAPE, **(SETTINGS | {"dropout": 0.0})) for i in range(3)]
    inputs, noised = _batch(draws)
    for i, d in enumerate(draws):
        torch.testing.assert_close(noised.noisy[i], inputs["latents"][i] + d.sigma * d.noise)
        torch.testing.assert_close(noised.reference[i], inputs["reference"][i] + d.reference_sigma * d.reference_noise)
        torch.testing.assert_close(noised.scaled[i], noised.noisy[i] / torch.sqrt(d.sigma**2 + 1))


def test_time_ids_are_fps_less_one_then_motion_then_noise():
    assert torch.equal(time_ids(7, 127, torch.tensor([0.0, 0.5])), torch.tensor([[6.0, 127.0, 0.0], [6.0, 127.0, 0.5]]))
    draws = [draw(0, 0, 0, SHAPE, **SETTINGS)]
    _, noised = _batch(draws)
    assert noised.time_ids.tolist() == [[6.0, 127.0, pytest.approx(float(draws[0].reference_sigma))]]


def test_as_many_draws_as_clips():
    clips = torch.zeros(2, *SHAPE), torch.zeros(2, 4, 3, 3), torch.zeros(2), torch.zeros(2, 1, 8)
    with pytest.raises(ValueError, match="draws for a batch"):
        noise_batch(*clips, draws=[], fps=7, motion_bucket=127)
