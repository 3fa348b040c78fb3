"""Files that take their names together, once all are written and on the disk, or leave what stood there.

A name never stands empty meanwhile where the file system has hard links. A process that is killed leaves a folder
`.saving-*` beside them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import GPTNeoFastError, short

_PREFIX = ".saving-"
_FULL, _CLOSED = "free some space there or give another folder", "give a folder that you may write to"
_WAYS_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _CLOSED),
    errno.EISDIR: "remove that folder or give another one to write to",
}


def write(folder: str | os.PathLike[str], texts: dict[str, str], error: type[GPTNeoFastError]) -> None:
    """Write texts, name -> contents, into `folder`, which is made where it is missing.

    Raises:
        error: one of them cannot be written; what was there still is.
    """
    with appearing(folder, error) as part:
        write_into(part, texts)


def write_into(part: Path, texts: dict[str, str]) -> None:
    """Write texts, name -> contents, into a folder that is there."""
    for name, text in texts.items():
        (part / name).write_text(text, encoding="utf-8")


@contextmanager
def appearing(folder: str | os.PathLike[str], error: type[GPTNeoFastError], stale: str = "") -> Iterator[Path]:
    """A folder to write into, whose files move into `folder` at the end, or vanish where something fails.

    Args:
        error: raised with the folder, the fault and the way out.
        stale: pattern of the names that a save of this kind gives; those of an earlier one are removed.

    Raises:
        error: `folder` cannot be written to, or the disk is full; what was there still is.
    """
    try:
        spelt = os.fsencode(folder) if isinstance(folder, (str, os.PathLike)) else b"\0"
    except UnicodeEncodeError:
        spelt = b"\0"
    if b"\0" in spelt:
        raise error(f"the folder to save to is {short(folder)}, which is no path; give one")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise error(f"{folder} is a file; give a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _scratch(folder) as (new, old):
            yield new
            for path in new.iterdir():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
            _exchange(folder, new, old, stale)
        made.clear()
    except OSError as fault:
        name = Path(fault.filename).name if isinstance(fault.filename, str) else ""
        what = f"{fault.strerror or fault}" + (f" ({name})" if name and not name.startswith(_PREFIX) else "")
        way_out = _WAYS_OUT.get(fault.errno or 0, "give another folder")
        raise error(f"the files cannot be written to {folder}: {what}; {way_out}") from fault
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def _scratch(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Folders inside `folder` for what comes and what goes; the latter stays where what it holds could not be put back."""
    scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()
        old.mkdir()
        yield new, old
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        for empty in (old, scratch):
            with suppress(OSError):
                empty.rmdir()


def _exchange(folder: Path, new: Path, old: Path, stale: str) -> None:
    """Give the files in `new` their names in `folder`; what they replace and what is stale goes to `old`, or all comes back."""
    coming = sorted(os.listdir(new))
    going = [name for name in sorted(os.listdir(folder)) if re.fullmatch(stale, name) and name not in coming]
    going = [name for name in going if not (folder / name).is_dir()]
    there = [name for name in [*coming, *going] if os.path.lexists(folder / name)]
    if in_the_way := [folder / name for name in there if (folder / name).is_dir()]:
        raise IsADirectoryError(errno.EISDIR, "a folder has the name of a file", str(in_the_way[0]))
    try:
        for name in there if len(coming) + len(going) > 1 else ():  # one alone is replaced or is not
            _keep(folder / name, old / name)
        for name in coming:
            os.replace(new / name, folder / name)
        for name in going:
            (folder / name).unlink(missing_ok=True)  # moved already where there are no hard links
    except BaseException as fault:
        try:
            for name in coming:
                if name not in there:
                    (folder / name).unlink(missing_ok=True)
            for name in os.listdir(old):
                os.replace(old / name, folder / name)
                (old / name).unlink(missing_ok=True)  # two names of one file: the line above does nothing
        except OSError as again:
            raise OSError(f"{fault}, then {again}; what was there and is no more stands in {old}") from fault
        raise


def _keep(path: Path, other: Path) -> None:
    """Give a file a second name, or only that where the file system has no hard links."""
    try:
        os.link(path, other, follow_symlinks=False)
    except OSError:
        os.replace(path, other)
