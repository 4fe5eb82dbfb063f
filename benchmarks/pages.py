"""Sections of a documentation page that benchmarks write: between two markers, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

PAGE: Final = Path(__file__).parents[1] / "docs" / "benchmarks" / "ood.md"


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Put a benchmark's text in its place on a page; what is around it stays.

    Args:
        name: The section's, as in ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
        text: Markdown.
        page: The page.

    Raises:
        ValueError: The page has no such section.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    content = page.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise ValueError(f"{page} has no section between {begin} and {end}")
    before, rest = content.split(begin, 1)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
