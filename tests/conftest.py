"""What holds for every test: no network, and one torch thread per worker when several workers share the machine."""

from __future__ import annotations

import os

# Read by the libraries when they are imported, and inherited by the commands that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter, which has to be chosen before triton is imported for the first time.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
