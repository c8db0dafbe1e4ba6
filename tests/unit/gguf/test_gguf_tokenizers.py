"""Words to GGUF and back: the same ids on any text, from every source, in both tokenizers."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from gguf_maker import TEXT, U32, pair, small
from gguf_models import tensors_of, vocabulary
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gemmakit import AutoTokenizer, GemmaTokenizer, GemmaTokenizerFast, demo_model
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.errors import CheckpointError, GemmakitError, TemplateError, TokenizerError
from gemmakit.gguf import read_gguf_header
from gemmakit.gguf_settings import Entry
from gemmakit.text.gguf import model_of, read_vocabulary, vocabulary_of
from gemmakit.text.vocabulary_files import CONTROL, UNUSED, USER_DEFINED, ModelFile

SNIPPETS = [
    "<start_of_turn>", "<end_of_turn>", "<mask>", "<unused7>", "[@BOS@]", "<b>", "<0x41>", "  ", " " * 33, "\n" * 32,
    "\t\t", "▁", "▁▁", " ▁", "é", "🙂", "漢字", "\0", "\r\n", "the ", "return", "<bos>", "<pad>",
]  # fmt: skip
texts = st.lists(
    st.one_of(st.sampled_from(SNIPPETS), st.text(st.characters(exclude_categories=("Cs",)), max_size=12)), max_size=20
).map("".join)


@pytest.fixture(scope="module")
def original():
    return GemmaTokenizer.from_pretrained(demo_model())


@pytest.fixture(scope="module")
def loaded(files):
    return [kind.from_pretrained(files["F16"]) for kind in (GemmaTokenizer, GemmaTokenizerFast)]


@pytest.fixture(scope="module")
def without_model(tmp_path_factory):
    """The demo's tokenizer as a folder that has tokenizer.json only."""
    folder = tmp_path_factory.mktemp("json")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(demo_model() / name, folder)
    return folder


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts)
@example("▁ ▁▁  ▁")
def test_ids_are_those_of_the_tokenizer_that_was_written(original, loaded, text):
    expected = original.encode(text, add_special_tokens=False)
    for tokenizer in loaded:
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.decode(expected) == original.decode(expected)


def test_special_tokens_and_settings_come_back(original, loaded):
    chat = [{"role": "user", "content": "Hi <start_of_turn>"}, {"role": "model", "content": "Yes"}]
    for tokenizer in loaded:
        assert tokenizer.special_tokens_map == original.special_tokens_map
        assert tokenizer.all_special_ids == original.all_special_ids
        assert tokenizer.add_bos_token
        assert not tokenizer.add_eos_token
        assert tokenizer.apply_chat_template(chat) == original.apply_chat_template(chat)
        assert tokenizer.decode([2, 106, 845, 107, 1], skip_special_tokens=True) == original.decode(
            [2, 106, 845, 107, 1], skip_special_tokens=True
        )


def test_the_pieces_are_google_s_own_again(files):
    """Types too: turns, <mask> and unused tokens are user-defined there, and control pieces in a GGUF."""
    entries = read_vocabulary(read_gguf_header(files["F16"]))
    assert [entries.entries[i].type for i in (4, 106, 107)] == [CONTROL] * 3
    assert entries.entries[2111] == Entry("[PAD2111]", -1000.0, UNUSED)
    model = ModelFile.read(demo_model() / "tokenizer.model")
    assert model_of(entries).pieces == model.pieces
    spaces = [piece for piece in model.pieces if piece.type == USER_DEFINED and "▁" in piece.text]
    assert spaces  # found with spaces by llama.cpp, which looks for them before it escapes spaces
    texts = {entry.text for entry in entries.entries}
    assert all(piece.text.replace("▁", " ") in texts for piece in spaces)


def test_every_source_gives_the_same_vocabulary(original, files, without_model):
    expected = vocabulary()
    fast = GemmaTokenizerFast.from_pretrained(demo_model())
    model = ModelFile.read(demo_model() / "tokenizer.model")
    for source in (original, GemmaTokenizer.from_pretrained(files["F16"]), GemmaTokenizer(model)):
        assert vocabulary_of(source) == expected
    # A tokenizer.json has no scores, but their order; and it is known which piece is joined first.
    for source in (fast, GemmaTokenizer.from_pretrained(without_model)):
        found = vocabulary_of(source)
        assert [(e.text, e.type) for e in found.entries] == [(e.text, e.type) for e in expected.entries]
        assert (found.special, found.templates) == (expected.special, expected.templates)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts)
def test_a_tokenizer_json_alone_gives_the_same_ids(original, without_model, text):
    if not hasattr(original, "from_json"):
        original.from_json = GemmaTokenizer(model_of(vocabulary_of(GemmaTokenizer.from_pretrained(without_model))))
    expected = original.encode(text, add_special_tokens=False)
    assert original.from_json.encode(text, add_special_tokens=False) == expected


