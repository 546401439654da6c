"""The precision in which a network runs."""

from contextlib import nullcontext

import pytest
import torch

from memnet.workflow.inferers import PrecisionInferer, PrecisionSlidingWindowInferer, bfloat16_autocast


@pytest.mark.parametrize(
    ("amp", "capability", "enabled"),
    [(True, (8, 0), True), (True, (7, 5), False), (None, (9, 0), True), (None, (7, 5), False), (False, (9, 0), False)],
)
def test_old_gpu_computes_in_float32(monkeypatch, amp, capability, enabled):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch, "autocast", lambda *a, enabled, **k: asked.append(enabled) or nullcontext())
    told = pytest.warns(UserWarning, match="computes in float32") if amp and not enabled else nullcontext()
    with told, bfloat16_autocast(torch.device("cuda"), amp):
        assert asked == [enabled]


@pytest.mark.parametrize(("amp", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cpu_does_as_asked(amp, dtype):
    assert PrecisionInferer(amp)(torch.rand(1, 2, 4, 4, 4), torch.nn.Conv3d(2, 3, 1)).dtype == dtype


@pytest.mark.parametrize("overlap", [1.0, -0.1, (0.5, 0.5, 1.0)])
def test_windows_that_never_move_on_are_refused(overlap):
    with pytest.raises(ValueError, match="overlap is .*, expected at least 0 and less than 1"):
        PrecisionSlidingWindowInferer(roi_size=(8, 8, 8), overlap=overlap)
