"""A stream gives what generate() gives, as it comes: tokens, why they end, scores, text; it may be left anywhere."""

import time

import pytest
import torch
from strategy_models import ALL, ONE, left_padded, model, read_late, rows, settings

from gemmakit.errors import InputError, NumericalError, PromptTooLong
from gemmakit.pytorch.cache import DynamicCache

pytestmark = pytest.mark.filterwarnings("ignore")
every_strategy = pytest.mark.parametrize("name", ALL)
SEARCHES = [name for name in ALL if name.startswith(("beam", "diverse", "constrained"))]
streamed_strategy = pytest.mark.parametrize("name", [name for name in ALL if name not in SEARCHES])
IDS = torch.tensor(rows(6))


def alone(name, **more):
    """Settings of a strategy with one result."""
    return {**settings(name, **more), "num_return_sequences": 1}


@pytest.fixture(params=["at once", "late"])
def queue(request, monkeypatch):
    if request.param == "late":
        read_late(monkeypatch)


# -- a stream is generate() ------------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("eos", [[], [1, 7, 12, 15], list(range(8, 40, 2))])
def test_tokens_and_reasons_are_those_of_generate(name, eos, queue):
    given = alone(name, eos_token_id=eos)
    whole = model().generate(IDS, **given)[0, 6:].tolist()
    events = list(model().stream(IDS, **given))
    assert [e.token for e in events] == whole
    assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == ("eos" if whole[-1] in eos else "length")
    assert all(e.text == "" and e.scores is None for e in events)


@every_strategy
def test_scores_are_those_of_generate(name, queue):
    given = alone(name, output_scores=True)
    out = model().generate(IDS, return_dict_in_generate=True, **given)
    events = list(model().stream(IDS, **given))
    if name in SEARCHES:  # a search's steps are not those of its results
        assert all(e.scores is None for e in events)
        return
    assert len(events) == len(out.scores)
    assert all(torch.equal(e.scores, s[0]) for e, s in zip(events, out.scores, strict=True))


@every_strategy
def test_a_criterion_ends_with_stop_and_time_with_length(name):
    def at_four(ids, scores):
        return torch.full((len(ids),), ids.shape[1] >= 10)

    given = alone(name, eos_token_id=[])
    events = list(model().stream(IDS, stopping_criteria=[at_four], **given))
    assert (len(events), events[-1].finish_reason) == (4, "stop")
    timed = list(model().stream(IDS, max_time=1e-9, **given))
    assert timed[-1].finish_reason == "length"
    assert len(timed) < 9


@every_strategy
def test_steps_of_all_rows_are_generate_without_padding(name, queue):
    ids, mask = left_padded(rows(7) if name in ONE else rows(7, 4, 6))
    for seed in range(3):
        given = settings(name, max_new_tokens=12, eos_token_id=[1, 7, *range(10 + seed, 30, 3)])
        whole = model().generate(ids, attention_mask=mask, **given)[:, ids.shape[1] :].tolist()
        found, last = [[] for _ in whole], None
        for step in model().stream_rows(ids, attention_mask=mask, **given):
            for tokens, new, before in zip(found, step.tokens, last or [None] * len(found), strict=True):
                assert not (before and new), "a token after the end"
                tokens += new
            last = step.finish_reasons
        for tokens, reason, row in zip(found, last, whole, strict=True):
            assert tokens == row[: len(tokens)]
            assert set(row[len(tokens) :]) <= {0}
            assert reason == ("eos" if tokens[-1] in given["eos_token_id"] else "length")
            assert reason == "eos" or len(tokens) == 12


def test_a_row_keeps_the_first_reason_it_had():
    def odd(ids, scores):
        return ids[:, -1] % 2 == 1

    ids, mask = left_padded(rows(7, 4, 6, 9, 5))
    *_, last = model().stream_rows(
        ids, attention_mask=mask, max_new_tokens=9, eos_token_id=[12, 14], pad_token_id=12, stopping_criteria=[odd]
    )
    whole = model().generate(
        ids, attention_mask=mask, max_new_tokens=9, eos_token_id=[12, 14], pad_token_id=12, stopping_criteria=[odd]
    )
    for reason, row in zip(last.finish_reasons, whole[:, ids.shape[1] :].tolist(), strict=True):
        end = next((t for t in row if t in (12, 14) or t % 2), None)
        assert reason == ("length" if end is None else "eos" if end in (12, 14) else "stop")


def test_a_number_that_is_none_comes_after_the_tokens_before_it():
    def broken(ids, scores):
        return scores if ids.shape[1] < 9 else scores * float("nan")

    for more in ({}, dict(prompt_lookup_num_tokens=4)):
        stream = model().stream(IDS, max_new_tokens=9, logits_processor=[broken], **more)
        assert len([next(stream) for _ in range(3)]) == 3
        with pytest.raises(NumericalError, match="step 4"):
            next(stream)


# -- text ------------------------------------------------------------------------------------------------------------

UNNAMED = [*range(1018, 1030)]  # the model's ids that the tokenizer lacks


@pytest.fixture
def texts(request, tokenizer):
    """Prompts in, text and events out, of a model that has this tokenizer."""
    text_model = request.getfixturevalue("model")

    def made(prompt, skip=True, **given):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        given = dict(max_new_tokens=20, suppress_tokens=UNNAMED, tokenizer=tokenizer, **given)
        new = text_model.generate(ids, **given)[0, ids.shape[1] :].tolist()
        events = list(text_model.stream(ids, skip_special_tokens=skip, **given))
        assert [e.token for e in events] == new
        return "".join(e.text for e in events), events

    return made


