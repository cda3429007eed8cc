"""What processes ask of glibc's allocator, by what it then does."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc's allocator")

MEMORY_TAKEN = """
import ctypes

class Info(ctypes.Structure):
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def heap():
    return libc.mallinfo2().arena / 2**20

def mapped():
    return libc.mallinfo2().hblkhd / 2**20

def taken(size):
    before = heap(), mapped()
    piece = libc.malloc(size * 2**20)
    by_itself = mapped() - before[1]
    libc.free(piece)
    return by_itself, heap() - before[0], mapped() - before[1]
"""
"""For a script: MiB that glibc has from the system for its heap, and for pieces by themselves; and what it takes of the
latter for a piece of some MiB, and of both once that is free. C's functions are asked, since an object that Python
happens to place above a piece would keep it in the heap."""


def printed(script: str, *arguments: str) -> list[float]:
    """What a script prints in a process of its own."""
    run = subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True)
    return [float(word) for word in run.stdout.split()]


@pytest.mark.slow
def test_a_process_that_predicts_keeps_the_memory_of_its_maps() -> None:
    script = f"""{MEMORY_TAKEN}
from slrnet.cpu import allocator

allocator.keep_memory()
print(*taken(100), *taken(100))
"""
    mapped, kept, left, _, new, _ = printed(script)
    assert mapped < 1
    assert kept > 50
    assert left < 1
    assert new < 1


@pytest.mark.slow
def test_a_large_network_takes_its_maps_from_the_system() -> None:
    """Maps of 8 MiB come from the heap, which keeps them, unless the network is large."""
    script = f"""{MEMORY_TAKEN}
import sys, torch
from slrnet.cpu import allocator

allocator.LARGE_NETWORK = 4 * int(sys.argv[1])
torch.zeros(2**22)  # 16 MiB: from now on glibc takes what is smaller from the heap
allocator.spare_memory(torch.nn.Linear(99, 1))  # 400 bytes
before = mapped()
maps = [torch.ones(2**21) for _ in range(20)]  # 160 MiB, of which a gap in the heap may hold a few
print(mapped() - before)
"""
    (large,), (small,) = (printed(script, size) for size in ("100", "101"))
    assert large > 120
    assert small < 20
