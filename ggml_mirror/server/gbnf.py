"""Grammars in llama.cpp's notation, read as it reads them, and refused where it would fail.

llama.cpp prints a grammar that it cannot parse to the server's log; it recurses into parentheses, walks every way in which rules can
begin to find left recursion (and does not find all), and writes repetitions out, those that count backwards for ever. So a short text can
overflow its stack, fill the memory or keep it busy for years. Follows ``llama_grammar_parser`` of llama.cpp's src/llama-grammar.cpp.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

MAX_CHARS = 128 << 10
MAX_NESTING = 2000  # parentheses
MAX_REPEATS = 2000  # MAX_REPETITION_THRESHOLD in llama.cpp
MAX_ELEMENTS = 500_000  # of rules, repetitions written out
MAX_BEGINNINGS = 50_000  # of one rule: stacks that llama.cpp may hold at once
MAX_STEPS = 30_000_000  # over all rules: what it walks to find left recursion

_ESCAPE = r'\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[trn\\"\[\]-])'
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9-]+")
_LITERAL = re.compile(rf'"((?:{_ESCAPE}|[^"\\])*)"')
_CLASS = re.compile(rf"\[\^?((?:{_ESCAPE}|[^\]\\])*)\]")
_CHAR = re.compile(rf"{_ESCAPE}|[^\\]", re.DOTALL)
_TOKEN = re.compile(r"!?(<\[(\d+)\]>|<[^>]*>)")
_INTEGER = re.compile(r"[0-9]+")

_ENDLESS = "something that may be empty is repeated without end"


class GrammarError(ValueError):
    """What is wrong with a grammar, and where."""


@dataclass
class Element:
    """A part of a sequence: a rule, by its name, or (without one) a terminal. Parentheses make a rule of their own.

    Attributes:
        size: elements that llama.cpp has for it, repetitions written out.
        copies: how often it may stand in a row at its beginning.
        rules: llama.cpp's count of what a further repetition would repeat.
        empty: it has no element at all, as ``""``.
        optional: it may be left out.
        endless: it is repeated without end. llama.cpp makes a rule of that, which begins with itself if what is repeated may be empty.
    """

    name: str | None = None
    size: int = 1
    copies: int = 1
    rules: int = 1
    empty: bool = False
    optional: bool = False
    endless: bool = False


Alternatives = list[list[Element]]


@dataclass
class Grammar:
    """What :func:`read_grammar` found.

    Attributes:
        rules: alternatives by name, each a sequence; those in parentheses have names that begin with "(".
        tokens: texts in angle brackets, each of which has to be one token of the vocabulary.
    """

    rules: dict[str, Alternatives] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)


def read_grammar(text: str) -> Grammar:
    """Read a grammar, and make sure that llama.cpp can.

    Raises:
        GrammarError: it does not parse, or is more than llama.cpp should be given.
    """
    if len(text) > MAX_CHARS:
        raise GrammarError(f"it has {len(text)} characters; {MAX_CHARS} are allowed")
    if "\0" in text:
        raise GrammarError(r"a null character stands in it; write \x00")
    grammar = _Reader(text).read()
    if "root" not in grammar.rules:
        raise GrammarError("it has no rule 'root'")
    for name in {element.name for element in _elements(grammar)}:
        if name is not None and name not in grammar.rules:
            raise GrammarError(f"rule {name[:80]!r} is not defined")
    nullable = _nullable(grammar)
    if any(element.endless and _is_bare(element, nullable) for element in _elements(grammar)):
        raise GrammarError(_ENDLESS)
    beginnings = _beginnings(grammar, nullable)
    if max(beginnings) > MAX_BEGINNINGS or sum(beginnings) > MAX_STEPS:
        raise GrammarError(f"it can begin in more than {MAX_BEGINNINGS} ways; join alternatives that begin alike")
    return grammar


class _Reader:
    """One reading of a text, from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.grammar = Grammar()
        self.symbols: set[str] = set()
        self.generated = 0  # rules that llama.cpp makes up, for groups and repetitions
        self.elements = 0

    def read(self) -> Grammar:
        self.skip(lines=True)
        while self.at < len(self.text):
            self.rule()
        return self.grammar

    def rule(self) -> None:
        name = self.take(_NAME, "the name of a rule")[0]
        if name in self.grammar.rules:
            raise GrammarError(f"rule {name[:80]!r} is defined twice")
        self.symbols.add(name)
        self.skip()
        if not self.text.startswith("::=", self.at):
            self.fail("::=")
        self.at += 3
        self.skip(lines=True)
        self.grammar.rules[name] = self.alternatives()
        if self.at < len(self.text):
            if self.text[self.at] not in "\r\n":
                self.fail("a new line or the end")
            self.skip(lines=True)

    def alternatives(self) -> Alternatives:
        """Those of a rule. Groups are read on a stack of their own: their depth is the client's to choose."""
        outer: list[tuple[Alternatives, int]] = []  # alternatives around, rules there were before the group
        here: Alternatives = [[]]
        while True:
            char = self.text[self.at : self.at + 1]
            if char == "|":
                self.at += 1
                self.skip(lines=True)
                here.append([])
            elif char == "(":
                if len(outer) == MAX_NESTING:
                    raise GrammarError(f"it nests more than {MAX_NESTING} parentheses")
                outer.append((here, self.n_rules))
                self.generated += 1
                here = [[]]
                self.at += 1
                self.skip(lines=True)
            elif char == ")" and outer:
                (around, before), group = outer.pop(), here
                name = f"({len(self.grammar.rules)}"
                self.grammar.rules[name] = group
                here = around
                here[-1].append(Element(name=name, rules=max(1, self.n_rules - before)))
                self.at += 1
                self.count(1)
                self.skip(lines=bool(outer))
            elif char and char in "*+?{":
                self.repeat(here[-1], lines=bool(outer))
            elif not self.terminal(here[-1], char, lines=bool(outer)):
                if outer:
                    self.fail("')'")
                return here

    def terminal(self, sequence: list[Element], char: str, *, lines: bool) -> bool:
        """A literal, class, token, any character or the name of a rule, if one stands here."""
        if char == '"':
            inner = self.take(_LITERAL, 'a text that ends in " and has none but known escapes')[1]
            size = len(_CHAR.findall(inner))
            sequence.append(Element(size=size, empty=size == 0))
        elif char == "[":
            inner = self.take(_CLASS, "a class that ends in ] and has none but known escapes")[1]
            size = len(_CHAR.findall(inner))
            sequence.append(Element(size=size, empty=size == 0))
        elif char and char in "<!":
            match = self.take(_TOKEN, "a token as <[5]> or <text>")
            if match[2] is None:
                self.grammar.tokens.add(match[1])
            elif len(match[2]) > 10 or int(match[2]) >= 2**32:
                raise GrammarError(f"{match[1][:30]} is no token id")
            sequence.append(Element())
        elif char == ".":
            self.at += 1
            sequence.append(Element())
        elif _NAME.match(char):
            name = self.take(_NAME, "a name")[0]
            self.symbols.add(name)
            sequence.append(Element(name=name))
        else:
            return False
        self.count(sequence[-1].size)
        self.skip(lines=lines)
        return True

    def repeat(self, sequence: list[Element], *, lines: bool) -> None:
        """Write the last element out, as llama.cpp does: S{m,n} is S m times, then n - m rules that may each be left out."""
        least, most = self.times(lines=lines)
        if not sequence or sequence[-1].empty:
            self.fail("something to repeat")
        element = sequence[-1]
        if most is None and element.optional:
            raise GrammarError(_ENDLESS)
        total = most or least or 1
        if element.rules * total > MAX_REPEATS:
            raise GrammarError(f"something is repeated up to {total} times; write fewer, or repeat something simpler")
        options = 1 if most is None else most - least
        self.count(max(least - 1, 0) * element.size + options * (element.size + 2))
        self.generated += options
        element.size = least * element.size + 1
        element.copies *= max(least + options, 1)
        element.rules *= total
        element.optional = element.optional or least == 0
        element.endless = element.endless or most is None
        self.skip(lines=lines)

    def times(self, *, lines: bool) -> tuple[int, int | None]:
        """At least and at most (None: without end)."""
        char = self.text[self.at]
        if char != "{":
            self.at += 1
            return (0 if char in "*?" else 1), (1 if char == "?" else None)
        start = self.at
        self.at += 1
        least = self.number(lines=lines)
        most: int | None = least
        if self.text.startswith(",", self.at):
            self.at += 1
            self.skip(lines=lines)
            most = self.number(lines=lines) if _INTEGER.match(self.text, self.at) else None
        if not self.text.startswith("}", self.at):
            self.fail("'}'")
        self.at += 1
        told = self.text[start : self.at][:40]
        if least > MAX_REPEATS:
            raise GrammarError(f"{told} repeats more than {MAX_REPEATS} times")
        if most is not None and most < least:
            raise GrammarError(f"{told} counts backwards")
        return least, None if most is None or most > MAX_REPEATS else most

    def number(self, *, lines: bool) -> int:
        self.skip(lines=lines)
        digits = self.take(_INTEGER, "a number")[0]
        self.skip(lines=lines)
        return int(digits[:9])

    @property
    def n_rules(self) -> int:
        return len(self.symbols) + self.generated

    def count(self, elements: int) -> None:
        self.elements += elements
        if self.elements > MAX_ELEMENTS:
            raise GrammarError(f"written out, it has more than {MAX_ELEMENTS} elements")

    def take(self, pattern: re.Pattern[str], what: str) -> re.Match[str]:
        match = pattern.match(self.text, self.at)
        if match is None:
            self.fail(what)
        self.at = match.end()
        return match

    def skip(self, *, lines: bool = False) -> None:
        match = (_SPACE_AND_LINES if lines else _SPACE).match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def fail(self, expected: str) -> NoReturn:
        line = self.text.count("\n", 0, self.at) + 1
        found = self.text[self.at : self.at + 20]
        where = f"not {found!r}" if found else "not its end"
        raise GrammarError(f"line {line}: {expected} was expected, {where}")


