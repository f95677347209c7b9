"""Given item tables: how their vectors lie, what they change and for whom, and heat maps of layers or items."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from textrec.data.prepared import PreparedSet
from textrec.study.figures import GREY, WIDTH, house_style
from textrec.study.finetuning_figures import FREQUENCIES, plot_lines
from textrec.study.records import Record, slices
from textrec.study.tables import ablation_table, paired_difference
from textrec.training.table_rows import BASES, TABLE_ROWS

LENGTHS = ("short_histories", "long_histories")
FEWEST = 1e-6  # of a logarithmic colour scale, relative to the largest number


def spread_table(vectors: Mapping[str, Tensor]):
    """Return a frame of item tables: width, mean cosine of two items, directions (the participation ratio of variance).

    Rows are taken to be of unit norm; `directions` is how many orthogonal ones would spread the variance as evenly.
    """
    import pandas

    told = {}
    for source, table in vectors.items():
        rows = table[1:].double()
        products_EE = (rows - rows.mean(0)).T @ (rows - rows.mean(0))
        directions = products_EE.trace().square() / products_EE.square().sum()  # eigenvalues: (sum)^2 / sum of squares
        cosine = rows.mean(0).square().sum()
        told[source] = {"width": rows.shape[1], "mean cosine": float(cosine), "directions": float(directions)}
    return pandas.DataFrame(told).T


def paired_tables(record: Record, ranks: Mapping[str, Sequence]):
    """Return an ablation table in which a row of `TABLE_ROWS` differs from its base's random one; others come last."""
    import pandas

    frames = []
    for base in (base for base in BASES if f"{base}_random" in ranks):
        frame = ablation_table([record], reference=f"{base}_random", ranks=ranks)
        frames.append(frame[[row in TABLE_ROWS and TABLE_ROWS[row].base == base for row in frame["row"]]])
    return pandas.concat([*frames, ablation_table([record], ranks=ranks)]).drop_duplicates("row", ignore_index=True)


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


def plot_matrices(panels: Sequence[Mapping], *, xlabel: str, ylabel: str, log: bool = False):
    """Draw matrices {title, rows} side by side on one colour scale, row and column 0 first; `log` suits attention."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm, Normalize

    with house_style():
        figure, ((*several,),) = plt.subplots(1, len(panels), figsize=(WIDTH, 0.9 + WIDTH / len(panels)), squeeze=False)
        top = max((value for panel in panels for row in panel["rows"] for value in row), default=1.0)
        seen = [value for panel in panels for row in panel["rows"] for value in row if value > FEWEST * top]
        norm = LogNorm(min(seen, default=FEWEST), top) if log else Normalize(0, top)
        for axes, panel in zip(several, panels, strict=True):
            image = axes.imshow(panel["rows"], norm=norm, cmap="viridis", interpolation="nearest")
            axes.set_title(panel["title"], fontsize=9)
            axes.set(xlabel=xlabel, ylabel=ylabel if axes is several[0] else None)
            axes.grid(visible=False)
            for axis in (axes.xaxis, axes.yaxis):
                axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=several, shrink=0.8)
    return figure
