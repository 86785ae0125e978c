"""What `bound` found in each cell -> the tables of the bound, of the enumeration and of additivity."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from stages.lib.comparing import Compared, compare, paired
from stages.lib.results import Study
from stages.lib.tables import Table, bracketed, comparison, label_aware_note

LOSSES = ["joint", "mirrored", "additive"]
# Of a bound: the methods without labels that choose among the same qualities.
PEERS = dict.fromkeys(("oracle", "oracle_joint", "oracle_mirrored"), ("mfiba", "mfiba_pseudo"))
PEERS |= dict.fromkeys(("oracle_skip", "oracle_skip_joint"), ("mfiba_skip", "mfiba_pseudo_skip"))
BOUND_NOTE = (
    "oracle and oracle_skip take the loss for the sum of single-scale losses; oracle_joint and oracle_skip_joint "
    "descend from them on the joint loss, scale by scale, at the same prices; oracle_mirrored is oracle with the "
    "losses of planes coded upside down, scored on the files."
)
MIRRORED_NOTE = (
    "Every feature map coded upside down and turned back, those of uniform too; the bits are those of the files. A "
    "learned codec has seen no such maps and errs more on them, so compare within this table, where oracle_mirrored is "
    "the one that chose on what it is scored with."
)
LEAD_NOTE = (
    "A bound chooses on the very coding errors that the files have. No predictor knows them that does not decode; a "
    "sender that decodes its codings does (mfiba_pseudo). Coded upside down the images, objects and "
    "qualities are the same, the errors others: a lead that is left there is of the image. Not all of what goes is of "
    "the errors: one other draw is a noisy guide to their mean, and where a codec errs more on turned maps, the mean "
    "losses of the scales differ too. So what a predictor that does not decode can gain lies between the columns."
)
ADDITIVITY_NOTES = [
    "Random tuples of qualities on all images with ground truth; losses are in objects of an image, means over the "
    "tuples. joint = slope * additive + constant, r2 of that line; in image: of both less their means over the image's "
    "tuples, which is all that an allocation compares; of mirrored: the same r2 of the loss of the same tuple with "
    "other coding errors, those of planes coded upside down, instead of the sum; interaction: var(joint - additive) / "
    "var(joint).",
    "Every allocation here, the paper's closed form as much as mfiba and the oracles, minimises a sum over scales. It "
    "needs less than equality: a slope is a factor on lambda', and a constant changes no choice; what counts is the "
    "order of an image's tuples. Where joint is above additive, losses of several scales reinforce each other; where "
    "the slope is below 1, large ones add up to less, since an object can be lost once only. r2 in image is what the "
    "sum explains to those who have measured every scale with these very coding errors, of mirrored what the image and "
    "the qualities determine at all: as long as the first is not below the second, a predictor loses more to chance "
    "than to the scales' interaction.",
]


class Additivity(NamedTuple):
    """How well joint losses are sums of single-scale ones, over some tuples of some images."""

    tuples: int
    bits: float  # mean
    joint: float  # mean losses, in objects
    additive: float
    slope: float  # of the least-squares line joint ~ slope * additive + constant
    r2: float  # of that line
    r2_within: float  # the same, both less their mean over the tuples of the image: what an allocation sees
    r2_mirrored: float  # r2_within of the loss of the same tuples with other coding errors
    spearman: float
    interaction: float  # var(joint - additive) / var(joint)


def describe(tuples: pd.DataFrame) -> Additivity:
    """Rows of additivity.csv -> numbers; NaN where nothing varies."""
    joint, _, additive = (tuples[name] for name in LOSSES)
    within = tuples[LOSSES] - tuples.groupby("image_id")[LOSSES].transform("mean")
    return Additivity(
        len(tuples),
        tuples["bits"].mean(),
        joint.mean(),
        additive.mean(),
        joint.cov(additive) / additive.var(),
        joint.corr(additive) ** 2,
        within["joint"].corr(within["additive"]) ** 2,
        within["joint"].corr(within["mirrored"]) ** 2,
        joint.rank().corr(additive.rank()),
        (joint - additive).var() / joint.var(),
    )


def parts_of(tuples: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of additivity.csv -> thirds by bits of those that send all scales; the others."""
    skipping = tuples["kind"] == "skipping"
    sent = tuples[~skipping]
    third = pd.qcut(sent["bits"].rank(method="first"), 3, labels=False)
    parts = {name: sent[third == n] for n, name in enumerate(("low rates", "middle rates", "high rates"))}
    return parts | {"some scales not sent": tuples[skipping]}


