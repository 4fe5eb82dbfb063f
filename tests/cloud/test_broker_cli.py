"""``driftkeel broker`` runs a broker in the foreground and says how to connect."""

import signal
import subprocess
import sys
from pathlib import Path

from adapter_store.mqtt import Link
from cloud.broker import Kind

WAIT_S = 20.0


def command(*arguments: str) -> list[str]:
    start = "from adapter_store.cli import main; main()"
    return [sys.executable, "-c", start, "broker", *arguments]


def test_the_command_runs_a_broker_until_interrupted(broker_kind: Kind, tmp_path: Path) -> None:
    arguments = ["--state-dir", str(tmp_path), "--port", "0", "--kind", broker_kind]
    arguments += ["--user", "device-a=secret", "--user", "catalogue=other"]
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            first, second = process.stdout.readline(), process.stdout.readline()
            assert broker_kind in first
            assert "trying only" in first
            assert "device-a" in second
            assert "secret" not in first + second
            port = int(first.split(":")[1].split(",")[0])
            link = Link(
                host="127.0.0.1",
                port=port,
                client_id="x",
                username="device-a",
                password="secret",
                on_message=lambda *_: None,
            )
            link.start()
            assert link.wait_connected(WAIT_S)
            link.stop()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0


def test_the_command_refuses_what_is_no_account(tmp_path: Path) -> None:
    arguments = ["--state-dir", str(tmp_path), "--user", "device-a"]
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "NAME=PASSWORD" in done.stderr
