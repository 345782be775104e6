"""`make gpu` at small sizes on a device."""

from pathlib import Path

import gpu
import gpu_sizes
import pytest
import torch


@pytest.mark.filterwarnings("ignore:layer .* calibration tokens for:UserWarning")
def test_the_measured_parts(device: torch.device, tmp_path: Path) -> None:
    assert gpu.main([*gpu_sizes.TINY, "--device", str(device), "--out", str(tmp_path)]) == 0
    gpu_sizes.check(tmp_path)
