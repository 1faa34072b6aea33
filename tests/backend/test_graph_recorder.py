"""Recording on a CUDA device, by itself."""

from __future__ import annotations

import pytest
import torch
from manylora.engine.graph_recorder import recorder_for


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_spoilt_capture_leaves_the_device_usable() -> None:
    recorder = recorder_for(torch.device("cuda"))
    x = torch.ones(4, device="cuda")

    def waits() -> None:
        x.mul_(float(x.sum()))

    with pytest.raises(RuntimeError):
        recorder.record(waits)
    recorder.abandon()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    x.fill_(1)

    def adds() -> None:
        x.add_(1)

    replay = recorder.record(adds)
    replay()
    # Once to warm up, not in the capture, once replayed.
    assert x.tolist() == [3.0] * 4