def tenths(tuples: pd.DataFrame) -> pd.DataFrame:
    """Rows of additivity.csv -> mean additive and joint loss of each tenth of them, in rising additive loss."""
    tenth = pd.qcut(tuples["additive"].rank(method="first"), 10, labels=False)
    return tuples[["additive", "joint"]].groupby(tenth).mean()


def bound_tables(studies: dict[tuple[str, str], Study]) -> list[Table]:
    """Studies of each (task, codec) -> the tables of reports/tables/bound."""
    if not studies:
        return []
    compared = {key: (compare(*study[:2]), compare(*study[2:4])) for key, study in studies.items()}
    files, mirrored = (pd.concat([found.bd for found in part]) for part in zip(*compared.values(), strict=True))
    tables = []
    for codec in files["codec"].unique():
        title = f"BD-rate against uniform, codec {codec}"
        of_files, of_mirrored = (bd[bd["codec"] == codec] for bd in (files, mirrored))
        tables.append(comparison(f"{title}: bounds", of_files, f"{label_aware_note()} {BOUND_NOTE}"))
        tables.append(
            comparison(f"{title}: the same choices, scored on planes coded upside down", of_mirrored, MIRRORED_NOTE)
        )
    return [*tables, _lead_table(compared), _enumeration_table(studies), _additivity_table(studies)]


def _lead_table(compared: dict[tuple[str, str], tuple[Compared, Compared]]) -> Table:
    rows = []
    for (task, codec), worlds in compared.items():
        for name, peer in ((name, peer) for name, peers in PEERS.items() for peer in peers):
            leads = [paired(world, [peer]).set_index("other").loc[name] for world in worlds]
            cells = (bracketed(lead["difference"], lead["ci_low"], lead["ci_high"]) for lead in leads)
            rows.append([f"{task}, {codec}", name, peer, *cells])
    title = "Lead of the bounds: BD-rate of the method without labels minus that of the bound, percentage points"
    return Table(title, ["", "bound", "over", "on the files", "coded upside down"], rows, [LEAD_NOTE])


def _enumeration_table(studies: dict[tuple[str, str], Study]) -> Table:
    rows = []
    for (task, codec), study in studies.items():
        for price, found in study.enumeration.groupby("lambda_prime"):
            means = found[["additive", "descent", "optimum"]].mean()
            above = [f"{100 * (means[name] / means['optimum'] - 1):.1f} %" for name in ("additive", "descent")]
            reached = [f"{np.isclose(found[name], found['optimum']).mean():.0%}" for name in ("additive", "descent")]
            rows.append([f"{task}, {codec}", f"{price:.1e}", *(f"{mean:.3f}" for mean in means), *above, *reached])
    headers = ["", "lambda'", "additive", "descent", "optimum"]
    headers += ["additive above", "descent above", "additive optimal", "descent optimal"]
    images = ", ".join(f"{s.enumeration['image_id'].nunique()} images of {key[0]}" for key, s in studies.items())
    note = (
        f"{images}; each scale not sent or at one of two qualities, so 243 tuples. Costs are in objects, loss plus "
        "lambda' times bits, mean over the images; above: of these means, against that of the optimum; optimal: share "
        "of the images."
    )
    return Table(
        "Joint cost of the additive choice, of the descent from it and of the best of all tuples", headers, rows, [note]
    )


def _additivity_table(studies: dict[tuple[str, str], Study]) -> Table:
    rows = []
    for (task, codec), study in studies.items():
        for name, tuples in (parts_of(study.additivity) | {"all": study.additivity}).items():
            found = describe(tuples)
            shares = (f"{value:.2f}" for value in found[4:])
            rows.append(
                [f"{task}, {codec}: {name}", str(found.tuples), f"{found.bits:,.0f}"]
                + [f"{found.joint:.3f}", f"{found.additive:.3f}", *shares]
            )
    headers = ["", "tuples", "bits", "joint", "additive", "slope", "r2", "r2 in image", "of mirrored", "Spearman"]
    return Table("Joint loss against the sum of single-scale losses", [*headers, "interaction"], rows, ADDITIVITY_NOTES)
