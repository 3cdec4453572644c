"""One thread per process: two OpenMP threads on a core that others use make everything slow."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
