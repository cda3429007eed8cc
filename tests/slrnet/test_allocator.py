"""What processes ask of glibc's allocator, by what it then does."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

NEW_PAGES = """
import resource

def new_pages(make):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        make()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="tells glibc's allocator")
def test_a_process_that_predicts_keeps_the_memory_of_its_maps() -> None:
    """Pages, small or huge, that are new to the process in 20 maps of 64 MiB, after as many before."""
    script = f"""{NEW_PAGES}
import sys, torch
from slrnet import allocator

def make():
    torch.ones(2**24)

if sys.argv[1] == "keep":
    allocator.keep_memory(torch.device("cpu"))
new_pages(make)
print(new_pages(make))
"""
    kept, plain = (
        int(subprocess.run([sys.executable, "-c", script, way], check=True, capture_output=True, text=True).stdout)
        for way in ("keep", "plain")
    )
    assert kept < plain / 4


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="tells glibc's allocator")
def test_a_reader_keeps_the_memory_of_its_batches_and_what_it_imported_from_being_looked_through() -> None:
    """Pages that are new in 20 times four batches of 5 MB, and what the collector has to look through."""
    script = f"""{NEW_PAGES}
import gc, torch
from slrnet.data.shards import prepare_reader

def make():
    batches = [torch.ones(5 * 10**6, dtype=torch.uint8) for _ in range(4)]

new_pages(make)
print(new_pages(make), len(gc.get_objects()))
prepare_reader()
new_pages(make)
print(new_pages(make), len(gc.get_objects()))
"""
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    pages, objects, pages_kept, objects_seen = map(int, run.stdout.split())
    assert pages_kept < pages / 4
    assert objects_seen < objects / 4


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc what it has taken by mmap")
def test_a_large_network_takes_its_maps_from_the_system() -> None:
    """Maps of 8 MiB come from the heap, which keeps them, unless the network is large."""
    script = """
import ctypes, sys, torch
from slrnet import allocator

class Info(ctypes.Structure):
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]

def mapped():
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Info
    return ask().hblkhd / 2**20

allocator.LARGE_NETWORK = 4 * int(sys.argv[1])
torch.zeros(2**22)  # 16 MiB: from now on glibc takes what is smaller from the heap
allocator.spare_memory(torch.nn.Linear(99, 1))  # 400 bytes
before = mapped()
maps = [torch.ones(2**21) for _ in range(20)]  # 160 MiB
print(mapped() - before)
"""
    large, small = (
        float(subprocess.run([sys.executable, "-c", script, size], check=True, capture_output=True, text=True).stdout)
        for size in ("100", "101")
    )
    assert large >= 160
    assert small < 20
