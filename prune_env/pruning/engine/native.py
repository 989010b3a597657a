"""The compiled kernel: built once with the system's C compiler, kept in the user's cache, called through ctypes.

Without a compiler everything works, by torch's own operations (`grouped.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).with_name("kernel")
HEADER, SOURCES = FOLDER / "layer.h", tuple(FOLDER / name for name in ("decide.c", "convolve.c", "pool.c"))
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w")
THREADED = "-fopenmp"
SECONDS = 120
"""Longest time that compiling may take."""

HUGE_PAGE = 2 << 20

SWITCH = "PRUNE_ENV_NATIVE"
"""Environment variable: 0 runs without the compiled kernel."""


class Layer(Structure):
    """`Layer` of layer.h."""

    _fields_ = [
        *((name, c_int) for name in ("inputs", "outputs")),
        *((name, c_int * 2) for name in ("kernel", "stride", "padding", "dilation")),
        *((name, c_void_p) for name in ("weight", "scale", "shift")),
        ("rectify", c_int),
    ]


class Gate(Structure):
    """`Gate` of decide.c."""

    _fields_ = [
        *((name, c_int) for name in ("full", "rectify")),
        *((name, c_void_p) for name in ("weight", "bias", "shift", "score", "doubted", "behind", "column")),
        *((name, c_double) for name in ("trust", "keep")),
    ]


class Policy(Structure):
    """`Policy` of decide.c."""

    _fields_ = [
        ("hidden", c_int),
        *((name, c_void_p) for name in ("recurrent", "encoded", "spent", "previous", "head")),
        ("head_bias", c_float),
        *((name, c_double) for name in ("least", "dense_macs", "spent_first")),
        ("terms", c_int),
        *((name, c_void_p) for name in ("weight", "first", "second")),
    ]


class Seat(Structure):
    """`Seat` of decide.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("pooled", "runtime", "encoder_bias", "recurrent_bias")),
        *((name, c_float) for name in ("pooled_mean", "pooled_factor", "runtime_mean", "runtime_factor")),
        *((name, c_double) for name in ("even", "constant_macs")),
        *((name, c_void_p) for name in ("first", "second")),
    ]


class Memory(Structure):
    """`Memory` of decide.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("hidden", "cell", "first", "second")),
        *((name, c_double) for name in ("previous", "spent")),
    ]


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler, or it fails, or `PRUNE_ENV_NATIVE=0`."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    for flags in ((*FLAGS, THREADED), FLAGS):
        try:
            library = ctypes.CDLL(str(_built(flags)))
        except (OSError, RuntimeError, subprocess.SubprocessError):
            # Threads come from the OpenMP that torch has loaded; a build that does not find it runs on one thread.
            continue
        _declare(library)
        return library
    return None


def compiled() -> bool:
    """Whether deployed networks run on the compiled kernel here."""
    return kernel() is not None


def paged(values: Tensor) -> Tensor:
    """A copy on huge pages where the system has them: rows of a large weight are read here and there."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return values.clone()
    room = mmap.mmap(-1, (values.nbytes // HUGE_PAGE + 2) * HUGE_PAGE)
    with contextlib.suppress(OSError):
        room.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(room, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    copy = whole[start : start + values.nbytes].view(values.dtype).view(values.shape)
    return copy.copy_(values)


def _declare(library: ctypes.CDLL) -> None:
    pointer, number = c_void_p, c_int
    library.begin.restype, library.begin.argtypes = None, [pointer, pointer]
    library.decide.restype = c_int
    library.decide.argtypes = [
        POINTER(Layer), POINTER(Gate), pointer, pointer, pointer, pointer, number, pointer, number,
        pointer, pointer, pointer, pointer, pointer, number,
    ]  # fmt: skip
    library.convolve.restype = None
    library.convolve.argtypes = [
        POINTER(Layer), pointer, number, number, number, pointer, pointer, number, pointer, number,
        pointer, pointer, pointer, pointer, number,
    ]  # fmt: skip
    library.pool_largest.restype = library.pool_mean.restype = None
    library.pool_largest.argtypes = [pointer, *(number,) * 3, *(pointer,) * 3, number, number, pointer]
    library.pool_mean.argtypes = [pointer, number, number, pointer]
    library.convolve_space.restype = c_long
    library.convolve_space.argtypes = [POINTER(Layer), number, number]


def _built(flags: tuple[str, ...]) -> Path:
    """The shared library for this source, compiler and processor, compiled if it is not in the cache.

    Raises:
        OSError: No compiler, or no place to write.
        RuntimeError: The user has no home.
        subprocess.SubprocessError: The compiler failed.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler")
    key = hashlib.sha256(HEADER.read_bytes())
    for source in SOURCES:
        key.update(source.read_bytes())
    for fact in (*flags, compiler, platform.machine(), _processor(), torch.__version__):
        key.update(fact.encode() + b"\0")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prune_env"
    library = home / f"kernel-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as draft:
        made, linked = [Path(draft) / f"{source.stem}.o" for source in SOURCES], Path(draft) / "kernel.so"
        commands = [
            ("-c", str(source), "-o", str(target), *flags) for source, target in zip(SOURCES, made, strict=True)
        ]
        # Linked without the compiler's own OpenMP: a second pool of threads would stall torch's.
        commands.append(("-shared", *map(str, made), "-o", str(linked), "-lm"))
        for command in commands:
            subprocess.run((compiler, *command), check=True, capture_output=True, timeout=SECONDS)
        os.replace(linked, library)
    return library


def _processor() -> str:
    """What the compiler's `native` stands for: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines[:40] if line.startswith(("model name", "flags", "Features")))
