"""A table of item vectors larger than memory: what encoding N and 4 N item texts into a memory map costs.

    python tests/benchmarks/bench_item_table.py [--items 20000]

Random texts of 8 to 40 tokens, no two alike, through RecFormer `tiny` with random weights; the tokens and the table are
files that are memory-mapped. Each size is a process of its own. *own* is the peak of the process's own pages (Linux's
RssAnon, sampled), *mapped* that of pages of files, which the system takes back when it needs them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from _ratio import machine

SHORTEST, LONGEST = 8, 40  # tokens of an item


def write_tokens(folder: Path, num_items: int, vocabulary_size: int) -> None:
    """Write the arrays of `ItemTokens`, a block at a time."""
    rng = np.random.default_rng(0)
    lengths_I = np.concatenate([[0], rng.integers(SHORTEST, LONGEST + 1, num_items)])
    offsets_I1 = np.concatenate([[0], np.cumsum(lengths_I)])
    np.save(folder / "offsets_I1.npy", offsets_I1)
    dtypes = {"token_ids_T": np.int32, "type_ids_T": np.int8, "word_starts_T": bool}
    for name, dtype in dtypes.items():
        array_T = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (int(offsets_I1[-1]),))
        for start in range(0, len(array_T), 1 << 20):
            block_T = array_T[start : start + (1 << 20)]
            block_T[:] = rng.integers(5, vocabulary_size, len(block_T)) if dtype == np.int32 else 2


class Watch(threading.Thread):
    """Keep the peaks of this process's own and mapped memory, MiB, above what it held at the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before, self.peaks = self.now(), {"own": 0.0, "mapped": 0.0}

    @staticmethod
    def now() -> dict[str, float]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {name: int(lines[key].split()[0]) / 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}

    def run(self) -> None:
        while True:
            for name, value in self.now().items():
                self.peaks[name] = max(self.peaks[name], value - self.before[name])
            time.sleep(0.01)


def encode(folder: Path, num_items: int) -> dict:
    """Fill the table of `num_items` items; return what it took."""
    import torch

    from textrec.data.tokenizing import ItemTokens, SpecialTokens
    from textrec.models.recformer import PRESETS, RecFormer
    from textrec.training.text_ranking import TextSet, item_table

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = RecFormer(PRESETS["tiny"]).eval()
    special = SpecialTokens(start=0, mask=4, padding=1, num_tokens=model.config.vocabulary_size)
    width = model.config.hidden_size
    write_tokens(folder, 1000, special.num_tokens)
    item_table(model, TextSet(None, ItemTokens.load(folder), special, None))  # first allocations
    write_tokens(folder, num_items, special.num_tokens)
    texts = TextSet(None, ItemTokens.load(folder), special, None)
    table_ID = np.lib.format.open_memmap(folder / "table.npy", "w+", np.float32, (num_items + 1, width))
    watch = Watch()
    watch.start()
    started = time.process_time()
    item_table(model, texts, out=torch.from_numpy(table_ID))
    cpu = time.process_time() - started
    norms_I = np.linalg.norm(table_ID[1 :: max(num_items // 1000, 1)], axis=1)
    assert not table_ID[0].any() and np.allclose(norms_I, 1, atol=1e-5)
    tokens = sum(path.stat().st_size for path in folder.glob("*_*.npy"))
    return {"cpu": cpu, "table": table_ID.nbytes / 2**20, "tokens": tokens / 2**20, **watch.peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(encode(Path(folder), arguments.work)))
        return
    print(machine())
    print("\n| items | items / CPU s | own, MiB | mapped, MiB | table, MiB | tokens, MiB |\n|--:|--:|--:|--:|--:|--:|")
    own = {}
    for num_items in (arguments.items, 4 * arguments.items):
        done = subprocess.run(
            [sys.executable, __file__, "--work", str(num_items)], stdout=subprocess.PIPE, text=True, check=True
        )
        took = json.loads(done.stdout.splitlines()[-1])
        own[num_items] = took["own"]
        numbers = " | ".join(f"{took[name]:,.0f}" for name in ("own", "mapped", "table", "tokens"))
        print(f"| {num_items:,} | {num_items / took['cpu']:,.0f} | {numbers} |", flush=True)
    few, many = own.values()
    print(f"\nown memory grows by {(many - few) * 2**20 / (3 * arguments.items):,.0f} bytes an item")


if __name__ == "__main__":
    main()
