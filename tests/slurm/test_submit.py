"""What slurm/submit prints and refuses; needs no Slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def submit(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "slurm" / "submit", *words], text=True, capture_output=True)


def last_line(*words: str) -> str:
    done = submit(*words)
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()[-1]


def test_dry_run_prints_settings_sbatch_script_and_srun_line(tmp_path):
    done = submit("pretrain", "PROFILE=cpu", "NODES=2-4", f"RUN={tmp_path / 'run'}", "--dry-run", "--", "--lr", "1e-4")
    for expected in (
        "NODES=2-4",
        "--nodes=2-4",
        "#SBATCH --requeue",
        "run_training()",
        "--lr 1e-4",
        "--kill-on-bad-exit=1",
        "pretrain/pretrain_multimodal.py",
    ):
        assert expected in done.stdout
    assert not (tmp_path / "run").exists()


def test_containers_are_entered_with_mounts(tmp_path):
    common = (
        "pretrain",
        "PROFILE=cpu",
        "IMAGE=image.sif",
        "MOUNTS=/data:/data",
        f"RUN={tmp_path}",
        "PYTHON=python",
        "--dry-run",
    )
    mounts = f"{ROOT}:{ROOT}\\,{tmp_path}:{tmp_path}\\,/data:/data"
    line = last_line(*common, "CONTAINER=pyxis")
    assert f"--container-image=image.sif --container-mounts={mounts}" in line
    line = last_line(*common, "CONTAINER=apptainer", "GPUS_PER_NODE=8")
    assert f"rank.sh apptainer exec --bind {mounts} --pwd {ROOT} --nv image.sif python" in line


@pytest.mark.parametrize("profile", ["generic", "cpu", "h100"])
def test_every_profile_makes_a_job(profile):
    assert "srun" in last_line("instruct_tune", f"PROFILE={profile}", "--dry-run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pretrain", "NODE=2"), "unknown setting NODE=2; settings are RUN ENTRY PROFILE ARRAY JOB_NAME"),
        # Variables that the shell or the launcher has are no settings for that.
        (("pretrain", "PATH=/nowhere", "--dry-run"), "unknown setting PATH=/nowhere"),
        (("pretrain", "ROOT=/nowhere", "--dry-run"), "unknown setting ROOT=/nowhere"),
        (("pretrain", "BASH_VERSINFO[0]=1", "--dry-run"), "unknown setting BASH_VERSINFO[0]=1"),
        (("pretrain", "RUN ENTRY=1", "--dry-run"), "unknown setting RUN ENTRY=1"),
        (("pretrain", "=1", "--dry-run"), "unknown setting =1"),
        (("pretrain", "PROFILE=nowhere"), "no profile"),
        (("pretrain", "CONTAINER=docker", "--dry-run"), "CONTAINER=docker is not none, pyxis or apptainer"),
        (("pretrian",), "slurm/submit KIND"),
        (("pretrain", "--config"), "arguments of the program come after --"),
        (("build_shards", "--dry-run"), "give ARRAY=0-N"),
    ],
)
def test_wrong_words_are_refused(words, message):
    done = submit(*words)
    assert done.returncode
    assert message in done.stderr


def test_every_setting_is_explained():
    names = subprocess.run(
        ["bash", "-c", f"ROOT={ROOT}; source $ROOT/slurm/lib.sh; printf '%s\\n' \"${{SETTINGS[@]%%=*}}\""],
        text=True,
        capture_output=True,
        check=True,
    ).stdout.split()
    profile = (ROOT / "slurm" / "profiles" / "generic.env").read_text()
    of_a_profile = re.findall(r"^([A-Z_]+)=[^#\n]*# .", profile, re.MULTILINE)
    of_a_job = re.findall(r"^ {10,}([A-Z]+)=\S+  +\S", submit("--help").stdout, re.MULTILINE)
    in_the_docs = re.findall(r"^\| `([A-Z]+)=", (ROOT / "docs" / "slurm.md").read_text(), re.MULTILINE)
    assert sorted(of_a_profile + of_a_job) == sorted(names)
    assert of_a_job == in_the_docs


@pytest.mark.parametrize(("failing", "good"), [("", "n1"), ("judge", "n1 n2"), ("judge-bandwidth", "n1 n3")])
def test_the_preflight_leaves_no_file_behind(tmp_path, failing, good):
    script = f"""
set -euo pipefail
ROOT={ROOT}
source "$ROOT/slurm/lib.sh"
load_settings
RUN=run SLURMD_NODENAME=n1 PREFLIGHT=full
on_every_node() {{ [[ -f $REPORTS ]] && echo answer >"$REPORTS"; }}
survival() {{ [[ $1 != "{failing}" ]] && if [[ $1 == judge ]]; then echo n1 n3; else echo n1; fi; }}
code=0
preflight n1 n2 || code=$?
echo "$code ${{GOOD[*]}}"
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], text=True, capture_output=True, env=environment)
    assert done.stdout == f"{int(bool(failing))} {good}\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_the_shell_code_is_clean():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    files = [
        *(ROOT / "slurm").glob("*.sbatch"),
        *(ROOT / "slurm").glob("*.sh"),
        *(ROOT / "slurm" / "profiles").glob("*.env"),
        ROOT / "slurm" / "submit",
        ROOT / "slurm" / "status",
    ]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, text=True, capture_output=True)
    assert not done.returncode, done.stdout
