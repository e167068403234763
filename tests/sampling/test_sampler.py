import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import MODEL

from mimicmotion.model.unet import build_model
from mimicmotion.sampling.sampler import (
    Conditions,
    decode,
    euler_scheduler,
    generator_of,
    sample,
    tile_weight,
    tiles,
    unit_normal,
)

TIME = {"fps": 7, "motion_bucket": 127}


def test_scheduler_is_the_released_one():
    scheduler = euler_scheduler()
    scheduler.set_timesteps(25)
    assert float(scheduler.init_noise_sigma) == pytest.approx(700.0007, abs=1e-4)
    assert float(scheduler.sigmas[0]) == pytest.approx(700.0) and float(scheduler.sigmas[-2]) == pytest.approx(0.002)
    assert float(scheduler.sigmas[-1]) == 0.0 and len(scheduler.timesteps) == 25
    ramp = torch.linspace(0, 1, 25, dtype=torch.float64)
    karras = (700 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 700 ** (1 / 7))) ** 7
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), karras, rtol=1e-5, atol=0)
    torch.testing.assert_close(scheduler.timesteps.double(), karras.log() / 4, rtol=1e-5, atol=1e-6)


def test_tiles_are_upstreams_where_upstream_works():
    assert tiles(16, 16, 6) == [list(range(16))]
    got = tiles(200, 72, 6)
    assert [tile[1] for tile in got] == [1, 67, 129] and all(len(tile) == 72 and tile[0] == 0 for tile in got)
    assert got[0] == [0, *range(1, 72)] and got[-1] == [0, *range(129, 200)]


@pytest.mark.parametrize("num_frames", [2, 5, 8, 9, 13, 14, 15, 21, 40])
@pytest.mark.parametrize("overlap", [0, 1, 3, 6])
def test_tiles_cover_every_frame_and_overlap(num_frames, overlap):
    got = tiles(num_frames, 8, overlap)
    assert {frame for tile in got for frame in tile} == set(range(num_frames))
    assert all(tile[0] == 0 and len(tile) == min(8, num_frames) for tile in got)
    for before, after in pairwise(got):
        assert len(set(before[1:]) & set(after[1:])) >= overlap - 1
    assert got[-1][-1] == num_frames - 1


def test_bad_tiles_are_refused():
    for arguments in ((1, 8, 2), (20, 8, 7), (20, 8, -1)):
        with pytest.raises(ValueError, match=r"give|needs"):
            tiles(*arguments)


def test_tile_weight_falls_linearly_from_the_centre():
    assert tile_weight(4).tolist() == [0.25, 0.75, 0.75, 0.25]
    weight = tile_weight(71)
    assert float(weight.max()) == pytest.approx(1.0) and int(weight.argmax()) == 35
    torch.testing.assert_close(weight[:36].diff(), torch.full((35,), 2 / 71))
    torch.testing.assert_close(weight, weight.flip(0))


def _case(B, F, size=8):
    torch.manual_seed(0)
    model = build_model(MODEL).eval()
    torch.nn.init.normal_(model.pose_net.final_proj.weight, std=0.1)
    conditions = Conditions(
        reference_latent=torch.randn(B, 4, size, size),
        image_embedding=torch.randn(B, 1, 32),
        pose=torch.rand(B, F, 3, 8 * size, 8 * size),
    )
    return model, conditions, unit_normal(generator_of(3), (B, F, 4, size, size))[0]


def _sample(model, conditions, noise, **changes):
    settings: dict[str, Any] = {"num_steps": 2, "guidance": 2.0, "tile": 4, "overlap": 1} | TIME | changes
    return sample(model, conditions, noise, **settings)


