"""Windows in every cache and strategy: prompts and answers several windows long, tokens as without any cache.

In float64, so that the order of sums decides nothing.
"""

from __future__ import annotations

import copy

import pytest
import torch
from strategy_models import MANY, MEMBERS, WINDOW, Uncaptured, left_padded, model, new_tokens, rows, settings

import gemmakit
from gemmakit.errors import InputError
from gemmakit.pytorch.cache import CacheLayer, DynamicCache, StaticCache, WindowCache
from gemmakit.pytorch.cache.window import SPARE, WindowLayer
from gemmakit.pytorch.decode import capture
from gemmakit.pytorch.decode.generate import begin
from gemmakit.pytorch.kernels import cpu

NEW = 3 * WINDOW
everyone = pytest.mark.parametrize("member", MEMBERS)
LONG = dict(max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
# Two rows, four and two windows long.
PADDED = left_padded(rows(4 * WINDOW + 3, 2 * WINDOW + 1))


def tokens(member, ids, mask=None, **asked):
    return model(member=member).generate(ids, attention_mask=mask, **{**LONG, **asked})


@everyone
@pytest.mark.parametrize("how", [{}, dict(do_sample=True, seed=4), dict(num_beams=3)], ids=["greedy", "sample", "beam"])
def test_every_cache_gives_the_tokens_of_no_cache(member, how):
    ids, mask = PADDED
    want = tokens(member, ids, mask, use_cache=False, **how)
    kinds = ("dynamic", "hybrid", "static", "offloaded", "offloaded_static")
    asked = {kind: dict(cache_implementation=kind) for kind in kinds}
    asked["chunks"] = dict(prefill_chunk_size=5)
    asked["handed over"] = dict(past_key_values=DynamicCache())
    for name, more in asked.items():
        assert torch.equal(tokens(member, ids, mask, **how, **more), want), name


@everyone
def test_a_quantized_cache_sees_windows_too(member):
    """Eight bits are near enough for a pass: the mean of what a step differs in is a hundredth of a logit's spread."""
    ids = torch.tensor(rows(4 * WINDOW))
    cache = gemmakit.QuantizedCache(nbits=8, q_group_size=8, residual_length=8)
    it = model(member=member)
    with torch.no_grad():
        whole = it(ids, use_cache=False).logits
        steps = [it(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]
    assert (torch.cat(steps, 1) - whole).abs().mean() < 0.01 * whole.std()


@everyone
@pytest.mark.parametrize("name", MANY)
def test_rows_of_a_batch_get_what_they_get_alone(member, name):
    lists, asked = rows(4 * WINDOW + 3, 2 * WINDOW + 1), settings(name, max_new_tokens=NEW)
    ids, mask = left_padded(lists)
    found = new_tokens(model(member=member).generate(ids, attention_mask=mask, **asked), ids.shape[1])
    alone = [
        row
        for one in lists
        for row in new_tokens(model(member=member).generate(torch.tensor([one]), **asked), len(one))
    ]
    assert found == alone


@everyone
@pytest.mark.usefixtures("drafting")
@pytest.mark.parametrize("cache", ["own", "full"])
@pytest.mark.parametrize(
    "how",
    [
        dict(assistant_model=True),
        dict(assistant_model=True, num_assistant_tokens=2 * WINDOW, assistant_confidence_threshold=0.0),
        dict(prompt_lookup_num_tokens=WINDOW + 3),
    ],
    ids=["assisted", "long drafts", "lookup"],
)
def test_drafts_past_several_windows_change_no_token(member, how, cache):
    ids = torch.tensor(rows(4 * WINDOW + 3))
    how = dict(how)
    if "assistant_model" in how:
        how["assistant_model"] = model(seed=0, spread=0.45, member=member)
    more = dict(past_key_values=DynamicCache()) if cache == "full" else {}
    assert torch.equal(tokens(member, ids, **how, **more), tokens(member, ids, use_cache=False))


@everyone
def test_a_cropped_prefix_is_used_again(member):
    ids = torch.tensor(rows(5 * WINDOW))
    it, cache = model(member=member), DynamicCache()
    it.generate(ids, past_key_values=cache, **LONG)
    cache.crop(3 * WINDOW)
    again = torch.cat((ids[:, : 3 * WINDOW], torch.tensor(rows(2 * WINDOW, seed=8))), dim=1)
    assert torch.equal(tokens(member, again, past_key_values=cache), tokens(member, again, use_cache=False))


@everyone
def test_contrastive_search_judges_by_whole_passes(member):
    """The definition, every candidate run after all tokens, without a cache."""
    it, ids, k, alpha = model(member=member), torch.tensor(rows(3 * WINDOW + 2)), 4, 0.6
    want = ids
    with torch.no_grad():
        for _ in range(NEW):
            out = it(want, output_hidden_states=True, use_cache=False)
            before = torch.nn.functional.normalize(out.hidden_states[-1][0].float(), dim=-1)
            likely, found = out.logits[0, -1].float().softmax(-1).topk(k)
            longer = torch.cat((want.expand(k, -1), found[:, None]), dim=1)
            states = it(longer, output_hidden_states=True, use_cache=False).hidden_states[-1][:, -1]
            near = (torch.nn.functional.normalize(states.float(), dim=-1) @ before.T).amax(-1)
            best = ((1 - alpha) * likely - alpha * near).argmax()
            want = longer[best][None]
    assert torch.equal(tokens(member, ids, penalty_alpha=alpha, top_k=k), want)


@everyone
@pytest.mark.parametrize("how", [{}, dict(do_sample=True, seed=4, top_k=9)], ids=["greedy", "sample"])
@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
def test_the_batch_engine_gives_what_rows_get_alone(member, how, recorded, monkeypatch):
    if recorded:
        monkeypatch.setitem(capture.CAPTURES, "cpu", Uncaptured)
    prompts = rows(4 * WINDOW + 3, 5, 2 * WINDOW + 1, 3 * WINDOW, 1)
    asked = dict(LONG, **how)
    found = model(member=member).generate_batch(
        prompts, max_batch_size=3, page_size=4, prefill_tokens=11, cuda_graphs=recorded, **asked
    )
    monkeypatch.undo()
    for prompt, result in zip(prompts, found, strict=True):
        assert result.ids == tokens(member, torch.tensor([prompt]), **how)[0].tolist()


@everyone
@pytest.mark.parametrize("padded", [False, True])
def test_recorded_steps_see_windows(member, padded, monkeypatch):
    ids, mask = PADDED if padded else (torch.tensor(rows(4 * WINDOW)), None)
    want = tokens(member, ids, mask, use_cache=False)
    monkeypatch.setitem(capture.CAPTURES, "cpu", Uncaptured)
    it = model(member=member)
    assert it.loop_plan() == "replayed from a graph"
    found = it.generate(ids, attention_mask=mask, **LONG)
    assert it.free_graphs()
    assert torch.equal(found, want)


# -- caches that forget ------------------------------------------------------------------------------------------------


@everyone
@pytest.mark.parametrize("name", [n for n in MANY if "contrastive" not in n])
def test_what_windows_hide_is_let_go_of_and_tokens_stay(member, name):
    ids, mask = PADDED
    it, asked = model(member=member), settings(name, max_new_tokens=2 * (WINDOW + SPARE), eos_token_id=None)
    it.config.max_position_embeddings = 512
    decoding = begin(it, ids, attention_mask=mask, **asked)
    assert type(decoding.prompt.cache) is WindowCache
    full = it.generate(ids, attention_mask=mask, past_key_values=DynamicCache(), **asked)
    assert torch.equal(decoding.run(), full)
    assert any(isinstance(layer, WindowLayer) and layer.forgotten for layer in decoding.prompt.cache.layers)


@everyone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_layers_write_to_buffers_that_move(member, dtype, monkeypatch):
    """To the bit as where everything is kept; past the prompt nothing is appended by torch."""
    if cpu.library() is None:
        pytest.skip(cpu.decision().why)
    it, ids = copy.deepcopy(model(member=member)).to(dtype), torch.tensor(rows(5 * WINDOW + 3 * SPARE))
    found = []
    for cache in (WindowCache(it.config), DynamicCache()):
        with torch.no_grad(), monkeypatch.context() as patch:
            out = [it(ids[:, : 5 * WINDOW], past_key_values=cache).logits]
            patch.setattr(CacheLayer, "append", None)
            patch.setattr(WindowLayer, "append", None)
            out += [it(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5 * WINDOW, ids.shape[1])]
        found.append(torch.cat(out, dim=1))
    assert torch.equal(*found)


@everyone
def test_a_cache_that_somebody_reads_forgets_nothing(member):
    ids, it = torch.tensor(rows(4 * WINDOW)), model(member=member)
    out = it.generate(ids, return_dict_in_generate=True, output_attentions=True, **LONG)
    assert all(keys.shape[2] == 4 * WINDOW + NEW - 1 for keys, _ in out.past_key_values)
    contrastive = begin(it, ids, penalty_alpha=0.6, top_k=4, **LONG)
    assert type(contrastive.prompt.cache) is DynamicCache


@pytest.mark.parametrize("seed", range(6))
def test_a_window_layer_holds_what_its_queries_see(seed):
    """Appended, taken back and reordered at random, beside a layer that keeps everything."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    window, spare = draw(1, 12), draw(0, 9)
    short, full = WindowLayer(window, spare), CacheLayer(None)
    with torch.no_grad():
        for _ in range(120):
            S = draw(1, 4) ** 3
            new = torch.randn(2, 2, 3, S, 4, generator=generator)
            found, want = short.append(*new, None), full.append(*new, None)
            reach = min(S + window - 1, want[0].shape[2])
            assert all(torch.equal(a[:, :, -reach:], b[:, :, -reach:]) for a, b in zip(found, want, strict=True))
            back = draw(0, min(spare, S) + 1)
            for layer in (short, full):
                layer.check_crop(int(layer.length) - back)
                layer.crop(int(layer.length) - back)
                layer.rebatch(lambda x: x.flip(0))
            assert int(short.length) == int(full.length)
            assert short.held <= max(window + short.kept + 1, S)


def test_more_than_a_cache_keeps_is_not_taken_back():
    config = model(member="gemma3_text").config
    cache = WindowCache(config)
    new = torch.zeros(1, 2, 200, 8)
    with torch.no_grad():
        for i in range(2):
            cache.update(new, new, i)
    with pytest.raises(InputError, match=r"65 tokens are to be taken back.*window of 8"):
        cache.crop(-SPARE - 1)
    assert [int(layer.length) for layer in cache.layers] == [200, 200]
    with pytest.raises(InputError, match="forgotten"):
        cache.to_legacy_cache()
    cache.crop(-SPARE)
    assert cache.get_seq_length() == 200 - SPARE
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("tokens", [5, 300])
def test_memory_is_that_of_the_window_in_window_layers(tokens):
    """What is held is counted, of a model of two layers whose full one grows by a half at most."""
    it = model(member="gemma3_text")
    cache = WindowCache(it.config)
    one = torch.zeros(1, 2, 1, 8)
    with torch.no_grad():
        for _ in range(tokens):
            for i in range(2):
                cache.update(one, one, i)
    position = 2 * one.nbytes
    short, full = (layer.nbytes for layer in cache.layers)
    assert short == sum(t.untyped_storage().nbytes() for t in (cache.layers[0]._keys, cache.layers[0]._values))
    assert short <= position * max(64, 2 * WINDOW + SPARE)
    assert position * tokens <= full <= position * max(64, 1.5 * tokens)


def test_gemma_3_4b_holds_128k_tokens_in_2_7_gigabytes():
    """By the layout, on torch's meta device: 17 GB where every layer keeps everything."""
    config = gemmakit.Gemma3TextConfig(
        hidden_size=2560, num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        sliding_window=1024,
    )  # fmt: skip
    context = 128 * 1024

    def held(cache):
        with torch.no_grad():
            for start in range(0, context, 4096):
                new = torch.empty(1, 4, min(4096, context - start), 256, dtype=torch.bfloat16, device="meta")
                for i in range(34):
                    cache.update(new, new, i)
        return cache.nbytes / 2**30

    assert held(WindowCache(config)) < 2.75
    assert held(StaticCache(config, max_cache_len=context)) == pytest.approx(17.0)
