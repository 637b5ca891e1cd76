"""--compare: runs side by side, best first, and what differs between them.

Reads config.json and metrics.csv of each run, no checkpoint.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.arguments import did_you_mean, nearest
from common.checkpoint import upgrade_config
from common.errors import UserError, printable
from common.process import quoted
from training.environment import short_commit
from training.options import MAY_CHANGE
from training.report import read_metrics
from training.run_folder import read_config, read_settings

WIDTH = 100  # characters of a line, where the names of runs allow it
# Characters of a value, longer ones are cut in the middle: the first with which the columns fit.
LIMITS = (44, 32, 24)
MAX_NAMES = 5  # that one line lists
MISSING = "-"
NO_BREAK = "\N{NO-BREAK SPACE}"
# Settings that leave the result as it is. The length of a run is none of them.
NOT_MATHEMATICS = set(MAY_CHANGE) - {"epochs"}
# What accuracies have to share to be comparable: settings, and rows of ``data_of``.
SAME_IMAGES = ("dataset", "sample", "classes", "evaluated on")
ENVIRONMENT = ("device", "torch", "git_commit")
HEADER = (
    "",
    "{} top-1",
    "top-5",
    "loss",
    "train top-1",
    "train loss",
    "epoch",
    "train s",
    "run{}",
)


@dataclass(frozen=True)
class RunSummary:
    """What config.json and metrics.csv say about a run."""

    folder: Path
    config: dict
    data: dict
    environment: dict
    rows: list[dict]  # of read_metrics
    sanity: bool
    finished: bool

    @property
    def last(self) -> dict | None:
        """The row of the last epoch; None before the first."""
        return self.rows[-1] if self.rows else None

    @property
    def eval_name(self) -> str:
        return "val" if self.config.get("val_fraction") else "test"

    @property
    def is_done(self) -> bool:
        """Whether the last epoch is trained and has an accuracy."""
        return (
            self.last is not None
            and self.last["epoch"] == self.config.get("epochs")
            and is_number(self.last["eval_top1"])
        )


def compare(words: Sequence[str]) -> int:
    """Print the comparison of the runs that ``words`` name: folders, or files in them. Returns the
    exit status.

    Raises UserError for a name without a file, for fewer than two runs, for a run that is named
    twice, and for damaged files."""
    found, left_out = read_runs(words)
    runs = sorted(found, key=rank)
    differing = differences(runs)
    notes = [*comparability(runs), *seed_notes(runs), *left_out_note(left_out)]
    parts = [result_lines(runs), notes, *difference_parts(differing)]
    print("\n\n".join("\n".join(lines) for lines in parts if lines))
    return 0


# ---- read ---------------------------------------------------------------------------------------


def read_runs(words: Sequence[str]) -> tuple[list[RunSummary], dict[str, list[str]]]:
    """(The runs, what is left out, by reason): a shell's * also names other files, and sanity
    passes. Raises UserError."""
    runs: list[RunSummary] = []
    left_out: dict[str, list[str]] = {}
    named: dict[Path, str] = {}
    for word in words:
        folder = folder_of(word)
        run = read_run(folder)
        if run is None or run.sanity:
            reason = "sanity pass" if run else "no run"
            left_out.setdefault(reason, []).append(word)
            continue
        place = folder.resolve()
        if place in named:
            first = named[place]
            also = "" if first == word else f", first as {printable(first)}"
            raise UserError(f"--compare: {printable(word)} is named twice{also}", 2)
        named[place] = word
        runs.append(run)
    if len(runs) < 2:
        raise UserError(f"--compare needs two runs{too_few(runs, left_out)}", 2)
    return runs, left_out


def folder_of(word: str) -> Path:
    """The folder that ``word`` names, or the one of the file. Raises UserError where there is
    neither."""
    path = Path(word)
    if os.path.lexists(path):
        return path if path.is_dir() else path.parent
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    near = nearest(path.name, beside)
    hint = did_you_mean(printable(path.with_name(near))) if near else "; name runs by their folders"
    raise UserError(f"--compare: there is no {printable(path)}{hint}", 2)


def read_run(folder: Path) -> RunSummary | None:
    """The run in a folder; None if there is none. Raises UserError for damaged files."""
    path = folder / "config.json"
    try:
        record = read_config(folder)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{printable(path)} is damaged ({error}): leave this run out") from None
    try:
        settings = read_settings(folder)
    except ValueError:  # another program's config.json
        return None
    try:
        rows = read_metrics(folder / "metrics.csv")
    except FileNotFoundError:
        rows = []
    except ValueError as error:
        raise UserError(
            f"{printable(str(error))}: repair this line, or leave the run out"
        ) from None
    data, environment = (
        record[name] if isinstance(record.get(name), dict) else {}
        for name in ("data", "environment")
    )
    return RunSummary(
        folder,
        settings | upgrade_config(settings),  # in the order of the run's own
        data,
        environment,
        rows,
        sanity=bool(record.get("sanity")),
        finished=bool(record.get("finished")),
    )


def too_few(runs: Sequence[RunSummary], left_out: Mapping[str, Sequence[str]]) -> str:
    """The end of the error for fewer than two runs: what there is instead, and what to name."""
    for folder in map(Path, left_out.get("no run", ())):
        if any(folder.glob("*/config.json")):
            return f", and {printable(folder)} is none. Those in it: --compare {quoted(folder)}/*"
    if left_out:
        return f", and these do not count: {left_out_words(left_out)}"
    return f": name another beside {printable(runs[0].folder)}"


# ---- decide -------------------------------------------------------------------------------------


def rank(run: RunSummary) -> tuple[int, float, float]:
    """Sorts the best run first: by accuracy, then by loss, on the evaluation set. Runs without an
    accuracy come after all others, those without an epoch last."""
    if run.last is None:
        return 2, 0.0, 0.0
    top1, loss = run.last["eval_top1"], run.last["eval_loss"]
    loss = loss if is_number(loss) else math.inf
    if not is_number(top1):
        return 1, 0.0, loss
    return 0, -round(top1, 6), loss  # 58.27 may be written 58.269999999999996


def differences(runs: Sequence[RunSummary]) -> dict[str, dict[str, list[str]]]:
    """What differs, by section ("setting", "data", "environment") and name: a value per run, as
    text."""
    sections = {
        "setting": [settings_of(run) for run in runs],
        "data": [data_of(run) for run in runs],
        "environment": [environment_of(run) for run in runs],
    }
    return {title: differing_rows(values) for title, values in sections.items()}


def differing_rows(values: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The names whose values are not the same in all of ``values``, in the order of the first that
    has them."""
    names = dict.fromkeys(itertools.chain.from_iterable(values))
    rows = {name: [each.get(name, MISSING) for each in values] for name in names}
    return {name: texts for name, texts in rows.items() if len(set(texts)) > 1}


