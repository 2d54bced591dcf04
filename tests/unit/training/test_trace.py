"""A routing trace holds what the router decided, once, for the positions it promises, and never stops a training."""

import re
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts import trace_file
from megatron_anyexperts.data.microbatch import TRAINING_INPUTS, collate
from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.metrics import record_tokens
from megatron_anyexperts.moe.trace import ForwardTrace
from megatron_anyexperts.training.config import TraceConfig, refuse_trace
from megatron_anyexperts.training.trace import Tracer, fixed_positions, open_tracer
from megatron_anyexperts.training.trace_writer import TraceWriter
from tests.unit.models.small import DYNAMIC, media_batch

ROOT = Path(__file__).resolve().parents[3]
KEYS = [["shards/text/a#1/2", "chat/b"]]


@given(st.integers(1, 5000), st.integers(1, 6000))
def test_positions_are_fixed_ascending_and_spread(length, count):
    positions = fixed_positions(length, count).numpy()
    assert len(positions) == min(length, count)
    assert positions[0] >= 0 and positions[-1] < length and (np.diff(positions) > 0).all()
    assert np.array_equal(positions, fixed_positions(length, count))
    assert np.diff(positions, prepend=0, append=length).max() <= 2 * (length // len(positions) + 1)


def microbatch():
    """One row of two documents, with every modality, and padding."""
    row = {name: value[0].numpy() if value.dim() > 1 and name not in MEDIA else value.numpy() for name, value in
           media_batch().items()}  # fmt: skip
    segments = np.array([1] * 5 + [2] * 5 + [0, 0], np.int32)
    row |= {
        "segment_ids": segments,
        "position_ids": np.array([*range(5), *range(5), 0, 0]),
        "loss_mask": (segments > 0).astype(np.float32),
        "sample_modality": np.where(segments > 0, 1, -1).astype(np.int8),
    }
    return collate([row], KEYS)


MEDIA = ("image_grids", "image_patches", "audio_lengths", "audio_features")


@pytest.fixture
def model(make_model):
    return make_model({"hybrid_layer_pattern": "*E*E"}, **DYNAMIC).train()


@pytest.fixture
def make_tracer(tmp_path):
    """`make_tracer(**changes)`: every step, all positions, into the test's folder; its threads end with the test."""
    made = []

    def make(most_bytes=1 << 20, **changes) -> Tracer:
        settings = {"every": 1, "positions": None, "most_slots": 3, "data_rank": 0, "writes_tokens": True, "step": 7}
        made.append(Tracer(TraceWriter(tmp_path, 0, most_bytes), **(settings | changes)))
        return made[-1]

    yield make
    for tracer in made:
        tracer.writer.close()


def forward(model, tracer, batch, **how):
    with record_tokens() as layers, tracer.microbatch(batch, **how):
        model(**batch.select(TRAINING_INPUTS))
    return layers


def read(folder) -> pd.DataFrame:
    table = pd.read_parquet(folder / "routing").merge(pd.read_parquet(folder / "tokens"))
    return table.sort_values(["step", "sequence", "position", "layer"]).reset_index(drop=True)


def test_the_tables_say_what_the_router_decided(model, make_tracer, tmp_path):
    tracer, batch = make_tracer(), microbatch()
    layers = forward(model, tracer, batch)
    tracer.end_step(7)
    tracer.writer.close()
    table = read(tmp_path)
    assert len(table) == 10 * 2 and table.layer.unique().tolist() == [2, 4]
    assert table.position.unique().tolist() == list(range(10))  # no padding
    one = table[table.layer == 2]
    assert one["sample"].tolist() == ["shards/text/a#1/2"] * 5 + ["chat/b"] * 5
    assert one.task.tolist() == ["shards/text"] * 5 + ["chat"] * 5
    assert one.offset.tolist() == [0, 1, 2, 3, 4] * 2
    assert one.token.tolist() == batch["tokens"][0, :10].tolist()
    names = {0: "text", 1: "image", 2: "audio", 3: "video"}
    assert one.modality.tolist() == [names[code] for code in batch["token_modality"][0, :10].tolist()]
    for number, [record] in layers.items():
        one = table[table.layer == number]
        assert one.slots.tolist() == record.slots_SB[:10, 0].tolist()
        assert one.real.tolist() == record.real_SB[:10, 0].tolist()
        assert one.importance.to_numpy() == pytest.approx(record.importance_SB[:10, 0].numpy())
    assert table.experts.map(len).tolist() == table.gates.map(len).tolist() == table.real.tolist()
    assert all(len(set(experts)) == len(experts) for experts in table.experts)
    assert all((np.diff(gates) <= 0).all() and (gates >= 0).all() for gates in table.gates)
    # Softmax over the slots in use: real and virtual gates are all there is.
    assert (table.gates.map(sum) + table.virtual_gate).tolist() == pytest.approx([1] * 20, abs=1e-5)
    assert ((table.virtual_gate > 0) == (table.slots > table.real)).all()


def test_three_lines_of_pandas_read_a_trace(model, make_tracer, tmp_path, capsys):
    tracer = make_tracer()
    layers = forward(model, tracer, microbatch())
    tracer.end_step(7)
    tracer.writer.close()
    [lines] = re.findall(r"```python\n(import pandas.*?)```", (ROOT / "docs/analysis.md").read_text(), re.DOTALL)
    assert lines.count("\n") == 3 and "RUN/traces/training/" in lines
    exec(lines.replace("RUN/traces/training", str(tmp_path)), found := {})
    assert len(found["table"]) == 20 and "modality" in capsys.readouterr().out
    [record] = layers[4]
    images = microbatch()["token_modality"][0] == 1
    printed = found["table"].query("layer == 4 and modality == 'image'").real.mean()
    assert printed == record.real_SB[images, 0].double().mean()


def test_only_the_fixed_positions_of_traced_steps_are_kept(model, make_tracer, tmp_path):
    tracer, batch = make_tracer(every=4, positions=3), microbatch()
    for step in (7, 8, 9):
        forward(model, tracer, batch)
        tracer.end_step(step)
    tracer.writer.close()
    table = read(tmp_path)
    assert table.step.unique().tolist() == [8]
    assert set(table.position) == set(fixed_positions(12, 3).tolist()) - {10, 11}


def test_a_step_that_is_run_again_leaves_one_trace(model, make_tracer, tmp_path):
    tracer, batch = make_tracer(), microbatch()
    for _ in range(3):  # two microbatches, three times
        for _ in range(2):
            forward(model, tracer, batch, microbatches=2)
    tracer.end_step(7)
    tracer.writer.close()
    assert read(tmp_path).groupby("sequence").size().to_dict() == {0: 20, 1: 20}


def test_recomputation_leaves_one_trace(make_model, make_tracer, tmp_path):
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    model = make_model({"hybrid_layer_pattern": "*E*E"}, **DYNAMIC, **recompute)
    tracer, batch = make_tracer(), microbatch()
    with tracer.microbatch(batch):
        losses = model.train()(**batch.select(TRAINING_INPUTS))
    losses.sum().backward()
    tracer.end_step(7)
    tracer.writer.close()
    assert len(read(tmp_path)) == 20


def test_parts_of_an_evaluation_number_their_rows_on(model, make_tracer, tmp_path):
    tracer, batch = make_tracer(), microbatch()
    for _ in range(3):
        forward(model, tracer, batch, tasks=[["one", "two"]])
        tracer.end_part()
    tracer.writer.close()
    table = read(tmp_path)
    assert table.groupby("sequence").size().to_dict() == {0: 20, 1: 20, 2: 20}
    assert set(table.task) == {"one", "two"} and len(list((tmp_path / "tokens").iterdir())) == 3


def test_a_rank_that_reached_its_bound_traces_no_more(model, make_tracer, tmp_path, capfd):
    tracer, batch = make_tracer(most_bytes=1), microbatch()
    for step in (7, 8):
        forward(model, tracer, batch)
        tracer.end_step(step)
        while step == 7 and not tracer.writer.full:
            threading.Event().wait(0.01)
    tracer.writer.close()
    assert read(tmp_path).step.unique().tolist() == [7]
    assert "reach the bound of 1: nothing is traced after step 7" in capfd.readouterr().err
    assert TraceWriter(tmp_path, 0, 10).full  # a resumed run counts what is there


def test_training_never_waits_for_the_disk(tmp_path, capfd):
    writer, go = TraceWriter(tmp_path, 0, 1 << 20), threading.Event()

    def slow():
        go.wait()
        return {}

    for step in range(8):
        writer.submit(step, slow)
    go.set()
    writer.close()
    assert writer.left_out >= 5
    assert "1 step(s) left out" in capfd.readouterr().err


def test_a_disk_that_takes_nothing_costs_the_trace_only(tmp_path, capfd):
    (tmp_path / "tokens").write_text("a file where the folder should be")
    writer = TraceWriter(tmp_path, 0, 1 << 20)
    writer.submit(1, lambda: {"tokens": {}})
    writer.close()
    assert "routing trace of rank 0: 1 write(s) lost, training goes on" in capfd.readouterr().err


def test_a_resumed_run_forgets_the_steps_that_come_again(one_rank, tmp_path):
    folder = tmp_path / "traces/training"
    for step in (2, 4, 6):
        for table in trace_file.TABLES:
            path = trace_file.path_of(folder, table, step, 3)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    flags = {"anyexperts_trace_every": 2, "anyexperts_trace_positions": 4, "anyexperts_trace_megabytes": 1}
    args = SimpleNamespace(run_dir=str(tmp_path), rank=0, iteration=4, **flags)
    tracer = open_tracer(args, 3)
    tracer.writer.close()
    assert [trace_file.step_of(path) for path in trace_file.files_of(folder, "routing")] == [2, 4]
    assert tracer.step == 5 and not tracer.active
    assert open_tracer(SimpleNamespace(anyexperts_trace_every=0), 3) is None


def whole_rows(**flags) -> SimpleNamespace:
    given = {"anyexperts_trace_every": 5, "run_dir": "run", "context_parallel_size": 1, "anyexperts_stock_moe": False}
    return SimpleNamespace(**given | flags)


def test_what_cannot_be_traced_is_refused():
    with pytest.raises(ValueError, match="anyexperts-trace-positions=0 is below 1"):
        TraceConfig(anyexperts_trace_positions=0)
    with pytest.raises(ValueError, match="needs --run-dir"):
        refuse_trace(SimpleNamespace(anyexperts_trace_every=5, run_dir=None))
    with pytest.raises(ValueError, match="anyexperts-stock-moe; for Megatron's own top-k"):
        refuse_trace(whole_rows(anyexperts_stock_moe=True))
    with pytest.raises(ValueError, match="context-parallel-size=2"):
        refuse_trace(whole_rows(context_parallel_size=2))


def test_parts_of_a_row_under_sequence_parallelism_are_the_whole_row():
    """Two shards of one row, as two tensor-parallel ranks trace them, are the trace of the whole row."""
    generator = torch.Generator().manual_seed(0)
    map_TE = torch.rand(24, 5, generator=generator) < 0.5  # 12 positions of 2 rows
    gates_TE, slots_T = torch.rand(24, 5, generator=generator) * map_TE, map_TE.sum(1)
    importance_T, virtual_T = torch.rand(24, generator=generator), torch.rand(24, generator=generator)

    def decision(part):
        rows = (gates_TE[part], map_TE[part], virtual_T[part], importance_T[part], slots_T[part])
        return RoutingDecision(*rows, None)

    whole = ForwardTrace(torch.tensor([0, 5, 6, 11]), 12, 5)
    whole.add(1, decision(slice(None)), (12, 2), 0)
    halves = []
    for rank in (0, 1):
        half = ForwardTrace(torch.tensor([0, 5, 6, 11]), 12, 5)
        half.add(1, decision(slice(12 * rank, 12 * rank + 12)), (6, 2), rank)
        halves.append(half.layers[1])
    for name in ("place_N2", "figures_NF"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole.layers[1], name))
    again = ForwardTrace(torch.tensor([0, 5, 6, 11]), 12, 5)
    again.add(1, decision(slice(None)), (12, 2), 1)  # without sequence parallelism the second rank has nothing to add
    assert not again.layers
