"""Errors say what, where and what to do; nothing that was asked for is dropped in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pydl
from pydl import _native, functional
from pydl.table import TABLE, Op, register
from tests import harness


def test_a_name_that_is_none() -> None:
    """A backend that does not exist: the message lists those that do."""
    for call in (
        lambda: functional.gelu(torch.ones(2), backend="gpu"),
        lambda: pydl.use_backend("gpu").__enter__(),
    ):
        with pytest.raises(
            ValueError, match=r"'gpu', wants one of torch, reference, cpu, cuda, triton"
        ):
            call()


def test_an_unavailable_backend() -> None:
    """Asked for by name, it is refused with the reason, never replaced."""
    code = """
import torch, pydl
from pydl import functional
assert not torch.cuda.is_available()
x = torch.ones(2)
calls = lambda: functional.gelu(x, backend=name), lambda: pydl.use_backend(name).__enter__()
for call in calls:
    for name in ("cuda", "triton"):
        try:
            call()
        except RuntimeError as error:
            print(name, error)
        else:
            print("nothing raised")
"""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: no backend is unavailable")
    lines = harness.python(code, TRITON_INTERPRET="0").stdout.splitlines()
    assert len(lines) == 4 and all("pydl" in line for line in lines)
    for line in lines[::2]:
        assert "'cuda'" in line and ("built without CUDA" in line or "no CUDA device" in line)
    for line in lines[1::2]:
        assert "'triton'" in line and ("no CUDA device" in line or "does not import" in line)


def test_wrong_dtype(op: Op) -> None:
    """Integers and complex numbers by an explicit backend: named, with what is wanted."""
    case = harness.plain(op)
    for dtype in (torch.int32, torch.bool, torch.complex64):
        given = [t.to(dtype) for t in case.tensors()]
        for backend in ("cpu", "reference"):
            with pytest.raises(
                RuntimeError, match=rf"pydl: {op.name}.*{str(dtype).removeprefix('torch.')}"
            ):
                op.function(*harness.bind(case, given), backend=backend, **case.kwargs)


def test_integers_in_the_definitions() -> None:
    """No backend computes them in silence, whatever they become: torch promotes them or raises."""
    x = torch.tensor([1, 2, -5])
    with pytest.raises(RuntimeError, match=r"sigmoid.*'reference'.*has dtype int64, wants float32"):
        functional.sigmoid(x, backend="reference")
    for backend in (None, "reference", "torch"):
        with pytest.raises(
            RuntimeError, match=r"swish: input has dtype torch.int64, wants a float"
        ):
            functional.swish(x, torch.tensor([2]), backend=backend)
    assert torch.equal(functional.sigmoid(x), torch.sigmoid(x))


def test_another_device(op: Op) -> None:
    """A tensor that the backend does not serve is refused, whichever argument it is."""
    case = harness.plain(op)
    for i in range(len(case.tensors())):
        given = [t.to("meta") if k == i else t for k, t in enumerate(case.tensors())]
        with pytest.raises(RuntimeError, match=rf"pydl: {op.name}.*meta"):
            op.function(*harness.bind(case, given), backend="cpu", **case.kwargs)


def test_meta_tensors(op: Op) -> None:
    """Shapes can be worked out on the meta device, as with torch, where no backend is named."""
    case = harness.plain(op)
    given = [t.to("meta") for t in case.tensors()]
    wanted = harness.called(op.native, case, case.tensors())
    for out, right in zip(harness.called(op.function, case, given), wanted, strict=True):
        assert out.is_meta and out.shape == right.shape


def test_every_reason_is_named() -> None:
    """One message lists all that is wrong."""
    x = torch.ones(2, 3, dtype=torch.int32, device="meta")
    with pytest.raises(RuntimeError, match=r"gelu.*cpu.*meta.*int32") as error:
        functional.gelu(x, backend="cpu")
    assert ";" in str(error.value)


def test_layouts_that_kernels_do_not_know(op: Op) -> None:
    """Sparse tensors are torch's by default, and refused by name where a kernel is asked for."""
    if len((case := op.cases(torch.float32)[-1]).tensors()) > 1:
        pytest.skip("torch takes no sparse tensor here")
    x = torch.eye(4).to_sparse()
    with pytest.raises(RuntimeError, match="dense strided"):
        op.function(x, *case.args[1:], backend="cpu", **case.kwargs)


