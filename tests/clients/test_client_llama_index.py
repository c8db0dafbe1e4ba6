"""llama-index asks a gemmakit model, whole and streaming."""

from llama_index.llms.huggingface import HuggingFaceLLM


def test_it_answers_as_the_model_does(model, tokenizer):
    llm = HuggingFaceLLM(
        model=model, tokenizer=tokenizer, context_window=256, max_new_tokens=6, generate_kwargs={"do_sample": False}
    )
    ids = tokenizer("If the file", return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    assert llm.complete("If the file").text == expected
    assert [*llm.stream_complete("If the file")][-1].text == expected
