"""Files that were damaged, by chance (seeded) or on purpose: each is read right, or refused in our own words."""
import random
import shutil

import pytest
import torch

import cub
from cub_sample import write_cub_sample
from image_files import DataError
from tests.test_training import trainer
from training import checkpoint
from training.options import UserError


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes with bits flipped, an end cut off, bytes put in, taken out, copied over others, or its end rewritten."""
    data, kind = bytearray(content), rng.randrange(6)
    place, length = rng.randrange(len(data)), rng.randint(1, 200)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 3, 20))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place:place] = rng.randbytes(min(length, 40))
    elif kind == 3:
        del data[place:place + length]
    elif kind == 4:
        other = rng.randrange(len(data))
        data[place:place + length] = data[other:other + length]
    else:   # a zip file has its directory there
        for _ in range(rng.randint(1, 4)):
            data[-rng.randint(1, min(len(data), 1500))] = rng.randrange(256)
    return bytes(data)


def test_a_thousand_damaged_checkpoints(tmp_path):
    torch.manual_seed(0)
    content = {"format": checkpoint.FORMAT, "model": {f"w{i}": torch.randn(3, 3) for i in range(4)}, "ema": None,
               "config": {"model": "vgg"}, "class_names": ["a", "b"], "input_size": [32, 32], "mean": [0.1] * 3,
               "std": [0.2] * 3, "position": {"epoch": 1}, "transferred": []}
    path, rng, read = tmp_path / "last.pt", random.Random(0), 0
    torch.save(content, path)
    whole = path.read_bytes()
    for _ in range(1000):
        path.write_bytes(damaged(whole, rng))
        try:
            found = checkpoint.read_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            read += 1
            assert all(torch.equal(found["model"][name], value) for name, value in content["model"].items())
    assert 20 < read < 300  # damage to what nobody reads, as time stamps
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("birds")
    write_cub_sample(folder, seed=0, classes=3, train_per_class=2, test_per_class=1)
    return folder


def test_a_thousand_damaged_metadata_files(birds, tmp_path):
    """Also that no image path leaves the folder, whatever the files say."""
    folder, rng, read = tmp_path / cub.CUB_FOLDER, random.Random(1), 0
    shutil.copytree(birds / cub.CUB_FOLDER, folder, ignore=shutil.ignore_patterns("*.jpg"))
    files = sorted(folder.rglob("*.txt"))
    originals = {path: path.read_bytes() for path in files}
    assert len(files) == 7
    for _ in range(1000):
        path = rng.choice(files)
        path.write_bytes(damaged(originals[path], rng))
        try:
            found, parts, class_names, part_names = cub.read_metadata(folder)
        except DataError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
        else:
            read += 1
            assert len(found) >= 3 and all(0 <= bird.label < len(class_names) for bird in found)
            assert all(folder / "images" in bird.path.parents and ".." not in bird.path.parts for bird in found)
        path.write_bytes(originals[path])
    assert 50 < read < 900
    assert sorted(folder.rglob("*.txt")) == files and [p.name for p in tmp_path.iterdir()] == [cub.CUB_FOLDER]


@pytest.mark.parametrize("change, message", [
    ({"config": {"model": "vgg-att9", "width": 1.0}}, "does not hold the network that its settings describe"),
    ({"config": "none"}, "is not a checkpoint of this project: its config is not what it should be"),
    ({"class_names": []}, "its class_names is not what it should be"),
    ({"class_names": [1, 2]}, "its class_names is not what it should be"),
    ({"input_size": [32]}, "its input_size is not what it should be"),
    ({"input_size": [10**9, 10**9]}, "its input_size is not what it should be"),
    ({"mean": [float("nan")] * 3}, "its mean is not what it should be"),
    ({"std": [0.0] * 3}, "its std is not what it should be"),
    ({"model": {}, "ema": {}}, "does not hold the network that its settings describe"),
    ({"model": {"x": "y"}, "ema": None}, "its model is not what it should be"),
])
def test_a_checkpoint_with_other_things_in_it(tmp_path, change, message):
    ours = trainer()
    content = ours.state() | {"format": checkpoint.FORMAT, "config": ours.config | {"trunk": ""},
                              "class_names": list("abcd"), "input_size": [32, 32], "mean": [0.1] * 3, "std": [0.3] * 3}
    torch.save(content, tmp_path / "last.pt")
    assert checkpoint.load_model(checkpoint.read_checkpoint(tmp_path / "last.pt"))(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    torch.save(content | change, tmp_path / "last.pt")
    with pytest.raises(UserError, match=message):
        checkpoint.load_model(checkpoint.read_checkpoint(tmp_path / "last.pt"))
