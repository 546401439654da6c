"""Keeps the DICOM libraries quiet about patients, and their errors to one kind."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydicom

__all__ = ["DicomError", "guarded"]


class DicomError(ValueError):
    """DICOM files that cannot be used, with the reason."""


@contextmanager
def guarded(name: str | Path) -> Iterator[None]:
    """Run a parser on files of which anything may be expected.

    On damaged bytes it raises anything, and warns and logs in quotes of what it found, which may name the patient.

    Args:
        name: the file or folder to blame.

    Raises:
        DicomError: for whatever is raised inside.
    """
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        except (DicomError, ImportError):
            raise
        except Exception as error:
            reason = (
                os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "damaged, or no valid DICOM"
            )
            raise DicomError(f"{name}: cannot be read ({reason})") from None
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
