"""A crafted checkpoint runs code in the installed torch, and none here."""

import importlib.util
import io
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import default_planner, filesystem

from megatron_anyexperts.platform import torch_checkpoint
from megatron_anyexperts.platform.torch_checkpoint import UntrustedCheckpoint, load_metadata


class Runs:
    """Makes the folder of its name when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    state = {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16), "steps": [1, "a"]}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture(params=[False, True], ids=["stock", "ours"])
def guarded(request, monkeypatch):
    monkeypatch.setattr(filesystem, "pickle", pickle)
    # Another test of this process may have replaced it: the source is run once more.
    stock = importlib.util.module_from_spec(default_planner.__spec__)
    default_planner.__spec__.loader.exec_module(stock)
    monkeypatch.setattr(default_planner.DefaultLoadPlanner, "load_bytes", stock.DefaultLoadPlanner.load_bytes)
    if request.param:
        torch_checkpoint.install()
    return request.param


def load(folder) -> dict:
    state = {"weight": torch.zeros(2, 3), "half": torch.zeros(2, dtype=torch.bfloat16), "steps": None}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def test_an_honest_checkpoint_loads(checkpoint, guarded):
    state = load(checkpoint)
    assert torch.equal(state["weight"], torch.arange(6.0).reshape(2, 3))
    assert state["half"].sum() == 2 and state["steps"] == [1, "a"]


def test_metadata_runs_no_code(checkpoint, guarded, tmp_path):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises((BaseExceptionGroup, BaseException)):
        load(checkpoint)
    assert (tmp_path / "ran").exists() is not guarded


def test_an_object_beside_the_tensors_runs_no_code(checkpoint, guarded, tmp_path):
    dcp.save({"steps": Runs(tmp_path / "ran")}, checkpoint_id=checkpoint, no_dist=True)
    (tmp_path / "ran").rmdir() if (tmp_path / "ran").exists() else None
    state = {"steps": None}
    if guarded:
        with pytest.raises(BaseException, match="posix.mkdir|weights_only|Weights only"):
            dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    else:
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    assert (tmp_path / "ran").exists() is not guarded


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch.hub.load", "builtins.getattr"])
def test_what_metadata_may_ask_for_is_named(name):
    module, _, attribute = name.rpartition(".")
    crafted = b"c" + module.encode() + b"\n" + attribute.encode() + b"\n."
    with pytest.raises(UntrustedCheckpoint, match=name):
        load_metadata(io.BytesIO(crafted))
