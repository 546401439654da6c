"""What a convolution takes on a CPU while it runs, besides its result: copies in oneDNN's order, unfolded inputs, scratch."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

__all__ = ["bytes_inside"]

_ATEN = torch.ops.aten
_SLOW_UP_TO = 20480  # product of the first four sizes of a float32 input of batch size 1 that PyTorch unfolds by itself
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_BLOCK = 16 if _AVX512 else 8  # of channels that oneDNN keeps together
# whether oneDNN, if there is one, takes bfloat16; else PyTorch unfolds it by itself
_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_SHARED_FROM = 256  # voxels of a plane for each thread, from which all unfold one; below, each that of its own sample


def bytes_inside(function: Any, arguments: Any, outputs: Any) -> int:
    """Return the bytes that a call of an operation takes for the time it runs, 0 for all but convolutions on a CPU.

    They are alive besides the output, or besides the gradient of the input, and gone before that of the weights is made.

    What PyTorch chooses is as in ``use_mkldnn`` of its Convolution.cpp; what the kernels then take was measured with
    :func:`memnet.accounting.live_memory.peak_live_bytes` over channels, widths, strides, batch sizes and numbers of threads, with
    AVX-512 and with AVX2.
    The number of threads is that of ``torch.get_num_threads()`` now: on several, PyTorch leaves to oneDNN what it does itself
    on one, and oneDNN gives each its own scratch. Known to be off in bfloat16
    are strided convolutions on more than two threads or from or to few channels, unfolded planes on more than two threads or of
    less than 100 voxels, gradients of weights of width 1 over a few thousand voxels or less, and those of wider weights on more
    than four threads, which oneDNN shares out by an estimate of its own: many channels over few voxels take less than this says.

    Args:
        function: the overload, such as ``torch.ops.aten.convolution.default``.
        arguments: its arguments.
        outputs: what it returned.
    """
    if function is _ATEN.convolution.default:
        (x, weight), y, (stride, padding, _, transposed) = arguments[:2], outputs, arguments[3:7]
        of_x, of_weight = False, False
    elif function is _ATEN.convolution_backward.default:
        (y, x, weight), (stride, padding, _, transposed) = arguments[:3], arguments[4:8]
        of_x, of_weight = arguments[-1][:2]
    else:
        return 0
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return 0
    forward = function is _ATEN.convolution.default
    if not _goes_to_onednn(x, weight, stride):
        return _unfolded(x, weight, y, transposed, forward, of_x) + (weight.nbytes if of_weight else 0)
    sides = (y, x) if transposed else (x, y)
    unfolds = _unfolds(*sides, weight, padding)
    if _is_channels_last(x):
        return _of_weights_channels_last(*sides, weight, stride, unfolds) if of_weight else 0
    if forward:
        return _of_data(x, weight, y, transposed, stride) - y.nbytes
    for_x = _of_data(y, weight, x, not transposed, stride) - x.nbytes if of_x else 0
    return max(for_x, _of_weights(*sides, weight, stride, unfolds) if of_weight else 0)


def _goes_to_onednn(x: torch.Tensor, weight: torch.Tensor, stride: Any) -> bool:
    if x.dtype == torch.bfloat16:
        return _BFLOAT16
    wide = prod(weight.shape[2:]) > 1 or max(stride) > 1 or x.shape[0] >= 16 or torch.get_num_threads() > 1
    return wide and (x.shape[0] > 1 or min(weight.shape[-2:]) > 3 or prod(x.shape[:4]) > _SLOW_UP_TO)


def _is_channels_last(x: torch.Tensor) -> bool:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return layout is not None and x.is_contiguous(memory_format=layout) and not x.is_contiguous()


def _unfolded(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, transposed: bool, forward: bool, of_x: bool
) -> int:
    """Bytes of all samples unfolded by PyTorch itself, or of one to be folded, and of its copy of channels-last ones."""
    copy = x.nbytes if _is_channels_last(x) else 0
    if transposed:
        each = prod(weight.shape[1:]) * x[0, 0].nbytes
        return each + (max(copy, x.nbytes - y.nbytes) if forward else copy)
    if prod(weight.shape[2:]) == 1:
        return max(copy, x.nbytes if of_x and x.dim() == 5 else 0)
    return prod(weight.shape[1:]) * y[:, :1].nbytes + copy


def _of_data(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, transposed: bool, stride: Any) -> int:
    """Bytes at most alive while ``y`` is computed from ``x``, ``y`` included, by a convolution or its transpose."""
    (of_x, of_y, of_weight), widths, threads = _copies(x, weight, y), weight.shape[2:], torch.get_num_threads()
    if transposed and max(stride) > 1:  # each thread pads a sample, and the result is copied twice
        padded = [n + (width - 1) // 2 for n, width in zip(x.shape[2:], widths, strict=True)]
        pads = threads * x.shape[1] * prod(padded) * x.element_size()
        return max(x.nbytes + of_weight + y.nbytes + pads, 3 * y.nbytes)
    narrow = prod(widths) == 1
    sums = threads * 2 * of_y // y.shape[0] if narrow and x.dtype == torch.bfloat16 else 0  # in float32, of a sample
    return of_y + max((of_x if narrow or transposed or x.shape[1] >= _BLOCK else 0) + of_weight + sums, y.nbytes)


def _of_weights(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, stride: Any, unfolds: bool) -> int:
    """Bytes at most alive while the weights' gradient is computed; ``y`` is the side of fewer voxels."""
    (of_x, of_y, of_weight), scratch = _copies(x, weight, y), _scratch(x, y, weight, stride, unfolds)
    if unfolds:
        return weight.nbytes + scratch
    return scratch + (of_y + weight.nbytes if _has_few(x, weight) else of_x + of_y + of_weight)


