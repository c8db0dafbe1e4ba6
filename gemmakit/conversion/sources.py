"""What is converted: weights of any kind with their configuration, checked against each other, and the small files."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from gemmakit.checkpoint import Checkpoint, open_checkpoint
from gemmakit.checkpoint.formats import GGUF, GOOGLE, ORBAX
from gemmakit.checkpoint.formats.gguf import GgufFile
from gemmakit.checkpoint.formats.orbax import OrbaxFile
from gemmakit.checkpoint.layout import (
    PREFIX,
    architecture_of,
    config_from_shapes,
    differences,
    released_size,
    tensor_shapes,
    tied_names,
    warn_of_copies,
)
from gemmakit.checkpoint.save import same_content
from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError, InputError
from gemmakit.family import PRESETS
from gemmakit.files import replacing
from gemmakit.generation import GenerationConfig
from gemmakit.gguf import read_gguf_header
from gemmakit.gguf_settings import config_values
from gemmakit.hub import DEFAULT, HubOptions, Name, check_relative, find_file, local_directory, packaged_model
from gemmakit.text import GemmaTokenizer, GemmaTokenizerFast
from gemmakit.text.files import ADDED, CONFIG, JSON, MODEL, SPECIALS, TEMPLATE
from gemmakit.text.gguf import vocabulary_of

GENERATION = "generation_config.json"


@dataclass
class Source:
    """A checkpoint that is whole: `names` are its tensors in the order to write them, all of the right shape."""

    where: str
    checkpoint: Checkpoint
    config: GemmaConfig
    names: list[str]
    tokenizer: TokenizerFiles | None = None
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The format of the weights, a key of `TITLES`."""
        return self.checkpoint.kind

    @property
    def quantized(self) -> str | None:
        """How the stored weights are quantized, by name; None where they are numbers."""
        settings = self.config.extra.get("quantization_config")
        return str(settings.get("quant_method", "unknown")) if isinstance(settings, dict) else None

    @property
    def parameters(self) -> int:
        """Numbers in the tensors that are converted."""
        return sum(prod(self.checkpoint.info(name).shape) for name in self.names)


def open_source(
    name: Name,
    *,
    config: GemmaConfig | Name | None = None,
    model_size: str | None = None,
    tokenizer: Name | None = None,
    dtype: str | None = None,
    keep_quantized: bool = False,
    allow_pickle: bool = False,
    hub: HubOptions = DEFAULT,
) -> Source:
    """Open, find the configuration, and refuse what is missing, left over or wrongly shaped; no tensor is read.

    A pickle is read when `name` is that very file, or with `allow_pickle`.
    dtype: that of tensors a GGUF file holds in fewer bits; keep_quantized: instead keep what gemmakit has a layout for.
    Raises CheckpointError, ConfigError, InputError and others.
    """
    path = packaged_model(name) or Path(name).expanduser()
    if path.is_dir():
        name = path = path / check_relative(hub.subfolder) if hub.subfolder else path
        hub = DEFAULT
    given = _given(config)
    vocab_size = None if given is None else given.vocab_size
    checkpoint = open_checkpoint(name, hub, allow_pickle=allow_pickle or path.is_file(), vocab_size=vocab_size)
    beside: Name = path.parent if path.is_file() else name
    hub = DEFAULT if path.exists() else hub
    if checkpoint.kind == GGUF:
        beside = path = checkpoint.files[0]
        checkpoint, given = _gguf(path, dtype, given, keep_quantized)
    elif keep_quantized:
        raise InputError(f"keep_quantized is for GGUF files, and {name} is none: leave it out.")
    config = given or _config(checkpoint, str(name), beside, model_size, hub)
    if model_size is not None:
        _check_size(str(name), config, checkpoint, model_size)
    source = Source(str(name), checkpoint, config, [])
    source.names = checkpoint.names() if source.quantized else check_whole(source.where, checkpoint, config)
    config.architectures = config.architectures or [architecture_of(config, source.names)]
    above = path.parent / MODEL  # where Google's releases have it
    if tokenizer is None and checkpoint.kind == ORBAX and not (path / MODEL).exists() and above.is_file():
        tokenizer = above
    source.tokenizer = read_tokenizer(beside, hub) if tokenizer is None else read_tokenizer(tokenizer)
    if tokenizer is not None and source.tokenizer is None:
        raise CheckpointError(f"{tokenizer} holds neither tokenizer.model nor tokenizer.json.")
    source.files[GENERATION] = _generation(beside, config, hub)
    if source.tokenizer is not None:
        source.files.update(source.tokenizer.files)
        if source.tokenizer.size > config.vocab_size:
            warnings.warn(
                f"the tokenizer has {source.tokenizer.size} ids, the model {config.vocab_size}: are both of one model?",
                stacklevel=4,
            )
    return source


