"""Files that are no weights of this model: one line that says what each is and what to do, and nothing is loaded."""

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODEL
from torch import Tensor
from weight_files import part, prefixed, safetensors_bytes, write_pth, write_safetensors

from mimicmotion.model.unet import MimicMotionModel, build_model
from mimicmotion.model.weights import WeightsError, load, read
from mimicmotion.model.weights.writing import cast

State = dict[str, Tensor]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 3049435868\n"


class Code:
    """Pickles to a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def model() -> MimicMotionModel:
    torch.manual_seed(0)
    return build_model(MODEL)


@pytest.fixture(scope="module")
def state(model: MimicMotionModel) -> State:
    return {name: torch.ones(tensor.shape) for name, tensor in model.state_dict().items()}


def _bytes(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def _cut(folder: Path, path: Path, share: float) -> Path:
    whole = path.read_bytes()
    return _bytes(folder, path.name, whole[: int(len(whole) * share)])


def _zip(folder: Path, names: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(folder / "a.pth", "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return folder / "a.pth"


def _folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _index(weight_map: object) -> dict[str, bytes]:
    text = json.dumps({"weight_map": weight_map}).encode()
    return {"config.json": b"{}", "diffusion_pytorch_model.safetensors.index.json": text}


def _changed(state: State, name: str, tensor: Tensor | None) -> State:
    rest = {key: value for key, value in state.items() if key != name}
    return rest if tensor is None else rest | {name: tensor}


def _nan(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


def _traced(folder: Path) -> Path:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(folder / "a.pth"))  # pyright: ignore[reportAttributeAccessIssue]
    return folder / "a.pth"


CONV = "unet.conv_in.weight"
FILES: dict[str, tuple[Callable[[Path, State], Path], str]] = {
    "nothing": (lambda f, s: f / "a.pth", "is not there; give a .pth, a .safetensors, a diffusers folder"),
    "empty": (lambda f, s: _bytes(f, "a.pth", b""), r"is empty \(0 bytes\), .* fetch it again"),
    "lfs pointer": (lambda f, s: _bytes(f, "a.safetensors", LFS), "LFS pointer.* 3,049,435,868 bytes; `git lfs pull`"),
    "web page": (lambda f, s: _bytes(f, "a.pth", b"\n<!DOCTYPE html><html>Log in"), "a web page.* download the file"),
    "json": (lambda f, s: _bytes(f, "a.pth", b'{"error": "Repository not found"}'), "text, which begins with .*error"),
    "few bytes": (lambda f, s: _bytes(f, "a.safetensors", b"\x08\x00\x00"), r"no known kind \(3 bytes, .* 08 00 00\)"),
    "gguf": (lambda f, s: _bytes(f, "a.safetensors", b"GGUF\x03" + bytes(99)), "GGUF file, .* give .* .safetensors"),
    "gzip": (lambda f, s: _bytes(f, "a.pth", b"\x1f\x8b\x08" + bytes(99)), "gzip archive; unpack it"),
    "cut safetensors": (
        lambda f, s: _cut(f, write_safetensors(f / "a.safetensors", s), 0.5),
        r"was cut short: [\d,]+ of [\d,]+ bytes; fetch or copy it again",
    ),
    "cut header": (lambda f, s: _bytes(f, "a.safetensors", safetensors_bytes(s)[:99]), "cut short within its header"),
    "damaged header": (
        lambda f, s: _bytes(f, "a.safetensors", safetensors_bytes(s).replace(b'"dtype"', b'"dt\xffpe"', 1)),
        "cannot be read|damaged header",
    ),
    "unknown dtype": (
        lambda f, s: _bytes(f, "a.safetensors", safetensors_bytes(s).replace(b'"F32"', b'"Q32"', 1)),
        r"cannot be read \(.*Q32.*\)",
    ),
    "cut pth": (lambda f, s: _cut(f, write_pth(f / "a.pth", s), 0.9), "cut short: the end of its archive"),
    "zip of something else": (lambda f, s: _zip(f, {"readme.txt": b"x"}), r"torch.save did not make \(it holds readme"),
    "zip that is none": (lambda f, s: _bytes(f, "a.pth", b"PK\x03\x04" + bytes(500)), "end of its archive"),
    "zip with no pickle in data.pkl": (lambda f, s: _zip(f, {"a/data.pkl": b"x", "a/version": b"3"}), "cannot be read"),
    "torchscript": (lambda f, s: _traced(f), r"TorchScript program.* state_dict\(\)"),
    "pickle with code": (
        lambda f, s: write_pth(f / "a.pth", {CONV: Code(f / "ran")}), r"asks for code \(.*\).* was executed"
    ),
    "plain pickle of torch's protocol with code": (
        lambda f, s: _bytes(f, "a.pth", pickle.dumps({CONV: Code(f / "ran")}, protocol=2)), r"asks for code \(.*\)"
    ),
    "plain pickle with code": (
        lambda f, s: _bytes(f, "a.pth", pickle.dumps({CONV: Code(f / "ran")})), "cannot be read .* Nothing"
    ),
    "a whole module": (lambda f, s: write_pth(f / "a.pth", torch.nn.Linear(1, 1)), "asks for code.*torch.nn.*Linear"),
    "a list": (lambda f, s: write_pth(f / "a.pth", [1, 2]), "holds no tensors by name, but list"),
    "an optimizer's": (
        lambda f, s: write_pth(f / "a.pth", {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}),
        r"holds no UNet and no PoseNet \(its tensors: 1 of optimizer\)",
    ),
    "vae alone": (
        lambda f, s: write_pth(f / "a.pth", {"first_stage_model.encoder.conv_in.bias": torch.ones(2)}),
        r"its tensors: 1 of VAE",
    ),
    "SVD's own file": (
        lambda f, s: write_pth(f / "a.pth", {"model.diffusion_model.out.0.weight": torch.ones(2)}),
        "original single file .* give the same model's folder in diffusers' layout",
    ),
    "lora": (
        lambda f, s: write_pth(f / "a.pth", {"unet.mid_block.attn.to_q.lora_A.weight": torch.ones(2)}), "is an adapter"
    ),
    "pose net alone": (
        lambda f, s: write_pth(f / "a.pth", part(s, "pose_net.")), "alone; give it as --model.pretrained-pose-net"
    ),
    "twice": (
        lambda f, s: write_pth(f / "a.pth", s | prefixed({CONV: s[CONV]}, "module.")),
        "unet.conv_in.weight twice, as unet.conv_in.weight and as module.unet.conv_in.weight",
    ),
    "two unets in a folder": (
        lambda f, s: _folder(f, {"unet-1.pth": b"", "unet-2.pth": b""}), "unet-1.pth, unet-2.pth; give one of them"
    ),
    "a folder of files": (
        lambda f, s: _folder(f, {"a.pth": b"", "b.safetensors": b""}), "give one of its files: a.pth, b.safetensors"
    ),
    "a folder without weights": (lambda f, s: _folder(f, {"config.json": b"{}"}), "has no diffusion_pytorch_model"),
    "config.json that is none": (
        lambda f, s: _folder(f, {"config.json": b"<html>", "diffusion_pytorch_model.bin": b""}), "is no JSON"
    ),
    "an index that leads out": (lambda f, s: _folder(f, _index({"a": "../b.safetensors"})), "no file beside it"),
    "an index of what is gone": (lambda f, s: _folder(f, _index({"a": "b.safetensors"})), "b.safetensors is not there"),
    "an index of nothing": (lambda f, s: _folder(f, _index(None)), "lists no files"),
    "a pipe": (lambda f, s: (os.mkfifo(f / "a.pth"), f / "a.pth")[1], "is no file; give a file of weights"),
    "missing": (
        lambda f, s: write_pth(f / "a.pth", _changed(s, "unet.conv_in.bias", None)),
        r"does not fit the model; nothing was loaded. missing: 1 \(unet.conv_in.bias\). Give weights of this model",
    ),
    "unexpected": (
        lambda f, s: write_pth(f / "a.pth", prefixed(s | {"unet.conv_in.weigth": torch.ones(1)}, "module.")),
        r"unexpected: 1 \(module.unet.conv_in.weigth\)",
    ),
    "no pose net where names have prefixes": (
        lambda f, s: write_pth(f / "a.pth", prefixed(part(s, "unet."), "unet.")),
        r"missing: 19 .* and 9 more\). They lack .*PoseNet.* --model.pretrained-pose-net",
    ),
    "another size": (
        lambda f, s: write_pth(f / "a.pth", _changed(s, CONV, torch.ones(32, 8, 3, 3))),
        r"wrong shape: 1 \(unet.conv_in.weight: weights \(32, 8, 3, 3\), model \(64, 8, 3, 3\)\). .*another size",
    ),
    "integers": (
        lambda f, s: write_pth(f / "a.pth", _changed(s, CONV, s[CONV].int())), r"wrong dtype: 1 \(.*torch.int32\)"
    ),
    "NaN": (
        lambda f, s: write_pth(f / "a.pth", _changed(s, CONV, _nan(s[CONV], torch.nan))),
        r"holds 1 values that are infinite or NaN, in 1 tensors \(unet.conv_in.weight: 1\).* an earlier checkpoint",
    ),
    "infinite in float8": (
        lambda f, s: write_safetensors(
            f / "a.safetensors", _changed(s, CONV, _nan(s[CONV], torch.inf).to(torch.float8_e5m2))
        ),
        "holds 1 values that are infinite or NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_one_line_says_what_it_is_and_what_to_do(kind, state, model, tmp_path):
    write, said = FILES[kind]
    path = write(tmp_path, state)
    before = model.unet.conv_in.bias.clone()
    with pytest.raises(WeightsError, match=said) as caught:
        load(model, read(path))
    text = str(caught.value)
    assert "\n" not in text and str(tmp_path) in text and "weights_only=False" not in text
    assert torch.equal(model.unet.conv_in.bias, before) and not (tmp_path / "ran").exists()


def test_damage_anywhere_is_one_line_too(state, tmp_path):
    """Bytes flipped and ends cut at random places of small files: read, or refused; never another error."""
    small = {CONV: torch.ones(2, 2), "pose_net.scale": torch.ones(1)}
    draw, num_refused = random.Random(0), 0
    sources = [write_pth(tmp_path / "a.pth", small), _bytes(tmp_path, "b.safetensors", safetensors_bytes(small))]
    torch.save(small, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    for source in (*sources, tmp_path / "c.pth"):
        whole = source.read_bytes()
        for _ in range(150):
            content = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.2 else whole)
            for _ in range(min(len(content), draw.randrange(4))):
                content[draw.randrange(len(content))] = draw.randrange(256)
            try:
                read(_bytes(tmp_path, f"damaged{source.suffix}", bytes(content)))
            except WeightsError as error:
                assert "\n" not in str(error)
                num_refused += 1
    assert num_refused > 150


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        (lambda f, s: write_pth(f / "p.pth", part(s, "unet.")), "holds no PoseNet"),
        (lambda f, s: write_pth(f / "p.pth", _changed(part(s, "pose_net."), "scale", None)), r"1 \(pose_net.scale\)"),
        (lambda f, s: f / "p.pth", "p.pth is not there"),
    ],
)  # fmt: skip
def test_what_goes_with_a_unet_is_a_pose_net(beside, said, state, model, tmp_path):
    unet = write_pth(tmp_path / "u.pth", part(state, "unet."))
    with pytest.raises(WeightsError, match=said):
        load(model, read(unet, beside(tmp_path, state)))


def test_two_pose_nets_are_one_too_many(state, tmp_path):
    whole = write_pth(tmp_path / "MimicMotion_1-1.pth", state)
    with pytest.raises(WeightsError, match=r"holds a PoseNet itself, and .* leave one of them out"):
        read(whole, whole)


def test_what_a_dtype_cannot_hold_is_not_written():
    with pytest.raises(
        WeightsError, match=r"a reaches 7e.04, which float16 cannot hold: export with --dtype fp32 or bf16"
    ):
        cast({"a": torch.tensor([1.0, -7e4])}, torch.float16)
