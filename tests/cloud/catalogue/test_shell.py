"""The operator shell: what its commands print, how they end, and what Tab offers."""

import io
import json
from collections.abc import Callable, Iterator

import httpx
import msgspec
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from starlette.testclient import TestClient

from adapter_store import wire
from adapter_store.bundle import bundle_digest
from adapter_store.explanation import Explanation
from cloud.api import make_api
from cloud.shell import ShellCompleter, interact, run_command
from cloud.shell_client import Client
from cloud.shell_commands import Session, commands
from tests.adapter_store.explained import DOCUMENT

TOKEN = "token"


class Connection:
    connected = True

    def statistics(self) -> dict[str, int]:
        return {}


@pytest.fixture
def client(desk) -> Iterator[Client]:
    api = make_api(desk.operators, desk.store, Connection(), TOKEN)
    with TestClient(api) as served:
        yield Client("http://testserver", TOKEN, "ops", transport=served._transport)


@pytest.fixture
def run(client, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs one line; returns exit status, output and errors."""

    def run(line: str, *, as_json: bool = False) -> tuple[int, str, str]:
        shown = io.StringIO()
        session = Session(client, Console(file=shown, width=160), as_json=as_json)
        status = run_command(session, line)
        printed = capsys.readouterr()
        return status, printed.out + shown.getvalue(), printed.err

    return run


@pytest.fixture
def fleet(desk, make_report, make_bundle) -> str:
    """device-a, which runs generation 2, and one candidate; returns the candidate's digest."""
    desk.register()
    desk.say("device-a", make_report())
    desk.upload(make_bundle(1))
    return bundle_digest(make_bundle(1))


def test_devices_are_listed(fleet, run) -> None:
    status, out, _ = run("devices")
    assert status == 0
    assert "device-a" in out
    assert "online" in out
    assert "own choice" in out


def test_one_device_is_shown_with_its_generations(fleet, run) -> None:
    _, out, _ = run("device device-a")
    assert "▸ generation 2" in out
    assert "  generation 1" in out


def test_a_training_is_shown_with_a_bar(desk, fleet, run, make_report) -> None:
    training = wire.TrainingProgress(
        step=30, steps=100, epoch=6, epochs=20, accuracy=0.814, seconds=3.0, eta_s=7.0
    )
    desk.say("device-a", make_report(sequence=2, training=training))
    bar = "[###-------] epoch 6 of 20, accuracy 0.81, at most 7 s left"
    assert bar in run("device device-a")[1]
    assert f"training {bar}" in run("watch --seconds 0")[1]


def test_the_kind_of_shift_is_shown(desk, fleet, run, make_report) -> None:
    episode = wire.EpisodeSummary(number=3, state="seeking", detail="asking", kind="new classes")
    desk.say("device-a", make_report(sequence=2, episode=episode))
    assert "new classes" in run("devices")[1]
    assert "kind of shift new classes" in " ".join(run("device device-a")[1].split())
    assert json.loads(run("devices", as_json=True)[1])[0]["reported"]["episode"]["kind"] == (
        "new classes"
    )
    older = wire.EpisodeSummary(number=3, state="seeking", detail="asking")
    desk.say("device-a", make_report(sequence=3, episode=older))
    assert "kind of shift not known yet" in " ".join(run("device device-a")[1].split())


def test_an_alarm_is_explained(desk, fleet, run) -> None:
    found = msgspec.convert(DOCUMENT, Explanation)
    desk.say("device-a", wire.Explained(explanation=found))
    assert run("explain device-a 3") == (0, found.text() + "\n", "")
    assert json.loads(run("explain device-a 3", as_json=True)[1]) == DOCUMENT
    status, out, error = run("explain device-a 4")
    assert (status, out) == (1, "")
    assert "no explanation of episode 4 of device-a; there are: 3" in error
    assert run("explain device-a x")[0] == 2


def test_an_adapter_is_approved_by_the_beginning_of_its_id(desk, fleet, run) -> None:
    _, out, _ = run("adapters --status candidate")
    assert fleet[:12] in out
    status, out, _ = run(f"approve {fleet[:6]} --reason 'tried on line 3'")
    assert (status, out) == (0, f"adapter {fleet[:12]} is approved\n")
    _, out, _ = run(f"adapter {fleet[:6]}")
    assert "approved" in out
    assert "cat, dog" in out
    _, out, _ = run("log -n 1")
    assert "tried on line 3" in out
    assert "ops" in out


def test_quarantine_warns_of_the_devices_that_run_it(desk, fleet, run, make_report) -> None:
    report = make_report("device-b")
    held = [msgspec.structs.replace(g, bundles=[fleet]) for g in report.generations]
    desk.say("device-b", msgspec.structs.replace(report, generations=held))
    _, out, _ = run(f"quarantine {fleet[:6]}")
    assert "warning: still run by device-b" in out


def test_a_confirmed_rollback_says_so(desk, fleet, run, make_report) -> None:
    desk.on_push = lambda device, _: desk.say(
        device, make_report(sequence=2, desired_version=1, generation=1, pinned=True)
    )
    status, out, _ = run("rollback device-a")
    assert status == 0
    assert out.startswith("device-a runs generation 1 (was 2), pinned, confirmed in 0.")


def test_an_unconfirmed_rollback_says_so(fleet, run) -> None:
    status, out, _ = run("rollback device-a --to 1 --wait 0")
    assert status == 0
    assert "not confirmed yet" in out
    _, out, _ = run("devices")
    assert "generation 1, pinned (not confirmed)" in out


def test_a_device_that_cannot_makes_the_command_fail(desk, fleet, run, make_report) -> None:
    desk.on_push = lambda device, _: desk.say(
        device, make_report(sequence=2, desired_version=1, problem="it is damaged")
    )
    status, out, err = run("rollback device-a")
    assert (status, out) == (1, "")
    assert "device-a cannot: it is damaged" in err


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("rollback nobody", 1, "no device 'nobody'; known devices: device-a"),
        ("rollback device-a --to 7", 1, "has no generation 7; it reports 1, 2"),
        ("approve zz", 1, "no adapter's id begins with 'zz'"),
        ("device a/b", 1, "there is nothing at"),
        ("device ../adapters", 1, "there is nothing at"),
        ("frobnicate", 2, "No such command 'frobnicate'"),
        ("rollback", 2, "Missing argument 'NAME'"),
        ("rollback device-a --to one", 2, "'one' is not a valid integer"),
        ("rollback device-a --too 1", 2, "No such option"),
        ("adapters --status new", 2, "'new' is not one of"),
        ("log -n 0", 2, "-n"),
        ("approve 'unfinished", 2, "cannot read"),
        ("help frobnicate", 2, "no command 'frobnicate'"),
    ],
)
def test_what_goes_wrong_is_said_on_stderr_with_a_status(fleet, run, line, status, says) -> None:
    found, out, err = run(line)
    assert (found, out) == (status, "")
    assert says in err


