"""What each `tvm:` target is: LLVM's target, the CPU features it needs, its C compiler, its qemu.

`tvm:native` is the richest entry of this table that the machine has, so that the features which an
artifact checks at start are all that its code uses.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

from qcompiler.devices import cpu_flags
from qcompiler.errors import UnsupportedError
from qcompiler.target import Target

_V2 = ("sse4.2", "popcnt")
_V3 = (*_V2, "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

# Our name of a feature → Linux's name in /proc/cpuinfo, by family, where the two differ.
_LINUX = {
    "x86-64": {
        "sse4.2": "sse4_2", "bmi": "bmi1", "lzcnt": "abm", "avx512vnni": "avx512_vnni",
        "avx512bf16": "avx512_bf16",
    },
    "aarch64": {"neon": "asimd", "dotprod": "asimddp"},
    "armv7": {"vfp4": "vfpv4"},
    "riscv64": {},
}  # fmt: skip
_FAMILY = {
    "x86_64": "x86-64",
    "amd64": "x86-64",
    "arm64": "aarch64",
    "aarch64": "aarch64",
    "armv7l": "armv7",
    "armv8l": "armv7",
    "riscv64": "riscv64",
}


@dataclass(frozen=True)
class Machine:
    """One kind of machine that code is generated for.

    Attributes:
        family: the instruction set: x86-64, aarch64, armv7 or riscv64.
        triple: LLVM's and the GNU tools' name of the machine.
        features: CPU features that the code may use, by the names that the C runtime checks.
        lanes: float32 numbers in a vector register; 1 where there are no vectors.
        cpu, attributes, abi: LLVM's mcpu, mattr, and further options of TVM's target.
        flags: the C compiler's options for this machine.
        package: Debian's package with the cross compiler.
        qemu: the user-mode emulator and its options, in Debian's package `qemu-user`.
    """

    family: str
    triple: str
    features: tuple[str, ...]
    lanes: int
    cpu: str = ""
    attributes: tuple[str, ...] = ()
    abi: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    package: str = ""
    qemu: tuple[str, ...] = ()

    @property
    def tvm(self) -> dict[str, Any]:
        """The argument of `tvm.target.Target`."""
        found: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, **self.abi}
        if self.cpu:
            found["mcpu"] = self.cpu
        if self.attributes:
            found["mattr"] = [*self.attributes]
        return found

    @property
    def compiler(self) -> str:
        """The GNU C compiler's command for another machine; at home it is `cc`."""
        return f"{self.triple}-gcc"

    @property
    def here(self) -> bool:
        """Whether this very machine runs the code."""
        return self.family == host_family() and not missing(self.features)


def _x86(features: tuple[str, ...], lanes: int, cpu: str, *attributes: str) -> Machine:
    return Machine(
        "x86-64", "x86_64-linux-gnu", features, lanes, cpu, attributes,
        package="gcc-x86-64-linux-gnu", qemu=("qemu-x86_64", "-cpu", "max"),
    )  # fmt: skip


def _arm64(*more: str) -> Machine:
    features = ("neon", *more)
    attributes = tuple(f"+{name}" for name in features)  # LLVM's names are ours
    return Machine(
        "aarch64", "aarch64-linux-gnu", features, 4, "", attributes,
        package="gcc-aarch64-linux-gnu", qemu=("qemu-aarch64", "-cpu", "max"),
    )  # fmt: skip


MACHINES: dict[str, Machine] = {
    "tvm:x86-64": _x86(_V2, 4, "x86-64-v2"),
    "tvm:x86-64-v3": _x86(_V3, 8, "x86-64-v3"),
    "tvm:x86-64:avx512vnni": _x86((*_V4, "avx512vnni"), 16, "x86-64-v4", "+avx512vnni"),
    "tvm:x86-64:avx512bf16": _x86(
        (*_V4, "avx512vnni", "avx512bf16"), 16, "x86-64-v4", "+avx512vnni", "+avx512bf16"
    ),
    "tvm:aarch64": _arm64(),
    "tvm:aarch64:dotprod": _arm64("dotprod"),
    "tvm:aarch64:i8mm": _arm64("dotprod", "i8mm"),
    "tvm:aarch64:bf16": _arm64("dotprod", "i8mm", "bf16"),
    "tvm:armv7": Machine(
        "armv7", "arm-linux-gnueabihf", ("neon", "vfp4"), 4, "", ("+neon", "+vfp4"),
        {"mtriple": "armv7-linux-gnueabihf", "mfloat-abi": "hard"},
        ("-march=armv7-a", "-mfpu=neon-vfpv4", "-mfloat-abi=hard", "-marm"),
        "gcc-arm-linux-gnueabihf", ("qemu-arm", "-cpu", "max"),
    ),
    "tvm:riscv64": Machine(
        "riscv64", "riscv64-linux-gnu", (), 1, "", ("+m", "+a", "+f", "+d", "+c"),
        {"mabi": "lp64d"}, (), "gcc-riscv64-linux-gnu", ("qemu-riscv64",),
    ),
}  # fmt: skip


def machine(target: Target) -> Machine:
    """The machine that a `tvm:` target names.

    Raises:
        UnsupportedError: if the target is of another runtime, or `tvm:native` is asked for on a
            machine that the table does not have.
    """
    if (target.runtime, target.device) == ("tvm", "native"):
        return MACHINES[native()]
    found = MACHINES.get(str(target))
    if found is None:
        raise UnsupportedError(f"'{target}' names no machine that code is generated for")
    return found


def native() -> str:
    """The richest target that runs on this machine.

    Raises:
        UnsupportedError: on a machine that the table does not have.
    """
    fitting = [name for name, entry in MACHINES.items() if entry.here]
    if not fitting:
        raise UnsupportedError(
            f"tvm:native: no code is generated for this machine ({platform.machine()}); "
            f"name a target: {', '.join(MACHINES)}"
        )
    return max(fitting, key=lambda name: len(MACHINES[name].features))


def host_family() -> str:
    """This machine's instruction set by the table's names; as the system calls it if unknown."""
    name = platform.machine().lower()
    return _FAMILY.get(name, name)


def missing(features: tuple[str, ...]) -> list[str]:
    """Those of the features that this machine lacks."""
    names = _LINUX.get(host_family(), {})
    return [name for name in features if names.get(name, name) not in cpu_flags()]
