"""Gemma 2, Gemma 3, VaultGemma and Gemma 4 against transformers, prompts and answers several windows long.

Tolerances as in test_forward_matches_transformers, for the same reasons; through up to 7 layers instead of 3.
transformers refuses sdpa for models with capped scores, so there its side is eager whatever ours is.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from parity_tools import apart, batch, randomise
from tiny_shapes import COMMON, MEMBERS, SHAPES, WINDOW

import gemmakit
from gemmakit.family import KINDS
from gemmakit.pytorch import layers

LENGTH = 5 * WINDOW + 3
FLOAT32 = 4e-5
HALF = {torch.bfloat16: 8 * 2**-8, torch.float16: 8 * 2**-11}
TOLERANCE = {torch.float32: FLOAT32, **HALF}
PADDING = ("none", "left", "right")
everyone = pytest.mark.parametrize("member", MEMBERS)


def run(model, ids, mask=None, **more):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **more)


@everyone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_one_pass_equal_the_oracle_to_the_bit(pair, member, shape, dtype):
    both = pair(shape, member=member, dtype=dtype)
    ids, _ = batch("none", rows=2, width=LENGTH)
    ours, theirs = run(both.ours, ids, use_cache=False).logits, run(both.theirs, ids, use_cache=False).logits
    assert type(both.ours).__name__ == KINDS[member].classes["causal_lm"]
    assert torch.equal(ours, theirs)


@everyone
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_logits_equal_the_oracle_in_every_dtype_and_padding(pair, member, attn, dtype):
    exact, both = pair("gqa", member=member), pair("gqa", member=member, dtype=dtype)
    both.ours.set_attn_implementation(attn)
    for padding in PADDING:
        ids, mask = batch(padding, width=LENGTH)
        ours, theirs = run(both.ours, ids, mask).logits, run(both.theirs, ids, mask).logits
        if KINDS[member].scale == 1.0 and dtype in HALF:
            # Scores that are not scaled down move their weights by more where they are rounded, as the oracle's are:
            # in float16 it is 2^-7.5 from float32. Rounded alike nothing differs; else each has its own distance.
            truth = run(exact.theirs, ids, mask).logits
            near, its = (apart(x.float(), truth, mask) for x in (ours, theirs))
            assert near < 1.5 * its, padding
            assert attn != "eager" or dtype == torch.float16 or apart(ours, theirs, mask) == 0.0
        else:
            assert apart(ours, theirs, mask) < TOLERANCE[dtype], padding


@everyone
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_flex_attention_is_as_near_to_float32_as_the_oracle(pair, member, dtype):
    """It keeps scores in float32 where the oracle's eager rounds them: each has its own distance from the truth."""
    exact, both = pair("gqa", member=member), pair("gqa", member=member, dtype=dtype)
    both.ours.set_attn_implementation("flex_attention")
    for padding in PADDING:
        ids, mask = batch(padding, width=LENGTH)
        truth = run(exact.theirs, ids, mask).logits
        ours, theirs = (apart(run(m, ids, mask).logits.float(), truth, mask) for m in (both.ours, both.theirs))
        assert ours < max(1.5 * theirs, FLOAT32), padding


@everyone
@pytest.mark.parametrize("padding", PADDING)
def test_every_hidden_state_and_attention_equals_the_oracle(pair, member, padding):
    both = pair("gqa", member=member)
    ids, mask = batch(padding, width=LENGTH)
    asked = dict(output_hidden_states=True, output_attentions=True)
    ours, theirs = run(both.ours, ids, mask, **asked), run(both.theirs, ids, mask, **asked)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == len(both.ours.model.layers) + 1
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert apart(mine, other, mask) < FLOAT32
    for mine, other in zip(ours.attentions, theirs.attentions, strict=True):
        assert apart(mine.transpose(1, 2), other.transpose(1, 2), mask) < FLOAT32


