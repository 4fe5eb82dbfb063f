"""What a class may be called: the one rule for labels in feedback and in bundles.

A label is shown to operators, written to logs and sent to other devices, so it holds nothing that
a terminal, a log or a web page would act on.
"""

from __future__ import annotations

from typing import Final

from adapter_store.errors import LabelError

MAX_LABEL: Final = 200


def check_label(label: str, *, what: str = "label") -> None:
    r"""Refuse a name that cannot be shown as it is.

    Args:
        label: The name.
        what: What the name is, for the message.

    Raises:
        LabelError: It is empty, over 200 characters, begins or ends with a space, or holds
            control, formatting or unassigned characters.

    Example:
        >>> check_label("grüner Tee")
        >>> check_label("cat\x1b[2J")
        Traceback (most recent call last):
        adapter_store.errors.LabelError: label 'cat\x1b[2J' holds '\x1b'; use printable characters
    """
    if not label or len(label) > MAX_LABEL:
        shown = f"{label[:40]!a}... " if label else ""
        raise LabelError(
            f"{what} {shown}has {len(label)} characters; use 1 to {MAX_LABEL} characters"
        )
    if not label.isprintable():
        bad = next(character for character in label if not character.isprintable())
        raise LabelError(f"{what} {label[:40]!a} holds {bad!a}; use printable characters")
    if label != label.strip():
        raise LabelError(f"{what} {label[:40]!a} begins or ends with a space; remove it")
