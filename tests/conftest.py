"""Shared by all tests: threads, and torchaudio beside any torch (see reproduce/compat.py)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from reproduce.compat import import_torchaudio

import_torchaudio()  # transformers imports it too, and would meet the check that this passes over
