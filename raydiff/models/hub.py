"""A hub id, answered in seconds: from the local cache, else by one question to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SECONDS = 5.0  # that the hub has for an answer


def cached(name: str, revision: str | None = None) -> Path | None:
    """The snapshot of a hub id in the local cache, whole or in part; None when there is none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "model_index.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def model_index(name: str, revision: str | None = None) -> dict[str, Any]:
    """The model_index.json of a hub id, asked for once.

    Raises ConnectionError when the hub does not answer or must not be asked, FileNotFoundError when it has no such file,
    PermissionError when it wants a token, ValueError when the answer is no JSON object.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    at = f"{name}@{revision}" if revision else name
    if constants.is_offline_mode():
        raise ConnectionError(f"{at!r} is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids to ask the hub: unset it")
    url = hf_hub_url(name, "model_index.json", revision=revision, endpoint=constants.ENDPOINT)
    try:
        answer = get_session().get(url, headers=build_hf_headers(), timeout=SECONDS, follow_redirects=True)
    except Exception as error:  # httpx's, by whatever name this version of huggingface_hub imports it
        reason = str(error) or type(error).__name__
        raise ConnectionError(
            f"{at!r} is not in the Hugging Face cache, and {constants.ENDPOINT} cannot be reached ({reason}): give a folder, or"
            " download it where there is a network"
        ) from None
    if answer.status_code in (401, 403):
        raise PermissionError(f"the hub shows {at!r} to no one without access: is it spelt right, and HF_TOKEN set?")
    if answer.status_code == 404:
        raise FileNotFoundError(f"the hub has no {at!r} with a model_index.json: it must be a diffusers pipeline")
    if answer.status_code != 200:
        raise ConnectionError(
            f"{constants.ENDPOINT} answers {answer.status_code} for {at!r}: try again later, or give a folder"
        )
    try:
        index = json.loads(answer.text)
    except ValueError:
        index = None
    if not isinstance(index, dict):
        raise ValueError(f"the model_index.json of {at!r} on the hub is no JSON object")
    return index


def reachable(name: str, revision: str | None = None) -> bool:
    """Whether the hub answers for a hub id within seconds."""
    try:
        model_index(name, revision)
    except ConnectionError:
        return False
    return True
