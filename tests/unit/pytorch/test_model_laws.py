"""Laws of the forward pass, against a reference written out in float64 and against itself.

EXACT 2e-5, a share of the largest logit: float32 steps are 6e-8; three matrix products a layer sum up to 64 of them.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gemma import VOCAB, far, left_padded, prompts, reference_logits, tiny

import gemmakit
from gemmakit.errors import InputError, TokenOutOfRange
from gemmakit.pytorch.attention import IMPLEMENTATIONS
from gemmakit.pytorch.masks import Visibility

EXACT = 2e-5
ATTENTION = ("eager", "sdpa")
HEADS = [(1, False), (2, True), (4, False)]  # kv heads, bias

each_attention = pytest.mark.parametrize("attn", ATTENTION)


def causal(width, rows=1):
    return torch.ones(width, width, dtype=torch.bool).tril().expand(rows, -1, -1)


# -- against the reference -------------------------------------------------------------------------------------------


@each_attention
@pytest.mark.parametrize(("kv_heads", "bias"), HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_forward_equals_the_formulas_of_the_paper(attn, kv_heads, bias, tied):
    model = tiny(num_key_value_heads=kv_heads, attention_bias=bias, attn_implementation=attn, tie_word_embeddings=tied)
    ids = prompts()
    assert far(model(ids).logits, reference_logits(model, ids, causal(9, 2))) < EXACT


@each_attention
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("how", ["config", "call"])
def test_bidirectional_attention_sees_every_token_that_is_no_padding(attn, padding, how):
    model = tiny(attn_implementation=attn, use_bidirectional_attention=True if how == "config" else None)
    more = {} if how == "config" else {"is_causal": False}
    ids = prompts(rows=3, width=8)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :3] = 0
    elif padding == "right":
        mask[1, -3:] = 0
    visible = mask.bool()[:, None, :].expand(-1, 8, -1)
    logits = model(ids, attention_mask=None if padding == "none" else mask, **more).logits
    reference = reference_logits(model, ids, visible)
    assert far(logits[mask.bool()], reference[mask.bool()]) < EXACT
    assert far(reference, reference_logits(model, ids, causal(8, 3))) > 0.01  # the reference is not the causal one


@each_attention
def test_a_bidirectional_model_can_be_asked_for_causal_attention(attn):
    model = tiny(attn_implementation=attn, use_bidirectional_attention=True)
    ids = prompts()
    assert far(model(ids, is_causal=True).logits, reference_logits(model, ids, causal(9, 2))) < EXACT


@each_attention
def test_bidirectional_attention_over_a_static_cache_sees_only_written_places(attn):
    model = tiny(attn_implementation=attn)
    ids = prompts()
    cache = gemmakit.StaticCache(model.config, max_cache_len=20)
    got = model(ids, past_key_values=cache, cache_position=torch.arange(9), is_causal=False).logits
    assert far(got, model(ids, is_causal=False).logits) < EXACT


@each_attention
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_documents_equal_separate_documents(attn, use_cache):
    model = tiny(attn_implementation=attn)
    lengths = (4, 1, 6, 3)
    documents = [prompts(rows=2, width=n, seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    packed = model(torch.cat(documents, 1), position_ids=positions, use_cache=use_cache).logits
    separate = torch.cat([model(d).logits for d in documents], 1)
    assert far(packed, separate) < EXACT
    assert far(model(torch.cat(documents, 1)).logits, separate) > 0.01


@each_attention
def test_rows_may_be_packed_differently(attn):
    model = tiny(attn_implementation=attn)
    ids = prompts(rows=2, width=7)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
    packed = model(ids, position_ids=positions).logits
    assert far(packed[:1, 3:], model(ids[:1, 3:]).logits) < EXACT
    assert far(packed[1:], model(ids[1:]).logits) < EXACT


def test_shifted_positions_alone_change_nothing_but_the_phase():
    """Attention depends on differences of positions, so a shift of all of them leaves the logits as they are."""
    model = tiny()
    ids = prompts()
    shifted = model(ids, position_ids=torch.arange(9)[None] + 40).logits
    assert far(shifted, model(ids).logits) < 5e-5  # cos and sin of angles up to 48 carry their float32 rounding


# -- masks -----------------------------------------------------------------------------------------------------------


@each_attention
def test_4d_masks_are_used_as_they_are(attn):
    model = tiny(attn_implementation=attn)
    ids = prompts(rows=2, width=7)
    seen = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    seen |= torch.eye(7, dtype=torch.bool)
    reference = reference_logits(model, ids, seen[:, 0])
    lowest = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    infinite = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    for mask in (seen, lowest, infinite):
        assert far(model(ids, attention_mask=mask).logits, reference) < EXACT
    bias = torch.randn(1, 4, 7, 7, generator=torch.Generator().manual_seed(4))  # one number a head: added, not tested
    with_bias = model(ids, attention_mask=bias).logits
    assert far(with_bias, model(ids, is_causal=False).logits) > 0.01
    assert torch.isfinite(with_bias).all()


def test_4d_masks_of_whole_numbers_are_refused():
    with pytest.raises(InputError, match=r"4-D and torch.int64: give bool"):
        tiny()(prompts(), attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 1, 9, 8), (3, 1, 9, 9), (2, 1, 8, 9)])
def test_4d_masks_of_another_shape_are_refused_with_the_shape_that_fits(shape):
    with pytest.raises(InputError, match=r"\(2, 1, 9, 9\)"):
        tiny()(prompts(), attention_mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(2, 8), (3, 9), (2, 10), (18,)])
def test_2d_masks_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match="attention_mask"):
        tiny()(prompts(), attention_mask=torch.ones(shape, dtype=torch.long))


@each_attention
@pytest.mark.parametrize("kind", ["bool", "additive", "2d"])
def test_rows_that_see_nothing_give_zeros_and_finite_gradients(attn, kind):
    model = tiny(attn_implementation=attn)
    attended = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    ids = prompts(rows=2, width=6)
    seen = causal(6, 2)[:, None].clone()
    seen[1] = False
    mask = {
        "bool": seen,
        "additive": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
        "2d": torch.tensor([[1] * 6, [0] * 6]),
    }[kind]
    out = model(ids, attention_mask=mask, labels=ids, output_attentions=True)
    for values in attended:
        assert not values[1].any()
        assert values[0].any()
    assert not out.attentions[0][1].any()
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@each_attention
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 5])
def test_blind_queries_get_zero_output_and_zero_gradient(attn, kv_heads, queries):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 5, 8, generator=generator, requires_grad=True) for _ in range(2))
    seen = torch.ones(2, 1, queries, 5, dtype=torch.bool)
    seen[1, :, 0] = False
    blind = ~seen.any(-1, keepdim=True)
    out, _ = IMPLEMENTATIONS[attn](q, k, v, Visibility(seen | blind, blind=blind), scale=8**-0.5, dropout=0.0)
    assert not out[1, :, 0].any()
    assert out[0].all(-1).all()
    out.sum().backward()
    assert not q.grad[1, :, 0].any()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_asking_for_attentions_under_sdpa_gives_those_of_eager():
    ids, mask = left_padded([prompts()[0], prompts()[1, 3:]], 9)
    mask[:, 0] = torch.tensor([1, 0])
    results = {a: tiny(attn_implementation=a)(ids, attention_mask=mask, output_attentions=True) for a in ATTENTION}
    for mine, eager in zip(results["sdpa"].attentions, results["eager"].attentions, strict=True):
        assert mine.shape == (2, 4, 9, 9)
        assert torch.equal(mine, eager)
        assert torch.allclose(mine[0].sum(-1), torch.ones(4, 9))
        assert not mine.triu(1).any()


# -- padding, chunks, caches -----------------------------------------------------------------------------------------


@each_attention
@pytest.mark.parametrize(("kv_heads", "bias"), HEADS)
def test_cached_decode_equals_full_forward(attn, kv_heads, bias):
    model = tiny(num_key_value_heads=kv_heads, attention_bias=bias, attn_implementation=attn)
    ids = prompts()
    whole, cache, steps = model(ids).logits, None, []
    with torch.no_grad():
        for i in range(ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert far(torch.cat(steps, 1), whole) < EXACT


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 11)), attn=st.sampled_from(ATTENTION), padded=st.booleans())
def test_chunked_prefill_equals_one_shot(cuts, attn, padded):
    model = tiny(attn_implementation=attn)
    rows = prompts(rows=2, width=12)
    ids, mask = left_padded([rows[0], rows[1, 7:]], 12) if padded else (rows, torch.ones_like(rows))
    whole, cache, parts = model(ids, attention_mask=mask).logits, gemmakit.DynamicCache(), []
    edges = [0, *sorted(cuts), 12]
    with torch.no_grad():
        for start, end in pairwise(edges):
            parts.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    assert far(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()]) < EXACT


@each_attention
@pytest.mark.parametrize("places", [True, False], ids=["cache_position", "counted"])
def test_static_cache_equals_dynamic_cache(attn, places):
    model = tiny(attn_implementation=attn)
    rows = prompts(rows=2, width=10)
    ids, mask = left_padded([rows[0], rows[1, 4:]], 10)
    static, dynamic = gemmakit.StaticCache(model.config, max_cache_len=16), gemmakit.DynamicCache()
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 10)):
            more = {"cache_position": torch.arange(start, end)} if places else {}
            piece, seen = ids[:, start:end], mask[:, :end]
            mine = model(piece, attention_mask=seen, past_key_values=static, **more).logits
            other = model(piece, attention_mask=seen, past_key_values=dynamic).logits
            at = mask[:, start:end].bool()
            assert far(mine[at], other[at]) < EXACT
    assert static.get_seq_length() == dynamic.get_seq_length() == 10


@each_attention
def test_right_padding_changes_no_real_position(attn):
    model = tiny(attn_implementation=attn)
    ids = prompts(rows=1, width=6)
    padded = torch.cat((ids, torch.zeros(1, 4, dtype=torch.long)), 1)
    mask = torch.tensor([[1] * 6 + [0] * 4])
    assert far(model(padded, attention_mask=mask).logits[:, :6], model(ids).logits) < EXACT


# -- inputs and outputs ----------------------------------------------------------------------------------------------


def test_inputs_embeds_are_used_as_given():
    model = tiny()
    ids = prompts()
    scaled = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=scaled).logits, model(ids).logits)
    assert torch.equal(model.model(inputs_embeds=scaled, output_hidden_states=True).hidden_states[0], scaled)


def test_exactly_one_of_ids_and_embeds_is_needed():
    model = tiny()
    for arguments in ({}, {"input_ids": prompts(), "inputs_embeds": torch.zeros(2, 9, 40)}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**arguments)


def test_logits_to_keep_keeps_the_last_or_the_named_positions():
    model = tiny()
    ids = prompts()
    whole = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=0).logits, whole)
    assert far(model(ids, logits_to_keep=3).logits, whole[:, -3:]) < EXACT
    places = torch.tensor([7, 0])
    assert far(model(ids, logits_to_keep=places).logits, whole[:, places]) < EXACT


def test_labels_are_shifted_inside_and_minus_100_is_ignored():
    model = tiny()
    ids = prompts()
    labels = ids.clone()
    labels[0, 2:5] = -100
    logits = model(ids).logits.detach().double().log_softmax(-1)
    terms = [-logits[b, s, labels[b, s + 1]] for b in range(2) for s in range(8) if labels[b, s + 1] != -100]
    expected = float(sum(terms))
    assert float(model(ids, labels=labels).loss.detach()) == pytest.approx(expected / len(terms), rel=1e-6)
    counted = model(ids, labels=labels, num_items_in_batch=50).loss.detach()
    assert float(counted) == pytest.approx(expected / 50, rel=1e-6)


@pytest.mark.parametrize("kept", [4, torch.tensor([1, 2, 6])], ids=["int", "tensor"])
def test_loss_over_kept_positions_asks_each_for_its_own_next_token(kept):
    model = tiny()
    ids = prompts()
    places = kept if isinstance(kept, torch.Tensor) else torch.arange(5, 9)
    logits = model(ids).logits.detach().double().log_softmax(-1)
    terms = [-logits[b, s, ids[b, s + 1]] for b in range(2) for s in places.tolist() if s < 8]
    loss = model(ids, labels=ids, logits_to_keep=kept).loss.detach()
    assert float(loss) == pytest.approx(float(sum(terms)) / len(terms), rel=1e-6)


def test_loss_is_float32_in_half_models():
    model = tiny().bfloat16()
    out = model(prompts(), labels=prompts())
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32


def test_hidden_states_begin_with_the_embedding_and_end_after_the_final_norm():
    model = tiny()
    ids = prompts()
    before_norm = []
    model.model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    out = model.model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert out.hidden_states[-1] is out.last_hidden_state
    assert not torch.allclose(out.hidden_states[-1], before_norm[0])
    assert torch.equal(model.model.norm(before_norm[0]), out.last_hidden_state)


def test_return_dict_false_gives_a_tuple_without_what_was_not_asked_for():
    model = tiny()
    ids = prompts()
    logits = model(ids).logits
    alone = model(ids, return_dict=False, use_cache=False)
    assert isinstance(alone, tuple)
    assert len(alone) == 1
    assert torch.equal(alone[0], logits)
    loss, again, cache = model(ids, labels=ids, return_dict=False)
    assert loss.dim() == 0
    assert torch.equal(again, logits)
    assert isinstance(cache, gemmakit.DynamicCache)
    everything = model.model(ids, return_dict=False, output_hidden_states=True, output_attentions=True)
    assert [type(x) for x in everything] == [torch.Tensor, gemmakit.DynamicCache, tuple, tuple]


def test_defaults_of_the_call_come_from_the_configuration():
    model = tiny(output_attentions=True, output_hidden_states=True, use_cache=False, return_dict=False)
    out = model(prompts())
    assert [type(x) for x in out] == [torch.Tensor, tuple, tuple]


def test_token_ids_outside_the_vocabulary_are_named():
    for bad in (VOCAB, -1, 10**6):
        ids = prompts()
        ids[1, 4] = bad
        with pytest.raises(TokenOutOfRange, match=rf"token id {bad} is outside the vocabulary of {VOCAB}"):
            tiny()(ids)


@pytest.mark.parametrize("bad", [VOCAB, -1, -99, 10**9])
def test_labels_outside_the_vocabulary_are_named(bad):
    labels = prompts()
    labels[1, 3] = bad
    with pytest.raises(InputError, match=rf"label {bad} is outside the vocabulary of {VOCAB}"):
        tiny()(prompts(), labels=labels)


@pytest.mark.parametrize("wrong", [-1, 1.5, True, None, torch.tensor(3), torch.tensor([[0]])], ids=str)
def test_logits_to_keep_of_another_kind_is_refused(wrong):
    with pytest.raises(InputError, match="logits_to_keep is"):
        tiny()(prompts(), logits_to_keep=wrong)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_of_any_whole_type(dtype):
    model, ids = tiny(), prompts()
    assert torch.equal(model(ids, labels=ids.to(dtype)).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_labels_that_are_no_ids_are_refused(dtype):
    with pytest.raises(InputError, match="must be token ids"):
        tiny()(prompts(), labels=prompts().to(dtype))


@pytest.mark.parametrize(
    "wrong", [{"input_ids": prompts()}, [[2, 3]], prompts().numpy()], ids=lambda x: type(x).__name__
)
def test_what_is_no_tensor_is_refused_with_the_remedy(wrong):
    with pytest.raises(InputError, match=r"input_ids is a .*must be a tensor"):
        tiny()(wrong)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"\(2, 8\).*\(2, 9\)"):
        tiny()(prompts(), labels=prompts()[:, 1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(inputs_embeds=torch.zeros(2, 3, 7)), r"inputs_embeds has shape \(2, 3, 7\).*\(batch, sequence, 40\)"),
        (dict(inputs_embeds=torch.zeros(3, 40)), r"inputs_embeds has shape \(3, 40\)"),
        (dict(input_ids=torch.zeros(3, dtype=torch.long)), r"input_ids has shape \(3,\)"),
        (dict(input_ids=prompts(), position_ids=torch.arange(9)), r"position_ids has shape \(9,\).*\(2, 9\)"),
        (dict(input_ids=prompts(), position_ids=torch.arange(5)[None]), r"position_ids has shape \(1, 5\)"),
        (dict(input_ids=prompts()[:, :0]), "2 rows of 0 tokens"),
        (dict(input_ids=prompts()[:0]), "0 rows of 9 tokens"),
        (dict(input_ids=prompts(), past_key_values=5), "past_key_values is a int.*2 layers"),
        (dict(input_ids=prompts(), past_key_values=[(torch.zeros(2, 2, 3, 12),) * 2]), "is 1 layers.*of 2 layers"),
        (dict(input_ids=prompts(), labels=prompts().float()), "labels are torch.float32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        tiny()(**arguments)


def test_labels_may_be_of_any_whole_dtype():
    model = tiny()
    losses = [float(model(prompts(), labels=prompts().to(d)).loss.detach()) for d in (torch.long, torch.int32)]
    assert losses[0] == losses[1]


# -- training --------------------------------------------------------------------------------------------------------


def gradients(model, **more):
    ids = prompts()
    model.zero_grad()
    model(ids, labels=ids, **more).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@each_attention
def test_gradients_flow_with_a_cache_as_without(attn):
    model = tiny(attn_implementation=attn).train()
    with_cache, without = gradients(model, use_cache=True), gradients(model, use_cache=False)
    for name, gradient in without.items():
        assert gradient.any(), name
        assert torch.equal(with_cache[name], gradient), name


@each_attention
@pytest.mark.parametrize("trained", ["", "q_proj", "layers.0.self_attn.v_proj"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_gradients_flow_through_two_cached_passes(attn, trained, kind):
    """Whatever is frozen: a cache that writes in place would destroy what the first pass saved for its backward."""
    model = tiny(attn_implementation=attn).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    ids = prompts()

    def loss(parts):
        cache = gemmakit.DynamicCache() if kind == "dynamic" else gemmakit.StaticCache(model.config, max_cache_len=12)
        logits = torch.cat([model(p, past_key_values=cache).logits for p in parts], 1)
        return logits.log_softmax(-1).gather(-1, ids[..., None]).sum()

    found = []
    for parts in ((ids,), (ids[:, :4], ids[:, 4:])):
        model.zero_grad()
        loss(parts).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert found[0]
    for name, gradient in found[0].items():
        assert float((found[1][name] - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max()), name


@each_attention
def test_gradient_checkpointing_equals_plain_gradients(attn):
    model = tiny(attn_implementation=attn).train()
    plain = gradients(model)
    passes = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, plain[name]), name
    assert len(passes) == 2  # the layer did run again in the backward pass
    model.gradient_checkpointing_disable()
    gradients(model)
    assert len(passes) == 3


def test_gradient_checkpointing_refuses_a_cache_that_it_would_fill_twice():
    model = tiny().train()
    with torch.no_grad():
        cache = model(prompts(), use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="gradient checkpointing"):
        model(prompts(), past_key_values=cache)


def test_dropout_acts_in_training_only():
    model = tiny(attention_dropout=0.5)
    ids = prompts()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_hooks_and_names_are_those_of_released_checkpoints():
    names = set(tiny(num_hidden_layers=1).state_dict())
    layer = "model.layers.0."
    assert names == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        *(f"{layer}self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"{layer}mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
        f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight",
    }  # fmt: skip


def test_fresh_weights_are_normal_with_zero_norms_biases_and_padding_row():
    model = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attention_bias=True, initializer_range=0.05,
    ))  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.05, rel=0.1), name  # 2048 draws or more: 6 sigma
    assert not model.model.embed_tokens.weight[0].any()
    assert model.lm_head.weight is model.model.embed_tokens.weight
