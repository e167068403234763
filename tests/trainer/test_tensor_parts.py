"""Checkpoints of tensors in parts: what each rank writes, what any mesh reads, and what goes wrong on one rank."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import forked
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.torch_version import TorchVersion

from mimicmotion.ranks.distributed import Ranks, join_ranks
from mimicmotion.run import tensor_parts
from mimicmotion.run.checkpoint import Checkpoint, CheckpointError, folders, load, save

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}
ABOUT = {"state": {"rate": 0.1}}


def whole() -> dict[str, dict[str, Tensor]]:
    """Rows that no number of ranks divides, fewer rows than ranks, no axes at all, and other dtypes."""
    drawn = torch.Generator().manual_seed(0)
    return {
        "model": {"a": torch.randn(5, 3, generator=drawn), "b": torch.randn(1, 2, generator=drawn)},
        "optimizer": {"a/exp_avg": torch.randn(7, 2, 3, generator=drawn).bfloat16(), "a/step": torch.tensor(3.0)},
        "codes": {"a": torch.arange(9, dtype=torch.uint8)},
    }


def on_mesh(ranks: Ranks, size: int, *, fill: float | None = None) -> dict[str, dict[str, Tensor]]:
    """All of it in parts on groups of `size` ranks, but what has no axes and what is codes."""
    mesh = init_device_mesh("cpu", (ranks.world_size // size, size))
    return {
        group: {
            name: distribute_tensor(x if fill is None else x * 0 + fill, mesh, [Replicate(), Shard(0)])
            if x.ndim and group != "codes"
            else x
            for name, x in tensors.items()
        }
        for group, tensors in whole().items()
    }


def on_ranks(folder: Path, num_ranks: int, work: Callable[[Ranks], object]) -> list[object]:
    """What work(ranks) returns on each rank, as JSON."""

    def run(rank: int) -> None:
        with join_ranks() as ranks:
            (folder / f"{rank}.json").write_text(json.dumps(work(ranks)))

    ends = forked.ranks(folder, num_ranks, run)
    assert [end.code for end in ends] == [0] * num_ranks, "\n".join(end.said for end in ends)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def unpacked(path: Path) -> tuple[dict[str, tuple[list[int], Tensor]], dict[str, str]]:
    """Of a .safetensors, read by its definition: each tensor with where in a whole one it begins, and the metadata."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    about = header.pop("__metadata__")
    offsets = json.loads(about["DCP_SHARDING_INFO"])
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + place for place in entry["data_offsets"])
        data = bytearray(content[begin:end])
        plain = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]]) if data else torch.empty(0)
        found[name] = (offsets[name]["saved_offsets"], plain.view(entry["shape"]))
    return found, about


