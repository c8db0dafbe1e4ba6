"""What every Gemma model can do besides running, loading and saving: embeddings, heads, training switches."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gemmakit.checks import Whole, check
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.hub import push_folder
from gemmakit.pytorch import per_layer
from gemmakit.pytorch.attention import implementation
from gemmakit.pytorch.parallel.processes import require_whole
from gemmakit.pytorch.pruning import prune_heads


class ModelMethods(nn.Module):
    """Mixed into GemmaPreTrainedModel."""

    base_model_prefix: ClassVar[str] = "model"
    tied_weights: ClassVar[dict[str, str]] = {}
    # A decoder layer adds to what came into it, so it must be whole on one device.
    _no_split_modules: ClassVar[list[str]] = ["GemmaDecoderLayer"]
    supports_gradient_checkpointing: ClassVar[bool] = True
    # What transformers' models say of themselves to other libraries.
    config_class: ClassVar[type[GemmaConfig]] = GemmaConfig
    main_input_name: ClassVar[str] = "input_ids"
    input_modalities: ClassVar[str] = "text"
    output_modalities: ClassVar[tuple[str, ...]] = ("text",)
    accepts_loss_kwargs: ClassVar[bool] = False  # whether forward takes num_items_in_batch
    loss_type: ClassVar[str | None] = None
    is_parallelizable: ClassVar[bool] = False
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None
    model_tags: list[str] | None = None

    config: GemmaConfig
    gradient_checkpointing: bool
    checkpointing_arguments: dict[str, Any]
    checkpointing_every: int = 1
    _grads_hook: Any = None

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where inputs belong: the device of the first weights that are not offloaded, or of what brings them back."""
        here = next((p.device for p in self.parameters() if not p.is_meta), None)
        return here or _brought_to(self) or next(self.parameters()).device

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """What peft asks before it puts an adapter on an embedding."""
        return dict(self.tied_weights)

    @property
    def base_model(self) -> nn.Module:
        return getattr(self, self.base_model_prefix, self)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """ids (3, 5) that any of these models takes."""
        ids = torch.arange(15, device=self.device).view(3, 5)
        return {"input_ids": ids % self.config.vocab_size}

    @classmethod
    def can_generate(cls) -> bool:
        """Whether it has generate()."""
        return hasattr(cls, "generate")

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether its code came with a checkpoint: never."""
        return False

    is_remote_code = is_custom_code

    def get_decoder(self) -> nn.Module:
        """The decoder without a head."""
        return self.base_model

    def set_decoder(self, decoder: nn.Module) -> None:
        """Take another decoder under the head."""
        if self.base_model is self:
            raise InputError(f"{type(self).__name__} is a decoder itself.")
        setattr(self, self.base_model_prefix, decoder)

    def add_model_tags(self, tags: str | list[str]) -> None:
        """Words for a model card; kept in `model_tags`."""
        new = [tags] if isinstance(tags, str) else list(tags)
        self.model_tags = list(dict.fromkeys([*(self.model_tags or ()), *new]))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Parameters, a tied one counted once."""
        skip = {id(self.get_input_embeddings().weight)} if exclude_embeddings else set()
        return sum(
            p.numel() for p in self.parameters() if id(p) not in skip and (p.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights as they are held, a tied one counted once, and of the buffers: tables, packed scales."""
        held = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    # -- embeddings and the head -----------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embed_tokens  # type: ignore[return-value]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Take another embedding (V, D); the vocabulary is then its size, and a tied head follows.

        The scale by sqrt(D) belongs to GemmaScaledEmbedding; a plain nn.Embedding is used as it is.
        """
        require_whole(self, "load it without tp_plan to give it another embedding")
        self.base_model.embed_tokens = value
        self._follow_vocabulary()

    def get_output_embeddings(self) -> nn.Linear | None:
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Take another head (D -> V). One with a weight of its own unties the two, in the configuration too."""
        if self.get_output_embeddings() is None:
            raise InputError(f"{type(self).__name__} has no language modelling head.")
        require_whole(self, "load it without tp_plan to give it another head")
        self.lm_head = new_embeddings
        if new_embeddings.weight is not self.get_input_embeddings().weight:
            self.config.tie_word_embeddings = False

    def tie_weights(self) -> None:
        """Make tied parameters one tensor again, if the configuration ties them."""
        if self.config.tie_word_embeddings:
            for tied, source in self.tied_weights.items():
                assign(self, tied, self.get_parameter(source))

    def untie_weights(self) -> None:
        """Give the head a copy of the embedding's weight, to be trained and saved apart."""
        for tied, source in self.tied_weights.items() if self.config.tie_word_embeddings else ():
            weight = self.get_parameter(source)
            assign(self, tied, nn.Parameter(weight.detach().clone(), weight.requires_grad))
        self.config.tie_word_embeddings = False

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the number of token ids, of the embedding, of the head and of the table that layers have of their own.

        The ids that stay keep their rows.

        Args:
            new_num_tokens: the new V; None keeps it, for `pad_to_multiple_of` alone.
            pad_to_multiple_of: round V up, for instance to 64 for tensor cores.
            mean_resizing: new rows are the mean of the old ones, so that a new token starts about as likely as the
                others; False draws them as in a fresh model.

        Raises:
            InputError: a size that is no whole number, or that a special token of the configuration is outside of; a
                model that a tensor plan has split.
        """
        require_whole(self, "resize one that is loaded without tp_plan, save it, and load that")
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        size = self._new_size(new_num_tokens, pad_to_multiple_of)
        heads = [] if head is None or head.weight is embedding.weight else [head]
        for module in (embedding, *heads, *per_layer.tables(self)):
            if module.weight.shape[0] != size:
                self._resize_rows(module, size, mean_resizing)
                vars(module).pop("stays_in_file", None)
        self._follow_vocabulary()
        return embedding

    def _resize_rows(self, module: Any, size: int, mean: bool) -> None:
        module.weight = self._resized(module.weight, size, mean)

    def _new_size(self, wanted: int | None, multiple: int | None) -> int:
        for name, value in (("new_num_tokens", wanted), ("pad_to_multiple_of", multiple)):
            if value is not None:
                check(name, value, Whole(1), InputError)
        size = self.get_input_embeddings().num_embeddings if wanted is None else wanted
        size = size if multiple is None else math.ceil(size / multiple) * multiple
        config = self.config
        tokens = [t for t in (config.pad_token_id, config.bos_token_id, *config.eos_token_ids) if t is not None]
        if max(tokens, default=0) >= size:
            raise InputError(
                f"{size} token ids leave out {max(tokens)}, a special token of the configuration: keep at least "
                f"{max(tokens) + 1}, or change the configuration first."
            )
        return size

    @torch.no_grad()
    def _resized(self, old: Tensor, size: int, mean: bool) -> nn.Parameter:
        """(V, D) -> (size, D)."""
        if old.is_meta:
            raise InputError("the embedding is offloaded: load the model without offloading to resize it.")
        new = old.new_empty(size, old.shape[1])
        kept = min(size, old.shape[0])
        new[:kept] = old[:kept]
        if mean:
            new[kept:] = old.mean(0, dtype=torch.float32).to(old.dtype)
        else:
            new[kept:].normal_(0.0, self.config.initializer_range)
        return nn.Parameter(new, old.requires_grad)

    def _follow_vocabulary(self) -> None:
        """Let the head and the numbers that are written down agree with the embedding."""
        self.tie_weights()
        embedding: Any = self.get_input_embeddings()
        self.config.vocab_size = embedding.num_embeddings = size = embedding.weight.shape[0]
        for table in per_layer.tables(self):
            self.config.vocab_size_per_layer_input = table.num_embeddings = table.weight.shape[0]
        head = self.get_output_embeddings()
        if head is not None:
            head.out_features = head.weight.shape[0]
        models: tuple[Any, ...] = (self, self.base_model)
        for model in models:
            model.vocab_size = size

    # -- attention -------------------------------------------------------------------------------------------------

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Compute attention by "eager", "sdpa", "flash_attention_2" or "flex_attention" from now on.

        Raises ConfigError, or MissingDependency for a package that is not installed.
        """
        self.config.attn_implementation = implementation(attn_implementation)

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Take attention heads out, {layer: [query heads]}; see `gemmakit.pytorch.pruning.prune_heads`.

        What is gone is kept in `config.pruned_heads`, so that gemmakit loads what was saved; other libraries cannot.
        """
        require_whole(self, "load it without tp_plan to prune it; a plan does not split what is pruned")
        prune_heads(self, heads_to_prune)

    # -- training --------------------------------------------------------------------------------------------------

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    is_activation_checkpointing = is_gradient_checkpointing

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers in the backward pass instead of keeping their activations; the cache is off meanwhile.

        The arguments go to torch.utils.checkpoint.checkpoint, which is called with use_reentrant=False by default.
        every_n_layers: recompute layers 0, n, 2n, ... alone, the others keep theirs. offload: not done here.

        Raises InputError for an every_n_layers below 1, or where offloading is asked for.
        """
        check("every_n_layers", every_n_layers, Whole(1), InputError)
        if offload:
            raise InputError(
                "offload is set, but activations are recomputed here, not kept in CPU memory: leave it out, or train "
                "under torch.autograd.graph.save_on_cpu()."
            )
        arguments = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self._set_checkpointing(True, arguments, every_n_layers)

    def gradient_checkpointing_disable(self) -> None:
        self._set_checkpointing(False, {"use_reentrant": False}, 1)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **how: Any
    ) -> None:
        """The newer name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **how)

    activation_checkpointing_disable = gradient_checkpointing_disable

    def _set_checkpointing(self, on: bool, arguments: dict[str, Any], every: int) -> None:
        for module in self.modules():
            if isinstance(module, ModelMethods):
                module.gradient_checkpointing, module.checkpointing_arguments = on, arguments
                module.checkpointing_every = every

    def enable_input_require_grads(self) -> None:
        """Let gradients reach the embedding's output though its weight is frozen, as reentrant checkpointing needs."""
        if self._grads_hook is None:
            hook = lambda module, args, output: output.requires_grad_(True)  # noqa: E731
            self._grads_hook = self.get_input_embeddings().register_forward_hook(hook)

    def disable_input_require_grads(self) -> None:
        if self._grads_hook is not None:
            self._grads_hook.remove()
            self._grads_hook = None

    # -- out -------------------------------------------------------------------------------------------------------

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "5GB", **kwargs: Any) -> str:
        """Save to a temporary folder and upload it; kwargs go to `gemmakit.hub.push_folder`. The address comes back."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)  # type: ignore[operator]
            return push_folder(folder, repo_id, **kwargs)


def _brought_to(model: nn.Module) -> torch.device | None:
    """Where accelerate's hooks bring offloaded weights."""
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    places = (getattr(part, "execution_device", None) for hook in hooks for part in getattr(hook, "hooks", [hook]))
    place = next((place for place in places if place is not None), None)
    return None if place is None else torch.device(place)


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter, or the buffer, that is called `name`, in dotted form."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    parameter = attribute not in owner._buffers and not isinstance(tensor, nn.Parameter)
    setattr(owner, attribute, nn.Parameter(tensor) if parameter else tensor)
