"""EmbeddingModel's own laws; what it shares with sentence-transformers is held in tests/parity."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_embedding
import torch
from tiny_embedding import TEXTS

from gemmakit import AutoModelForCausalLM, EmbeddingModel
from gemmakit.errors import CheckpointError, InputError, UnsafeFile

CLOSE = 2e-6  # sums over a padded batch run in another order than alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_embedding.make(tmp_path_factory.mktemp("embedding"))


@pytest.fixture(scope="module")
def model(folder) -> EmbeddingModel:
    return EmbeddingModel.from_pretrained(folder)


@pytest.mark.parametrize("size", [1, 2, 32])
def test_a_vector_does_not_depend_on_batch_mates_nor_on_their_order(model, size):
    alone = np.stack([model.encode(text) for text in TEXTS])
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=size), alone, atol=CLOSE)
    np.testing.assert_allclose(model.encode(TEXTS[::-1], batch_size=size), alone[::-1], atol=CLOSE)


def test_truncated_vectors_are_the_first_numbers_with_length_one(model):
    whole, short = model.encode(TEXTS, normalize_embeddings=False), model.encode(TEXTS, truncate_dim=7)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=CLOSE)
    np.testing.assert_allclose(
        short, whole[:, :7] / np.linalg.norm(whole[:, :7], axis=1, keepdims=True), atol=CLOSE
    )  # fmt: skip
    for wrong in (0, 25, True):
        with pytest.raises(InputError, match=r"truncate_dim is .*at most 24"):
            model.encode("x", truncate_dim=wrong)


def test_one_text_gives_a_row_and_none_an_empty_matrix(model):
    assert model.encode("x").shape == (24,)
    assert model.encode([], truncate_dim=5).shape == (0, 5)
    assert isinstance(model.encode("x", convert_to_numpy=False), torch.Tensor)
    with pytest.raises(InputError, match="item 1 is a int"):
        model.encode(["x", 3])


def test_a_prompt_stands_before_the_text(model):
    np.testing.assert_array_equal(model.encode_query("x"), model.encode(tiny_embedding.PROMPTS["query"] + "x"))
    np.testing.assert_array_equal(model.encode_document("x"), model.encode("x", prompt_name="document"))
    np.testing.assert_array_equal(model.encode_query("x", prompt=""), model.encode("x", prompt_name="plain"))
    with pytest.raises(InputError, match="prompt_name is 'quiz'; this model has 'query', 'document', 'plain'"):
        model.encode("x", prompt_name="quiz")


def test_what_is_over_the_limit_is_not_read(model):
    long = "word " * 200
    np.testing.assert_array_equal(model.encode(long), model.encode(long + "and a different end"))


def test_half_precision_points_the_same_way(folder, model):
    for dtype in (torch.float16, torch.bfloat16):
        half = EmbeddingModel.from_pretrained(folder, dtype=dtype)
        assert half.model.dtype == dtype
        assert half.similarity(half.encode(TEXTS), model.encode(TEXTS)).diagonal().min() > 0.995


def test_saving_and_loading_changes_no_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    np.testing.assert_array_equal(EmbeddingModel.from_pretrained(tmp_path).encode(TEXTS), model.encode(TEXTS))


def test_a_model_without_a_head_generates_nothing(folder):
    with pytest.raises(InputError, match=r"Gemma3TextModel.*EmbeddingModel"):
        AutoModelForCausalLM.from_pretrained(folder)


FAULTS = {
    "an activation by a foreign name": ("2_Dense/config.json", "activation_function", "os.system", CheckpointError),
    "another width": ("3_Dense/config.json", "in_features", 95, CheckpointError),
    "weights of another shape": ("3_Dense/config.json", "out_features", 23, CheckpointError),
    "a residual": ("2_Dense/config.json", "use_residual", True, CheckpointError),
    "another pooling": ("1_Pooling/config.json", "pooling_mode_max_tokens", True, CheckpointError),
    "no similarity": ("config_sentence_transformers.json", "similarity_fn_name", "taste", CheckpointError),
    "prompts that are no texts": ("config_sentence_transformers.json", "prompts", {"query": 3}, CheckpointError),
    "no room": ("sentence_bert_config.json", "max_seq_length", 0, CheckpointError),
    "a path that leaves": ("modules.json", 2, {"path": "../2_Dense", "type": "x.Dense"}, UnsafeFile),
    "an absolute path": ("modules.json", 0, {"path": "/etc", "type": "x.Transformer"}, UnsafeFile),
    "a step without a path": ("modules.json", 1, {"type": "x.Pooling"}, CheckpointError),
    "an unknown step": ("modules.json", 4, {"path": "4_LSTM", "type": "x.LSTM"}, CheckpointError),
    "a step that is no object": ("modules.json", 4, "Normalize", CheckpointError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_by_what_is_wrong(tmp_path, fault):
    file, key, value, error = FAULTS[fault]
    path = tiny_embedding.make(tmp_path) / file
    values = json.loads(path.read_text())
    values[key] = value
    tiny_embedding.write(path, values)
    with pytest.raises(error) as raised:
        EmbeddingModel.from_pretrained(tmp_path)
    assert any(
        str(part) in str(raised.value) for part in (key, value, "pooling", "must have a type", "LSTM", "refused")
    )


def test_a_folder_of_another_layout_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no modules\.json.*AutoModel"):
        EmbeddingModel.from_pretrained(tmp_path)
