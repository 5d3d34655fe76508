"""Whether Triton can compile kernels here; asked by every room that has some."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


def why_no_triton() -> str | None:
    """What Triton lacks to compile its kernels: itself, the C compiler or the headers that its launcher is made with; None: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return nothing_to_compile_with()


@functools.cache  # asked at every loss
def nothing_to_compile_with() -> str | None:
    """The part of it that does not change while a process runs."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler; install gcc, or name one in the environment variable CC"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton finds no Python.h; install the headers of this Python (python3-dev)"
    return None
