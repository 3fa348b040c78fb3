"""What GPTNeoConfig does with files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ConfigError
from ..files import atomic
from ..files.hub import Source
from ..files.strict_json import read_object
from .rules import instead_of_config

if TYPE_CHECKING:
    from .config import GPTNeoConfig

_MAX_BYTES = 16 << 20  # of config.json; a hundred thousand labels have less


class ConfigFiles:
    """Reading and writing `config.json`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    aliases: ClassVar[dict[str, str]]

    if TYPE_CHECKING:

        def to_json_string(self) -> str: ...
        def to_dict(self) -> dict[str, Any]: ...
        @classmethod
        def from_dict(cls, values: dict[str, Any], **overrides: Any) -> GPTNeoConfig: ...

    @classmethod
    def keywords(cls) -> set[str]:
        """Names that a value can be given by: fields, their other names, num_labels."""
        return {*cls.__dataclass_fields__, *cls.aliases, "num_labels"}

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write the text of `config.json` to a file, whole or not at all.

        Raises:
            ConfigError: it cannot be written there, or holds what JSON has not.
        """
        place = Path(path)
        atomic.write(place.parent, {place.name: self.to_json_string()}, ConfigError)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str], **overrides: Any) -> GPTNeoConfig:
        """The configuration in one `config.json`."""
        values = read_object(Path(path), ConfigError, _MAX_BYTES)
        try:
            return cls.from_dict(values, **overrides)
        except ConfigError as error:
            raise ConfigError(f"{os.fspath(path)}: {error}") from None

    @classmethod
    def from_source(cls, source: Source, **overrides: Any) -> GPTNeoConfig:
        """The configuration of a folder or hub repository."""
        path = source.file("config.json")
        if path is None:
            raise ConfigError(f"{source.name!r} holds no config.json ({source.holdings()}); {instead_of_config(source.folder)}")
        with source.reading():
            return cls.from_json_file(path, **({"name_or_path": source.name} | overrides))

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], return_unused_kwargs: bool = False, **options: Any) -> Any:
        """The configuration of a folder or hub id; options are `Source`'s (revision, token, ...) or fields to override.

        Args:
            return_unused_kwargs: give (configuration, options that are no field) and keep none of these.
        """
        source = Source.of(name_or_path, **{k: options.pop(k) for k in Source.OPTIONS if k in options})
        unused = {k: options.pop(k) for k in list(options) if return_unused_kwargs and k not in cls.keywords()}
        config = cls.from_source(source, **options)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def get_config_dict(cls, name_or_path: str | os.PathLike[str], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values of a `config.json`, and the options that are not `Source`'s."""
        where = {k: options.pop(k) for k in Source.OPTIONS if k in options}
        return cls.from_pretrained(name_or_path, **where).to_dict(), options

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` into `folder`, which is made where it is missing.

        Raises:
            ConfigError: it cannot be written there; what was there still is.
        """
        atomic.write(folder, {"config.json": self.to_json_string()}, ConfigError)
