"""What went wrong, why, and what to do."""


class BenchError(Exception):
    """A measurement that is none. Its text is for people."""

    def __init__(self, what, why="", remedy=""):
        super().__init__("\n".join(part.rstrip() for part in (what, indent(why), indent(remedy)) if part.strip()))


class Skipped(Exception):
    """Something that can't be had on this host; its text is the reason."""


def indent(text):
    """The lines of a text, set in by two."""
    return "\n".join("  " + line for line in text.strip().splitlines())


def tail(text, lines=12):
    """The last lines of a program's output, where the reason mostly is."""
    return "\n".join(text.strip().splitlines()[-lines:])
