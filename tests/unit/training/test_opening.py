"""The first lines of a training, and the last one that torchrun prints."""

import json
import os

import pytest
import torch

from megatron_anyexperts.training.opening import count_parameters, model_line, part_of, short
from tests.multirank import FORKED


def test_parameters_are_counted_by_part(one_rank):
    model = torch.nn.ModuleDict({"vision": torch.nn.Linear(2, 3), "embedding": torch.nn.Embedding(5, 2)})
    decoder = {"experts": torch.nn.Linear(4, 4, bias=False), "norm": torch.nn.Linear(1, 1)}
    model["decoder"] = torch.nn.ModuleDict(decoder)
    tied = torch.nn.Parameter(torch.zeros(7))
    tied.shared = True
    model.register_parameter("output_layer", tied)
    counts = count_parameters(model)
    assert counts == {"vision": 9, "embeddings": 10, "experts": 16, "rest of the decoder": 2}
    # Of 4 experts a token gets 1: 12 of their 16 parameters do not act.
    assert model_line(counts, 1.0, 4) == (
        "model: 37 parameters, 25 active for a token (experts 16, rest of the decoder 2, embeddings 10, vision 9)"
    )


def test_shared_experts_count_as_the_decoder_which_every_token_passes():
    assert part_of("language_model.decoder.layers.1.mlp.shared_experts.linear_fc1.weight") == "rest of the decoder"
    assert part_of("language_model.decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight") == "experts"


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7"), (999.7, "1.00 k"), (108_578, "109 k"), (1.45e6, "1.45 M"), (16.26e9, "16.3 B")]
)
def test_counts_have_three_digits(number, text):
    assert short(number) == text


def _crash(report: str) -> None:
    from megatron_anyexperts.training.pretrain import main

    os.environ["TORCHELASTIC_ERROR_FILE"] = report

    def crash(_cli: list[str]) -> None:
        raise KeyError("val")

    main([], crash)


def test_torchrun_learns_why_a_rank_crashed(tmp_path):
    process = FORKED.Process(target=_crash, args=(str(tmp_path / "report.json"),))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert json.loads((tmp_path / "report.json").read_text())["message"]["message"] == "KeyError: 'val'"
