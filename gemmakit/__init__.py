"""gemmakit runs Google's Gemma.

Names load when they are first used: importing the package loads neither torch nor jax.
"""

# pyright: reportUnusedImport=false
# (the imports at the end are for type checkers and editors)

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gemmakit.family import FLAX, KINDS

__version__ = "0.1.0"

# public name -> the module that defines it
_HOME = {
    "GemmaConfig": "gemmakit.config",
    "BitsAndBytesConfig": "gemmakit.quantization",
    "WeightOnlyConfig": "gemmakit.quantization",
    "quantize_checkpoint": "gemmakit.pytorch.quantize_checkpoint",
    "GenerationConfig": "gemmakit.generation",
    "DisjunctiveConstraint": "gemmakit.generation.constraints",
    "PhrasalConstraint": "gemmakit.generation.constraints",
    "WatermarkingConfig": "gemmakit.generation",
    "SynthIDTextWatermarkingConfig": "gemmakit.generation",
    "GemmaTokenizer": "gemmakit.text",
    "GemmaTokenizerFast": "gemmakit.text",
    "GemmaModel": "gemmakit.pytorch.model",
    "GemmaForCausalLM": "gemmakit.pytorch.heads",
    "GemmaForSequenceClassification": "gemmakit.pytorch.heads",
    "GemmaForTokenClassification": "gemmakit.pytorch.heads",
    "GemmaPreTrainedModel": "gemmakit.pytorch.pretrained",
    "FlaxGemmaModel": "gemmakit.flax",
    "FlaxGemmaForCausalLM": "gemmakit.flax",
    "FlaxGemmaForSequenceClassification": "gemmakit.flax",
    "FlaxGemmaForTokenClassification": "gemmakit.flax",
    "Cache": "gemmakit.pytorch.cache",
    "DynamicCache": "gemmakit.pytorch.cache",
    "StaticCache": "gemmakit.pytorch.cache",
    "OffloadedCache": "gemmakit.pytorch.cache",
    "QuantizedCache": "gemmakit.pytorch.cache",
    "BaseModelOutputWithPast": "gemmakit.outputs",
    "CausalLMOutputWithPast": "gemmakit.outputs",
    "SequenceClassifierOutputWithPast": "gemmakit.outputs",
    "TokenClassifierOutput": "gemmakit.outputs",
    "to_grouped_query": "gemmakit.utils.grouped_query",
    "convert_checkpoint": "gemmakit.conversion",
    "convert_tokenizer": "gemmakit.conversion",
    "demo_model": "gemmakit.hub",
    "AutoConfig": "gemmakit.auto",
    "AutoTokenizer": "gemmakit.auto",
    "AutoModel": "gemmakit.auto",
    "AutoModelForCausalLM": "gemmakit.auto",
    "AutoModelForSequenceClassification": "gemmakit.auto",
    "AutoModelForTokenClassification": "gemmakit.auto",
    "EmbeddingModel": "gemmakit.pipelines",
    "pipeline": "gemmakit.pipelines",
    "FeatureExtractionPipeline": "gemmakit.pipelines",
    "Pipeline": "gemmakit.pipelines",
    "TextGenerationPipeline": "gemmakit.pipelines",
    "TextClassificationPipeline": "gemmakit.pipelines",
    "TokenClassificationPipeline": "gemmakit.pipelines",
    "BatchEngine": "gemmakit.pytorch.decode.batch",
    "BatchResult": "gemmakit.pytorch.decode.batch",
    "Request": "gemmakit.pytorch.decode.batch",
    "BatchEncoding": "gemmakit.text",
    "IncrementalDecoder": "gemmakit.text",
    "BaseStreamer": "gemmakit.streamers",
    "LogitsProcessor": "gemmakit.pytorch.decode.protocols",
    "LogitsProcessorList": "gemmakit.pytorch.decode.protocols",
    "StoppingCriteria": "gemmakit.pytorch.decode.protocols",
    "StoppingCriteriaList": "gemmakit.pytorch.decode.protocols",
    "WatermarkDetector": "gemmakit.pytorch.decode.processors.watermark",
    "TextStreamer": "gemmakit.streamers",
    "TextIteratorStreamer": "gemmakit.streamers",
    "AsyncTextIteratorStreamer": "gemmakit.streamers",
}

