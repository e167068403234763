"""Weights on a hub: when a path is an id, what is fetched of it, and what is said where it cannot be had."""

import fnmatch
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from weight_files import write_pth, write_safetensors

from mimicmotion.config import ModelConfig
from mimicmotion.model.weights import WeightsError
from mimicmotion.model.weights.hub import fetch, is_hub_id
from mimicmotion.run import pretrained

STEM = "diffusion_pytorch_model"
CONV = {"conv_in.weight": torch.ones(2)}


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("stabilityai/stable-video-diffusion-img2vid-xt-1-1", True),
        ("owner/name@v1.0", True),
        ("owner/name@refs/pr/3", True),
        ("models/MimicMotion_1-1.pth", False),  # a file that is not there
        ("runs/dmeo", False),  # beside runs that are: a slip
        ("there/folder", False),
        ("name", False),
        ("/owner/name", False),
        ("a/b/c", False),
        ("../name", False),
    ],
)
def test_an_id_is_an_owner_and_a_name_that_lead_nowhere_here(text, is_id, tmp_path, monkeypatch):
    for folder in ("runs/demo", "there/folder"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(Path(text)) == is_id
    if not is_id and not Path(text).exists():
        with pytest.raises(
            ValueError, match=rf"--model.pretrained: {text} is not there .*a hub id as owner/name@revision"
        ):
            pretrained.check_given(ModelConfig(pretrained=Path(text)))
    else:
        pretrained.check_given(ModelConfig(pretrained=Path(text)))


class Hub:
    """Stands for huggingface_hub: a folder's files, of which only those that are asked for are handed out."""

    def __init__(self, names: list[str], folder: Path) -> None:
        self.names, self.folder = names, folder
        self.revision = "?"
        self.fetched: list[str] = []

    def list_repo_files(self, repo_id: str, revision: str | None) -> list[str]:
        assert repo_id == "owner/name"
        self.revision = revision
        return self.names

    def snapshot_download(self, repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert repo_id == "owner/name" and revision == self.revision
        self.fetched = sorted(n for n in self.names if any(fnmatch.fnmatch(n, p) for p in allow_patterns))
        return str(self.folder)


PIPELINE = ["README.md", "svd_xt.safetensors", "vae/config.json", f"vae/{STEM}.safetensors", "unet/config.json"]


@pytest.mark.parametrize(
    ("names", "fetched"),
    [
        (
            [*PIPELINE, f"unet/{STEM}.safetensors", f"unet/{STEM}.fp16.safetensors", f"unet/{STEM}.bin"],
            ["unet/config.json", f"unet/{STEM}.safetensors"],
        ),
        (
            [*PIPELINE, f"unet/{STEM}.fp16.safetensors", f"pose_net/{STEM}.safetensors"],
            [f"pose_net/{STEM}.safetensors", "unet/config.json", f"unet/{STEM}.fp16.safetensors"],
        ),
        (
            [*PIPELINE, f"unet/{STEM}.safetensors.index.json", f"unet/{STEM}-00001-of-00002.safetensors"],
            ["unet/config.json", f"unet/{STEM}-00001-of-00002.safetensors", f"unet/{STEM}.safetensors.index.json"],
        ),
        (["config.json", f"{STEM}.bin", "optimizer.bin"], ["config.json", f"{STEM}.bin"]),
    ],
)
def test_only_the_models_files_are_fetched(names, fetched, tmp_path, monkeypatch):
    hub = Hub(names, tmp_path)
    for name in ("list_repo_files", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    assert fetch(Path("owner/name@v2")) == tmp_path
    assert hub.revision == "v2" and hub.fetched == fetched


def test_several_files_are_named_not_chosen_among(tmp_path, monkeypatch):
    hub = Hub(["README.md", "MimicMotion_1.pth", "MimicMotion_1-1.pth"], tmp_path)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", hub.list_repo_files)
    said = r"holds no diffusers folder, but MimicMotion_1.pth, MimicMotion_1-1.pth; .*`hf download owner/name FILE`"
    with pytest.raises(WeightsError, match=said):
        fetch(Path("owner/name@main"))


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """A hub's cache, laid out by hand, and no network."""
    for name, value in (("HF_HUB_OFFLINE", True), ("HF_HUB_CACHE", str(tmp_path / "cache"))):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    commit = "0" * 40
    folder = tmp_path / "cache" / "models--owner--svd"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    unet = folder / "snapshots" / commit / "unet"
    write_safetensors(unet / f"{STEM}.safetensors", CONV)
    (unet / "config.json").write_text(json.dumps({"num_attention_heads": [5, 10, 20, 20]}))
    return tmp_path


def test_what_was_fetched_before_needs_no_network(offline):
    found = pretrained.read(ModelConfig(pretrained=Path("owner/svd")))
    assert list(found.tensors) == ["unet.conv_in.weight"] and found.is_unet_alone
    pose_net = write_pth(offline / "p.pth", {"scale": torch.ones(1)})
    found = pretrained.read(ModelConfig(pretrained=Path("owner/svd@main"), pretrained_pose_net=pose_net))
    assert sorted(found.tensors) == ["pose_net.scale", "unet.conv_in.weight"]


@pytest.mark.parametrize("text", ["owner/other", "owner/svd@v2"])
def test_without_a_network_it_is_one_sentence(text, offline):
    with pytest.raises(
        WeightsError, match=r"is no path here and could not be had from the hub .*hf download owner/"
    ) as caught:
        pretrained.read(ModelConfig(pretrained=Path(text)))
    assert "\n" not in str(caught.value)
