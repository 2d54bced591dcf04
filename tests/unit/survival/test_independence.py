"""The batch script and the login node need nothing but Python."""

import ast
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


def test_torch_is_imported_by_the_two_checks_that_run_on_nodes_and_nothing_else_is():
    found = set()
    for path in (ROOT / "megatron_anyexperts" / "survival").glob("*.py"):
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for package in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"megatron_anyexperts"}:
                inside = next((each.name for each in functions if each.lineno < node.lineno <= each.end_lineno), None)
                assert package == "torch"
                found.add((path.stem, inside))
    assert found == {("bandwidth", "measure"), ("preflight", "probe_gpus")}


def test_every_module_imports_without_third_party_packages():
    modules = sorted(path.stem for path in (ROOT / "megatron_anyexperts" / "survival").glob("[a-z]*.py"))
    lines = "; ".join(f"import megatron_anyexperts.survival.{name}" for name in modules)
    done = subprocess.run([sys.executable, "-S", "-c", lines], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
