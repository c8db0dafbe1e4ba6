"""The tokenizer that goes with a checkpoint: its files carried over, or made from tokenizer.model alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from gemmakit.checkpoint.save import same_content
from gemmakit.errors import CheckpointError, InputError
from gemmakit.files import replacing
from gemmakit.hub import DEFAULT, HubOptions, Name, find_file, local_directory
from gemmakit.text import GemmaTokenizer, GemmaTokenizerFast
from gemmakit.text.saving import ADDED, CONFIG, JSON, MODEL, SPECIALS, TEMPLATE

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
    from gemmakit.text.gguf import vocabulary_of

    return vocabulary_of(GemmaTokenizer(str(found.path)) if found.path.suffix == ".model" else str(found.path))


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
