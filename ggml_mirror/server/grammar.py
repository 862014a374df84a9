"""How a request may constrain its answer: a grammar, a JSON schema, or a response format. In the end all are grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

from .body import bad, name_of
from .errors import RequestError
from .gbnf import GrammarError, read_grammar

#: Keywords of a JSON schema that llama-cpp-python writes out that many times.
_MOST = 1000  # of what llama.cpp then takes for repeated 2000 times
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_QUANTIFIER = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")


def check_grammar(text: str, param: str) -> None:
    """Refuse what llama.cpp cannot read, or what would harm it.

    Raises:
        RequestError: names ``param`` and the reason.
    """
    try:
        read_grammar(text)
    except GrammarError as error:
        raise RequestError(
            f"{param}: the grammar cannot be used: {error}", param=param, code="invalid_grammar"
        ) from None


def grammar_of_schema(schema: Any, param: str) -> str:
    """The grammar of a JSON schema, by llama-cpp-python's converter.

    Raises:
        RequestError: the schema is not one, or uses what the converter does not know; names ``param``.
    """
    if not isinstance(schema, dict):
        raise RequestError(f"{param}: a JSON schema is an object, not {type(schema).__name__}", param=param)
    for name, count in _repeats(schema):
        if count > _MOST:
            raise RequestError(f"{param}: {name} is {count}; at most {_MOST} can be enforced", param=param)
    try:
        text: str = json_schema_to_gbnf(json.dumps(schema))
    except RecursionError:
        raise RequestError(
            f"{param}: the JSON schema has too many optional properties or nests too deeply", param=param
        ) from None
    except Exception as error:  # the converter's own assertions, and whatever a malformed schema makes it do
        reason = str(error) if isinstance(error, (AssertionError, ValueError)) and str(error) else type(error).__name__
        raise RequestError(f"{param}: this JSON schema cannot be enforced: {reason[:300]}", param=param) from None
    check_grammar(text, param)
    return text


def _repeats(schema: Any) -> Iterator[tuple[str, int]]:
    todo = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo.extend(node)
        elif isinstance(node, dict):
            todo.extend(node.values())
            for name in _COUNTS:
                if isinstance(node.get(name), int):
                    yield name, node[name]
            if isinstance(node.get("pattern"), str):
                for match in _QUANTIFIER.finditer(node["pattern"]):
                    for number in match.groups():
                        if number:
                            yield f"the pattern's {match[0]}", int(number[:9])


def take_constraint(body: dict[str, Any]) -> str:
    """A grammar, a JSON schema or a response format: in the end all is a grammar that llama.cpp can be given.

    Returns:
        The field that it came from.
    """
    wanted = [name for name in ("grammar", "json_schema", "response_format") if body.get(name) not in (None, "")]
    grammar = body.pop("grammar", "")
    schema = body.pop("json_schema", None)
    answer = body.pop("response_format", None)
    if isinstance(answer, dict) and answer.get("type") == "text":
        wanted.remove("response_format")
        answer = None
    if len(wanted) > 1:
        raise bad(wanted[1], f"not together with {wanted[0]}")
    if not wanted:
        return "grammar"
    param = wanted[0]
    if param == "grammar":
        if not isinstance(grammar, str):
            raise bad(param, f"a grammar is text, not {name_of(grammar)}")
        check_grammar(grammar, param)
        body["grammar"] = grammar
    elif param == "json_schema":
        body["grammar"] = grammar_of_schema(schema, param)
    else:
        body["grammar"] = _grammar_of_format(answer)
    return param


def _grammar_of_format(answer: Any) -> str:
    kind = answer.get("type") if isinstance(answer, dict) else None
    if kind == "json_object":
        if answer.get("schema") is None:
            return str(JSON_GBNF)
        return grammar_of_schema(answer["schema"], "response_format.schema")
    if kind == "json_schema":
        inner = answer.get("json_schema")
        if not isinstance(inner, dict):
            raise bad("response_format.json_schema", f"an object was expected, not {name_of(inner)}")
        return grammar_of_schema(inner.get("schema"), "response_format.json_schema.schema")
    raise bad("response_format.type", "one of text, json_object, json_schema was expected")
