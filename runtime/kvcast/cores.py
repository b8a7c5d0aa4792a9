"""How many threads can really run at once here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Physical cores that this process may use: within its affinity, and within the CPU quota of its control groups (containers)."""
    n = _physical(_allowed())
    quota = _quota()
    return max(1, n if quota is None else min(n, int(quota)))


def _allowed() -> set[int] | None:
    """Logical processors that the scheduler may put this process on; None where the system does not say."""
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError):  # Windows and macOS, or forbidden
        try:
            return set(psutil.Process().cpu_affinity())
        except (AttributeError, psutil.Error):
            return None


def _physical(allowed: set[int] | None) -> int:
    if allowed is None:
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        try:
            package, core = ((TOPOLOGY / f"cpu{cpu}" / "topology" / name).read_text() for name in ("physical_package_id", "core_id"))
        except OSError:  # no topology: no more than the machine has cores
            return min(len(allowed), psutil.cpu_count(logical=False) or len(allowed))
        cores.add((package, core))
    return len(cores)


def _quota() -> float | None:
    """Processors' worth of time that control groups leave this process; None where nothing bounds it."""
    quotas = [quota for folder in _cgroups() if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _cgroups() -> Iterator[Path]:
    """The control groups of this process and those above them, of both versions."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = CGROUP / controllers if controllers else CGROUP
        folder = top / path.lstrip("/")
        while True:
            yield folder
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent
        if controllers:
            yield CGROUP / "cpu"


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max": no bound
        return None