@everyone
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [(1,), (WINDOW,), (3, 1, 2 * WINDOW, 1, 1)], ids=["steps", "windows", "mixed"])
def test_cached_passes_equal_the_oracles_single_pass(pair, member, chunks, kind, attn, padding):
    both = pair("gqa", member=member)
    both.ours.set_attn_implementation(attn)
    ids, mask = batch(padding, width=LENGTH)
    whole = run(both.theirs, ids, mask, use_cache=False).logits
    static = gemmakit.StaticCache(both.ours.config, max_cache_len=LENGTH + 5)
    cache, start, i = static if kind == "static" else gemmakit.DynamicCache(), 0, 0
    while start < LENGTH:
        end = min(start + chunks[i % len(chunks)], LENGTH)
        seen = None if mask is None else mask[:, :end]
        ours = run(both.ours, ids[:, start:end], seen, past_key_values=cache).logits
        at = None if mask is None else mask[:, start:end]
        if at is None or bool(at.any()):
            assert apart(ours, whole[:, start:end], at) < FLOAT32, (start, end)
        start, i = end, i + 1
    assert cache.get_seq_length() == LENGTH


CACHES = {"dynamic": {}, "static": dict(cache_implementation="static"), "none": dict(use_cache=False)}


@everyone
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("width", [5, 3 * WINDOW + 1])
def test_greedy_tokens_are_the_oracles_far_past_the_window(pair, member, width, cache, padding):
    # A tied head would say what it reads over and over.
    both = pair("gqa", member=member, attn="sdpa", tie_word_embeddings=False)
    ids, mask = batch(padding, width=width) if width > 7 else (batch("none", width=width)[0], None)
    asked = dict(attention_mask=mask, max_new_tokens=4 * WINDOW, do_sample=False, eos_token_id=None)
    theirs = both.theirs.generate(ids, **asked)
    assert both.ours.generate(ids, **asked, **CACHES[cache]).tolist() == theirs.tolist()
    assert len(set(theirs[:, width:].flatten().tolist())) > 8  # it says various things


@everyone
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_every_gradient_equal_the_oracle(pair, member, shape, attn):
    both = pair(shape, member=member)
    both.ours.set_attn_implementation(attn)
    ids, mask = batch("left", width=LENGTH)
    labels = ids.masked_fill(mask.cumsum(-1) < 2, -100)
    found = {}
    for name, model in (("ours", both.ours.train()), ("theirs", both.theirs.train())):
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        found[name] = float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}
    assert found["ours"][0] == pytest.approx(found["theirs"][0], rel=1e-6)
    mine, other = found["ours"][1], found["theirs"][1]
    assert mine.keys() == other.keys()
    overall = max(float(g.abs().max()) for g in other.values())
    for name, gradient in other.items():
        assert gradient.abs().max() > 0, name
        assert float((mine[name] - gradient).abs().max()) <= FLOAT32 * overall, name


@everyone
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_bfloat16_gradients_are_as_near_to_float32s_as_the_oracles(pair, member, attn):
    """By themselves the two differ by up to 2% of a tensor's largest; both are ten times as far from float32."""
    both = pair("gqa", member=member, dtype=torch.bfloat16)
    both.ours.set_attn_implementation(attn)
    ids, mask = batch("left", width=LENGTH)
    labels = ids.masked_fill(mask.cumsum(-1) < 2, -100)

    def gradients(model):
        model.train().zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return torch.cat([p.grad.float().flatten() for _, p in sorted(model.named_parameters())])

    exact = copy.deepcopy(both.theirs)
    for tensor in (*exact.parameters(), *(b for n, b in exact.named_buffers() if n.endswith("layer_scalar"))):
        tensor.data = tensor.data.float()
    truth = gradients(exact)
    ours, theirs = (float((gradients(m) - truth).norm() / truth.norm()) for m in (both.ours, both.theirs))
    assert ours < 1.1 * theirs


@everyone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_in_chunks_is_the_whole_loss_with_its_gradients(pair, member, dtype):
    model = pair("gqa", member=member, dtype=dtype).ours.train()
    ids, _ = batch("none", width=LENGTH)
    found = []
    for chunk in (None, 7):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, loss_chunk_size=chunk).loss
        loss.backward()
        found.append((float(loss.detach()), {n: p.grad.float() for n, p in model.named_parameters()}))
    (whole, mine), (parts, other) = found
    # The chunked sums come in another order: float32 steps, or roundings of the half format the other way, which the
    # layers below carry on: up to 2^-5.2 measured.
    close = 1e-5 if dtype == torch.float32 else 2**-4
    assert parts == pytest.approx(whole, rel=1e-6)
    for name, gradient in mine.items():
        assert float((other[name] - gradient).abs().max()) <= close * float(gradient.abs().max()), name


