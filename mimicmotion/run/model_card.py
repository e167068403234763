"""README.md of exported weights: what they are, how to use them, and what they were trained on and measured at."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from mimicmotion.config import Config, ModelConfig, WeightsKind
from mimicmotion.data.cache import Manifest, file_sha256, is_prepared
from mimicmotion.data.footage_identity import FootageIdentity
from mimicmotion.json_values import to_json
from mimicmotion.model.weights.writing import Layout
from mimicmotion.paths import printable
from mimicmotion.run.checkpoint import Checkpoint
from mmkernels.choices import read_plan

_SHAPE = (
    "block_out_channels", "num_attention_heads", "layers_per_block", "transformer_layers_per_block",
    "cross_attention_dim", "addition_time_embed_dim",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was exported from where."""

    run: str  # the run folder's name
    folder: Path  # of the checkpoint
    saved: Checkpoint
    config: Config
    layout: Layout
    kind: WeightsKind
    dtype: str
    num_tensors: int
    evaluation: Path  # evaluate.json, where the run has one
    is_adapter: bool = False  # adapters and PoseNet alone

    @property
    def metadata(self) -> dict[str, str]:
        """What each .safetensors says of itself."""
        return {"run": self.run, "step": str(self.saved.step), "weights": self.kind, "dtype": self.dtype}


def has_released_sizes(model: ModelConfig) -> bool:
    """Whether programs that build the released model can take weights of this one."""
    return all(getattr(model, name) == getattr(ModelConfig(), name) for name in _SHAPE)


