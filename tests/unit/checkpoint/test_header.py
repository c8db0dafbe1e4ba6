"""What a safetensors header may say, and that anything else is one clear error in bounded memory and time."""

import json
import random
import struct
import time
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gemmakit.checkpoint import TensorInfo, read_header
from gemmakit.checkpoint.arrays import BITS
from gemmakit.checkpoint.formats.safetensors import DTYPES, encode_header, scan
from gemmakit.errors import CheckpointError

TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
}


def write(path, header, data=b"\0" * 34, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_read_header_equals_what_safetensors_wrote(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "note": 'a "quoted" {brace} \\'})
    header = scan(path)
    assert header.metadata == {"format": "pt", "note": 'a "quoted" {brace} \\'}
    for name, tensor in TENSORS.items():
        info = header.tensors[name]
        assert (f"torch.{info.dtype}", info.shape, info.nbytes) == (
            str(tensor.dtype),
            tuple(tensor.shape),
            tensor.nbytes,
        )
        data = path.read_bytes()[info.begin : info.end]
        assert data == bytes(tensor.view(torch.uint8).reshape(-1).tolist())


def test_encoded_header_is_read_by_safetensors_and_by_us(tmp_path):
    table = {"scalar": ("float32", (), 4), 'é\n"': ("int16", (3,), 6), "empty": ("float16", (0, 7), 0)}
    path = tmp_path / "x.safetensors"
    first = encode_header(table, {"format": "pt"})
    assert len(first) % 64 == 0
    path.write_bytes(first + b"\1" * 10)
    assert {name: tuple(tensor.shape) for name, tensor in load_file(path).items()} == {
        n: t[1] for n, t in table.items()
    }
    read = read_header(path)
    assert {name: (info.dtype, info.shape, info.nbytes) for name, info in read.items()} == table


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_dtype_of_the_format_is_known(tmp_path, code):
    name = DTYPES[code]
    bits = BITS[name]
    nbytes = 8 * bits // 8
    header = {"t": {"dtype": code, "shape": [8], "data_offsets": [0, nbytes]}}
    path = write(tmp_path / "x.safetensors", header, b"\0" * nbytes)
    begin = path.stat().st_size - nbytes
    assert read_header(path) == {"t": TensorInfo(name, (8,), begin, begin + nbytes)}


def changed(name, **fields):
    return {**GOOD, name: {**GOOD[name], **fields}}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (changed("b", data_offsets=[20, 30]), "'b' overlaps"),
        (changed("b", data_offsets=[26, 36]), "truncated: tensor 'b' needs bytes"),
        (changed("b", data_offsets=[34, 24]), "'b' has the impossible data_offsets [34, 24]"),
        (changed("b", data_offsets=[24, 33]), "'b' of dtype BF16 and shape [5] needs 10 bytes, found 9"),
        (changed("b", data_offsets=[-1, 9]), "impossible data_offsets"),
        (changed("b", data_offsets=[24]), "impossible data_offsets"),
        (changed("b", data_offsets=[24, 2**64 + 24]), "impossible data_offsets"),
        (changed("b", shape=[5.0]), "impossible shape [5.0]"),
        (changed("b", shape=[True]), "impossible shape"),
        (changed("b", shape=[-5]), "impossible shape"),
        (changed("b", shape=[2**62, 2**62, 2**62]), "needs 'over 2**64' bytes"),
        (changed("b", dtype="F99"), "unknown dtype 'F99'"),
        (changed("b", dtype=["F32"]), "unknown dtype"),
        (changed("b", more=1), "needs dtype, shape and data_offsets"),
        ({"a": GOOD["a"]}, "tensors end at byte"),
        ({**GOOD, "b": [1]}, "description expected"),
        ({**GOOD, "__metadata__": {"n": 1}}, "a name expected"),
        ({**GOOD, "__metadata__": "x"}, "'{' expected"),
        ({**GOOD, "\ud800": GOOD["b"]}, "not UTF-8 text"),
        (b'{"a":1,}', "description expected"),
        (b"[]", "does not begin"),
        (b" {}", "does not begin"),
        (b"{} x", "something follows"),
        (b"{", "name expected"),
        (b'{"a"', "':' expected"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[34],"data_offsets":[0,34]}}', "repeats a key"),
        (b'{"__metadata__":{"k":"1","k":"2"}}', "metadata key 'k' occurs twice"),
        (b'{"__metadata__":{},"__metadata__":{}}', "occurs twice"),
    ],
)
def test_malformed_header_names_file_and_fault(tmp_path, header, says):
    says = says.replace("'over 2**64'", "over 2**64")
    with pytest.raises(CheckpointError) as caught:
        read_header(write(tmp_path / "x.safetensors", header))
    assert says in str(caught.value)
    assert "x.safetensors" in str(caught.value)


