"""Tells how a result was made, so that it can be made again: command, bundle, weights, versions, machine."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["bundle_metadata", "provenance"]

_PACKAGES = ("memnet", "torch", "monai", "pytorch-ignite", "numpy", "nibabel")


def bundle_metadata(bundle_root: str | Path) -> dict[str, Any]:
    """Return the content of a bundle's ``configs/metadata.json``, nothing where it has none that can be read."""
    try:
        content = json.loads((Path(bundle_root) / "configs" / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def provenance(
    bundle_root: str | Path, network: nn.Module, weights: str | Path | None, device: torch.device | str
) -> dict[str, str]:
    """Describe the run of this process.

    Args:
        bundle_root: the bundle's folder.
        network: the network that was run.
        weights: the file of its weights.
        device: where it was run.

    Returns:
        What a person reads, by what it is called.
    """
    metadata, device = bundle_metadata(bundle_root), torch.device(device)
    told = (getattr(module, "memory", None) for module in network.modules())
    memory = next((strategy for strategy in told if isinstance(strategy, str)), None)
    n_parameters = sum(p.numel() for p in network.parameters())
    made = {
        "command": _command(),
        "bundle": f"{Path(bundle_root).name} {metadata.get('version', 'of no version')}",
        "network": f"{type(network).__name__}, {n_parameters:,} parameters",
        "memory strategy": f"{memory} in training; here nothing is kept" if memory else "none",
    }
    if weights is not None and Path(weights).is_file():
        made["weights"] = f"{weights}, SHA-256 {_digest(weights)}"
    made["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {_processor()}"
    made["peak memory"] = _peak(device)
    made["versions"] = ", ".join([f"Python {platform.python_version()}", *_versions()])
    made["system"] = f"{platform.system()} {platform.machine()}"
    return made


def _command() -> str:
    """Return what was typed, as far as a process knows; a script is named alone, since its arguments are its own."""
    package = Path(sys.argv[0])
    if package.name == "__main__.py":
        parts = package.parent.parts
        # the last one: a clone is called memnet, too, and may hold the environment
        start = max((i for i, part in enumerate(parts) if part in ("monai", "memnet")), default=len(parts) - 1)
        return " ".join(map(_quoted, ["python", "-m", ".".join(parts[start:]), *sys.argv[1:]]))
    return f"called from {package.name or 'Python'}"


def _quoted(word: str) -> str:
    # lists of files, "['a','b']", as people type them; shlex closes and opens its quotes at each of theirs
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def _digest(file: str | Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _processor() -> str:
    n_threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()}, {n_threads} thread{'s' * (n_threads != 1)}"


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the device"
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{kilobytes * (1 if sys.platform == 'darwin' else 1024) / 2**30:.2f} GiB of the process"


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found
