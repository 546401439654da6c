"""Python's first import in a process that ../run.py has started: tells PyTorch of the pretended GPU."""

import contextlib
import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TOTAL = 12 << 30


def pretend(library: str) -> None:
    """Load the kernels, before PyTorch asks for CUDA's, and answer what ``torch.cuda`` is asked."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
        ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    import torch
    import torch._utils
    import torch.storage

    spec = importlib.util.spec_from_file_location("pretended_gpu", library)
    assert spec is not None and spec.loader is not None
    sys.modules["pretended_gpu"] = gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)

    for name in ("_cuda_exchangeDevice", "_cuda_maybeExchangeDevice", "_cuda_getCurrentRawStream"):
        setattr(torch._C, name, lambda *_: 0)
    torch._C._cuda_clearCublasWorkspaces = lambda *_: None
    properties = SimpleNamespace(name="pretended GPU", total_memory=TOTAL, major=9, minor=0, multi_processor_count=1)

    def answer(value: Any) -> Any:
        return lambda *_, **__: value

    generator = torch.default_generator
    answers = {
        "_lazy_init": answer(None),
        "init": answer(None),
        "is_available": answer(True),
        "is_initialized": answer(True),
        "_is_compiled": answer(True),
        "is_bf16_supported": answer(True),
        "device_count": answer(1),
        "current_device": answer(0),
        "set_device": answer(None),
        "_exchange_device": answer(0),
        "_maybe_exchange_device": answer(0),
        "synchronize": answer(None),
        "empty_cache": answer(None),
        "get_device_name": answer(properties.name),
        "get_device_capability": answer((properties.major, properties.minor)),
        "get_device_properties": answer(properties),
        "mem_get_info": lambda *_: (TOTAL - gpu.allocated(), TOTAL),
        "memory_allocated": lambda *_: gpu.allocated(),
        "max_memory_allocated": lambda *_: gpu.allocated_at_most(),
        "reset_peak_memory_stats": lambda *_: gpu.reset_peak(),
        "Stream": _Stream,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda _: contextlib.nullcontext(),
        "default_generators": (generator,),
        "get_rng_state": lambda *_: generator.get_state(),
        "set_rng_state": lambda state, *_: generator.set_state(state),
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state_all": lambda states: generator.set_state(states[0]),
        "manual_seed": answer(None),  # the CPU's seed is the pretended one's
        "manual_seed_all": answer(None),
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, value)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, value)
    torch.cuda._initialized = True
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]

    elsewhere, copied = torch._utils._to, torch.UntypedStorage.clone

    def moved(storage: Any, device: torch.device, non_blocking: bool = False) -> Any:
        if "cuda" not in (storage.device.type, device.type) or storage.device.type == device.type:
            return elsewhere(storage, device, non_blocking)
        view = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return view.to(device).untyped_storage()

    def clone(storage: Any) -> Any:
        if storage.device.type != "cuda":
            return copied(storage)
        return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage).clone().untyped_storage()

    torch._utils._to = torch.storage._to = moved  # type: ignore[attr-defined]
    for kind in (torch.storage._StorageBase, torch.UntypedStorage):
        kind.clone = clone  # type: ignore[method-assign]
        kind.cuda = lambda storage, *_, **__: moved(storage, torch.device("cuda"))  # type: ignore[assignment]
        kind.cpu = lambda storage: moved(storage, torch.device("cpu"))  # type: ignore[method-assign]


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        import torch

        self.device = torch.device("cuda:0")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    wait_stream = wait_event = lambda self, other: None


if "PRETENDED_GPU" in os.environ:
    pretend(os.environ["PRETENDED_GPU"])
