"""What a run cost."""

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
