"""A batch whose passes are replayed, and whose steps are started before the last one's tokens are read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from gemmakit.pytorch.decode import capture
from gemmakit.pytorch.decode.batch import BatchEngine, Request, engine, generate_batch
from gemmakit.pytorch.decode.batch import capture as batch_capture

sys.path.insert(0, str(Path(__file__).parent))
from strategy_models import Uncaptured
from test_batch import *  # noqa: F403  every law of batches, once more under the fixture below
from test_batch import PROMPTS, agree, alone, check_idle, made, model, prompt, run

MODES = {"overlap": (True, False), "captured": (False, True), "both": (True, True)}


@pytest.fixture(autouse=True, params=MODES)
def mode(request, monkeypatch):
    overlap, captured = MODES[request.param]
    init = BatchEngine.__init__

    def begun(self, *args, **given):
        init(self, *args, **{"overlap": overlap, **given})

    monkeypatch.setattr(engine.BatchEngine, "__init__", begun)
    if captured:
        monkeypatch.setitem(capture.CAPTURES, "cpu", Uncaptured)
        monkeypatch.setattr(batch_capture, "WORTH_USES", 1)
    return request.param


# -- what is new -----------------------------------------------------------------------------------------------------


def recorded(engine):
    return [] if engine._captured is None else list(engine._captured._store.entries)


def test_passes_are_replayed_by_buckets_where_they_are_to_be(mode):
    engine = BatchEngine(model, max_batch_size=5, page_size=4)
    for ids in PROMPTS[:5]:
        engine.add(Request(ids, settings=dict(max_new_tokens=30, eos_token_id=None)))
    tokens, _, _ = run(engine)
    assert len({len(ids) for ids in PROMPTS[:5]}) == 5
    for i, ids in enumerate(PROMPTS[:5]):
        assert agree(model, ids + tokens[i], alone(model, ids, max_new_tokens=30, eos_token_id=None))
    keys = recorded(engine)
    assert bool(keys) == (mode != "overlap")
    assert all(rows & (rows - 1) == 0 and pages >= 4 for rows, pages, _, _ in keys)
    assert len({pages for _, pages, _, _ in keys}) > 1 or not keys
    check_idle(engine)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9])
def test_rows_that_fill_a_bucket_up_change_nothing(rows):
    prompts = [prompt(3 + i, seed=i) for i in range(rows)]
    given = dict(max_new_tokens=9, eos_token_id=None)
    results = generate_batch(model, prompts, max_batch_size=rows, **given)
    for ids, result in zip(prompts, results, strict=True):
        assert agree(model, result.ids, alone(model, ids, **given))


@pytest.mark.parametrize("settings", [dict(do_sample=True, seed=4, top_k=9), dict(do_sample=True, seed=4, top_p=0.9)])
def test_draws_are_those_of_each_request_alone(settings):
    given = dict(max_new_tokens=12, eos_token_id=[1, 7, 9, 11, 13], **settings)
    results = generate_batch(model, PROMPTS, max_batch_size=4, **given)
    for ids, result in zip(PROMPTS, results, strict=True):
        assert agree(model, result.ids, alone(model, ids, **given))
    assert {r.finish_reason for r in results} == {"eos", "length"}


def test_a_step_is_started_before_the_tokens_of_the_last_one_are_read(mode, monkeypatch):
    log, first = [], engine.BatchEngine._start
    monkeypatch.setattr(engine.BatchEngine, "_start", lambda *a: (log.append("start"), first(*a))[1])
    read = engine.Started.read
    monkeypatch.setattr(engine.Started, "read", lambda self: (log.append("read"), read(self))[1])
    generate_batch(model, [PROMPTS[0], PROMPTS[3]], max_new_tokens=6, eos_token_id=None)
    if mode == "captured":
        assert log == ["start", "read"] * 6
    else:
        assert log == ["start", *["start", "read"] * 5, "read"]  # nothing in vain: the length is known


def test_no_more_than_one_pass_is_run_in_vain(mode):
    """An eos is learnt of one step late; requests of their own processors are never run ahead."""
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))  # a hook: nothing is replayed
    try:
        alone_ids = generate_batch(model, [PROMPTS[1]], max_new_tokens=9, eos_token_id=None)[0].new_ids
        eos = next(t for i, t in enumerate(alone_ids) if t not in alone_ids[:i] and i > 2)
        at = alone_ids.index(eos) + 1
        for processors, vain in (((), mode != "captured"), ((lambda ids, scores: scores,), 0)):
            passes.clear()
            out = generate_batch(
                model, [PROMPTS[1]], max_new_tokens=9, eos_token_id=eos, logits_processor=processors
            )  # fmt: skip
            assert (len(out[0].new_ids), out[0].finish_reason) == (at, "eos")
            assert len(passes) == at + vain
    finally:
        handle.remove()


def test_what_comes_and_goes_while_steps_are_under_way():
    engine = BatchEngine(model, max_batch_size=3, page_size=4, cache_tokens=64)
    settings = dict(max_new_tokens=10, eos_token_id=None)
    ids = [engine.add(Request(p, settings=settings)) for p in PROMPTS[:3]]
    tokens, reasons = {}, {}

    def note(events):
        for event in events:
            assert event.id not in reasons, "an event after the end"
            if event.token is not None:
                tokens.setdefault(event.id, []).append(event.token)
            if event.finish_reason:
                reasons[event.id] = event.finish_reason

    for _ in range(3):
        note(engine.step())
    assert engine.cancel(ids[1])
    late = engine.add(Request(PROMPTS[3], settings=settings))
    while engine.has_work:
        note(engine.step())
    assert reasons == {ids[0]: "length", ids[1]: "cancelled", ids[2]: "length", late: "length"}
    for id, p in ((ids[0], PROMPTS[0]), (ids[2], PROMPTS[2]), (late, PROMPTS[3])):
        assert agree(model, p + tokens[id], alone(model, p, **settings))
    check_idle(engine)
    assert engine.step() == []


def test_a_changed_model_is_seen_by_the_next_request():
    changing = made(2, seed=3)
    engine = BatchEngine(changing, page_size=4)
    given = dict(max_new_tokens=9, eos_token_id=None)
    before = [engine.add(Request(PROMPTS[0], settings=given))]
    first, _, _ = run(engine)
    weight = changing.model.layers[0].mlp.up_proj.weight
    changing.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(-weight.detach())
    before.append(engine.add(Request(PROMPTS[0], settings=given)))
    second, _, _ = run(engine)
    assert PROMPTS[0] + first[before[0]] != PROMPTS[0] + second[before[1]]
    fresh = generate_batch(changing, [PROMPTS[0]], share_prefixes=False, **given)[0]
    alone_now = alone(changing, PROMPTS[0], **given)
    assert agree(changing, fresh.ids, alone_now)


def test_the_switch_turns_replaying_off(mode):
    engine = BatchEngine(model, page_size=4, cuda_graphs=False)
    engine.add(Request(PROMPTS[0], settings=dict(max_new_tokens=9)))
    run(engine)
    assert engine._captured is None


def test_a_device_that_refuses_to_record_changes_nothing(mode, monkeypatch):
    class Refusing(Uncaptured):
        def capture(self, step):
            raise RuntimeError("not permitted when stream is capturing")

    monkeypatch.setitem(capture.CAPTURES, "cpu", Refusing)
    given = dict(max_new_tokens=9, eos_token_id=None)
    results = generate_batch(model, PROMPTS, max_batch_size=3, **given)
    for ids, result in zip(PROMPTS, results, strict=True):
        assert agree(model, result.ids, alone(model, ids, cuda_graphs=False, **given))
