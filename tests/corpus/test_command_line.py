"""The commands as a user runs them: processes, MPI, Slurm array, kill -9, messages and exit codes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.corpus.raw import raw_corpus, tree_bytes, write

TOOLS = Path(__file__).parents[2] / "data_tools"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(TOOLS.parent),
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def tool(name: str, *arguments, before=(), environment=None, timeout=300) -> subprocess.CompletedProcess:
    command = [*before, sys.executable, TOOLS / f"{name}.py", *map(str, arguments)]
    return subprocess.run(
        command, env=ENVIRONMENT | (environment or {}), capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(corpus YAML, folder of a build by one process)."""
    root = tmp_path_factory.mktemp("raw")
    description = raw_corpus(root)
    result = tool("build_shards", description, "--output", root / "out", "--workers", 0)
    assert result.returncode == 0, result.stderr
    assert "102 items = 96 samples + 6 rejected" in result.stdout
    assert "items/s" in result.stderr and "shard/s" in result.stderr
    return description, root / "out"


def test_mpi_gives_the_bytes_of_one_process(reference):
    description, expected = reference
    output = expected.parent / "out-mpi"
    mpiexec = Path(sys.executable).parent / "mpiexec"  # of the extra `dev`
    before = [mpiexec, "-n", "2", "--oversubscribe"]
    result = tool("build_shards", description, "--output", output, "--mpi", before=before)
    assert result.returncode == 0, result.stderr
    assert tree_bytes(output) == tree_bytes(expected)


def test_an_mpi_rank_that_fails_ends_all_ranks(tmp_path):
    mpiexec = Path(sys.executable).parent / "mpiexec"  # of the extra `dev`
    description = write(tmp_path / "c.yaml", "{name: x, sources: [{type: text_folder, path: nowhere}]}")
    before = [mpiexec, "-n", "2", "--oversubscribe"]
    result = tool("build_shards", description, "--output", tmp_path / "out", "--mpi", before=before, timeout=120)
    assert result.returncode != 0 and "nowhere does not exist" in result.stderr


def test_a_slurm_array_gives_the_bytes_of_one_process_in_any_order_of_its_tasks(reference):
    description, expected = reference
    output = expected.parent / "out-array"
    for task in (7, 3, 5):
        array = {"ID": task, "MIN": 3, "STEP": 2, "COUNT": 3, "MAX": 7}
        environment = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
        result = tool("build_shards", description, "--output", output, "--workers", 1, environment=environment)
        assert result.returncode == 0, result.stderr
        assert ("96 samples" in result.stdout) == (task == 3)
    assert tree_bytes(output) == tree_bytes(expected)


def test_array_tasks_at_the_same_time_give_the_bytes_of_one_process(reference):
    description, expected = reference
    output = expected.parent / "out-together"
    command = [sys.executable, TOOLS / "build_shards.py", description, "--output", output, "--workers", "0", "--quiet"]
    processes = [subprocess.Popen([*command, "--part", f"{part}/2"], env=ENVIRONMENT) for part in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
    assert tree_bytes(output) == tree_bytes(expected)


def kill_until_done(description: Path, output: Path, moments: list[float]) -> int:
    """Start a build again and again, killing its whole process group at the given moments; returns the kills."""
    command = [sys.executable, TOOLS / "build_shards.py", description, "--output", output, "--workers", "2", "--quiet"]
    kills = 0
    for moment in moments:
        process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL)
        try:
            assert process.wait(moment) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL).returncode == 0
    return kills


def test_killed_at_random_moments_and_continued_gives_the_same_bytes(reference):
    description, expected = reference
    output = expected.parent / "out-killed"
    moments = random.Random(5)
    assert kill_until_done(description, output, [moments.uniform(1.0, 6.0) for _ in range(3)]) > 0
    assert tree_bytes(output) == tree_bytes(expected)
    assert not (output / ".build/tmp").exists()


@pytest.mark.slow
def test_killed_at_20_random_moments_gives_the_same_bytes(reference):
    description, expected = reference
    moments = random.Random(7)
    kills = 0
    for attempt in range(20):
        output = expected.parent / f"out-killed-{attempt}"
        kills += kill_until_done(description, output, [moments.uniform(0.5, 12.0)])
        assert tree_bytes(output) == tree_bytes(expected)
        shutil.rmtree(output)
    assert kills >= 10


