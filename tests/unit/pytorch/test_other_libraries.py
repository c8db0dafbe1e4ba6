"""What other libraries ask of models, configurations and caches by the names that transformers gives it."""

import json

import pytest
import torch
import transformers
from tiny_gemma import left_padded, prompts, tiny, tiny_config

import gemmakit

MODEL = tiny()


def test_a_model_says_what_it_is(tmp_path):
    MODEL.save_pretrained(tmp_path)
    theirs = transformers.GemmaForCausalLM.from_pretrained(tmp_path)
    for name in ("main_input_name", "base_model_prefix", "supports_gradient_checkpointing"):
        assert getattr(MODEL, name) == getattr(theirs, name), name
    assert MODEL.config_class is gemmakit.GemmaConfig
    assert MODEL.can_generate() and not MODEL.model.can_generate()
    assert MODEL.get_decoder() is MODEL.model and MODEL.model.get_decoder() is MODEL.model
    attention = MODEL.model.layers[0].self_attn
    assert attention.num_key_value_groups == theirs.model.layers[0].self_attn.num_key_value_groups == 2
    assert MODEL(**MODEL.dummy_inputs).logits.shape == (3, 5, MODEL.config.vocab_size)
    MODEL.add_model_tags("a")
    MODEL.add_model_tags(["a", "b"])
    assert MODEL.model_tags == ["a", "b"]


def test_a_decoder_is_exchanged():
    one, other = tiny(seed=1), tiny(seed=2)
    one.set_decoder(other.model)
    assert torch.equal(one.model(prompts()).last_hidden_state, other.model(prompts()).last_hidden_state)
    with pytest.raises(gemmakit.errors.InputError, match="is a decoder itself"):
        other.model.set_decoder(one.model)


def test_a_library_that_steps_the_model_gets_the_tokens_of_generate():
    """By prepare_inputs_for_generation and what comes after it, as those do that have loops of their own."""
    ids, mask = left_padded([prompts(rows=1, width=n, seed=n)[0] for n in (9, 4)], 9)
    expected = MODEL.generate(ids, attention_mask=mask, max_new_tokens=5, eos_token_id=None)
    given = dict(attention_mask=mask, past_key_values=gemmakit.DynamicCache(), use_cache=True)
    for _ in range(5):
        out = MODEL(**MODEL.prepare_inputs_for_generation(ids, **given))
        ids = torch.cat((ids, out.logits[:, -1:].argmax(-1)), 1)
        given = MODEL._update_model_kwargs_for_generation(out, given)
    assert torch.equal(ids, expected)


def test_a_configuration_is_read_and_written_by_those_names(tmp_path):
    config = tiny_config(rms_norm_eps=1e-5)
    config.to_json_file(tmp_path / "config.json")
    assert gemmakit.GemmaConfig.from_json_file(tmp_path / "config.json") == config
    values, rest = gemmakit.GemmaConfig.get_config_dict(tmp_path, other=1)
    assert (values, rest) == (json.loads((tmp_path / "config.json").read_text()), {"other": 1})
    assert gemmakit.GemmaConfig.from_dict(config.to_diff_dict()) == config
    assert "rms_norm_eps" in config.to_diff_dict() and "attention_bias" not in config.to_diff_dict()
    assert config.get_text_config() is config.get_text_config(decoder=True) is config
    assert "hidden_size" in config and "hidden_sizes" not in config
    assert config.is_encoder_decoder is False
    config._attn_implementation = "eager"
    assert config.attn_implementation == config._attn_implementation == "eager"


def test_generation_settings_are_written_by_those_names(tmp_path):
    config = gemmakit.GenerationConfig(max_new_tokens=4, num_beams=2)
    config.validate(strict=True)
    config.to_json_file(tmp_path / "generation_config.json")
    assert gemmakit.GenerationConfig.from_pretrained(tmp_path) == config
    assert config.to_diff_dict() == config.to_dict()


