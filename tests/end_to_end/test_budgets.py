"""The directory of a run is all that tools need: other slot budgets, answers, pictures of its video frames."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_anyexperts.data.tokenizer import train_tokenizer
from megatron_anyexperts.evaluation.budgets import Budget
from megatron_anyexperts.training.arguments import UsageError
from tests.end_to_end.launch import ROOT, pretrain, start_ranks
from tests.feed import corpus as small_corpus

COMMAND = ROOT / "pretrain/evaluate_budgets.py"
PICTURES = ROOT / "pretrain/show_routing.py"
EVALUATE = ROOT / "pretrain/evaluate.py"
GENERATE = ROOT / "pretrain/generate.py"


@dataclass(frozen=True)
class Trained:
    """A run on a corpus that holds video as well."""

    run_dir: Path

    def call(self, entry: Path, *words: str, ranks: int = 1) -> tuple[int, str]:
        """Run a command on the run's directory; returns exit code and output of all ranks."""
        processes = start_ranks(entry, ranks, ["--run-dir", str(self.run_dir), *words])
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        return max(process.returncode for process in processes), "\n".join(outputs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    # With too few steps all tokens have the same importance, and only whole numbers of slots can be met.
    folder = tmp_path_factory.mktemp("budgets")
    small_corpus.build(folder / "shards", {"text": 48, "image_text": 24, "video_text": 24})
    train_tokenizer([small_corpus.prose(index, 30) for index in range(200)], 512, folder / "tokenizer")
    spread = ("--train-iters", "40", "--save-interval", "40", "--anyexperts-spread-loss-coeff", "1.0")
    pretrain(folder, folder / "run", *spread)
    return Trained(folder / "run")


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("evaluated")
    budgets = ["1:1", "2:2", "3:3", "1:3:1.5", "1:3:2.5:2.2", "1:3"]
    files = ["--output", str(folder)]
    code, output = trained.call(COMMAND, "--budgets", *budgets, "--batches", "6", "--passes", "80", *files)
    assert code == 0, output[-4000:]
    assert (folder / "budgets.png").stat().st_size > 10_000
    rows = json.loads((folder / "budgets.json").read_text())
    assert all(f"| {row['budget']} | {row['slots']:.2f} | {row['real']:.2f} |" in output for row in rows)
    return {row["budget"]: row for row in rows}


def test_a_static_budget_gives_every_token_as_many_real_slots(evaluated):
    for slots in (1, 2, 3):
        row = evaluated[f"static {slots}"]
        assert row["slots"] == row["real"] == slots
        assert set(row["real_by_token"].values()) == {slots}


def test_every_layer_is_steered_as_near_to_its_targets_as_whole_slots_allow(evaluated):
    few, many = evaluated["1 to 3, slots 1.5"], evaluated["1 to 3, slots 2.5, real 2.2"]
    assert few["slots"] == pytest.approx(1.5, rel=0.1)
    assert many["slots"] == pytest.approx(2.5, rel=0.1) and many["real"] == pytest.approx(2.2, rel=0.1)
    assert max(few["deviation"], many["deviation"]) < 0.1  # without steering 0.33 and 0.2


def test_the_budget_of_training_without_targets_changes_nothing_even_after_others(evaluated):
    again, first = evaluated["1 to 3"], evaluated["trained"]
    assert {**again, "budget": "", "errors": None} == {**first, "budget": "", "errors": None}
    assert set(again["errors"].values()) == {0.0}
    # The same microbatches under both: what they have in common is in no difference.
    assert 0 < evaluated["static 1"]["errors"]["all"] < first["errors"]["all"]
    losses = [row["losses"]["all"] for row in evaluated.values()]
    assert len(set(losses)) == len(losses) - 1


def test_losses_are_those_of_each_kind_of_sample(evaluated):
    for row in evaluated.values():
        assert set(row["losses"]) == {"all", "text", "image", "video"}
        kinds = [loss for kind, loss in row["losses"].items() if kind != "all"]
        assert min(kinds) < row["losses"]["all"] < max(kinds)


def test_evaluation_gives_the_losses_of_the_trained_budget_and_their_errors(trained):
    # Few enough batches not to repeat the held-out set.
    code, output = trained.call(COMMAND, "--budgets", "1:1", "--batches", "2", "--json")
    assert code == 0, output[-4000:]
    budgets = json.loads(output[output.index("[\n") : output.rindex("]") + 1])
    code, output = trained.call(EVALUATE, "--batches", "2")
    assert code == 0, output[-4000:]
    rows = {words[0]: words[1:] for line in output.splitlines() if len(words := line.split()) == 6}
    for name, loss in budgets[0]["losses"].items():
        documents, targets, mean, error, _ = rows[name]
        assert float(mean) == pytest.approx(loss, abs=1e-3)
        assert int(targets) > int(documents) > 1 and 0 < float(error) < 1


def test_ranks_that_evaluate_together_read_every_document_once(trained):
    def losses(*words: str, ranks: int) -> dict[str, dict]:
        code, output = trained.call(EVALUATE, "--json", "--batches", "100", *words, ranks=ranks)
        assert code == 0, output[-4000:]
        [line] = [line for line in output.splitlines() if line.startswith('{"load"')]
        return json.loads(line)["losses"]

    alone, shared = losses(ranks=1), losses("--expert-model-parallel-size", "2", ranks=2)
    assert shared.keys() == alone.keys() >= {"all", "text", "image", "video"}
    for name, loss in alone.items():
        assert [shared[name][key] for key in ("documents", "targets")] == [loss["documents"], loss["targets"]]
        assert shared[name]["mean"] == pytest.approx(loss["mean"], rel=1e-4)


def test_expert_parallel_ranks_share_the_work(trained, evaluated, tmp_path):
    words = ["--budgets", "2:2", "--batches", "3", "--output", str(tmp_path)]
    code, output = trained.call(COMMAND, *words, "--expert-model-parallel-size", "2", ranks=2)
    assert code == 0, output[-4000:]
    for row in json.loads((tmp_path / "budgets.json").read_text()):
        assert row["losses"]["all"] == pytest.approx(evaluated[row["budget"]]["losses"]["all"], rel=1e-4)
        assert row["real"] == pytest.approx(evaluated[row["budget"]]["real"], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budgets", "1:9"], "k_max=9"),
        (["--budgets", "1:3:5"], "anyexperts_target_slots=5.0"),
        (["--budgets", "2"], "k_min:k_max"),
        (["--budgets", "1:3", "--batches", "0"], "--batches 0"),
    ],
)
def test_an_impossible_request_is_refused_with_the_limit(trained, words, message):
    code, output = trained.call(COMMAND, *words)
    assert code == 2
    assert message in output.splitlines()[-1]


