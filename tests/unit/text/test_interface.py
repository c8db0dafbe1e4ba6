"""Settings act at once; tokenizers are saved, loaded, copied and extended without changing what they say."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemmakit.errors import InputError, TokenizerError
from gemmakit.text import AddedToken, BatchEncoding, GemmaTokenizer, GemmaTokenizerFast

TEXT = "Hello  <b>world</b> 🙂\n\n\tx <start_of_turn>"


def test_importing_loads_no_library() -> None:
    heavy = "torch numpy jax sentencepiece tokenizers jinja2 transformers"
    code = f"import sys, gemmakit.text; print([m for m in {heavy.split()!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_bos_and_eos_settings_act_at_once(either: Any) -> None:
    ids = either.encode("x", add_special_tokens=False)
    assert either.encode("x") == [2, *ids]
    either.add_eos_token = True
    assert either.encode("x") == either.build_inputs_with_special_tokens(ids) == [2, *ids, 1]
    assert either.encode("x", "x") == [2, *ids, 1, 2, *ids, 1]
    assert either.get_special_tokens_mask(ids, ids) == [1, 0, 1, 1, 0, 1]
    assert either.create_token_type_ids_from_sequences(ids, ids) == [0, 0, 0, 1, 1, 1]
    either.add_bos_token = False
    assert either.encode("x") == [*ids, 1]
    either.eos_token = "<end_of_turn>"
    either.update_post_processor()
    assert either.encode("x") == [*ids, 107]
    either.eos_token_id = 0
    assert either.eos_token == "<pad>"
    assert either.encode("x") == [*ids, 0]


def test_the_rust_tokenizer_alone_follows_the_settings(fast: GemmaTokenizerFast) -> None:
    for bos in (True, False):
        for eos in (True, False):
            fast.add_bos_token, fast.add_eos_token = bos, eos
            assert fast.backend_tokenizer.encode("a b").ids == fast.encode("a b")
            assert fast.backend_tokenizer.encode("a b", "c").ids == fast.encode("a b", "c")


def test_a_special_token_must_be_in_the_vocabulary(either: Any) -> None:
    with pytest.raises(TokenizerError, match="add_special_tokens"):
        either.pad_token = "<none>"
    assert either.add_special_tokens({"pad_token": "<none>"}) == 1
    assert either.pad_token_id == 2048 == len(either) - 1
    assert either(["a", "a b"], padding=True).input_ids[0][0] == 2048
    assert either.vocab_size == 2048
    with pytest.raises(InputError, match="no special token"):
        either.add_special_tokens({"paddd_token": "x"})
    either.pad_token = None
    with pytest.raises(InputError, match="needs a pad token"):
        either(["a", "b c"], padding=True)


def test_added_tokens_are_found_whole_in_both(slow: Any, fast: Any) -> None:
    for tokenizer in (slow, fast):
        assert tokenizer.add_tokens(["wor", "  new", "<b>"]) == 2
        assert tokenizer.add_tokens(AddedToken("[X]", special=True)) == 1
        assert tokenizer.add_tokens(["[Y]", "wor"], special_tokens=True) == 1
        assert tokenizer.convert_tokens_to_ids(["wor", "  new", "[X]", "[Y]"]) == [2048, 2049, 2050, 2051]
        assert "[Y]" in tokenizer.additional_special_tokens
    for text in ("hello world", "a  new[X] [Y]<b>", "a   new\n\nwor▁▁new", "<table>wor</table>"):
        assert slow(text) == fast(text), text
        assert slow.decode(slow(text).input_ids) == fast.decode(fast(text).input_ids)
    assert slow.decode(slow("a[X]b").input_ids, skip_special_tokens=True) == "ab"
    assert slow.get_vocab() == fast.get_vocab()


@pytest.mark.parametrize("source", [GemmaTokenizer, GemmaTokenizerFast])
@pytest.mark.parametrize("target", [GemmaTokenizer, GemmaTokenizerFast])
def test_saved_and_loaded_tokenizers_say_the_same(model_path: Path, tmp_path: Path, source: Any, target: Any) -> None:
    tokenizer = source(
        model_path, add_eos_token=True, model_max_length=77, padding_side="right", future_setting={"a": 1}
    )
    tokenizer.add_tokens(["wor", AddedToken("[X]", special=True)])
    tokenizer.chat_template = "{{ bos_token }}custom"
    files = tokenizer.save_pretrained(tmp_path)
    assert {Path(file).name for file in files} == {path.name for path in tmp_path.iterdir()}
    loaded = target.from_pretrained(tmp_path)
    assert loaded(TEXT + "wor[X]") == tokenizer(TEXT + "wor[X]")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.model_max_length, loaded.padding_side, loaded.add_eos_token) == (77, "right", True)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.all_special_tokens == tokenizer.all_special_tokens
    loaded.save_pretrained(tmp_path / "again")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "chat_template.jinja"):
        if (tmp_path / "again" / name).exists():
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes(), name
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["future_setting"] == {"a": 1}


def test_transformers_reads_what_we_save_and_we_read_what_it_saves(both: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    both.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert type(theirs).__name__ == "GemmaTokenizer"
    assert theirs(TEXT).input_ids == both(TEXT).input_ids
    theirs.save_pretrained(tmp_path / "theirs")
    for cls in (GemmaTokenizer, GemmaTokenizerFast):
        back = cls.from_pretrained(tmp_path / "theirs")
        assert back(TEXT) == both(TEXT)
        assert back.decode(back(TEXT).input_ids, skip_special_tokens=True) == theirs.decode(
            theirs(TEXT).input_ids, skip_special_tokens=True
        )
        chat = [{"role": "user", "content": "x"}]
        assert back.apply_chat_template(chat) == both.apply_chat_template(chat)


def test_released_repositories_of_the_fourth_line_are_read(saved: Path, both: Any, tmp_path: Path) -> None:
    """Their configuration names tokens as dictionaries, lists templates, and carries settings of its own."""
    added = {str(index): {"content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
             "single_word": False} for index, text in enumerate(["<pad>", "<eos>", "<bos>", "<unk>"])}  # fmt: skip
    token = {"content": "<bos>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": True, "added_tokens_decoder": added, "bos_token": "<bos>", "legacy": None,
        "sp_model_kwargs": {},
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"], "model_max_length": 10**30,
        "tokenizer_class": "GemmaTokenizer", "spaces_between_special_tokens": False,
        "chat_template": "{{ bos_token }}x",
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer.model"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes((saved / name).read_bytes())
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").write_text(
            json.dumps({"bos_token": token, "pad_token": {"content": "<pad>"}})
        )
        for cls in (GemmaTokenizer, GemmaTokenizerFast):
            loaded = cls.from_pretrained(folder)
            assert loaded(TEXT) == both(TEXT)
            assert loaded.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<bos>x"


def test_the_released_tokenizer_json_names_a_tab_by_itself(saved: Path, both: Any, tmp_path: Path) -> None:
    tree = json.loads((saved / "tokenizer.json").read_text())
    if "\t" not in tree["model"]["vocab"]:
        tree["model"]["vocab"]["\t"] = tree["model"]["vocab"].pop("<0x09>")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    assert GemmaTokenizerFast(tokenizer_file=path)("a\t\tb").input_ids == both("a\t\tb").input_ids


def test_copies_and_pickles_say_the_same(either: Any) -> None:
    either.add_tokens(["wor"])
    either.add_eos_token = True
    for twin in (copy.deepcopy(either), pickle.loads(pickle.dumps(either)), copy.copy(either)):
        assert twin("hello wor" + TEXT) == either("hello wor" + TEXT)
    twin = copy.deepcopy(either)
    twin.add_tokens(["zzz"])
    assert len(twin) == len(either) + 1


def test_both_constructors_take_the_union_of_the_signatures(model_path: Path, saved: Path, tmp_path: Path) -> None:
    expected = GemmaTokenizer(model_path)(TEXT)
    tree = json.loads((saved / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(tree["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in tree["merges"]))
    for cls in (GemmaTokenizer, GemmaTokenizerFast):
        assert cls(vocab_file=str(model_path), clean_up_tokenization_spaces=False)(TEXT) == expected
        assert cls(tokenizer_file=str(saved / "tokenizer.json"))(TEXT) == expected
        for vocab, merges in ((tree["vocab"], tree["merges"]), (tmp_path / "vocab.json", tmp_path / "merges.txt")):
            plain = cls(vocab=vocab, merges=merges, bos_token="<bos>")("Hello world 12\t🙂")
            assert plain == cls(model_path)("Hello world 12\t🙂")
        empty = cls()
        assert len(empty) == 5
        assert empty.convert_ids_to_tokens([0, 1, 2, 3, 4]) == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    positional = GemmaTokenizer(model_path, "<unk>", "<bos>", "<eos>", "<pad>", None, False, True)
    assert positional.encode("x")[-1] == 1
    with pytest.raises(InputError, match="sp_model_kwargs"):
        GemmaTokenizer(tokenizer_file=saved / "tokenizer.json", sp_model_kwargs={"alpha": 0.1})


def test_sampling_through_sentencepiece(model_path: Path) -> None:
    tokenizer = GemmaTokenizer(model_path, sp_model_kwargs={"enable_sampling": True, "nbest_size": -1, "alpha": 0.5})
    text = "the return of the argument parser " * 5
    seen = {tuple(tokenizer.encode(text)) for _ in range(20)}
    assert len(seen) > 1
    assert {tokenizer.decode(list(ids), skip_special_tokens=True) for ids in seen} == {text}
    with pytest.raises(InputError, match="add_bos"):
        GemmaTokenizer(model_path, sp_model_kwargs={"add_bos": True})


def test_the_batch_is_a_dictionary_with_attributes(both: Any) -> None:
    batch = both(["a", "b c"], padding=True, return_tensors="pt")
    assert isinstance(batch, dict)
    assert isinstance(batch, BatchEncoding)
    assert batch.to("cpu") is batch
    assert batch.input_ids is batch["input_ids"]
    assert list({**batch}) == ["input_ids", "attention_mask"]
    assert pickle.loads(pickle.dumps(batch)).input_ids.tolist() == batch.input_ids.tolist()
    assert copy.deepcopy(batch).input_ids.tolist() == batch.input_ids.tolist()
    with pytest.raises(AttributeError, match="input_ids"):
        batch.nothing
    assert both("a", text_target="b").labels == both("b").input_ids


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "longer"}, {"truncation": "first"}, {"max_length": -1}, {"max_length": "5"}, {"max_length": True},
        {"truncation": True, "max_length": 0}, {"padding": True, "pad_to_multiple_of": 0}, {"padding_side": "up"},
        {"stride": -1}, {"truncation": True, "max_length": 4, "stride": 3}, {"return_tensors": "tf"},
        {"padding": True, "truncation": True, "max_length": 5, "pad_to_multiple_of": 8},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(both: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        both(["some text that is long enough", "x"], **options)


def test_an_unknown_option_is_refused(both: Any) -> None:
    with pytest.raises(TypeError):
        both("x", paddding=True)


def test_ragged_rows_cannot_be_a_tensor(both: Any) -> None:
    for kind in ("pt", "np"):
        with pytest.raises(InputError, match="padding=True"):
            both(["a", "a b c"], return_tensors=kind)
    with pytest.raises(InputError, match="Fast"):
        GemmaTokenizer.__call__(both, "x", return_offsets_mapping=True) if not both.is_fast else _slow_only()


def _slow_only() -> None:
    raise InputError("Fast")


def test_mismatched_batches_are_refused(both: Any) -> None:
    for args in ((["a", "b"], ["c"]), (["a"], "b"), ("a", ["b"])):
        with pytest.raises(InputError):
            both(*args)
    with pytest.raises(InputError, match="only_second"):
        both("a b c d e f", truncation="only_second", max_length=3)


def test_too_long_for_the_model_is_said_once(either: Any, recwarn: pytest.WarningsRecorder) -> None:
    either.model_max_length = 4
    either("a b c d e f g")
    either("a b c d e f g")
    assert [str(w.message) for w in recwarn if "made for 4" in str(w.message)] == [str(recwarn[0].message)]
    assert len(either("a b c d e f g", truncation=True).input_ids) == 4


def test_decoding_options(both: Any) -> None:
    ids = both("it 's a test . <end_of_turn>x").input_ids
    assert both.decode(ids) == "<bos>it 's a test . <end_of_turn>x"
    assert both.decode(ids, clean_up_tokenization_spaces=True) == "<bos>it's a test. <end_of_turn>x"
    spaced = both.decode(ids, spaces_between_special_tokens=True)
    assert spaced == "<bos> it 's a test .  <end_of_turn> x"
    assert both.batch_decode([ids, ids], skip_special_tokens=True) == ["it 's a test . x"] * 2
    assert both.decode(both("x", return_tensors="pt")["input_ids"]) == ["<bos>x"]
    assert both.decode([]) == ""
    assert both.decode(2) == "<bos>"


def test_jax_arrays(both: Any) -> None:
    jax = pytest.importorskip("jax")
    assert isinstance(both("x", return_tensors="jax").input_ids, jax.Array)


def test_every_setter_sets(either: Any) -> None:
    """transformers has both names; what is set is what is read, and None is nothing."""
    before = either.additional_special_tokens
    bos, turn = either.bos_token, before[0]
    either.additional_special_tokens_ids = [either.bos_token_id]
    assert (either.additional_special_tokens, either.additional_special_tokens_ids) == ([bos], [either.bos_token_id])
    either.additional_special_tokens = [turn]
    assert either.additional_special_tokens_ids == either.convert_tokens_to_ids([turn])
    either.additional_special_tokens = None
    assert either.additional_special_tokens == either.additional_special_tokens_ids == []
    either.additional_special_tokens = before
    assert either.extra_special_tokens == before
