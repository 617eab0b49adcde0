"""A process that trains for days keeps its memory, and does not search its libraries for garbage.

    settle()         # once, where a job begins and its libraries are loaded

glibc gives large blocks back to the kernel when they are freed and asks for them anew, page by page and zeroed. A
stream frees and allocates images and batches all the time, in threads: with 55 KB JPEGs of 224 to 512 pixels this cost
1% of the decoder's time (3.9 page faults a sample, 1.2 with it). In return a process stays as large as it once was.

PyTorch and its like are some 400,000 objects, through which Python's collector looks for cycles again and again: a
full collection takes 0.2 s with them, all threads that decode stand still, and the ranks' peers wait.
"""

import ctypes
import gc

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT = 128 << 20  # bytes at the top of each thread's heap that are not given back
_LARGEST = 32 << 20  # bytes of a block that may come out of a heap, the most that glibc documents


def settle() -> None:
    """Freed memory stays; what is alive now counts as alive for good. With another C library than glibc the latter."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _KEPT)
    if not gc.get_freeze_count():  # once: a second job in one process must not keep what is left of the first
        gc.collect()
        gc.freeze()
