"""Dumping pretraining that says in the end how many tensors were cast to FP8."""

import sys

from megatron_anyexperts.training import checkpoints, pretrain
from tests.end_to_end.dumping_pretrain import DumpingCheckpoints
from tests.te import fp8

if __name__ == "__main__":
    checkpoints.Checkpoints = DumpingCheckpoints
    code = pretrain.main()
    print(f"casts to FP8: {fp8.quantize.calls}")
    sys.exit(code)
