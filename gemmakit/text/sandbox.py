"""Jinja for chat templates that nobody vouches for.

A template comes with a checkpoint, so it is a stranger's program. Three fences stand around it:

- what it can reach: only plain data, a list of harmless methods and filters, and no attribute that leads elsewhere;
- how long it runs: loops, calls and filters count steps against a budget and look at the clock. Everything runs in the
  caller's thread, so nothing is left behind when it is stopped;
- how much it makes: every operation that can grow a value is measured before it happens.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg, pass_context

from gemmakit.errors import TemplateError

MAX_SOURCE_CHARS = 2**18
MAX_CHARS = 2**23
# What an entry of a list is counted as; it bounds how long a list can be to walk through.
ENTRY_CHARS = 64
MAX_STEPS = 1_000_000
TIME_LIMIT_S = 5.0
MAX_INT_BITS = 4096
MAX_DEPTH = 64

_STR = """capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace
isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split
splitlines startswith strip swapcase title upper"""
_LOOP = """changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"""
_FILTERS = """abs capitalize count d default dictsort first float groupby int items join last length list lower map max
min reject rejectattr replace reverse round safe select selectattr sort string title trim unique upper"""
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR.split()),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    LoopContext: frozenset(_LOOP.split()),
}
# %-formatting can ask for a width of its own; nobody needs four digits of it.
_WIDE = re.compile(r"%[^%a-zA-Z]*(?:\*|\d{4})")
_WIDE_TIME = re.compile(r"%[^a-zA-Z]*\d{3}")


class TemplateRefused(TemplateError):
    """The template itself called `raise_exception`: the conversation does not suit it."""


@dataclass
class Budget:
    """What one rendering may still use."""

    deadline: float
    steps: int
    chars: int

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise TemplateError(f"the chat template was stopped after {MAX_STEPS} steps: it loops without end.")
        if time.monotonic() > self.deadline:
            raise TemplateError(f"the chat template was stopped after {TIME_LIMIT_S} seconds.")

    def need(self, chars: int) -> None:
        if chars > self.chars:
            raise TemplateError(f"the chat template makes {chars} characters at once; the limit is {self.chars}.")

    def check(self, value: Any) -> Any:
        """`value`, whose whole content (as if written out) must fit; iterators become lists."""
        if isinstance(value, str):
            self.need(len(value))
        elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise TemplateError(f"the chat template makes an integer of {value.bit_length()} bits.")
        elif isinstance(value, (list, tuple, dict)):
            self.need(self.weigh(value))
        elif isinstance(value, Iterator) or type(value).__name__ in ("dict_items", "dict_keys", "dict_values"):
            return self.collect(value)  # type: ignore[arg-type]
        return value

    def collect(self, values: Iterable[Any]) -> list[Any]:
        found: list[Any] = []
        for value in values:
            self.step()
            found.append(value)
        self.need(self.weigh(found))
        return found

    def weigh(self, value: Any, depth: int = 0) -> int:
        """Characters of a value, an entry counted as ENTRY_CHARS; stops at too many. Only plain data nests."""
        if isinstance(value, str):
            return len(value) + ENTRY_CHARS
        if not isinstance(value, (list, tuple, dict)):
            if depth and not isinstance(value, (int, float, type(None), Undefined)):
                raise TemplateError(f"the chat template puts a {type(value).__name__} into a list.")
            return ENTRY_CHARS
        if depth > MAX_DEPTH:
            raise TemplateError(f"the chat template nests lists more than {MAX_DEPTH} deep.")
        total = ENTRY_CHARS
        items = (part for pair in value.items() for part in pair) if isinstance(value, dict) else iter(value)
        for item in items:
            total += self.weigh(item, depth + 1)
            self.need(total)
        return total


_budget: ContextVar[Budget] = ContextVar("budget")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with lists of what is allowed in place of lists of what is not."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=_EXTENSIONS)
        allowed = {name: _guarded(FILTERS[name]) for name in _FILTERS.split()}
        own = {"tojson": _tojson, "indent": _indent, "format": _format, "sum": _sum}
        self.filters = allowed | {name: _guarded(function) for name, function in own.items()}
        self.filters |= {"_each": _each, "_join": _guarded(_join), "_made": _guarded(_same)}
        self.globals = {
            "range": _range,
            "namespace": Namespace,
            "dict": dict,
            "raise_exception": _raise,
            "strftime_now": _now,
        }
        self._callables = tuple(self.globals.values())

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _instrument(tree, self)
        return tree

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._no_inside(obj, attribute, super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._no_inside(obj, argument, super().getitem(obj, argument))

    def _no_inside(self, obj: Any, name: Any, value: Any) -> Any:
        # Jinja would only complain once such a value is used; asking for it is reason enough.
        if isinstance(name, str) and name.startswith("_") and isinstance(value, Undefined):
            raise SecurityError(f"it reaches for the attribute {name!r} of a {type(obj).__name__}.")
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr.startswith("_"):
            return False
        if isinstance(obj, Namespace):
            return True
        return any(attr in names for kind, names in _METHODS.items() if isinstance(obj, kind))

    def is_safe_callable(self, obj: Any) -> bool:
        # Calling what is undefined says so by itself, in better words.
        if isinstance(obj, (Macro, LoopContext, Undefined)) or any(obj is known for known in self._callables):
            return True
        owner = getattr(obj, "__self__", None)
        name = getattr(obj, "__name__", "")
        return any(name in names for kind, names in _METHODS.items() if isinstance(owner, kind))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        budget = _budget.get()
        budget.step()
        if isinstance(getattr(obj, "__self__", None), str):
            args = _measure(budget, obj.__self__, obj.__name__, args)
        return budget.check(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.step()
        if operator == "%" and isinstance(left, str):
            return _format(left, *(right if isinstance(right, tuple) else (right,)))
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    budget.need(budget.weigh(value) * max(0, times))
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            budget.need(len(left) + len(right))
        if operator == "**":
            _check_power(left, right)
        return budget.check(super().call_binop(context, operator, left, right))

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        budget = _budget.get(None)
        parts = list(parts)
        if budget is not None:
            budget.step()
            budget.need(sum(map(len, parts)))
        return "".join(parts)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's words for training; here it only groups them."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


_EXTENSIONS = [loopcontrols, _Generation]


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Render a template with plain data. Raises TemplateError for whatever the template does wrong.

    `variables` hold str, int, float, bool, None, and lists and dictionaries of them.
    """
    budget = Budget(time.monotonic() + TIME_LIMIT_S, MAX_STEPS, 2**62)
    size = budget.weigh(dict(variables))
    budget.chars, budget.steps = MAX_CHARS + 16 * size, MAX_STEPS + size
    token = _budget.set(budget)
    try:
        return _render(compiled(source), variables, budget)
    except TemplateError:
        raise
    except RecursionError:
        raise TemplateError("the chat template calls itself without end.") from None
    except MemoryError:
        raise TemplateError("the chat template needs more memory than there is.") from None
    except SecurityError as error:
        raise TemplateError(f"the chat template was refused: {error}") from None
    except Exception as error:
        raise TemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error
    finally:
        _budget.reset(token)


