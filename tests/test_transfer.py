"""--init-from, the frozen stage, small micro-batches: what is copied, what trains, and what batch
norm does meanwhile."""

import copy
import functools
import hashlib
import http.server
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_cifar100
from attention_model import build_model
from common.checkpoint import FORMAT
from common.errors import UserError
from data import cifar_sample
from tests.helpers.trainers import CONFIG, Batches, make_trainer
from training import sanity, transfer
from training.batch_norm import MIN_BN_BATCH
from training.optim import lr_at
from training.run import Run
from training.trainer import Trainer, TrainState

NAMES = ("a", "b", "c", "d")


def source_from(model, class_names=("x", "y"), what="a test"):
    return transfer.Source(what, model.state_dict(), (0.5,) * 3, (0.2,) * 3, class_names)


# ---- what goes over -----------------------------------------------------------------------------


def test_everything_but_the_head_goes_over_between_trunks_and_sizes(capsys):
    old = build_model("vgg-att3-concat-dp", 4, width=1 / 16)
    new = build_model("vgg-att3-concat-dp", 4, width=1 / 16, trunk="pooled", pool4=5)
    fresh = copy.deepcopy(new.state_dict())
    names = transfer.transfer(new, source_from(old), NAMES)
    for name, value in new.state_dict().items():
        head = name.startswith("classifier.linears")
        assert (
            torch.equal(value, (fresh if head else old.state_dict())[name])
            and (name in names) != head
        ), name
    said = capsys.readouterr().out
    assert (
        "starting fresh: classifier.linears.0; not used: classifier.linears.0" in said
        and "a test" in said
    )


def test_the_head_goes_over_when_the_classes_are_the_same():
    old, new = (build_model("vgg-gap", 4, width=1 / 16) for _ in range(2))
    assert transfer.transfer(new, source_from(old, NAMES), NAMES) == set(old.state_dict())
    assert torch.equal(new.classifier.weight, old.classifier.weight)


def test_what_does_not_fit_is_named(capsys):
    new = build_model("vgg-att2-concat-gate", 4, width=1 / 16)
    transfer.transfer(new, source_from(build_model("vgg-att3-concat-pc", 4, width=1 / 16)), NAMES)
    fresh, _, unused = capsys.readouterr().out.partition("; not used: ")
    assert (
        "gates.conv10.compatibility.W" in fresh
        and "trunk" not in fresh
        and "gates.conv7.compatibility.u" in unused
    )
    with pytest.raises(
        UserError, match=r"no filter of a test fits this network \(--width 0.0625 here\)"
    ):
        transfer.transfer(new, source_from(build_model("vgg-gap", 4, width=1 / 8)), NAMES)


# ---- ImageNet weights ---------------------------------------------------------------------------


def make_vgg16_bn() -> torch.nn.Sequential:
    """The layers of torchvision's vgg16_bn up to its classifier, every number of them random."""
    import torchvision

    torch.manual_seed(3)
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=True)
    for norm in (m for m in features if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_mean, -0.1, 0.1)
        torch.nn.init.uniform_(norm.running_var, 0.5, 1.5)
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return features.eval()


