"""Models on the Hugging Face hub: `hf://owner/name[@revision][/file.gguf]`, extra `hub`.

What is needed of a repository is downloaded into the hub's own cache, file by file, where other
programs find it and `HF_HUB_OFFLINE=1` finds it again. Names, hashes and tokens are the business of
`huggingface_hub`; a file is fetched here, so that one that was cut off is gone on with by the next
process as well, and compared with its hash before it is in the cache.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any, Self

from fdq_checkpoints.errors import CheckpointError, shown
from fdq_checkpoints.readers import hub_files

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
# Of a revision with slashes only those that the hub itself makes; others are written %2F.
_REVISION = r"(?:refs/(?:pr|convert)/[\w.-]+|[\w.%-]+)"
# pathlib makes one slash of the two.
_ADDRESS = re.compile(rf"hf:/+(?:models/)?({_NAME}/{_NAME})(?:@({_REVISION}))?(?:/(.+))?")
_SUFFIX = ".fdq-partial"
_HASH = r"[0-9a-f]{40}|[0-9a-f]{64}"
_NETWORKS = ("httpx2", "httpx")  # what the hub's library speaks through, by its version


_LOGGER = logging.getLogger("fdq")


@dataclasses.dataclass(frozen=True)
class Address:
    """A repository of a model, or a file in GGUF of one."""

    repository: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for what does not begin with `hf:`; CheckpointError for what begins so alone."""
        if not re.match(r"hf:(/|$)", text):  # pathlib leaves `hf:` of a lone `hf://`
            return None
        match = _ADDRESS.fullmatch(text)
        file = match and match[3]
        if match is None or (file and not file.lower().endswith(".gguf")) or ".." in text:
            given = re.sub("^hf:/*", "hf://", text)
            raise CheckpointError(
                f"{shown(given)}: expected hf://owner/name, hf://owner/name@revision or "
                "hf://owner/name/file.gguf."
            )
        revision = match[2] and match[2].replace("%2F", "/")
        return cls(match[1], revision, file)

    def __str__(self) -> str:
        """As it is written."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}{revision}" + (f"/{self.file}" if self.file else "")


@functools.cache
def fetch(address: Address) -> pathlib.Path:
    """The directory, or the GGUF, in the hub's cache, complete; downloads what is not there.

    Without a network, or with `HF_HUB_OFFLINE=1`, what the cache has.

    Raises:
      FileNotFoundError: no such repository, revision or file, or one that needs a login.
      PermissionError: a gated model.
      CheckpointError: nothing there that fdq reads, or a file that is not what the hub says.
      ConnectionError: no network, and not in the cache.
      ModuleNotFoundError: without `huggingface_hub`.
    """
    hub = _library()
    with _explained(address), _quiet_without_terminal():
        try:
            if hub.constants.HF_HUB_OFFLINE:
                raise hub.errors.OfflineModeIsEnabled
            return _Download(hub, address).run()
        except _unreachable() as error:
            cached = _cached(hub, address)
            if cached is None:
                offline = hub.constants.HF_HUB_OFFLINE
                why = (
                    "HF_HUB_OFFLINE is set"
                    if offline
                    else f"the hub is not reached ({_line(error)})"
                )
                raise ConnectionError(
                    f"{address}: {' '.join(why.split())[:200]}, and the cache does not have all of "
                    f"it ({hub.constants.HF_HUB_CACHE})."
                ) from error
            if not hub.constants.HF_HUB_OFFLINE:
                _LOGGER.warning(
                    "%s: the hub is not reached (%s); %s of the cache is read.",
                    address,
                    _line(error),
                    origin(cached) or cached,
                )
            return cached


def origin(folder: pathlib.Path) -> str | None:
    """Of a directory in the hub's cache, the address of what it is, with its commit."""
    path = folder.absolute()
    for one in (path, *path.parents):
        found = re.fullmatch(r"models--(.+?)--(.+)", one.parent.parent.name)
        if found and one.parent.name == "snapshots":
            rest = path.relative_to(one).as_posix()
            return f"hf://{found[1]}/{found[2]}@{one.name}" + ("" if rest == "." else f"/{rest}")
    return None


