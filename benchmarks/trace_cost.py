"""What a routing trace costs a training step: steps with and without it in turn, forward and backward.

    python benchmarks/trace_cost.py                  # 64 positions of a row of 1024, 4 mixture layers of 16 experts
    python benchmarks/trace_cost.py --positions 1024 # all of them

Ratios of medians, traced over not traced: of a step's time, which other load of the machine enters as well, and of its
processor time, in which the writer's thread counts and other load hardly. The share is what the step's own thread takes
for tracing, over the median step without. All are of a step that is traced: with --anyexperts-trace-every N, the mean
step pays an Nth.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_anyexperts.data.microbatch import TRAINING_INPUTS, Microbatch, collate
from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.models.build import EncoderConfig, LanguageModelConfig, build_model
from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.trace import ForwardTrace
from megatron_anyexperts.platform import cpu
from megatron_anyexperts.training.trace import Tracer
from megatron_anyexperts.training.trace_writer import TraceWriter

VOCABULARY = 4096


def build(options: argparse.Namespace) -> torch.nn.Module:
    """A decoder of attention and mixture layers in turn."""
    config = AnyExpertsConfig(
        num_layers=2 * options.layers,
        hidden_size=options.hidden,
        ffn_hidden_size=2 * options.hidden,
        moe_ffn_hidden_size=options.hidden,
        num_attention_heads=8,
        num_moe_experts=options.experts,
        moe_router_topk=4,
        anyexperts_k_min=2,
        anyexperts_k_max=6,
        anyexperts_rho_max=0.2,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        transformer_impl="local",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=not torch.cuda.is_available(),
    )
    language = LanguageModelConfig("*E" * options.layers, VOCABULARY, options.length)
    model = build_model(language, EncoderConfig(), MediaShape(), config, True, True)
    return model.to(torch.cuda.current_device()).train()


def rows(options: argparse.Namespace) -> Microbatch:
    """Rows of random text, each a document."""
    length = options.length
    row = {
        "tokens": np.random.default_rng(0).integers(0, VOCABULARY, length),
        "labels": np.random.default_rng(1).integers(0, VOCABULARY, length),
        "loss_mask": np.ones(length, np.float32),
        "position_ids": np.arange(length),
        "segment_ids": np.ones(length, np.int32),
        "token_modality": np.zeros(length, np.int8),
        "sample_modality": np.zeros(length, np.int8),
        "image_patches": np.zeros((0, 3 * MediaShape().patch_size ** 2), np.float32),
        "image_grids": np.zeros((0, 3), np.int32),
        "audio_features": np.zeros((0, MediaShape().n_mels), np.float32),
        "audio_lengths": np.zeros(0, np.int32),
    }
    return collate([row] * options.rows, [["text/one"]] * options.rows).to(torch.device(torch.cuda.current_device()))


class Stopwatch:
    """Seconds that calls of a function take on the thread that calls it."""

    def __init__(self):
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self):
        """Count the time inside."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def step(
    model: torch.nn.Module, batch: Microbatch, tracer: Tracer | None, watch: Stopwatch, number: int
) -> tuple[float, float]:
    """Seconds of one step and of the processor; `watch` gets those of tracing."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start, busy = time.perf_counter(), time.process_time()
    with contextlib.ExitStack() as stack:
        if tracer is not None:
            tracer.step = number
            tracing = tracer.microbatch(batch)
            with watch.running():
                tracing.__enter__()
            stack.push(tracing)
        losses = model(**batch.select(TRAINING_INPUTS))
        before = time.perf_counter()
    watch.seconds += time.perf_counter() - before
    losses.mean().backward()
    if tracer is not None:
        with watch.running():
            tracer.end_step(number)
    synchronize()
    return time.perf_counter() - start, time.process_time() - busy


def main() -> None:
    """Print both measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 40), ("rows", 1), ("length", 1024), ("hidden", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--positions", type=int, default=64)
    options = parser.parse_args()
    cpu.bridge()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder, 'rendezvous')}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        model, batch = build(options), rows(options)
        writer = TraceWriter(Path(folder), 0, 1 << 40)
        tracer = Tracer(writer, 1, options.positions, 6, 0, True, 1)
        seconds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        own: list[float] = []
        add = ForwardTrace.add
        for number in range(1, options.rounds + 2):
            for traced in (False, True):
                watch = Stopwatch()

                def timed(self, *arguments, watch=watch):
                    with watch.running():
                        add(self, *arguments)

                ForwardTrace.add = timed
                spent = step(model, batch, tracer if traced else None, watch, number)
                if number > 1:
                    seconds[traced].append(spent)
                    own += [watch.seconds] if traced else []
        writer.close()
        for place, name in enumerate(("step", "processor")):
            without, traced = (statistics.median(each[place] for each in seconds[kind]) for kind in (False, True))
            ratio = f"ratio {traced / without:.4f}"
            print(f"{name}: {1000 * without:.1f} ms without, {1000 * traced:.1f} ms traced, {ratio}")
            if name == "step":
                share = statistics.median(own) / without
                print(f"on the step's thread: {1000 * statistics.median(own):.2f} ms, {share:.2%}")
        print(f"written: {writer.bytes / (options.rounds + 1) / 1024:.1f} KiB a step, {writer.left_out} left out")
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