def check_whole(where: str, checkpoint: Checkpoint, config: GemmaConfig) -> list[str]:
    """The names to convert, in the customary order. Raises CheckpointError for what is missing, over or misshapen."""
    shapes = checkpoint.shapes()
    architecture = architecture_of(config, shapes)
    wanted = tensor_shapes(config, architecture)
    found = differences(wanted, shapes, tied_names(config, architecture), heads=False)
    found.refuse(where, architecture)
    warn_of_copies(checkpoint, found.copies, stacklevel=4)
    checkpoint.rename(found.names)
    return list(wanted)


# -- configuration -----------------------------------------------------------------------------------------------------


def _given(config: GemmaConfig | Name | None) -> GemmaConfig | None:
    if config is None or isinstance(config, GemmaConfig):
        return config
    return GemmaConfig.from_pretrained(config)


def _config(checkpoint: Checkpoint, where: str, beside: Name, size: str | None, hub: HubOptions) -> GemmaConfig:
    """The configuration beside the weights, within them, or of the released model of that size."""
    found = find_file(beside, "config.json", hub, optional=True)
    if found is not None:
        return GemmaConfig.from_pretrained(found)
    file = checkpoint._files[0]
    if isinstance(file, OrbaxFile):
        return file.config()
    if size is not None and checkpoint.kind == GOOGLE:
        return GemmaConfig.preset(size.lower())
    shapes = checkpoint.shapes()
    if not any(name.startswith(PREFIX) for name in shapes):
        shapes = {f"model.{name}": shape for name, shape in shapes.items()}
    return config_from_shapes(shapes, where)


def _check_size(where: str, config: GemmaConfig, checkpoint: Checkpoint, size: str) -> None:
    """InputError unless the checkpoint is of the released size that was said."""
    if size.lower() not in PRESETS:
        raise InputError(f"model_size is {size!r}; it must be one of {', '.join(s.upper() for s in PRESETS)}.")
    found = released_size(checkpoint.shapes())
    wrong = [n for n, value in PRESETS[size.lower()].items() if getattr(config, n) != value]
    if found is not None and found != size.lower():
        raise InputError(f"{where} is a {found.upper()} model by its shapes, but model_size is {size}.")
    if wrong:
        name = wrong[0]
        raise InputError(
            f"{where} has {name} = {getattr(config, name)}, but a {size} model has {PRESETS[size.lower()][name]}: "
            "leave model_size out."
        )


def _generation(beside: Name, config: GemmaConfig, hub: HubOptions) -> bytes:
    alone = Path(beside).is_file()  # a GGUF file says all itself
    found = None if alone else find_file(beside, GENERATION, hub, optional=True)
    if found is not None:
        GenerationConfig.from_pretrained(found.parent)  # refuses what is impossible
        return found.read_bytes()
    return GenerationConfig.from_model_config(config).to_json_string().encode()