def model_card(export: Export, output: Path, files: Sequence[Path]) -> str:
    """The text, for weights whose files lie in the folder `output`."""
    config, step = export.config, export.saved.step
    averaged = "the moving average of the weights" if export.kind == "ema" else "the weights themselves, no average"
    begun = "The run began with fresh weights."
    if config.model.pretrained is not None:
        begun = (
            f"The run began with {_bare(config.model.pretrained.as_posix())}, whose licence holds for these as well."
        )
    listed = [
        f"| `{path.relative_to(output).as_posix()}` | {path.stat().st_size:,} | `{file_sha256(path)}` |"
        for path in files
    ]
    parts = [
        "---\nlibrary_name: diffusers\ntags: [mimicmotion, image-to-video, pose-guided]\n---",
        f"# {printable(export.run)}, step {step}",
        f"{_what(export)}, {export.num_tensors:,} tensors in {export.dtype}: {averaged}. {begun}",
        "## Use",
        _use(export, files, output),
        *_of_other_sizes(config.model),
        "## Files",
        "\n".join(["| file | bytes | SHA-256 |", "|---|---|---|", *listed]),
        "## Data",
        _data(export),
        "## Evaluation",
        "\n".join(_evaluation(export)),
        "## Plan",
        _plan(export),
        "## Settings",
        f"```json\n{json.dumps(_shown(to_json(config)), indent=1)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _what(export: Export) -> str:
    lora = export.config.lora
    if not lora.rank:
        return "MimicMotion's UNet and PoseNet"
    adapters = f"adapters (LoRA) of rank {lora.rank} on {lora.target} layers"
    if export.is_adapter:
        return f"MimicMotion's PoseNet, and {adapters} for its UNet"
    return f"MimicMotion's UNet and PoseNet with {adapters} merged in"


def _use(export: Export, files: Sequence[Path], output: Path) -> str:
    names = [path.relative_to(output).as_posix() for path in files]
    heads = export.config.model.num_attention_heads
    if export.is_adapter:
        return _use_of_adapters(export, names)
    again = f"`--model.pretrained {names[0]}` of train.py begins another run with it."
    if export.layout == "tencent":
        return f"The layout of Tencent's MimicMotion: name `{names[0]}` as `ckpt_path` of its settings. {again}"
    if export.layout == "comfyui":
        return (
            "For kijai's ComfyUI-MimicMotionWrapper: copy `models` and `custom_nodes` over those of the folder that "
            f"ComfyUI is in, and choose `{Path(names[0]).name}` in its loader, which offers no other name, "
            f"whatever the dtype inside. `--model.pretrained {names[0]} --model.pretrained-pose-net {names[1]}` of "
            "train.py begins another run with them."
        )
    return (
        '`UNetSpatioTemporalConditionModel.from_pretrained(folder, subfolder="unet")` of diffusers reads the UNet, '
        f"whose head counts {heads} no shape shows; PoseNet is MimicMotion's own and lies beside it. "
        "`--model.pretrained` of train.py takes the folder."
    )


def _use_of_adapters(export: Export, names: Sequence[str]) -> str:
    if export.layout == "diffusers":
        return (
            "diffusers' class for SVD takes no adapters by itself. With peft: `class UNet("
            "UNetSpatioTemporalConditionModel, PeftAdapterMixin): pass`, and then `UNet.from_pretrained(...)` of the "
            f'weights above and its `load_lora_adapter(folder, prefix="unet", weight_name="{names[0]}")`. PoseNet is '
            "MimicMotion's own and lies beside it."
        )
    return (
        f"`{names[0]}` has kohya's names, which ComfyUI's loaders of LoRA read; they know spatial layers only, so use "
        "export.py with --lora merge where temporal ones were trained. PoseNet goes where the wrapper looks for it."
    )


def _of_other_sizes(model: ModelConfig) -> list[str]:
    if has_released_sizes(model):
        return []
    sizes = f"channels {model.block_out_channels}, heads {model.num_attention_heads}"
    return [f"Its sizes ({sizes}) are not the released model's: programs that build only that one cannot load it."]


def _data(export: Export) -> str:
    """Which clips, by digests; no path of theirs is told."""
    config, identity = export.config, export.saved.documents.get("encoder", {})
    clips = identity.get("clips", {})
    known = f"{len(clips):,} clips" if clips else "clips"
    lines = [
        f"{known} of {config.data.num_frames} frames, latents of {_bare(identity.get('name', config.data.encoder))} "
        f"{identity.get('version', '')}".rstrip()
        + "."
    ]
    if not is_prepared(config.data.prepared):
        lines.append("The prepared folder was not at hand when this was exported, so its manifest has no digest here.")
        return " ".join(lines)
    lines.append(
        f"SHA-256 of the prepared folder's manifest.json: `{file_sha256(config.data.prepared / 'manifest.json')}`."
    )
    try:
        now = FootageIdentity.of(Manifest.read(config.data.prepared)).clips
    except ValueError:  # damaged, or another version's
        lines.append("It could not be read when this was exported, so its clips were not compared.")
        return " ".join(lines)
    if clips and clips != now:
        lines.append("Clips of it were added, dropped or made anew since the checkpoint was written.")
    return " ".join(lines)


def _evaluation(export: Export) -> Iterator[str]:
    """The figures of evaluate.json and what they are of."""
    if not export.evaluation.is_file():
        yield "Not evaluated (`python mimicmotion/evaluate.py`)."
        return
    try:
        found = json.loads(export.evaluation.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        yield f"{export.evaluation.name} could not be read when this was exported."
        return
    if export.kind != "ema" and "ema" in export.saved.tensors:
        yield "These figures are of the averaged weights (evaluate.py takes those), and raw ones were exported.\n"
    of = PurePath(str(found.get("checkpoint", ""))).name
    if of != export.folder.name:
        yield f"These figures are of {of or 'another checkpoint'}, not of {export.folder.name}, which was exported.\n"
    clips = found.get("clips")
    yield f"Over {len(clips) if isinstance(clips, list) else 'its'} clips, truth: {found.get('truth', 'not said')}.\n"
    yield "| figure | value |\n|---|---|"
    for name, value in _numbers(found):
        yield f"| {name} | {value:.4g} |"


def _numbers(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def _plan(export: Export) -> str:
    names = sorted(name for name in export.saved.documents if name.startswith("plan"))
    if not names:
        return f"None: every block ran as kernels {export.config.kernels} has it."
    return "\n".join(f"- {name}: {read_plan(export.folder / f'{name}.json')}" for name in names)


def _shown(value: Any) -> Any:
    """Settings without where on someone's machine things lie."""
    if isinstance(value, Mapping):
        return {name: _shown(inner) for name, inner in value.items()}
    return _bare(value) if isinstance(value, str) else value


def _bare(text: str) -> str:
    return PurePath(text).name if PurePath(text).is_absolute() else printable(text)
