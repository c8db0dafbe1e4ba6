"""Weights in and out: safetensors, msgpack, Orbax; what differs is named; both backends read what either wrote."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.serialization import msgpack_serialize
from flax_tools import apart, as_torch, batch, flat, make_torch
from safetensors.numpy import load_file, save_file
from tiny_shapes import SHAPES

import gemmakit
from gemmakit.errors import CheckpointError, InputError, UnsafeFile
from gemmakit.flax import FlaxGemmaForCausalLM, FlaxGemmaForSequenceClassification, FlaxGemmaModel, stack_layers


def equal_trees(ours, theirs):
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert ours[path].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(ours[path], np.float32), np.asarray(leaf, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_safetensors_from_pytorch_to_flax_and_back_are_the_same_bits(tmp_path, dtype):
    before = make_torch(**SHAPES["gqa"], attention_bias=True, tie_word_embeddings=False).to(getattr(torch, dtype))
    before.save_pretrained(tmp_path / "pytorch", max_shard_size="30KB")
    assert len(list((tmp_path / "pytorch").glob("*.safetensors"))) > 1
    model = FlaxGemmaForCausalLM.from_pretrained(tmp_path / "pytorch", dtype="auto")
    assert str(model.dtype) == dtype
    assert {str(leaf.dtype) for leaf in flat(model.params).values()} == {dtype}
    model.save_pretrained(tmp_path / "flax", max_shard_size="40KB")
    after = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / "flax")
    assert after.state_dict().keys() == before.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    assert after.config.architectures == ["GemmaForCausalLM"]
    assert after.config == model.config


def test_tensors_go_straight_to_the_asked_dtype(both):
    model = FlaxGemmaForCausalLM.from_pretrained(both("mqa").folder, param_dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in flat(model.params).values()} == {"bfloat16"}
    assert model.dtype == jnp.float32
    assert model(np.full((1, 4), 2)).logits.dtype == jnp.float32


def test_msgpack_comes_back_as_it_was_in_one_file_and_in_shards(both, tmp_path):
    model = both("gqa", attention_bias=True).flax
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "flax_model.msgpack", "generation_config.json"]
    equal_trees(FlaxGemmaForCausalLM.from_pretrained(tmp_path).params, model.params)
    # Shards as transformers 4.46.3 wrote them: whole paths as keys.
    (tmp_path / "flax_model.msgpack").unlink()
    leaves = {path: np.asarray(leaf) for path, leaf in flat(model.params).items()}
    names, weight_map = sorted(leaves), {}
    for i, part in enumerate((names[:5], names[5:]), start=1):
        shard = f"flax_model-{i:05}-of-00002.msgpack"
        (tmp_path / shard).write_bytes(msgpack_serialize({name: leaves[name] for name in part}))
        weight_map.update(dict.fromkeys(part, shard))
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    equal_trees(FlaxGemmaForCausalLM.from_pretrained(tmp_path).params, model.params)


def test_a_msgpack_that_has_no_room_leaves_the_checkpoint_that_is_there(both, tmp_path, monkeypatch):
    model, other = both("gqa").flax, both("mha").flax
    model.save_pretrained(tmp_path, safe_serialization=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes.*1000 bytes free"):
        other.save_pretrained(tmp_path, safe_serialization=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_msgpack_of_the_bare_model_and_of_one_with_a_head_open_each_other(both, tmp_path):
    model = both("mqa").flax
    bare = FlaxGemmaModel(model.config, _do_init=False)
    bare.save_pretrained(tmp_path, params=model.params["model"], safe_serialization=False)
    equal_trees(FlaxGemmaForCausalLM.from_pretrained(tmp_path).params, model.params)
    equal_trees(FlaxGemmaModel.from_pretrained(both("mqa").folder).params, model.params["model"])


def test_safetensors_with_flax_names_are_read(both, tmp_path):
    """As transformers 4.46.3 wrote them with safe_serialization=True."""
    model = both("mqa").flax
    model.config.save_pretrained(tmp_path)
    tensors = {path.replace("/", "."): np.asarray(leaf) for path, leaf in flat(model.params).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "flax"})
    equal_trees(FlaxGemmaForCausalLM.from_pretrained(tmp_path).params, model.params)


def as_google(params, config, fused, gating_dict=False, transposed=False):
    """The tree that google-deepmind/gemma's checkpoints hold, from ours: the conversion written the other way round."""
    D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    inner = params["model"]
    padded = np.pad(np.asarray(inner["embed_tokens"]["embedding"]), ((0, 128), (0, 0)))
    out = {"embedder": {"input_embedding": padded}, "final_norm": {"scale": inner["norm"]["weight"]}}
    for i, layer in inner["layers"].items():
        kernels = {n: np.asarray(v["kernel"]) for part in ("self_attn", "mlp") for n, v in layer[part].items()}
        q = kernels["q_proj"].reshape(D, N, H).transpose(1, 0, 2)
        k, v = (kernels[n].reshape(D, K, H).transpose(1, 0, 2) for n in ("k_proj", "v_proj"))
        attn = {"attn_vec_einsum": {"w": kernels["o_proj"].reshape(N, H, D)}}
        if fused:
            attn["qkv_einsum"] = {"w": np.stack([q, k, v])}
        else:
            attn.update(q_einsum={"w": q}, kv_einsum={"w": np.stack([k, v])})
        gating = np.stack([kernels["gate_proj"], kernels["up_proj"]])
        gating = gating.swapaxes(1, 2) if transposed else gating
        mlp = {"gating_einsum": gating, "linear": kernels["down_proj"]}
        out[f"layer_{i}"] = {
            "attn": attn,
            "mlp": {name: {"w": w} for name, w in mlp.items()} if gating_dict else mlp,
            "pre_attention_norm": {"scale": layer["input_layernorm"]["weight"]},
            "pre_ffw_norm": {"scale": layer["post_attention_layernorm"]["weight"]},
        }
    return out


