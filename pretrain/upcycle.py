"""Start a new mixture from a trained checkpoint; its first forward pass is the old model's.

    python pretrain/upcycle.py --config NEW_MODEL.yaml --tokenizer-model DIR --load OLD_CHECKPOINT --save NEW_CHECKPOINT

NEW_MODEL.yaml is the configuration that training will go on with. A fixed top-k checkpoint becomes a dynamic one; dense
layers at places where the new pattern has `E` become mixtures of copies. One process without a GPU. Exit code 2:
refused, with a list of what does not fit.
"""

import sys
from pathlib import Path

from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.training.inference import start


def main() -> int:
    try:
        args = start(sys.argv[1:])
        if not args.load or not args.save or args.load == args.save:
            raise UsageError("name the old checkpoint with --load and a new directory with --save")
        if args.world_size > 1:
            raise UsageError(f"{args.world_size} processes; run it as one, the result loads in any parallel layout")
        from megatron_anyexperts.training.pretrain import model_provider
        from megatron_anyexperts.training.upcycling import upcycle

        upcycle(model_provider(), Path(args.load), Path(args.save))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"checkpoint: {args.save} (train with --pretrained-checkpoint {args.save} and a new --run-dir)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
