"""Steps on fixed memory, run as they are: what an accelerator replays gives the tokens of the plain loop."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemmakit.errors import NumericalError
from gemmakit.pytorch.decode import capture

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))
from strategy_models import Uncaptured, read_late
from tiny_gemma import left_padded, prompts, tiny

SETTINGS = {
    "greedy": dict(),
    "sampled": dict(do_sample=True, seed=3, top_k=0),
    "temperature": dict(do_sample=True, seed=3, temperature=1.7, top_k=0),
    "top_k": dict(do_sample=True, seed=3, top_k=7, temperature=2.0),
    "top_p": dict(do_sample=True, seed=3, top_p=0.8, top_k=40),
    "others": dict(do_sample=True, seed=3, min_p=0.01, typical_p=0.95, renormalize_logits=True),
}
every_setting = pytest.mark.parametrize("how", SETTINGS)


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded on the CPU too, by running them as they are; the number of recordings."""
    made = []

    class Counted(Uncaptured):
        def capture(self, step):
            made.append(step)
            step()
            step()
            return step

    monkeypatch.setitem(capture.CAPTURES, "cpu", Counted)
    monkeypatch.setattr(capture, "WORTH_STEPS", 1)
    return made


@pytest.fixture(params=["at once", "late"])
def queue(request, monkeypatch):
    if request.param == "late":
        read_late(monkeypatch)


def plainly(model, ids, **given):
    return model.generate(ids, cuda_graphs=False, **given)


@every_setting
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_are_those_of_the_plain_loop(how, rows, recorded, queue):
    model, ids = tiny(), prompts(rows)
    given = dict(max_new_tokens=20, eos_token_id=None, **SETTINGS[how])
    assert torch.equal(model.generate(ids, **given), plainly(model, ids, **given))
    assert len(recorded) == 1


@every_setting
def test_left_padding_and_rows_that_end_on_the_way(how, recorded, queue):
    model = tiny()
    ids, mask = left_padded([row[: 9 - 3 * i] for i, row in enumerate(prompts(3))], 9)
    ended = 0
    for seed in range(4):
        given = dict(SETTINGS[how], max_new_tokens=18, eos_token_id=[1, *range(20 + seed, 130, 9)], pad_token_id=0)
        if "seed" in given:
            given["seed"] = seed
        ours = model.generate(ids, attention_mask=mask, **given)
        assert torch.equal(ours, plainly(model, ids, attention_mask=mask, **given))
        ended += int((ours[:, -1] == 0).any() or ours.shape[1] < 27)
    assert ended, "no row ended before the others"


KINDS = [dict(num_key_value_heads=1), dict(num_key_value_heads=4), dict(attn_implementation="eager"),
         dict(use_bidirectional_attention=True)]  # fmt: skip


@pytest.mark.parametrize("changes", KINDS)
def test_every_kind_of_attention_gives_the_same(changes, recorded):
    model = tiny(**changes)
    ids, mask = left_padded([row[: 9 - 3 * i] for i, row in enumerate(prompts(2))], 9)
    for given in (dict(input_ids=prompts(2)), dict(input_ids=ids, attention_mask=mask)):
        settings = dict(max_new_tokens=12, eos_token_id=None, **given)
        assert torch.equal(model.generate(**settings), model.generate(cuda_graphs=False, **settings))
    assert len(recorded) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_formats_give_tokens_of_the_plain_loop_up_to_ties(dtype, recorded):
    """The whole buffer is seen through a mask, so sums run in another order: tokens may part where two are near."""
    model, ids = tiny().to(dtype), prompts(2)
    given = dict(max_new_tokens=12, eos_token_id=None)
    ours, theirs = model.generate(ids, **given), plainly(model, ids, **given)
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if at is not None:
            logits = model(torch.tensor([b[:at]])).logits[0, -1].float()
            assert logits[a[at]] >= logits[b[at]] - 8 / 256 * logits.abs().max()
    assert len(recorded) == 1


