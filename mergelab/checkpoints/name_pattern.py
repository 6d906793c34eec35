r"""Patterns of module names, matched in time that grows with the name alone.

PEFT reads the keys of `rank_pattern` and `alpha_pattern` as regular expressions. A few bytes of one can keep
Python's matcher busy for ever, so what these keys are made of (names, `.`, classes, groups, alternatives and
repetitions) is read here, and matched by following all alternatives at once; the rest of the language is
refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

__all__ = ["compile_pattern", "matches_name"]

_LONGEST = 1000
_MOST_STATES = 2000
_PLAIN = re.compile(r"[\w.-]+")
_BOUNDS = re.compile(r"\{(\d{1,4})(?:(,)(\d{0,4}))?\}")
_ESCAPED = {"d": "0123456789", "w": None}


@dataclass
class _Program:
    """A nondeterministic automaton: per state, characters that lead on, and jumps that read nothing.

    `steps[i]` is `(negated, characters, next state)`; characters None stand for those of a word.
    """

    steps: list[tuple[bool, frozenset[str] | None, int] | None]
    jumps: list[list[int]]

    def state(self) -> int:
        if len(self.steps) >= _MOST_STATES:
            raise ValueError("it is too large")
        self.steps.append(None)
        self.jumps.append([])
        return len(self.steps) - 1


Node = tuple[Any, ...]


class _Parser:
    """Text to `("set", negated, chars)`, `("join", ...)`, `("or", ...)`, `("repeat", x, low, high)`."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def parse(self) -> Node:
        found = self.alternatives()
        if self.peek():
            raise ValueError(f"its {self.peek()!r} closes nothing")
        return found

    def alternatives(self) -> Node:
        self.depth += 1
        if self.depth > 50:
            raise ValueError("its groups are too deep")
        options = [self.sequence()]
        while self.peek() == "|":
            self.at += 1
            options.append(self.sequence())
        self.depth -= 1
        return ("or", *options)

    def sequence(self) -> Node:
        parts: list[Node] = []
        while self.peek() and self.peek() not in "|)":
            parts.append(self.repeated(self.atom()))
        return ("join", *parts)

    def atom(self) -> Node:
        char = self.peek()
        self.at += 1
        if char == ".":
            return ("set", True, frozenset("\n"))
        if char == "[":
            return self.characters()
        if char == "(":
            if self.peek() == "?":
                if not self.text.startswith("?:", self.at):
                    raise ValueError(f"it uses '(?{self.text[self.at + 1 : self.at + 2]}'")
                self.at += 2
            found = self.alternatives()
            if self.peek() != ")":
                raise ValueError("a group is not closed")
            self.at += 1
            return found
        if char == "\\":
            return ("set", False, self.escaped())
        if char in "^$*+?{}":
            raise ValueError(f"it has {char!r} where a name was expected")
        return ("set", False, frozenset(char))

    def escaped(self) -> frozenset[str] | None:
        char = self.peek()
        self.at += 1
        if char in _ESCAPED:
            found = _ESCAPED[char]
            return None if found is None else frozenset(found)
        if not char or char.isalnum():
            raise ValueError(f"it uses '\\{char}'")
        return frozenset(char)

    def characters(self) -> Node:
        negated = self.peek() == "^"
        self.at += negated
        found: set[str] = set()
        first = True
        while first or self.peek() != "]":
            first = False
            char = self.peek()
            self.at += 1
            if not char:
                raise ValueError("a class is not closed")
            if char == "\\":
                word = self.escaped()
                found |= _WORD if word is None else word
                continue
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                last = self.text[self.at + 1]
                self.at += 2
                if not (char <= last and ord(last) < 256) or last == "\\":
                    raise ValueError(f"it has the range {char}-{last}")
                found |= {chr(code) for code in range(ord(char), ord(last) + 1)}
            else:
                found.add(char)
        self.at += 1
        return ("set", negated, frozenset(found))

    def repeated(self, node: Node) -> Node:
        char, low, high = self.peek(), 0, None
        if char == "{" and (bounds := _BOUNDS.match(self.text, self.at)):
            low = int(bounds[1])
            high = low if not bounds[2] else (int(bounds[3]) if bounds[3] else None)
            self.at = bounds.end()
        elif char and char in "*+?":
            low, high = int(char == "+"), 1 if char == "?" else None
            self.at += 1
        else:
            return node
        if self.peek() == "?":  # a lazy repetition matches the same names
            self.at += 1
        if self.peek() and self.peek() in "*+?{":
            raise ValueError("it repeats a repetition")
        if high is not None and high < low:
            raise ValueError("it repeats fewer times than it asks for")
        return ("repeat", node, low, high)


