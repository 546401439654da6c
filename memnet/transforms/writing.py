"""Writes label maps so that a file is either complete or absent."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection, PathLike
from monai.data import NibabelWriter
from monai.transforms import MapTransform

from memnet.dicom import holds_dicom, read_stack, save_segmentation
from memnet.whole_files import NotWrittenError, whole_file
from memnet.workflow.legends import LEGENDS

__all__ = ["AtomicNibabelWriter", "SaveSegmentationd", "output_name"]

logger = logging.getLogger("memnet")


class AtomicNibabelWriter(NibabelWriter):
    """MONAI's NIfTI writer, writing beside the target first and renaming; sform and qform both hold the affine.

    Their code is the metadata's ``space_code``, see :func:`memnet.transforms.volumes.read_volume`, or else 1, a scanner's space.
    """

    space_code = 1

    def write(self, filename: PathLike, verbose: bool = False, **kwargs: Any) -> None:
        """Write the label map.

        Args:
            filename: the target, ending in ``.nii.gz`` or ``.nii``; its folder must exist.
            verbose: log the file's name.
            kwargs: MONAI's further arguments.

        Raises:
            NotWrittenError: the disk is full, or the folder is read-only.
        """
        with whole_file(Path(filename)) as partial:
            if verbose:
                logger.info("writing %s", filename)
            # past MONAI's own, which sets the codes to 1
            nib.save(
                self.create_backend_obj(
                    self.data_obj, affine=self.affine, dtype=self.output_dtype, space_code=self.space_code, **kwargs
                ),
                partial,
            )

    def set_metadata(self, meta_dict: Mapping[str, Any] | None, resample: bool = False, **options: Any) -> None:
        """Take the affine as it is; MONAI's writer resamples even where it is told not to, and fails on permuted axes."""
        if resample or meta_dict is None:
            super().set_metadata(meta_dict, resample=resample, **options)
            return
        self.space_code = int(meta_dict.get("space_code", 1))
        self.affine = np.asarray(meta_dict["affine"], dtype=np.float64)
        self.data_obj = np.asarray(self.data_obj)

    @classmethod
    def create_backend_obj(
        cls, data_array: Any, affine: Any = None, dtype: Any = None, space_code: int = 1, **kwargs: Any
    ) -> nib.nifti1.Nifti1Image:
        """Make the image; programs that read the qform alone find the affine there, too."""
        data_array = np.reshape(
            data_array, (*np.shape(data_array), *[1] * (3 - np.ndim(data_array)))
        )  # of one slice, too
        image = super().create_backend_obj(data_array, affine=affine, dtype=dtype, **kwargs)
        image.set_qform(np.asarray(image.affine, dtype=np.float64), code=space_code, strip_shears=True)
        image.set_sform(np.asarray(image.affine, dtype=np.float64), code=space_code)
        image.header.set_xyzt_units("mm")
        return image


class SaveSegmentationd(MapTransform):
    """Write label maps of DICOM series as DICOM segmentations, too, beside the file that ``SaveImaged`` wrote.

    The metadata's ``segmentation`` is the path. Label maps of other scans, and those that were not saved, pass unchanged.

    Args:
        keys: the label maps, ``(1, D, H, W)`` on the grid of their scan, saved with ``savepath_in_metadict``.
        legend: name of one of :data:`memnet.workflow.legends.LEGENDS`.
    """

    def __init__(self, keys: KeysCollection, legend: str) -> None:
        super().__init__(keys)
        self.legend = LEGENDS[legend]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the segmentations; what keeps one from being written is a warning, since the label map is there."""
        d = dict(data)
        for key in self.key_iterator(d):
            meta = d[key].meta
            scan, saved = meta.get("filename_or_obj", ""), meta.get("saved_to")
            if not scan or not saved or not (Path(scan).is_dir() or holds_dicom(scan)):
                continue
            target = Path(str(saved).removesuffix(".gz").removesuffix(".nii") + ".dcm")
            try:
                save_segmentation(d[key][0].cpu().numpy().astype(np.uint8), read_stack(scan), self.legend, target)
            except NotWrittenError:
                raise
            except (ImportError, ValueError) as error:
                reason = (
                    'highdicom is missing: pip install "memnet[dicom]"' if isinstance(error, ImportError) else error
                )
                logger.warning("%s: no DICOM segmentation of it is written (%s)", scan, reason)
                continue
            meta["segmentation"] = str(target)
        return d


def output_name(meta: Mapping[str, Any], saver: Any = None) -> dict[str, Any]:
    """Name an output after its input; the ``output_name_formatter`` of MONAI's ``SaveImage``.

    Args:
        meta: the image's metadata; ``output_name`` where the data set gave one, otherwise the file's name.
        saver: the calling transform, not used.

    Returns:
        The arguments of MONAI's ``FolderLayout.filename``.
    """
    name = meta.get("output_name")
    # the layout cuts the last extension off
    return {"subject": f"{name}.nii.gz" if name else str(meta.get("filename_or_obj", "image")), "idx": None}
