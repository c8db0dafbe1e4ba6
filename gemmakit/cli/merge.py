"""gemmakit merge: an adapter becomes part of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from gemmakit.auto import AutoConfig
from gemmakit.errors import InputError
from gemmakit.hub import demo_model


def merge(
    model: Annotated[str, Argument(help="Folder or Hub id that the adapter is for, or demo.")],
    adapter: Annotated[Path, Argument(help="Folder with adapter_config.json, from gemmakit tune or peft.")],
    out: Annotated[Path, Argument(help="Folder for the whole model, or a .gguf file for the adapter alone.")],
) -> int:
    """Fold an adapter into the weights, and save a model like any other: gemmakit convert makes a GGUF file of it.

    Where OUT ends in .gguf, the adapter alone is written, for llama.cpp's --lora beside a GGUF file of the model.
    """
    if out.suffix == ".gguf":
        from gemmakit.pytorch.adapters import adapter_to_gguf

        if out.exists():
            raise InputError(f"{out} exists: name another file.")
        print(adapter_to_gguf(adapter, out, AutoConfig.from_pretrained(demo_model() if model == "demo" else model)))
        return 0
    from gemmakit.tune import merge as fold

    fold(model, adapter, out)
    print(out)
    return 0
