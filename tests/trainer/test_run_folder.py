import subprocess
import sys
import textwrap

import pytest

from mimicmotion.data.ownership import sign
from mimicmotion.run.run_folder import owned


def _owner(run_dir):
    """Another process that owns the folder until it is told to end, or killed."""
    script = f"""
        import sys
        from pathlib import Path
        from mimicmotion.data.ownership import sign
        from mimicmotion.run.run_folder import owned
        with owned(Path({str(run_dir)!r})):
            sign(Path({str(run_dir)!r}))
            print("mine", flush=True)
            sys.stdin.readline()
    """
    words = [sys.executable, "-c", textwrap.dedent(script)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "mine\n"
    return process


@pytest.mark.parametrize("is_killed", [False, True])
def test_two_processes_never_own_one_folder_and_an_end_gives_it_back(is_killed, tmp_path):
    run_dir = tmp_path / "runs" / "dance"
    other = _owner(run_dir)
    said = rf"dance belongs to another run, process {other.pid} on .* since 20.*--run-dir"
    with pytest.raises(ValueError, match=said), owned(run_dir):
        pass
    with owned(tmp_path / "runs" / "another"):  # a neighbour is free
        pass
    if is_killed:
        other.kill()
    other.communicate("\n")
    with owned(run_dir):
        sign(run_dir)
        run_dir.rename(tmp_path / "runs" / "dance.1")  # as a fresh start does with an earlier run
        run_dir.mkdir()
        script = "import sys, pathlib, mimicmotion.run.run_folder as r\nwith r.owned(pathlib.Path(sys.argv[1])): pass"
        late = subprocess.run([sys.executable, "-c", script, str(run_dir)], capture_output=True, text=True)
        assert late.returncode == 1 and "belongs to another run" in late.stderr
