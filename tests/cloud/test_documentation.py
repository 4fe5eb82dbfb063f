"""docs/catalogue.md says what there is: every command, request and status, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from types import UnionType
from typing import get_args

import click
import msgspec
import pytest
from starlette.routing import Route

from cloud.api import _JUDGE as JUDGE
from cloud.api import _STEER as STEER
from cloud.api import make_api
from cloud.config import Config
from cloud.operators import Operators
from cloud.service import open_store
from cloud.shell_commands import commands
from cloud.views import STATUSES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8")


def first_cells() -> list[str]:
    return re.findall(r"^\| (.*?) \|", TEXT, re.MULTILINE)


@pytest.mark.parametrize("section", msgspec.structs.fields(Config), ids=lambda field: field.name)
def test_every_key_is_explained_where_it_is_defined(section: msgspec.structs.FieldInfo) -> None:
    assert not isinstance(section.type, UnionType), get_args(section.type)
    explained = re.findall(r"^ {8}(\w+): \S", section.type.__doc__ or "", re.MULTILINE)
    assert explained == [field.name for field in msgspec.structs.fields(section.type)]


def test_every_command_of_the_shell_is_documented_with_its_options() -> None:
    cells = " ".join(first_cells())
    for name, command in commands.commands.items():
        assert f"`{name}" in cells, name
        options = [p for p in command.params if isinstance(p, click.Option)]
        for option in options:
            assert option.opts[0] in TEXT, f"{name} {option.opts[0]}"


def test_no_command_is_documented_that_does_not_exist() -> None:
    shell = TEXT.partition("## The shell")[2].partition("\n## ")[0]
    named = {
        word
        for cell in re.findall(r"^\| (`.*?) \|", shell, re.MULTILINE)
        for word in re.findall(r"`([a-z]+)", cell)
    }
    assert named == set(commands.commands)


def test_every_request_is_documented(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.toml"
    path.write_text('[catalogue]\nstate_dir = "state"\n[mqtt]\nhost = "localhost"\n')
    store = open_store(Config.load(path))
    app = make_api(Operators(store, lambda *_: False), store, _Nobody(), "token")
    store.close()
    for route in app.routes:
        assert isinstance(route, Route)
        words = route.path.replace("{name}", "NAME").replace("{id}", "ID").replace("{episode}", "N")
        action = words.rpartition("/")[2]
        assert words in TEXT or f"…/{action}" in TEXT, words


def test_every_status_of_an_adapter_is_documented() -> None:
    for status in STATUSES:
        assert f"`{status}`" in TEXT


def test_every_action_in_the_audit_log_is_documented() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cloud").glob("*.py"))
    written = set(re.findall(r'action="(\w+)"|\.note\(device, "(\w+)"', sources))
    actions = {name for pair in written for name in pair if name} | set(STEER) | set(JUDGE)
    audit = TEXT.partition("## The audit log")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", audit, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == actions


class _Nobody:
    connected = False

    def statistics(self) -> dict[str, int]:
        return {}
