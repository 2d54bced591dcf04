"""Evaluate a trained model on what its data hold out; the same as `anyexperts evaluate`."""

import sys

from megatron_anyexperts.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
