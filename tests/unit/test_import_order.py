"""Which package may know which, typing included; and no circle, anywhere."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_anyexperts"
ANYONE = {
    "media", "host_sizes", "row_cut", "files", "config_search", "described", "console", "hardware", "trace_file",
}  # fmt: skip
"""Modules of the package itself that know nothing of it."""
LOWER = {
    "platform": set(),
    "moe": set(),
    "survival": {"data.config"},
    "models": {"moe"},
    "data": {"survival.signals"},
    "corpus": {"data"},
    "training": {"platform", "moe", "survival", "models", "data"},
    "weights": {"platform", "moe", "survival", "models", "data", "training"},
    "evaluation": {"platform", "moe", "survival", "models", "data", "training"},
    "analysis": {"survival", "evaluation"},
    "studies": {"survival.signals"},
    "checks": {"platform", "models", "moe", "data", "training"},
    "commands": {"platform", "survival", "data", "corpus", "training", "weights", "evaluation", "analysis",
                 "checks", "studies"},
}
"""Each package, and what it may import beside itself and `ANYONE`."""
EXCEPTIONS = {
    ("training.instruct", "evaluation.answers"): "tuning measures held-out answers on its way",
}


def imports() -> dict[str, set[str]]:
    """Modules of the package that each of its modules imports, names without the package's."""
    modules = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = list(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        found[name] = set()
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([PACKAGE, *above, *([base] if base else [])])
            if base != PACKAGE and not base.startswith(f"{PACKAGE}."):
                continue
            for alias in node.names:
                full = f"{base}.{alias.name}".removeprefix(f"{PACKAGE}.")
                target = full if full in modules else base.removeprefix(f"{PACKAGE}.")
                if target != name and target in modules:
                    found[name].add(target)
    return found


IMPORTS = imports()


def belongs(module: str, allowed: set[str]) -> bool:
    return any(module == each or module.startswith(f"{each}.") for each in allowed)


@pytest.mark.parametrize("package", LOWER)
def test_a_package_knows_only_those_below_it(package):
    wrong = {
        (name, target)
        for name, targets in IMPORTS.items()
        if belongs(name, {package})
        for target in targets
        if not belongs(target, {package} | LOWER[package] | ANYONE) and (name, target) not in EXCEPTIONS
    }
    assert wrong == set()


def test_every_package_has_its_place():
    packages = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert packages == set(LOWER)


def test_there_is_no_circle():
    # A package that only re-exports is named by importing any module of it; that is no dependency of its content.
    modules = {
        name: {target for target in targets if not name.startswith(f"{target}.")} for name, targets in IMPORTS.items()
    }
    TopologicalSorter(modules).prepare()


def test_the_library_needs_torch_and_megatron_core_only():
    allowed = ("torch", "megatron.core", PACKAGE, "numpy", "triton")  # which torch brings, where it has a GPU
    for path in (ROOT / PACKAGE / "moe").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                top = name.split(".")[0]
                assert name.startswith(allowed) or top in sys.stdlib_module_names, (path.name, name)
