#!/usr/bin/env python3
"""The command `anyexperts corpus stats` for a checkout, see `megatron_anyexperts/commands/corpus_stats.py`."""

import sys

from megatron_anyexperts.commands.corpus_stats import main

if __name__ == "__main__":
    sys.exit(main())