def test_with_json_every_answer_is_one_document_on_a_line(fleet, run) -> None:
    for line in ("devices", "device device-a", "adapters", f"adapter {fleet[:6]}", "log"):
        status, out, _ = run(line, as_json=True)
        assert status == 0
        assert out.count("\n") == 1
        json.loads(out)
    _, out, _ = run("rollback device-a --wait 0", as_json=True)
    answer = json.loads(out)
    assert not answer["confirmed"]
    assert answer["desired"]["generation"] == 1


def test_watch_tells_the_state_and_what_changes(desk, fleet, run) -> None:
    status, out, _ = run("watch --seconds 0")
    assert status == 0
    assert "device-a: online, generation 2, wanted: own choice" in out


def test_what_devices_write_is_neither_markup_nor_a_terminal_command(
    desk, run, make_report
) -> None:
    nasty = "[bold]x[/] [/red] [link=http://evil]y\x1b[2J\r\n"
    report = make_report(
        problem=nasty,
        episode=wire.EpisodeSummary(number=1, state=nasty, detail=nasty),
        counters={nasty: 1.0},
    )
    report = msgspec.structs.replace(
        report,
        generations=[msgspec.structs.replace(g, reason=nasty) for g in report.generations],
    )
    desk.say("device-a", wire.Register(device="device-a", encoder="a" * 64, software=nasty))
    desk.say("device-a", report)
    for line in ("devices", "device device-a", "log", "watch --seconds 0"):
        status, out, _ = run(line)
        assert status == 0
        assert "\x1b[2J" not in out
        assert "\r" not in out
        if line == "device device-a":
            assert "[bold]x[/] [/red]" in out


def test_help_names_every_command(run) -> None:
    _, out, _ = run("help")
    for name in commands.commands:
        assert f"  {name} " in out
        status, text, _ = run(f"help {name}")
        assert status == 0
        assert name in text


def test_an_empty_line_does_nothing(run) -> None:
    assert run("   ") == (0, "", "")


def test_a_catalogue_that_is_not_there_is_named(capsys) -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    client = Client("http://nowhere", TOKEN, "ops", transport=httpx.MockTransport(refuse))
    assert run_command(Session(client, Console(), as_json=False), "devices") == 1
    assert "http://nowhere" in capsys.readouterr().err


def test_something_else_at_the_address_is_noticed(capsys) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text="<html>hello</html>"))
    client = Client("http://elsewhere", TOKEN, "ops", transport=transport)
    assert run_command(Session(client, Console(), as_json=False), "devices") == 1
    assert "http://elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("roll", ["rollback"]),
        ("help ap", ["approve"]),
        ("rollback dev", ["device-a"]),
        ("rollback device-a --", ["--to", "--wait"]),
        ("adapters --status app", ["approved"]),
        ("rollback device-a dev", []),
        ("frobnicate x", []),
    ],
)
def test_tab_completes(fleet, client, text, offered) -> None:
    found = ShellCompleter(client).get_completions(Document(text), CompleteEvent())
    assert [completion.text for completion in found] == offered


def test_tab_completes_adapter_ids(fleet, client) -> None:
    document = Document(f"approve {fleet[:3]}")
    (completion,) = ShellCompleter(client).get_completions(document, CompleteEvent())
    assert completion.text == fleet[:12]


def test_tab_offers_nothing_when_the_catalogue_is_away() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(500))
    completer = ShellCompleter(Client("http://nowhere", TOKEN, "ops", transport=transport))
    assert list(completer.get_completions(Document("device d"), CompleteEvent())) == []


def test_the_interactive_shell_runs_lines_until_quit_and_keeps_its_history(
    fleet, client, capsys, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text("device nobody\rpin device-a --wait 0\rquit\r")
        interact(Session(client, Console(), as_json=False))
    printed = capsys.readouterr()
    assert "no device 'nobody'" in printed.err
    assert "not confirmed yet" in printed.out
    history = (tmp_path / "driftkeel" / "shell-history").read_text(encoding="utf-8")
    assert "+pin device-a --wait 0" in history
