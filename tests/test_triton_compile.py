"""Every Triton kernel compiles ahead of time for sm_80, sm_90 and sm_100, with no GPU: full
registers' worth of bytes per access where the data is aligned, and no spills."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

CAPABILITIES = (80, 90, 100)

# Name -> (module, kernel, pointers, fp64 pointers, integers, floats, constants). Pointers but the
# fp64 and `seed` are of the dtype under test.
_ACTS = (2, 7, 8)
# How channels' kernels are given a tile: of the inner dimension, of many rows of a short one, of
# channels. None stands for as many elements as 16 bytes hold.
_TILES = {
    "inner": {"LAST": False, "PACK": None, "ROWS": 1, "COLUMNS": 1024},
    "short": {"LAST": False, "PACK": 1, "ROWS": 8, "COLUMNS": 64},
    "last": {"LAST": True, "PACK": None, "ROWS": 8, "COLUMNS": 128},
}
_NORMED = {"ACT": 7, "RESIDUAL": True, "WEIGHT": True, "BIAS": True}
_SCORE_TILE = {"ROWS": 16, "OTHERS": 8, "NUMBERS": 16}
KERNELS = {
    **{
        f"unary_fwd {a}": ("activation", "unary_fwd_kernel", {"ACT": a, "BLOCK": 1024})
        for a in _ACTS
    },
    **{
        f"unary_bwd {a}": ("activation", "unary_bwd_kernel", {"ACT": a, "BLOCK": 1024})
        for a in _ACTS
    },
    "learnt_fwd": ("activation", "learnt_fwd_kernel", {"SWISH": True, "BLOCK": 1024}),
    "learnt_columns": (
        "activation",
        "learnt_columns_kernel",
        {"SWISH": True, "ROWS": 16, "COLUMNS": 64},
    ),
    "learnt_rows": ("activation", "learnt_rows_kernel", {"SWISH": False, "BLOCK": 1024}),
    "bias_fwd": ("bias_act", "fwd_kernel", {"ACT": 7, "DROPOUT": False, "BLOCK": 1024}),
    "bias_fwd dropout": ("bias_act", "fwd_kernel", {"ACT": 7, "DROPOUT": True, "BLOCK": 1024}),
    "bias_bwd columns": (
        "bias_act",
        "bwd_kernel",
        {"ACT": 7, "DROPOUT": True, "COLUMNS_FIRST": True, "ROWS": 16, "COLUMNS": 64},
    ),
    "bias_bwd rows": (
        "bias_act",
        "bwd_kernel",
        {"ACT": 11, "DROPOUT": False, "COLUMNS_FIRST": False, "ROWS": 1, "COLUMNS": 512},
    ),
    "gated_fwd": ("gated_act", "fwd_kernel", {"ACT": 9, "BLOCK": 1024}),
    "gated_bwd": ("gated_act", "bwd_kernel", {"ACT": 7, "BLOCK": 1024}),
    "norm_fwd": (
        "layer_norm",
        "fwd_kernel",
        {"CENTRED": True, "WEIGHT": True, "BIAS": True, "ONE": True, "BLOCK": 1024},
    ),
    "norm_bwd": (
        "layer_norm",
        "bwd_kernel",
        {"CENTRED": True, "WEIGHT": True, "SUMS": True, "BLOCK": 1024},
    ),
    "norm_bwd long": (
        "layer_norm",
        "bwd_long_kernel",
        {"CENTRED": True, "WEIGHT": True, "SUMS": True, "BLOCK": 1024},
    ),
    **{
        f"{kernel} {form}": ("channel_norm", f"{kernel}_kernel", {**tile, **constants})
        for form, tile in _TILES.items()
        for kernel, constants in {
            "moments": {"ROWS": 2 * tile["ROWS"]},
            "apply": _NORMED,
            "sums": {**_NORMED, "STORED": True},
            "dx": {**_NORMED, "CENTRED": True, "ALONE": True},
        }.items()
    },
    "join_moments": (
        "channel_norm",
        "join_moments_kernel",
        {"COLUMNS": 1024, "ENTRIES": 32, "GROUPS": 8},
    ),
    "totals": (
        "channel_norm",
        "totals_kernel",
        {"TOTALS": True, "DBIAS": True, "DWEIGHT": True, "ROWS": 32, "COLUMNS": 8},
    ),
    "group_sums": ("channel_norm", "group_sums_kernel", {"WEIGHT": True, "BLOCK": 128}),
    **{
        f"add_norm_fwd{label}": (
            "add_norm",
            "fwd_kernel",
            {"CENTRED": True, "WEIGHT": True, "BIAS": True, **options, "BLOCK": 1024},
        )
        for label, options in {
            "": {"DROPOUT": False, "ONE": True},
            " dropout": {"DROPOUT": True, "ONE": True},
            " long": {"DROPOUT": True, "ONE": False},
        }.items()
    },
    **{
        f"add_norm_bwd{label}": (
            "add_norm",
            f"bwd{'_long' if 'long' in label else ''}_kernel",
            {"CENTRED": True, "WEIGHT": True, "SUMS": True, **options, "BLOCK": 1024},
        )
        for label, options in {
            "": {"MORE": True, "TWO": False, "DROPOUT": False},
            " dropout": {"MORE": True, "TWO": True, "DROPOUT": True},
            " long": {"MORE": True, "TWO": True, "DROPOUT": True},
        }.items()
    },
    **{
        f"score_fwd {number}": (
            "score",
            "fwd_kernel",
            {"ADDITIVE": number == 0, "ROWS": 16, "OTHERS": 16, "NUMBERS": 16},
        )
        for number in (0, 1)
    },
    **{
        f"score_bwd {number} {of}": (
            "score",
            "bwd_kernel",
            {"ADDITIVE": number == 0, "OF_QUERIES": of == "queries", **_SCORE_TILE},
        )
        for number in (0, 1)
        for of in ("queries", "keys")
    },
    "add_partials": ("common", "add_partials_kernel", {"BLOCK": 32}),
}
_FLOATS = {"p", "scale", "eps", "factor"}
_COUNTS = {
    "n",
    "rows",
    "outer",
    "channels",
    "inner",
    "pieces",
    "outer_pieces",
    "inner_pieces",
    "limit",
    "stride",
    "run",
    "groups",
    "parts",
    "apart",
    "count",
    "queries",
    "keys",
    "width",
    "query_tiles",
    "key_tiles",
    "others",
    "row_stride",
    "other_stride",
    "tiles",
    "blocks",
}
_FP32 = dict.fromkeys(
    ("mean", "rest", "var", "rstd", "scores", "dscores", "dmine", "dweight"), "*fp32"
)
_FP64 = dict.fromkeys(("partials", "totals", "sums"), "*fp64")

# Attention's kernels: label -> (module, kernel, padded width, what its Form has on, options, the
# others being chosen by width, dtype and capability).
_BARE = dict.fromkeys(
    ("PACKED", "WINDOW", "MASK", "SOFTCAP", "RELATIVE", "DROPOUT", "NATURAL", "PLAIN", "EVEN"), 0
)
_CAUSAL = {"WINDOW": True, "PLAIN": True, "EVEN": True}
_EVERYTHING = {
    "PACKED": True, "WINDOW": True, "MASK": 2, "SOFTCAP": True, "RELATIVE": True, "DROPOUT": 4,
}  # fmt: skip
ATTENTION = {
    **{
        f"{kernel} {width}": (module, kernel, width, _CAUSAL)
        for kernel, module in (
            ("fwd", "attention"),
            ("dkv", "attention_backward"),
            ("dq", "attention_backward"),
        )
        for width in (64, 128)
    },
    "fwd everything": ("attention", "fwd", 64, _EVERYTHING),
    "dkv everything": ("attention_backward", "dkv", 32, _EVERYTHING),
    "dq everything": ("attention_backward", "dq", 32, _EVERYTHING),
    "dmask": ("attention_bias", "dmask", 64, {"MASK": 2}),
    "diagonal": ("attention_bias", "diagonal", 64, {"WINDOW": True, "RELATIVE": True}),
    "drelative": ("attention_bias", "drelative", 64, {}),
    "rows": ("attention_tile", "rows", 64, {}),
}


def _attention(label: str, dtype: str, capability: int) -> tuple[dict, dict, dict]:
    """(signature, constants, options); what is a tuple on the device is a list with its name."""
    from pydl.kernels import attention, attention_backward, attention_bias

    module, kernel, width, on = ATTENTION[label]
    size = 4 if dtype == "fp32" else 2
    side, bias_options = attention_bias.shape(width, size)
    tile: dict = {
        "fwd": attention.shape(width, size, 4096),
        "dkv": attention_backward.dkv_shape(width, size, capability // 10),
        "dq": attention_backward.dq_shape(width, size),
        "dmask": {**bias_options, "OF_QUERIES": True, "OF_KEYS": True, "BLOCK_Q": side,
                  "BLOCK_K": side},
        "diagonal": {**bias_options, "N": side},
        "drelative": {"N": side, "BLOCK": 128},
        "rows": {"DLSE": True, "NATURAL": size == 4, "BLOCK": 64},
    }[kernel]  # fmt: skip
    options = {n: tile.pop(n) for n in ("num_warps", "num_stages") if n in tile}
    form = {**_BARE, **on, "NATURAL": size == 4}
    form["PLAIN"] = form["PLAIN"] and size == 2
    constants = {"FORM": ["Form", *form.values()], "WIDTH": width, "VALUES": width, **tile}
    rows = ["Rows", f"*{dtype}", "i32", "i32", "i32"]
    bias = ["Bias", f"*{dtype}", "i32", "i32", "i32", "i32"]
    kinds = {
        "inputs": ["Inputs", rows, rows, rows, bias, bias, "*i64", "*i64", "*i64"],
        "numbers": ["Numbers", *["fp32"] * 5, "i64", "fp32"],
        **dict.fromkeys(("out", "dout", "dq", "dk", "dv"), rows),
        "dlse": ["Rows", "*fp32", "i32", "i32", "i32"],
        **dict.fromkeys(("lse", "rest", "row_numbers", "to", "sums", "drelative"), "*fp32"),
    }
    if kernel == "drelative":
        kinds["sums"] = "*fp32"
    signature = {
        a: "constexpr" if a in constants else kinds.get(a, "i32")
        for a in _arguments(module, f"{kernel}_kernel")
    }
    return signature, {k: v for k, v in constants.items() if k in signature}, options


# Linear attention's: label -> (module, kernel, padded width, what its Form has on).
_EVERY_FORM = {
    "DECAY": True, "HIDDEN": True, "BEGIN": True, "PIECES": True, "END": True, "LOGS": True,
}  # fmt: skip
LINEAR = {
    "output 64": ("linear_attention_mix", "mix", 64, {"ROLE": 0}),
    "dq everything": ("linear_attention_mix", "mix", 32, {"ROLE": 1, **_EVERY_FORM}),
    "dk 64": ("linear_attention_mix", "mix", 64, {"ROLE": 2, "GROUPED": True}),
    "totals 64": ("linear_attention_state", "totals", 64, {"ROLE": 3, "DECAY": True}),
    "scan": ("linear_attention_state", "scan", 64, {}),
    "powers": ("linear_attention_state", "powers", 64, {}),
    "rho": ("linear_attention", "rho", 64, {}),
    "decay": ("linear_attention", "decay", 64, {}),
}


def _linear(label: str, dtype: str, capability: int) -> tuple[dict, dict, dict]:
    """The same as `_attention` gives."""
    from pydl.kernels import linear_attention_call as call

    module, kernel, width, on = LINEAR[label]
    form = {"ROLE": 0, "CAUSAL": True, "NORMALIZE": True, "FEATURE": 1, "DECAY": False,
            "HIDDEN": False, **on}  # fmt: skip
    size, logs = 4 if dtype == "fp32" else 2, form.get("LOGS", False)
    tile = call.shape(width, width, size, capability // 10, logs)
    if kernel == "totals":
        tile = call.totals_shape(width, width, size)
    constants = {"FORM": ["linear_attention_call.Form", *call.Form(**form)], **tile}
    own: dict = {
        "scan": {"BACK": True, "BEGIN": True, "END": True, "DECAY": True, "BLOCK": 128},
        "powers": {"COUNT": 65, "BLOCK": 128},
        "rho": {"BLOCK": 64, "VALUES": 64},
        "decay": {"BLOCK": 256},
    }
    options = {n: constants.pop(n) for n in ("num_warps", "num_stages")}
    options = {"num_warps": 4} if kernel in own else options
    constants = own.get(kernel, constants)
    rows = ["Rows", f"*{dtype}", "i32", "i32", "i32"]
    states = ["linear_attention_call.States", "*fp32", "*fp32", "i32", "i32"]
    kinds = {
        "inputs": [
            "linear_attention_call.Inputs",
            *[rows] * 4,
            *["*fp32"] * 3,
            "*u8",
            "i32",
            "i32",
        ],
        **dict.fromkeys(("y", "dout", "out"), rows),
        **dict.fromkeys(("begin", "end", "cut"), states),
        **dict.fromkeys(("raw", "factor", "rho", "decay", "ddecay", "powers"), "*fp32"),
        **dict.fromkeys(("scale", "eps"), "fp32"),
        "logs": "*fp64",
    }
    signature = {
        a: "constexpr" if a in constants else kinds.get(a, "i32")
        for a in _arguments(module, f"{kernel}_kernel")
    }
    return signature, constants, options


# Run in a process of its own: the interpreter, which other tests use, replaces the compiler.
_SCRIPT = """
import importlib, json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
jobs = json.load(sys.stdin)
call = importlib.import_module("pydl.kernels.attention_call")