def test_a_worker_does_not_outlive_its_killed_parent(reference, tmp_path):
    description, _ = reference
    command = [sys.executable, TOOLS / "build_shards.py", description, "--output", tmp_path / "out", "--workers", "1"]
    process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    children = []
    while not children and time.monotonic() < deadline:
        time.sleep(0.1)
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        children = [child for child in listed if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    process.kill()
    process.wait()
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children and not any(_alive(child) for child in children)


def _alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_damaged_shard_is_named_with_the_command_that_rebuilds_it(reference):
    _, expected = reference
    output = expected.parent / "out-damaged"
    shutil.copytree(expected, output)
    assert tool("verify_shards", output, "--workers", 1).returncode == 0
    shard = output / "chat/train/shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-3000])
    result = tool("verify_shards", output, "--workers", 1)
    assert result.returncode == 1
    assert "DAMAGED chat/train/shard-000000.tar" in result.stdout and result.stdout.count("DAMAGED") == 1
    [command] = [line.split("rebuild: ")[1] for line in result.stdout.splitlines() if "rebuild: " in line]
    subprocess.run(command, shell=True, check=True, env=ENVIRONMENT)
    assert tool("verify_shards", output, "--workers", 1).returncode == 0
    assert tree_bytes(output) == tree_bytes(expected)


@pytest.mark.parametrize(
    ("description", "arguments", "message"),
    [
        ("{name: x, sorces: []}", [], "unknown key 'sorces'; did you mean 'sources'?"),
        ("name: [", [], "cannot read it"),
        ("{name: x, seed: 1, sources: [], seed: 2}", [], "'seed' is there twice"),
        ("{name: x, sources: [{type: text_folder, path: gone}]}", [], "gone does not exist"),
        ("{name: x, sources: [{type: text_folder, path: .}]}", ["--part", "4/4"], "part=4 is outside 0..3"),
        ("{name: x, sources: [{type: text_folder, path: .}]}", ["--workers", "-1"], "--workers=-1 must be 0 or more"),
        ("{name: x, sources: [{type: text_folder, path: .}]}", ["--rebuild", "a"], "holds no finished build"),
    ],
)
def test_bad_input_ends_in_one_clear_message(tmp_path, description, arguments, message):
    path = write(tmp_path / "c.yaml", description)
    result = tool("build_shards", path, "--output", tmp_path / "out", *arguments)
    assert result.returncode not in (0, -signal.SIGSEGV) and message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["build_shards", "verify_shards", "shard_stats", "plan_mixture", "fetch_demo_data"])
def test_help_explains_every_option(name):
    text = tool(name, "--help").stdout
    options = text.partition("options:")[2].splitlines()
    flags = [line for line in options if line.startswith("  -")]
    assert len(flags) >= 2
    for number, line in enumerate(options):
        if line.startswith("  -"):
            below = options[number + 1] if number + 1 < len(options) else ""
            explained = len(line.split("  ")) > 2 or below.startswith("     ")
            assert explained, line


@pytest.mark.parametrize("name", ["verify_shards", "shard_stats"])
def test_a_folder_without_a_corpus_is_refused(tmp_path, name):
    result = tool(name, tmp_path)
    assert result.returncode == 2 and "holds no finished corpus" in result.stderr


def test_statistics_are_printed_and_plotted(reference):
    _, expected = reference
    plots = expected.parent / "plots"
    result = tool("shard_stats", expected, "--plots", plots)
    assert result.returncode == 0, result.stderr
    assert "audio seconds" in result.stdout and "chat turns" in result.stdout
    assert {path.name for path in plots.iterdir()} >= {"tokens.png", "video.png", "interleaved.png"}


def test_demo_data_without_a_network_says_so_and_is_usable(tmp_path):
    result = tool("fetch_demo_data", "--output", tmp_path / "raw", "--offline", "--videos", 4)
    assert result.returncode == 0, result.stderr
    assert "FALLBACK" in result.stdout and "NO SPEECH" in result.stdout
    assert json.loads((tmp_path / "raw/SOURCE.json").read_text())["counts"]["images"] >= 500
    assert "nothing to fetch" in tool("fetch_demo_data", "--output", tmp_path / "raw", "--offline").stdout
    demo = TOOLS.parent / "pretrain/configs/corpora/demo.yaml"
    built = tool("build_shards", demo, "--root", tmp_path / "raw", "--output", tmp_path / "out", "--workers", 1)
    assert built.returncode == 0 and "image train" in built.stdout and "video train" in built.stdout, built.stderr
