"""The command `anyexperts convert` for a checkout, see `megatron_anyexperts/commands/convert.py`."""

import sys

from megatron_anyexperts.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
