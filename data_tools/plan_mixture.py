#!/usr/bin/env python3
"""The command `anyexperts corpus plan` for a checkout, see `megatron_anyexperts/commands/corpus_plan.py`."""

import sys

from megatron_anyexperts.commands.corpus_plan import main

if __name__ == "__main__":
    sys.exit(main())
