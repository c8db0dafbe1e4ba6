"""Second names of a configuration's fields, and names that are nearly one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, TypeVar, overload

from gemmakit.errors import ConfigError

T = TypeVar("T")

# Names that other libraries use for the same thing, and what Gemma calls it.
_OTHER_NAMES = {
    "n_layer": "num_hidden_layers", "n_layers": "num_hidden_layers", "num_layers": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_heads": "num_attention_heads", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "n_kv_heads": "num_key_value_heads",
    "d_model": "hidden_size", "n_embd": "hidden_size", "embed_dim": "hidden_size",
    "d_ff": "intermediate_size", "ffn_dim": "intermediate_size", "mlp_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings", "n_ctx": "max_position_embeddings",
    "n_positions": "max_position_embeddings", "max_position_embedding": "max_position_embeddings",
    "rms_eps": "rms_norm_eps", "layer_norm_eps": "rms_norm_eps", "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta", "theta": "rope_theta", "activation": "hidden_act", "n_vocab": "vocab_size",
    "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip


class Spelling(Generic[T]):
    """A second name of what a field holds: `read` finds it there, `write` says what an assignment changes.

    While a configuration is made, the field may come after it: what is given is kept for __post_init__.
    """

    def __init__(self, read: Callable[[Any], T], write: Callable[[Any, Any], dict[str, Any]]):
        self.read, self.write = read, write

    def __set_name__(self, owner: type, name: str) -> None:
        self.given = f"_{name}"

    @overload
    def __get__(self, config: None, owner: Any = None) -> None: ...
    @overload
    def __get__(self, config: Any, owner: Any = None) -> T: ...
    def __get__(self, config: Any | None, owner: Any = None) -> T | None:
        return None if config is None else self.read(config)

    def __set__(self, config: Any, value: Any) -> None:
        made = "extra" in vars(config)
        vars(config).update(self.write(config, value) if made else {self.given: value})


def refuse_misspelled(names: Iterable[str], fields: Collection[str]) -> None:
    """ConfigError for a name that looks like one of `fields`, or like another library's word for it."""
    for name in names:
        meant = _OTHER_NAMES.get(name)
        if meant is None:
            close = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
            meant = close[0] if close else None
        if meant is not None:
            raise ConfigError(f"GemmaConfig has no field {name!r}: did you mean {meant!r}?")
