"""Results -> figures, each as SVG and PNG; the same numbers give the same bytes.

One colour and marker per method everywhere, from the palette of Okabe and Ito (Color Universal Design, 2008).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from stages.lib.bound_tables import tenths
from stages.lib.comparing import ANCHOR, HEROES, LABEL_AWARE, UNCODED, band
from stages.lib.files import atomic
from stages.lib.params import SCALES

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
OLIVE = "#8A7A00"  # beside the palette; as far from white as from the dark paper of the page
WARNING = "#B00000"
SHADES = ("#CFCFCF", "#8A8A8A", "#2B2B2B")  # of what is small, medium, large
METHODS = {  # method -> colour, marker; others are grey
    ANCHOR: (BLACK, "o"),
    "static": (ORANGE, "s"),
    "upstream_predicted": (SKY, "^"),
    "mfiba": (VERMILION, "D"),
    "static_skip": (ORANGE, "P"),
    "mfiba_skip": (BLUE, "P"),
    "mfiba_pseudo": (OLIVE, "^"),
    "mfiba_pseudo_skip": (OLIVE, "P"),
    "upstream_measured": (PURPLE, "v"),
    "oracle": (GREEN, "X"),
    "oracle_skip": (GREEN, "P"),
}
OTHER_METHOD = (GREY, "*")
WITH_BAND = (ANCHOR, *HEROES)
LOOK = {
    "svg.hashsalt": "mfiba",  # ids in the SVG are hashes, salted at random by default
    "font.size": 10,
    "axes.titlesize": 10.5,
    "figure.titlesize": 12,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "savefig.dpi": 160,
}
# Without these matplotlib writes the date and its own version.
FORMATS = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


@contextmanager
def saved(stem: Path, width: float, height: float, layout: str = "constrained") -> Iterator[Figure]:
    """An empty figure of so many inches, written to <stem>.svg and <stem>.png when the block ends."""
    with style.context(["default", LOOK]):
        figure = Figure((width, height), layout=layout)  # type: ignore[arg-type]  # its types lack "none"
        yield figure
        for suffix, metadata in FORMATS.items():
            with atomic(Path(f"{stem}.{suffix}")) as scratch:
                figure.savefig(scratch, metadata=metadata)
            figure.set_layout_engine("none")  # laid out once, not for each format


def rd_figure(stem: Path, points: pd.DataFrame, resamples: pd.DataFrame, authors: pd.DataFrame | None = None) -> None:
    """points.csv and bootstrap.csv of one cell -> accuracy over bits per image of every method.

    authors: bits_per_image and accuracy of the points that the paper's authors publish.
    """
    uncoded = points[points["method"] == UNCODED].iloc[0]
    with saved(stem, 7.4, 4.4) as figure:
        axes = figure.add_subplot()
        axes.axhline(uncoded["accuracy"], color=GREY, linestyle="--", label="uncoded features")
        for method, rows in points[points["method"] != UNCODED].groupby("method", sort=False):
            rows = rows.sort_values("bits_per_image", kind="stable")
            colour, marker = METHODS.get(method, OTHER_METHOD)
            aware = method in LABEL_AWARE
            axes.plot(
                rows["bits_per_image"],
                rows["accuracy"],
                color=colour,
                marker=marker,
                markerfacecolor="white" if aware else colour,
                linestyle=":" if aware else "-",
                label=f"{method} *" if aware else method,
                zorder=2 if aware else 3,
            )
            if method in WITH_BAND:
                ends = band(resamples, rows)
                axes.fill_between(rows["bits_per_image"], *ends, color=colour, alpha=0.13, linewidth=0, zorder=1)
        if authors is not None:
            x, y = authors["bits_per_image"], authors["accuracy"]
            axes.plot(x, y, color=BLACK, marker="x", linestyle="", label="the authors' own *", zorder=4)
        plain_log_x(axes)
        axes.set_xlabel("bits per image")
        axes.set_ylabel(f"{uncoded['accuracy_name']} on {uncoded['split']}")
        task, codec = uncoded["task"].capitalize(), uncoded["codec"].upper()
        axes.set_title(f"{task}, {codec}: accuracy over rate, {uncoded['n_images']} images", fontsize=12)
        if not uncoded["accuracy"] > 0:
            warning = "The model finds nothing, even with uncoded features."
            axes.text(0.5, 0.8, warning, color=WARNING, ha="center", transform=axes.transAxes)
        figure.legend(loc="outside right upper")
        figure.text(
            0.995, 0.02, "shaded: 95 % interval\n* uses the labels of\nthe evaluated images", fontsize=9, ha="right"
        )


def codec_figure(stem: Path, model: str, codec: str, curves: dict[str, pd.DataFrame], loss: pd.DataFrame) -> None:
    """`rate_distortion` of a codec and of HEVC, and loss.csv -> PSNR over bits for each scale; training loss."""
    with saved(stem, 8.6, 5.2) as figure:
        panels, last = scale_panels(figure)
        for scale, axes in panels.items():
            for name, curve in curves.items():
                colour, marker = (BLUE, "o") if name == codec else (ORANGE, "s")
                rows = curve[curve["scale"] == scale].sort_values("bits", kind="stable")
                axes.plot(rows["bits"], rows["psnr"], color=colour, marker=marker, label=name.upper())
            plain_log_x(axes)
            axes.set_title(f"scale {scale}")
        figure.supxlabel("bits of the scale", fontsize=10)
        figure.supylabel("PSNR of the features for a peak of 1, dB", fontsize=10)
        figure.suptitle(f"Codec {codec.upper()} on the features of {model}, split fit")
        legend = {"handles": panels[SCALES[0]].get_lines(), "fontsize": 10}
        if len(loss):
            last.plot(loss["step"], loss["loss"], color=BLUE)
            last.set_title("training loss over steps")
            panels[SCALES[0]].legend(**legend)
        else:
            last.axis("off")
            last.legend(loc="center", **legend)


def loss_rate_figure(stem: Path, task: str, codec: str, fit: dict, pixels: dict[str, float]) -> None:
    """`fit_scales` and the mean plane pixels of each scale -> mean drop over rate with the fitted power law."""
    with saved(stem, 8.6, 5.2) as figure:
        panels, last = scale_panels(figure)
        for scale, axes in panels.items():
            mean, power, weight = fit["mean"][scale], fit["power"][scale], fit["label"][scale]["mean"]
            rate = np.array(mean["bits"]) / pixels[scale]
            fine = np.geomspace(rate.min(), rate.max(), 100)
            axes.axhline(0, color=GREY, linewidth=0.8)
            measured = axes.plot(rate, mean["drop"], color=BLACK, marker="o", linestyle="", label="mean of the images")
            law = weight * power["alpha"] * fine ** power["beta"]
            fitted = axes.plot(fine, law, color=VERMILION, label=r"fit $\bar{w}_s\,\alpha_s R_s^{\beta_s}$")
            plain_log_x(axes)
            r2 = "n/a" if power["r2"] is None else f"{power['r2']:.2f}"
            axes.set_title(f"scale {scale}, held-out $r^2$ = {r2}")
            if power["flags"]:
                flags = "\n".join(power["flags"])
                axes.text(0.97, 0.95, flags, color=WARNING, ha="right", va="top", transform=axes.transAxes)
        last.axis("off")
        last.legend(handles=[*measured, *fitted], loc="center", fontsize=10)
        figure.supxlabel("bits per plane pixel", fontsize=10)
        figure.supylabel("drop of the image's AP", fontsize=10)
        figure.suptitle(
            f"{task.capitalize()}, {codec.upper()}: loss-rate model, {fit['n_labelled']} images of split fit, "
            "one scale coded"
        )


def importance_figure(stem: Path, task: str, codec: str, fit: dict, weights: pd.DataFrame) -> None:
    """`fit_scales` and MFIP's predicted weights -> importance of each scale: labels on fit, predictions on test."""
    of_test = weights[weights["split"] == "test"].groupby("scale")["weight"]
    predicted = pd.DataFrame({"mean": of_test.mean(), "std": of_test.std(ddof=0)}).reindex(SCALES)
    labels = pd.DataFrame(fit["label"]).T.reindex(SCALES)
    place = np.arange(len(SCALES))
    with saved(stem, 6.4, 4.4) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="x", visible=False)
        for shift, colour, name, table in [
            (-0.2, BLUE, f"label, {fit['n_labelled']} images of fit", labels),
            (
                0.2,
                ORANGE,
                f"predicted, {weights.loc[weights['split'] == 'test', 'image_id'].nunique()} images of test",
                predicted,
            ),
        ]:
            axes.bar(place + shift, table["mean"], 0.38, yerr=table["std"], capsize=3, color=colour, label=name)
        axes.axhline(1 / len(SCALES), color=GREY, linestyle="--", label="all scales equal")
        axes.set_xticks(place, SCALES)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("scale")
        axes.set_ylabel("importance $w_s$, mean ± standard deviation")
        figure.legend(loc="outside lower center", ncols=3)
        figure.suptitle(f"{task.capitalize()}, {codec.upper()}: importance of the scales")