def test_parameters_that_do_not_fit() -> None:
    """Shapes, dtypes and names that do not fit: op, argument, what it is and what is wanted."""
    x = torch.ones(2, 3, 4)
    wrong = [
        (lambda: functional.prelu(x, torch.ones(4), backend="cpu"), r"prelu: weight.*\(4,\).*3"),
        (lambda: functional.prelu(x, torch.ones(3, 1), backend="cpu"), r"prelu: weight.*\(3, 1\)"),
        (
            lambda: functional.prelu(x, torch.ones(3).double(), backend="cpu"),
            r"prelu.*float64.*float32",
        ),
        (lambda: functional.swish(x, torch.ones(2), backend="cpu"), r"swish: beta.*\(2,\).*3"),
        (
            lambda: functional.swish(x, torch.ones(1).half(), backend="cpu"),
            r"swish: beta.*float16.*float32",
        ),
        (lambda: functional.swish(torch.ones(3), torch.ones(3), backend="cpu"), r"swish: beta"),
        (
            lambda: functional.bias_act(x, torch.ones(3), backend="cpu"),
            r"bias_act: bias.*\(3,\).*\(4,\)",
        ),
        (
            lambda: functional.bias_act(x, torch.ones(4).half(), backend="cpu"),
            r"bias_act: bias.*float16",
        ),
        (
            lambda: functional.bias_act(torch.ones(()), torch.ones(1), backend="cpu"),
            r"bias_act: bias",
        ),
        (
            lambda: functional.gated_act(x, x[1:], backend="cpu"),
            r"gated_act: up.*\(1, 3, 4\).*\(2, 3, 4\)",
        ),
        (
            lambda: functional.gated_act(x, x.double(), backend="cpu"),
            r"gated_act: up.*float64.*float32",
        ),
        (lambda: functional.gelu(x, "tan", backend="cpu"), r"gelu: approximate is 'tan'"),
    ]
    for call, message in wrong:
        with pytest.raises(RuntimeError, match=f"pydl: {message}"):
            call()
    values = [
        (
            lambda: functional.bias_act(x, None, "softmax", backend="cpu"),
            r"act is 'softmax', wants one of",
        ),
        (
            lambda: functional.bias_act(x, None, "relu", act_param=2.0, backend="cpu"),
            r"relu has no parameter",
        ),
        (
            lambda: functional.bias_act(x, None, "relu", 1.5, backend="cpu"),
            r"dropout_p is 1.5, wants 0 to 1",
        ),
        (lambda: functional.gated_act(x, x, "softmax", backend="cpu"), r"act is 'softmax'"),
    ]
    for call, message in values:
        with pytest.raises(ValueError, match=message):
            call()


def test_errors_of_torch_remain(op: Op) -> None:
    """Without a backend named, what torch refuses it refuses in its own words."""
    if not hasattr(torch.nn.functional, op.name):
        pytest.skip("torch has no such function")
    for wrong in ("text", None, 3):
        with pytest.raises((TypeError, AttributeError)):
            op.function(wrong, *op.cases(torch.float32)[0].args[1:])  # type: ignore[arg-type]


def test_another_torch() -> None:
    """An extension built against another torch is refused at import, with the remedy."""
    _native.check("2.13.0", "2.13.0")
    with pytest.raises(
        ImportError, match=r"built against torch 2.11.0, but torch 2.13.0.*Remedy: .*pip install"
    ):
        _native.check("2.11.0", "2.13.0")


def test_a_missing_extension() -> None:
    """A folder of sources says that it is one."""
    code = "import sys; sys.modules['pydl._built'] = None; import pydl"
    done = harness.python(code)
    assert (
        done.returncode != 0
        and "pydl._C is missing" in done.stderr
        and "pip install" in done.stderr
    )


def test_the_environment_chooses() -> None:
    """PYDL_BACKEND yields to the context and the argument; a wrong one is refused at import."""
    code = """
import torch, pydl
from pydl import backends
print(backends.requested(None), backends.requested("torch"))
with pydl.use_backend("reference"):
    print(backends.requested(None))
with pydl.use_backend(None):
    print(backends.requested(None))
"""
    assert harness.python(code, PYDL_BACKEND="cpu").stdout.split() == [
        "cpu",
        "torch",
        "reference",
        "None",
    ]
    assert harness.python(code, PYDL_BACKEND="").stdout.split() == [
        "None",
        "torch",
        "reference",
        "None",
    ]
    done = harness.python("import pydl", PYDL_BACKEND="gpu")
    assert done.returncode != 0 and "PYDL_BACKEND is 'gpu', wants one of" in done.stderr


