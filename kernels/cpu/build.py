"""Builds the kernels' shared library: `python -m kernels.cpu.build`. Needs CMake and a C++17 compiler."""

import subprocess
import sys
from pathlib import Path

from kernels.cpu import LIBRARY_PATH

SOURCE = Path(__file__).parent


def build(directory: Path, *, definitions: tuple[str, ...] = ()) -> Path:
    """Builds into `directory`, incrementally, and returns the library's path.

    `definitions` are CMake cache entries, `NAME=value`. Raises FileNotFoundError without CMake, CalledProcessError when
    the compiler refuses; its output has then been shown.
    """
    _forget_other_source(directory)
    options = [f"-D{definition}" for definition in definitions]
    configure = ["cmake", "-S", str(SOURCE), "-B", str(directory), *options]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 (arguments are our own)
    compile_all = ["cmake", "--build", str(directory), "--parallel"]
    subprocess.run(compile_all, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 (arguments are our own)
    return directory / LIBRARY_PATH.name


def _forget_other_source(directory: Path) -> None:
    """Drops what CMake remembers of a checkout that was copied or moved: it would refuse this one."""
    cache = directory / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={SOURCE.resolve()}\n" not in cache.read_text():
        cache.unlink()


def main() -> int:
    """Builds in place. Returns the exit code."""
    try:
        build(LIBRARY_PATH.parent)
    except FileNotFoundError:
        sys.stderr.write("the CPU kernels need CMake 3.20 or later: install cmake and a C++ compiler\n")
        return 1
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"building the CPU kernels failed: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
