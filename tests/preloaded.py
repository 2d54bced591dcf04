"""What every rank imports, imported once in the process that ranks are forked from: it takes 6 s a rank otherwise."""

import gc
import importlib

from megatron_anyexperts.platform import cpu

cpu.bridge()  # before Megatron is imported, as in training

TRAINING = ("checkpoints", "data", "forward_step", "instruct", "learning_rates", "metrics", "step_stats", "upstream")
for module in TRAINING:
    importlib.import_module(f"megatron_anyexperts.training.{module}")
importlib.import_module("megatron.core.tokenizers.text.libraries.huggingface_tokenizer")

gc.freeze()  # ranks collect garbage in every save
