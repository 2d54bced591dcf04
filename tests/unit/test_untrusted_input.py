"""No source file reads input in a way that lets the input run code or leave its folder.

Each exception is listed with its reason; a listed one that is gone fails too, so the list stays true.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megatron_anyexperts", "pretrain", "data_tools", "slurm")

RUNS_CODE = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "dill.loads",
    "eval",
    "exec",
    "compile",
    "__import__",
    "importlib.import_module",
    "runpy.run_path",
    "runpy.run_module",
    "torch.hub.load",
    "pandas.read_pickle",
    "cloudpickle.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
}
EXCEPTIONS = {
    ("megatron_anyexperts/checks/doctor.py", "importlib.import_module"): "names of packages in its own table",
    ("megatron_anyexperts/platform/cpu.py", "importlib.import_module"): "names of modules in its own table",
    ("megatron_anyexperts/platform/seams.py", "importlib.import_module"): "names of modules in its own table",
    ("megatron_anyexperts/completion.py", "importlib.import_module"): "names of modules in its own table",
    ("megatron_anyexperts/corpus/sources/base.py", "os.walk"): "where the corpus says `follow_links: true`",
}


def name_of(function: ast.expr) -> str:
    parts = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    return ".".join([getattr(function, "id", "?"), *reversed(parts)]) if parts else getattr(function, "id", "?")


def calls(path: Path):
    """Name, keywords and line of each call; names are those of their modules, however they were imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    full = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            full |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
        elif isinstance(node, ast.Import):
            full |= {each.asname: each.name for each in node.names if each.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            root, dot, rest = name_of(node.func).partition(".")
            yield full.get(root, root) + dot + rest, {word.arg: word.value for word in node.keywords}, node.lineno


def is_literal(value: ast.expr | None, expected: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is expected


def unsafe(name: str, words: dict) -> bool:
    """Whether a call could let its input run code, or follow a link out of a folder."""
    if name in RUNS_CODE:
        return True
    if name == "torch.load":
        return not is_literal(words.get("weights_only"), True)
    if name == "numpy.load":
        return not is_literal(words.get("allow_pickle"), False)
    if name in ("os.walk", "os.fwalk"):
        return "followlinks" in words and not is_literal(words["followlinks"], False)
    if name.startswith("subprocess."):
        return "shell" in words and not is_literal(words["shell"], False)
    if name.endswith(".extractall"):
        return "filter" not in words
    return name.endswith("from_pretrained") and "trust_remote_code" in words


def found() -> dict[tuple[str, str], list[int]]:
    places: dict[tuple[str, str], list[int]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, words, line in calls(path):
                if unsafe(name, words):
                    places.setdefault((str(path.relative_to(ROOT)), name), []).append(line)
    return places


def test_nothing_untrusted_can_run_code():
    places = found()
    assert {key: lines for key, lines in places.items() if key not in EXCEPTIONS} == {}
    assert set(EXCEPTIONS) <= set(places), "an exception is no longer needed"


def test_the_walk_finds_what_it_looks_for(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "import pickle, torch, yaml, os, subprocess\n"
        "pickle.loads(b''); torch.load(p); torch.load(p, weights_only=False); yaml.load(f, L); eval('1')\n"
        "os.walk(p, followlinks=True); subprocess.run(c, shell=True); tar.extractall(p)\n"
        "torch.load(p, weights_only=True); yaml.safe_load(f); os.walk(p); subprocess.run(c)\n"
        "import numpy as n; n.load(p); n.load(p, allow_pickle=False)\n"
        "from pickle import loads as l; l(b'')\n"
    )
    assert [line for name, words, line in calls(source) if unsafe(name, words)] == [2] * 5 + [3] * 3 + [5, 6]
