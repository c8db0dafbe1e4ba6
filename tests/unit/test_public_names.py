"""What gemmakit exports is what the reference lists, and every part of it is typed and described."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gemmakit

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "reference").glob("*.md"))
# Public by their module, as the documents import them.
BY_MODULE = {
    "gemmakit.utils.attention_visualizer": ["AttentionMaskVisualizer"],
    "gemmakit.text.tools": ["tool_schema"],
    "gemmakit.text.response": ["parse_tool_calls", "ResponseParser", "ResponseForm", "Thought"],
    "gemmakit.text.answer_grammar": ["answer_grammar"],
    "gemmakit.text.prompts": ["Prompts"],
    "gemmakit.flax": None,
    "gemmakit.integrations": None,
    "gemmakit.compat": None,
    "gemmakit.flax.compat": None,
}
NAMES = [name for name in gemmakit.__all__ if name != "__version__"]
SHAPED = [
    "GemmaModel.forward",
    "GemmaForCausalLM.forward",
    "GemmaForSequenceClassification.forward",
    "GemmaForTokenClassification.forward",
    "GemmaForCausalLM.generate",
    "GemmaTokenizer.__call__",
    "GemmaTokenizerFast.__call__",
    "BatchEncoding",
]


def needs_flax(name: str) -> None:
    if "flax" in name.lower():
        pytest.importorskip("flax")
        pytest.importorskip("jax")


def found(path: str) -> Any:
    """The module or object of a dotted name."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(found(module), name)


def documented() -> list[str]:
    return [
        path for page in PAGES for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def model_type_of(name: str) -> str:
    return getattr(getattr(gemmakit, name, None), "model_type", "gemma")


def test_the_reference_lists_exactly_what_is_public():
    needs_flax("flax")
    public = {id(getattr(gemmakit, name)): name for name in NAMES}
    for module, names in BY_MODULE.items():
        home = importlib.import_module(module)
        public |= {id(getattr(home, name)): name for name in names or home.__all__}
    listed = {id(found(path)): path for path in documented()}
    # Classes of the other members are Gemma 1's under names of their own: a table lists them.
    table = next(page for page in PAGES if page.name == "models.md").read_text(encoding="utf-8")
    members = {i: name for i, name in public.items() if model_type_of(name) != "gemma"}
    assert [name for name in members.values() if f"`{name}`" not in table] == []
    public = {i: name for i, name in public.items() if i not in members}
    assert sorted(public[i] for i in public.keys() - listed.keys()) == [], "public, and not in docs/reference"
    assert sorted(listed[i] for i in listed.keys() - public.keys()) == [], "in docs/reference, and not public"
    assert len(documented()) == len(set(documented())) == len(listed), "listed twice"


@pytest.mark.parametrize("home", ["gemmakit.compat", "gemmakit.flax.compat"])
def test_names_of_transformers_are_those_of_the_reference_and_of_the_package(home):
    """Each is found as gemmakit.NAME and told by that name; nothing else is told. `*` and dir() leave them out."""
    needs_flax(home)
    page = next(page for page in PAGES if page.name == "compat.md").read_text(encoding="utf-8")
    names = importlib.import_module(home).__all__
    assert len(names) == len(set(names)) > 10
    for name in names:
        assert getattr(gemmakit, name) is getattr(importlib.import_module(home), name)
        own = name in gemmakit.__all__
        assert own or f"::: {home}.{name}\n" in page + "\n" or f"`{name}` is `" in page, name
    listed = re.findall(rf"^::: {re.escape(home)}\.(\w+)$", page, re.MULTILINE)
    assert set(listed) <= set(names) - set(gemmakit.__all__)


def test_every_error_is_reachable_and_described():
    errors = gemmakit.errors
    kinds = [e for e in vars(errors).values() if inspect.isclass(e) and e.__module__ == errors.__name__]
    assert len(kinds) >= 14
    assert all(
        e.__doc__ and issubclass(e, errors.GemmakitError) and e.__name__ in (errors.__doc__ or "") for e in kinds
    )


def functions(name: str) -> Iterator[tuple[str, Any]]:
    """A public function; or a class's own constructor, __call__ and public methods."""
    value = getattr(gemmakit, name)
    if not inspect.isclass(value):
        if inspect.isfunction(value):
            yield name, value
        return
    for key, member in vars(value).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if inspect.isfunction(function) and (key in ("__init__", "__call__") or not key.startswith("_")):
            yield f"{name}.{key}", function


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_described(name):
    needs_flax(name)
    assert inspect.getdoc(getattr(gemmakit, name))
    # A property's name says what it is; a method also does something.
    undescribed = [
        where
        for where, function in functions(name)
        if not where.endswith((".__init__", ".__call__")) and not described(name, where) and not is_property(where)
    ]
    assert undescribed == []


def is_property(where: str) -> bool:
    name, _, key = where.partition(".")
    return bool(key) and isinstance(inspect.getattr_static(getattr(gemmakit, name), key), property)


def described(name: str, where: str) -> bool:
    """By its own docstring, or by that of the method it overrides."""
    value = getattr(gemmakit, name)
    return bool(inspect.getdoc(getattr(value, where.partition(".")[2]) if "." in where else value))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_callable_is_fully_annotated(name):
    needs_flax(name)
    missing: list[str] = []
    for where, function in functions(name):
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[int("." in where and not static(where)) :]
        missing += [f"{where}({p.name})" for p in parameters if p.annotation is p.empty]
        if signature.return_annotation is signature.empty and not where.endswith(".__init__"):
            missing.append(f"{where} -> ?")
    assert missing == []


def static(where: str) -> bool:
    name, _, key = where.partition(".")
    return isinstance(inspect.getattr_static(getattr(gemmakit, name), key), staticmethod)


@pytest.mark.parametrize("where", SHAPED)
def test_what_takes_and_gives_tensors_says_their_shapes(where):
    name, _, key = where.partition(".")
    value = getattr(gemmakit, name)
    assert "(B" in (inspect.getdoc(getattr(value, key) if key else value) or "")


@pytest.mark.parametrize("missing", ["flax", "jax", None])
def test_a_star_import_needs_no_optional_package(missing):
    hide = (
        f"import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: n != {missing!r} and f(n, *a)\n"
    )
    block = f"sys.modules[{missing!r}] = None\n" if missing else ""
    program = f"{hide}{block}from gemmakit import *\nassert GemmaConfig\nassert 'FlaxGemmaModel' not in globals()"
    if missing is None:
        needs_flax("flax")
        program = program.replace("not in", "in")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
