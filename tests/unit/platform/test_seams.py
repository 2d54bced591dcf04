"""The table of seams names all that is replaced or read in other packages, and no more."""

import ast
import importlib
from pathlib import Path

import pytest

import megatron_anyexperts
from megatron_anyexperts.platform import seams

PACKAGE = Path(megatron_anyexperts.__file__).parent
ROOT = PACKAGE.parent
OTHERS = ("megatron", "torch", "nvidia_resiliency_ext", "transformer_engine", "webdataset")
TABLES = {"platform/seams.py", "platform/cpu.py", "platform/megatron.py"}


def foreign_names(tree: ast.Module) -> dict[str, str]:
    """Dotted name by the local name of everything that is imported from another package."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[(alias.asname or alias.name).split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: whole for name, whole in names.items() if whole.split(".")[0] in OTHERS}


def dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    """Dotted name of an attribute of something foreign."""
    path = []
    while isinstance(node, ast.Attribute):
        path.append(node.attr)
        node = node.value
    if path and isinstance(node, ast.Name) and node.id in names:
        return ".".join([names[node.id], *reversed(path)])
    return None


def touched(source: str) -> tuple[set[str], set[str]]:
    """Foreign attributes that a module assigns, and private ones that it reads."""
    tree = ast.parse(source)
    names = foreign_names(tree)
    assigned, read = set(), set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or (name := dotted(node, names)) is None:
            continue
        if isinstance(node.ctx, ast.Store):
            assigned.add(name)
        elif node.attr.startswith("_") and not node.attr.startswith("__"):
            read.add(name)
    return assigned, read


def setters(source: str) -> int:
    """Calls of `setattr` on something foreign."""
    tree = ast.parse(source)
    names = foreign_names(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    return sum(
        isinstance(call.func, ast.Name)
        and call.func.id == "setattr"
        and isinstance(call.args[0], ast.Name)
        and call.args[0].id in names
        for call in calls
    )


@pytest.mark.parametrize("seam", seams.SEAMS, ids=lambda seam: seam.name)
def test_what_is_replaced_is_there_and_its_file_speaks_of_it(seam):
    owner, name = seams.owner_of(seam.module, seam.attribute)
    inherited = seam.how == seams.READ  # set when an object is made
    assert (
        hasattr(owner, name)
        or inherited
        and name in Path(importlib.import_module(owner.__module__).__file__).read_text()
    )
    text = (PACKAGE / seam.where).read_text()
    assert name in text or seam.attribute.split(".")[0] in text
    assert (ROOT / seam.test).is_file(), seam.test
    assert len(seam.reason) > 10


def test_the_table_has_each_place_once_and_all_tables():
    rows = seams.seams()
    assert len({(row.name, row.where) for row in rows}) == len(rows)
    assert sum(row.only_without_cuda for row in rows) > 20 and any("ChainedOptimizer" in row.name for row in rows)


def test_nothing_else_is_replaced_or_read():
    known = {seam.attribute.split(".")[-1] for seam in seams.SEAMS}
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        where = str(path.relative_to(PACKAGE))
        if where in TABLES:
            continue
        assigned, read = touched(path.read_text())
        read = {name for name in read if name.split(".")[-1] not in known}
        if assigned or read or setters(path.read_text()):
            found[where] = (assigned, read)
    assert not found


def test_the_walk_finds_what_it_looks_for():
    source = (
        "from megatron.core import a\nimport torch.distributed as d\na.b.c = 1\nd._x()\nsetattr(a, 'b', 1)\nself._y = 2"
    )
    assert touched(source) == ({"megatron.core.a.b.c"}, {"torch.distributed._x"})
    assert setters(source) == 1


def test_only_what_the_table_has_can_be_replaced():
    with pytest.raises(LookupError, match=r"training\.pretrain is replaced, but platform/seams\.py does not say so"):
        seams.replace("megatron.training.training", "pretrain", None)
