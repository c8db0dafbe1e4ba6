"""from_pretrained and save_pretrained: what is kept, converted, named, refused, and what loading costs."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gemma import prompts, tiny, tiny_config

import gemmakit
from gemmakit.errors import CheckpointError, InputError, UnsafeFile

CausalLM = gemmakit.GemmaForCausalLM


@pytest.fixture
def saved(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **fields):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **fields}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saved_model_comes_back_equal_in_its_own_dtype(dtype, tmp_path):
    model = tiny(attention_bias=True).to(dtype)
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert again.config.dtype == str(dtype).removeprefix("torch.")
    assert not again.training
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert torch.equal(again(prompts()).logits, model(prompts()).logits)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16", "torch.bfloat16"], ids=str)
def test_weights_are_converted_when_a_dtype_is_asked_for(saved, name, value):
    model, folder = saved
    again = CausalLM.from_pretrained(folder, **{name: value})
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.model.norm.weight, model.model.norm.weight.bfloat16())
    assert again.model.rotary_emb.inv_freq.dtype == torch.float32
    assert CausalLM.from_pretrained(folder, **{name: "auto"}).dtype == torch.float32


@pytest.mark.parametrize("value", ["float7", "int8", torch.int8, "nn"], ids=str)
def test_dtypes_that_weights_cannot_have_are_refused(saved, value):
    with pytest.raises(InputError, match="it must be 'auto', 'float32', 'bfloat16' or 'float16'"):
        CausalLM.from_pretrained(saved[1], dtype=value)


LOAD = """
import sys, gemmakit, torch
def anonymous():
    return sum(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')) // 1024
torch.set_num_threads(1)
torch.randn(8, 8) @ torch.randn(8, 8)
gemmakit.GemmaForCausalLM.from_pretrained(sys.argv[1])  # warm: a tiny model, for imports and allocator
before = anonymous()
model = gemmakit.GemmaForCausalLM.from_pretrained(sys.argv[2], dtype=sys.argv[3])
print(anonymous() - before, sum(p.nbytes for p in model.parameters()) // 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is Linux's")
def test_loading_in_the_files_dtype_takes_no_memory_for_the_weights(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    config = tiny_config(hidden_size=1024, vocab_size=40000, intermediate_size=4096, head_dim=64)
    with torch.device("meta"):
        model = CausalLM(config)
    model.to_empty(device="cpu").tie_weights()
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.to(torch.float32).save_pretrained(folder)

    def grown(dtype):
        command = [sys.executable, "-c", LOAD, str(saved[1]), str(folder), dtype]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return int(out[0]), int(out[1])

    mapped, size = grown("auto")
    converted, _ = grown("bfloat16")
    assert size > 200
    assert mapped < 25  # MiB: nothing but bookkeeping
    # The test can see memory where it is taken. Pages that the imports had freed may be given back meanwhile.
    assert size // 2 - 5 <= converted < size // 2 + 25


def test_writing_to_loaded_weights_never_reaches_the_file(saved):
    _, folder = saved
    before = (folder / "model.safetensors").read_bytes()
    again = CausalLM.from_pretrained(folder)
    with torch.no_grad():
        again.model.norm.weight.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_saving_into_the_folder_loaded_from_keeps_every_value(saved):
    _, folder = saved
    again = CausalLM.from_pretrained(folder)
    expected = {n: t.clone() for n, t in again.state_dict().items()}
    with torch.no_grad():
        again.model.norm.weight.add_(1.0)
    again.save_pretrained(folder)
    third = CausalLM.from_pretrained(folder).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(third[name], tensor + (name == "model.norm.weight")), name
        assert torch.equal(again.state_dict()[name], third[name]), name


def test_a_loaded_model_can_be_trained(saved):
    _, folder = saved
    again = CausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = again(prompts(), labels=prompts()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > losses[1] > losses[2]


# -- what differs is named -------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(saved):
    _, folder = saved
    edit(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        CausalLM.from_pretrained(folder)


def test_many_missing_tensors_are_counted(saved):
    _, folder = saved
    edit_config(folder, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2.* and 14 more tensors"):
        CausalLM.from_pretrained(folder)


def test_an_unexpected_tensor_is_named(saved):
    _, folder = saved
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}))
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.0\.self_attn\.q_proj\.bias"):
        CausalLM.from_pretrained(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(saved):
    _, folder = saved
    edit_config(folder, intermediate_size=63)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight has shape \(64, 40\).*\(63, 40\)"):
        CausalLM.from_pretrained(folder)


def test_tables_that_early_releases_stored_are_ignored(saved):
    model, folder = saved
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}))
    assert torch.equal(CausalLM.from_pretrained(folder)(prompts()).logits, model(prompts()).logits)


def test_a_tied_head_in_the_file_that_differs_is_said_so(saved):
    _, folder = saved
    edit(folder, lambda t: t.update({"lm_head.weight": torch.ones(130, 40)}))
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        again = CausalLM.from_pretrained(folder)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    untied = CausalLM.from_pretrained(folder, tie_word_embeddings=False)
    assert bool((untied.lm_head.weight == 1).all())


def test_a_tied_model_stores_the_shared_weight_once(saved):
    assert "lm_head.weight" not in load_file(saved[1] / "model.safetensors")


def test_an_untied_head_is_stored_and_loaded(tmp_path):
    model = tiny(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


def test_base_and_headed_models_open_each_others_files(tmp_path):
    model = tiny(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "headed")
    with pytest.warns(UserWarning, match=r"lm_head\.weight not used by GemmaModel"):
        base = gemmakit.GemmaModel.from_pretrained(tmp_path / "headed")
    assert torch.equal(base(prompts()).last_hidden_state, model.model(prompts()).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"lm_head\.weight not in the checkpoint: freshly initialised"):
        headed = CausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(headed.model(prompts()).last_hidden_state, model.model(prompts()).last_hidden_state)
    assert torch.isfinite(headed.lm_head.weight).all()


def test_a_tied_headed_model_opens_a_base_models_file_without_a_word(tmp_path, recwarn):
    model = tiny()
    model.model.save_pretrained(tmp_path)
    headed = CausalLM.from_pretrained(tmp_path)
    assert torch.equal(headed(prompts()).logits, model(prompts()).logits)
    assert not [w for w in recwarn if "lm_head" in str(w.message)]


# -- refusals --------------------------------------------------------------------------------------------------------


def test_quantized_checkpoints_are_refused_or_read_never_misread(saved):
    _, folder = saved
    edit_config(folder, quantization_config={"quant_method": "some_new_method", "bits": 3})
    with pytest.raises((CheckpointError, InputError, ValueError), match=r"quantiz|some_new_method"):
        CausalLM.from_pretrained(folder)


def test_code_in_a_checkpoint_is_refused(saved):
    with pytest.raises(UnsafeFile, match="trust_remote_code"):
        CausalLM.from_pretrained(saved[1], trust_remote_code=True)
    assert CausalLM.from_pretrained(saved[1], trust_remote_code=False)


def test_pickles_are_refused_unless_asked_for(saved):
    model, folder = saved
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UnsafeFile, match="allow_pickle=True"):
        CausalLM.from_pretrained(folder)
    again = CausalLM.from_pretrained(folder, allow_pickle=True)
    assert torch.equal(again(prompts()).logits, model(prompts()).logits)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_pickles_that_hold_code_are_refused_even_when_asked_for(saved):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UnsafeFile):
        CausalLM.from_pretrained(folder, allow_pickle=True)


