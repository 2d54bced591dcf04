"""`python -m megatron_anyexperts.gpu_check`: the check of precisions and implementations, see `checks/gpu_check.py`."""

import sys

from megatron_anyexperts.checks.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
