"""The codes of a packed weight as a parameter to which nothing can be added in silence.

Adapters are merged by `weight.data += delta`, `weight.data = merged` and their like. On codes torch rounds such a sum
to whole codes, or fails without a word about why.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._utils import _rebuild_parameter

from gemmakit.errors import InputError


class Codes(nn.Parameter):
    """A parameter, not trained, whose `data` says what it is to whoever adds to it or sets it to other numbers."""

    def __new__(cls, data: Any, requires_grad: bool = False) -> Codes:  # pyright: ignore[reportInconsistentConstructor]
        return torch.Tensor._make_subclass(cls, data.as_subclass(Tensor), False)  # type: ignore[attr-defined]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Tensor.data.__get__(self).as_subclass(CodesData)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        moved = value.device != self.device or value.is_meta
        if value.dtype != self.dtype or not (moved or torch.equal(value, self)):
            refuse()
        Tensor.data.__set__(self, value.as_subclass(Tensor))  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return _rebuild_parameter, (plain, False, OrderedDict())


class CodesData(Tensor):
    """What `Codes.data` gives: a tensor, but for arithmetic with it; what torch's functions make of it is plain."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def clone(self, *, memory_format: Any = torch.preserve_format) -> Tensor:
        return super().clone(memory_format=memory_format).as_subclass(CodesData)

    def detach(self) -> Tensor:
        return super().detach().as_subclass(CodesData)

    def copy_(self, other: Tensor, non_blocking: bool = False) -> Tensor:
        return refuse() if other.is_floating_point() else super().copy_(other, non_blocking)

    def _refuse(self, *others: Any) -> NoReturn:
        refuse()

    __add__ = __radd__ = __iadd__ = __sub__ = __rsub__ = __isub__ = __mul__ = __rmul__ = __imul__ = _refuse  # type: ignore[assignment]
    add_ = sub_ = mul_ = _refuse  # type: ignore[assignment]


def refuse() -> NoReturn:
    """Raises InputError."""
    raise InputError(
        "an adapter is not merged onto weights in 8 or 4 bits, whose codes cannot hold what it adds: call dequantize() "
        "of the model first (of a peft model, get_base_model().dequantize()), and merge onto plain weights."
    )


def guard(module: nn.Module) -> None:
    """Make the module's weight `Codes`, the same object."""
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter:
        weight.__class__ = Codes
