"""--attack: the attacks against references that go image by image, and the command."""

import argparse
import copy
import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import attention_model
from attention_model import MODEL_NAMES, build_model
from common.checkpoint import load_model
from common.device import Precision
from data import eval_batches, evenly_spread, to_input
from tests.helpers.makers import image_set
from tests.helpers.runs import content_of
from training import attacks, evaluate_attacks, options
from training.attacks import AttackedNetwork, attacked_batches, fgsm, pgd

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def small_network(name="vgg-att3-concat-pc", dtype=torch.float64, classes=4):
    """A network whose batch norm has seen noise, in evaluation mode."""
    torch.manual_seed(0)
    model = build_model(name, classes, width=1 / 16).to(dtype)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, 3, 16, 16, dtype=dtype))
    return model.eval()


def attacked_network(model, precision="fp32", **options):
    return AttackedNetwork(model, MEAN, STD, Precision(precision, CPU), **options)


def some_images(count=6, dtype=torch.float64):
    """Images of 16 px in [0, 1], with values at both ends."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(-40, 296, (count, 16, 16, 3)).clip(0, 255) / 255
    return torch.tensor(pixels, dtype=dtype).permute(0, 3, 1, 2)


def generator():
    return torch.Generator().manual_seed(attacks.NOISE_SEED)


def loss_of(model, image, label):
    """The cross-entropy of one image (3, H, W) in [0, 1], the long way."""
    normalized = [(channel - m) / s for channel, m, s in zip(image, MEAN, STD, strict=True)]
    scores = model(torch.stack(normalized)[None])[0]
    return scores.exp().sum().log() - scores[label]


def sign_of(model, image, label):
    image = image.clone().requires_grad_()
    loss_of(model, image, label).backward()
    return image.grad.sign()


def losses_of(model, images, labels):
    with torch.no_grad():
        return torch.stack([loss_of(model, *each) for each in zip(images, labels, strict=True)])


@pytest.fixture
def exact_maps(monkeypatch):
    """Maps in float64, too: small differences would be lost in float32."""
    monkeypatch.setattr(
        attention_model,
        "softmax_over_positions",
        lambda scores: scores.flatten(1).softmax(1).view(scores.shape),
    )


# ---- the gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg-att3-concat-pc", "vgg-att3-concat-gate", "vgg-gap"])
def test_the_gradient_is_that_of_finite_differences(exact_maps, name):
    model, images = small_network(name), some_images()
    found = attacked_network(model).gradient(images, LABELS)
    rng, step = np.random.default_rng(1), 1e-6
    for image, label, gradient in zip(images[:3], LABELS, found, strict=False):
        doubt = 1 - (-losses_of(model, [image], [label])[0]).exp()
        for place in zip(rng.integers(0, 3, 8), *rng.integers(0, 16, (2, 8)), strict=True):
            ends = [image.clone(), image.clone()]
            for end, move in zip(ends, (-step, step), strict=True):
                end[place] += move
            low, high = losses_of(model, ends, [label] * 2)
            slope = (high - low) / (2 * step)
            assert gradient[place] * doubt == pytest.approx(slope.item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_small_step_raises_the_loss_of_every_network_by_the_gradients_sum(exact_maps, name):
    model, images = small_network(name), some_images(1) * 0.8 + 0.1  # nothing is cut off
    [moved] = fgsm(attacked_network(model), images, LABELS[:1], [255 * 1e-7], generator())
    image = images[0].clone().requires_grad_()
    loss = loss_of(model, image, LABELS[0])
    loss.backward()
    rise = loss_of(model, moved[0], LABELS[0]) - loss
    assert rise.item() / 1e-7 == pytest.approx(image.grad.abs().sum().item(), rel=1e-3)


def test_the_network_itself_stays_as_it_is():
    model = small_network().train()
    before = copy.deepcopy(model.state_dict())
    attacked_network(model).gradient(some_images(), LABELS)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_the_gradient_of_an_image_that_the_network_is_sure_of_is_not_lost(precision):
    """Its cross-entropy alone would be too small: 1e-10 in float32, nothing in half precision."""
    model, images = small_network("vgg-gap"), some_images()
    with torch.no_grad():
        first, *others = model(attacked_network(model).inputs_of(images)).T
        model.classifier.bias[0] += 23 - (first - torch.stack(others).logsumexp(0)).min()
        sure = torch.zeros(6, dtype=torch.int64)
        assert 1e-12 < losses_of(model, images, sure).max() < 1e-9
    exact = attacked_network(model).gradient(images, sure)
    found = attacked_network(copy.deepcopy(model).float(), precision).gradient(images.float(), sure)
    large = exact.abs() > exact.abs().flatten(1).quantile(0.5, 1)[:, None, None, None]
    same = (found.sign() == exact.sign())[large].double().mean()
    print(f"{precision}: {100 * same:.2f} % of the larger half have the right sign")
    assert found.isfinite().all() and same > {"fp16": 0.98, "bf16": 0.9, "fp32": 0.999}[precision]


# ---- the attacks --------------------------------------------------------------------------------


def test_fgsm_takes_one_step_of_the_strength_to_the_side_where_the_loss_rises(exact_maps):
    model, images, strengths, counts = small_network(), some_images(), [0.5, 1.0, 8.0], []
    network = attacked_network(model, observe=counts.append)
    found = list(fgsm(network, images, LABELS, strengths, generator()))
    assert counts == [6]  # one gradient for all strengths
    for strength, attacked in zip(strengths, found, strict=True):
        for image, label, each in zip(images, LABELS, attacked, strict=True):
            step = strength / 255 * sign_of(model, image, label).numpy()
            np.testing.assert_allclose(each, np.clip(image.numpy() + step, 0, 1), atol=1e-12)


def test_pgd_takes_twenty_steps_and_stays_within_the_strength(exact_maps):
    model, images, strengths, counts = small_network(), some_images(3), [8.0], []
    network = attacked_network(model, observe=counts.append)
    found = list(pgd(network, images, LABELS[:3], strengths, generator()))
    assert counts == [3] * 20
    for strength, attacked in zip(strengths, found, strict=True):
        draw, bound = generator(), strength / 255
        for image, label, each in zip(images, LABELS, attacked, strict=False):
            change = bound * (2 * torch.rand(3, 16, 16, generator=draw).double() - 1)
            for _ in range(20):
                now = (image + change).clamp(0, 1)
                moved = now + bound / 8 * sign_of(model, now, label)
                change = (moved - image).clamp(-bound, bound)
            torch.testing.assert_close(each, (image + change).clamp(0, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-7), (torch.float64, 1e-15)])
def test_attacked_images_are_images_within_the_strength(dtype, rounding):
    images, network = some_images(3, dtype), attacked_network(small_network(dtype=dtype))
    strengths = [0.0, 4.0, 255.0]
    for attack in (fgsm, pgd):
        found = list(attack(network, images, LABELS[:3], strengths, generator()))
        assert torch.equal(found[0], images)
        for strength, attacked in zip(strengths, found, strict=True):
            assert attacked.dtype == dtype and 0 <= attacked.min() and attacked.max() <= 1
            assert (attacked - images).abs().max() <= strength / 255 + rounding


def test_pgd_finds_at_least_the_loss_of_fgsm():
    """Where the loss is linear within the bound, both end in the same corner: PGD's steps together
    are longer than the way there from any start. Where it is not, PGD sees the turns."""
    model, images, labels = small_network("vgg-att3-concat-gate"), some_images(3), LABELS[:3]
    network, strengths = attacked_network(model), [0.25, 16.0]
    pairs = zip(
        fgsm(network, images, labels, strengths, generator()),
        pgd(network, images, labels, strengths, generator()),
        strict=True,
    )
    before, ratios = losses_of(model, images, labels).mean(), []
    for pair in pairs:
        one_step, many = (losses_of(model, each, labels).mean() - before for each in pair)
        ratios.append((many / one_step).item())
    print("PGD's rise of the loss by FGSM's:", ratios)
    assert ratios[0] > 0.98 and ratios[1] > 1.05


def test_an_images_noise_does_not_depend_on_the_batches(monkeypatch):
    """Where no gradient moves them, PGD gives the starting points."""
    network = attacked_network(small_network(dtype=torch.float32))
    monkeypatch.setattr(network, "gradient", lambda images, labels: torch.zeros_like(images))
    images = some_images(dtype=torch.float32)
    inputs, found = network.inputs_of(images), []
    for size in (6, 4, 1):
        batches = zip(inputs.split(size), LABELS.split(size), strict=True)
        given = list(attacked_batches(network, batches, {"pgd": [2.0, 4.0]}))
        found.append([torch.cat([x for x, _ in given[kind::3]]) for kind in range(3)])
        assert torch.equal(torch.cat([y for _, y in given[2::3]]), LABELS)
    assert all(
        torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True)
    )
    as_given, *attacked = found[0]
    assert torch.equal(as_given, inputs)
    noise = 2 * torch.rand(6, 3, 16, 16, generator=generator()) - 1
    for strength, each in zip((2, 4), attacked, strict=True):
        start = (images + strength / 255 * noise).clamp(0, 1)
        torch.testing.assert_close(network.images_of(each), start, rtol=0, atol=1e-6)


def test_images_and_inputs_are_each_others_inverse():
    """Also after the resize of the evaluation."""
    pictures = image_set(count=3)
    [(inputs, _)] = eval_batches(pictures, CPU, MEAN, STD, (16, 20))
    images = attacked_network(small_network(dtype=torch.float32)).images_of(inputs)
    resized = to_input(pictures.images, (0, 0, 0), (1, 1, 1), (16, 20))
    torch.testing.assert_close(images, resized, rtol=0, atol=1e-6)


# ---- the command --------------------------------------------------------------------------------


def strict_json(path) -> dict:
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(Path(path).read_text(), parse_constant=refuse)


@pytest.fixture
def attacked(cli, unhurt):
    """attacked(...) -> (status, output, error) of --attack on the unhurt run, into out."""
    return lambda *words: cli(
        "--evaluate", unhurt / "last.pt", "--device", "cpu", "--out", "out", *words
    )


def test_the_command_prints_and_writes_the_accuracy_of_each_attack(attacked, cli, unhurt):
    words = ("--attack", "pgd:4", "--attack", "fgsm:8,4", "--attack", "fgsm:0.5,4")
    status, out, err = attacked(*words)
    assert status == 0, err
    assert [path.name for path in Path("out").iterdir()] == ["attacks.json"]
    record = strict_json("out/attacks.json")
    results = record["results"]
    kinds = [("none", 0, 0), ("fgsm", 0.5, 1), ("fgsm", 4, 1), ("fgsm", 8, 1), ("pgd", 4, 20)]
    assert [(each["attack"], each["strength"], each["steps"]) for each in results] == kinds

    table = [line.split() for line in out.splitlines() if line.startswith(("none", *attacks.STEPS))]
    for (name, strength, _), each, row in zip(kinds, results, table, strict=True):
        share, z2 = each["correct"] / 32, 1.959964**2
        ends = sorted(100 * np.roots([1 + z2 / 32, -2 * share - z2 / 32, share**2]))
        assert each["images"] == 32 and each["top1"] == pytest.approx(100 * share)
        assert each["top1_95"] == pytest.approx(ends, abs=1e-3)
        shown = [each["top1"], *each["top1_95"]]
        top1, low, high = (f"{number:.2f}" for number in shown)
        loss = float(row.pop())
        assert row == [name, f"{strength:g}", top1, low, "to", high]
        assert loss == pytest.approx(each["loss"], abs=5.1e-5)

    plain = cli("--evaluate", unhurt / "last.pt", "--device", "cpu", "--out", "plain")
    evaluation = strict_json("plain/evaluation.json")
    assert plain[0] == 0 and plain[1].splitlines()[0] == out.splitlines()[0]
    for key in ("loss", "top1", "top1_95"):
        assert results[0][key] == evaluation[key]
    same = record.keys() - {"results", "command", "date"}
    assert {key: record[key] for key in same} == {key: evaluation[key] for key in same}
    assert (record["seed"], record["epoch"], record["images"]) == (0, 4, 32)
    assert record["command"].endswith("--attack fgsm:0.5,4")
    # one image of the 32 may go the other way
    correct = {(each["attack"], each["strength"]): each["correct"] for each in results}
    assert correct["pgd", 4] <= correct["fgsm", 4] + 1 and correct["fgsm", 8] < correct["none", 0]


def test_the_commands_losses_are_those_of_the_network_itself(attacked, unhurt, small_task):
    assert attacked("--attack", "fgsm:2,6", "--attack-images", 5)[0] == 0
    saved, (_, test) = content_of(unhurt), small_task.data.sample(None)
    model, chosen = load_model(saved).double(), evenly_spread(5, 32)
    images = test.images[chosen].permute(0, 3, 1, 2).double() / 255
    labels = test.labels[chosen]
    mean, std = (torch.tensor(saved[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    images.requires_grad_()
    logits = model((images - mean) / std)
    logits.log_softmax(1)[range(5), labels].sum().backward()
    for each in strict_json("out/attacks.json")["results"]:
        step = each["strength"] / 255 * images.grad.sign()
        with torch.no_grad():
            logits = model(((images - step).clip(0, 1) - mean) / std)
        loss = -logits.log_softmax(1)[range(5), labels].mean()
        assert each["loss"] == pytest.approx(loss.item(), rel=1e-3) and each["images"] == 5
        assert each["correct"] == (logits.argmax(1) == labels).sum()


def test_attack_images_takes_as_many_as_there_are(attacked):
    status, out, _ = attacked("--attack", "fgsm:1", "--attack-images", 5)
    assert status == 0 and "\n5 of 32 test images (" in out
    status, out, _ = attacked("--attack", "fgsm:1", "--attack-images", 99)
    assert status == 0 and "\n32 test images (" in out
    status, out, _ = attacked("--attack=fgsm:1", "--attack=pgd:1", "--attack-images=1")
    assert status == 0 and "\n1 of 32 test images (" in out and "gradients per image: 21\n" in out


def test_it_works_in_bf16(attacked):
    status, out, err = attacked("--attack", "fgsm:8", "--attack-images", 2, "--precision", "bf16")
    assert status == 0, err
    record = strict_json("out/attacks.json")
    before, after = (each["loss"] for each in record["results"])
    assert record["precision"] == "bf16" and after > before


def test_numbers_that_are_none_are_null(cli, unhurt):
    saved = content_of(unhurt)
    for state in filter(None, (saved["model"], saved["ema"])):
        next(tensor for name, tensor in state.items() if "classifier" in name).fill_(float("nan"))
    torch.save(saved, "nan.pt")
    status, out, err = cli("--evaluate", "nan.pt", "--device", "cpu", "--attack", "fgsm:1")
    assert status == 0 and " nan\n" in out, err
    assert [each["loss"] for each in strict_json("attacks.json")["results"]] == [None, None]


def test_a_file_of_somebody_elses_stays_and_ours_is_replaced(attacked):
    Path("out").mkdir()
    theirs = '{"software": "another", "results": []}'
    Path("out/attacks.json").write_text(theirs)
    for words in (["fgsm:1"], ["fgsm:1,2"]):
        status, out, _ = attacked("--attack", *words, "--attack-images", 1)
        assert status == 0 and "Written to out/attacks-2.json\n" in out
    assert {path.name for path in Path("out").iterdir()} == {"attacks.json", "attacks-2.json"}
    assert Path("out/attacks.json").read_text() == theirs
    assert len(strict_json("out/attacks-2.json")["results"]) == 3


def test_a_folder_that_takes_no_file_loses_no_numbers(attacked, monkeypatch):
    def fails(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("common.files.open", fails, raising=False)
    status, out, err = attacked("--attack", "fgsm:1", "--attack-images", 2)
    assert status == 1 and list(Path("out").iterdir()) == []
    assert re.search(r"^fgsm +1 ", out, re.M)
    assert err == (
        "error: out/attacks.json could not be written: Read-only file system. The results above "
        "are complete; --out FOLDER writes the files to another folder\n"
    )


def test_ctrl_c_ends_it_without_a_file(attacked, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_attacks, "evaluate", stop)
    assert attacked("--attack", "fgsm:1")[0] == 130 and not Path("out").exists()


def test_an_attack_is_a_name_and_strengths():
    assert options.attack_of("fgsm:4") == ("fgsm", (4.0,))
    assert options.attack_of("pgd:2,0.5,255") == ("pgd", (2.0, 0.5, 255.0))
    given = [("pgd", (4.0,)), ("fgsm", (8.0, 4.0)), ("fgsm", (0.5, 4.0))]
    assert evaluate_attacks.merged(given) == {"fgsm": [0.5, 4.0, 8.0], "pgd": [4.0]}
    wrong = ["fsgm:1", "fgsm", "fgsm:", "pgd:1,,2", "pgd:0", "pgd:-1", "fgsm:256", "fgsm:nan"]
    for text in (*wrong, "fgsm:inf", "fgsm:x", "FGSM:1", "1,2", "fgsm:1:2", "fgsm:" + "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text[:40]}: expected fgsm or pgd"):
            options.attack_of(text)


def test_a_wrong_attack_is_refused_with_an_example(cli, unhurt):
    status, out, err = cli("--evaluate", unhurt / "last.pt", "--attack", "fsgm:1")
    assert (status, out) == (2, "") and err.splitlines()[0].endswith(
        ": error: --attack: fsgm:1: expected fgsm or pgd and strengths above 0 and up to 255, "
        "for example fgsm:1,2,4"
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--attack", "fgsm:1"], "--attack goes with --evaluate"),
        (["--evaluate", "RUN", "--attack-images", "5"], "--attack-images goes with --attack"),
        (["--evaluate", "RUN", "--attack", "fgsm:1", "--attack-images", "0"], "0 is below 1"),
        (["--evaluate", "RUN", "--attack", "fgsm:1", "--sort", "name"], "leave out --sort"),
        (["--evaluate", "RUN", "--attack", "fgsm:1", "--export", "n.pt2"], "leave out --attack"),
        (["--evaluate", "RUN", "--attack", "fgsm:1", "--width", "1"], "leave out --width"),
        (["--evaluate", "RUN", "--attack", "fgsm:1", "--out", "file"], "file is not a folder"),
        (["--sanity", "--attack", "fgsm:1"], "--attack goes with --evaluate"),
    ],
)
def test_options_that_do_not_go_together(cli, unhurt, words, message):
    Path("file").write_text("mine")
    before = sorted(unhurt.iterdir())
    status, out, err = cli(*(unhurt / "last.pt" if word == "RUN" else word for word in words))
    assert (status, out) == (2, "") and message in err and "Traceback" not in err
    assert sorted(unhurt.iterdir()) == before and [path.name for path in Path().iterdir()] == [
        "file"
    ]
