"""`python -m megatron_anyexperts.doctor`: the doctor, see `checks/doctor.py`."""

import sys

from megatron_anyexperts.checks.doctor import main

if __name__ == "__main__":
    sys.exit(main())
