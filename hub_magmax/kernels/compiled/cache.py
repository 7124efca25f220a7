"""Compiled loops as machine code that outlasts the process, called without their compiler.

numba keeps what it compiled as well, but importing it and finding its way back takes .9 s in every process,
measured, as long as merging 0.1B parameters; llvmlite alone, on which numba stands, takes .03 s.

    largest = cache.task_vectors(stored, rows)

calls `merge.task_vectors`; other loops are in the modules beside it. A loop takes arrays without gaps,
numbers, and named tuples of both, allocates nothing, and returns an int64. It lets other threads run.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy as np

from hub_magmax.kernels.structures import Bits, Merging, Reading
from hub_magmax.text import step

LOG = logging.getLogger(__name__)

#: Elements of all rows that are worked on at a time: they stay in the nearest caches.
BLOCK = 2048

#: Elements of a row that are worked on at once: as many float32 numbers as the widest registers hold.
#: Narrower registers are used several at a time.
LANES = 16

#: Additional places that an array of places in a block needs: they are written a few at a time.
SPARE = 4

#: Elements of rows that are sorted at a time.
SORTED = 2**17

#: High bits of a key that nearly always tell which task a mix draws.
MIX_BITS = 12

#: Numbers of operations; they stand in the compiled code. First come sums, of which those after `AGREEING`
#: leave something out of each task vector; then means of what has an elected sign, sums of that, other means,
#: and selections.
(
    WEIGHTED, AFFINE, AGREEING, BAND, DROPPED, CLIPPED, SCALED, TIES, BAND_TIES, DROPPED_TIES, SCALED_TIES,
    SELECTED_TIES, RESCALED_TIES, TIES_SUM, BAND_TIES_SUM, DROPPED_TIES_SUM, SCALED_TIES_SUM, STITCHED,
    BALANCED, LARGEST, CHOSEN,
) = range(21)  # fmt: skip

#: Functions of the C library that loops call; all others that they could call raise errors, which none does.
_SYSTEM = ("pread", "clock_gettime")

_MODULES = (
    "merge",
    "elections",
    "values",
    "winners",
    "histogram",
    "random",
    "ranks",
    "binned_ranks",
    "spreads",
    "competition",
    "top_n",
    "one_pass",
    "products",
    "bits",
    "simd",
)
_SYMBOL = "hub_magmax_loop"
_DIGEST_BYTES = 32

#: How an array is passed, without its shape and steps: owner, parent, elements, bytes of one, memory.
ARRAY_ARGUMENTS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
_SCALARS = {
    "i4": ctypes.c_int32, "i8": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u4": ctypes.c_uint32, "u8": ctypes.c_uint64,
    "f4": ctypes.c_float, "f8": ctypes.c_double,
}  # fmt: skip
#: The same as LLVM writes them.
_LLVM = {ctypes.c_void_p: "ptr", ctypes.c_float: "float", ctypes.c_double: "double"}

#: Dtype and number of dimensions of an argument, 0 for a number; or type and kinds of a named tuple.
Kind = tuple[Any, Any]


#: An array without gaps, a number, or a named tuple of such.
Argument = Any


def _flatten(argument: Argument, flat: list[Any]) -> Kind:
    """Append what a loop takes for an argument, and return its kind."""
    if isinstance(argument, tuple):
        return type(argument), tuple(_flatten(item, flat) for item in argument)
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        memory = argument.__array_interface__["data"][0]
        flat += (0, 0, argument.size, argument.itemsize, memory, *argument.shape, *argument.strides)
        return argument.dtype.str[1:], argument.ndim
    number = np.asarray(argument)
    flat.append(number.item())
    return number.dtype.str[1:], 0


class Loop:
    """One function of `compiled`, for arguments of any dtypes that it can take."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = Lock()
        self._code: dict[tuple[Kind, ...], Callable[..., int]] = {}

    def __call__(self, *arguments: Argument) -> int:
        flat: list[Any] = []
        kinds = tuple(_flatten(argument, flat) for argument in arguments)
        code = self._code.get(kinds) or self._load(kinds)
        return code(*flat)

    def is_kept(self) -> bool:
        """Say whether some form of the loop was compiled earlier, for this processor and by this version."""
        return any(any(folder.glob(f"{self.name}-*{fingerprint()}.o")) for folder in folders())

    def _load(self, kinds: tuple[Kind, ...]) -> Callable[..., int]:
        with self._lock:
            if kinds not in self._code:
                file = f"{self.name}-{'-'.join(map(_name, kinds))}-{fingerprint()}.o"
                content = _find(file) or self._compiled_once(file, kinds)
                self._code[kinds] = _link(content, kinds)
            return self._code[kinds]

    def _compiled_once(self, file: str, kinds: tuple[Kind, ...]) -> bytes:
        """Compile, and keep the code; of several processes one does so, and the others wait for it."""
        with _claimed(file):
            content = _find(file)
            if content is None:
                content = self._compile(kinds)
                _keep(file, content)
        return content

    def _compile(self, kinds: tuple[Kind, ...]) -> bytes:
        told = f"the loop {self.name}{_told(kinds)}"
        work, report = f"{told} is compiled", partial(LOG.info, extra={"begins": f"{told} is compiled"})
        started = time.perf_counter()
        try:
            with step(f"compiling {told}, once on this machine", report):
                content = compile_loop(self.name, kinds)
        finally:
            LOG.info("compiled %s in %.1f s", told, time.perf_counter() - started, extra={"ends": work})
        return content


