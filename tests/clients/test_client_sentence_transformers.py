"""sentence-transformers pools what a gemmakit model gives as what transformers' gives."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, models

import gemmakit

TEXTS = ["If the file is there", "Return the first word", "What"]


@pytest.mark.usefixtures("registered")
def test_vectors_are_those_of_transformers_model(name):
    made = models.Transformer(name, model_kwargs={"dtype": torch.float32})
    made.tokenizer.padding_side = "right"
    whole = SentenceTransformer(modules=[made, models.Pooling(made.get_word_embedding_dimension())], device="cpu")
    expected = whole.encode(TEXTS)
    made.auto_model = gemmakit.AutoModel.from_pretrained(name, dtype=torch.float32)
    np.testing.assert_allclose(whole.encode(TEXTS), expected, atol=1e-4)
