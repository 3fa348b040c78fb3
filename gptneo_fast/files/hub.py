"""Source: a local folder, or a hub repository at one commit, behind one question: where is this file on the local disk?"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..errors import CheckpointError, ConfigError, InputError, ModelNotFoundError, SetupError, TokenizerError, nearest, short
from .repository import Remote, Repository, UnreachableError, damaged

_REPO_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95})?")


@dataclass
class Source:
    """A local folder, or a hub repository at one revision.

    `Source.of(name_or_path, ...)` decides which. Every file of a repository comes from the commit that the first one came
    from, so a branch that moves meanwhile mixes nothing.
    """

    OPTIONS: ClassVar = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")

    name: str
    folder: Path | None = None
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False  # once for every file
    subfolder: str = ""
    commit: str | None = field(default=None, init=False)  # found at the first question
    offline: str | None = field(default=None, init=False)  # why the hub is not asked
    _served: set[Path] = field(default_factory=set, init=False, repr=False)
    _fetched: set[str] = field(default_factory=set, init=False, repr=False)

    @classmethod
    def of(cls, name_or_path: str | os.PathLike[str] | Source, **options: Any) -> Source:
        """The source that a user's name stands for; `options` are those of OPTIONS.

        A source stands for itself, and its own options count: those that share it share the commit.

        Raises:
            InputError: the name is neither a folder nor a possible repository id; a revision or subfolder that none can have.
            ModelNotFoundError: it looks like a path and there is no such folder.
        """
        if isinstance(name_or_path, Source):
            return name_or_path
        name = os.fspath(name_or_path) if isinstance(name_or_path, os.PathLike) else name_or_path
        if not isinstance(name, str) or not name.strip():
            raise InputError(
                f"model name {short(name)} is no text; give a folder or a hub id such as 'EleutherAI/gpt-neo-125m'"
            )
        _check_part("revision", options.get("revision"))
        _check_part("subfolder", options.get("subfolder"))
        folder = Path(name)
        try:
            folder = folder.expanduser()
            is_folder, exists = folder.is_dir(), folder.exists()
        except (OSError, ValueError, RuntimeError):  # too long a name, a NUL in it, ~ of nobody
            is_folder = exists = False
        if is_folder:
            return cls(name, folder=folder / options.pop("subfolder", ""), **options)
        if exists:
            raise InputError(f"{name!r} is a file; give the folder that holds config.json and the weights")
        if not _REPO_ID.fullmatch(name):
            shown = name if len(name) <= 120 else name[:120] + "..."
            looks_like_path = name.startswith((".", "/", "~")) and len(name) < 1000 and "\0" not in name
            if looks_like_path and ".." not in Path(name).parts:
                raise ModelNotFoundError(f"no folder {shown!r}{_near(folder)}; give a folder or a hub id")
            raise InputError(f"{shown!r} is neither a folder nor a hub id of the form 'owner/name'")
        return cls(name, **options)

    def file(self, name: str) -> Path | None:
        """Local path of the file `name`, or None where the source has none. Raises as `files` does."""
        return self.files([name])[name]

    def files(self, names: Iterable[str]) -> dict[str, Path | None]:
        """Local path of each of these files, or None where the source has none; says the size of a large download first.

        Raises:
            ModelNotFoundError: the repository or revision does not exist, or offline and nothing of it is in the cache.
            SetupError: the hub refused or cannot be reached, the cache cannot be written to, the disk is too small.
            CheckpointError: a file arrived damaged.
        """
        if self.folder is not None:
            paths = {name: self.folder / name for name in names}
            # A link that leads nowhere is a fault and no absence.
            return {name: path if os.path.lexists(path) else None for name, path in paths.items()}
        repository = self._repository()
        if self.commit is None:
            self._choose_commit(repository)
        found: dict[str, Path | None] = {}
        remote: dict[str, Remote] = {}
        for name in names:
            path = self._path(name)
            link = repository.link(path, str(self.commit))
            if link.exists() and (path in self._fetched or not self.force_download):
                found[name] = link
                continue
            found[name] = None
            if not self.offline and (asked := self._ask(repository, path)):
                remote[name] = asked
        repository.announce(list(remote.values()))
        for name, asked in remote.items():
            with repository.explained(name, self.revision):
                found[name] = repository.fetch(asked, self.force_download)
            self._fetched.add(asked.path)
        self._served |= {path for path in found.values() if path}
        return found

    @contextmanager
    def reading(self) -> Iterator[None]:
        """An error about files of the cache that are not what the hub sent gains the words that heal the cache."""
        try:
            yield
        except (CheckpointError, ConfigError, TokenizerError) as error:
            snapshot = self._repository().link("", str(self.commit))
            if names := [link.relative_to(snapshot).as_posix() for link in sorted(self._served) if damaged(link)]:
                error.args = (
                    f"{error}. The cache's {' and '.join(names)} is not what the hub sent: pass force_download=True, or run: "
                    + self._command(*names, "--force-download"),
                )
            raise

    def holdings(self) -> str:
        """What the source holds and why there is no more, for errors."""
        if self.folder is None and self.commit is None:
            return "a hub repository"
        folder = self.folder or self._repository().link(self.subfolder, str(self.commit))
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        held = f"it holds {', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}" if names else "it is empty"
        if self.offline:
            return f"offline ({self.offline}), of the snapshot {folder} {held}; with network, run: {self._command()}"
        return held

    def _choose_commit(self, repository: Repository) -> None:
        """The commit that `revision` stands for: the hub says so, or where it does not tell, the cache."""
        from huggingface_hub import constants, errors as hub

        revision = self.revision or "main"
        if self.local_files_only or constants.HF_HUB_OFFLINE:
            self.offline = "local_files_only=True" if self.local_files_only else "HF_HUB_OFFLINE=1"
        else:
            path = self._path("config.json")
            try:
                with repository.explained(path, revision):
                    self.commit = repository.commit_of(revision, path)
                    return
            except (SetupError, ModelNotFoundError) as error:
                cached = repository.cached_commit(revision) and not isinstance(error.__cause__, hub.RevisionNotFoundError)
                if isinstance(error, ModelNotFoundError) and not cached:
                    raise ModelNotFoundError(f"{error}{_near(Path(self.name))}") from error.__cause__
                if not isinstance(error, UnreachableError) and not cached:
                    raise
                self.offline = str(error)
        if self.force_download:
            raise SetupError(f"force_download=True fetches {self.name!r} again, and the hub is not asked: {self.offline}")
        self.commit = repository.cached_commit(revision)
        if self.commit is None:
            raise ModelNotFoundError(
                f"{self.name!r} is not a folder here{_near(Path(self.name))}; offline ({self.offline}), and the cache "
                f"{repository.root} holds nothing of such a repository at revision {revision!r} "
                f"(HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', 'unset')}); with network, run: {self._command()}"
            )

    def _ask(self, repository: Repository, path: str) -> Remote | None:
        """What the hub says of a file; None where it has none, or where it refuses a model that the cache may hold whole."""
        absent = repository.absent(path, str(self.commit))
        if absent.exists():
            return None
        try:
            with repository.explained(path, self.revision):
                remote = repository.look(path, str(self.commit))
        except (SetupError, ModelNotFoundError) as error:
            if self._fetched or self.force_download:
                raise
            self.offline = str(error)
            return None
        if remote.etag:
            return remote
        with suppress(OSError):  # a cache that is read-only forgets
            absent.parent.mkdir(parents=True, exist_ok=True)
            absent.touch()
        return None

    def _path(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def _repository(self) -> Repository:
        from huggingface_hub import constants

        return Repository(self.name, self.token, Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser())

    def _command(self, *arguments: str) -> str:
        """The command line that fetches the repository, or files of it, into the same cache."""
        options = {"--revision": self.revision, "--cache-dir": self.cache_dir}
        given = [str(part) for pair in options.items() if pair[1] for part in pair]
        return shlex.join(["hf", "download", self.name, *arguments, *given])


def _check_part(what: str, value: Any) -> None:
    """Refuse a revision or subfolder that would lead elsewhere."""
    if value in (None, ""):
        return
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > 200:
        raise InputError(f"{what} {short(value)} is no name of at most 200 printed characters")
    if value.startswith("/") or ".." in value.split("/"):
        raise InputError(f"{what} {value!r} leaves its repository")


def _near(folder: Path) -> str:
    """Names of folders beside `folder` that resemble it."""
    try:
        beside = [p.name for p in folder.absolute().parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    return nearest(folder.name, beside)
