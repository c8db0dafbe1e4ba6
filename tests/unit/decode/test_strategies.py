"""Laws that hold for every decoding strategy."""

import warnings

import pytest
import torch
from strategy_models import ALL, BOS, MANY, ONE, VOCAB, left_padded, model, new_tokens, read_late, rows, settings

import gemmakit
from gemmakit.errors import GenerationConfigError, InputError, NumericalError, PromptTooLong, TokenOutOfRange
from gemmakit.pytorch.cache import DynamicCache, StaticCache
from gemmakit.pytorch.decode.strategies import STRATEGIES, choose

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("drafting")]
every_strategy = pytest.mark.parametrize("name", ALL)
batch_strategy = pytest.mark.parametrize("name", MANY)


def decode(name, lists, extra=0, masked=True, **more):
    ids, mask = left_padded(lists, extra)
    given = {"attention_mask": mask} if masked else {}
    return new_tokens(model().generate(ids, **given, **settings(name, **more)), ids.shape[1])


# -- neighbours, padding and caches change no token ------------------------------------------------------------------


@batch_strategy
def test_a_row_does_not_depend_on_its_neighbours(name):
    lists = rows(6, 6, 6)
    alone = [tokens for row in lists for tokens in decode(name, [row])]
    assert decode(name, lists) == alone


@every_strategy
def test_left_padding_changes_no_token(name):
    lists = rows(6) if name in ONE else rows(8, 3, 5)
    alone = [tokens for row in lists for tokens in decode(name, [row])]
    assert decode(name, lists) == alone
    assert decode(name, lists, extra=3) == alone


@every_strategy
@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded", "offloaded_static"])
def test_the_kind_of_cache_changes_no_token(name, kind):
    lists = rows(7) if name in ONE else rows(7, 4)
    assert decode(name, lists, cache_implementation=kind) == decode(name, lists)


@every_strategy
def test_a_cache_of_the_callers_changes_no_token(name):
    lists = rows(7) if name in ONE else rows(7, 4)
    for cache in (DynamicCache(), StaticCache(model().config, max_cache_len=40)):
        assert decode(name, lists, past_key_values=cache) == decode(name, lists)


@pytest.mark.parametrize("name", [n for n in MANY if "contrastive" not in n])
def test_no_cache_at_all_changes_no_token(name):
    assert decode(name, rows(7, 4), use_cache=False) == decode(name, rows(7, 4))


@pytest.mark.parametrize("name", [n for n in ALL if "contrastive" not in n])
def test_going_on_from_a_cache_that_holds_the_beginning(name):
    lists = rows(9) if name in ONE else rows(9, 9)
    ids, _ = left_padded(lists)
    cache = DynamicCache()
    model()(ids[:, :5], past_key_values=cache)
    out = model().generate(ids, past_key_values=cache, **settings(name))
    assert new_tokens(out, 9) == decode(name, lists)


@every_strategy
def test_prefill_in_chunks_changes_no_token(name):
    lists = rows(9) if name in ONE else rows(9, 4)
    assert decode(name, lists, prefill_chunk_size=2) == decode(name, lists)


