"""langchain asks a gemmakit model through transformers' pipeline, whole and streaming."""

import pytest
import transformers
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture
def llm(model, tokenizer):
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=6, do_sample=False)
    return HuggingFacePipeline(pipeline=pipe)


def expected(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_it_answers_as_the_model_does(llm, model, tokenizer):
    assert llm.bind(skip_prompt=True).invoke("If the file") == expected(model, tokenizer, "If the file")
    assert "".join(llm.stream("If the file")) == expected(model, tokenizer, "If the file")


def test_it_chats(llm, tokenizer):
    answer = ChatHuggingFace(llm=llm, tokenizer=tokenizer).invoke("What is 3 + 4?")
    assert isinstance(answer.content, str) and answer.content
