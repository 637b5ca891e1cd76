"""A GPU's numbers against the CPU's: python -m pytest -m gpu, some minutes on one card.

Devices round differently. A number may be three times as far from the CPU's in float32 as the CPU's
own is in the same precision, and FLOOR or FLOOR_OF_SUMS more. TF32 is switched off, so that float32
is what it says.

GPU_TESTS_ON=cpu runs all of this on the CPU: that tests the tests.
"""

import contextlib
import copy
import functools
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cam
from common.device import DTYPES
from data import Augmentation
from experiments.replaced_maps import measure
from explain.faithfulness import Faithfulness
from explain.maps import (
    attention_maps,
    class_activation_map,
    grad_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
)
from explain.networks import TrainedNetwork
from tests.helpers.environment import GPU
from tests.helpers.makers import image_set, orthogonalized
from tests.helpers.runs import NARROW, assert_equal, config_of, content_of, signal_after
from tests.helpers.trainers import CPU, Batches, make_trainer
from train_cifar100 import TASK as CIFAR100
from train_cub import TASK as CUB
from training.evaluate_checkpoint import open_checkpoint
from training.evaluation import evaluate
from training.muon import Muon
from training.report import read_metrics
from training.run import Run
from training.trainer import Trainer

DEVICE = torch.device(GPU)
ON_CARD = DEVICE.type == "cuda"
FAMILIES = (
    "vgg",
    "vgg-gap",
    "vgg-pan",
    "vgg-att3-concat-pc",
    "vgg-att3-concat-dp",
    "vgg-att3-concat-gate",
)
# of weights and gradients: where rounding turns a ReLU or a maximum, a few per cent of these
FLOOR = 0.05
FLOOR_OF_SUMS = 0.01
COMPILERS = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]

pytestmark = pytest.mark.gpu
compiles = pytest.mark.skipif(
    not COMPILERS
    or ON_CARD
    and torch.cuda.is_available()
    and torch.cuda.get_device_capability() < (7, 0),
    reason="Triton needs compute capability 7.0 and a C compiler",
)


@pytest.fixture(autouse=True)
def the_same_kernels(monkeypatch, request):
    """No TF32 (matrix products are without it anyway), and no search for the fastest kernels, which
    takes time and may choose others each time. bf16 only where the card has it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    if ON_CARD:
        # a Run switches the search on
        monkeypatch.setattr(torch.backends.cudnn, "benchmark_limit", 1)
        if "bf16" in request.node.name and not torch.cuda.is_bf16_supported(
            including_emulation=False
        ):
            pytest.skip("this card has no bf16")


def far(found: dict, expected: dict) -> float:
    """Distance of all tensors together, in units of their length."""
    assert found.keys() == expected.keys()
    pairs = [
        (found[name].detach().cpu().double(), expected[name].detach().cpu().double())
        for name in expected
    ]
    return math.sqrt(
        sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    )


def assert_near(model: str, precision: str, compiled: bool = False):
    """What is measured on the device, beside the CPU's in the same precision and in float32."""
    expected, same = cpu_numbers(model, "fp32"), cpu_numbers(model, precision)
    found = measured(make(model, DEVICE, precision, compiled))
    for kind in expected:
        floor = FLOOR_OF_SUMS if kind in ("statistics", "evaluation") else FLOOR
        distance, allowed = (
            far(found[kind], expected[kind]),
            3 * far(same[kind], expected[kind]) + floor,
        )
        print(f"{kind}: {distance:.2g} from the CPU's in float32, {allowed:.2g} allowed")
        assert distance <= allowed, kind


def make(model: str, device: torch.device, precision: str, compiled: bool = False) -> Trainer:
    return make_trainer(
        Batches(16, device),
        device,
        precision,
        compiled,
        model=model,
        width=1 / 8,
        lr=0.02,
        compile=True,
    )


@functools.cache
def cpu_numbers(model: str, precision: str) -> dict[str, dict]:
    return measured(make(model, CPU, precision))


def grads(ours: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in ours.model.named_parameters() if p.grad is not None}


