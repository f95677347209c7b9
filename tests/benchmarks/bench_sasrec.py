"""Training of one SASRec on MovieLens-1M, targets per second: ours against RecBole, RecTools and RePlay.

    TEXTREC_PEERS=<python of an environment with peers.txt> python tests/benchmarks/bench_sasrec.py

The same net (d = 64, 2 blocks, 1 head, feed-forward 64, dropout 0.2), softmax over the whole catalogue, Adam 1e-3,
fp32, the same histories, 128 a step. A peer trains with its own net and loss on batches laid out in advance; ours are
made inside the clock. RecBole predicts one target per prefix of a history, so a step of it is 256 such rows; only
targets per second compare. The data are `ml-1m-sasrec` under $TEXTREC_DATA or, where that is absent, random histories
of about those lengths.
"""

import argparse
import gzip
import itertools
import os
import sys
import tempfile
from pathlib import Path

from _ratio import Contender, interleave, machine, median_ratio, peers_interpreter, serve, versions_of

PACKAGES = {"RePlay": "replay-rec", "RecTools": "rectools", "RecBole": "recbole"}
WIDTH, HISTORIES, PREFIXES, STEPS, ROUNDS = 64, 128, 256, 2, 3


def write_input(path: Path) -> str:
    """Write the training histories as flat arrays; return what they are."""
    import numpy as np

    source = Path(os.environ.get("TEXTREC_DATA", "")) / "ml-1m-sasrec" / "ml-1m.txt.gz"
    if source.is_file():
        with gzip.open(source, "rt") as file:
            users, items = np.loadtxt(file, dtype=np.int64).T
        lengths, name = np.bincount(users)[1:], "MovieLens-1M"
    else:
        rng = np.random.default_rng(0)
        lengths = np.clip(rng.lognormal(4.6, 1.0, 6040).astype(np.int64), 5, 2000)
        items, name = rng.integers(1, 3417, lengths.sum()), "random histories of MovieLens-1M's shape"
    np.savez(path, items=items, offsets=np.concatenate([[0], np.cumsum(lengths)]), train_end=lengths - 2)
    return name


class Trainer:
    """A few steps on the same histories in every run; targets are counted, not assumed."""

    def __init__(self, data, length):
        import numpy as np
        import torch

        torch.manual_seed(0)
        self.np, self.torch, self.data, self.length = np, torch, data, length
        self.num_items = int(data["items"].max())
        self.rows = np.random.default_rng(0).permutation(len(data["train_end"]))[: STEPS * HISTORIES]
        self.prepare()
        self.works = {"train": self.run}

    def training_items(self, user):
        start = self.data["offsets"][user]
        return self.data["items"][start : start + self.data["train_end"][user]]

    def run(self):
        targets, loss = 0, None
        for inputs, count in self.batches():
            self.optimizer.zero_grad()
            loss = self.loss(inputs)
            loss.backward()
            self.optimizer.step()
            targets += count
        return {"targets": int(targets), "loss": float(loss.detach())}

    def batches(self):
        return self.ready

    def padded(self):
        """Yield left-padded inputs and targets [128, length] of each step, as the ports feed them."""
        for first in range(0, len(self.rows), HISTORIES):
            inputs, targets = self.np.zeros((2, HISTORIES, self.length), dtype=self.np.int64)
            for row, user in enumerate(self.rows[first : first + HISTORIES]):
                items = self.training_items(user)[-self.length - 1 :]
                inputs[row, self.length - len(items) + 1 :] = items[:-1]
                targets[row, self.length - len(items) + 1 :] = items[1:]
            yield self.torch.from_numpy(inputs), self.torch.from_numpy(targets)


class Ours(Trainer):
    def prepare(self):
        from textrec.data.histories import Histories
        from textrec.models.sasrec import SASRec, SASRecConfig
        from textrec.training.batches import HistoryBatches, next_item_targets
        from textrec.training.losses import full_softmax
        from textrec.training.module import SequenceModule, TrainingConfig

        config = SASRecConfig(num_items=self.num_items, max_sequence_length=self.length, embedding_dim=WIDTH)
        module = SequenceModule(SASRec(config), TrainingConfig(learning_rate=1e-3), seed=0)
        self.model, self.optimizer = module.model.train(), module.configure_optimizers()
        self.full_softmax = full_softmax
        items, offsets = self.data["items"].astype(self.np.int32), self.data["offsets"]
        histories = Histories(items, self.np.zeros_like(items), offsets)
        self.dataset = HistoryBatches(histories, self.data["train_end"], self.length, next_item_targets)

    def batches(self):
        for step in range(STEPS):
            batch = self.dataset[0, step, self.rows[step * HISTORIES : (step + 1) * HISTORIES]]
            yield batch, (batch["targets"] != 0).sum()

    def loss(self, batch):
        hidden, targets = self.model(batch["items"]), batch["targets"][batch["items"] != 0]
        return self.full_softmax(hidden, self.model.item_vectors(), targets) / len(targets)


