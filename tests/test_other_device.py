"""The networks train on a device that is not the CPU, a simulated one: nothing stays behind on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from other_device import CASES


def test_nothing_stays_behind_on_the_cpu() -> None:
    script = Path(__file__).parent / "other_device.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * len(CASES)
    assert not {case: error for case, error in found.items() if error}