def test_the_environment_chooses_what_is_missing() -> None:
    """PYDL_BACKEND naming what cannot run here is an error of the call, not a fallback."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: no backend is unavailable")
    code = "import torch; from pydl import functional; functional.relu(torch.ones(2))"
    done = harness.python(code, PYDL_BACKEND="cuda", TRITON_INTERPRET="0")
    assert done.returncode != 0 and "relu: backend 'cuda' cannot serve this call" in done.stderr


def test_levels_that_are_none() -> None:
    """PYDL_CPU_LEVEL: a wrong name, or more than the CPU has, is refused at import."""
    done = harness.python("import pydl", PYDL_CPU_LEVEL="sse9")
    assert done.returncode != 0
    assert "ValueError: pydl: PYDL_CPU_LEVEL is sse9, wants baseline, avx2 or avx512" in done.stderr
    assert "build it again" not in done.stderr
    if _native.C.machine_level() != "avx512":
        done = harness.python("import pydl", PYDL_CPU_LEVEL="avx512")
        assert done.returncode != 0 and "but this CPU has" in done.stderr


@pytest.mark.parametrize("jobs", ["abc", "0", "-2", "1.5"])
def test_compilers_at_once_that_are_no_number(jobs: str, tmp_path: Path) -> None:
    """MAX_JOBS: the build ends with its name and a remedy before anything is compiled."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)],
        cwd=harness.ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "MAX_JOBS": jobs},
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"pydl: MAX_JOBS is '{jobs}'\npydl: remedy: " in done.stderr


def test_triton_is_missed_only_where_it_is_wanted() -> None:
    """Without Triton everything else works; asking for it says so, and how to get it."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import torch, pydl
from pydl import functional
functional.gelu(torch.ones(3, requires_grad=True), backend="cpu").sum().backward()
functional.gelu(torch.ones(3))
for _ in range(2):
    try:
        functional.gelu(torch.ones(3), backend="triton")
    except RuntimeError as error:
        print(error)
"""
    done = harness.python(code)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1], done.stderr
    assert "Triton does not import" in lines[0] and "pip install 'triton" in lines[0]


def test_a_row_twice() -> None:
    """The table refuses a second op of one name."""
    with pytest.raises(ValueError, match="has an op 'relu' already"):
        register(TABLE["relu"])


@pytest.mark.parametrize("asked", [None, "torch", "reference", "cpu"])
def test_numbers_that_are_no_ints(asked: str | None) -> None:
    """torch's type of error, and what is wanted."""
    x = torch.randn(2, 64)
    ours = asked in ("reference", "cpu")
    for op in (functional.layer_norm, functional.rms_norm):
        for shape in ((64.0,), torch.tensor([64]), 64, "64", (True,), {64}):
            match = f"pydl: {op.__name__}: normalized_shape is .*ints, such as" if ours else "ints"
            with pytest.raises(TypeError, match=match):
                op(x, shape, backend=asked)
        op(x, [np.int64(64)], backend=asked)
    for op in (functional.add_layer_norm, functional.add_rms_norm):
        with pytest.raises(TypeError, match=rf"pydl: {op.__name__}: .* 64, wants a list .*\[64\]"):
            op(x, x, 64, backend=asked)
    for groups in (True, 2.0):
        match = "pydl: group_norm: num_groups is .*, wants an int" if ours else "must be int"
        with pytest.raises(TypeError, match=match):
            functional.group_norm(x, groups, backend=asked)


@pytest.mark.parametrize("asked", [None, "torch", "reference", "cpu"])
def test_activations_that_there_are_not(asked: str | None) -> None:
    """Whichever way it goes, the op that was called is named."""
    x = torch.randn(2, 6, 3)
    with pytest.raises(ValueError, match="pydl: group_norm: act is 'nope', wants one of identity"):
        functional.group_norm(x, 2, act="nope", backend=asked)
    with pytest.raises(ValueError, match="pydl: batch_norm_act: act is 'nope'"):
        functional.batch_norm_act(x, None, None, training=True, act="nope", backend=asked)


@pytest.mark.parametrize("asked", [None, "torch", "reference", "cpu"])
def test_arguments_of_another_kind(asked: str | None) -> None:
    """What is no number, no dimension or no pattern is named, whoever computes."""
    x = torch.ones(2, 3)
    for beta in ("a", None, 1j):
        with pytest.raises(TypeError, match=f"pydl: swish: beta is {beta!r}, wants a number or"):
            functional.swish(x, beta, backend=asked)  # type: ignore[arg-type]
    assert torch.equal(
        functional.swish(x, np.float32(2), backend=asked), functional.swish(x, 2.0, backend=asked)
    )
    for dim in (2, -3):
        for bias in (torch.ones(3), None):
            with pytest.raises(IndexError, match=rf"bias_act: dim is {dim}, wants -2 to 1 for .*3"):
                functional.bias_act(x, bias, dim=dim, backend=asked)


def test_patterns_and_channels_of_another_kind() -> None:
    for name in ("include", "exclude"):
        with pytest.raises(TypeError, match=f"pydl: replace: {name} has 3, wants module types"):
            pydl.replace(torch.nn.Sequential(torch.nn.ReLU()), **{name: 3})  # type: ignore[arg-type]
    for expansion in (0, -2):
        with pytest.raises(ValueError, match=f"BottleneckBlock: expansion is {expansion}, wants 1"):
            pydl.nn.BottleneckBlock(6, 8, expansion=expansion)
