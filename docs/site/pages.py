"""Adds to the site what lies outside docs/: the README, a reference page of each module, and every linked file.

Links in README and docs lead to files of the repository, so that they work wherever it is read; here they are turned
into links to the pages of those files.
"""

import os
import re
from pathlib import Path, PurePosixPath

import mkdocs_gen_files

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_anyexperts"
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".env": "bash"}
PAGES = {
    "Start": {"About": "index.md", "Where to begin": "guide.md", "Recipes": "recipes.md", "64 GPUs": "cluster.md"},
    "Method": {
        "Routing": "routing.md",
        "Budgets": "budgets.md",
        "Importance": "importance.md",
        "Dispatch": "dispatch.md",
        "Model": "model.md",
        "The layer as a library": "library.md",
    },
    "Data": {"Building shards": "building_shards.md", "Feeding training": "data.md"},
    "Runs": {
        "Planning a job": "planning.md",
        "Slurm": "slurm.md",
        "Survival": "survival.md",
        "Reading a run": "reading_a_run.md",
        "What is logged": "metrics.md",
        "What experts do": "analysis.md",
        "Benchmarks": "benchmarks.md",
        "GPUs": "gpu.md",
        "Conversion and upcycling": "conversion.md",
    },
}
"""Order of the pages of docs/; those that are not here come last."""


def reference_page(module: Path) -> str:
    """Page of a module's path."""
    path = module.with_suffix("")
    return f"reference/{path.parent / 'index' if path.name == '__init__' else path}.md"


def file_page(path: Path) -> str:
    """Page of any other file or folder of the repository."""
    return f"files/{path.as_posix()}.md"


class Site:
    """Writes pages, and notes which files they link."""

    def __init__(self) -> None:
        self.linked: set[Path] = set()

    def page_of(self, path: Path) -> str:
        """The page to which a link to a file of the repository leads."""
        if path == Path("README.md"):
            return "index.md"
        if path.parts[0] == "docs":
            return path.relative_to("docs").as_posix()
        if path.parts[0] == PACKAGE and (path.suffix == ".py" or (ROOT / path / "__init__.py").is_file()):
            return reference_page(path if path.suffix else path / "__init__.py")
        self.linked.add(path)
        return file_page(path)

    def write(self, page: str, text: str, origin: Path) -> None:
        """Write a page whose links are relative to `origin`, a file of the repository."""

        def turned(match: re.Match) -> str:
            before, target, after = match.groups()
            if "://" in target:
                return match.group()
            path = Path(os.path.normpath(origin.parent / target))
            found = os.path.relpath(self.page_of(path), PurePosixPath(page).parent)
            return f"{before}{found}{after}"

        with mkdocs_gen_files.open(page, "w") as file:
            file.write(LINK.sub(turned, text))

    def write_linked(self) -> None:
        """Pages of linked files; those of Markdown may link more."""
        done: set[Path] = set()
        while left := sorted(self.linked - done):
            for path in left:
                self.write(file_page(path), shown(path), path)
            done |= set(left)


def shown(path: Path) -> str:
    """What the page of a file or folder says."""
    whole = ROOT / path
    if whole.is_dir():
        return f"# {path}\n\n" + "".join(f"- `{child.name}`\n" for child in sorted(whole.iterdir()))
    text = whole.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f"# {path}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}````\n"


def navigation(modules: list[Path]) -> str:
    """Pages in order, as literate-nav reads it."""
    lines = []
    for title, pages in PAGES.items():
        lines += [f"- {title}", *(f"    - [{name}]({page})" for name, page in pages.items())]
    lines.append("- Reference")
    for module in modules:
        parts = module.with_suffix("").parts
        depth = len(parts) - (parts[-1] == "__init__")
        if parts[-1] == "__init__":
            parts = parts[:-1]
        lines.append(f"{'    ' * depth}- [{parts[-1]}]({reference_page(module)})")
    return "\n".join(lines) + "\n"


def main() -> None:
    site = Site()
    site.write("index.md", (ROOT / "README.md").read_text(encoding="utf-8"), Path("README.md"))
    for page in sorted((ROOT / "docs").glob("*.md")):
        site.write(page.name, page.read_text(encoding="utf-8"), page.relative_to(ROOT))
    found = (path.relative_to(ROOT) for path in (ROOT / PACKAGE).rglob("*.py"))
    modules = sorted(found, key=lambda path: [*path.parent.parts, "" if path.stem == "__init__" else path.stem])
    for module in modules:
        name = ".".join(module.with_suffix("").parts).removesuffix(".__init__")
        site.write(reference_page(module), f"# {name}\n\n::: {name}\n", module)
    site.write_linked()
    with mkdocs_gen_files.open("SUMMARY.md", "w") as file:
        file.write(navigation(modules))


main()
