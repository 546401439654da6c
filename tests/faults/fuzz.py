"""Damages every kind of input and sees what a bundle's run makes of it: ``python tests/faults/fuzz.py --cases 2400``."""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import nibabel as nib
import numpy as np
import torch
from bundle_cases import SMALL, TISSUE, run
from conftest import BUNDLES, phantom
from dicom_files import write_enhanced, write_series

from memnet.bundle import input_error
from memnet.datasets.ismrmrd_writer import write_ismrmrd
from memnet.mri.fourier import image_to_kspace
from memnet.mri.simulated_scans import simulate_volume
from memnet.workflow.checkpoints import load_weights

LONGEST = 30.0  # seconds
EXTREMES = [
    *(np.array(value, dtype).tobytes() for dtype in ("<i2", ">i2", "<i4", "<i8") for value in (0, -1, 2**15 - 1)),
    *(
        np.array(value, dtype).tobytes()
        for dtype in ("<f4", "<f8")
        for value in (0, -1e30, 1e30, np.nan, np.inf, 1e-38)
    ),
]
AFFINE = np.array([[-0.9, 0, 0, 20], [0, 1.1, 0, -30], [0, 0, 1.3, 5], [0, 0, 0, 1]], dtype=float)
SMALL_KNEE = {"n_unrolls": 1, "channels": 4, "n_coils": 2, "calibration": 8, "device": "cpu", "report": False}


class Hang(BaseException):
    """A case that takes too long."""


