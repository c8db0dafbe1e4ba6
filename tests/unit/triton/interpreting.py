"""Triton's interpreter made to round as the device does.

Imported before triton, in a process of its own with TRITON_INTERPRET=1. As it comes, the interpreter cuts bfloat16 off
instead of rounding to the nearest, multiplies bfloat16 matrices as if their bits were integers, and takes a number
that was loaded for a loop's bound in a way that NumPy 2.4 no longer allows. A third of its time goes
into what nothing looks at, which is left out.
"""

import dataclasses
import os

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before Python starts"

# It works out for every sum and product of integers whether it overflows, and tells nobody: only `debug` would.
_builder = interpreter.interpreter_builder
assert not _builder.options.debug
_builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)


def _unnamed(self, types, fields=None):
    """The type of a tuple, as shapes are: as it comes it writes out its name each time."""
    self.types, self.fields = types, fields or [""] * len(types)


tl.core.tuple_type.__init__ = _unnamed
tl.core.tuple_type.name = property(lambda self: f"[{','.join(map(str, self.types))}]")

_convert = interpreter._convert_float


def _nearest(data, source, target, mode):
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)
    return _convert(data, source, target, mode)


def _widened(handle):
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    product = np.matmul(_widened(a), _widened(b), dtype=np.float32)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


_patch_tensor = interpreter._patch_lang_tensor


def _indexed(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_patched = set()


def _call(self, *arguments, **named):
    """A function called by a kernel. As it comes, each call patches the language again, on top of what is there."""
    module = self.fn.__module__
    if module.startswith("triton.") and module not in _patched:
        _patched.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **named)


interpreter.InterpretedFunction.__call__ = _call
interpreter._patch_lang_tensor = _indexed
interpreter._convert_float = _nearest
interpreter.InterpreterBuilder.create_dot = _dot
