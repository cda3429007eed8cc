"""Watches the GPU of each rank through NVML: the one module that imports `pynvml` (package nvidia-ml-py).

Every rank samples its own GPU in a thread, so that all nodes of a run are covered. At the end of an epoch rank 0 gets
the figures of all ranks during their training steps, without measuring and saving. MLflow's page has a tab for names
that begin with `system`: `system/gpu/rank_R/NAME` is for one rank, `system/gpu/NAME` is over the ranks that have the
figure (the maximum if NAME ends in `_max`, else the mean).

- `utilization`, `utilization_max`: share of the time in which some kernel ran, [0, 1]
- `memory_used`, `memory_used_max`, `memory_total`: GiB, of all processes together, caches included
- `temperature`, `temperature_max`: degrees Celsius
- `power`, `power_max`: W
- `energy`, `energy_per_image`: J, by the GPU's own counter, or integrated power where it has none
- `throttled`: share of the samples in which heat, the power brake or the hardware lowered the clocks, [0, 1]
- `power_capped`: share of the samples at the power limit, [0, 1]; usual under full load
- `ecc_errors`: uncorrected memory errors since the driver was loaded

A figure that a GPU does not offer is absent, not zero; without a GPU or NVML all are absent. A part of a GPU (MIG) has
no utilization, power and energy of its own; its temperature, clocks and memory errors are those of the GPU.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import pynvml
import torch

from slrnet.distributed.process import Process, gather_over_ranks

__all__ = ["GpuMonitor", "GpuWatch", "open_monitor"]

GIB = 2**30
MEMORY_NEARLY_FULL = 0.95
"""Share of the memory above which people are warned."""

_COOLING = "clear its airflow, check its fan, or lower its power limit (nvidia-smi -pl)"
_POWER = "check its power supply and cables, or lower its power limit (nvidia-smi -pl)"
# Reasons for lower clocks that people can act on; idling and the software power limit are not among them.
_REASONS = {
    "hardware_thermal_slowdown": (pynvml.nvmlClocksEventReasonHwThermalSlowdown, _COOLING),
    "software_thermal_slowdown": (pynvml.nvmlClocksEventReasonSwThermalSlowdown, _COOLING),
    "power_brake_slowdown": (pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown, _POWER),
    "hardware_slowdown": (pynvml.nvmlClocksEventReasonHwSlowdown, f"{_COOLING}; {_POWER}"),
}
_MEANS = ("utilization", "memory_used", "temperature", "power", "throttled", "power_capped")
_MAXIMA = ("utilization", "memory_used", "temperature", "power")
_STATES = ("memory_total", "ecc_errors")
# NVML's errors if a GPU, a driver or a container does not offer a figure.
_ABSENT = tuple(
    getattr(pynvml, f"NVMLError_{name}")
    for name in ("NotSupported", "FunctionNotFound", "NoPermission", "NoData", "InvalidArgument")
)


class GpuMonitor:
    """Samples one GPU in a thread until it is closed, or until NVML loses the GPU.

    Args:
        uuid: name of the GPU in NVML, `GPU-...` or `MIG-...`.
        interval: seconds between samples.
    """

    def __init__(self, uuid: str, *, interval: float) -> None:
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self.name = f"{pynvml.nvmlDeviceGetName(self._handle)}, {pynvml.nvmlDeviceGetUUID(self._handle)}"
        partition = uuid.startswith("MIG-")
        self._card = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self._handle) if partition else self._handle
        self._readers: list[Callable[[], dict[str, float]]] = [
            self._memory,
            lambda: {"temperature": pynvml.nvmlDeviceGetTemperature(self._card, pynvml.NVML_TEMPERATURE_GPU)},
            self._clocks,
            self._ecc_errors,
            self._other_processes,
        ]
        if not partition:
            self._readers += [
                lambda: {"utilization": pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100},
                lambda: {"power": pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000},
                lambda: {"counter": pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000},
            ]
        self._samples: list[dict[str, float]] = []
        self._warnings: dict[str, str] = {}
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(interval,), name="gpu-monitor", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Starts an interval with a sample; drops earlier figures and keeps warnings."""
        with self._lock:
            self._samples.clear()
        self.sample()

    def end(self, images: int) -> tuple[dict[str, float], dict[str, str]]:
        """Figures since `begin`, in which this GPU trained on `images` > 0 images; and new warnings by cause."""
        self.sample()
        with self._lock:
            warnings = {cause: text for cause, text in self._warnings.items() if cause not in self._told}
            self._told |= set(warnings)
            names = set.intersection(*map(set, self._samples)) if self._samples else set()
            whole = {name: [sample[name] for sample in self._samples] for name in names}
        figures = {name: fmean(whole[name]) for name in _MEANS if name in whole}
        figures |= {f"{name}_max": max(whole[name]) for name in _MAXIMA if name in whole}
        figures |= {name: whole[name][-1] for name in _STATES if name in whole}
        if "counter" in whole:
            figures["energy"] = whole["counter"][-1] - whole["counter"][0]
        elif "power" in whole:
            figures["energy"] = float(np.trapezoid(whole["power"], whole["time"]))
        if "energy" in figures:
            figures["energy_per_image"] = figures["energy"] / images
        return figures, warnings

    def sample(self) -> None:
        """Reads all figures once. A figure that the GPU lacks is not read again; any other NVML error ends sampling."""
        with self._lock:
            values = {"time": time.monotonic()}
            for read in tuple(self._readers):
                try:
                    values |= read()
                except _ABSENT:
                    self._readers.remove(read)
                except pynvml.NVMLError as error:
                    lost = f"NVML gives no more figures ({error}); look at the kernel log for Xid errors"
                    self._warnings["lost"] = lost
                    self._readers.clear()
                    self._samples.clear()
                    self._closed.set()
                    return
            self._samples.append(values)

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join(timeout=5.0)

    def _watch(self, interval: float) -> None:
        while not self._closed.wait(interval):
            self.sample()

    def _memory(self) -> dict[str, float]:
        memory = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
        if memory.used > MEMORY_NEARLY_FULL * memory.total:
            used = f"{memory.used / GIB:.1f} of {memory.total / GIB:.1f} GiB"
            self._warnings["memory"] = f"{used} of its memory are taken; raise train.accumulation before it runs out"
        return {"memory_used": memory.used / GIB, "memory_total": memory.total / GIB}

    def _clocks(self) -> dict[str, float]:
        mask = pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._card)
        reasons = [name for name, (bit, _) in _REASONS.items() if mask & bit]
        for name in reasons:
            self._warnings[name] = f"its clocks are lowered by {name.replace('_', ' ')}; {_REASONS[name][1]}"
        return {"throttled": bool(reasons), "power_capped": bool(mask & pynvml.nvmlClocksEventReasonSwPowerCap)}

    def _ecc_errors(self) -> dict[str, float]:
        kind = (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        count = pynvml.nvmlDeviceGetTotalEccErrors(self._card, *kind)
        if count:
            lasting = f"{count} uncorrected memory errors since its driver started; reset or replace it"
            self._warnings["ecc_errors"] = lasting
        return {"ecc_errors": count}

    def _other_processes(self) -> dict[str, float]:
        memory = {entry.pid: entry.usedGpuMemory for entry in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}
        # In a container NVML may give the host's process ids, among which this process cannot be recognized.
        known = os.getpid() in memory
        memory.pop(os.getpid(), None)
        if len(memory) > (not known):
            sizes = {pid: "" if taken is None else f" ({taken / GIB:.1f} GiB)" for pid, taken in sorted(memory.items())}
            listed = ", ".join(f"{pid}{size}" for pid, size in sizes.items())
            among = "" if known else " (ids outside of this container; one of them is this rank)"
            self._warnings["processes"] = f"it is shared with process {listed}{among}; end it or keep it off this GPU"
        return {}


@dataclass
class GpuWatch:
    """The monitors of all ranks; every rank must call `start` and `end` equally often."""

    process: Process
    interval: float
    """Seconds between samples; 0 turns the monitors off."""
    _monitor: GpuMonitor | None = None
    _names: Sequence[str | None] = ()

    def start(self) -> dict[str, str]:
        """Starts this rank's monitor; returns name and UUID of each rank's GPU as MLflow tags."""
        if self.interval:
            self._monitor = open_monitor(self.process.device, interval=self.interval)
        self._names = gather_over_ranks(self._monitor.name if self._monitor else None, self.process)
        return {f"gpu.rank_{rank}": name for rank, name in enumerate(self._names) if name is not None}

    def begin(self) -> None:
        """Starts an interval."""
        if self._monitor is not None:
            self._monitor.begin()

    def end(self, images: int) -> tuple[dict[str, float], dict[str, str]]:
        """Figures of all ranks since `begin` by their MLflow names, and new warnings by their tags.

        This rank trained on `images` > 0 images since then.
        """
        gathered = gather_over_ranks(({}, {}) if self._monitor is None else self._monitor.end(images), self.process)
        metrics, by_name = dict[str, float](), defaultdict[str, list[float]](list)
        warnings = {}
        for rank, (figures, causes) in enumerate(gathered):
            for name, value in figures.items():
                metrics[f"system/gpu/rank_{rank}/{name}"] = value
                by_name[name].append(value)
            for cause, text in causes.items():
                warnings[f"gpu.rank_{rank}.{cause}"] = f"GPU of rank {rank} ({self._names[rank]}): {text}"
        for name, values in by_name.items():
            metrics[f"system/gpu/{name}"] = max(values) if name.endswith("_max") else fmean(values)
        return metrics, warnings

    def close(self) -> None:
        """Ends this rank's monitor."""
        if self._monitor is not None:
            self._monitor.close()


def open_monitor(device: torch.device, *, interval: float) -> GpuMonitor | None:
    """Starts to watch the GPU that PyTorch calls `device`; None if it is no GPU or NVML does not know it."""
    if device.type != "cuda":
        return None
    index = device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[index : index + 1]
    parts = [name.strip() for name in visible if name.strip().startswith("MIG-")]
    uuid = torch.cuda.get_device_properties(index).uuid  # PyTorch does not tell a GPU from a part of one
    for name in (*parts, f"MIG-{uuid}", f"GPU-{uuid}"):
        with suppress(pynvml.NVMLError):
            return GpuMonitor(name, interval=interval)
    return None
