"""Which of the processes of a run this one is."""

from torch import distributed

__all__ = ["rank"]


def rank() -> int:
    """Return this process's number among those of a run, 0 where it is the only one."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
