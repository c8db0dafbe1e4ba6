"""Pictures of who may look at whom: the very mask that the model's layers get, with the tokens beside it.

Axis letters: B batch, S query positions, T key positions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemmakit.auto import AutoConfig, AutoTokenizer
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, MissingDependency

VISIBLE, SELF, HIDDEN, PADDING = "■", "◆", "·", "░"
_STYLE = {VISIBLE: "green", SELF: "bold yellow", HIDDEN: "dim", PADDING: "red dim"}
_COLOUR = {VISIBLE: "#3b8f5a", SELF: "#e0a020", HIDDEN: "#f2f2f0", PADDING: "#e6c3c0"}
_MEANING = {VISIBLE: "may look", SELF: "itself", HIDDEN: "may not look", PADDING: "padding"}
_LABEL_WIDTH = 16


class AttentionMaskVisualizer:
    """Shows the attention mask that a checkpoint's configuration gives for a text.

    Args:
        model_name: a folder or Hub id; only its configuration and tokenizer are read.
        config, tokenizer: instead of those found there.

    Calling it prints the mask in a terminal (in colour; plain when piped) and draws it in a notebook; `save` writes the
    last one as PNG or SVG. `masks` holds it: bool (B, S, T), True where a query may look.
    """

    def __init__(self, model_name: str | os.PathLike[str], *, config: GemmaConfig | None = None, tokenizer: Any = None):
        self.config = config or AutoConfig.from_pretrained(model_name)
        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(model_name)
        self.masks: Any = None
        self._grids: list[tuple[list[str], list[str]]] = []

    def __call__(
        self, input_sentence: str | Sequence[str], *, packed: bool = False, is_causal: bool | None = None
    ) -> None:
        """Show the mask of a text, or of several as one padded batch.

        packed: put several texts into one row as documents that see themselves only, as in packed training.
        is_causal: False for bidirectional attention; by default as the configuration says.
        """
        texts = [input_sentence] if isinstance(input_sentence, str) else list(input_sentence)
        if not texts or not all(isinstance(t, str) for t in texts):
            raise InputError("give a text or a list of at least one text.")
        ids, attention_mask, position_ids = self._encoded(texts, packed)
        self.masks = self._visible(ids, attention_mask, position_ids, is_causal)
        pads = [[not m for m in row] for row in attention_mask.tolist()] if attention_mask is not None else None
        self._grids = [
            self._grid(row, mask, pads[i] if pads else [False] * len(row))
            for i, (row, mask) in enumerate(zip(ids.tolist(), self.masks.tolist(), strict=True))
        ]
        if _in_notebook():
            from IPython.display import SVG, display  # pyright: ignore[reportMissingImports]

            display(SVG(self._drawn("svg")))
        else:
            _print(self._grids)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the last mask shown to a .png or .svg file. Needs matplotlib."""
        kind = Path(path).suffix.removeprefix(".").lower()
        if kind not in ("png", "svg"):
            raise InputError(f"{path} must end with .png or .svg.")
        if not self._grids:
            raise InputError("nothing to save yet: call the visualizer with a text first.")
        Path(path).write_bytes(self._drawn(kind))

    def _encoded(self, texts: list[str], packed: bool) -> tuple[Any, Any, Any]:
        """ids (B, S), attention_mask (B, S) or None, position_ids (B, S) or None."""
        import torch

        if not packed:
            encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
            return encoded["input_ids"], encoded["attention_mask"], None
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        ids = torch.tensor([[token for row in rows for token in row]])
        return ids, None, torch.cat([torch.arange(len(row)) for row in rows])[None]

    def _visible(self, ids: Any, attention_mask: Any, position_ids: Any, is_causal: bool | None) -> Any:
        import torch

        from gemmakit.pytorch.masks import visibility

        (B, S), device = ids.shape, ids.device
        causal = self.config.is_causal if is_causal is None else is_causal
        seen = visibility(
            attention_mask, batch=B, queries=S, keys=S, past=0, causal=causal, position_ids=position_ids, device=device
        )
        mask = torch.ones(1, 1, S, S, dtype=torch.bool) if seen.mask is None else seen.mask
        mask = mask.tril() if seen.mask is None and seen.causal else mask
        mask = mask if seen.blind is None else mask & ~seen.blind
        return mask[:, 0].expand(B, S, S)

    def _grid(self, ids: list[int], mask: list[list[bool]], pads: list[bool]) -> tuple[list[str], list[str]]:
        """The tokens' labels, and one string of S cells a query."""
        labels = [_label(token) for token in self.tokenizer.convert_ids_to_tokens(ids)]
        rows = []
        for q, row in enumerate(mask):
            cells = (SELF if q == k and seen else VISIBLE if seen else HIDDEN for k, seen in enumerate(row))
            rows.append("".join(PADDING if pads[q] or pads[k] else cell for k, cell in enumerate(cells)))
        return labels, rows

    def _drawn(self, kind: str) -> bytes:
        try:
            from matplotlib.figure import Figure  # no pyplot: no global state, no window
        except ImportError:
            raise MissingDependency(
                "pictures of masks need matplotlib: pip install 'gemmakit[plot]' (the terminal form needs nothing)."
            ) from None
        import io

        size = max(len(labels) for labels, _ in self._grids)
        figure = Figure(figsize=(len(self._grids) * (0.28 * size + 2.2), 0.28 * size + 2.2), layout="constrained")
        for axes, (labels, rows) in zip(
            figure.subplots(1, len(self._grids), squeeze=False)[0], self._grids, strict=True
        ):
            _draw(axes, labels, rows)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=144)
        return out.getvalue()


