"""Tune a pretrained model on conversations: the loss is on what the assistant says.

    torchrun --nproc-per-node 2 pretrain/instruct_tune.py --config pretrain/configs/instruct_demo.yaml \\
        --pretrained-checkpoint PRETRAINED/checkpoints --run-dir TUNED [any Megatron flag]

The same loop as pretraining. A new run takes the weights of --pretrained-checkpoint and starts data, optimizer and
schedule anew; the same command again resumes it. --freeze-PART and --lr-scale-PART choose what is tuned and how fast.
"""

import sys

from megatron_anyexperts.survival.signals import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()
    from megatron_anyexperts.training.instruct import main  # takes seconds

    sys.exit(main())
