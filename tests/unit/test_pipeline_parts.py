"""What transformers' pipelines offer beside a call: the call's parts, data sets, older names, folders."""

import pytest
import torch
import transformers
from tiny_checkpoint import make, tiny_config

import gemmakit
from gemmakit import pipeline
from gemmakit.errors import InputError, PromptTooLong

TEXTS = ["def add(", "class Longer(Base):", "import os"]
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "LOC"}
CHAT = [{"role": "user", "content": "What is 1 + 1?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"), max_position_embeddings=64)


@pytest.fixture(scope="module")
def pipes(folder):
    torch.manual_seed(0)
    tokenizer = gemmakit.AutoTokenizer.from_pretrained(folder)
    kinds = {
        "text-classification": gemmakit.GemmaForSequenceClassification(tiny_config(num_labels=3)),
        "token-classification": gemmakit.GemmaForTokenClassification(tiny_config(id2label=LABELS)),
    }
    made = {task: pipeline(task, model=model.eval(), tokenizer=tokenizer) for task, model in kinds.items()}
    for task in ("text-generation", "feature-extraction"):
        made[task] = pipeline(task, str(folder), device=-1)
    return made


# The options of a call, and the parts that they belong to.
OPTIONS = {
    "text-generation": ({"prefix": "a "}, {"max_new_tokens": 4}, {"return_full_text": False, "prefix": "a "}),
    "text-classification": ({"truncation": True}, {}, {"top_k": 2, "function_to_apply": "sigmoid"}),
    "token-classification": ({"truncation": True}, {}, {"aggregation_strategy": "simple", "ignore_labels": []}),
    "feature-extraction": ({"tokenize_kwargs": {"add_special_tokens": False}}, {}, {"return_tensors": False}),
}


@pytest.mark.parametrize("task", OPTIONS)
def test_the_parts_of_a_call_make_it_up(task, pipes):
    pipe, parts = pipes[task], OPTIONS[task]
    for text in TEXTS:
        before, during, after = parts
        made = pipe.postprocess(pipe.forward(pipe.preprocess(text, **before), **during), **after)
        called = pipe(text, **{name: value for part in parts for name, value in part.items()})
        assert str(made) == str(called)
    assert pipe.predict(TEXTS[:1]) and str(pipe.transform(TEXTS[:1])) == str(pipe(TEXTS[:1]))
    assert pipe.dtype == pipe.torch_dtype == torch.float32


@pytest.mark.parametrize("task", OPTIONS)
def test_a_data_set_is_read_item_by_item(task, pipes):
    class Rows(torch.utils.data.Dataset):
        read = 0

        def __len__(self):
            return len(TEXTS)

        def __getitem__(self, index):
            Rows.read += 1
            return {"text": TEXTS[index]}

    pipe = pipes[task]
    options = OPTIONS[task][1]
    results = pipe(transformers.pipelines.pt_utils.KeyDataset(Rows(), "text"), batch_size=2, num_workers=2, **options)
    assert Rows.read == 0
    first = next(results)
    assert Rows.read == 2
    assert str([first, *results]) == str(pipe(TEXTS, batch_size=2, **options))
    with pytest.raises(InputError, match="num_workers is -1"):
        pipe(TEXTS, num_workers=-1)


@pytest.mark.parametrize("task", OPTIONS)
def test_a_pipeline_is_saved_whole(task, pipes, tmp_path):
    pipe, options = pipes[task], OPTIONS[task][1]
    pipe.save_pretrained(tmp_path)
    again = pipeline(task, str(tmp_path), device=-1, dtype=torch.float32)
    assert str(again(TEXTS, **options)) == str(pipe(TEXTS, **options))


def test_features_are_the_decoders_last_hidden_states(pipes):
    pipe = pipes["feature-extraction"]
    ids = pipe.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipe.model(ids).last_hidden_state
    assert torch.equal(pipe(TEXTS[0], return_tensors=True), expected)
    assert pipe(TEXTS[0]) == expected.tolist()
    head = pipeline("feature-extraction", model=gemmakit.GemmaForCausalLM(pipe.model.config), tokenizer=pipe.tokenizer)
    assert head(TEXTS[0], return_tensors=True).shape == expected.shape
    assert pipe(" ".join(TEXTS * 9), truncation=True, return_tensors=True).shape[1] == 64
    with pytest.raises(InputError, match="truncation is given twice"):
        pipe(TEXTS[0], truncation=True, tokenize_kwargs={"truncation": False})


