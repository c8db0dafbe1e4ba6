"""The wrapper around the Linen modules: weights in and out, one compiled forward pass.

Axis letters: B batch, S positions.
"""

from __future__ import annotations

import copy
import functools
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gemmakit import outputs
from gemmakit.checkpoint import open_checkpoint, save_checkpoint
from gemmakit.checkpoint.formats.msgpack import pytorch_name
from gemmakit.checkpoint.layout import SCALAR
from gemmakit.checkpoint.settings import generation_for
from gemmakit.config import GemmaConfig
from gemmakit.errors import ConfigError, InputError, TokenOutOfRange
from gemmakit.family import FLAX, member_class
from gemmakit.flax import cache as caches
from gemmakit.flax import per_layer, products
from gemmakit.flax.attention import Wanted, implementation
from gemmakit.flax.loss import check_array, known
from gemmakit.flax.weights import (
    Rules,
    config_of,
    dtype_of,
    flat,
    fresh,
    load,
    nested,
    pytorch_tensor,
    save_msgpack,
    stack_layers,
    unstack_layers,
)
from gemmakit.generation import GenerationConfig
from gemmakit.hub import HubOptions, find_gguf, push_saved, refuse_code

Output = TypeVar("Output", bound=outputs.ModelOutput)
Model = TypeVar("Model", bound="FlaxGemmaPreTrainedModel[Any]")
# Arguments that old code passes and that ask for what is always so.
_ALWAYS = ("from_pt", "from_flax", "use_safetensors", "low_cpu_mem_usage", "_fast_init")


class FrozenConfig(GemmaConfig):
    """A copy of a configuration that equals another by what it says: two models of one shape share compiled code.

    A Linen module is a static argument of jit, which compares by hash; a GemmaConfig can change and has none.
    """

    def __init__(self, config: GemmaConfig):
        self.__dict__.update(copy.deepcopy(config.__dict__))
        self.__dict__["model_type"] = config.model_type
        act = config.hidden_act
        # config.json holds neither; a callable has no name that tells it from another.
        beside = (config.attn_implementation, id(act) if callable(act) else None)
        self._key = (config.to_json_string(), *beside)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrozenConfig) and self._key == other._key

    def __repr__(self) -> str:  # every error of flax prints the module, and with it this
        return f"FrozenConfig({self.num_hidden_layers} layers of {self.hidden_size})"


