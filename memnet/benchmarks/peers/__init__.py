"""memnet beside other implementations of reversible and checkpointed training: ``python -m memnet bench``."""
