"""Going on from a cache gives what starting over gives, whoever filled it, whatever form the prompt has.

transformers has most of the faults that these laws are held against; the last tests write down which.
"""

import copy
import itertools

import pytest
import torch
import transformers
from tiny_gemma import left_padded, prompts, tiny

import gemmakit
from gemmakit.errors import InputError

NEW = dict(max_new_tokens=5, eos_token_id=None)
MODEL = tiny()
TURN = 3  # tokens of the second turn
FILLED = {
    "forward": lambda ids, mask, cache: MODEL(ids, attention_mask=mask, past_key_values=cache),
    "forward, positions of its own": lambda ids, mask, cache: MODEL(
        ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0) + 7, past_key_values=cache
    ),
    "token by token": lambda ids, mask, cache: [
        MODEL(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache) for i in range(ids.shape[1])
    ],
    "generate": lambda ids, mask, cache: MODEL.generate(
        ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, max_new_tokens=2, eos_token_id=None
    ),
    "rows that were reordered": lambda ids, mask, cache: [
        MODEL(ids.flip(0), attention_mask=mask.flip(0), past_key_values=cache),
        cache.reorder_cache(torch.arange(len(ids)).flip(0)),
    ],
    "more than is kept": lambda ids, mask, cache: [
        FILLED["forward"](ids, mask, cache),
        _second(ids, cache),
        cache.crop(ids.shape[1]),
    ],
}


def _second(ids, cache):
    """A turn that is padded itself, to be taken back."""
    ids, mask = left_padded([row[-n:] for row, n in zip(ids, (5, 2), strict=True)], 5)
    return MODEL.generate(ids, attention_mask=mask, past_key_values=cache, **NEW)


def turns(lengths):
    """Two turns of rows of these lengths: ids and mask of the first, what the second adds, and each row alone."""
    first = [prompts(rows=1, width=n, seed=i)[0] for i, n in enumerate(lengths)]
    more = prompts(rows=len(lengths), width=TURN + 1, seed=50)[:, 1:]
    ids, mask = left_padded(first, max(lengths))
    alone = [torch.cat((row, more[i])) for i, row in enumerate(first)]
    return ids, mask, more, [MODEL.generate(row[None], **NEW)[0, len(row) :].tolist() for row in alone]


def filled(by, ids, mask, kind=gemmakit.DynamicCache):
    cache = kind() if kind is gemmakit.DynamicCache else kind(MODEL.config, max_cache_len=40)
    with torch.no_grad():
        FILLED[by](ids, mask, cache)
        if by == "generate":  # the token it chose is not the prompt's
            cache.crop(ids.shape[1] - 1)
            MODEL(ids[:, -1:], attention_mask=mask, past_key_values=cache)
    return cache


@pytest.mark.parametrize("by", FILLED)
@pytest.mark.parametrize("lengths", [(6, 6), (6, 3)], ids=["even", "padded"])
def test_whoever_fills_a_cache_generate_goes_on_as_if_from_the_start(by, lengths):
    """Ids and embeddings, all of them or the new ones, with a mask over all, over the prompt, or none."""
    ids, mask, more, expected = turns(lengths)
    whole, seen = torch.cat((ids, more), 1), torch.cat((mask, torch.ones_like(more)), 1)
    cache = filled(by, ids, mask)
    for what, how, given in itertools.product(("whole", "new"), ("ids", "embeds"), ("all", "prompt's", "none")):
        part = whole if what == "whole" else more
        masks = {"all": seen, "prompt's": seen[:, -part.shape[1] :], "none": None}
        form = dict(inputs=part) if how == "ids" else dict(inputs_embeds=MODEL.get_input_embeddings()(part))
        asked = dict(NEW, past_key_values=copy.deepcopy(cache), attention_mask=masks[given])
        out = MODEL.generate(**form, **asked)
        assert out[:, -5:].tolist() == expected, (what, how, given)
        held = asked["past_key_values"].get_seq_length()
        assert held == whole.shape[1] + 4  # appended once; the last token was never run


@pytest.mark.parametrize("by", ["forward", "generate"])
@pytest.mark.parametrize("kind", [gemmakit.StaticCache, gemmakit.DynamicCache])
def test_whoever_fills_a_cache_forward_goes_on_as_if_from_the_start(by, kind):
    """The positions that are not given continue those of the cache."""
    ids, mask, more, _ = turns((6, 3))
    whole, seen = torch.cat((ids, more), 1), torch.cat((mask, torch.ones_like(more)), 1)
    expected = MODEL(whole, attention_mask=seen).logits[:, -TURN:]
    got = MODEL(more, attention_mask=seen, past_key_values=filled(by, ids, mask, kind)).logits
    # The shift of all positions by the same number turns queries and keys alike: what is left is rounding.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", [{}, dict(penalty_alpha=0.6, top_k=4), dict(prompt_lookup_num_tokens=2)])
