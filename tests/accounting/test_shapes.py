"""What is remembered of an operation is what it returns."""

from collections.abc import Callable

import pytest
import torch

from memnet.accounting.dry_run import Ledger, simulation

CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "new": lambda x: x * 2,
    "strides": lambda x: (x * 2, x.as_strided((2, 3, 4), (1, 2, 6)) * 2)[1],
    "integer": lambda x: x.int() * 2,
    "number of another type": lambda x: x.int() * 2.0,
    "in place": lambda x: x.add_(1),
    "out": lambda x: torch.mul(x, 2, out=x),
    "one of two": lambda x: x.aminmax(dim=0)[1],
    "view": lambda x: x.transpose(0, 2)[1:],
    "one of several views": lambda x: x.unbind(1)[2],
    "undeclared view": lambda x: torch.ops.aten._unsafe_view(x, [6, 4]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_second_call_returns_what_a_real_one_does(call):
    x = torch.ones(2, 3, 4)
    real = call(x)
    with simulation():
        without_data = torch.ones(2, 3, 4)
        with Ledger():
            for _ in range(2):
                y = call(without_data)
                assert (y.shape, y.stride(), y.dtype, y.device) == (real.shape, real.stride(), real.dtype, real.device)
                assert y.storage_offset() == real.storage_offset() and (y is without_data) == (real is x)
                shared = y.untyped_storage()._cdata == without_data.untyped_storage()._cdata
                assert shared == (real.untyped_storage()._cdata == x.untyped_storage()._cdata)
