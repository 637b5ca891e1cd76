"""The CUDA path on a CPU. Tensors that claim to be on cuda:0 (FakeTensorMode: shapes, types and
devices, no numbers) go through whole steps and evaluations. A mix of devices, a value that the host
asks for, and a copy that it waits for raise.

What fake tensors cannot do is replaced: random draws, the backward pass, fused kernels.
tests/test_gpu.py has the numbers.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attention_model
import train_cifar100
import train_cub
from data import ImageSet
from datasets import augmentation
from tests.helpers.runs import config_of
from training import muon, optim, run
from training import trainer as trainer_module

CUDA = torch.device("cuda", 0)
COUNT, BATCH = 48, 16  # images; TrivialAugment has 14 operations
NATIVE = {name: getattr(torch, name) for name in ("Generator", "rand")}


class Mode(FakeTensorMode):
    """What is copied with deepcopy stays in this mode."""

    def __deepcopy__(self, memo):
        return self


def fake_tensors_work() -> bool:
    """PyTorch 2.6 asks for a driver even to index one."""
    try:
        with Mode():
            return torch.empty(2, device=CUDA)[:1].device == CUDA
    except RuntimeError:
        return False


pytestmark = [
    pytest.mark.skipif(
        not fake_tensors_work(), reason="this PyTorch's fake CUDA tensors need a driver"
    ),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]


class NoWaiting(TorchDispatchMode):
    """A copy between the host and the device is to run beside the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name, blocking = func._schema.name, not (kwargs or {}).get("non_blocking")
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[name == "aten::copy_"]
            blocking = blocking and not (name == "aten::copy_" and args[2:] == (True,))
            assert source.device == result.device or not blocking, (
                f"{name} from {source.device} to {result.device} waits"
            )
        return result


class Draws:
    """torch.Generator, also on the device that claims to be there."""

    def __new__(cls, device="cpu"):
        return (
            super().__new__(cls)
            if torch.device(device).type == "cuda"
            else NATIVE["Generator"](device)
        )

    def __init__(self, device):
        self.device = torch.device(device)

    def manual_seed(self, seed):
        self.seed = seed
        return self

    def initial_seed(self):
        return self.seed


def moved(self, device, memory_format=torch.preserve_format):
    """nn.Module.to, which cannot exchange fake parameters in place."""
    for module in self.modules():
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is None:  # a layer without bias
                    continue
                changed = t.detach().to(
                    device, memory_format=memory_format if t.ndim == 4 else torch.preserve_format
                )
                table[name] = (
                    nn.Parameter(changed, t.requires_grad)
                    if isinstance(t, nn.Parameter)
                    else changed
                )
    return self


def forget_constants():
    """What is kept between batches must be neither taken into this mode nor left behind."""
    for function in vars(augmentation).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture
def on_cuda(monkeypatch):
    """on_cuda(task, *words) -> a Run on the device that is not there. Everything else of the test
    runs there too."""
    monkeypatch.setattr(torch, "Generator", Draws)
    monkeypatch.setattr(
        torch,
        "rand",
        lambda *size, generator=None, **options: NATIVE["rand"](
            *size, generator=None if isinstance(generator, Draws) else generator, **options
        ),
    )
    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**34, 2**34))
    # fp16's scaler asks whether the gradients are finite: the only thing in a step that waits
    monkeypatch.setattr(
        torch.amp.GradScaler, "_maybe_opt_step", lambda self, optimizer, *_, **__: optimizer.step()
    )
    monkeypatch.setattr(run, "choose_device", lambda name: CUDA)
    for place, name in (
        (attention_model, "initialize"),
        (nn.Conv2d, "reset_parameters"),
        (nn.Linear, "reset_parameters"),
    ):
        monkeypatch.setattr(place, name, lambda _: None)  # done on the CPU, and slow in this mode
    monkeypatch.setattr(run, "fingerprint", lambda image_set: [len(image_set), 0])
    monkeypatch.setattr(
        run.Run, "weights_and_statistics", lambda *_: ((0.5,) * 3, (0.25,) * 3, frozenset())
    )
    forget_constants()

    def make(task, *words, side=32):
        config = config_of(
            task,
            *"--no-compile --width 0.0625 --batch-size".split(),
            BATCH,
            "--set",
            "progressive_from=0",
            *words,
        )
        images = ImageSet(
            torch.empty(COUNT, side, side, 3, dtype=torch.uint8),
            torch.empty(COUNT, dtype=torch.int64),
            tuple("abcdef"),
            "nowhere",
        )
        made = run.Run(task, config, None, images, images)
        trainer = made.trainer
        for group in trainer.optimizer.param_groups:
            group |= {"fused": False, "foreach": True}
        without = trainer.model.parameters_without_gradient()
        parameters = [p for name, p in trainer.model.named_parameters() if name not in without]

        def backward(loss):
            assert loss.requires_grad and loss.device == CUDA and loss.dtype == torch.float32
            for p in parameters:
                if p.requires_grad:
                    p.grad = torch.empty_like(p) if p.grad is None else p.grad + torch.empty_like(p)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        return made

    with Mode():
        yield make
    forget_constants()


