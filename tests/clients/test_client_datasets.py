"""datasets maps texts through a gemmakit tokenizer, remembers it by its content, and feeds a pipeline."""

import datasets
import transformers
from datasets.fingerprint import Hasher

import gemmakit

TEXTS = ["If the file is there", "Return the first word", "What", "And the other"]


def test_a_tokenizer_is_mapped_in_other_processes_and_known_again(tokenizer, name, tmp_path):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    made = rows.map(lambda batch: tokenizer(batch["text"]), batched=True, num_proc=2)
    assert made["input_ids"] == tokenizer(TEXTS)["input_ids"]
    again = gemmakit.AutoTokenizer.from_pretrained(name)
    assert Hasher.hash(tokenizer) == Hasher.hash(again)
    again.add_tokens(["<new>"])
    assert Hasher.hash(tokenizer) != Hasher.hash(again)


def test_rows_go_through_a_pipeline(model, tokenizer):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    pipe = gemmakit.pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=3)
    expected = [pipe(text) for text in TEXTS]
    assert [*pipe(rows["text"], batch_size=2)] == expected
    from transformers.pipelines.pt_utils import KeyDataset

    assert [*pipe(KeyDataset(rows, "text"), batch_size=2)] == expected
    assert isinstance(KeyDataset(rows, "text"), transformers.pipelines.pt_utils.Dataset)
