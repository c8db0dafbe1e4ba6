"""Continuous batching: whoever else runs, whenever requests come and go, each gets the tokens it gets alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmakit import GemmaConfig, GemmaForCausalLM
from gemmakit.errors import (
    GenerationConfigError,
    InputError,
    NotEnoughMemory,
    NumericalError,
    PromptTooLong,
    TokenOutOfRange,
)
from gemmakit.pytorch.decode import processors
from gemmakit.pytorch.decode.batch import BatchEngine, Request, generate_batch
from gemmakit.pytorch.decode.batch.scheduler import Scheduler

VOCAB, BOS, EOS = 60, 2, 1
HEADS = [1, 2, 4]
# Logits are of size 1 to 10. Two tokens nearer than this may change places when float32 sums change their order.
TIE = 1e-4


def made(kv_heads=2, seed=0, **fields):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=kv_heads, head_dim=8, max_position_embeddings=128,
                 initializer_range=0.5, tie_word_embeddings=False)  # fmt: skip
    return GemmaForCausalLM(GemmaConfig(**{**sizes, **fields})).eval()


MODELS = {kv_heads: made(kv_heads) for kv_heads in HEADS}
model = MODELS[2]


def prompt(length, seed=0):
    return [BOS, *torch.randint(4, VOCAB, (length - 1,), generator=torch.Generator().manual_seed(seed)).tolist()]


PROMPTS = [prompt(n, seed=n) for n in (3, 11, 1, 7, 20, 5)]


def alone(model, ids, **settings):
    return model.generate(torch.tensor([ids]), **settings)[0].tolist()


def agree(model, ours, theirs, tie=TIE):
    """Equal, or parted at two tokens that are as good as equal."""
    if ours == theirs:
        return True
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        return False
    with torch.no_grad():
        logits = model(torch.tensor([ours[:at]])).logits[0, -1].float()
    return abs(float(logits[ours[at]] - logits[theirs[at]])) < tie


def check_idle(engine):
    pool = engine.scheduler.pool
    assert not engine.has_work
    assert not engine._rows
    assert pool.idle == pool.pages
    assert not any(pool._holders)


def check_pages(engine):
    pool = engine.scheduler.pool
    held = Counter(page for s in engine.scheduler.running for page in s.holding.pages)
    assert pool._holders == [held[page] for page in range(pool.pages + 1)]
    assert set(held) | set(pool._idle) == set(range(1, pool.pages + 1))
    assert not set(held) & set(pool._idle)


def run(engine):
    """Step to the end: tokens, finish reasons and errors by id."""
    tokens, reasons, errors = {}, {}, {}
    while engine.has_work:
        check_pages(engine)
        for event in engine.step():
            assert event.id not in reasons, "an event after the end"
            if event.token is not None:
                tokens.setdefault(event.id, []).append(event.token)
            if event.finish_reason:
                reasons[event.id] = event.finish_reason
                errors[event.id] = event.error
    return tokens, reasons, errors


# -- the same tokens as alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", HEADS)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_greedy_tokens_are_those_of_generate_one_at_a_time(kv_heads, attn):
    model = made(kv_heads, attn_implementation=attn)
    results = generate_batch(model, PROMPTS, max_batch_size=3, max_new_tokens=12, eos_token_id=None)
    for ids, result in zip(PROMPTS, results, strict=True):
        assert agree(model, result.ids, alone(model, ids, max_new_tokens=12, eos_token_id=None))
        assert (result.finish_reason, result.prompt_length) == ("length", len(ids))
    assert len({tuple(r.new_ids) for r in results}) == len(results), "the model does not tell the prompts apart"


SAMPLING = [
    dict(do_sample=True, seed=5, top_k=0),
    dict(do_sample=True, seed=5, temperature=1.7, top_p=0.9),
    dict(do_sample=True, seed=5, top_k=7, min_p=0.02, repetition_penalty=1.3),
]


@pytest.mark.parametrize("kv_heads", HEADS)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_sampled_tokens_depend_on_seed_and_prompt_alone(kv_heads, sampling):
    model = MODELS[kv_heads]
    results = generate_batch(model, PROMPTS + PROMPTS[:2], max_batch_size=3, max_new_tokens=10, **sampling)
    for ids, result in zip(PROMPTS + PROMPTS[:2], results, strict=True):
        assert result.ids == alone(model, ids, max_new_tokens=10, **sampling)
    other = generate_batch(model, PROMPTS, max_new_tokens=10, **{**sampling, "seed": 6})
    assert [r.ids for r in other] != [r.ids for r in results[: len(PROMPTS)]]


@st.composite
def _arrivals(draw):
    requests = []
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 18))
        # Few seeds and a common beginning, so that prefixes are shared.
        ids = prompt(length, seed=draw(st.integers(0, 1)))
        requests.append((ids, draw(st.integers(1, 10)), draw(st.integers(0, 8)), draw(st.sampled_from(SETTINGS))))
    size = draw(st.integers(1, 7))
    longest = max(-(-(len(ids) + new - 1) // size) for ids, new, _, _ in requests)
    engine = dict(
        page_size=size,
        cache_tokens=(longest + draw(st.integers(0, 8))) * size,
        max_batch_size=draw(st.integers(1, 5)),
        prefill_tokens=draw(st.integers(1, 20)),
        share_prefixes=draw(st.booleans()),
    )
    return sorted(requests, key=lambda r: r[2]), engine


SETTINGS = [
    {},
    dict(eos_token_id=list(range(3, VOCAB, 9))),
    dict(eos_token_id=list(range(3, VOCAB, 5)), min_length=9),
    dict(repetition_penalty=1.5),
    dict(no_repeat_ngram_size=2),
    dict(do_sample=True, seed=3, temperature=1.5),
    dict(do_sample=True, seed=4, top_p=0.8, repetition_penalty=1.2),
]


@pytest.mark.parametrize("kv_heads", HEADS)
@given(work=_arrivals())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_arrivals_sizes_and_settings_give_the_tokens_of_generate(kv_heads, work):
    model, (requests, sizes) = MODELS[kv_heads], work
    engine = BatchEngine(model, **sizes)
    bytes_held, steps, got, reasons = engine.nbytes, 0, {}, {}
    while engine.has_work or engine._next_id < len(requests):
        for ids, new, arrival, wanted in requests[engine._next_id :]:
            if arrival <= steps:
                engine.add(Request(ids, settings={**wanted, "max_new_tokens": new}))
        for event in engine.step():
            got.setdefault(event.id, []).append(event.token)
            reasons[event.id] = event.finish_reason
        check_pages(engine)
        assert engine.nbytes == bytes_held
        steps += 1
    check_idle(engine)
    for i, (ids, new, _, wanted) in enumerate(requests):
        expected = alone(model, ids, max_new_tokens=new, **wanted)
        if wanted.get("do_sample"):
            assert ids + got[i] == expected
        else:
            assert agree(model, ids + got[i], expected)
        assert reasons[i] in ("eos", "length")


@pytest.mark.parametrize("settings", [{}, SAMPLING[1]])
def test_rows_that_were_sent_back_go_on_with_the_same_tokens(settings):
    prompts = [prompt(9, seed=i) for i in range(4)]
    engine = BatchEngine(model, max_batch_size=4, page_size=4, cache_tokens=48, share_prefixes=False)
    for ids in prompts:
        engine.add(Request(ids, settings={"max_new_tokens": 20, "eos_token_id": None, **settings}))
    tokens, _, _ = run(engine)
    assert engine.scheduler.preemptions > 0
    for i, ids in enumerate(prompts):
        assert ids + tokens[i] == alone(model, ids, max_new_tokens=20, eos_token_id=None, **settings)
    check_idle(engine)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_by_default_there_is_room_for_whoever_runs(monkeypatch, page_size):
    def never(*_):
        raise AssertionError("sent back")

    monkeypatch.setattr(Scheduler, "_preempt", never)
    generate_batch(model, PROMPTS, max_batch_size=3, page_size=page_size, max_new_tokens=15, eos_token_id=None)


def test_shared_prefixes_spare_work_and_change_no_token():
    common = prompt(17, seed=8)
    prompts = [[*common, 10 + i] for i in range(4)]
    seen = []
    handle = model.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    try:
        results = {}
        for share in (True, False):
            seen.clear()
            results[share] = generate_batch(
                model, prompts, max_batch_size=1, page_size=4, share_prefixes=share, max_new_tokens=5
            )
            results[share] = [r.ids for r in results[share]], sum(seen)
    finally:
        handle.remove()
    assert results[True][0] == results[False][0] == [alone(model, ids, max_new_tokens=5) for ids in prompts]
    assert results[False][1] - results[True][1] == 3 * 16, "three prompts find four pages of four tokens"


def test_half_precision_agrees_up_to_near_ties():
    """bfloat16 keeps 8 bits: logits of size 8 are rounded to steps of 1/32, and a batch may round another way."""
    half = made(2).bfloat16()
    results = generate_batch(half, PROMPTS, max_batch_size=4, max_new_tokens=8, eos_token_id=None)
    for ids, result in zip(PROMPTS, results, strict=True):
        assert agree(half, result.ids, alone(half, ids, max_new_tokens=8, eos_token_id=None), tie=0.25)


@pytest.mark.filterwarnings("error")
def test_left_padding_is_left_out():
    width = 12
    rows = [[0] * (width - len(ids)) + ids for ids in PROMPTS[:4]]
    padded = generate_batch(model, torch.tensor(rows), max_new_tokens=6)
    plain = generate_batch(model, PROMPTS[:4], max_new_tokens=6)
    assert [r.ids for r in padded] == [r.ids for r in plain]


def test_prompts_may_be_lists_tensors_and_rows():
    ids = PROMPTS[1]
    forms = [ids, tuple(ids), torch.tensor(ids), torch.tensor([ids])]
    assert len({tuple(r.ids) for r in generate_batch(model, forms, max_new_tokens=4)}) == 1


def test_an_empty_prompt_starts_from_bos():
    empty, tensor, bos = generate_batch(model, [[], torch.empty(0), [BOS]], max_new_tokens=5)
    assert empty.ids == tensor.ids == bos.ids
    assert empty.ids[0] == BOS
    assert empty.prompt_length == 1


def test_no_prompts_no_results():
    assert generate_batch(model, []) == []


def test_the_model_has_the_method():
    assert [r.ids for r in model.generate_batch(PROMPTS[:2], max_new_tokens=3)] == [
        r.ids for r in generate_batch(model, PROMPTS[:2], max_new_tokens=3)
    ]


def test_sampling_without_a_seed_follows_torchs_seed():
    def drawn():
        torch.manual_seed(11)
        return [r.ids for r in generate_batch(model, PROMPTS, do_sample=True, max_new_tokens=8, max_batch_size=2)]

    first = drawn()
    assert drawn() == first
    assert [r.ids for r in generate_batch(model, PROMPTS, do_sample=True, max_new_tokens=8)] != first


# -- how requests end --------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one letter a token."""

    all_special_ids = ()

    def get_vocab(self):
        return {chr(0x100 + i): i for i in range(VOCAB)}

    def encode(self, text, **_):
        return [ord(c) - 0x100 for c in text]

    def decode(self, ids, **_):
        return "".join(chr(0x100 + i) for i in ids)


