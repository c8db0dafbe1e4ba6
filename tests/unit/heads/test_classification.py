"""The classification heads: pooling, checkpoints of other classes, refused labels, and a task they learn."""

from __future__ import annotations

import math

import pytest
import torch

from gemmakit import GemmaConfig
from gemmakit.errors import CheckpointError, ConfigError, InputError, TokenOutOfRange
from gemmakit.pytorch.heads import GemmaForCausalLM, GemmaForSequenceClassification, GemmaForTokenClassification
from gemmakit.pytorch.model import GemmaModel

HEADS = [GemmaForSequenceClassification, GemmaForTokenClassification]


def config(**more) -> GemmaConfig:
    base = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=64, num_labels=3)  # fmt: skip
    return GemmaConfig(**{**base, **more})


def model(cls=GemmaForSequenceClassification, **more):
    torch.manual_seed(0)
    return cls(config(**more)).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(0))


# -- pooling ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_scores_as_it_does_alone(side, ids):
    m = model()
    alone = [m(ids[i : i + 1, : 6 - i]).logits for i in range(3)]
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i in range(3):
        place = slice(0, 6 - i) if side == "right" else slice(i, 6)
        padded[i, place], mask[i, place] = ids[i, : 6 - i], 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    together = m(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_are_pooled_by_the_mask(side, ids):
    m = model()
    mask = torch.ones_like(ids)
    mask[1, slice(4, 6) if side == "right" else slice(0, 2)] = 0
    by_ids = m(ids.masked_fill(mask == 0, 0), attention_mask=mask).logits
    embeds = m.get_input_embeddings()(ids.masked_fill(mask == 0, 0))
    torch.testing.assert_close(m(inputs_embeds=embeds, attention_mask=mask).logits, by_ids)


@torch.no_grad()
def test_without_a_pad_token_the_mask_says_where_padding_is(ids):
    m = model(pad_token_id=None)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    pooled = m(ids, attention_mask=mask).logits
    torch.testing.assert_close(pooled[1:2], m(ids[1:2, :4]).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pad", [None, -1])
def test_several_rows_with_nothing_to_tell_padding_are_refused(pad, ids):
    m = model(pad_token_id=pad)
    with pytest.raises(ValueError, match=r"3 rows, and nothing says where padding is.*pad_token_id.*attention_mask"):
        m(ids)
    assert m(ids[:1]).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="inputs_embeds have no ids"):
        model()(inputs_embeds=torch.zeros(2, 4, 16))
    assert m(inputs_embeds=torch.zeros(1, 4, 16)).logits.shape == (1, 3)


@torch.no_grad()
def test_a_row_of_nothing_but_padding_is_refused_by_number(ids):
    ids[1] = 0
    with pytest.raises(InputError, match="row 1 of the batch is all padding"):
        model()(ids)


@torch.no_grad()
@pytest.mark.parametrize("pad", [0, None])
def test_inputs_without_a_token_are_refused(pad):
    m = model(pad_token_id=pad)
    for arguments in ({"input_ids": torch.zeros(1, 0).long()}, {"inputs_embeds": torch.zeros(2, 0, 16)}):
        with pytest.raises(InputError, match="no token to classify"):
            m(**arguments)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pad_token_that_the_mask_shows_is_text(ids, side):
    """The end token is the pad token of many: a text that ends in it is scored there. transformers never does."""
    m = model()
    m.config.pad_token_id = int(ids[1, 2])
    padded, mask = torch.full_like(ids, m.config.pad_token_id), torch.zeros_like(ids)
    place = slice(0, 3) if side == "right" else slice(3, 6)
    padded[1, place], mask[1, place] = ids[1, :3], 1
    padded[0], mask[0] = ids[0], 1
    both = m(padded[:2], attention_mask=mask[:2]).logits
    m.config.pad_token_id = 0
    torch.testing.assert_close(both[1:], m(ids[1:2, :3]).logits, atol=1e-5, rtol=1e-4)


def test_a_masked_token_is_padding_whatever_its_id(ids):
    m = model()
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    torch.testing.assert_close(m(ids, attention_mask=mask).logits[1:2], m(ids[1:2, :3]).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("legacy", [True, False], ids=["tuple", "cache"])
def test_a_cached_prefix_gives_the_same_logits(cls, legacy, ids):
    m = model(cls)
    cache = m.model(ids[:, :4]).past_key_values
    out = m(ids[:, 4:], past_key_values=cache.to_legacy_cache() if legacy else cache)
    whole = m(ids).logits
    torch.testing.assert_close(out.logits, whole if cls is HEADS[0] else whole[:, 4:], atol=1e-5, rtol=1e-4)
    if cls is HEADS[0]:
        assert isinstance(out.past_key_values, tuple if legacy else type(cache))


# -- inputs and outputs -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cls", HEADS)
def test_outputs_read_by_name_key_and_index_and_as_a_tuple(cls, ids):
    m = model(cls)
    labels = torch.zeros((3,) if cls is HEADS[0] else (3, 6), dtype=torch.long)
    out = m(ids, labels=labels, output_hidden_states=True, output_attentions=True)
    assert out["loss"] is out.loss is out[0]
    assert out.logits is out[1]
    assert out.loss.shape == () and out.loss.dtype == torch.float32
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert ("past_key_values" in out) == (cls is HEADS[0])
    plain = m(ids, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], m(ids).logits)


@pytest.mark.parametrize("cls", HEADS)
def test_exactly_one_of_ids_and_embeddings(cls, ids):
    m = model(cls)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(3, 6, 16)}):
        with pytest.raises(ValueError, match="exactly one"):
            m(**arguments)