def walk(made):
    """A step of each image size that the run has, and an evaluation. Returns how often the network
    was run in the steps."""
    trainer, found = made.trainer, []
    hook = trainer.model.trunk.block1[1].register_forward_hook(
        lambda unit, inputs, output: found.append(output.dtype)
    )
    batches = trainer.batches.epoch(0)
    next(batches)  # an epoch's order of images is copied to the device once
    with NoWaiting():
        for epoch in (0, made.config["epochs"] - 1)[: 1 + (made.config["progressive"] != "none")]:
            trainer.position.epoch = epoch
            trainer.step(*next(batches))
    hook.remove()
    assert set(found) == {trainer.precision.dtype}
    assert {t.device for t in trainer.model.state_dict().values()} == {CUDA}
    evaluated(made)
    return len(found)


def evaluated(made):
    """Recalibration and evaluation ask for numbers when the device has all of its work, not
    before."""
    trainer, batches = made.trainer, list(made.recalibration_batches())
    assert sum(map(len, batches)) == COUNT
    with NoWaiting():
        asked_at_the_end(trainer.recalibrate_batch_norm, batches)
    batches = list(
        run.eval_batches(made.eval_set, CUDA, made.mean, made.std, made.config["input_size"])
    )
    asked_at_the_end(
        lambda given: run.evaluate(trainer.eval_model, given, 6, trainer.precision), batches
    )


def asked_at_the_end(work, batches):
    given = iter(batches)
    with pytest.raises(DataDependentOutputException):
        work(given)
    assert next(given, None) is None


@pytest.mark.parametrize("model", attention_model.MODEL_NAMES)
def test_every_model(on_cuda, model):
    made = on_cuda(
        train_cifar100.TASK,
        "--model",
        model,
        "--precision",
        "bf16",
        "--epochs",
        5,
        "--set",
        "progressive=none",
    )
    assert made.config["muon"]
    walk(made)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("task", [train_cifar100.TASK, train_cub.TASK], ids=["cifar100", "cub"])
@pytest.mark.parametrize("recipe", ["fast", "paper"])
def test_every_recipe_and_precision(on_cuda, task, recipe, precision):
    size = ["--image-size", 48] if task.dataset == "cub" else []
    made = on_cuda(
        task,
        "--model",
        "vgg-att3-concat-gate",
        "--recipe",
        recipe,
        "--precision",
        precision,
        *size,
        side=56,
    )
    assert made.config["trivial_augment"] == (task.dataset == "cifar100" and recipe == "fast")
    walk(made)


@pytest.mark.parametrize(
    "words, parts", [(["--micro-batch", 6], 3), (["--checkpoint-activations"], 1)]
)
def test_what_saves_memory(on_cuda, words, parts):
    made = on_cuda(
        train_cub.TASK,
        "--model",
        "vgg-att3-concat-gate",
        "--precision",
        "fp16",
        "--image-size",
        48,
        *words,
    )
    assert walk(made) == parts


def test_a_frozen_trunk(on_cuda):
    made = on_cuda(train_cub.TASK, "--precision", "bf16", "--image-size", 48, "--set", "muon=0.3")
    made.trainer.batch_norm.transferred = frozenset(
        name for name in made.trainer.model.state_dict() if name.startswith("trunk.")
    )
    walk(made)
    assert not any(
        p.requires_grad
        for name, p in made.trainer.model.named_parameters()
        if name.startswith("trunk.")
    )


def test_images_that_stay_on_the_host(on_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 2**34))
    made = on_cuda(train_cifar100.TASK, "--precision", "bf16")
    assert made.train_set.images.device.type == "cpu"
    walk(made)


def harmed(work, harm):
    """The function, with something done to what comes out of it, or to the moving average."""

    def call(*args, **kwargs):
        result = work(*args, **kwargs)
        if isinstance(result, (list, tuple)):
            return [harm(each) for each in result]
        return harm(args[0].averages[0] if result is None else result)

    return call


def from_the_host(tensor):
    # one number alone may come from there
    return tensor + torch.ones(tensor.shape or 1, device="cpu")


def read(tensor):
    return tensor * tensor.detach().flatten()[0].item()


def copied(tensor):
    return tensor + torch.zeros(tensor.shape, device="cpu").to(tensor.device)


PLACES = (
    (augmentation, "normalize"),
    (trainer_module, "resize"),
    (trainer_module.F, "cross_entropy"),
    (muon, "products_of_factors"),
    (torch, "_foreach_lerp"),
    (optim.EMA, "update"),
)


@pytest.mark.parametrize(
    "harm, said", [(from_the_host, "devices"), (read, "_local_scalar_dense"), (copied, "waits")]
)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_a_mistake_is_found_wherever_it_is(on_cuda, monkeypatch, place, harm, said):
    made = on_cuda(
        train_cifar100.TASK, "--epochs", 5, "--precision", "bf16", "--set", "progressive=none"
    )
    monkeypatch.setattr(*place, harmed(getattr(*place), harm))
    with pytest.raises((RuntimeError, AssertionError), match=said):
        walk(made)
