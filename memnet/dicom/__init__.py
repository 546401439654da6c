"""DICOM in and out: the series of a folder as a volume, a label map as a segmentation object."""

from memnet.dicom.pixels import read_pixels
from memnet.dicom.segmentation import save_segmentation
from memnet.dicom.series import holds_dicom, split_uid
from memnet.dicom.stack import Stack, read_stack

__all__ = ["Stack", "holds_dicom", "read_pixels", "read_stack", "save_segmentation", "split_uid"]
