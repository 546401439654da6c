"""Memory kept for the next tensor."""

import subprocess
import sys

CODE = """
import resource, torch
from memnet.workflow.allocation import keep_freed_memory
print(keep_freed_memory())
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_large_tensors_fault_their_pages_once() -> None:
    # in a process of its own, since the setting stays
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=300)
    applied, faults = done.stdout.split()
    if applied == "True":
        assert int(faults) < 40_000  # 65536 pages of 4 KiB where every tensor is faulted in anew
