"""The house in numbers: files and lines by folder, long files, imports inside functions.

    python scripts/house.py [ROOT]

ROOT is a checkout, this one if left out: run it on two commits to compare them.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LONG = 500  # lines
DEPTH = 2  # folders of the package that are told apart, below it


def sources(root: Path) -> list[Path]:
    return sorted((root / "gemmakit").rglob("*.py"))


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def folder(path: Path, root: Path) -> str:
    return "/".join(path.relative_to(root).parts[:-1][: DEPTH + 1])


def late_imports(path: Path) -> Iterator[str]:
    """Modules imported inside a function, once for each place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import):
                    yield from (alias.name for alias in inner.names)
                elif isinstance(inner, ast.ImportFrom) and inner.module:
                    yield inner.module


def report(root: Path) -> Iterator[str]:
    paths = sources(root)
    files, length = Counter[str](), Counter[str]()
    for path in paths:
        files[folder(path, root)] += 1
        length[folder(path, root)] += lines(path)
    yield f"{'folder':<32} {'files':>6} {'lines':>7}"
    for name in sorted(files):
        yield f"{name:<32} {files[name]:>6} {length[name]:>7,}"
    yield f"{'all':<32} {files.total():>6} {length.total():>7,}"
    yield f"files under 121 lines: {sum(lines(path) < 121 for path in paths)}"
    yield f"files over {LONG} lines: " + (
        ", ".join(str(p.relative_to(root)) for p in paths if lines(p) > LONG) or "none"
    )
    late = [(path, module) for path in paths for module in late_imports(path)]
    own = [(path, module) for path, module in late if module.split(".")[0] == "gemmakit"]
    others = Counter(module.split(".")[0] for _, module in late if module.split(".")[0] != "gemmakit")
    yield "imports inside functions: " + ", ".join(f"{name} {count}" for name, count in others.most_common())
    yield f"of gemmakit's own modules: {len(own)}"
    yield from (f"  {path.relative_to(root)}: {module}" for path, module in own)


if __name__ == "__main__":
    print("\n".join(report(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])))
