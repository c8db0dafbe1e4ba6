"""Several low-rank adapters around one model, of which each row of a pass takes its own, or none.

What is frozen beneath is read once for all rows; each adapter's small products run for its rows alone. Axis letters:
O outputs, I inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemmakit.errors import InputError
from gemmakit.pytorch.kernels import linear
from gemmakit.pytorch.shapes import Float


class Update(NamedTuple):
    """What an adapter does to a projection: y + gain * (y - bias) + B A x, all in float32.

    A: (r, I). B: (O, r), scaled. gain: (O,), of DoRA, by how much a row's learnt length is another; None for none.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None = None


Rows = Mapping[int, slice | Tensor]  # by the place of an adapter among the names
# A thread has a context of its own: passes of one model that run at the same time choose apart.
_chosen: ContextVar[Mapping[RowAdapters, Rows]] = ContextVar("row_adapters")


class RowAdapters:
    """The adapters of a model by name, and which rows of the pass that runs take which."""

    def __init__(self, names: Iterable[str]):
        self.names = tuple(names)

    @property
    def rows(self) -> Rows:
        return _chosen.get({}).get(self, {})

    @contextmanager
    def chosen(self, parts: Iterable[tuple[str | None, int]], device: torch.device) -> Generator[None, None, None]:
        """Within, tokens of a pass take the adapters of their parts. parts: an adapter or None, and how many tokens."""
        found: dict[int, list[int]] = {}
        total = 0
        for name, count in parts:
            if name is not None:
                found.setdefault(self.names.index(name), []).extend(range(total, total + count))
            total += count
        rows_of: Rows = {
            place: slice(None) if len(rows) == total else torch.tensor(rows, device=device)
            for place, rows in found.items()
        }
        token = _chosen.set({**_chosen.get({}), self: rows_of})
        try:
            yield
        finally:
            _chosen.reset(token)


class RowAdaptedLinear(nn.Module):
    """A projection with the updates of several adapters beside it; rows that choose none get the projection's own."""

    def __init__(self, base_layer: nn.Linear, adapters: RowAdapters, updates: dict[int, Update]):
        """updates: by the place of an adapter among the names; an adapter may leave a projection alone."""
        super().__init__()
        self.base_layer, self.adapters, self.held = base_layer, adapters, tuple(updates)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        for place, update in updates.items():
            for part, tensor in zip(Update._fields, update, strict=True):
                self.register_buffer(f"{part}_{place}", tensor, persistent=False)

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def update(self, place: int) -> Update:
        return Update(*(getattr(self, f"{part}_{place}") for part in Update._fields))

    def forward(self, input: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        base = self.base_layer(input)
        chosen = {place: rows for place, rows in self.adapters.rows.items() if place in self.held}
        if not chosen:
            return base
        x, y = input.reshape(-1, self.in_features), base.reshape(-1, self.out_features)
        for place, rows in chosen.items():
            y[rows] = self._updated(self.update(place), x[rows], y[rows])
        return y.view(base.shape)

    def _updated(self, update: Update, x: Float[Tensor, "n I"], y: Float[Tensor, "n O"]) -> Float[Tensor, "n O"]:
        low = linear(linear(x.to(update.A.dtype), update.A), update.B)
        if update.gain is None:
            return y + low.to(y.dtype)
        plain = y if self.bias is None else y - self.bias
        return (y + update.gain * plain.to(low.dtype) + low).to(y.dtype)


def row_adapters(model: Any) -> RowAdapters | None:
    """Those of a model; None where it has none of which rows could choose."""
    return next((m.adapters for m in model.modules() if isinstance(m, RowAdaptedLinear)), None)


def check_adapter(model: Any, name: str) -> None:
    """Raises InputError for a name that no adapter of the model has."""
    found = row_adapters(model)
    names = () if found is None else found.names
    if name not in names:
        raise InputError(f"adapter is {name!r:.200}, but the model has {', '.join(names) or 'none'}: load_adapters it.")
