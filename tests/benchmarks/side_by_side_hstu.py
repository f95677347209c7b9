"""Accuracy of RecTools' HSTU and ours: the same prepared set, the same recipe, the same ranking.

    TEXTREC_PEERS=<python of an environment with peers.txt> python tests/benchmarks/side_by_side_hstu.py RUN/rows/hstu

The folder is a finished run of the row `hstu`: recipe, seed, validation users and our numbers are read from it.
RecTools' net, loss, sampler and batches are its own; its vectors are ranked by our ranking. Every epoch ends in a
checkpoint under `--folder`, from which the same command goes on; `--test` ranks the test targets with the best epoch's
weights once training has ended. The report goes to standard output, progress to standard error.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from _ratio import machine, peers_interpreter, versions_of

ROOT = Path(__file__).resolve().parents[2]
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}  # glibc gives nothing back


def peer_net(recipe: dict):
    """Return RecTools' model of our recipe, freshly drawn, and its net; its item ids are ours, for all our items."""
    import numpy as np
    import pandas as pd
    from rectools.dataset import Dataset
    from rectools.models import HSTUModel
    from rectools.models.nn.item_net import IdEmbeddingsItemNet

    names = {
        "n_blocks": "num_blocks", "n_heads": "num_heads", "n_factors": "embedding_dim", "dropout_rate": "dropout",
        "session_max_len": "max_sequence_length", "relative_time_attention": "time_bias", "loss": "loss",
        "relative_pos_attention": "position_bias", "n_negatives": "num_negatives", "lr": "learning_rate",
        "batch_size": "batch_size",
    }  # fmt: skip
    settings = {theirs: recipe[ours] for theirs, ours in names.items()}
    cosine = {"logits_t": recipe["temperature"]}
    model = HSTUModel(**settings, item_net_block_types=(IdEmbeddingsItemNet,), lightning_module_kwargs=cosine)
    items = np.arange(1, recipe["num_items"] + 1)
    times = pd.Timestamp("2000-01-01") + pd.to_timedelta(items, unit="s")
    frame = pd.DataFrame({"user_id": items // 100, "item_id": items, "weight": 1, "datetime": times})
    model._build_model_from_dataset(Dataset.construct(frame))  # its ids follow the order of the rows
    model.lightning_model._xavier_normal_init()
    assert (model.data_preparator.item_id_map.convert_to_internal(items) == items).all()
    assert (*recipe["adam_betas"], recipe["weight_decay"]) == (*model.lightning_model.adam_betas, 0.0)  # not settable
    return model, model.lightning_model.torch_model


def newest(histories, user: int, end: int, length: int) -> tuple[list[int], list[int]]:
    """Return the items and times of the newest `length` interactions before `end`."""
    first = histories.offsets_U1[user]
    rows = slice(first + max(end - length, 0), first + end)
    return histories.items_E[rows].tolist(), histories.times_E[rows].tolist()


def training_loader(model, prepared, users):
    from rectools.models.nn.transformers.data_preparator import SequenceDataset
    from torch.utils.data import DataLoader

    length, ends = model.session_max_len + 1, prepared.split.train_end_U
    parts = [newest(prepared.histories, user, ends[user], length) for user in users if ends[user] >= 2]
    items, times = map(list, zip(*parts, strict=True))
    dataset = SequenceDataset(items, [[1.0] * len(each) for each in items], {"unix_ts": times})
    return DataLoader(dataset, model.batch_size, shuffle=True, collate_fn=model.data_preparator._collate_fn_train)


def request_batch(model, histories, users, ends) -> dict:
    """Lay out what RecTools makes of a history and a context: a last dummy item whose time is that of the request."""
    elements = []
    for user, end in zip(users, ends, strict=True):
        items, times = newest(histories, user, end + 1, model.session_max_len + 1)
        elements.append(([*items[:-1], 0], None, {"unix_ts": times}))
    return model.data_preparator._collate_fn_recommend(elements)


def rank(model, net, prepared, which: str, users):
    """Rank the targets of `users` as `textrec.training.trainer.evaluate` does, from RecTools' vectors."""
    import numpy as np
    import torch

    from textrec.evaluation.ranking import VectorScorer, rank_targets

    users_U, ends_U = prepared.split.targets(which)
    chosen, histories = np.isin(users_U, users), prepared.histories
    users_U, ends_U, normed = users_U[chosen], ends_U[chosen], net.similarity_module._get_embeddings_norm
    net.eval()
    with torch.no_grad():
        items_ID = net.item_model.get_all_embeddings()

        def user_vectors(rows: slice):
            batch = request_batch(model, histories, users_U[rows], ends_U[rows])
            return normed(net.encode_sessions(batch, items_ID)[:, -1])

        return rank_targets(
            VectorScorer(user_vectors, normed(items_ID)[1:]), users_U, histories.at(users_U, ends_U),
            lambda rows: histories.prefixes(users_U[rows], ends_U[rows]), num_items=prepared.num_items,
        )  # fmt: skip


def largest_differences(recipe: dict, prepared) -> list[float]:
    """Compare unit states of our net with RecTools' fresh weights to RecTools', the request time told and withheld."""
    import torch

    from textrec.models.hstu import HSTU, OUTPUT_LENGTH, HSTUConfig

    fields = {name: recipe[name] for name in HSTUConfig.__dataclass_fields__ if name in recipe}
    fields["max_sequence_length"] -= OUTPUT_LENGTH  # our attention is then divided by RecTools' number
    (model, theirs), ours, histories = peer_net(recipe), HSTU(HSTUConfig(**fields)).eval(), prepared.histories
    ours.item_table = theirs.eval().item_model.item_net_blocks[0].ids_emb
    for block, peer in zip(ours.blocks, theirs.transformer_layers.stu_blocks, strict=True):
        block.project.weight.data, block.output = peer.uvqk_proj.data.T, peer.output_mlp
        for bias in peer.rel_attn.parameters():
            torch.nn.init.normal_(bias)  # larger than for training: biases that count
        block.distances, block.buckets = peer.rel_attn.pos_weights, peer.rel_attn.time_weights
    found = torch.zeros(2)
    for length in (3, 50, fields["max_sequence_length"]):
        users = (histories.lengths_U > length).nonzero()[0][:8]
        ends = users * 0 + length  # all of one length: RecTools counts positions from the newest, we from the oldest
        ours.position_table.weight.data[:length] = theirs.pos_encoding_layer.pos_emb.weight.data[:length].flip(0)
        items, times, _ = map(torch.from_numpy, histories.windows(users, ends, length))
        requests = torch.from_numpy(histories.times_E[histories.offsets_U1[users] + ends])
        with torch.no_grad():
            batch = request_batch(model, histories, users, ends)
            states = theirs.encode_sessions(batch, theirs.item_model.get_all_embeddings())[:, -length:].flatten(0, 1)
            states = theirs.similarity_module._get_embeddings_norm(states)
            told, withheld = (ours(items, times, each) * recipe["temperature"] for each in (requests, None))
        found = found.maximum(torch.stack([(each - states).abs().max() for each in (told, withheld)]))
    return found.tolist()


def train_epoch(module, optimizer, loader) -> float:
    """Return the mean of the steps' losses."""
    module.train()
    losses = []
    for batch in loader:
        optimizer.zero_grad()
        loss = module.loss_calculator(module.get_batch_logits(batch), batch["y"], batch["yw"])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return statistics.mean(losses)


def work(arguments, key: dict, prepared) -> None:
    """Train RecTools' net, or go on with it; write what came of it to `result.json` and the test's ranks."""
    import torch

    from textrec.evaluation.metrics import mean_metrics
    from textrec.seeding import derive_seed, generator

    recipe, seed, last = key["parameters"], key["seed"], arguments.folder / "last.pt"
    torch.manual_seed(derive_seed(seed, "peer"))
    differences = largest_differences(recipe, prepared)
    model, net = peer_net(recipe)
    optimizer = model.lightning_model.configure_optimizers()
    users = prepared.split.targets("validation")[0][: arguments.users]
    if recipe["validation_users"] and recipe["validation_users"] < len(users):
        users = generator(seed, "validation users").choice(users, recipe["validation_users"], replace=False)
    loader = training_loader(model, prepared, range(prepared.histories.num_users)[: arguments.users])
    identity = {"row": key, "users": arguments.users, "every": arguments.every}
    state = {"identity": identity, "curve": [], "best": -1.0, "since_best": 0}
    if last.is_file():
        state = torch.load(last, weights_only=True)
        if state["identity"] != identity:
            raise SystemExit(f"{last} belongs to another row, --users or --every: name another --folder")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
    for epoch in range(len(state["curve"]), arguments.epochs):
        if state["since_best"] >= recipe["patience"]:
            break
        torch.manual_seed(derive_seed(seed, "peer", epoch))  # order, negatives and dropout
        wall, cpu = time.perf_counter(), time.process_time()
        entry = {"epoch": epoch, "train_loss": train_epoch(model.lightning_model, optimizer, loader)}
        entry |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "load": os.getloadavg()[0]}
        if (epoch + 1) % arguments.every == 0 or epoch + 1 == arguments.epochs:
            value = mean_metrics(rank(model, net, prepared, "validation", users).filtered)["ndcg@10"]
            entry |= {"ndcg@10": value, "validation_cpu": time.process_time() - cpu - entry["cpu"]}
            state["since_best"] += 1
            if value > state["best"]:
                weights = {name: weight.clone() for name, weight in net.state_dict().items()}
                state |= {"best": value, "since_best": 0, "best_net": weights}
        state["curve"].append(entry)
        state |= {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, partial := Path(f"{last}.partial-{os.getpid()}"))
        partial.replace(last)
        print(", ".join(f"{name} {value:.4g}" for name, value in entry.items()), file=sys.stderr, flush=True)
    (arguments.folder / "ranks.parquet").unlink(missing_ok=True)
    if arguments.test:
        net.load_state_dict(state["best_net"])
        rank(model, net, prepared, "test", prepared.split.targets("test")[0]).save(arguments.folder / "ranks.parquet")
    told = {"curve": state["curve"], "parameters": sum(each.numel() for each in net.parameters())}
    (arguments.folder / "result.json").write_text(json.dumps(told | {"differences": differences}))


REPORT = """
{data}, {fingerprint:.12}; seed {seed}; {max_sequence_length} positions, width {embedding_dim}, {num_blocks} blocks,
{num_heads} head, dropout {dropout}, cosine / {temperature}, {num_negatives} uniform negatives a position,
{batch_size} histories a step, Adam {learning_rate}. Both are told the time of each item to be predicted, RecTools in
ranking by its context. Training part, validation users ({validation_users}), candidates, seen items and ties are the
same, and both keep the best validation epoch. Ours validates every {validate_every}, RecTools every {every} epochs;
both stop after {patience} validations without a better one.
One thread; CPU seconds are of an epoch and a validation (ours: all that the run spent, by its epochs); wall / CPU says
how quiet it was. While RecTools trained, the load average was {low:.1f} to {high:.1f}. Its process keeps memory that
it has freed (glibc's `MALLOC_MMAP_MAX_=0`): that took a third off its epoch, and takes 3 % off ours, measured without.

| contender | parameters | epochs | CPU s an epoch | wall / CPU | best validation NDCG@10 | epoch | HR@10 | NDCG@10 |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""
DIFFERENCES = """
Weights to weights: with RecTools' fresh weights our unit states differ from its own by at most {0:.0e} (histories of 3,
50 and 189 items, all positions; our denominator set to 200, our position table reversed for each length); with the time
of request withheld, by {1:.2f}. Trained weights cannot be carried over: its norms learn a scale and a shift, ours
neither, and the shift inside a gate fits no weight of ours. What else RecTools does otherwise and does not let one set:

