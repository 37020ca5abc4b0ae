"""The CPU backend: compiled kernels whose results are bitwise equal in every batch, chunk and thread count."""

from pathlib import Path

LIBRARY_PATH = Path(__file__).parent / "build" / "libstaffetta_cpu.so"
"""Where `python -m kernels.cpu.build` leaves the kernels."""
