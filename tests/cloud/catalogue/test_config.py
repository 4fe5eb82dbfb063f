"""The catalogue's configuration: every key documented, mistakes named."""

import re
from pathlib import Path

import msgspec
import pytest

from adapter_store.errors import ConfigError
from cloud.config import Config

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "catalogue.md"
SMALLEST = '[catalogue]\nstate_dir = "state"\n[mqtt]\nhost = "broker"\n'


def keys() -> dict[str, object]:
    """Every key with its default."""
    found = {}
    for section in msgspec.structs.fields(Config):
        for field in msgspec.structs.fields(section.type):
            found[f"{section.encode_name}.{field.encode_name}"] = field.default
    return found


def documented() -> dict[str, str]:
    rows = re.findall(
        r"^\| `(\w+\.\w+)` \| (.+?) \|", DOCUMENTATION.read_text(encoding="utf-8"), re.MULTILINE
    )
    return dict(rows)


def test_every_key_is_documented_with_its_default() -> None:
    assert documented().keys() == keys().keys()
    for key, default in keys().items():
        said = documented()[key]
        if default is msgspec.NODEFAULT:
            assert said == "required", key
        else:
            shown = f'"{default}"' if isinstance(default, str) else str(default)
            assert said == f"`{shown}`", key


def test_a_small_file_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.toml"
    path.write_text(SMALLEST, encoding="utf-8")
    config = Config.load(path)
    assert config.state_dir == tmp_path / "state"
    assert config.database_url == f"sqlite:///{tmp_path / 'state' / 'catalogue.db'}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[catalogue]\nstate_dri = "x"\n[mqtt]\nhost = "b"', "unknown key 'catalogue.state_dri'"),
        (SMALLEST + "prot = 1", "unknown key 'mqtt.prot'"),
        (SMALLEST + "[htpp]", "unknown key 'htpp'"),
        ('[mqtt]\nhost = "b"', "key 'catalogue' is missing"),
        ("[catalogue]\n[mqtt]", "missing"),
        (SMALLEST + "port = 70000", "mqtt.port"),
        (SMALLEST + '[http]\nport = "8790"', "http.port"),
        ('[catalogue]\nstate_dir = ""\n[mqtt]\nhost = "b"', "catalogue.state_dir"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "catalogue.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(says)):
        Config.load(path)
