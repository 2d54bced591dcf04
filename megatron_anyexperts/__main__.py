"""`python -m megatron_anyexperts`, for `torchrun -m`: the command `anyexperts`."""

import sys

from megatron_anyexperts.cli import main

if __name__ == "__main__":
    sys.exit(main())