def test_rows_with_equal_processors_go_through_them_together(monkeypatch):
    """And are told apart where they differ; what reads the tokens so far goes through alone."""
    rows = []
    top_k = processors.TopK.__call__
    monkeypatch.setattr(processors.TopK, "__call__", lambda self, ids, s: rows.append(len(s)) or top_k(self, ids, s))
    engine = BatchEngine(model)
    common = dict(do_sample=True, seed=1, max_new_tokens=3, eos_token_id=None)
    wanted = [dict(top_k=5), dict(top_k=5), dict(top_k=9), dict(top_k=5, repetition_penalty=1.2), dict(top_k=5)]
    for ids, own in zip(PROMPTS, wanted, strict=False):
        engine.add(Request(ids, settings={**common, **own}))
    tokens, _, _ = run(engine)
    assert Counter(rows) == {1: 6, 3: 3}
    monkeypatch.undo()
    for i, own in enumerate(wanted):
        assert PROMPTS[i] + tokens[i] == alone(model, PROMPTS[i], **common, **own)


def test_each_request_has_its_own_settings_and_ending():
    tokens = alone(model, PROMPTS[1], max_new_tokens=9, eos_token_id=None)[len(PROMPTS[1]) :]
    text = Letters().decode(tokens[:4])
    stop = alone(model, PROMPTS[1], max_new_tokens=9, eos_token_id=None, stop_strings=text, tokenizer=Letters())
    engine = BatchEngine(model, page_size=4)
    for request in (
        Request(PROMPTS[1], settings=dict(max_new_tokens=9, eos_token_id=tokens[2])),
        Request(PROMPTS[1], settings=dict(max_new_tokens=9, eos_token_id=None, stop_strings=text), tokenizer=Letters()),
        Request(PROMPTS[1], settings=dict(max_new_tokens=2, eos_token_id=None)),
        Request(PROMPTS[1], settings=dict(max_length=14, eos_token_id=None)),
        Request(PROMPTS[1], settings=dict(max_new_tokens=9, max_time=1e-9, eos_token_id=None)),
        Request(PROMPTS[1], settings=dict(max_new_tokens=9, eos_token_id=None),
                stopping_criteria=[lambda ids, scores: ids.shape[1] == 15]),
    ):  # fmt: skip
        engine.add(request)
    got, reasons, _ = run(engine)
    assert [reasons[i] for i in range(6)] == ["eos", "stop", "length", "length", "length", "stop"]
    assert got[0] == tokens[: tokens.index(tokens[2]) + 1]
    assert PROMPTS[1] + got[1] == stop
    assert [len(got[i]) for i in (2, 3, 4, 5)] == [2, 3, 1, 4]
    check_idle(engine)


