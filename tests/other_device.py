"""Trains the networks on a simulated device that is not the CPU and prints what went wrong with each, as JSON.

Simulated tensors hold no data but know their device, and an operation on tensors of two devices is refused as on a GPU. PyTorch's
autograd learns of devices once in a process; hence a script, which test_other_device.py runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import backend_registration

import memnet
from memnet.accounting.dry_run import Ledger, simulation
from memnet.losses import InvResLoss

DEVICE = "another"
SMALL = {"in_channels": 4, "out_channels": 3, "channels": 4, "n_levels": 2}
IMAGE, TENSORS, SLAB = (1, 4, 16, 16, 16), (2, 6, 11, 11, 11), (1, 2, 4, 12, 12)


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def moved(network: nn.Module) -> nn.Module:
    """What ``network.to(device)`` does, which simulated parameters do not offer."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, device=DEVICE), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=DEVICE)
    return network


def images() -> list[torch.Tensor]:
    return [torch.randn(IMAGE, device=DEVICE)]


def tensors() -> list[torch.Tensor]:
    return [torch.randn(TENSORS, device=DEVICE)]


def raw_data() -> list[torch.Tensor]:
    kspace, csm = (torch.randn(SLAB, dtype=torch.complex64, device=DEVICE) for _ in range(2))
    return [kspace, csm, torch.ones(1, 1, 1, *SLAB[3:], dtype=torch.bool, device=DEVICE)]


CASES: list[tuple[str, dict[str, Any], Callable[[], list[torch.Tensor]]]] = [
    *(
        (name, {**SMALL, **options}, images)
        for name in ("UNet3D", "PartiallyInvResUNet", "FullyInvResUNet")
        for options in ({"memory": "store"}, {"memory": "recursive"})
    ),
    *(
        (name, {**SMALL, "memory": "invert", **options}, images)
        for name, options in (
            ("PartiallyInvResUNet", {}),
            ("FullyInvResUNet", {}),
            ("FullyInvResUNet", {"vae": True}),
            ("FullyInvResUNet", {"tile": "auto"}),
            ("FullyInvResUNet", {"tile": (8,)}),
            ("FullyInvResUNet", {"memory": "auto", "memory_budget": 10**8}),
        )
    ),
    ("ESPCN", {"in_channels": 6}, tensors),
    *(
        ("ESPCNRevNet", {"in_channels": 6, "n_blocks": 1, "memory": memory}, tensors)
        for memory in ("checkpoint", "invert")
    ),
    *(
        ("MoDL", {"n_unrolls": 2, "channels": 8, **options}, raw_data)
        for options in (
            {"memory": "store"},
            {"memory": "checkpoint", "shared": False},
            {"memory": "checkpoint", "tile": (8,)},
            {"memory": "store", "contraction": 0.9},
        )
    ),
]


def train(name: str, options: dict[str, Any], inputs: Callable[[], list[torch.Tensor]], amp: bool) -> None:
    with simulation(), Ledger():
        network = moved(getattr(memnet, name)(**options))
        with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
            output = network(*inputs())
        if options.get("vae"):
            loss = InvResLoss()(output, torch.ones(1, 1, *IMAGE[2:], device=DEVICE))
        else:
            loss = output.abs().mean()
        loss.backward()
        assert loss.device.type == DEVICE
        missing = [key for key, p in network.named_parameters() if p.grad is None or p.grad.device.type != DEVICE]
        assert not missing, missing


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, _Module())
    library = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    library.fallback(torch.library.fallthrough_kernel)  # autocast casts nothing there
    found = {}
    for name, options, inputs in CASES:
        for amp in (False, True):
            key = f"{name} {options}{' autocast' if amp else ''}"
            try:
                train(name, options, inputs, amp)
                found[key] = ""
            except Exception as error:
                found[key] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