@pytest.mark.parametrize(("shape", "older"), [("mqa", True), ("gqa", False), ("mha", True)])
def test_orbax_checkpoints_of_google_deepmind_gemma_are_read(both, tmp_path, shape, older):
    import orbax.checkpoint as ocp

    pair = both(shape)
    config = pair.flax.config
    tree = as_google(pair.flax.params, config, shape == "mha", gating_dict=not older, transposed=not older)
    if older:  # the names of whole modules are keys: "transformer/layer_0/attn/q_einsum": {"w": ...}
        tree = {f"transformer/{name}": value for name, value in tree.items()}
    ocp.PyTreeCheckpointer().save((tmp_path / "orbax").absolute(), jax.tree_util.tree_map(np.asarray, tree))
    ours = FlaxGemmaForCausalLM.from_pretrained(tmp_path / "orbax", config=config)
    equal_trees(ours.params, pair.flax.params)
    guessed = FlaxGemmaForCausalLM.from_pretrained(tmp_path / "orbax").config
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        assert getattr(guessed, name) == getattr(config, name)


def test_orbax_saves_of_our_own_parameters_open_in_both_backends(both, tmp_path):
    import orbax.checkpoint as ocp

    pair = both("mqa")
    params, folder = pair.flax.params, tmp_path / "orbax"
    with ocp.StandardCheckpointer() as saver:  # which waits at the end for what is written meanwhile
        saver.save(folder.absolute(), {"params": params})
    with pytest.raises(CheckpointError, match=r"put its config\.json into the folder"):
        FlaxGemmaForCausalLM.from_pretrained(folder)
    equal_trees(FlaxGemmaForCausalLM.from_pretrained(folder, config=pair.flax.config).params, params)
    (folder / "config.json").write_text(pair.flax.config.to_json_string())
    theirs = gemmakit.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in pair.torch.state_dict().items():
        assert torch.equal(theirs[name], tensor), name


