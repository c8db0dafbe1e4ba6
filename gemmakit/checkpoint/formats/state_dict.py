"""A dictionary of tensors in memory, read as a checkpoint's file is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemmakit.checkpoint.arrays import TensorInfo


class StateDict:
    """Tensors by name; what is handed out is a copy."""

    kind = "safetensors"
    path = Path("state_dict")

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self.metadata: Mapping[str, str] = {}
        self._held = dict(state_dict)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape), 0, t.nbytes)
            for name, t in self._held.items()
        }

    def tensor(self, name: str, framework: str, device: Any) -> Any:
        """One tensor on `device`; framework must be "pt"."""
        assert framework == "pt"
        return self._held[name].detach().to(device, copy=True)

    def close(self) -> None:
        self._held = {}
