"""Where transformers itself has a fault that a law of ours is held against, it is written down here.

Of caches, packed rows and entities the tests of those laws say it: test_continuing, test_targets,
test_pipelines_match_transformers.
"""

import warnings

import pytest
import torch
import transformers

import gemmakit
from gemmakit.errors import InputError, TemplateError

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"


@pytest.fixture(scope="module")
def name():
    return str(gemmakit.demo_model())


@pytest.fixture(scope="module")
def tokenizers(name):
    return [library.AutoTokenizer.from_pretrained(name) for library in (gemmakit, transformers)]


def written(tokenizer, content, template=TEMPLATE, **options):
    chat = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template, **options)


def test_parts_of_a_text_are_written_into_the_prompt_as_python_prints_them(tokenizers):
    """With a template that knows strings alone, as Gemma 1's own does. transformers has the fault."""
    ours, theirs = tokenizers
    parts = [{"type": "text", "text": "Hi"}]
    assert written(theirs, parts) == f"<bos>[user] {parts}\n"
    assert written(ours, parts) == written(ours, "Hi") == written(theirs, "Hi")


@pytest.mark.parametrize(("content", "shown"), [(3, "3"), (None, "")])
def test_what_is_no_text_becomes_some_text(tokenizers, content, shown):
    """transformers has the fault."""
    ours, theirs = tokenizers
    assert written(theirs, content) == f"<bos>[user] {shown}\n"
    with pytest.raises(TemplateError, match="it must be a text"):
        written(ours, content)


def test_special_tokens_are_set_and_stay_what_they_were(tokenizers):
    """transformers 5 takes the names for attributes of anything. It has the fault; what it reads is another name."""
    ours, theirs = tokenizers
    before = theirs.all_special_ids
    theirs.additional_special_tokens_ids = [5]
    assert theirs.all_special_ids == before
    kept = ours.additional_special_tokens_ids
    ours.additional_special_tokens_ids = [5]
    try:
        assert 5 in ours.all_special_ids
    finally:
        ours.additional_special_tokens_ids = kept


def test_scores_asked_of_a_pipeline_are_given_or_refused(name, tokenizers):
    """transformers dropped them once and gives them today; a text is all that ours gives, and it says so."""
    found = []
    for library, tokenizer in zip((gemmakit, transformers), tokenizers, strict=True):
        model = library.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        pipe = library.pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=2, do_sample=False)
        found.append(pipe)
    asked = dict(return_dict_in_generate=True, output_scores=True)
    with pytest.raises(InputError, match="gives texts"):
        found[0]("If the", **asked)
    (theirs,) = found[1]("If the", **asked)
    assert theirs["generated_text"] == found[0]("If the")[0]["generated_text"]
    assert "scores" in theirs


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    fields = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                  num_key_value_heads=1, head_dim=8, num_labels=3)  # fmt: skip
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    gemmakit.GemmaForSequenceClassification(gemmakit.GemmaConfig(**fields, initializer_range=0.3)).save_pretrained(
        folder
    )
    return [kind.GemmaForSequenceClassification.from_pretrained(folder).eval() for kind in (gemmakit, transformers)]


@torch.no_grad()
def test_a_pad_token_that_the_mask_shows_is_left_out(classifiers):
    """A text that ends in the pad token is scored before its end. transformers has the fault."""
    ids = torch.tensor([[2, 5, 6]])
    for model, scored in zip(classifiers, (-1, -2), strict=True):
        logits = model.score(model.model(ids).last_hidden_state)[0]
        before, model.config.pad_token_id = model.config.pad_token_id, 6
        found = model(ids, attention_mask=torch.ones_like(ids)).logits[0]
        model.config.pad_token_id = before
        torch.testing.assert_close(found, logits[scored], rtol=1e-5, atol=1e-6)


def test_a_mean_over_nothing_is_nan_and_nothing_is_said(name):
    """transformers has the fault: ours is NaN too, and says why."""
    ids = torch.tensor([[2, 5, 6]])
    for library in (gemmakit, transformers):
        model = library.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert model(ids, labels=torch.full_like(ids, -100)).loss.isnan()
        assert [str(w.message) for w in said if "nothing is left to learn" in str(w.message)] == (
            [] if library is transformers else [str(said[0].message)]
        )


def test_the_whitespace_of_a_template_stays_before_a_text_that_is_continued(tokenizers):
    """The text's own goes where the template trims it, and no further. transformers does not have the fault."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}]
    for template, end in ((TEMPLATE, "[assistant] b"), (TEMPLATE.replace(" | trim", ""), "[assistant]  b ")):
        texts = [
            t.apply_chat_template(chat, tokenize=False, chat_template=template, continue_final_message=True)
            for t in tokenizers
        ]
        assert texts[0].endswith(end) and texts[0] == texts[1]
