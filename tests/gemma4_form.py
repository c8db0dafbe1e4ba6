"""A vocabulary and a template of Gemma 4's form, as small as can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_checkpoint

import gemmakit
from gemmakit.text.response import GEMMA4

TOKENS = [
    "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>",
    "<|channel>", "<channel|>", "<|turn>", "<turn|>",
]  # fmt: skip

# System turn with the tools, turns of user and model, results inside the model's turn, thoughts of this turn's calls.
TEMPLATE = """\
{%- macro value(v) -%}
    {%- if v is string -%}<|"|>{{ v }}<|"|>
    {%- elif v is mapping -%}
        {{- '{' -}}
        {%- for k, w in v | dictsort -%}{{ k }}:{{ value(w) }}{{ ',' if not loop.last }}{%- endfor -%}
        {{- '}' -}}
    {%- elif v is sequence -%}
        {{- '[' -}}{%- for w in v -%}{{ value(w) }}{{ ',' if not loop.last }}{%- endfor -%}{{- ']' -}}
    {%- else -%}{{ v | tojson }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(user=-1, model=false) -%}
{%- for m in messages if m.role == 'user' -%}{%- set ns.user = messages.index(m) -%}{%- endfor -%}
{{- bos_token -}}
{%- set own = messages[0].role in ['system', 'developer'] -%}
{%- if own or tools or enable_thinking -%}
    <|turn>system{{ '\\n' -}}
    {{- '<|think|>\\n' if enable_thinking -}}
    {{- messages[0].content | trim if own -}}
    {%- for tool in tools or [] -%}
        <|tool>declaration:{{ tool.function.name }}{{ value(tool.function.parameters or {}) }}<tool|>
    {%- endfor -%}<turn|>{{ '\\n' -}}
{%- endif -%}
{%- for m in (messages[1:] if own else messages) -%}
    {%- if m.role == 'tool' -%}
        <|tool_response>response:{{ m.name or 'unknown' }}{value:{{ value(m.content) }}}<tool_response|>
    {%- else -%}
        {%- if ns.model and m.role == 'user' -%}<turn|>{{ '\\n' }}{%- endif -%}
        {%- if not (ns.model and m.role == 'assistant') -%}
            <|turn>{{ 'model' if m.role == 'assistant' else m.role }}{{ '\\n' -}}
        {%- endif -%}
        {%- if m.reasoning and m.tool_calls and messages.index(m) > ns.user -%}
            <|channel>thought{{ '\\n' + m.reasoning + '\\n' }}<channel|>
        {%- endif -%}
        {%- for call in m.tool_calls or [] -%}
            <|tool_call>call:{{ call.function.name }}{{ value(call.function.arguments) }}<tool_call|>
        {%- endfor -%}
        {{- m.content | trim if m.content -}}
        {%- set ns.model = m.role == 'assistant' -%}
        {%- if not ns.model -%}<turn|>{{ '\\n' }}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if ns.model and messages[-1].role == 'assistant' -%}<turn|>{{ '\\n' }}{%- endif -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}
    <|turn>model{{ '\\n' }}{{- '<|channel>thought\\n<channel|>' if not enable_thinking -}}
{%- endif -%}
"""


def equip(tokenizer: Any) -> Any:
    """The tokenizer with Gemma 4's tokens and template."""
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(value: Any) -> list[str | None]:
    """A value in pieces of text, None where a quote stands."""
    if isinstance(value, str):
        return [None, value, None]
    if isinstance(value, dict):
        items = [[f"{key}:", *written(item)] for key, item in value.items()]
    elif isinstance(value, list):
        items = [written(item) for item in value]
    else:
        return [json.dumps(value)]
    inside = [piece for place, item in enumerate(items) for piece in ([","] if place else []) + item]
    return ["{", *inside, "}"] if isinstance(value, dict) else ["[", *inside, "]"]


def ids_of_call(tokenizer: Any, name: str, arguments: dict[str, Any]) -> list[int]:
    """A call as the model writes it; what strings say is never a token of the form."""
    quote = tokenizer.convert_tokens_to_ids(GEMMA4.quote)
    ids = [tokenizer.convert_tokens_to_ids(GEMMA4.call), *plain_ids(tokenizer, f"call:{name}")]
    for piece in written(arguments):
        ids += [quote] if piece is None else plain_ids(tokenizer, piece)
    return [*ids, tokenizer.convert_tokens_to_ids(GEMMA4.call_end)]


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, in which no letters are a token of the form."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def make(folder: Path, says: str | None = None) -> Path:
    """A random model with this vocabulary and template. says: the grammar of all its answers, tokens by name."""
    tiny_checkpoint.make(folder, vocab_size=1024 + len(TOKENS))
    tokenizer = equip(gemmakit.AutoTokenizer.from_pretrained(folder))
    tokenizer.save_pretrained(folder)
    if says is not None:
        settings = json.loads((folder / "generation_config.json").read_text())
        settings["grammar"] = by_id(tokenizer, says)
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def by_id(tokenizer: Any, grammar: str) -> str:
    """A grammar with the tokens of the form by their ids."""
    for name in TOKENS:
        grammar = grammar.replace(f" {name}", f" <[{tokenizer.convert_tokens_to_ids(name)}]>")
    return grammar