class Brightness(torch.nn.Module):
    """Stands in for a trained network of the tissue bundle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor([0, 0.25, 0.55, 1.0]).reshape(1, 4, 1, 1, 1)
        return -100 * (x.amax(1, keepdim=True) - levels).abs()


@dataclass(frozen=True)
class Kind:
    """A kind of file: how one is made whole in a folder, where its header ends, and who reads it.

    ``make`` returns the file to damage; ``feed`` gets that file and a folder for outputs.
    """

    make: Callable[[Path], Path]
    feed: Callable[[Path, Path], Any]
    header: int = 400
    is_compressed: bool = False


def segment(**scan: str) -> Callable[[Path, Path], Any]:
    def feed(file: Path, out: Path) -> None:
        given = {key: str(file.parent if value == "folder" else file) for key, value in scan.items()}
        options = {**SMALL, **given, "network_def": Brightness(), "handlers": [], "amp": False}
        run(TISSUE.folder, "run", "inference.json", **options, output_dir=str(out))

    return feed


def reconstruct(file: Path, out: Path) -> None:
    options = {**SMALL_KNEE, "image": str(file), "output_dir": str(out)}
    # the weights that the network begins with
    handlers = [{"_target_": "memnet.workflow.reporting.ImageReport"}]
    run(BUNDLES / "knee_mri_recon_mel", "run", "inference.json", **options, handlers=handlers)


def save_volume(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        values = np.rint(phantom((12, 11, 10))[0]).astype(np.int16)
        kind = nib.AnalyzeImage if name.endswith(".hdr") else nib.Nifti1Image
        nib.save(kind(values, np.diag([1.0, 1.2, 0.9, 1]) if kind is nib.Nifti1Image else None), folder / name)
        return folder / name

    return make


def save_slices(folder: Path) -> Path:
    values = np.rint(phantom((12, 11, 6))[0]).astype(np.int16)
    return sorted(write_series(folder, values, AFFINE).iterdir())[2]


def save_frames(folder: Path) -> Path:
    values = np.rint(phantom((12, 11, 6))[0]).astype(np.int16)
    return write_enhanced(folder / "frames.dcm", values, AFFINE, range(6))


def save_raw_data(folder: Path) -> Path:
    magnitude = torch.from_numpy(phantom((6, 14, 12))[0])
    kspace = image_to_kspace(simulate_volume(magnitude, 2, 0.01), (1,)).numpy()[None]
    write_ismrmrd(folder / "scan.h5", kspace, np.ones((1, 14, 12), bool), AFFINE)
    return folder / "scan.h5"


def save_datalist(folder: Path) -> Path:
    for name in ("a_T1.nii.gz", "b_T2.nii.gz"):
        save_volume(name)(folder)
    content = {"test": [{"image": "a_T1.nii.gz"}, {"image": [None, str(folder / "b_T2.nii.gz")]}], "name": "ä"}
    (folder / "datalist.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder / "datalist.json"


def save_weights(folder: Path) -> Path:
    torch.save(torch.nn.Linear(3, 2).state_dict(), folder / "model.pt")
    return folder / "model.pt"


def load(file: Path, out: Path) -> None:
    load_weights(torch.nn.Linear(3, 2), file)


KINDS = {
    "NIfTI": Kind(save_volume("scan_T1.nii"), segment(image="file"), 352),
    "NIfTI, compressed": Kind(save_volume("scan_T1.nii.gz"), segment(image="file"), 352, is_compressed=True),
    "Analyze": Kind(save_volume("scan_T1.hdr"), segment(image="file"), 348),
    "DICOM, classic": Kind(save_slices, segment(image="folder"), 900),
    "DICOM, enhanced": Kind(save_frames, segment(image="file"), 2000),
    "HDF5 (ISMRMRD)": Kind(save_raw_data, reconstruct, 6000),
    "JSON (datalist)": Kind(save_datalist, segment(datalist="file"), 100),
    "weights": Kind(save_weights, load, 1000),
}


def damage(content: bytes, header: int, rng: np.random.Generator) -> bytes:
    """Cut, flip, overwrite, remove or insert, in the header rather than behind it."""
    header = min(header, len(content) - 8)
    place = int(rng.integers(0, header if rng.random() < 0.75 else len(content) - 8))
    way, n = rng.integers(0, 6), int(rng.integers(1, 64))
    if way == 0:
        return content[: int(rng.integers(0, len(content)))]
    if way == 1:
        flipped = np.frombuffer(content, np.uint8).copy()
        for at in [place, *rng.integers(0, header, int(rng.integers(0, 4)))]:
            flipped[at] ^= 1 << int(rng.integers(0, 8))
        return flipped.tobytes()
    if way in (2, 3):
        extreme = EXTREMES[int(rng.integers(len(EXTREMES)))]
        aligned = place - place % 2
        return content[:aligned] + extreme + content[aligned + len(extreme) :]
    if way == 4:
        return content[:place] + content[place + n :]
    return content[:place] + rng.integers(0, 256, n, np.uint8).tobytes() + content[place:]


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_case(kind: Kind, folder: Path, seed: int | None) -> tuple[str, str]:
    """Damage a file, unless there is no seed, and feed it to its reader.

    Returns:
        ``refused`` in words, or ``used`` since the damage left a valid file; otherwise what should not be: ``traceback``,
        ``hang``, ``output`` after an error, ``memory``. And the words.
    """
    rng = np.random.default_rng(seed)
    source, out = folder / "in", folder / "out"
    for place in (source, out):
        shutil.rmtree(place, ignore_errors=True)
    source.mkdir(parents=True)
    file = kind.make(source)
    content = file.read_bytes()
    if seed is None:
        pass
    elif kind.is_compressed and rng.random() < 0.7:
        file.write_bytes(gzip.compress(damage(gzip.decompress(content), kind.header, rng), 1))
    else:
        file.write_bytes(damage(content, kind.header, rng))
    try:
        with at_most(LONGEST):
            kind.feed(file, out)
    except Hang:
        return "hang", ""
    except Exception as error:
        found = input_error(error)
        if found is None:
            cause: BaseException = error
            while cause.__cause__ or cause.__context__:
                cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
            return "traceback", f"{type(cause).__name__}: {cause}"
        if "out of memory" in str(found):
            return "memory", str(found)
        return ("output" if out.exists() and any(out.rglob("*.*")) else "refused"), str(found)
    return "used", ""


def fuzz(name: str, n_cases: int, seed: int, folder: Path, talk: bool = False) -> Counter[str]:
    """Run the cases of a kind of file; the counts of how they ended."""
    ends: Counter[str] = Counter()
    for case in range(seed, seed + n_cases):
        end, words = one_case(KINDS[name], folder, case)
        ends[end] += 1
        if talk and end not in ("refused", "used"):
            print(f"{name}, case {case}: {end} {words[:300]}", flush=True)
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2400, help="in all, in equal parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    gibibytes = 2**30
    resource.setrlimit(resource.RLIMIT_AS, (16 * gibibytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    share, total = -(-arguments.cases // len(arguments.kinds)), Counter[str]()
    print(
        "| input | cases | refused in words | used | traceback, hang, memory or output | seconds |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.kinds:
            begun = time.monotonic()
            ends = fuzz(name, share, arguments.seed, Path(folder), talk=True)
            wrong = share - ends["refused"] - ends["used"]
            seconds = time.monotonic() - begun
            print(f"| {name} | {share} | {ends['refused']} | {ends['used']} | {wrong} | {seconds:.0f} |", flush=True)
            total.update(ends)
    wrong = total.total() - total["refused"] - total["used"]
    print(f"| all | {total.total()} | {total['refused']} | {total['used']} | {wrong} | |")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
