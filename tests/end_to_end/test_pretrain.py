"""Megatron's own loop trains this model: alike with static routing, in any layout, and across an interruption."""

import json
import math
import re
import shutil

import pandas as pd
import pytest

from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training.step_stats import read_sample_log
from tests.end_to_end.launch import pretrain

STATIC = (
    *("--anyexperts-k-min", "2", "--anyexperts-k-max", "2", "--anyexperts-rho-max", "0", "--anyexperts-alpha", "0"),
    *("--unset", "anyexperts-target-slots", "--unset", "anyexperts-target-real"),
    # Stock Megatron cannot combine the padding mask with the expert bias.
    *("--unset", "moe-router-enable-expert-bias"),
)
TWENTY = ("--train-iters", "20", "--save-interval", "100")


def test_static_routing_trains_like_stock_megatron(corpus, tmp_path):
    # With EP = 1 stock Megatron clips expert and dense gradients by one sum, which rounds differently.
    ep2 = ("--expert-model-parallel-size", "2")
    # Not every token of this corpus is a target, and that is where the weight of router losses is not Megatron's.
    same = (*STATIC, *TWENTY, *ep2, "--moe-router-load-balancing-type", "none", "--unset", "moe-z-loss-coeff")
    ours = pretrain(corpus, tmp_path / "ours", *same, ranks=2)
    stock = pretrain(corpus, tmp_path / "stock", *same, "--anyexperts-stock-moe", ranks=2)
    assert len(ours.losses) == 20
    # Only rounding: padding gets no experts here, so that a matrix product has fewer rows.
    assert ours.losses == pytest.approx(stock.losses, rel=1e-6)


TRACED = ("--anyexperts-trace-every", "2")


@pytest.fixture(scope="module")
def from_one_step(corpus, tmp_path_factory):
    """Continues one checkpoint, since layouts draw their initial weights differently, up to iteration 21."""
    folder = tmp_path_factory.mktemp("layouts")
    until = ("--train-iters", "21", "--save-interval", "100")
    pretrain(corpus, folder / "start", *until, "--exit-interval", "1")

    def go(name: str, *flags: str, ranks: int = 1) -> tuple[dict[int, float], str, Run]:
        shutil.copytree(folder / "start", folder / name)
        result = pretrain(corpus, folder / name, *until, *flags, ranks=ranks)
        return result.losses, re.search("^model: .*$", result.output, re.MULTILINE)[0], result.run

    return go


def trace(run) -> pd.DataFrame:
    """The routing trace of a training, by what is the same in every layout."""
    folder = run.traces / "training"
    table = pd.read_parquet(folder / "routing").merge(pd.read_parquet(folder / "tokens"))
    table = table.astype({"sample": str, "modality": str})
    table = table.set_index(["step", "sample", "position", "layer", "token"]).sort_index()
    table["experts"] = table["experts"].map(sorted).map(tuple)
    return table


@pytest.fixture(scope="module")
def one_rank(from_one_step):
    return from_one_step("EP1", *TRACED)