def additivity_figure(stem: Path, task: str, codec: str, parts: dict[str, pd.DataFrame]) -> None:
    """Parts of additivity.csv -> a panel each: joint over additive loss of the tuples, and the mean of each tenth."""
    with saved(stem, 9.6, 3.4) as figure:
        panels = figure.subplots(1, len(parts), sharex=True, sharey=True)
        for axes, (name, tuples) in zip(panels, parts.items(), strict=True):
            look = {"bins": "log", "mincnt": 1, "vmin": 0.3, "cmap": "Greys", "linewidths": 0}  # one tuple is not white
            axes.hexbin(tuples["additive"], tuples["joint"], gridsize=24, **look)
            axes.axline((0, 0), slope=1, color=GREY, linestyle="--", linewidth=1, label="joint = additive")
            mean = tenths(tuples)
            axes.plot(mean["additive"], mean["joint"], color=VERMILION, marker="o", label="mean of each tenth")
            axes.set_title(name)
        panels[0].legend(loc="upper left")
        figure.supxlabel("sum of the losses of single scales, objects", fontsize=10)
        figure.supylabel("joint loss, objects", fontsize=10)
        figure.suptitle(f"{task.capitalize()}, {codec.upper()}: do the losses of the scales add up?")


def size_figure(stem: Path, study: str, sizes: pd.DataFrame) -> None:
    """sizes.csv of one study -> BD-rates and worth of the scales in images of small, medium and large objects."""
    groups, quantities = list(sizes["size"].unique()), dict(list(sizes.groupby("quantity")))
    with saved(stem, 10.4, 3.8) as figure:
        saving, *scales = figure.subplots(1, 3)
        values, low, high = (
            quantities["bd_rate"].pivot(index="size", columns="name", values=name).loc[groups]
            for name in ("value", "ci_low", "ci_high")
        )
        methods = {method: METHODS.get(method, OTHER_METHOD)[0] for method in quantities["bd_rate"]["name"].unique()}
        grouped_bars(saving, values, methods, {m: (values[m] - low[m], high[m] - values[m]) for m in methods})
        saving.axhline(0, color=GREY, linewidth=0.8)
        saving.set_title(f"BD-rate against {ANCHOR}, %")
        figure.legend(*saving.get_legend_handles_labels(), loc="outside lower left", ncols=len(methods))
        shades = dict(zip(groups, SHADES, strict=False))
        titles = {"weight": "measured importance $w_s$", "sensitivity": "predicted sensitivity $k_s$"}
        for axes, (quantity, title) in zip(scales, titles.items(), strict=True):
            by_scale = quantities[quantity].pivot(index="name", columns="size", values="value")
            grouped_bars(axes, by_scale.loc[list(SCALES)], shades)
            axes.set_xlabel("scale")
            axes.set_title(title)
        saving.set_xlabel("objects")
        scales[0].legend(title="objects", fontsize=8)
        figure.suptitle(f"{study}: images of test by the size of their objects")