class FlaxGemmaPreTrainedModel(Generic[Output]):
    """What every Gemma model of this backend is: a configuration, a Linen module, and a tree of parameters.

    Args:
        config: the configuration; what later changes in it holds for the calls after that.
        input_shape: (batch, sequence), kept for old code; Gemma's parameters do not depend on it.
        seed: of fresh weights.
        dtype: of the computation, whatever dtype the parameters have: float32, bfloat16 or float16.
        _do_init: False leaves the model without parameters: give them to every call, or set `params`.
        scan_layers: compile one decoder layer for all, so that compile time does not grow with depth, at the price of
            slower decoding; `params` keeps its names, and calls take `stack_layers(params)` too.
        gradient_checkpointing: recompute each layer in the backward pass.
    """

    module_class: ClassVar[type[nn.Module]]
    base_model_prefix: ClassVar[str] = "model"
    framework: ClassVar[str] = "flax"

    def __init__(
        self,
        config: GemmaConfig,
        input_shape: tuple[int, int] = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        *,
        scan_layers: bool = False,
        gradient_checkpointing: bool = False,
    ):
        if not isinstance(config, GemmaConfig):
            raise InputError(f"config is a {type(config).__name__}; give a GemmaConfig, or use from_pretrained.")
        member_class(type(self), config.model_type)  # refuses another member's
        if config.enable_moe_block:
            raise ConfigError(
                f"the model has {config.num_experts} experts in each layer (Gemma 4 26B-A4B): mixtures of experts run "
                f"in PyTorch alone, as {config.kind.classes['causal_lm']}."
            )
        per_layer.check_rows(config)
        shapes = {replace(config.layer(i), rope="", window=None) for i in range(config.num_hidden_layers)}
        if scan_layers and len(shapes) > 1:
            raise ConfigError("scan_layers=True needs layers of one shape, and this model's differ: leave it out.")
        self.config = copy.deepcopy(config)
        self.config.attn_implementation = implementation(config.attn_implementation)
        self.dtype = dtype_of(dtype)
        self.input_shape = input_shape
        self.scan_layers = scan_layers
        self.gradient_checkpointing = gradient_checkpointing
        self.key = jax.random.PRNGKey(seed)
        self.rules: Rules | None = None
        self.name_or_path = config.name_or_path
        self.generation_config = GenerationConfig.from_model_config(config)
        self._params: dict[str, Any] | None = None
        if _do_init:
            self.params = self.init_weights(self.key, input_shape)

    # -- the module and its parameters -----------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The Linen module, as the configuration stands now. Equal ones share compiled code."""
        self.config.attn_implementation = implementation(self.config.attn_implementation)
        return self.module_class(  # type: ignore[call-arg]
            config=FrozenConfig(self.config),
            dtype=self.dtype,
            scan_layers=self.scan_layers,
            remat=self.gradient_checkpointing,
        )

    @property
    def params(self) -> dict[str, Any]:
        """The tree of parameters, with the names of released checkpoints (with scan_layers a copy: `stored_params`)."""
        return unstack_layers(self.stored_params)

    @params.setter
    def params(self, params: Any) -> None:
        tree = self._stored_form(params)
        given, needed = set(flat(tree)), set(flat(self._stored_form_of_shapes()))
        if needed - given:
            missing = sorted(needed - given)
            raise InputError(f"the parameters lack {', '.join(missing[:4])}{' and more' if missing[4:] else ''}.")
        self._params = tree

    @property
    def stored_params(self) -> dict[str, Any]:
        """The parameters as this model keeps them: stacked with scan_layers."""
        if self._params is None:
            raise InputError("the model has no parameters (_do_init=False): pass params= to the call, or set params.")
        return self._params

    @property
    def params_shape_tree(self) -> dict[str, Any]:
        """Shapes and dtypes of the parameters, without making any."""
        module = self.module_class(config=FrozenConfig(self.config), dtype=self.dtype)  # type: ignore[call-arg]
        return _shapes(module)

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """The paths of all parameters."""
        return {tuple(path.split("/")) for path in flat(self.params_shape_tree)}

    def _stored_form(self, params: Any) -> dict[str, Any]:
        return (stack_layers if self.scan_layers else unstack_layers)(nested(flat(params)))

    def _stored_form_of_shapes(self) -> Any:
        if not self.scan_layers:
            return self.params_shape_tree
        return jax.eval_shape(stack_layers, self.params_shape_tree)

    def init_weights(self, rng: jax.Array, input_shape: tuple[int, int] = (1, 1), params: Any = None) -> dict[str, Any]:
        """Fresh parameters: normal(0, initializer_range) for matrices, zero for biases, norms and the padding row.

        params: a tree whose leaves are kept; only what it lacks is made.
        """
        given = {} if params is None else flat(unstack_layers(params))
        shapes = flat(self.params_shape_tree)
        return nested({p: given[p] if p in given else fresh(p, s, rng, self.config) for p, s in shapes.items()})

    def num_parameters(self) -> int:
        """Parameters that can be trained, a tied head counted once."""
        leaves = flat(self.params_shape_tree).items()
        return sum(int(np.prod(leaf.shape)) for path, leaf in leaves if not path.endswith(SCALAR))

    def to_bf16(self, params: Any, mask: Any = None) -> dict[str, Any]:
        """`params` with floating leaves in bfloat16, or those where the tree `mask` has True. The dtype of the
        computation is the model's own."""
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Any, mask: Any = None) -> dict[str, Any]:
        """`params` with floating leaves in float16, as `to_bf16`."""
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Any, mask: Any = None) -> dict[str, Any]:
        """`params` with floating leaves in float32, as `to_bf16`."""
        return _cast(params, jnp.float32, mask)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each layer in the backward pass instead of keeping what it computed."""
        self.gradient_checkpointing = True

    enable_gradient_checkpointing = gradient_checkpointing_enable

    def gradient_checkpointing_disable(self) -> None:
        self.gradient_checkpointing = False

    def shard(self, mesh: jax.sharding.Mesh, axes: dict[str, str | None] | None = None) -> None:
        """Lay parameters out on the mesh, and batches and caches of later calls; see `gemmakit.flax.weights`."""
        self.rules = Rules(mesh, self.config, axes)
        self._params = self.rules.parameters(self.stored_params)

    # -- the forward pass ------------------------------------------------------------------------------------------

    def init_cache(self, batch_size: int, max_length: int) -> caches.Cache:
        """An empty cache for `batch_size` rows of at most `max_length` tokens, to pass as `past_key_values`."""
        cache = caches.new_cache(self.config, batch_size, max_length, self.dtype, self.scan_layers)
        return cache if self.rules is None else self.rules.cache(cache)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: caches.Cache | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        is_causal: bool | None = None,
        lora: Any = None,
        **head: Any,
    ) -> Output | tuple[Any, ...]:
        """Run the model, compiled once a shape. numpy and jax arrays do; inside jit, grad and vmap too.

        Args:
            input_ids: (B, S) token ids.
            attention_mask: (B, S) of 0 and 1; with a cache over its tokens and these, or as wide as the cache; or 4-D,
                bool or additive, used as it is.
            position_ids: (B, S); by default they continue after the cache. Given without mask and cache, a restart
                of the positions begins a new document, and tokens see their own document only.
            params: instead of the model's own; layers may be stacked or not.
            past_key_values: what `init_cache` made or a call before gave back; comes back with these tokens in it.
            dropout_rng: needed where `train` and the configuration drop.
            train: apply dropout.
            output_attentions, output_hidden_states, return_dict: as the configuration says unless given.
            is_causal: False lets every token see all others that are not padding; by default as the configuration
                says (`use_bidirectional_attention`).
            lora: adapters, as `init_lora` makes them.
            head: what the class's `of_head` names, labels for one.

        Raises:
            InputError (a ValueError): shapes that do not fit.
            TokenOutOfRange: an id that the vocabulary does not have.
            PromptTooLong: the cache is full.
        """
        c, more = self.config, self.of_head(input_ids, attention_mask, **head)
        labels = more.pop("labels", None)
        input_ids = self._checked_ids(input_ids)
        if past_key_values is not None:
            caches.check(past_key_values, *input_ids.shape)
        if train and dropout_rng is None and self._drops():
            raise InputError("train=True with dropout in the configuration needs dropout_rng=jax.random.PRNGKey(...).")
        attention_mask, position_ids = (None if a is None else self._placed(a) for a in (attention_mask, position_ids))
        variables, inputs = self.variables(params, lora), (input_ids, attention_mask, position_ids, past_key_values)
        if not train and known(*jax.tree.leaves((variables, inputs, labels))):
            variables["products"] = self.products(variables["params"], copies=False)
        out = _apply(
            self.module,
            variables,
            inputs,
            labels,
            dropout_rng,
            train=train,
            attentions=c.output_attentions if output_attentions is None else output_attentions,
            hidden_states=c.output_hidden_states if output_hidden_states is None else output_hidden_states,
            static=(*more.items(), ("is_causal", is_causal)),
        )
        return out if (c.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def of_head(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        """What a call takes besides, checked; the decoder alone takes nothing."""
        return {}

    def variables(self, params: Any = None, lora: Any = None) -> dict[str, Any]:
        """What the module is applied to: the model's own parameters or others, and adapters."""
        held = {"params": self.stored_params if params is None else self._stored_form(params)}
        return held if lora is None else {**held, "lora": self._stored_form(lora)}

    def products(self, params: Any, *, copies: bool) -> dict[str, Any]:
        """How a call multiplies by the parameters, see products.py; {} where the module alone says it."""
        return products.told(params, self.dtype, self.config.tie_word_embeddings, self.rules is not None, copies)

    def _drops(self) -> bool:
        return self.config.attention_dropout > 0

    def _placed(self, array: Any) -> Any:
        if not known(array):
            return array
        array = array if isinstance(array, jax.Array) else np.asarray(array)
        return array if self.rules is None else self.rules.batch(array)

    def _checked_ids(self, ids: Any) -> Any:
        """(B, S) int32. Raises InputError, TokenOutOfRange."""
        check_array("input_ids", ids, "model")
        if np.ndim(ids) != 2:
            raise InputError(f"input_ids has shape {tuple(np.shape(ids))}; it must be (batch, sequence).")
        if not known(ids):
            return ids.astype(jnp.int32)
        host, size = np.asarray(ids), self.config.vocab_size
        bad = host[(host < 0) | (host >= size)]
        if bad.size:
            raise TokenOutOfRange(
                f"token id {int(bad[0])} is outside the vocabulary of {size} ids (0 to {size - 1}): "
                "was the text encoded with another model's tokenizer?"
            )
        return self._placed(host.astype(np.int32))

    # -- in and out ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        dtype: Any = jnp.float32,
        *,
        config: GemmaConfig | None = None,
        param_dtype: Any = None,
        _do_init: bool = True,
        input_shape: tuple[int, int] = (1, 1),
        seed: int = 0,
        scan_layers: bool = False,
        attn_implementation: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        mesh_axes: dict[str, str | None] | None = None,
        allow_pickle: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model from a folder or the Hub: safetensors, Flax msgpack, GGUF, or a folder that Orbax wrote.

        Args:
            pretrained_model_name_or_path: a folder, a .gguf file, or "owner/name" on the Hub.
            dtype: of the computation; "auto" takes the one of the weights.
            config: instead of the config.json found there; of Google's Orbax folders, which have none, shapes tell
                enough, of a Flax model's own parameters they do not.
            param_dtype: of the parameters; None keeps what is stored. Each tensor goes from the mapped file straight to
                this dtype and to its devices.
            _do_init: False returns (model without parameters, parameters), as old code expects.
            seed: of heads that the file lacks.
            mesh, mesh_axes: lay the model out on these devices; see `gemmakit.flax.weights`.
            allow_pickle: read pytorch_model.bin, with torch's restricted unpickler, when there is nothing better.
            ignore_mismatched_sizes: start a head of another shape afresh, with a warning, instead of refusing.
            kwargs: revision, token, cache_dir, local_files_only, subfolder, variant; gguf_file, the name of a GGUF file
                of that folder or id; anything else overrides a field of the configuration.

        Raises:
            CheckpointError: files missing, damaged, or with tensors this model lacks, misses or shapes otherwise.
            UnsafeFile, HubError, NotEnoughMemory, ConfigError, MissingDependency.
        """
        name = pretrained_model_name_or_path
        refuse_code(kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in _ALWAYS}
        hub, variant = HubOptions.take(kwargs), kwargs.pop("variant", None)
        gguf = find_gguf(name, kwargs.pop("gguf_file", None), hub)
        if gguf is not None:
            name, hub, variant = gguf, HubOptions(), None
        config = config_of(name, config, hub, kwargs)
        if gguf is not None and param_dtype is None:
            param_dtype = config.dtype
        config.attn_implementation = attn_implementation or config.attn_implementation
        model = member_class(cls, config.model_type)(
            config, input_shape, seed, jnp.float32, _do_init=False, scan_layers=scan_layers
        )
        shapes = flat(model.params_shape_tree)
        opened = open_checkpoint(name, hub, vocab_size=config.vocab_size, allow_pickle=allow_pickle, variant=variant)
        rules = None if mesh is None else Rules(mesh, config, mesh_axes)
        params = load(model, opened, shapes, param_dtype, rules, ignore_mismatched_sizes)
        model.generation_config = generation_for(name, hub) or model.generation_config
        model.dtype = dtype_of(
            next(iter(params.values())).dtype if isinstance(dtype, str) and dtype == "auto" else dtype
        )
        model.rules, model.name_or_path = rules, str(name)
        if not _do_init:
            return model, nested(params)
        model._params = model._stored_form(nested(params))
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        params: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        *,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write config.json, generation_config.json and the weights, so that a reader finds the old or the new, whole.

        Args:
            save_directory: the folder, made if absent.
            params: instead of the model's own.
            max_shard_size: bytes a safetensors file, as a number or "5GB", "200MB".
            safe_serialization: safetensors, which both backends read; False writes flax_model.msgpack as old
                transformers did, in one file.
            push_to_hub: afterwards upload the folder; kwargs go to `push_folder`.

        Raises:
            CheckpointError: the disk refuses.
        """
        leaves = flat(unstack_layers(self.stored_params if params is None else nested(flat(params))))
        config, folder = self.config, Path(save_directory)
        config.architectures = [member_class(type(self), config.model_type).__name__.removeprefix(FLAX)]
        config.dtype = str(next(iter(leaves.values())).dtype)
        files = {
            "config.json": config.to_json_string(),
            "generation_config.json": self.generation_config.to_json_string(),
        }
        if safe_serialization:
            tensors = {pytorch_name(path)[0]: pytorch_tensor(path, leaf) for path, leaf in leaves.items()}
            save_checkpoint(tensors, folder, max_shard_size=max_shard_size, extra_files=files)
        else:
            save_msgpack(leaves, folder, files)
        push_saved(folder, push_to_hub, kwargs)