def test_rows_that_ended_early_go_on_as_if_alone(strategy):
    """What filled a row after its end is hidden in the next turn, and is no place in between."""
    lengths = (6, 3) if "prompt_lookup_num_tokens" not in strategy else (6,)
    ids, mask, more, _ = turns(lengths)
    said = MODEL.generate(ids, attention_mask=mask, **NEW)[:, ids.shape[1] :]
    end = int(said[-1, 2])
    asked = dict(max_new_tokens=6, eos_token_id=end, return_dict_in_generate=True, **strategy)
    out = MODEL.generate(ids, attention_mask=mask, past_key_values=gemmakit.DynamicCache(), **asked)
    new = out.sequences[:, ids.shape[1] :]
    over = ((new == end).cumsum(-1) > 0) & torch.cat((torch.zeros_like(new[:, :1]), new[:, :-1] == end), 1).cumsum(
        -1
    ).bool()
    whole = torch.cat((out.sequences, more), 1)
    seen = torch.cat((mask, (~over).long(), torch.ones_like(more)), 1)
    alone = [MODEL.generate(w[s.bool()][None], **NEW)[0, -5:].tolist() for w, s in zip(whole, seen, strict=True)]
    got = MODEL.generate(whole, attention_mask=seen, past_key_values=out.past_key_values, **NEW)
    assert got[:, -5:].tolist() == alone


@pytest.mark.parametrize("way", ["tuple", "file", "copy"])
def test_what_a_cache_knows_of_padding_outlives_its_form(way, tmp_path):
    ids, mask, more, expected = turns((6, 3))
    cache = filled("generate", ids, mask)
    if way == "file":
        cache.save(tmp_path / "cache.safetensors")
        cache = gemmakit.DynamicCache.load(tmp_path / "cache.safetensors")
    cache = {"tuple": cache.to_legacy_cache(), "copy": copy.deepcopy(cache)}.get(way, cache)
    assert MODEL.generate(more, past_key_values=cache, **NEW)[:, -5:].tolist() == expected


@pytest.mark.parametrize("width", [2, 7, 9, 11, 14])
@pytest.mark.parametrize("value", [1, 0])
def test_a_mask_covers_the_prompt_or_the_cache_with_it_whatever_it_holds(width, value):
    """All ones too: a check that is skipped where a mask hides nothing lets one of any width through."""
    cache = gemmakit.DynamicCache()
    MODEL(prompts(width=9), past_key_values=cache)
    mask = torch.ones(2, width, dtype=torch.long)
    mask[0, 0] = value
    with pytest.raises(
        InputError, match=rf"\(2, {width}\); it must be \(2, 1\) or, with the 9 of the cache, \(2, 10\)"
    ):
        MODEL.generate(prompts(width=1), attention_mask=mask, past_key_values=cache, **NEW)


# -- and transformers ------------------------------------------------------------------------------------------------


def theirs(folder):
    MODEL.save_pretrained(folder)
    return transformers.GemmaForCausalLM.from_pretrained(folder).eval()


def test_transformers_counts_a_padded_cache_by_two_rules(tmp_path):
    """Forward counts places and generate what is not padding: the padded row goes on as another text. Ours does not."""
    oracle = theirs(tmp_path)
    ids, mask, more, expected = turns((6, 3))
    whole, seen = torch.cat((ids, more), 1), torch.cat((mask, torch.ones_like(more)), 1)
    cache = oracle(ids, attention_mask=mask, use_cache=True).past_key_values
    got = oracle.generate(whole, attention_mask=seen, past_key_values=cache, **NEW)[:, -5:].tolist()
    assert oracle.generate(whole, attention_mask=seen, **NEW)[:, -5:].tolist() == expected
    assert got[0] == expected[0]
    assert got[1] != expected[1]


def test_transformers_crops_embeddings_to_its_cache_but_takes_no_rest_of_them(tmp_path):
    """All embeddings beside a cache go on as ids do, in both. Those alone that the cache lacks are an error there."""
    oracle, ids = theirs(tmp_path), prompts(rows=1, width=9)
    expected = MODEL.generate(ids, **NEW)[:, 9:].tolist()
    for library, model in ((gemmakit, MODEL), (transformers, oracle)):
        embeds = model.get_input_embeddings()(ids)
        for part in (slice(0, None), slice(6, None)):
            cache = library.DynamicCache()
            model(ids[:, :6], past_key_values=cache, use_cache=True)
            given = dict(inputs_embeds=embeds[:, part], past_key_values=cache, **NEW)
            if library is transformers and part.start:
                with pytest.raises(RuntimeError, match="0 elements"):
                    model.generate(**given)
                continue
            assert model.generate(**given).tolist() == expected
            assert cache.get_seq_length() == 9 + 4  # the last token was never run


@pytest.mark.parametrize("width", [8, 10, 14])
def test_transformers_takes_all_ones_of_any_width_beside_a_cache(width, tmp_path):
    """And shows what it hid before, or hides what it showed: other tokens, and no word. Ours refuses."""
    oracle = theirs(tmp_path)
    ids, mask, more, _ = turns((6, 3))
    whole, seen = torch.cat((ids, more[:, :1]), 1), torch.cat((mask, torch.ones_like(more[:, :1])), 1)
    said = []
    for given in (seen, torch.ones(2, width, dtype=torch.long)):
        cache = oracle(ids, attention_mask=mask, use_cache=True).past_key_values
        said.append(oracle.generate(whole[:, 6:], attention_mask=given, past_key_values=cache, **NEW)[:, 1:].tolist())
    assert said[0] != said[1]
    cache = gemmakit.DynamicCache()
    MODEL(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(InputError, match=rf"attention_mask has shape \(2, {width}\)"):
        MODEL.generate(
            whole[:, 6:], attention_mask=torch.ones(2, width, dtype=torch.long), past_key_values=cache, **NEW
        )
