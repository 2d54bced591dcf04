"""Every shipped configuration trains, saves, changes its layout and goes on; a new file is tested by being there."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from megatron_anyexperts.training.arguments import parse
from megatron_anyexperts.training.config_files import read_config
from tests.end_to_end.dumping_pretrain import live_state
from tests.end_to_end.launch import DUMPING, ROOT, pretrain
from tests.end_to_end.proxies import proxy
from tests.multirank import run_ranks

CONFIGS = sorted((ROOT / "pretrain/configs").glob("*.yaml"))
EP2 = (2, ("--expert-model-parallel-size", "2"))
LAYOUTS = {"EP1": (1, ()), "PP2": (2, ("--pipeline-model-parallel-size", "2"))}
FOUR = ("--train-iters", "4", "--save-interval", "2", "--log-interval", "1")
MICROBATCHES = 24
"""A bf16 counter stops at 256; an expert of a proxy gets more than that of so many microbatches."""


@pytest.fixture(params=CONFIGS, ids=[path.stem for path in CONFIGS])
def config(request, tmp_path) -> Path:
    """The proxy of one configuration."""
    path = tmp_path / request.param.name
    path.write_text(yaml.safe_dump(proxy(read_config(str(request.param)))))
    return path


def test_configuration_trains_saves_and_goes_on_in_other_layouts(corpus, config, tmp_path):
    ranks, flags = EP2
    whole = pretrain(corpus, tmp_path / "whole", *FOUR, *flags, ranks=ranks, entry=DUMPING, config=config)
    assert list(whole.losses) == [1, 2, 3, 4]
    is_default = "no-gradient-accumulation-fusion" not in read_config(str(config))
    assert ("gradient accumulation fusion is off: it needs apex" in whole.output) == is_default
    before = live_state(whole.run.root / "live_saved/2")
    assert {"weight", "param", "exp_avg", "exp_avg_sq"} <= {key[-1] for key in before}
    trained = [key for key in before if key[-1] == "exp_avg"]
    assert sum(bool(before[key].any()) for key in trained) > 0.9 * len(trained)
    shutil.rmtree(whole.run.checkpoints / "iter_0000004")

    for name, (ranks, flags) in LAYOUTS.items():
        shutil.copytree(whole.run.root, tmp_path / name)
        resumed = pretrain(corpus, tmp_path / name, *FOUR, *flags, ranks=ranks, entry=DUMPING, config=config)
        after = live_state(resumed.run.root / "live_loaded")
        assert before.keys() == after.keys()
        assert [key for key, values in before.items() if not torch.equal(values, after[key])] == []
        for iteration in (3, 4):
            assert math.isclose(resumed.losses[iteration], whole.losses[iteration], rel_tol=1e-3), (name, iteration)


def bf16_step(rank: int, world_size: int, words: list[str]) -> tuple[dict[str, torch.dtype], list[tuple]]:
    """One optimizer step's controllers, of many microbatches through a bf16 model that is built as for training.

    Returns:
        dtypes of all floating buffers, and of each router the exact counts, the expert bias before and after, the
        update rate, and whether its mean is kept at 0.
    """
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_model

    from megatron_anyexperts.moe.router import AnyExpertsRouter
    from megatron_anyexperts.platform import cpu
    from megatron_anyexperts.training.pretrain import DEFAULTS, check, model_provider

    cpu.bridge(training=True)
    args = parse(words, DEFAULTS)
    check(args)
    initialize_megatron(allow_no_cuda=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = get_model(model_provider, ModelType.encoder_or_decoder, pg_collection=groups)
    [chunk] = model
    routers = [module for module in chunk.modules() if isinstance(module, AnyExpertsRouter)]
    exact = [torch.zeros(args.num_experts, dtype=torch.int64) for _ in routers]

    def count(router, _, decision) -> None:
        exact[routers.index(router)] += decision.routing_map_TE.sum(0)

    for router in routers:
        router.register_forward_hook(count)
    before = [router.expert_bias.clone() for router in routers]
    chunk.zero_grad_buffer()
    for _ in range(MICROBATCHES - 1):
        with chunk.no_sync():
            _forward(chunk, args).backward()
    _forward(chunk, args).backward()
    chunk.config.finalize_model_grads_func(model)
    buffers = {name: buffer.dtype for name, buffer in chunk.named_buffers() if buffer.is_floating_point()}
    rows = [
        (counts, old, router.expert_bias.clone(), router.config.moe_router_bias_update_rate)
        for counts, old, router in zip(exact, before, routers, strict=True)
    ]
    return buffers, rows


def _forward(chunk, args) -> torch.Tensor:
    text = torch.randint(args.padded_vocab_size, (1, args.seq_length + 1))
    losses = chunk(
        tokens=text[:, :-1],
        labels=text[:, 1:],
        position_ids=torch.arange(args.seq_length)[None],
        segment_ids=torch.ones(1, args.seq_length, dtype=torch.int32),
        loss_mask=torch.ones(1, args.seq_length),
    )
    return losses.float().mean()


def test_every_counter_of_a_bf16_model_is_exact_and_its_expert_bias_moves_the_right_way(corpus, config):
    paths = ["--data-path", str(corpus / "shards/blend.yaml"), "--tokenizer-model", str(corpus / "tokenizer")]
    # The check of gradients works inside the training loop only.
    words = ["--config", str(config), "--bf16", "--no-check-for-nan-in-loss-and-grad", *paths]
    [(buffers, routers)] = run_ranks(bf16_step, 1, words)
    assert set(buffers.values()) == {torch.float32}
    assert any(name.endswith("router.local_tokens_per_expert") for name in buffers)
    assert routers
    for counts, before, after, rate in routers:
        assert counts.max() > 256
        moved = after - before
        direction = torch.sign(counts.double().mean() - counts)
        assert torch.allclose(moved - moved.mean(), rate * (direction - direction.mean()).float(), atol=1e-6)
