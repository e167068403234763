"""A picture and poses give what the published algorithm gives, which is written out in `released_pipeline`."""

import dataclasses

import pytest
import torch
from released_pipeline import released
from tiny import tiny_config
from tiny_svd import MODEL, tiny_clip, tiny_model, tiny_vae

from mimicmotion.model.encoders import SVDEncoder
from mimicmotion.sampling.animation import frames_of, generate_latents, steer
from mimicmotion.sampling.sampler import generator_of

SIDE = 64
# Of float32 through these networks: a picture 1e-7 of itself away gives latents 6e-5 and frames 9e-5 away.
ROUNDING = 5e-4


@pytest.fixture(scope="module")
def networks():
    return tiny_model(), tiny_vae(), tiny_clip()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(3, SIDE, SIDE, generator=generator) * 2 - 1
    return picture, torch.randint(0, 256, (12, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def settings(tmp_path, *, tile, **sampling):
    config = tiny_config(tmp_path, num_frames=tile)
    sampling = {"num_steps": 2, "guidance": 3.0, "first_guidance": 1.5, "decode_frames": 3} | sampling
    return dataclasses.replace(config, model=MODEL, sampling=dataclasses.replace(config.sampling, **sampling))


def ours(networks, inputs, config, *, num_frames, seeds=(5,), reference_noise=0.0, rows_at_once=1):
    model, vae, clip = networks
    picture, poses = inputs
    encoder = SVDEncoder(vae, clip, name="tiny")
    conditions, noise = steer(
        picture,
        poses[:num_frames],
        encoder,
        config,
        generators=[*map(generator_of, seeds)],
        reference_noise=reference_noise,
    )
    latents = generate_latents(
        model, conditions, noise, config, reference_noise=reference_noise, rows_at_once=rows_at_once
    )
    return latents, [torch.cat([*frames_of(each, config, encoder)]) for each in latents]


def apart(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


# tile, overlap, frames with the reference: one tile; steps that end at the last frame; one more tile at the end
@pytest.mark.parametrize(
    ("tile", "overlap", "num_frames", "reference_noise"), [(6, 2, 6, 0.0), (5, 2, 11, 0.3), (5, 1, 12, 0.0)]
)
def test_latents_and_frames_are_the_released_ones(
    tmp_path, networks, inputs, tile, overlap, num_frames, reference_noise
):
    config = settings(tmp_path, tile=tile, tile_overlap=overlap)
    latents, (frames,) = ours(networks, inputs, config, num_frames=num_frames, reference_noise=reference_noise)
    (model, vae, clip), (picture, poses) = networks, inputs
    wanted_latents, wanted_frames = released(
        model,
        vae,
        clip,
        picture,
        poses[:num_frames].float() / 127.5 - 1,
        seed=5,
        num_steps=2,
        tile=tile,
        overlap=overlap,
        guidance=(1.5, 3.0),
        reference_noise=reference_noise,
        decode_frames=3,
    )
    assert frames.shape == wanted_frames.shape == (num_frames - 1, 3, SIDE, SIDE)
    assert apart(latents[0], wanted_latents) < ROUNDING
    assert apart(frames, wanted_frames) < ROUNDING


def test_where_the_released_pipeline_breaks(tmp_path, networks, inputs):
    """Clips shorter than a tile, guidance of 1 or less, overlap 0, several clips: each as it has to be."""
    whole = settings(tmp_path, tile=5, tile_overlap=2)
    short, _ = ours(networks, inputs, whole, num_frames=4)
    fitting = settings(tmp_path, tile=4, tile_overlap=2)
    assert torch.equal(short, ours(networks, inputs, fitting, num_frames=4)[0])  # as a tile of its own length

    free = settings(tmp_path, tile=5, tile_overlap=2, guidance=1.0, first_guidance=0.0)
    single = settings(tmp_path, tile=5, tile_overlap=2, guidance=0.5, first_guidance=None)
    assert torch.equal(ours(networks, inputs, free, num_frames=7)[0], ours(networks, inputs, single, num_frames=7)[0])

    beside = settings(tmp_path, tile=5, tile_overlap=0)
    touching = settings(tmp_path, tile=5, tile_overlap=1)
    got = ours(networks, inputs, beside, num_frames=9)[0]
    assert got.isfinite().all() and torch.equal(got, ours(networks, inputs, touching, num_frames=9)[0])

    many, pictures = ours(networks, inputs, whole, num_frames=9, seeds=(7, 5), reference_noise=0.1)
    for rows_at_once in (1, 3):
        alone, (frames,) = ours(
            networks, inputs, whole, num_frames=9, seeds=(5,), reference_noise=0.1, rows_at_once=rows_at_once
        )
        assert apart(many[1], alone[0]) < ROUNDING and apart(pictures[1], frames) < ROUNDING
    assert apart(many[0], many[1]) > 0.1


def test_noise_of_a_tile_repeats_and_that_of_a_clip_does_not(tmp_path, networks, inputs):
    picture, poses = inputs
    encoder = SVDEncoder(*networks[1:], name="tiny")
    for kind, repeats in (("tile", True), ("clip", False)):
        config = settings(tmp_path, tile=5, tile_overlap=2, noise=kind)
        _, noise = steer(picture, poses, encoder, config, generators=[generator_of(5)])
        assert torch.equal(noise[0, :5], noise[0, 5:10]) == repeats
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