@torch.no_grad()
def test_a_cache_is_taken_apart_and_put_together_again():
    """With what it knows of padding: each part goes on as the whole does."""
    ids, mask = left_padded([prompts(rows=1, width=n, seed=n)[0] for n in (9, 4, 6)], 9)
    cache = gemmakit.DynamicCache()
    assert not cache.is_initialized
    MODEL.generate(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, max_new_tokens=1)
    assert cache.is_initialized and not cache.is_compileable
    assert torch.equal(cache.key_cache[1], cache[1][0]) and torch.equal(cache.value_cache[1], cache[1][1])
    assert cache.get_mask_sizes(3) == (11, 0)
    parts = cache.batch_split(3, 2)
    assert [len(part[0][0]) for part in parts] == [2, 1]
    asked = dict(max_new_tokens=4, eos_token_id=None)
    expected = MODEL.generate(ids, attention_mask=mask, **asked)[:, -4:]
    whole = gemmakit.DynamicCache.from_batch_splits(parts)
    assert torch.equal(MODEL.generate(ids[:, -1:], past_key_values=whole, **asked)[:, -4:], expected)
    for part, rows in zip(parts, (slice(0, 2), slice(2, 3)), strict=True):
        got = MODEL.generate(ids[rows, -1:], past_key_values=part, **asked)[:, -4:]
        assert torch.equal(got, expected[rows])


def test_a_list_of_criteria_knows_its_length():
    criteria = [gemmakit.MaxLengthCriteria(9), gemmakit.EosTokenCriteria(1), gemmakit.MaxLengthCriteria(7)]
    assert gemmakit.StoppingCriteriaList(criteria).max_length == 7
    assert gemmakit.StoppingCriteriaList(criteria[1:2]).max_length is None


def test_numbers_that_a_model_tells_follow_its_changes():
    model = tiny()
    assert model.model.vocab_size == model.vocab_size == model.config.vocab_size
    model.resize_token_embeddings(140)
    assert model.model.vocab_size == model.vocab_size == 140
    model.prune_heads({1: [0, 2]})
    groups = [layer.self_attn.num_key_value_groups for layer in model.model.layers]
    assert groups == [2, 1]
    model.prune_heads({0: [2, 3]})
    assert model.model.layers[0].self_attn.num_key_value_groups == 2


def test_constraints_are_stepped_by_hand():
    """As transformers' are, which 4.46 still has; what one remembers changes nothing for generate()."""
    phrase = gemmakit.PhrasalConstraint([5, 6, 7])
    assert (phrase.seqlen, phrase.remaining(), phrase.advance(), phrase.completed) == (3, 3, 5, False)
    assert phrase.does_advance(5) and not phrase.does_advance(6)
    assert [phrase.update(token) for token in (5, 6)] == [(True, False, False)] * 2
    assert phrase.copy().remaining() == 3 and phrase.copy(stateful=True).remaining() == phrase.remaining() == 1
    assert phrase.update(9) == (False, False, True) and phrase.remaining() == 3
    assert [phrase.update(token) for token in (5, 6, 7)][-1] == (True, True, False)
    assert phrase.completed and phrase.advance() is None and phrase.remaining() == 0
    choice = gemmakit.DisjunctiveConstraint([[5, 6], [5, 8, 9], [3]])
    assert (choice.seqlen, choice.advance(), choice.remaining()) == (3, [5, 3], 3)
    choice.update(5)
    assert (choice.advance(), choice.current_seq, choice.remaining()) == ([6, 8], [5], 2)
    assert choice.update(6) == (True, True, False)
    choice.reset()
    assert choice.update(3) == (True, True, False) and choice.advance() is None
    asked = dict(constraints=[choice], num_beams=2, max_new_tokens=4, eos_token_id=None)
    out = MODEL.generate(prompts(), **asked)
    choice.reset()
    assert torch.equal(MODEL.generate(prompts(), **asked), out)
    with pytest.raises(gemmakit.errors.GenerationConfigError, match="token_id is 'a'"):
        choice.does_advance("a")


@pytest.mark.parametrize("kind", ["CausalLM", "SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_model_of_shapes_alone_tells_shapes(kind, masked):
    """Made on "meta", where no label, mask or pad token has a number to look at."""
    with torch.device("meta"):
        model = getattr(gemmakit, f"GemmaFor{kind}")(tiny_config(num_labels=3))
        ids, mask = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long) if masked else None
        labels = torch.zeros(2, dtype=torch.long) if kind == "SequenceClassification" else ids
        out = model(ids, attention_mask=mask, labels=labels)
    assert out.loss.shape == () and out.logits.shape[0] == 2
