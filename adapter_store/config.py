"""Reading a TOML configuration file into a typed structure, refusing what it does not know.

The daemon and the catalogue describe their settings as msgspec structs with
``forbid_unknown_fields=True``; every problem is reported by the key's full name.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import TypeVar

import msgspec

from adapter_store.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)

_UNKNOWN = re.compile(r"unknown field `([^`]+)`(?: - at `\$\.?([^`]*)`)?")
_AT = re.compile(r"^(.*?) - at `\$\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]+)`(?: - at `\$\.?([^`]*)`)?")


def load_config(path: Path, kind: type[T]) -> T:
    """Read and validate a configuration file.

    Args:
        path: A TOML file.
        kind: The struct that describes it.

    Returns:
        The settings, defaults filled in.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or has an unknown, missing or
            wrongly typed key; the message names the file and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    try:
        return msgspec.convert(tomllib.loads(text), kind)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_explain(str(error), kind)}") from error


def _explain(message: str, kind: type[msgspec.Struct]) -> str:
    if match := _UNKNOWN.search(message):
        name, parent = match.group(1), match.group(2) or ""
        known = _fields_at(kind, parent)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {_join(parent, name)!r}; {hint}"
    if match := _MISSING.search(message):
        return f"key {_join(match.group(2) or '', match.group(1))!r} is missing; set it"
    if match := _AT.match(message):
        return f"key {match.group(2)!r}: {match.group(1)[0].lower()}{match.group(1)[1:]}"
    return message


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _fields_at(kind: type[msgspec.Struct], parent: str) -> list[str]:
    """The names of the keys that the table ``parent`` of the configuration may hold."""
    info = msgspec.inspect.type_info(kind)
    for part in filter(None, parent.split(".")):
        fields = {f.encode_name: f.type for f in getattr(info, "fields", ())}
        if part not in fields:
            return []
        info = fields[part]
        if isinstance(info, msgspec.inspect.UnionType):
            info = next(t for t in info.types if isinstance(t, msgspec.inspect.StructType))
    return [f.encode_name for f in getattr(info, "fields", ())]
