"""Tokenizers to and from directories and the Hub, in the files that transformers reads and writes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gemmakit.checks import DOWNLOADING, Accepted, take_accepted
from gemmakit.errors import GemmakitError, InputError, TokenizerError
from gemmakit.files import replacing
from gemmakit.hub import HubOptions, find_file, find_gguf, push_folder, refuse_code
from gemmakit.text.gguf import gguf_settings
from gemmakit.text.vocabulary import AddedToken, Engine
from gemmakit.text.vocabulary_files import read_json

Self = TypeVar("Self", bound="Saving")

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
SPECIALS, TEMPLATE, ADDED = "special_tokens_map.json", "chat_template.jinja", "added_tokens.json"
MAX_TEMPLATE_BYTES = 2**20

# Said by a file about itself or about other software; nothing here acts on it, and code is never loaded.
_IGNORED = ("tokenizer_class", "auto_map", "backend", "is_local", "local_files_only", "tokenizer_file", "vocab_file")
_SAVING: Accepted = {
    "legacy_format": ((None, False), "tokenizer.json is always written, and tokenizer.model where there is one"),
    "save_raw_chat_template": ((None, True), "save_jinja_files=False puts the template into tokenizer_config.json"),
}
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "sep_token", "cls_token")


class Saving:
    """`from_pretrained`, `save_pretrained`, `save_vocabulary`."""

    _engine: Engine
    is_fast: bool
    vocab_file: str | None
    _around: Callable[[], tuple[list[int], list[int]]]

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *inputs: Any,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        gguf_file: str | None = None,
        **settings: Any,
    ) -> Self:
        """Load from a directory, a Hub id or a GGUF file; `settings` override what the files say.

        gguf_file: the name of a GGUF file of that directory or id, which holds the tokenizer. Otherwise GemmaTokenizer
        prefers `tokenizer.model`, GemmaTokenizerFast `tokenizer.json`; either takes the other. Raises
        TokenizerError for malformed files, CheckpointError or HubError where they cannot be had.
        """
        name = os.fspath(pretrained_model_name_or_path)
        refuse_code(settings)
        take_accepted(settings, DOWNLOADING, InputError)
        for key in ("use_fast", "legacy"):  # the class says it; Gemma's has no older form
            settings.pop(key, None)

        hub = HubOptions(revision, token, cache_dir, local_files_only, subfolder)
        gguf = find_gguf(name, gguf_file, hub)
        if gguf is not None:
            return _made(cls, inputs, {**gguf_settings(gguf), "name_or_path": str(gguf), **settings})

        def find(filename: str) -> Path | None:
            return find_file(name, filename, hub, optional=True)

        config = {**_config(find), "name_or_path": name}
        order = (JSON, MODEL) if cls.is_fast else (MODEL, JSON)
        for filename in order:
            path = find(filename)
            if path is not None:
                key = "vocab_file" if filename == MODEL else "tokenizer_file"
                if filename == JSON:
                    config.pop("sp_model_kwargs", None)
                return _made(cls, inputs, {**config, key: str(path), **settings})
        raise TokenizerError(f"{name} has neither {order[0]} nor {order[1]}: it holds no Gemma tokenizer.")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        filename_prefix: str | None = None,
        *,
        push_to_hub: bool = False,
        save_jinja_files: bool = True,
        **upload: Any,
    ) -> tuple[str, ...]:
        """Write everything `from_pretrained` needs, here and in transformers; returns the files' paths.

        Each file is written beside its place and moved there, so an interrupted save leaves the old file whole.
        save_jinja_files: False puts the chat template into tokenizer_config.json, where several always are.
        push_to_hub: upload the folder afterwards, to `repo_id` (default: the folder's name); `upload` goes to
        `gemmakit.hub.push_folder`.
        """
        take_accepted(upload, _SAVING, InputError)
        if upload and not push_to_hub:
            raise InputError(f"save_pretrained has no argument {', '.join(upload)} unless push_to_hub=True.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = [Path(path) for path in self.save_vocabulary(folder, filename_prefix)]
        for name, text in self._texts(save_jinja_files):
            files.append(_write(folder / _prefixed(name, filename_prefix), text.encode()))
        template = folder / _prefixed(TEMPLATE, filename_prefix)
        if template not in files:  # an older one would be read before what tokenizer_config.json says
            template.unlink(missing_ok=True)
        if push_to_hub:
            push_folder(folder, upload.pop("repo_id", folder.name), **upload)
        return tuple(map(str, files))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save to a temporary folder and upload it; kwargs go to `gemmakit.hub.push_folder`. The address comes back."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, **kwargs)

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the vocabulary alone: `tokenizer.model` where there is one, and `tokenizer.json`."""
        folder = Path(save_directory)
        if not folder.is_dir():
            raise TokenizerError(f"{folder} is not a directory to save a vocabulary in.")
        written = []
        model = self._model_bytes()
        if model is not None:
            written.append(_write(folder / _prefixed(MODEL, filename_prefix), model))
        text = self._engine.tokenizer_json(*self._around())
        written.append(_write(folder / _prefixed(JSON, filename_prefix), text.encode()))
        return tuple(map(str, written))

    def _model_bytes(self) -> bytes | None:
        model = self._engine.model_bytes()
        if model is not None:
            return model
        try:
            return Path(self.vocab_file).read_bytes() if self.vocab_file else None
        except OSError as error:
            raise TokenizerError(f"cannot read {self.vocab_file} to save it again: {error.strerror}.") from error

    def update_post_processor(self) -> None:
        """Bring the Rust tokenizer's own post-processor in line. Encoding here never needs it: settings act at once."""
        self._engine.set_around(*self._around())

    @property
    def init_kwargs(self: Any) -> dict[str, Any]:
        """What a tokenizer like this one is made of beside its vocabulary, as the constructor names it."""
        return {**self._settings(), "chat_template": self.chat_template, "name_or_path": self.name_or_path}

    def _settings(self: Any) -> dict[str, Any]:
        """What tokenizer_config.json says, but for the class and the template."""
        return {
            **self._other,
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            "added_tokens_decoder": {str(i): token.to_dict() for i, token in self.added_tokens_decoder.items()},
            **self.special_tokens_map,
            "additional_special_tokens": self.additional_special_tokens,
            "extra_special_tokens": self.additional_special_tokens,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "sp_model_kwargs": getattr(self, "sp_model_kwargs", {}),
            "spaces_between_special_tokens": self.spaces_between_special_tokens,
            "use_default_system_prompt": self.use_default_system_prompt,
        }

    def _texts(self: Any, templates_apart: bool) -> Iterator[tuple[str, str]]:
        config = {**self._settings(), "tokenizer_class": "GemmaTokenizer"}
        template: Any = self.chat_template if isinstance(self.chat_template, Mapping) else self.get_chat_template()
        if isinstance(template, Mapping):
            config["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
        elif templates_apart:
            yield TEMPLATE, template
        else:
            config["chat_template"] = template
        yield CONFIG, json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        specials = {**self.special_tokens_map, "additional_special_tokens": self.additional_special_tokens}
        yield SPECIALS, json.dumps(specials, indent=2, ensure_ascii=False) + "\n"


def _made(cls: type[Self], inputs: tuple[Any, ...], settings: Mapping[str, Any]) -> Self:
    try:
        template = settings.get("chat_template")
        if isinstance(template, list):
            settings = {**settings, "chat_template": {entry["name"]: entry["template"] for entry in template}}
        return cls(*inputs, **settings)
    except GemmakitError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise TokenizerError(f"{settings['name_or_path']}: its tokenizer settings are malformed: {error}") from error


def _config(find: Any) -> dict[str, Any]:
    """Constructor arguments from the configuration files, of transformers 4 and 5 and of the released repositories."""
    path = find(CONFIG)
    config = dict(_object(path)) if path else {}
    specials = find(SPECIALS)
    for key, value in (_object(specials) if specials else {}).items():
        config.setdefault(key, value)
    added = find(ADDED)
    if added is not None and "added_tokens_decoder" not in config:
        config["added_tokens_decoder"] = _legacy_added(_object(added), config)
    for key in _IGNORED:
        config.pop(key, None)
    for key in _NAMES:
        if isinstance(config.get(key), Mapping):
            config[key] = AddedToken.of(config[key])
        elif not isinstance(config.get(key, ""), (str, type(None))):
            raise TokenizerError(f"{path}: {key} is {config[key]!r}; a string is needed.")
    template = find(TEMPLATE)
    if template is not None:
        config["chat_template"] = _template(template)
    if config.get("model_max_length") is None:
        config.pop("model_max_length", None)
    return config


def _legacy_added(table: Mapping[str, Any], config: Mapping[str, Any]) -> dict[int, AddedToken]:
    specials = {str(config.get(name)) for name in _NAMES}
    if not all(type(index) is int for index in table.values()):
        raise TokenizerError(f"{ADDED} must give an id for each token.")
    return {index: AddedToken(text, special=text in specials) for text, index in table.items()}


def _object(path: Path) -> Mapping[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} must hold an object, found {type(data).__name__}.")
    return data


def _template(path: Path) -> str:
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise TokenizerError(f"{path} is larger than {MAX_TEMPLATE_BYTES} bytes.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: {error.reason}.") from error


def _prefixed(name: str, prefix: str | None) -> str:
    return f"{prefix}-{name}" if prefix else name


def _write(path: Path, data: bytes) -> Path:
    with replacing(path) as staged:
        staged.write_bytes(data)
    return path