class RePlay(Trainer):
    def prepare(self):
        from replay.data import FeatureHint, FeatureSource, FeatureType
        from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
        from replay.nn.sequential import SasRec

        feature = TensorFeatureInfo(
            "item_id",
            is_seq=True,
            feature_type=FeatureType.CATEGORICAL,
            embedding_dim=WIDTH,
            padding_value=self.num_items,
            cardinality=self.num_items,
            feature_hint=FeatureHint.ITEM_ID,
            feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
        )
        self.model = SasRec.from_params(
            TensorSchema([feature]),
            embedding_dim=WIDTH,
            num_heads=1,
            num_blocks=2,
            max_sequence_length=self.length,
            dropout=0.2,
        ).train()
        self.optimizer = self.torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.ready = []
        for inputs, targets in self.padded():
            inputs, targets = ((ids - 1).masked_fill(ids == 0, self.num_items) for ids in (inputs, targets))
            real = inputs != self.num_items
            batch = {
                "feature_tensors": {"item_id": inputs},
                "padding_mask": real,
                "positive_labels": targets[..., None],
                "negative_labels": None,
                "target_padding_mask": real[..., None],
            }
            self.ready.append((batch, real.sum()))

    def loss(self, batch):
        return self.model(**batch)["loss"]


class RecTools(Trainer):
    def prepare(self):
        import pandas as pd
        from rectools.dataset import Dataset
        from rectools.models import SASRecModel
        from rectools.models.nn.item_net import IdEmbeddingsItemNet

        parts = [self.training_items(user)[-self.length - 1 :] for user in self.rows]
        catalogue = self.np.arange(1, self.num_items + 1)  # users behind the trained ones, so that no item is missing
        parts += self.np.array_split(catalogue, self.num_items // self.length + 1)
        users = self.np.repeat(self.np.arange(len(parts)), [len(part) for part in parts])
        times = pd.Timestamp("2000-01-01") + pd.to_timedelta(self.np.arange(len(users)), unit="s")
        frame = pd.DataFrame({"user_id": users, "item_id": self.np.concatenate(parts), "weight": 1, "datetime": times})
        model = SASRecModel(
            n_blocks=2,
            n_heads=1,
            n_factors=WIDTH,
            dropout_rate=0.2,
            session_max_len=self.length,
            loss="softmax",
            lr=1e-3,
            batch_size=HISTORIES,
            item_net_block_types=(IdEmbeddingsItemNet,),
        )
        model._build_model_from_dataset(Dataset.construct(frame))
        self.module = model.lightning_model.train()
        self.optimizer = self.torch.optim.Adam(self.module.parameters(), lr=1e-3)
        loader = model.data_preparator.get_dataloader_train()
        batches = list(self.torch.utils.data.DataLoader(loader.dataset, HISTORIES, collate_fn=loader.collate_fn))
        self.ready = [(batch, (batch["y"] != 0).sum()) for batch in batches[:STEPS]]

    def loss(self, batch):
        return self.module.loss_calculator(self.module.get_batch_logits(batch), batch["y"], batch["yw"])


class RecBole(Trainer):
    def prepare(self):
        from recbole.model.sequential_recommender import SASRec

        config = {
            "USER_ID_FIELD": "user",
            "ITEM_ID_FIELD": "item",
            "LIST_SUFFIX": "_list",
            "ITEM_LIST_LENGTH_FIELD": "length",
            "NEG_PREFIX": "neg_",
            "MAX_ITEM_LIST_LENGTH": self.length,
            "device": self.torch.device("cpu"),
            "n_layers": 2,
            "n_heads": 1,
            "hidden_size": WIDTH,
            "inner_size": WIDTH,
            "hidden_dropout_prob": 0.2,
            "attn_dropout_prob": 0.2,
            "hidden_act": "relu",
            "layer_norm_eps": 1e-12,
            "initializer_range": 0.02,
            "loss_type": "CE",
        }
        catalogue = type("Catalogue", (), {"num": lambda _, field: self.num_items + 1})()
        self.model = SASRec(config, catalogue).train()
        self.optimizer = self.torch.optim.Adam(self.model.parameters(), lr=1e-3)
        rng = self.np.random.default_rng(1)
        weights = self.data["train_end"] - 1  # prefixes of a history; a step draws from all of them
        users = rng.choice(len(weights), STEPS * PREFIXES, p=weights / weights.sum())
        self.ready = []
        for first in range(0, len(users), PREFIXES):
            rows = self.np.zeros((PREFIXES, self.length), dtype=self.np.int64)
            lengths, targets = self.np.zeros((2, PREFIXES), dtype=self.np.int64)
            for row, user in enumerate(users[first : first + PREFIXES]):
                items = self.training_items(user)
                end = rng.integers(1, len(items))
                prefix = items[max(0, end - self.length) : end]
                rows[row, : len(prefix)], lengths[row], targets[row] = prefix, len(prefix), items[end]
            batch = {"item_list": rows, "length": lengths, "item": targets}
            self.ready.append(({name: self.torch.from_numpy(values) for name, values in batch.items()}, PREFIXES))

    def loss(self, batch):
        return self.model.calculate_loss(batch)


CONTENDERS = {"ours": Ours, "RePlay": RePlay, "RecTools": RecTools, "RecBole": RecBole}


def work(name: str, path: str, length: int, threads: int) -> None:
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    with np.load(path) as data:
        serve(CONTENDERS[name]({key: data[key] for key in data.files}, length).works)


def race(folder: Path, path: Path, length: int, threads: int, peers: str | None, names: list[str]) -> None:
    """Print one row per contender."""
    interpreters = {"ours": sys.executable} | dict.fromkeys(names, peers)
    contenders = [
        Contender(
            name,
            [interpreter, __file__, "--worker", name, str(path), str(length), str(threads)],
            {"OMP_NUM_THREADS": str(threads)},
        )
        for name, interpreter in interpreters.items()
    ]
    interleave(contenders, ["train"], ROUNDS, folder)
    targets = {each.name: each.runs["train"][0]["result"]["targets"] for each in contenders}
    for each in contenders:
        wall, cpu, peak = (each.median("train", quantity) for quantity in ("wall", "cpu", "peak_mib"))
        per_target = targets["ours"] / targets[each.name]  # a ratio of times becomes one of times per target
        ratios = [median_ratio(each, contenders[0], "train", quantity) * per_target for quantity in ("wall", "cpu")]
        cells = [length, threads, each.name, f"{targets[each.name] / wall:,.0f}", f"{targets[each.name] / cpu:,.0f}"]
        cells += [f"{peak:,.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def main() -> None:
    peers = peers_interpreter()
    installed = versions_of(peers, [*PACKAGES.values(), "torch"]) if peers else {}
    names = [name for name, package in PACKAGES.items() if installed.get(package)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "histories.npz"
        data = write_input(path)
        print(f"# SASRec training\n\n{machine()}.")
        print(f"Ours: torch {versions_of(sys.executable, ['torch'])['torch']}. Peers:", end=" ")
        print(", ".join(f"{name} {version}" for name, version in installed.items()) or "none", end=".\n\n")
        print(f"{data}; d = {WIDTH}, 2 blocks, 1 head, dropout 0.2, softmax over the catalogue, Adam, fp32. Medians of")
        print(f"{ROUNDS} interleaved rounds of {STEPS} steps; the ratio is the contender's time per target by ours;")
        print("memory is the peak above what was resident before the first step.\n")
        print("| longest history | threads | by | targets / s | targets / CPU s | peak MiB | times ours, wall | CPU |")
        print("|--:|--:|---|--:|--:|--:|--:|--:|")
        for length, threads in itertools.product((50, 200), (1, 2)):
            race(Path(folder), path, length, threads, peers, names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs=4)
    arguments = parser.parse_args()
    if arguments.worker:
        name, path, *numbers = arguments.worker
        work(name, path, *map(int, numbers))
    else:
        main()
