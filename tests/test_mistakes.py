"""The pictures of --evaluate: the most confused pairs of classes, the surest mistakes."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ImageFont

from attention_model import build_model
from common import fonts
from common.device import Precision
from data import ImageSet, to_input
from explain.pictures import MARGIN, PAPER, enlarge, overlay
from tests.helpers.trainers import CPU
from training import mistakes
from training.evaluation import EvaluatedCheckpoint, Evaluation, Predictions
from training.mistakes import confused_pairs, fitted, most_confused, surest_mistakes

MEAN, STD, SIZE = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (32, 32)
NAMES = ("ash", "birch", "cedar", "elm")


def evaluation(labels, seen, sure, *, model="vgg-gap", names=NAMES, size=(32, 32)):
    """An evaluation of random images with these classes, answers and probabilities."""
    labels, seen, sure = torch.tensor(labels), torch.tensor(seen), torch.tensor(sure)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (len(labels), *size, 3), dtype=np.uint8))
    counts = labels.bincount(minlength=len(names)).tolist()
    right = labels[labels == seen].bincount(minlength=len(names)).tolist()
    torch.manual_seed(0)
    return EvaluatedCheckpoint(
        Path("run/last.pt"),
        {"position": {"epoch": 2, "step": 0}, "mean": MEAN, "std": STD, "input_size": SIZE},
        {"model": model, "width": 1 / 16, "epochs": 3},
        build_model(model, len(names), width=1 / 16).eval(),
        Precision("fp32", CPU),
        ImageSet(images, labels, tuple(names), "a test"),
        Evaluation(1.0, 100 * sum(right) / len(labels), 100.0, counts, right),
        Predictions(labels, seen[:, None], sure[:, None], torch.ones(len(labels))),
        1.0,
        "python train_cifar100.py",
    )


def some_mistakes(count=60, **options):
    rng = np.random.default_rng(2)
    labels, seen = rng.integers(0, 4, (2, count)).tolist()
    return evaluation(labels, seen, rng.permutation(count) / count, **options)


def places(sheet, picture):
    """(top, left) of each copy of a picture on the sheet, from above."""
    height, width = picture.shape[:2]
    starts = np.argwhere((sheet == picture[0, 0]).all(axis=2)).tolist()
    return [
        (y, x) for y, x in starts if np.array_equal(sheet[y : y + height, x : x + width], picture)
    ]


def assert_nothing_in_the_margins(sheet):
    edge = MARGIN - 1  # a picture's frame is outside it
    strips = (sheet[:edge], sheet[:, :edge], sheet[:, -edge:], sheet[-10:])
    assert all((strip == PAPER).all() for strip in strips)


# ---- the most confused pairs --------------------------------------------------------------------


def test_pairs_are_ranked_by_both_directions_together():
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 6, (7, 7))
    together = Counter()
    for a in range(7):
        for b in range(7):
            if a != b:
                together[frozenset((a, b))] += matrix[a, b]
    pairs = most_confused(torch.tensor(matrix), 10)
    assert [together[frozenset(pair)] for pair in pairs] == sorted(together.values())[::-1][:10]
    assert len(set(map(frozenset, pairs))) == 10
    assert all(matrix[a, b] >= matrix[b, a] for a, b in pairs)


def test_pairs_without_mistakes_are_left_out():
    assert most_confused(torch.diag(torch.tensor([3, 4, 5])), 10) == []
    matrix = torch.tensor([[5, 0, 0], [0, 5, 0], [2, 0, 5]])
    assert most_confused(matrix, 10) == [(2, 0)]


def test_the_picture_of_pairs_shows_the_surest_examples_of_each_direction():
    evaluated = some_mistakes()
    labels, seen = evaluated.test.labels.tolist(), evaluated.predictions.predicted.tolist()
    sure = evaluated.predictions.probabilities[:, 0].tolist()
    sheet = confused_pairs(evaluated)
    assert_nothing_in_the_margins(sheet)
    directions = {}
    for image in sorted(range(60), key=lambda i: -sure[i]):
        found = places(sheet, enlarge(evaluated.test.images[image].numpy(), 96))
        direction = (labels[image], seen[image])
        if found:
            directions.setdefault(direction, []).append(found[0])
        else:  # it is right, or not one of the surest
            assert labels[image] == seen[image] or len(directions[direction]) == 5
        assert len(found) == (labels[image] != seen[image]) or not found
    assert max(map(len, directions.values())) == 5 and len(directions) == 12
    counts, tops = Counter(zip(labels, seen, strict=True)), {}
    for (truth, answer), found in directions.items():
        assert found == sorted(found) and len({y for y, _ in found}) == 1  # a row, the surest first
        tops.setdefault(frozenset((truth, answer)), set()).add(found[0][0])
        there, back = counts[truth, answer], counts[answer, truth]
        if there > back:
            assert found[0][1] == MARGIN  # at the left
    assert {len(rows) for rows in tops.values()} == {1}  # both directions side by side
    ranked = sorted(tops, key=lambda pair: min(tops[pair]))
    totals = [counts[a, b] + counts[b, a] for a, b in map(tuple, ranked)]
    assert totals == sorted(totals, reverse=True)


def test_captions_and_notes_say_how_many_and_how_sure(monkeypatch):
    texts = []

    def text(self, place, words, *rest):
        texts.append(words)
        return draw_text(self, place, words, *rest)

    draw_text = mistakes.ImageDraw.ImageDraw.text
    monkeypatch.setattr(mistakes.ImageDraw.ImageDraw, "text", text)
    evaluated = evaluation([0, 0, 0, 1, 1, 2], [1, 1, 0, 0, 1, 2], [0.5, 0.875, 1, 0.625, 1, 1])
    confused_pairs(evaluated)
    for expected in (
        "ash seen as birch: 2 of 3",
        "birch seen as ash: 1 of 2",
        "0: 50 %",
        "1: 88 %",
        "3: 62 %",
        "vgg-gap, width 0.0625, after 2 of 3 epochs (run/last.pt)",
        "3 mistakes in 6 test images: top-1 50.00 %, 95 % interval 18.76 to 81.24 %",
        "Images: a test",
    ):
        assert texts.count(expected) == 1, expected
    assert not [words for words in texts if "cedar" in words]


def test_one_mistake_in_one_direction_is_a_picture():
    evaluated = evaluation([0, 1, 2], [0, 1, 0], [0.9, 0.9, 0.9])
    sheet = confused_pairs(evaluated)
    assert len(places(sheet, enlarge(evaluated.test.images[2].numpy(), 96))) == 1
    assert_nothing_in_the_margins(sheet)
    assert (
        len(places(surest_mistakes(evaluated), enlarge(evaluated.test.images[2].numpy(), 256))) == 1
    )


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (300, 100)])
def test_long_names_and_other_shapes_stay_within_the_picture(size):
    names = tuple(f"Great_Crested_Flycatcher_{'of_the_northern_woods_' * n}" for n in range(4))
    evaluated = some_mistakes(names=names, size=size)
    for sheet in (confused_pairs(evaluated), surest_mistakes(evaluated)):
        assert_nothing_in_the_margins(sheet)
        assert max(sheet.shape) < 4000


def test_without_mistakes_there_is_no_picture():
    evaluated = evaluation([0, 1, 2], [0, 1, 2], [0.9, 0.9, 0.9])
    assert confused_pairs(evaluated) is None and surest_mistakes(evaluated) is None


# ---- the surest mistakes ------------------------------------------------------------------------


def test_the_sheet_shows_the_16_surest_mistakes_with_their_maps(monkeypatch):
    titles, draw = [], mistakes.attention_sheet
    monkeypatch.setattr(
        mistakes,
        "attention_sheet",
        lambda *words, **options: titles.extend(words[2]) or draw(*words, **options),
    )
    evaluated = some_mistakes(model="vgg-att2-concat-pc")
    labels, seen = evaluated.test.labels.tolist(), evaluated.predictions.predicted.tolist()
    sure = evaluated.predictions.probabilities[:, 0].tolist()
    sheet = surest_mistakes(evaluated)
    assert_nothing_in_the_margins(sheet)
    wrong = [i for i in sorted(range(60), key=lambda i: -sure[i]) if labels[i] != seen[i]]
    found = [places(sheet, enlarge(image.numpy())) for image in evaluated.test.images[wrong]]
    assert list(map(len, found)) == [1] * 16 + [0] * (len(wrong) - 16) and len(wrong) > 16
    assert found[:16] == sorted(found[:16])  # row by row, the surest first
    assert titles == [
        f"{i}: {NAMES[labels[i]]}, seen: {NAMES[seen[i]]} {100 * sure[i]:.0f} %" for i in wrong[:16]
    ]
    inputs = to_input(evaluated.test.images[wrong[:16]], MEAN, STD, SIZE)
    with torch.no_grad():
        _, maps = evaluated.model(inputs, return_attention=True)
    for level in ("conv10", "conv13"):
        image, attention = enlarge(evaluated.test.images[wrong[3]].numpy()), maps[level][3].numpy()
        assert len(places(sheet, overlay(image, attention))) == 1


def test_a_network_without_attention_shows_the_images_alone(monkeypatch):
    given = {}
    draw = mistakes.attention_sheet
    monkeypatch.setattr(
        mistakes,
        "attention_sheet",
        lambda *words, **options: given.update(options, maps=words[1]) or draw(*words, **options),
    )
    evaluated = some_mistakes(count=12, model="vgg")
    wrong = (evaluated.test.labels != evaluated.predictions.predicted).nonzero().flatten()
    sheet = surest_mistakes(evaluated)
    for image in evaluated.test.images[wrong]:
        assert len(places(sheet, enlarge(image.numpy(), 256))) == 1
    assert given["maps"] == {} and not given["legend"]  # there are no colors to explain
    assert_nothing_in_the_margins(sheet)


# ---- text ---------------------------------------------------------------------------------------


def test_names_are_cut_and_numbers_are_not():
    font = ImageFont.load_default(size=15)
    template = "{} seen as {}: 21 of 100"
    assert fitted(template, "maple", "oak", font, 500) == "maple seen as oak: 21 of 100"
    # braces in a name are no places for another
    assert fitted(template, "{}", "{0}", font, 500) == "{} seen as {0}: 21 of 100"
    for first, second in (("m" * 80, "o" * 90), ("m" * 80, "oak"), ("ash", "o" * 90)):
        text = fitted(template, first, second, font, 400)
        assert 330 < font.getlength(text) <= 400 and text.endswith(": 21 of 100")
        for name in (first, second):
            assert name in text or len(name) > 3  # a short one is left whole


def test_names_that_no_font_has_are_numbers(monkeypatch):
    """As the same pictures with these numbers for names."""
    monkeypatch.setattr(fonts, "system_fonts", lambda: fonts.SystemFonts([]))
    names, numbers = ("ash", "桦", "雪松", "elm"), ("ash", "class 1", "class 2", "elm")
    for draw in (confused_pairs, surest_mistakes):
        assert (draw(some_mistakes(names=names)) == draw(some_mistakes(names=numbers))).all()


def test_the_run_says_once_which_letters_no_font_has(monkeypatch, capsys):
    monkeypatch.setattr(fonts, "system_fonts", lambda: fonts.SystemFonts([]))
    model = "vgg-att1-dp"
    evaluated = some_mistakes(8, model=model, names=("ash", "桦", "雪松", "elm"))
    monitor = mistakes.monitor_of(evaluated)
    report = SimpleNamespace(health=lambda *args: None, overlays=lambda *args: None)
    said = []
    for epoch, overlays in enumerate((False, True, True)):
        monitor.observe(evaluated.model, evaluated.precision, {}, report, epoch, overlays=overlays)
        said.append([line for line in capsys.readouterr().out.splitlines() if "note:" in line])
    assert said[0] == said[2] == [] and len(said[1]) == 1
    assert 'no font here has 松 桦 雪: in the pictures 2 of 4 names are "class 1"' in said[1][0]
