"""The native kernels of another processor, run by an emulator, in the place of the library that is loaded here.

`pytest -p emulated_library` with EMULATED naming the program (neon_driver.cpp, and what runs it) makes every test of
the kernels call that program: each call's memory is copied there, ends there where memory ends, and comes back.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import struct
import subprocess

from gemmakit import native
from gemmakit.native.ids import WeightFormat
from gemmakit.pytorch.kernels import cpu

_SIZES = {WeightFormat.BF16: 2, WeightFormat.F16: 2, WeightFormat.F32: 4}  # bytes of a number


def matrix_parts(m, x_format):
    """Field of native.h's Matrix -> bytes behind it."""
    groups = -(-m.in_ // m.group) if m.group else 0
    sizes = {"codes": m.out * m.in_ * _SIZES.get(m.format, 1), "bias": m.out * _SIZES.get(x_format, 0)}
    if m.format == WeightFormat.INT8_ROWS:
        sizes["scale"] = 4 * m.out
    if m.format > WeightFormat.INT8_ROWS:
        sizes |= {"scale": 2 * m.out * groups, "zero": m.out * groups}
    if m.format == WeightFormat.INT4:
        sizes["codes"] = m.out * -(-m.in_ // 32) * 16
    if m.format > WeightFormat.INT4:
        sizes["codes"] = m.out * -(-m.in_ // 128) * 16 * WeightFormat(m.format).bits
    return sizes


_NORMS = ("q_norm", "k_norm", "v_norm")


def attention_parts(a):
    return in_pages(a) if a.pages else in_rows(a)


def in_pages(a):
    size, longs = _SIZES.get(a.format, 4), lambda at, n: (ctypes.c_int64 * n).from_address(at)
    tokens, pages = longs(a.starts, a.B + 1)[a.B], max(longs(a.pages, a.B * a.page_count)) + 1
    q, kv, cache = (n * a.H * size for n in (tokens * a.N, tokens * a.K, pages * a.page_size * a.K))
    norms = {f"{name}.weight": a.H * _SIZES.get(getattr(a, name).format, 4) for name in _NORMS}
    return {"q": q, "y": q, "k": kv, "v": kv, "cos": tokens * a.H * size, "sin": tokens * a.H * size, "keys": cache,
            "values": cache, "pages": 8 * a.B * a.page_count, "starts": 8 * (a.B + 1), "lengths": 8 * a.B,
            **norms}  # fmt: skip


def in_rows(a):
    size = _SIZES.get(a.format, 4)
    q, kv = a.B * a.S * a.N * a.H * size, a.B * a.S * a.K * a.H * size
    table = (a.table_row * (a.B - 1) + a.S * a.H) * size
    cache = a.B * a.K * a.capacity * a.H * size
    mask = a.mask_row * (a.B - 1) + a.mask_query * (a.S - 1) + a.T - a.first
    blind = a.blind_row * (a.B - 1) + a.blind_query * (a.S - 1) + 1
    norms = {f"{name}.weight": a.H * _SIZES.get(getattr(a, name).format, 4) for name in _NORMS}
    return {"q": q, "y": q, "k": kv, "v": kv, "cos": table, "sin": table, "keys": cache, "values": cache,
            "mask": mask, "blind": blind, **norms}  # fmt: skip


def member(made, path):
    """Where a field of a structure lies, or with dots a field of a structure within it, and its value."""
    offset = 0
    for name in path.split("."):
        offset, made = offset + getattr(type(made), name).offset, getattr(made, name)
    return offset, made


class Call:
    """One call's segments, each with the memory it came from and goes back to, and the pointers between them."""

    def __init__(self, words):
        self.segments, self.homes, self.pointers = [bytearray(8 * words)], [None], []

    def word(self, at, value):
        """Argument `at` is this number: an int, a float or None."""
        packed = struct.pack("<f4x", value) if isinstance(value, float) else struct.pack("<q", value or 0)
        self.segments[0][8 * at : 8 * at + 8] = packed

    def lead(self, segment, offset, address, size, back=False):
        """Put a pointer to a copy of `size` bytes at `address` there; nothing where the address is null."""
        if address:
            self.pointers.append((segment, offset, len(self.segments)))
            self.segments.append(ctypes.string_at(address, size))
            self.homes.append((address, size) if back else None)

    def structure(self, segment, offset, made, parts, back=()):
        """A pointer to a structure (or an array of them), whose own pointers lead to parts[field] bytes."""
        items = list(made) if isinstance(made, ctypes.Array) else [made]
        raw = bytearray(b"".join(bytes(item) for item in items))
        own = len(self.segments)
        self.pointers.append((segment, offset, own))
        self.segments.append(raw)
        self.homes.append(None)
        for i, item in enumerate(items):
            for field, size in parts(item).items():
                offset, address = member(item, field)
                self.lead(own, i * ctypes.sizeof(item) + offset, address, size, field in back)

    def addresses(self, at, array, sizes):
        """Argument `at` is an array of pointers to what is written."""
        own = len(self.segments)
        self.pointers.append((0, 8 * at, own))
        self.segments.append(bytes(8 * len(sizes)))
        self.homes.append(None)
        for i, size in enumerate(sizes):
            self.lead(own, 8 * i, array[i], size, back=True)


def matrices_of(argument):
    """The Matrix structures that an argument stands for."""
    return argument if isinstance(argument, ctypes.Array) else argument._obj


def _project(call, m, count, x_format, x, rows, y, residual, threads):
    outs, size = [one.out for one in m], _SIZES.get(x_format, 4)
    call.structure(0, 0, m, lambda one: matrix_parts(one, x_format))
    if x is None:  # a question only
        return
    call.lead(0, 24, x, rows * m[0].in_ * size)
    call.addresses(5, y, [rows * out * size for out in outs])
    call.lead(0, 48, residual, rows * outs[0] * size)


def _expand(call, m, start, stop, y_format, y, threads):
    one = matrices_of(m)
    call.structure(0, 0, one, lambda one: matrix_parts(one, y_format))
    call.lead(0, 32, y, (stop - start) * one.in_ * _SIZES[y_format], back=True)


def _norm(call, at, norm, width):
    """Argument `at` is a Norm of so many features."""
    call.structure(0, 8 * at, norm, lambda one: {"weight": width * _SIZES.get(one.format, 4)})


def _rms_norm(call, x_format, x, rows, width, norm, residual, y, threads):
    size = rows * width * _SIZES[x_format]
    call.lead(0, 8, x, size)
    _norm(call, 4, norm, width)
    call.lead(0, 40, residual, size)
    call.lead(0, 48, y, size, back=True)


def _gated(call, x_format, act, gate, up, y, n, threads):
    for at, pointer in ((2, gate), (3, up), (4, y)):
        call.lead(0, 8 * at, pointer, n * _SIZES[x_format], back=at == 4)


def _norm_project(call, m, count, x_format, x, rows, norm, y, threads):
    call.structure(0, 0, m, lambda one: matrix_parts(one, x_format))
    call.lead(0, 24, x, rows * m[0].in_ * _SIZES[x_format])
    _norm(call, 5, norm, m[0].in_)
    call.addresses(6, y, [rows * one.out * _SIZES[x_format] for one in m])


def _norm_gate_up(call, m, x_format, x, rows, norm, act, y, threads):
    call.structure(0, 0, m, lambda one: matrix_parts(one, x_format))
    call.lead(0, 16, x, rows * m[0].in_ * _SIZES[x_format])
    _norm(call, 4, norm, m[0].in_)
    call.lead(0, 48, y, rows * m[0].out * _SIZES[x_format], back=True)


def _project_norm_add(call, m, x_format, x, rows, norm, residual, y, threads):
    call.structure(0, 0, m, lambda one: matrix_parts(one, x_format))
    call.lead(0, 16, x, rows * m[0].in_ * _SIZES[x_format])
    _norm(call, 4, norm, m[0].out)
    for at, pointer in ((5, residual), (6, y)):
        call.lead(0, 8 * at, pointer, rows * m[0].out * _SIZES[x_format], back=at == 6)


def _attend(call, a):
    one = a._obj
    # A call that is to be refused has sizes that say nothing of its memory, but of what the kernel refuses it by.
    sound, looked_at = one.B * one.S <= cpu.MAX_ROWS and 0 <= one.start <= one.T - one.S and one.capacity >= one.T, {}
    if one.pages:
        lengths = (ctypes.c_int64 * one.B).from_address(one.lengths)
        sound, looked_at = (
            max(lengths) <= one.page_count * one.page_size,
            {"lengths": 8 * one.B, "starts": 8 * one.B + 8},
        )
    call.structure(0, 0, one, attention_parts if sound else lambda one: looked_at, back=("y", "keys", "values"))


def _read_memory(call, start, size, total, threads):
    call.lead(0, 0, start, size)
    call.lead(0, 16, ctypes.addressof(total._obj), 8, back=True)


def _use_instruction_set(call, name):
    if name is not None:
        kept = ctypes.create_string_buffer(name)
        call.lead(0, 0, ctypes.addressof(kept), len(kept))


KERNELS = {"gemmakit_" + known.__name__[1:]: known for known in (_project, _expand, _rms_norm, _gated, _norm_project,
           _norm_gate_up, _project_norm_add, _attend, _read_memory, _use_instruction_set)}  # fmt: skip


class Emulated:
    """What ctypes.CDLL is for native.so: gemmakit_<kernel> functions that give the kernel's result."""

    def __init__(self, command):
        self.program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.best = self.isa = self.program.stdout.readline().strip() or None

    def gemmakit_instruction_set(self):
        return self.isa

    def gemmakit_use_instruction_set(self, name):
        failed = self.run("gemmakit_use_instruction_set", name)
        if not failed:
            self.isa = name or self.best
        return failed

    def __getattr__(self, name):
        if name not in KERNELS:
            raise AttributeError(f"emulated_library.py does not know which memory {name} reads and writes: tell it")
        return lambda *arguments: self.run(name, *arguments)

    def run(self, kernel, *arguments):
        call = Call(len(arguments))
        for at, argument in enumerate(arguments):
            if argument is None or isinstance(argument, (int, float)):
                call.word(at, argument)
        KERNELS[kernel](call, *arguments)
        return self.exchange(kernel, call)

    def exchange(self, kernel, call):
        send, answer = self.program.stdin, self.program.stdout
        send.write(struct.pack("<32sII", kernel.encode(), len(call.segments), len(call.pointers)))
        for segment in call.segments:
            send.write(struct.pack("<Q", len(segment)))
            send.write(segment)
        for pointer in call.pointers:
            send.write(struct.pack("<3Q", *pointer))
        send.flush()
        head = answer.read(4)
        assert len(head) == 4, f"{kernel} ended the emulated program with {self.program.wait()}"
        for segment, home in zip(call.segments[1:], call.homes[1:], strict=True):
            made = answer.read(len(segment))
            if home is None:
                assert made == bytes(segment) or self.leads(call, segment), f"{kernel} wrote where it only reads"
            else:
                ctypes.memmove(home[0], made, home[1])
        return struct.unpack("<i", head)[0]

    def leads(self, call, segment):
        """Whether the segment holds pointers, which are others there."""
        return any(call.segments[origin] is segment for origin, _, _ in call.pointers)


if "EMULATED" in os.environ:
    emulated = Emulated(shlex.split(os.environ["EMULATED"])), ""
    native._loaded = lambda: emulated