def test_unknown_arguments_are_refused_and_fields_override(saved):
    _, folder = saved
    with pytest.raises(InputError, match="divice_map"):
        CausalLM.from_pretrained(folder, divice_map="auto")
    with pytest.raises(ValueError, match="num_kv_heads"):
        CausalLM.from_pretrained(folder, num_kv_heads=1)
    assert CausalLM.from_pretrained(folder, attention_dropout=0.5).config.attention_dropout == 0.5
    with pytest.raises(InputError, match="attention_dropout"):
        CausalLM.from_pretrained(folder, config=tiny_config(), attention_dropout=0.5)
    with pytest.raises(InputError, match="max_shard"):
        tiny().save_pretrained(folder, max_shard=3)


def test_a_given_config_stands_in_for_the_files(saved):
    model, folder = saved
    again = CausalLM.from_pretrained(folder, config=tiny_config(use_cache=False))
    assert again(prompts()).past_key_values is None
    assert torch.equal(again(prompts()).logits, model(prompts()).logits)


def test_attention_implementations_can_be_chosen_and_unknown_ones_are_refused(saved):
    _, folder = saved
    assert CausalLM.from_pretrained(folder, attn_implementation="eager").config.attn_implementation == "eager"
    assert CausalLM.from_pretrained(folder).config.attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="attn_implementation is 'telepathy'"):
        CausalLM.from_pretrained(folder, attn_implementation="telepathy")


def test_devices_are_taken_by_every_spelling(saved):
    for device in (None, "cpu", torch.device("cpu"), -1):
        assert CausalLM.from_pretrained(saved[1], device_map=device).device.type == "cpu"


# -- the models' small facts -----------------------------------------------------------------------------------------


def test_parameters_are_counted_once():
    model = tiny(tie_word_embeddings=True)
    expected = 130 * 40 + 40 + 2 * (40 * 48 * 2 + 40 * 24 * 2 + 3 * 40 * 64 + 80)
    assert model.num_parameters() == expected
    assert model.num_parameters(exclude_embeddings=True) == expected - 130 * 40
    model.model.embed_tokens.weight.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == expected - 130 * 40
    assert tiny(tie_word_embeddings=False).num_parameters() == expected + 130 * 40


def test_replaced_input_embeddings_stay_tied():
    model = tiny()
    new = type(model.get_input_embeddings())(130, 40)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    assert model.get_output_embeddings().weight is new.weight


def test_a_model_needs_a_gemma_config():
    with pytest.raises(InputError, match="dict"):
        CausalLM({"hidden_size": 3})
