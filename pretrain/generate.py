"""The command `anyexperts generate` for a checkout, see `megatron_anyexperts/commands/generate.py`."""

import sys

from megatron_anyexperts.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
