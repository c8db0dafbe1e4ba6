"""The list in docs/transformers.md of what transformers' classes have and gemmakit's lack, each with a reason.

python scripts/transformers_gaps.py writes it anew, and fails where something new has no reason in REASONS below.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import gemmakit
from gemmakit import checks, hub
from gemmakit.pytorch import pretrained
from gemmakit.pytorch.adapters import methods as adapters
from gemmakit.text import calling, files

PAGE = Path(__file__).resolve().parents[1] / "docs" / "transformers.md"
BEGIN, END = "<!-- made by scripts/transformers_gaps.py -->", "<!-- end of what scripts/transformers_gaps.py makes -->"

# The classes that both libraries document; of classes that share a base, what the base lacks is said of it alone.
CLASSES = [
    "GemmaConfig",
    "GenerationConfig",
    "GemmaModel",
    "GemmaForCausalLM",
    "GemmaForSequenceClassification",
    "GemmaForTokenClassification",
    "GemmaTokenizerFast",
    "BatchEncoding",
    "DynamicCache",
    "StaticCache",
    "QuantizedCache",
    "AutoConfig",
    "AutoTokenizer",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "Pipeline",
    "TextGenerationPipeline",
    "TextClassificationPipeline",
    "TokenClassificationPipeline",
    "FeatureExtractionPipeline",
    "TextStreamer",
    "TextIteratorStreamer",
    "AsyncTextIteratorStreamer",
    "LogitsProcessorList",
    "StoppingCriteriaList",
    "BitsAndBytesConfig",
    "WatermarkingConfig",
    "SynthIDTextWatermarkingConfig",
    "WatermarkDetector",
    "ModelOutput",
    "CausalLMOutputWithPast",
]
BASES = {
    "GemmaForCausalLM": "GemmaModel", "GemmaForSequenceClassification": "GemmaModel",
    "GemmaForTokenClassification": "GemmaModel", "StaticCache": "DynamicCache", "QuantizedCache": "DynamicCache",
    "AutoModel": "AutoConfig", "AutoTokenizer": "AutoConfig", "AutoModelForCausalLM": "AutoConfig",
    "AutoModelForSequenceClassification": "AutoConfig", "AutoModelForTokenClassification": "AutoConfig",
    "TextGenerationPipeline": "Pipeline", "TextClassificationPipeline": "Pipeline",
    "TokenClassificationPipeline": "Pipeline", "FeatureExtractionPipeline": "Pipeline",
    "SynthIDTextWatermarkingConfig": "WatermarkingConfig",
}  # fmt: skip


def _names(function: Any) -> set[str]:
    return {*inspect.signature(function).parameters}


# What a method of ours takes by **kwargs.
FORWARDED = {
    "from_pretrained": {*checks.DOWNLOADING, *vars(hub.HubOptions()), *pretrained._LOADING, "trust_remote_code"},
    "save_pretrained": {*pretrained._SAVING, *files._SAVING},
    "push_to_hub": _names(hub.push_folder),
    "load_adapter": {*adapters._LOADING},
    "encode": _names(calling.Calling.__call__),
    "batch_decode": _names(gemmakit.GemmaTokenizerFast.decode),
    "preprocess": _names(gemmakit.TextGenerationPipeline.encode),
    "generate": _names(gemmakit.GemmaForCausalLM.generate) | {"synced_gpus"},
    "activation_checkpointing_enable": _names(gemmakit.GemmaModel.gradient_checkpointing_enable),
    "__init__": _names(gemmakit.Pipeline.__init__),
}

# Patterns of `Class.name` and `Class.method(argument)` -> why there is none here.
REASONS: dict[str, str] = {
    "of models that read images, sound or other than their own text: none of these is here": """
        GemmaModel.get_encoder GemmaModel.set_encoder GemmaModel.get_position_embeddings
        GemmaModel.resize_position_embeddings GemmaConfig.__init__(is_encoder_decoder)
        GemmaConfig.chunk_size_feed_forward GemmaConfig.__init__(chunk_size_feed_forward)
        Pipeline.__init__(feature_extractor) Pipeline.default_input_names
        Pipeline.__init__(image_processor) Pipeline.__init__(video_processor) Pipeline.__init__(processor)
        GemmaConfig.sub_configs_defaults GemmaConfig.get_mtp_config TextGenerationPipeline.XL_PREFIX
        GenerationConfig.extra_output_flags""",
    "of other kinds of experts, of linear attention and recurrent states, which no Gemma here has": """
        GemmaModel.*expert* DynamicCache.*conv_state DynamicCache.*recurrent_state DynamicCache.update_indexer
        DynamicCache.is_linear DynamicCache.has_previous_state DynamicCache.activate_past_recording
        DynamicCache.is_recording_past""",
    "code and classes from a checkpoint never run, and classes are not registered": """
        *.register_for_auto_class AutoConfig.register GemmaConfig.is_custom_code GemmaConfig.is_remote_code
        GemmaForCausalLM.load_custom_generate GemmaConfig.extra_files GemmaConfig.extra_config_files""",
    '`from_pretrained(tp_plan="auto")` splits a model over processes: [scale.md](scale.md)': """
        GemmaModel.*_plan GemmaModel.*parallel* GemmaModel.tp_size GemmaModel.fsdp_size GemmaModel.*distribute*
        GemmaModel.*distributed* GemmaModel.barrier_* GemmaModel.gather_* GemmaModel.should_save_on_this_rank
        GemmaConfig.base_model_*""",
    "a model has one adapter here, from a folder; `peft.get_peft_model` has several, and switches": """
        GemmaModel.*_adapter GemmaModel.*_adapters GemmaModel.get_adapter_state_dict GemmaModel.enable_peft_hotswap
        GemmaModel.load_adapter(*)""",
    "`model.generate_batch(requests)` and `BatchEngine` batch continuously; [Serving](serving.md)": """
        GemmaForCausalLM.*continuous_batching* GemmaForCausalLM.generate_batch(*)""",
    "`generate(token_healing=True)` does it": "GemmaForCausalLM.heal_tokens",
    "steps of transformers' own loading, saving or generating, of no use beside others": """
        GemmaModel.can_record_outputs GemmaModel.generation_config_class GemmaModel.get_compiled_call
        GemmaModel.get_correct_attn_implementation GemmaModel.get_expanded_tied_weights_keys GemmaModel.get_init_context
        GemmaModel.get_parameter_or_buffer GemmaModel.initialize_weights GemmaModel.is_backend_compatible
        GemmaModel.mark_tied_weights_as_initialized GemmaModel.named_non_persistent_buffers
        GemmaModel.retrieve_modules_from_names GemmaModel.warn_if_padding_and_no_attention_mask
        GemmaModel.tie_weights(*) GemmaForCausalLM.adjust_generation_fn
        GemmaForCausalLM.prepare_inputs_for_generation(*) *.dict_dtype_to_str GemmaConfig.convert_rope_params_to_dict
        GemmaConfig.standardize_rope_params GemmaConfig.default_* GemmaConfig.*rope*keys* GemmaConfig.base_config_key
        GemmaConfig.ignore_keys_at_rope_validation GenerationConfig.validate(user_set_attributes)
        GenerationConfig.to_json_*(*) Pipeline.check_model_type Pipeline.device_placement
        Pipeline.ensure_tensor_on_device Pipeline.get_inference_context Pipeline.get_iterator Pipeline.run_single
        Pipeline.preprocess Pipeline.postprocess BitsAndBytesConfig.post_init DynamicCache.is_dummy
        DynamicCache.early_initialization DynamicCache.prefetch WatermarkingConfig.construct_processor""",
    "kernels choose themselves; `model.decode_plan()` says which": """
        GemmaModel.use_kernels GemmaModel.set_use_kernels GemmaModel.set_attn_implementation(allow_all_kernels)
        GemmaModel.from_pretrained(fusion_config)""",
    "weights are mapped or read as the format allows": "GemmaModel.from_pretrained(disable_mmap)",
    "`forward(labels=)` computes it; `gemmakit.pytorch.loss` has the parts": "GemmaModel.loss_function",
    "one layout is written, which both read": """
        GemmaModel.save_pretrained(save_original_format) GemmaTokenizerFast.save_pretrained(save_format)
        GemmaTokenizerFast.can_save_slow_tokenizer GemmaTokenizerFast.convert_to_native_format
        GemmaTokenizerFast.save_chat_templates GemmaTokenizerFast.pretrained_vocab_files_map
        GemmaTokenizerFast.vocab_files_names GemmaTokenizerFast.slow_tokenizer_class""",
    "every layer's settings follow from config.json: `config.layer(i)` gives them": """
        GemmaConfig.*per_layer* GemmaConfig.is_heterogeneous""",
    "`config.validate()` checks everything at once, and whenever a configuration is made": "GemmaConfig.validate_*",
    "fields are set as attributes, or by `update`": """
        GemmaConfig.update_from_string GemmaConfig.use_return_dict *transformers_version*""",
    "`huggingface_hub` says such things of a repository": "*.push_to_hub(*)",
    "`tokenizer.backend_tokenizer` has it": """
        GemmaTokenizerFast.decoder GemmaTokenizerFast.model GemmaTokenizerFast.set_truncation_and_padding""",
    "the arguments themselves say it": """
        GemmaTokenizerFast.__call__(tokenizer_kwargs) GemmaTokenizerFast.convert_added_tokens
        GemmaTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES BatchEncoding.__init__(n_sequences) Pipeline.__init__(task)
        Pipeline.__init__(binary_output) TextClassificationPipeline.function_to_apply
        TextGenerationPipeline.postprocess(return_type) TokenClassificationPipeline.*""",
    "special tokens in a chat are always plain text": "GemmaTokenizerFast.apply_chat_template(sanitize_control_tokens)",
    "a template writes whole conversations": "GemmaTokenizerFast.encode_message_with_chat_template",
    "the chat template tells how its answers are written: `gemmakit.text.response`": """
        GemmaTokenizerFast.parse_response(*) GemmaTokenizerFast.get_response_parser""",
    "vocabularies are not trained here": "GemmaTokenizerFast.train_new_from_iterator(*)",
    "`tokenizer_encode_kwargs` and `chat_template_kwargs` take it": "TextGenerationPipeline.preprocess(*)",
    "`OffloadedCache` does it": "DynamicCache.offload DynamicCache.__init__(offload*)",
    "`crop(n)` keeps the first n positions, `crop(-n)` forgets the last n": """
        DynamicCache.crop(tokens_to_remove) DynamicCache.is_croppable""",
    "a cache's layers have one length; `cache[0][0].shape` has the sizes": """
        DynamicCache.batch_size DynamicCache.get_query_offset DynamicCache.is_sliding
        DynamicCache.get_max_length(layer_idx)""",
    "`QuantizedCache(nbits=, q_group_size=)` has kernels of its own": "QuantizedCache.__init__(*)",
    "`config.quant_method`, `to_dict`": """
        BitsAndBytesConfig.quantization_method BitsAndBytesConfig.from_dict(return_unused_kwargs)""",
}


def missing() -> dict[str, list[str]]:
    """Class -> its names and arguments that gemmakit's class of that name lacks."""
    found: dict[str, list[str]] = {}
    for name in CLASSES:
        theirs, ours = _theirs(name), getattr(gemmakit, name)
        items = [*_lacking(theirs, ours, name)]
        base = found.get(BASES.get(name, ""), [])
        found[name] = [item for item in items if item not in base]
    return {name: items for name, items in found.items() if items}