def measured(ours: Trainer) -> dict[str, dict]:
    """By kind: gradients, changes of the weights in two steps, statistics, average; and what is
    evaluated."""
    (images, labels), *_ = ours.batches.all
    before = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    scaler = ours.precision.scaler
    # it begins with more than these gradients can bear, and would skip steps
    if scaler.is_enabled():
        scaler.scale(torch.ones((), device=ours.device))
        scaler.update(128.0)
    ours.batch_norm.set_train_mode(ours.global_step, ours.micro_batch)
    ours.gradients(images, labels)
    if scaler.is_enabled():
        scaler.unscale_(ours.optimizer)
    found = {"gradients": grads(ours)}
    scaler.update()
    for batch in ours.batches.all[:2]:
        ours.step(*batch)
        ours.position.step += 1
    found["steps"] = {name: p.detach() - before[name] for name, p in ours.model.named_parameters()}
    found["statistics"] = {
        name: t for name, t in ours.model.state_dict().items() if "running" in name
    }
    found["average"] = {name: t - before[name] for name, t in ours.ema.model.named_parameters()}
    ours.recalibrate_batch_norm(images for images, _ in ours.batches.all)
    result = evaluate(ours.eval_model, iter(ours.batches.all), 4, ours.precision)
    found["evaluation"] = {"loss": torch.tensor([result.loss, ours.checked_loss()])}
    assert sum(result.class_counts) == 3 * len(images) and ours.summed >= 2
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", FAMILIES)
def test_training_and_evaluation_are_the_cpus(model, precision):
    assert_near(model, precision)


@compiles
@pytest.mark.parametrize(
    "model, precision", [("vgg-att3-concat-gate", "bf16"), ("vgg-pan", "fp32"), ("vgg", "fp16")]
)
def test_compiled_networks_are_the_cpus(model, precision):
    assert_near(model, precision, compiled=True)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 0.1)])
def test_muons_step_is_that_of_float64(precision, tolerance):
    """Shapes of the full width, whose Gram matrices have three sizes; against singular values cut
    by hand."""
    torch.manual_seed(0)
    shapes = ((64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3), (128, 64, 3, 3), (512, 64, 3, 3))
    weights = [torch.randn(shape) for shape in shapes]
    gradients = [torch.randn_like(weight) for weight in weights]
    filters = [
        torch.nn.Parameter(weight.to(DEVICE).contiguous(memory_format=torch.channels_last))
        for weight in weights
    ]
    for p, gradient in zip(filters, gradients, strict=True):
        p.grad = gradient.to(DEVICE).contiguous(memory_format=torch.channels_last)
    group = {"params": filters, "momentum": 0.0, "nesterov": False, "filter_momentum": 0.9}
    Muon([group], DTYPES[precision], lr=0.1, fused=True).step()
    for p, weight, gradient in zip(filters, weights, gradients, strict=True):
        direction = orthogonalized(gradient.flatten(1)).view(weight.shape)
        size = weight.norm() / math.sqrt(min(direction.flatten(1).shape))
        step = (weight.double() - p.detach().cpu().double()) / (0.1 * size)
        distance = ((step - direction).norm() / direction.norm()).item()
        print(f"{tuple(weight.shape)}: {distance:.2g}")
        assert distance < tolerance


# ---- data ---------------------------------------------------------------------------------------


class DrawnOnTheCPU:
    """A generator for a device; the numbers are the CPU's (see same_draws)."""

    def __init__(self, device: torch.device, seed: int):
        self.device, self.real = device, torch.Generator().manual_seed(seed)
        self.initial_seed = self.real.initial_seed


@pytest.fixture
def same_draws(monkeypatch):
    rand = torch.rand
    monkeypatch.setattr(
        torch,
        "rand",
        lambda *size, generator, device: rand(*size, generator=generator.real).to(device),
    )


AUGMENTATIONS = {
    "cifar100": {"pad": 4, "trivial_augment": True},
    "cub": {"pad": 0, "zoom": 0.5, "jitter": 0.2, "size": (28, 30)},
    "the rest": {"pad": 2, "cutout": 7, "jitter": 0.1},
}


