"""A model's folder or its repository on the hub, behind one question: where is this file on the local disk?"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, ModelNotFoundError, SetupError, nearest

_REPO_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95})?")


@dataclass(frozen=True)
class Source:
    """A local folder, or a hub repository at one revision.

    `Source.of(name_or_path, ...)` decides which; `file(name)` gives the local path of one file, downloading it where it
    has to, or None where the folder or repository has no such file.
    """

    name: str
    folder: Path | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    subfolder: str = ""

    @classmethod
    def of(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Source:
        """The source that a user's name stands for; `options` are the other fields of this class.

        Raises:
            InputError: the name is neither a folder nor a possible repository id.
            ModelNotFoundError: it looks like a path and there is no such folder.
        """
        name = os.fspath(name_or_path)
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"model name {name!r} is empty; give a folder or a hub id such as 'EleutherAI/gpt-neo-125m'")
        folder = Path(name).expanduser()
        try:
            is_folder, exists = folder.is_dir(), folder.exists()
        except (OSError, ValueError):  # too long a name, or a NUL in it
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
        """Local path of the file `name`, or None where the source has none.

        Raises:
            ModelNotFoundError: the repository does not exist, or offline and not in the cache.
            SetupError: the hub refused (a gated repository, a bad token, no network).
        """
        if self.folder is not None:
            path = self.folder / name
            return path if os.path.lexists(path) else None  # a link that leads nowhere is a fault and no absence
        return self._download(name)

    def holdings(self) -> str:
        """What a folder holds, for errors."""
        if self.folder is None:
            return "a hub repository"
        names = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
        return f"it holds {', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}" if names else "it is empty"

    def _download(self, name: str) -> Path | None:
        from huggingface_hub import errors as hub
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(
                self.name,
                name,
                subfolder=self.subfolder or None,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
            )
        except hub.LocalEntryNotFoundError as error:
            if self._cached("config.json"):  # the snapshot is there, this file is not part of it
                return None
            raise ModelNotFoundError(
                f"{self.name!r} is not a folder here and {name!r} of the hub repository is not in the cache "
                f"{self._cache_folder()} (HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', 'unset')}, "
                f"local_files_only={self.local_files_only}){_near(Path(self.name))}; "
                f"on a machine with network run: hf download {self.name}"
            ) from error
        except hub.EntryNotFoundError:
            return None
        except hub.GatedRepoError as error:
            raise SetupError(
                f"{self.name!r} is gated: accept its terms on its page, then pass token=... or run: hf auth login"
            ) from error
        except hub.RevisionNotFoundError as error:
            raise ModelNotFoundError(f"{self.name!r} has no revision {self.revision!r}") from error
        except hub.RepositoryNotFoundError as error:
            raise ModelNotFoundError(
                f"{self.name!r} is neither a folder here nor a repository on the hub{_near(Path(self.name))}; "
                "a private repository needs token=..."
            ) from error
        except (hub.HfHubHTTPError, OSError) as error:
            raise SetupError(f"the hub did not give {name!r} of {self.name!r}: {type(error).__name__}") from error
        return Path(path)

    def _cached(self, name: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        name = f"{self.subfolder}/{name}" if self.subfolder else name
        return isinstance(try_to_load_from_cache(self.name, name, self.cache_dir, self.revision), str)

    def _cache_folder(self) -> str:
        from huggingface_hub import constants

        return str(self.cache_dir or constants.HF_HUB_CACHE)


def _near(folder: Path) -> str:
    """Names of folders beside `folder` that resemble it."""
    try:
        beside = [p.name for p in folder.absolute().parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    return nearest(folder.name, beside)
