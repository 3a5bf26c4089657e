"""EdgeModel → the folder that a C programmer uses: libraries, runner, header, weights, example."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qcompiler.backends.edge_model import EdgeModel
from qcompiler.backends.edge_program import check, program_source
from qcompiler.backends.edge_target import Machine, host_family, machine
from qcompiler.errors import UnsupportedError
from qcompiler.target import Target

WEIGHTS = "weights.bin"
RUNNER = "model"
SHARED = "libmodel.so"
STATIC = "libmodel.a"
HEADER = "model.h"

SOURCES = Path(__file__).parent
RUNTIME = (
    "edge_cpu.c", "edge_pool.c", "edge_memory.c", "edge_runtime.c", "edge_run.c", "edge_decode.c",
)  # fmt: skip
RUNNER_SOURCES = ("edge_runner.c", "edge_npy.c")
HEADERS = ("edge_program.h", "edge_runtime.h", "edge_npy.h")
API = "edge_api.h"  # model.h, under the name that packages keep it by
OPTIONS = ("-std=gnu11", "-O2", "-fPIC", "-ffunction-sections", "-fdata-sections", "-w")

CMAKE = """\
# The compiled model as an imported library, `model`; and, built on its own, the example.
cmake_minimum_required(VERSION 3.13)
project(model_example C)
find_package(Threads REQUIRED)
add_library(model STATIC IMPORTED GLOBAL)
set_target_properties(model PROPERTIES
  IMPORTED_LOCATION "${CMAKE_CURRENT_LIST_DIR}/libmodel.a"
  INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}"
  INTERFACE_LINK_LIBRARIES "Threads::Threads;m")
if(CMAKE_CURRENT_SOURCE_DIR STREQUAL CMAKE_SOURCE_DIR)
  add_executable(example example.c)
  target_link_libraries(example model)
endif()
"""


def write(edge: EdgeModel, folder: Path, extra: Sequence[str] = ()) -> None:
    """Write everything but manifest and report into `folder`, which must exist.

    Args:
        edge: the compiled model.
        folder: gets weights.bin, model.h, libmodel.a, libmodel.so, model (the command-line runner,
            static), CMakeLists.txt and example.c.
        extra: further options for the C compiler, such as sanitizers; the runner is then linked
            dynamically.

    Raises:
        UnsupportedError: if the C compiler for the target is missing, or fails.
    """
    check(edge)
    target = machine(Target.parse(edge.target))
    tools = Tools(target)
    (folder / WEIGHTS).write_bytes(edge.weights)
    shutil.copyfile(SOURCES / API, folder / HEADER)
    (folder / "CMakeLists.txt").write_text(CMAKE)
    (folder / "example.c").write_text(example_source(edge))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for source in (*RUNTIME, *RUNNER_SOURCES, *HEADERS):
            shutil.copyfile(SOURCES / source, work / source)
        shutil.copyfile(SOURCES / API, work / HEADER)
        (work / "program.c").write_text(program_source(edge))
        (work / "exports").write_text("{ global: model_*; local: *; };\n")
        objects = []
        for index, (_, content) in enumerate(edge.objects):
            objects.append(f"kernels_{index}.o")
            (work / objects[-1]).write_bytes(content)
        options = [*OPTIONS, *target.flags, *extra]
        # One object, of which only the functions of model.h are seen from outside: the kernels'
        # names are those of every model.
        tools.cc(
            work, *options, "-r", "-nostdlib", *RUNTIME, "program.c", *objects, "-o", "model.o"
        )
        if not extra:  # sanitizers' own symbols must stay visible
            tools.run(work, tools.objcopy, "--wildcard", "--keep-global-symbol=model_*", "model.o")
        tools.run(work, tools.ar, "rcs", STATIC, "model.o")
        libraries = ["-lpthread", "-lm"]
        tools.cc(
            work, *options, "-shared", "-Wl,--version-script=exports", f"-Wl,-soname,{SHARED}",
            "model.o", *libraries, "-o", SHARED,
        )  # fmt: skip
        tools.cc(
            work, *options, *([] if extra else ["-static", "-s"]), "-Wl,--gc-sections",
            *RUNNER_SOURCES, STATIC, *libraries, "-o", RUNNER,
        )  # fmt: skip
        for made in (STATIC, SHARED, RUNNER):
            shutil.copy(work / made, folder / made)


class Tools:
    """The C compiler and binutils for a machine."""

    def __init__(self, target: Machine) -> None:
        at_home = target.family == host_family()
        prefix = "" if at_home else f"{target.triple}-"
        self.compiler = "cc" if at_home else target.compiler
        self.objcopy, self.ar = f"{prefix}objcopy", f"{prefix}ar"
        package = "gcc" if at_home else target.package
        for tool in (self.compiler, self.objcopy, self.ar):
            if shutil.which(tool) is None:
                raise UnsupportedError(
                    f"'{tool}' was not found, which is needed to link code for {target.family}; on "
                    f"Debian and Ubuntu: apt-get install {package} libc6-dev"
                    if at_home
                    else f"'{tool}' was not found, which is needed to link code for "
                    f"{target.family}; on Debian and Ubuntu: apt-get install {package}"
                )

    def cc(self, folder: Path, *arguments: str) -> None:
        """Run the C compiler in `folder`."""
        self.run(folder, self.compiler, *arguments)

    def run(self, folder: Path, *command: str) -> None:
        """Run a tool in `folder`; an `UnsupportedError` with what it said when it fails."""
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[-8:])
            raise UnsupportedError(
                f"'{command[0]}' could not build the model's library: {said or done.returncode}"
            )


def example_source(edge: EdgeModel) -> str:
    """A program that runs the model once, on zeros of its smallest sizes."""
    sizes = edge.entries[0].sizes
    arrays, tensors = [], []
    for index, port in enumerate(edge.inputs):
        shape = [sizes[s] if isinstance(s, str) else s for s in port.shape]
        listed = ", ".join(map(str, shape)) or "0"
        count = " * ".join(map(str, shape)) or "1"
        arrays.append(f"static {_c_type(port.dtype)} input_{index}[{count}]; /* {port.name} */")
        tensors.append(f"{{MODEL_{port.dtype.upper()}, {len(shape)}, {{{listed}}}, input_{index}}}")
    return "\n".join(
        [
            '#include <stdio.h>\n#include "model.h"\n',
            *arrays,
            "\nint main(void) {",
            '  model *m = model_create("weights.bin", 1);',
            f"  model_tensor inputs[] = {{{', '.join(tensors)}}}, outputs[{len(edge.outputs)}];",
            "  if (!m || model_run(m, inputs, outputs)) return puts(model_error(m)), 1;",
            f"  {_c_type(edge.outputs[0].dtype)} *numbers = outputs[0].data;",
            '  printf("%s starts with %g\\n", model_output(0)->name, (double)numbers[0]);',
            "  model_destroy(m);",
            "  return 0;",
            "}",
            "",
        ]
    )


def _c_type(dtype: str) -> str:
    floats = {"float32": "float", "float64": "double", "bool": "uint8_t", "float16": "uint16_t"}
    return floats.get(dtype, f"{dtype}_t")