def test_each_rank_writes_its_part_and_copies_are_written_once(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        save(tmp_path, Checkpoint(step=4, tensors=on_mesh(ranks, 2), documents=ABOUT), keep=1, ranks=ranks)

    on_ranks(tmp_path, 4, work)
    folder, wanted = tmp_path / "step-00000004", whole()
    assert sorted(path.name for path in folder.iterdir()) == [
        "codes.safetensors", "manifest.json", "model", "optimizer", "state.json",
    ]  # fmt: skip
    for group in ("model", "optimizer"):
        files = sorted((folder / group).iterdir())
        assert len(files) > 1 and sum(path.stat().st_size for path in files) < 4000
        parts = [unpacked(path)[0] for path in files]
        for name, tensor in wanted[group].items():
            own = [part[name] for part in parts if name in part]
            assert sum(x.numel() for _, x in own) == tensor.numel()
            for offset, x in own:
                place = tuple(slice(begin, begin + size) for begin, size in zip(offset, x.shape, strict=True))
                assert torch.equal(tensor[place], x), name


@pytest.mark.parametrize("size", [1, 3])
def test_any_mesh_reads_its_own_parts(size: int, tmp_path: Path) -> None:
    """What two ranks have saved, on three: whole copies or parts, in place of other values; and on no mesh."""

    def write(ranks: Ranks) -> None:
        save(tmp_path, Checkpoint(step=1, tensors=on_mesh(ranks, 2), documents=ABOUT), keep=1, ranks=ranks)

    def read(ranks: Ranks) -> list[str]:
        held, wanted, off = on_mesh(ranks, size, fill=9), whole(), []
        for group, tensors in load(tmp_path / "step-00000001", like=held).tensors.items():
            for name, tensor in tensors.items():
                is_part = isinstance(tensor, DTensor)
                assert is_part == isinstance(held[group][name], DTensor)
                if not torch.equal(tensor.full_tensor() if is_part else tensor, wanted[group][name]):
                    off.append(name)
        return off

    on_ranks(tmp_path, 2, write)
    assert on_ranks(tmp_path, 3, read) == [[]] * 3
    alone = load(tmp_path / "step-00000001")
    assert (alone.step, alone.documents) == (1, ABOUT)
    for group, tensors in whole().items():
        assert alone.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(alone.tensors[group][name], tensor) and alone.tensors[group][name].dtype == tensor.dtype
    assert load(tmp_path / "step-00000001", groups=("model",)).tensors.keys() == {"model"}


def test_another_shape_comes_as_it_was_saved(tmp_path: Path) -> None:
    """And is refused by name where it is taken up."""

    def work(ranks: Ranks) -> list[object]:
        held = on_mesh(ranks, 2)
        save(tmp_path, Checkpoint(step=1, tensors=held, documents=ABOUT), keep=1, ranks=ranks)
        mesh = init_device_mesh("cpu", (1, 2))
        held["model"]["a"] = distribute_tensor(torch.zeros(6, 3), mesh, [Replicate(), Shard(0)])
        found = load(tmp_path / "step-00000001", like=held).tensors["model"]
        return [isinstance(found["a"], DTensor), list(found["a"].shape), isinstance(found["b"], DTensor)]

    assert on_ranks(tmp_path, 2, work) == [[False, [5, 3], True]] * 2


def test_a_flipped_bit_and_a_missing_part_are_refused(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        for step in (1, 2, 3):
            save(tmp_path, Checkpoint(step=step, tensors=on_mesh(ranks, 2), documents={}), keep=3, ranks=ranks)

    on_ranks(tmp_path, 2, work)
    flipped, missing = (sorted((tmp_path / f"step-0000000{step}" / "optimizer").iterdir())[-1] for step in (3, 2))
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    missing.unlink()
    with pytest.raises(CheckpointError, match=rf"damaged: optimizer/{flipped.name} has SHA-256 .*step-00000001"):
        load(tmp_path / "step-00000003")
    with pytest.raises(CheckpointError, match=rf"damaged: optimizer/{missing.name} is missing"):
        load(tmp_path / "step-00000002")


def test_a_rank_that_cannot_write_is_named_by_all_and_nothing_is_left(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> str:
        saved = Checkpoint(step=1, tensors=on_mesh(ranks, 2), documents={})
        save(tmp_path, saved, keep=2, ranks=ranks)
        error = OSError(28, "No space left on device")
        patched = mock.patch.object(HuggingFaceStorageWriter, "write_data", side_effect=error)
        with pytest.raises(CheckpointError) as raised:
            if ranks.rank == 1:
                patched.start()
            save(tmp_path, dataclasses.replace(saved, step=2), keep=2, ranks=ranks)
        return str(raised.value)

    for said in on_ranks(tmp_path, 2, work):
        assert "step 2 could not be saved" in str(said) and "rank 1: OSError: [Errno 28] No space left" in str(said)
        assert "step-00000001 is the newest that is complete" in str(said)
    assert [path.name for path in tmp_path.glob("*step*")] == ["step-00000001"]


def test_a_folder_that_ranks_do_not_share_is_said(tmp_path: Path) -> None:
    """As on two machines that both have a folder of that name."""

    def run(rank: int) -> None:
        with join_ranks() as ranks:
            saved = Checkpoint(step=1, tensors=on_mesh(ranks, 2), documents={})
            save(tmp_path / f"machine-{ranks.rank}", saved, keep=1, ranks=ranks)
            ranks.wait()

    first, second = forked.ranks(tmp_path, 2, run)
    assert (first.code, second.code) == (1, 1)
    assert "is not in" in first.said and "all ranks have to write into one folder" in first.said
    assert folders(tmp_path / "machine-0") == []


def test_an_older_torch_is_told_which_one_to_take(tmp_path: Path) -> None:
    with (
        mock.patch.object(torch, "__version__", TorchVersion("2.8.0+cu128")),
        pytest.raises(ValueError, match=r"got torch 2\.8\.0\+cu128, .*parallel\.shard.* install torch>=2\.9"),
    ):
        tensor_parts.load(tmp_path, {})