def test_added_tokens_are_written(tmp_path, model, original):
    tokenizer = GemmaTokenizer.from_pretrained(demo_model())
    tokenizer.add_tokens(["<tool>", "two words"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    path = write_gguf(tmp_path / "x.gguf", model.config, tensors_of(model), vocabulary_of(tokenizer), "F32")
    found = read_vocabulary(read_gguf_header(path))
    assert [(e.text, e.type) for e in found.entries[2048:2051]] == [("<tool>", 4), ("two words", 4), ("<|end|>", 3)]
    text = "a <tool> of two words<|end|>"
    for kind in (GemmaTokenizer, GemmaTokenizerFast):
        assert kind.from_pretrained(path).encode(text) == tokenizer.encode(text)
    assert original.encode(text) != tokenizer.encode(text)
    from gemmakit.text import AddedToken

    tokenizer.add_tokens([AddedToken("strip", lstrip=True)])
    with pytest.raises(TokenizerError, match=r"'strip'.*GGUF cannot say"):
        vocabulary_of(tokenizer)


def test_several_templates_come_back(files, tmp_path, model):
    several = replace(vocabulary(), templates={"default": "{{ 'a' }}", "tool_use": "{{ 'b' }}"})
    path = write_gguf(tmp_path / "x.gguf", model.config, tensors_of(model), several, "F32")
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template == several.templates
    chat = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "a"
    assert AutoTokenizer.from_pretrained(path, chat_template="{{ 'c' }}").chat_template == "{{ 'c' }}"


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% for i in range(10**12) %}x{% endfor %}",
    "{{ cycler.__init__.__globals__ }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_ends_in_the_sandbox(tmp_path, template):
    """CVE-2024-34359 was this very path: a chat template of a GGUF file."""
    made = small()
    made.pairs.append(pair("tokenizer.chat_template", TEXT, template))
    path = tmp_path / "x.gguf"
    path.write_bytes(made.bytes())
    with pytest.raises(TemplateError):
        AutoTokenizer.from_pretrained(path).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def without(made, key):
    return [p for p in made.pairs if key.encode() not in p[: 8 + len(key)]]


@pytest.mark.parametrize(
    ("key", "bad", "expected"),
    [
        ("tokenizer.ggml.model", pair("tokenizer.ggml.model", TEXT, "gpt2"), "'gpt2'.*'llama'"),
        ("tokenizer.ggml.model", None, "kind ''"),
        ("tokenizer.ggml.tokens", None, "no list tokenizer.ggml.tokens"),
        ("tokenizer.ggml.tokens", pair("tokenizer.ggml.tokens", TEXT, "x"), "no list"),
        ("tokenizer.ggml.tokens", pair("tokenizer.ggml.tokens", 9, (TEXT, ["<unk>"])), "scores has 6 items; 1"),
        ("tokenizer.ggml.tokens", pair("tokenizer.ggml.tokens", 9, (TEXT, [b"\xff"] * 6)), "item 0 is not UTF-8"),
        ("tokenizer.ggml.tokens", pair("tokenizer.ggml.tokens", 9, (TEXT, ["a"] * 6)), "appears twice"),
        ("tokenizer.ggml.tokens", pair("tokenizer.ggml.tokens", 9, (TEXT, ["", "a", "b", "c", "d", "e"])), "empty"),
        ("tokenizer.ggml.scores", pair("tokenizer.ggml.scores", 9, (6, [float("nan")] * 6)), "score"),
        ("tokenizer.ggml.token_type", pair("tokenizer.ggml.token_type", 9, (5, [3, 3, 3, 2, 1, 9])), "type 9"),
        ("tokenizer.ggml.token_type", pair("tokenizer.ggml.token_type", 9, (5, [5, 3, 3, 2, 1, 1])), "unused"),
        ("tokenizer.ggml.token_type", pair("tokenizer.ggml.token_type", 9, (5, [3, 3, 3, 1, 1, 1])), "unknown pieces"),
        ("tokenizer.ggml.bos_token_id", pair("tokenizer.ggml.bos_token_id", U32, 6), "bos_token_id is 6.*6 tokens"),
        ("general.architecture", pair("general.architecture", TEXT, "llama"), "'llama'"),
        ("k", pair("tokenizer.ggml.add_space_prefix", 7, True), "add_space_prefix is true"),
        ("k", pair("tokenizer.ggml.add_bos_token", U32, 1), "add_bos_token is 1; it must be of type bool"),
    ],
)
def test_words_that_make_no_sense_are_refused(tmp_path, key, bad, expected):
    made = small()
    made.pairs = without(made, key) + ([bad] if bad else [])
    path = tmp_path / "x.gguf"
    path.write_bytes(made.bytes())
    for kind in (GemmaTokenizer, GemmaTokenizerFast):
        with pytest.raises(GemmakitError, match=expected) as caught:
            kind.from_pretrained(path)
        assert str(path) in str(caught.value)


def test_a_file_of_another_name_is_found_by_gguf_file(tmp_path, files):
    shutil.copy(files["F16"], tmp_path / "model-f16")
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file="model-f16").encode("a") == [2, 1964]
    with pytest.raises(CheckpointError, match="absent"):
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="absent")


def test_an_unknown_token_may_be_called_control_as_in_the_files_of_gemma_3(tmp_path):
    made = small()
    made.pairs = without(made, "tokenizer.ggml.token_type")
    made.pairs.append(pair("tokenizer.ggml.token_type", 9, (5, [3, 3, 3, 3, 1, 1])))
    path = tmp_path / "x.gguf"
    path.write_bytes(made.bytes())
    for kind in (GemmaTokenizer, GemmaTokenizerFast):
        tokenizer = kind.from_pretrained(path)
        assert tokenizer.unk_token_id == 3
        assert tokenizer.encode("\u4e00", add_special_tokens=False) == [3]
