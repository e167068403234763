import errno
import os
import subprocess
import sys

import pytest
import torch

from mimicmotion.commands import one_sentence, sentence
from mimicmotion.paths import first_line


def _os_error(number, path):
    return OSError(number, os.strerror(number), path)


SENTENCES = {
    "disk full": (_os_error(errno.ENOSPC, "/tmp/x"), r"no space left to write /tmp/x, [\d.]+ GiB are free"),
    "no rights": (_os_error(errno.EACCES, "/root/x"), r"/root/x cannot be used \(Permission denied\)"),
    "read-only": (_os_error(errno.EROFS, "/mnt/x"), r"/mnt/x cannot be used \(Read-only"),
    "GPU memory": (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), r"Tried\); give --memory-budget auto"),
    "memory": (MemoryError(), "the memory ran out; give fewer workers"),
    "package": (ModuleNotFoundError("No module named 'torchao'"), r"No module named 'torchao'; `pip install -e \.`"),
    "no words": (ValueError(), "ValueError"),
}  # fmt: skip


@pytest.mark.parametrize("name", SENTENCES)
def test_an_expected_error_ends_in_one_sentence(name):
    error, wanted = SENTENCES[name]
    said = f"^training stopped: .*{wanted}"
    with pytest.raises(SystemExit, match=said) as ended, one_sentence("training stopped", debug=False):
        raise error
    assert "\n" not in str(ended.value) == f"training stopped: {sentence(error)}"


def test_debug_and_faults_of_ours_keep_their_traceback():
    with pytest.raises(ValueError, match="got x"), one_sentence("stopped", debug=True):
        raise ValueError("got x")
    with pytest.raises(KeyError), one_sentence("stopped", debug=False):
        raise KeyError("a fault of ours")


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from mimicmotion.run.checkpoint import Checkpoint, CheckpointError, load, newest, save
run_dir = Path(sys.argv[1])
large = lambda step: Checkpoint(step=step, tensors={"model": {"a": torch.zeros(1 << 18)}}, documents={"config": {}})
save(run_dir, large(1), keep=2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))  # a write beyond fails, as on a full disk
try:
    save(run_dir, large(2), keep=2)
except CheckpointError as error:
    print(error)
print(newest(run_dir).name, load(newest(run_dir)).step, sorted(path.name for path in run_dir.iterdir()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_checkpoint_that_cannot_be_written_keeps_those_before_it_and_says_what_to_do(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    said, state = done.stdout.splitlines()
    assert said.startswith(f"step 2 could not be saved in {tmp_path} (") and "File too large" in said
    assert f"{tmp_path / 'step-00000001'} is the newest that is complete. Make room there and" in said
    assert state == "step-00000001 1 ['step-00000001']"


def test_the_first_line_of_an_error_is_its_kind_where_it_says_nothing() -> None:
    assert [first_line(error) for error in (MemoryError(), ValueError("\n a \nb"))] == ["MemoryError", "a"]
