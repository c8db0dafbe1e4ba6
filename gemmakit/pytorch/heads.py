"""What stands on the decoder: the language model, one label a sequence, one label a token.

Axis letters: B batch, S positions, D hidden, V vocabulary, C labels. Parameter names are those of released checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemmakit.config import GemmaConfig
from gemmakit.errors import ConfigError, InputError
from gemmakit.family import members
from gemmakit.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from gemmakit.pytorch import per_layer
from gemmakit.pytorch.attention import capped
from gemmakit.pytorch.cache import Cache, counted_positions
from gemmakit.pytorch.decode.generate import GenerationMixin
from gemmakit.pytorch.fused import layers_plan
from gemmakit.pytorch.kernels import linear_plan
from gemmakit.pytorch.layers import Linear
from gemmakit.pytorch.loss import (
    IGNORED_LABEL,
    causal_loss,
    check_labels,
    chunked_loss,
    next_labels,
    readable,
    warn_of_nothing,
)
from gemmakit.pytorch.model import GemmaModel, is_watched, places
from gemmakit.pytorch.pretrained import GemmaPreTrainedModel
from gemmakit.pytorch.quantize import QuantizedLinear
from gemmakit.pytorch.shapes import Float, Int, Shaped

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# The field's common default where a configuration names none; only token classification drops.
TOKEN_DROPOUT = 0.1


class GemmaForCausalLM(GemmaPreTrainedModel, GenerationMixin):
    """Gemma with the language modelling head, whose weight is the embedding's unless the configuration unties them."""

    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs: ClassVar[bool] = True
    loss_type: ClassVar[str | None] = "ForCausalLM"

    def __init__(self, config: GemmaConfig):
        super().__init__(config)
        self.model = GemmaModel(config)
        self.config = self.model.config
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def decode_plan(self) -> dict[str, str]:
        """How a decoding step runs and why, in words: the loop, attention, the fused forms of the layers, the head.

        Each projection's line says what its module does where it is called itself.
        """
        plan = {"loop": self.loop_plan(), "attention": self.config.attn_implementation or "sdpa"}
        plan["seams"] = str(layers_plan(self.model.layers))
        if self.tensor_parallel is not None:
            plan["tensor"] = str(self.tensor_parallel)
        layer = self.model.layers[0]
        matrices = {name.split(".")[-1]: m for name, m in layer.named_modules() if name.endswith("_proj")}
        for table in per_layer.tables(self):
            plan[per_layer.TABLE] = per_layer.plan(table)
        if experts := self.config.num_experts if self.config.enable_moe_block else None:
            plan["experts"] = f"{self.config.top_k_experts} of {experts} a token, read one by one"
        for name, module in {**matrices, "lm_head": self.lm_head}.items():
            if isinstance(module, QuantizedLinear | Linear):
                weight = module.packed if isinstance(module, QuantizedLinear) else module.weight
                plan[name] = str(linear_plan(weight))
            else:
                plan[name] = f"{type(module).__module__}.{type(module).__name__}"
        return plan

    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        attention_mask: Shaped[Tensor, "B _"] | Shaped[Tensor, "_ _ _ _"] | Mapping[str, Tensor] | None = None,
        position_ids: Int[Tensor, "#B S"] | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        inputs_embeds: Float[Tensor, "B S D"] | None = None,
        labels: Int[Tensor, "B S"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Int[Tensor, " S"] | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        is_causal: bool | None = None,
        per_layer_inputs: Float[Tensor, "B S L P"] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        loss_chunk_size: int | None = None,
        **packing: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the decoder and the head; arguments as in `GemmaModel.forward`, and:

        Args:
            labels: (B, S) ids to predict, shifted inside (position s predicts label s + 1); -100 is ignored, and so
                is what only a padding position or another packed document could predict (`loss.next_labels`).
            logits_to_keep: 0 for all positions, n for the last n, or a tensor of positions.
            num_items_in_batch: divide the summed loss by this instead of by the number of targets of this call, for
                gradient accumulation: the targets of all parts, counted on what `loss.next_labels` gives.
            loss_chunk_size: with labels, compute the loss so many positions (B * S) at a time and no logits: those of
                all positions are most of the memory of a training step. Loss and gradients are the same up to rounding.

        Returns:
            CausalLMOutputWithPast with logits (B, S or fewer, V) in the weights' dtype and loss () in float32.

        Raises:
            InputError: labels of another shape, or outside the vocabulary.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        kept = places("logits_to_keep", logits_to_keep)
        if labels is not None:
            check_labels(labels, inputs_embeds if input_ids is None else input_ids, self.config.vocab_size)
        whole = labels is not None or is_watched(self.model)
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            cache_position,
            is_causal=is_causal,
            per_layer_inputs=per_layer_inputs,
            positions_to_keep=0 if whole else logits_to_keep,
            **packing,
        )
        hidden = out.last_hidden_state[:, kept] if whole else out.last_hidden_state
        targets = None if labels is None else next_labels(labels, attention_mask, position_ids)
        if targets is not None and num_items_in_batch is None:
            warn_of_nothing(targets)
        targets = None if targets is None else targets[:, kept]
        if loss_chunk_size is not None:
            cap = self.config.final_logit_softcapping
            logits, loss = None, chunked_loss(self.lm_head, hidden, targets, loss_chunk_size, num_items_in_batch, cap)
        else:
            logits = self.compute_logits(hidden)
            loss = None if targets is None else causal_loss(logits, targets, num_items_in_batch)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return result if return_dict else result.to_tuple()

    def compute_logits(self, hidden_states: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """The head alone, on what the decoder gave."""
        return capped(self.lm_head(hidden_states), self.config.final_logit_softcapping)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "B S D"] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward pass: of the ids (B, S) those that the cache does not hold.

        For libraries that step a model themselves; `generate` has its own loop.
        """
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        first = inputs_embeds is not None and not held
        position_ids = None
        if attention_mask is not None and attention_mask.dim() == 2:
            position_ids = counted_positions(attention_mask, past_key_values)
        return {
            "input_ids": None if first else input_ids[:, held:],
            "inputs_embeds": inputs_embeds if first else None,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **kwargs,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        """The arguments of the next `prepare_inputs_for_generation`, for libraries that step a model themselves."""
        mask = model_kwargs.get("attention_mask")
        more = {} if mask is None else {"attention_mask": F.pad(mask, (0, num_new_tokens), value=1)}
        return {**model_kwargs, **more, "past_key_values": outputs.past_key_values}


class GemmaForSequenceClassification(GemmaPreTrainedModel):
    """Gemma with a linear head on the right-most token of each row that is not padding."""

    def __init__(self, config: GemmaConfig):
        super().__init__(config)
        _check_config(config)
        self.num_labels = config.num_labels
        self.model = GemmaModel(config)
        self.config = self.model.config
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        attention_mask: Shaped[Tensor, "B _"] | Shaped[Tensor, "_ _ _ _"] | None = None,
        position_ids: Int[Tensor, "#B S"] | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        inputs_embeds: Float[Tensor, "B S D"] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Int[Tensor, " S"] | None = None,
        *,
        is_causal: bool | None = None,
        **packing: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Run the decoder and score each row once; arguments as in `GemmaModel.forward`, and:

        Padding is what a 2-D `attention_mask` hides; without one, every position whose id is `config.pad_token_id`. It
        may be on either side. With `inputs_embeds` only the mask can tell.

        Args:
            labels: (B,) class numbers; (B,) or (B, C) real numbers for regression; (B, C) of 0 to 1 for multi-label.
                `config.problem_type` says which; without it one label is regression, whole numbers are classes, and
                real numbers are multi-label.

        Returns:
            SequenceClassifierOutputWithPast with logits (B, C) in the weights' dtype and loss () in float32.

        Raises:
            InputError: several rows and neither ids with a pad token nor a mask; a row of nothing but padding; labels
                of another shape or out of range.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        places = last_tokens(input_ids, inputs_embeds, attention_mask, self.config.pad_token_id)
        problem = None if labels is None else _problem_type(self.config, labels)
        if labels is not None and places is not None:
            _check_sequence_labels(labels, problem, places.shape[0], self.num_labels)
        out: BaseModelOutputWithPast = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            cache_position,
            is_causal=is_causal,
            **packing,
        )
        hidden = out.last_hidden_state
        assert places is not None  # the decoder refused a call without inputs
        # Only the pooled positions are scored: the head is linear, so pooling first is the same and cheaper.
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        logits = self.score(hidden[rows, places.to(hidden.device)])
        result = SequenceClassifierOutputWithPast(
            loss=None if labels is None else sequence_loss(logits, labels, problem),
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return result if return_dict else result.to_tuple()


class GemmaForTokenClassification(GemmaPreTrainedModel):
    """Gemma with dropout and a linear head on every token."""

    def __init__(self, config: GemmaConfig):
        super().__init__(config)
        _check_config(config)
        self.num_labels = config.num_labels
        self.model = GemmaModel(config)
        self.config = self.model.config
        self.dropout = nn.Dropout(TOKEN_DROPOUT if config.classifier_dropout is None else config.classifier_dropout)
        biased = config.extra.get("token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=biased)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        attention_mask: Shaped[Tensor, "B _"] | Shaped[Tensor, "_ _ _ _"] | None = None,
        position_ids: Int[Tensor, "#B S"] | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        inputs_embeds: Float[Tensor, "B S D"] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Int[Tensor, " S"] | None = None,
        *,
        is_causal: bool | None = None,
        **packing: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Run the decoder and score each token; arguments as in `GemmaModel.forward`, and:

        Args:
            labels: (B, S) class numbers, not shifted; -100 is ignored.
            use_cache: accepted like elsewhere; the output has no place for a cache, so none is made. One that is
                given as `past_key_values` is read and appended to.

        Returns:
            TokenClassifierOutput with logits (B, S, C) in the weights' dtype and loss () in float32.

        Raises:
            InputError: labels of another shape or out of range.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        inputs = input_ids if input_ids is not None else inputs_embeds
        if labels is not None and inputs is not None:
            _check_shape(labels, [tuple(inputs.shape[:2])])
            _check_classes(labels, self.num_labels)
        out: BaseModelOutputWithPast = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            False,
            output_attentions,
            output_hidden_states,
            True,
            cache_position,
            is_causal=is_causal,
            **packing,
        )
        logits = self.score(self.dropout(out.last_hidden_state))
        result = TokenClassifierOutput(
            loss=None if labels is None else _cross_entropy(logits.flatten(0, 1), labels.flatten()),
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return result if return_dict else result.to_tuple()


def last_tokens(ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None, pad: int | None) -> Tensor | None:
    """The right-most position of each row, (B,), that is not padding; None when there is no input at all.

    ids: (B, S), or embeds: (B, S, D); mask: (B, past + S) of 0 and 1, or anything else, which says nothing here.
    Raises InputError where padding cannot be told from text, or a row holds nothing else.
    """
    inputs = ids if ids is not None else embeds
    if inputs is None or inputs.dim() < 2:
        return None
    B, S = inputs.shape[:2]
    if not S:
        raise InputError(f"the inputs have shape {tuple(inputs.shape)}: there is no token to classify.")
    fits = mask is not None and mask.dim() == 2 and mask.shape[0] == B and mask.shape[1] >= S
    if fits and mask is not None:  # the decoder refuses other shapes
        real = mask[:, mask.shape[1] - S :].to(inputs.device) != 0
    elif ids is not None and pad is not None and pad >= 0:
        real = ids != pad
    elif B == 1:
        return torch.full((B,), S - 1, dtype=torch.long, device=inputs.device)
    else:
        what = "inputs_embeds have no ids" if ids is None else "config.pad_token_id is not set"
        raise InputError(
            f"this call has {B} rows, and nothing says where padding is: {what} and there is no 2-D "
            "attention_mask. Pass attention_mask, or one row at a time."
        )
    if readable(real) and not bool(real.any(-1).all()):
        row = int((~real.any(-1)).nonzero()[0])
        raise InputError(f"row {row} of the batch is all padding: it has no token to classify. Leave the row out.")
    return (torch.arange(S, device=inputs.device) * real).argmax(-1)


def sequence_loss(logits: Tensor, labels: Tensor, problem: str | None) -> Tensor:
    """Mean squared error, cross entropy or binary cross entropy by `problem`, in float32. logits: (B, C)."""
    labels = labels.to(logits.device)
    if problem == "single_label_classification":
        return _cross_entropy(logits, labels.flatten())
    target = labels.float().reshape(logits.shape)
    if problem == "regression":
        return F.mse_loss(logits.float(), target)
    return F.binary_cross_entropy_with_logits(logits.float(), target)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    warn_of_nothing(labels)
    return F.cross_entropy(logits.float(), labels.to(logits.device, torch.long), ignore_index=IGNORED_LABEL)


def _problem_type(config: GemmaConfig, labels: Tensor) -> str:
    """What the configuration says, or what the labels look like; the guess is not written down in the config."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    return "single_label_classification" if whole else "multi_label_classification"