_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


def _build(node: Node, program: _Program, start: int) -> int:
    """Adds a node that begins at state `start`; returns the state at which it ends."""
    kind, *rest = node
    if kind == "set":
        end = program.state()
        program.steps[start] = (rest[0], rest[1], end)
        return end
    if kind == "join":
        for part in rest:
            start = _build(part, program, _after(program, start))
        return start
    if kind == "or":
        ends = [_build(part, program, _after(program, start)) for part in rest]
        end = program.state()
        for each in ends:
            program.jumps[each].append(end)
        return end
    part, low, high = rest
    for _ in range(low):
        start = _build(part, program, _after(program, start))
    end = program.state()
    if high is None:
        loop = _after(program, start)
        back = _build(part, program, _after(program, loop))
        program.jumps[back].append(loop)
        program.jumps[loop].append(end)
        return end
    for _ in range(high - low):
        program.jumps[start].append(end)
        start = _build(part, program, _after(program, start))
    program.jumps[start].append(end)
    return end


def _after(program: _Program, state: int) -> int:
    """A fresh state that `state` jumps to: each state reads for one node only."""
    fresh = program.state()
    program.jumps[state].append(fresh)
    return fresh


@lru_cache(maxsize=4096)
def compile_pattern(key: str) -> _Program | None:
    """Reads a pattern; None for a plain name.

    Raises:
        ValueError: it is malformed, too large, or uses more of the language than is read here.
    """
    if len(key) > _LONGEST:
        raise ValueError(f"it has {len(key)} characters")
    if _PLAIN.fullmatch(key):
        return None
    program = _Program([], [])
    node = _Parser(key.removesuffix("$").removeprefix("^")).parse()
    if key.startswith("^") and len(node) > 2:
        raise ValueError("its '^' belongs to one alternative only")
    end = _build(node, program, program.state())
    program.jumps[end].append(-1)
    return program


def matches_name(key: str, name: str) -> bool:
    r"""Whether PEFT's rule, `re.match(rf"(.*\.)?({key})$", name)`, holds for a module's name."""
    program = compile_pattern(key)
    if program is None:
        tail = name[len(name) - len(key) :]
        before = name[: len(name) - len(key)]
        near = len(key) <= len(name) and all(k in (c, ".") for k, c in zip(key, tail, strict=True))
        return near and (not before or before.endswith("."))
    anywhere = not key.startswith("^")
    states: set[int] = set()
    _enter(program, 0, states)
    for char in name:
        following: set[int] = set()
        for state in states:
            step = program.steps[state] if state >= 0 else None
            if step is not None and _reads(step[0], step[1], char):
                _enter(program, step[2], following)
        if anywhere and char == ".":
            _enter(program, 0, following)
        states = following
        if not states and not anywhere:
            return False
    return -1 in states


def _reads(negated: bool, chars: frozenset[str] | None, char: str) -> bool:
    return (char.isalnum() or char == "_" if chars is None else char in chars) != negated


def _enter(program: _Program, state: int, states: set[int]) -> None:
    """Adds a state and all that it jumps to."""
    waiting = [state]
    while waiting:
        state = waiting.pop()
        if state not in states:
            states.add(state)
            waiting += program.jumps[state] if state >= 0 else []