@pytest.mark.parametrize("skip", [True, False])
def test_the_pieces_together_are_the_decoded_text(texts, tokenizer, skip):
    for seed in range(12):
        text, events = texts("Größe 🙂 is", skip, do_sample=True, temperature=3.0, seed=seed, top_k=0)
        tokens = [e.token for e in events if not (skip and e.finish_reason == "eos")]
        assert text == tokenizer.decode(tokens, skip_special_tokens=skip)


def test_an_end_token_has_no_text_where_special_ones_have_none(texts, tokenizer):
    _, plain = texts("import")
    end = plain[3].token
    tokens = [e.token for e in plain]
    tokens = tokens[: tokens.index(end) + 1]
    assert texts("import", eos_token_id=end)[0] == tokenizer.decode(tokens[:-1], skip_special_tokens=True)
    assert texts("import", False, eos_token_id=end)[0] == tokenizer.decode(tokens)


def test_a_stop_string_ends_with_stop_and_is_in_the_text(texts):
    text, whole = texts("import")
    stop = next(e.text for e in whole[3:] if e.text.isascii() and e.text.strip())
    said, events = texts("import", stop_strings=[stop])
    assert events[-1].finish_reason == "stop"
    assert stop in said
    assert text.startswith(said)


# -- leaving ---------------------------------------------------------------------------------------------------------


@streamed_strategy
def test_leaving_early_leaves_a_cache_that_goes_on(name, queue):
    given = alone(name, eos_token_id=[], max_new_tokens=8)
    whole = model().generate(IDS, **given)[0].tolist()
    greedy = "sample" not in name
    for count in range(1, 8):
        cache = DynamicCache()
        stream = model().stream(IDS, past_key_values=cache, **given)
        came = [next(stream).token for _ in range(count)]
        stream.close()
        assert came == whole[6 : 6 + count]
        assert cache.get_seq_length() == 6 + count - 1 or "contrastive" in name
        assert list(stream) == []
        if greedy and "contrastive" not in name:
            rest = model().generate(
                torch.tensor([whole[: 6 + count]]), past_key_values=cache, max_new_tokens=8 - count, eos_token_id=[]
            )
            assert rest[0].tolist() == whole
    assert model().generate(IDS, **given)[0].tolist() == whole


def test_nothing_is_run_that_was_not_asked_for():
    passes = []
    hook = model().model.register_forward_hook(lambda *_: passes.append(1))
    try:
        stream = model().stream(IDS, max_new_tokens=9, eos_token_id=[])
        assert not passes
        for count in range(1, 5):
            next(stream)
            assert len(passes) == count
    finally:
        hook.remove()


def test_gradients_are_off_inside_and_as_they_were_outside():
    assert torch.is_grad_enabled()
    for event in model().stream(IDS, max_new_tokens=3, output_scores=True):
        assert torch.is_grad_enabled()
        assert not event.scores.requires_grad


def test_two_streams_of_a_model_do_not_meet():
    given = dict(max_new_tokens=9, eos_token_id=[], do_sample=True)
    alone_ = [[e.token for e in model().stream(IDS, seed=s, **given)] for s in (1, 2)]
    pairs = list(zip(*(model().stream(IDS, seed=s, **given) for s in (1, 2)), strict=True))
    assert [[e.token for e in events] for events in zip(*pairs, strict=True)] == alone_


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        (dict(streamer=object()), InputError, "streamer is given to stream"),
        (dict(custom_generate=lambda *_: None), InputError, "custom_generate is given to stream"),
        (dict(num_return_sequences=2, do_sample=True), InputError, "this call has 2"),
        (dict(max_new_tokens=1000), PromptTooLong, "1000"),
        (dict(stop_strings=["x"]), InputError, "pass the tokenizer"),
    ],
)
def test_errors_come_with_the_call_not_with_the_first_token(given, kind, said):
    with pytest.raises(kind, match=said):
        model().stream(IDS, **given)


def test_a_batch_is_refused():
    ids, mask = left_padded(rows(7, 4))
    with pytest.raises(InputError, match="this call has 2"):
        model().stream(ids, attention_mask=mask)


# -- streamers are fed from it ---------------------------------------------------------------------------------------


class Told:
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.flatten().tolist())

    def end(self):
        self.heard.append("end")


@streamed_strategy
def test_a_streamer_hears_what_a_stream_gives(name, queue):
    told, given = Told(), alone(name)
    model().generate(IDS, streamer=told, **given)
    assert told.heard == [IDS[0].tolist(), *([e.token] for e in model().stream(IDS, **given)), "end"]


def test_a_streamer_hears_the_end_whatever_goes_wrong():
    for given in (dict(max_new_tokens=0), dict(num_beams=2), dict(prompt_lookup_num_tokens=3, use_cache=False)):
        told = Told()
        with pytest.raises(InputError):
            model().generate(IDS, streamer=told, **given)
        assert told.heard == ["end"]


def test_time_that_the_reader_takes_is_not_the_models():
    """A drafter measures passes; a reader that dawdles must not look like a slow pass."""
    from gemmakit.pytorch.decode.strategies.prompt_lookup import Lookup

    seconds, learn = [], Lookup.learn
    Lookup.learn = lambda self, proposed, accepted, took: (seconds.append(took), learn(self, proposed, accepted, took))
    try:
        for _ in model().stream(IDS, max_new_tokens=5, eos_token_id=[], prompt_lookup_num_tokens=3):
            time.sleep(0.2)
    finally:
        Lookup.learn = learn
    assert seconds
    assert min(seconds) < 0.2