@pytest.mark.parametrize("options", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_augmentation_is_the_cpus_for_the_same_draws(same_draws, options):
    """But where an operation jumps: there a last bit may decide, in one value of a thousand."""
    images = image_set(count=140, height=32, width=32).images
    smooth = F.avg_pool2d(images[::2].permute(0, 3, 1, 2).float(), 5, 1, 2)
    images[::2] = smooth.permute(0, 2, 3, 1).byte()
    ours, level = Augmentation(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), **options), 1 / 255 / 0.2
    for seed in range(3):
        found, expected = (
            ours(images.to(device), DrawnOnTheCPU(device, seed)).cpu() for device in (DEVICE, CPU)
        )
        difference = (found - expected).abs() / level
        jumps = (difference > 1.5).float().mean()
        print(
            f"{difference.mean():.2g} of 255 levels apart on average, {100 * jumps:.2g} % of the "
            "values over 1.5"
        )
        assert difference.mean() < 0.02 and jumps < 1e-3


# ---- whole runs ---------------------------------------------------------------------------------

RUN = [
    *NARROW[: NARROW.index("--device")],
    *(
        "--precision fp32 --no-compile --overlay-every 0 --epochs 2 --set crop_pad=0 "
        "--set flip=false --lr 0.003"
    ).split(),
]  # at the recipe's rate rounding changes the loss of such a run by a tenth


@pytest.mark.parametrize("first, second", [(GPU, GPU), ("cpu", GPU), (GPU, "cpu")])
def test_a_run_that_is_stopped_goes_on_on_either_device(cli, monkeypatch, tmp_path, first, second):
    assert cli(*RUN, "--device", "cpu", "--run-dir", "whole")[0] == 0
    signal_after(monkeypatch, 8)
    status, _, err = cli(*RUN, "--device", first, "--run-dir", "hurt")
    assert status == 143, err
    content = content_of(tmp_path / "hurt")
    assert (content["position"]["epoch"], content["position"]["step"]) == (1, 2)
    status, _, err = cli("--resume", "hurt", "--device", second)
    assert status == 0, err
    whole, hurt = (read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "hurt"))
    for expected, found in zip(whole, hurt, strict=True):
        print(
            {
                name: (found[name], expected[name])
                for name in ("train_loss", "eval_loss", "train_top1")
            }
        )
        assert found["lr"] == expected["lr"] and found["epoch"] == expected["epoch"]
        for name in ("train_loss", "eval_loss"):
            assert found[name] == pytest.approx(expected[name], rel=0.01)


def test_a_resumed_run_starts_from_every_bit_of_the_one_before(small_task):
    before, after = (run_of(small_task, *RUN, "--device", GPU) for _ in range(2))
    before.trainer.train_epoch()
    before.trainer.next_epoch()
    state = on_disk(before.trainer.state())
    after.trainer.load_state(state)
    assert_equal(on_disk(after.trainer.state()), state)
    batches = [next(each.trainer.batches.epoch(1)) for each in (before, after)]
    assert torch.equal(batches[0][0], batches[1][0])  # the same draws
    for each, batch in zip((before, after), batches, strict=True):
        each.trainer.step(*batch)
    states = [dict(each.trainer.model.named_parameters()) for each in (before, after)]
    assert far(states[1], states[0]) < 1e-4


