"""What the documentation says is what is there."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import click
import pytest

from adapter_store.cli import driftkeel
from exporter.package import default_encoder_package

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _update_readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "update_readme", ROOT / "tools" / "update_readme.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_numbers_are_those_of_the_report() -> None:
    report = json.loads((ROOT / "docs/demo/report.json").read_text(encoding="utf-8"))
    assert _update_readme().readme_table(report) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_report_is_of_a_whole_demo() -> None:
    report = json.loads((ROOT / "docs/demo/report.json").read_text(encoding="utf-8"))
    assert report["steps"]
    assert all(step["ok"] for step in report["steps"])


def test_the_model_cards_numbers_are_those_of_the_benchmark_on_the_shipped_encoder() -> None:
    result = json.loads((ROOT / "benchmarks/results/default_encoder.json").read_text("utf-8"))
    shares = (f"{100 * result['accuracy'][name]:.1f} %" for name in ("cifar100_small", "digits"))
    row = f"| default encoder, 64 px | {' | '.join(shares)} |"
    assert row in (ROOT / "docs/default-encoder.md").read_text("utf-8")
    assert result["encoder"]["digest"] == default_encoder_package().digest


def test_the_broker_decisions_times_are_those_of_the_benchmark() -> None:
    results = json.loads((ROOT / "benchmarks/results/brokers.json").read_text("utf-8"))["brokers"]
    searches = [results[name]["searches"] for name in ("mosquitto", "amqtt", "embedded")]
    times = " | ".join(f"{s['p50_ms']} / {s['p99_ms']} ms" for s in searches)
    page = (ROOT / "docs/decisions/0001-embedded-broker.md").read_text("utf-8")
    assert f"| one answer, p50 / p99 | {times} |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_in_the_documentation_exists() -> None:
    context = click.Context(driftkeel)
    known = set(driftkeel.list_commands(context))
    for page in PAGES:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for name in re.findall(r"^(?:\$ )?driftkeel ([a-z]+)", block, re.MULTILINE):
                assert name in known, f"{page.name} names `driftkeel {name}`"


def test_every_command_explains_itself() -> None:
    context = click.Context(driftkeel)
    for name in driftkeel.list_commands(context):
        command = driftkeel.get_command(context, name)
        assert command is not None
        assert command.help, name


def test_the_example_of_an_own_encoder_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/encoders.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/encoders.md", "exec"), {"__name__": "example"})  # noqa: S102
    assert re.fullmatch(r"[0-9a-f]{64}\n", capsys.readouterr().out)