def test_pages_of_a_row_that_ends_are_free_at_once():
    engine = BatchEngine(model, page_size=4, cache_tokens=64)
    engine.add(Request(PROMPTS[4], settings=dict(max_new_tokens=1)))
    engine.add(Request(PROMPTS[1], settings=dict(max_new_tokens=4, eos_token_id=None)))
    free = engine.scheduler.pool.idle
    events = engine.step()
    assert [e.finish_reason for e in events] == ["length", None]
    assert engine.scheduler.pool.idle == free - 3, "11 tokens and the next one"
    run(engine)
    check_idle(engine)


def test_a_cancelled_request_says_so_once_and_frees_its_pages():
    engine = BatchEngine(model, max_batch_size=2, page_size=4)
    ids = [engine.add(Request(p, settings=dict(max_new_tokens=6, eos_token_id=None))) for p in PROMPTS[:4]]
    engine.step()
    assert engine.cancel(ids[0])  # running
    assert engine.cancel(ids[3])  # waiting
    assert not engine.cancel(ids[0])
    assert not engine.cancel(99)
    tokens, reasons, _ = run(engine)
    assert reasons == {0: "cancelled", 1: "length", 2: "length", 3: "cancelled"}
    assert PROMPTS[1] + alone(model, PROMPTS[1], max_new_tokens=6, eos_token_id=None)[11:] == PROMPTS[1] + (
        alone(model, PROMPTS[1], max_new_tokens=1, eos_token_id=None)[11:] + tokens[1]
    )
    check_idle(engine)


