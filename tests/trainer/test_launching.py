"""Scripts that launch training on several machines: their words are real, and SLURM's joins what stands for two."""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from places import ROOT
from torch.distributed.run import get_args_parser

from mimicmotion.train import parse

SLURM, KUBERNETES = ROOT / "docs/launch/slurm.sbatch", ROOT / "docs/launch/kubernetes.yaml"

# As two machines: each gets the command, with the words after it in the place of train.py.
SRUN = f"""#!/bin/bash
words=("${{@/mimicmotion\\/train.py/{ROOT}/tests/trainer/joined.py}}")
"${{words[@]}}" & "${{words[@]}}" & wait -n && wait -n
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && echo localhost && echo another
[[ $1 == requeue ]] && echo "again $2"
exit 0
"""
SAVING = """#!/bin/bash
trap 'echo saved; exit 1' TERM
kill -USR1 $PPID  # SLURM's, before the time limit
while true; do sleep 0.1; done
"""


def script_of_pod() -> str:
    """What a container runs."""
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"] == "mimicmotion"
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert container["command"] == ["bash", "-c"] and mounted == {volume["name"] for volume in pod["volumes"]}
    return container["args"][0]


@pytest.mark.parametrize("script", [SLURM.read_text(), script_of_pod()], ids=["slurm", "kubernetes"])
def test_every_word_is_one_that_bash_torchrun_and_train_know(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    (line,) = re.findall(r"^ *(?:srun|exec) (torchrun .*?)&?$", script.replace("\\\n", " "), re.MULTILINE)
    words = shlex.split(line)
    at = words.index("mimicmotion/train.py")
    numbers = {"$SLURM_JOB_NUM_NODES": "2", "$SLURM_GPUS_ON_NODE": "8"}
    parsed = get_args_parser().parse_args([numbers.get(word, word) for word in words[1 : at + 1]])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("2", "8", "c10d")
    assert parsed.shutdown_timeout == 180 and parsed.rdzv_endpoint.endswith(":29500")
    given, begin = words[at + 1 : -1], ["--model.pretrained", "weights.pth"]
    for more in (begin, ["--resume"]):
        arguments = parse([*given, *more])
        assert arguments.config.preset == "mimicmotion-72" and arguments.resume == (more != begin)
        assert all(word in script for word in more[:1])


def slurm(folder: Path, srun: str) -> subprocess.CompletedProcess[str]:
    """SLURM's script with these in the place of srun and scontrol."""
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    environment = {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "RUN_DIR": str(folder / "run"), "WEIGHTS": "w.pth", "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": f"{os.getpid()}",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1",
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(SLURM)], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=200
    )


def test_slurms_script_joins_two_machines_and_goes_on_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = f"--kernels fused --preset mimicmotion-72 --run-dir {run_dir}"
    first = slurm(tmp_path, '#!/bin/bash\necho "$@"\n')
    assert first.stdout.endswith(f"mimicmotion/train.py {words} --model.pretrained w.pth\n"), first
    (run_dir / "stage-1/step-00000100").mkdir(parents=True)
    done = slurm(tmp_path, SRUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count(f"joined 11 2 {words} --resume") == 1, done.stdout


def test_slurms_script_has_ranks_save_before_the_limit_and_queues_itself_again(tmp_path: Path) -> None:
    done = slurm(tmp_path, SAVING)
    assert (done.returncode, done.stdout) == (0, f"saved\nagain {os.getpid()}\n"), done.stderr
    assert slurm(tmp_path, "#!/bin/bash\nexit 7\n").returncode == 7
