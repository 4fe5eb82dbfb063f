"""The `driftkeel` command tells what is missing in one line."""

import pytest

from adapter_store import cli
from adapter_store.errors import ConfigError


def _fails(error: Exception):
    def main(**_: object) -> None:
        raise error

    return main


def test_an_error_of_ours_is_one_line_and_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.driftkeel, "main", _fails(ConfigError("key 'x' is missing")))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "driftkeel: key 'x' is missing\n"


def test_a_missing_optional_package_names_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ModuleNotFoundError("No module named 'torch'", name="torch")
    monkeypatch.setattr(cli.driftkeel, "main", _fails(missing))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "pip install 'driftkeel[train]'" in capsys.readouterr().err


def test_any_other_missing_module_is_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = ModuleNotFoundError("No module named 'ood.nothing'", name="ood.nothing")
    monkeypatch.setattr(cli.driftkeel, "main", _fails(missing))
    with pytest.raises(ModuleNotFoundError):
        cli.main()
