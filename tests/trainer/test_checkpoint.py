import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from mimicmotion.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    folders,
    load,
    newest,
    save,
    set_damaged_aside,
    stage,
)


def _checkpoint(step, value=None):
    torch.manual_seed(step)
    tensors = {"model": {"a": torch.randn(50, 20), "b": torch.randn(3).bfloat16()}, "ema": {"a": torch.randn(50, 20)}}
    return Checkpoint(step=step, tensors=tensors, documents={"state": {"rate": 0.1, "value": value}})


def test_round_trip_is_bit_exact(tmp_path):
    saved = _checkpoint(7, "text")
    folder = save(tmp_path, saved, keep=2)
    loaded = load(folder)
    assert (loaded.step, loaded.documents) == (7, saved.documents)
    for group, tensors in saved.tensors.items():
        assert loaded.tensors[group].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(loaded.tensors[group][key], tensor) and loaded.tensors[group][key].dtype == tensor.dtype


def test_last_few_are_kept_and_the_newest_is_by_number(tmp_path):
    for step in (2, 9, 10, 100):
        save(tmp_path, _checkpoint(step), keep=3)
    assert [path.name for path in folders(tmp_path)] == ["step-00000009", "step-00000010", "step-00000100"]
    assert newest(tmp_path) == tmp_path / "step-00000100"
    assert newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.json"])
def test_one_flipped_bit_is_refused_and_the_intact_one_before_is_named(tmp_path, name):
    for step in (1, 2, 3):
        save(tmp_path, _checkpoint(step), keep=3)
    for step, offset in ((3, -9), (2, -1)):
        path = tmp_path / f"step-{step:08d}" / name
        content = bytearray(path.read_bytes())
        content[offset] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"step-00000003 is damaged: {name} .*step-00000001"):
        load(tmp_path / "step-00000003")


def test_missing_file_and_unreadable_manifest_are_refused(tmp_path):
    first, second = save(tmp_path, _checkpoint(1), keep=3), save(tmp_path, _checkpoint(2), keep=3)
    (second / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing.*step-00000001"):
        load(second)
    (first / "manifest.json").write_text("")
    with pytest.raises(CheckpointError, match="no earlier checkpoint"):
        load(first)


def test_what_is_damaged_is_set_aside_down_to_the_newest_intact_one_over_all_stages(tmp_path):
    first = save(stage(tmp_path, 1, 2), _checkpoint(4), keep=3)
    bad = [save(stage(tmp_path, 2, 2), _checkpoint(step), keep=3) for step in (1, 2)]
    (bad[0] / "manifest.json").unlink()
    manifest = bad[1] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))  # no file's sum tells
    said = set_damaged_aside(tmp_path)
    assert [line.partition(" is damaged: ")[0] for line in said] == [str(folder) for folder in reversed(bad)]
    assert "manifest.json is not as it was written" in said[0] and all(
        f"{first} is the newest" in line for line in said
    )
    assert newest(tmp_path) == first and all(folder.with_name(f"{folder.name}.damaged").is_dir() for folder in bad)
    assert set_damaged_aside(tmp_path) == []
    (first / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is intact; start again without --resume"):
        set_damaged_aside(tmp_path)
    assert newest(tmp_path) == first, "none is renamed where none is intact"


def test_only_what_the_manifest_names_is_loaded_and_what_killed_runs_left_goes(tmp_path):
    folder = save(tmp_path, _checkpoint(1), keep=2)
    (folder / "more.json").write_text("{}")
    assert "more" not in load(folder).documents
    (tmp_path / ".step-00000009.partial").mkdir()
    save(tmp_path, _checkpoint(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_saving_a_step_again_replaces_it_whole(tmp_path):
    save(tmp_path, _checkpoint(1, "old"), keep=2)
    folder = save(tmp_path, _checkpoint(1, "new"), keep=2)
    assert load(folder).documents["state"]["value"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    folder = save(tmp_path, _checkpoint(1), keep=1)

    def disk_full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(CheckpointError, match=r"No space left .*step-00000001 is the newest that is complete"):
        save(tmp_path, _checkpoint(2), keep=1)
    monkeypatch.undo()
    assert newest(tmp_path) == folder and load(folder).step == 1
    assert save(tmp_path, _checkpoint(2), keep=1) == newest(tmp_path)  # what the failed one left is no obstacle


def test_killed_while_saving_leaves_an_intact_newest_checkpoint(tmp_path):
    code = """
        import sys, torch
        from pathlib import Path
        from mimicmotion.run.checkpoint import Checkpoint, save
        step = 0
        while True:
            step += 1
            tensors = {"model": {"a": torch.full((2_000_000,), float(step))}}
            save(Path(sys.argv[1]), Checkpoint(step=step, tensors=tensors, documents={}), keep=2)
            print(step, flush=True)
    """
    words = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = [int(process.stdout.readline()) for _ in range(3)][-1]
        time.sleep(0.013)
        os.kill(process.pid, signal.SIGKILL)
        last = max([last, *(int(line) for line in process.stdout)])
    folder = newest(tmp_path)
    assert folder is not None
    loaded = load(folder)
    assert loaded.step >= last
    assert torch.equal(loaded.tensors["model"]["a"], torch.full((2_000_000,), float(loaded.step)))
