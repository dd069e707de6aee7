"""Passwords, keys and tokens have no place in a run: run.json, MLflow, logs and Ray's dashboard show every field and argument.

What holds one is refused by the name of its field, and its text is never repeated. Imports the standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

_URI = re.compile(r"(\w{0,12}):/+(?=(\S*))")  # the last word of its scheme, and all that follows
_PLAIN_HOST = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:\d{0,5})?")
_BUCKETS = {"s3", "s3a", "s3n"}
_USER_IS_SECRET = {"http", "https", *_BUCKETS}  # elsewhere it may be a container, as in abfss://, or a plain name
_SHAPES = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|\b(hf|gh[pousr])_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bdapi[0-9a-f]{32}"
    r"|BEGIN [A-Z ]*PRIVATE KEY"
)
_NAME = r"pass|passwd|password|pwd|secret|(api|access|account|secret|private)[_-]?key([_-]?id)?"
_IN_QUERY = re.compile(rf"[?&;#{{][\w.-]*({_NAME}|key|token|sig|signature|credential|auth)\s*=\s*[^&;\s]", re.IGNORECASE)
_FIELD = re.compile(rf"(.*[_-])?({_NAME}|(auth|access|api|hf|hub|bearer|session|tracking)[_-]?token)|token", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*TOKEN")  # of an environment; a field that ends so may be a word of a prompt
_REFERENCE = re.compile(r"\$\w+|\$\{\w+\}|")  # filled in where it is used


def found(text: str) -> str | None:
    """What a text holds that is secret, without the secret; None when it holds none."""
    before = None
    while text != before:  # as it stands, and with its %2F and the like read
        for scheme, rest in _URI.findall(text):
            if _login(scheme.lower(), rest):
                return f"a login in a URI ({scheme}://...@)"
        if _SHAPES.search(text):
            return "what looks like a key or a token"
        if _IN_QUERY.search(text):
            return "a secret in a URI's query"
        before, text = text, unquote(text)
    return None


def _login(scheme: str, rest: str) -> bool:
    """Whether a password, or a user who is one, stands in the URI scheme://rest."""
    host, _, path = rest.partition("/")
    user, at, _ = host.rpartition("@")
    if at:
        return ":" in user or scheme in _USER_IS_SECRET
    plain = ":" not in host if scheme in _BUCKETS else _PLAIN_HOST.fullmatch(host)
    return "@" in path and not plain  # the secret itself has a slash, as AWS's may


def in_tree(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, what it holds) of every secret in tables and lists of a config."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            path = f"{field}.{key}" if field else str(key)
            if found(str(key)):
                yield field or "a key", "what looks like a secret in a key's name"
            elif isinstance(inner, str) and _named_secret(str(key)) and not _REFERENCE.fullmatch(inner):
                yield path, "a secret, by its name"
            else:
                yield from in_tree(inner, path)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from in_tree(inner, field)
    elif isinstance(value, str) and (what := found(value)):
        yield field, what


def _named_secret(key: str) -> bool:
    last = key.rpartition(".")[2]  # of a dotted path
    return bool(_FIELD.fullmatch(last) or _VARIABLE.fullmatch(last))


def fault(field: str, what: str) -> str:
    """The one sentence about a secret in `field`."""
    return (
        f"{field}: holds {what}; take it out, as run.json, MLflow and logs show it: credentials come from the environment or"
        " the role of the nodes alone, see docs/clusters.md"
    )


def refuse(text: object, field: str) -> None:
    """Raise ValueError, naming the field, when a text holds a secret."""
    if what := found(str(text)):
        raise ValueError(fault(field, what))


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Raise ValueError when an argument of a command line holds a secret; it is named by its option, field or place."""
    for place, text in enumerate(arguments):
        option = arguments[place - 1] if place and arguments[place - 1].startswith("-") else f"argument {place + 1}"
        name, equals, value = text.partition("=")
        if equals and re.fullmatch(r"[\w.-]+", name) and not found(name):
            for field, what in in_tree({name: value}):
                raise ValueError(fault(field, what))
        else:
            refuse(text, option)
