"""Vectors against sentence-transformers' of the same folder; without the package, against those it gave once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_embedding

from gemmakit import EmbeddingModel

RECORDED = Path(__file__).parent / "fixtures" / "embeddings.json"
# Numbers of vectors of length 1, after three layers in float32 whose sums run in another order.
CLOSE = 2e-5
CASES = {
    "no prompt": dict(),
    "a prompt by name": dict(prompt_name="query"),
    "its words": dict(prompt="words, of any kind: "),
    "truncated": dict(prompt_name="document", truncate_dim=10),
}


@pytest.mark.parametrize("include_prompt", [True, False], ids=["prompt in the mean", "prompt left out"])
@pytest.mark.parametrize("case", CASES)
def test_vectors_equal_the_recorded_ones(tmp_path, case, include_prompt):
    ours = EmbeddingModel.from_pretrained(tiny_embedding.make(tmp_path, include_prompt=include_prompt))
    theirs = json.loads(RECORDED.read_text())[f"{case}, {include_prompt}"]
    np.testing.assert_allclose(ours.encode(tiny_embedding.TEXTS, **CASES[case]), theirs, atol=CLOSE)


@pytest.mark.parametrize("include_prompt", [True, False], ids=["prompt in the mean", "prompt left out"])
@pytest.mark.parametrize("steps", [2, 4, 5])
def test_vectors_equal_theirs_also_after_saving(tmp_path, include_prompt, steps):
    theirs = reference(tiny_embedding.make(tmp_path / "a", include_prompt=include_prompt, steps=steps, default="query"))
    ours = EmbeddingModel.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b")
    again = reference(tmp_path / "b")
    for options in CASES.values():
        expected = theirs.encode(tiny_embedding.TEXTS, normalize_embeddings=True, **options)
        np.testing.assert_allclose(ours.encode(tiny_embedding.TEXTS, **options), expected, atol=CLOSE)
        np.testing.assert_allclose(
            again.encode(tiny_embedding.TEXTS, normalize_embeddings=True, **options), expected, atol=CLOSE
        )
    for name in ("encode_query", "encode_document"):
        expected = getattr(theirs, name)(tiny_embedding.TEXTS, normalize_embeddings=True)
        np.testing.assert_allclose(getattr(ours, name)(tiny_embedding.TEXTS), expected, atol=CLOSE)


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities_equal_theirs(tmp_path, kind):
    theirs = reference(tiny_embedding.make(tmp_path))
    ours = EmbeddingModel.from_pretrained(tmp_path)
    theirs.similarity_fn_name = ours.similarity_fn_name = kind
    a = ours.encode(tiny_embedding.TEXTS)
    np.testing.assert_allclose(ours.similarity(a, a[:2]), theirs.similarity(a, a[:2]), atol=1e-4)  # roots near zero


def reference(folder: Path):
    package = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    return package.SentenceTransformer(str(folder), device="cpu")


def record(folder: Path) -> None:
    """Write the recorded vectors anew: python tests/parity/test_embedding_matches_sentence_transformers.py FOLDER."""
    found = {}
    for include_prompt in (True, False):
        theirs = reference(tiny_embedding.make(folder / str(include_prompt), include_prompt=include_prompt))
        for case, options in CASES.items():
            vectors = theirs.encode(tiny_embedding.TEXTS, normalize_embeddings=True, **options)
            found[f"{case}, {include_prompt}"] = [[round(float(x), 6) for x in row] for row in vectors]
    RECORDED.write_text(json.dumps(found))


if __name__ == "__main__":
    import sys

    record(Path(sys.argv[1]))
