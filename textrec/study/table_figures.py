"""Given item tables: how their vectors lie, what they change, cost and for whom, and heat maps of layers or items."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
from torch import Tensor

from textrec.data.prepared import PreparedSet
from textrec.data.splitting import training_counts
from textrec.evaluation.ranking import Ranks
from textrec.study import redundancy
from textrec.study.claims import PLUMBING
from textrec.study.figures import GREY, WIDTH, house_style
from textrec.study.finetuning_figures import FREQUENCIES, plot_lines
from textrec.study.records import RARE, SAMPLED, Record, Run, slices
from textrec.study.tables import RULES, ablation_table, paired_difference, ranks_at_hand
from textrec.study.text_figures import expectation_table
from textrec.training.table_rows import BASES, TABLE_ROWS

LENGTHS = ("short_histories", "long_histories")
CONTROLS = {"permuted", "same_covariance"}  # transforms after which vectors say nothing of their items
SEEN_RARELY = "_rare_targets"  # ends the name of a row that is ranked on targets seen at most RARE times
FEWEST = 1e-6  # of a logarithmic colour scale, relative to the largest number


def spread_table(vectors: Mapping[str, Tensor]):
    """Return a frame of item tables: width, mean cosine of two items, directions (the participation ratio of variance).

    Rows are taken to be of unit norm; `directions` is how many orthogonal ones would spread the variance as evenly.
    """
    told = {}
    for source, table in vectors.items():
        rows = table[1:].double()
        products_EE = (rows - rows.mean(0)).T @ (rows - rows.mean(0))
        directions = products_EE.trace().square() / products_EE.square().sum()  # eigenvalues: (sum)^2 / sum of squares
        cosine = rows.mean(0).square().sum()
        told[source] = {"width": rows.shape[1], "mean cosine": float(cosine), "directions": float(directions)}
    return pandas.DataFrame(told).T


def _pair_of(row: str) -> str | None:
    """Return the row of a random table that a row of `TABLE_ROWS` is paired with, on the same targets."""
    name = row.removesuffix(SEEN_RARELY)
    if name not in TABLE_ROWS or TABLE_ROWS[name].faithful:  # no random row has the published code's habits
        return None
    kind = "narrow" if "embedding_dim" in TABLE_ROWS[name].settings else "random"
    return f"{TABLE_ROWS[name].base}_{kind}{row[len(name) :]}"


def paired_tables(group: Sequence[Record], metric: str = "ndcg@10", *, ranks: Mapping[str, Sequence] | None = None):
    """Return an ablation table in which a row of `TABLE_ROWS` differs from its base's random one; others come last."""
    ranks, frames = ranks_at_hand(group) if ranks is None else ranks, []
    rows = {row["row"] for record in group for row in record.rows}
    for reference in (f"{base}_{of}{on}" for base in BASES for of in ("random", "narrow") for on in ("", SEEN_RARELY)):
        if reference in rows:
            own = {row: given for row, given in ranks.items() if _pair_of(row) == reference}
            frame = ablation_table(group, metric, reference=reference, ranks=own)
            frames.append(frame[[_pair_of(row) == reference for row in frame["row"]]])
    rest = {row: given for row, given in ranks.items() if not row.endswith(SEEN_RARELY)}
    last = ablation_table(group, metric, ranks=rest)
    last.loc[last["row"].str.endswith(SEEN_RARELY), "difference"] = np.nan  # their pair is of other targets
    frames.append(last)
    return pandas.concat(frames).drop_duplicates("row", ignore_index=True)


def rarely_seen(prepared: PreparedSet) -> Callable[[Ranks], Ranks]:
    """Return what keeps of ranks the users whose target training saw at most `RARE` times, or never."""
    seen_I = training_counts(prepared.histories, prepared.split)
    return lambda ranks: ranks.subset(seen_I[ranks.targets_U] <= RARE)


def rare_results(results: Sequence, prepared: PreparedSet) -> list:
    """Return rows of `TABLE_ROWS` once more, on rarely seen targets alone."""
    few, told = rarely_seen(prepared), {"changed": f"targets seen at most {RARE} times alone", "cost": {}, "curve": []}
    ranked = [each for each in results if each.row in TABLE_ROWS and each.ranks is not None]
    rare = [replace(each, row=each.row + SEEN_RARELY, ranks=few(each.ranks), **told) for each in ranked]
    return [each for each in rare if len(each.ranks.users_U)]


