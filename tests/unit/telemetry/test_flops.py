from __future__ import annotations

import pytest
import torch

from orchestrator.telemetry.flops import Flops, peak_flops
from orchestrator.telemetry.format import line_of
from orchestrator.telemetry.records import Step


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", None),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_the_peak_is_the_cards_own(card: str, peak: float | None) -> None:
    assert peak_flops(card) == peak


def told(flops: Flops) -> dict[str, float | None]:
    return {"mfu": flops.mfu, "tflops": flops.tflops}


def line(flops: Flops) -> str | None:
    return line_of(Step(iter=7, loss=2.5, lr=1e-3, dt_s=0.125, tokens_per_s=512.0, **told(flops)))


def test_a_line_tells_mfu_of_a_known_card_and_tflops_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {0: "NVIDIA H100 80GB HBM3", 1: "NVIDIA RTX A6000"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    known, unknown, cpu = (Flops(torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu"))
    assert line(known) == "iter 7: loss 2.5000, time 125.00ms"
    for flops in (known, unknown, cpu):
        flops.add(400e12)
        flops.add(500e12)
    assert told(known) == {"mfu": pytest.approx(410 / 989), "tflops": pytest.approx(410)}
    assert line(known) == "iter 7: loss 2.5000, time 125.00ms, mfu 41.46%"
    assert line(unknown) == "iter 7: loss 2.5000, time 125.00ms, 410.0 TFLOP/s"
    assert line(cpu) == "iter 7: loss 2.5000, time 125.00ms"
    assert told(cpu) == {"mfu": None, "tflops": None}
