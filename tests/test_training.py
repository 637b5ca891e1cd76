"""The loop, the optimizer's side and the checkpoints, against independent few-line references."""

import errno
import math
import os
import pickle
import platform
import subprocess
import sys
import textwrap
import types
import zipfile

import pytest
import torch

from attention_model import build_model
from common.checkpoint import FORMAT, load_model, read_checkpoint
from common.device import (
    Precision,
    choose_compile,
    choose_precision,
    persist_compile_cache,
)
from common.errors import UserError, is_oom_error
from data import cifar_sample
from tests.helpers.trainers import CONFIG, CPU, Batches, make_trainer
from training import checkpoint, run
from training import trainer as trainer_module
from training.evaluation import evaluate
from training.ranks import Ranks
from training.trainer import split_micro_batches

# ---- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_bf16, expected", [(True, "bf16"), (False, "fp32")])
def test_auto_precision_on_a_cpu(monkeypatch, has_bf16, expected):
    monkeypatch.setattr("common.device.cpu_has_bf16", lambda: has_bf16)
    assert choose_precision("auto", CPU) == expected
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", CPU)


@pytest.mark.parametrize(
    "name, native, expected",
    [
        ("NVIDIA H100 80GB HBM3", True, "bf16"),
        ("NVIDIA GeForce RTX 2080 Ti", False, "fp16"),
        ("NVIDIA GeForce GTX 1080 Ti", False, "fp16"),
        ("NVIDIA GeForce GTX 1660 Ti", False, "fp32"),
    ],
)
def test_auto_precision_on_a_gpu(monkeypatch, name, native, expected):
    """Turing and older emulate bf16: emulation must not count. GTX 16xx give NaN in fp16."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    assert choose_precision("auto", torch.device("cuda")) == expected


def test_bf16_runs_and_its_maps_are_float32():
    ours = make_trainer()
    ours.precision = Precision("bf16", CPU)
    images, labels = ours.batches.all[0]
    ours.model.train()
    ours.step(images, labels)
    assert math.isfinite(ours.checked_loss())
    with ours.precision.context():
        logits, maps = ours.model.eval()(images, return_attention=True)
    assert logits.dtype == torch.bfloat16 and {m.dtype for m in maps.values()} == {torch.float32}
    for attention_map in maps.values():
        torch.testing.assert_close(attention_map.sum((1, 2)), torch.ones(8))


def test_compiling_and_checkpointing_where_the_statistics_would_be_wrong(monkeypatch):
    assert not choose_compile("auto", CPU, False)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    assert choose_compile(True, CPU, False) and not choose_compile(False, CPU, True)
    with pytest.raises(UserError, match="wrong batch-norm statistics in PyTorch 2.6.0"):
        choose_compile(True, CPU, True)


# ---- micro-batches ------------------------------------------------------------------------------


def test_where_compiled_code_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    persist_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    persist_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(
        tmp_path / "cache" / "learn-to-pay-attention"
    )
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made there
    persist_compile_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc"
    or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35),
    reason="asks glibc's malloc, which took no such setting before 2.35",
)
def test_large_blocks_are_kept_from_one_step_to_the_next():
    """In a process of its own: what is free in this one's heap by now would count."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent("""
        import ctypes, torch
        from common.device import tune_malloc
        libc = ctypes.CDLL(None)

        class Mallinfo(ctypes.Structure):
            _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                             "fsmblks", "uordblks", "fordblks", "keepcost")]
        libc.mallinfo2.restype = Mallinfo
        blocks = [torch.empty(10 * 2**20) for _ in range(6)]    # 40 MiB each
        assert libc.mallinfo2().hblks >= 6      # each mapped on its own: given back when it is freed
        del blocks
        tune_malloc()
        mapped = libc.mallinfo2().hblks
        blocks = [torch.empty(10 * 2**20) for _ in range(6)]
        heap = libc.mallinfo2().arena
        assert libc.mallinfo2().hblks == mapped and heap >= 240 * 2**20
        del blocks
        assert libc.mallinfo2().arena >= heap
        """),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_parts_are_near_equal_and_none_is_a_single_image_unless_asked_for():
    for count in range(2, 40):
        for micro_batch in [None, *range(1, 45)]:
            parts = [
                len(p)
                for p, _ in split_micro_batches(
                    torch.arange(count), torch.arange(count), micro_batch
                )
            ]
            assert sum(parts) == count and max(parts) - min(parts) <= 1
            assert min(parts) >= (1 if micro_batch == 1 else 2)
            # 3: an odd batch by twos
            assert max(parts) <= (1 if micro_batch == 1 else max(micro_batch or count, 3))


@pytest.mark.parametrize(
    "batch, ranks, micro_batch", [(128, 3, 14), (128, 3, 43), (10, 4, 1), (10, 4, 2), (9, 2, 3)]
)
def test_every_rank_makes_as_many_parts(batch, ranks, micro_batch):
    """Where shares are uneven too: a rank that made a part more would wait in its SyncBatchNorm for
    ever."""
    sizes = [len(range(batch)[Ranks(rank, ranks, rank).share(batch)]) for rank in range(ranks)]
    parts = [
        [
            len(part)
            for part, _ in split_micro_batches(
                torch.arange(size),
                torch.arange(size),
                micro_batch,
                (batch // ranks, -(-batch // ranks)),
            )
        ]
        for size in sizes
    ]
    assert sum(sizes) == batch and len(set(map(len, parts))) == 1 and min(map(min, parts)) > 0


def test_a_compiler_that_fails_does_not_end_the_run(capsys):
    ours, reference = make_trainer(dropout=0.0), make_trainer(dropout=0.0)

    def broken(images):
        raise ImportError("Python.h: no such file")

    ours.run_model, ours.compile_is_optional = broken, True
    for each in (ours, reference):
        each.step(*each.batches.all[0])
    assert ours.run_model is ours.parallel
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.model.parameters(), reference.model.parameters(), strict=True)
    )
    assert capsys.readouterr().out.startswith(
        "torch.compile failed (Python.h: no such file): training without it"
    )
    ours.run_model = broken  # asked for by --compile
    with pytest.raises(ImportError):
        ours.step(*ours.batches.all[0])


def test_micro_batches_give_the_gradient_of_the_batch():
    """With batch norm in evaluation mode every image stands for itself, so the sums must agree to
    rounding."""
    gradients = []
    for micro_batch in (None, 3):
        ours = make_trainer(model="vgg-gap")
        ours.model.double().eval()
        ours.micro_batch = micro_batch
        images, labels = ours.batches.all[0]
        ours.gradients(images.double(), labels)
        gradients.append([p.grad.clone() for p in ours.model.parameters()])
        assert ours.images_summed == 8
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)  # the loss itself is in float32


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError("no room"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_halves_the_micro_batch_and_repeats_the_whole_step(capsys, error):
    ours, reference = make_trainer(dropout=0.0), make_trainer(dropout=0.0, micro_batch=2)
    sizes = []

    def scarce(images):
        sizes.append(len(images))
        if len(images) > 2:
            raise error
        return ours.model(images)

    ours.run_model = scarce
    for each in (ours, reference):
        each.model.train()
        each.step(*each.batches.all[0])
    assert sizes == [8, 4, 2, 2, 2, 2] and ours.micro_batch == 2
    for a, b in zip(ours.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "continuing with --micro-batch 2" in capsys.readouterr().out
    assert ours.state()["micro_batch"] == 2
    ours.run_model = lambda images: (_ for _ in ()).throw(error)
    with pytest.raises(
        UserError,
        match="out of memory at 1 image at once.*peak [0-9]+ MiB.*\nTry, in this order: "
        "--checkpoint-activations, --set trunk=pooled, a smaller --image-size$",
    ):
        ours.step(*ours.batches.all[1])


# ---- looks at the loss, evaluation --------------------------------------------------------------


def test_what_may_be_out_of_memory_is_so_on_a_full_gpu_only(monkeypatch):
    vague = RuntimeError("GET was unable to find an engine to execute this computation")
    assert not is_oom_error(vague) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 2**30, 11 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * 2**30)
    for reserved, full in ((8 * 2**30, True), (9 * 2**30, False)):  # 5 and 6 of 11 GiB to be had
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
        assert is_oom_error(vague) is full
        assert not is_oom_error(RuntimeError("a mistake of ours"))


def test_when_the_loss_is_looked_at(monkeypatch):
    """On a GPU once a second, as a look waits for it; several ranks at the same steps; on a CPU
    always."""
    ours, now = make_trainer(), [100.0]
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: now[0])
    assert ours.sync_due(1, looked=100.0)
    ours.device = torch.device("cuda")
    assert not ours.sync_due(20, looked=99.5) and ours.sync_due(7, looked=98.9)
    ours.ranks = Ranks(0, 2, 0)
    assert [step for step in range(1, 50) if ours.sync_due(step, looked=0.0)] == [20, 40]


def test_saving_is_not_counted_as_training(monkeypatch):
    ours, clock = make_trainer(), [0.0]
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: clock[0])

    def passes(seconds):
        clock[0] += seconds

    ours.step = lambda *batch: passes(2.0)
    ours.train_epoch(on_check=lambda step, loss: passes(100.0))
    assert ours.position.seconds == 3 * 2


def test_a_resumed_micro_batch(capsys):
    """The one that a run came to when memory ran out is kept; one that was asked for is not, when
    --micro-batch is auto."""
    for before, now, kept in (("auto", "auto", 4), (4, "auto", None), ("auto", 2, 2), (4, 2, 2)):
        ours, state = make_trainer(micro_batch=now), make_trainer(micro_batch=before).state()
        ours.load_state(state | {"micro_batch": 4, "config": {"micro_batch": before}})
        assert ours.micro_batch == kept


def test_a_loss_that_is_not_finite_names_epoch_and_step():
    batches = Batches()
    batches.all[1][0][3, 0, 5, 5] = float("nan")
    ours = make_trainer(batches)
    ours.position.epoch = 1
    with pytest.raises(UserError, match=r"not finite at epoch 2, step 2 of 3(.|\n)*lower --lr"):
        ours.train_epoch()


def test_evaluation_against_a_loop_over_images():
    torch.manual_seed(3)
    model = build_model("vgg-gap", 7, width=1 / 16).train()
    images, labels = torch.randn(11, 3, 32, 32), torch.randint(7, (11,))
    batches = [(images[i : i + 4], labels[i : i + 4]) for i in range(0, 11, 4)]
    result = evaluate(model, batches, 7, Precision("fp32", CPU))
    assert model.training
    model.eval()
    with torch.no_grad():
        ranks = [
            (model(x[None])[0].argsort(descending=True) == y).nonzero().item()
            for x, y in zip(images, labels, strict=True)
        ]
        loss = (
            sum(
                -model(x[None])[0].log_softmax(0)[y].item()
                for x, y in zip(images, labels, strict=True)
            )
            / 11
        )
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.top1 == pytest.approx(100 * sum(r == 0 for r in ranks) / 11)
    assert result.top5 == pytest.approx(100 * sum(r < 5 for r in ranks) / 11)
    assert result.class_counts == torch.bincount(labels, minlength=7).tolist()
    assert sum(result.class_correct) == sum(r == 0 for r in ranks)


def test_a_short_training_learns_the_sample():
    """Real training on the generated sample: far above chance (25 %), no level dead, maps that are
    not flat."""
    from data import Augmentation, TrainBatches

    train, test = cifar_sample(classes=4, train_per_class=100, test_per_class=25)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    batches = TrainBatches(
        train,
        20,
        seed=0,
        augmentation=Augmentation(mean=mean, std=std, pad=2, flip=False),
        device="cpu",
    )
    ours = make_trainer(batches, model="vgg-att2-concat-pc", width=0.125, epochs=3, lr=0.05)
    from data import eval_batches

    for _ in range(3):
        ours.train_epoch()
        ours.next_epoch()
    result = evaluate(
        ours.eval_model, eval_batches(test, CPU, mean, std, (32, 32)), 4, ours.precision
    )
    assert result.top1 > 50, result


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A run folder with two checkpoints, the content of the last, and its path."""
    ours = make_trainer()
    content = {
        "format": FORMAT,
        **ours.state(),
        "config": CONFIG | {"trunk": ""},
        "class_names": list("abcd"),
        "input_size": [32, 32],
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "rng": checkpoint.random_states(),
    }
    checkpoint.save_checkpoint(tmp_path, content | {"mark": "first"})
    checkpoint.save_checkpoint(tmp_path, content | {"mark": "second"})
    return tmp_path, content


