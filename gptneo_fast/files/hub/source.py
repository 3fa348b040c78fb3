"""Source: a local folder, or a hub repository at one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import InputError, ModelNotFoundError, nearest
from .download import Cache, Remote, UnreachableError, announce, explained, fetch, look

_REPO_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95})?")


@dataclass
class Source:
    """A local folder, or a hub repository at one revision.

    `Source.of(name_or_path, ...)` decides which. Every file of a repository comes from the commit that the first one came
    from, so a branch that moves meanwhile mixes nothing.
    """

    name: str
    folder: Path | None = None
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    subfolder: str = ""
    commit: str | None = None  # found at the first question
    offline: str | None = None  # why the hub is not asked

    @classmethod
    def of(cls, name_or_path: str | os.PathLike[str] | Source, **options: Any) -> Source:
        """The source that a user's name stands for; `options` are the other fields of this class.

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
                f"model name {name!r:.100} is no text; give a folder or a hub id such as 'EleutherAI/gpt-neo-125m'"
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
        """
        if self.folder is not None:
            paths = {name: self.folder / name for name in names}
            # A link that leads nowhere is a fault and no absence.
            return {name: path if os.path.lexists(path) else None for name, path in paths.items()}
        from huggingface_hub.errors import EntryNotFoundError

        cache = Cache(self._cache_root(), self.name)
        found: dict[str, Path | None] = {}
        remote: dict[str, Remote] = {}
        for name in names:
            found[name], asked = self._look(cache, f"{self.subfolder}/{name}" if self.subfolder else name)
            if asked:
                remote[name] = asked
        if remote:
            announce(self.name, list(remote.values()), cache)
        for name, asked in remote.items():
            with suppress(EntryNotFoundError), explained(self.name, str(self.revision), name, cache):
                found[name] = fetch(self.name, asked, cache, self.token)
        return found

    def holdings(self) -> str:
        """What the source holds and why there is no more, for errors."""
        if self.folder is None and self.commit is None:
            return "a hub repository"
        if self.folder is None:
            folder = Cache(self._cache_root(), self.name).folder / "snapshots" / str(self.commit) / self.subfolder
        else:
            folder = self.folder
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        held = f"it holds {', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}" if names else "it is empty"
        if self.offline:
            return f"offline ({self.offline}), of the snapshot {folder} {held}; with network, run: hf download {self.name}"
        return held

    def _look(self, cache: Cache, path: str) -> tuple[Path | None, Remote | None]:
        """A file in the cache, or what the hub says of it; neither where it does not exist."""
        if self.commit is None:
            self._choose_commit(cache)
        if self.commit is not None:
            if there := cache.find(path, self.commit):
                return there, None
            if self.offline or cache.known_absent(path, self.commit):
                return None, None
        return None, self._ask(cache, path)

    def _choose_commit(self, cache: Cache) -> None:
        """The commit that `revision` stands for: the hub says so, or where it cannot be asked, the cache."""
        from huggingface_hub import constants, errors as hub, hf_hub_download

        if self.local_files_only or constants.HF_HUB_OFFLINE:
            self.offline = "local_files_only=True" if self.local_files_only else "HF_HUB_OFFLINE=1"
        else:
            cache.mend(self.revision or "main")
            path = f"{self.subfolder}/config.json" if self.subfolder else "config.json"
            try:
                with explained(self.name, str(self.revision), path, cache):
                    with suppress(hub.EntryNotFoundError):
                        look(self.name, path, self.revision or "main", self.token)  # asks once, where the next line retries
                    # Also writes down which commit the revision stands for, for later use without network.
                    hf_hub_download(self.name, path, revision=self.revision, token=self.token, cache_dir=cache.root)
            except UnreachableError as error:
                self.offline = str(error)
            except ModelNotFoundError as error:
                raise ModelNotFoundError(f"{error}{_near(Path(self.name))}") from error.__cause__
            except hub.EntryNotFoundError:
                pass  # a repository without config.json has a commit all the same
        self.commit = cache.commit_of(self.revision or "main")
        if self.offline and self.commit is None:
            raise ModelNotFoundError(
                f"{self.name!r} is not a folder here{_near(Path(self.name))}; offline ({self.offline}), and the cache "
                f"{cache.root} holds nothing of such a repository at revision {self.revision or 'main'!r} "
                f"(HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', 'unset')}); with network, run: hf download {self.name}"
            )

    def _ask(self, cache: Cache, path: str) -> Remote | None:
        """What the hub says of a file; None where it has none, or does not answer any more."""
        from huggingface_hub import errors as hub

        try:
            with explained(self.name, str(self.revision), path, cache):
                return look(self.name, path, self.commit or self.revision or "main", self.token)
        except hub.EntryNotFoundError:
            if self.commit is not None:
                cache.note_absent(path, self.commit)
        except UnreachableError as error:
            if self.commit is None:
                raise
            self.offline = str(error)  # what the cache holds may be all that is needed
        return None

    def _cache_root(self) -> Path:
        from huggingface_hub import constants

        return Path(self.cache_dir or constants.HF_HUB_CACHE)


def _check_part(what: str, value: Any) -> None:
    """Refuse a revision or subfolder that would lead elsewhere."""
    if value in (None, ""):
        return
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > 200:
        raise InputError(f"{what} {value!r:.100} is no name of at most 200 printed characters")
    if value.startswith("/") or ".." in value.split("/"):
        raise InputError(f"{what} {value!r} leaves its repository")


def _near(folder: Path) -> str:
    """Names of folders beside `folder` that resemble it."""
    try:
        beside = [p.name for p in folder.absolute().parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    return nearest(folder.name, beside)