def _theirs(name: str) -> Any:
    for home in ("transformers", "transformers.modeling_outputs", "transformers.utils"):
        kind = getattr(importlib.import_module(home), name, None)
        if kind is not None:
            return kind
    raise LookupError(f"transformers has no {name} any more: take it out of CLASSES.")


def _lacking(theirs: Any, ours: Any, name: str) -> Iterator[str]:
    general = {*dir(torch.nn.Module), *dir(object), *dir(dict)}
    public = [n for n in dir(theirs) if not n.startswith("_") and n not in general]
    held = _instance(ours, name)
    yield from (n for n in public if not hasattr(ours, n) and not hasattr(held, n))
    for method in ["__init__", "__call__", *public]:
        one, other = getattr(theirs, method, None), getattr(ours, method, None)
        if not inspect.isroutine(one) or not inspect.isroutine(other):
            continue
        try:
            wanted, given = inspect.signature(one).parameters, inspect.signature(other).parameters
        except ValueError:  # built in
            continue
        by_name = {p.name for p in wanted.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}
        taken = {*given} | (FORWARDED.get(method, set()) if _takes_more(given) else set())
        yield from (f"{method}({n})" for n in wanted if n in by_name and n not in taken and not n.startswith("_"))


def _takes_more(parameters: Any) -> bool:
    return any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def _instance(kind: Any, name: str) -> Any:
    """An object of a class whose fields are set when it is made."""
    if name.endswith("Config") and not name.startswith("Auto"):
        return kind(
            **({"load_in_4bit": True} if name == "BitsAndBytesConfig" else {"keys": [1]} if "SynthID" in name else {})
        )
    return gemmakit.AutoTokenizer.from_pretrained(gemmakit.demo_model()) if "Tokenizer" in name else None


