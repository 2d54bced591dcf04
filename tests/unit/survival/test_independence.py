"""The batch script and the login node need nothing but Python."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_every_command_line_starts_without_third_party_packages():
    # -S leaves out site-packages.
    done = subprocess.run(
        [sys.executable, "-S", "-m", "megatron_anyexperts.survival", "--help"], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert "judge-bandwidth" in done.stdout
