#!/usr/bin/env python3
"""The command `anyexperts corpus verify` for a checkout, see `megatron_anyexperts/commands/corpus_verify.py`."""

import sys

from megatron_anyexperts.commands.corpus_verify import main

if __name__ == "__main__":
    sys.exit(main())
