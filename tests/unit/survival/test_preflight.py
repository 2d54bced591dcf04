"""What makes a node unfit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.survival import bandwidth
from megatron_anyexperts.survival.preflight import MARK, Needs, Report, choose, collect, judge, probe

GOOD = Report("n1", 1000.0, {"torch": "2.11"}, {"run directory /r": 50.0})
NODES = ["n1", "n2", "n3"]


def verdict(*reports: Report, needs: Needs | None = None) -> dict[str, str]:
    return judge(reports, NODES, needs or Needs(), asked_at=999, heard_at=1001, reference_node="n1")


def three(**changes: object) -> list[Report]:
    """Three nodes of which n2 differs from the others by `changes`."""
    return [GOOD, replace(GOOD, node="n2", **changes), replace(GOOD, node="n3")]


def test_equal_nodes_are_fit():
    assert verdict(*three()) == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"versions": {"torch": "2.10"}}, "torch is 2.10, not 2.11"),
        ({"free_gib": {"run directory /r": 0.4}}, "0.4 GiB free in the run directory /r, not 1"),
        ({"time": 900.0}, "its clock is off by -99 s or more"),
        ({"time": 1100.0}, "its clock is off by +99 s or more"),
        ({"faults": ["GPU 3 multiplies wrongly"]}, "GPU 3 multiplies wrongly"),
    ],
)
def test_each_fault_is_named(changes, reason):
    assert verdict(*three(**changes)) == {"n2": reason}


def test_a_silent_node_is_unfit():
    assert verdict(GOOD, replace(GOOD, node="n3")) == {"n2": "did not answer"}


def test_without_a_majority_the_batch_hosts_versions_decide():
    other = replace(GOOD, node="n2", versions={"torch": "2.10"})
    assert list(judge([other, GOOD], ["n1", "n2"], Needs(), 999, 1001, "n1")) == ["n2"]


def test_this_machine_answers_and_an_unwritable_directory_is_a_fault(tmp_path):
    report = probe(tmp_path, gpus_expected=0)
    assert report.faults == []
    assert report.versions["torch"] != "absent"
    assert "cannot write to the run directory" in probe(tmp_path / "absent", 0).faults[0]


def test_missing_gpus_are_a_fault(tmp_path):
    import torch

    present = torch.cuda.device_count()
    assert probe(tmp_path, present + 1).faults[0] == f"{present} GPUs, not {present + 1}"


def test_too_few_fit_nodes_are_one_line():
    assert choose(NODES, {"n2": "x"}, 2) == ["n1", "n3"]
    with pytest.raises(ValueError, match=r"1 of 3 nodes are fit, 2 are needed \(n2: x; n3: y\)"):
        choose(NODES, {"n2": "x", "n3": "y"}, 2)


@given(st.lists(st.dictionaries(st.text(), st.integers())), st.sampled_from(["", "\n", "n1: noise\n"]))
def test_records_are_found_although_lines_run_together(records, between):
    assert collect("noise" + between + between.join(MARK + json.dumps(record) for record in records)) == records


def test_a_torn_record_is_left_out():
    assert collect(f'{MARK}{{"node": "n{MARK}{{"node": "n2"}}\n') == [{"node": "n2"}]


@given(st.integers(2, 200))
def test_every_node_is_paired_and_no_round_uses_one_twice(world):
    rounds = bandwidth.pairings(world)
    assert {rank for pairs in rounds for pair in pairs for rank in pair} == set(range(world))
    for pairs in rounds:
        used = [rank for pair in pairs for rank in pair]
        assert len(used) == len(set(used))


def test_a_node_slow_with_both_neighbours_is_named():
    assert bandwidth.slow_nodes({"n1": 20, "n2": 3.1}, 10) == {"n2": "3.10 GB/s to its neighbours, not 10"}
