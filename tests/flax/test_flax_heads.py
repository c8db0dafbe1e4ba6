"""Classification heads against the PyTorch backend's."""

import jax
import numpy as np
import pytest
import torch
from flax_tools import apart, as_torch, batch, make_torch
from tiny_shapes import SHAPES, VOCAB

from gemmakit.errors import InputError
from gemmakit.flax import FlaxGemmaForSequenceClassification, FlaxGemmaForTokenClassification


@pytest.fixture(scope="module")
def sequence(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")
    model = make_torch("SequenceClassification", **SHAPES["mqa"], num_labels=3)
    model.save_pretrained(folder)
    return FlaxGemmaForSequenceClassification.from_pretrained(folder), model


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    folder = tmp_path_factory.mktemp("token")
    model = make_torch("TokenClassification", **SHAPES["mqa"], num_labels=5, classifier_dropout=0.3)
    model.save_pretrained(folder)
    return FlaxGemmaForTokenClassification.from_pretrained(folder), model


@pytest.mark.parametrize("labels", [
    np.array([0, 2, 1]),
    np.array([[1.0, 0.0, 1.0], [0.0, 0.25, 1.0], [0.0, 0.0, 0.0]], np.float32),
], ids=["classes", "several"])  # fmt: skip
@pytest.mark.parametrize("padding", ["left", "right"])
def test_sequences_are_scored_as_by_pytorch(sequence, padding, labels):
    ours, theirs = sequence
    ids, mask = batch(padding)
    with torch.no_grad():
        expected = theirs(as_torch(ids), as_torch(mask), labels=as_torch(labels))
    for seen in (mask, None):  # without a mask the pad token tells where the text ends, on the right
        if seen is None and padding == "left":
            continue
        out = ours(ids, seen, labels=labels)
        assert apart(out.logits, expected.logits) < 1e-5
        assert float(out.loss) == pytest.approx(float(expected.loss), rel=1e-5)


def test_regression_is_pytorchs(tmp_path):
    model = make_torch("SequenceClassification", **SHAPES["mqa"], num_labels=1)
    model.save_pretrained(tmp_path)
    ours = FlaxGemmaForSequenceClassification.from_pretrained(tmp_path)
    ids, mask = batch("right")
    labels = np.array([0.5, -1.0, 2.0], np.float32)
    expected = model(as_torch(ids), as_torch(mask), labels=as_torch(labels)).loss
    assert float(ours(ids, mask, labels=labels).loss) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_tokens_are_scored_as_by_pytorch(token):
    ours, theirs = token
    ids, mask = batch("left")
    labels = np.where(mask, ids % 5, -100)
    with torch.no_grad():
        expected = theirs(as_torch(ids), as_torch(mask), labels=as_torch(labels))
    out = ours(ids, mask, labels=labels)
    assert apart(out.logits, expected.logits, mask) < 1e-5
    assert float(out.loss) == pytest.approx(float(expected.loss), rel=1e-5)


def test_dropout_is_drawn_from_the_key_in_training_alone(token):
    ours, _ = token
    ids, mask = batch("left")
    keys = jax.random.split(jax.random.PRNGKey(0))
    first, again, other = (
        np.asarray(ours(ids, mask, train=True, dropout_rng=k).logits) for k in (keys[0], keys[0], keys[1])
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    with pytest.raises(InputError, match="dropout_rng"):
        ours(ids, mask, train=True)


def test_what_cannot_be_scored_is_refused(sequence, token):
    ids, mask = batch("left")
    model = sequence[0]
    with pytest.raises(InputError, match="row 1 of the batch is all padding"):
        model(ids, mask * np.array([[1], [0], [1]]))
    with pytest.raises(InputError, match="label 3 is not one of 3"):
        model(ids, mask, labels=np.array([0, 1, 3]))
    with pytest.raises(InputError, match="labels has shape"):
        model(ids, mask, labels=np.zeros((3, 2), np.float32))
    with pytest.raises(InputError, match="from 0 to 1"):
        model(ids, mask, labels=np.full((3, 3), 1.5, np.float32))
    with pytest.raises(InputError, match="labels are float"):
        token[0](ids, mask, labels=mask.astype(np.float32))
    model.config.pad_token_id = None
    with pytest.raises(InputError, match="nothing says where padding is"):
        model(ids)
    model.config.pad_token_id = 0


@pytest.mark.parametrize("layout", ["left", "right", "packed"])
def test_the_loss_of_a_batch_is_that_of_its_rows(both, layout):
    """float32, sums in another order."""
    model = both().flax
    rows = [np.random.randint(4, VOCAB, (1, length)) for length in (8, 5)]
    alone = sum(float(model(row, labels=row).loss) * (row.shape[1] - 1) for row in rows) / 11
    if layout == "packed":
        ids = np.concatenate(rows, axis=1)
        position_ids = np.concatenate([np.arange(8), np.arange(5)])[None]
        loss = model(ids, position_ids=position_ids, labels=ids).loss
    else:
        pad = (3, 0) if layout == "left" else (0, 3)
        ids = np.concatenate([rows[0], np.pad(rows[1], ((0, 0), pad))])
        mask = np.concatenate([np.ones((1, 8), int), np.pad(np.ones((1, 5), int), ((0, 0), pad))])
        loss = model(ids, attention_mask=mask, labels=np.where(mask == 0, -100, ids)).loss
    assert float(loss) == pytest.approx(alone, rel=1e-5)
