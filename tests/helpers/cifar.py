"""CIFAR-100 and CIFAR-10 for tests of either: what loads it, and small files like the official
ones."""

import dataclasses
import pickle
import tarfile

import numpy as np

import data
from datasets import cifar, download
from tests.helpers import makers

OTHER = {"cifar100": "cifar10", "cifar10": "cifar100"}
# Images of each official file; the batches differ, so that their order shows.
COUNTS = {
    "cifar100": {"train": 6, "test": 4},
    "cifar10": {
        **{f"data_batch_{number}": count for number, count in enumerate((3, 1, 2, 4, 2), 1)},
        "test_batch": 4,
    },
}
KEYS = {"cifar100": ("fine_labels", "fine_label_names"), "cifar10": ("labels", "label_names")}
META = {"cifar100": "meta", "cifar10": "batches.meta"}


class Cifar:
    """One of the two data sets: its functions, and the archive that cifar.py looks for."""

    def __init__(self, name, monkeypatch):
        self.name, self.constant, self.monkeypatch = name, f"{name.upper()}_ARCHIVE", monkeypatch
        self.load, self.present = getattr(data, f"load_{name}"), getattr(data, f"{name}_present")

    @property
    def archive(self):
        return getattr(cifar, self.constant)

    def change(self, **changes):
        changed = dataclasses.replace(self.archive, **changes)
        self.monkeypatch.setattr(cifar, self.constant, changed)

    def read(self, root, **options):
        """What is there, without a download."""
        return self.load(root, download=False, progress=False, **options)

    def fails(self, root, *words, **options):
        return makers.fails(self.read, root, *words, **options)

    def make_folders(self, root, **options):
        return makers.make_folders(root, name=self.name, **options)

    def spelled(self, *names):
        """FOLDERS, UNPACKED and ARCHIVE as this data set has them, in title case where the word is;
        other names as they are."""
        spelling = {
            "FOLDERS": self.archive.class_folders,
            "UNPACKED": self.archive.folder,
            "ARCHIVE": self.archive.name,
        }
        spelling |= {word.title(): name.title() for word, name in spelling.items()}
        return [spelling.get(name, name) for name in names]

    def write_official(self, root):
        """A small archive like the official one in ``root``, its unpacked folder beside it.
        cifar.py is made to expect their md5 sums.

        Returns the archive's path and what it holds: (images (N, 32, 32, 3), labels) of train and
        of test."""
        rng, (labels_key, names_key) = np.random.default_rng(0), KEYS[self.name]
        contents = {META[self.name]: {names_key: ["ant", "bee", "cow"]}}
        parts = {"train": [], "test": []}
        for name, count in COUNTS[self.name].items():
            pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            labels = rng.integers(0, 3, count).tolist()
            planes = [[image[..., channel].ravel() for channel in range(3)] for image in pixels]
            contents[name] = {"data": np.array(planes).reshape(count, 3072), labels_key: labels}
            parts["test" if name.startswith("test") else "train"].append((pixels, labels))
        path = self._write(root, contents)
        return path, [
            (
                np.concatenate([pixels for pixels, _ in part]),
                sum((labels for _, labels in part), []),
            )
            for part in parts.values()
        ]

    def _write(self, root, contents):
        folder, path = root / self.archive.folder, root / self.archive.name
        folder.mkdir(parents=True)
        for name, content in contents.items():
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))  # as Python 2 has it
        with tarfile.open(path, "w:gz") as tar:
            # in another order than that of the images, as the official one is
            for name in sorted(contents, reverse=True):
                tar.add(folder / name, f"{folder.name}/{name}")
            # a member that would leave the folder, if anything were unpacked
            tar.add(folder / META[self.name], "../escaped")
        sums = {
            field: {name: download.md5_of(folder / name) for name in getattr(self.archive, field)}
            for field in ("train", "test", "meta")
        }
        self.change(md5=download.md5_of(path), **sums)
        return path
