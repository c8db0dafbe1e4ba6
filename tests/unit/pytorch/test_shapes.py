"""Annotations of shapes tell the truth: jaxtyping and beartype check every call of the annotated modules."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import gemmakit

pytest.importorskip("jaxtyping")
pytest.importorskip("beartype")
PACKAGE = Path(gemmakit.__file__).parent
HERE = Path(__file__).parent
# Every module that annotates shapes; jaxtyping then checks all annotations of its functions.
ANNOTATED = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in (PACKAGE / "pytorch").rglob("*.py")
    if "from gemmakit.pytorch.shapes import" in path.read_text(encoding="utf-8")
)


HEAD = f"""
from jaxtyping import install_import_hook
hook = install_import_hook({ANNOTATED!r}, "beartype.beartype")
import traceback, torch, gemmakit
from tiny_gemma import left_padded, prompts, tiny
torch.set_num_threads(1)
"""
MODEL = "model, ids = tiny(max_position_embeddings=128), prompts(2, 9)\n"
CALLS = {
    "forward": """
model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, output_attentions=True)
model(ids, is_causal=False); model(inputs_embeds=model.get_input_embeddings()(ids))
model(ids[:1], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]]), use_cache=False)
model(ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool)); model(ids, attention_mask=torch.zeros(2, 1, 9, 9))
padded, mask = left_padded([ids[0], ids[1, :5]], 9)
for how in ("eager", "sdpa"):  # flex_attention looks at functions' code, which a checked one hides
    model.set_attn_implementation(how)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.no_grad():
            model.to(dtype)(padded, attention_mask=mask)
""",
    "training": """
model.train()
for more in ({}, dict(loss_chunk_size=4), dict(num_items_in_batch=torch.tensor(9)), dict(num_items_in_batch=9)):
    model(ids, labels=ids, **more).loss.backward()
model.lm_head.register_forward_hook(lambda *arguments: None)
model(ids, labels=ids, loss_chunk_size=4).loss.backward()
model.gradient_checkpointing_enable()
model(ids, labels=ids).loss.backward()
""",
    "caches": """
from gemmakit.pytorch.cache import DynamicCache, StaticCache
for kind in ("dynamic", "static", "offloaded", "offloaded_static", "quantized"):
    model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation=kind)
cache = StaticCache(model.config, 2, 12, dtype=torch.float32)
with torch.no_grad():
    model(ids, past_key_values=cache, cache_position=torch.arange(9))
    model(ids[:, :1], past_key_values=cache, cache_position=torch.tensor([9]))
    legacy = model(ids, past_key_values=DynamicCache()).past_key_values.to_legacy_cache()
    model(ids[:, :2], past_key_values=legacy)
cache = model(ids, past_key_values=DynamicCache()).past_key_values
cache.reorder_cache(torch.tensor([1, 0])); cache.batch_repeat_interleave(2); cache.crop(3)
""",
    "strategies": """
more = dict(max_new_tokens=5, do_sample=False)
helper = tiny(num_hidden_layers=1)
for how in ({}, dict(do_sample=True, seed=1, top_k=20, num_return_sequences=2),
            dict(num_beams=3, repetition_penalty=1.2),
            dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_attentions=True,
                 output_hidden_states=True)):
    model.generate(ids, **{**more, **how})
for how in (dict(assistant_model=helper), dict(prompt_lookup_num_tokens=3), dict(eos_token_id=[5, 6])):
    model.generate(ids[:1], **more, **how)
""",
    "windows": """
sizes = dict(vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
sizes |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=256, query_pre_attn_scalar=8)
layers = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
model = gemmakit.Gemma3ForCausalLM(gemmakit.Gemma3TextConfig(**sizes, **layers)).eval()
ids, more = prompts(2, 19).clamp_max(59), dict(max_new_tokens=90, do_sample=False, eos_token_id=None)
for how in ({}, dict(num_beams=2), dict(penalty_alpha=0.6, top_k=3), dict(cache_implementation="static"),
            dict(prefill_chunk_size=3)):
    model.generate(ids, **more, **how)
model.generate(ids[:1], prompt_lookup_num_tokens=3, **more)
model.generate_batch([ids[0], ids[1, :7]], page_size=4, **more)
""",
    "quantized": """
import tempfile
model.save_pretrained(folder := tempfile.mkdtemp())
for how in ("int8", "int4"):
    quantized = gemmakit.GemmaForCausalLM.from_pretrained(folder, quantization_config=how)
    quantized.generate(ids, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        quantized(prompts(3, 13))
    quantized(ids, labels=ids)
""",
    "kernels": """
from gemmakit.pytorch.kernels import linear
with torch.no_grad():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 3, 40):
            linear(torch.randn(rows, 1024).to(dtype), torch.randn(1030, 1024).to(dtype), torch.randn(1030).to(dtype))
""",
    "heads": """
for kind in (gemmakit.GemmaForSequenceClassification, gemmakit.GemmaForTokenClassification, gemmakit.GemmaModel):
    tiny(kind=kind, num_labels=3, pad_token_id=0)(ids)
""",
    # As many targets as there should be, in another order of axes: torch computes a loss from them all the same.
    "a lie": """
from gemmakit.pytorch.loss import causal_loss
causal_loss(torch.zeros(2, 3, 7), torch.zeros(3, 2).long())
""",
}


@pytest.fixture(scope="module")
def failures():
    """Name of CALLS -> the error that checking every annotation of ANNOTATED gave, in one process."""
    code = HEAD + "".join(
        f"try:\n{textwrap.indent(MODEL + calls, '    ')}\nexcept Exception:\n"
        f"    print('=={name}==' + traceback.format_exc()[-1500:])\n"
        for name, calls in CALLS.items()
    )
    path = os.pathsep.join([str(PACKAGE.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    _, *parts = done.stdout.split("==")
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("calls", [name for name in CALLS if name != "a lie"])
def test_every_call_has_the_shapes_that_annotations_say(failures, calls):
    assert calls not in failures, failures[calls]


def test_a_shape_that_is_not_the_annotated_one_is_refused(failures):
    assert "TypeCheckError" in failures["a lie"]


def test_without_jaxtyping_annotations_are_words():
    code = "import sys; sys.modules['jaxtyping'] = None; import gemmakit; gemmakit.GemmaForCausalLM"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
