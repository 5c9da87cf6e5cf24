"""Recognises activations and normalisations of Hugging Face's transformers by what they compute.

A copy of the module with random parameters runs on random inputs. It has a twin where a function of
pydl gives the same values and gradients: the module's are those of the definition in fp64 but for
rounding, and the kernels' are as near to that as `pydl.table.judge` asks, in fp32, fp16 and bf16.
Names play no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pydl.nn.derived import Derived, Form, apply
from pydl.table import judge

PACKAGE = "transformers"
NEEDED = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (
    Form("gelu"),
    Form("gelu", (("approximate", "tanh"),)),
    Form("silu"),
    Form("swish", (("beta", 1.702),)),
    Form("mish"),
    Form("relu"),
    Form("tanh"),
    Form("sigmoid"),
)
# A module that rounds after each of its few steps is off by some units of the last place.
_UNITS = 8
_NO_TWIN = "computes what no function of pydl does"
_Key = tuple[Any, ...]


def origin(cls: type) -> type | None:
    """The class of transformers that a type is or derives from; None where there is none."""
    return next((c for c in cls.__mro__ if c.__module__.partition(".")[0] == PACKAGE), None)


def candidate(module: nn.Module) -> bool:
    """Whether a module has the parts of an activation or normalisation: no children, no buffers,
    and no parameters but a weight, and a bias, of one dimension."""
    if module._modules or module._buffers or origin(type(module)) is None:
        return False
    sizes = {None if p is None else p.shape for p in module._parameters.values()} - {None}
    if not module._parameters.keys() <= {"weight", "bias"} or len(sizes) > 1:
        return False
    return all(len(size) == 1 and size[0] > 0 for size in sizes if size is not None)


class Recogniser:
    """Finds forms, once for modules of one class and the same attributes."""

    def __init__(self) -> None:
        self._known: dict[_Key, Form | str] = {}

    def __call__(self, module: nn.Module) -> Form | str:
        """The form of a candidate, or why it has none."""
        key = _key(module)
        if key is not None and key in self._known:
            return self._known[key]
        with (
            torch.random.fork_rng(()),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            found = _recognise(module)
        if key is not None:
            self._known[key] = found
        return found


def named(module: nn.Module) -> bool:
    """Whether a report should tell why a candidate has no twin: it has a weight, or stands among
    the package's activations."""
    cls = origin(type(module))
    return bool(module._parameters) or (
        cls is not None and cls.__module__ == f"{PACKAGE}.activations"
    )


def _key(module: nn.Module) -> _Key | None:
    """What a form depends on; None where that cannot be compared."""
    own = []
    for name, value in sorted(vars(module).items()):
        if not isinstance(value, dict):
            if isinstance(value, Tensor):
                return None
            plain = frozenset(value) if isinstance(value, set) else value
            own.append((name, type(value), getattr(plain, "__func__", plain)))
    sizes = [(n, None if p is None else p.shape) for n, p in module._parameters.items()]
    key = (type(module), getattr(type(module), "forward"), *own, *sizes)  # noqa: B009
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _shadow(module: nn.Module, dtype: torch.dtype) -> Any:
    """The same module with random parameters on the CPU."""
    made: Any = object.__new__(type(module))
    object.__setattr__(made, "__dict__", dict(vars(module)))
    generator = torch.Generator().manual_seed(1)
    vars(made)["_parameters"] = {
        name: None if p is None else nn.Parameter(_randn(generator, *p.shape).to(dtype))
        for name, p in module._parameters.items()
    }
    return made


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _inputs(columns: int, dtype: torch.dtype) -> list[Tensor]:
    """Of two, three and four dimensions. For an activation also values of every size that the dtype
    has; for a normalisation rows so small that eps counts."""
    generator = torch.Generator().manual_seed(2)
    size = columns or 33
    drawn = [3 * _randn(generator, *lead, size) for lead in ((6,), (2, 3), (2, 3, 2))]
    if columns:
        drawn += [10.0**power * _randn(generator, 4, size) for power in (-3, -2, 1)]
    else:
        top = torch.log10(torch.tensor(torch.finfo(dtype).max, dtype=torch.float64)) - 0.5
        sizes = 10 ** torch.linspace(-6, float(top), 96, dtype=torch.float64, device="cpu")
        drawn.append(torch.cat((sizes, -sizes)))
    return [x.to(dtype) for x in drawn]