def test_an_engine_with_nothing_but_a_cancellation_to_tell_has_work():
    engine = BatchEngine(model)
    engine.cancel(engine.add(PROMPTS[0]))
    assert engine.has_work
    assert [e.finish_reason for e in engine.step()] == ["cancelled"]
    check_idle(engine)
    assert engine.step() == []


def test_the_callback_sees_every_token_and_may_cancel():
    seen = {}

    def on_token(place, token, reason):
        seen.setdefault(place, []).append((token, reason))
        return False if place == 1 and len(seen[1]) == 3 else None

    results = generate_batch(
        model, PROMPTS[:3], max_batch_size=2, max_new_tokens=6, eos_token_id=None, on_token=on_token
    )
    assert [r.finish_reason for r in results] == ["length", "cancelled", "length"]
    for place, result in enumerate(results):
        assert result.new_ids == [token for token, _ in seen[place]]
        assert [reason for _, reason in seen[place]][:-1] == [None] * (len(seen[place]) - 1)
    assert len(results[1].new_ids) == 3
    assert seen[0][-1][1] == "length"


def test_grammars_healing_and_stop_texts_are_followed_row_by_row(model, fast):
    pytest.importorskip("llguidance")
    common = dict(max_new_tokens=40, eos_token_id=1, pad_token_id=0)
    wanted = [
        ("def f", dict(regex=r"(yes|no|może) [0-9]{3,5}")),
        ("return a", dict(json_schema={"enum": ["Ω", 3, None]})),
        ("opt", dict(token_healing=True)),
        ("x = (", dict(regex=r"[ab]{2,5}é?🙂[0-9]x", do_sample=True, seed=3)),
        ("class A:", dict(stop_strings=["e", "a"])),
    ]
    prompts = [fast.encode(text) for text, _ in wanted]
    requests = [
        Request(ids, settings={**common, **own}, tokenizer=fast) for ids, (_, own) in zip(prompts, wanted, strict=True)
    ]
    results = generate_batch(model, requests, max_batch_size=3, page_size=4)
    for ids, (_, own), result in zip(prompts, wanted, results, strict=True):
        assert result.ids == alone(model, ids, tokenizer=fast, **common, **own)
    assert [r.finish_reason for r in results[:2]] == ["eos", "eos"]
    assert results[4].finish_reason == "stop"


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_prompt_that_never_fits_is_refused_before_anything_runs():
    ran = []
    handle = model.register_forward_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(PromptTooLong, match=r"prompt 1: prompt has 20 tokens and .* 10 .* holds 16.*cache_tokens="):
            generate_batch(model, [PROMPTS[0], PROMPTS[4]], page_size=4, cache_tokens=16, max_new_tokens=10)
        with pytest.raises(PromptTooLong, match=r"prompt 2: prompt has 100 tokens .* 40, but the context holds 128"):
            generate_batch(model, [*PROMPTS[:2], prompt(100)], max_new_tokens=40)
    finally:
        handle.remove()
    assert not ran