merge_chunk = Loop("merge_chunk")
read_rows = Loop("read_rows")
task_vectors = Loop("task_vectors")
add_products = Loop("add_products")
rank = Loop("rank")
draw = Loop("draw")
rename = Loop("rename")
part = Loop("part")
mix = Loop("mix")
count = Loop("count")
drop = Loop("drop")
write_scores = Loop("write_scores")
write_spreads = Loop("write_spreads")
write_square_sums = Loop("write_square_sums")
write_entries = Loop("write_entries")
write_factors = Loop("write_factors")
write_binned_factors = Loop("write_binned_factors")
write_magnitude_sums = Loop("write_magnitude_sums")
count_magnitudes = Loop("count_magnitudes")
count_and_merge = Loop("count_and_merge")
look = Loop("look")
look_and_merge = Loop("look_and_merge")


def _name(kind: Kind) -> str:
    first, rest = kind
    return f"{first}{rest}" if isinstance(first, str) else "-".join((first.__name__, *map(_name, rest)))


def _told(kinds: tuple[Kind, ...]) -> str:
    """Say in words which form of a loop takes arguments of these kinds; empty where there is only one."""
    fields = dict(kind for kind in kinds if not isinstance(kind[0], str))
    stored = next((fields[kind] for kind in (Reading, Bits) if kind in fields), ())
    bits = {"u2": 16, "u4": 32}.get(stored[-1][0] if stored else "")
    told = f" for numbers of {bits} bits" if bits else ""
    per_element = fields[Merging][Merging._fields.index("per_element")][0] if Merging in fields else ""
    return f"{told}, with a factor for each element" if per_element == "f4" else told


def _arguments(kinds: tuple[Kind, ...]) -> list[Any]:
    """Return the types of the arguments: places for result and error, then each one taken apart."""
    return [ctypes.c_void_p, ctypes.c_void_p, *(part for kind in kinds for part in _parts(kind))]


def _parts(kind: Kind) -> list[Any]:
    first, rest = kind
    if not isinstance(first, str):
        return [part for item in rest for part in _parts(item)]
    return [*ARRAY_ARGUMENTS, *[ctypes.c_int64] * (2 * rest)] if rest else [_SCALARS[first]]


def _type(kind: Kind) -> Any:
    """Return numba's type of an argument."""
    import numba

    named: Any = numba.types.NamedTuple
    first, rest = kind
    if not isinstance(first, str):
        return named([_type(item) for item in rest], first)
    dtype = numba.from_dtype(np.dtype(first))
    return numba.types.Array(dtype, rest, "C") if rest else dtype