def settings_of(run: RunSummary) -> dict[str, str]:
    return {name: as_text(value) for name, value in run.config.items()}


def data_of(run: RunSummary) -> dict[str, str]:
    names = {
        "evaluated on": f"{run.eval_name} images",
        "training images": "images",
        "classes": "classes",
    }
    counts = {shown: run.data.get(name) for shown, name in names.items()}
    texts = {
        name: f"{count:,}" if isinstance(count, int) else MISSING for name, count in counts.items()
    }
    return texts | {"evaluated on": f"{texts['evaluated on']} {run.eval_name} images"}


def environment_of(run: RunSummary) -> dict[str, str]:
    shown = {name: run.environment[name] for name in ENVIRONMENT if name in run.environment}
    if isinstance(shown.get("git_commit"), str):
        shown["git_commit"] = short_commit(shown["git_commit"])
    return {name: as_text(value) for name, value in shown.items()}


def comparability(runs: Sequence[RunSummary]) -> list[str]:
    """The note where not all runs were evaluated on the same images."""
    differing = differing_rows([settings_of(run) | data_of(run) for run in runs])
    # what a run's version did not write down says nothing
    known = {name: set(differing.get(name, ())) - {MISSING} for name in SAME_IMAGES}
    names = [name for name, texts in known.items() if len(texts) > 1]
    if not names:
        return []
    return [
        f"Their accuracies are not comparable: they were evaluated on different images "
        f"({', '.join(names)})."
    ]


