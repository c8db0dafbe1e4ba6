"""A GGUF header is read whole or refused with the file, the values and the limit; never anything else."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from gguf_maker import ARRAY, BOOL, F32, TEXT, U32, U64, Maker, pair, place, small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gemmakit.gguf as module
from gemmakit import GemmaConfig, GemmaForCausalLM, GemmaTokenizer, GemmaTokenizerFast
from gemmakit.checkpoint import open_checkpoint
from gemmakit.errors import CheckpointError, GemmakitError
from gemmakit.gguf import read_gguf_header


@pytest.fixture
def file(tmp_path: Path):
    def write(made: Maker | bytes) -> Path:
        path = tmp_path / "x.gguf"
        path.write_bytes(made if isinstance(made, bytes) else made.bytes())
        return path

    return write


def refused(path: Path, *expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_gguf_header(path)
    assert str(path) in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


def test_every_value_type_is_read(file):
    pairs = [pair(f"n{kind}", kind, 1) for kind in (0, 1, 2, 3, 4, 5, 6, 10, 11, 12)]
    pairs += [pair("yes", BOOL, True), pair("text", TEXT, "é"), pair("list", ARRAY, (U32, [1, 2])),
              pair("texts", ARRAY, (TEXT, ["a", "", "漢"])), pair("flags", ARRAY, (BOOL, [True, False]))]  # fmt: skip
    found = read_gguf_header(file(Maker(pairs)))
    assert all(found.metadata[f"n{kind}"] == 1 for kind in (0, 1, 2, 3, 4, 5, 6, 10, 11, 12))
    assert (found.metadata["yes"], found.metadata["text"], found.metadata["list"]) == (True, "é", [1, 2])
    assert list(found.metadata["texts"]) == ["a", "", "漢"]
    assert found.metadata["flags"] == [True, False]


@pytest.mark.parametrize("version", [2, 3])
def test_shapes_are_torch_s_and_places_the_file_s(file, version):
    made = small()
    made.version = version
    path = file(made)
    found = read_gguf_header(path)
    assert found.tensors["blk.0.ffn_down.weight"].shape == (4, 8)
    first = found.tensors["token_embd.weight"]
    assert path.read_bytes()[first.begin : first.begin + 4] == struct.pack("<f", -0.5)


def test_an_alignment_of_its_own_moves_the_data(file):
    made = Maker([pair("general.alignment", U32, 256)], [place("t", [4], 0, 0)], bytes(16), alignment=256)
    assert read_gguf_header(file(made)).tensors["t"].begin == 256


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"magic": b"GGML"}, ["b'GGML'"]),
        ({"version": 1}, ["version is 1", "2 and 3"]),
        ({"version": 4}, ["version is 4"]),
        ({"version": 3 << 24}, ["big-endian"]),
        ({"tensors": 2**63}, [str(2**63), "tensors", "limit is 65536"]),
        ({"count": 2**40}, [str(2**40), "metadata pairs", "limit is 65536"]),
        ({"tensors": 60_000}, []),  # what follows is read as more of them
        ({"count": 60_000}, []),
    ],
)
def test_impossible_beginnings(file, change, expected):
    made = small()
    for name, value in change.items():
        setattr(made, name, value)
    refused(file(made), *expected)


LONG = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (LONG + b"key", ["bytes in a metadata key", "limit is 65535"]),
        (struct.pack("<Q", 60_000) + b"key", ["truncated"]),
        (pair(b"\xff\xfe", U32, 1), ["not UTF-8"]),
        (pair("general.architecture", TEXT, "x"), ["occurs twice", "general.architecture"]),
        (pair("k", 4, 1)[:-8] + struct.pack("<I", 13), ["unknown type 13"]),
        (pair("k", TEXT, "")[:-8] + LONG, ["limit is 16777216"]),
        (pair("k", TEXT, b"\xff"), ["'k' is not UTF-8"]),
        (pair("k", U32, 1)[:-8] + struct.pack("<IB", BOOL, 7), ["neither true nor false"]),
        (pair("k", ARRAY, (U32, []))[:-8] + LONG, ["items in 'k'", "limit is 4000000"]),
        (pair("k", ARRAY, (U32, []))[:-8] + struct.pack("<Q", 3_000_000), ["truncated"]),
        (pair("k", ARRAY, (TEXT, []))[:-8] + struct.pack("<Q", 3_000_000), []),
        (pair("k", ARRAY, (TEXT, []))[:-8] + struct.pack("<Q", 1) + LONG, ["item of 'k'", "limit is 65535"]),
        (pair("k", ARRAY, (ARRAY, [(U32, [1])])), ["array of arrays"]),
        (pair("k", ARRAY, (U32, []))[:-12] + struct.pack("<IQ", 99, 0), ["unknown type 99"]),
    ],
)
def test_impossible_metadata(file, bad, expected):
    made = small()
    made.pairs.append(bad)
    refused(file(made), *expected)


@pytest.mark.parametrize("value", [0, 7, 12, 2**20, 2**31])
def test_impossible_alignments(file, value):
    made = small()
    made.pairs.append(pair("general.alignment", U32, value))
    refused(file(made), "general.alignment", str(value), "power of 2")


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (place("token_embd.weight", [4], 0, 0), ["occurs twice"]),
        (place("t", [], 0, 0), ["0 dimensions"]),
        (place("t", [1] * 5, 0, 0), ["5 dimensions"]),
        (place("t", [0, 4], 0, 0), ["impossible shape (4, 0)"]),
        (place("t", [2**32, 2**32], 0, 0), ["impossible shape"]),
        (place("t", [2**60], 0, 0), ["truncated", "needs bytes"]),
        (place("t", [32], 77, 0), ["unknown type 77"]),
        (place("t", [33], 8, 0), ["rows of 33", "Q8_0", "32"]),
        (place("t", [4], 0, 3), ["begins at 3", "multiple of 32"]),
        (place("t", [4], 0, 2**64 - 32), ["truncated"]),
        (place("t", [4], 0, 2**40), ["truncated"]),
        (place("t", [4], 0, 0), ["overlap", "'t'", "token_embd"]),
        (place("t", [4], 0, 64), ["overlap"]),
        (place(b"\xff", [4], 0, 0), ["not UTF-8"]),
    ],
)
def test_impossible_tensors(file, bad, expected):
    made = small()
    made.places.append(bad)
    refused(file(made), *expected)


def test_a_file_cut_anywhere_is_refused(file):
    whole = small().bytes()
    read_gguf_header(file(whole))
    for length in (*range(200), *range(200, len(whole) - 32, 37)):
        refused(file(whole[:length]))


def test_a_folder_or_nothing_is_refused(tmp_path):
    refused(tmp_path, "cannot be read")
    refused(tmp_path / "absent.gguf", "cannot be read")


def test_absurd_counts_cost_no_memory(file):
    """A small file that declares gigabytes is refused before they are allocated."""
    made = small()
    made.pairs.append(pair("k", ARRAY, (U64, []))[:-8] + struct.pack("<Q", 3_999_999))
    path = file(made)
    tracemalloc.start()
    refused(path, "truncated")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_the_header_s_own_limit(file, monkeypatch):
    monkeypatch.setattr(module, "HEADER_LIMIT_BYTES", 300)
    refused(file(small()), "limit is 300")


def open_all(path: Path) -> None:
    """Everything that reads a GGUF."""
    GemmaConfig.from_pretrained(path)
    GemmaTokenizer.from_pretrained(path)
    GemmaTokenizerFast.from_pretrained(path)
    with open_checkpoint(path) as checkpoint:
        for _ in checkpoint.items():
            pass
    GemmaForCausalLM.from_pretrained(path)


def test_the_small_file_is_whole(file):
    open_all(file(small()))


WHOLE = small().bytes()
HEADER = len(WHOLE) - len(small().data)


def mutated(changes: list[tuple[int, int]], cut: int | None, splice: tuple[int, int, int] | None) -> bytes:
    data = bytearray(WHOLE)
    for at, byte in changes:
        data[at % HEADER] = byte
    if splice is not None:
        a, b, to = (n % len(data) for n in splice)
        data[to:to] = data[min(a, b) : max(a, b)]
    return bytes(data[:cut] if cut is not None else data)


places = st.integers(0, HEADER - 1)
interesting = st.sampled_from([0, 1, 7, 8, 9, 10, 0x7F, 0x80, 0xFF])
changes = st.lists(st.tuples(places, interesting | st.integers(0, 255)), max_size=6)
cuts = st.none() | st.integers(0, len(WHOLE))
splices = st.none() | st.tuples(places, places, places)
quietly = settings(
    max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.filterwarnings("ignore")
@quietly
@given(changes, cuts, splices)
def test_a_damaged_file_gives_gemmakit_s_errors_only(file, changes, cut, splice):
    path = file(mutated(changes, cut, splice))
    tracemalloc.start()
    try:
        open_all(path)
    except GemmakitError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50_000_000  # the file has four kilobytes


kinds = st.integers(0, 14) | st.sampled_from([2**31, 2**32 - 1])
sizes = st.sampled_from([0, 1, 2, 31, 32, 33, 256, 2**16, 2**31, 2**32, 2**63, 2**64 - 1])
keys = st.sampled_from(["general.alignment", "general.architecture", "gemma.block_count", "tokenizer.ggml.tokens", "k"])
pairs = st.tuples(keys, kinds, st.binary(max_size=24)).map(
    lambda p: pair(p[0], U32, 0)[:-8] + struct.pack("<I", p[1]) + p[2]
)
tensors = st.builds(place, st.text(max_size=6), st.lists(sizes, max_size=5), kinds, sizes)
headers = st.builds(
    Maker, st.lists(pairs, max_size=5), st.lists(tensors, max_size=5), st.binary(max_size=200),
    version=st.sampled_from([2, 3, 3, 3]), tensors=st.none() | sizes, count=st.none() | sizes,
)  # fmt: skip


@quietly
@given(headers | st.binary(max_size=300) | st.binary(max_size=300).map(lambda tail: b"GGUF\3\0\0\0" + tail))
def test_a_random_header_gives_a_header_or_a_checkpoint_error(file, made):
    path = file(made)
    try:
        found = read_gguf_header(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    assert all(0 <= t.begin <= t.end <= size for t in found.tensors.values())


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory by address space are Linux's")
def test_the_most_that_a_header_may_declare_fits_half_a_gigabyte(tmp_path):
    """Four million empty strings: the most items, in 32 MB of file."""
    path = tmp_path / "x.gguf"
    key = pair("k", ARRAY, (TEXT, []))[:-8] + struct.pack("<Q", 4_000_000)
    path.write_bytes(Maker([key + bytes(8 * 4_000_000)]).bytes())
    code = "import sys; from gemmakit.gguf import read_gguf_header as r; print(len(r(sys.argv[1]).metadata['k']))"
    limit = 512 * 2**20

    def cap() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, preexec_fn=cap, env={**os.environ}
    )
    assert done.stdout.strip() == "4000000", done.stderr[-500:]


@pytest.mark.parametrize(
    ("key", "bad", "expected"),
    [
        ("general.architecture", pair("general.architecture", TEXT, "llama"), ["'llama'", "Gemma 1, 1.1"]),
        ("gemma.block_count", None, ["lacks gemma.block_count"]),
        ("gemma.block_count", pair("gemma.block_count", TEXT, "one"), ["gemma.block_count", "'one'"]),
        ("gemma.block_count", pair("gemma.block_count", U32, 2**31 - 1), ["block_count is 2147483647", "1 layers"]),
        ("gemma.attention.key_length", pair("gemma.attention.key_length", U32, 2**31), ["blk.0.attn_q", "(4, 4)"]),
        ("gemma.feed_forward_length", pair("gemma.feed_forward_length", U32, 2**31), ["feed_forward_length is"]),
        ("gemma.attention.head_count_kv", pair("gemma.attention.head_count_kv", U32, 2), ["blk.0.attn_k"]),
        ("gemma.embedding_length", pair("gemma.embedding_length", U32, 5), ["embedding_length is 5", "rows of 4"]),
        ("gemma.attention.key_length", pair("gemma.attention.value_length", U32, 6), ["value_length is 6"]),
        ("gemma.context_length", pair("gemma.context_length", ARRAY, (U32, [1, 2])), ["one whole number"]),
        ("", pair("gemma.rope.scaling.type", TEXT, "yarn"), []),
        ("", pair("gemma.vocab_size", U32, 7), ["vocab_size is 7", "6 rows"]),
        ("", pair("gemma.rope.dimension_count", U32, 1), ["dimension_count is 1"]),
        ("gemma.attention.head_count", pair("gemma.attention.head_count", U32, 0), []),
        (
            "gemma.attention.layer_norm_rms_epsilon",
            pair("gemma.attention.layer_norm_rms_epsilon", F32, float("nan")),
            [],
        ),
    ],
)
def test_settings_that_contradict_are_refused(file, key, bad, expected):
    made = small()
    made.pairs = [p for p in made.pairs if not key or not p.startswith(struct.pack("<Q", len(key)) + key.encode())]
    made.pairs += [bad] if bad else []
    if b"yarn" in (bad or b""):
        made.pairs.append(pair("gemma.rope.scaling.factor", F32, 4.0))
        expected = ["'yarn'", "linear"]
    with pytest.raises(GemmakitError) as caught:
        GemmaConfig.from_pretrained(file(made))
    assert all(part in str(caught.value) for part in expected)


def test_linear_scaling_and_unknown_settings_come_through(file):
    made = small()
    made.pairs += [pair("gemma.rope.scaling.type", TEXT, "linear"), pair("gemma.rope.scaling.factor", F32, 4.0),
                   pair("gemma.rope.freq_base", F32, 5e5), pair("gemma.novelty", U32, 3)]  # fmt: skip
    config = GemmaConfig.from_pretrained(file(made))
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    assert config.gguf == {"gemma.novelty": 3}
    assert config.rms_norm_eps == 1e-6
