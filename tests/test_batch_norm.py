"""Batch norm: statistics for evaluation, and small micro-batches."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_cifar100
from attention_model import build_model
from data import cifar_sample
from tests.helpers.trainers import CONFIG, Batches, make_trainer, snapshot, staged
from training.run import Run
from training.trainer import Trainer, TrainState


def inputs_of_norms(model, images) -> dict[str, torch.Tensor]:
    """What each 2-d batch norm is given in evaluation mode."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            hooks.append(
                module.register_forward_hook(
                    lambda m, args, out, name=name: seen.update({name: args[0]})
                )
            )
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_statistics_are_those_of_use(ema_decay, dropout):
    """The identity-like convolutions average nothing out, so that dropout shifts the running
    variance of the second norm on; settled, each norm has the mean and variance of what it sees in
    use."""
    torch.manual_seed(0)
    model = build_model("vgg-att3-concat-pc", 4, width=1 / 16, dropout=dropout)
    ours = Trainer(
        CONFIG | {"ema_decay": ema_decay}, model, Batches(64), torch.device("cpu"), precision="fp32"
    )
    with torch.no_grad():
        for norm in (m for m in ours.model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.running_mean.fill_(3)
    images = ours.batches.all[0][0]
    weights = {name: p.clone() for name, p in ours.eval_model.named_parameters()}
    state = torch.get_rng_state()
    ours.recalibrate_batch_norm(iter([images]))
    seen = inputs_of_norms(ours.eval_model, images)
    for name, module in ours.eval_model.named_modules():
        if name in seen:
            torch.testing.assert_close(
                module.running_mean, seen[name].mean((0, 2, 3)), atol=1e-3, rtol=1e-2, msg=name
            )
            torch.testing.assert_close(
                module.running_var, seen[name].var((0, 2, 3)), atol=1e-3, rtol=1e-2, msg=name
            )
            assert module.momentum == 0.1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in ours.eval_model.named_parameters())


def test_recalibration_never_takes_a_single_image():
    """65 training images: in batches of 64, one would be left over, and batch norm has no variance
    of one."""
    sets = cifar_sample(classes=5, train_per_class=13, test_per_class=2)
    config = CONFIG | {
        "val_fraction": 0.0,
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
        "image_size": None,
        "seed": 0,
        "trunk": "",
        "init_from": "none",
        "overlay_every": 0,
        "dropout": 1.0,
    }
    run = Run(train_cifar100.TASK, config, Path("nowhere"), *sets)
    sizes = [len(batch) for batch in run.recalibration_batches()]
    assert sum(sizes) == 65 and min(sizes) > 1
    assert 0 <= run.evaluate().top1 <= 100


@pytest.mark.parametrize("step, kept", [(0, True), (3, True), (4, False)])
def test_statistics_that_are_kept_are_not_settled(step, kept):
    """Step 3 is the end of the frozen epoch, whose evaluation is of what was trained: the head on
    the trunk as it came."""
    ours = staged()
    ours.position = TrainState(epoch=step // 4, step=step if step < 4 else 1)
    before = snapshot(ours)
    ours.recalibrate_batch_norm(images for images, _ in ours.batches.all)
    changed = {
        name
        for name, value in ours.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed and (not [name for name in changed if name.startswith("trunk.")]) == kept


def test_of_no_images_there_are_no_statistics():
    plain = make_trainer(dropout=0.0)
    before = snapshot(plain)
    plain.recalibrate_batch_norm(iter([]))
    assert all(torch.equal(value, before[name]) for name, value in plain.model.state_dict().items())


@pytest.mark.parametrize(
    "small", [{"micro_batch": 4}, {"batch_size": 4}, {"batch_size": 4, "micro_batch": 16}]
)
def test_small_parts_use_the_statistics_that_came_with_the_weights(small):
    ours = staged(freeze_epochs=0.0, **small)
    before = snapshot(ours)
    ours.step(*ours.batches.all[0])
    for name, value in ours.model.state_dict().items():
        if "running_" in name:
            assert torch.equal(value, before[name]), name
    assert not torch.equal(
        ours.model.trunk.block1[0].conv.weight, before["trunk.block1.0.conv.weight"]
    )
    assert "running statistics that came with the transferred weights" in ours.batch_norm.note(
        ours.micro_batch
    )


@pytest.mark.parametrize(
    "batch, micro_batch, advice", [(8, 4, "--checkpoint-activations"), (4, "auto", "--batch-size")]
)
def test_small_parts_from_scratch_say_what_batch_norm_sees(batch, micro_batch, advice):
    ours = make_trainer(Batches(batch), micro_batch=micro_batch, batch_size=batch)
    before = snapshot(ours)
    ours.step(*ours.batches.all[0])
    assert not torch.equal(
        ours.model.trunk.block1[0].norm.running_mean, before["trunk.block1.0.norm.running_mean"]
    )
    assert f"sees 4 images at a time, whose statistics are noisy: {advice}" in ours.batch_norm.note(
        ours.micro_batch
    )


def test_single_images_train_on_running_statistics_and_equal_the_whole_batch():
    """With the statistics fixed, parts of one give the gradient of the batch: each image is on its
    own anyway."""
    single, reference = (
        staged(freeze_epochs=0.0, micro_batch=1, muon=0.0),
        staged(freeze_epochs=0.0),
    )
    single.step(*single.batches.all[0])
    reference.model.eval()
    images, labels = reference.batches.all[0]
    F.cross_entropy(
        reference.model(images), labels, label_smoothing=CONFIG["label_smoothing"]
    ).backward()
    for (name, a), b in zip(
        single.model.named_parameters(), reference.model.parameters(), strict=True
    ):
        assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm() + 1e-6, name
    assert "one image has none worth using" in single.batch_norm.note(single.micro_batch)
