"""The files of --export: .pt2 (torch.export) and .onnx (torch.onnx). For each, how a network is
written, loaded again and used."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attention_model import Network
from common.errors import UserError, one_line
from common.process import program

INPUT = "images"  # the input's name
METADATA = "metadata.json"  # the description's name in a .pt2 file
OPSET = 18  # of ONNX; onnxruntime has it since 1.14 (2023)
ONNX_BYTES = 2**31 - 2**20  # of weights that fit one ONNX file, with room for the graph


# ---- the network --------------------------------------------------------------------------------


class NormalizingNetwork(nn.Module):
    """RGB images (N, 3, H, W) in [0, 1] -> {"logits": (N, classes), and each map, (N, h, w), by the
    name of its level}.

    Takes the network over: a parameter that no output depends on is replaced by a single NaN, which
    would show in any output that does. With pc they are a quarter of the file.
    """

    def __init__(self, network: Network, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))
        unused = network.parameters_without_gradient()
        for name, parameter in network.named_parameters():
            if name in unused:
                parameter.data = torch.full((1,), torch.nan)
        # so that outputs["logits"].numpy() needs no detach()
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits, maps = self.network((images - self.mean) / self.std, return_attention=True)
        return {"logits": logits, **maps}

    def roles(self) -> dict[str, str]:
        """What each output is, in their order."""
        roles = {"logits": "before the softmax"}
        for level in self.network.levels:
            gate = level in self.network.sigmoid_levels
            roles[level] = "gate in [0, 1]" if gate else "attention map, sums to 1"
        return roles


class AsTuple(nn.Module):
    """A network with a tuple of outputs instead of a dict: ONNX names them by their order."""

    def __init__(self, network: NormalizingNetwork):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(images).values())


# ---- what a format is ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """The network of a file."""

    run: Callable[[Tensor], dict[str, Tensor]]
    runtime: str  # what runs it, with its version


@dataclass(frozen=True)
class Format:
    """How a kind of file is written, read and used."""

    description: str
    advice: str  # for a file that is not what it should be
    # (network, (height, width), description) -> the file; raises UserError
    content: Callable[[NormalizingNetwork, Sequence[int], dict], bytes]
    load: Callable[[Path], Loaded]
    # the description in a file; raises any error for a file without one
    metadata: Callable[[Path], dict]
    # (file, (height, width), names of the outputs) -> lines of Python
    usage: Callable[[Path, Sequence[int], Sequence[str]], list[str]]
    require: Callable[[], None] = lambda: None  # raises UserError where a package is missing


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor log lines: those of PyTorch's exporters are about its own code. Errors
    are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def example(size: Sequence[int]) -> Tensor:
    """Images to trace a network with. Two: a batch of one would be taken for the only size."""
    return torch.zeros(2, 3, *size)


def one_image(function: str, size: Sequence[int]) -> str:
    """The call that makes an image to try."""
    return f"{function}({', '.join(map(str, (1, 3, *size)))})"


# ---- .pt2 ---------------------------------------------------------------------------------------


def pt2_content(network: NormalizingNetwork, size: Sequence[int], metadata: dict) -> bytes:
    """The file of torch.export."""
    batch = torch.export.Dim("batch", min=1, max=2**31 - 1)  # PyTorch 2.6 needs an upper limit
    with quiet():
        exported = torch.export.export(
            network, (example(size),), dynamic_shapes={INPUT: {0: batch}}, strict=False
        )
        remove_device_checks(exported)
        # into memory, as PyTorch's own writer raises no OSError on a full disk
        buffer = io.BytesIO()
        torch.export.save(exported, buffer, extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


def remove_device_checks(exported: torch.export.ExportedProgram) -> None:
    """Remove the assertions that tensors are on the CPU, as they were in the export: the network
    has to run on a GPU as well, after ``.to("cuda")``."""
    for node in list(exported.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            exported.graph.erase_node(node)
    exported.graph_module.recompile()


def load_pt2(path: Path) -> Loaded:
    # opened here, as PyTorch warns of names that do not end in .pt2
    with open(path, "rb") as file, quiet():
        return Loaded(torch.export.load(file).module(), f"PyTorch {torch.__version__}")


def pt2_metadata(path: Path) -> dict:
    # without PyTorch: loading somebody else's file could run code
    with zipfile.ZipFile(path) as archive:
        # the folder in the archive depends on PyTorch's version
        [name] = [name for name in archive.namelist() if Path(name).name == METADATA]
        return json.loads(archive.read(name))


def pt2_usage(path: Path, size: Sequence[int], outputs: Sequence[str]) -> list[str]:
    return [
        "import torch",
        f'about = {{"{METADATA}": ""}}  # will hold the names of the classes, and more',
        f"network = torch.export.load({str(path)!r}, extra_files=about).module()",
        f"outputs = network({one_image('torch.rand', size)})  # {', '.join(outputs)}",
    ]


# ---- .onnx --------------------------------------------------------------------------------------


def require_onnx() -> None:
    """Raises UserError where the package onnx is missing."""
    try:
        import onnx  # noqa: F401 - few need it: it is no requirement
    except ImportError as error:
        raise UserError(
            f"an .onnx file needs the package onnx ({one_line(error)[:100]}), and running it "
            f"onnxruntime:\n  {program('python')} -m pip install onnx onnxruntime"
        ) from None


def onnx_content(network: NormalizingNetwork, size: Sequence[int], metadata: dict) -> bytes:
    """The file of torch.onnx, with the weights in it. Raises UserError where they do not fit."""
    import onnx

    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    if weights > ONNX_BYTES:
        raise UserError(
            f"the network's weights take {weights / 2**30:.1f} GiB, and an ONNX file holds less "
            f"than 2 GiB: export to a .pt2 file"
        )
    outputs, buffer = list(network.roles()), io.BytesIO()
    with quiet():
        # dynamo=False: the exporter that builds on torch.export fails on batch norm in PyTorch 2.6
        # and on adaptive pooling in 2.11, needs one more package, and takes ten times as long
        torch.onnx.export(
            AsTuple(network),
            (example(size),),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=outputs,
            dynamic_axes={name: {0: "batch"} for name in (INPUT, *outputs)},
        )
    model = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(
        model,
        {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in metadata.items()
        },
    )
    return model.SerializeToString()


def load_onnx(path: Path) -> Loaded:
    """The network in onnxruntime or, where that is missing, in onnx's own evaluator, which is
    slow."""
    content = path.read_bytes()
    try:
        import onnxruntime
    except ImportError:
        return load_in_evaluator(content)
    onnxruntime.set_default_logger_severity(3)  # errors only
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return Loaded(
        lambda images: by_name(names, session.run(None, {INPUT: images.numpy()})),
        f"onnxruntime {onnxruntime.__version__}",
    )


def load_in_evaluator(content: bytes) -> Loaded:
    """The network in the evaluator of the package onnx."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load_from_string(content))
    names = evaluator.output_names
    return Loaded(
        lambda images: by_name(names, evaluator.run(None, {INPUT: images.numpy()})),
        f"onnx.reference {onnx.__version__}, as onnxruntime is not installed",
    )


def by_name(names: Sequence[str], arrays: Sequence[Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def onnx_metadata(path: Path) -> dict:
    import onnx

    model = onnx.load(path, load_external_data=False)
    return {each.key: each.value for each in model.metadata_props}


def onnx_usage(path: Path, size: Sequence[int], outputs: Sequence[str]) -> list[str]:
    images = f'{one_image("np.random.rand", size)}.astype("float32")'
    return [
        "import numpy as np, onnxruntime",
        f"session = onnxruntime.InferenceSession({str(path)!r})",
        "about = session.get_modelmeta().custom_metadata_map  # the names of the classes, and more",
        f'[{", ".join(outputs)}] = session.run(None, {{"{INPUT}": {images}}})',
    ]


FORMATS = {
    ".pt2": Format(
        f"torch.export of PyTorch {torch.__version__}; an older one may not read it",
        "Another version of PyTorch may help, or an .onnx file",
        pt2_content,
        load_pt2,
        pt2_metadata,
        pt2_usage,
    ),
    ".onnx": Format(
        f"ONNX opset {OPSET}",
        "A newer onnxruntime may help, or a .pt2 file",
        onnx_content,
        load_onnx,
        onnx_metadata,
        onnx_usage,
        require_onnx,
    ),
}