def gate_table(run: Run, pairs: Sequence[Sequence[str]], ranks: Mapping[str, Sequence], metric: str = "ndcg@10"):
    """Return an `expectation_table` of pairs under every rule for the candidates that there are enough items for."""
    fewest = min((each.filtered.candidates_U.min() for seeds in ranks.values() for each in seeds), default=0)
    frames = {}
    for rule in RULES if fewest > SAMPLED else RULES[:2]:
        found = {" over ".join(pair): paired_difference(*map(ranks.get, pair), metric, rule)[:3] for pair in pairs}
        frames[rule] = expectation_table(run, found)
    return pandas.concat(frames, names=["rule", None]).droplevel(1).reset_index()


def control_table(run: Run, ranks: Mapping[str, Sequence], metric: str = "ndcg@10", margin: float = 0.005):
    """Return a frame of what controls reach beyond the random row of their model.

    They are `equal` where the whole interval lies within the margin, else `above` or `below` where it excludes zero.
    """
    rows = [row for row in ranks if row in TABLE_ROWS and CONTROLS & {*TABLE_ROWS[row].transforms}]
    rows = [row for row in rows if _pair_of(row) in ranks]
    found = [paired_difference(ranks[row], ranks[_pair_of(row)], metric)[:3] for row in rows]
    words = ["equal" if max(-low, high) <= margin else "above" if low > 0 else "below" if high < 0 else "undecided"
             for _, low, high in found]  # fmt: skip
    frame = pandas.DataFrame(found, index=rows, columns=["beyond random", "low", "high"])
    return frame.assign(margin=margin, verdict=PLUMBING if run.scale == "smoke" else words)


def rule_table(record: Record, metric: str = "ndcg@10"):
    """Return a frame of rows by rule for the candidates: the metric, and the place among the rows."""
    rows = [row for row in record.rows if row["metrics"] and not row["row"].endswith(SEEN_RARELY)]
    told = {row["row"]: row["slices"] | {RULES[0]: row["metrics"]} for row in rows}
    found = {row: {rule: of[rule][metric]["value"] for rule in RULES if rule in of} for row, of in told.items()}
    frame = pandas.DataFrame(found).T
    return frame.join(frame.rank(ascending=False).add_suffix(", place"))


def efficiency_table(results: Sequence, folder: Path, prepared: PreparedSet, num_users: int = 1000, rounds: int = 5):
    """Return a frame of the rows of `TABLE_ROWS`: sizes, times, the best validation, and whether it was only sooner.

    Rows take turns in ranking `num_users` users on the CPU, after an uncounted round; `beside random` is the median
    ratio to the row of a random table in the same round. A row whose weights are not here has neither sizes nor times.
    """
    from textrec.models.sequence_model import SequenceModel
    from textrec.training.trainer import evaluate

    rows = {each.row: each for each in results if each.row in TABLE_ROWS and each.ranks is not None}
    models = {row: SequenceModel.from_pretrained(at) for row in rows if (at := folder / f"rows/{row}/model").is_dir()}
    users, spent, lines = prepared.split.targets("test")[0][:num_users], {row: [] for row in models}, {}
    for _ in range(1 + rounds):
        for row, model in models.items():
            started = time.process_time()
            evaluate(model, prepared, "test", users)
            spent[row].append(time.process_time() - started)
    curves = {row: [(entry["ndcg@10"], entry["epoch"] + 1) for entry in each.curve if "ndcg@10" in entry]
              for row, each in rows.items()}  # fmt: skip
    for row, result in rows.items():
        sizes = [(each.numel(), each.requires_grad) for each in models[row].parameters()] if row in models else []
        own, pair = (np.array(spent.get(name, [np.nan] * (1 + rounds))[1:]) for name in (row, _pair_of(row)))
        (best, epochs), (level, _) = (max(curves.get(name, [(np.nan, 0)]), key=lambda point: (point[0], -point[1]))
                                      for name in (row, _pair_of(row)))  # fmt: skip
        lines[row] = {
            "parameters": sum(n for n, _ in sizes) or np.nan, "trained": sum(n for n, on in sizes if on) or np.nan,
            "seconds an epoch": np.mean([entry["seconds"] for entry in result.curve]),
            f"CPU s for {len(users):,} users": np.median(own), "beside random": np.median(own / pair),
            "best validation": best, "after epochs": epochs,
            "random's best after": next((epoch for value, epoch in curves[row] if value >= level), np.nan),
        }  # fmt: skip
    return pandas.DataFrame.from_dict(lines, orient="index")


