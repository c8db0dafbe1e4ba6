"""Where a chat template is kept: in a file of its own, in tokenizer_config.json, or several there."""

import json

import pytest
import transformers

from gemmakit.errors import InputError

CHAT = [{"role": "user", "content": "x"}]
SEVERAL = {"default": "{{ bos_token }}d", "tool_use": "{{ bos_token }}t"}


def test_a_template_is_kept_where_it_is_asked_to_be_and_read_from_there(either, tmp_path):
    either.chat_template = "{{ bos_token }}one"
    either.save_pretrained(tmp_path)
    either.chat_template = "{{ bos_token }}two"
    files = either.save_pretrained(tmp_path, save_jinja_files=False)
    assert not (tmp_path / "chat_template.jinja").exists() and not any("jinja" in name for name in files)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == either.chat_template
    for loaded in (type(either).from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.apply_chat_template(CHAT, tokenize=False) == "<bos>two"


def test_several_templates_are_all_saved(either, tmp_path):
    either.chat_template = SEVERAL
    either.save_pretrained(tmp_path)
    for loaded in (type(either).from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)):
        for name, said in (("default", "<bos>d"), ("tool_use", "<bos>t")):
            assert loaded.apply_chat_template(CHAT, chat_template=name, tokenize=False) == said
    again = type(either).from_pretrained(tmp_path)
    assert again.chat_template == SEVERAL


def test_arguments_of_saving_that_ask_for_what_is_done_are_accepted(either, tmp_path):
    either.save_pretrained(tmp_path, legacy_format=False, save_raw_chat_template=True)
    for wrong in ({"legacy_format": True}, {"save_raw_chat_template": False}, {"no_such": 1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            either.save_pretrained(tmp_path, **wrong)


@pytest.mark.parametrize("argument", ["replace_extra_special_tokens", "replace_additional_special_tokens"])
def test_additional_special_tokens_are_replaced_or_kept(either, argument):
    either.add_special_tokens({"additional_special_tokens": ["<one>"]})
    either.add_special_tokens({"additional_special_tokens": ["<two>"]}, **{argument: False})
    assert either.additional_special_tokens == ["<one>", "<two>"]
    either.add_special_tokens({"extra_special_tokens": ["<three>"]}, **{argument: True})
    assert either.additional_special_tokens == ["<three>"]
    assert either.convert_tokens_to_ids("<one>") != either.unk_token_id