@everyone
def test_given_4d_masks_and_embeddings_equal_the_oracle(pair, member):
    both = pair("gqa", member=member)
    ids, _ = batch("none", rows=2, width=LENGTH)
    seen = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5)) < 0.5
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    theirs = run(both.theirs, ids, added).logits
    for mask in (seen, added):
        assert apart(run(both.ours, ids, mask).logits, theirs) < FLOAT32
    embeds = torch.randn(2, LENGTH, 48, generator=torch.Generator().manual_seed(2))
    more = {}
    if width := both.ours.config.hidden_size_per_layer_input:
        # Without them, the tokens that the embeddings are of are looked for: here there are none.
        with pytest.raises(gemmakit.errors.InputError, match="is no token's embedding"):
            run(both.ours, None, inputs_embeds=embeds)
        own = both.ours.model.embed_tokens(ids)
        assert torch.equal(run(both.ours, None, inputs_embeds=own).logits, run(both.ours, ids).logits)
        more = dict(per_layer_inputs=torch.randn(2, LENGTH, len(both.ours.model.layers), width))
    ours, theirs = (run(m, None, inputs_embeds=embeds, **more).logits for m in (both.ours, both.theirs))
    assert apart(ours, theirs) < FLOAT32


@everyone
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_packed_documents_equal_each_document_alone(pair, member, attn):
    model = pair("gqa", member=member).ours
    model.set_attn_implementation(attn)
    lengths = (2 * WINDOW + 3, 3, WINDOW, 3 * WINDOW)
    ids, _ = batch("none", rows=1, width=sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = run(model, ids, position_ids=positions, use_cache=False).logits
    alone = [run(model, part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    assert apart(packed, torch.cat(alone, dim=1)) < FLOAT32


def embedder(library, shape="gqa"):
    fields = {**COMMON, **SHAPES[shape], **MEMBERS["gemma3_text"], "sliding_window": 2 * WINDOW}
    return library.Gemma3TextModel(library.Gemma3TextConfig(**fields, use_bidirectional_attention=True)).eval()


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("attn", ["eager", "sdpa", "flex_attention"])
def test_bidirectional_windows_equal_the_oracle(attn, padding):
    theirs, ours = embedder(transformers), embedder(gemmakit)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    ours.set_attn_implementation(attn)
    ids, mask = batch(padding, width=LENGTH)
    mine, other = run(ours, ids, mask).last_hidden_state, run(theirs, ids, mask).last_hidden_state
    assert apart(mine, other, mask) < FLOAT32
    # Each side sees half the window and itself.
    assert (ours.config.sliding_window, ours.config.layer(0).window) == (2 * WINDOW, WINDOW + 1)


HEADS = {
    ("gemma2", "sequence_classification"): "Gemma2ForSequenceClassification",
    ("gemma2", "token_classification"): "Gemma2ForTokenClassification",
    ("gemma3_text", "sequence_classification"): "Gemma3TextForSequenceClassification",
}


@pytest.mark.parametrize("role", ["sequence_classification", "token_classification"])
@everyone
def test_every_member_has_every_head(member, role, tmp_path):
    """Where transformers has the head too, with its logits and in its files."""
    classes = KINDS[member].classes
    fields = {**COMMON, **SHAPES["gqa"], **MEMBERS[member], "num_labels": 3}
    ours = getattr(gemmakit, classes[role])(getattr(gemmakit, classes["config"])(**fields)).eval()
    randomise(ours)
    ids, mask = batch("left", width=LENGTH)
    logits = run(ours, ids, mask).logits
    ours.save_pretrained(tmp_path)
    again = getattr(gemmakit, classes[role]).from_pretrained(tmp_path)
    assert torch.equal(run(again, ids, mask).logits, logits)
    theirs = HEADS.get((member, role))
    if theirs is not None:
        oracle = getattr(transformers, theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()
        keep = mask.bool() if role == "token_classification" else slice(None)
        assert apart(logits[keep], run(oracle, ids, mask).logits[keep]) < FLOAT32


@everyone
@pytest.mark.parametrize("author", ["transformers", "gemmakit"])
def test_checkpoints_of_either_library_are_read_by_both(pair, member, author):
    both = pair("mqa", author=author, member=member, attn="sdpa")
    ids, _ = batch("none", width=LENGTH)
    assert apart(run(both.ours, ids).logits, run(both.theirs, ids).logits) < FLOAT32
    again = gemmakit.AutoModelForCausalLM.from_pretrained(both.folder)
    assert type(again).__name__ == type(both.theirs).__name__
    assert again.config.layer_types == both.theirs.config.layer_types


@pytest.fixture
def streams():
    """The dtypes in which the residual stream is scaled, to be changed by a test."""
    before = dict(layers.STREAM_SCALES)
    yield layers.STREAM_SCALES
    layers.STREAM_SCALES.clear()
    layers.STREAM_SCALES.update(before)


@pytest.mark.parametrize("member", ["gemma2", "gemma3_text"])
def test_scaling_the_residual_stream_changes_no_bit(pair, member, streams):
    model = pair("gqa", member=member).ours
    ids, mask = batch("left", width=LENGTH)
    asked = dict(output_hidden_states=True)
    plain = run(model, ids, mask, **asked)
    streams[torch.float32] = streams[torch.float16]
    scaled = run(model, ids, mask, **asked)
    assert torch.equal(plain.logits, scaled.logits)
    for a, b in zip(plain.hidden_states, scaled.hidden_states, strict=True):
        assert torch.equal(a, b)


def test_float16_does_not_overflow_where_the_oracle_does(pair, tmp_path):
    """Large norms after attention and MLP, as the trained models have them."""
    both = pair("gqa", member="gemma3_text")
    with torch.no_grad():
        for name, parameter in both.theirs.named_parameters():
            if "post_" in name:
                parameter.mul_(3e4)
    both.theirs.save_pretrained(tmp_path)
    exact = gemmakit.Gemma3ForCausalLM.from_pretrained(tmp_path)
    half = gemmakit.Gemma3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    ids, _ = batch("none", width=LENGTH)
    truth, ours = run(exact, ids).logits, run(half, ids).logits.float()
    oracle = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float16, attn_implementation="eager")
    assert not run(oracle.eval(), ids).logits.isfinite().all()
    assert ours.isfinite().all()
    # float16 rounds to 2^-11 and some twenty roundings lie between: a hundredth, far from what an overflow leaves.
    assert float((ours - truth).norm() / truth.norm()) < 0.01


@everyone
def test_configurations_mean_the_same_in_both_libraries(member, tmp_path):
    classes = KINDS[member].classes
    fewer = dict(sliding_window=99, num_hidden_layers=5)
    for fields in ({}, {**COMMON, **SHAPES["mqa"], **MEMBERS[member]}, fewer):
        ours, theirs = (
            getattr(gemmakit, classes["config"])(**fields),
            getattr(transformers, classes["config"])(**fields),
        )
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        read = getattr(transformers, classes["config"]).from_pretrained(tmp_path / "ours")
        mine = gemmakit.AutoConfig.from_pretrained(tmp_path / "theirs")
        assert type(mine).__name__ == classes["config"]
        for oracle in (theirs, read):  # where its layers differ, it asks which one is meant
            oracle.allow_global_per_layer_attribute_access = True
        assert len({tuple(map(c.layer, range(c.num_hidden_layers))) for c in (ours, mine)}) == 1
        for a, b in ((ours, theirs), (ours, read), (mine, theirs)):
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                         "num_attention_heads", "num_key_value_heads", "query_pre_attn_scalar", "sliding_window",
                         "layer_types", "attn_logit_softcapping", "final_logit_softcapping",
                         "max_position_embeddings", "hidden_activation", "eos_token_id"):  # fmt: skip
                assert getattr(a, name, None) == getattr(b, name, None), name
            assert a.rope_parameters == b.rope_parameters
        for i, spec in enumerate(map(ours.layer, range(ours.num_hidden_layers))):
            for one in (theirs, read):
                told = one.per_layer_config[i] if classes["config"] == "Gemma4TextConfig" else one
                assert (spec.head_dim, spec.num_key_value_heads) == (told.head_dim, told.num_key_value_heads)
