"""Files of a hub repository into huggingface_hub's cache: large ones are resumed where an earlier process left off.

huggingface_hub resumes a download that breaks off, but begins anew after its process was killed. Here the part of a large
file stays under a name of its own beside the cache's blobs; a lock, which the kernel lets go of with its process, keeps
two processes from writing to it, and it is the lock that huggingface_hub itself takes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError, ModelNotFoundError, SetupError

LARGE = 16 << 20  # bytes from which a file is announced, and resumed after a kill
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")  # a commit or an etag: what may be a file's name
_MOVE = "set HF_HOME or pass cache_dir=... to keep downloads elsewhere"


class UnreachableError(SetupError):
    """The hub does not answer; what is in the cache may still do."""


@dataclass(frozen=True)
class Remote:
    """A file of a repository at one commit: where its bytes are, how many, and the name of its blob."""

    path: str  # in the repository
    commit: str
    url: str
    size: int
    etag: str


@dataclass(frozen=True)
class Cache:
    """The part of huggingface_hub's cache that belongs to one repository."""

    root: Path
    repository: str

    @property
    def folder(self) -> Path:
        """What holds refs, snapshots and blobs."""
        return self.root / f"models--{self.repository.replace('/', '--')}"

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit stood for when it was last asked for; None where it never was."""
        ref = self.folder / "refs" / revision
        try:
            commit = ref.read_text(errors="replace").strip() if ref.is_file() else revision
            known = _PLAIN.fullmatch(commit) and (ref.is_file() or (self.folder / "snapshots" / commit).is_dir())
        except OSError as error:
            raise SetupError(f"the cache {self.folder} cannot be read: {error.strerror}; {_MOVE}") from error
        return commit if known else None

    def mend(self, revision: str) -> None:
        """Remove a reference that a killed process left half written; huggingface_hub would stumble over it."""
        ref = self.folder / "refs" / revision
        with suppress(OSError):
            if ref.is_file() and self.commit_of(revision) is None:
                ref.unlink()

    def find(self, path: str, commit: str) -> Path | None:
        """The file where it is in the cache."""
        found = self.folder / "snapshots" / commit / path
        return found if found.exists() else None

    def known_absent(self, path: str, commit: str) -> bool:
        """Whether the hub said that the commit has no such file."""
        return (self.folder / ".no_exist" / commit / path).exists()

    def note_absent(self, path: str, commit: str) -> None:
        """Remember that the commit has no such file, so that nobody asks again; a cache that is read-only forgets it."""
        note = self.folder / ".no_exist" / commit / path
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()


def look(repository: str, path: str, revision: str, token: str | bool | None) -> Remote:
    """Ask the hub about a file; raises what huggingface_hub raises."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    about = get_hf_file_metadata(hf_hub_url(repository, path, revision=revision), token=token)
    if not _PLAIN.fullmatch(about.commit_hash or "") or not _PLAIN.fullmatch(about.etag or ""):
        raise SetupError(
            f"the server that answered for {path!r} of {repository!r} is no hub: it names no commit or no etag (it says "
            f"{about.commit_hash!r:.80} and {about.etag!r:.80}); check HF_ENDPOINT and the proxy"
        )
    # A small text may come without its length.
    return Remote(path, str(about.commit_hash), about.location, about.size or 0, str(about.etag))


