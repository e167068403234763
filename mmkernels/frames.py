"""One clip's frames on several ranks: who has which, and pixels exchanged for frames where all frames are needed.

Each of K ranks has F_k of the F frames of every clip, in order, and computes alone whatever a frame needs by itself.
What attends or convolves over frames takes every pixel by itself instead, so for that each rank has all frames of some
pixels. With p the pixels of rank k,

    x (B, F_k, P, C)  ->  (B, F, p, C)  ->  compute  ->  (B, F, p, C')  ->  (B, F_k, P, C')

each arrow an all-to-all of all tokens but the rank's own, (K - 1) / K of B * F * P * C elements over all ranks, and its
gradient is the arrow turned around. The pixels go in parts, which set out together: while one is computed the next is
on its way, forward and backward. A token is what it is on one rank, but for the sums of GroupNorm
(mmkernels.kernels.group_norm.over_ranks). A parameter's gradient is that of the rank's own tokens: the sum over ranks
is the whole. Collectives are torch's functional ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing.reductions import StorageWeakRef

Compute = Callable[[Tensor, slice], Tensor]
_MOST_PARTS = 4  # the first exchange of a block is not hidden: a quarter of it is left
_PART_TOKENS = 16384  # of a rank; fewer do not fill a GPU with their products


def counts_of(num_frames: int, size: int) -> tuple[int, ...]:
    """Frames of each of `size` ranks, as even as they can be, the first ones longer: those of torch.tensor_split."""
    return tuple(num_frames // size + (rank < num_frames % size) for rank in range(size))


def slice_of(num_frames: int, size: int, rank: int) -> slice:
    """The frames of one of `size` ranks."""
    counts = counts_of(num_frames, size)
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


class FrameRanks:
    """The ranks that share a UNet's clips out by their frames, and how many frames each has in a forward.

    mesh: of one axis. counts: of every forward, where they are known beforehand; else the ranks tell each other, in a
    collective of their hosts, where the process group has a backend for CPU tensors ("cpu:gloo,cuda:nccl").
    """

    def __init__(self, mesh: DeviceMesh, counts: tuple[int, ...] | None = None) -> None:
        if mesh.ndim != 1:
            raise ValueError(f'frames is a mesh of {mesh.ndim} axes, wanted one: give mesh["frames"] of a larger one')
        self._group, self._rank = mesh.get_group(), mesh.get_local_rank()
        self._clip = Clip(self._group.group_name, self._rank, counts or (), [])
        self._is_fixed = counts is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> FrameRanks:
        return self  # a process group has no copy

    def attach(self, unet: nn.Module) -> Callable[[], None]:
        """Look at how many frames each forward of the UNet has; returns what stops it."""
        return unet.register_forward_pre_hook(self._begin, with_kwargs=True).remove

    def clip(self, num_frames: int) -> Clip:
        """The clips of the forward that is running, of which this rank has so many frames."""
        counts = self._clip.counts
        if not counts or counts[self._rank] != num_frames:
            raise RuntimeError(
                f"a block has {num_frames} frames and the UNet that was told of its ranks {counts or 'none'}: call the "
                "UNet itself, whose forward tells how many frames there are"
            )
        return self._clip

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        num_frames = (args[0] if args else kwargs["sample"]).shape[1]
        counts = self._clip.counts if self._is_fixed else self._exchanged(num_frames)
        if min(counts) < 1:
            raise ValueError(f"the ranks have {counts} frames of a clip; each needs one at least, give fewer ranks")
        self._clip = self._clip._replace(counts=counts, seen=[])

    def _exchanged(self, num_frames: int) -> tuple[int, ...]:
        found: list[Any] = [None] * self._group.size()
        torch.distributed.all_gather_object(found, num_frames, self._group)
        return tuple(found)


class Clip(NamedTuple):
    """The frames that each rank of a group has of a forward's clips."""

    group: str  # the process group's name, which functional collectives take
    rank: int
    counts: tuple[int, ...]
    seen: list[tuple[Any, Tensor]]  # gathered in this forward: which memory in which layout and version, and as what

    @property
    def num_frames(self) -> int:
        """Of all ranks."""
        return sum(self.counts)

    def gathered(self, x: Tensor, *, is_by_clip: bool = False) -> Tensor:
        """x (B * F_k, ...) of all ranks: (B * F, ...), differentiable; once a forward where x has no gradient.

        is_by_clip: x is (B, F_k, ...), and what is returned (B, F, ...).
        """
        key: Any = None  # of what changes its version with its content, and has no gradient
        if not (x.requires_grad or x.is_inference()):
            # not the tensor itself: what runs again in backward may be given another one of the same memory
            memory = StorageWeakRef(x.untyped_storage()), x.storage_offset(), x.shape, x.stride(), x.dtype
            key = *memory, x._version
            if (found := next((found for known, found in self.seen if known == key), None)) is not None:
                return found
        clips = x if is_by_clip else x.unflatten(0, (-1, self.counts[self.rank]))
        of_ranks: Any = _Gather.apply(clips.to(torch.uint8) if x.dtype == torch.bool else clips, self)
        gathered = (of_ranks if is_by_clip else of_ranks.flatten(0, 1)).to(x.dtype)
        if key is not None:
            self.seen.append((key, gathered))
        return gathered

    def over_pixels(self, tokens: Tensor, compute: Compute, *, num_parts: int | None = None) -> Tensor:
        """compute(tokens (B * F, p, C), pixels) -> (B * F, p, C') for the pixels p that are this rank's, part by part.

        tokens (B * F_k, P, C) give (B * F_k, P, C'). pixels: which of the P they are. Raises ValueError where there are
        fewer pixels than ranks.
        """
        frames = tokens.unflatten(0, (-1, self.counts[self.rank]))
        B, _, P, C = frames.shape
        shape, parts = (B, self.num_frames), self._parts(frames, num_parts)
        there, back = ([_Flight(part) for part in parts] for _ in range(2))
        sent: Any = _SendFrames.apply(frames, there)
        returned: list[Any] = []
        channels = C
        for ticket, outward, homeward in zip(sent, there, back, strict=True):
            pixels: Any = _TakePixels.apply(ticket, outward, (*shape, outward.part.num_own, C))
            out = compute(pixels.flatten(0, 1), outward.part.own)
            returned.append(_SendPixels.apply(out.unflatten(0, shape), homeward))
            channels = out.shape[2]
            del pixels, out  # what backward reads it has kept
        taken: Any = _TakeFrames.apply(back, (B, self.counts[self.rank], P, channels), *returned)
        return taken.flatten(0, 1)

    def _parts(self, frames: Tensor, num_parts: int | None) -> list[_Part]:
        (B, _, P, _), size = frames.shape, len(self.counts)
        if size > P:
            raise ValueError(
                f"the frames are on {size} ranks, which share out the pixels where frames are taken together, and here "
                f"a frame has {P} pixel(s); give larger pictures or fewer ranks"
            )
        if num_parts is None:
            tokens = B * self.num_frames * P // size
            num_parts = min(_MOST_PARTS, tokens // _PART_TOKENS)
        parts, begin = [], 0
        for num_pixels in counts_of(P, max(1, min(num_parts, P // size))):
            parts.append(_Part(self, begin, counts_of(num_pixels, size)))
            begin += num_pixels
        return parts


class _Part(NamedTuple):
    """Pixels from `begin` on, `widths` of them for each rank: how both layouts lie in what is sent and received."""

    clip: Clip
    begin: int
    widths: tuple[int, ...]

    @property
    def num_own(self) -> int:
        """Pixels of this rank."""
        return self.widths[self.clip.rank]

    @property
    def own(self) -> slice:
        """This rank's pixels among all."""
        first = self.begin + sum(self.widths[: self.clip.rank])
        return slice(first, first + self.num_own)

    def send_frames(self, frames: Tensor) -> Tensor:
        """Begin to send (B, F_k, P, C); what it returns is received when it was waited for."""
        sizes = self._sizes_of_frames(frames)
        sent = frames.new_empty(sum(sizes))
        for place, values in zip(sent.split(sizes), self._of_ranks(frames), strict=True):
            place.view(values.shape).copy_(values)
        each = frames.shape[0] * frames.shape[3] * self.num_own
        return _begin_exchange(sent, sizes, [each * count for count in self.clip.counts], self.clip)

    def take_pixels(self, buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What all ranks sent by `send_frames`, as (B, F, p, C)."""
        received = _wait(buffer)
        if shape[0] == 1:
            return received.view(shape)
        of_ranks = received.split([shape[0] * count * shape[2] * shape[3] for count in self.clip.counts])
        return torch.cat([x.view(shape[0], -1, *shape[2:]) for x in of_ranks], 1)

    def send_pixels(self, pixels: Tensor) -> Tensor:
        """Begin to send (B, F, p, C), as `send_frames`."""
        B, _, p, C = pixels.shape
        sent = pixels.reshape(-1)
        if B > 1:
            sent = torch.cat([x.reshape(-1) for x in pixels.split(self.clip.counts, 1)])
        each = B * self.clip.counts[self.clip.rank] * C
        counts = [B * count * p * C for count in self.clip.counts]
        return _begin_exchange(sent, counts, [each * width for width in self.widths], self.clip)

    def take_frames(self, buffer: Tensor, frames: Tensor) -> None:
        """Write what all ranks sent by `send_pixels` into its place in (B, F_k, P, C)."""
        received = _wait(buffer).split(self._sizes_of_frames(frames))
        for place, values in zip(self._of_ranks(frames), received, strict=True):
            place.copy_(values.view(place.shape))

    def _of_ranks(self, frames: Tensor) -> list[Tensor]:
        """The pixels of each rank, of (B, F_k, P, C)."""
        return list(frames[:, :, self.begin : self.begin + sum(self.widths)].split(self.widths, 2))

    def _sizes_of_frames(self, frames: Tensor) -> list[int]:
        B, F, _, C = frames.shape
        return [B * F * width * C for width in self.widths]


def _begin_exchange(sent: Tensor, sizes: list[int], received: list[int], clip: Clip) -> Tensor:
    """Send `sizes` elements of a flat tensor to each rank: what comes in their place, once it was waited for."""
    return torch.ops._c10d_functional.all_to_all_single(sent, received, sizes, clip.group)


def _wait(buffer: Tensor) -> Tensor:
    """What a functional collective fills; on a GPU the stream waits, the host does not."""
    return torch.ops._c10d_functional.wait_tensor(buffer)


class _Flight:
    """One exchange of a part. What is in flight lies here; autograd sees an empty tensor, the same both ways."""

    def __init__(self, part: _Part) -> None:
        self.part, self._buffer = part, None

    def begin(self, buffer: Tensor) -> Tensor:
        """Hold what is in flight; returns what stands for it."""
        self._buffer = buffer
        return buffer.new_empty(0)

    def end(self) -> Tensor:
        """What was in flight, still to be waited for."""
        buffer, self._buffer = self._buffer, None
        assert buffer is not None
        return buffer


# Each of these is another one turned around: what forward begins to send, backward waits for, and the other way round.


class _SendFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frames: Tensor, flights: list[_Flight]) -> tuple[Tensor, ...]:
        ctx.flights, ctx.shape = flights, frames.shape
        return tuple(flight.begin(flight.part.send_frames(frames)) for flight in flights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        frames = grad_outputs[0].new_empty(ctx.shape)
        for flight in ctx.flights:
            flight.part.take_frames(flight.end(), frames)
        return frames, None


class _TakePixels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, flight: _Flight, shape: tuple[int, ...]) -> Tensor:
        ctx.flight = flight
        return flight.part.take_pixels(flight.end(), shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return ctx.flight.begin(ctx.flight.part.send_pixels(*grad_outputs)), None, None


class _SendPixels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, flight: _Flight) -> Tensor:
        ctx.flight, ctx.shape = flight, pixels.shape
        return flight.begin(flight.part.send_pixels(pixels))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.part.take_pixels(ctx.flight.end(), ctx.shape), None


class _TakeFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flights: list[_Flight], shape: tuple[int, ...], *tickets: Tensor) -> Tensor:
        ctx.flights = flights
        frames = tickets[0].new_empty(shape)
        for flight in flights:
            flight.part.take_frames(flight.end(), frames)
        return frames

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        # Autograd goes back from the last part, which therefore sets out first.
        tickets = [flight.begin(flight.part.send_frames(*grad_outputs)) for flight in reversed(ctx.flights)]
        return None, None, *reversed(tickets)


class _Gather(torch.autograd.Function):
    """(B, F_k, ...) of every rank as (B, F, ...); the gradient adds up the ranks' in their order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Clip) -> Tensor:
        ctx.clip, B, rest = clip, x.shape[0], x.shape[2:]
        size, received = len(clip.counts), [x[:, :1].numel() * count for count in clip.counts]
        sent = x.reshape(1, -1).expand(size, -1).reshape(-1)
        found = _wait(_begin_exchange(sent, [x.numel()] * size, received, clip))
        return torch.cat([part.view(B, -1, *rest) for part in found.split(received)], 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        clip, (gradient,) = ctx.clip, grad_outputs
        size, own, each = len(clip.counts), clip.counts[clip.rank], gradient[:, :1].numel()
        sent = torch.cat([part.reshape(-1) for part in gradient.split(clip.counts, 1)])
        found = _wait(_begin_exchange(sent, [each * count for count in clip.counts], [each * own] * size, clip))
        total = found.view(size, -1).sum(0, dtype=torch.promote_types(found.dtype, torch.float32))
        return total.to(gradient.dtype).view(gradient.shape[0], own, *gradient.shape[2:]), None
