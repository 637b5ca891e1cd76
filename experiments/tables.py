"""The tables of docs/attention.md, from the files of the runs.

A table stands in the document between ``<!-- table: NAME -->`` and ``<!-- end -->``. All numbers
are of the last epoch, in percent or points; a mean is over the seeds, and a range in brackets is
from the lowest seed to the highest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist, fmean, stdev, variance

from common.errors import UserError
from experiments.plan import ATTACK, CONTROL, FIRST, MAPS, TRANSFER
from training.report import read_metrics

SLOT = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Files = Mapping[str, dict]  # of a run: the content of its files by name
Runs = Mapping[str, Sequence[Files]]  # by model, or first50-model: a run per seed


# ---- reading ------------------------------------------------------------------------------------


def read_runs(folder: Path) -> dict[str, list[Files]]:
    """The files of each finished run in ``folder``, by the folder's name without its seed. Raises
    UserError where there is none, or none of the control."""
    runs: dict[str, list[Files]] = {}
    for path in sorted(folder.glob("*/config.json")):
        files = {file.name: json.loads(file.read_text()) for file in path.parent.glob("*.json")}
        if files["config.json"].get("finished"):
            files["last epoch"] = read_metrics(path.parent / "metrics.csv")[-1]
            runs.setdefault(path.parent.name.rpartition("-")[0], []).append(files)
    if CONTROL not in runs:
        raise UserError(f"{folder} holds no finished run of {CONTROL}", 2)
    return runs


def filled(document: str, runs: Runs) -> str:
    """The document with its tables made again. Raises UserError for an unknown name."""

    def table(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise UserError(f"no table is called {match[2]}; there are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]](runs)}\n\n{match[3]}"

    return SLOT.sub(table, document)


# ---- numbers ------------------------------------------------------------------------------------


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion around the normal distribution's
    (Abramowitz and Stegun, 26.7.5); within 0.003 from 4 degrees of freedom on."""
    z, n = NormalDist().inv_cdf(0.975), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, start=1))


def pooled(groups: Iterable[Sequence[float]]) -> tuple[float, int]:
    """The standard deviation within groups, pooled over them, and its degrees of freedom."""
    groups = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(variance(group) * (len(group) - 1) for group in groups)
    return math.sqrt(squares / freedom), freedom


def difference(groups: Mapping[str, Sequence[float]], one: str, digits: int = 1) -> str:
    """ "+1.3 ± 0.4": the mean of a group against the control's, with its 95 % interval from the
    spread between seeds. Without an interval where there are fewer than four degrees of freedom,
    or no seeds to compare with."""
    if CONTROL not in groups:
        return ""
    mean = number(fmean(groups[one]) - fmean(groups[CONTROL]), digits, "+")
    if sum(len(group) - 1 for group in groups.values()) < 4:
        return mean
    sd, freedom = pooled(groups.values())
    half = t_quantile(freedom) * sd * math.sqrt(1 / len(groups[one]) + 1 / len(groups[CONTROL]))
    return f"{mean} ± {half:.{digits}f}"