def grouped_bars(
    axes: Axes,
    table: pd.DataFrame,
    colours: dict[str, str],
    errors: dict[str, tuple[pd.Series, pd.Series]] | None = None,
) -> None:
    """A group of bars for each row, one for each column that has a colour; errors: those below and above its bars.

    Hatched: methods that may skip, as some have the colour of the same without.
    """
    width = 0.8 / len(colours)
    place = np.arange(len(table)) - 0.4 + width / 2
    for number, (name, colour) in enumerate(colours.items()):
        error = None if errors is None else errors[name]
        line = {"elinewidth": 0.8, "ecolor": GREY}
        bars = axes.bar(place + number * width, table[name], width, yerr=error, color=colour, label=name, error_kw=line)
        if name.endswith("_skip"):
            for bar in bars:
                bar.set(hatch="///", edgecolor="white", linewidth=0)
    axes.set_xticks(np.arange(len(table)), table.index)
    axes.grid(axis="x", visible=False)


def scale_panels(figure: Figure) -> tuple[dict[str, Axes], Axes]:
    """2 x 3 panels: one for each scale, and the last."""
    *panels, last = figure.subplots(2, 3).flat
    return dict(zip(SCALES, panels, strict=True)), last


# Per decade, from coarse to fine.
TICKS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9))
MOST_TICKS = 6


