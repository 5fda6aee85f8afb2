"""Import this before torch: OpenMP and the allocator take their settings before the first tensor.

A thread that waits spins for some microseconds and then sleeps. The default spins for milliseconds, which
costs most of the speed on a machine whose cores have other work too. Sleeping at once costs speed on a quiet
machine. docs/log.md has what was seen.

Memory that a step frees stays with the process for the next step. glibc would give it back, and each 4 KB
that is touched anew costs a page fault.
"""
import contextlib
import ctypes
import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
with contextlib.suppress(OSError, AttributeError):  # no glibc, no setting
    # M_ARENA_MAX, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_TOP_PAD of malloc.h
    for setting, value in ((-8, 1), (-1, 2**31 - 1), (-3, 2**25), (-2, 2**26)):
        ctypes.CDLL("libc.so.6").mallopt(setting, value)
