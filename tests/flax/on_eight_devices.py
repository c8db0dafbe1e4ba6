"""Run by test_flax_sharding.py: prints what it finds as one line of JSON."""

import json
import sys
import warnings
from pathlib import Path

import jax
import numpy as np

sys.path.extend(map(str, Path(__file__).parents[:2]))
from flax_tools import apart, batch, flat

from gemmakit.flax import FlaxGemmaForCausalLM, make_mesh, shard

warnings.simplefilter("ignore")


def spec(array):
    return list(array.sharding.spec)


def compare(folder, mesh):
    ids, mask = batch("left", rows=4)
    one = FlaxGemmaForCausalLM.from_pretrained(folder)
    many = FlaxGemmaForCausalLM.from_pretrained(folder)
    many.shard(mesh)
    leaves = flat(many.params)
    layer = "model/layers/1/self_attn/"
    logits = many(ids, mask).logits
    settings = dict(attention_mask=mask, max_new_tokens=12)
    tokens = [np.asarray(m.generate(ids, **settings).sequences) for m in (one, many)]
    specs = {n: spec(leaves[f"{layer}{n}/kernel"]) for n in ("q_proj", "k_proj", "o_proj")}
    specs["embedding"] = spec(leaves["model/embed_tokens/embedding"])
    specs["norm"] = spec(leaves["model/norm/weight"])
    specs["cache"] = [a for a in spec(many.init_cache(4, 16)["layers"]["0"]["key"]) if a]
    specs["logits"] = spec(logits) if hasattr(logits.sharding, "spec") else ["data"]
    found = {
        "logits_apart": apart(logits, one(ids, mask).logits, mask),
        "same_tokens": bool((tokens[0] == tokens[1]).all()),
        "specs": {n: trimmed(s) for n, s in specs.items()},
    }
    return one, many, found


def trimmed(axes):
    while axes and axes[-1] is None:
        axes = axes[:-1]
    return axes


def training_step(model, params, ids):
    gradients = jax.jit(jax.grad(lambda p: model(ids, params=p, labels=ids).loss))(params)
    return jax.tree_util.tree_map(lambda p, g: p - 0.1 * g, params, gradients)


def main():
    mesh = make_mesh(data=2)
    report, models = {"devices": len(jax.devices())}, {}
    for shape, folder in zip(("mqa", "mha", "gemma3"), sys.argv[1:], strict=True):
        one, many, report[shape] = compare(folder, mesh)
        models[shape] = one, many
    one, many = models["mha"]
    loaded = FlaxGemmaForCausalLM.from_pretrained(sys.argv[2], mesh=mesh)
    report["loaded_like_sharded"] = all(
        leaf.sharding == flat(many.params)[path].sharding and bool((leaf == flat(many.params)[path]).all())
        for path, leaf in flat(loaded.params).items()
    )
    split = FlaxGemmaForCausalLM.from_pretrained(sys.argv[2], mesh=mesh, mesh_axes={"hidden": "data"})
    report["hidden_over_data"] = spec(flat(split.params)["model/layers/0/mlp/up_proj/kernel"])
    ids, _ = batch(rows=8)
    parts = jax.pmap(lambda x: one(x, params=one.params).logits)(ids[:, None])
    report["pmap_apart"] = apart(np.asarray(parts)[:, 0], one(ids).logits)
    after = [flat(training_step(one, p, ids)) for p in (one.params, shard(one.params, mesh, one.config))]
    report["step_apart"] = max(apart(after[1][path], after[0][path]) for path in after[0])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
