"""The command lines from prepared clips to a video, on a short run of a tiny model."""

import json
import shutil
import sys
from dataclasses import replace

import av
import forked
import numpy as np
import pytest
import torch
import videos
from launched import launched
from people import Swaying
from torch import nn

from mimicmotion import evaluate, sample, train
from mimicmotion import prepare as prepare_command
from mimicmotion.config import demo
from mimicmotion.data.cache import NotWritableError
from mimicmotion.data.curate import Bounds
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.data.preparation import Recipe, prepare
from mimicmotion.diffusion import preconditioning
from mimicmotion.evaluation.compared import RunClips
from mimicmotion.evaluation.person_metrics import person_region
from mimicmotion.model.encoders import PatchCodec, load_encoder
from mimicmotion.ranks.distributed import join_ranks
from mimicmotion.run.checkpoint import folders
from mimicmotion.run.history import read_history
from mimicmotion.run.run_folder import start_afresh
from mimicmotion.sampling import generation
from mimicmotion.sampling.generation import load_averaged, other_order

NUM_FRAMES = 5
WORDS = [
    "--kernels", "fused", "--data.height", "64", "--data.width", "64", "--data.num-frames", str(NUM_FRAMES),
    "--model.block-out-channels", "32", "32", "32", "32", "--model.num-attention-heads", "2", "2", "2", "2",
    "--model.layers-per-block", "1", "--model.addition-time-embed-dim", "8",
    "--trainer.num-steps", "2", "--sampling.num-steps", "2", "--sampling.tile-overlap", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    clips = [videos.write_video(folder / f"{num_frames}.mp4", num_frames) for num_frames in (12, 13)]
    recipe = Recipe(height=64, width=64, num_frames=NUM_FRAMES, bounds=Bounds(min_frames=1), workers=1)
    prepare(clips, folder, recipe=recipe, poses=Swaying(), encoder=PatchCodec())
    return folder


@pytest.fixture(scope="module")
def run_dir(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    done = launched("mimicmotion/train.py", 1, *WORDS, "--data.prepared", prepared, "--run-dir", folder, renders=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_train_says_what_it_runs_and_leaves_what_it_promises(run_dir):
    lines = (run_dir / "stdout").read_text()
    for words in ("preset demo (the default", "kernels fused", "encoder patch-codec (stand-in)", "finished at step 2"):
        assert words in lines
    assert lines.count("\nstep ") == 2 and "\x1b" not in lines  # plain lines where there is no terminal
    assert [path.name for path in folders(run_dir)] == ["step-00000002"]
    assert len(read_history(run_dir / "loss.jsonl")) == 2 and (run_dir / "loss.png").stat().st_size > 1000
    assert json.loads((run_dir / "step-00000002" / "encoder.json").read_text())["name"] == "patch-codec (stand-in)"
    assert "fused" in (run_dir / "step-00000002" / "kernels.json").read_text()


def test_sample_writes_the_video_and_names_the_stand_in(run_dir, tmp_path, capsys):
    arguments = sample.Arguments(run_dir=run_dir, output=tmp_path, check_pose_order=True)
    is_higher = sample.run(arguments)
    figures = json.loads((tmp_path / "sample.json").read_text())
    assert figures["encoder"] == "patch-codec (stand-in)" and figures["num_frames"] == NUM_FRAMES - 1
    assert is_higher == figures["is_right_order_higher"] == (figures["psnr_db"] > figures["psnr_other_pose_order_db"])
    with av.open(str(tmp_path / "sample.mp4")) as container:
        assert "patch-codec (stand-in)" in container.metadata["comment"]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate or 0) == 30.0
    assert len(frames) == NUM_FRAMES - 1 and frames[0].shape == (64, 4 * 64, 3)
    printed = capsys.readouterr().out
    assert f"PSNR against the truth: {figures['psnr_db']:.3f} dB" in printed
    assert f"in another order: {figures['psnr_other_pose_order_db']:.3f} dB, of the person " in printed
    with torch.no_grad():  # the same by hand, over the pixels of the person alone
        config, model, _ = generation.load_averaged(run_dir)
        decoder = load_encoder(config.data.encoder)
        dataset = ClipDataset(config.data.prepared, config.data.num_frames, 0)
        clip = dataset.clip(figures["clip"], 0, 1)
        _, truth = generation.reference_and_truth(clip, config, decoder)
        frames = generation.generate(model, config, clip, decoder, seed=0)
    inside = person_region(clip["keypoints"][1:].numpy(), 64, 64).numpy()
    errors = ((frames - truth).numpy() / 2) ** 2
    seen = [each[:, mask[0]].mean() for each, mask in zip(errors, inside, strict=True) if mask.any()]
    by_hand = [10 * np.log10(1 / error) for error in seen]
    assert figures["person_psnr_db"] == pytest.approx(np.mean(by_hand), abs=1e-3)
    sample.run(arguments)
    again = json.loads((tmp_path / "sample.json").read_text())
    assert again == figures  # the same seed gives the same figures


def test_sample_says_that_it_cannot_write_before_it_samples(run_dir, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sample, "sample_clip", lambda *_, **__: pytest.fail("it has sampled"))
    with pytest.raises(NotWritableError, match=r"cannot write .*; give a folder that you may write to"):
        sample.run(sample.Arguments(run_dir=run_dir, output=tmp_path / "file"))


def test_two_ranks_sample_a_prepared_clip_as_one_does(run_dir, tmp_path):
    """The figures to the last digit, of frames that both ranks have decoded; one of them writes and speaks."""
    said = {}
    for num_ranks in (1, 2):
        arguments = sample.Arguments(run_dir=run_dir, output=tmp_path / str(num_ranks), check_pose_order=True)

        def work(_, arguments=arguments):
            with join_ranks() as ranks:
                sample.run(arguments, ranks)

        ends = forked.ranks(tmp_path, num_ranks, work)
        assert [end.code for end in ends] == [0] * num_ranks and [end.said for end in ends[1:]] == [""] * (
            num_ranks - 1
        )
        said[num_ranks] = ends[0].said.replace(str(arguments.output), "")
    one, two = ((tmp_path / str(number) / "sample.json").read_text() for number in (1, 2))
    assert one == two and said[1] == said[2] and "PSNR against the truth" in said[1]


def test_failed_pose_check_exits_with_the_reason(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "run", lambda *_: False)
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(SystemExit, match="pose check failed"):
        sample.main()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["sample.py", "--run-dir", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        sample.main()


class FollowsPose(nn.Module):
    """Stands for a model that has learnt: whatever the noise, the clean latents are the pose pictures, shrunk."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, joined, timestep, _embedding, _ids, pose, _keep=None):
        sigma = (4 * timestep).exp().view(-1, 1, 1, 1, 1)
        scaled = joined[:, :, :4]
        clean = torch.zeros_like(scaled) if pose is None else _shrunk(pose)
        coefficients = preconditioning(sigma)
        return (clean - coefficients.c_skip * scaled / coefficients.c_in) / coefficients.c_out


def _shrunk(pose):
    small = nn.functional.avg_pool2d(pose.flatten(0, 1), 8).unflatten(0, pose.shape[:2])  # (B, F, 3, h, w)
    return torch.cat([small, small[:, :, :1]], dim=2)


def test_a_model_that_follows_the_poses_passes_the_check_and_one_that_does_not_fails(prepared):
    dataset = ClipDataset(prepared, NUM_FRAMES, 0)
    clip = dataset.clip(dataset.clip_ids[0], 0, 1)
    clip["latents"] = _shrunk(clip["pose"].unsqueeze(0))[0]
    arguments = ["--data.num-frames", str(NUM_FRAMES), "--sampling.tile-overlap", "1", "--sampling.guidance", "1"]
    config = train.parse([*arguments, "--sampling.num-steps", "3"]).config
    _, figures = sample.sample_clip(FollowsPose(), config, clip, PatchCodec(), seed=0, checks_order=True)  # pyright: ignore[reportArgumentType]
    assert figures["is_right_order_higher"] and figures["psnr_db"] > 60 > figures["psnr_other_pose_order_db"] + 20
    clip["latents"] = clip["latents"][other_order(NUM_FRAMES, 0)]
    _, figures = sample.sample_clip(FollowsPose(), config, clip, PatchCodec(), seed=0, checks_order=True)  # pyright: ignore[reportArgumentType]
    assert not figures["is_right_order_higher"]


def test_other_order_moves_every_frame_but_the_reference():
    for num_frames in (3, 5, 72):
        order = other_order(num_frames, 0)
        assert order[0] == 0 and sorted(order.tolist()) == list(range(num_frames))
        assert not (order[1:] == torch.arange(1, num_frames)).any()
        assert torch.equal(order, other_order(num_frames, 0))


def test_evaluate_writes_a_row_a_clip(run_dir, tmp_path):
    evaluate.run(evaluate.Arguments(run_dir=run_dir, output=tmp_path / "evaluate.json"))
    result = json.loads((tmp_path / "evaluate.json").read_text())
    assert len(result["clips"]) == 2 and result["encoder"] == "patch-codec (stand-in)"
    assert result["psnr_db"] == pytest.approx(sum(row["psnr_db"] for row in result["clips"]) / 2)
    assert all(-1 <= row["ssim"] <= 1 for row in result["clips"])
    assert "trained on" in result["chosen"] and result["sampling"]["num_steps"] == 2 and result["seed"] == 0
    assert (
        "'swaying'" in result["missing"]["poses"]
        and "patch-codec (stand-in) has no CLIP" in result["missing"]["identity"]
    )
    # The key points are the cache's, so that the person's region needs no backend.
    assert result["person_psnr_db"] == pytest.approx(sum(row["person_psnr_db"] for row in result["clips"]) / 2)
    assert {"psnr_db", "motion_distance_px"} <= result["repeating_the_reference"].keys()
    with av.open(str(tmp_path / "evaluate" / f"001-{result['clips'][0]['clip']}.mp4")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].frames) == (4 * 64, NUM_FRAMES - 1)


def test_a_run_against_itself_has_the_same_noise_and_no_difference(run_dir, tmp_path):
    evaluate.run(
        evaluate.Arguments(
            run_dir=run_dir, against=run_dir, num_clips=1, check_pose_order=True, output=tmp_path / "e.json"
        )
    )
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["against"]["tests"]["psnr_db"]["mean_difference"] == 0
    assert result["against"]["settings_that_differ"] == []
    assert result["other_pose_order"]["psnr_db"] != result["psnr_db"]
    assert (tmp_path / "e-against").is_dir() and "e-against/001-" in (tmp_path / "e.html").read_text()


def test_a_run_that_holds_videos_out_is_evaluated_on_them(run_dir, monkeypatch):
    """Two clips of two videos of which half is held out; a folder that is given counts whole."""
    config, *rest = load_averaged(run_dir)
    config = replace(config, data=replace(config.data, held_out=0.5))
    monkeypatch.setattr("mimicmotion.evaluation.compared.load_averaged", lambda _: (config, *rest))
    held_out = RunClips(run_dir)
    trained = ClipDataset(config.data.prepared, NUM_FRAMES, config.trainer.seed, held_out=0.5).clip_ids
    assert len(trained) == len(held_out.dataset.clip_ids) == 1 and held_out.dataset.clip_ids != trained
    assert "holds out" in held_out.about(0)["chosen"]
    assert len(RunClips(run_dir, prepared=config.data.prepared).dataset.clip_ids) == 2


def test_fresh_start_moves_an_earlier_run_aside(tmp_path):
    run_dir = tmp_path / "demo"
    assert start_afresh(run_dir) is None
    for number in (1, 2):
        (run_dir / "step-00000002").mkdir(parents=True)
        (run_dir / "step-00000002" / "manifest.json").write_text("{}")
        note = start_afresh(run_dir)
        assert note is not None and "--resume" in note
        assert not run_dir.exists() and (tmp_path / f"demo.{number}" / "step-00000002").is_dir()


def test_training_that_cannot_go_on_exits_with_the_reason(prepared, tmp_path):
    words = [*WORDS, "--data.prepared", str(prepared), "--run-dir", str(tmp_path)]
    limits = ["--trainer.max-skipped-in-a-row", "1", "--model.pretrained", str(tmp_path / "gone.pth")]
    done = launched("mimicmotion/train.py", 1, *words, *limits)
    assert done.returncode != 0 and "training stopped: " in done.stderr and "gone.pth" in done.stderr


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        (train, ["--data.prepared", "clisp"], r"training stopped: nothing is prepared in clisp, .*: clips\)"),
        (train, ["--plan", "plna.json"], r"training stopped: --plan: plna.json is not there .*: plan.json\)"),
        (train, ["--model.pretrained", "model.pt"], r"--model.pretrained: model.pt is not there .*: model.pth\)"),
        (train, ["--resume", "--run-dir", "rum"], r"--resume: rum holds no checkpoint .*: run\).* leave --resume out"),
        (sample, ["--run-dir", "rnu"], r"sampling stopped: rnu holds no checkpoint .*: run\)"),
        (evaluate, ["--run-dir", "rnu"], r"evaluation stopped: rnu holds no checkpoint .*: run\)"),
        (prepare_command, ["--videos", "cilps"], r"preparing stopped: .* cilps, which is not there .*: clips\)"),
        (prepare_command, ["--encoder", "./svb"], r"preparing stopped: encoder: svb is not there .*: svd\)"),
        (prepare_command, ["--dwpose-dir", "svb", "--poses", "dwpose"], r"svb without yolox_l.onnx"),
    ],
)
def test_a_path_that_is_not_there_is_one_line_with_what_lies_near(
    command, words, told, prepared, tmp_path, monkeypatch
):
    shutil.copytree(prepared, tmp_path / "clips")
    (tmp_path / "run" / "step-00000002").mkdir(parents=True)
    (tmp_path / "run" / "step-00000002" / "manifest.json").write_text("{}")
    (tmp_path / "svd").mkdir()
    for name in ("plan.json", "model.pth"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_command, "embedded_footage", lambda: [])
    monkeypatch.setattr("sys.argv", ["command", *words])
    with pytest.raises(SystemExit, match=told) as stopped:
        command.main()
    assert "\n" not in str(stopped.value)


def test_demo_preset_fits_what_the_codec_and_the_unet_need():
    config = demo()
    assert config.data.encoder == "patch-codec" and config.trainer.precision == "fp32"
    assert config.data.height % 64 == 0 and config.data.width % 64 == 0
