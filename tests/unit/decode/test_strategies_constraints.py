"""What constrained beam search promises: the phrases are there."""

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from strategy_models import VOCAB, left_padded, model, new_tokens, rows, settings

from gemmakit.errors import GenerationConfigError, TokenOutOfRange
from gemmakit.generation.constraints import Constraint, DisjunctiveConstraint, PhrasalConstraint, Progress, from_words

pytestmark = pytest.mark.filterwarnings("ignore")


def holds(tokens, phrase):
    return any(tokens[i : i + len(phrase)] == list(phrase) for i in range(len(tokens)))


WORDS = {
    "one": [[30, 31]],
    "two": [[30, 31, 32], [25]],
    "any_of": [[[30, 31], [33]], [[25, 26], [27, 28]]],
}


def decode(lists, **more):
    ids, mask = left_padded(lists)
    given = {**settings("beam"), "num_return_sequences": 1, "num_beams": 6, "max_new_tokens": 12, **more}
    return new_tokens(model().generate(ids, attention_mask=mask, **given), ids.shape[1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("words", WORDS)
def test_every_phrase_is_in_every_result(words, early, seed):
    for tokens in decode(rows(8, 5, seed=seed), force_words_ids=WORDS[words], early_stopping=early):
        for constraint in from_words(WORDS[words]):
            assert any(holds(tokens, phrase) for phrase in constraint.phrases)


def test_constraint_objects_are_the_same_as_words():
    objects = [DisjunctiveConstraint([[30, 31], [33]]), PhrasalConstraint([25, 26])]
    words = [[[30, 31], [33]], [[25, 26]]]
    assert decode(rows(8), constraints=objects) == decode(rows(8), force_words_ids=words)
    assert objects[0].token_ids == [[30, 31], [33]]
    assert objects[1].token_ids == [25, 26]


def test_a_search_too_short_for_its_phrases_gives_what_it_has():
    assert len(decode(rows(8), force_words_ids=[[30, 31, 32, 33]], max_new_tokens=2)[0]) == 2


def test_a_result_without_the_phrase_never_stands_before_one_with_it():
    ids, _ = left_padded(rows(8))
    given = {**settings("beam"), "num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 5}
    found = [holds(row, (30, 31, 32, 33)) for row in
             new_tokens(model().generate(ids, force_words_ids=[[30, 31, 32, 33]], **given), 8)]  # fmt: skip
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("ids", [[], "5", [1.0], [True], [-1], None])
def test_a_phrase_is_a_list_of_token_ids(ids):
    with pytest.raises(GenerationConfigError, match="token_ids"):
        PhrasalConstraint(ids)
    with pytest.raises(GenerationConfigError, match="token_ids"):
        DisjunctiveConstraint([ids])


def test_a_phrase_that_begins_with_another_is_refused():
    with pytest.raises(GenerationConfigError, match="begins"):
        DisjunctiveConstraint([[5, 6], [5, 6, 7]])


def test_ids_outside_the_vocabulary_are_refused():
    for wrong in (dict(force_words_ids=[[VOCAB]]), dict(constraints=[PhrasalConstraint([VOCAB])])):
        with pytest.raises(TokenOutOfRange, match=str(VOCAB)):
            decode(rows(5), **wrong)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=3, unique_by=tuple),
       st.lists(st.integers(0, 2), max_size=14))  # fmt: skip
@examples(max_examples=200, deadline=None)
def test_progress_claims_nothing_that_is_not_there(phrases, tokens):
    constraints: list[Constraint] = [PhrasalConstraint(p) for p in phrases]
    progress = Progress(tuple(constraints))
    longest = max(c.longest for c in constraints)
    for i, token in enumerate(tokens):
        wanted = token in progress.next()
        after = progress.after(token)
        assert (after.bank(longest) > progress.bank(longest)) == wanted
        progress = after
        if progress.complete:
            assert all(holds(tokens[: i + 1], p) for p in phrases)
            break
