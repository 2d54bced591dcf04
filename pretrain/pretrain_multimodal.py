"""Pretrain a multimodal mixture-of-experts model.

One process per device, started by torchrun or srun:

    torchrun --nproc-per-node 2 pretrain/pretrain_multimodal.py --config pretrain/configs/demo.yaml [any Megatron flag]
"""

import sys

from megatron_anyexperts.survival.signals import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()
    from megatron_anyexperts.training.pretrain import main  # takes seconds

    sys.exit(main())
