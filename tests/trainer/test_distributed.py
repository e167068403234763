import json

import pytest
import torch
from launched import launched
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import NoiseClips, tiny_config

from mimicmotion.config import TrainerConfig
from mimicmotion.ranks.distributed import Ranks, join_ranks, rank_sample_ids
from mimicmotion.run.history import read_history
from mimicmotion.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    done = launched("tests/trainer/two_ranks.py", 2, folder, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_two_ranks_give_the_gradients_of_one_on_the_joined_batch(two_ranks, tmp_path):
    """Two ranks of two accumulated micro-batches each, against one micro-batch of four."""
    config = tiny_config(tmp_path, batch_size=4, micro_batch_size=4)
    trainer = Trainer(config, NoiseClips(config=config), Ranks(rank=0, world_size=1, device=CPU))
    trainer._backward(trainer._load(0))
    wanted = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    first, second = (load_file(two_ranks / f"gradients-{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() == wanted.keys() and len(wanted) > 500
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


def test_a_bad_clip_of_one_rank_is_skipped_and_counted_by_all(two_ranks):
    ends = []
    for rank in range(2):
        path = two_ranks / f"end-{rank}.safetensors"
        with safe_open(path, framework="pt") as opened:
            assert "3 steps in a row, up to step 6 (4 skipped in all)" in opened.metadata()["why"]
        ends.append(load_file(path))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert (int(ends[0]["step"]), int(ends[0]["skipped"])) == (6, 4)
    assert all(value.isfinite().all() for value in ends[0].values())
    rows = read_history(two_ranks / "run" / "loss.jsonl")
    assert [row["step"] for row in rows if row["is_skipped"]] == [2, 4, 5, 6]


def test_a_plan_is_the_first_ranks_for_the_least_free_memory(two_ranks):
    """Rank 0 has 20 GiB free, rank 1 has 10; what stops one stops both, with the same words."""
    first, second = (json.loads((two_ranks / f"plans-{rank}.json").read_text()) for rank in range(2))
    assert first.pop("asked") == [[10, False], [1, False], [2, False]] and second.pop("asked") == []
    assert first.pop("fails") == ["KeyError", "'a fault of ours'"]
    assert second.pop("fails") == ["FirstRankError", "the first rank failed: 'a fault of ours'"]
    assert first == second
    (plan, ema), refused = first["auto"], first["a file"]
    assert plan["made_for"]["budget_gib"] == 10 and ema == "host"
    assert first["does not fit"] == ["ValueError", "no plan fits a budget of 1 GiB"]
    assert refused[0] == "ValueError" and "peak is 15.0 GiB, the device has 10.0 GiB free" in refused[1]
    assert first["no file"][0] == "ValueError" and "there is no file" in first["no file"][1]


def test_memory_that_runs_out_on_one_rank_repeats_the_step_on_all(two_ranks):
    """The step is done again under the same smaller plan, with the bits of a run under DDP."""
    wanted = load_file(two_ranks / "wrapped-0.safetensors")
    for rank in range(2):
        path = two_ranks / f"fitted-{rank}.safetensors"
        with safe_open(path, framework="pt") as opened:
            assert opened.metadata()["blocks"] == "('mid_block.resnets.0',)"
        found = load_file(path)
        assert [name for name, x in wanted.items() if not torch.equal(found[name], x)] == []
    assert [row["step"] for row in read_history(two_ranks / "fitted" / "loss.jsonl")] == [1, 2]


def test_ranks_share_the_batch_without_overlap(tmp_path):
    config = tiny_config(tmp_path, batch_size=8, micro_batch_size=2)
    shares = [rank_sample_ids(config, Ranks(rank=rank, world_size=2, device=CPU)) for rank in range(2)]
    assert [list(ids) for ids in shares[0]] == [[0, 1], [2, 3]] and [list(ids) for ids in shares[1]] == [[4, 5], [6, 7]]
    with pytest.raises(ValueError, match="give a multiple of 6"):
        rank_sample_ids(config, Ranks(rank=0, world_size=3, device=CPU))
    assert TrainerConfig().batch_size == 8


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join_ranks() as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_first) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        ranks.wait()
        model = torch.nn.Linear(1, 1)
        assert ranks.wrap(model) is model