def seed_notes(runs: Sequence[RunSummary]) -> list[str]:
    """For runs that differ in nothing but the seed: mean and sample standard deviation of top-1
    over those that have come to their end. A line per group of such runs."""
    groups: dict[tuple, list[int]] = {}
    for number, run in enumerate(runs, start=1):
        settings = {
            name: text
            for name, text in (settings_of(run) | data_of(run)).items()
            if name not in NOT_MATHEMATICS and name != "seed"
        }
        groups.setdefault(tuple(sorted(settings.items())), []).append(number)
    notes = (seed_note(runs, numbers) for numbers in groups.values())
    return [note for note in notes if note]


def seed_note(runs: Sequence[RunSummary], numbers: Sequence[int]) -> str:
    """The note on the runs of these numbers; nothing where no two of them can be compared."""
    group = [runs[number - 1] for number in numbers]
    done = [run for run in group if run.is_done]
    seeds = {as_text(run.config.get("seed")) for run in done}
    if len(seeds) < 2:
        return ""
    top1 = [run.last["eval_top1"] for run in done]
    count = f"{len(done)} runs"
    if len(seeds) < len(done):  # one was repeated: they say less than as many seeds would
        count += f" of {len(seeds)} seeds"
    if len(done) < len(group):
        count += f"; {len(group) - len(done)} unfinished"
    who = "These" if len(group) == len(runs) else ranges(numbers)
    return (
        f"{who} differ in no setting but the seed: top-1 mean {statistics.mean(top1):.2f} %, "
        f"sd {statistics.stdev(top1):.2f} ({count})"
    )


def is_number(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


# ---- in words -----------------------------------------------------------------------------------


def as_text(value: object) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, list):
        return "x".join(map(as_text, value))  # sizes
    if value is None:
        return "none"
    return printable(str(value)) or '""'


def cell(value: float | None, decimals: int) -> str:
    return MISSING if value is None else f"{value:,.{decimals}f}"


def ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 5, 6] -> "1-3, 5, 6"."""
    words = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        row = [str(number) for _, number in group]
        words += [f"{row[0]}-{row[-1]}"] if len(row) > 2 else row
    return ", ".join(words)


def shortened(texts: Sequence[str], limit: int) -> list[str]:
    """``texts``, those over ``limit`` characters cut in the middle, but not so short that two
    become the same."""
    for length in range(limit, max(map(len, texts))):
        cut = [cut_middle(text, length) for text in texts]
        if len(set(cut)) == len(set(texts)):
            return cut
    return list(texts)


def cut_middle(text: str, limit: int) -> str:
    """``text`` in at most ``limit`` characters. More of its end is left, where paths differ."""
    if len(text) <= limit:
        return text
    start = (limit - 3) // 3
    return f"{text[:start]}...{text[len(text) - (limit - 3 - start) :]}"


def left_out_note(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"Left out: {left_out_words(left_out)}"] if left_out else []


def left_out_words(left_out: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{some(words)} ({reason})" for reason, words in left_out.items())


def some(words: Sequence[str]) -> str:
    """The last parts of the first of these paths."""
    names = [printable(Path(word).name or word) for word in words[:MAX_NAMES]]
    more = f" and {len(words) - MAX_NAMES} more" if len(words) > MAX_NAMES else ""
    return ", ".join(names) + more


# ---- lines --------------------------------------------------------------------------------------


def result_lines(runs: Sequence[RunSummary]) -> list[str]:
    """The table of the last epochs, numbered in the order of ``runs``."""
    eval_names = {run.eval_name for run in runs}
    parent = common_parent([run.folder for run in runs])
    header = list(HEADER)
    header[1] = header[1].format(eval_names.pop() if len(eval_names) == 1 else "eval")
    header[-1] = header[-1].format(f", in {printable(parent)}" if parent != Path() else "")
    rows = [
        [str(number), *result_cells(run), printable(name_in(parent, run.folder))]
        for number, run in enumerate(runs, start=1)
    ]
    return aligned([header, *rows], ">" * (len(header) - 1) + "<")


def result_cells(run: RunSummary) -> list[str]:
    """Top-1, top-5, loss, training top-1 and loss, epoch, seconds."""
    last = run.last
    if last is None:
        state = "no metrics.csv" if run.finished else "no epoch yet"
        return [MISSING] * 5 + [state, MISSING]
    seconds = sum(row["seconds"] for row in run.rows if row["seconds"] is not None)
    return [
        cell(last["eval_top1"], 2),
        cell(last["eval_top5"], 2),
        cell(last["eval_loss"], 4),
        cell(last["train_top1"], 2),
        cell(last["train_loss"], 4),
        f"{last['epoch']}/{as_text(run.config.get('epochs', '?'))}",
        cell(seconds, 0),
    ]


def common_parent(folders: Sequence[Path]) -> Path:
    """The folder that holds all of these; that of the process if they have no other in common."""
    try:
        return Path(os.path.commonpath([folder.parent for folder in folders]))
    except ValueError:  # absolute and relative ones
        return Path()


def name_in(parent: Path, folder: Path) -> Path:
    """The rest of the folder's path; all of it where ``parent`` is that of the process."""
    return folder if parent == Path() else folder.relative_to(parent)


def difference_parts(differing: Mapping[str, Mapping[str, list[str]]]) -> list[list[str]]:
    """The lines of each section that has any."""
    parts = [difference_lines(title, rows) for title, rows in differing.items() if rows]
    if not parts:
        return [["Nothing differs: the same settings, data, device, PyTorch and commit."]]
    return parts if differing["setting"] else [["No setting differs."], *parts]


def difference_lines(title: str, rows: Mapping[str, list[str]]) -> list[str]:
    """A row per name and a column per run; where that is too wide, the runs of each value."""
    count = len(next(iter(rows.values())))
    header = [title, *map(str, range(1, count + 1))]
    for limit in LIMITS:
        cells = [[name, *shortened(texts, limit)] for name, texts in rows.items()]
        lines = aligned([header, *cells], "<" * len(header))
        if max(map(len, lines)) <= WIDTH:
            return lines
    return lines_by_value(title, rows)


def lines_by_value(title: str, rows: Mapping[str, list[str]]) -> list[str]:
    """A row per name: each value and the numbers of its runs, that of the best run first."""
    width = max(map(len, [title, *rows]))
    lines = [f"{title:<{width}}  value (runs)"]
    for name, texts in rows.items():
        numbers: dict[str, list[int]] = {}
        for number, text in enumerate(shortened(texts, LIMITS[0]), start=1):
            # no line ends within a value, or between it and its runs
            numbers.setdefault(text.replace(" ", NO_BREAK), []).append(number)
        wrapped = textwrap.wrap(
            "; ".join(f"{text}{NO_BREAK}({ranges(numbers[text])})" for text in numbers),
            WIDTH,
            initial_indent=f"{name:<{width}}  ",
            subsequent_indent=" " * (width + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [line.replace(NO_BREAK, " ") for line in wrapped]
    return lines


def aligned(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Rows of cells as lines, the columns two spaces apart. ``align``: "<" or ">" per column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{text:{side}{width}}" for text, side, width in zip(row, align, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
