"""The compiled crop: the bytes of PyTorch's operators for any box, on several processors, within its memory."""

from __future__ import annotations

import ctypes
import functools
import itertools
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slrnet.cpu import compiled
from slrnet.cpu import crop as crop_cpu
from slrnet.data.transforms import Crop, crop_into
from slrnet.ops.kernels import SWITCH
from tests.fixtures.crops import crop_image

pytestmark = pytest.mark.skipif(
    "not hasattr(compiled.compiled('crop'), 'crop')", reason="no C compiler, or no processor with AVX2"
)

PROCESSORS = {"this": "", "without AVX-512": "-mno-avx512f", "without VBMI": "-mno-avx512vbmi"}


@pytest.fixture(autouse=True)
def from_the_first_crop_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crop_cpu, "_FEW", 0)


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel as it is on another processor, whose instructions this one has too."""
    library = compiled_with(PROCESSORS[request.param])
    monkeypatch.setattr(crop_cpu, "compiled", lambda name: library)


@functools.cache
def compiled_with(options: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        compiler = Path(folder) / "cc"
        compiler.write_text(f'#!/bin/sh\nexec {compiled._compiler()} "$@" {options}\n')
        compiler.chmod(0o755)
        patch.setenv(compiled.COMPILER_VARIABLE, str(compiler))
        library = compiled.compiled.__wrapped__("crop")
    assert library is not None
    return library


def noise(height: int, width: int, seed: int) -> Tensor:
    """(3, H, W) uint8, channels last: black and white, whose mixtures are farthest from each other."""
    generator = torch.Generator().manual_seed(seed)
    return (255 * torch.randint(0, 2, (height, width, 3), generator=generator)).byte().permute(2, 0, 1)


def assert_same_bytes(image: Tensor, crop: Crop, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = crop_image(image, crop, size=size)
    with monkeypatch.context() as without:
        without.setenv(SWITCH, "off")
        expected = crop_image(image, crop, size=size)
    assert torch.equal(made, expected), (image.shape, crop, size)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("size", [1, 2, 4, 5, 7, 64, 321])
def test_the_bytes_of_the_operators(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From enlarging 30 times to reducing 300 times: other numbers of taps, and steps of one and of several pixels."""
    rng = random.Random(size)
    for number in range(16):
        longest = rng.choice([12, 90, 400])
        height, width = rng.randint(1, longest), rng.randint(1, longest)
        box_height, box_width = rng.randint(1, height), rng.randint(1, width)
        top, left = rng.randint(0, height - box_height), rng.randint(0, width - box_width)
        if number % 4 == 0:  # the end of the box is the end of the image's memory
            top, left = height - box_height, width - box_width
        crop = Crop(top, left, box_height, box_width, mirrored=bool(number % 2))
        assert_same_bytes(noise(height, width, number), crop, size, monkeypatch)


@pytest.mark.usefixtures("processor")
def test_crops_of_photographs_at_their_usual_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (height, width) in enumerate([(375, 500), (500, 333), (480, 640), (2000, 3001)]):
        crop = Crop(height // 30, width // 20, height * 9 // 10, width * 9 // 10, mirrored=bool(number % 2))
        assert_same_bytes(noise(height, width, number), crop, 321, monkeypatch)


def test_a_process_that_makes_few_crops_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    library = compiled_with("")
    monkeypatch.setattr(crop_cpu, "compiled", lambda name: asked.append(name) or library)
    monkeypatch.setattr(crop_cpu, "_asked", itertools.count())
    monkeypatch.setattr(crop_cpu, "_FEW", 3)
    image, crop = noise(40, 50, 0), Crop(1, 2, 30, 40, mirrored=True)
    first = [crop_image(image, crop, size=20) for _ in range(3)]
    assert asked == []
    assert torch.equal(crop_image(image, crop, size=20), first[0])
    assert asked != []


def test_writes_to_its_place_and_nowhere_else() -> None:
    batch = torch.full((3, 3, 33, 33), 7, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    image, crop = noise(50, 60, 0), Crop(3, 4, 40, 50, mirrored=True)
    crop_into(batch[1], image, crop)
    assert torch.equal(batch[1], crop_image(image, crop, size=33))
    assert (batch[0] == 7).all()
    assert (batch[2] == 7).all()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.slow
def test_no_byte_outside_its_memory_is_touched(tmp_path: Path) -> None:
    """The compiler's own checks of every access, and of what is given back, over random boxes."""
    (tmp_path / "boxes.c").write_text(BOXES.replace("KERNEL", str(Path(crop_cpu.__file__).with_suffix(".c"))))
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    for options in PROCESSORS.values():
        command = ["cc", "-O1", "-march=native", *options.split(), *checks, "boxes.c", "-o", "boxes", "-lm"]
        built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        if "cannot find" in built.stderr:
            pytest.skip("the compiler lacks its libraries for checks")
        assert built.returncode == 0, built.stderr
        ran = subprocess.run([tmp_path / "boxes"], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[:2000]


def test_processors_without_its_instructions_leave_it_to_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crop_cpu, "compiled", lambda name: compiled_with("-mno-avx2 -mno-avx512f"))
    assert crop_cpu.crop_kernel() is None
    assert_same_bytes(noise(40, 50, 0), Crop(1, 2, 30, 40, mirrored=True), 20, monkeypatch)


BOXES = """
#include "KERNEL"

static int below(int limit) { return rand() % limit; }

int main(void) {
    for (int k = 0; k < 400; k++) {
        int height = 1 + below(k % 3 ? 300 : 20), width = 1 + below(k % 5 ? 300 : 20);
        int size = 1 + below(k % 2 ? 100 : 9);
        int h = 1 + below(height), w = 1 + below(width);
        int top = k % 4 ? below(height - h + 1) : height - h, left = k % 4 ? below(width - w + 1) : width - w;
        size_t bytes = (size_t)3 * height * width;
        uint8_t *image = malloc(bytes), *out = malloc((size_t)3 * size * size);
        memset(image, k, bytes);
        if (crop(image, bytes, 3 * width, top, left, h, w, size, k % 2, out)) return 1;
        for (int i = 0; i < 3 * size * size; i++)
            if (out[i] != (uint8_t)k) return 2;
        free(image), free(out);
    }
    return 0;
}
"""
