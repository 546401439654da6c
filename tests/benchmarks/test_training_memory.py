"""Measuring a training step of each network."""

from memnet.benchmarks.training_memory import Measurement, measure, table


def test_inverting_needs_less_than_storing():
    inverted = measure("fully", "invert", 24, steps=1)
    stored = measure("fully", "store", 24, steps=1)
    assert inverted.memory == "invert"
    assert inverted.seconds > 0
    assert inverted.peak < 0.8 * stored.peak


def test_ratios_are_to_the_first_row_of_the_same_patch_and_precision():
    rows = [
        Measurement("UNet3D", 5_838_404, "store", 64, "float32", 400 * 2**20, 2.0),
        Measurement("FullyInvResUNet", 5_820_000, "invert", 64, "float32", 100 * 2**20, 3.0),
        Measurement("FullyInvResUNet", 5_820_000, "invert", 96, "float32", 300 * 2**20, 9.0),
    ]
    lines = table(rows).splitlines()[2:]
    assert lines[1] == "| FullyInvResUNet | 5.82 | invert | 64^3 | float32 | 100 | 0.25 | 1.50 |"
    assert lines[2].endswith("| 300 | 1.00 | 1.00 |")
