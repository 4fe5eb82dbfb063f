"""Making text from elsewhere fit for a terminal or a log.

Devices and operators write names, reasons and messages; nothing in them may move a cursor, start a
new line in a log, or be unfit for a database.
"""


def printable(text: str) -> str:
    r"""Text with everything that a terminal would act on written as its escape.

    Example:
        >>> printable("Prüfstand\x1b[2J")
        'Prüfstand\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
