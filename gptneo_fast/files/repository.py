"""A repository on the hub and its part of huggingface_hub's cache.

huggingface_hub fetches. What it does not do is done here: a large download is announced, a file gets its name in the cache
only once it has the hash that the hub tells, and a hub that refuses or falls silent ends in an error that says what to do. A
file is fetched into a folder of its own: no two writers meet, and nothing left over is opened.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError, GPTNeoFastError, InputError, ModelNotFoundError, SetupError

LARGE = 16 << 20  # bytes from which a download is announced
ANSWER, SILENCE = 60.0, 300.0  # seconds for an answer about a file, and for its next 10 MB; a socket's timeout forgives drops
STALE = 3600.0  # seconds after which the folder of an unfinished download is that of a killed process
_MINE = ".gptneo_fast-"  # how such a folder's name begins
_MOVE = "set HF_HOME or pass cache_dir=... to keep downloads elsewhere"
_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")  # a commit, or a file's etag: git's SHA-1 of it, or its SHA-256


class UnreachableError(SetupError):
    """The hub does not answer; what is in the cache may still do."""


@dataclass(frozen=True)
class Remote:
    """A file of a repository at one commit: its bytes (0: not told) and its hash ("": there is no such file)."""

    path: str  # in the repository
    commit: str
    size: int
    etag: str


@dataclass(frozen=True)
class Repository:
    """A repository, the token to ask for it with, and the root of the cache."""

    name: str
    token: str | bool | None = field(repr=False)
    root: Path

    @property
    def folder(self) -> Path:
        """What the cache keeps of it: refs, snapshots and blobs."""
        return self.root / f"models--{self.name.replace('/', '--')}"

    def link(self, path: str, commit: str) -> Path:
        """The place in the cache of a commit's file, a link to what holds it."""
        return self.folder / "snapshots" / commit / path

    def absent(self, path: str, commit: str) -> Path:
        """What stands in the cache where the hub said that the commit has no such file, so that nobody asks again."""
        return self.folder / ".no_exist" / commit / path

    def cached_commit(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit stood for when it was last asked for; None where it never was."""
        ref = self.folder / "refs" / revision
        try:
            commit = ref.read_text(errors="replace").strip() if ref.is_file() else revision
            known = _HASH.fullmatch(commit) and (ref.is_file() or (self.folder / "snapshots" / commit).is_dir())
        except OSError as error:
            raise SetupError(f"the cache {self.folder} cannot be read: {error.strerror}; {_MOVE}") from error
        return commit if known else None

    def commit_of(self, revision: str, path: str) -> str:
        """The commit that the hub says a revision stands for when it is asked for `path`; the cache remembers it."""
        commit = self.look(path, revision).commit
        with suppress(OSError):  # a cache that is read-only forgets
            if revision != commit != self.cached_commit(revision):
                with _placing(self.folder / "refs" / revision) as new:
                    new.write_text(commit)
        return commit

    def look(self, path: str, revision: str) -> Remote:
        """Ask the hub about a file; raises what huggingface_hub raises."""
        from huggingface_hub import errors as hub, get_hf_file_metadata, hf_hub_url

        try:
            with _deadline(ANSWER, lambda: 0.0):
                about = get_hf_file_metadata(hf_hub_url(self.name, path, revision=revision), token=self.token)
        except hub.RemoteEntryNotFoundError as error:
            return Remote(path, self._hash(path, error.response.headers.get("X-Repo-Commit")), 0, "")
        return Remote(path, self._hash(path, about.commit_hash), about.size or 0, self._hash(path, about.etag))

    def _hash(self, path: str, told: str | None) -> str:
        if not _HASH.fullmatch(told or ""):
            raise SetupError(
                f"the server that answered for {path!r} of {self.name!r} is no hub: it says {told!r:.80} where the hash of a "
                "commit or file belongs; check HF_ENDPOINT and the proxy"
            )
        return str(told)

    def announce(self, files: Sequence[Remote]) -> None:
        """Say what a large download will fetch, once it is sure that there is room for it.

        Raises:
            SetupError: the disk has less room than the download needs.
        """
        from huggingface_hub.utils import are_progress_bars_disabled

        if (total := sum(f.size for f in files)) < LARGE:
            return
        free = shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.exists())).free
        size = f"{total / 1e9:.2f} GB"
        if free < total:
            short = f"{self.name!r} needs {size} in {self.root}, which has {free / 1e9:.2f} GB free"
            raise SetupError(f"{short}; make room, or {_MOVE}")
        if not are_progress_bars_disabled():
            names = ", ".join(f.path for f in files[:4]) + (f" and {len(files) - 4} more files" if len(files) > 4 else "")
            about = f"{size} of {self.name} at commit {files[0].commit[:8]} ({names}) into {self.root}"
            print(f"gptneo_fast: fetching {about}", file=sys.stderr)

    def fetch(self, file: Remote, force: bool = False) -> Path:
        """The file in the cache; fetched unless what is there has its hash. Raises what huggingface_hub raises.

        Raises:
            CheckpointError: it arrived damaged, and nothing of it is kept.
        """
        from huggingface_hub.file_download import are_symlinks_supported
        from huggingface_hub.utils import WeakFileLock

        blob, link = self.folder / "blobs" / file.etag, self.link(file.path, file.commit)
        lock = self.root / ".locks" / self.folder.name / f"{file.etag}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with suppress(TimeoutError):  # huggingface_hub's lock saves a second download and guards nothing
                stack.enter_context(WeakFileLock(lock, timeout=60 + file.size / 1e6))
            if force or not intact(blob, file.etag):
                self._fetch(file, blob)
            with _placing(link) as new:
                if are_symlinks_supported(self.root):
                    new.symlink_to(os.path.relpath(blob, link.parent))
                else:
                    os.replace(blob, new)
        return link

    def _fetch(self, file: Remote, blob: Path) -> None:
        from huggingface_hub import hf_hub_download

        for left in blob.parent.glob(f"{_MINE}*"):
            if time.time() - _written(left) > STALE:
                shutil.rmtree(left, ignore_errors=True)
        with _placing(blob) as new:
            with _deadline(SILENCE, lambda: _written(new.parent)):
                nothing = new.parent / "cache"  # what the real one holds would be copied
                part = hf_hub_download(
                    self.name, file.path, revision=file.commit, token=self.token, local_dir=new.parent, cache_dir=nothing
                )
            if not intact(Path(part), file.etag):
                raise CheckpointError(
                    f"{file.path!r} of {self.name!r} arrived damaged: its {os.path.getsize(part)} bytes do not have the hash "
                    f"{file.etag} that {_endpoint()} tells; nothing of it is kept. Try again; a proxy may have meddled"
                )
            os.replace(part, new)

    @contextmanager
    def explained(self, path: str, revision: str | None) -> Iterator[None]:
        """Turn what huggingface_hub raises into errors that say what to do; no message holds the token."""
        from huggingface_hub import errors as hub

        what = f"{path!r} of {self.name!r}"
        try:
            yield
        except GPTNeoFastError:
            raise
        except hub.GatedRepoError as error:
            raise SetupError(
                f"{self.name!r} is gated: accept its terms on its page, then pass token=... or run: hf auth login"
            ) from error
        except hub.RevisionNotFoundError as error:
            raise ModelNotFoundError(f"{self.name!r} has no revision {revision!r}; its page lists branches and tags") from error
        except hub.RepositoryNotFoundError as error:
            raise ModelNotFoundError(
                f"{self.name!r} is neither a folder here nor a repository on the hub; a private one needs token=... or: "
                "hf auth login (a token that has expired is refused with the same answer)"
            ) from error
        except hub.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            kind = UnreachableError if status >= 500 else SetupError
            raise kind(f"the hub {_endpoint()} answered {what} with status {status}; try again later") from error
        except (hub.LocalEntryNotFoundError, hub.HTTPError, ConnectionError, TimeoutError) as error:
            raise UnreachableError(
                f"{what}: the hub {_endpoint()} cannot be reached ({type(error).__name__}); try again"
            ) from error
        except OSError as error:
            raise self._about(error, what) from error
        except ValueError as error:  # a name that the hub allows nowhere
            raise InputError(f"{what}: {error}") from error

    def _about(self, error: OSError, what: str) -> SetupError:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return SetupError(f"the cache {self.root} cannot be written to ({error.strerror}); {_MOVE}")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return SetupError(f"the disk of the cache {self.root} is full ({error.strerror}); make room, or {_MOVE}")
        return SetupError(f"{what} could not be fetched from {_endpoint()}: {error}")


def intact(path: Path, etag: str) -> bool:
    """Whether a file has the hash that its etag is."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        begin = hashlib.sha256 if len(etag) == 64 else lambda: hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        return hashlib.file_digest(file, begin).hexdigest() == etag


def damaged(link: Path) -> bool:
    """Whether a link of the cache leads to anything else than what the hub sent."""
    etag = os.path.basename(os.readlink(link)) if link.is_symlink() else ""
    return bool(_HASH.fullmatch(etag)) and not intact(link, etag)


@contextmanager
def _placing(target: Path) -> Iterator[Path]:
    """A path in a folder of its own, whose file takes the place of `target` at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_MINE, dir=target.parent, ignore_cleanup_errors=True) as folder:
        new = Path(folder) / "new"
        yield new
        os.replace(new, target)


@contextmanager
def _deadline(seconds: float, written: Callable[[], float]) -> Iterator[None]:
    """Close huggingface_hub's connections where nothing is written for so long.

    Raises:
        UnreachableError: the hub fell silent.
    """
    from huggingface_hub import close_session

    done, silent = threading.Event(), threading.Event()

    def watch() -> None:
        before = written()
        while not done.wait(seconds):
            now = written()
            if now == before:
                silent.set()
                close_session()
            before = now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        if not silent.is_set():
            raise
        raise UnreachableError(f"the hub {_endpoint()} fell silent for {seconds:.0f} seconds; try again") from error
    finally:
        done.set()
        watcher.join()


def _written(folder: Path) -> float:
    """When something in the folder was last written."""
    with suppress(OSError):  # a file that is being moved
        return max(p.stat().st_mtime for p in (folder, *folder.rglob("*")))
    return time.time()


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