@every_strategy
def test_the_prompt_is_run_once_a_row(name):
    """Copies of a prompt (beams, sequences to return) are made from its keys, not from its tokens."""
    lists = rows(7) if name in ONE else rows(7, 7)
    shapes = []
    hook = model().register_forward_pre_hook(
        lambda m, a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    try:
        decode(name, lists)
    finally:
        hook.remove()
    prompts = [shape for shape in shapes if shape[1] >= 7]
    assert prompts[0] == (len(lists), 7)
    assert len(prompts) == (2 if name == "assisted_by_itself" else 1)


# -- drafts change nothing -------------------------------------------------------------------------------------------

DRAFTS = {
    "one": dict(num_assistant_tokens=1, assistant_confidence_threshold=0.0),
    "seven": dict(num_assistant_tokens=7, assistant_confidence_threshold=0.0),
    "heuristic": dict(num_assistant_tokens=2, num_assistant_tokens_schedule="heuristic"),
    "unsure": dict(assistant_confidence_threshold=0.9),
}
SHAPED = {
    "plain": {},
    "processors": dict(repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=5),
    "static": dict(cache_implementation="static"),
    "endless": dict(eos_token_id=None),
}


@pytest.mark.parametrize("shaped", SHAPED)
@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("name", ["assisted", "assisted_by_itself"])
def test_assisted_greedy_gives_the_greedy_tokens(name, drafts, shaped):
    for seed in range(4):
        lists = rows(6, seed=seed)
        more = dict(max_new_tokens=17, **SHAPED[shaped])
        assert decode(name, lists, **more, **DRAFTS[drafts]) == decode("greedy", lists, **more)


@pytest.mark.parametrize("shaped", SHAPED)
@pytest.mark.parametrize("sampled", [{}, dict(do_sample=True, seed=3), dict(do_sample=True, seed=8, temperature=0.4)])
def test_prompt_lookup_gives_the_tokens_of_plain_decoding_sampled_ones_too(sampled, shaped):
    for seed in range(4):
        lists = rows(9, seed=seed)
        more = dict(max_new_tokens=25, **sampled, **SHAPED[shaped])
        assert decode("lookup", lists, **more, max_matching_ngram_size=3) == decode("greedy", lists, **more)


@pytest.mark.parametrize("name", ["assisted", "assisted_by_itself", "lookup"])
def test_drafts_show_what_plain_decoding_shows(name):
    wanted = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_attentions=True,
                  output_hidden_states=True, max_new_tokens=15)  # fmt: skip
    ids, _ = left_padded(rows(8))
    ours, plain = (model().generate(ids, **settings(n, **wanted)) for n in (name, "greedy"))
    assert ours.keys() == plain.keys()
    assert torch.equal(ours.sequences, plain.sequences)
    assert ours.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    for field in ("scores", "logits", "attentions", "hidden_states"):
        assert len(ours[field]) == len(plain[field])
        for a, b in zip(ours[field], plain[field], strict=True):
            pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
            assert all(x.shape == y.shape and torch.allclose(x, y, atol=1e-4) for x, y in pairs)  # softmax is float32


@pytest.mark.parametrize("name", [n for n in ALL if not settings(n).get("num_beams")])
@pytest.mark.parametrize("width", [6, 8])
def test_what_a_step_shows_is_what_one_pass_over_the_text_shows(name, width):
    """Whatever was tried beside it: the states and weights of each token are those of the finished text."""
    if name == "sample_two":
        return
    ids, mask = left_padded(rows(6), extra=width - 6)
    wanted = dict(return_dict_in_generate=True, output_hidden_states=True, output_attentions=True)
    out = model().generate(ids, attention_mask=mask, **settings(name, **wanted, eos_token_id=None))
    text = out.sequences[:, :-1]
    mask = torch.cat((mask, mask.new_ones(1, text.shape[1] - width)), 1)
    whole = model()(text, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
                    output_hidden_states=True, output_attentions=True)  # fmt: skip
    for step in range(1, len(out.hidden_states)):
        at = width + step - 1
        for ours, theirs in zip(out.hidden_states[step], whole.hidden_states, strict=True):
            assert torch.allclose(ours[:, 0], theirs[:, at], atol=1e-4)  # softmax is float32
        for ours, theirs in zip(out.attentions[step], whole.attentions, strict=True):
            assert ours.shape[-2:] == (1, at + 1)
            assert torch.allclose(ours[:, :, 0], theirs[:, :, at, : at + 1], atol=1e-5)


