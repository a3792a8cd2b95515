"""Builds the CPU kernels of csrc/ as a plain shared library; everything else is in
pyproject.toml."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

# x86-64-v3 is AVX2 and FMA, which every CPU must have; parts that use AVX-512 say so in the code
# and run only where it is found. No -ffast-math: it reorders sums, and a library linked with it
# flushes denormals in whatever thread loads it. -ffp-contract=off: the compiler fuses nothing on
# its own.
COMPILE_FLAGS = [
    "-O3",
    "-march=x86-64-v3",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-std=c++17",
    "-fvisibility=hidden",
    "-fPIC",
    "-pthread",
]


class BuildSharedLibrary(build_ext):
    """Compiles with g++ or clang++ directly: the library is loaded by ctypes and knows nothing of
    Python."""

    def build_extension(self, ext: Extension) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise PlatformError(
                f"kunserve's CPU kernels need an x86-64 CPU, not {platform.machine()}"
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *_compiler(),
            *ext.extra_compile_args,
            "-shared",
            *ext.sources,
            "-o",
            str(target),
        ]
        print(shlex.join(command))
        if subprocess.run(command, check=False).returncode != 0:
            raise CompileError(
                "the CPU kernels of kunserve did not compile; see the compiler's message above"
            )


def _compiler() -> list[str]:
    """The C++ compiler as the start of a command: $CXX if set, else the first that is installed."""
    for candidate in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise PlatformError(
        "kunserve needs a C++17 compiler (g++ or clang++) to build its CPU kernels; "
        "on Debian: apt-get install g++"
    )


setup(
    ext_modules=[
        Extension(
            "kunserve.device.kernels._cpu",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.[hi]*")),
            extra_compile_args=COMPILE_FLAGS,
        )
    ],
    cmdclass={"build_ext": BuildSharedLibrary},
)
