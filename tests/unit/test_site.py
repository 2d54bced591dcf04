"""The documentation builds as a site: every link and anchor of it leads somewhere, every module has its page."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    start = (tmp_path / "index.html").read_text()
    assert "Two commands" in start and 'href="routing.html"' in start
    for module in (ROOT / "megatron_anyexperts").rglob("*.py"):
        path = module.relative_to(ROOT).with_suffix("")
        page = tmp_path / "reference" / (path.parent / "index" if path.name == "__init__" else path)
        assert page.with_suffix(".html").is_file(), page
    slots = (tmp_path / "reference/megatron_anyexperts/moe/slots.html").read_text()
    assert "How many slots a token gets" in slots and "soft_slots" in slots
