"""What a run cost."""

import sys

import pytest
import torch

from textrec.training.cost import CPU_WATTS, Meter


def test_the_meter_counts_work_and_tokens():
    meter = Meter()
    sum(range(2_000_000))
    cost = meter.read(tokens=7)
    assert cost["tokens"] == 7
    assert 0 < cost["cpu_s"] and 0 < cost["wall_s"] and 0.01 < cost["peak_rss_gib"] < 100
    assert abs(cost["energy_wh"] - cost["cpu_s"] * CPU_WATTS / 3600) < 1e-3


def test_what_other_processes_spent_is_added():
    assert 100 <= Meter().read(elsewhere_cpu_s=100.0)["cpu_s"] < 160


def test_memory_is_that_of_the_process_which_did_the_work():
    elsewhere = {"peak_rss_gib": 123.0, "peak_gpu_gib": 4.0}
    cost, own = Meter().read(peaks=elsewhere), Meter().read(peaks=None)
    assert (cost["peak_rss_gib"], cost["peak_gpu_gib"]) == (123.0, 4.0) and own["peak_rss_gib"] < 100


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's record of peak memory starts afresh on Linux alone")
def test_memory_that_was_given_back_before_is_not_counted():
    meter = Meter()
    block = torch.ones(2**27)  # half a GiB
    held = meter.read()["peak_rss_gib"]
    del block
    afterwards = Meter().read()["peak_rss_gib"]
    assert held - afterwards > 0.4 and meter.read()["peak_rss_gib"] == pytest.approx(afterwards, abs=0.1)
