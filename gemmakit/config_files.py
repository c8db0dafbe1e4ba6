"""What transformers' configurations can do besides holding settings: dictionaries, files and names of theirs."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gemmakit.files import read_json_object, write_text
from gemmakit.hub import HubOptions, find_file, push_folder, push_saved

if TYPE_CHECKING:
    from typing_extensions import Self


class ConfigFiles:
    """Mixed into GemmaConfig."""

    is_encoder_decoder = False
    is_composition = False
    attribute_map: ClassVar[dict[str, str]] = {}
    sub_configs: ClassVar[dict[str, Any]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_json_string(self, use_diff: bool = True) -> str:
        raise NotImplementedError

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **overrides: Any) -> Any:
        raise NotImplementedError

    @property
    def _attn_implementation(self) -> str:
        return self.attn_implementation  # type: ignore[attr-defined]

    @_attn_implementation.setter
    def _attn_implementation(self, value: str) -> None:
        self.attn_implementation = value

    @property
    def _name_or_path(self) -> str:
        return self.name_or_path  # type: ignore[attr-defined]

    @_name_or_path.setter
    def _name_or_path(self, value: str) -> None:
        self.name_or_path = value

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and hasattr(self, name)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """This one: all of it is of text."""
        return self

    def to_diff_dict(self) -> dict[str, Any]:
        """What of `to_dict` differs from the class's defaults, and the model_type."""
        defaults = type(self)().to_dict()
        return {n: v for n, v in self.to_dict().items() if n == "model_type" or n not in defaults or v != defaults[n]}

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json into a folder, replacing an older one at once; push_to_hub: upload it, kwargs say how."""
        self.to_json_file(Path(save_directory) / "config.json")
        push_saved(Path(save_directory), push_to_hub, kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write `to_dict` as one file, which a reader finds whole; use_diff is accepted, the rest is written too."""
        write_text(Path(json_file_path), self.to_json_string())

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Self:
        """Read one file."""
        return cls.from_dict(read_json_object(Path(json_file)))

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What config.json of a folder or a Hub id holds, and the arguments that say nothing of where it is."""
        path = find_file(pretrained_model_name_or_path, "config.json", HubOptions.take(kwargs))
        assert path is not None
        return copy.deepcopy(read_json_object(path)), kwargs

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload config.json; kwargs go to `gemmakit.hub.push_folder`. The address comes back."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, **kwargs)