def test_older_names_of_options_mean_what_they_meant(pipes):
    pipe = pipes["text-classification"]
    assert pipe(TEXTS, return_all_scores=True) == pipe(TEXTS, top_k=None)
    assert pipe(TEXTS, return_all_scores=False) == pipe(TEXTS)
    pipe = pipes["token-classification"]
    for given, meant in (
        ({"grouped_entities": True}, "simple"),
        ({"grouped_entities": True, "ignore_subwords": True}, "first"),
        ({"grouped_entities": False}, "none"),
    ):
        assert pipe(TEXTS, **given) == pipe(TEXTS, aggregation_strategy=meant)


@pytest.mark.parametrize(
    ("task", "given", "said"),
    [
        ("text-classification", {"return_all_scores": True, "top_k": 2}, "top_k is 2"),
        ("token-classification", {"aggregation_strategy": "max", "ignore_subwords": False}, "aggregation_strategy"),
        ("feature-extraction", {"tokenize_kwargs": {"return_tensors": "pt"}}, "tokenize_kwargs has return_tensors"),
        ("text-generation", {"tokenizer_encode_kwargs": {"return_dict": False}}, "which the pipeline decides"),
    ],
)
def test_options_that_contradict_one_another_are_refused(task, given, said, pipes):
    with pytest.raises(InputError, match=said):
        pipes[task](TEXTS, **given)


def test_the_parts_of_a_call_refuse_the_options_that_it_refuses(pipes):
    with pytest.raises(InputError, match="max_new_tokns"):
        pipes["text-generation"].preprocess(TEXTS[0], max_new_tokns=5)


def test_encoding_and_stopping_are_told_by_the_names_of_transformers(pipes):
    pipe = pipes["text-generation"]
    plain = pipe(TEXTS[0], max_new_tokens=8, return_tensors=True)[0]["generated_token_ids"]
    assert pipe(text_inputs=TEXTS[0], max_new_tokens=8, return_tensors=True)[0]["generated_token_ids"] == plain
    bare = pipe(TEXTS[0], max_new_tokens=1, return_tensors=True, tokenizer_encode_kwargs={"add_special_tokens": False})
    assert bare[0]["generated_token_ids"][0] == plain[1] != plain[0]
    text = pipe(TEXTS[0], max_new_tokens=8, return_full_text=False)[0]["generated_text"]
    stop = text[len(text) // 2]
    stopped = pipe(TEXTS[0], max_new_tokens=8, return_full_text=False, stop_sequence=stop)[0]["generated_text"]
    assert stop in stopped and text.startswith(stopped) and len(stopped) < len(text)
    chat = pipe(CHAT, max_new_tokens=2, tokenizer_encode_kwargs={"documents": None})
    assert chat == pipe(CHAT, max_new_tokens=2)
    with pytest.raises(InputError, match="tokenizer_encode_kwargs has return_tensors"):
        pipe(TEXTS[0], tokenizer_encode_kwargs={"return_tensors": "pt"})


def test_a_long_prompt_is_cut_on_its_left_where_that_is_asked_for(pipes):
    pipe, long = pipes["text-generation"], " ".join(TEXTS * 9)
    ids = pipe.tokenizer(long)["input_ids"]
    assert len(ids) > 64
    with pytest.raises(PromptTooLong):
        pipe(long, max_new_tokens=10)
    made = pipe(long, max_new_tokens=10, handle_long_generation="hole", return_tensors=True)[0]["generated_token_ids"]
    assert made[:54] == [pipe.tokenizer.bos_token_id, *ids[-53:]] and len(made) <= 64
    short = pipe(TEXTS[0], max_new_tokens=10)
    assert pipe(TEXTS[0], max_new_tokens=10, handle_long_generation="hole") == short
    with pytest.raises(InputError, match="handle_long_generation is 'x'"):
        pipe(long, handle_long_generation="x")
    with pytest.raises(PromptTooLong, match="nothing of a prompt fits"):
        pipe(long, max_new_tokens=64, handle_long_generation="hole")
