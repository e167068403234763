"""Export a run's weights: `python mimicmotion/export.py --run-dir runs/demo --layout tencent|comfyui|diffusers`.

Writes a folder of its own, with a model card: tencent, one .pth that upstream's code loads; comfyui, the files and
folders that ComfyUI-MimicMotionWrapper looks for; diffusers, unet/ and pose_net/.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # python puts this folder first, where our modules would hide others of the same name
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from mmkernels.optional import explain_missing

    explain_missing("mimicmotion/export.py", "`pip install -e .` in the checkout installs all of the trainer")

import torch
import tyro
from safetensors import SafetensorError
from torch import Tensor

from mimicmotion.commands import one_sentence
from mimicmotion.config import Config, WeightsKind
from mimicmotion.data.cache import FULL
from mimicmotion.json_values import from_json
from mimicmotion.model.adapters import weight_of
from mimicmotion.model.unet import MimicMotionModel, build_model
from mimicmotion.model.weights import Weights, compare
from mimicmotion.model.weights.adapter_files import write_adapters
from mimicmotion.model.weights.writing import Layout, cast, write_layout
from mimicmotion.paths import free_gib, near
from mimicmotion.run import checkpoint, pretrained
from mimicmotion.run.model_card import Export, has_released_sizes, model_card
from mimicmotion.sampling.generation import run_folder_of

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Export a run's weights in a layout that others read."""

    run_dir: Path = Path("runs/demo")  # a run's folder (its newest checkpoint) or one checkpoint folder
    layout: Layout = "tencent"  # tencent: one .pth; comfyui: its folders; diffusers: unet/ and pose_net/
    weights: WeightsKind = "ema"  # the moving average of the weights, or the raw ones
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"  # of every tensor; the released ones are fp16
    lora: Literal["merge", "adapter"] = "merge"  # a run's adapters: in the weights they are for, or by themselves
    output: Path | None = None  # folder to make; where none is given, export/LAYOUT-STEP-WEIGHTS-DTYPE in the run's
    debug: bool = False  # show where in the code an error arose


def run(arguments: Arguments) -> Path:
    """Export as asked; returns the folder that was made."""
    own = pretrained.own_checkpoint(arguments.run_dir, arguments.weights)
    if own is None:
        found = near(arguments.run_dir, checkpoint.is_run)
        raise ValueError(
            f"{arguments.run_dir} holds no checkpoint (runs {found}); train first, or give the folder of a run."
        )
    folder, kind = own
    saved = checkpoint.load(folder, groups=("model", "ema"))
    config: Config = from_json(saved.documents["config"])
    is_adapter = arguments.lora == "adapter"
    if is_adapter and not config.lora.rank:
        raise ValueError(f"{folder} has no adapters (its lora.rank is 0); leave --lora adapter out.")
    tensors, kind = pretrained.own(saved, kind) if is_adapter else pretrained.whole(saved, kind)
    with torch.device("meta"):
        model = build_model(config.model)
    if not is_adapter:
        _check_whole(model, tensors, folder)
    tensors = cast(tensors, _DTYPES[arguments.dtype])
    run_dir = run_folder_of(arguments.run_dir)
    export = Export(
        run=run_dir.absolute().name, folder=folder, saved=saved, config=config, layout=arguments.layout, kind=kind,
        dtype=arguments.dtype, num_tensors=len(tensors), evaluation=run_dir / "evaluate.json",
        is_adapter=is_adapter,
    )  # fmt: skip
    name = f"{'adapter-' if is_adapter else ''}{arguments.layout}-{saved.step}-{kind}-{arguments.dtype}"
    output = arguments.output or run_dir / "export" / name
    _write(export, output, tensors, model)
    print(f"{kind} weights of step {saved.step}, {len(tensors):,} tensors in {arguments.dtype}: {output}", flush=True)
    if kind != arguments.weights:
        print("the run takes no moving average (optimizer.ema off): these are its raw weights", flush=True)
    if config.lora.rank and not is_adapter:
        print(f"its adapters are merged into {config.model.pretrained}; --lora adapter has them alone", flush=True)
    if not has_released_sizes(config.model):
        print("its sizes are not the released model's: programs that build only that one cannot load it", flush=True)
    return output


def _check_whole(model: MimicMotionModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise ValueError where a tensor of the model is missing, or is another one."""
    if report := compare(model, Weights(source=folder, tensors=tensors)):
        raise ValueError(
            f"{folder} does not hold the model that its settings say ({report}); export another checkpoint."
        )


def _write(export: Export, output: Path, tensors: dict[str, Tensor], model: MimicMotionModel) -> None:
    """Make the folder `output`, whole or not at all."""
    if output.exists():
        raise ValueError(f"{output} is there already; move it away, or give another --output.")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
    try:
        partial.mkdir(parents=True)
        data = export.config.data
        if export.is_adapter:
            weight = weight_of(export.config.lora)
            files = write_adapters(export.layout, partial, tensors, weight, export.metadata)
        else:
            files = write_layout(
                export.layout, partial, tensors, model.unet, num_frames=data.num_frames, metadata=export.metadata
            )
        (partial / "README.md").write_text(model_card(export, partial, files), encoding="utf-8")
        for path in (*partial.rglob("*"), partial):
            checkpoint.flush(path)
        partial.rename(output)
        checkpoint.flush(output.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises the last where a disk is full
        said = f"{output} could not be written ({error})"
        if isinstance(error, OSError) and error.errno not in FULL:
            raise ValueError(f"{said}; give another --output") from error
        size = sum(tensor.nbytes for tensor in tensors.values()) / 2**30
        advice = f"it takes {size:.1f} GiB{free_gib(output)}; make room there, or give another --output"
        raise ValueError(f"{said}: {advice}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # there is none where all went well


def main() -> None:
    """Run the command line; exits with 1 and the reason where it cannot export."""
    arguments = tyro.cli(Arguments)
    with one_sentence("export stopped", debug=arguments.debug):
        run(arguments)


if __name__ == "__main__":
    main()
