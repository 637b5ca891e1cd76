"""--init-from, the frozen stage, small micro-batches: what is copied, what trains, and what batch
norm does meanwhile."""

import copy
import functools
import hashlib
import http.server
import re
import threading

import pytest
import torch
import torch.nn.functional as F

from attention_model import build_model
from common.checkpoint import FORMAT
from common.errors import UserError
from tests.helpers.trainers import snapshot, staged
from training import transfer
from training.batch_norm import MIN_BN_BATCH
from training.schedules import lr_at

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
        "starting fresh: classifier.linears.0 (other classes); not used: classifier.linears.0"
        in said
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
        "gates.conv10.compatibility.W (not there)" in fresh
        and "gates.conv10.compatibility.u (1 x 32 there, 1 x 16 here)" in fresh
        and re.search(r"classifier.linears.0 \(\d+ x \d+ there, \d+ x \d+ here\)", fresh)
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


# ---- small micro-batches ------------------------------------------------------------------------


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
