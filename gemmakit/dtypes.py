"""Names of dtypes, the same in config.json, in checkpoints and in both backends."""

from __future__ import annotations

from typing import Any


def dtype_name(dtype: Any) -> str:
    """The name of a dtype of torch, numpy or jax, or the name itself: bfloat16 for torch.bfloat16 and its text."""
    return str(dtype).removeprefix("torch.")
