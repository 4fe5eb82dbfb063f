"""`driftkeel shell` and `driftkeel catalogue` as commands, against a running catalogue."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from adapter_store.cli import driftkeel
from tests.cloud.conftest import Fleet
from tests.cloud.field import CatalogueProcess

Shell = Callable[..., Result]
NOWHERE = ("127.0.0.1", 1)


@pytest.fixture
def shell(fleet: Fleet) -> Shell:
    """Runs `driftkeel shell` with the catalogue's own configuration."""

    def run(*arguments: str, text: str | None = None) -> Result:
        config = ["--config", str(fleet.catalogue.config)]
        return CliRunner().invoke(driftkeel, ["shell", *config, *arguments], input=text)

    return run


def test_one_command_is_run_and_printed(shell: Shell) -> None:
    result = shell("-c", "devices")
    assert result.exit_code == 0
    assert "device-a" in result.stdout
    assert "online" in result.stdout


def test_with_json_every_answer_is_a_line(shell: Shell, fleet: Fleet) -> None:
    result = shell("--json", "-c", "devices", "-c", f"adapter {fleet.approved}", "-c", "log -n 1")
    assert result.exit_code == 0
    devices, adapter, log = map(json.loads, result.stdout.splitlines())
    assert devices[0]["name"] == "device-a"
    assert adapter["digest"] == fleet.approved
    assert len(log) == 1


def test_a_rollback_and_the_way_back(shell: Shell, fleet: Fleet) -> None:
    shell("-c", "rollback device-a --to 2")
    result = shell("-c", "rollback device-a --wait 60", "-c", "unpin device-a --wait 60")
    assert result.exit_code == 0
    there, back = result.stdout.splitlines()
    assert there.startswith("device-a runs generation 1 (was 2), pinned, confirmed in ")
    assert back.startswith("device-a runs generation 1 (was 1), confirmed in ")
    assert not fleet.device.pinned


@pytest.mark.parametrize(
    ("line", "status"),
    [("help", 0), ("", 0), ("rollback nobody", 1), ("frobnicate", 2), ("rollback", 2)],
)
def test_the_exit_status_says_what_became_of_it(shell: Shell, line: str, status: int) -> None:
    result = shell("-c", line)
    assert result.exit_code == status
    assert bool(result.stderr) == bool(status)


def test_nothing_after_a_failure_is_run(shell: Shell) -> None:
    result = shell("-c", "rollback nobody", "-c", "devices")
    assert result.exit_code == 1
    assert result.stdout == ""


def test_commands_come_from_a_pipe_until_quit(shell: Shell) -> None:
    result = shell("--json", text="log -n 1\n\nlog -n 1\nquit\nfrobnicate\n")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2


def test_an_ambiguous_id_names_the_choices(shell: Shell, fleet: Fleet) -> None:
    result = shell("-c", f"approve {fleet.alike[0][0]}")
    assert result.exit_code == 1
    for digest in fleet.alike:
        assert digest[:5] in result.stderr


def test_the_operators_name_is_in_the_log(shell: Shell) -> None:
    shell("--operator", "Jörg Müller", "-c", "pin nobody")
    (entry,) = json.loads(shell("--json", "-c", "log -n 1").stdout)
    assert (entry["who"], entry["outcome"]) == ("Jörg Müller", "refused")


def test_address_and_token_can_be_given(fleet: Fleet, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(fleet.catalogue.token + "\n", encoding="utf-8")
    arguments = ["shell", "--url", fleet.catalogue.url, "--token-file", str(token), "-c", "devices"]
    assert CliRunner().invoke(driftkeel, arguments).exit_code == 0
    token.write_text("wrong\n", encoding="utf-8")
    result = CliRunner().invoke(driftkeel, arguments)
    assert result.exit_code == 1
    assert "the operator token is missing or wrong" in result.stderr


def test_a_catalogue_that_is_down_is_said_and_nothing_hangs(tmp_path: Path) -> None:
    catalogue = CatalogueProcess(tmp_path, NOWHERE, "")
    catalogue.state.mkdir()
    (catalogue.state / "operator.token").write_text("token\n", encoding="utf-8")
    url = ["--url", "http://127.0.0.1:1"]
    result = CliRunner().invoke(
        driftkeel, ["shell", "--config", str(catalogue.config), *url, "-c", "devices"]
    )
    assert result.exit_code == 1
    assert "cannot be reached at http://127.0.0.1:1" in result.stderr
    assert "is it running?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--config FILE, or --url and --token-file"),
        (["--token-file", "nowhere"], "cannot read the operator token nowhere"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_without_a_token_it_says_what_to_give(arguments: list[str], says: str) -> None:
    environment = {name: "" for name in os.environ if name.startswith("DRIFTKEEL_")}
    result = CliRunner().invoke(driftkeel, ["shell", *arguments, "-c", "devices"], env=environment)
    assert result.exit_code != 0
    assert says in result.output + str(result.exception)


def test_the_public_key_stays_the_same_and_needs_no_broker(tmp_path: Path) -> None:
    catalogue = CatalogueProcess(tmp_path, NOWHERE, "")
    keys = {
        CliRunner().invoke(driftkeel, arguments).stdout
        for arguments in (
            ["catalogue", "public-key", "--config", str(catalogue.config)],
            ["catalogue", "--config", str(catalogue.config), "public-key"],
        )
    }
    assert len(keys) == 1
    assert len(keys.pop().strip()) == 44
