"""The configuration file: every key is documented, and what is wrong is refused by name."""

import inspect
import json
import re
from pathlib import Path

import msgspec
import pytest

from adapter_store.errors import ConfigError
from edge_agent.config import Config, load_agent_config

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "agent-config.md"


def sections() -> dict[str, type[msgspec.Struct]]:
    found = {}
    for field in msgspec.structs.fields(Config):
        info = msgspec.inspect.type_info(field.type)
        options = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
        for option in options:
            if isinstance(option, msgspec.inspect.StructType):
                found[field.name] = option.cls
    return found


def keys() -> dict[str, msgspec.structs.FieldInfo]:
    return {
        f"{name}.{field.name}": field
        for name, section in sections().items()
        for field in msgspec.structs.fields(section)
    }


def documented() -> dict[str, str]:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \| (\S+) \|", text, re.MULTILINE))


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "agent.toml"
    path.write_text(text, encoding="utf-8")
    return load_agent_config(path)


MINIMAL = '[agent]\ndevice = "d"\nstate_dir = "state"\n'


def test_every_key_is_documented_with_its_default_and_nothing_else_is() -> None:
    expected = {
        key: "required" if field.default is msgspec.NODEFAULT else f"`{json.dumps(field.default)}`"
        for key, field in keys().items()
    }
    assert documented() == expected


@pytest.mark.parametrize("name", sections())
def test_every_key_is_explained_where_it_is_defined(name: str) -> None:
    section = sections()[name]
    explained = re.findall(r"^ {4}(\w+): \S", inspect.cleandoc(section.__doc__ or ""), re.MULTILINE)
    assert explained == [field.name for field in msgspec.structs.fields(section)]


def test_a_typo_is_refused_by_name_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"alarm\.false_alarm_evry.*false_alarm_every"):
        load(tmp_path, MINIMAL + "[alarm]\nfalse_alarm_evry = 5\n")


@pytest.mark.parametrize(
    "text",
    [
        "[learner]\nmomentum = 1.5\n",
        "[learner]\nepochs = 0\n",
        "[http]\nport = 70000\n",
        "[generations]\nkeep = 0\n",
        "[alarm]\nfalse_alarm_every = 'often'\n",
        "[mqtt]\nport = 1883\n",
    ],
)
def test_a_value_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, MINIMAL + text)


@pytest.mark.parametrize("device", ["", "a/b", "a+", "#", "x" * 65])
def test_a_device_name_that_cannot_be_a_topic_is_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        load(tmp_path, f'[agent]\ndevice = "{device}"\nstate_dir = "state"\n')


def test_paths_start_at_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL + 'encoder = "my-encoder"\n')
    assert config.agent.state_dir == str(tmp_path / "state")
    assert config.agent.encoder == str(tmp_path / "my-encoder")
    assert load(tmp_path, MINIMAL).agent.encoder == "default"


def test_without_a_broker_the_device_is_offline(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).mqtt is None
