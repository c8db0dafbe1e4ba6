"""A growing cache whose window layers keep their newest positions alone.

A layer that sees W keys needs no older ones: at 128k tokens Gemma 3 4B then holds under 2.75 GiB of keys and values
instead of 17. Axis letters: B batch, K kv heads, T positions held, S new ones, H head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.pytorch.cache.core import CacheLayer, DynamicCache
from gemmakit.pytorch.shapes import Float, Int

# Of the newest tokens so many can be taken back, as drafts are and a step that came too late.
SPARE = 64


class WindowLayer(CacheLayer):
    """The newest positions of a layer whose queries see `window` keys, themselves included.

    `length` counts all positions, of which the first `forgotten` are held no more. What is there suffices for the next
    query after up to `spare` of the newest positions are taken back; a buffer has room for
    `window` more, so that moving what is kept to its beginning costs one copy of a position for each that comes.
    """

    def __init__(self, window: int, spare: int = SPARE):
        super().__init__(None)
        self.kept = window - 1 + spare
        self.window, self.most, self.forgotten = window, window + self.kept + 1, 0

    @property
    def held(self) -> int:
        return int(self.length) - self.forgotten

    @property
    def keys(self) -> Float[Tensor, "B K T H"] | None:
        return None if self._keys is None else self._keys[:, :, : self.held]

    @property
    def values(self) -> Float[Tensor, "B K T H"] | None:
        return None if self._values is None else self._values[:, :, : self.held]

    def append(
        self, k: Float[Tensor, "B K S H"], v: Float[Tensor, "B K S H"], places: Int[Tensor, " S"] | None
    ) -> tuple[Float[Tensor, "B K T H"], Float[Tensor, "B K T H"]]:
        """Take S more positions; give them and those held before them, of which any query here sees the last alone."""
        S = k.shape[2]
        if not torch.is_grad_enabled() and self.kept + S <= self.most:
            keys, values, _, end = self.claim((k.shape[0], k.shape[1], k.shape[3]), S, k)
            keys[:, :, end - S : end] = k
            values[:, :, end - S : end] = v
            return keys[:, :, :end], values[:, :, :end]
        if self.keys is not None and self.values is not None and self.held:
            k, v = torch.cat((self.keys, k), dim=2), torch.cat((self.values, v), dim=2)
        self.length = int(self.length) + S
        self.forgotten = max(self.forgotten, int(self.length) - self.kept)
        self._keys, self._values = (x[:, :, x.shape[2] - self.held :] for x in (k, v))
        self._borrowed = True
        if not torch.is_grad_enabled():  # copied, so that a long prompt's memory is let go of
            self._reserve((k.shape[0], k.shape[1], k.shape[3]), k, self.held, self.held)
        return k, v

    def claim(
        self, sizes: tuple[int, int, int], more: int, like: Tensor
    ) -> tuple[Float[Tensor, "B K capacity H"], Float[Tensor, "B K capacity H"], int, int]:
        """As CacheLayer's, at places of the buffers: the queries of this call see those before them as ever."""
        held = self.held
        if held + more > self.most and held > self.kept:
            assert self._keys is not None and self._values is not None
            self._keys, self._values = (x[:, :, held - self.kept : held] for x in (self._keys, self._values))
            self._borrowed = True  # so that room is made, and this copied to its beginning
            self.forgotten += held - self.kept
            held = self.kept
        self._reserve(sizes, like, held, held + more)
        self.length = int(self.length) + more
        assert self._keys is not None and self._values is not None
        return self._keys, self._values, held, held + more

    def _room(self, held: int, end: int) -> int:
        return max(end, self.most if self.forgotten else min(super()._room(held, end), self.most))

    def check_crop(self, length: int) -> None:
        """The next query must not see what is forgotten; without positions the layer starts anew."""
        if length and self.forgotten > max(length - self.window + 1, 0):
            raise InputError(
                f"{int(self.length) - length} tokens are to be taken back, but layers with a window of {self.window} "
                f"keep what {self.kept - self.window + 1} need: use a DynamicCache() for more."
            )

    def crop(self, length: int) -> None:
        super().crop(length)
        self.forgotten = self.forgotten if length else 0


class WindowCache(DynamicCache):
    """Grows as tokens come in the layers that see all of them; where a window hides older ones, these are let go of.

    Tokens are those of a DynamicCache. At least `spare` of the newest can be taken back (crop).
    """

    spare = SPARE

    def __init__(self, config: GemmaConfig):
        super().__init__(config=config)
        self.windows = [spec.window for spec in config.kv_layers()]

    @staticmethod
    def pays(config: GemmaConfig, length: int) -> bool:
        """Whether `length` tokens pass a window."""
        windows = [spec.window for spec in config.kv_layers()]
        return any(window is not None and window < length for window in windows)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        if isinstance(layer, WindowLayer) and layer.forgotten:
            raise InputError(
                f"the first {layer.forgotten} of {layer.length} positions are forgotten in layers with a window of "
                f"{layer.window}: use a DynamicCache() where keys and values are to be read or saved."
            )
        return super().__getitem__(layer_idx)

    def _new_layer(self) -> CacheLayer:
        window = self.windows[len(self.layers)]
        return CacheLayer(None) if window is None else WindowLayer(window)
