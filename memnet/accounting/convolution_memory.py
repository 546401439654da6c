"""What a convolution takes on a CPU while it runs, besides its result: copies in oneDNN's order, unfolded inputs, scratch."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

__all__ = ["bytes_inside"]

_ATEN = torch.ops.aten
_SLOW_UP_TO = 20480  # product of the first four sizes of a float32 input of batch size 1 that PyTorch unfolds by itself
_BLOCK = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8  # of channels that oneDNN keeps together


def bytes_inside(function: Any, arguments: Any, outputs: Any) -> int:
    """Return the bytes that a call of an operation takes for the time it runs, 0 for all but convolutions on a CPU.

    What PyTorch chooses is as in ``use_mkldnn`` of its Convolution.cpp; what the kernels then take was measured with
    :func:`memnet.accounting.live_memory.peak_live_bytes` over channels, widths, batch sizes and numbers of threads. One case is
    known that falls short, by 17 %: width 1 in float32 on several threads, of channels that oneDNN's blocks do not divide.

    Args:
        function: the overload, such as ``torch.ops.aten.convolution.default``.
        arguments: its arguments.
        outputs: what it returned.
    """
    if function is _ATEN.convolution.default:
        (x, weight), y, backward = arguments[:2], outputs, False
    elif function is _ATEN.convolution_backward.default:
        (y, x, weight), backward = arguments[:3], True
    else:
        return 0
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return 0
    wanted = backward and arguments[-1][0]  # the input's gradient
    if x.dtype == torch.float32 and not _goes_to_onednn(x, weight, arguments[4 if backward else 3]):
        if prod(weight.shape[2:]) == 1:
            return x.nbytes - weight.nbytes if wanted else 0
        transposed = arguments[7 if backward else 6]
        return prod(weight.shape[1:]) * prod((x if transposed else y).shape[2:]) * x.element_size()
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is not None and x.is_contiguous(memory_format=channels_last):
        return 0
    return max(_of_gradients(x, weight, y, wanted)) if backward else _of_output(x, weight, y)


def _goes_to_onednn(x: torch.Tensor, weight: torch.Tensor, stride: Any) -> bool:
    wide = prod(weight.shape[2:]) > 1 or max(stride) > 1 or x.shape[0] >= 16 or torch.get_num_threads() > 1
    return wide and (x.shape[0] > 1 or min(weight.shape[-2:]) > 3 or prod(x.shape[:4]) > _SLOW_UP_TO)


def _of_output(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> int:
    """Bytes of the copies of a forward pass."""
    of_input, of_output, of_weight = _copies(x, weight, y)
    if prod(weight.shape[2:]) == 1:
        return of_input + of_output - y.nbytes + _scratch(y)
    return of_output + max(0, (of_input if x.shape[1] >= _BLOCK else 0) + of_weight - y.nbytes)


def _of_gradients(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, wanted: bool) -> tuple[int, int]:
    """Bytes of the copies for the input's gradient, and for the weights'."""
    (of_input, of_output, of_weight), threads = _copies(x, weight, y), torch.get_num_threads()
    few, half = x.shape[1] < _BLOCK, x.dtype == torch.bfloat16
    if prod(weight.shape[2:]) == 1:
        return (of_input + of_output - x.nbytes + _scratch(x) if wanted else 0), of_input + of_output
    for_input = of_input + of_output + of_weight - (x.nbytes if few else 0) if wanted else 0
    if not few:  # in bfloat16 each thread turns a sample around, and sums in float32
        turned = threads * ((of_input + of_output) // x.shape[0] + 2 * of_weight) if half else 0
        return for_input, of_input + of_output + turned
    if x.shape[1] <= 3 and not half:
        return for_input, of_output
    return for_input, threads * prod(weight.shape[1:]) * prod(y.shape[3:]) * x.element_size()  # a plane unfolded


def _copies(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> tuple[int, int, int]:
    """Bytes of input, output and weights in blocks of channels."""
    n_in, n_out = (-(-t.shape[1] // _BLOCK) * _BLOCK for t in (x, y))
    return n_in * x[:, :1].nbytes, n_out * y[:, :1].nbytes, n_in * n_out * weight[0, 0].nbytes


def _scratch(result: torch.Tensor) -> int:
    """Float32 sums of one sample for each thread, of a convolution of width 1 in bfloat16."""
    channels = -(-result.shape[1] // _BLOCK) * _BLOCK
    return torch.get_num_threads() * 4 * channels * prod(result.shape[2:]) if result.dtype == torch.bfloat16 else 0
