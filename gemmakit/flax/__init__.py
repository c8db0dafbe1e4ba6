"""The Flax backend: the same models as `gemmakit.pytorch`, as Linen modules, for jit, grad, vmap and meshes.

Importing this package needs jax and flax; `import gemmakit` alone does not.
"""

from gemmakit.errors import MissingDependency

try:
    import flax.linen  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import jax  # noqa: F401  # pyright: ignore[reportUnusedImport]
except ImportError as error:
    raise MissingDependency(
        f"the Flax backend needs jax and flax ({error.name} is not installed): pip install 'gemmakit[flax]'."
    ) from error

from gemmakit.family import FLAX, KINDS
from gemmakit.flax import heads, model
from gemmakit.flax.heads import (
    FlaxGemmaForCausalLM,
    FlaxGemmaForSequenceClassification,
    FlaxGemmaForTokenClassification,
)
from gemmakit.flax.loss import causal_loss
from gemmakit.flax.model import FlaxGemmaModel
from gemmakit.flax.pretrained import FlaxGemmaPreTrainedModel
from gemmakit.flax.weights import init_lora, make_mesh, merge_lora, shard, stack_layers, unstack_layers

__all__ = [
    "FlaxGemmaForCausalLM",
    "FlaxGemmaForSequenceClassification",
    "FlaxGemmaForTokenClassification",
    "FlaxGemmaModel",
    "FlaxGemmaPreTrainedModel",
    "causal_loss",
    "init_lora",
    "make_mesh",
    "merge_lora",
    "shard",
    "stack_layers",
    "unstack_layers",
]

# The other members of the family, by the names of Gemma 1's classes.
for _kind in KINDS.values():
    for _role, _first in KINDS["gemma"].classes.items():
        _name = FLAX + _kind.classes[_role]
        if FLAX + _first in __all__ and _name not in __all__:
            globals()[_name] = vars(model if _role == "model" else heads)[_name]
            __all__ += [_name]  # pyright: ignore[reportUnsupportedDunderAll]
