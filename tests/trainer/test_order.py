"""The order of samples: each once an epoch, whatever the ranks; a resume goes on; buckets keep pace with each other."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from mimicmotion.data.cache import Clip, Crop, Manifest
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.data.order import Order, Pick, Place
from mimicmotion.ranks.distributed import Ranks, rank_sample_ids
from mimicmotion.shapes import Bucket

CPU = torch.device("cpu")


def seen(order: Order, step: int, world_size: int = 1) -> list[Pick]:
    """The samples of a step as its ranks share them out, in micro-batches of one."""
    return [order.pick(step, sample_id) for sample_id in shared_out(order.batch_size, world_size)]


def shared_out(batch_size: int, world_size: int) -> list[int]:
    """The sample ids of all ranks, rank after rank."""
    config = tiny_config(Path("run"), batch_size=batch_size, micro_batch_size=1)
    ranks = [Ranks(rank=rank, world_size=world_size, device=CPU) for rank in range(world_size)]
    return [sample_id for rank in ranks for ids in rank_sample_ids(config, rank) for sample_id in ids]


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
    share=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_epoch_has_each_sample_once_whatever_the_number_of_ranks(num_samples, world_size, share, seed):
    order = Order({f"bucket {n}": size for n, size in enumerate(num_samples)}, world_size * share, seed, Place())
    counts: dict[tuple[str, int], Counter[int]] = {}
    num_rounds = 4
    num_steps = order._all_batches(num_rounds)
    for step in range(num_steps):
        picks = seen(order, step, world_size)
        assert {pick.bucket for pick in picks} == {order.bucket(step)}  # one shape on all ranks
        for pick in picks:
            counts.setdefault((pick.bucket, pick.epoch), Counter())[pick.sample] += 1
    for name, size in order.num_samples.items():
        taken = order.taken(num_steps)[name]
        assert num_rounds * size - order.batch_size < taken <= num_rounds * size  # in proportion to samples
        for epoch in range(taken // size):
            assert counts[name, epoch] == Counter(range(size))
        begun = counts.get((name, taken // size), Counter())
        assert begun.total() == taken % size and all(count == 1 for count in begun.values())


@pytest.fixture
def make(tmp_path):
    """Datasets of clips that are described and not there: (batch size, clips' lengths by shape, lengths, seed)."""

    def of(batch_size, clips, lengths=(), seed=0):
        described = [
            Clip(
                clip_id=f"{height}x{width}-{number}", source="a.mp4", source_sha256=f"{number}", source_height=8,
                source_width=8, frames_per_second=8.0, first_frame=0, num_frames=num_frames, frame_stride=1,
                crop=Crop(left=0, top=0, width=8, height=8), height=height, width=width, keypoints_file="k",
                tensors_file="t", statistics={},
            )
            for (height, width), found in clips.items()
            for number, num_frames in enumerate(found)
        ]  # fmt: skip
        manifest = Manifest(
            height=64, width=64, num_frames=9, encoder_name="e", encoder_version="1", scaling_factor=1.0,
            spatial_factor=8, pose_backend="p", pose_version="1", decoder="d", encoder_device="cpu", frame_stride=1,
            bounds={}, clips=described,
        )  # fmt: skip
        manifest.write(tmp_path)
        return ClipDataset(tmp_path, 9, seed, batch_size=batch_size, lengths=lengths)

    return of


CLIPS = {(64, 64): [9, 20, 33, 9], (64, 32): [17, 9], (32, 64): [12]}


def test_ranks_that_change_on_resume_see_each_sample_as_often_as_without(make):
    straight = make(8, CLIPS)
    wanted = [straight._draw(step, sample_id) for step in range(30) for sample_id in range(8)]
    found, place = [], straight.place()
    for world_size, steps in ((2, range(11)), (1, range(11, 12)), (4, range(12, 30))):
        dataset = make(8, CLIPS)  # a new process
        dataset.go_on_from(json.loads(json.dumps(place)), steps.start)
        found += [dataset._draw(step, sample_id) for step in steps for sample_id in shared_out(8, world_size)]
        place = dataset.place()
    assert found == wanted


def test_another_batch_size_goes_on_within_the_epoch(make):
    clips = {(64, 64): [9, 20, 33, 9]}  # 1 + 2 + 4 + 1 samples
    first, second = make(3, clips), make(2, clips)
    head = [first._draw(step, sample_id) for step in range(4) for sample_id in range(3)]  # 4 of the second epoch
    second.go_on_from(first.place(), 4)
    tail = [second._draw(4 + step, sample_id) for step in range(6) for sample_id in range(2)]
    counts = Counter(pick[0] for pick in head + tail)
    assert counts == {"64x64-0": 3, "64x64-1": 6, "64x64-2": 12, "64x64-3": 3}  # three whole epochs
    again = make(2, clips)
    again.go_on_from(second.place(), 7)
    assert [again._draw(7, i) for i in range(2)] == tail[6:8]


def test_other_clips_begin_the_next_epoch_of_their_bucket_alone(make):
    before = make(2, CLIPS)
    taken = before._order.taken(9)
    changed = {**CLIPS, (64, 32): [17, 9, 9]}  # of 3 samples now of 4
    after = make(2, changed)
    after.go_on_from(before.place(), 9)
    wide, narrow = "64x64x9", "64x32x9"
    assert taken[narrow] % 3 and taken[wide] % 8
    assert after._order.place.taken[narrow] == 4 * (taken[narrow] // 3 + 1)
    assert after._order.place.taken[wide] == taken[wide]
    for name, changes in (("seed", {"seed": 1}), ("clips", {"clips": changed})):
        other = make(**{"batch_size": 2, "clips": CLIPS, **changes})
        other.go_on_from(before.place(), 9)
        assert other._order.place.step == 9, name


def test_a_clip_is_trained_in_its_own_size_and_the_longest_length_that_it_fills(make):
    dataset = make(1, {(64, 64): [9, 8, 33, 6], (64, 32): [5]}, lengths=(5, 3))
    assert dataset.buckets == {
        Bucket(height=64, width=64, num_frames=9): 1 + 4,
        Bucket(height=64, width=64, num_frames=5): 2 + 1,
        Bucket(height=64, width=32, num_frames=5): 1,
    }
    assert next(iter(dataset.buckets)).num_frames == 9  # the largest first
    for step in range(20):
        name, _, start, num_frames, _ = dataset._draw(step, 0)
        assert str(dataset.bucket_of(step)).endswith(f"x{num_frames}")
        assert start + num_frames - 1 <= dataset._clips[name].num_frames
    with pytest.raises(ValueError, match=r"num_frames 7 and clip 64x64-3 of 6 frames; prepare again for 7 frames"):
        make(1, {(64, 64): [9, 8, 33, 6]}, lengths=(7,))


def test_a_bucket_of_fewer_samples_than_a_batch_waits_its_turn_and_is_seen_as_often(make):
    dataset = make(4, {(64, 64): [9] * 15, (64, 32): [9]})
    steps = [step for step in range(40) if dataset.bucket_of(step).width == 32]
    assert len(steps) == 2  # 16 samples are 4 batches a round: 10 rounds, of which each fourth has one of it
    epochs = [dataset._order.pick(step, sample_id).epoch for step in steps for sample_id in range(4)]
    assert epochs == list(range(8))
    assert len({dataset._draw(step, i)[1] for step in steps for i in range(4)}) > 3  # each time another reference


def test_the_place_is_of_a_run_that_has_been_resumed_twice(make):
    first = make(4, CLIPS)
    resumed = make(2, CLIPS)
    resumed.go_on_from(first.place(), 5)
    wanted = [resumed._draw(step, 0) for step in range(5, 30)]
    later = make(2, CLIPS)
    later.go_on_from(resumed.place(), 12)
    assert [later._draw(step, 0) for step in range(12, 30)] == wanted[7:]
    assert dataclasses.asdict(later._order.place)["step"] == 5
