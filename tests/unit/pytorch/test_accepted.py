"""What transformers' calls give: honoured where it has a meaning here, taken where it changes nothing, else refused."""

import inspect

import pytest
import torch
import transformers
from tiny_gemma import left_padded, prompts, tiny

import gemmakit
from gemmakit.errors import InputError

NEW = dict(max_new_tokens=5, eos_token_id=None)
MODEL = tiny()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    MODEL.save_pretrained(folder)
    return folder


LOADING = dict(
    low_cpu_mem_usage=True, use_safetensors=True, offload_state_dict=True, offload_buffers=True, resume_download=True,
    force_download=False, proxies=None, weights_only=True, key_mapping=None, use_kernels=False, tp_plan=None,
    adapter_kwargs=None, output_loading_info=False, state_dict=None,
)  # fmt: skip
MEANT = dict(
    force_download=True, proxies={"https": "x"}, weights_only=False, key_mapping={"a": "b"}, use_kernels=True,
    adapter_kwargs={"r": 4},
)  # fmt: skip


def same_weights(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_loading_takes_what_changes_nothing_and_refuses_by_name_what_would(folder):
    same_weights(gemmakit.GemmaForCausalLM.from_pretrained(folder, **LOADING), MODEL)
    for name, value in MEANT.items():
        with pytest.raises(InputError, match=f"^{name} is .* has no meaning here: "):
            gemmakit.GemmaForCausalLM.from_pretrained(folder, **{name: value})


def test_weights_are_given_by_their_names_without_a_file():
    """Names and shapes are checked as a file's are, and training does not change what was given."""
    weights = {name: t.clone() for name, t in MODEL.state_dict().items() if name != "lm_head.weight"}
    made = gemmakit.GemmaForCausalLM.from_pretrained(None, config=MODEL.config, state_dict=weights)
    same_weights(made, MODEL)
    with torch.no_grad():
        made.model.norm.weight.zero_()
    assert weights["model.norm.weight"].any()
    del weights["model.norm.weight"]
    with pytest.raises(gemmakit.errors.CheckpointError, match=r"lacks model\.norm\.weight"):
        gemmakit.GemmaForCausalLM.from_pretrained(None, config=MODEL.config, state_dict=weights)
    with pytest.raises(InputError, match="no name to load from"):
        gemmakit.GemmaForCausalLM.from_pretrained(None)


@pytest.mark.filterwarnings("ignore:.*freshly initialised")
def test_what_was_found_is_told_in_the_words_of_transformers(folder):
    for kind in ("GemmaForCausalLM", "GemmaForTokenClassification"):
        found = [
            getattr(library, kind).from_pretrained(folder, output_loading_info=True)[1]
            for library in (gemmakit, transformers)
        ]
        for name in ("missing_keys", "unexpected_keys"):
            ours, theirs = (sorted(info[name]) for info in found)
            assert ours == theirs, name


def test_saving_takes_accelerates_idiom(tmp_path):
    """unwrapped.save_pretrained(folder, is_main_process=..., save_function=..., state_dict=...)."""
    weights = {name: t * 2 for name, t in MODEL.state_dict().items()}
    idiom = dict(save_function=torch.save, state_dict=weights, safe_serialization=True, token=None, variant=None)
    MODEL.save_pretrained(tmp_path / "none", is_main_process=False, **idiom)
    assert not (tmp_path / "none").exists()
    MODEL.save_pretrained(tmp_path / "one", is_main_process=True, **idiom)
    saved = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    assert all(torch.equal(saved[name], t) for name, t in weights.items())
    for name, value in dict(safe_serialization=False, variant="fp16").items():
        with pytest.raises(InputError, match=f"^{name} is"):
            MODEL.save_pretrained(tmp_path / "two", **{name: value})
    with pytest.raises(InputError, match=r"state_dict does not have the model's names: model.norm.weight"):
        MODEL.save_pretrained(tmp_path / "two", state_dict={n: t for n, t in weights.items() if "model.norm" not in n})


# -- generate --------------------------------------------------------------------------------------------------------


def test_generate_takes_what_changes_nothing_and_refuses_by_name_what_would():
    ids = prompts()
    plain = MODEL.generate(ids, **NEW)
    harmless = dict(
        cache_position=torch.arange(9), logits_to_keep=1, token_type_ids=torch.zeros_like(ids), synced_gpus=False,
        use_model_defaults=True, assistant_tokenizer=None, disable_compile=True, compile_config=None,
        return_legacy_cache=False,
    )  # fmt: skip
    assert torch.equal(MODEL.generate(ids, **harmless, **NEW), plain)
    for name in ("hybrid", "hybrid_chunked", "sliding_window"):
        assert torch.equal(MODEL.generate(ids, cache_implementation=name, **NEW), plain)
    for name in ("synced_gpus", "return_legacy_cache", "assistant_tokenizer"):
        with pytest.raises(InputError, match=f"^{name} is True, which has no meaning here: "):
            MODEL.generate(ids, **{name: True}, **NEW)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_positions_of_the_caller_are_those_that_the_prompt_gets(copies, how):
    """Those of a text after a gap, in a batch; where they say what would be counted anyway nothing is different."""
    ids, mask = left_padded([prompts(rows=1, width=n, seed=n)[0] for n in (9, 4)], 9)
    asked = dict(NEW, attention_mask=mask, num_beams=copies, num_return_sequences=copies, **how)
    counted = (mask.cumsum(-1) - 1).clamp_min(0)
    assert torch.equal(MODEL.generate(ids, position_ids=counted, **asked), MODEL.generate(ids, **asked))
    apart = counted + 20 * (torch.arange(9) > 6)
    out = MODEL.generate(ids, position_ids=apart, **asked)
    if copies == 1:
        for step in range(5):
            end = 9 + step
            places = torch.cat((apart, apart[:, -1:] + torch.arange(1, step + 1)), 1)
            seen = torch.cat((mask, torch.ones(2, step, dtype=torch.long)), 1)
            logits = MODEL(out[:, :end], attention_mask=seen, position_ids=places, use_cache=False).logits
            assert torch.equal(out[:, end], logits[:, -1].argmax(-1))
    assert not torch.equal(out, MODEL.generate(ids, **asked))
    with pytest.raises(InputError, match=r"position_ids has shape \(2, 8\); it must be \(B, 9\)"):
        MODEL.generate(ids, position_ids=apart[:, 1:], **asked)


@pytest.mark.parametrize("form", ["ids", "embeds"])
def test_padding_on_the_right_changes_no_token(form):
    """It is moved, and said; transformers warns and continues after the padding."""
    rows = [prompts(rows=1, width=n, seed=n)[0] for n in (9, 4, 6)]
    left, mask = left_padded(rows, 9)
    right, shown = torch.zeros_like(left), torch.zeros_like(mask)
    for i, row in enumerate(rows):
        right[i, : len(row)], shown[i, : len(row)] = row, 1
    expected = MODEL.generate(left, attention_mask=mask, **NEW)
    given = dict(inputs=right) if form == "ids" else dict(inputs_embeds=MODEL.get_input_embeddings()(right))
    with pytest.warns(UserWarning, match="padded on the right.*moved to the left"):
        got = MODEL.generate(**given, attention_mask=shown, **NEW)
    assert torch.equal(got, expected if form == "ids" else expected[:, 9:])


def test_settings_and_caches_of_transformers_are_taken():
    """Its GenerationConfig leaves open what the model settles; its cache is read, layer by layer."""
    ids = prompts()
    theirs = transformers.GenerationConfig(max_new_tokens=4, repetition_penalty=1.7)
    assert torch.equal(
        MODEL.generate(ids, generation_config=theirs), MODEL.generate(ids, max_new_tokens=4, repetition_penalty=1.7)
    )
    held, cache = MODEL(ids[:, :5]).past_key_values, transformers.DynamicCache()
    for i, (keys, values) in enumerate(held):
        cache.update(keys, values, i)
    torch.testing.assert_close(MODEL(ids[:, 5:], past_key_values=cache).logits, MODEL(ids).logits[:, 5:])
    assert torch.equal(MODEL.generate(ids, past_key_values=cache, **NEW), MODEL.generate(ids, **NEW))


def test_every_argument_that_transformers_documents_for_saving_is_known():
    documented = inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters
    known = {*inspect.signature(MODEL.save_pretrained).parameters, *gemmakit.pytorch.pretrained._SAVING}
    assert {n for n in documented if n not in known} <= {"self", "save_original_format", "distributed_checkpoint"}


def test_settings_are_read_by_the_argument_names_of_transformers(folder, tmp_path):
    """Downloading, which every from_pretrained names, is not a field of the configuration."""
    config = gemmakit.GemmaConfig.from_pretrained(pretrained_model_name_or_path=folder, force_download=False)
    assert config == MODEL.config and "force_download" not in config.extra
    assert gemmakit.GemmaConfig.from_dict(config_dict=config.to_dict()) == config
    config.save_pretrained(save_directory=tmp_path, push_to_hub=False)
    settings = gemmakit.GenerationConfig.from_pretrained(pretrained_model_name=folder)
    assert gemmakit.GenerationConfig.from_model_config(model_config=config).eos_token_id == settings.eos_token_id
    settings.save_pretrained(save_directory=tmp_path)
    for read in (gemmakit.GemmaConfig, gemmakit.GenerationConfig, gemmakit.GemmaTokenizerFast):
        with pytest.raises(InputError, match="force_download is True"):
            read.from_pretrained(folder, force_download=True)
        with pytest.raises(InputError, match="proxies is"):
            read.from_pretrained(folder, proxies={"https": "x"})


def test_an_encoding_is_made_of_columns_as_transformers_makes_one():
    made = gemmakit.BatchEncoding({"input_ids": [[1, 2]]}, tensor_type="pt")
    assert made.input_ids.tolist() == [[1, 2]] and [*made] == ["input_ids"]
    assert gemmakit.BatchEncoding(data={"a": [1]}, tensor_type="np", prepend_batch_axis=True)["a"].shape == (1, 1)
    with pytest.raises(InputError, match="encoding is given"):
        gemmakit.BatchEncoding({}, encoding=[1])


@pytest.mark.parametrize("kind", ["CausalLM", "SequenceClassification", "TokenClassification"])
def test_what_packing_collators_tell_flash_attention_is_taken_beside_positions(kind):
    """And refused without them: documents would see each other."""
    model = tiny(kind=getattr(gemmakit, f"GemmaFor{kind}"))
    rows = [[2, 5, 6, 7], [2, 8, 9]]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    given = collate([{"input_ids": row, "labels": row} for row in rows])
    told = {name: value for name, value in given.items() if name not in ("input_ids", "labels", "position_ids")}
    assert told.keys() == {*gemmakit.pytorch.masks.PACKING}
    ids, places = given["input_ids"], given["position_ids"]
    assert torch.equal(model(ids, position_ids=places, **told).logits, model(ids, position_ids=places).logits)
    with pytest.raises(InputError, match="cu_seq_lens_q tells packed documents"):
        model(ids, cu_seq_lens_q=told["cu_seq_lens_q"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
        model(ids, no_such=1)
