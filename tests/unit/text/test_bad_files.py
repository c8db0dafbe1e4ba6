"""A malformed vocabulary is an error, found before any native parser reads it: no crash, no hang, little memory."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemmakit.errors import GemmakitError, TokenizerError, UnsafeFile
from gemmakit.text import GemmaTokenizer, GemmaTokenizerFast
from gemmakit.text.rust import RustEngine
from gemmakit.text.sentencepiece import SentencePieceEngine
from gemmakit.text.vocabulary_files import BpeFile, ModelFile, Piece

patient = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


def use(data: bytes) -> None:
    """Everything that reading the bytes leads to; TokenizerError or a working tokenizer, nothing else."""
    try:
        model = ModelFile.parse(data)
        engines = [SentencePieceEngine(model), RustEngine.from_model(model)]
    except TokenizerError:
        return
    for engine in engines:
        assert engine.encode(["Hello <b> 🙂\n\n"])


@pytest.fixture(scope="module")
def small(demo_vocabulary: Any) -> bytes:
    """A model of few bytes, so that a mutation is likely to hit something that matters."""
    return _small(demo_vocabulary)


def _small(demo_vocabulary: Any) -> bytes:
    pieces = demo_vocabulary.reserved_pieces()
    pieces += [
        Piece(text, -float(index)) for index, text in enumerate(["he", "ll", "o", "▁", "h", "e", "l", "hell", "é"])
    ]
    return ModelFile(pieces, b"\x18\x02\x98\x02\x01", b"\x0a\x08identity\x12\x00\x18\x00\x20\x00").to_bytes()


def test_the_small_model_works(small: bytes) -> None:
    model = ModelFile.parse(small)
    expected = SentencePieceEngine(model).encode(["hello hé\n"])
    assert RustEngine.from_model(model).encode(["hello hé\n"]) == expected


def test_every_truncation_is_handled(small: bytes) -> None:
    for size in [*range(200), *range(200, len(small), 37)]:
        use(small[:size])


@patient
@given(data=st.data())
def test_mutated_models_are_errors_or_work(small: bytes, data: Any) -> None:
    mutated = bytearray(small)
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "huge"]))
        if kind == "set":
            mutated[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del mutated[place : place + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            mutated[place:place] = data.draw(st.binary(max_size=20))
        else:
            mutated[place:place] = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
        if not mutated:
            break
    use(bytes(mutated))


@patient
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_errors_or_work(data: bytes) -> None:
    use(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no pieces"),
        (b"\x0a\xff\xff\xff\xff\x0f", "declares 4294967295 bytes"),
        (b"\x0a" + b"\xff" * 11, "longer than 10 bytes"),
        (b"\x0a\x02\x0a", "declares 2 bytes"),
        (b"\x0b", "wire type 3"),
        (b"\x00\x01", "field number 0"),
        (b"\x08\x01", "wire type 0"),
        (b"\x0a\x02\x08\x01", "wrong wire type"),
        (b"\x0a\x03\x0a\x01\xff", "not UTF-8"),
        (b"\x0a\x03\x0a\x01\x00", "NUL"),
        (b"\x0a\x02\x0a\x00", "is empty"),
        (b"\x0a\x05\x0a\x01a\x18\x63", "unknown type 99"),
        (b"\x0a\x08\x0a\x01a\x15" + struct.pack("<f", float("nan")), "score nan"),
        (b"\x0a\x03\x0a\x01a" * 2, "appears twice"),
        (b"\x0a\x03\x0a\x01a", "0 unknown pieces"),
    ],
)
def test_each_fault_of_a_model_is_named(data: bytes, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        ModelFile.parse(data)


def test_models_of_other_families_are_refused(demo_vocabulary: Any, small: bytes) -> None:
    good = ModelFile.parse(small)

    def with_(**changes: Any) -> ModelFile:
        model = copy.copy(good)
        for name, value in changes.items():
            setattr(model, name, value)
        return model

    unigram = with_(trainer_spec=b"\x18\x01\x98\x02\x01")
    prefix = with_(normalizer_spec=b"\x18\x01\x20\x00")
    trims = with_(normalizer_spec=b"\x18\x00\x20\x01")
    rewrites = with_(normalizer_spec=b"\x12\x03abc\x18\x00\x20\x00")
    few_bytes = with_(pieces=[piece for piece in good.pieces if piece.text != "<0x41>"])
    unused = with_(pieces=[*good.pieces, Piece("zz", 0, 5)])
    for model in (unigram, prefix, trims, rewrites, few_bytes, unused):
        with pytest.raises(TokenizerError):
            SentencePieceEngine(ModelFile.parse(model.to_bytes()))
        with pytest.raises(TokenizerError):
            RustEngine.from_model(ModelFile.parse(model.to_bytes()))


@pytest.mark.parametrize("cls", [GemmaTokenizer, GemmaTokenizerFast])
@pytest.mark.parametrize("content", [b"", b"not a model", b"{}", b"\x00" * 1000, b"PK\x03\x04", b"\x80\x04\x95"])
def test_files_that_are_no_vocabulary_are_named(cls: Any, content: bytes, tmp_path: Path) -> None:
    for key, name in (("vocab_file", "tokenizer.model"), ("tokenizer_file", "tokenizer.json")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match=name):
            cls(**{key: path})
        with pytest.raises(TokenizerError, match=name):
            cls.from_pretrained(tmp_path)
        path.unlink()
        with pytest.raises(TokenizerError, match="cannot read"):
            cls(**{key: path})
    with pytest.raises(TokenizerError, match="neither"):
        cls.from_pretrained(tmp_path)


# -- tokenizer.json


@pytest.fixture(scope="module")
def tree(demo_vocabulary: Any) -> dict[str, Any]:
    return json.loads(RustEngine.from_model(ModelFile.parse(_small(demo_vocabulary))).to_json())


junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to some of the values in a tree; long lists and dictionaries give their first entries."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key in list(value)[:12]:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(4, len(value))):
            found += places(value[index], (*path, index))
    return found


@settings(patient, max_examples=300)
@given(data=st.data())
def test_mutated_tokenizer_json_is_an_error_or_works(tree: dict[str, Any], data: Any) -> None:
    mutated = copy.deepcopy(tree)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(mutated)))
        holder = mutated
        for step in path[:-1]:
            holder = holder[step]
        if data.draw(st.booleans()):
            holder[path[-1]] = data.draw(junk)
        else:
            del holder[path[-1]]
    try:
        engine = RustEngine(BpeFile.of(mutated))
    except TokenizerError:
        return
    assert engine.encode(["Hello <b> 🙂\n\n"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model",), None),
        (("model", "type"), "Unigram"),
        (("model", "vocab"), []),
        (("model", "vocab"), {}),
        (("model", "vocab", "he"), -1),
        (("model", "vocab", "he"), 2**40),
        (("model", "vocab", "he"), 1.5),
        (("model", "vocab", "he"), True),
        (("model", "vocab", "he"), 0),
        (("model", "vocab", "a\ud800"), 9999),
        (("model", "vocab", "x" * 5000), 9999),
        (("model", "merges", 0), ["h"]),
        (("model", "merges", 0), "h"),
        (("model", "merges", 0), ["q", "z"]),
        (("model", "merges", 0), [1, 2]),
        (("model", "unk_token"), "<nothing>"),
        (("model", "dropout"), 0.5),
        (("model", "end_of_word_suffix"), "</w>"),
        (("model", "byte_fallback"), "yes"),
        (("added_tokens",), {}),
        (("added_tokens", 0, "id"), "0"),
        (("added_tokens", 0, "id"), 7),
        (("added_tokens", 0, "content"), None),
        (("added_tokens", 0, "special"), "yes"),
        (("normalizer",), {"type": "Lowercase"}),
        (("normalizer",), None),
        (("pre_tokenizer",), {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}),
        (("pre_tokenizer",), "x"),
        (("decoder",), {"type": "WordPiece"}),
        (("decoder",), None),
    ],
)
def test_each_fault_of_a_tokenizer_json_is_refused(tree: dict[str, Any], path: Any, value: Any, tmp_path: Path) -> None:
    mutated = holder = copy.deepcopy(tree)
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(mutated))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        GemmaTokenizerFast(tokenizer_file=tmp_path / "tokenizer.json")


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("[" * 200_000)
    with pytest.raises(TokenizerError, match="not JSON"):
        GemmaTokenizerFast(tokenizer_file=path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.json"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(2**40)
        with pytest.raises(TokenizerError, match="bytes"):
            GemmaTokenizerFast.from_pretrained(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"padding_side": "up"}'),
        ("tokenizer_config.json", '{"padding_side": 3}'),
        ("tokenizer_config.json", '{"bos_token": 3}'),
        ("tokenizer_config.json", '{"bos_token": {"content": 3}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"content": "<bos>"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"model_max_length": "many"}'),
        ("tokenizer_config.json", '{"model_max_length": Infinity}'),
        ("tokenizer_config.json", '{"model_input_names": 5}'),
        ("tokenizer_config.json", '{"sp_model_kwargs": 5}'),
        ("tokenizer_config.json", '{"sp_model_kwargs": {"model_file": "/etc/passwd"}}'),
        ("tokenizer_config.json", '{"additional_special_tokens": 5}'),
        ("tokenizer_config.json", '{"additional_special_tokens": [5]}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}'),
        ("special_tokens_map.json", '"x"'),
        ("special_tokens_map.json", '{"pad_token": []}'),
        ("added_tokens.json", '{"x": "y"}'),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_malformed_settings_are_errors_or_harmless(model_path: Path, tmp_path: Path, name: str, content: Any) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_path.read_bytes())
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    harmless = content in ('{"added_tokens_decoder": []}',)
    try:
        GemmaTokenizer.from_pretrained(tmp_path)
    except GemmakitError:
        assert not harmless
    else:
        assert harmless


def test_code_named_by_a_configuration_is_never_run(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_path.read_bytes())
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    assert GemmaTokenizer.from_pretrained(tmp_path)("x").input_ids[0] == 2
    with pytest.raises(UnsafeFile, match="trust_remote_code"):
        GemmaTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