def _recognise(module: nn.Module) -> Form | str:
    try:
        forms = [form for form in _possible(module) if _same(module, form, torch.float32)]
    except Exception as error:
        return f"does not run on random inputs ({type(error).__name__}: {error})"
    for form in forms:
        dtypes = [d for d in (*NEEDED, torch.float64) if _same(module, form, d)]
        missing = [str(d).removeprefix("torch.") for d in NEEDED if d not in dtypes]
        if not missing:
            return form._replace(dtypes=tuple(dtypes), direct=_direct(module))
        return f"computes {form}, but not in {' and '.join(missing)}"
    return _NO_TWIN


def _possible(module: nn.Module) -> Iterator[Form]:
    """Forms that the module has the attributes for."""
    if not module._parameters:
        yield from ACTIVATIONS
        return
    if module._parameters.get("weight") is None:
        return
    for name, value in vars(module).items():
        if isinstance(value, float) and 0 < value < 0.1:
            yield Form("layer_norm", eps=name)
            if module._parameters.get("bias") is None:
                yield Form("rms_norm", eps=name)
                yield Form("rms_norm", eps=name, offset=1)


def _flow(function: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of x and of the weights."""
    x = x.detach().requires_grad_()
    y = function(x)
    dy = _randn(torch.Generator().manual_seed(3), *y.shape).to(x.dtype).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], dy)]


def _same(module: nn.Module, form: Form, dtype: torch.dtype) -> bool:
    """Whether module and form have the same values and gradients in a dtype."""
    theirs, exact = _shadow(module, dtype), _shadow(module, dtype)
    for name, parameter in exact._parameters.items():
        if parameter is not None:
            exact._parameters[name] = nn.Parameter(parameter.detach().double())

    def forward(x: Tensor) -> Tensor:
        return type(module).forward(theirs, x)

    def definition(x: Tensor) -> Tensor:
        return apply(form, exact, x, "reference")

    def ours(x: Tensor) -> Tensor:
        return apply(form, theirs, x, "cpu")

    weights, exact_weights = (
        [p for p in one._parameters.values() if p is not None] for one in (theirs, exact)
    )
    for training in (True, False):
        vars(theirs)["training"] = training
        for x in _inputs(weights[0].numel() if weights else 0, dtype):
            native = _flow(forward, x, weights)
            if native[0].dtype != dtype or native[0].shape != x.shape:
                return False
            want = _flow(definition, x.double(), exact_weights)
            if not all(map(_near, native, want, [x] + [None] * len(want))):
                return False
            got = _flow(ours, x, weights)
            for i, (a, b, c) in enumerate(zip(got, want, native, strict=True)):
                if i:  # autograd of a formula may have inf - inf where the true value is finite
                    known = b.isfinite() & c.isfinite()
                    a, b, c = a[known], b[known], c[known]
                terms = x.numel() / max(1, b.numel()) if i > 1 else 0.0
                if b.numel() and not judge(a, b, c, terms)[0]:
                    return False
    return True


def _near(native: Tensor, want: Tensor, x: Tensor | None) -> bool:
    """Whether a module's values (of x) or gradients are a definition's but for rounding."""
    info = torch.finfo(native.dtype)
    known = want.isfinite() & (want.abs() < info.max)
    if x is None:
        known &= native.isfinite()
    a, b = native.double()[known], want[known]
    # What cancels inside a formula loses units of its input, elsewhere of the largest value.
    size = b.abs().max() if x is None or x.dim() > 1 else b.abs() + x.double().abs()[known]
    return bool(b.numel() == 0 or ((a - b).abs() <= _UNITS * info.eps * size + info.tiny).all())


class _Calls(TorchFunctionMode):
    """Counts the functions of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _direct(module: nn.Module) -> bool:
    """Whether a module calls one function of torch and nothing else."""
    if module._parameters:
        return False
    shadow, x = _shadow(module, torch.float32), _inputs(0, torch.float32)[0]
    with _Calls() as calls:
        type(module).forward(shadow, x)
    return calls.count == 1


def is_derived(cls: type) -> bool:
    """Whether a type is a twin made from a form."""
    return issubclass(cls, Derived)
