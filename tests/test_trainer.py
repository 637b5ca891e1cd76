"""The loop, the optimizer's side and the checkpoints, against independent few-line references."""

import pytest
import torch

from common.errors import UserError
from data import cifar_sample
from tests.helpers.trainers import CPU, Batches, make_trainer
from training import trainer as trainer_module
from training.evaluation import evaluate
from training.ranks import Ranks
from training.trainer import split_micro_batches

# ---- micro-batches ------------------------------------------------------------------------------


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
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate"
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


def test_when_the_loss_is_looked_at(monkeypatch):
    """On a GPU once a second, as a look waits for it; several ranks at the same steps; on a CPU
    always."""
    ours, now = make_trainer(), [100.0]
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: now[0])
    assert ours.sync_due(1, checked_at=100.0)
    ours.device = torch.device("cuda")
    assert not ours.sync_due(20, checked_at=99.5) and ours.sync_due(7, checked_at=98.9)
    ours.ranks = Ranks(0, 2, 0)
    assert [step for step in range(1, 50) if ours.sync_due(step, checked_at=0.0)] == [20, 40]


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