def _label(token: str) -> str:
    """A token as one short printable word."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)
    return shown if len(shown) <= _LABEL_WIDTH else shown[: _LABEL_WIDTH - 1] + "…"


def _print(grids: list[tuple[list[str], list[str]]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for labels, rows in grids:
        width = max(map(len, labels))
        shown = max(4, (console.width - width - 6) // 2) if sys.stdout.isatty() else len(rows)
        tens = "".join(f"{k // 10 if k % 10 == 0 and k else '':<2}" for k in range(min(len(rows), shown)))
        ones = "".join(f"{k % 10:<2}" for k in range(min(len(rows), shown)))
        for header in (tens, ones) if len(rows) > 10 else (ones,):
            console.print(Text(" " * (width + 5) + header.rstrip(), style="dim"))
        for number, (label, row) in enumerate(zip(labels, rows, strict=True)):
            line = Text(f"{number:>3} {label:<{width}} ")
            for cell in row[:shown]:
                line.append(cell, style=_STYLE[cell]).append(" ")
            line.rstrip()
            console.print(line.append(" …") if len(row) > shown else line)
        used = [cell for cell in _MEANING if any(cell in row for row in rows)]
        console.print(Text("    " + "   ".join(f"{cell} {_MEANING[cell]}" for cell in used) + "\n", style="dim"))


def _draw(axes: Any, labels: list[str], rows: list[str]) -> None:
    """One grid of squares, queries downwards, keys to the right."""
    from matplotlib.patches import Patch, Rectangle

    size = len(rows)
    for q, row in enumerate(rows):
        for k, cell in enumerate(row):
            axes.add_patch(Rectangle((k + 0.04, q + 0.04), 0.92, 0.92, facecolor=_COLOUR[cell]))
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xlabel="keys", ylabel="queries")
    # A dollar sign would start mathematics.
    names = [label.replace("$", r"\$") for label in labels]
    axes.set_xticks([k + 0.5 for k in range(size)], names, rotation=90, fontsize=8)
    axes.set_yticks([q + 0.5 for q in range(size)], names, fontsize=8)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    used = [cell for cell in _MEANING if any(cell in row for row in rows)]
    patches = [Patch(facecolor=_COLOUR[cell], label=_MEANING[cell]) for cell in used]
    axes.legend(
        handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncol=len(used), frameon=False, fontsize=8
    )


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")
