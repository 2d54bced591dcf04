"""Every command that README and docs print: run as printed from a clean shell, or accounted for."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megatron_anyexperts.completion import all_flags
from megatron_anyexperts.corpus.corpus import parse_corpus
from megatron_anyexperts.corpus.mixture import load_mixture
from tests.corpus.raw import raw_corpus

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]

RECIPE = "recipe"
"""Blocks that the slow test runs in this order, in one folder."""

DRY = "dry"
"""What is queued by these is looked at with --dry-run, from which a queue is all that is missing."""

HOW = {
    ("README.md", "make demo"): "the first runs what docs/recipes.md takes apart; the second runs this test",
    ("README.md", "git clone"): DRY,
    ("README.md", "source .venv"): RECIPE,
    ("docs/analysis.md", "anyexperts evaluate"): "tests/unit/evaluation/test_routing_trace.py, tests/unit/analysis",
    ("docs/benchmarks.md", "anyexperts evaluate"): "tests/unit/evaluation/test_benchmarks.py; files of the reader",
    ("docs/building_shards.md", "python data_tools/fetch"): RECIPE,
    ("docs/building_shards.md", "python data_tools/make_stamp"): "tests/corpus/test_scenes.py",
    ("docs/cluster.md", "docker"): "no container engine here; test_container_recipes",
    ("docs/cluster.md", "slurm/submit build"): DRY,
    ("docs/cluster.md", "anyexperts corpus plan"): "test_the_descriptions_of_the_cluster_page_are_valid",
    ("docs/cluster.md", "anyexperts convert"): "as in docs/conversion.md",
    ("docs/cluster.md", "anyexperts doctor"): DRY,
    ("docs/cluster.md", "slurm/submit instruct"): DRY,
    ("docs/conversion.md", "anyexperts convert import"): "tests/unit/weights; no released weights are here",
    ("docs/conversion.md", "anyexperts convert export"): "tests/unit/weights/test_hub_export.py; files of the reader",
    ("docs/conversion.md", "python pretrain/upcycle"): "tests/end_to_end/test_conversion.py; files of the reader",
    ("docs/gpu.md", "./bootstrap.sh"): "needs a GPU",
    ("docs/gpu.md", "proxy="): "tests/unit/checks/test_doctor.py validates each line of the table below it",
    ("docs/guide.md", "anyexperts convert"): "tests/unit/weights/test_new_tokens.py; no released weights are here",
    ("docs/planning.md", "anyexperts plan"): "tests/unit/checks/test_plan.py",
    ("docs/reading_a_run.md", "anyexperts runs"): "tests/unit/analysis/test_runs.py; test_budgets.py draws pictures",
    ("docs/recipes.md", "python pretrain/demo.py"): "the block after it has its steps",
    ("docs/recipes.md", "python data_tools/fetch"): RECIPE,
    ("docs/recipes.md", "python data_tools/make_demo"): RECIPE,
    ("docs/recipes.md", "torchrun"): RECIPE,
    ("docs/recipes.md", "python pretrain/generate.py --config pretrain/configs/instruct_demo.yaml --run"): RECIPE,
    ("docs/recipes.md", "python pretrain/generate.py --config pretrain/configs/instruct_demo.yaml --load"): RECIPE,
    ("docs/slurm.md", "git clone"): DRY,
    ("docs/survival.md", "(umask"): "tests/end_to_end/test_signed.py",
    ("docs/survival.md", ".venv/bin/torchrun"): RECIPE,
}  # fmt: skip
"""By page and beginning: `RECIPE`, `DRY`, or what shows that it works."""

STARTS = {
    *("python", "torchrun", "anyexperts", "docker", "make", "git", "source", "slurm/submit", "./bootstrap.sh", "proxy"),
    *(".venv/bin/torchrun", ".venv/bin/python", "(umask"),
}
"""First words of commands, or variables."""


@dataclass(frozen=True)
class Block:
    """A block of commands on a page."""

    page: str
    text: str

    @property
    def how(self) -> str | None:
        """What `HOW` says of it."""
        found = [how for (page, start), how in HOW.items() if page == self.page and self.text.startswith(start)]
        return found[0] if found else None


def blocks(page: str) -> list[Block]:
    """Blocks of a page that begin with a command."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    texts = [block for language, block in found if language in ("", "bash")]
    return [Block(page, block) for block in texts if re.split(r"[\s=]", block, maxsplit=1)[0] in STARTS]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands(block: Block) -> list[list[str]]:
    """Words of the commands of a block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_block_of_commands_is_run_or_accounted_for():
    assert [block for block in BLOCKS if block.how is None] == []
    assert len(BLOCKS) == len(HOW)


def flags_by_verb() -> dict[str, set[str]]:
    """Option strings of every verb, with its words."""
    found: dict[str, set[str]] = {}

    def walk(parser: argparse.ArgumentParser, name: str) -> None:
        nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for action in nested:
            for word, child in action.choices.items():
                walk(child, f"{name} {word}".strip())
        if not nested:
            found[name] = {option for action in parser._actions for option in action.option_strings}

    walk(all_flags(), "")
    return found


VERB_OF = {
    "pretrain/pretrain_multimodal.py": "pretrain",
    "pretrain/instruct_tune.py": "tune",
    "pretrain/show_routing.py": "pictures",
    "pretrain/evaluate_budgets.py": "budgets",
    "pretrain/generate.py": "generate",
    "pretrain/convert_checkpoint.py": "convert",
    "pretrain/upcycle.py": "upcycle",
    "data_tools/build_shards.py": "corpus build",
    "data_tools/verify_shards.py": "corpus verify",
    "data_tools/shard_stats.py": "corpus stats",
    "data_tools/plan_mixture.py": "corpus plan",
}


def test_every_printed_flag_exists():
    known, unknown = flags_by_verb(), []
    of_training = known["pretrain"]
    for block in BLOCKS:
        for words in commands(block):
            script = next((VERB_OF[word] for word in words if word in VERB_OF), None)
            if "anyexperts" in words[:1]:
                script = " ".join(words[1:3]) if words[1] == "corpus" else words[1]
            if script is None:
                continue
            of_verb = set().union(*(options for name, options in known.items() if name.startswith(script)))
            begin = next(i for i, word in enumerate(words) if word in VERB_OF or word == "anyexperts")
            used = {word.partition("=")[0] for word in words[begin:] if word.startswith("--") and word != "--"}
            unknown += [(block.page, flag) for flag in used - of_verb - of_training]
    assert not unknown


def scratch_checkout(folder: Path) -> Path:
    """A copy of the tracked files whose demo trains for four steps, with the environment of this one."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    for name in ("demo", "instruct_demo"):
        path = folder / f"pretrain/configs/{name}.yaml"
        steps = {"train-iters": 4, "eval-iters": 1, "eval-interval": 4, "save-interval": 2, "lr-warmup-iters": 1}
        text = path.read_text()
        for key, value in steps.items():
            text = re.sub(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
        path.write_text(text)
    return folder


def in_clean_shell(checkout: Path, text: str) -> None:
    """Run a block as somebody does who has just opened a shell and set the environment up."""
    clean = {"HOME": str(checkout), "PATH": "/usr/local/bin:/usr/bin:/bin", "GLOO_SOCKET_IFNAME": "lo"}
    clean |= {"PYTHONPATH": str(checkout)} if os.environ.get("PYTHONPATH") else {}
    activated = f"set -e\nsource .venv/bin/activate\n{text}"
    done = subprocess.run(
        ["bash", "-c", activated], cwd=checkout, env=clean, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, f"{text}\n{(done.stdout + done.stderr)[-3000:]}"


def test_the_commands_of_the_readme_run_as_printed(tmp_path):
    checkout = scratch_checkout(tmp_path)
    raw_corpus(checkout / "RAW", scale=4)
    [block] = [block for block in BLOCKS if block.page == "README.md" and block.how == RECIPE]
    in_clean_shell(checkout, block.text)
    assert (checkout / "RUN/checkpoints/latest_checkpointed_iteration.txt").read_text() == "4"
    assert list((checkout / "RUN/pictures").glob("*.png"))


@pytest.mark.parametrize("page", ["README.md", "docs/slurm.md", "docs/cluster.md"])
def test_what_the_pages_submit_is_what_slurm_would_get(page, tmp_path):
    checkout = scratch_checkout(tmp_path)
    submitted = 0
    for block in BLOCKS:
        if block.page == page and block.how == DRY:
            for line in block.text.replace("\\\n", " ").splitlines():
                if line.startswith("slurm/submit"):
                    # Folders of the pages are not here.
                    line = line.replace(" -- ", " --dry-run -- ").replace("RUN=/shared", f"RUN={tmp_path}")
                    in_clean_shell(checkout, line)
                    submitted += 1
    assert submitted


def test_the_descriptions_of_the_cluster_page_are_valid(tmp_path):
    corpus, mixture = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "docs/cluster.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(parse_corpus(yaml.safe_load(corpus)).sources) == 4
    (tmp_path / "mixture.yaml").write_text(mixture)
    planned = load_mixture(tmp_path / "mixture.yaml")
    assert sum(stage.tokens for stage in planned.stages) // (4096 * 4096) == 13113


def test_container_recipes_have_what_they_copy():
    """Both take the same files from the same base, and run what a checkout runs."""
    docker, apptainer = ((ROOT / "container" / name).read_text() for name in ("Dockerfile", "apptainer.def"))
    [base] = re.findall(r"^ARG BASE=(\S+)$", docker, re.MULTILINE)
    assert f"From: {base}" in apptainer
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", docker, re.MULTILINE)).split()
    assert "requirements-fp8.lock" in copied and all((ROOT / name).exists() and name in apptainer for name in copied)
    assert all("./bootstrap.sh dev,fp8" in text for text in (docker, apptainer))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_recipes_run_as_printed(tmp_path):
    checkout = scratch_checkout(tmp_path)
    (checkout / "CHECKPOINTS").symlink_to(checkout / "runs/demo/tuned/checkpoints")
    for block in BLOCKS:
        if block.how == RECIPE and block.page != "README.md":
            # Extending a run: four steps more, not twice 240.
            in_clean_shell(checkout, block.text.replace("--train-iters 480", "--train-iters 8"))
    assert (checkout / "runs/demo/pretrain/checkpoints/latest_checkpointed_iteration.txt").read_text() == "8"
