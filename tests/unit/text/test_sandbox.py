"""A template is a stranger's program: it reaches nothing, it ends, and it stays small."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmakit.errors import TemplateError
from gemmakit.text import sandbox

DATA: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi {0.__class__}"}], "x": 3}

ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ messages.__class__ }}",
    "{{ messages['__class__']['__base__'] }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ range.__self__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__init__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "{% for a in [1] %}{{ loop.__class__ }}{% endfor %}",
    "{{ '{0.__class__}'.format(x) }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ messages[0].content.format(x) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(x) }}",
    "{{ ('{0.__class__}' | attr('format'))(x) }}",
    "{{ x | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{{ [''] | map(attribute='__class__.__mro__') | first }}",
    "{{ messages | selectattr('__class__') | list }}",
    "{{ messages | groupby('__class__') }}",
    "{{ messages | sum(attribute='__class__') }}",
    "{{ [x] | sum(start=[]) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ x.real.denominator }}{{ x.to_bytes }}{{ x.to_bytes(3, 'big') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ nothing() }}",
    "{{ nothing.more }}",
    "{{ 1 / 0 }}",
    "{{ {}['a'].b }}",
    "{% set ns = namespace() %}{{ ns.__class__ }}",
    "{{ dict.fromkeys }}{{ dict.fromkeys('ab') }}",
    "{{ dict.__base__ }}",
    "{{ strftime_now('%1000000000d') }}",
]

# ruff: noqa: E501 (templates are easier to read on one line)
BOMBS = [
    "{% for i in range(10**12) %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**10 }}",
    "{{ ('a' * 1000000) * 1000000 }}",
    "{{ 10**10000 }}",
    "{{ (2**4000) * (2**4000) }}",
    "{% set ns = namespace(n=2) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=(1,)) %}{% for i in range(99) %}{% set ns.s = (ns.s, ns.s) %}{% endfor %}{{ ns.s == ns.s }}",
    "{% set ns = namespace(s=1) %}{% for i in range(99) %}{% set ns.s = {'a': ns.s, 'b': ns.s} %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s.join('abcdef') %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] | join(ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ '\\t'.expandtabs(10**10) }}",
    "{{ ('a\\n' * 100000) | indent('b' * 100000) }}",
    "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n > 0 %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100) }}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% for a in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 90 }}{% endfor %}",
    "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    "{{ range(100000) | map('string') | map('replace', '1', 'a' * 1000000) | list }}",
    "{{ [range(100000) | list] * 10000 }}",
    "{{ range(100000) | batch(1) | list }}",
    "(" * 100_000,
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ 1" + "+1" * 50_000 + " }}",
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ 'a' }}" * 100_000,
]


@pytest.mark.parametrize("template", ESCAPES)
def test_escapes_are_refused(template: str) -> None:
    with pytest.raises(TemplateError):
        sandbox.render(template, DATA)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "TIME_LIMIT_S", 1.0)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("template", BOMBS, ids=lambda text: text[:60])
def test_bombs_are_stopped_in_time_and_leave_no_thread(template: str) -> None:
    # The processor's time: the limit is the clock's, which a busy machine passes later, and never with more work.
    threads, start = threading.active_count(), time.process_time()
    try:
        text = sandbox.render(template, DATA)
    except TemplateError:
        pass
    else:
        assert len(text) <= sandbox.MAX_CHARS + 10_000, "harmless only because it is small"
    assert time.process_time() - start < 4 * sandbox.TIME_LIMIT_S
    assert threading.active_count() == threads


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("template", BOMBS[:14], ids=lambda text: text[:60])
def test_bombs_are_errors(template: str) -> None:
    with pytest.raises(TemplateError):
        sandbox.render(template, DATA)


def test_the_clock_stops_what_the_steps_would_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "TIME_LIMIT_S", 0.2)
    monkeypatch.setattr(sandbox, "MAX_STEPS", 10**12)
    with pytest.raises(TemplateError, match=r"0\.2 seconds"):
        sandbox.render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0]['content'] | trim }}", "Hi {0.__class__}"),
        ("{{ messages[0].content.split(' ')[0] | upper }}", "HI"),
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}", "1/1True"),
        ("{% for k, v in messages[0].items() %}{{ k }}{% endfor %}", "rolecontent"),
        ("{% for k, v in messages[0] | dictsort %}{{ k }}={{ v | length }};{% endfor %}", "content=16;role=4;"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}", "4"),
        ("{{ {'a': [1, 2.5, none, true], 'é': '<b>'} | tojson }}", '{"a": [1, 2.5, null, true], "é": "<b>"}'),
        ("{{ {'b': 'é'} | tojson(ensure_ascii=true, indent=2) }}", '{\n  "b": "\\u00e9"\n}'),
        ("{% macro m(a, b='!') %}{{ a ~ b }}{% endmacro %}{{ m('x') }}", "x!"),
        ("{{ 'a\nb' | indent(2) }}|{{ '%s-%02d' | format('x', 7) }}|{{ '%s' % 'y' }}", "a\n  b|x-07|y"),
        ("{{ undefined_thing }}{{ undefined_thing is defined }}{{ x is number }}", "FalseTrue"),
        ("{{ [3, 1, 2] | sort | last }}{{ [1, 2] | sum }}{{ (7 // 2) ** 2 % 5 }}", "334"),
        ("{{ messages[1:] }}{{ messages[-1].role }}{{ 'user' in messages | map(attribute='role') }}", "[]userTrue"),
        ("{% if x > 2 and not false %}yes{% elif x %}no{% endif %}\n   {#- note -#} !", "yes!"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ 'x' if x == 3 else 'y' }}{{ messages[0].get('name', 'none') }}", "xnone"),
        ("{% set text %}a{{ x }}{% endset %}{{ text }}{{ text is string }}", "a3True"),
    ],
)
def test_what_real_templates_use_works(template: str, expected: str) -> None:
    assert sandbox.render(template, DATA) == expected


def test_the_templates_own_error_reaches_the_caller() -> None:
    with pytest.raises(sandbox.TemplateRefused, match="not like this"):
        sandbox.render("{{ raise_exception('not like this') }}", {})


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("{}%#-+*/|.[]()'\" _abforinset0123,=~"), max_size=60))
def test_any_source_renders_or_is_refused(source: str) -> None:
    for wrapped in (source, "{{" + source + "}}", "{%" + source + "%}"):
        with contextlib.suppress(TemplateError):
            assert isinstance(sandbox.render(wrapped, DATA), str)


def test_a_long_conversation_is_within_the_caps(shared_fast: Any) -> None:
    chat = [{"role": "assistant" if index % 2 else "user", "content": "word " * 200} for index in range(4000)]
    assert len(shared_fast.apply_chat_template(chat, tokenize=False)) > 3_900_000
