"""Of which positions a pass gives hidden states or logits, and what is computed for the others: keys and values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gemma import away_from_zero, far, left_padded, prompts
from tiny_shapes import COMMON, MEMBERS, SHAPES

import gemmakit
from gemmakit.errors import InputError
from gemmakit.pytorch.cache import DynamicCache
from gemmakit.pytorch.cache.window import WindowCache
from gemmakit.pytorch.decode.batch.engine import BatchEngine
from gemmakit.pytorch.fused.cpu import NativeLayer
from gemmakit.pytorch.fused.reference import FusedLayer
from gemmakit.pytorch.kernels import cpu
from gemmakit.pytorch.kernels.invariance import rows_alike

S = 30
KEPT = {"the last": 1, "three": 3, "places": torch.tensor([7, 0]), "a list": [3, 3, 29], "a slice": slice(2, 9)}
# Sums of a few rows and of many may differ in their order.
CLOSE = 2e-5
KINDS = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "vaultgemma": "VaultGemma"}


def member(name, **changes):
    kind = KINDS[name]
    config = gemmakit.AutoConfig.for_model(name, **{**COMMON, **SHAPES["gqa"], **MEMBERS.get(name, {}), **changes})
    return away_from_zero(getattr(gemmakit, f"{kind}ForCausalLM")(config)).eval()


@pytest.fixture
def widths(monkeypatch):
    """How many positions layers in one piece take through their MLPs, one after the other."""
    found = []
    for form in (FusedLayer, NativeLayer):

        def mlp_add(self, gated, residual, own=form.mlp_add):
            found.append(gated.shape[1])
            return own(self, gated, residual)

        monkeypatch.setattr(form, "mlp_add", mlp_add)
    return found


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("cached", ["none", "dynamic", "window", "filled"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_kept_positions_are_those_of_a_pass_that_keeps_all(widths, name, kept, cached, padded):
    model = member(name)
    ids, mask = left_padded([*prompts(1, S), *prompts(1, 21, seed=2)], S) if padded else (prompts(2, S), None)
    first = 9 if cached == "filled" else 0

    def run(**asked):
        cache = {"none": None, "window": WindowCache(model.config)}.get(cached, DynamicCache())
        if first:
            shown = None if mask is None else mask[:, :first]
            model(ids[:, :first], attention_mask=shown, past_key_values=cache)
        widths.clear()
        return model(ids[:, first:], attention_mask=mask, past_key_values=cache, **asked), cache

    where = kept if first == 0 or isinstance(kept, int) else [place - first for place in (9, 12, 20)]
    whole, one = run()
    found, other = run(logits_to_keep=where)
    expected = whole.logits[:, -where:] if isinstance(where, int) else whole.logits[:, where]
    assert found.logits.shape == expected.shape
    assert widths[-1] == expected.shape[1]
    assert far(found.logits, expected) < CLOSE
    if one is not None:
        # What comes next finds all keys.
        more = prompts(2, 4, seed=5)
        shown = None if mask is None else torch.nn.functional.pad(mask, (0, 4), value=1)
        after = [model(more, attention_mask=shown, past_key_values=cache).logits for cache in (one, other)]
        assert torch.equal(*after)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_they_have_the_same_bits_where_rows_are_alike(widths, name):
    if cpu.library() is None:
        pytest.skip("wants the native library: a C++ compiler builds it")
    model, ids = member(name).bfloat16(), prompts(2, S)
    with rows_alike():
        whole = model(ids).logits
        for kept in KEPT.values():
            expected = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
            assert torch.equal(model(ids, logits_to_keep=kept).logits, expected)
            assert widths[-1] == expected.shape[1]


@given(st.lists(st.integers(-12, 11), min_size=1, max_size=20), st.booleans())
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_any_places_in_any_order(places, as_tensor):
    model, ids = member("gemma"), prompts(1, 12)
    kept = torch.tensor(places) if as_tensor else places
    assert far(model(ids, logits_to_keep=kept).logits, model(ids).logits[:, places]) < CLOSE


WATCHED = ["model", "model.norm", "model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("name", WATCHED)
@torch.no_grad()
def test_who_watches_sees_all_positions(name):
    model, seen = member("gemma", num_hidden_layers=2), []
    expected = model(prompts(2, S)).logits[:, -1:]

    def hook(module, given, out):
        first = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", out)
        seen.append(first.shape[1])

    model.get_submodule(name).register_forward_hook(hook)
    assert far(model(prompts(2, S), logits_to_keep=1).logits, expected) < CLOSE
    assert seen == [S]


@torch.no_grad()
def test_a_layer_of_another_kind_is_asked_for_all_positions():
    model = member("gemma", num_hidden_layers=2)
    expected = model(prompts(2, S)).logits[:, -1:]

    class Twice(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, *told):
            return self.layer(hidden_states, *told)

    model.model.layers[-1] = Twice(model.model.layers[-1])
    assert far(model(prompts(2, S), logits_to_keep=1).logits, expected) < CLOSE


def test_gradients_are_those_of_a_pass_that_keeps_all():
    def gradients(last):
        model = member("gemma3_text")
        last(model).sum().backward()
        return [p.grad for p in model.parameters()]

    ids = prompts(1, S)
    kept = gradients(lambda model: model(ids, logits_to_keep=2).logits)
    whole = gradients(lambda model: model(ids).logits[:, -2:])
    assert all(far(one, other) < CLOSE for one, other in zip(kept, whole, strict=True))


@torch.no_grad()
def test_hidden_states_are_of_all_positions():
    model, ids = member("gemma2"), prompts(2, S)
    out = model(ids, logits_to_keep=1, output_hidden_states=True)
    assert [state.shape[1] for state in out.hidden_states] == [S] * 5
    decoder = model.model(ids, positions_to_keep=3, output_hidden_states=True)
    assert torch.equal(decoder.last_hidden_state, decoder.hidden_states[-1][:, -3:])


@pytest.mark.parametrize("name", KINDS)
def test_generating_takes_the_last_token_of_a_prompt_through_the_last_mlp(widths, name):
    model, ids = member(name), prompts(1, S)
    asked = dict(max_new_tokens=6, do_sample=False, eos_token_id=[], speculate=False)
    tokens = model.generate(ids, **asked)
    assert S not in widths
    model.model.layers[-1].register_forward_hook(lambda *_: None)
    assert torch.equal(model.generate(ids, **asked), tokens)


def test_a_batch_takes_the_tokens_that_choose_through_the_last_mlp(widths):
    model, rows = member("gemma3_text"), [prompts(1, 20)[0], prompts(1, 27, seed=3)[0]]
    engine = BatchEngine(model, speculate=False)
    for row in rows:
        engine.add(row.tolist())
    engine.step()
    layers = len(model.model.layers)
    assert widths == [47] * (layers - 1) + [2] if engine.batch_invariant.why == "" else widths[-1] == 2


def test_positions_of_another_kind_are_refused():
    with pytest.raises(InputError, match="positions_to_keep is -1"):
        member("gemma").model(prompts(), positions_to_keep=-1)