@pytest.fixture(scope="module")
def vgg16_bn(tmp_path_factory):
    """torchvision's layers, and a file as torchvision's server has it (but for the classifier's
    size)."""
    features = make_vgg16_bn()
    weights = {f"features.{name}": value for name, value in features.state_dict().items()}
    path = tmp_path_factory.mktemp("server") / "unnamed.pth"
    torch.save(weights | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return features, path.rename(path.with_name(f"vgg16_bn-{digest[:8]}.pth"))


@pytest.fixture
def home(vgg16_bn, monkeypatch, tmp_path):
    """An empty torch cache, and an address for the file that nobody answers."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(transfer, "IMAGENET_URL", f"http://127.0.0.1:9/{vgg16_bn[1].name}")
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_an_empty_cache_variable_is_not_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert transfer.imagenet_file().parent == tmp_path / ".cache" / "torch" / "hub" / "checkpoints"


def test_the_file_is_torchvisions():
    import torchvision

    assert transfer.IMAGENET_URL == torchvision.models.VGG16_BN_Weights.IMAGENET1K_V1.url


def test_imagenet_weights_give_torchvisions_features(vgg16_bn, home):
    home.mkdir(parents=True)
    (home / vgg16_bn[1].name).symlink_to(vgg16_bn[1])
    model = build_model("vgg-att3-concat-pc", 4, trunk="pooled").eval()
    source = transfer.source_of("imagenet", model)
    assert source.mean == (0.485, 0.456, 0.406)
    names = transfer.transfer(model, source, NAMES)
    assert len(names) == 13 * 6 and all(name.startswith("trunk.") for name in names)
    x = images = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        for number in range(1, 6):
            x = model.trunk.run_block(number, x)
        torch.testing.assert_close(F.max_pool2d(x, 2), vgg16_bn[0](images), atol=1e-5, rtol=1e-4)
    with pytest.raises(
        UserError, match="ImageNet weights fit the pooled trunk: add --set trunk=pooled"
    ):
        transfer.source_of("imagenet", build_model("vgg-gap", 4, width=1 / 16))
    narrow = build_model("vgg-gap", 4, width=1 / 16, trunk="pooled")
    with pytest.raises(UserError, match=r"no filter of ImageNet .* \(--width 0.0625 here\)"):
        transfer.transfer(narrow, transfer.source_of("imagenet", narrow), NAMES)


def test_imagenet_weights_without_a_network(home):
    model = build_model("vgg-gap", 4, width=1 / 16, trunk="pooled")
    with pytest.raises(UserError) as caught:
        transfer.source_of("imagenet", model)
    said = str(caught.value)
    assert (
        "could not be downloaded" in said
        and transfer.IMAGENET_URL in said
        and str(transfer.imagenet_file()) in said
    )
    assert "--init-from none" in said and "\n" not in said
    assert not list(home.glob("*"))


@pytest.fixture
def server(vgg16_bn):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=vgg16_bn[1].parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_imagenet_weights_are_downloaded_and_checked(vgg16_bn, home, server, monkeypatch, capsys):
    monkeypatch.setattr(transfer, "IMAGENET_URL", f"{server}/{vgg16_bn[1].name}")
    weights = transfer.imagenet_weights()
    assert "downloading" in capsys.readouterr().out and transfer.imagenet_file().is_file()
    assert torch.equal(weights["features.0.weight"], vgg16_bn[0][0].weight)
    transfer.imagenet_file().write_bytes(vgg16_bn[1].read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged .* Move it away and start again"):
        transfer.imagenet_weights()
    transfer.imagenet_file().unlink()
    other = vgg16_bn[1].with_name("vgg16_bn-00000000.pth")
    other.write_bytes(b"something else")
    monkeypatch.setattr(transfer, "IMAGENET_URL", f"{server}/{other.name}")
    with pytest.raises(UserError, match="could not be downloaded .*invalid hash value"):
        transfer.imagenet_weights()
    assert not list(home.glob("*00000000*"))


def test_a_file_that_is_another_networks(vgg16_bn, home):
    home.mkdir(parents=True)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, transfer.imagenet_file())
    with pytest.raises(UserError, match="does not hold torchvision's vgg16_bn"):
        transfer.source_of("imagenet", build_model("vgg-gap", 4, width=1 / 16, trunk="pooled"))


# ---- stages and rates ---------------------------------------------------------------------------


def staged(**changes) -> Trainer:
    """A trainer whose trunk and gates were transferred; two epochs of three steps, the first half
    of them frozen."""
    config = (
        CONFIG
        | {
            "freeze_epochs": 1.0,
            "transfer_lr": 0.1,
            "model": "vgg-att3-concat-dp",
            "ema_decay": 0.0,
        }
        | changes
    )
    torch.manual_seed(0)
    model = build_model(config["model"], 4, width=config["width"], dropout=0.0)
    names = frozenset(
        name for name in model.state_dict() if not name.startswith("classifier.linears")
    )
    return Trainer(
        config,
        model,
        Batches(config["batch_size"]),
        torch.device("cpu"),
        precision="fp32",
        transferred=names,
    )


def snapshot(ours):
    return {name: value.clone() for name, value in ours.model.state_dict().items()}


def test_the_frozen_trunk_and_its_statistics_stay_then_everything_trains(capsys):
    ours = staged()
    before = snapshot(ours)
    ours.train_epoch()
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("trunk."), name
    frozen_end = snapshot(ours)
    assert "The trunk trains" not in capsys.readouterr().out
    ours.next_epoch()
    ours.step(*ours.batches.all[0])
    assert "The trunk trains from here on (epoch 2, step 1)" in capsys.readouterr().out
    moved = {
        name
        for name, value in ours.model.state_dict().items()
        if not torch.equal(value, frozen_end[name])
    }
    assert {name for name in moved if name.startswith("trunk.")} >= {
        name
        for name in before
        if name.startswith("trunk.") and name.endswith(("norm.weight", "running_mean"))
    }


def test_transferred_layers_have_a_lower_rate_and_the_schedule_does_not_jump():
    filters = [
        group for group in staged(muon=0.5).optimizer.param_groups if "filter_momentum" in group
    ]
    # of the trunk, and of the global branch
    assert [group["scale"] for group in filters] == [0.05, 0.05]
    ours, rates = staged(muon=0.0), []
    for _ in range(2):
        for images, labels in ours.batches.epoch(0):
            ours.step(images, labels)
            ours.position.step += 1
            rates.append(tuple(sorted({group["lr"] for group in ours.optimizer.param_groups})))
        ours.next_epoch()
    expected = [lr_at(ours.config, step, 3) for step in range(6)]
    assert [pair[1] for pair in rates] == expected
    for low, high in rates:
        assert low == pytest.approx(0.1 * high)


@pytest.mark.parametrize("stop_after", [2, 4])
def test_a_resumed_run_is_in_the_stage_that_it_was_in(stop_after):
    whole, first = staged(), staged()

    def run(ours, until):
        while ours.position.epoch * 3 + ours.position.step < until:
            ours.step(*ours.batches.all[ours.position.step])
            ours.position.step += 1
            if ours.position.step == 3:
                ours.next_epoch()

    run(whole, 6)
    run(first, stop_after)
    second = staged()
    second.load_state(copy.deepcopy(first.state()))
    run(second, 6)
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_the_authors_schedule_for_birds():
    config = {
        "lr": 0.01,
        "schedule": "double-halve",
        "halve_every": 30,
        "epochs": 320,
        "warmup": 0.0,
    }
    rates = [lr_at(config, epoch * 47, 47) for epoch in (0, 29, 30, 59, 60, 89, 90, 120, 150, 319)]
    assert rates == pytest.approx(
        [0.01, 0.01, 0.02, 0.02, 0.04, 0.04, 0.02, 0.01, 0.005, 0.01 / 2**6]
    )


# ---- statistics for evaluation ------------------------------------------------------------------


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


# ---- small micro-batches ------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "start, limit, found", [(8, 40, 32), (8, 5, 4), (8, 0, 0), (16, 9999, 1024)]
)
def test_the_largest_micro_batch_is_found_by_doubling(monkeypatch, start, limit, found):
    ours, tried = staged(), []

    def scarce(self, images):
        tried.append(len(images))
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.level(images.mean((2, 3))[:, :1])

    monkeypatch.setattr(type(ours.model), "forward", scarce)
    ours.model.level = torch.nn.Linear(1, 4)
    state = torch.get_rng_state()
    assert sanity.most_that_fit(ours, start) == found
    assert torch.equal(torch.get_rng_state(), state) and max(tried) <= 1024
    assert all(p.grad is None for p in ours.model.parameters())


def test_a_checkpoint_of_ours_as_source(tmp_path):
    ours = staged()
    content = ours.state() | {
        "format": FORMAT,
        "config": ours.config | {"dataset": "cifar100", "trunk": "", "init_from": "none"},
        "class_names": list(NAMES),
        "input_size": [32, 32],
        "mean": [0.1] * 3,
        "std": [0.3] * 3,
    }
    torch.save(content, tmp_path / "last.pt")
    source = transfer.source_of(str(tmp_path / "last.pt"), ours.model)
    assert (
        source.class_names == NAMES
        and source.mean == (0.1,) * 3
        and "vgg-att3-concat-dp" in source.description
    )
    assert transfer.source_of("none", ours.model) is None
    assert MIN_BN_BATCH == 8
