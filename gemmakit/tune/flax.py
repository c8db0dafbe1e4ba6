"""A Flax model in training: losses and gradients are JAX's, everything around them is the run's as ever.

What is trained stays with the PyTorch model of the same checkpoint, whose other weights are mapped and never read: so
rows, steps, states and files are one code's, and a run is written as PEFT's files or a checkpoint.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.checkpoint.formats.msgpack import flax_path
from gemmakit.errors import InputError
from gemmakit.flax import FlaxGemmaForCausalLM
from gemmakit.flax.loss import cross_entropy
from gemmakit.flax.weights import LORA_TARGETS, flat, merge_lora, nested
from gemmakit.pytorch.adapters import adapters_of
from gemmakit.pytorch.loss import IGNORED_LABEL
from gemmakit.tune.batches import targets

# A step is compiled for each width of its rows: they are padded to a multiple of this.
WIDTH = 32


class FlaxModel:
    """Takes a PyTorch model's place before a `Trainer`: called with a batch, it gives the loss, which has gradients.

    plain: the PyTorch model with what is trained in it. What else is asked of this one is asked of that.
    """

    def __init__(self, plain: Any, source: Any, dtype: str):
        """Raises InputError for an adapter on anything but projections."""
        self.plain = plain
        self.adapters = adapters_of(plain)
        others = [name for name in self.adapters if name.rpartition(".")[2] not in LORA_TARGETS]
        if others:
            raise InputError(f"--backend flax has adapters of {', '.join(LORA_TARGETS)} alone, not of {others[0]}.")
        self.flax = FlaxGemmaForCausalLM.from_pretrained(source, dtype=dtype)
        self.flax.gradient_checkpointing = plain.is_gradient_checkpointing
        self.trained: dict[str, Any] = {n: p for n, p in plain.named_parameters() if p.requires_grad}
        value = self._value
        self._loss, self._both = jax.jit(value), jax.jit(jax.value_and_grad(value))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def __call__(self, *, num_items_in_batch: int, **batch: Any) -> Any:
        """As a PyTorch model with labels; `loss` alone comes back, what concerns memory and caches is passed over."""
        kept = {n: batch[n] for n in ("input_ids", "labels", "attention_mask", "position_ids") if n in batch}
        if torch.is_grad_enabled():
            loss: Any = _Loss.apply(self, kept, num_items_in_batch, *self.trained.values())
        else:
            loss = torch.tensor(self.value_of(kept, num_items_in_batch))
        return SimpleNamespace(loss=loss)

    def to_generate(self) -> Any:
        """The Flax model as it stands now."""
        made = FlaxGemmaForCausalLM(self.flax.config, _do_init=False, dtype=self.flax.dtype)
        made.generation_config, made.name_or_path = self.flax.generation_config, self.flax.name_or_path
        params, lora = self._variables(self._arrays(), self.flax.params)
        made.params = params if lora is None else merge_lora(params, lora)
        return made

    def value_of(self, batch: dict[str, Tensor], items: int) -> float:
        return float(self._loss(self._arrays(), self.flax.stored_params, _laid_out(batch), np.float32(items)))

    def gradients_of(self, batch: dict[str, Tensor], items: int) -> tuple[float, list[Tensor]]:
        """The loss, and its gradients in the order of what is trained."""
        loss, found = self._both(self._arrays(), self.flax.stored_params, _laid_out(batch), np.float32(items))
        return float(loss), [torch.from_numpy(np.array(found[name])) for name in self.trained]

    def _arrays(self) -> dict[str, Any]:
        return {name: jnp.asarray(parameter.detach().numpy()) for name, parameter in self.trained.items()}

    def _value(self, trained: dict[str, Any], held: Any, batch: dict[str, Any], items: Any) -> Any:
        params, lora = self._variables(trained, held)
        wanted = batch["targets"]
        logits = self.flax(
            batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"), params, lora=lora, train=True
        ).logits
        return cross_entropy(logits, wanted) * (wanted != IGNORED_LABEL).sum() / items

    def _variables(self, trained: dict[str, Any], held: Any) -> tuple[Any, Any]:
        """Parameters, and adapters where there are some, in the tree's names and shapes."""
        if not self.adapters:
            turned = {flax_path(name): leaf for name, leaf in trained.items()}
            return nested({**flat(held), **{path: leaf.T if t else leaf for (path, t), leaf in turned.items()}}), None
        lora: dict[str, Any] = {}
        for name, adapter in self.adapters.items():
            path = name.replace(".", "/")
            lora[f"{path}/a"] = trained[f"{name}.lora_A"].T
            lora[f"{path}/b"] = trained[f"{name}.lora_B"].T * adapter.scaling
        return held, nested(lora)


class _Loss(torch.autograd.Function):
    """JAX's gradients, in the way in which torch is given them."""

    @staticmethod
    def forward(ctx: Any, model: FlaxModel, batch: dict[str, Tensor], items: int, *trained: Tensor) -> Tensor:  # type: ignore[override]
        loss, ctx.gradients = model.gradients_of(batch, items)
        return torch.tensor(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return None, None, None, *(found * gradient for found in ctx.gradients)


def _laid_out(batch: dict[str, Tensor]) -> dict[str, Any]:
    """The batch with what each position predicts, as wide as a multiple of WIDTH. Packed padding is a document."""
    room = -batch["input_ids"].shape[1] % WIDTH
    found = {name: tensor for name, tensor in batch.items() if name != "labels"}
    found["targets"] = F.pad(targets(batch), (0, room), value=IGNORED_LABEL)
    for name in ("input_ids", "attention_mask"):
        if name in found:
            found[name] = F.pad(found[name], (0, room))
    if "position_ids" in found:
        more = torch.arange(room).expand(len(found["position_ids"]), room)
        found["position_ids"] = torch.cat([found["position_ids"], more], dim=1)
    return {name: tensor.numpy().astype(np.int32) for name, tensor in found.items()}
