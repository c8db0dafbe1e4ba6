"""Which watermark a text gets: a green list (Kirchenbauer) or SynthID-text. Settings only; no tensors."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from gemmakit.checks import FLAG, OneOf, Real, Whole, check_fields
from gemmakit.errors import GenerationConfigError
from gemmakit.files import write_text

Self = TypeVar("Self", bound="BaseWatermarkingConfig")


@dataclass
class BaseWatermarkingConfig:
    """What both watermarks share: checked fields, and dictionaries in and out."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises GenerationConfigError for a field out of its range."""
        check_fields(self, GenerationConfigError, prefix="watermarking_config.")

    @classmethod
    def from_dict(cls: type[Self], config_dict: dict[str, Any], **overrides: Any) -> Self:
        merged = {**config_dict, **overrides}
        names = [f.name for f in fields(cls)]
        for name in merged:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise GenerationConfigError(f"{cls.__name__} has no setting {name!r}.{hint}")
        return cls(**merged)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json_string(self) -> str:
        """`to_dict` as indented JSON, with a line end."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write that as one file, which a reader finds whole."""
        write_text(Path(json_file_path), self.to_json_string())


@dataclass
class WatermarkingConfig(BaseWatermarkingConfig):
    """A share of the vocabulary, the green list, is made likelier; which share follows from the tokens before.

    greenlist_ratio: the share. bias: added to green tokens' logits. hashing_key: the secret. seeding_scheme:
    "lefthash" (the last token decides) or "selfhash" (the token itself takes part; slower). context_width: tokens
    before that count. Source: arXiv:2301.10226 and arXiv:2306.04634, algorithms 2 and 3.
    """

    greenlist_ratio: Annotated[float, Real(0, 1, above=True, below=True)] = 0.25
    bias: Annotated[float, Real()] = 2.0
    hashing_key: Annotated[int, Whole(1, 2**63 - 1)] = 15485863
    seeding_scheme: Annotated[str, OneOf("lefthash", "selfhash")] = "lefthash"
    context_width: Annotated[int, Whole(1)] = 1


@dataclass
class SynthIDTextWatermarkingConfig(BaseWatermarkingConfig):
    """SynthID-text: a tournament between tokens, one round a key, decided by hashes of the n-gram.

    ngram_len: tokens of an n-gram, the new one included. keys: the secret, one a round (20 to 30 are usual).
    context_history_size: contexts remembered, so that none is marked twice. sampling_table_seed and
    sampling_table_size: the table of coin flips. skip_first_ngram_calls: leave the first ngram_len - 1 tokens as they
    are. debug_mode: take every token as equally likely. Source: doi:10.1038/s41586-024-08025-4.
    """

    ngram_len: Annotated[int, Whole(2)] = 5
    keys: Sequence[int] = ()
    context_history_size: Annotated[int, Whole(1)] = 1024
    sampling_table_seed: Annotated[int, Whole(0, 2**63 - 1)] = 0
    sampling_table_size: Annotated[int, Whole(1, 2**24)] = 2**16
    skip_first_ngram_calls: Annotated[bool, FLAG] = False
    debug_mode: Annotated[bool, FLAG] = False

    def validate(self) -> None:
        super().validate()
        self.keys = list(self.keys)
        key = Whole(-(2**63), 2**63 - 1)
        if not self.keys or not all(key.holds(k) for k in self.keys):
            raise GenerationConfigError(
                f"watermarking_config.keys is {self.keys!r}; it must be a list of at least 1 whole number."
            )


def watermark_of(value: Any) -> BaseWatermarkingConfig:
    """The configuration an object or a dictionary stands for; SynthID's is known by its keys."""
    if isinstance(value, BaseWatermarkingConfig):
        value.validate()
        return value
    if isinstance(value, dict):
        kind = SynthIDTextWatermarkingConfig if "ngram_len" in value or "keys" in value else WatermarkingConfig
        return kind.from_dict(cast("dict[str, Any]", value))
    raise GenerationConfigError(
        f"watermarking_config is {value!r}; it must be a WatermarkingConfig, a SynthIDTextWatermarkingConfig or a "
        "dictionary of one's fields."
    )
