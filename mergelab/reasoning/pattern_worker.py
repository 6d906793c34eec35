"""The child process that searches texts for a user's pattern; it imports nothing of ours.

It reads `[pattern, text]` from its standard input, a line of JSON each, and answers on its standard output
with what the last match gives, until its input ends.
"""

from __future__ import annotations

import json
import re
import sys

__all__ = ["last_match", "main"]


def last_match(pattern: str, text: str) -> str | None:
    """The first group of the last match, or the match where there are no groups; None without a match."""
    found = None
    for match in re.finditer(pattern, text, re.MULTILINE):
        found = match.group(match.re.groups and 1)
    return found


def main() -> None:
    """Answers until the input ends."""
    answers = sys.stdout.buffer  # bytes: Windows would end lines otherwise
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        answers.write(json.dumps(last_match(*json.loads(line))).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
