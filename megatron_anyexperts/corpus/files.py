"""JSON files that are complete or absent, whenever the machine stops."""

import json
from pathlib import Path
from typing import Any

from megatron_anyexperts.files import atomic_file


def write_json(path: Path, scratch: Path, content: Any, first_wins: bool = False) -> None:
    """Write JSON with sorted keys atomically."""
    with atomic_file(path, scratch, first_wins) as file:
        file.write((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
