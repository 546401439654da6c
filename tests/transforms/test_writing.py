"""Writing of label maps; what a full disk does to it is in tests/faults."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from memnet.transforms.writing import AtomicNibabelWriter


def test_a_single_slice_keeps_its_three_dimensions(tmp_path: Path) -> None:
    writer = AtomicNibabelWriter(output_dtype=np.uint8)
    writer.set_data_array(torch.ones(1, 6, 5, 1), channel_dim=0, squeeze_end_dims=True)
    writer.set_metadata({"affine": np.eye(4)})
    writer.write(tmp_path / "a.nii.gz")
    assert nib.load(tmp_path / "a.nii.gz").shape == (6, 5, 1)
