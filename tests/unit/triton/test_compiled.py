"""What the kernels become on real devices, without one: compiled for 8.0 and 9.0, the result is read.

At the sizes of 2B and 7B and with the constants that `launch` takes for each device: loads of weights and keys are 16
bytes wide, nothing spills to local memory, shared memory fits.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.6,<3.7' (Linux)")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gemmakit.native.ids import Activation, WeightFormat  # noqa: E402
from gemmakit.pytorch.kernels.triton import attention, dequantize, gemv, launch, tuning  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which TRITON_INTERPRET=1 prevents: unset it", allow_module_level=True)

TUNINGS = {80: tuning.AMPERE, 90: tuning.HOPPER}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
# (inputs, and is there a norm before and a residual after) of each matrix.
MATRICES = {
    "2B qkv": (2048, True), "2B o": (2048, False), "2B down": (16384, False), "2B head": (2048, False),
    "7B qkv": (3072, True), "7B o": (4096, False), "7B down": (24576, False),
}  # fmt: skip
GATES = {"2B": 2048, "7B": 3072}
FORMS = {
    "16 bits": (WeightFormat.BF16, 1), "int8": (WeightFormat.INT8_ROWS, 1), "int8 g32": (WeightFormat.INT8_GROUPS, 32),
    "int4 g32": (WeightFormat.INT4, 32), "int4 g128": (WeightFormat.INT4, 128),
}  # fmt: skip
CODES = {
    WeightFormat.BF16: "*bf16",
    WeightFormat.INT8_ROWS: "*i8",
    WeightFormat.INT8_GROUPS: "*i8",
    WeightFormat.INT4: "*i32",
}
NUMBERS = dict.fromkeys(("eps", "q_eps", "k_eps", "gain", "scale", "softcap"), "fp32") | dict.fromkeys(
    ("rows", "start", "last"), "i32"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, constants, capability, pointers, divisible):
    """pointers: types of arguments that are not *bf16; divisible: numbers that are multiples of 16, as strides are."""
    constants = {**({"OFFSET": 1.0} if "OFFSET" in kernel.arg_names else {}), **constants}
    options = {"num_warps": constants.pop("num_warps")}
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        number = name in NUMBERS or name[0] == "O" or name.endswith(("_stride", "_row", "_query"))
        signature[name] = "constexpr" if name in constants else NUMBERS.get(name, "i32") if number else "*bf16"
        signature[name] = pointers.get(name, signature[name])
        if signature[name][0] == "*" or name in divisible:  # what torch allocates begins at a multiple of 16 bytes
            attrs[(i,)] = [["tt.divisibility", 16]]
    where = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=where, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assert_fits(found, capability, tmp_path):
    """No spills, and shared memory within the chip's."""
    assert ".local" not in found.asm["ptx"]
    assert found.metadata.shared <= SHARED_LIMIT[capability]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if tool.exists():  # the assembler may spill what PTX holds in registers
        (tmp_path / "kernel.cubin").write_bytes(found.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True).stdout
        stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
        assert (stack, local) == ("0", "0"), usage


