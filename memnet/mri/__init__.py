"""The physics of MRI: encoding operator, solver, coils, sampling, simulated raw data."""
