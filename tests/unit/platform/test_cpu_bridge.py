import torch

from megatron_anyexperts.platform import cpu


def test_cuda_stays_unavailable():
    assert cpu.bridge() and not torch.cuda.is_available()


def test_device_words_end_on_the_cpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).cuda().device.type == torch.ones(2).to("cuda").device.type == "cpu"
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"


def test_a_fork_of_the_device_generator_leaves_the_others_alone():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("other", 5)
    before = torch.get_rng_state()
    with tracker.fork("other"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with tracker.fork("other"):
        assert not torch.equal(torch.rand(3), first)


def test_nothing_is_touched_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    untouched = cpu.Bridge("torch", "no_such_attribute", lambda original: original, "must not be applied")
    monkeypatch.setattr(cpu, "BRIDGES", (untouched,))
    assert cpu.bridge() is False
    assert not hasattr(torch, "no_such_attribute")


def test_every_bridge_says_why():
    assert all(len(entry.reason) > 10 for entry in cpu.BRIDGES)
    assert len({(entry.module, entry.attribute) for entry in cpu.BRIDGES}) == len(cpu.BRIDGES)
