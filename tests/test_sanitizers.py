"""The CUDA kernels run under the address and undefined-behaviour sanitizers, emulated: no access
past an end, none that is misaligned, no overflow."""

from __future__ import annotations

import shutil

import pytest

from tests import harness
from tests.emulation import build

# In a process that was started with the sanitizers; one that finds something ends it.
_RUN = """
import torch
from tests import harness
from tests.emulation import build
from pydl import backends, check
from pydl.table import TABLE

build.load("asan")
backends.emulate_cuda(True)
count = 0
for op in TABLE.values():
    if harness.lacks(op, "cuda"):
        continue
    for dtype in op.dtypes:
        for case in op.cases(dtype, "cpu"):
            if sum(t.numel() for t in case.tensors()) > 9000:
                continue
            complaints = [r for r in check.compare(op, "cuda", case) if not r.ok]
            assert not complaints, (op.name, dtype, case.label, complaints)
            count += 1
print(count, "calls")
"""


def test_kernels() -> None:
    if harness.real_cuda():
        pytest.skip("the CUDA kernels run on a GPU here; compute-sanitizer is the tool there")
    if shutil.which(build._compiler()) is None:
        pytest.skip("no C++ compiler to build the emulation with")
    build.build("asan")
    done = harness.python(_RUN, **build.asan_environment())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert int(done.stdout.split()[-2]) > 500