def wide_loads(ptx):
    """How many loads of 16 bytes a thread makes: straight to registers and marked as used once, or to shared memory."""
    direct = re.findall(r"ld\.global\S*evict_first\S*?\.(v\d\.b\d+|b\d+)\s", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?(0x[0-9a-f]+)[,;]", ptx)
    assert set(direct) <= {"v4.b32", "v2.b64"}, "a weight is read in pieces of less than 16 bytes"
    assert {int(size, 16) for size in copies} <= {16, 8, 4}
    return len(direct) + sum(int(size, 16) == 16 for size in copies)


def rows_kernel(kernel, I, form, rows, capability, share, **flags):
    number, group = FORMS[form]
    shape = launch.Shape(I, number, group)
    constants = launch.block_constants(TUNINGS[capability], shape, rows, itemsize=2, share=share)
    scale = "*fp32" if number == WeightFormat.INT8_ROWS else "*fp16"
    pointers = {f"w{i}": CODES.get(number, "*i8") for i in range(3)} | {f"scale{i}": scale for i in range(3)}
    pointers |= {f"zero{i}": "*u8" for i in range(3)}
    pointers = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
    found = compiled(kernel, constants | flags, capability, pointers, {"O0", "O1", "O2", "O"})
    size = {WeightFormat.BF16: 2, WeightFormat.INT4: 0.5}.get(number, 1)
    # Of one tile of each weight, all bytes come in loads of 16.
    needed = share * constants["BO"] * constants["BI"] * size / 16 / (32 * constants["num_warps"])
    assert wide_loads(found.asm["ptx"]) >= needed
    return found


def check_projection(matrix, form, rows, capability, tmp_path):
    I, norm = MATRICES[matrix]
    flags = dict(NORM=norm, RESIDUAL=not norm, BIAS=False, WEIGHTS=3 if norm else 1)
    assert_fits(rows_kernel(gemv.project, I, form, rows, capability, 1, **flags), capability, tmp_path)


def check_gate(model, form, rows, capability, tmp_path):
    flags = dict(BIAS=False, ACT=Activation.GELU_TANH)
    assert_fits(rows_kernel(gemv.gate_up, GATES[model], form, rows, capability, 2, **flags), capability, tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("form", ["16 bits", "int8", "int4 g32"])
@pytest.mark.parametrize("matrix", ["2B qkv", "2B down"])
def test_projections_read_16_bytes_a_load_and_do_not_spill(matrix, form, capability, tmp_path):
    check_projection(matrix, form, 1, capability, tmp_path)


@pytest.mark.parametrize("form", ["16 bits", "int8", "int4 g128"])
@pytest.mark.parametrize(("model", "rows", "capability"), [("2B", 1, 90), ("7B", 8, 80)])
def test_gate_and_up_read_16_bytes_a_load_and_do_not_spill(model, rows, capability, form, tmp_path):
    check_gate(model, form, rows, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("matrix", list(MATRICES))
def test_every_projection_of_both_models(matrix, form, rows, capability, tmp_path):
    check_projection(matrix, form, rows, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("model", list(GATES))
def test_every_gate_of_both_models(model, form, rows, capability, tmp_path):
    check_gate(model, form, rows, capability, tmp_path)


POINTERS = {"mask_ptr": "*i8", "blind_ptr": "*i8", "places_ptr": "*i64", "table_ptr": "*i64",
            "partial_ptr": "*fp32", "top_ptr": "*fp32", "total_ptr": "*fp32"}  # fmt: skip
PLAIN = dict(Q_NORM=False, K_NORM=False, CAPPED=False, WHOLE_MASK=False)


def check_attention(S, N, K, page, capability, tmp_path, H=256, **more):
    constants = launch.attention_constants(TUNINGS[capability], S, N, K, H, itemsize=2, paged=page > 0)
    flags = dict(SPLITS=64, MASK=True, BLIND=True, CAUSAL=False, PLACED=True, PAGE=page, **{**PLAIN, **more})
    strides = {"table_row", "row_stride", "head_stride"}
    found = compiled(attention.attend, constants | flags, capability, POINTERS, strides)
    assert_fits(found, capability, tmp_path)
    # A tile of keys and one of values.
    assert wide_loads(found.asm["ptx"]) >= 2 * constants["BT"] * H * 2 / 16 / (32 * constants["num_warps"])
    flags = {name: flags[name] for name in ("SPLITS", "BLIND", "PLACED", "PAGE")} | {"BS": 16, "num_warps": 4}
    flags |= {name: constants[name] for name in ("S", "N", "H", "HP", "BT")}
    pointers = {name: kind for name, kind in POINTERS.items() if name in attention.join.arg_names}
    assert_fits(compiled(attention.join, flags, capability, pointers, set()), capability, tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("N", "K"), [(8, 1), (16, 16)], ids=["2B", "7B"])
def test_attention_reads_16_bytes_a_load_and_does_not_spill(N, K, capability, tmp_path):
    check_attention(1, N, K, 0, capability, tmp_path)


MEMBERS = {
    "gemma2 9B": (16, 8, 256, dict(CAPPED=True)), "gemma2 27B": (32, 16, 128, dict(CAPPED=True)),
    "gemma3 270M": (4, 1, 256, dict(Q_NORM=True, K_NORM=True)),
    "gemma3 27B": (32, 16, 128, dict(Q_NORM=True, K_NORM=True)),
    "gemma4 31B": (32, 16, 256, dict(Q_NORM=True, K_NORM=True, OFFSET=0.0)),
}  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("member", ["gemma2 27B", "gemma3 270M"])
def test_attention_with_norms_or_a_cap_does_not_spill(member, capability, tmp_path):
    N, K, H, more = MEMBERS[member]
    check_attention(1, N, K, 0, capability, tmp_path, H, **more)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("S", [1, 2, 4, 8])
@pytest.mark.parametrize("member", MEMBERS)
def test_attention_with_norms_or_a_cap_of_several_positions_and_over_pages(member, S, page, capability, tmp_path):
    N, K, H, more = MEMBERS[member]
    check_attention(S, N, K, page, capability, tmp_path, H, **more)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("S", [1, 2, 4, 8])
@pytest.mark.parametrize(("N", "K"), [(8, 1), (16, 16), (8, 2)])
def test_attention_of_several_positions_and_over_pages(N, K, S, page, capability, tmp_path):
    check_attention(S, N, K, page, capability, tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
def test_expanding_a_weight_reads_and_writes_16_bytes(capability, tmp_path):
    sizes = dict(I=2048, BO=4, BI=1024, num_warps=4)
    eight = compiled(dequantize.expand8, sizes | dict(G=1, GROUP=2048), capability,
                     {"code_ptr": "*i8", "scale_ptr": "*fp32"}, {"O"})  # fmt: skip
    four = compiled(dequantize.expand4, sizes | dict(G=64, GROUP=32), capability,
                    {"code_ptr": "*u8", "scale_ptr": "*fp16", "zero_ptr": "*u8"}, {"O"})  # fmt: skip
    for found in (eight, four):
        assert_fits(found, capability, tmp_path)
        assert re.findall(r"st\.global\S*?\.(v4\.b32|v2\.b64)", found.asm["ptx"])
    assert wide_loads(eight.asm["ptx"]) >= 1


def test_the_reader_of_widths_sees_a_narrow_load(tmp_path):
    """Unless pointers are promised to be multiples of 16, loads come out two bytes wide, and the test must say so."""
    constants = launch.block_constants(tuning.HOPPER, launch.Shape(2048, WeightFormat.BF16), 1, itemsize=2)
    constants |= dict(NORM=True, RESIDUAL=False, BIAS=False, WEIGHTS=1, OFFSET=1.0)
    kernel = gemv.project
    signature = {n: "constexpr" if n in constants else "*bf16" for n in kernel.arg_names}
    signature |= dict(eps="fp32", rows="i32", O0="i32", O1="i32", O2="i32")
    where = {(kernel.arg_names.index(n),): v for n, v in constants.items() if n != "num_warps"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=where, attrs={})
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    with pytest.raises(AssertionError, match="pieces"):
        wide_loads(found.asm["ptx"])
