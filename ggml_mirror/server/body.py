"""Reading the body of a request, and saying what is wrong with a field of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from .errors import RequestError

MAX_DEPTH = 64


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        RequestError: not JSON, not an object, too deep, or with values that JSON does not have (NaN, lone surrogates).
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 text (byte {error.start})", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}", code="invalid_json"
        ) from None
    except RecursionError:
        raise RequestError(f"the body nests more than {MAX_DEPTH} levels", code="invalid_json") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, not {name_of(body)}", code="invalid_json")
    _check_values(body)
    return body


def validate(cls: type[BaseModel], body: dict[str, Any]) -> Any:
    try:
        return cls.model_validate(body)
    except ValidationError as error:
        raise of_validation_error(error.errors(include_url=False), body) from None


def of_validation_error(errors: Iterable[Any], body: Any = None) -> RequestError:
    """The one of pydantic's errors that leads deepest into the request: alternatives of a union each add some."""
    # Of those, the alternatives that were not meant say that another literal (a role, a type) was expected.
    best = max(errors, key=lambda e: (len(_path(e["loc"], body)), e["type"] != "literal_error"))
    path = _path(best["loc"], body)
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    return RequestError(f"{param or 'body'}: {best['msg']}", param=param or None)


def _path(loc: Iterable[Any], body: Any) -> list[Any]:
    """Steps of pydantic's location that are in the request; the others are names of types."""
    if body is None:
        return [step for step in loc if step != "body"]
    steps = list(loc)
    path, value = [], body
    for i, step in enumerate(steps):
        if isinstance(value, dict) and (step in value or i == len(steps) - 1):
            path.append(step)
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            path.append(step)
            value = value[step]
    return path


def bad(param: str, what: str) -> RequestError:
    return RequestError(f"{param}: {what}", param=param)


def name_of(value: Any) -> str:
    """JSON's word for a type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _check_values(body: dict[str, Any]) -> None:
    """No value lies too deep, and every text can be written as UTF-8."""
    todo: list[tuple[Any, str, int]] = [(value, name, 1) for name, value in body.items()]
    for name in body:
        _check_text(name, "body")
    while todo:
        value, at, depth = todo.pop()
        if isinstance(value, str):
            _check_text(value, at)
        elif isinstance(value, dict | list):
            if depth >= MAX_DEPTH:
                raise RequestError(
                    f"{at.split('.')[0][:80]}: nests more than {MAX_DEPTH} levels", param=at.split(".")[0][:80]
                )
            if isinstance(value, list):
                todo.extend(
                    (inner, f"{at}[{i}]", depth + 1) for i, inner in enumerate(value) if not isinstance(inner, int)
                )
            else:
                for key, inner in value.items():
                    _check_text(key, at)
                    todo.append((inner, f"{at}.{key}", depth + 1))


def _check_text(text: str, at: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{at[:200]}: half of a surrogate pair is not text", param=at[:200]) from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is beyond any number")
    return value