def test_checkpoint_round_trip(saved):
    folder, content = saved
    back = read_checkpoint(folder / "last.pt")
    assert back["mark"] == "second" and read_checkpoint(folder / "last.prev.pt")["mark"] == "first"
    assert back["config"] == content["config"] and back["rng"]["python"] == content["rng"]["python"]
    for name, value in content["model"].items():
        assert torch.equal(back["model"][name], value)
    assert not [name for name in back["model"] if name.startswith(("module.", "_orig_mod."))]
    assert {p.name for p in folder.iterdir()} == {"last.pt", "last.prev.pt"}
    model = load_model(back)
    assert not model.training and torch.equal(
        model.state_dict()["trunk.block1.0.conv.weight"],
        content["ema"]["trunk.block1.0.conv.weight"],
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: b"", "cut short"),
        (lambda data: data[: len(data) // 2], "cut short"),
        (
            lambda data: data[:5000] + bytes([data[5000] ^ 4]) + data[5001:],
            "damaged|could not be read|no checkpoint",
        ),
        (lambda data: b"not a checkpoint at all", "no checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_takes_over(
    saved, capsys, damage, message
):
    folder, _ = saved
    path = folder / "last.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert checkpoint.read_last(folder)["mark"] == "first"
    assert "Going on from the checkpoint before it" in capsys.readouterr().out


def test_every_flipped_byte_of_a_tensor_is_found(saved):
    folder, _ = saved
    path = folder / "last.pt"
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda i: i.file_size)
    middle = record.header_offset + record.file_size // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    with pytest.raises(UserError, match="checksum"):
        read_checkpoint(path)


def test_code_in_a_checkpoint_is_refused_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"model": Harmful()}, tmp_path / "a.pt")
    with open(tmp_path / "b.pt", "wb") as file:
        pickle.dump(Harmful(), file)
    for name, message in (("a.pt", "is refused"), ("b.pt", "no checkpoint")):
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "harm").exists()


