"""Shapes in annotations: `Float[Tensor, "B S D"]` is a tensor of floats with these axes, equal letters equal sizes.

Axis letters, one legend: B batch, S query positions, T key positions, N heads, K kv heads, H head_dim, D hidden,
F mlp, V vocabulary; O and I outputs and inputs of a weight, R rows of tokens, C chunk. `*x` any axes, `_` one of any
size, `#B` that or 1, `dim-1` and `...` as jaxtyping has them, `Shaped` any dtype.

jaxtyping checks them where it is loaded before gemmakit.pytorch, as tests/unit/pytorch/test_shapes.py does; elsewhere
they say the same to readers and cost nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING or sys.modules.get("jaxtyping") is None:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
    from typing import Annotated as Shaped
else:
    from jaxtyping import Bool, Float, Int, Shaped

# What picks positions of a sequence.
Places = slice | list[int] | Tensor

__all__ = ["Bool", "Float", "Int", "Places", "Shaped"]
