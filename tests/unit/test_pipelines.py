"""pipeline(): the shapes transformers gives, one <bos>, and rows that do not know of each other."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path

import pytest
import torch
from gemma4_form import make as make_gemma4_form
from tiny_checkpoint import make

import gemmakit
from gemmakit import TextGenerationPipeline, TextIteratorStreamer, pipeline
from gemmakit.errors import GenerationConfigError, InputError, PromptTooLong

TEXTS = ["def add(", "class Longer(Base):\n    x = 1", "", "import os"]
CHAT = [{"role": "user", "content": "What is 1 + 1?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny"), max_position_embeddings=64)


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("text-generation", str(folder), device=-1, max_new_tokens=6)


def test_a_chat_of_text_parts_is_answered_as_one_of_strings(pipe):
    parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    answer = pipe(CHAT)[0]["generated_text"][-1]
    assert pipe(parts)[0]["generated_text"] == [*parts, answer]
    begun = {"role": "assistant", "content": "It "}
    whole = pipe([*CHAT, begun])[0]["generated_text"][-1]["content"]
    begun = {"role": "assistant", "content": [{"type": "text", "text": "It "}]}
    assert pipe([*parts, begun])[0]["generated_text"][-1]["content"] == [{"type": "text", "text": whole}]


def test_a_chat_ends_with_its_turn(pipe):
    ends = pipe.model.generation_config.eos_token_ids
    assert pipe.turn_ends() == {"eos_token_id": [*ends, *{pipe.tokenizer.end_of_turn_id}.difference(ends)]}


def test_shapes_of_results(pipe):
    one = pipe("def add(")
    assert isinstance(one, list)
    assert list(one[0]) == ["generated_text"]
    assert one[0]["generated_text"].startswith("def add(")
    assert pipe(["def add(", ""]) == [one, pipe("")]
    assert pipe([]) == []
    two = pipe("def add(", num_return_sequences=2, do_sample=True, seed=1)
    assert len(two) == 2
    answer = pipe(CHAT)[0]["generated_text"]
    assert answer[:-1] == CHAT
    assert answer[-1]["role"] == "assistant"
    assert pipe([CHAT, CHAT]) == [pipe(CHAT)] * 2
    assert pipe(CHAT, return_full_text=False)[0]["generated_text"] == answer[-1]["content"]


def test_the_text_is_the_prompt_itself_and_the_decoded_continuation(pipe):
    for text in TEXTS:
        ids = pipe.tokenizer(text, return_tensors="pt").input_ids
        new = pipe.model.generate(ids, max_new_tokens=6)[0, ids.shape[1] :]
        expected = pipe.tokenizer.decode(new, skip_special_tokens=True)
        assert pipe(text)[0]["generated_text"] == text + expected
        assert pipe(text, return_full_text=False)[0]["generated_text"] == expected
        assert pipe(text, return_tensors=True)[0]["generated_token_ids"] == ids[0].tolist() + new.tolist()


def test_exactly_one_bos(pipe):
    bos = pipe.tokenizer.bos_token_id
    rendered = pipe.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    with pytest.warns(UserWarning, match="already starts with the BOS"):
        rows = [pipe.encode(p) for p in (*TEXTS, CHAT, rendered, "<bos>text")]
    assert all(row[0] == bos and row.count(bos) == 1 for row in rows)
    assert rows[-3] == rows[-2]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_do_not_depend_on_batch_mates(pipe, size):
    alone = [pipe(text) for text in TEXTS]
    assert pipe(TEXTS, batch_size=size) == alone
    chats = [CHAT, [{"role": "user", "content": "A much longer question about something"}]]
    assert pipe(chats, batch_size=size) == [pipe(chat) for chat in chats]
    # Near the end of the context the default length differs from row to row.
    long = ["x = 1\n" * 7, "y", "z = 2\n" * 8]
    without = TextGenerationPipeline(pipe.model, pipe.tokenizer)
    assert without(long, batch_size=size) == [without(text) for text in long]
    limited = dict(max_length=45)
    assert without(["x = 1", "y"], batch_size=size, **limited) == [without(t, **limited) for t in ("x = 1", "y")]


def test_a_stopped_row_has_no_padding_after_it(pipe):
    texts = [t for t in TEXTS if t]
    whole = [pipe(t, return_full_text=False)[0]["generated_text"] for t in texts]
    stop = whole[0][:2]
    options = dict(stop_strings=[stop], return_tensors=True)
    assert pipe(texts, batch_size=len(texts), **options) == [pipe(t, **options) for t in texts]


def test_the_default_length_ends_with_the_context_and_a_longer_prompt_is_refused(pipe):
    without = TextGenerationPipeline(pipe.model, pipe.tokenizer)
    assert len(without("x", return_tensors=True)[0]["generated_token_ids"]) == 64
    with pytest.raises(PromptTooLong, match="context holds 64"):
        without("x = 1\n" * 40)
    with pytest.raises(PromptTooLong, match="max_new_tokens is 100"):
        without("x", max_new_tokens=100)


def test_an_iterator_is_read_only_as_far_as_asked(pipe):
    read = []

    def endless():
        for number in count():
            read.append(number)
            yield f"x{number}"

    results = pipe(endless(), batch_size=2)
    assert read == []
    assert list(islice(results, 3)) == [pipe(f"x{i}") for i in range(3)]
    assert len(read) == 4


def test_a_last_message_of_the_assistant_is_continued(pipe):
    begun = [*CHAT, {"role": "assistant", "content": "It is"}]
    whole = pipe(begun)[0]["generated_text"]
    assert [m["role"] for m in whole] == ["user", "assistant"]
    assert whole[-1]["content"].startswith("It is")
    assert pipe.encode(begun)[-1] not in (107, 108)


def test_a_streamer_sees_every_prompt_in_turn(pipe):
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, timeout=5, skip_special_tokens=True)
    results = pipe(TEXTS[:2], streamer=streamer, return_full_text=False, batch_size=2)
    for result in results:
        assert "".join(streamer) == result[0]["generated_text"]


def test_settings_go_to_generate_and_unknown_ones_are_refused(pipe):
    assert pipe("x", max_new_tokens=2, return_tensors=True)[0]["generated_token_ids"][2:].__len__() == 2
    with pytest.raises(GenerationConfigError, match="max_new_token"):
        pipe("x", max_new_token=3)
    with pytest.raises(GenerationConfigError, match="temperature"):
        pipe("x", temperature=-1.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(task="dance"), "gemmakit has text-generation"),
        (dict(device=0, device_map="auto"), "device and device_map"),
        (dict(device="moon"), "device is 'moon': there is no such device"),
        pytest.param(
            dict(device=0),
            "device 0 asks for",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="runs where there is no accelerator"),
        ),
        (dict(framework="tf"), "framework"),
        (dict(batch_size=0), "batch_size is 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(folder, arguments, said):
    with pytest.raises(InputError, match=said):
        pipeline(**{"task": "text-generation", "model": str(folder), **arguments})("x")


@pytest.mark.parametrize("inputs", [3, b"bytes", {"role": "user"}, [3], ["x", CHAT, None]])
def test_inputs_that_are_no_prompts_are_refused(pipe, inputs):
    with pytest.raises(InputError, match="text-generation takes a text or a chat"):
        pipe(inputs)


def test_a_loaded_model_finds_its_tokenizer_and_refuses_loading_arguments(folder):
    model = gemmakit.GemmaForCausalLM.from_pretrained(folder)
    pipe = pipeline("text-generation", model=model, device=torch.device("cpu"))
    assert pipe.model is model
    assert pipe("x", max_new_tokens=2)[0]["generated_text"].startswith("x")
    with pytest.raises(InputError, match="for loading"):
        pipeline("text-generation", model=model, torch_dtype=torch.bfloat16)
    fresh = gemmakit.GemmaForCausalLM(model.config)
    fresh.name_or_path = ""
    with pytest.raises(InputError, match="pass tokenizer="):
        pipeline("text-generation", model=fresh)


def test_dtype_has_two_names_and_keeps_the_files_by_default(folder):
    assert pipeline("text-generation", str(folder)).model.dtype == torch.float32
    for name in ("dtype", "torch_dtype"):
        assert pipeline("text-generation", str(folder), **{name: torch.bfloat16}).model.dtype == torch.bfloat16


def test_what_has_no_place_in_a_result_is_refused(folder, pipe):
    """transformers gives scores beside the text today, and computed and dropped them before."""
    for name in ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions"):
        with pytest.raises(InputError, match=f"{name} is True, but text-generation gives texts"):
            pipe("x", **{name: True})
        assert pipe("x", **{name: False}) == pipe("x")
        with pytest.raises(InputError, match="gives texts"):
            pipeline("text-generation", str(folder), **{name: True})


def test_what_a_pipeline_does_not_know_is_refused_when_it_is_made(folder):
    with pytest.raises(GenerationConfigError, match=r"no setting 'max_new_token'. Did you mean 'max_new_tokens'"):
        pipeline("text-generation", str(folder), max_new_token=3)


def test_a_draft_is_loaded_by_its_name(folder):
    drafted = pipeline("text-generation", str(folder), device=-1, assistant_model=str(folder), max_new_tokens=6)
    assert type(drafted.options["assistant_model"]) is type(drafted.model)
    assert drafted(TEXTS[0]) == pipeline("text-generation", str(folder), device=-1, max_new_tokens=6)(TEXTS[0])
    with pytest.raises(InputError, match=r"is a builtins.str; it must be a gemmakit causal language model"):
        pipeline("text-generation", str(folder))(TEXTS[0], assistant_model=str(folder))


def test_what_loading_takes_reaches_it(folder):
    for given in (dict(quantization_config="int8"), dict(model_kwargs=dict(quantization_config="int8"))):
        pipe = pipeline("text-generation", str(folder), device_map="cpu", **given)
        assert pipe.model.is_quantized
        with pytest.raises(InputError, match=r"quantization_config.*are for loading"):
            pipeline("text-generation", pipe.model, tokenizer=pipe.tokenizer, **given)


def test_a_chats_thoughts_and_calls_stand_beside_what_is_said(tmp_path):
    pytest.importorskip("llguidance", reason="the model is made to think by gemmakit[constrained]")
    thought = r'<|channel> "thought\nThey ask.\n" <channel|>'
    says = f'start: {thought} "Well" <|tool_call> "call:clock{{zone:" <|"|> "UTC" <|"|> "}}" <tool_call|>'
    pipe = gemmakit.pipeline("text-generation", make_gemma4_form(tmp_path / "model", says), device_map="cpu")
    chat = [{"role": "user", "content": "Time?"}]
    clock = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
    message = pipe(chat, tools=[clock])[0]["generated_text"][-1]
    called = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    assert message == {"role": "assistant", "content": "Well", "reasoning": "They ask.", "tool_calls": [called]}
    assert pipe(chat, return_full_text=False)[0] == {
        "generated_text": "Wellcall:clock{zone:UTC}",
        "reasoning": "They ask.",
    }
    variables = {"enable_thinking": True}
    thinking, plain = (pipe.encode(chat, chat_template_kwargs=kwargs) for kwargs in (variables, None))
    assert pipe.tokenizer.decode(thinking).startswith("<bos><|turn>system\n<|think|>") and thinking != plain
    with pytest.raises(InputError, match="tokenize"):
        pipe(chat, chat_template_kwargs={"tokenize": False})
