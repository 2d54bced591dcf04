"""The NVIDIA driver, from what nvidia-smi and the kernel print, against the CUDA of torch."""

from dataclasses import replace

import pytest

from megatron_anyexperts.checks import doctor
from megatron_anyexperts.checks.doctor import Installation
from megatron_anyexperts.checks.driver import Driver, describe, from_kernel, from_smi, is_older, problem

TOO_OLD = Installation(torch="2.15.0+cu132", megatron="0.19.2", cuda="13.2", driver=Driver("550.163.01"))


@pytest.mark.parametrize(
    ("output", "version", "said"),
    [
        ("580.159.04\n580.159.04\n", "580.159.04", None),
        ("535.183.01\n", "535.183.01", None),
        ("570.86\n", "570.86", None),
        ("", None, None),
        ("No devices were found\n", None, "No devices were found"),
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
            "NVIDIA driver is installed and running.\n\n",
            None,
            "couldn't communicate with the NVIDIA driver",
        ),
        (
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.183\n",
            None,
            "Driver/library version mismatch NVML library version: 535.183",
        ),
    ],
)
def test_what_nvidia_smi_prints_is_read(output, version, said):
    found = from_smi(output)
    assert found.version == version
    assert (found.said is None) == (said is None) and (said is None or said in found.said)


CLOSED = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
OPEN = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22-I3)
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""


@pytest.mark.parametrize(
    ("text", "version"), [(CLOSED, "535.183.01"), (OPEN, "580.95.05"), (CLOSED.splitlines()[1], None)]
)
def test_what_the_kernel_says_is_read(text, version):
    assert from_kernel(text) == version


def test_versions_are_ordered_by_number():
    assert is_older("525.60.11", "525.60.13") and not is_older("525.60.13", "525.60.13")
    assert is_older("99.1", "525.60.13") and not is_older("580.65.06", "580") and is_older("575.57.08", "580")


@pytest.mark.parametrize(
    ("driver", "cuda", "works", "expected"),
    [
        (Driver("550.163.01"), "13.2", False, "driver 550.163.01 is too old: torch's CUDA 13.2 needs 580 or newer"),
        (Driver("550.163.01"), "13.2", False, "cuda-compat-13-2"),
        (Driver("520.61.05"), "12.6", False, "needs 525.60.13 or newer"),
        (Driver("550.163.01"), "12.6", False, "torch sees no GPU; look at CUDA_VISIBLE_DEVICES"),
        (Driver("550.163.01"), None, False, "built without CUDA"),
        (Driver(None, "No devices were found"), "13.2", False, "does not answer: No devices were found"),
        (Driver("580.95.05", "Driver/library version mismatch"), "13.2", False, "nvidia-smi says: Driver/library"),
        (Driver("550.163.01"), "13.2", True, None),
        (Driver(), "13.2", False, None),
    ],
)
def test_the_reason_names_what_was_found_what_is_needed_and_the_way_out(driver, cuda, works, expected):
    reason = problem(driver, cuda, works)
    assert (reason is None) == (expected is None) and (expected is None or expected in reason)


def test_the_doctor_says_it_in_its_report_and_of_a_configuration_that_needs_cuda():
    config = ["--config", "ling_mini_2_0"]
    assert "  no GPU:                   driver 550.163.01 is too old" in doctor.report(TOO_OLD)
    assert "550.163.01, older than the 580 that CUDA 13.2 needs" in doctor.report(TOO_OLD)
    first, *_ = doctor.missing_for(doctor.parse_config(config), TOO_OLD)
    assert first.startswith("CUDA: driver 550.163.01 is too old")
    assert not any("driver" in text for text in doctor.missing_for(doctor.parse_config(["--config", "demo"]), TOO_OLD))
    forward = replace(TOO_OLD, capability=(9, 0), gpus=("NVIDIA H100",))
    assert "too old" not in doctor.report(forward)
    assert describe(Driver("580.95.05"), "13.2") == "580.95.05, at least the 580 that CUDA 13.2 needs"