def test_refused_prompts_can_be_results_while_the_others_go_on():
    prompts = [PROMPTS[0], prompt(100), [BOS, VOCAB], PROMPTS[1], "text", PROMPTS[4]]
    results = generate_batch(
        model, prompts, on_error="return", max_new_tokens=30, eos_token_id=None, page_size=4, cache_tokens=44
    )
    assert [r.finish_reason for r in results] == ["length", "error", "error", "length", "error", "error"]
    kinds = [type(r.error) for r in results]
    assert kinds == [type(None), PromptTooLong, TokenOutOfRange, type(None), InputError, PromptTooLong]
    assert "prompt 5: " in str(results[5].error)
    for i in (0, 3):
        assert agree(model, results[i].ids, alone(model, prompts[i], max_new_tokens=30, eos_token_id=None))
    everything_refused = generate_batch(model, [prompt(200)], on_error="return")
    assert [r.finish_reason for r in everything_refused] == ["error"]


@pytest.mark.parametrize("bad", [VOCAB, -1, 10**30])
def test_token_ids_outside_the_vocabulary_are_named(bad):
    with pytest.raises(TokenOutOfRange, match=rf"token id {bad} is outside the vocabulary of {VOCAB}"):
        generate_batch(model, [PROMPTS[0], [BOS, bad]])
    if bad < 2**63:
        with pytest.raises(TokenOutOfRange, match=rf"{bad} is outside the vocabulary"):
            BatchEngine(model).add(torch.tensor([BOS, bad]))


@pytest.mark.parametrize("bad", [[1.5], ["a"], [True], "text", {"input_ids": [2]}, torch.ones(2, 3, dtype=torch.long)])
def test_what_is_no_row_of_token_ids_is_refused(bad):
    with pytest.raises(InputError, match=r"prompt 0: (a|input_ids)"):
        generate_batch(model, [bad])


@pytest.mark.parametrize("name", ["max_batch_size", "page_size", "cache_tokens", "cache_bytes", "prefill_tokens"])
@pytest.mark.parametrize("value", [0, -3, 1.5, "8", True])
def test_impossible_sizes_are_named(name, value):
    with pytest.raises(InputError, match=rf"{name} is .* whole number >= 1"):
        BatchEngine(model, **{name: value})
    with pytest.raises(InputError, match=rf"{name} is .* whole number >= 1"):
        generate_batch(model, [PROMPTS[0]], **{name: value})


def test_sizes_by_bytes_and_their_limits():
    token_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, kv heads, head_dim, float32
    engine = BatchEngine(model, page_size=4, cache_bytes=11 * 4 * token_bytes + 5)
    assert engine.scheduler.pool.pages == 10
    assert engine.nbytes == 11 * 4 * token_bytes
    with pytest.raises(InputError, match=rf"smallest cache.*{2 * 4 * token_bytes} bytes"):
        BatchEngine(model, page_size=4, cache_bytes=2 * 4 * token_bytes - 1)
    with pytest.raises(InputError, match="give one of them"):
        BatchEngine(model, cache_bytes=10**6, cache_tokens=100)
    with pytest.raises(NotEnoughMemory, match="cache_tokens"):
        BatchEngine(model, cache_tokens=10**13)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(num_beams=2), "beam_search"),
        (dict(do_sample=True, num_return_sequences=2), "num_return_sequences"),
        (dict(guidance_scale=1.5), "guidance_scale"),
        (dict(return_dict_in_generate=True), "return_dict_in_generate"),
        (dict(prompt_lookup_num_tokens=2), "assisted"),
        (dict(penalty_alpha=0.5, top_k=4), "contrastive"),
    ],
)
def test_what_only_generate_can_do_is_refused_by_name(settings, named):
    with pytest.raises(InputError, match=rf"a batch has no .*{named}.*use generate\(\)"):
        generate_batch(model, PROMPTS, **settings)


