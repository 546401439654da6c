"""Packs a bundle to give away: a folder as Hugging Face takes it, and a zip as MONAI's ``download`` takes it."""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import version_leq

from memnet import __version__
from memnet.whole_files import whole_file
from memnet.workflow.checkpoints import load_weights

__all__ = ["add_parser", "pack_bundle"]

_CARD = PurePosixPath("docs/README.md")
_WEIGHTS = PurePosixPath("models/model.pt")
_REQUIRED = ("LICENSE", "configs/metadata.json", "configs/inference.json", "configs/logging.conf", str(_CARD))
_LINK = re.compile(r"\[(?P<text>[^]\n]*)\]\((?P<target>[^)\s]+)\)")


def pack_bundle(
    bundle: str | Path, output_dir: str | Path, ckpt_path: str | Path | None = None, wheel: str | Path | None = None
) -> tuple[Path, Path]:
    """Pack a bundle's license, configs, documents and the weights that its configs name, and nothing else of its folder.

    The folder is a whole bundle, with the model card that Hugging Face shows as ``README.md`` at its top; the zip holds that
    folder, and is the same byte for byte whenever the files are. In the packed documents links within the bundle hold; what
    links out of it, to memnet's own documents, becomes text.

    Args:
        bundle: the bundle's folder.
        output_dir: gets ``<name>/`` and ``<name>_v<version>.zip``; made if missing.
        ckpt_path: weights to ship rather than the bundle's ``models/model.pt``, such as a training's ``model_best.pt``.
        wheel: wheel of memnet to ship along, so that who takes the bundle needs nothing else of memnet.

    Returns:
        The folder and the zip.

    Raises:
        ValueError: a file is missing, the weights do not fit, the metadata do not say which memnet is needed, the card has no
            front matter, a link leads nowhere, or the folder is there already.
    """
    bundle, output_dir = Path(bundle).resolve(), Path(output_dir)
    missing = [name for name in _REQUIRED if not (bundle / name).is_file()]
    if missing:
        raise ValueError(f"{bundle}: no bundle to pack, {', '.join(missing)} missing")
    metadata = _metadata(bundle)
    weights = Path(ckpt_path) if ckpt_path else bundle / _WEIGHTS
    _require_weights(bundle, weights)
    contents = _contents(bundle)
    contents[_WEIGHTS] = weights
    if wheel:
        contents[PurePosixPath(Path(wheel).name)] = _require_wheel(Path(wheel))
    card = _card(bundle, contents)

    folder, archive = output_dir / bundle.name, output_dir / f"{bundle.name}_v{metadata['version']}.zip"
    if folder.exists():
        raise ValueError(f"{folder}: is there already; remove it, or give another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".partial-") as partial:
        target = Path(partial) / bundle.name
        for name, source in contents.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if name.suffix == ".md":
                (target / name).write_text(_mended(bundle, name, name.parent, contents), encoding="utf-8")
            else:
                shutil.copyfile(source, target / name)
        (target / "README.md").write_text(card, encoding="utf-8")
        with whole_file(archive) as zipped:
            _zip(target, zipped)
        target.rename(folder)
    return folder, archive


def add_parser(commands: Any) -> None:
    """Add the command ``pack`` to the subparsers of the command line."""
    parser = commands.add_parser("pack", help="a bundle as a zip for MONAI's download and a folder for Hugging Face")
    parser.add_argument("--bundle", required=True, help="folder of the bundle")
    parser.add_argument("--output_dir", default="packed", help="gets the folder and the zip")
    parser.add_argument("--ckpt_path", help="weights other than the bundle's own, such as a training's model_best.pt")
    parser.add_argument("--wheel", help="wheel of memnet to ship along")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    for path in pack_bundle(arguments.bundle, arguments.output_dir, arguments.ckpt_path, arguments.wheel):
        print(path)


def _metadata(bundle: Path) -> dict[str, Any]:
    file = bundle / "configs" / "metadata.json"
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    wanted = metadata.get("required_packages_version", {}).get("memnet")
    if wanted is None or not version_leq(wanted, __version__):
        found = "no memnet" if wanted is None else f"memnet {wanted}"
        raise ValueError(
            f"{file}: required_packages_version names {found}, but the bundle was made with memnet {__version__}"
        )
    return metadata


def _require_weights(bundle: Path, weights: Path) -> None:
    """Refuse weights that the network does not take, that want a GPU, or with which a training's other states come along."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    load_weights(parser.get_parsed_content("network_def"), weights)
    places: set[str] = set()

    def stay(storage: Any, place: str) -> Any:
        places.add(place)
        return storage

    state = torch.load(weights, map_location=stay, weights_only=True)
    if places - {"cpu"}:
        raise ValueError(
            f"{weights}: saved on {', '.join(sorted(places))}, without which it cannot be exported; save it anew by "
            f"torch.save(torch.load({str(weights)!r}, map_location='cpu'), {str(weights)!r})"
        )
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{weights}: holds the state of a training, too; give its model_best.pt")


def _require_wheel(wheel: Path) -> Path:
    if not wheel.is_file() or not wheel.name.startswith(f"memnet-{__version__}-") or wheel.suffix != ".whl":
        raise ValueError(f"{wheel}: no wheel of memnet {__version__}; make one by `python -m pip wheel --no-deps .`")
    return wheel


def _contents(bundle: Path) -> dict[PurePosixPath, Path]:
    configs = "".join(file.read_text(encoding="utf-8") for file in bundle.glob("configs/*.json"))
    files = [
        bundle / "LICENSE",
        *(f for p in ("configs/*.json", "configs/*.conf", "docs/**/*") for f in bundle.glob(p)),
        *(f for f in bundle.glob("models/*.pt") if f"/models/{f.name}'" in configs),  # such as a second network's
    ]
    return {PurePosixPath(f.relative_to(bundle).as_posix()): f for f in sorted(files) if f.is_file()}


def _card(bundle: Path, contents: Mapping[PurePosixPath, Path]) -> str:
    card = _mended(bundle, _CARD, PurePosixPath("."), contents)
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    keys = set(re.findall(r"^(\w+):", front[1], re.MULTILINE)) if front else set()
    if not {"license", "library_name", "tags"} <= keys:
        raise ValueError(f"{bundle / _CARD}: no model card, its front matter must tell license, library_name and tags")
    return card


def _mended(bundle: Path, name: PurePosixPath, shown_in: PurePosixPath, contents: Mapping[PurePosixPath, Path]) -> str:
    """Return a document's text with the links that hold where it will stand."""

    def mend(link: re.Match[str]) -> str:
        target, _, anchor = link["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        path = PurePosixPath(posixpath.normpath(name.parent / target))
        if path.parts[0] == "..":
            return f"{link['text']} (in memnet)"
        if path not in contents and not any(path in packed.parents for packed in contents):
            raise ValueError(f"{bundle / name}: links {link['target']}, which is not packed")
        return f"[{link['text']}]({posixpath.relpath(path, shown_in)}{'#' * bool(anchor)}{anchor})"

    return _LINK.sub(mend, (bundle / name).read_text(encoding="utf-8"))


def _zip(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(f for f in folder.rglob("*") if f.is_file()):
            # the time of no file, so that the same files make the same archive
            entry = zipfile.ZipInfo(file.relative_to(folder.parent).as_posix())
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, file.read_bytes())
