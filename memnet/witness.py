"""Some values of a state, kept to see whether inversion brings it back."""

from collections.abc import Sequence

import torch

__all__ = ["some_values"]

_ABOUT = 1024  # values of a tensor


def some_values(state: Sequence[torch.Tensor]) -> torch.Tensor:
    """Copy about a thousand values of each floating-point or complex tensor, less of a small one.

    They lie on a grid of the tensor's places, so that they are the same ones whatever its strides.

    Args:
        state: tensors of any shape.

    Returns:
        1D, in the largest precision among them; of a complex tensor real and imaginary part.
    """
    values = []
    for x in state:
        if x.is_complex():
            x = torch.view_as_real(x.detach())
        if x.is_floating_point():
            values.append(x.detach()[_places(x.shape)].flatten())
    return torch.cat(values) if values else torch.zeros(0)


def _places(shape: Sequence[int]) -> tuple[slice, ...]:
    """Return about as many places along each side, more along the others of what a short side lacks."""
    places, left = [slice(None)] * len(shape), float(_ABOUT)
    for done, (n, axis) in enumerate(sorted((n, axis) for axis, n in enumerate(shape))):
        step = max(1, -(-n // max(1, round(left ** (1 / (len(shape) - done))))))
        places[axis] = slice(None, None, step)
        left /= max(1, -(-n // step))
    return tuple(places)