def spread(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """ "12.3 (11.9 to 12.8)": the mean, the lowest and the highest."""
    if not values:
        return ""
    mean, low, high = (number(x, digits, sign) for x in (fmean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def number(value: float, digits: int, sign: str = "") -> str:
    value = round(value, digits) + 0.0  # no -0.0
    return f"{value:{sign if value else ''}.{digits}f}".replace("-", "−")


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def with_file(runs: Runs, name: str) -> dict[str, list[dict]]:
    """{model: the content of this file of each of its runs}, of the models that have it."""
    found = {model: [run[name] for run in files if name in run] for model, files in runs.items()}
    return {model: each for model, each in found.items() if each}


# ---- tables -------------------------------------------------------------------------------------


def networks(runs: Runs) -> str:
    """Top-1 of each network, and its difference to vgg-gap."""
    last = with_file(runs, "last epoch")
    last = {model: rows for model, rows in last.items() if not model.startswith("first")}
    top1 = {model: [row["eval_top1"] for row in rows] for model, rows in last.items()}
    rows = [
        [
            model,
            ", ".join(f"{value:.2f}" for value in top1[model]),
            f"**{fmean(top1[model]):.2f}**",
            f"{stdev(top1[model]):.2f}" if len(top1[model]) > 1 else "",
            "control" if model == CONTROL else difference(top1, model, 2),
            f"{fmean(row['eval_top5'] for row in last[model]):.2f}",
            f"{fmean(row['eval_loss'] for row in last[model]):.3f}",
        ]
        for model in sorted(top1, key=lambda model: -fmean(top1[model]))
    ]
    heads = ["network", "top-1, by seed", "mean", "sd", f"against {CONTROL}", "top-5", "loss"]
    return markdown(heads, rows)


BY = ("uniform", "average", "same class", "other class")


def replaced(runs: Runs) -> str:
    """Points of top-1 with replaced maps, against the network's own; after the semicolon with the
    classifier's statistics taken anew."""
    rows = []
    for model, files in with_file(runs, MAPS).items():
        own = [file["top1"] for file in files]
        for level in (row["of"] for row in files[0]["replaced"] if row["by"] == "uniform"):
            changed = [changes(files, by, level) for by in BY]
            anew = [fmean(changes(files, by, level, "top1_recalibrated")) for by in BY]
            cells = [
                f"{spread(points, sign='+')}; {number(mean, 1, '+')}"
                for points, mean in zip(changed, anew, strict=True)
            ]
            rows.append([model, level, f"{fmean(own):.1f}", *cells])
            model = ""
    heads = [
        "network",
        "level",
        "own maps",
        "uniform",
        "average",
        "of the same class",
        "of another",
    ]
    return markdown(heads, rows)


def changes(files: Sequence[dict], by: str, of: str, key: str = "top1") -> list[float]:
    """Points of top-1 that a replacement changes, per seed; with key "top1_recalibrated", both
    sides with the classifier's statistics taken anew."""
    rows = [{(row["by"], row["of"]): row[key] for row in file["replaced"]} for file in files]
    return [row[by, of] - row["own", "all"] for row in rows]


def query(runs: Runs) -> str:
    """How far another image's g moves the maps, and what it costs."""
    rows = []
    for model, files in with_file(runs, MAPS).items():
        for by in files[0]["moved_by_g"]:
            rows.append(
                [
                    model,
                    by,
                    spread(changes(files, by, "g"), 2, "+"),
                    per_level([file["moved_by_g"][by] for file in files]),
                    per_level([file["between_images"][by] for file in files]),
                ]
            )
            model = ""
    heads = [
        "network",
        "g of an image of the",
        "top-1",
        "the maps move by",
        "maps of the two images",
    ]
    return markdown(heads, rows)


def per_level(found: Sequence[Mapping[str, float]]) -> str:
    """The mean over seeds, per level."""
    return ", ".join(f"{level} {fmean(each[level] for each in found):.3f}" for level in found[0])


def attacks(runs: Runs) -> str:
    """Top-1 under attack, by strength."""
    found: dict[str, dict[str, list[float]]] = {}
    for model, files in with_file(runs, ATTACK).items():
        for row in (row for file in files for row in file["results"]):
            key = f"{row['attack'].upper()}, {row['strength']:g}/255" if row["strength"] else "none"
            found.setdefault(key, {}).setdefault(model, []).append(row["top1"])
    rows = [
        [
            attack,
            model,
            spread(groups[model]),
            spread(groups.get(CONTROL, [])),
            difference(groups, model),
        ]
        for attack, groups in found.items()
        for model in groups
        if model != CONTROL
    ]
    return markdown(["attack", "network", "top-1", CONTROL, "difference"], rows)


def transferred(runs: Runs) -> str:
    """Top-1 of a linear classifier on frozen features."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    sizes: dict[str, int] = {}
    for name, files in with_file(runs, TRANSFER).items():
        model = name.removeprefix(f"first{FIRST}-")
        source = "CIFAR-100" if name == model else f"CIFAR-100, first {FIRST}"
        for row in (row for file in files for row in file["targets"]):
            target = f"{row['target']}, {row['classes']} classes, {row['image_size']} px"
            found.setdefault((source, target), {}).setdefault(model, []).append(row["top1"])
            sizes[model] = row["features"]
    rows = [
        [
            *key,
            f"{model} ({sizes[model]})",
            spread(groups[model]),
            f"{spread(groups.get(CONTROL, []))} ({sizes.get(CONTROL, '')})",
            difference(groups, model),
        ]
        for key, groups in found.items()
        for model in groups
        if model != CONTROL
    ]
    heads = ["trained on", "classifier on", "network (features)", "top-1", CONTROL, "difference"]
    return markdown(heads, rows)


TABLES: dict[str, Callable[[Runs], str]] = {
    "networks": networks,
    "replaced": replaced,
    "query": query,
    "attacks": attacks,
    "transfer": transferred,
}