class _Download:
    """Of what is needed of one repository."""

    def __init__(self, hub: Any, address: Address):
        self._hub, self._address = hub, address
        self._api = hub.HfApi(endpoint=hub.constants.ENDPOINT)
        info = self._api.model_info(
            address.repository, revision=address.revision, files_metadata=True
        )
        self._commit: str = info.sha
        self._files = {one.rfilename: one for one in info.siblings if _is_plain(one.rfilename)}

    def run(self) -> pathlib.Path:
        """Where it is."""
        sizes = {name: one.size or 0 for name, one in self._files.items()}
        names = hub_files.needed(
            str(self._address), self._files, self._address.file, sizes, self._fetched
        )
        paths = {name: self._fetched(name) for name in names}
        first = next(iter(names))
        self._keep_revision(first)
        if self._address.file or first.lower().endswith(".gguf"):
            return paths[first]
        return paths[first].parents[first.count("/")]

    def _keep_revision(self, name: str) -> None:
        """Lets the cache know which commit a branch was, for when there is no network."""
        self._in_cache(name, self._address.revision)

    def _in_cache(self, name: str, revision: str | None) -> pathlib.Path:
        """By the library: a blob that is there is not downloaded again."""
        found = self._hub.hf_hub_download(
            self._address.repository,
            name,
            revision=revision,
            endpoint=self._api.endpoint,
            cache_dir=self._hub.constants.HF_HUB_CACHE,
        )
        return pathlib.Path(found)

    def _fetched(self, name: str) -> pathlib.Path:
        hub, repository, commit = self._hub, self._address.repository, self._commit
        cache = hub.constants.HF_HUB_CACHE
        there = hub.try_to_load_from_cache(repository, name, cache_dir=cache, revision=commit)
        if isinstance(there, str):
            return pathlib.Path(there)
        url = hub.hf_hub_url(repository, name, revision=commit, endpoint=self._api.endpoint)
        headers = hub.utils.build_hf_headers()
        found = hub.get_hf_file_metadata(url, headers=headers)
        said = self._files[name]
        expected = said.lfs.sha256 if said.lfs is not None else said.blob_id
        if found.etag is None:
            raise ConnectionError(f"{self._address}: the hub gives no hash of {name}.")
        if expected is not None and found.etag != expected and len(found.etag) == len(expected):
            raise CheckpointError(
                f"{self._address}: {name} has changed while it was looked up. Try again."
            )
        in_pieces = getattr(found, "xet_file_data", None) is not None  # which the library fetches
        if not in_pieces:
            self._fetch(name, url, found, headers)
        path = self._in_cache(name, commit)
        if in_pieces or not re.fullmatch(_HASH, found.etag):
            try:
                self._compare(name, path, expected or found.etag)
            except BaseException:
                path.unlink(missing_ok=True)  # the link: the next one looks at it again
                raise
        return path

    def _fetch(self, name: str, url: str, found: Any, headers: dict[str, str]) -> None:
        """Into the cache's blob; what another process has begun is gone on with."""
        from filelock import FileLock
        from huggingface_hub import file_download

        if not re.fullmatch(_HASH, found.etag or ""):
            return  # of no kind that is known; left to the library
        folder = file_download.repo_folder_name(repo_id=self._address.repository, repo_type="model")
        blob = pathlib.Path(self._hub.constants.HF_HUB_CACHE) / folder / "blobs" / found.etag
        if blob.exists():
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        partial = blob.with_name(blob.name + _SUFFIX)
        location = found.location or url
        if _host(location) != _host(url):
            # A signed address of whoever stores the file, who is shown no token.
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        with FileLock(f"{partial}.lock"):
            if blob.exists():
                return  # of whoever held the lock
            if found.size is not None and partial.exists() and partial.stat().st_size > found.size:
                partial.unlink()
            _get(location, partial, headers, found.size, name)
            self._compare(name, partial, found.etag)
            os.replace(partial, blob)
        pathlib.Path(f"{partial}.lock").unlink(missing_ok=True)

    def _compare(self, name: str, path: pathlib.Path, expected: str) -> None:
        """CheckpointError, and the file removed, where it is not what the hub says."""
        found = _digest(path, len(expected))
        if found is not None and found != expected:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self._address}: {name} is not what the hub says: its hash is {found[:16]}…, "
                f"expected {expected[:16]}…. It was removed; run the command again, and if it "
                "happens again something on the way changes files."
            )