def announce(repository: str, files: Sequence[Remote], cache: Cache) -> None:
    """Say what a large download will fetch, once it is sure that there is room for it.

    Raises:
        SetupError: the disk has less room than the download needs.
    """
    blobs = cache.folder / "blobs"
    wanted = [f for f in files if not (blobs / f.etag).exists()]
    there = sum(_size(_part(blobs, f)) for f in wanted)
    total = sum(f.size for f in wanted)
    if total < LARGE:
        return
    existing = next(p for p in (cache.folder, *cache.folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < total - there:
        raise SetupError(
            f"{repository!r} needs {_gb(total - there)} in {cache.root}, which has {_gb(free)} free; make room, or {_MOVE}"
        )
    from huggingface_hub.utils import are_progress_bars_disabled

    if not are_progress_bars_disabled():
        already = f", {_gb(there)} of it from an earlier attempt" if there else ""
        names = ", ".join(f.path for f in wanted[:4]) + (f" and {len(wanted) - 4} more files" if len(wanted) > 4 else "")
        print(
            f"gptneo_fast: fetching {_gb(total)} of {repository} at commit {wanted[0].commit[:8]} ({names}) "
            f"into {cache.root}{already}",
            file=sys.stderr,
        )


def fetch(repository: str, file: Remote, cache: Cache, token: str | bool | None) -> Path:
    """The file in the cache, downloaded where it is not there yet; raises what huggingface_hub raises."""
    from huggingface_hub import hf_hub_download

    if file.size >= LARGE:
        _fetch_blob(repository, file, cache, token)
    return Path(hf_hub_download(repository, file.path, revision=file.commit, token=token, cache_dir=cache.root))


def _fetch_blob(repository: str, file: Remote, cache: Cache, token: str | bool | None) -> None:
    """The contents of a large file under the name that huggingface_hub then finds."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    blobs = cache.folder / "blobs"
    lock = cache.root / ".locks" / cache.folder.name / f"{file.etag}.lock"
    for folder in (blobs, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if (blobs / file.etag).exists():
            return
        part = _part(blobs, file)
        done = _size(part)
        if done > file.size:
            part.unlink()
            done = 0
        same_host = file.url.split("/")[2] == _endpoint().split("/")[2]
        headers = build_hf_headers(token=token if same_host else False)  # a content server gets no token
        with part.open("ab") as out:
            http_get(file.url, out, resume_size=done, headers=headers, expected_size=file.size)
        if done and len(file.etag) == 64 and _sha256(part) != file.etag:  # of two attempts; etags of large files are sha256
            part.unlink()
            raise SetupError(f"{file.path!r} of {repository!r} arrived damaged and was deleted; try again")
        os.replace(part, blobs / file.etag)


@contextmanager
def explained(repository: str, revision: str, path: str, cache: Cache) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors that say what to do; no message holds the token.

    Only that a repository has no such file is let through.
    """
    from huggingface_hub import errors as hub

    what = f"{path!r} of {repository!r}"
    try:
        yield
    except hub.GatedRepoError as error:
        raise SetupError(
            f"{repository!r} is gated: accept its terms on its page, then pass token=... or run: hf auth login"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repository!r} has no revision {revision!r}; its page lists branches and tags") from error
    except hub.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repository!r} is neither a folder here nor a repository on the hub; a private one needs token=... or: "
            "hf auth login (a token that has expired is refused with the same answer)"
        ) from error
    except hub.LocalEntryNotFoundError as error:  # what huggingface_hub makes of a hub that falls silent
        raise UnreachableError(f"{what}: the hub {_endpoint()} cannot be reached; try again") from error
    except hub.EntryNotFoundError:
        raise
    except hub.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        kind = UnreachableError if status >= 500 else SetupError
        raise kind(f"the hub {_endpoint()} answered {what} with status {status}; try again later") from error
    except (hub.HTTPError, ConnectionError, TimeoutError) as error:
        raise UnreachableError(
            f"{what}: the hub {_endpoint()} cannot be reached ({type(error).__name__}); try again"
        ) from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise SetupError(f"the cache {cache.root} cannot be written to ({error.strerror}); {_MOVE}") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SetupError(f"the disk of the cache {cache.root} is full ({error.strerror}); make room, or {_MOVE}") from error
        kind = UnreachableError if error.errno is None else SetupError  # older libraries' connection errors have no number
        raise kind(f"{what} could not be fetched from {_endpoint()}: {error}") from error
    except ValueError as error:  # a name that the hub allows nowhere
        raise InputError(f"{what}: {error}") from error


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _part(blobs: Path, file: Remote) -> Path:
    return blobs / f"{file.etag}.gptneo_fast.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