def gain_data(
    results: Sequence, pairs: Sequence[tuple[str, str]], prepared: PreparedSet, names: Sequence[str] = FREQUENCIES,
    metric: str = "ndcg@10",
) -> list[dict]:  # fmt: skip
    """Return lines {row, x, value, low, high}: what a row gains over the random one of its pair, by slices of users.

    Pairs whose second row does not start at random are left out. The difference is paired over the same users, with its
    95 % interval; a slice that has no user has no point.
    """
    known, lines = {result.row: result.ranks for result in results if result.ranks is not None}, []
    for first, second in (pair for pair in pairs if known.keys() >= {*pair} and pair[1].endswith("_random")):
        masks = slices(known[first], prepared)
        for name, mask_U in ((name, masks[name]) for name in names if name in masks):
            both = ([known[row].subset(mask_U)] for row in (first, second))
            numbers = dict(zip(("value", "low", "high"), paired_difference(*both, metric)[:3], strict=True))
            lines.append({"row": first, "x": f"{name.partition('_')[0]}\n{mask_U.sum():,} targets"} | numbers)
    return lines


def plot_gains(panels: Sequence[tuple[str, str, Sequence[Mapping]]]):
    """Draw panels (x label, y label, lines) as `plot_lines` does, with losses below a line at zero."""
    figure = plot_lines(panels)
    for axes in figure.axes:
        axes.set_ylim(None, None, auto=True)
        axes.autoscale(axis="y")
        axes.axhline(0, color=GREY, linewidth=0.9, zorder=0)
    return figure


def attention_figures(encoders: Mapping, packed: Sequence[Tensor]) -> dict[str, tuple]:
    """Return {name: (figure, data)}: attention by layer and head, between items, and which layers are like the first's.

    Maps are of the first and the last layer; layers are compared with those of the first encoder.
    """
    profiles = {name: redundancy.attention_profile(each, packed) for name, each in encoders.items()}
    panels, first = redundancy.attention_panels(profiles), next(iter(encoders))
    maps = [{"title": f"{name}, {place} layer", "rows": told["map"][layer]}
            for place, layer in (("first", 0), ("last", -1)) for name, told in profiles.items()]  # fmt: skip
    aligned = [{"title": f"{name} (across)", "rows": redundancy.alignment(encoders[first], each, packed)}
               for name, each in encoders.items()]  # fmt: skip
    data = {"panels": panels, "heads": {name: told["heads"] for name, told in profiles.items()}}
    drawn = plot_matrices(maps, xlabel="to item", ylabel="from item", log=True, columns=len(encoders))
    alike = plot_matrices(aligned, xlabel="layer", ylabel=f"layer of {first}")
    return {"attention": (plot_lines(panels), data), "items": (drawn, maps), "alignment": (alike, aligned)}


def plot_matrices(panels: Sequence[Mapping], *, xlabel: str, ylabel: str, log: bool = False, columns: int = 0):
    """Draw matrices {title, rows}, all or `columns` of them side by side, on one (logarithmic) scale of colours."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm, Normalize

    with house_style():
        columns = columns or len(panels)
        shape = -(-len(panels) // columns), columns
        figure, grid = plt.subplots(*shape, figsize=(WIDTH, 0.9 + shape[0] * WIDTH / columns), squeeze=False)
        top = max((value for panel in panels for row in panel["rows"] for value in row), default=1.0)
        seen = [value for panel in panels for row in panel["rows"] for value in row if value > FEWEST * top]
        norm = LogNorm(min(seen, default=FEWEST), top) if log else Normalize(0, top)
        for axes, panel in zip(grid.flat, panels, strict=True):
            image = axes.imshow(panel["rows"], norm=norm, cmap="viridis", interpolation="nearest")
            axes.set_title(panel["title"], fontsize=9)
            axes.set(xlabel=xlabel, ylabel=ylabel if axes in grid[:, 0] else None)
            axes.grid(visible=False)
            for axis in (axes.xaxis, axes.yaxis):
                axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=grid, shrink=0.8)
    return figure