def _get(
    url: str, partial: pathlib.Path, headers: dict[str, str], size: int | None, name: str
) -> None:
    """What is lacking of a file; as often as a cut connection brought some of it."""
    from huggingface_hub import errors, file_download

    while True:
        begun = partial.stat().st_size if partial.exists() else 0
        try:
            with open(partial, "ab") as file:
                file_download.http_get(
                    url,
                    file,
                    resume_size=begun,
                    headers=headers,
                    expected_size=size,
                    displayed_filename=name,
                )
            return
        except errors.HfHubHTTPError:
            raise
        except Exception as error:
            of_network = type(error).__module__.split(".")[0] in _NETWORKS
            if not of_network or partial.stat().st_size <= begun:
                raise


def _digest(path: pathlib.Path, length: int) -> str | None:
    """As the hub names files: SHA-256 of large ones, Git's of the others; None for another name."""
    with open(path, "rb") as file:
        if length == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        if length == 40:
            git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
            for chunk in iter(lambda: file.read(1 << 20), b""):
                git.update(chunk)
            return git.hexdigest()
    return None


def _is_plain(name: str) -> bool:
    """A path below the repository's root, without anything that leads elsewhere."""
    parts = name.split("/")
    return "\\" not in name and all(part not in ("", ".", "..") for part in parts)


def _host(url: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url).netloc


def _cached(hub: Any, address: Address) -> pathlib.Path | None:
    """What the cache has of it, if that is all that is needed."""
    try:
        found = hub.snapshot_download(
            address.repository,
            revision=address.revision,
            cache_dir=hub.constants.HF_HUB_CACHE,
            local_files_only=True,
        )
    except hub.errors.LocalEntryNotFoundError:
        return None
    folder = pathlib.Path(found)
    has_config = any((folder / name).exists() for name in ("fdq.json", "config.json"))
    if address.file is None and has_config and hub_files.is_complete(folder):
        return folder
    names = [path.relative_to(folder).as_posix() for path in folder.glob("**/*") if path.is_file()]
    first = hub_files.whole_gguf(names, address.file)
    return None if first is None else folder / first


def _library() -> Any:
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors, utils  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Models on the hub need the package `huggingface_hub`: pip install huggingface_hub "
            "(of the extra `hub`). Local directories work without it.",
            name=error.name,
        ) from error
    return huggingface_hub


def _unreachable() -> tuple[type[BaseException], ...]:
    """Errors of a network that is not there: of the library and of the one below it."""
    from huggingface_hub import errors

    kinds: list[type[BaseException]] = [errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError]
    for module in _NETWORKS:
        library = sys.modules.get(module)
        for name in ("TransportError", "ConnectError", "TimeoutException"):
            kind = getattr(library, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                kinds.append(kind)
    return tuple(kinds)


@contextlib.contextmanager
def _explained(address: Address) -> Iterator[None]:
    """The hub's refusals in a line that says what to do."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{address.repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{address}: a gated model. Accept its terms on {page}, then log in with `hf auth "
            "login` (or set HF_TOKEN)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{address}: no such model on the hub, or a private one. Look at {page}; for a private "
            "one log in with `hf auth login` (or set HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{address}: the model has no revision {address.revision!r}. Give a branch, a tag or a "
            f"commit of {page}/commits/main."
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{address}: not in the repository: {_line(error)}.") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.FileMetadataError) as error:
        raise ConnectionError(f"{address}: the hub answers: {_line(error)}.") from error
    except json.JSONDecodeError as error:
        raise ConnectionError(f"{address}: the hub's answer is no JSON: {_line(error)}.") from error


def _line(error: BaseException) -> str:
    # Without the signatures that addresses of gated files carry.
    text = re.sub(r"\?[^\s'\"]+", "?…", " ".join(str(error).split()))
    return text[:300].rstrip(".")


@contextlib.contextmanager
def _quiet_without_terminal() -> Iterator[None]:
    """The library's bars are for terminals."""
    from huggingface_hub import utils

    if sys.stderr.isatty() or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()
