"""Rules of the house: what an import loads, how long a file is, who may import whom."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import gemmakit

PACKAGE = Path(gemmakit.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "jax", "flax", "numpy", "transformers", "tokenizers", "sentencepiece", "safetensors")


def loaded_by(statement):
    """The heavy packages that are in sys.modules of a fresh interpreter after `statement`."""
    code = f"import sys\n{statement}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import gemmakit") == []


def test_configurations_need_neither_torch_nor_jax():
    assert loaded_by("import gemmakit; gemmakit.GemmaConfig(); gemmakit.GenerationConfig()") == []


def test_a_heavy_import_would_be_seen():
    assert loaded_by("import gemmakit, numpy") == ["numpy"]


# What only some files, commands or settings need.
OPTIONAL = {"accelerate", "beartype", "bitsandbytes", "gguf", "jax", "jaxtyping", "llguidance", "matplotlib", "msgpack",
            "optax", "orbax", "rich", "sentencepiece", "triton", "typer"}  # fmt: skip
WITHOUT = f"""
import sys, tempfile

sys.modules.update(dict.fromkeys({OPTIONAL}))  # what is None there is not found
import gemmakit, torch

tokenizer = gemmakit.AutoTokenizer.from_pretrained(gemmakit.demo_model())
model = gemmakit.AutoModelForCausalLM.from_pretrained(gemmakit.demo_model())
ids = tokenizer("If the file", return_tensors="pt").input_ids
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = gemmakit.GemmaForCausalLM.from_pretrained(folder)
new = [event.token for event in again.stream(ids, max_new_tokens=4)]
assert model.generate(ids, max_new_tokens=4)[0].tolist()[-4:] == new
print("done")
"""


def test_a_model_loads_speaks_and_is_saved_without_any_optional_package():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["done"], done.stdout + done.stderr


@pytest.mark.parametrize("name", gemmakit.__all__)
def test_every_public_name_resolves(name):
    assert getattr(gemmakit, name) is not None
    assert name in dir(gemmakit)


def test_other_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        gemmakit.no_such_name


def test_no_source_file_is_over_500_lines():
    assert SOURCES
    long = {str(p.relative_to(PACKAGE)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_the_package_nowhere_imports_transformers():
    """Not even inside a function, where import-linter looks too, or by a name in a string, where it does not.

    But for `gemmakit.integrations`, whose one function is there to be asked for it.
    """
    assert "transformers" not in loaded_by("import gemmakit.integrations")
    for path in SOURCES:
        if path == PACKAGE / "integrations.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = []
            if isinstance(node, ast.Import):
                named = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                named = [node.module or ""]
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = ast.unparse(node.func)
                if called.endswith("import_module") or called == "__import__":
                    named = [str(node.args[0].value)]
            assert not [n for n in named if n.split(".")[0] == "transformers"], f"{path}:{node.lineno}"


def test_import_contracts_hold():
    root = PACKAGE.parent
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def _is_module(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def _imported(tree, path, late):
    """The modules that a file imports: when it is loaded, or with `late` inside functions."""
    found, todo = [], [(node, False) for node in ast.iter_child_nodes(tree)]
    while todo:
        node, inside = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom) and inside is late:
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            else:
                assert node.level == 0, f"{path}:{node.lineno}: relative"
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [part if _is_module(part) else node.module for part in parts]
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        todo += [(child, inside) for child in ast.iter_child_nodes(node)]
    return found


@functools.cache
def _modules():
    """Each module's file, and what it imports when it is loaded and inside functions."""
    found = {}
    for path in SOURCES:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        found[name] = path, _imported(tree, path, late=False), _imported(tree, path, late=True)
    return found


@functools.cache
def _loads(first):
    """Other people's packages that come with a module."""
    seen, others, todo = set(), set(), [first]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        if module.split(".")[0] != "gemmakit":
            others |= {module.split(".")[0]} - sys.stdlib_module_names
        else:
            todo += [*_modules()[module][1], *([module.rpartition(".")[0]] if "." in module else [])]
    return others


def test_a_late_import_spares_a_package_that_is_not_loaded_yet():
    """One inside a function is there so that a file can be had without somebody else's package, and for nothing else:
    what it leads to loads one that the file itself does not."""
    idle = [
        f"{path}: {module}"
        for name, (path, _, late) in _modules().items()
        for module in late
        if module in _modules() and _loads(module) <= _loads(name)
    ]
    assert idle == []


def test_no_module_imports_in_a_circle():
    """Inside functions neither; a package's parts may import what the package itself imports them for."""
    graph = {
        name: {one for one in (*early, *late) if one in _modules() and not name.startswith(f"{one}.")}
        for name, (_, early, late) in _modules().items()
    }
    assert len([*graphlib.TopologicalSorter(graph).static_order()]) == len(SOURCES)
