"""For all tests: one thread a process, silent progress bars, no downloads from hubs.

Two busy OpenMP threads on shared cores can be many times slower than one.
"""
import os
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", CI="true", HF_HUB_OFFLINE="1", MPLBACKEND="Agg",
                  TOKENIZERS_PARALLELISM="false")

import pytest  # noqa: E402  (after the environment)
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def undrawn(request, monkeypatch):
    """Vision runs leave empty files in place of figures, unless the test is marked `pictures`.

    Drawing takes most of the time of a run of three small steps.
    """
    if request.node.get_closest_marker("pictures"):
        return
    from utils import figure
    from vision import show

    def touched(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"")
        return path
    monkeypatch.setattr(figure, "plot_panels", lambda files, metrics, output, **_: touched(output))
    for module in (show, sys.modules.get("vision.vlm.data")):
        if module:
            monkeypatch.setattr(module, "grid", lambda path, *_: touched(path))