def _render(template: jinja2.Template, variables: Mapping[str, Any], budget: Budget) -> str:
    parts: list[str] = []
    total = 0
    for part in template.generate(**variables):
        budget.step()
        total += len(part)
        budget.need(total)
        parts.append(part)
    return "".join(parts)


@lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    """The template, compiled; raises TemplateError for bad syntax, unknown filters, or too long a source."""
    if not isinstance(source, str):
        raise TemplateError(f"a chat template must be a string, found {type(source).__name__}.")
    if len(source) > MAX_SOURCE_CHARS:
        raise TemplateError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE_CHARS} are compiled.")
    try:
        return Sandbox().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is malformed at line {error.lineno}: {error.message}") from None
    except (RecursionError, MemoryError, SyntaxError, OverflowError, ValueError, TypeError) as error:
        raise TemplateError(f"the chat template cannot be compiled: {type(error).__name__}: {error}") from None


@lru_cache(maxsize=64)
def names_in(source: str) -> frozenset[str]:
    """The variables that a template reads; raises TemplateError as `compiled` does."""
    compiled(source)
    return frozenset(meta.find_undeclared_variables(jinja2.Environment(extensions=_EXTENSIONS).parse(source)))


def _instrument(tree: nodes.Template, environment: Sandbox) -> None:
    """Put the budget's questions into the program: at each round of a loop, at each list, at each `~`."""

    def asked(node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=environment)

    def changed(node: Any) -> Any:
        for name, value in list(node.iter_fields()):
            if isinstance(value, nodes.Node):
                setattr(node, name, changed(value))
            elif isinstance(value, list):
                setattr(node, name, [changed(item) if isinstance(item, nodes.Node) else item for item in value])
        if isinstance(node, nodes.For):
            node.iter = asked(node.iter, "_each")
        if isinstance(node, nodes.Concat):
            return asked(nodes.List(node.nodes, lineno=node.lineno, environment=environment), "_join")
        if isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            return asked(node, "_made")
        return node

    changed(tree)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that asks the budget before and after."""
    passed = _PassArg.from_obj(function)

    @pass_context
    @wraps(function)
    def run(context: Any, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        if function.__name__ == "do_replace":
            args = _measure(budget, str(value), "replace", tuple(args))
        if function.__name__ in ("sync_do_join", "do_join"):
            value = budget.check(list(value))
            budget.need(sum(len(str(item)) for item in value) + len(str(args[0] if args else "")) * len(value))
        extra = {
            None: (),
            _PassArg.context: (context,),
            _PassArg.eval_context: (context.eval_ctx,),
            _PassArg.environment: (context.environment,),
        }[passed]
        return budget.check(function(*extra, value, *args, **kwargs))

    # `wraps` copies the mark of the wrapped filter, which is not how this one is called.
    run.jinja_pass_arg = _PassArg.context  # type: ignore[attr-defined]
    return run


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and exponent * base.bit_length() > MAX_INT_BITS:
        raise TemplateError(f"the chat template raises {base} to the power {exponent}.")


def _measure(budget: Budget, text: str, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse `replace` and `join` before they make something huge; returns the arguments to use."""
    if method == "replace" and len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        budget.need(len(text) + text.count(old) * len(new))
    elif method == "join" and args:
        items = budget.collect(args[0])
        budget.need(sum(len(str(item)) for item in items) + len(text) * len(items))
        return (items, *args[1:])
    return args