@pytest.mark.parametrize("cls", HEADS)
def test_a_token_outside_the_vocabulary_is_named(cls, ids):
    for bad in (50, -1):
        ids[2, 3] = bad
        with pytest.raises(TokenOutOfRange, match=rf"{bad} .*50 ids"):
            model(cls)(ids)


@pytest.mark.parametrize("cls", HEADS)
def test_labels_are_checked(cls, ids):
    m = model(cls)
    shape = (3,) if cls is HEADS[0] else (3, 6)
    good = torch.zeros(shape, dtype=torch.long)
    for value in (3, -1, -101):
        bad = good.clone()
        bad[0] = value
        with pytest.raises(InputError, match=f"label {value} "):
            m(ids, labels=bad)
    with pytest.raises(InputError, match=r"labels has shape \(2"):
        m(ids, labels=good[:2])
    with pytest.raises(InputError, match="shape"):
        m(ids, labels=torch.zeros(3, 5, dtype=torch.long))


def test_real_valued_labels_are_checked(ids):
    multi = model(problem_type="multi_label_classification")
    with pytest.raises(InputError, match=r"label 1\.5 .*from 0 to 1"):
        multi(ids, labels=torch.full((3, 3), 1.5))
    with pytest.raises(InputError, match="shape"):
        multi(ids, labels=torch.zeros(3))
    regression = model(num_labels=1)
    with pytest.raises(InputError, match=r"nan.*finite"):
        regression(ids, labels=torch.tensor([0.0, math.nan, 1.0]))
    with pytest.raises(InputError, match="whole numbers"):
        model(problem_type="single_label_classification")(ids, labels=torch.zeros(3))
    with pytest.raises(InputError, match="whole numbers"):
        model(GemmaForTokenClassification)(ids, labels=torch.zeros(3, 6))


@pytest.mark.parametrize("cls", HEADS)
def test_an_impossible_head_is_refused_on_construction(cls):
    with pytest.raises(ConfigError, match="problem_type is 'guess'"):
        model(cls, problem_type="guess")
    with pytest.raises(ConfigError, match=r"classifier_dropout is 1\.5"):
        model(cls, classifier_dropout=1.5)
    with pytest.raises(ConfigError, match="num_labels is 0"):
        model(cls, num_labels=0)