def test_repeated_tensor_name_is_refused(tmp_path):
    one = json.dumps(GOOD)[1:-1]
    with pytest.raises(CheckpointError, match="'a' occurs twice"):
        read_header(write(tmp_path / "x.safetensors", f"{{{one},{one}}}".encode()))


def test_header_over_100_mb_is_refused_by_its_declared_length(tmp_path):
    with pytest.raises(CheckpointError, match=r"declares a header of 100000001 bytes; the limit is 100000000"):
        read_header(write(tmp_path / "x.safetensors", GOOD, length=100_000_001))


@pytest.mark.parametrize("keep", [0, 7, 8, 50, 200])
def test_truncated_file_gives_expected_and_found_bytes(tmp_path, keep):
    path = write(tmp_path / "x.safetensors", GOOD)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(keep, len(whole) - 1)])
    with pytest.raises(CheckpointError, match=r"truncated.*\d+"):
        read_header(path)


def test_missing_file_and_directory_are_checkpoint_errors(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_header(path)


@pytest.mark.parametrize("unit", [b"[", b"{", b'{"a":', b"[],", b'"a":[],', b"\\", b'"', b"0,", b"9"])
def test_hostile_header_is_refused_in_bounded_memory_and_time(tmp_path, unit):
    size = 20_000_000
    path = write(tmp_path / "x.safetensors", b'{"t":' + unit * (size // len(unit)), b"")
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(CheckpointError):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size
    assert time.process_time() - begin < 10


def attempt(path, data):
    """Read damaged bytes: either an error of ours, or a header that safetensors accepts as well."""
    path.write_bytes(data)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert len(str(error)) < 2000  # noqa: PT017
        return
    for info in header.values():
        assert 0 <= info.begin <= info.end <= len(data)
    if all(f"torch.{info.dtype}" in {str(t) for t in (torch.float32, torch.bfloat16)} for info in header.values()):
        load_file(path)


relaxed = settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path, data):
    attempt(tmp_path / "x.safetensors", data)


@relaxed
@given(st.binary(max_size=200), st.binary(max_size=50))
def test_any_header_text_is_read_or_refused(tmp_path, text, data):
    attempt(tmp_path / "x.safetensors", struct.pack("<Q", len(text)) + text + data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "U8"]) | json_values},
    optional={
        "shape": st.lists(st.integers(0, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 40), max_size=2) | json_values,
        "x": json_values,
    },
)


@relaxed
@given(st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entries | json_values, max_size=4))
def test_any_json_is_read_or_refused(tmp_path, header):
    attempt(tmp_path / "x.safetensors", write(tmp_path / "y", header).read_bytes())


@relaxed
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_a_few_changed_bytes_are_read_or_refused(tmp_path, seed, count):
    rng = random.Random(seed)
    data = bytearray(write(tmp_path / "y", {"__metadata__": {"format": "pt"}, **GOOD}).read_bytes())
    for _ in range(count):
        data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b'{}[]",:0129'])
    attempt(tmp_path / "x.safetensors", bytes(data))
