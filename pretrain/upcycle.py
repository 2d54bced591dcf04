"""The command `anyexperts upcycle` for a checkout, see `megatron_anyexperts/commands/upcycle.py`."""

import sys

from megatron_anyexperts.commands.upcycle import main

if __name__ == "__main__":
    sys.exit(main())