def reasoned() -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Reason -> what it is of; what has none; reasons' patterns that nothing needs."""
    rows: dict[str, list[str]] = {reason: [] for reason in REASONS}
    without: list[str] = []
    unused = {pattern for patterns in REASONS.values() for pattern in patterns.split()}
    for name, items in missing().items():
        for item in items:
            full = f"{name}.{item}"
            for reason, patterns in REASONS.items():
                hits = [p for p in patterns.split() if fnmatch.fnmatchcase(full, p)]
                if hits:
                    rows[reason].append(full)
                    unused -= {*hits}
                    break
            else:
                without.append(full)
    return rows, without, sorted(unused)


def table() -> str:
    """The list as it stands on the page."""
    rows, without, _ = reasoned()
    if without:
        raise SystemExit(f"no reason in REASONS for: {', '.join(without)}")
    lines = ["| what transformers has | why it is not here |", "| --- | --- |"]
    for reason, items in rows.items():
        if items:
            lines.append(f"| {'; '.join(_grouped(items))} | {reason} |")
    return "\n".join(lines)


def _grouped(items: list[str]) -> list[str]:
    """ "Class: `name`, `method(argument)`" for each class."""
    by_class: dict[str, list[str]] = {}
    for item in items:
        name, _, rest = item.partition(".")
        by_class.setdefault(name, []).append(f"`{rest}`")
    return [f"{name}: {', '.join(rest)}" for name, rest in by_class.items()]


def page(text: str) -> str:
    """The page with the list made anew."""
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    if sys.argv[1:] == ["--raw"]:
        for kind, lacks in missing().items():
            print(kind, *lacks, sep="\n    ")
    else:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
