"""Runs Python where a GPU is pretended: ``python tests/pretended_gpu/run.py -m pytest --device cuda tests/nets``.

For a machine without one, to see what would fail there for its device: tensors left on the CPU, looks at values, threads of
autograd, autocast, checkpoints. See kernels.cpp for what is pretended and what is not. Processes that the command starts see the
same GPU; in any of them ``pretended_gpu.synchronizations()``, imported like a library, counts how often a GPU would have stood
still. Needs a C++ compiler and ninja; the first run compiles for half a minute into ``build/pretended_gpu``.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "build" / "pretended_gpu"


def build() -> Path:
    """Compile the kernels where they are not compiled yet and return the library."""
    from torch.utils.cpp_extension import load

    BUILD.mkdir(parents=True, exist_ok=True)
    load("pretended_gpu", [str(HERE / "kernels.cpp")], ["-O1"], build_directory=str(BUILD), is_python_module=False)
    return BUILD / "pretended_gpu.so"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {sys.argv[0]} -m module ... | script.py ...")
    path = os.pathsep.join([str(HERE / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PRETENDED_GPU": str(build()), "PYTHONPATH": path}
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment)
