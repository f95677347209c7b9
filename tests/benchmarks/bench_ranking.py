"""Exact tie-aware ranks at every k against the top-k metrics of RecBole, RecTools, RePlay and ranx.

    TEXTREC_PEERS=<python of an environment with peers.txt> python tests/benchmarks/bench_ranking.py

All get the same user vectors, item vectors, targets and seen items. Two works: `least` is the cheapest thing a peer can
do (HR, NDCG and MRR at 10, seen items filtered); `same` is what one pass of ours always gives (k up to 100, seen items
filtered and kept). A peer scores with its own loop where it has one, in the faster of two batch sizes, with its input
laid out in advance.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path

from _ratio import Contender, interleave, machine, median_ratio, peers_interpreter, serve, versions_of

SIZES = {"ML-1M": (6_040, 3_416, 999_611), "Beauty": (22_363, 12_101, 198_502)}  # users, items, interactions
WIDTH, ROUNDS = 64, 5
WORKS = {"least": ((10,), (True,)), "same": ((1, 5, 10, 20, 50, 100), (True, False))}  # ks, seen items filtered?
PACKAGES = {"RePlay": "replay-rec", "RecTools": "rectools", "RecBole": "recbole", "ranx": "ranx"}


def write_input(path: Path, users: int, items: int, interactions: int) -> None:
    """Write vectors whose targets rank well, and histories of ragged length, popular items more often."""
    import numpy as np

    rng = np.random.default_rng(0)
    item_vectors = rng.normal(size=(items, WIDTH)).astype(np.float32)
    targets = rng.integers(0, items, users)
    user_vectors = rng.normal(size=(users, WIDTH)).astype(np.float32) + 0.4 * item_vectors[targets]
    lengths = 3 + rng.multinomial(interactions - 3 * users, rng.dirichlet(np.full(users, 0.7)))
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, items // 3))])
    popularity = rng.zipf(1.3, items).clip(max=1000) ** 0.5
    seen = rng.choice(items, offsets[-1], p=popularity / popularity.sum())
    rows = np.repeat(np.arange(users), np.diff(offsets))
    seen = np.where(seen == targets[rows], (seen + 1) % items, seen)  # no target was seen
    np.savez(path, users=user_vectors, items=item_vectors, targets=targets, seen=seen, offsets=offsets)


class Ours:
    def __init__(self, data):
        import torch

        from textrec.evaluation.metrics import mean_metrics
        from textrec.evaluation.ranking import VectorScorer, rank_targets

        users, items = torch.from_numpy(data["users"]), torch.from_numpy(data["items"])
        targets, flat, offsets = data["targets"] + 1, data["seen"] + 1, data["offsets"]

        def seen(rows):
            ends = offsets[rows.start : rows.stop + 1]
            return flat[ends[0] : ends[-1]], ends - ends[0]

        def run():
            scorer = VectorScorer(lambda rows: users[rows], items)
            ranks = rank_targets(scorer, range(len(users)), targets, seen, num_items=len(items))
            filtered, kept = mean_metrics(ranks.filtered), mean_metrics(ranks.kept)
            return {"hr": filtered["recall@10"], "ndcg": filtered["ndcg@10"], "kept": kept["ndcg@10"]}

        self.works = dict.fromkeys(WORKS, run)


class TopK:
    """What the peers share: blocks of scores, seen items set to minus infinity, the best k."""

    def __init__(self, data):
        import numpy as np
        import torch

        self.np, self.torch, self.data = np, torch, data
        self.users, self.items = torch.from_numpy(data["users"]), torch.from_numpy(data["items"])
        self.targets = torch.from_numpy(data["targets"])
        self.prepare()
        self.works = {name: lambda ks=ks, rules=rules: self.work(ks, rules) for name, (ks, rules) in WORKS.items()}
        speeds = {}
        for self.batch in (256, 1024):
            self.lay_out()
            self.measure((10,), True)
            start = time.perf_counter()
            self.measure((10,), True)
            speeds[time.perf_counter() - start] = self.batch
        self.batch = speeds[min(speeds)]
        self.lay_out()

    def work(self, ks, rules):
        results = [self.measure(ks, filtered) for filtered in rules]
        return results[0] | ({"kept": results[1]["ndcg"]} if len(results) > 1 else {})

    def prepare(self):
        pass

    def lay_out(self):
        """Index the seen items of every batch as (row, item) pairs."""
        offsets, seen = self.data["offsets"], self.data["seen"]
        self.batches = []
        for start in range(0, len(self.users), self.batch):
            ends = offsets[start : start + self.batch + 1]
            rows = self.np.repeat(self.np.arange(len(ends) - 1), self.np.diff(ends))
            pairs = self.torch.from_numpy(rows), self.torch.from_numpy(seen[ends[0] : ends[-1]])
            self.batches.append((slice(start, start + len(ends) - 1), pairs))

    def score_blocks(self, filtered):
        for rows, seen_pairs in self.batches:
            scores = self.users[rows] @ self.items.T
            if filtered:
                scores[seen_pairs] = -math.inf
            yield rows, scores


class RecBole(TopK):
    def prepare(self):
        from recbole.evaluator import Collector, Evaluator

        self.np.float = float  # RecBole 1.2.1 asks for names that NumPy has dropped
        settings = {"device": self.torch.device("cpu"), "eval_args": {"mode": "full"}, "metric_decimal_place": 10}
        configs = {ks: settings | {"metrics": ["Hit", "NDCG", "MRR"], "topk": list(ks)} for ks, _ in WORKS.values()}
        self.tools = {ks: (Collector(config), Evaluator(config)) for ks, config in configs.items()}

    def measure(self, ks, filtered):
        collector, evaluator = self.tools[ks]
        for rows, scores in self.score_blocks(filtered):
            collector.eval_batch_collect(scores, None, self.torch.arange(len(scores)), self.targets[rows])
        metrics = evaluator.evaluate(collector.get_data_struct())
        return {"hr": float(metrics["hit@10"]), "ndcg": float(metrics["ndcg@10"])}


class RecTools(TopK):
    def prepare(self):
        from rectools.fast_transformers import compute_metrics
        from rectools.models.rank import Distance, TorchRanker
        from scipy import sparse

        self.make_ranker = lambda: TorchRanker(Distance.DOT, "cpu", self.users, self.items, batch_size=self.batch)
        self.compute_metrics = compute_metrics
        shape = (len(self.users), len(self.items))
        ones = self.np.ones(len(self.data["seen"]), dtype=self.np.float32)
        self.seen = sparse.csr_matrix((ones, self.data["seen"], self.data["offsets"]), shape=shape)

    def measure(self, ks, filtered):
        users, pairs = self.np.arange(len(self.users)), self.seen if filtered else None
        _, items, _ = self.make_ranker().rank(users, k=max(ks), filter_pairs_csr=pairs)
        metrics = self.compute_metrics(self.torch.from_numpy(items.reshape(-1, max(ks))), self.targets, list(ks))
        gain_of_ten_hits = sum(1 / math.log2(rank + 1) for rank in range(1, 11))  # its NDCG divides by this
        return {"hr": metrics["HR@10"], "ndcg": metrics["NDCG@10"] * gain_of_ten_hits}


class RePlay(TopK):
    def prepare(self):
        from replay.metrics.torch_metrics_builder import TorchMetricsBuilder
        from replay.nn.lightning.postprocessor import SeenItemsFilter

        self.metrics = {ks: TorchMetricsBuilder(["recall", "ndcg", "mrr"], list(ks)) for ks, _ in WORKS.values()}
        self.filter = SeenItemsFilter(len(self.items), "seen_ids")

    def lay_out(self):
        super().lay_out()
        padded = []
        for rows, (row, item) in self.batches:
            counts = self.torch.bincount(row, minlength=rows.stop - rows.start)
            place = self.torch.arange(len(row)) - self.torch.repeat_interleave(counts.cumsum(0) - counts, counts)
            ids = self.torch.full((len(counts), int(counts.max())), -1)
            ids[row, place] = item
            padded.append((rows, {"seen_ids": ids}))
        self.batches = padded

    def measure(self, ks, filtered):
        metrics = self.metrics[ks]
        metrics.reset()
        for rows, seen in self.batches:
            scores = self.users[rows] @ self.items.T
            scores = self.filter.on_validation(seen, scores) if filtered else scores
            best = self.torch.topk(scores, k=max(ks), dim=1).indices
            metrics.add_prediction(best, self.targets[rows, None])
        measured = metrics.get_metrics()
        return {"hr": float(measured["recall@10"]), "ndcg": float(measured["ndcg@10"])}


class Ranx(TopK):
    """It only measures given lists: scores and top-k are plain torch."""

    def measure(self, ks, filtered):
        from ranx import evaluate

        lists = []
        for _, scores in self.score_blocks(filtered):
            best = self.torch.topk(scores, k=max(ks), dim=1)
            lists.append(self.np.stack([best.indices.numpy(), best.values.numpy()], axis=2).astype(self.np.float64))
        truth = self.np.stack([self.targets.numpy(), self.np.ones(len(self.targets))], axis=1)[:, None]
        names = [f"{name}@{k}" for name in ("hit_rate", "ndcg", "mrr") for k in ks]
        measured = evaluate(truth, self.np.concatenate(lists), names, threads=self.torch.get_num_threads())
        return {"hr": float(measured["hit_rate@10"]), "ndcg": float(measured["ndcg@10"])}


CONTENDERS = {"ours": Ours, "RePlay": RePlay, "RecTools": RecTools, "RecBole": RecBole, "ranx": Ranx}


def work(name: str, path: str, threads: int) -> None:
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    with np.load(path) as data:
        serve(CONTENDERS[name]({key: data[key] for key in data.files}).works)


def check_equal(contenders: list[Contender], users: int) -> None:
    """Refuse to time what disagrees: rounding may move two users across rank 10, not more."""
    ours = contenders[0].runs["same"][0]["result"]
    for contender in contenders[1:]:
        for work in WORKS:
            for metric, value in contender.runs[work][0]["result"].items():
                if abs(value - ours[metric]) > 2 / users:
                    raise SystemExit(f"{contender.name} finds {metric} {value}, we find {ours[metric]}")


def race(folder: Path, size: str, threads: int, peers: str | None, names: list[str]) -> None:
    """Print one row per work and contender."""
    users, items, interactions = SIZES[size]
    path = folder / f"{size}.npz"
    write_input(path, users, items, interactions)
    environment = {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    interpreters = {"ours": sys.executable} | dict.fromkeys(names, peers)
    contenders = [
        Contender(name, [interpreter, __file__, "--worker", name, str(path), str(threads)], environment)
        for name, interpreter in interpreters.items()
    ]
    interleave(contenders, list(WORKS), ROUNDS, folder)
    check_equal(contenders, users)
    for work in WORKS:
        for each in contenders:
            result = each.runs[work][0]["result"]
            wall, cpu, peak = (each.median(work, quantity) for quantity in ("wall", "cpu", "peak_mib"))
            ratios = [median_ratio(each, contenders[0], work, quantity) for quantity in ("wall", "cpu")]
            cells = [f"{users:,} x {items:,}", threads, work, each.name, f"{result['hr']:.4f}", f"{result['ndcg']:.4f}"]
            cells += [f"{wall:.3f}", f"{cpu:.3f}", f"{peak:.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
            print("|", " | ".join(map(str, cells)), "|", flush=True)


HEADER = """
d = {width}; medians of {rounds} interleaved rounds; `times ours` is the median over rounds of a time by our time;
memory is the peak above what was resident before the first run (a lower bound for peers, whose allocators keep what the
choice of a batch size left). `least`: HR, NDCG and MRR at 10, seen items filtered. `same`: at 1, 5, 10, 20, 50 and 100,
filtered and kept, which is what ours computes (with ties) in both works. ranx only measures given lists: its scores and
top-k are plain torch. RecTools' NDCG is multiplied by the gain of ten hits.

| users x items | threads | work | by | HR@10 | NDCG@10 | wall s | CPU s | peak MiB | times ours, wall | CPU |
|---|--:|---|---|--:|--:|--:|--:|--:|--:|--:|"""


def main() -> None:
    peers = peers_interpreter()
    installed = versions_of(peers, [*PACKAGES.values(), "torch"]) if peers else {}
    names = [name for name, package in PACKAGES.items() if installed.get(package)]
    print(f"# Exact ranks against top-k metrics\n\n{machine()}.")
    print(f"Ours: torch {versions_of(sys.executable, ['torch'])['torch']}. Peers:", end=" ")
    print(", ".join(f"{name} {version}" for name, version in installed.items()) or "none", end=".\n")
    print(HEADER.format(width=WIDTH, rounds=ROUNDS), flush=True)
    busy = os.getloadavg()[0] > 0.5
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            for threads in (1,) if busy else (1, 2):
                race(Path(folder), size, threads, peers, names)
    if busy:
        print("\n2 threads are left out: other work was running, and threads that wait for a core time the scheduler.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs=3)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker[0], arguments.worker[1], int(arguments.worker[2]))
    else:
        main()
