"""gemmakit merge: an adapter becomes part of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument


def merge(
    model: Annotated[str, Argument(help="Folder or Hub id that the adapter is for, or demo.")],
    adapter: Annotated[Path, Argument(help="Folder with adapter_config.json, from gemmakit tune or peft.")],
    out: Annotated[Path, Argument(help="Folder for the whole model.")],
) -> int:
    """Fold an adapter into the weights, and save a model like any other: gemmakit convert makes a GGUF file of it."""
    from gemmakit.tune import merge as fold

    fold(model, adapter, out)
    print(out)
    return 0
