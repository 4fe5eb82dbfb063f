"""Put the results of a demo run into the README: `python -m tools.update_readme demo-out`.

Copies the run's report and picture to `docs/demo/` and rewrites the table between the README's
markers from that report, so that no number there is typed by hand; a test compares them.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from examples.demo.report import rows

ROOT = Path(__file__).parents[1]
_TABLE = re.compile(r"(<!-- demo results -->\n).*?(<!-- end of demo results -->)", re.DOTALL)


def readme_table(report: dict[str, object]) -> str:
    """The README's table of results, as Markdown."""
    lines = ["| measured | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows(report)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Copy the report and the picture, and rewrite the table."""
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    if not all(step["ok"] for step in report["steps"]):
        sys.exit(f"{run}/report.json is of a run in which not every step happened")
    kept = ROOT / "docs" / "demo"
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "stream.png"):
        shutil.copyfile(run / name, kept / name)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    table = readme_table(report)
    new, n = _TABLE.subn(lambda match: match.group(1) + table + match.group(2), text)
    if n != 1:
        sys.exit("README.md has no place between 'demo results' markers")
    readme.write_text(new, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
