"""What slurm/submit prints and refuses; needs no Slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.feed import corpus

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


NUMBERS = ["NODES", "SPARE_NODES", "RANKS_PER_NODE", "CPUS_PER_RANK", "GPUS_PER_NODE", "SIGNAL_LEAD_S"]
NUMBERS += ["MAX_FAILURES", "HANG_S", "RETRY_DELAY_S", "MIN_FREE_GIB", "PREFLIGHT_TIMEOUT_S"]


@pytest.mark.parametrize("where", ["argument", "profile"])
def test_shell_arithmetic_never_runs_what_is_in_a_setting(tmp_path, where):
    trace = tmp_path / "ran"
    code = f"a[$(touch {trace})]"
    for name in NUMBERS:
        if where == "profile":
            (tmp_path / "own.env").write_text(f"{name}='{code}'\n")
            done = submit("pretrain", f"PROFILE={tmp_path}/own.env", f"RUN={tmp_path}/run", "--dry-run")
        else:
            done = submit("pretrain", "PROFILE=cpu", f"{name}={code}", f"RUN={tmp_path}/run", "--dry-run")
        assert done.returncode == 2
        assert f"{name}=a\\[" in done.stderr
        assert not trace.exists(), name


def test_a_typing_error_in_a_profile_is_refused(tmp_path):
    profile = tmp_path / "own.env"
    profile.write_text("shared=/data\nHANGS_S=5\nMOUNTS=$shared:$shared\nexport NCCL_DEBUG=WARN\n")
    done = submit("pretrain", f"PROFILE={profile}", "--dry-run")
    assert done.returncode == 2
    assert f"unknown setting HANGS_S in {profile}; did you mean HANG_S?" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    profile.write_text(profile.read_text().replace("HANGS_S", "HANG_S"))
    assert not submit("pretrain", f"PROFILE={profile}", "--dry-run").returncode


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HANG_S= 700\nHANG_S =700\n", "is no command; write NAME=value without spaces around ="),
        ("if true; then\nHANG_S=700\n", "syntax error"),
    ],
)
def test_a_profile_that_is_read_in_part_only_is_refused(tmp_path, text, message):
    profile = tmp_path / "own.env"
    profile.write_text(text)
    done = submit("pretrain", f"PROFILE={profile}", "--dry-run")
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return corpus.build(folder / "shards", {"text": 40}), corpus.write_tokenizer(folder / "tokenizer")


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ("flag", "error: unknown flag --train-itres; did you mean train-iters"),
        ("tokenizer", "error: Unable to instantiate HuggingFace AutoTokenizer for "),
        ("blend", "error: data or tokenizer cannot be opened: "),
        ("layout", "error: no layout for 3 to 3 nodes of 1 ranks"),
    ],
)
def test_what_training_would_refuse_is_refused_before_it_is_queued(tmp_path, data, spoilt, message):
    blend, tokenizer = data
    if spoilt == "tokenizer":
        tokenizer = tmp_path
    if spoilt == "blend":
        blend = shutil.copy(blend, tmp_path)  # its relative paths now lead nowhere
    words = ["--config", "demo", "--data-path", str(blend), "--tokenizer-model", str(tokenizer), "--eval-iters", "0"]
    words += ["--train-itres", "5"] if spoilt == "flag" else []
    nodes = 3 if spoilt == "layout" else 1
    run = tmp_path / "run"
    done = submit("pretrain", "PROFILE=cpu", f"PYTHON={sys.executable}", f"RUN={run}", f"NODES={nodes}", "--", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not run.exists()


def test_all_wrong_settings_are_named_at_once():
    done = submit("pretrain", "HANG_S=ten", "PREFLIGHT=of", "--dry-run")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pretrain", "NODE=2"), "unknown setting NODE=2; did you mean NODES?; settings are RUN ENTRY PROFILE"),
        # Variables that the shell or the launcher has are no settings for that.
        (("pretrain", "PATH=/nowhere", "--dry-run"), "unknown setting PATH=/nowhere"),
        (("pretrain", "ROOT=/nowhere", "--dry-run"), "unknown setting ROOT=/nowhere"),
        (("pretrain", "BASH_VERSINFO[0]=1", "--dry-run"), "unknown setting BASH_VERSINFO[0]=1"),
        (("pretrain", "RUN ENTRY=1", "--dry-run"), "unknown setting RUN ENTRY=1"),
        (("pretrain", "=1", "--dry-run"), "unknown setting =1"),
        (("pretrain", "PROFILE=nowhere"), "no profile"),
        (("pretrain", "CONTAINER=docker", "--dry-run"), "CONTAINER=docker is not one of none pyxis apptainer"),
        ((), "slurm/submit KIND"),
        (("pretrian",), "unknown KIND pretrian; did you mean pretrain?; KIND is one of build_shards instruct_tune"),
        (("../slurm/pretrain",), "unknown KIND"),
        (("pretrain", "HANGS=9", "--dry-run"), "unknown setting HANGS=9; did you mean HANG_S?"),
        (("pretrain", "HANG_S=ten", "--dry-run"), "HANG_S=ten is not a number of seconds above 0, such as 600"),
        (("pretrain", "HANG_S=0.0", "--dry-run"), "HANG_S=0.0 is not a number of seconds above 0"),
        (("pretrain", "MAX_FAILURES=lots", "--dry-run"), "MAX_FAILURES=lots is not a whole number from 1"),
        (("pretrain", "RANKS_PER_NODE=08", "--dry-run"), "RANKS_PER_NODE=08 is not a whole number from 1"),
        (("pretrain", "PREFLIGHT=of", "--dry-run"), "PREFLIGHT=of is not one of full nodes off"),
        (("pretrain", "NODES=4-2", "--dry-run"), "NODES=4-2 runs backwards; write 2-4"),
        (("pretrain", "NODES=0", "--dry-run"), "NODES=0 is not a whole number from 1, or a range"),
        (("pretrain", "TIME=soon", "--dry-run"), "TIME=soon is not one of sbatch's times"),
        (("pretrain", "RUN=runs/100%", "--dry-run"), "is not a path without % and"),
        (("pretrain", "RUN=a\nNODES=9", "--dry-run"), "contains a line break or a control character"),
        (("pretrain", "RUN=a:b", "CONTAINER=pyxis", "--dry-run"), "which the list of a container's mounts cannot hold"),
        (("pretrain", "SIGNAL_LEAD_S=70000", "--dry-run"), "more than 65535"),
        (("pretrain", "GPUS_PER_NODE=4", "RANKS_PER_NODE=8", "--dry-run"), "each rank needs a GPU"),
        (("pretrain", "CONTAINER=pyxis", "PROFILE=cpu"), "CONTAINER=pyxis needs IMAGE="),
        (("pretrain", "PROFILE=cpu", "ENTRY=nowhere.py"), "ENTRY=nowhere.py: no file"),
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
        ["bash", "-c", f"ROOT={ROOT}; source $ROOT/slurm/lib.sh; setting_names"],
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