@functools.partial(jax.jit, static_argnames=("module", "train", "attentions", "hidden_states", "static"))
def _apply(
    module: Any,
    variables: Any,
    inputs: tuple[Any, ...],
    labels: Any,
    dropout_rng: Any,
    *,
    train: bool,
    attentions: bool,
    hidden_states: bool,
    static: tuple[tuple[str, Any], ...],
) -> Any:
    """One compiled pass for every model whose module is equal."""
    more = {} if labels is None else {"labels": labels}
    rngs = None if dropout_rng is None else {"dropout": dropout_rng}
    wanted = Wanted(train=train, attentions=attentions, hidden_states=hidden_states)
    return module.apply(variables, *inputs, wanted, rngs=rngs, **more, **dict(static))


@functools.lru_cache(maxsize=32)
def _shapes(module: nn.Module) -> dict[str, Any]:
    made = jax.eval_shape(module.init, jax.random.PRNGKey(0), jnp.zeros((1, 1), jnp.int32))
    return made["params"]


def _cast(params: Any, dtype: Any, mask: Any) -> dict[str, Any]:
    leaves = flat(params)
    chosen = dict.fromkeys(leaves, True) if mask is None else flat(mask)
    if set(chosen) != set(leaves):
        raise InputError("mask must be a tree like the parameters, with True or False at every leaf.")
    return nested({
        path: leaf.astype(dtype) if chosen[path] and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for path, leaf in leaves.items()
    })  # fmt: skip


def _register(cls: type) -> None:
    names = [f.name for f in fields(cls)]
    jax.tree_util.register_pytree_with_keys(
        cls,
        lambda out: ([(jax.tree_util.GetAttrKey(n), getattr(out, n)) for n in names], None),
        lambda _, values: cls(**dict(zip(names, values, strict=True))),
    )


# So that a caller's own jitted function may return them.
for _cls in (
    outputs.BaseModelOutputWithPast,
    outputs.CausalLMOutputWithPast,
    outputs.SequenceClassifierOutputWithPast,
    outputs.TokenClassifierOutput,
    outputs.GenerateDecoderOnlyOutput,
    outputs.GenerateBeamDecoderOnlyOutput,
):
    _register(_cls)
