"""The report on a checkpoint as text: 80 columns, coloured on a terminal, plain in a pipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from gemmakit.checkpoint.inspect import Findings, Problem, memory
from gemmakit.errors import GemmakitError

_BOLD, _GREEN, _RED, _DIM = "1", "32", "31", "2"
_MANY_FILES = 8


def lines(found: Findings, tensors: bool) -> list[str]:
    """The whole report; the table of tensors if it is asked for."""
    return [
        f"{_bold(Path(found.path).resolve().name)}: {found.title}",
        *_about(found),
        *(["", *_memory(found)] if found.config is not None else []),
        *(["", *_table(found)] if tensors and found.tensors else []),
        "",
        *_verdict(found),
    ]


def _about(found: Findings) -> list[str]:
    out: list[str] = []
    config = found.config
    if found.tensors:
        said = [found.architecture or "a Gemma", f"{_count(found.parameters)} parameters"]
        said += [f"{config.num_hidden_layers} layers", f"context {config.max_position_embeddings}"] if config else []
        out.append(_row("model", ", ".join(said)))
        out.append(_row("weights", f"{len(found.tensors)} tensors, {size(found.tensor_bytes)}: {_dtypes(found)}"))
    if found.quantization:
        out.append(_row("quantized", found.quantization))
    for i, (name, length, count) in enumerate(found.files[:_MANY_FILES]):
        out.append(_row("" if i else "files", f"{name:<40} {size(length):>9} {count:>6} tensor{'s' * (count != 1)}"))
    if len(found.files) > _MANY_FILES:
        out.append(_row("", f"and {len(found.files) - _MANY_FILES} more"))
    out.append(_row("tokenizer", _tokenizer(found)))
    return [*out, *(_row("note", note) for note in found.notes)]


def _tokenizer(found: Findings) -> str:
    tokenizer = found.tokenizer
    if tokenizer is None:
        return "none beside it"
    files = ", ".join(name for name in tokenizer["files"] if not name.endswith("config.json"))
    if not tokenizer["loads"]:
        return f"{files}: cannot be loaded"
    return f"{tokenizer['size']} ids, {'with' if tokenizer['chat_template'] else 'without'} a chat template"


def _dtypes(found: Findings) -> str:
    total = sum(found.dtypes.values()) or 1
    ordered = sorted(found.dtypes.items(), key=lambda item: -item[1])
    if len(ordered) == 1:
        return ordered[0][0]
    return ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in ordered)


def _memory(found: Findings) -> list[str]:
    assert found.config is not None
    out = [_bold("Memory"), f"  {'':<10} {'weights':>10} {'per 1000 tokens':>17}"]
    for name, sizes in memory(found.config, found.architecture).items():
        out.append(f"  {name:<10} {size(sizes['weights']):>10} {size(sizes['kv_per_1000_tokens']):>17}")
    return out


def _table(found: Findings) -> list[str]:
    wide = max(map(len, found.tensors))
    return [
        _bold("Tensors"),
        *(
            f"  {name:<{wide}}  {info.dtype:<9} {'x'.join(map(str, info.shape))}"
            for name, info in found.tensors.items()
        ),
    ]


def _verdict(found: Findings) -> list[str]:
    if not found.problems:
        compared = "every tensor of the configuration is there" if found.config else "every file is readable"
        return [_style("Whole", _GREEN) + f": {compared}" + (", and every number finite." if found.scanned else ".")]
    count = len(found.problems)
    head = f"{_style('Not whole', _RED)}: {count} problem{'s' if count > 1 else ''}"
    return [head, *(f"  {problem.line()}" for problem in found.problems)]


def _row(name: str, text: str) -> str:
    return f"  {name:<10} {text}"


def size(number: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.{2 if scale == 1e9 else 1}f} {unit}"
    return f"{number} B"


def _count(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} billion"
    return f"{number / 1e6:.2f} million" if number >= 1e6 else str(number)


def _bold(text: str) -> str:
    return _style(text, _BOLD)


def _style(text: str, code: str) -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


# -- the tokenizer beside it -------------------------------------------------------------------------------------------


def inspect_tokenizer(found: Findings) -> None:
    """Load the tokenizer that lies beside the weights, once, and add what is known of it and what is wrong."""
    from gemmakit.conversion.sources import FILES

    where = found.beside
    if where is None or (where.is_dir() and not any((where / name).is_file() for name in FILES[:2])):
        return
    files = [name for name in FILES if (where / name).is_file()] if where.is_dir() else [where.name]
    found.tokenizer = {"files": files, "loads": False, "size": None, "chat_template": None}
    _load_tokenizer(found, found.tokenizer, where)


def _load_tokenizer(found: Findings, about: dict[str, Any], where: Path) -> None:
    from gemmakit.text import GemmaTokenizerFast

    try:
        tokenizer: Any = GemmaTokenizerFast.from_pretrained(str(where))
        template = tokenizer.get_chat_template()
        about.update(loads=True, size=len(tokenizer), chat_template=template is not None)
        if template is not None:
            tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except GemmakitError as error:
        found.problems.append(Problem("tokenizer", None, None, None, f"tokenizer: {error}"))
        return
    if found.config is not None and len(tokenizer) > found.config.vocab_size:
        expected = f"at most {found.config.vocab_size} ids, as the embedding has rows"
        found.problems.append(Problem("tokenizer", None, expected, str(len(tokenizer))))