@pytest.mark.parametrize("name", ["greedy", "assisted", "assisted_by_itself", "lookup", "contrastive"])
def test_a_streamer_hears_every_token_once_and_in_order(name):
    class Ear:
        def __init__(self):
            self.heard, self.ended = [], 0

        def put(self, value):
            self.heard += value.flatten().tolist()

        def end(self):
            self.ended += 1

    ear = Ear()
    out = model().generate(torch.tensor(rows(8)), streamer=ear, **settings(name))
    assert ear.heard == out[0].tolist()
    assert ear.ended == 1


# -- what is asked for must go together ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "strategy"),
    [(dict(), "greedy_search"), (dict(do_sample=True), "sample"), (dict(num_beams=2), "beam_search"),
     (dict(num_beams=2, do_sample=True), "beam_sample"), (dict(penalty_alpha=0.6, top_k=4), "contrastive_search"),
     (dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0), "group_beam_search"),
     (dict(num_beams=2, force_words_ids=[[5]]), "constrained_beam_search"),
     (dict(prompt_lookup_num_tokens=3), "prompt_lookup")],
)  # fmt: skip
def test_settings_choose_the_strategy(given, strategy):
    assert choose(gemmakit.GenerationConfig(**given), None, None, model()) == strategy
    assert strategy in STRATEGIES


