"""Imports go down one list only, and no serving module can reach torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "ood": set(),
    "adapter_store": {"ood"},
    "exporter": {"ood", "adapter_store"},
    "cloud": {"ood", "adapter_store", "exporter"},
    "edge_agent": {"ood", "adapter_store", "exporter"},
}


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", BELOW)
def test_imports_go_down_only(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        upward = (_imported(file) & BELOW.keys()) - BELOW[package] - {package}
        assert not upward, f"{file.relative_to(ROOT)} imports {sorted(upward)}"


def test_the_shift_detector_needs_numpy_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"numpy", "ood"}
    for file in (ROOT / "ood").rglob("*.py"):
        assert _imported(file) <= allowed, file.name


@pytest.mark.parametrize(
    "module", ["edge_agent.cli", "edge_agent.agent", "edge_agent.conductor", "edge_agent.http_api"]
)
def test_a_serving_device_imports_no_torch_and_no_onnx(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'onnx'}} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
