"""A configuration with a mistake is refused by the key's name."""

from pathlib import Path

import msgspec
import pytest

from adapter_store.config import load_config
from adapter_store.errors import ConfigError


class Http(msgspec.Struct, forbid_unknown_fields=True):
    port: int = 80


class Config(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    http: Http = msgspec.field(default_factory=Http)
    extra: Http | None = None


def _load(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "c.toml"
    file.write_text(text)
    return load_config(file, Config)


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    assert _load(tmp_path, 'name = "a"') == Config(name="a", http=Http(80))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('name = "a"\n[http]\nprot = 1', "unknown key 'http.prot'; did you mean 'port'"),
        ('name = "a"\n[extra]\nprot = 1', "unknown key 'extra.prot'; did you mean 'port'"),
        ('nam = "a"', "'nam'"),
        ("[http]\nport = 1", "key 'name' is missing"),
        ('name = "a"\n[http]\nport = "x"', "key 'http.port': expected `int`, got `str`"),
        ("name = ", "not valid TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, text)
    assert says in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_config(tmp_path / "none.toml", Config)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(file, Config)