def _elements(grammar: Grammar) -> Iterator[Element]:
    for alternatives in grammar.rules.values():
        for sequence in alternatives:
            yield from sequence


def _nullable(grammar: Grammar) -> set[str]:
    """Rules that may be empty. A rule is looked at again when one that it names turns out to be."""
    users: defaultdict[str, set[str]] = defaultdict(set)
    for rule, alternatives in grammar.rules.items():
        for sequence in alternatives:
            for element in sequence:
                if element.name is not None:
                    users[element.name].add(rule)
    found: set[str] = set()
    todo = list(grammar.rules)
    while todo:
        rule = todo.pop()
        if rule in found:
            continue
        if any(all(_may_be_empty(element, found) for element in sequence) for sequence in grammar.rules[rule]):
            found.add(rule)
            todo += users[rule]
    return found


def _may_be_empty(element: Element, nullable: set[str]) -> bool:
    return element.optional or _is_bare(element, nullable)


def _is_bare(element: Element, nullable: set[str]) -> bool:
    """May what is repeated, or not, itself be empty?"""
    return element.empty or element.name in nullable


def _first(alternatives: Alternatives, nullable: set[str]) -> Iterator[Element]:
    """Elements that a rule can begin with."""
    for sequence in alternatives:
        for element in sequence:
            yield element
            if not _may_be_empty(element, nullable):
                break


def _beginnings(grammar: Grammar, nullable: set[str]) -> list[int]:
    """In how many ways each rule can begin."""
    known: dict[str, int] = {}
    for start in grammar.rules:
        if start in known:
            continue
        # Depth first, on a stack of its own: rules refer to one another as deeply as a client wants.
        path, on_path = [(start, _first(grammar.rules[start], nullable))], {start}
        while path:
            rule, rest = path[-1]
            element = next(rest, None)
            if element is None:
                total = 1
                for one in _first(grammar.rules[rule], nullable):
                    ways = 1 if one.name is None else known[one.name]
                    total += ways * (one.copies if _is_bare(one, nullable) else 1)
                known[rule] = min(total, MAX_BEGINNINGS + 1)
                path.pop()
                on_path.discard(rule)
            elif element.name is not None:
                if element.name in on_path:
                    named = "a group" if element.name.startswith("(") else f"rule {element.name[:80]!r}"
                    raise GrammarError(f"{named} begins with itself (left recursion)")
                if element.name not in known:
                    path.append((element.name, _first(grammar.rules[element.name], nullable)))
                    on_path.add(element.name)
    return list(known.values())
