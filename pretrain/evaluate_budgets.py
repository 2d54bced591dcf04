"""The command `anyexperts budgets` for a checkout, see `megatron_anyexperts/commands/budgets.py`."""

import sys

from megatron_anyexperts.commands.budgets import main

if __name__ == "__main__":
    sys.exit(main())