def _check_config(config: GemmaConfig) -> None:
    if config.num_labels < 1:
        raise ConfigError(f"num_labels is {config.num_labels}; a classification head needs at least 1.")
    if config.problem_type not in (None, *PROBLEM_TYPES):
        raise ConfigError(f"problem_type is {config.problem_type!r}; it must be one of {', '.join(PROBLEM_TYPES)}.")
    p = config.classifier_dropout
    if p is not None and not (isinstance(p, (int, float)) and not isinstance(p, bool) and 0 <= p < 1):
        raise ConfigError(f"classifier_dropout is {p!r}; it must be a number >= 0 and < 1.")


def _check_sequence_labels(labels: Tensor, problem: str | None, batch: int, classes: int) -> None:
    if problem == "single_label_classification":
        _check_shape(labels, [(batch,), (batch, 1)])
        return _check_classes(labels, classes)
    _check_shape(labels, [(batch,), (batch, 1)] if classes == 1 else [(batch, classes)])
    if not readable(labels):
        return None
    low, high = (-torch.inf, torch.inf) if problem == "regression" else (0.0, 1.0)
    values = labels.float()
    bad = labels[~(values.isfinite() & (values >= low) & (values <= high))]
    if bad.numel():
        limit = "a finite number" if problem == "regression" else "from 0 to 1"
        raise InputError(f"label {bad[0].item()} is out of range; for {problem} each must be {limit}.")
    return None


def _check_classes(labels: Tensor, classes: int) -> None:
    if labels.is_floating_point():
        raise InputError(f"labels are {labels.dtype}; class numbers must be whole numbers (torch.long).")
    if not readable(labels):
        return
    bad = labels[((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= classes)]
    if bad.numel():
        raise InputError(
            f"label {int(bad[0])} is not one of the {classes} classes (0 to {classes - 1}; {IGNORED_LABEL} marks what "
            "to ignore). Set num_labels or id2label in the config, or fix the label."
        )


def _check_shape(labels: Tensor, allowed: list[tuple[int, ...]]) -> None:
    if tuple(labels.shape) not in allowed:
        raise InputError(f"labels has shape {tuple(labels.shape)}; it must be {' or '.join(map(str, allowed))}.")


for _head in (GemmaForCausalLM, GemmaForSequenceClassification, GemmaForTokenClassification):
    globals().update(members(_head))