def plain_log_x(axes: Axes) -> None:
    """A logarithmic x axis with the finest ticks that have room, in plain numbers: 5k, 10k. Call it after plotting."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)))
    choices = [np.outer(decades, steps).ravel() for steps in TICKS]
    choices = [ticks[(ticks >= low) & (ticks <= high)] for ticks in choices]
    axes.set_xticks(max((ticks for ticks in choices if len(ticks) <= MOST_TICKS), key=len, default=choices[0]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def plain(value: float) -> str:
    """1500 -> 1.5k, 2e6 -> 2M, 0.05 -> 0.05"""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def method_figure(stem: Path) -> None:
    """The method as boxes and arrows: what is sent, and how the sender chooses phi of each scale."""
    with saved(stem, 9.6, 4.2, layout="none") as figure:
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 96), ylim=(0, 42))  # the unit is 0.1 inch
        axes.axis("off")
        for x, width, name in ((0.8, 67.4, "sender"), (76.8, 18.4, "receiver")):
            _box(axes, x, 0.8, width, 40.4, "#F3F6F9", "#C9D2DA")
            axes.text(x + 1.2, 40, name, color="#5B6873", fontsize=12, fontweight="bold", va="top")

        _image(axes, 3, 28.5, 8)
        axes.text(7, 27.6, "image", ha="center", va="top")
        _box(axes, 14.8, 29, 10.4, 7, text="backbone")
        _pyramid(axes, 29, 29, 1, [0.7] * len(SCALES))
        axes.text(43.5, 36.2, "feature pyramid", ha="center", va="top")
        _box(axes, 53, 27.5, 13, 10, "#D9EFE7", GREEN, "codec, each\nscale at its own\n$\\varphi_s$, or not sent", 9)
        _arrow(axes, (11.4, 32.5), (14.3, 32.5))
        _arrow(axes, (25.7, 32.5), (28.7, 32.5))
        _arrow(axes, (50.1, 32.5), (52.5, 32.5))
        _arrow(axes, (66.5, 32.5), (78.9, 32.5), linewidth=3)
        axes.text(72.5, 33.6, "bitstream", ha="center")

        _box(axes, 79.5, 28.5, 13, 8, "#D9EFE7", GREEN, "decode, predict\nwhat is not sent", 9)
        _pyramid(axes, 77.6, 18.6, 0.82, [0.3, 0.9, 0.7, 0.5, 0])
        axes.text(86, 14.9, "darker: higher $\\varphi_s$;\ndashed: predicted", ha="center", va="center", fontsize=8)
        _box(axes, 79.5, 3, 13, 8.5, text="task heads:\nboxes, masks,\nkeypoints")
        _arrow(axes, (86, 28), (86, 24.5))
        _arrow(axes, (86, 13.3), (86, 12))

        axes.plot([40.25, 40.25, 8.7], [28.6, 24, 24], color=BLACK, linewidth=1.4, solid_joinstyle="miter")
        _arrow(axes, (8.7, 24.08), (8.7, 11.4))
        _arrow(axes, (24.4, 24.08), (24.4, 20.4))
        _box(axes, 3, 4.8, 11.4, 6, "#D9EFE7", GREEN, "precode at\none quality", 9)
        _box(axes, 17.6, 4.8, 13.6, 6, "#FBE6D8", VERMILION, "rate model", 9)
        _box(axes, 17.6, 13.8, 13.6, 6, "#FBE6D8", VERMILION, "MFIP")
        _box(axes, 39, 4.8, 21, 15, "#FBE6D8", VERMILION)
        axes.text(49.5, 17.2, "bit allocation", ha="center", va="center")
        axes.text(49.5, 13.2, r"$\min_\varphi\ \sum_s k_s\,\ell_s(\varphi_s)$", ha="center", va="center")
        axes.text(49.5, 8.4, r"$+\ \lambda'\,\sum_s b_s(\varphi_s)$", ha="center", va="center")
        _arrow(axes, (14.9, 7.8), (17.1, 7.8))
        _arrow(axes, (31.7, 7.8), (38.5, 7.8))
        axes.text(35.1, 8.7, r"bits $b_s(\varphi)$", ha="center", fontsize=9)
        _arrow(axes, (31.7, 16.8), (38.5, 16.8))
        axes.text(35.1, 13.6, "sensitivity\n$k_s$", ha="center", va="center", fontsize=9)
        for x, height in zip(np.arange(5) + 32.7, (1.2, 3.2, 2.2, 1.6, 0.7), strict=True):
            axes.add_patch(Rectangle((x, 17.6), 0.8, height, color=VERMILION))
        axes.text(46.4, 23.2, r"price of a bit $\lambda'$", ha="center", va="center")
        _arrow(axes, (46.4, 22.2), (46.4, 20.4))
        _arrow(axes, (57.4, 20.4), (57.4, 27))
        axes.text(58.2, 23.6, r"$\varphi_s$", va="center", fontsize=12)
        once = r"measured once, on split fit: mean loss $\ell_s(\varphi)$ of each scale and quality, rate model, MFIP"
        _box(axes, 3, 1.6, 57, 2.2, "white", GREY, once, 9)


def _box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str = "#DCEBF7",
    edge: str = BLUE,
    text: str = "",
    size: float = 10,
) -> None:
    corners = "round,pad=0,rounding_size=0.8"
    axes.add_patch(FancyBboxPatch((x, y), width, height, corners, facecolor=fill, edgecolor=edge, linewidth=1.3))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, linespacing=1.35)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], linewidth: float = 1.4, color: str = BLACK
) -> None:
    look: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 9 + 2 * linewidth, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=color, linewidth=linewidth, **look))


def _pyramid(axes: Axes, x: float, y: float, size: float, shades: list[float]) -> None:
    """Five squares from scale 0 to pool, darker where the quality is higher, dashed where nothing is sent."""
    for scale, side, shade in zip(SCALES, (6, 4.6, 3.6, 2.9, 2.3), shades, strict=True):
        side *= size
        line = "-" if shade else "--"
        axes.add_patch(Rectangle((x, y), side, side, facecolor="white", edgecolor=BLUE, linewidth=1.2, linestyle=line))
        axes.add_patch(Rectangle((x, y), side, side, facecolor=BLUE, alpha=shade, linewidth=0))
        axes.text(x + side / 2, y - 0.5, scale, ha="center", va="top", fontsize=9)
        x += side + 0.3 * size


def _image(axes: Axes, x: float, y: float, side: float) -> None:
    """A photograph: a sky, a sun, two hills."""
    axes.add_patch(Rectangle((x, y), side, side, facecolor="#D6ECFA", edgecolor=BLACK, linewidth=1.2))
    axes.plot(x + 0.72 * side, y + 0.74 * side, marker="o", markersize=9, color=ORANGE)
    for peak, height, half in ((0.35, 0.6, 0.33), (0.68, 0.4, 0.3)):
        corners = [(peak - half, 0.01), (peak, height), (peak + half, 0.01)]
        axes.add_patch(Polygon([(x + a * side, y + b * side) for a, b in corners], facecolor=GREEN, edgecolor="white"))
