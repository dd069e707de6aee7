"""JSON that carries its own SHA-256, so that one changed byte in it is noticed by who reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_SEAL = "sha256"


class BrokenSeal(ValueError):
    """The text is not what was written."""


def dump(value: Mapping[str, Any], indent: int | None = None) -> bytes:
    """The JSON of `value` with the digest of its values in one more field."""
    return json.dumps({**value, _SEAL: _digest(value)}, indent=indent).encode()


def load(text: bytes) -> dict[str, Any]:
    """What `dump` was given, as JSON has it. Raises BrokenSeal, with the reason."""
    try:
        tree = json.loads(text)
    except ValueError:
        raise BrokenSeal("is no JSON") from None
    seal = tree.pop(_SEAL, None) if isinstance(tree, dict) else None
    if seal is None:
        raise BrokenSeal("has no digest")
    if seal != _digest(tree):
        raise BrokenSeal("holds something else than was written")
    return dict(tree)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
