"""Finds the labelled cases of a data set, splits them, and says what is missing."""

from memnet.datasets.brats import find_brats
from memnet.datasets.cases import (
    IMAGE_SUFFIXES,
    ITK_SUFFIXES,
    SCAN_SUFFIXES,
    Case,
    as_list,
    existing_folder,
    find_file,
    require_cases,
    require_files,
    split_folds,
)
from memnet.datasets.datalist import read_datalist
from memnet.datasets.iseg import find_iseg
from memnet.datasets.labelled import find_evaluation_cases, find_training_cases

__all__ = [
    "IMAGE_SUFFIXES",
    "ITK_SUFFIXES",
    "SCAN_SUFFIXES",
    "Case",
    "as_list",
    "existing_folder",
    "find_brats",
    "find_evaluation_cases",
    "find_file",
    "find_iseg",
    "find_training_cases",
    "read_datalist",
    "require_cases",
    "require_files",
    "split_folds",
]
