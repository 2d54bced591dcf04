"""The command `anyexperts pictures` for a checkout, see `megatron_anyexperts/commands/pictures.py`."""

import sys

from megatron_anyexperts.commands.pictures import main

if __name__ == "__main__":
    sys.exit(main())
