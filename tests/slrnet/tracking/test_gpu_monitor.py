"""GPU figures and warnings against an NVML of our own, and the absence of the real one."""

from __future__ import annotations

import inspect
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from slrnet.config import Config, apply_overrides
from slrnet.distributed.process import Process
from slrnet.tracking import gpu_monitor
from slrnet.tracking.gpu_monitor import GpuMonitor, GpuWatch, open_monitor

GIB = 2**30
NEVER = 1e6
"""Seconds between the thread's samples where a test takes them itself."""
UUID = "12345678-0000-1111-2222-333344445555"


@dataclass
class Gpu:
    """What the fake library says of a GPU, in NVML's units."""

    uuid: str = f"GPU-{UUID}"
    name: str = "NVIDIA L4"
    utilization: int = 50
    used: int = 6 * GIB
    total: int = 24 * GIB
    temperature: int = 60
    milliwatts: int = 70_000
    millijoules: int = 5_000_000
    reasons: int = pynvml.nvmlClocksEventReasonNone
    ecc_errors: int = 0
    processes: dict[int, int | None] = field(default_factory=lambda: {os.getpid(): 5 * GIB})
    parent: Gpu | None = None
    errors: dict[str, pynvml.NVMLError] = field(default_factory=dict)
    """Calls that fail, by name; "" for all."""