def test_clip_shorter_than_a_tile_no_guidance_and_batches_work():
    # 8x8 latents shrink to one pixel, where a GroupNorm over two numbers makes rounding errors large
    model, conditions, noise = _case(2, 3, size=16)
    together = _sample(model, conditions, noise)
    for guidance in (0.0, 1.0, 2.0):
        latents = _sample(model, conditions, noise, guidance=guidance)
        assert latents.shape == noise.shape and latents.isfinite().all()
    for i in range(2):
        one = Conditions(
            reference_latent=conditions.reference_latent[i : i + 1],
            image_embedding=conditions.image_embedding[i : i + 1],
            pose=conditions.pose[i : i + 1],
        )
        alone = _sample(model, one, noise[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=2e-3)


def test_same_noise_gives_the_same_bits():
    model, conditions, noise = _case(1, 6)
    assert torch.equal(noise, unit_normal(generator_of(3), (1, 6, 4, 8, 8))[0])
    assert torch.equal(_sample(model, conditions, noise), _sample(model, conditions, noise))


class Recorder:
    """Stands for the model: answers with the frame's number plus what it was given to tell passes apart."""

    def __init__(self):
        self.calls = []

    def __call__(self, joined, timestep, embedding, ids, pose, keep=None):
        self.calls.append((joined, timestep, embedding, ids, pose))
        return joined[:, :, :4] * 0 + (1.0 if pose is None else 3.0)


def test_guidance_and_the_unconditional_pass():
    _, conditions, noise = _case(1, 3)
    recorder, scheduler = Recorder(), euler_scheduler()
    scheduler.set_timesteps(1)
    start = noise * scheduler.init_noise_sigma
    scheduler.scale_model_input(start, scheduler.timesteps[0])
    got = _sample(recorder, conditions, noise, num_steps=1, guidance=2.0)
    wanted = scheduler.step(
        torch.full_like(noise, 1 + 2.0 * (3 - 1)), scheduler.timesteps[0], start, return_dict=False
    )[0]
    torch.testing.assert_close(got, wanted)
    (joined, _, embedding, ids, pose), (joined_free, _, embedding_free, ids_free, pose_free) = recorder.calls
    assert pose is not None and pose_free is None
    assert torch.equal(joined[:, :, 4:], conditions.reference_latent[:, None].expand(-1, 3, -1, -1, -1))
    assert (
        not joined_free[:, :, 4:].any()
        and not embedding_free.any()
        and torch.equal(embedding, conditions.image_embedding)
    )
    assert ids.tolist() == ids_free.tolist() == [[6.0, 127.0, 0.0]]
    recorder.calls.clear()
    _sample(recorder, conditions, noise, num_steps=1, guidance=2.0, reference_noise=0.25)
    assert [call[3].tolist() for call in recorder.calls] == [[[6.0, 127.0, 0.25]]] * 2
    recorder.calls.clear()
    _sample(recorder, conditions, noise, num_steps=1, guidance=1.0)
    assert len(recorder.calls) == 1 and recorder.calls[0][4] is not None


def test_overlapping_tiles_are_blended_by_weight():
    _, conditions, noise = _case(1, 6)

    class ByTile(Recorder):
        def __call__(self, joined, timestep, embedding, ids, pose, keep=None):
            super().__call__(joined, timestep, embedding, ids, pose, keep)
            return joined[:, :, :4] * 0 + float(len(self.calls))

    scheduler = euler_scheduler()
    scheduler.set_timesteps(1)
    start = noise * scheduler.init_noise_sigma
    scheduler.scale_model_input(start, scheduler.timesteps[0])
    got = _sample(ByTile(), conditions, noise, num_steps=1, guidance=1.0, overlap=2)
    # tiles [0, 1, 2, 3] and [0, 3, 4, 5] with weights 1/4, 3/4, 3/4, 1/4
    blended = torch.tensor([1.5, 1.0, 1.0, (0.25 * 1 + 0.75 * 2) / 1.0, 2.0, 2.0]).view(1, -1, 1, 1, 1)
    wanted = scheduler.step(blended.expand_as(noise), scheduler.timesteps[0], start, return_dict=False)[0]
    torch.testing.assert_close(got, wanted)


def test_conditions_of_other_sizes_are_refused():
    model, conditions, noise = _case(1, 3)
    with pytest.raises(ValueError, match="pose has 3 frames, the noise 2"):
        _sample(model, conditions, noise[:, :2])
    with pytest.raises(ValueError, match="as many of each"):
        dataclasses.replace(conditions, reference_latent=torch.zeros(2, 4, 8, 8))


def test_decode_unscales_and_takes_a_few_frames_at_a_time():
    sizes = []

    def decoder(part):
        sizes.append(len(part))
        return part[:, :3] * 2

    latents = torch.linspace(-0.3, 0.3, 19).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)
    got = torch.cat([*decode(latents, decoder, scaling_factor=0.5, frames_at_once=8)])
    assert sizes == [8, 8, 3]
    torch.testing.assert_close(got, (latents[:, :3] * 4).clamp(-1, 1))