* attention is divided by the positions read (200), ours by those and 11 more, as Meta published;
* positions are counted from the newest item, ours from the oldest one read;
* every matrix is drawn Xavier-normal, ours as published (items and projections N(0, 0.02), output Xavier-uniform);
* a negative that equals the target counts, ours is masked;
* left to itself it knows the items in the newest 201 training interactions of histories only; here it knows all."""


def tested(folder: Path, name: str, shape: list) -> dict | None:
    """Print a row of the table; return the users' test metrics where there are some."""
    from textrec.evaluation.metrics import per_user_metrics
    from textrec.evaluation.ranking import Ranks

    path = folder / "ranks.parquet"
    metrics = per_user_metrics(Ranks.load(path).filtered, ks=(10,)) if path.is_file() else None
    cells = [f"{metrics[each].mean():.4f}" if metrics else "" for each in ("recall@10", "ndcg@10")]
    print(f"| {' | '.join(map(str, [name, *shape, *cells]))} |")
    return metrics


def report(arguments, row: dict, peers: str) -> None:
    from textrec.evaluation.significance import bootstrap_interval
    from textrec.models.hstu import HSTU
    from textrec.study.claims import load_claims

    claims = load_claims()
    key, cost, recipe = row["key"], row["result"]["cost"], row["key"]["parameters"]
    result = json.loads((arguments.folder / "result.json").read_text())
    ours, theirs = list(csv.DictReader((arguments.row / "logs" / "metrics.csv").open())), result["curve"]
    installed, loads = versions_of(peers, ["rectools", "torch"]), [entry["load"] for entry in theirs]
    print(f"# HSTU, side by side\n\n{machine()}. RecTools {installed['rectools']}, torch {installed['torch']}.")
    told = {name: key[name] for name in ("fingerprint", "seed")} | {"low": min(loads), "high": max(loads)}
    print(REPORT.format(data=arguments.data, every=arguments.every, **recipe, **told))
    parameters = sum(each.numel() for each in HSTU.from_pretrained(arguments.row / "model").parameters())
    best = max(ours, key=lambda entry: float(entry["ndcg@10"]))
    spent = f"{cost['cpu_s'] / len(ours):.1f}", f"{cost['wall_s'] / cost['cpu_s']:.2f}"
    cells = [f"{parameters:,}", len(ours), *spent, f"{float(best['ndcg@10']):.4f}", int(best["step"]) + 1]
    mine = tested(arguments.row, "ours", cells)
    validated = [entry for entry in theirs if "ndcg@10" in entry]
    best = max(validated, key=lambda entry: entry["ndcg@10"])
    cpu, wall = (statistics.median(entry[name] for entry in theirs) for name in ("cpu", "wall"))
    validating = statistics.median(entry["validation_cpu"] for entry in validated)
    cells = [f"{result['parameters']:,}", len(theirs), f"{cpu + validating:.1f}", f"{wall / cpu:.2f}"]
    peer = tested(arguments.folder, "RecTools", [*cells, f"{best['ndcg@10']:.4f}", best["epoch"] + 1])
    published = [f"{claims[f'rectools-hstu/hstu/{metric}'].value:.4f}" for metric in ("recall@10", "ndcg@10")]
    print(f"| RecTools, as its tutorial gives it | | 100 | | | | | {' | '.join(published)} |")
    for metric, name in (("recall@10", "HR@10"), ("ndcg@10", "NDCG@10")) if peer else ():
        gaps = mine[metric] - peer[metric]
        low, high = bootstrap_interval(gaps[None])
        print(f"\n{name}, ours minus RecTools, user by user: {gaps.mean():+.4f} [{low:+.4f}, {high:+.4f}] (95 %).")
    print(DIFFERENCES.format(*result["differences"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("row", type=Path, help="folder of a finished run: rows/hstu")
    parser.add_argument("--data", default="ml-1m-w3", help="the prepared set of that run")
    parser.add_argument("--epochs", type=int, default=101)
    parser.add_argument("--every", type=int, default=2, help="epochs between two validations of RecTools' net")
    parser.add_argument("--users", type=int, help="a trial: train and validate on so many users only")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "side_by_side_hstu", help="RecTools' state")
    parser.add_argument("--test", action="store_true", help="rank the test targets with the best epoch's weights")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    row = json.loads((arguments.row / "row.json").read_text())
    if arguments.worker:
        from textrec.data.prepared import PreparedSet

        prepared = PreparedSet.load(ROOT / "data" / "processed" / arguments.data)
        if prepared.fingerprint != row["key"]["fingerprint"]:
            raise SystemExit(f"{arguments.row} was run on another set than {arguments.data}")
        arguments.folder.mkdir(parents=True, exist_ok=True)
        work(arguments, row["key"], prepared)
    elif peers := peers_interpreter():
        environment = os.environ | KEPT_MEMORY | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [peers, __file__, *sys.argv[1:], "--worker"]
        if subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode:
            raise SystemExit("RecTools' part ended early; the same command goes on")
        report(arguments, row, peers)


if __name__ == "__main__":
    main()
