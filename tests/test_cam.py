"""cam.py as people use it: a network that has learned where to look, pictures of maps, and wrong
use."""

import csv
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cam
from data import cifar_sample, load_cifar100, load_cub
from datasets.augmentation import normalize
from datasets.cub_sample import write_cub_sample
from explain import measuring, methods
from explain.metrics import CENTER, UNIFORM
from tests.helpers.environment import ROOT
from tests.helpers.makers import first_lines, make_folders, torchvisions, untrained
from tests.helpers.runs import with_sample
from train_cifar100 import FAST, TASK
from train_cub import FAST as BIRDS
from training import commands

# ---- a network that has learned where to look ---------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An attention network and vgg-gap, trained on the sample for some seconds: name ->
    checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    sets = cifar_sample(classes=4, train_per_class=150, test_per_class=40)
    task = with_sample(TASK, lambda config: sets)
    for name in ("vgg-att3-concat-pc", "vgg-gap"):
        assert (
            commands.main(
                task,
                [
                    "--sample",
                    "--model",
                    name,
                    *(
                        "--width 0.0625 --epochs 3 --batch-size 16 --lr 0.04 --set muon=0.25 "
                        "--set lr_by_width=0 --set crop_pad=2 --seed 0 --device cpu "
                        "--precision fp32 --overlay-every 0 --run-dir"
                    ).split(),
                    str(folder / name),
                ],
            )
            == 0
        )
    return {name: folder / name / "last.pt" for name in ("vgg-att3-concat-pc", "vgg-gap")}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli("photo.png") -> (exit status, standard output, standard error), in an empty folder; with
    a small sample."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "MEASURED", 8)
    sets = cifar_sample(classes=4, train_per_class=150, test_per_class=40)
    monkeypatch.setitem(cam.SOURCES, "cifar100", with_sample(TASK, lambda config: sets).data)

    def call(*words):
        capsys.readouterr()
        return cam.main([str(word) for word in words]), *capsys.readouterr()

    return call


def rows_of(path):
    with open(path, newline="") as file:
        return {row["map"]: row for row in csv.DictReader(file)}


def test_maps_point_at_the_mark(cli, trained, capsys):
    """160 pictures that the networks have not seen, the marks' boxes unknown to them."""
    rows = {}
    for name, path in trained.items():
        status, out, _ = cli(
            "--checkpoint", path, "--dataset", "sample", "--measure", "--out", name
        )
        assert status == 0 and "160 test images" in out and "gradcam of the true class" in out
        rows[name] = rows_of(Path(name, "measures.csv"))
        with capsys.disabled():
            print("\n" + out[out.index(":") + 2 :])
    attention, pooled = rows["vgg-att3-concat-pc"], rows["vgg-gap"]
    assert list(attention) == ["conv7", "conv10", "conv13", "gradcam", UNIFORM, CENTER]
    assert float(attention[UNIFORM]["pointing_game"]) == pytest.approx(49 / 1024, abs=1e-4)
    assert (
        max(float(attention[level]["pointing_game"]) for level in ("conv7", "conv10", "conv13"))
        >= 0.8
    )
    assert (
        float(pooled["gradcam"]["pointing_game"]) >= 0.8 and pooled["cam"]["pointing_game"] >= "0.8"
    )
    assert (
        float(pooled["gradcam"]["max_box_acc_v2"])
        > 0.3
        > float(attention[CENTER]["max_box_acc_v2"])
    )


# ---- the command line ---------------------------------------------------------------------------


@pytest.fixture
def ours_on_disk(tmp_path):
    return untrained(
        tmp_path / "net.pt",
        "vgg-att2-concat-dp",
        FAST,
        "cifar100",
        ["apple", "pear", "sweet_pepper"],
    )