def test_a_misspelt_setting_is_refused():
    with pytest.raises(GenerationConfigError, match="max_new_tokens"):
        generate_batch(model, PROMPTS, max_new_token=3)


def test_bidirectional_models_are_refused():
    with pytest.raises(InputError, match="use_bidirectional_attention"):
        generate_batch(made(use_bidirectional_attention=True), PROMPTS)


def test_stop_strings_need_the_tokenizer():
    with pytest.raises(InputError, match="tokenizer"):
        generate_batch(model, PROMPTS, stop_strings="a")


def poisoned(**fields):
    """A model that answers NaN to whoever has seen token 50."""
    sick = made(**fields)
    with torch.no_grad():
        sick.model.embed_tokens.weight[50] = float("nan")
    return sick


def clean(length, seed):
    return [t if t != 50 else 51 for t in prompt(length, seed)]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_nan_ends_its_own_request_and_names_it_and_the_step(attn):
    sick = poisoned(attn_implementation=attn)
    healthy = [clean(n, seed=n) for n in (9, 2, 13)]
    prompts = [healthy[0], [BOS, 9, 7, 50], healthy[1], [BOS, 50, 50, 50, 50], healthy[2]]
    settings = dict(max_new_tokens=7, eos_token_id=None, suppress_tokens=[50])
    # The page of prompt 1 goes to prompt 2, which fills half of it beside prompt 0 and must not see the NaN behind.
    sizes = dict(max_batch_size=2, page_size=4, cache_tokens=40)
    results = generate_batch(sick, prompts, on_error="return", **sizes, **settings)
    assert [r.finish_reason for r in results] == ["length", "error", "length", "error", "length"]
    assert "request 1, step 1: no token has a finite score" in str(results[1].error)
    assert "request 3, step 1" in str(results[3].error)
    for i in (0, 2, 4):
        assert agree(sick, results[i].ids, alone(sick, prompts[i], **settings))
    with pytest.raises(NumericalError, match="request 1, step 1"):
        generate_batch(sick, prompts, **sizes, **settings)


def test_nan_that_comes_later_names_its_step_and_spares_the_others():
    sick = poisoned()
    force = lambda ids, scores: scores if ids.shape[1] != 5 else scores.index_fill(1, torch.tensor([50]), 1e9)  # noqa: E731
    engine = BatchEngine(sick, page_size=4)
    settings = dict(max_new_tokens=8, eos_token_id=None)
    engine.add(Request(clean(3, 1), settings=settings, logits_processor=[force]))
    engine.add(Request(clean(4, 2), settings={**settings, "suppress_tokens": [50]}))
    tokens, reasons, errors = run(engine)
    assert reasons == {0: "error", 1: "length"}
    assert len(tokens[0]) == 3
    assert isinstance(errors[0], NumericalError)
    assert "request 0, step 4" in str(errors[0])
    check_idle(engine)


def test_pages_with_nan_are_never_shared():
    sick = poisoned()
    engine = BatchEngine(sick, page_size=2)
    engine.add([BOS, 50, 7, 8, 9])
    run(engine)
    assert engine.scheduler.pool.find([BOS, 50, 7, 8, 9]).pages == ()


def test_every_token_forbidden_is_an_error_of_that_request():
    engine = BatchEngine(model)
    forbid = lambda ids, scores: torch.full_like(scores, -torch.inf)  # noqa: E731
    engine.add(Request(PROMPTS[0], logits_processor=[forbid]))
    engine.add(Request(PROMPTS[0], settings=dict(do_sample=True, seed=1), logits_processor=[forbid]))
    engine.add(Request(PROMPTS[1], settings=dict(max_new_tokens=2, eos_token_id=None)))
    _, reasons, errors = run(engine)
    assert reasons == {0: "error", 1: "error", 2: "length"}
    assert isinstance(errors[1], NumericalError)