def on_disk(state: dict) -> dict:
    """What a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def run_of(task, *words) -> Run:
    config = config_of(task, *words)
    return Run(task, config, Path("."), *task.data.sample(config))


# fp16's scaler asks whether the gradients are finite
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", ["fast", "paper"])
@pytest.mark.parametrize(
    "task, words",
    [
        (CIFAR100, ["--batch-size", 64]),
        (CUB, ["--image-size", 64, "--batch-size", 16, "--init-from", "none"]),
    ],
    ids=["cifar100", "cub"],
)
def test_nothing_in_a_step_waits_for_the_device(task, words, recipe, precision):
    trainer = run_of(
        task,
        "--sample",
        "--width",
        0.0625,
        "--device",
        GPU,
        "--precision",
        precision,
        "--no-compile",
        "--recipe",
        recipe,
        *words,
    ).trainer
    # what is kept from step to step is there from now on, for any order of the operations
    for epoch in range(4):
        for batch in trainer.batches.epoch(epoch):
            if epoch == 0:
                trainer.step(*batch)
    batches, before = trainer.batches.epoch(0), trainer.summed
    next(batches)  # an epoch's order of images is copied to the device once
    with no_waiting():
        for batch in batches:
            trainer.step(*batch)
    assert trainer.summed - before == len(trainer.batches) - 1 > 1


@contextlib.contextmanager
def no_waiting():
    if ON_CARD:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_CARD:
            torch.cuda.set_sync_debug_mode("default")


# ---- memory -------------------------------------------------------------------------------------

BATCH = 256  # images, so that activations are most of what is needed


def gradients_of(ours: Trainer) -> dict:
    ours.batch_norm.set_train_mode(ours.global_step, ours.micro_batch)
    ours.gradients(*ours.batches.all[0])
    return grads(ours)


def peak_of(work) -> tuple[object, float]:
    """What ``work`` gives, and the most MiB that were in use beyond what was so before (nan on a
    CPU)."""
    if not ON_CARD:
        return work(), math.nan
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    return result, (torch.cuda.max_memory_allocated() - before) / 2**20


def test_out_of_memory_halves_the_micro_batch_and_loses_nothing_of_the_batch(capsys):
    new = functools.partial(
        make_trainer,
        Batches(BATCH, DEVICE),
        DEVICE,
        model="vgg-att3-concat-pc",
        width=1 / 4,
        muon=0.0,
    )
    gradients_of(new())  # libraries take memory of their own
    whole, half = (
        peak_of(lambda size=size: gradients_of(new(micro_batch=size)))[1]
        for size in ("auto", BATCH // 2)
    )
    ours, expected = new(), new(micro_batch=BATCH // 2)
    with only_room_for(ours, (whole + half) / 2):
        ours.step(*ours.batches.all[0])
    said = capsys.readouterr().out
    print(f"peak {whole:.0f} MiB with {BATCH} images at once, {half:.0f} MiB with half of them")
    assert f"continuing with --micro-batch {BATCH // 2}" in said and ours.images_summed == BATCH
    expected.step(*expected.batches.all[0])
    assert far(*(grads(each) for each in (ours, expected))) < 1e-3
    assert far(dict(ours.model.named_parameters()), dict(expected.model.named_parameters())) < 1e-4


@contextlib.contextmanager
def only_room_for(ours: Trainer, mib: float):
    """Of the card's memory; on a CPU, for half of the batch."""
    if not ON_CARD:
        model = ours.run_model

        def scarce(images):
            if len(images) > BATCH // 2:
                raise torch.OutOfMemoryError("out of memory")
            return model(images)

        ours.run_model = scarce
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + mib * 2**20) / total)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("common.errors.gpu_is_half_full", lambda: True)  # it asks the whole card
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_activations_cost_no_accuracy_and_less_memory(precision):
    found = {}
    for checkpointed in (False, True):
        ours = make_trainer(
            Batches(BATCH, DEVICE),
            DEVICE,
            precision,
            model="vgg-att3-concat-gate",
            width=1 / 4,
            checkpoint_activations=checkpointed,
        )
        found[checkpointed] = peak_of(functools.partial(gradients_of, ours))
    distance = far(found[True][0], found[False][0])
    print(
        f"peak {found[False][1]:.0f} MiB, checkpointed {found[True][1]:.0f} MiB; gradients "
        f"{distance:.2g} apart"
    )
    assert distance < FLOOR_OF_SUMS
    assert not ON_CARD or found[True][1] < 0.8 * found[False][1]


# ---- maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, model",
    [
        (attention_maps, "vgg-att3-concat-gate"),
        (attention_maps, "vgg-pan"),
        (class_activation_map, "vgg-gap"),
        (grad_cam, "vgg-att3-concat-dp"),
        (grad_cam_plus_plus, "vgg-att3-concat-dp"),
        (hires_cam, "vgg-att3-concat-gate"),
        (layer_cam, "vgg-gap"),
    ],
)
def test_maps_are_the_cpus(method, model):
    ours = make_trainer(model=model, width=1 / 8)
    for batch in ours.batches.all:
        ours.step(*batch)
    network, (images, labels) = ours.model.eval(), ours.batches.all[0]
    found = []
    for device in (CPU, DEVICE):
        words = () if method is attention_maps else (labels.to(device),)
        maps = method(copy.deepcopy(network).to(device), images.to(device), *words)
        found.append(maps if isinstance(maps, dict) else {"map": maps})
    for level, expected in found[0].items():
        assert found[1][level].device.type == DEVICE.type and expected.max() == 1
        torch.testing.assert_close(found[1][level].cpu(), expected, atol=2e-3, rtol=0)