def test_a_stack_of_layers_in_orbax_is_refused_by_name(both, tmp_path):
    import orbax.checkpoint as ocp

    pair = both("mqa")
    ocp.PyTreeCheckpointer().save((tmp_path / "orbax").absolute(), stack_layers(pair.flax.params))
    with pytest.raises(CheckpointError, match="unstack_layers"):
        FlaxGemmaForCausalLM.from_pretrained(tmp_path / "orbax", config=pair.flax.config)


def test_every_difference_is_named(both, tmp_path):
    folder = both("mqa").folder
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())

    def opening(changed):
        save_file(changed, tmp_path / "model.safetensors")
        return FlaxGemmaForCausalLM.from_pretrained(tmp_path)

    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        opening({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=r"holds model\.extra\.weight"):
        opening({**tensors, "model.extra.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has shape \(5, 32\)"):
        opening({**tensors, name: np.zeros((5, 32), np.float32)})
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError):
        FlaxGemmaForCausalLM.from_pretrained(tmp_path)


def test_damaged_msgpack_and_empty_folders_are_errors(both, tmp_path):
    (tmp_path / "config.json").write_text((both("mqa").folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        FlaxGemmaForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(b"\x81\xa1a")
    with pytest.raises(CheckpointError, match="msgpack"):
        FlaxGemmaForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "flax_model.msgpack").unlink()
    index = {"weight_map": {"a": "../flax_model.msgpack"}}
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeFile):
        FlaxGemmaForCausalLM.from_pretrained(tmp_path)


def test_a_head_the_file_lacks_starts_fresh_and_says_so(both):
    with pytest.warns(UserWarning, match=r"score\.weight not in the checkpoint"):
        model = FlaxGemmaForSequenceClassification.from_pretrained(both("mqa").folder, num_labels=3)
    assert model.params["score"]["kernel"].shape == (32, 3)


def test_classification_heads_travel_between_the_backends(tmp_path):
    before = make_torch("SequenceClassification", **SHAPES["gqa"], num_labels=4)
    before.save_pretrained(tmp_path / "pytorch")
    model = FlaxGemmaForSequenceClassification.from_pretrained(tmp_path / "pytorch")
    model.save_pretrained(tmp_path / "flax")
    after = gemmakit.GemmaForSequenceClassification.from_pretrained(tmp_path / "flax")
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor)


def test_old_arguments_and_do_init_false(both):
    folder = both("mqa").folder
    model, params = FlaxGemmaForCausalLM.from_pretrained(folder, _do_init=False, from_pt=True)
    with pytest.raises(InputError, match="_do_init=False"):
        model.params
    ids, _ = batch()
    assert apart(model(ids, params=params).logits, both("mqa").torch(as_torch(ids)).logits) < 1e-5
    with pytest.raises(UnsafeFile):
        FlaxGemmaForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(InputError, match="nonsense"):
        FlaxGemmaForCausalLM.from_pretrained(folder, nonsense=1)


def test_saved_generation_settings_come_back(both, tmp_path):
    model = FlaxGemmaForCausalLM.from_pretrained(both("mqa").folder)
    model.generation_config = model.generation_config.updated(max_new_tokens=7)
    model.save_pretrained(tmp_path)
    assert FlaxGemmaForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 7


def test_pickles_are_refused_unless_asked_for(both, tmp_path):
    pair = both("mqa")
    (tmp_path / "config.json").write_text((pair.folder / "config.json").read_text())
    torch.save(
        {n: t for n, t in pair.torch.state_dict().items() if n != "lm_head.weight"}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(UnsafeFile, match="allow_pickle"):
        FlaxGemmaForCausalLM.from_pretrained(tmp_path)
    equal_trees(FlaxGemmaForCausalLM.from_pretrained(tmp_path, allow_pickle=True).params, pair.flax.params)


def test_loading_warns_of_nothing(both):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FlaxGemmaForCausalLM.from_pretrained(both("mqa").folder)