def test_token_dropout_is_the_configured_one():
    assert model(GemmaForTokenClassification).dropout.p == 0.1
    assert model(GemmaForTokenClassification, classifier_dropout=0.3).dropout.p == 0.3
    assert model(GemmaForTokenClassification, classifier_dropout=0).dropout.p == 0


# -- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("source", [GemmaModel, GemmaForCausalLM])
def test_a_head_starts_fresh_on_a_base_or_causal_checkpoint_and_says_so(cls, source, tmp_path):
    base = model(source)
    base.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"score\.weight.*freshly initialised"):
        loaded = cls.from_pretrained(tmp_path, num_labels=5)
    assert loaded.score.weight.shape == (5, 16)
    assert 0 < loaded.score.weight.std() < 0.1
    for name, tensor in base.base_model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_a_base_model_opens_a_classifier_and_says_what_it_leaves(tmp_path):
    model(GemmaForTokenClassification).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"score\.weight, score\.bias not used by GemmaModel"):
        GemmaModel.from_pretrained(tmp_path)


def test_a_fresh_bias_leaves_the_stored_weight_alone(tmp_path):
    stored = model()
    stored.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"score\.bias not in the checkpoint"):
        loaded = GemmaForTokenClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.score.weight, stored.score.weight)
    assert torch.equal(loaded.score.bias, torch.zeros(3))


def test_a_head_of_another_size_is_refused_unless_asked_for(tmp_path):
    model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"score\.weight has shape \(3, 16\).*\(7, 16\)"):
        GemmaForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    with pytest.warns(UserWarning, match="freshly initialised"):
        m = GemmaForSequenceClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert m.score.weight.shape == (7, 16)


@pytest.mark.parametrize("cls", HEADS)
def test_a_saved_head_comes_back_equal(cls, tmp_path, recwarn):
    m = model(cls, problem_type="single_label_classification", id2label={0: "a", 1: "b"}, num_labels=None)
    m.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert not recwarn.list
    assert again.config.id2label == {0: "a", 1: "b"} and again.config.problem_type == "single_label_classification"
    for name, tensor in m.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


# -- training -----------------------------------------------------------------------------------------------------


def train(m, batches, steps=120):
    optimizer = torch.optim.AdamW(m.parameters(), lr=5e-3)
    m.train()
    for step in range(steps):
        ids, mask, labels = batches(step)
        optimizer.zero_grad()
        m(ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    return m.eval()


def padded_batch(step, rows=32, length=8):
    """Random ids 10..49, padded on the left by 0 to 3."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(10, 50, (rows, length), generator=g)
    mask = (torch.arange(length) >= torch.randint(0, 4, (rows, 1), generator=g)).long()
    return ids * mask, mask


def test_fine_tuning_learns_which_mark_a_sequence_holds():
    def batches(step):
        ids, mask = padded_batch(step)
        labels = torch.arange(ids.shape[0]) % 3
        ids[torch.arange(ids.shape[0]), 3 + torch.arange(ids.shape[0]) % 5] = labels + 5
        return ids, mask, labels

    m = train(model(), batches)
    ids, mask, labels = batches(10_000)  # never trained on
    with torch.no_grad():
        accuracy = (m(ids, attention_mask=mask).logits.argmax(-1) == labels).float().mean()
    assert accuracy >= 0.9, f"accuracy {accuracy:.2f}, chance is 0.33"


def test_fine_tuning_learns_a_label_a_token():
    def batches(step):
        ids, mask = padded_batch(step)
        return ids, mask, torch.where(mask == 0, -100, ids % 3)

    m = train(model(GemmaForTokenClassification), batches, steps=60)
    ids, mask, labels = batches(10_000)
    with torch.no_grad():
        right = m(ids, attention_mask=mask).logits.argmax(-1) == labels
    accuracy = right[mask.bool()].float().mean()
    assert accuracy >= 0.95, f"accuracy {accuracy:.2f}, chance is 0.33"