def test_deletion_and_insertion_are_the_cpus():
    ours = make_trainer(model="vgg-gap", width=1 / 8)
    for batch in ours.batches.all:
        ours.step(*batch)
    images, labels = ours.batches.all[0]
    tables = []
    for device in (CPU, DEVICE):
        model = copy.deepcopy(ours.model).to(device).eval()
        names = tuple(map(str, range(ours.model.class_layers()[0].out_features)))
        network = TrainedNetwork(model, names, images.shape[2:], (0.5,) * 3, (0.25,) * 3, "a test")
        found = Faithfulness(steps=4)
        maps = hires_cam(model, images.to(device), labels.to(device))
        found.add(network, images.to(device), {"hirescam": maps.cpu()})
        tables.append(found.table())
    for row, expected in zip(*tables, strict=True):
        assert row == pytest.approx(expected, abs=0.01)


# ---- the scripts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, words",
    [(CIFAR100, ["--batch-size", 32]), (CUB, ["--image-size", 64, "--batch-size", 8])],
    ids=["cifar100", "cub"],
)
def test_sanity_and_benchmark(cli, monkeypatch, tmp_path, task, words):
    # ImageNet's weights do not fit so narrow a network
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    words = ["--sample", "--width", 0.0625, "--device", GPU, "--no-compile", *words]
    status, out, err = cli("--sanity", *words, task=task)
    print(out)
    assert status == 0 and "FAILED" not in out, err
    status, out, err = cli("--benchmark", 10, *words, task=task)
    print(out)
    assert status == 0 and "images/s" in out, err


def test_evaluation_and_cam_of_a_checkpoint_on_either_device(
    cli, small_task, monkeypatch, tmp_path
):
    monkeypatch.setitem(cam.SOURCES, "cifar100", small_task.data)
    assert cli(*RUN, "--device", GPU, "--run-dir", "run")[0] == 0
    shown, maps = [], []
    for number, device in enumerate(("cpu", GPU)):
        status, out, err = cli("--evaluate", "run/last.pt", "--device", device)
        assert status == 0, err
        shown.append([float(found) for found in re.findall(r"(?:loss|top-1|top-5) ([0-9.]+)", out)])
        assert (
            cam.main(
                [
                    *(
                        "--checkpoint run/last.pt --dataset sample --index 0-3 "
                        "--method attention --method gradcam --method hirescam --smooth "
                        "--raw --target 1 --out"
                    ).split(),
                    str(number),
                    "--device",
                    device,
                ]
            )
            == 0
        )
        maps.append({path.name: np.load(path) for path in sorted(Path(str(number)).rglob("*.npy"))})
    print(shown)
    (loss, *tops), (found, *others) = shown
    assert found == pytest.approx(loss, rel=0.01)
    assert others == pytest.approx(tops, abs=100 / 32 + 0.1)  # an image may change sides
    assert len(maps[0]) == 4 * 5 and maps[0].keys() == maps[1].keys()  # three levels, two CAMs
    for name, expected in maps[0].items():
        np.testing.assert_allclose(maps[1][name], expected, atol=5e-3)


def test_attacks_and_replaced_maps_of_a_checkpoint_on_either_device(cli, small_task):
    assert cli(*RUN, "--device", GPU, "--run-dir", "run")[0] == 0
    attacked, replaced = [], []
    for device in ("cpu", GPU):
        words = "--evaluate run/last.pt --attack fgsm:1,8 --attack pgd:2 --device".split()
        status, out, err = cli(*words, device)
        assert status == 0, err
        attacked.append(
            [row["loss"] for row in json.loads(Path("run/attacks.json").read_text())["results"]]
        )
        opened = open_checkpoint(small_task.data, "run/last.pt", device)
        replaced.append(measure(opened.model, opened.batches, opened.precision))
    print(attacked)
    # of small gradients, the sign is rounding
    assert attacked[1] == pytest.approx(attacked[0], rel=0.05)
    for one, other in zip(*(found["replaced"] for found in replaced), strict=True):
        assert (one["by"], one["of"]) == (other["by"], other["of"])
        assert other["top1"] == pytest.approx(one["top1"], abs=2 * 100 / 32 + 0.1)