# The other members of the family, by the names of Gemma 1's classes.
for _kind in KINDS.values():
    for _role, _first in KINDS["gemma"].classes.items():
        _HOME[_kind.classes[_role]] = _HOME[_first]
        if f"{FLAX}{_first}" in _HOME:
            _HOME[f"{FLAX}{_kind.classes[_role]}"] = _HOME[f"{FLAX}{_first}"]
    _name = _kind.classes["causal_lm"].removesuffix("ForCausalLM")
    _HOME[f"{_name}PreTrainedModel"] = _HOME["GemmaPreTrainedModel"]

_MODULES = ("errors",)

# `from gemmakit import *` is no reason to fail for want of an optional package.
_MISSING = () if find_spec("flax") and find_spec("jax") else ("gemmakit.flax",)

__all__ = ["__version__", *_MODULES, *(name for name, home in _HOME.items() if home not in _MISSING)]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in (*_HOME, *_MODULES):
        # Names that only transformers has are looked up where they are, so that the package's own stay few.
        home = "gemmakit.flax.compat" if name.startswith(FLAX) else "gemmakit.compat"
        others = importlib.import_module(home) if name[:1].isupper() or name == "set_seed" else None
        if others is None or name not in others.__all__:
            raise AttributeError(f"module 'gemmakit' has no attribute {name!r}")
        return getattr(others, name)

    if name in _MODULES:
        return importlib.import_module(f"gemmakit.{name}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from gemmakit import errors
    from gemmakit.auto import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    # Classes of the other members are made from the table in `family`; to a type checker they are Gemma 1's.
    from gemmakit.config import GemmaConfig
    from gemmakit.config import GemmaConfig as Gemma2Config
    from gemmakit.config import GemmaConfig as Gemma3TextConfig
    from gemmakit.config import GemmaConfig as Gemma4TextConfig
    from gemmakit.config import GemmaConfig as VaultGemmaConfig
    from gemmakit.conversion import convert_checkpoint, convert_tokenizer
    from gemmakit.flax import (
        FlaxGemmaForCausalLM,
        FlaxGemmaForSequenceClassification,
        FlaxGemmaForTokenClassification,
        FlaxGemmaModel,
    )
    from gemmakit.flax import FlaxGemmaForCausalLM as FlaxGemma2ForCausalLM
    from gemmakit.flax import FlaxGemmaForCausalLM as FlaxGemma3ForCausalLM
    from gemmakit.flax import FlaxGemmaForCausalLM as FlaxGemma4ForCausalLM
    from gemmakit.flax import FlaxGemmaForCausalLM as FlaxVaultGemmaForCausalLM
    from gemmakit.flax import FlaxGemmaForSequenceClassification as FlaxGemma2ForSequenceClassification
    from gemmakit.flax import FlaxGemmaForSequenceClassification as FlaxGemma3TextForSequenceClassification
    from gemmakit.flax import FlaxGemmaForSequenceClassification as FlaxGemma4TextForSequenceClassification
    from gemmakit.flax import FlaxGemmaForSequenceClassification as FlaxVaultGemmaForSequenceClassification
    from gemmakit.flax import FlaxGemmaForTokenClassification as FlaxGemma2ForTokenClassification
    from gemmakit.flax import FlaxGemmaForTokenClassification as FlaxGemma3TextForTokenClassification
    from gemmakit.flax import FlaxGemmaForTokenClassification as FlaxGemma4TextForTokenClassification
    from gemmakit.flax import FlaxGemmaForTokenClassification as FlaxVaultGemmaForTokenClassification
    from gemmakit.flax import FlaxGemmaModel as FlaxGemma2Model
    from gemmakit.flax import FlaxGemmaModel as FlaxGemma3TextModel
    from gemmakit.flax import FlaxGemmaModel as FlaxGemma4TextModel
    from gemmakit.flax import FlaxGemmaModel as FlaxVaultGemmaModel
    from gemmakit.generation import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig
    from gemmakit.generation.constraints import DisjunctiveConstraint, PhrasalConstraint
    from gemmakit.hub import demo_model
    from gemmakit.outputs import (
        BaseModelOutputWithPast,
        CausalLMOutputWithPast,
        SequenceClassifierOutputWithPast,
        TokenClassifierOutput,
    )
    from gemmakit.pipelines import (
        EmbeddingModel,
        FeatureExtractionPipeline,
        Pipeline,
        TextClassificationPipeline,
        TextGenerationPipeline,
        TokenClassificationPipeline,
        pipeline,
    )
    from gemmakit.pytorch.cache import Cache, DynamicCache, OffloadedCache, QuantizedCache, StaticCache
    from gemmakit.pytorch.decode.batch import BatchEngine, BatchResult, Request
    from gemmakit.pytorch.decode.processors.watermark import WatermarkDetector
    from gemmakit.pytorch.decode.protocols import (
        LogitsProcessor,
        LogitsProcessorList,
        StoppingCriteria,
        StoppingCriteriaList,
    )
    from gemmakit.pytorch.heads import GemmaForCausalLM, GemmaForSequenceClassification, GemmaForTokenClassification
    from gemmakit.pytorch.heads import GemmaForCausalLM as Gemma2ForCausalLM
    from gemmakit.pytorch.heads import GemmaForCausalLM as Gemma3ForCausalLM
    from gemmakit.pytorch.heads import GemmaForCausalLM as Gemma4ForCausalLM
    from gemmakit.pytorch.heads import GemmaForCausalLM as VaultGemmaForCausalLM
    from gemmakit.pytorch.heads import GemmaForSequenceClassification as Gemma2ForSequenceClassification
    from gemmakit.pytorch.heads import GemmaForSequenceClassification as Gemma3TextForSequenceClassification
    from gemmakit.pytorch.heads import GemmaForSequenceClassification as Gemma4TextForSequenceClassification
    from gemmakit.pytorch.heads import GemmaForSequenceClassification as VaultGemmaForSequenceClassification
    from gemmakit.pytorch.heads import GemmaForTokenClassification as Gemma2ForTokenClassification
    from gemmakit.pytorch.heads import GemmaForTokenClassification as Gemma3TextForTokenClassification
    from gemmakit.pytorch.heads import GemmaForTokenClassification as Gemma4TextForTokenClassification
    from gemmakit.pytorch.heads import GemmaForTokenClassification as VaultGemmaForTokenClassification
    from gemmakit.pytorch.model import GemmaModel
    from gemmakit.pytorch.model import GemmaModel as Gemma2Model
    from gemmakit.pytorch.model import GemmaModel as Gemma3TextModel
    from gemmakit.pytorch.model import GemmaModel as Gemma4TextModel
    from gemmakit.pytorch.model import GemmaModel as VaultGemmaModel
    from gemmakit.pytorch.pretrained import GemmaPreTrainedModel
    from gemmakit.pytorch.pretrained import GemmaPreTrainedModel as Gemma2PreTrainedModel
    from gemmakit.pytorch.pretrained import GemmaPreTrainedModel as Gemma3PreTrainedModel
    from gemmakit.pytorch.pretrained import GemmaPreTrainedModel as Gemma4PreTrainedModel
    from gemmakit.pytorch.pretrained import GemmaPreTrainedModel as VaultGemmaPreTrainedModel
    from gemmakit.pytorch.quantize_checkpoint import quantize_checkpoint
    from gemmakit.quantization import BitsAndBytesConfig, WeightOnlyConfig
    from gemmakit.streamers import AsyncTextIteratorStreamer, BaseStreamer, TextIteratorStreamer, TextStreamer
    from gemmakit.text import BatchEncoding, GemmaTokenizer, GemmaTokenizerFast, IncrementalDecoder
    from gemmakit.utils.grouped_query import to_grouped_query