def _of_weights_channels_last(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, stride: Any, unfolds: bool
) -> int:
    """Bytes taken while the weights' gradient is computed from channels-last input, which is not copied as a whole."""
    if x.dtype == torch.bfloat16:
        return _scratch(x, y, weight, stride, unfolds)
    return 0 if _AVX512 or not unfolds else x[:1].nbytes + 2 * weight.nbytes + _scratch(x, y, weight, stride, unfolds)


def _scratch(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, stride: Any, unfolds: bool) -> int:
    """Bytes of a plane of the input unfolded, or in bfloat16 of a sample turned around and of sums in float32, by thread."""
    threads = torch.get_num_threads()
    if unfolds:
        plane = prod(y.shape[3:])
        unfolded = x.shape[1] * prod(weight.shape[2:]) * plane * x.element_size()
        each = x.shape[0] > 1 and plane < _SHARED_FROM * threads
        return (threads if each else 1) * (unfolded + 4 * weight.nbytes)
    if x.dtype == torch.float32 or prod(weight.shape[2:]) == 1:
        return 0
    of_x, of_y, of_weight = _copies(x, weight, y)
    if _has_few(x, weight):
        of_x = of_weight = 0
    return _sharing_samples(x, y, stride) * ((of_x + of_y) // x.shape[0] + 2 * of_weight)


def _sharing_samples(x: torch.Tensor, y: torch.Tensor, stride: Any) -> int:
    """Threads that sum over samples and slices of their own; where channels can be shared, too, half of them do that."""
    threads = torch.get_num_threads()
    shares_channels = max(stride) > 1 or (threads > 2 and max(x.shape[1], y.shape[1]) > _BLOCK)
    return max(1, threads // 2) if shares_channels else threads


def _has_few(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Tell whether the weights' gradient is summed over channels as they are, where others come in whole blocks."""
    return prod(weight.shape[2:]) > 1 and (x.shape[1] < _BLOCK if _AVX512 else x.shape[1] == 3)


def _unfolds(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, padding: Any) -> bool:
    """Tell whether the weights' gradient is that of an unfolded plane."""
    if x.dtype == torch.bfloat16:
        return _has_few(x, weight) and y.shape[1] < _BLOCK
    awkward = _has_few(x, weight) and x.shape[1] > 3 if _AVX512 else x.dim() == 5 and padding[0] > 0
    return awkward or min(x.shape[2:]) < min(weight.shape[2:])


def _copies(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> tuple[int, int, int]:
    """Bytes of input, output and weights in blocks of channels."""
    n_in, n_out = (-(-t.shape[1] // _BLOCK) * _BLOCK for t in (x, y))
    return n_in * x[:, :1].nbytes, n_out * y[:, :1].nbytes, n_in * n_out * weight[0, 0].nbytes
