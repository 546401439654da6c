"""Reads and writes the overrides of a config as people type them."""

from __future__ import annotations

import json
import shlex
from typing import Any

__all__ = ["read_override", "write_override"]


def read_override(text: str) -> tuple[str, Any]:
    """Take ``ID=VALUE`` apart; the value is JSON, or else the word that it is; ``True`` and ``None`` are JSON's, too.

    Raises:
        ValueError: it has no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is no override; write ID=VALUE")
    try:
        return key, json.loads(value.lower() if value.lower() in ("true", "false", "null") else value)
    except json.JSONDecodeError:
        return key, None if value.lower() == "none" else value


def write_override(key: str, value: Any) -> str:
    """Return an override as MONAI's command line takes it, quoted for a shell: ``--patch_size "[64, 64, 32]"``."""
    text = value if isinstance(value, str) else json.dumps(value)
    if text == shlex.quote(text):
        return f"--{key} {text}"
    return f"--{key} {shlex.quote(text)}" if set(text) & set('"$`\\!') else f'--{key} "{text}"'
