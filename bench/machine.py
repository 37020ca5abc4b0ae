"""What a result says about the machine it was measured on: enough to judge a figure, nothing that names a host."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

_CPUINFO: Final = Path("/proc/cpuinfo")
_MEMINFO: Final = Path("/proc/meminfo")
_TOLD_FLAGS: Final = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
)  # fmt: skip
_TOLD_PACKAGES: Final = ("staffetta", "torch", "grpcio", "uvloop")


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine, as its operating system tells it. `caches` names each level's size, as the kernel writes it."""

    cpu: str
    num_cores: int
    flags: tuple[str, ...]
    caches: dict[str, str]
    memory_bytes: int
    kernel: str
    python: str
    packages: dict[str, str]


def describe_machine() -> Machine:
    """This machine, and the cores that this process may use."""
    info = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in info.splitlines())}
    flags = set(facts.get("flags", "").split())
    return Machine(
        cpu=facts.get("model name", platform.processor()),
        num_cores=len(os.sched_getaffinity(0)),
        flags=tuple(flag for flag in _TOLD_FLAGS if flag in flags),
        caches=_caches(),
        memory_bytes=_memory_bytes(),
        kernel=platform.release(),
        python=platform.python_version(),
        packages={name: found for name in _TOLD_PACKAGES if (found := _version(name))},
    )


def _caches() -> dict[str, str]:
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
        caches[f"L{level} {kind.lower()}"] = (index / "size").read_text().strip()
    return caches


def _memory_bytes() -> int:
    for line in _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else ():
        name, _, rest = line.partition(":")
        if name == "MemTotal":
            return int(rest.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
