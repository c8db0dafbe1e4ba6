"""Write tests/flax/fixtures: a tiny checkpoint as transformers 4.46.3 saves it, and what its FlaxGemma makes of it.

transformers removed its Flax classes afterwards, so they run in an environment of their own:

    python3 -m venv old && old/bin/pip install transformers==4.46.3 "numpy<2.3" "jax[cpu]==0.4.38" flax==0.10.2 torch
    old/bin/python scripts/make_flax_fixtures.py
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "flax" / "fixtures"
NEW_TOKENS = 10


def make_config():
    """Every width its own, grouped queries, N * H != D. The old class read no rope_theta but 10000."""
    return transformers.GemmaConfig(
        vocab_size=72, hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, hidden_activation="gelu_pytorch_tanh",
        initializer_range=0.2, attention_bias=False,
    )  # fmt: skip


def randomise(params, seed=0):
    """Weights at a scale where a wrong sign, shift or scale shows; norms away from 0."""
    rng = np.random.default_rng(seed)
    flat = flatten_dict(params)
    drawn = {}
    for path in sorted(flat):
        mean, std = (0.1, 0.3) if path[-1] == "weight" else (0.0, 0.3)
        drawn[path] = jnp.asarray(rng.normal(mean, std, flat[path].shape), jnp.float32)
    return unflatten_dict(drawn)


def batch(rows=3, width=9, seed=1):
    """ids that begin with <bos>, padded on the left by 0, 2 and 5."""
    ids = np.random.default_rng(seed).integers(4, 72, (rows, width))
    mask = np.ones_like(ids)
    for row, missing in enumerate((0, 2, 5)):
        mask[row, :missing] = 0
        ids[row, missing] = 2
    return np.where(mask, ids, 0), mask


def outputs(model, ids, mask):
    """Whole and step by step, greedy tokens too."""
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    out = model(ids, mask, positions, output_hidden_states=True, output_attentions=True)
    width = ids.shape[1]
    cache = model.init_cache(len(ids), width)
    first = model(ids[:, :6], mask, positions[:, :6], past_key_values=cache)
    steps, cache = [first.logits], first.past_key_values
    for at in range(6, width):
        step = model(ids[:, at : at + 1], mask, positions[:, at : at + 1], past_key_values=cache)
        steps.append(step.logits)
        cache = step.past_key_values
    made = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return {
        "logits": out.logits,
        "hidden_states": np.stack(out.hidden_states),
        "attentions": np.stack(out.attentions),
        "stepped": np.concatenate(steps, axis=1),
        "greedy": made.sequences,
    }


def main():
    if transformers.__version__ != "4.46.3":
        sys.exit(f"transformers is {transformers.__version__}; this must be 4.46.3 (see the top of this file).")
    config = make_config()
    model = transformers.FlaxGemmaForCausalLM(config)
    model.params = randomise(model.params)
    model.save_pretrained(FOLDER / "as_flax")
    twin = transformers.GemmaForCausalLM.from_pretrained(
        FOLDER / "as_flax", from_flax=True, attn_implementation="eager"
    )
    twin.config._name_or_path = "as_flax"  # not where this ran
    twin.save_pretrained(FOLDER / "as_pytorch")
    ids, mask = batch()
    with torch.no_grad():
        from_torch = twin(torch.tensor(ids), torch.tensor(mask)).logits.numpy()
    values = {"ids": ids, "mask": mask, "pytorch_logits": from_torch, **outputs(model, ids, mask)}
    np.savez_compressed(FOLDER / "outputs.npz", **{name: np.asarray(v) for name, v in values.items()})
    print(f"jax {jax.__version__}: {sum(f.stat().st_size for f in FOLDER.rglob('*') if f.is_file())} bytes in {FOLDER}")


if __name__ == "__main__":
    main()
