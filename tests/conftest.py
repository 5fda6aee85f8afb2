"""For all tests: one thread a process, silent progress bars, no downloads from hubs.

Two busy OpenMP threads on shared cores can be many times slower than one.
"""
import os

os.environ.update(OMP_NUM_THREADS="1", CI="true", HF_HUB_OFFLINE="1", MPLBACKEND="Agg",
                  TOKENIZERS_PARALLELISM="false")

import torch  # noqa: E402  (after the environment)

torch.set_num_threads(1)
