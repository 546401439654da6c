"""Options and fixtures of the whole suite."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    # ignite imports what torch has deprecated; as an error it would leave MONAI without ignite for the whole session
    warnings.simplefilter("ignore")
    import ignite.handlers  # noqa: F401
    import monai.bundle  # noqa: F401
    import monai.engines  # noqa: F401
    import monai.handlers  # noqa: F401

from monai.bundle import ConfigParser  # noqa: E402

BUNDLES = Path(__file__).parent.parent / "bundles"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tests that take one: cpu or cuda")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test; a test is skipped where it is absent."""
    name = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def data_dir() -> Path:
    """Real data, where the environment variable MEMNET_DATA says it lies."""
    folder = Path(os.environ.get("MEMNET_DATA", ""))
    if not os.environ.get("MEMNET_DATA") or not folder.is_dir():
        pytest.skip("real data needed: set MEMNET_DATA to their folder")
    return folder


def phantom(shape: tuple[int, int, int] = (20, 24, 22), seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return T1, T2 (float32) and tissue labels (uint8, 0 to 3) of nested ellipsoids."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    radius = np.sqrt((grid**2).sum(0)) * rng.uniform(0.95, 1.05)
    labels = np.select([radius < 0.4, radius < 0.6, radius < 0.8], [3, 2, 1], 0).astype(np.uint8)
    t1 = np.array([0, 200, 500, 900])[labels] + rng.normal(0, 20, shape) * (labels > 0)
    t2 = np.array([0, 900, 500, 300])[labels] + rng.normal(0, 20, shape) * (labels > 0)
    return t1.astype(np.float32), t2.astype(np.float32), labels


@pytest.fixture
def write_nifti(tmp_path: Path) -> Callable[..., Path]:
    """Write an array as a NIfTI file in the test's folder."""

    def write(name: str, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture(scope="session")
def iseg_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small subjects as iSeg-2019 distributes them: Analyze pairs, labels 0, 10, 150 and 250."""
    folder = tmp_path_factory.mktemp("iseg")
    for number in (1, 2, 10):
        t1, t2, labels = phantom(seed=number)
        values = np.array([0, 10, 150, 250], dtype=np.uint8)[labels]
        for kind, array in {"T1": t1.astype(np.int16), "T2": t2.astype(np.int16), "label": values}.items():
            # the distributed files have a fourth axis of length one
            image = nib.AnalyzeImage(array[..., None], np.diag([-1.0, 1, 1, 1]))
            nib.save(image, folder / f"subject-{number}-{kind}.hdr")
    return folder


@pytest.fixture
def datalist(tmp_path: Path, write_nifti: Callable[..., Path]) -> Path:
    """A Decathlon datalist of three small cases, one of them without a T2."""
    cases = []
    for number in range(3):
        t1, t2, labels = phantom(seed=number)
        for kind, array in {"t1": t1, "t2": t2, "label": labels}.items():
            write_nifti(f"case{number}/{kind}.nii.gz", array)
        images = [f"case{number}/t1.nii.gz", f"case{number}/t2.nii.gz" if number else None]
        cases.append({"image": images, "label": f"case{number}/label.nii.gz"})
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": cases}))
    return path


@pytest.fixture(scope="session")
def brats_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small cases as BraTS 2020 distributes them: a folder each, four modalities, labels 0, 1, 2 and 4."""
    folder = tmp_path_factory.mktemp("brats")
    for number in (1, 2, 3):
        t1, t2, labels = phantom(seed=number)
        case = f"BraTS20_Training_{number:03d}"
        volumes = {"t1": t1, "t1ce": 2 * t1, "t2": t2, "flair": t2[::-1], "seg": np.array([0, 2, 1, 4])[labels]}
        (folder / case).mkdir()
        for kind, values in volumes.items():
            nib.save(nib.Nifti1Image(values.astype(np.int16), np.eye(4)), folder / case / f"{case}_{kind}.nii.gz")
    return folder


@pytest.fixture
def random_weights(tmp_path: Path) -> Callable[..., Path]:
    """Write weights of a bundle's network, small where the overrides say so."""

    def make(bundle: Path, **overrides: Any) -> Path:
        parser = ConfigParser()
        parser.read_config(str(bundle / "configs" / "inference.json"))
        parser.update(overrides)
        path = tmp_path / "weights" / "model.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save(parser.get_parsed_content("network_def").state_dict(), path)
        return path

    return make


@pytest.fixture
def label_maps(write_nifti: Callable[..., Path]) -> Path:
    """Three small label maps with FreeSurfer's values: background, ventricle, cortex, white matter, skin."""
    for number in range(3):
        values = np.array([0, 4, 3, 2], dtype=np.int16)[phantom(seed=number)[2]]
        values[2:-2, 2:-2, 2:-2][values[2:-2, 2:-2, 2:-2] == 0] = 516
        path = write_nifti(f"label_maps/{number}.nii.gz", values)
    return path.parent


@pytest.fixture
def shipped(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Copy a bundle elsewhere, with random weights where it ships none yet."""

    def copy(bundle: Path) -> Path:
        target = tmp_path / "elsewhere" / bundle.name
        shutil.copytree(bundle, target, ignore=shutil.ignore_patterns("eval"))
        model = target / "models" / "model.pt"
        if not model.exists():
            parser = ConfigParser()
            parser.read_config(str(target / "configs" / "inference.json"))
            model.parent.mkdir(exist_ok=True)
            torch.save(parser.get_parsed_content("network_def").state_dict(), model)
        return target

    yield copy