def made_of(x):
    if not isinstance(x, list):
        return x
    module, _, name = x[0].rpartition(".")
    module = importlib.import_module("pydl.kernels." + (module or "attention_call"))
    return getattr(module, name)(*map(made_of, x[1:]))


def pointers(kind, path):
    # And the strides beside them.
    if isinstance(kind, tuple):
        aligned = type(kind) is not call.Numbers
        return [p for n, k in enumerate(kind) if aligned for p in pointers(k, (*path, n))]
    return [path] if kind.startswith("*") or len(path) > 1 else []


for label, module, name, signature, constants, capability, out, options in jobs:
    kernel = getattr(importlib.import_module(f"pydl.kernels.{module}"), name)
    signature = {k: made_of(v) for k, v in signature.items()}
    constants = {k: made_of(v) for k, v in constants.items()}
    # Pointers and the first count are multiples of 16, as they are for whole tensors.
    attributes = {
        path: [["tt.divisibility", 16]]
        for i, (arg, kind) in enumerate(signature.items())
        for path in ([(i,)] if arg in ("n", "width", "value_width") else pointers(kind, (i,)))
    }
    source = ASTSource(kernel, signature, constants, attributes)
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    open(out, "wb").write(made.asm["cubin"])
    open(out + ".ptx", "w").write(made.asm["ptx"])