def compile_loop(name: str, kinds: tuple[Kind, ...]) -> bytes:
    """Have numba compile a function, and return its machine code, an object file."""
    import llvmlite.binding as llvm

    signature = tuple(map(_type, kinds))
    modules = [import_module(f"hub_magmax.kernels.compiled.{module}") for module in _MODULES]
    function = next(getattr(module, name) for module in modules if hasattr(module, name))
    function.compile(signature)
    module = llvm.parse_assembly(_closed(function.inspect_llvm(signature)))
    entry = module.get_function(function.overloads[signature].fndesc.llvm_func_name)
    entry.name = _SYMBOL
    # How numba passes arguments is documented for its own developers only, so it is looked at.
    found = [str(argument.type) for argument in entry.arguments]
    expected = [_LLVM.get(kind) or f"i{8 * ctypes.sizeof(kind)}" for kind in _arguments(kinds)]
    assert found == expected, f"numba passes {found}; expected {expected}"
    code: bytes = _machine(llvm).emit_object(module)
    return code


def _closed(text: str) -> str:
    """Replace what the code calls of numba by traps: what raises, which nothing here does."""
    kept = "|".join((r"llvm\.", *(rf"{name}\(" for name in _SYSTEM)))
    declared = re.compile(rf'^declare (?!.*@(?:{kept}))(.*?) (@[\w.$"]+)\((.*)\).*$', re.MULTILINE)
    return declared.sub(r"define internal \1 \2(\3) { call void @llvm.trap() unreachable }", text) + (
        "" if "declare void @llvm.trap()" in text else "\ndeclare void @llvm.trap()\n"
    )


def _machine(llvm: Any) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="default",
        codemodel="jitdefault",
        jit=True,
    )


def _link(content: bytes, kinds: tuple[Kind, ...]) -> Callable[..., int]:
    """Put machine code into memory, and return what calls it."""
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(llvm))
    engine.add_object_file(llvm.ObjectFileRef.from_data(content))
    engine.finalize_object()
    _ENGINES.append(engine)
    code = ctypes.CFUNCTYPE(ctypes.c_int32, *_arguments(kinds))(engine.get_function_address(_SYMBOL))

    def call(*flat: Any) -> int:
        found, error = ctypes.c_int64(), ctypes.c_void_p()
        status = code(ctypes.addressof(found), ctypes.addressof(error), *flat)
        assert status == 0, f"a compiled loop failed: {status}"
        return found.value

    return call


#: They own the code.
_ENGINES: list[Any] = []


@cache
def fingerprint() -> str:
    """Identify the source, the compiler and the processor."""
    import llvmlite.binding as llvm

    parts = (
        *(
            path.read_text(encoding="utf-8")
            for path in (
                *(Path(__file__).with_name(f"{name}.py") for name in (*_MODULES, "cache")),
                *(
                    Path(__file__).parent.with_name(f"{name}.py")
                    for name in ("structures", "products", "spreads", "competition")
                ),
            )
        ),
        version("numba"),
        version("llvmlite"),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def folders() -> tuple[Path, ...]:
    """Return where code is kept: beside this file, or where that cannot be written, in the user's cache."""
    homes = [Path(__file__).parent / "__pycache__"]
    with suppress(RuntimeError):  # no home
        homes.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hub_magmax")
    return tuple(homes)


@contextmanager
def _claimed(file: str) -> Iterator[None]:
    """Keep other processes from compiling the same meanwhile, where a folder can be written."""
    claim = _opened_claim(f"{file}.lock")
    if claim is None:
        yield
        return
    with claim:
        with suppress(OSError):  # a file system without locks
            _lock(claim)
        try:
            yield
        finally:
            Path(claim.name).unlink(missing_ok=True)


def _lock(claim: IO[bytes]) -> None:
    """Lock a file; a process that is killed lets go of it."""
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with step("waiting for another process, which compiles the same loop"):
            fcntl.flock(claim, fcntl.LOCK_EX)


def _opened_claim(name: str) -> IO[bytes] | None:
    for folder in folders():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            return (folder / name).open("ab")
    return None


def _find(file: str) -> bytes | None:
    for folder in folders():
        with suppress(OSError):
            content = (folder / file).read_bytes()
            digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if hashlib.sha256(code).digest() == digest:
                return code
    return None


def _keep(file: str, content: bytes) -> None:
    """Keep code for later processes, where a folder can be written."""
    for folder in folders():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as temporary:
                temporary.write(hashlib.sha256(content).digest() + content)
            Path(temporary.name).replace(folder / file)
            return