def _gguf(path: Path, dtype: str | None, config: GemmaConfig | None, keep: bool) -> tuple[Checkpoint, GemmaConfig]:
    """A GGUF file's weights, its blocks in `dtype` or kept as codes, and the configuration that it holds itself."""
    config = config or GemmaConfig.from_dict(config_values(read_gguf_header(path)))
    file = GgufFile(path, None if keep else dtype, keep_quantized=keep)
    if file.quantization is not None:
        config.extra["quantization_config"] = file.quantization
    return Checkpoint([file]), config


# -- the tokenizer: its files carried over, or made from tokenizer.model alone -----------------------------------------

FILES = (MODEL, JSON, CONFIG, SPECIALS, ADDED, TEMPLATE)


class TokenizerFiles(NamedTuple):
    """A tokenizer that was loaded once, to see that it is whole: where it lies, its files, its number of ids."""

    path: Path
    files: dict[str, bytes]
    size: int


def read_tokenizer(name: Name, hub: HubOptions = DEFAULT) -> TokenizerFiles | None:
    """The tokenizer in a folder, behind a Hub id, or of one tokenizer.model; None where there is none.

    Where only tokenizer.model lies (Google's releases), the files that transformers reads are made from it.
    Raises TokenizerError for a damaged one, CheckpointError, HubError.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in (".model", ".gguf"):
        return _made(path)
    if path.is_file():
        return read_tokenizer(path.parent)
    if local_directory(name) is None and path.exists():
        raise CheckpointError(f"{path} is no file and no folder: it holds no tokenizer.")
    found = {file: held for file in FILES if (held := find_file(name, file, hub, optional=True)) is not None}
    if MODEL not in found and JSON not in found:
        return None
    if set(found) == {MODEL}:
        return _made(found[MODEL])
    tokenizer = GemmaTokenizerFast.from_pretrained(str(name), **vars(hub))
    parent = next(iter(found.values())).parent
    return TokenizerFiles(parent, {file: held.read_bytes() for file, held in found.items()}, len(tokenizer))


def vocabulary(found: TokenizerFiles) -> Any:
    """What a GGUF file holds of a tokenizer. Raises TokenizerError for one that it cannot hold."""
    made = GemmaTokenizer if found.path.suffix == ".model" else GemmaTokenizer.from_pretrained
    return vocabulary_of(made(str(found.path)))


def _made(file: Path) -> TokenizerFiles:
    """From a SentencePiece model or a GGUF file."""
    made = GemmaTokenizerFast(str(file)) if file.suffix == ".model" else GemmaTokenizerFast.from_pretrained(str(file))
    tokenizer: Any = made
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return TokenizerFiles(file, files, len(tokenizer))


def convert_tokenizer(source: Name, target: Name, *, overwrite: bool = False, **where: Any) -> list[Path]:
    """Write the tokenizer of `source` (a tokenizer.model, a GGUF file, a folder, a Hub id) into the folder `target`.

    where: revision, token, cache_dir, local_files_only, subfolder of a Hub id. Returns the paths written.
    Raises TokenizerError, CheckpointError, HubError, and InputError where `target` holds another tokenizer.
    """
    if not Path(source).expanduser().exists() and local_directory(source) is not None:
        raise CheckpointError(f"{source} does not exist: there is no tokenizer to convert.")
    found = read_tokenizer(source, HubOptions(**where))
    if found is None:
        raise CheckpointError(f"{source} holds neither {MODEL} nor {JSON}: there is no tokenizer to convert.")
    folder = Path(target).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; a tokenizer is written into a folder.")
    others = [
        file for file in FILES if (folder / file).exists() and not same_content(folder / file, found.files.get(file))
    ]
    if others and not overwrite:
        raise InputError(f"{folder} holds another tokenizer ({', '.join(others)}). Pass --overwrite to replace it.")
    try:
        for file, content in found.files.items():
            with replacing(folder / file) as staged:
                staged.write_bytes(content)
    except OSError as error:
        raise CheckpointError(f"Writing into {folder} failed: {error.strerror or error}.") from error
    return [folder / file for file in found.files]
