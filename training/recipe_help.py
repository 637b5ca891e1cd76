"""What --help says of the recipes: the defaults of the options, and the constants that --set
changes."""

from __future__ import annotations

import textwrap

# The meanings of the constants.
CONSTANTS = {
    "lr_by_width": "factor on lr: 1/width, at most this (not Muon's); 0: none",
    "momentum": "of SGD and of Muon, 0 to 1",
    "muon": "rate of Muon for the 3x3 filters, in units of lr; 0: SGD",
    "nesterov": "Nesterov momentum in SGD",
    "weight_decay": "of SGD: this times the weight is added to its gradient",
    "decay_all": "decay all weights; false: filters and matrices only",
    "schedule": "linear (up to lr, down to 0), halve (from lr on), or double-halve (from lr to "
    "4 lr, then halved)",
    "halve_every": "epochs between the changes of halve and double-halve",
    "warmup": "share of the run in which the rate rises to lr",
    "label_smoothing": "share of the target spread over all classes, 0 to 1",
    "dropout": "factor on the authors' rates of 0.3 to 0.5; 0: none",
    "ema_decay": "of the moving average of the weights, per step; 0: none",
    "ema_share": "share of the run that the average spans at most; 1: no limit",
    "crop_pad": "pixels of reflected border around a random crop; 0: no crop",
    "flip": "mirror half of the training images",
    "trivial_augment": "change each image in one of 14 ways (arXiv 2103.10158)",
    "cutout": "side of a square cut out of each image, in pixels; 0: none",
    "zoom": "smallest share of the image in a random resized crop; 0: none",
    "jitter": "brightness, contrast, saturation times 1 +/- this; 0: none",
    "progressive": "small images first, as SCALE:UNTIL (share of the side, share of the run at "
    "which it ends), or none",
    "progressive_from": "optimizer steps; shorter runs train at full size throughout",
    "trunk": 'full, or pooled (after each block, as VGG16); "": by model',
    "pool4": "side of the pooling before block 4, in positions",
    "crop": "box (a bird's bounding box), center (the centered square), or whole (the image)",
    "test_share": "share of each class that is the test set, where there is no folder for it",
    "split_seed": "draws that share",
    "near_duplicates": "keep copies of a picture on one side of that split",
    "margin": "added to each side of the box, in units of its longer side",
    "transfer_lr": "factor on the rate of transferred layers",
}
# of the table of these constants, in characters
NAME_COLUMN, VALUE_COLUMN, MIN_COLUMN = 18, 8, 24
# Values that --help puts in words.
IN_WORDS = {("image_size", None): "that of the images", ("init_from", ""): "must be given"}


def in_recipes(recipes: dict[str, dict], name: str) -> str:
    """The default of an option: "(fast: 30, paper: 300)", or "(default: 128)" where all agree."""
    texts = {recipe: value_text(name, values.get(name)) for recipe, values in recipes.items()}
    if len(set(texts.values())) == 1:
        texts = {"default": next(iter(texts.values()))}
    listed = ", ".join(f"{recipe}: {text}" for recipe, text in texts.items())
    return f"({listed})".replace("%", "%%")  # argparse formats the text


def value_text(name: str, value: object) -> str:
    """A value of a recipe as it is typed, or in words."""
    if (name, value) in IN_WORDS:
        return IN_WORDS[name, value]
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def constants_table(
    names: list[str], recipes: dict[str, dict], short: dict[str, dict], *, below: int, width: int
) -> str:
    """The constants of these names: value in each recipe and meaning, in lines of up to ``width``
    characters. ``short``: a recipe's changes for runs of fewer than ``below`` epochs."""
    rows = [["NAME", *map(str.upper, recipes), "MEANING"]]
    for name in names:
        texts = [value_text(name, values.get(name)) for values in recipes.values()]
        rows.append([name, *texts, CONSTANTS.get(name, "")])
    indent = 2  # argparse's, of a group
    lines = [line for row in rows for line in table_row(row, width - indent)]
    for recipe, changes in short.items():
        texts = [f"{name} {value_text(name, value)}" for name, value in changes.items()]
        note = f"{recipe} in runs of fewer than {below} epochs: {', '.join(texts)}"
        lines += ["", *textwrap.wrap(note, max(MIN_COLUMN, width - indent))]
    return "\n".join(lines)


def table_row(cells: list[str], width: int) -> list[str]:
    """The lines of a row: a cell that is too long moves the next one to a new line, and the last
    one is wrapped."""
    name, *values, meaning = cells
    lines, start = [name], NAME_COLUMN
    for value in values:
        lines += [""] * (len(lines[-1]) >= start)
        lines[-1] = lines[-1].ljust(start) + value
        start += VALUE_COLUMN
    lines += [""] * (len(lines[-1]) >= start)
    first, *others = textwrap.wrap(
        meaning, max(MIN_COLUMN, width - start), break_on_hyphens=False
    ) or [""]
    lines[-1] = lines[-1].ljust(start) + first
    return lines + [" " * start + line for line in others]
