"""Run by torchrun from test_wrapped.py: `wrapped_ranks.py FILE`; the first rank writes how far gradients are off."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainer_shapes import SHAPES, Batch, Shape, batch_of

import mmkernels

CLIPS = 4  # two for each rank
Wrap = Callable[[Shape], tuple[dict[str, Any], Callable[[Batch], None]]]  # what runs, and a step's backward


def parallel(accumulates: bool = False, **settings: Any) -> Wrap:
    """Every part in DistributedDataParallel as its owner gives it; accumulates: a clip at a time."""

    def wrap(shape: Shape) -> tuple[dict[str, Any], Callable[[Batch], None]]:
        parts = {name: DistributedDataParallel(part, **settings) for name, part in shape.parts.items()}

        def backward(batch: Batch) -> None:
            pieces = [pick(batch, i, i + 1) for i in range(2)] if accumulates else [batch]
            for i, piece in enumerate(pieces):
                with nullcontext() if i + 1 == len(pieces) else parts["unet"].no_sync():
                    (shape.loss(parts, piece) / len(pieces)).backward()

        return parts, backward

    return wrap


def sharded(shape: Shape) -> tuple[dict[str, Any], Callable[[Batch], None]]:
    """The UNet in FSDP2."""
    for part in shape.parts.values():
        fully_shard(part)
    return shape.parts, lambda batch: shape.loss(shape.parts, batch).backward()


def accelerated(shape: Shape) -> tuple[dict[str, Any], Callable[[Batch], None]]:
    """Every part as accelerate prepares it, which on GPUs alone leaves a frozen one as it is; a clip at a time."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    parts: dict[str, Any] = dict(shape.parts)
    for name, part in parts.items():
        if any(parameter.requires_grad for parameter in part.parameters()):
            parts[name] = accelerator.prepare(part)

    def backward(batch: Batch) -> None:
        for i in range(2):
            with accelerator.accumulate(*parts.values()):
                accelerator.backward(shape.loss(parts, pick(batch, i, i + 1)))
                assert accelerator.sync_gradients == (i == 1)

    return parts, backward


WRAPS: dict[str, Wrap] = {
    "as it is": parallel(),
    "find unused": parallel(find_unused_parameters=True),
    "static graph": parallel(static_graph=True),
    "bucket view": parallel(gradient_as_bucket_view=True),
    "bucket view, static graph": parallel(gradient_as_bucket_view=True, static_graph=True),
    "accumulated": parallel(accumulates=True),
    "bucket view, find unused, accumulated": parallel(
        accumulates=True, gradient_as_bucket_view=True, find_unused_parameters=True
    ),
    "FSDP2": sharded,
}


def pick(batch: Batch, first: int, end: int) -> Batch:
    """Some clips."""
    return {name: x[first:end] for name, x in batch.items()}


def second_gradients(shape: Shape, backward: Callable[[Batch], object], first: int, end: int) -> dict[str, Tensor]:
    """Of the second of two steps, by name; each rank's own clips of the same batches."""
    for seed in (1, 2):
        backward(pick(batch_of(CLIPS, seed), first, end))
        found = {name: whole(x.grad) for name, x in shape.named_trained() if x.grad is not None}
        with torch.no_grad():
            for x in shape.trained():
                if x.grad is not None:
                    x -= 1e-2 * x.grad
                    x.grad = None
    return found


def whole(x: Any) -> Tensor:
    """A tensor that may be sharded."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()


def decayed(shape: Shape, backward: Callable[[Batch], object], batch: Batch) -> float:
    """Largest difference of a dead parameter from itself times 1 - lr * weight_decay, after a step of AdamW."""
    dead = [shape.parts["unet"].get_parameter(name) for name in mmkernels.dead_parameters(shape.parts["unet"])]
    before = [x.detach().clone() for x in dead]
    backward(batch)
    torch.optim.AdamW(shape.trained(), lr=1e-2, weight_decay=0.1).step()
    return max(float((x - old * (1 - 1e-2 * 0.1)).abs().max()) for x, old in zip(dead, before, strict=True))


def compare(name: str, wrap: Wrap, wanted: dict[str, Tensor], plan: str = "fused") -> dict[str, Any]:
    """Of a replaced shape in a wrapper: the largest error of a gradient, and those that are missing or zero.

    off: over the largest gradient of all where a name's own is smaller than a millionth of that.
    """
    rank = torch.distributed.get_rank()
    shape = SHAPES[name]()
    for part in shape.replaced:
        mmkernels.replace(shape.parts[part], plan)
    _, backward = wrap(shape)
    found = second_gradients(shape, backward, 2 * rank, 2 * rank + 2)
    scale = max(float(x.abs().max()) for x in wanted.values())
    off = {
        key: float((x - wanted[key]).abs().max()) / max(float(wanted[key].abs().max()), 1e-6 * scale)
        for key, x in found.items()
    }
    result = {
        "off": max(off.values()),
        "gradients": len(found),
        "silent": sorted(wanted.keys() - found.keys()),
        "zero": sorted(key for key, x in found.items() if not x.any()),
    }
    if name == "diffusers" and wrap is WRAPS["as it is"]:
        result["decayed"] = decayed(shape, backward, pick(batch_of(CLIPS, 3), 2 * rank, 2 * rank + 2))
    return result


def of_the_first_rank(work: Callable[[], Any]) -> Any:
    """What it computes, on every rank."""
    holder = [work() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(holder)
    return holder[0]


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every wrapper around diffusers' shape, and every shape under accelerate."""
    for name, make in SHAPES.items():
        plain = make()
        wanted = of_the_first_rank(
            lambda s=plain: second_gradients(s, lambda batch: s.loss(s.parts, batch).backward(), 0, CLIPS)
        )
        tokens = plain.context_tokens
        dead = {f"{part}.{key}" for part, x in plain.parts.items() for key in mmkernels.dead_parameters(x, tokens)}
        known = {"dead": sorted(dead & wanted.keys()), "trained": len(wanted)}
        wraps = WRAPS if name == "diffusers" else {}
        for word, wrap in {**wraps, "accelerate": accelerated}.items():
            yield f"{name}: {word}", compare(name, wrap, wanted) | known
        if name == "diffusers":
            yield f"{name}: recomputed whole", compare(name, accelerated, wanted, "checkpoint") | known


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = dict(cases())
    gathered: list[Any] = [None, None]
    torch.distributed.all_gather_object(gathered, found)
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(gathered))
    torch.distributed.barrier()  # as in mimicmotion.ranks.distributed: gloo's threads let go of the last tensors
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
