"""Block sizes by device and form: plain data, looked up, never searched for at start-up.

REASONED, NOT MEASURED: no device was at hand. A memory that answers after about 700 ns at 3.35 TB/s (H100) wants 2.3 MB
under way, 18 KB a multiprocessor; 1.55 TB/s (A100) wants 10 KB. So each program asks for 4 to 16 KB of a weight ahead,
four or more programs share a multiprocessor, and outputs a program are few enough that every matrix of 2B and 7B gives
each multiprocessor several (2,048 outputs / 4 = 512 programs for 132): splitting the inputs would add a launch and gain
nothing. More rows keep more inputs and sums in registers, so their blocks are shorter. Registers, shared memory and
spills of every entry are read from the compiled code by tests/unit/triton/test_compiled.py.
"""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    """outputs and inputs of one step of a program; for gate and up together half the outputs of each."""

    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 3  # tiles on their way while one is computed with, and that one


class Tuning(NamedTuple):
    # [form][rows], rows 1, 2, 4, 8.
    plain: dict[int, Blocks]
    int8: dict[int, Blocks]
    int4: dict[int, Blocks]
    key_tile: int  # keys a step of attention
    key_stages: int
    attention_programs: int  # as many as attention is split into, if there are keys enough
    dequantize_above: int  # rows from which a weight is expanded and multiplied by the library


HOPPER = Tuning(
    plain={1: Blocks(4, 2048), 2: Blocks(4, 1024), 4: Blocks(4, 512), 8: Blocks(4, 512)},
    int8={1: Blocks(4, 1024), 2: Blocks(4, 1024), 4: Blocks(4, 1024), 8: Blocks(4, 512)},
    int4={1: Blocks(8, 1024), 2: Blocks(8, 1024), 4: Blocks(4, 1024), 8: Blocks(4, 1024)},
    key_tile=32,
    key_stages=3,
    attention_programs=256,
    dequantize_above=32,
)
AMPERE = Tuning(
    plain={1: Blocks(4, 1024), 2: Blocks(4, 1024), 4: Blocks(4, 512), 8: Blocks(4, 512)},
    int8={1: Blocks(4, 1024), 2: Blocks(4, 1024), 4: Blocks(4, 1024), 8: Blocks(4, 512)},
    int4={1: Blocks(8, 1024), 2: Blocks(8, 1024), 4: Blocks(4, 1024), 8: Blocks(4, 1024)},
    key_tile=32,
    key_stages=2,
    attention_programs=216,
    dequantize_above=32,
)
# By compute capability; others take the one whose shared memory is not larger than theirs (8.6 and 8.9 have 99 KB).
TUNINGS = {(9, 0): HOPPER, (8, 0): AMPERE}
DEFAULT = AMPERE
# More parts than this cost more to join than they save in reading.
MAX_SPLITS = 64


def tuning(capability: tuple[int, int] | None) -> Tuning:
    """The constants for a device of this compute capability; None (the interpreter) takes Hopper's."""
    if capability is None:
        return HOPPER
    return TUNINGS.get(capability, HOPPER if capability >= (10, 0) and capability[0] < 12 else DEFAULT)


def splits(programs: int, heads: int, tile: int, keys: int) -> int:
    """Among how many programs each of `heads` (B * K) kv heads divides its keys: a power of two, 1 to MAX_SPLITS.

    keys: the most there can be, known on the host.
    """
    wanted = min(programs // max(heads, 1), -(-keys // tile), MAX_SPLITS)
    return 1 << max(wanted.bit_length() - 1, 0)