@pytest.mark.parametrize(
    "flags, tolerance",
    [
        ((*TRACED, "--expert-model-parallel-size", "2"), 1e-4),
        ((*TRACED, "--pipeline-model-parallel-size", "2", "--overlap-grad-reduce"), 1e-4),
        (("--context-parallel-size", "2"), 2e-3),
        # Cut matrix products round every activation differently, and now and then a token's choice of experts flips.
        (
            (*TRACED, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1"),
            2e-3,
        ),
    ],
    ids=["EP2", "PP2", "CP2", "TP2+SP"],
)
def test_the_layout_does_not_change_the_losses(from_one_step, one_rank, flags, tolerance, request):
    (split, size, run), (losses, whole_size, whole_run) = (
        from_one_step(request.node.callspec.id, *flags, ranks=2),
        one_rank,
    )
    assert list(split) == list(losses) == list(range(1, 22))
    assert size == whole_size
    assert read_sample_log(run.samples) == read_sample_log(whole_run.samples)
    for iteration, loss in losses.items():
        assert math.isclose(loss, split[iteration], rel_tol=tolerance), iteration
    assert losses[21] < 0.9 * losses[1]
    if not set(TRACED) <= set(flags):
        return
    traced, whole = trace(run), trace(whole_run)
    # The first step has the same weights; later ones drift apart by rounding, but read the same tokens.
    assert traced.index.equals(whole.index) and len(whole.loc[2]) > 300
    assert traced.modality.tolist() == whole.modality.tolist()
    assert (traced.loc[2].experts == whole.loc[2].experts).mean() > 0.99
    assert traced.loc[2].importance.tolist() == pytest.approx(whole.loc[2].importance.tolist(), abs=1e-4)


def followed(run) -> dict[int, float]:
    """Loss by step, as a person reads it."""
    step = r"^step (\d+)/6 \| loss ([\d.]+) \(text .*real [\d.]+ per token.* lr \S+"
    lines = re.findall(step, run.output, re.MULTILINE)
    return {int(step): float(loss) for step, loss in lines}


def test_resuming_on_fewer_ranks_trains_the_very_next_samples(corpus, tmp_path):
    ep2 = ("--expert-model-parallel-size", "2")
    (tmp_path / "stages.yaml").write_text(
        "stages:\n- {at_step: 2, over: 1, weights: {text: 1, image_text: 3}}\n- {at_step: 4, weights: {text: 1}}\n"
    )
    mixture = ("--data-mixture-schedule", str(tmp_path / "stages.yaml"))
    whole = pretrain(corpus, tmp_path / "whole", *ep2, *mixture, ranks=2)
    broken = pretrain(corpus, tmp_path / "broken", *ep2, *mixture, "--exit-interval", "3", ranks=2)
    resumed = pretrain(corpus, tmp_path / "broken", *mixture)
    begins = [re.findall(r"mixture stage (\d) of 3 begins", run.output) for run in (whole, broken, resumed)]
    assert begins == [["1", "2", "3"], ["1", "2"], ["3"]]
    for run, steps in ((whole, range(1, 7)), (broken, range(1, 4)), (resumed, range(4, 7))):
        assert followed(run) == pytest.approx({step: run.losses[step] for step in steps}, abs=6e-4)
        assert "WARNING" not in run.output and len(run.output.splitlines()) < 40, run.output
        assert f"saved iteration {max(steps)} in " in run.output
        assert "model: 121 k parameters, 107 k active for a token (experts 24.6 k, " in run.output
        assert "data: 3 sets of samples (" in run.output and "ETA" in run.output
    assert "checkpoint: none, random weights" in whole.output
    assert "checkpoint: iteration 3, 12 rows trained" in resumed.output and "finished: 6 steps" in resumed.output
    for line in ("--- arguments ---", "iteration        2/       6", "Overwriting old incomplete"):
        assert line in whole.log and line not in whole.output
    assert read_sample_log(resumed.run.samples) == read_sample_log(whole.run.samples)
    assert resumed.losses.keys() == whole.losses.keys()
    for iteration, loss in whole.losses.items():
        assert math.isclose(loss, resumed.losses[iteration], rel_tol=1e-5), iteration


# Every source of randomness in a step, layers of multi-token prediction, and evaluations between the steps.
NOISY = (
    *("--eval-interval", "2", "--verbose"),
    *("--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--moe-input-jitter-eps", "0.01"),
    *("--hybrid-layer-pattern", "*E*E/*E", "--mtp-num-layers", "1"),
)


@pytest.fixture(scope="module")
def noisy(corpus, tmp_path_factory):
    """The same steps in one go with a log line each, and interrupted after a single line about the first three."""
    folder = tmp_path_factory.mktemp("noisy")
    whole = pretrain(corpus, folder / "whole", *NOISY)
    broken = pretrain(corpus, folder / "broken", *NOISY, "--exit-interval", "3", "--log-interval", "3")
    first = runlog.read_metrics(broken.run)
    return whole, first, pretrain(corpus, folder / "broken", *NOISY)


def test_resuming_in_the_same_layout_is_bit_identical(noisy):
    whole, _, resumed = noisy
    assert list(whole.losses) == [1, 2, 3, 4, 5, 6]
    assert {step: resumed.losses[step] for step in (4, 5, 6)} == {step: whole.losses[step] for step in (4, 5, 6)}
    assert "the settings are those it was saved with" in resumed.output


def test_a_line_of_three_steps_is_what_three_lines_say(noisy):
    steps, [line] = runlog.read_metrics(noisy[0].run)[:3], noisy[1]
    assert line["iteration"] == 3
    for name in ("load_balancing_loss", "z_loss", "mtp_1_loss"):
        assert line[name] == pytest.approx(sum(step[name] for step in steps) / 3, rel=1e-6)
    assert list(line["routing"]["layers"]) == ["2", "4", "5"]  # the last one is the prediction layer
    for part in ("all", "text", "image", "audio"):
        figures = [step["routing"].get(part, {"tokens": 0, "real": 0, "slots_histogram": [0] * 4}) for step in steps]
        tokens = [each["tokens"] for each in figures]
        assert line["routing"][part]["tokens"] == sum(tokens)
        real = sum(count * each["real"] for count, each in zip(tokens, figures, strict=True)) / sum(tokens)
        assert line["routing"][part]["real"] == pytest.approx(real)
        histogram = [sum(counts) for counts in zip(*(each["slots_histogram"] for each in figures), strict=True)]
        assert line["routing"][part]["slots_histogram"] == histogram
    peaks = [step["routing"]["load"]["rank_max_over_mean_peak"] for step in steps]
    assert line["routing"]["load"]["rank_max_over_mean_peak"] == max(peaks)
    for layer in line["routing"]["layers"].values():
        assert layer["all"]["tokens"] * 3 == line["routing"]["all"]["tokens"]


def test_the_console_says_the_same(noisy):
    whole = noisy[0]
    console = re.findall(
        r"iteration +(\d+)/.*?lm loss: (\S+) \|.*?load_balancing_loss: (\S+) .*?mtp_1 loss: (\S+)", whole.output
    )
    assert len(console) == 6
    for (iteration, *values), line in zip(console, runlog.read_metrics(whole.run), strict=True):
        assert int(iteration) == line["iteration"]
        for value, name in zip(values, ("loss", "load_balancing_loss", "mtp_1_loss"), strict=True):
            assert float(value) == pytest.approx(line[name], rel=1e-5)
    assert line["load_balancing_loss"] == pytest.approx(1, abs=0.1)  # a mean over layers of losses that start at 1


def test_the_run_keeps_every_evaluation(noisy):
    for result in (noisy[0], noisy[2]):
        said = re.findall(
            r"validation loss at iteration (\d+).*? lm loss value: (\S+) .*?text loss value: (\S+)", result.output
        )
        kept = {line["iteration"]: line for line in runlog.read_held_out(result.run)}
        assert said and {int(iteration) for iteration, *_ in said} <= set(kept)
        for iteration, *losses in said:
            line = kept[int(iteration)]
            assert [line["loss"], line["loss_text"]] == pytest.approx([float(loss) for loss in losses], rel=1e-5)
    whole, resumed = (runlog.read_held_out(noisy[which].run) for which in (0, 2))
    assert [line["iteration"] for line in whole] == [line["iteration"] for line in resumed] == [2, 4, 6]


def test_the_run_says_how_loaded_each_expert_is_and_what_was_read(noisy):
    load = json.loads(noisy[0].run.expert_load.read_text())
    assert load["iteration"] == 6 and list(load["layers"]) == ["2", "4", "5"]
    for experts in load["layers"].values():
        assert sum(experts) / len(experts) == pytest.approx(1)
    lines = runlog.read_metrics(noisy[0].run)
    assert all("experts_over_mean" not in layer for line in lines for layer in line["routing"]["layers"].values())
    documents = {key.partition("#")[0] for keys in read_sample_log(noisy[0].run.samples).values() for key in keys}
    assert sum(line["samples_read"] for line in lines) >= len(documents) > 0
    assert sum(line["samples_lost"] for line in lines) == 0


def test_throughput_is_that_of_training_steps_only(noisy):
    lines = runlog.read_metrics(noisy[0].run)
    assert "first_step_s" in lines[0] and "tokens_per_s" not in lines[0]
    assert all("first_step_s" not in line for line in lines[1:])
    evaluations = [float(ms) / 1000 for ms in re.findall(r"evaluate \.+: \(([\d.]+)", noisy[0].output)]
    pauses = {3: evaluations[0], 5: evaluations[1]}
    for before, line in zip(lines, lines[1:], strict=False):
        tokens = line["routing"]["layers"]["2"]["all"]["tokens"]
        step_s = tokens / line["tokens_per_s"]
        assert 0 < step_s < line["time"] - before["time"] - pauses.get(line["iteration"], 0)
        assert 0 <= line["data_wait_share"] <= 1
        assert line["tflops_per_gpu"] > 0 and "mfu" not in line  # a CPU has no known peak


def test_evaluations_between_steps_are_no_part_of_them(noisy):
    """What a step counts and times is what it trained on: no held-out sample, the last eight of each kind."""
    first_held_out = {"text": 112, "image_text": 40, "audio_text": 32}
    for keys in read_sample_log(noisy[0].run.samples).values():
        for kind, number in (re.match(r"(\w+)/\w+-(\d+)", key).groups() for key in keys):
            assert int(number) < first_held_out[kind]


@pytest.mark.slow
def test_a_growing_batch_trains_the_same_samples_on_any_number_of_ranks(corpus, tmp_path):
    without = [word for name in ("global-batch-size", "train-iters", "lr-warmup-iters") for word in ("--unset", name)]
    growing = (
        *without,
        "--train-samples",
        "24",
        "--lr-warmup-samples",
        "4",
        "--step-batch-size-schedule",
        "0:2 1024:4",
    )
    whole = pretrain(corpus, tmp_path / "whole", *growing)
    pretrain(corpus, tmp_path / "broken", *growing, "--exit-interval", "3")
    resumed = pretrain(corpus, tmp_path / "broken", *growing, "--expert-model-parallel-size", "2", ranks=2)
    # 1024 tokens are 8 rows of 128
    assert [line["consumed_samples"] for line in runlog.read_metrics(whole.run)] == [2, 4, 6, 8, 12, 16, 20, 24]
    assert read_sample_log(resumed.run.samples) == read_sample_log(whole.run.samples)
    for iteration, loss in whole.losses.items():
        assert math.isclose(loss, resumed.losses[iteration], rel_tol=1e-5), iteration
