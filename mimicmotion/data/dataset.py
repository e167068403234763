"""Training samples of a prepared folder, and whole clips for sampling.

A sample follows from (seed, step, sample_id) alone: no ambient random state, so a resumed run sees the same samples.
Frame 0 is the reference frame, frames 1 on are consecutive, as inference tiles [0, i+1 ... i+71].

An epoch takes each clip once for each window of F - 1 frames that fits into it beside the others, so that footage
counts by its length: cut into two clips or left in one, a dance is seen as often. The windows of a clip lie end to end
from a frame that each epoch draws anew; the reference frame is drawn for each from the whole clip.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimicmotion.data.cache import Clip, Manifest, NotFiniteError, check_finite
from mimicmotion.data.crop import crop_frame
from mimicmotion.data.footage import decode
from mimicmotion.data.footage_identity import FootageIdentity
from mimicmotion.data.hands import hand_weights
from mimicmotion.data.held_out import split
from mimicmotion.data.order import Order, Place, number_of
from mimicmotion.data.poses import skeleton_scale, skeletons
from mimicmotion.data.poses.keypoints import NUM_KEYPOINTS
from mimicmotion.data.reference_noise import ReferenceNoise
from mimicmotion.pixels import as_input
from mimicmotion.shapes import Bucket
from mmkernels.planning.sizes import LATENT_STRIDE

# The released model was always told 7 frames a second and motion 127, whatever the video: so is it in training.
CONDITIONED_FRAMES_PER_SECOND = 7
CONDITIONED_MOTION_BUCKET = 127


class ClipDataset:
    """The clips of a prepared folder as samples of num_frames frames, or of the most of `lengths` that a clip fills.

    Raises ValueError where the folder is not prepared or a clip is shorter than all of these.
    """

    def __init__(
        self, prepared: Path, num_frames: int, seed: int, *, batch_size: int = 1, lengths: Sequence[int] = (),
        held_out: float = 0.0, is_held_out: bool = False, draw_latents: bool = False, max_stride: int = 1,
        reference_noise: ReferenceNoise | None = None,
    ) -> None:  # fmt: skip
        """batch_size: samples a step over all ranks. lengths: below num_frames, for clips that are too short for it.

        held_out: share of the source videos that is set aside; is_held_out: this dataset is of those.
        draw_latents: samples hold latents drawn from the encoder's distribution and not its mean.
        max_stride: a sample's frames lie 1 to max_stride kept frames apart, drawn for each, as far as its clip goes.
        reference_noise: on the pixels of samples' references, as the folder was prepared with; None: they are clean.
        """
        self.prepared = prepared
        self.manifest = Manifest.read(prepared)
        self.identity = FootageIdentity.of(self.manifest)
        parts = split(self.manifest.clips, held_out, seed)
        self.num_held_out, chosen = len(parts[1]), parts[int(is_held_out)]
        self.manifest = replace(self.manifest, clips=[clip for clip in self.manifest.clips if clip.clip_id in chosen])
        self._lengths = (num_frames, *lengths)
        self.seed = seed
        # What is looked at stays the same.
        self._draw_latents, self._max_stride = draw_latents and not is_held_out, 1 if is_held_out else max_stride
        self._has_noised_references = reference_noise is not None and not is_held_out
        self._clips = {clip.clip_id: clip for clip in self.manifest.clips}
        if num_frames < 2:
            raise ValueError(f"got num_frames {num_frames}, wanted at least 2: a reference and one more")
        if not self._clips:
            raise ValueError(f"got {prepared}, whose manifest holds no clip; run prepare again")
        if reference_noise not in (None, self.manifest.reference_noise):
            raise ValueError(
                f"got {prepared}, prepared with noise of {self.manifest.reference_noise} on the pixels of references, "
                f"wanted {reference_noise}; prepare another folder for it, or give --diffusion.reference-noise latent"
            )
        self._samples: dict[Bucket, list[tuple[str, int]]] = {}  # a clip's name and which of its windows
        for clip in self.manifest.clips:
            bucket = _bucket(clip, self._lengths)
            windows = clip.num_frames // (bucket.num_frames - 1)
            self._samples.setdefault(bucket, []).extend((clip.clip_id, window) for window in range(windows))
        self._by_name = {str(bucket): bucket for bucket in self._samples}
        self._order = Order(self._counts(), batch_size, seed, Place())

    def __len__(self) -> int:
        """Number of samples of an epoch, over all buckets."""
        return sum(self.buckets.values())

    @property
    def buckets(self) -> dict[Bucket, int]:
        """The shapes that there are and the samples of an epoch of each, the largest shape first."""
        return {bucket: len(self._samples[bucket]) for bucket in sorted(self._samples, reverse=True)}

    @property
    def clip_ids(self) -> list[str]:
        """The clips' names, in the manifest's order."""
        return list(self._clips)

    def bucket_of(self, step: int) -> Bucket:
        """The shape of a step's samples, on all ranks."""
        return self._by_name[self._order.bucket(step)]

    def sample(self, step: int, sample_id: int) -> dict[str, Any]:
        """Sample sample_id of a step, as `data/order.py` and the module's docstring say.

        Returns latents and latents_deviation (F, 4, h, w) float32 scaled, reference_latent (4, h, w) unscaled and
        reference_sigma (), the noise on its pixels, noised_reference and noised_sigma of which they are taken where
        references have noise, image_embedding (1, 1024),
        keypoints (F, 128, 3), pose (F, 3, H, W) in [-1, 1], loss_weight (F, 1, h, w), fps, motion_bucket, sample_id,
        and what was chosen: clip_id, reference, start, stride.
        """
        sample = {**self.clip(*self._draw(step, sample_id)), "sample_id": sample_id}
        if self._has_noised_references:
            sample |= {"reference_latent": sample["noised_reference"], "reference_sigma": sample["noised_sigma"]}
        if self._draw_latents:  # but for reference_latent, which is the mean in sampling too
            seed = np.random.SeedSequence([self.seed, step, sample_id]).spawn(1)[0].generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(seed) >> 1)
            noise = torch.randn(sample["latents"].shape, generator=generator)
            sample["latents"] = sample["latents"] + sample["latents_deviation"] * noise
        return sample

    def frames_per_second(self, clip_id: str) -> float:
        """The rate of a clip's frames. Raises ValueError where there is none of that name."""
        return self._clip(clip_id).frames_per_second

    def clip_of(self, step: int, sample_id: int) -> str:
        """Name of the clip that `sample` takes."""
        return self._draw(step, sample_id)[0]

    def _draw(self, step: int, sample_id: int) -> tuple[str, int, int, int, int]:
        """The clip's name, the reference frame, the first frame, the number of frames and the stride of a sample.

        A stride over 1 reaches beyond the sample's window, which then begins where there is room.
        """
        pick = self._order.pick(step, sample_id)
        bucket = self._by_name[pick.bucket]
        clip_id, window = self._samples[bucket][pick.sample]
        clip, length = self._clips[clip_id], bucket.num_frames - 1
        of_epoch = [self.seed, pick.epoch, number_of(clip_id)]
        first = int(np.random.default_rng(np.random.SeedSequence(of_epoch)).integers(clip.num_frames % length + 1))
        random = np.random.default_rng(np.random.SeedSequence([*of_epoch, window]))
        reference, longest = int(random.integers(clip.num_frames)), (clip.num_frames - 1) // max(1, length - 1)
        stride = int(random.integers(min(self._max_stride, longest))) + 1
        start = min(first + window * length, clip.num_frames - 1 - (length - 1) * stride)
        return clip_id, reference, start, bucket.num_frames, stride

    def _counts(self) -> dict[str, int]:
        return {str(bucket): len(samples) for bucket, samples in self._samples.items()}

    def _digests(self) -> dict[str, str]:
        """Of what the order of each bucket follows from."""
        return {
            str(bucket): hashlib.sha256(f"{self.seed} {samples}".encode()).hexdigest()[:16]
            for bucket, samples in self._samples.items()
        }

    def place(self) -> dict[str, Any]:
        """Where the order of samples began to be counted and of what, as JSON values; `go_on_from` takes it up."""
        order = self._order
        place = {"step": order.place.step, "taken": dict(order.place.taken)}
        counted = {"num_samples": order.num_samples, "batch_size": order.batch_size, "seed": order.seed}
        return {**place, **counted, "digests": self._digests()}

    def go_on_from(self, place: Mapping[str, Any], step: int) -> None:
        """Go on at a step of a run with the same or with another batch size or other clips.

        Another batch size goes on within the epoch, with the samples that are still to come. A bucket whose clips or
        seed are others begins its next epoch.
        """
        begun = Place(step=place["step"], taken=place["taken"])
        before = Order(place["num_samples"], place["batch_size"], place["seed"], begun)
        counts, digests, order = self._counts(), self._digests(), self._order
        if (digests, order.batch_size) == (place["digests"], before.batch_size):
            self._order = Order(counts, order.batch_size, self.seed, begun)
            return
        taken = before.taken(step)
        for name in taken.keys() & counts.keys():
            if digests[name] != place["digests"][name]:
                taken[name] = -(-taken[name] // before.num_samples[name]) * counts[name]
        self._order = Order(counts, order.batch_size, self.seed, Place(step=step, taken=taken))

    def clip(
        self, clip_id: str, reference: int, start: int, num_frames: int | None = None, stride: int = 1
    ) -> dict[str, Any]:
        """Frame `reference` of a clip, then num_frames - 1 frames from start on (default: as many as it is trained in).

        Keys as in sample, with sample_id -1. Raises ValueError where the frames are not in the clip.
        """
        chosen = self._clip(clip_id)
        num_frames = num_frames or _bucket(chosen, self._lengths).num_frames
        stop = start + (num_frames - 2) * stride + 1
        if not (0 <= start < stop <= chosen.num_frames and 0 <= reference < chosen.num_frames):
            raise ValueError(
                f"got reference {reference} and frames {start} to {stop} of clip {clip_id}, which has"
                f" {chosen.num_frames}"
            )
        stored = self._read(chosen, reference, range(start, stop, stride))
        latents, keypoints = stored["latents"].float(), stored["keypoints"]
        short_side, stroke = skeleton_scale(chosen.height, chosen.width)
        pictures = skeletons(keypoints.numpy(), chosen.height, chosen.width, short_side=short_side, stroke=stroke)
        return {
            "latents": latents * self.manifest.scaling_factor,
            "latents_deviation": stored["latents_deviation"].float() * self.manifest.scaling_factor,
            "reference_latent": latents[0].clone(),
            "reference_sigma": torch.zeros(()),
            "noised_reference": stored["noised_latents"][0].float(),
            "noised_sigma": stored["noised_sigma"][0],
            "image_embedding": stored["image_embedding"].float(),
            "keypoints": keypoints,
            "pose": as_input(torch.from_numpy(pictures)),
            "loss_weight": hand_weights(keypoints, *latents.shape[-2:]),
            "fps": CONDITIONED_FRAMES_PER_SECOND,
            "motion_bucket": CONDITIONED_MOTION_BUCKET,
            "sample_id": -1,
            "clip_id": clip_id,
            "reference": reference,
            "start": start,
            "stride": stride,
        }

    def frames(self, clip_id: str, indices: Sequence[int]) -> Tensor:
        """The source's own pictures (F, 3, H, W) uint8 in the clip's crop, at indices; decodes the video.

        Raises ValueError where the video is gone or an index lies outside the clip.
        """
        chosen = self._clip(clip_id)
        source = Path(chosen.source)
        if not source.is_file():
            raise ValueError(f"got clip {clip_id} of {source}, which is gone; put it back or prepare again")
        if not indices or min(indices) < 0 or max(indices) >= chosen.num_frames:
            raise ValueError(f"got frames {list(indices)} of clip {clip_id}, which has {chosen.num_frames}")
        wanted = set(indices)
        pictures = {}
        film = decode(source, frame_stride=chosen.frame_stride)
        for row, frame in enumerate(_until(film, chosen.rows.start + max(indices))):
            if (index := row - chosen.rows.start) in wanted:
                picture = crop_frame(frame, chosen.crop, chosen.height, chosen.width)
                shown = picture[:, ::-1].copy() if chosen.is_mirrored else picture
                pictures[index] = torch.from_numpy(shown).permute(2, 0, 1)
        return torch.stack([pictures[index] for index in indices])

    def _clip(self, clip_id: str) -> Clip:
        if clip_id not in self._clips:
            raise ValueError(f"got clip {clip_id!r}, wanted one of {', '.join(self._clips)}")
        return self._clips[clip_id]

    def _read(self, clip: Clip, reference: int, window: range) -> dict[str, Tensor]:
        """Rows reference and `window` of latents and keypoints, row reference of what a reference alone has."""
        path = self.prepared / clip.tensors_file
        try:
            with safe_open(path, framework="pt") as opened:
                rows = {
                    name: torch.cat([part[reference : reference + 1], part[window.start : window.stop][:: window.step]])
                    for name in ("latents", "latents_deviation", "keypoints")
                    for part in (opened.get_slice(name),)
                }
                of_reference = {
                    name: opened.get_slice(name)[reference : reference + 1]
                    for name in ("image_embedding", "noised_latents", "noised_sigma")
                }
                stated = (opened.metadata() or {}).get("content_sha256")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {path} ({error}); run prepare again, which makes it anew") from error
        read = {**rows, **of_reference}
        _check_layout(path, read, clip, 1 + len(window))
        try:
            check_finite(read)
        except NotFiniteError as error:
            raise NotFiniteError(
                f"clip {clip.clip_id} ({path}) is {error}; run prepare again, which makes it anew or leaves the video "
                "out with the reason"
            ) from error
        if stated != self.manifest.files.get(clip.tensors_file, stated):
            raise ValueError(f"{path} is not the file that the manifest names; run prepare again, which makes it anew")
        return read


def _check_layout(path: Path, read: dict[str, Tensor], clip: Clip, num_rows: int) -> None:
    """Raise ValueError where a tensor of a clip's file has another shape or dtype than a clip of this size has."""
    latent = 4, clip.height // LATENT_STRIDE, clip.width // LATENT_STRIDE
    wanted = {
        "latents": (num_rows, *latent, torch.float16),
        "latents_deviation": (num_rows, *latent, torch.float16),
        "noised_latents": (1, *latent, torch.float16),
        "noised_sigma": (1, torch.float32),
        "keypoints": (num_rows, NUM_KEYPOINTS, 3, torch.float32),
        "image_embedding": (1, read["image_embedding"].shape[-1], torch.float16),
    }
    for name, (*shape, dtype) in wanted.items():
        if tuple(read[name].shape) != tuple(shape) or read[name].dtype != dtype:
            raise ValueError(
                f"{name} of {path} is {read[name].dtype} {tuple(read[name].shape)} where {dtype} {tuple(shape)} is "
                "wanted; run prepare again, which makes it anew"
            )


def _bucket(clip: Clip, lengths: Sequence[int]) -> Bucket:
    """The shape that a clip is trained in. Raises ValueError where it fills none of the lengths."""
    fitting = [length for length in lengths if length <= clip.num_frames]
    if not fitting:
        raise ValueError(
            f"got num_frames {min(lengths)} and clip {clip.clip_id} of {clip.num_frames} frames; prepare again"
            f" for {min(lengths)} frames, which leaves it out"
        )
    return Bucket(height=clip.height, width=clip.width, num_frames=max(fitting))


def _until(frames: Iterator[np.ndarray], last: int) -> Iterator[np.ndarray]:
    for index, frame in enumerate(frames):
        yield frame
        if index == last:
            return