"""


def _arguments(module: str, name: str) -> list[str]:
    text = (Path(__file__).parents[1] / "kernels" / f"{module}.py").read_text()
    found = re.search(rf"def {name}\((.*?)\):", text, re.S)
    assert found, name
    given = found.group(1).replace("\n", " ").split(",")
    return [a.split(":")[0].strip() for a in given if a.strip()]


def _signature(module: str, name: str, dtype: str, constants: dict) -> dict[str, str]:
    kinds = {}
    for argument in _arguments(module, name):
        if argument in constants:
            kinds[argument] = "constexpr"
        elif argument in _FLOATS:
            kinds[argument] = "fp32"
        elif argument in _COUNTS:
            kinds[argument] = "i64" if argument in ("n", "limit") else "i32"
        else:
            fixed = {"seed": "*i64", **_FP32, **_FP64}
            kinds[argument] = fixed.get(argument, f"*{dtype}")
    return kinds


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], Path]:
    import json

    folder = tmp_path_factory.mktemp("cubins")
    jobs: list = []
    made = {}
    for label, (module, name, constants) in KERNELS.items():
        for dtype, pack in (("fp32", 4), ("bf16", 8)):
            given = {k: pack if v is None else v for k, v in constants.items()}
            for capability in CAPABILITIES:
                out = folder / f"{label.replace(' ', '_')}.{dtype}.{capability}.cubin"
                made[label, dtype, capability] = out
                jobs.append(
                    (
                        label,
                        module,
                        name,
                        _signature(module, name, dtype, given),
                        given,
                        capability,
                        str(out),
                        {"num_warps": 4},
                    )
                )
    families: list[tuple[str, dict, Callable]] = [
        ("attention", ATTENTION, _attention), ("linear_attention", LINEAR, _linear),
    ]  # fmt: skip
    for family, labels, given_by in families:
        for label, (module, kernel, *_) in labels.items():
            for dtype, capability in itertools.product(("fp32", "bf16"), CAPABILITIES):
                out = folder / f"{family}_{label.replace(' ', '_')}.{dtype}.{capability}.cubin"
                made[f"{family} {label}", dtype, capability] = out
                signature, given, options = given_by(label, dtype, capability)
                name = f"{kernel}_kernel"
                jobs.append((label, module, name, signature, given, capability, str(out), options))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return made


def test_compiles(cubins: dict[tuple[str, str, int], Path]) -> None:
    assert all(path.stat().st_size > 0 for path in cubins.values())


def test_no_spills(cubins: dict[tuple[str, str, int], Path]) -> None:
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    bad = []
    for key, path in cubins.items():
        text = subprocess.run(
            [dump, "--dump-resource-usage", path], capture_output=True, text=True
        ).stdout
        used = re.search(r"REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", text)
        assert used, text
        if key[0].endswith("everything"):
            continue  # too much at once to fit: what matters is that it compiles
        if used.group(1) != "0" or used.group(2) != "0":
            bad.append((key, used.group(0)))
    assert not bad


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_accesses_are_wide(
    cubins: dict[tuple[str, str, int], Path], dtype: str, capability: int
) -> None:
    normed = [
        f"{kernel} {form}" for kernel in ("apply", "sums", "dx") for form in ("inner", "last")
    ]
    for label in ("unary_fwd 7", "unary_bwd 7", "gated_fwd", "gated_bwd", *normed):
        ptx = Path(f"{cubins[label, dtype, capability]}.ptx").read_text()
        # 1024 elements over 128 threads: 16 bytes a thread in bf16, twice that in fp32.
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx), label
        assert re.search(r"st\.global\S*\.v4\.b32", ptx), label
        # Alone come a channel's weight and bias.
        alone = re.findall(r"(?:ld|st)\.global\S*\.b16", ptx)
        assert len(alone) <= (2 if label in normed else 0), label
