#!/usr/bin/env python3
"""The command `anyexperts corpus build` for a checkout, see `megatron_anyexperts/commands/corpus_build.py`."""

import sys

from megatron_anyexperts.commands.corpus_build import main

if __name__ == "__main__":
    sys.exit(main())