def test_what_is_not_ours_says_so(tmp_path, saved):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(
        UserError, match="not a checkpoint of this project: it has no format, model"
    ):
        read_checkpoint(tmp_path / "other.pt")
    torch.save(saved[1] | {"format": 99}, tmp_path / "newer.pt")
    with pytest.raises(UserError, match="format 99, and this code reads format 2"):
        read_checkpoint(tmp_path / "newer.pt")
    new = {"zoom", "jitter", "transfer_lr", "freeze_epochs"}
    older = saved[1] | {
        "format": 1,
        "config": {k: v for k, v in saved[1]["config"].items() if k not in new}
        | {"init_from": None},
    }
    del older["transferred"]
    torch.save(older, tmp_path / "older.pt")
    read = read_checkpoint(tmp_path / "older.pt")
    assert (
        read["config"] == saved[1]["config"] and read["transferred"] == [] and read["format"] == 2
    )
    # what it did
    was = {
        "muon": 0.0,
        "ema_share": 1.0,
        "progressive_from": 0,
        "trivial_augment": False,
        "lr_by_width": 0.0,
    }
    before = saved[1] | {"config": {k: v for k, v in saved[1]["config"].items() if k not in was}}
    torch.save(before, tmp_path / "before.pt")
    assert read_checkpoint(tmp_path / "before.pt")["config"] == saved[1]["config"] | was
    with pytest.raises(UserError, match="there is no such file"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(UserError, match="is a folder; name the checkpoint in it"):
        read_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint_whole(saved, monkeypatch):
    folder, content = saved

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match="No space left on device. What was saved before is untouched"
    ):
        checkpoint.save_checkpoint(folder, content | {"mark": "third"})
    monkeypatch.undo()
    assert checkpoint.read_last(folder)["mark"] == "second"
    assert {p.name for p in folder.iterdir()} == {"last.pt", "last.prev.pt"}


@pytest.mark.parametrize("save_takes, due", [(0.2, 50), (1.0, 50), (3.0, 150)])
def test_how_often_a_run_saves(monkeypatch, save_takes, due):
    """Every 50 seconds; where that would cost over 2 % of the time, as often as costs 2 %."""
    saved, clock = [], [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    state = types.SimpleNamespace(
        saved_at=0.0, save_seconds=save_takes, save=lambda: saved.append(clock[0])
    )
    for clock[0] in (0.0, due - 0.1, due):
        run.Run.save_when_due(state)
    assert saved == [due] and save_takes / due <= 0.02


def test_a_missing_run_folder_is_made_again(saved, tmp_path):
    checkpoint.save_checkpoint(tmp_path / "gone" / "run", saved[1])
    assert checkpoint.read_last(tmp_path / "gone" / "run")
