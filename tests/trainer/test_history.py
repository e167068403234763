import json
import logging

import pytest
from rich.console import Console

from mimicmotion.run import history
from mimicmotion.run.history import History, Reporter, plot_loss, read_history


def _row(step, loss=0.5, is_skipped=False):
    return {
        "step": step, "loss": None if is_skipped else loss, "gradient_norm": None if is_skipped else 1.0,
        "learning_rate": 1e-3, "is_skipped": is_skipped, "seconds": 0.1,
        **({"why": "it is a spike", "clips": ["dance_a"]} if is_skipped else {}),
    }  # fmt: skip


def test_rows_are_json_lines_and_a_fresh_start_empties_the_file(tmp_path):
    path = tmp_path / "run" / "loss.jsonl"
    rows = History(path, resumed_step=0)
    rows.append(_row(1))
    rows.append(_row(2, is_skipped=True))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [_row(1), _row(2, is_skipped=True)]
    History(path, resumed_step=1)
    assert read_history(path) == [_row(1)]
    History(path, resumed_step=0)
    assert read_history(path) == []


def _report(capsys, *, is_quiet=False):
    with Reporter(first=0, last=12, log_every=5, is_quiet=is_quiet) as reporter:
        for step in range(1, 13):
            reporter.step(_row(step, is_skipped=step == 7))
    return capsys.readouterr().out


def test_plain_lines_where_there_is_no_terminal(capsys):
    lines = _report(capsys).splitlines()
    assert [line.split()[1] for line in lines] == ["1/12", "5/12", "7", "10/12", "12/12"]
    assert "loss 0.5000" in lines[0] and "skipped: it is a spike" in lines[2] and "clips dance_a" in lines[2]
    assert _report(capsys, is_quiet=True) == ""


def test_what_the_kernels_log_is_told_while_the_run_goes_on(capsys):
    log = logging.getLogger("mmkernels")
    for is_quiet in (False, True):
        with Reporter(first=0, last=12, log_every=5, is_quiet=is_quiet):
            log.info("timing %s (shape %d of this run)", "group_norm_silu_conv", 7)
        log.info("afterwards")
        told = "mmkernels: timing group_norm_silu_conv (shape 7 of this run)\n"
        assert capsys.readouterr().out == ("" if is_quiet else told)
    assert log.handlers == [] and not log.isEnabledFor(logging.INFO)


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(history, "Console", lambda: Console(force_terminal=True, width=120))
    printed = _report(capsys)
    assert "12/12" in printed and "\x1b[" in printed and "step 7 skipped" in printed
    assert "step 5/12" not in printed


@pytest.mark.pictures
def test_loss_picture_leaves_out_skipped_steps(tmp_path):
    plot_loss([_row(step, 1 / step, is_skipped=step == 3) for step in range(1, 30)], tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError):
        read_history(tmp_path / "gone.jsonl")
