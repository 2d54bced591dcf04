"""Makes of any shipped configuration one that two CPU cores train in seconds, by rule, so that it tests the file."""

from collections.abc import Mapping
from typing import Any

# At most these sizes. What multiplies slots or groups stays as it is.
LARGEST = {
    "seq-length": 128,
    "max-position-embeddings": 128,
    "num-attention-heads": 4,
    "num-experts": 32,
    "vision-num-layers": 1,
    "vision-num-heads": 2,
    "audio-num-layers": 1,
    "audio-num-heads": 2,
    "data-streams": 2,
    "lr-warmup-iters": 1,
    "lr-wsd-decay-iters": 1,
    "eval-iters": 1,
}
# Widths shrink as the width that they belong to does; the narrow one is the second.
WIDTHS = {
    "hidden-size": (64, ("ffn-hidden-size", "moe-ffn-hidden-size", "moe-shared-expert-intermediate-size")),
    "vision-hidden-size": (32, ("vision-ffn-hidden-size",)),
    "audio-hidden-size": (32, ("audio-ffn-hidden-size",)),
}
BLOCKS = 3
CORPUS = {
    "data-shuffle-buffer": 10,
    "data-packing-buffer": 8,
    "data-image-max-patches": 64,
    "data-video-max-patches": 256,
    "data-audio-max-seconds": 12,
    "vision-patch-size": 14,
    "vision-spatial-merge": 2,
    "audio-n-mels": 20,
    "audio-stride": 16,
}
"""The shards of the tests hold small pictures and short tones."""
WITHOUT_CUDA: dict[str, tuple[Any, str]] = {
    "transformer-impl": ("local", "Transformer Engine needs CUDA"),
    "moe-grouped-gemm": (None, "Transformer Engine's kernel"),
    "distributed-backend": ("gloo", "NCCL needs CUDA"),
    "use-cpu-initialization": (True, "weights are made where they stay"),
    "no-persist-layer-norm": (True, "apex"),
    "no-rope-fusion": (True, "Transformer Engine"),
    "no-masked-softmax-fusion": (True, "a CUDA kernel"),
    "no-bias-dropout-fusion": (True, "compiled by torch's JIT"),
    "no-bias-swiglu-fusion": (True, "compiled by torch's JIT"),
    "disable-jit-fuser": (True, "a C++ compiler at first use"),
}
"""The only keys that change for another reason than size: value (None: left out), and what a CPU lacks."""
INSTEAD = {"recompute-modules": (["moe"], "moe_act and layernorm are recomputed by Transformer Engine")}
"""The same, where the file has the key."""
WITH_TRANSFORMER_ENGINE = {
    key: WITHOUT_CUDA[key] for key in ("distributed-backend", "use-cpu-initialization", "disable-jit-fuser")
}
"""What is left of `WITHOUT_CUDA` where a reference stands for Transformer Engine's operators (tests/te)."""


def proxy(config: Mapping[str, Any], transformer_engine: bool = False) -> dict[str, Any]:
    """Shrink a configuration; whatever no table names stays as the file has it."""
    small = dict(config)
    floor = 32 if transformer_engine else 16  # FP8 multiplies multiples of 16, also where two ranks share a width
    for key, largest in LARGEST.items():
        if key in small:
            small[key] = min(small[key], largest)
    for width, (narrow, followers) in WIDTHS.items():
        if small.get(width, 0) > narrow:
            for key in filter(small.__contains__, followers):
                small[key] = max(floor, small[key] * narrow // small[width])
            small[width] = narrow
    if "kv-channels" in small:
        small["kv-channels"] = small["hidden-size"] // small["num-attention-heads"]
    groups = config["num-attention-heads"] // config.get("num-query-groups", config["num-attention-heads"])
    small["num-query-groups"] = max(1, small["num-attention-heads"] // groups)
    decoder, *prediction = small["hybrid-layer-pattern"].split("/")
    small["hybrid-layer-pattern"] = "/".join([decoder[: 2 * BLOCKS], *prediction])
    small["global-batch-size"] = 4 * small["micro-batch-size"]
    small["expert-model-parallel-size"] = 1  # the test sets the layout
    lacking = WITHOUT_CUDA | {key: row for key, row in INSTEAD.items() if key in small}
    if transformer_engine:
        lacking = WITH_TRANSFORMER_ENGINE
        small |= {"transformer-impl": "transformer_engine", "moe-grouped-gemm": True, "bf16": True}
    return small | CORPUS | {key: value for key, (value, _) in lacking.items()}
