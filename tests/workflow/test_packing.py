"""A packed bundle is whole, holds nothing else, and works where it is unpacked."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_cases import SMALL, TISSUE, WARNINGS, run
from conftest import BUNDLES, phantom

from memnet import __version__
from memnet.cli import main
from memnet.workflow.packing import pack_bundle

pytestmark = WARNINGS


@pytest.fixture
def bundle(tmp_path: Path, random_weights: Callable[..., Path]) -> Path:
    """The tissue bundle with a small network, and with what a training leaves in its folder."""
    target = tmp_path / TISSUE.name
    shutil.copytree(TISSUE.folder, target, ignore=shutil.ignore_patterns("eval", "*.pt"))
    config = target / "configs" / "inference.json"
    content = json.loads(config.read_text())
    content["network_def"] |= {"channels": SMALL["network_def#channels"], "n_levels": SMALL["network_def#n_levels"]}
    config.write_text(json.dumps({**content, "roi_size": SMALL["roi_size"], "device": "cpu"}))
    for name in ("models/model.pt", "models/model_last.pt", "eval/model_best.pt"):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copy(random_weights(TISSUE.folder, **SMALL), target / name)
    return target


def test_segments_where_monai_unpacks_it(
    bundle: Path, write_nifti: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", "--bundle", str(bundle), "--output_dir", str(tmp_path / "packed")]) == 0
    folder, archive = map(Path, capsys.readouterr().out.split())
    assert archive.name == f"{TISSUE.name}_v{__version__}.zip"
    monai.bundle.download(TISSUE.name, url=archive.as_uri(), bundle_dir=tmp_path / "elsewhere", progress=False)
    unpacked = tmp_path / "elsewhere" / TISSUE.name
    files = {f.relative_to(unpacked).as_posix(): f.read_bytes() for f in unpacked.rglob("*") if f.is_file()}
    assert files == {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert {name for name in files if name.endswith(".pt")} == {"models/model.pt"}
    assert {"README.md", "LICENSE", "configs/metadata.json", "docs/README.md"} <= files.keys()

    scan = write_nifti("scan.nii.gz", phantom()[0])
    maps = []
    for place in (bundle, unpacked):
        run(place, "run", "inference.json", image=str(scan), output_dir=str(place / "out"))
        maps.append(np.asarray(nib.load(place / "out" / "scan_tissue.nii.gz").dataobj))
    assert maps[0].any()
    np.testing.assert_array_equal(*maps)
    network = monai.bundle.load(TISSUE.name, bundle_dir=str(unpacked.parent), workflow_type="inference")
    for key, value in torch.load(bundle / "models" / "model.pt", weights_only=True).items():
        assert torch.equal(network.state_dict()[key].cpu(), value), key


def test_weights_that_want_a_gpu_are_refused(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = bundle / "models" / "model.pt"
    state = torch.load(weights, weights_only=True)
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
        torch.save(state, weights)
    with pytest.raises(ValueError, match=r"model\.pt: saved on cuda:1, .* map_location='cpu'"):
        pack_bundle(bundle, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_same_files_make_the_same_archive(bundle: Path, tmp_path: Path) -> None:
    archives = [pack_bundle(bundle, tmp_path / name)[1].read_bytes() for name in ("first", "second")]
    assert archives[0] == archives[1]


def test_second_networks_weights_come_along(shipped: Callable[[Path], Path], tmp_path: Path) -> None:
    bundle = shipped(BUNDLES / "brain_dti_superres_iqt")
    folder, _ = pack_bundle(bundle, tmp_path / "packed")
    assert (folder / "models" / "espcn.pt").read_bytes() == (bundle / "models" / "espcn.pt").read_bytes()


@pytest.mark.parametrize("name", sorted(p.name for p in BUNDLES.iterdir() if p.is_dir()))
def test_links_hold_in_every_packed_document(name: str, shipped: Callable[[Path], Path], tmp_path: Path) -> None:
    folder, _ = pack_bundle(shipped(BUNDLES / name), tmp_path / "packed")
    documents = [folder / "README.md", *folder.glob("docs/**/*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                linked = (document.parent / target).resolve()
                assert linked.exists() and linked.is_relative_to(folder.resolve()), f"{document.name}: {target}"
    card, original = (f.read_text() for f in (folder / "README.md", BUNDLES / name / "docs" / "README.md"))
    assert card.split("---")[1] == original.split("---")[1]
    assert "(in memnet)" in card or "../../../" not in original


def test_ships_other_weights_and_the_wheel(bundle: Path, tmp_path: Path) -> None:
    trained = {k: v + 1 for k, v in torch.load(bundle / "models" / "model.pt", weights_only=True).items()}
    torch.save(trained, tmp_path / "model_best.pt")
    wheel = tmp_path / f"memnet-{__version__}-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    _, archive = pack_bundle(bundle, tmp_path / "packed", tmp_path / "model_best.pt", wheel)
    with zipfile.ZipFile(archive) as packed:
        assert packed.read(f"{bundle.name}/models/model.pt") == (tmp_path / "model_best.pt").read_bytes()
        assert packed.read(f"{bundle.name}/{wheel.name}") == b"wheel"


def _metadata(bundle: Path, needed: dict[str, str]) -> None:
    file = bundle / "configs" / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "required_packages_version": needed}))


def _weights(bundle: Path, content: dict[str, object]) -> None:
    torch.save(content, bundle / "models" / "model.pt")


def _append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no license": (lambda b: (b / "LICENSE").unlink(), "no bundle to pack, LICENSE missing"),
    "no weights": (lambda b: (b / "models" / "model.pt").unlink(), "model.pt: no such weights file"),
    "other weights": (lambda b: _weights(b, {"a": torch.ones(1)}), "do not fit"),
    "whole training": (
        lambda b: _weights(b, {"model": torch.load(b / "models" / "model.pt", weights_only=True), "epoch": 3}),
        "give its model_best.pt",
    ),
    "says nothing of memnet": (lambda b: _metadata(b, {}), "names no memnet"),
    "newer memnet": (lambda b: _metadata(b, {"memnet": "99.0"}), "names memnet 99.0"),
    "no model card": (lambda b: (b / "docs" / "README.md").write_text("# Tissue\n"), "no model card"),
    "dead link": (lambda b: _append(b / "docs" / "scores.md", "[a](b.md)"), "links b.md, which is not packed"),
    "link to what is left out": (
        lambda b: _append(b / "docs" / "README.md", "[a](../models/model_last.pt)"),
        "links ../models/model_last.pt, which is not packed",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DEFECTS.values(), ids=DEFECTS)
def test_defect_is_refused_and_nothing_left(
    damage: Callable[[Path], object], message: str, bundle: Path, tmp_path: Path
) -> None:
    damage(bundle)
    with pytest.raises(ValueError, match=re.escape(message)):
        pack_bundle(bundle, tmp_path / "packed")
    assert not list((tmp_path).glob("packed/*"))


def test_keeps_what_was_packed_before(bundle: Path, tmp_path: Path) -> None:
    folder, _ = pack_bundle(bundle, tmp_path / "packed")
    with pytest.raises(ValueError, match="is there already"):
        pack_bundle(bundle, tmp_path / "packed")
    with pytest.raises(ValueError, match="no wheel of memnet"):
        pack_bundle(bundle, tmp_path / "other", wheel=tmp_path / "memnet-0.0.1-py3-none-any.whl")
    assert folder.is_dir() and not (tmp_path / "other").exists()


def test_archive_that_points_out_of_its_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    """MONAI unpacks; memnet reads no archive itself."""
    _, archive = pack_bundle(bundle, tmp_path / "packed")
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(f"{bundle.name}/../../outside.txt", "")
    with pytest.raises(ValueError, match="Unsafe path"):
        monai.bundle.download(bundle.name, url=archive.as_uri(), bundle_dir=tmp_path / "elsewhere", progress=False)
    assert not list(tmp_path.rglob("outside.txt"))