def broken(*_):
    raise ZeroDivisionError("of the caller's own")


def narrow(ids, scores):
    return scores[:, :-1]


@pytest.mark.parametrize(
    ("where", "own", "error"),
    [
        ("logits_processor", broken, ZeroDivisionError),
        ("stopping_criteria", broken, ZeroDivisionError),
        ("logits_processor", narrow, InputError),
    ],
)
def test_what_a_requests_own_code_does_wrong_ends_that_request_alone(where, own, error):
    engine = BatchEngine(model)
    engine.add(Request(PROMPTS[0], **{where: [own]}))
    engine.add(Request(PROMPTS[1], settings=dict(max_new_tokens=3, eos_token_id=None)))
    tokens, reasons, errors = run(engine)
    assert reasons == {0: "error", 1: "length"}
    assert isinstance(errors[0], error)
    assert PROMPTS[1] + tokens[1] == alone(model, PROMPTS[1], max_new_tokens=3, eos_token_id=None)
    check_idle(engine)


@pytest.mark.parametrize("where", ["forward", "processor", "criterion"])
@pytest.mark.parametrize("sampling", [{}, dict(do_sample=True, seed=2)])
def test_an_interrupted_step_can_be_repeated_and_changes_nothing(where, sampling):
    interrupt = {"at": 4}

    def maybe():
        interrupt["at"] -= 1
        if interrupt["at"] == 0:
            raise KeyboardInterrupt

    def processor(ids, scores):
        maybe() if where == "processor" else None
        return scores

    def criterion(ids, scores):
        maybe() if where == "criterion" else None
        return False

    handle = model.model.layers[1].register_forward_hook(lambda *_: maybe() if where == "forward" else None)
    settings = dict(max_new_tokens=6, eos_token_id=None, **sampling)
    engine = BatchEngine(model, max_batch_size=3, page_size=4)
    try:
        for ids in PROMPTS[:4]:
            engine.add(Request(ids, settings=settings, logits_processor=[processor], stopping_criteria=[criterion]))
        with pytest.raises(KeyboardInterrupt):
            run(engine)
        check_pages(engine)
    finally:
        handle.remove()
    before = {s.id: s.tokens[len(PROMPTS[s.id]) :] for s in [*engine.scheduler.running, *engine.scheduler.waiting]}
    tokens, reasons, _ = run(engine)
    assert set(reasons.values()) == {"length"}
    for i, ids in enumerate(PROMPTS[:4]):
        expected = alone(model, ids, **settings)[len(ids) :]
        assert expected[len(expected) - len(tokens[i]) :] == tokens[i]
        assert expected[: len(before[i])] == before[i]
    check_idle(engine)


def test_a_request_may_be_cancelled_after_an_interrupted_step():
    interrupts = [KeyboardInterrupt]

    def criterion(ids, scores):
        if interrupts:
            raise interrupts.pop()
        return False

    engine = BatchEngine(model, page_size=4)
    settings = dict(max_new_tokens=4, eos_token_id=None)
    for ids in PROMPTS[:3]:
        engine.add(Request(ids, settings=settings, stopping_criteria=[criterion]))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.cancel(1)  # its token is picked and not yet told
    tokens, reasons, _ = run(engine)
    assert reasons == {0: "length", 1: "cancelled", 2: "length"}
    assert 1 not in tokens
    for i in (0, 2):
        assert PROMPTS[i] + tokens[i] == alone(model, PROMPTS[i], **settings)
    check_idle(engine)


def test_what_the_callback_raises_reaches_the_caller():
    def on_token(place, token, reason):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_batch(model, PROMPTS, on_token=on_token)


def test_rope_tables_that_change_with_the_longest_row_stop_at_the_trained_context():
    rope = dict(rope_type="longrope", original_max_position_embeddings=16, factor=8.0,
                short_factor=[1.0] * 4, long_factor=[2.0] * 4)  # fmt: skip
    model = made(rope_parameters={**rope, "rope_theta": 10000.0})
    results = generate_batch(model, PROMPTS[:2], max_new_tokens=4, eos_token_id=None)
    assert [r.ids for r in results] == [alone(model, p, max_new_tokens=4, eos_token_id=None) for p in PROMPTS[:2]]
    with pytest.raises(PromptTooLong, match="trained context of 16"):
        generate_batch(model, PROMPTS[:2], max_new_tokens=6)