def test_later_calls_use_the_same_memory(recorded):
    model = tiny()
    for seed, width in ((1, 9), (2, 12), (3, 5), (1, 9)):
        ids = prompts(2, width, seed)
        given = dict(max_new_tokens=15, eos_token_id=None)
        assert torch.equal(model.generate(ids, **given), plainly(model, ids, **given))
    assert len(recorded) == 1
    (fixed,) = capture.captured_steps(model).entries.values()
    before = fixed.cache.layers[0]._keys.data_ptr()
    model.generate(prompts(2), max_new_tokens=15)
    assert fixed.cache.layers[0]._keys.data_ptr() == before


def test_results_are_not_changed_by_the_next_call(recorded):
    model = tiny()
    given = dict(max_new_tokens=12, eos_token_id=None, return_dict_in_generate=True)
    first = model.generate(prompts(2), **given)
    tokens, keys = first.sequences.clone(), [k.clone() for k, _ in first.past_key_values]
    model.generate(prompts(2, seed=5), **given)
    assert torch.equal(first.sequences, tokens)
    assert all(torch.equal(a, b) for a, (b, _) in zip(keys, first.past_key_values, strict=True))


@pytest.mark.parametrize("kind", [None, "dynamic", "static"])
def test_the_cache_that_comes_back_is_that_of_the_plain_loop(kind, recorded, queue):
    model, ids = tiny(), prompts(2)
    given = dict(max_new_tokens=12, eos_token_id=[1, *range(30, 60)], return_dict_in_generate=True,
                 cache_implementation=kind)  # fmt: skip
    ours, theirs = model.generate(ids, **given), plainly(model, ids, **given)
    a, b = ours.past_key_values, theirs.past_key_values
    assert type(a) is type(b)
    assert a.get_seq_length() == b.get_seq_length() == ours.sequences.shape[1] - 1
    for mine, other in zip(a, b, strict=True):
        for x, y in zip(mine, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert len(recorded) == 1


def test_several_samples_a_prompt(recorded):
    model, ids = tiny(), prompts(2)
    given = dict(max_new_tokens=12, eos_token_id=None, do_sample=True, seed=2, num_return_sequences=3)
    ours = model.generate(ids, return_dict_in_generate=True, **given)
    assert torch.equal(ours.sequences, plainly(model, ids, **given))
    assert ours.past_key_values[0][0].shape[0] == 6
    assert len(recorded) == 1


def test_a_prompt_in_chunks(recorded):
    model, ids = tiny(), prompts(2, 23)
    given = dict(max_new_tokens=12, eos_token_id=None)
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **given), plainly(model, ids, **given))


def test_one_generator_draws_what_it_draws_in_the_plain_loop(recorded):
    model, ids = tiny(), prompts(3)
    given = dict(max_new_tokens=12, eos_token_id=None, do_sample=True)
    ours = model.generate(ids, generator=torch.Generator().manual_seed(9), **given)
    theirs = plainly(model, ids, generator=torch.Generator().manual_seed(9), **given)
    assert torch.equal(ours, theirs)
    again = model.generate(ids, generator=torch.Generator().manual_seed(10), **given)
    assert not torch.equal(ours, again)


@pytest.mark.parametrize("new", [1, 2, 3, 55])
def test_every_length_up_to_the_whole_context(new, recorded, queue):
    model, ids = tiny(), prompts(1)
    given = dict(max_new_tokens=new, eos_token_id=None)
    assert torch.equal(model.generate(ids, **given), plainly(model, ids, **given))
    assert len(recorded) == 1


class Told:
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.flatten().tolist())

    def end(self):
        self.heard.append("end")


def test_a_streamer_hears_every_token_in_order_and_then_the_end(recorded, queue):
    model, ids = tiny(), prompts(1)
    streamer = Told()
    out = model.generate(ids, max_new_tokens=12, eos_token_id=None, streamer=streamer)
    assert streamer.heard == [ids[0].tolist(), *([t] for t in out[0, ids.shape[1] :].tolist()), "end"]
    assert len(recorded) == 1


