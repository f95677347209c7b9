"""What a run cost: wall and processor seconds, peak memory, real positions read, an energy estimate."""

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

CPU_WATTS = 10.0  # per busy core, a laptop's; energy is an estimate and labelled so


class Meter:
    """Measures from its construction to `read()`."""

    def __init__(self):
        forget_peaks()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self, tokens: int = 0, elsewhere_cpu_s: float = 0.0, peaks: dict | None = None) -> dict[str, float]:
        """Return the cost keys of a record row; other processes than this one spent `elsewhere_cpu_s` on it.

        `peaks` is the `peak_memory` of one of them, where they did the work; by default this process's.
        """
        cpu_s = time.process_time() - self.cpu + elsewhere_cpu_s
        return {
            "wall_s": round(time.perf_counter() - self.wall, 2), "cpu_s": round(cpu_s, 2),
            **(peaks or peak_memory()), "tokens": tokens, "energy_wh": round(cpu_s * CPU_WATTS / 3600, 3),
        }  # fmt: skip


def forget_peaks() -> None:
    """Let `peak_memory` count from here, where the kernel allows it (Linux); elsewhere it counts from the start."""
    import torch

    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Return the most that this process has held since `forget_peaks`, in GiB: resident, and on its CUDA device."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"peak_rss_gib": round(peak, 3), "peak_gpu_gib": round(gpu, 3)}
