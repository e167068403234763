"""Tensors that lie in parts on several ranks, as a folder of safetensors that any mesh reads.

torch.distributed.checkpoint in its safetensors format: each rank writes its own file, whose header says where in its
tensor each part begins. Nothing is gathered or pickled, and copies of one part are written once.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from mimicmotion.ranks.distributed import Ranks


def check_torch() -> None:
    """Raise ValueError where this torch has no such format."""
    if torch.__version__ < "2.9":
        raise ValueError(
            f"got torch {torch.__version__}, and weights in parts (parallel.shard) are saved and read by what torch "
            "2.9 brought; install torch>=2.9"
        )


def save(tensors: Mapping[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """Write the group's parts of all ranks into a folder that is made; every rank has to call it.

    Tensors that are in no parts have to be the same on every rank, and are written by one. Raises OSError on every rank
    where one could not write, and on the first where it does not see what all have written.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save({name: x.detach() for name, x in tensors.items()}, storage_writer=writer, process_group=ranks.patient)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {type(cause).__name__}: {cause}") from error
    if ranks.is_first and (unseen := _unseen(tensors, folder)):
        raise OSError(
            f"what other ranks have written of {len(unseen)} tensors, {unseen[0]} for one, is not in {folder}: all "
            "ranks have to write into one folder, which several machines share"
        )


def _unseen(tensors: Mapping[str, Tensor], folder: Path) -> list[str]:
    """The tensors that are not all there."""
    found = dict(_entries(dcp.HuggingFaceStorageReader(str(folder)).read_metadata()))
    held = {name: sum(chunk.sizes.numel() for chunk in entry.chunks) for name, entry in found.items()}
    return [name for name, tensor in tensors.items() if held.get(name) != tensor.numel()]


def load(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of such a folder: in parts where those of the same name, shape and dtype in `like` are, else whole.

    A rank reads the bytes of its own parts; no other rank has to call it.
    """
    check_torch()
    reader = dcp.HuggingFaceStorageReader(str(folder))
    found = {name: _room(entry, like.get(name)) for name, entry in _entries(reader.read_metadata())}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
        dcp.load(dict(found), storage_reader=reader, no_dist=True)
    return found


def _entries(metadata: Metadata) -> Iterator[tuple[str, TensorStorageMetadata]]:
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # a safetensors has no other
        yield name, entry


def _room(entry: TensorStorageMetadata, held: Tensor | None) -> Tensor:
    dtype = entry.properties.dtype
    if isinstance(held, DTensor) and (held.shape, held.dtype) == (entry.size, dtype):
        return torch.empty_like(held)
    return torch.empty(entry.size, dtype=dtype)