def test_tokens_are_read_one_step_behind(recorded, monkeypatch):
    """When a token is told, the step after it has been started already, and no more than that one."""
    read_late(monkeypatch)
    started, gaps = [], []
    step = capture.StaticStep.step
    monkeypatch.setattr(capture.StaticStep, "step", lambda self: (started.append(1), step(self)))

    class Watching(Told):
        def put(self, value):
            super().put(value)
            gaps.append(len(started) - 3 - (len(self.heard) - 2))  # recording took three

    tiny().generate(prompts(1), max_new_tokens=9, eos_token_id=None, streamer=Watching())
    assert gaps[1:-1] == [1] * 8
    assert gaps[-1] == 0  # nothing is left to start


# -- what a device could record --------------------------------------------------------------------------------------

READS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique", "bincount")


class Watch(TorchDispatchMode):
    """Forbids what waits for a device or has a size that depends on data; notes the operators and their sizes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert not any(name == word or name.startswith(f"{word}_") for word in READS), f"{func.name()} waits"
        out = func(*args, **(kwargs or {}))
        shapes = [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.seen.append((func.name(), shapes))
        return out


@pytest.mark.parametrize("how", ["greedy", "top_p", "others"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_reads_nothing_and_is_the_same_work_every_time(how, rows, padded, recorded):
    model = tiny()
    ids, mask = left_padded([row[: 8 - 3 * i] for i, row in enumerate(prompts(rows))], 9)
    given = dict(max_new_tokens=8, eos_token_id=[1, 5, 6], **SETTINGS[how])
    model.generate(ids if padded else prompts(rows), attention_mask=mask if padded else None, **given)
    (fixed,) = capture.captured_steps(model).entries.values()
    assert (fixed.mask is not None) == padded
    work, addresses = [], []
    for _ in range(3):
        with torch.no_grad(), Watch() as watch:
            fixed.step()
        work.append(watch.seen)
        addresses.append([t.data_ptr() for t in vars(fixed).values() if isinstance(t, torch.Tensor)])
    assert work[0] == work[1] == work[2]
    assert addresses[0] == addresses[1] == addresses[2]


def test_the_watch_sees_what_it_forbids():
    with pytest.raises(AssertionError, match="waits"), Watch():
        bool(torch.ones(2).all())


def test_calls_in_either_mode_follow_each_other(recorded):
    """Memory taken in inference mode could not be written to outside of it."""
    model, ids = tiny(), prompts(2)
    given = dict(max_new_tokens=10, eos_token_id=None)
    with torch.inference_mode():
        first = model.generate(ids, **given)
    assert torch.equal(model.generate(ids, **given), first)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, **given), first)
    assert len(recorded) == 1


# -- where it is impossible ------------------------------------------------------------------------------------------


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def patched(model):
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x)


class Own(torch.nn.Linear):
    pass


Own.__module__ = "elsewhere.layers"


def foreign(model):
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = Own(old.in_features, old.out_features, bias=False)
    model.model.layers[1].mlp.up_proj.weight = old.weight


OF_MODEL = {"hooks": hooked, "replaced": patched, "another library": foreign, "training": lambda m: m.train()}
OF_CALL = {
    "cuda_graphs is False": dict(cuda_graphs=False),
    "RepetitionPenalty": dict(repetition_penalty=1.2),
    "MaxTime": dict(max_time=100.0),
    "cache is none": dict(use_cache=False),
    "a QuantizedCache": dict(cache_implementation="quantized"),
    "scores, hidden_states": dict(return_dict_in_generate=True, output_scores=True, output_hidden_states=True),
    "function": dict(logits_processor=[lambda ids, scores: scores]),
}


@pytest.mark.parametrize("why", OF_MODEL)
def test_a_model_that_cannot_be_replayed_says_why_and_steps(why, recorded, caplog):
    model = tiny()
    expected = model.generate(prompts(1), max_new_tokens=10, cuda_graphs=False)
    OF_MODEL[why](model)
    assert why in model.loop_plan()
    assert model.decode_plan()["loop"] == model.loop_plan()
    with caplog.at_level(logging.DEBUG, "gemmakit"):
        for _ in range(2):
            assert torch.equal(model.generate(prompts(1), max_new_tokens=10), expected)
    assert not recorded
    assert sum(why in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("why", OF_CALL)
def test_a_call_that_cannot_be_replayed_says_why_and_steps(why, recorded, caplog):
    model = tiny()
    assert model.loop_plan() == "replayed from a graph"
    with caplog.at_level(logging.DEBUG, "gemmakit"):
        model.generate(prompts(1), max_new_tokens=10, **OF_CALL[why])
    assert not recorded
    assert sum(why in r.getMessage() for r in caplog.records) == 1


def test_beams_and_drafts_and_given_caches_are_not_replayed(recorded):
    model, ids = tiny(), prompts(1)
    model.generate(ids, max_new_tokens=10, num_beams=2)
    model.generate(ids, max_new_tokens=10, prompt_lookup_num_tokens=3)
    out = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, cuda_graphs=False)
    model.generate(out.sequences, max_new_tokens=10, past_key_values=out.past_key_values)
    model.generate(inputs_embeds=model.model.embed_tokens(ids), max_new_tokens=10)
    assert not recorded


def test_rope_that_reads_the_length_is_not_replayed(recorded):
    model = tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert "dynamic" in model.loop_plan()
    model.generate(prompts(1), max_new_tokens=10)
    assert not recorded


def test_a_cpu_has_no_graphs():
    assert tiny().loop_plan() == "step by step (cpu has no graphs)"


def test_few_tokens_are_not_worth_recording(recorded, monkeypatch):
    monkeypatch.setattr(capture, "WORTH_STEPS", 8)
    model = tiny()
    model.generate(prompts(1), max_new_tokens=7)
    assert not recorded
    model.generate(prompts(1), max_new_tokens=8)
    assert len(recorded) == 1


def test_a_device_that_refuses_is_asked_once_and_the_tokens_come_anyway(monkeypatch):
    asked = []

    class Refusing(Uncaptured):
        def capture(self, step):
            asked.append(1)
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setitem(capture.CAPTURES, "cpu", Refusing)
    model, ids = tiny(), prompts(1)
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        ours = model.generate(ids, max_new_tokens=10)
    assert torch.equal(model.generate(ids, max_new_tokens=10), ours)
    assert torch.equal(plainly(model, ids, max_new_tokens=10), ours)
    assert asked == [1]
    assert "not permitted" in model.loop_plan()


def test_what_a_kernels_compiler_raises_is_a_reason_too(monkeypatch):
    class Compiler(Exception):
        pass

    class Failing(Uncaptured):
        def capture(self, step):
            raise Compiler

    monkeypatch.setitem(capture.CAPTURES, "cpu", Failing)
    model, ids = tiny(), prompts(1)
    with pytest.warns(UserWarning, match="failed .Compiler"):
        ours = model.generate(ids, max_new_tokens=10)
    assert torch.equal(plainly(model, ids, max_new_tokens=10), ours)


def test_too_little_memory_steps_and_keeps_nothing(monkeypatch):
    class Full(Uncaptured):
        def capture(self, step):
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setitem(capture.CAPTURES, "cpu", Full)
    model, ids = tiny(), prompts(1)
    ours = model.generate(ids, max_new_tokens=10)
    assert torch.equal(plainly(model, ids, max_new_tokens=10), ours)
    assert not capture.captured_steps(model).entries
    assert model.loop_plan() == "replayed from a graph"  # another shape may fit


def test_a_call_within_a_call_steps(recorded):
    model, inner = tiny(), []

    class Asking(Told):
        def put(self, value):
            if not inner:
                inner.append(model.generate(prompts(1, seed=4), max_new_tokens=10, eos_token_id=None))

    given = dict(max_new_tokens=10, eos_token_id=None)
    out = model.generate(prompts(1), streamer=Asking(), **given)
    assert torch.equal(out, plainly(model, prompts(1), **given))
    assert torch.equal(inner[0], plainly(model, prompts(1, seed=4), **given))
    assert len(recorded) == 1


# -- what is kept ----------------------------------------------------------------------------------------------------


def change_weight(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)


def replace_weight(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(-weight.detach())


def replace_module(model):
    model.model.layers = torch.nn.ModuleList(reversed(list(model.model.layers)))
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i


def change_setting(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [change_weight, replace_weight, replace_module, change_setting])
def test_a_changed_model_is_seen(change, recorded):
    model, ids = tiny(), prompts(2)
    given = dict(max_new_tokens=10, eos_token_id=None)
    before = model.generate(ids, **given)
    change(model)
    after = model.generate(ids, **given)
    assert torch.equal(after, plainly(model, ids, **given))
    assert torch.equal(before, after) == (change is change_setting)
    assert len(recorded) == (1 if change is change_weight else 2)


def test_the_oldest_shapes_are_forgotten(recorded, monkeypatch):
    monkeypatch.setattr(capture, "MAX_CAPTURED", 2)
    model = tiny()
    for rows in (1, 2, 3):
        model.generate(prompts(rows), max_new_tokens=10)
    assert [key[0][0] for key in capture.captured_steps(model).entries] == [2, 3]
    model.generate(prompts(2), max_new_tokens=10)
    assert [key[0][0] for key in capture.captured_steps(model).entries] == [3, 2]
    monkeypatch.setattr(capture.captured_steps(model)._capture, "budget_bytes", 1)
    model.generate(prompts(2), max_new_tokens=10)
    assert not capture.captured_steps(model).entries


def test_what_is_kept_can_be_freed_and_is_counted(recorded):
    model = tiny()
    model.generate(prompts(2), max_new_tokens=10)
    (fixed,) = capture.captured_steps(model).entries.values()
    assert fixed.nbytes >= 2 * 2 * 2 * 2 * 64 * 12 * 4  # keys and values, layers, rows, heads, places, width, bytes
    assert model.free_graphs() == fixed.nbytes
    assert model.free_graphs() == 0
    model.generate(prompts(2), max_new_tokens=10)
    assert len(recorded) == 2


def test_copies_of_a_model_share_nothing(recorded):
    model, ids = tiny(), prompts(2)
    given = dict(max_new_tokens=10, eos_token_id=None)
    expected = model.generate(ids, **given)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not capture.captured_steps(other).entries
        assert torch.equal(other.generate(ids, **given), expected)


def test_numbers_that_are_none_end_the_call_and_do_not_stay(recorded):
    model, ids = tiny(), prompts(2)
    given = dict(max_new_tokens=10, eos_token_id=None)
    expected = model.generate(ids, **given)
    weight = model.model.layers[0].mlp.up_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="step 1"):
        model.generate(ids, **given)
    with torch.no_grad():
        weight.copy_(kept)
    assert torch.equal(model.generate(ids, **given), expected)


def test_an_interrupted_call_leaves_the_next_one_right(recorded):
    model, ids = tiny(), prompts(1)

    class Stop(Told):
        def put(self, value):
            super().put(value)
            if len(self.heard) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=10, streamer=Stop())
    given = dict(max_new_tokens=10, eos_token_id=None)
    assert torch.equal(model.generate(ids, **given), plainly(model, ids, **given))


def test_a_stream_that_is_left_keeps_what_was_recorded(recorded, queue):
    model, ids = tiny(), prompts(1)
    given = dict(max_new_tokens=10, eos_token_id=None)
    expected = plainly(model, ids, **given)[0, ids.shape[1] :].tolist()
    for count in (1, 4, 9):
        stream = model.stream(ids, **given)
        assert [next(stream).token for _ in range(count)] == expected[:count]
        stream.close()
        assert [e.token for e in model.stream(ids, **given)] == expected
    assert len(recorded) == 1


def test_a_call_beside_an_open_stream_steps_and_neither_minds(recorded):
    model, ids = tiny(), prompts(1)
    given = dict(max_new_tokens=10, eos_token_id=None)
    stream = model.stream(ids, **given)
    first = next(stream).token
    whole = model.generate(ids, **given)
    assert [first, *(e.token for e in stream)] == whole[0, ids.shape[1] :].tolist()
    assert torch.equal(model.generate(ids, **given), whole)
    assert len(recorded) == 1


@pytest.mark.parametrize(("total", "limit", "places"), [
    (9, 8192, 64), (65, 8192, 80), (100, 8192, 112), (2048, 8192, 2048), (2049, 8192, 2560), (8000, 8192, 8192),
    (8200, 8192, 8200), (100, 100, 100),
])  # fmt: skip
def test_places_are_rounded_up_by_a_quarter_at_most(total, limit, places):
    assert capture.room(total, limit) == places