def test_pictures_show_video_frames(trained):
    code, output = trained.call(PICTURES)
    assert code == 0, output[-4000:]
    assert (trained.run_dir / "pictures/frames.png").stat().st_size > 10_000


def test_an_answer_needs_the_run_alone(trained):
    code, output = trained.call(GENERATE, "--prompt", "a small red boat", "--max-new-tokens", "2", "--json")
    assert code == 0, output[-4000:]
    *notes, printed = output.splitlines()
    own = ("flags that the command line does not give", "taking the weights of", "gradient accumulation fusion is off")
    assert all(note.startswith(own) for note in notes), output
    answer = json.loads(printed)["answer"]
    assert 1 <= len(answer) <= 2 and all(1 <= token["slots"] <= 3 for token in answer[:-1])


def test_a_budget_is_read_from_its_parts():
    assert Budget.parse("1:4") == Budget(1, 4)
    assert Budget.parse("1:4:2.5") == Budget(1, 4, 2.5)
    assert Budget.parse("1:4::1.8") == Budget(1, 4, None, 1.8)
    assert Budget.parse("2:2").static and not Budget.parse("2:2:2:1.8").static
    for word in ("3", "1:2:3:4:5", "a:2", "1:b", "1:4:x"):
        with pytest.raises(UsageError, match=word):
            Budget.parse(word)