@pytest.mark.parametrize(
    ("given", "named"),
    [(dict(num_return_sequences=2), "num_return_sequences"), (dict(num_beams=2, num_return_sequences=3), "num_beams"),
     (dict(penalty_alpha=0.5, top_k=4, use_cache=False), "use_cache"),
     (dict(penalty_alpha=0.5, num_beams=2), "penalty_alpha"),
     (dict(penalty_alpha=0.5, do_sample=True), "penalty_alpha"),
     (dict(prompt_lookup_num_tokens=2, penalty_alpha=0.5, top_k=4), "penalty_alpha"),
     (dict(prompt_lookup_num_tokens=2, num_beams=2), "prompt_lookup_num_tokens"),
     (dict(prompt_lookup_num_tokens=2, use_cache=False), "use_cache"),
     (dict(prompt_lookup_num_tokens=2, assistant_model=model()), "assistant_model"),
     (dict(assistant_model=model(), num_beams=2), "num_beams"),
     (dict(assistant_model=model(vocab=VOCAB + 1)), "vocabulary"),
     (dict(assistant_model=model(), do_sample=True, num_return_sequences=2), "num_return_sequences"),
     (dict(num_beams=3, num_beam_groups=2, diversity_penalty=1.0), "num_beam_groups"),
     (dict(num_beams=4, num_beam_groups=2), "diversity_penalty"), (dict(force_words_ids=[[5]]), "force_words_ids"),
     (dict(seed=1, generator=torch.Generator(), do_sample=True), "generator"),
     (dict(early_stopping="sometimes", num_beams=2), "early_stopping")],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_contradictions_are_refused_by_name(given, named):
    with pytest.raises(InputError, match=named):
        model().generate(torch.tensor(rows(5)), max_new_tokens=3, **given)


@pytest.mark.parametrize("name", [n for n in MANY if settings(n).get("num_beams")])
def test_a_search_has_no_streamer_and_tells_it_so(name):
    class Waiting:
        told = 0

        def end(self):
            self.told += 1

    streamer = Waiting()
    with pytest.raises(InputError, match="streamer"):
        model().generate(torch.tensor(rows(5)), streamer=streamer, **settings(name))
    assert streamer.told == 1  # whoever reads it in another thread must not wait forever


@pytest.mark.parametrize("name", ONE)
def test_drafts_follow_one_row(name):
    with pytest.raises(InputError, match="one row"):
        model().generate(torch.tensor(rows(5, 5)), **settings(name))


# -- faults ----------------------------------------------------------------------------------------------------------


@every_strategy
def test_nan_weights_name_the_step(name):
    broken = model(seed=5, layers=3)
    weight = broken.model.layers[1].mlp.up_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = torch.nan
        with pytest.raises(NumericalError, match="step 1, row 0"):
            broken.generate(torch.tensor(rows(6)), **settings(name))
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@every_strategy
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_choose_nothing_name_the_step_where_they_appear(name, bad):
    def spoil(ids, scores):
        return torch.full_like(scores, bad) if ids.shape[1] >= 8 else scores

    with pytest.raises(NumericalError, match="step 3, row 0"):
        model().generate(torch.tensor(rows(6)), logits_processor=[spoil], **settings(name, min_new_tokens=5))


@every_strategy
def test_a_single_nan_is_not_overlooked(name):
    def spoil(ids, scores):
        return scores.index_fill(1, torch.tensor([VOCAB - 1]), torch.nan)

    with pytest.raises(NumericalError, match="step 1"):
        model().generate(torch.tensor(rows(6)), logits_processor=[spoil], **settings(name))


@every_strategy
def test_faulty_prompts_are_refused(name):
    """FAULTS 12, 13, 14: before anything runs."""
    with pytest.raises(TokenOutOfRange, match=f"{VOCAB}"):
        model().generate(torch.tensor([[BOS, VOCAB]]), **settings(name))
    with pytest.raises(PromptTooLong, match="96"):
        model().generate(torch.tensor(rows(90)), **settings(name))
    cache = StaticCache(model().config, max_cache_len=10)
    with pytest.raises(PromptTooLong, match="cache"):
        model().generate(torch.tensor(rows(6)), past_key_values=cache, **settings(name))
    ids = torch.tensor([[BOS, 5], [0, 0]])
    with pytest.raises(InputError, match="padding"):
        model().generate(ids, attention_mask=(ids != 0).long(), **settings(name))


@every_strategy
def test_an_empty_prompt_begins_with_bos(name):
    """But what must be there before a lookup or a draft is the same <bos>."""
    out = model().generate(**settings(name))
    assert torch.equal(out, model().generate(torch.tensor([[BOS]]), **settings(name)))


@every_strategy
def test_an_interruption_leaves_nothing_behind(name):
    before = decode(name, rows(6))

    def interrupt(ids, scores):
        if ids.shape[1] > 7:
            raise KeyboardInterrupt
        return False

    ended = []
    streamer = type("S", (), {"put": lambda s, v: None, "end": lambda s: ended.append(1)})()
    more = {} if settings(name).get("num_beams") or name == "sample_two" else {"streamer": streamer}
    with pytest.raises(KeyboardInterrupt):
        model().generate(
            torch.tensor(rows(6)), stopping_criteria=[interrupt], **more, **settings(name, eos_token_id=None)
        )
    assert len(ended) == len(more)
    assert decode(name, rows(6)) == before


@every_strategy
def test_a_criterion_ends_a_row_where_it_says(name):
    def full(ids, scores):
        assert len(scores) == len(ids)
        return torch.full((len(ids),), ids.shape[1] >= 6 + 4)

    out = model().generate(torch.tensor(rows(6)), stopping_criteria=[full], **settings(name, eos_token_id=None))
    assert out.shape[1] == 6 + 4


@every_strategy
def test_max_time_ends_every_strategy(name):
    out = model().generate(torch.tensor(rows(6)), **settings(name, eos_token_id=None, max_time=1e-9))
    assert out.shape[1] == 6 + 1


@every_strategy
def test_embeddings_instead_of_ids(name):
    ids = torch.tensor(rows(6))
    embeds = model().get_input_embeddings()(ids)
    if "assisted" in name:
        with pytest.raises(InputError, match="inputs_embeds"):
            model().generate(inputs_embeds=embeds, **settings(name))
        return
    ours = model().generate(inputs_embeds=embeds, **settings(name))
    if name in ("constrained", "sample_two") or "lookup" in name or "sample" in name:
        assert ours.shape[1] <= 9  # the ids of the prompt seed, fulfil and propose: without them tokens may differ
        return
    assert new_tokens(ours, 0) == decode(name, rows(6))


# -- decoding of the caller's own ------------------------------------------------------------------------------------


def by_hand(model, input_ids, logits_processor, stopping_criteria, generation_config, twice=False, **kwargs):
    """A greedy loop as callers of transformers write it."""
    assert kwargs["attention_mask"].shape == input_ids.shape
    assert generation_config.max_length == stopping_criteria.max_length
    while True:
        scores = logits_processor(input_ids, model(input_ids, use_cache=False).logits[:, -1])
        input_ids = torch.cat((input_ids, scores.argmax(-1, keepdim=True)), dim=1)
        if stopping_criteria(input_ids, None).all():
            return torch.cat((input_ids, input_ids)) if twice else input_ids


def test_a_function_decodes_instead_of_a_strategy():
    ids = torch.tensor(rows(6))
    given = settings("greedy", repetition_penalty=1.3)
    plain = model().generate(ids, **given)
    assert torch.equal(model().generate(ids, custom_generate=by_hand, **given), plain)
    assert len(model().generate(ids, custom_generate=by_hand, twice=True, **given)) == 2


def test_code_of_a_repository_is_never_run():
    with pytest.raises(InputError, match="never loaded"):
        model().generate(torch.tensor(rows(6)), custom_generate="transformers-community/sink_cache")


def test_a_setting_that_nobody_knows_is_refused_there_too():
    with pytest.raises(GenerationConfigError, match="thrice"):
        model().generate(torch.tensor(rows(6)), custom_generate=by_hand, thrice=True)


# -- an accelerator's host learns of a step while the next one runs --------------------------------------------------


@every_strategy
def test_reading_a_step_late_changes_nothing(name, monkeypatch):
    """As on an accelerator: the step that is under way when a row turns out to be over is taken back."""
    lists = rows(7) if name in ONE else rows(7, 4, 6)
    ids, mask = left_padded(lists)
    wanted = dict(return_dict_in_generate=True, output_scores=True, output_hidden_states=True)
    for seed in range(4):
        given = settings(name, max_new_tokens=14, eos_token_id=[1, 7, *range(10 + seed, 30, 3)], **wanted)
        now = model().generate(ids, attention_mask=mask, **given)
        with monkeypatch.context() as patch:
            read_late(patch)
            late = model().generate(ids, attention_mask=mask, **given)
        assert now.past_key_values.get_seq_length() == late.past_key_values.get_seq_length()
        for field in ("sequences", "beam_indices", "sequences_scores"):
            assert (now.get(field) is None) == (late.get(field) is None)
            assert now.get(field) is None or torch.equal(now[field], late[field])
        assert len(now.scores) == len(late.scores) == len(late.hidden_states)


# -- the host is not waited for --------------------------------------------------------------------------------------


def test_the_loop_reads_the_device_once_a_step(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    counted = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
                            torch.ops.aten.equal.default):  # fmt: skip
                counted.append(str(function))
            return function(*args, **(kwargs or {}))

    plain = torch.Tensor.tolist

    def tolist(self):
        counted.append("tolist")
        return plain(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    ids = torch.tensor(rows(6))

    def reads(**more):
        counted.clear()
        with Reads():
            model().generate(ids, **settings("greedy", eos_token_id=[1, 7], **more))
        return len(counted)

    for more in ({}, dict(do_sample=True, top_k=5, top_p=0.9), dict(repetition_penalty=1.2, no_repeat_ngram_size=3)):
        a, b = (reads(max_new_tokens=n, min_new_tokens=n, **more) for n in (8, 20))
        assert b - a == 12  # one message a step: its tokens and whether all rows are done
    with warnings.catch_warnings():
        a, b = (reads(max_new_tokens=n, min_new_tokens=n, num_beams=3) for n in (8, 20))
    assert b - a == 12
