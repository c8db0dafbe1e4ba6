"""feature-extraction: what the decoder makes of each token of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gemmakit.auto import AutoModel
from gemmakit.errors import InputError
from gemmakit.pipelines.base import Pipeline, Record, encoding_options, evaluating, is_flax


class FeatureExtractionPipeline(Pipeline):
    """Gives the hidden states of a text after the last norm, as nested lists (1, S, D), <bos> included.

    A model with a head gives those that the head reads. Vectors of whole texts are `EmbeddingModel`'s.

    Arguments of a call:
        return_tensors: a tensor (1, S, D) on the CPU, in the weights' dtype, instead of lists.
        truncation: True cuts what is longer than the context; else it is refused.
        tokenize_kwargs: further arguments of the tokenizer: {"max_length": 64, "truncation": True}.
    """

    task = "feature-extraction"
    takes = "a text"
    model_class = AutoModel

    def __init__(self, model: Any, tokenizer: Any, **options: Any):
        if is_flax(model):
            raise InputError(f"{self.task} needs a PyTorch model; {type(model).__name__} is none.")
        super().__init__(model, tokenizer, **options)

    def is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, str)

    def run(
        self,
        batch: Sequence[str],
        *,
        return_tensors: bool = False,
        truncation: bool | str | None = None,
        tokenize_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """The results of a batch, in its order; the options are described at the class."""
        made = [self.preprocess(text, truncation=truncation, tokenize_kwargs=tokenize_kwargs) for text in batch]
        # One by one: each has its own length, and none is to depend on another's.
        return [self.postprocess(self.forward(one), return_tensors=return_tensors) for one in made]

    def preprocess(
        self,
        inputs: str,
        *,
        truncation: bool | str | None = None,
        tokenize_kwargs: Mapping[str, Any] | None = None,
    ) -> Record:
        """input_ids and attention_mask, (1, S)."""
        options = encoding_options("tokenize_kwargs", tokenize_kwargs)
        if truncation is not None and options.setdefault("truncation", truncation) != truncation:
            raise InputError("truncation is given twice, the second time in tokenize_kwargs: give it once.")
        if options.get("truncation"):
            options.setdefault(
                "max_length", min(self.model.config.max_position_embeddings, self.tokenizer.model_max_length)
            )
        return self.model_inputs(self.tokenizer(inputs, **options)["input_ids"])

    def forward(self, model_inputs: Mapping[str, torch.Tensor]) -> Record:
        """last_hidden_state, (1, S, D)."""
        decoder = self.model.get_decoder()
        with torch.no_grad(), evaluating(decoder):
            return {"last_hidden_state": decoder(**model_inputs, use_cache=False, return_dict=True)[0]}

    def postprocess(self, model_outputs: Mapping[str, torch.Tensor], *, return_tensors: bool = False) -> Any:
        """Nested lists, or the tensor."""
        hidden = model_outputs["last_hidden_state"].cpu()
        return hidden if return_tensors else hidden.float().tolist()