class FakeNvml:
    """A module `pynvml` with its own GPUs; constants and errors are the real ones, other calls do not exist."""

    def __init__(self, *gpus: Gpu) -> None:
        self.gpus = gpus
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        real = getattr(pynvml, name)
        if callable(real) and not isinstance(real, type):
            raise AttributeError(f"{name} is not faked")
        return real

    def nvmlInit(self) -> None:
        if not self.gpus:
            raise pynvml.NVMLError_DriverNotLoaded

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                return gpu
        raise pynvml.NVMLError_NotFound

    def nvmlDeviceGetUUID(self, handle: Gpu) -> str:
        return handle.uuid

    def nvmlDeviceGetName(self, handle: Gpu) -> str:
        return handle.name

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, migDevice: Gpu) -> Gpu:
        assert migDevice.parent is not None
        return migDevice.parent

    def nvmlDeviceGetUtilizationRates(self, handle: Gpu) -> Any:
        return self._answer(handle, "nvmlDeviceGetUtilizationRates", SimpleNamespace(gpu=handle.utilization))

    def nvmlDeviceGetMemoryInfo(self, handle: Gpu, version: int | None = None) -> Any:
        memory = SimpleNamespace(used=handle.used, total=handle.total, free=handle.total - handle.used)
        return self._answer(handle, "nvmlDeviceGetMemoryInfo", memory)

    def nvmlDeviceGetTemperature(self, handle: Gpu, sensor: int) -> Any:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self._answer(handle, "nvmlDeviceGetTemperature", handle.temperature)

    def nvmlDeviceGetPowerUsage(self, handle: Gpu) -> Any:
        return self._answer(handle, "nvmlDeviceGetPowerUsage", handle.milliwatts)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Gpu) -> Any:
        return self._answer(handle, "nvmlDeviceGetTotalEnergyConsumption", handle.millijoules)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Gpu) -> Any:
        return self._answer(handle, "nvmlDeviceGetCurrentClocksEventReasons", handle.reasons)

    def nvmlDeviceGetTotalEccErrors(self, handle: Gpu, errorType: int, counterType: int) -> Any:
        assert (errorType, counterType) == (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        return self._answer(handle, "nvmlDeviceGetTotalEccErrors", handle.ecc_errors)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Gpu) -> Any:
        entries = [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in handle.processes.items()]
        return self._answer(handle, "nvmlDeviceGetComputeRunningProcesses", entries)

    def _answer(self, gpu: Gpu, call: str, value: Any) -> Any:
        self.calls[call] += 1
        error = gpu.errors.get(call, gpu.errors.get(""))
        if error is not None:
            raise error
        return value


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(gpu_monitor, "time", clock)
    return clock


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def nvml(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    nvml = FakeNvml(gpu)
    monkeypatch.setattr(gpu_monitor, "pynvml", nvml)
    return nvml


@pytest.fixture
def monitor(gpu: Gpu, nvml: FakeNvml, clock: Clock) -> Iterator[GpuMonitor]:
    monitor = GpuMonitor(gpu.uuid, interval=NEVER)
    yield monitor
    monitor.close()


def test_the_fake_has_the_signatures_of_the_library() -> None:
    faked = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    assert len(faked) == 13
    for name in faked:
        real, fake = (inspect.signature(inspect.unwrap(getattr(owner, name))) for owner in (pynvml, FakeNvml))
        if name not in ("nvmlDeviceGetHandleByUUID", "nvmlDeviceGetName", "nvmlDeviceGetUUID"):  # wrapped without names
            assert list(fake.parameters)[1:] == list(real.parameters), name


class TestFigures:
    def test_means_maxima_and_states_of_an_interval(self, monitor: GpuMonitor, gpu: Gpu, clock: Clock) -> None:
        gpu.utilization = 100
        monitor.sample()  # before the interval
        gpu.utilization = 50
        monitor.begin()
        clock.now += 10.0
        gpu.utilization, gpu.used, gpu.temperature, gpu.milliwatts = 90, 12 * GIB, 72, 130_000
        gpu.reasons = pynvml.nvmlClocksEventReasonSwPowerCap
        gpu.millijoules += 900_000
        figures, warnings = monitor.end(30)
        assert figures == pytest.approx(
            {
                "utilization": 0.7,
                "utilization_max": 0.9,
                "memory_used": 9.0,
                "memory_used_max": 12.0,
                "memory_total": 24.0,
                "temperature": 66.0,
                "temperature_max": 72.0,
                "power": 100.0,
                "power_max": 130.0,
                "throttled": 0.0,
                "power_capped": 0.5,
                "ecc_errors": 0.0,
                "energy": 900.0,
                "energy_per_image": 30.0,
            }
        )
        assert warnings == {}

    def test_energy_without_a_counter_is_integrated_power(self, monitor: GpuMonitor, gpu: Gpu, clock: Clock) -> None:
        gpu.errors["nvmlDeviceGetTotalEnergyConsumption"] = pynvml.NVMLError_NotSupported()
        monitor.begin()
        for seconds, milliwatts in ((2.0, 90_000), (1.0, 50_000)):
            clock.now += seconds
            gpu.milliwatts = milliwatts
            monitor.sample()
        figures, _ = monitor.end(23)
        # 2 s from 70 W to 90 W, 1 s from 90 W to 50 W
        assert figures["energy"] == pytest.approx(160.0 + 70.0)
        assert figures["energy_per_image"] == pytest.approx(10.0)

    @pytest.mark.parametrize(
        ("call", "figures"),
        [
            ("UtilizationRates", {"utilization", "utilization_max"}),
            ("MemoryInfo", {"memory_used", "memory_used_max", "memory_total"}),
            ("Temperature", {"temperature", "temperature_max"}),
            ("PowerUsage", {"power", "power_max"}),
            ("CurrentClocksEventReasons", {"throttled", "power_capped"}),
            ("TotalEccErrors", {"ecc_errors"}),
            ("ComputeRunningProcesses", set()),
        ],
    )
    @pytest.mark.parametrize("error", [pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission])
    def test_what_a_gpu_lacks_is_absent_and_asked_for_once(
        self, monitor: GpuMonitor, gpu: Gpu, nvml: FakeNvml, call: str, figures: set[str], error: type[Exception]
    ) -> None:
        monitor.begin()
        everything, _ = monitor.end(4)
        nvml.calls.clear()
        gpu.errors[f"nvmlDeviceGet{call}"] = error()
        for _ in range(2):
            monitor.begin()
            rest, warnings = monitor.end(4)
            assert everything.keys() - rest.keys() == figures
            assert warnings == {}
        assert nvml.calls.pop(f"nvmlDeviceGet{call}") == 1
        assert set(nvml.calls.values()) == {4}

    def test_a_figure_that_goes_within_the_interval_is_absent(self, monitor: GpuMonitor, gpu: Gpu) -> None:
        for call in ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption"):
            monitor.begin()
            gpu.errors[call] = pynvml.NVMLError_NotSupported()
            figures, _ = monitor.end(4)
        assert not {"power", "power_max", "energy", "energy_per_image"} & figures.keys()
        assert "utilization" in figures

    def test_the_thread_samples_at_its_interval_until_closed(self, gpu: Gpu, nvml: FakeNvml) -> None:
        several = threading.Event()
        answer = nvml._answer

        def count(gpu: Gpu, call: str, value: Any) -> Any:
            if nvml.calls[call] >= 3:
                several.set()
            return answer(gpu, call, value)

        nvml._answer = count  # type: ignore[method-assign]
        monitor = GpuMonitor(gpu.uuid, interval=0.001)
        assert several.wait(60.0)
        assert monitor._thread.daemon
        monitor.close()
        assert not monitor._thread.is_alive()


class TestWarnings:
    @pytest.mark.parametrize(
        ("reason", "cause", "remedy"),
        [
            ("HwThermalSlowdown", "hardware_thermal_slowdown", "airflow"),
            ("SwThermalSlowdown", "software_thermal_slowdown", "airflow"),
            ("HwPowerBrakeSlowdown", "power_brake_slowdown", "power supply"),
            ("HwSlowdown", "hardware_slowdown", "airflow.*power supply"),
        ],
    )
    def test_reasons_for_lower_clocks(
        self, monitor: GpuMonitor, gpu: Gpu, reason: str, cause: str, remedy: str
    ) -> None:
        monitor.begin()
        gpu.reasons = getattr(pynvml, f"nvmlClocksEventReason{reason}") | pynvml.nvmlClocksEventReasonSwPowerCap
        figures, warnings = monitor.end(4)
        assert list(warnings) == [cause]
        assert re.search(f"lowered by {cause.replace('_', ' ')}; .*{remedy}", warnings[cause])
        assert (figures["throttled"], figures["power_capped"]) == (0.5, 0.5)

    @pytest.mark.parametrize(
        "reason", ["None", "GpuIdle", "ApplicationsClocksSetting", "SwPowerCap", "SyncBoost", "DisplayClockSetting"]
    )
    def test_other_reasons_are_none(self, monitor: GpuMonitor, gpu: Gpu, reason: str) -> None:
        gpu.reasons = getattr(pynvml, f"nvmlClocksEventReason{reason}")
        monitor.begin()
        figures, warnings = monitor.end(4)
        assert (figures["throttled"], warnings) == (0.0, {})

    @pytest.mark.parametrize(
        ("change", "cause", "text"),
        [
            ({"used": 23 * GIB}, "memory", "23.0 of 24.0 GiB of its memory are taken"),
            ({"ecc_errors": 3}, "ecc_errors", "3 uncorrected memory errors"),
            ({"processes": {os.getpid(): GIB, 7: 2 * GIB}}, "processes", r"shared with process 7 \(2.0 GiB\); end it"),
            ({"processes": {os.getpid(): GIB, 7: None}}, "processes", "shared with process 7; end it"),
            ({"processes": {17: 3 * GIB, 7: 2 * GIB}}, "processes", r"7 \(2.0 GiB\), 17 \(3.0 GiB\) .*one of them is"),
        ],
    )
    def test_each_cause_is_told_once_even_from_before_the_interval(
        self, monitor: GpuMonitor, gpu: Gpu, change: dict[str, Any], cause: str, text: str
    ) -> None:
        for name, value in change.items():
            setattr(gpu, name, value)
        monitor.sample()
        monitor.begin()
        _, warnings = monitor.end(4)
        assert list(warnings) == [cause]
        assert re.search(text, warnings[cause])
        monitor.begin()
        assert monitor.end(4)[1] == {}

    @pytest.mark.parametrize("processes", [{}, {os.getpid(): GIB}, {os.getpid(): None}, {7: GIB}])
    def test_the_own_process_is_no_other_one(
        self, monitor: GpuMonitor, gpu: Gpu, processes: dict[int, int | None]
    ) -> None:
        """In a container its id may be another one."""
        gpu.processes = processes
        monitor.begin()
        assert monitor.end(4)[1] == {}

    def test_memory_just_below_the_limit(self, monitor: GpuMonitor, gpu: Gpu) -> None:
        gpu.used = gpu.total * 19 // 20
        monitor.begin()
        assert monitor.end(4)[1] == {}

    @pytest.mark.parametrize(
        "error", [pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired, pynvml.NVMLError_Unknown]
    )
    def test_a_lost_gpu_is_told_once_and_ends_the_monitor(
        self, monitor: GpuMonitor, gpu: Gpu, nvml: FakeNvml, error: type[Exception]
    ) -> None:
        monitor.begin()
        gpu.errors[""] = error()
        figures, warnings = monitor.end(4)
        assert figures == {}
        assert list(warnings) == ["lost"]
        assert "NVML gives no more figures" in warnings["lost"]
        monitor._thread.join(60.0)
        assert not monitor._thread.is_alive()
        nvml.calls.clear()
        monitor.begin()
        assert monitor.end(4) == ({}, {})
        assert not nvml.calls


class TestWhichGpu:
    @pytest.fixture
    def as_cuda(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Devices that PyTorch was asked for; it names them without a prefix."""
        asked: list[int] = []

        def properties(index: int) -> Any:
            asked.append(index)
            return SimpleNamespace(uuid=UUID)

        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return asked

    def opened(self, device: str = "cuda:0") -> str | None:
        monitor = open_monitor(torch.device(device), interval=NEVER)
        if monitor is not None:
            monitor.close()
        return None if monitor is None else monitor.name

    def test_the_one_with_the_uuid_that_pytorch_sees(self, nvml: FakeNvml, as_cuda: list[int]) -> None:
        nvml.gpus = (Gpu(uuid="GPU-other"), *nvml.gpus)
        assert self.opened("cuda:1") == f"NVIDIA L4, GPU-{UUID}"
        assert self.opened("cuda") == f"NVIDIA L4, GPU-{UUID}"
        assert as_cuda == [1, 0]

    @pytest.mark.parametrize(
        ("visible", "uuid"),
        [("", f"MIG-{UUID}"), ("MIG-part", "MIG-part"), ("MIG-gone", f"MIG-{UUID}"), ("0", f"MIG-{UUID}")],
    )
    def test_a_part_of_a_gpu(
        self,
        nvml: FakeNvml,
        gpu: Gpu,
        as_cuda: list[int],
        monkeypatch: pytest.MonkeyPatch,
        visible: str,
        uuid: str,
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        nvml.gpus = (*nvml.gpus, Gpu(uuid=uuid, name="NVIDIA A100 MIG 1g.5gb", parent=gpu, used=GIB, temperature=1))
        assert self.opened() == f"NVIDIA A100 MIG 1g.5gb, {uuid}"
        monitor = open_monitor(torch.device("cuda:0"), interval=NEVER)
        assert monitor is not None
        gpu.ecc_errors, gpu.temperature = 2, 77
        monitor.begin()
        figures, warnings = monitor.end(4)
        monitor.close()
        assert (figures["memory_used"], figures["temperature"], figures["ecc_errors"]) == (1.0, 77, 2)
        assert not {"utilization", "power", "energy", "energy_per_image"} & figures.keys()
        assert list(warnings) == ["ecc_errors"]

    def test_none_that_nvml_knows(self, nvml: FakeNvml, as_cuda: list[int], capfd: pytest.CaptureFixture[str]) -> None:
        nvml.gpus = (Gpu(uuid="GPU-other"),)
        assert self.opened() is None
        nvml.gpus = ()
        assert self.opened() is None
        assert capfd.readouterr() == ("", "")

    def test_the_real_library_without_a_driver(self, as_cuda: list[int], capfd: pytest.CaptureFixture[str]) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            assert self.opened() is None
            assert capfd.readouterr() == ("", "")
        else:
            pytest.skip("this machine has an NVIDIA driver")

    def test_a_cpu_is_not_looked_for(self, nvml: FakeNvml) -> None:
        assert self.opened("cpu") is None


class TestProcess:
    def test_the_first_rank_gets_the_figures_and_warnings_of_all(
        self, nvml: FakeNvml, gpu: Gpu, monitor: GpuMonitor, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        others: list[Any] = ["NVIDIA T4, GPU-2", None]

        def gather(value: Any, process: Process) -> list[Any]:
            return [value, *others]

        monkeypatch.setattr(gpu_monitor, "gather_over_ranks", gather)
        monkeypatch.setattr(gpu_monitor, "open_monitor", lambda device, interval: monitor)
        watch = GpuWatch(Process(0, 3), interval=1.0)
        assert watch.start() == {"gpu.rank_0": f"NVIDIA L4, GPU-{UUID}", "gpu.rank_1": "NVIDIA T4, GPU-2"}
        watch.begin()
        gpu.ecc_errors = 1
        gpu.millijoules += 80_000
        figures = {"utilization": 0.9, "temperature_max": 91.0, "energy_per_image": 40.0}
        others[:] = [(figures, {"memory": "nearly full"}), ({}, {})]
        metrics, warnings = watch.end(4)
        assert metrics["system/gpu/rank_0/utilization"] == 0.5
        assert metrics["system/gpu/rank_1/utilization"] == 0.9
        assert metrics["system/gpu/utilization"] == pytest.approx(0.7)
        assert metrics["system/gpu/temperature_max"] == 91.0
        assert metrics["system/gpu/energy_per_image"] == pytest.approx(30.0)
        assert metrics["system/gpu/power"] == 70.0  # of the one rank that has it
        assert not any(name.startswith("system/gpu/rank_2/") for name in metrics)
        assert warnings["gpu.rank_1.memory"] == "GPU of rank 1 (NVIDIA T4, GPU-2): nearly full"
        assert list(warnings) == ["gpu.rank_0.ecc_errors", "gpu.rank_1.memory"]
        watch.close()
        assert not monitor._thread.is_alive()


class TestTraining:
    @pytest.fixture
    def config(self, tiny_config: Config) -> Config:
        return apply_overrides(tiny_config, ["evaluation.every=9", "evaluation.pseudo_mask_images=0"])

    def fit(self, trainer: Any) -> None:
        reports: list[dict[str, float]] = []
        trainer.fit(report=reports.append)
        assert not any(name.startswith("system/") for report in reports for name in report)

    def test_on_a_cpu_there_are_no_figures(
        self, config: Config, start_trainer: Callable[..., Any], tracker: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.fit(start_trainer(config, tracker=tracker))
        assert not any(name.startswith("system/") for _, values in tracker.points for name in values)
        assert tracker.tags == {}
        assert "GPU" not in capsys.readouterr().out

    def test_figures_of_each_epoch_and_warnings_once(
        self,
        config: Config,
        start_trainer: Callable[..., Any],
        tracker: Any,
        gpu: Gpu,
        nvml: FakeNvml,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        started: list[GpuMonitor] = []

        def start(device: torch.device, interval: float) -> GpuMonitor:
            started.append(GpuMonitor(gpu.uuid, interval=NEVER))
            return started[-1]

        def counting(handle: Gpu) -> int:
            handle.millijoules += 16_000  # at each sample
            return handle.millijoules

        monkeypatch.setattr(gpu_monitor, "open_monitor", start)
        nvml.nvmlDeviceGetTotalEnergyConsumption = counting  # type: ignore[method-assign]
        gpu.reasons = pynvml.nvmlClocksEventReasonHwThermalSlowdown
        self.fit(start_trainer(config, tracker=tracker))
        assert tracker.curve("system/gpu/rank_0/utilization") == [(2, 0.5), (4, 0.5)]
        assert tracker.curve("system/gpu/throttled") == [(2, 1.0), (4, 1.0)]
        # Two steps of four images between the two samples.
        assert tracker.curve("system/gpu/energy_per_image") == [(2, 2.0), (4, 2.0)]
        assert tracker.tags.pop("gpu.rank_0") == f"NVIDIA L4, GPU-{UUID}"
        assert list(tracker.tags) == ["gpu.rank_0.hardware_thermal_slowdown"]
        assert capsys.readouterr().out.count(tracker.tags["gpu.rank_0.hardware_thermal_slowdown"]) == 1
        assert [monitor._thread.is_alive() for monitor in started] == [False]

    def test_a_lost_gpu_does_not_end_the_training(
        self,
        config: Config,
        start_trainer: Callable[..., Any],
        tracker: Any,
        gpu: Gpu,
        nvml: FakeNvml,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(gpu_monitor, "open_monitor", lambda device, interval: GpuMonitor(gpu.uuid, interval=NEVER))
        gpu.errors[""] = pynvml.NVMLError_GpuIsLost()
        self.fit(start_trainer(config, tracker=tracker))
        assert [step for step, values in tracker.points if "train/epoch_loss" in values] == [2, 4]
        assert not any(name.startswith("system/") for _, values in tracker.points for name in values)
        assert capsys.readouterr().out.count("NVML gives no more figures") == 1
