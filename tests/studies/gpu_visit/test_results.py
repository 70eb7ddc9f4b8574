from __future__ import annotations

import pytest

from megalibi.studies.gpu_visit.results import find_data_sheet


@pytest.mark.parametrize(
    ("driver_name", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA B200", None),
        ("", None),
    ],
)
def test_a_drivers_name_finds_the_data_sheet(driver_name: str, name: str | None) -> None:
    gpu = find_data_sheet(driver_name)
    assert (gpu and gpu.name) == name