@pass_context
def _each(context: Any, values: Any) -> Iterator[Any]:
    budget = _budget.get()
    for value in values:
        budget.step()
        yield value


def _same(value: Any) -> Any:
    return value


def _join(values: list[Any]) -> str:
    texts = [str(value) for value in values]
    _budget.get().need(sum(map(len, texts)))
    return "".join(texts)


def _sum(values: Any, attribute: str | None = None, start: float = 0) -> float:
    total = start
    for value in values:
        total += value[attribute] if attribute is not None else value
    if not isinstance(total, (int, float)):
        raise TemplateError("sum adds numbers only.")
    return total


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, pad = str(text), width if isinstance(width, str) else " " * min(int(width), 64)
    budget = _budget.get()
    budget.need(len(text) + len(pad) * (text.count("\n") + 1))
    lines = text.split("\n")
    rest = [pad + line if line or blank else line for line in lines[1:]]
    return "\n".join([(pad if first else "") + lines[0], *rest])


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    text, budget = str(text), _budget.get()
    if _WIDE.search(text):
        raise TemplateError(f"the chat template formats with a width that is too large: {text[:40]!r}.")
    values = kwargs or args
    budget.need(len(text) + text.count("%") * (1024 + 10 * budget.weigh(dict(kwargs) if kwargs else list(args))))
    return text % values


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    indent = None if indent is None else min(int(indent), 16)
    weight = _budget.get().weigh(value)
    _budget.get().need(weight)
    separators = tuple(separators) if separators else None
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return text
    # Private characters stay as they are: chat.py writes its marks with them.
    return re.sub(r"[^\x00-\x7f\ue000-\uf8ff]", lambda found: json.dumps(found[0])[1:-1], text)


def _range(*args: int) -> range:
    values = range(*args)
    if len(values) > 100_000:
        raise TemplateError(f"the chat template asks for a range of {len(values)}; at most 100000 are given.")
    return values


def _raise(message: Any = "") -> None:
    raise TemplateRefused(str(message)[:2000])


def _now(form: str) -> str:
    if len(form) > 200 or _WIDE_TIME.search(form):
        raise TemplateError("the chat template asks for a date that is too long.")
    return datetime.now().strftime(form)