MEASURED_FILES = {"measures.csv", "faithfulness.csv", "curves.csv", "curves.png"}


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_files_of_any_mode_and_size(cli, ours_on_disk, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(noise(50, 80, 1)).save(photos / "grey.png")
    Image.fromarray(noise(50, 80, 4)).save(photos / "rgba.png")
    Image.fromarray(noise(50, 80)).quantize(16).save(photos / "palette.gif", transparency=3)
    Image.fromarray(noise(1, 3000)).save(photos / "line.png")
    Image.fromarray(noise(1, 1)).save(photos / "dot.png")
    Image.fromarray(noise(1400, 900)).save(photos / "large.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(noise(48, 96)).save(photos / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(noise(48, 96)).convert("CMYK").save(photos / "cmyk.jpg")
    (photos / "notes.txt").write_text("no image")
    (photos / ".hidden.png").write_text("no image")
    status, out, err = cli("--checkpoint", ours_on_disk, photos, "--out", "maps", "--raw")
    assert status == 0 and err == "" and "8 images done" in out
    assert "cam skipped: " in out and "use gradcam" in out and "gradcam at trunk.block5" in out
    assert re.search(r"photos/turned\.jpg: \w+ \d+\.\d %, \w+ \d+\.\d %, \w+ \d+\.\d %$", out, re.M)
    sizes = {
        name: Image.open(tmp_path / "maps" / f"{name}-conv13.png").size
        for name in ("grey", "line", "dot", "large", "turned")
    }
    assert sizes == {
        "grey": (400, 250),
        "line": (1024, 1),
        "dot": (224, 224),
        "large": (658, 1024),
        "turned": (240, 480),
    }
    assert sorted(p.name for p in (tmp_path / "maps").glob("grey*")) == sorted(
        f"grey-{name}"
        for name in (
            "conv10.png",
            "conv10.npy",
            "conv13.png",
            "conv13.npy",
            "gradcam.png",
            "gradcam.npy",
            "sheet.png",
        )
    )
    raw = np.load(tmp_path / "maps" / "turned-conv10.npy")
    assert raw.shape == (32, 32) and raw.dtype == np.float32 and raw.min() >= 0 and raw.max() == 1


def test_the_network_sees_the_picture_as_in_training_and_the_map_lies_over_it(
    cli, tmp_path, monkeypatch
):
    """A squashed photo goes in normalised, and a spot comes out over the place where it was."""
    path = untrained(tmp_path / "net.pt", "vgg-gap", FAST, "cifar100", ["a", "b"])
    pixels, seen = noise(40, 90), []
    Image.fromarray(pixels).save("photo.png")

    def spot(model, batch, columns, names, layers):
        seen.append(batch)
        maps = torch.zeros(len(batch), 32, 32)
        maps[:, 8, 24] = 1
        return {layers[0]: {"gradcam": [maps]}}

    monkeypatch.setattr(methods, "raw_gradient_maps", spot)
    assert (
        cli("--checkpoint", path, "photo.png", "--method", "gradcam", "--opacity", 1, "--out", ".")[
            0
        ]
        == 0
    )
    small = torch.from_numpy(
        np.array(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    )
    torch.testing.assert_close(seen[-1].cpu(), normalize(small[None], [0.5] * 3, [0.25] * 3))
    shown = np.asarray(Image.open("photo-gradcam.png")).astype(int).sum(2)
    assert shown.shape == (240, 540)  # six times as large
    y, x = np.argwhere(shown == shown.max()).mean(0)
    assert (y / 240, x / 540) == pytest.approx((8.5 / 32, 24.5 / 32), abs=0.01)


def test_bad_images_are_told_and_the_rest_is_done(cli, ours_on_disk, tmp_path):
    Image.fromarray(noise(64, 64)).save("good.png")
    whole = Path("good.png").read_bytes()
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    Path("text.jpg").write_text("hello")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save("deep.png")
    Path("empty").mkdir()
    status, out, err = cli(
        "--checkpoint", ours_on_disk, *"cut.png text.jpg gone.png deep.png empty good.png".split()
    )
    assert status == 1 and "1 image done, 5 files in runs/cam" in out
    for name, reason in (
        ("cut.png", "truncated"),
        ("text.jpg", "not an image"),
        ("gone.png", "No such file"),
        ("deep.png", "more than 8 bits"),
        ("empty", "holds no images"),
    ):
        assert len([line for line in err.splitlines() if name in line and reason in line]) == 1, err
    assert "5 of the inputs could not be used" in err and Path("runs/cam/good-sheet.png").exists()


def test_no_input_is_overwritten_and_names_do_not_clash(cli, ours_on_disk):
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Image.fromarray(noise(32, 32)).save(Path(folder, "photo.png"))
        Image.fromarray(noise(32, 32)).save(Path(folder, "photo-conv10.png"))
    Path("a", "link-sheet.png").symlink_to("photo.png")
    Image.fromarray(noise(32, 32)).save(Path("a", "link.bmp"))
    before = {path: path.read_bytes() for path in Path().glob("[ab]/*")}
    status, out, _ = cli("--checkpoint", ours_on_disk, "a", "b", "--out", "a")
    assert status == 0 and "6 images done, 25 files in a" in out
    assert re.search(r"^b/photo\.png: .*   \(written as photo-3\)$", out, re.M)
    assert len(list(Path("a").iterdir())) == 4 + 25
    assert all(path.read_bytes() == content for path, content in before.items())
    assert Path("a/link-sheet.png").is_symlink()
    assert Path("a/photo-2-conv10.png").exists() and Path("a/photo-3-sheet.png").exists()


def test_training_and_cam_see_the_same_picture(cli, tmp_path, monkeypatch):
    """A phone's photo that lies on its side, one with hidden colors behind what is transparent, a
    large one in CMYK, ..."""
    exif, hidden = Image.Exif(), np.where(noise(40, 40, 1) > 127, 255, 0).astype(np.uint8)
    exif[0x0112] = 6
    Path("photos").mkdir()
    Image.fromarray(noise(48, 96)).save("photos/turned.jpg", exif=exif)
    Image.fromarray(np.dstack([noise(40, 40), hidden])).save("photos/transparent.png")
    Image.fromarray(noise(300, 200)).convert("CMYK").save("photos/cmyk.jpg")
    Image.fromarray(noise(30, 30)).quantize(16).save("photos/palette.gif", transparency=3)
    for split in ("train", "test"):
        shutil.copytree("photos", f"data/cifar100/{split}/a")
        shutil.copytree("photos", f"data/cifar100/{split}/b")
    stored = load_cifar100("data", image_size=32)[0].images[:4]
    seen, network = [], untrained(tmp_path / "net.pt", "vgg-gap", FAST, "cifar100", ["a", "b"])
    batch = cam.TrainedNetwork.batch
    monkeypatch.setattr(
        cam.TrainedNetwork,
        "batch",
        lambda self, images: (seen.append(images), batch(self, images))[1],
    )
    assert cli("--checkpoint", network, "photos")[0] == 0
    assert np.array_equal(seen[0], stored)
    assert Image.open("runs/cam/turned-gradcam.png").size == (240, 480)


def test_what_is_passed_over_in_a_folder_is_said(cli, ours_on_disk):
    Path("photos").mkdir()
    for name in ("a.png", "b.JFIF", "c.jp2"):
        Image.fromarray(noise(32, 32)).save(Path("photos", name))
    Path("photos/IMG.HEIC").write_bytes(b"not for Pillow")
    Path("photos/more").mkdir()
    status, out, err = cli("--checkpoint", ours_on_disk, "photos")
    assert status == 0 and "3 images done" in out, err
    assert (
        "photos: passed over 2 of 5 names without an ending of an image format that Pillow reads "
        "here (1 .heic, 1 a "
        "folder): IMG.HEIC, more/\n"
    ) in out
    status, _, err = cli("--checkpoint", ours_on_disk, "photos/IMG.HEIC")  # named: tried, and told
    assert status == 1 and "error: photos/IMG.HEIC cannot be read as an image (not an image)" in err


def test_pictures_beside_their_photos_are_not_taken_for_photos(cli, ours_on_disk):
    Path("photos").mkdir()
    Image.fromarray(noise(32, 32)).save("photos/a.png")
    made = None
    for _ in range(2):
        status, out, err = cli("--checkpoint", ours_on_disk, "photos", "--out", "photos")
        assert status == 0 and "1 image done, 5 files in photos" in out, err
        made = made or {path.name for path in Path("photos").iterdir()}
        assert {path.name for path in Path("photos").iterdir()} == made
    assert f"photos: passed over {len(made) - 2} of cam.py's own pictures\n" in out


def test_names_that_are_long_or_in_another_encoding(cli, ours_on_disk):
    names = [
        os.fsdecode(b"caf\xe9"),
        "caf\u00e9" * 40,
        "\U0001f426" * 60,
        "n" * 250,
        "line\nbreak",
        "-x",
    ]
    for name in names:
        Image.fromarray(noise(32, 32)).save(Path(f"./{name}.png"))
    status, out, err = cli(
        "--checkpoint", ours_on_disk, ".", "--out", os.fsdecode(b"ma\xeeps"), "--raw"
    )
    assert (
        status == 0
        and err == ""
        and f"{len(names)} images done" in out
        and r"files in ma\xeeps" in out
    )
    assert len(list(Path(os.fsdecode(b"ma\xeeps")).iterdir())) == len(names) * 7 + 1
    assert r"caf\xe9.png: " in out and r"line\nbreak.png: " in out


def test_a_closed_pipe_stops_no_pictures(trained, tmp_path):
    """... | head -1: every picture is made all the same."""
    for name in ("photo.png", "other.png"):
        Image.fromarray(noise(32, 32)).save(tmp_path / name)
    start = [str(ROOT / "cam.py"), "--checkpoint", str(trained["vgg-gap"])]
    assert (
        first_lines(
            [
                [*start, "--measure", "--dataset", "sample", "--index", "0,1", "--out", "m"],
                [*start, "photo.png", "other.png", "--out", "p"],
                [*start, "--list-layers"],
            ],
            tmp_path,
        )
        == [(0, 1, "")] * 3
    )
    assert {path.name for path in tmp_path.glob("m/*")} == MEASURED_FILES
    assert {path.name for path in tmp_path.glob("p/*")} == {
        "predictions.csv",
        *(f"{n}-{what}.png" for n in ("photo", "other") for what in ("cam", "gradcam", "sheet")),
    }


def test_the_data_folder_is_the_checkpoints_and_nothing_is_downloaded(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.cifar.fetch", None)  # a call would fail
    make_folders(tmp_path / "photos", classes=("a", "b"), size=(32, 32))
    path = untrained(
        tmp_path / "net.pt", "vgg-gap", FAST | {"data_dir": "photos"}, "cifar100", ["a", "b"]
    )
    words = ["--checkpoint", path, "--dataset", "cifar100", "--num-workers", 0]
    assert cli(*words, "--index", "0")[0] == 0
    Path("photos").rename("moved")
    status, _, err = cli(*words)
    assert status == 1 and f"are not in {tmp_path / 'photos'}: give --data-dir" in err
    assert cli(*words, "--data-dir", "moved", "--index", "0")[0] == 0


def test_empty_words_and_home_folders(cli, ours_on_disk, tmp_path, monkeypatch):
    Image.fromarray(noise(32, 32)).save("photo.png")
    for option in (
        "--checkpoint",
        "--out",
        "--data-dir",
        "--index",
        "--target",
        "--layer",
        "--arch",
        "--weights",
        "--method",
    ):
        for words in ([option, ""], [f"{option}="]):
            status, _, err = cli("--checkpoint", ours_on_disk, "photo.png", *words)
            assert status == 2 and f"error: {option} is empty\n" in err
    status, _, err = cli("--checkpoint", ours_on_disk, "photo.png", "")
    assert status == 2 and "error: an argument is empty" in err
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("net.pt", "photo.png"):
        shutil.copy(name, "home")
    assert cli("--checkpoint=~/net.pt", "~/photo.png", "--out=~/maps")[0] == 0
    assert Path("home/maps/photo-sheet.png").exists() and not Path("~").exists()
    status, _, err = cli("--checkpoint", ours_on_disk, "photo.png", "--out=~nosuchuser/maps")
    assert (
        status == 2
        and "error: --out: ~nosuchuser/maps: there is no home folder for ~nosuchuser" in err
    )
    status, _, err = cli("--checkpoint", ours_on_disk, "photo.png", "--out", "photo.png")
    assert status == 2 and "--out photo.png is a file, not a folder" in err
    for words in (
        ["--index", "9" * 5000],
        ["--index", "1-" + "9" * 5000],
        ["--num-workers", "9" * 20],
        ["--top-k", "9" * 30],
    ):
        assert cli("--checkpoint", ours_on_disk, "--dataset", "sample", *words)[0] == 2
    assert cli("--checkpoint", ours_on_disk, "photo.png", "--target", "9" * 5000)[0] == 2
    assert not Path("runs").exists()


def test_data_set_selection_targets_and_top_k(cli, trained):
    path = trained["vgg-gap"]
    status, out, err = cli(
        "--checkpoint",
        path,
        *"--dataset sample --index 3,0-2 --top-k 2 --out a --colours viridis --opacity 0.3".split(),
    )
    assert status == 0, err
    assert "4 of 160 test images" in out and "attention skipped" in out
    seen = re.findall(r"^sample-test (\d): (\w+|letter-\w) ", out, re.M)
    assert [number for number, _ in seen] == ["3", "0", "1", "2"]
    names = {p.name for p in Path("a").iterdir()}
    assert names == {
        f"sample-test-0000{i}-{what}.png"
        for i in range(4)
        for what in ("cam", "cam-2", "gradcam", "gradcam-2", "sheet")
    } | {"sample-test-sheet.png", "predictions.csv"}
    status, out, _ = cli(
        "--checkpoint",
        path,
        *"--dataset sample --index 0 --target CROSS --out b --method cam".split(),
    )
    assert status == 0 and "cross" in out and len(list(Path("b").iterdir())) == 3
    status, *_ = cli(
        "--checkpoint", path, *"--dataset sample --index 0 --target 2 --out c --method cam".split()
    )
    assert status == 0
    assert (
        Path("b/sample-test-00000-cam.png").read_bytes()
        == Path("c/sample-test-00000-cam.png").read_bytes()
    )
    assert (
        Path("b/sample-test-00000-cam.png").read_bytes()
        != Path("a/sample-test-00000-cam.png").read_bytes()
    )


def test_sets_go_through_in_one_batch(cli, trained, monkeypatch):
    calls, method = [], methods.raw_gradient_maps
    monkeypatch.setattr(
        methods,
        "raw_gradient_maps",
        lambda model, batch, *rest: (calls.append(len(batch)), method(model, batch, *rest))[1],
    )
    assert cli("--checkpoint", trained["vgg-gap"], "--dataset", "sample", "--measure")[0] == 0
    # the first asks whether the method applies; then the true classes, and the predicted ones
    assert calls == [1, 160, 8]


def test_birds_are_measured_on_whole_pictures_part_by_part(cli, tmp_path):
    write_cub_sample(tmp_path / "data", seed=1, classes=3, train_per_class=2, test_per_class=3)
    path = untrained(
        tmp_path / "net.pt",
        "vgg-att3-concat-pc",
        BIRDS,
        "cub",
        ["ring", "plus", "cross"],
        size=48,
    )
    status, out, err = cli(
        "--checkpoint", path, "--dataset", "cub", "--measure", "--num-workers", 0
    )
    assert status == 0, err
    _, test = load_cub(tmp_path / "data", image_size=round(48 * 8 / 7), crop="whole")
    share = ((test.boxes[:, 2:] - test.boxes[:, :2]).prod(1) / 55**2).mean().item()
    rows, parts = rows_of("runs/cam/measures.csv"), rows_of("runs/cam/parts.csv")
    assert (
        float(rows[UNIFORM]["energy_in_box"]) == pytest.approx(share, abs=0.01)
        and 0.2 < share < 0.4
    )
    for row in parts.values():
        assert float(row["eye"]) + float(row["mark"]) + float(row["tail"]) == pytest.approx(
            1, abs=2e-4
        )
    assert (
        list(parts) == list(rows)
        and "peak nearest to, %" in out
        and "chosen with their boxes" in out
    )
    status, out, _ = cli(
        "--checkpoint", path, *"--dataset cub --index 0-2 --num-workers 0 --out boxes".split()
    )
    assert status == 0 and "3 of 9 test images" in out  # cut out as in training
    assert Image.open("boxes/cub-test-00000-conv7.png").size == (275, 275)


def test_cifar_100_selection(cli, ours_on_disk, tmp_path):
    for split in ("train", "test"):
        for label in ("apple", "pear", "sweet_pepper"):
            folder = tmp_path / "data" / "cifar100" / split / label
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(noise(32, 32)).save(folder / f"{i}.png")
    status, out, err = cli(
        "--checkpoint", ours_on_disk, "--dataset", "cifar100", "--index", "0,5", "--num-workers", 0
    )
    assert status == 0 and "2 of 6 test images" in out, err
    assert {p.name[:19] for p in Path("runs/cam").iterdir()} == {
        "cifar100-test-00000",
        "cifar100-test-00005",
        "cifar100-test-sheet",
        "predictions.csv",
    }


def test_weights_of_your_own_for_torchvisions(cli, monkeypatch):
    model = torchvisions("resnet18", torch.float32, classes=3)
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}},
        "mine.pth",
    )
    Image.fromarray(noise(60, 90)).save("photo.png")
    status, out, err = cli(
        "--arch", "resnet18", "--weights", "mine.pth", "photo.png", "--out", "o", "--raw"
    )
    assert status == 0, err
    assert "gradcam at layer4" in out and "class 2" in out and "attention skipped" in out
    assert np.abs(np.load("o/photo-cam.npy") - np.load("o/photo-gradcam.npy")).max() < 1e-3
    status, out, _ = cli("--arch", "resnet18", "--weights", "mine.pth", "--list-layers")
    assert (
        status == 0
        and re.search(r"^layer4 +512 x 7 x 7   \(default, blocks\)$", out, re.M)
        and "layer3.0.conv1" in out
    )
    status, _, err = cli("--arch", "resnet34", "--weights", "mine.pth", "photo.png")
    assert status == 1 and "does not fit torchvision's resnet34" in err

    def offline(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    status, _, err = cli("--arch", "resnet18", "--weights", "DEFAULT", "photo.png")
    assert (
        status == 1 and "https://download.pytorch.org/models/resnet18" in err and "put it at" in err
    )


class Code:
    def __reduce__(self):
        return exec, ("open('executed', 'w')",)


def test_files_that_are_no_checkpoints_are_refused(cli, ours_on_disk):
    Image.fromarray(noise(32, 32)).save("photo.png")
    Path("cut.pt").write_bytes(ours_on_disk.read_bytes()[:5000])
    torch.save({"model": 1}, "other.pt")
    torch.save(Code(), "code.pt")
    Path("code.pkl").write_bytes(pickle.dumps(Code()))
    for name, message in (
        ("cut.pt", "cut short"),
        ("other.pt", "not a checkpoint of this project"),
        ("photo.png", "no checkpoint"),
        ("code.pt", "is refused"),
        ("gone.pt", "no such file"),
    ):
        status, _, err = cli("--checkpoint", name, "photo.png")
        assert status == 1 and message in err and len(err.splitlines()) <= 2
    for name in ("code.pt", "code.pkl", "photo.png", "cut.pt"):
        status, _, err = cli("--arch", "resnet18", "--weights", name, "photo.png")
        assert status == 1 and len(err.splitlines()) <= 2
        assert "refused" in err or f"{name} could not be read" in err
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--target", "pare"], "there is no such class; nearest: pear"),
        (["--target", "3"], "numbered 0 to 2"),
        (["--layer", "trunk.block6"], "no layer 'trunk.block6'; it has trunk.block"),
        (["--layer", "global_branch.linear"], "gives (1, 32)"),
        (["--method", "cam"], "--method cam: this network does not end in average pooling"),
        (["--method", "attention", "--layer", "x"], "--layer is for gradcam"),
        (
            ["--method", "attention", "--method", "cam", "--layer", "x"],
            "not for --method attention",
        ),
        (["--query", "photo.png", "--method", "gradcam"], "--query is for attention maps"),
        (["--measure", "--query", "photo.png"], "leave --query out"),
        (["--measure", "--class-names", "names.txt"], "leave --class-names out"),
        (["--format", "jpeg"], "invalid choice 'jpeg' (did you mean jpg?)"),
        (["--scale", "0"], "--scale"),
        (["--target", "pear", "--top-k", "2"], "not allowed with"),
        (["--opacity", "2"], "not between 0 and 1"),
        (["--dataset", "sample"], "not both"),
        (["--arch", "resnet18"], "name one network"),
        (["--index", "0"], "are for a --dataset"),
        (["--meth", "cam"], "unrecognized option --meth (did you mean --method?)"),
    ],
)
def test_wrong_use_exits_with_2(cli, ours_on_disk, words, message):
    Image.fromarray(noise(32, 32)).save("photo.png")
    status, _, err = cli("--checkpoint", ours_on_disk, "photo.png", *words)
    assert status == 2 and message in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--dataset", "sample", "--index", "5-3"], "expected numbers and ranges"),
        (["--dataset", "sample", "--index", "160"], "there are 160 images, numbered from 0"),
        (["--dataset", "sample", "--measure", "--top-k", "2"], "--measure chooses the class"),
        (["--dataset", "cub", "--data-dir", "gone/data"], "gone/data does not exist"),
        ([], "name images"),
    ],
)
def test_wrong_selections(cli, ours_on_disk, words, message):
    status, _, err = cli("--checkpoint", ours_on_disk, *words)
    assert status == (1 if "gone/data" in words else 2) and message in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--arch", "resnet19", "--weights", "DEFAULT"], "no such classifier; nearest: resnet1"),
        (["--arch", "resnet18"], "needs weights: --weights DEFAULT"),
        (
            ["--arch", "resnet18", "--weights", "V9"],
            "neither a file nor weights of torchvision's resnet18",
        ),
        (["--weights", "x.pth"], "name one network"),
    ],
)
def test_wrong_networks(cli, words, message):
    status, _, err = cli(*words, "photo.png")
    assert status == 2 and message in err
