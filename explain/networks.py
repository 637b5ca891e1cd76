"""Trained networks, from a checkpoint of this project or from torchvision."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.checkpoint import inference_weights, load_model, read_checkpoint
from common.device import DTYPES, Precision, choose_device, choose_precision
from common.errors import UserError, printable
from common.files import expand_user
from data import eval_batch_size, to_input
from explain.class_names import read_class_names
from explain.images import View, each_pixels, is_one, view_of
from explain.inference import eval_no_grad, logits_of
from explain.layers import default_layer, nearest_names
from explain.maps import (
    GRADIENT_METHODS,
    raw_attention,
    raw_class_activation,
    raw_gradient_maps,
    upsample_and_scale,
)
from explain.smoothing import smoothed
from explain.weights import from_torchvision


@dataclass(repr=False, eq=False)
class TrainedNetwork:
    """A trained classifier with its classes, input size and normalization; see ``load_network``.

    ``predict``, ``attention``, ``cam`` and ``preprocess`` take images in these forms:

    - a file name (str or Path): opened as in training, turned upright by its EXIF orientation;
    - a PIL image of any mode, as it is (ImageOps.exif_transpose turns a photo upright);
    - an array or a tensor (H, W), (H, W, 3) or (3, H, W): uint8, or floats from 0 to 1. A batch of
      them has a dimension more. Do not normalize: the network does.
    - a list of any of these, of any sizes, or an iterator. It is worked through in batches of
      ``batch_size``, so the memory for many files is that of their results.

    One image gives one result; several (a list, a batch) give a list of results in the same order.

    Raises:
        UserError: a file cannot be read as an image; the message names it.
        ValueError: anything else that is not as above, such as an empty list, floats beyond [0, 1],
            NaN, or a wrong number of channels or dimensions.

    Several threads may use one network: they read their files in parallel, and the network serves
    them one after the other. Do not run ``model`` itself in one thread while another asks for maps:
    these put hooks on it meanwhile. To train it, take a copy (copy.deepcopy(network.model)).
    """

    model: nn.Module  # gives logits (N, classes) for what preprocess gives
    class_names: tuple[str, ...]
    size: tuple[int, int]  # (height, width) of its input in pixels
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    description: str
    config: dict = field(default_factory=dict)  # of the run; empty for torchvision's
    precision: str = "fp32"  # of the forward pass: fp32, bf16 or fp16

    def __repr__(self) -> str:
        return f"<TrainedNetwork {self.description}>"

    def place_on(self, device: torch.device) -> None:
        self.model.to(device, memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def batch_size(self) -> int:
        """Images per batch on its device."""
        return eval_batch_size(self.size, self.device)

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass in ``precision``; the weights stay in float32."""
        return Precision(self.precision, self.device).context()

    # ---- input ----------------------------------------------------------------------------------

    def preprocess(self, images: object) -> Tensor:
        """The input of ``model``: (N, 3, *size) float32 on the network's device, normalized by
        ``mean`` and ``std``. N is 1 for one image.

        Each image is resized as a whole, regardless of its aspect ratio; a network trained on
        centered squares (``sees_center``) gets the square.

        Example:
            >>> batch = network.preprocess(["photo.jpg", "other.png"])
            >>> logits = network.model(batch)  # (2, classes), with gradients if they are on
        """
        return self.batch([self.view(pixels).pixels for pixels in each_pixels(images)])

    @property
    def sees_center(self) -> bool:
        """Whether it was trained on the centered square of each picture."""
        return self.config.get("crop") == "center"

    def view(self, pixels: np.ndarray) -> View:
        """What the network sees of a picture, pixels (H, W, 3)."""
        return view_of(pixels, self.size, self.sees_center)

    def batch(self, images: Tensor | Sequence[np.ndarray]) -> Tensor:
        """Levels from 0 to 255, (N, H, W, 3) or a list of (H, W, 3) of one size -> (N, 3, *size),
        the input of the network: resized whole if they have another size, and normalized, as in
        evaluation."""
        if not torch.is_tensor(images):
            images = torch.from_numpy(np.stack(images))
        # whatever the default type was when the constants were made
        return to_input(images.to(self.device), self.mean, self.std, self.size).float()

    def views_and_batches(self, images: object) -> Iterator[tuple[list[View], Tensor]]:
        """The images in batches, one file in memory at a time."""
        views = (self.view(pixels) for pixels in each_pixels(images))
        while chunk := list(itertools.islice(views, self.batch_size)):
            yield chunk, self.batch([view.pixels for view in chunk])

    # ---- output ---------------------------------------------------------------------------------

    def probabilities(self, batch: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes) float32, on the CPU."""
        with eval_no_grad(self.model), torch.no_grad(), self.autocast():
            return logits_of(self.model, batch).float().softmax(1).cpu()

    def predict(
        self, images: object, k: int = 5
    ) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
        """The ``k`` most probable classes, or all if there are fewer: [(class name, probability),
        ...], the best first. A list of such lists for several images. Raises as above, and
        ValueError for a k below 1.

        Example:
            >>> network.predict("photo.jpg", k=2)
            [("dog", 0.93), ("wolf", 0.04)]
            >>> for file, best in zip(files, network.predict(files, k=1)):
            ...     print(file, best[0])
        """
        if k < 1:
            raise ValueError(f"k is {k}: ask for 1 class or more")
        results = []
        for _, batch in self.views_and_batches(images):
            best = self.probabilities(batch).topk(min(k, len(self.class_names)))
            for values, classes in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                names = (self.class_names[c] for c in classes)
                results.append(list(zip(names, values, strict=True)))
        return results[0] if is_one(images) else results

    def attention(
        self, images: object, query: object = None, smooth: bool = False
    ) -> dict[str, np.ndarray] | list[dict[str, np.ndarray]]:
        """The attention map of each level, {"conv7": (H, W), ...}: float32 arrays from 0 to 1 at
        the size of the picture, upsampled bilinearly and divided by their maximum. 0 outside of the
        part that the network sees. A list of such dicts for several images.

        The size of a file is that of open_rgb: upright, and smaller than in the file where that has
        over 67 megapixels.

        Args:
            query: another image, whose global feature takes the place of the images' own (dp and
                gate networks; see ``attention_maps`` in explain/maps.py).
            smooth: the mean over flips and small shifts of the image (explain/smoothing.py).

        Raises as above, and ValueError for a network without attention, or a query that changes
        nothing.

        Example:
            >>> maps = network.attention("photo.jpg")
            >>> plt.imshow(open_rgb("photo.jpg")); plt.imshow(maps["conv10"], alpha=0.5)
        """
        asked = None if query is None else self.preprocess(query)
        if asked is not None and len(asked) != 1:
            raise ValueError(f"query: expected one image, got {len(asked)}")

        def raw(batch: Tensor) -> Mapping[str, Tensor]:
            return raw_attention(self.model, batch, asked)

        results = []
        for views, batch in self.views_and_batches(images):
            with self.autocast():
                found = smoothed(raw, batch) if smooth else raw(batch)
            for i, view in enumerate(views):
                results.append({level: placed(maps[i], view) for level, maps in found.items()})
        return results[0] if is_one(images) else results

    def cam(
        self,
        images: object,
        target: str | int | None = None,
        method: str = "gradcam",
        layer: nn.Module | str | None = None,
        smooth: bool = False,
    ) -> np.ndarray | list[np.ndarray]:
        """The class activation map: where the evidence for a class is, (H, W) as in ``attention``.
        A list of arrays for several images.

        Args:
            target: name or number of the class; None: the one that the network sees in each image.
            method: "gradcam", "gradcam++", "hirescam" or "layercam", for any network, or "cam",
                for those that end in average pooling and one linear layer. See explain/maps.py.
            layer: of the gradient methods, a module of ``model`` or its name; None: the last with
                an extent.
            smooth: the mean over flips and small shifts of the image (explain/smoothing.py).

        Raises:
            ValueError, UserError: as above, and ValueError for a class or a layer that does not
                exist, or a method that does not apply to the network.

        Example:
            >>> network.cam("photo.jpg").shape  # the picture's height and width
            (1080, 1920)
            >>> network.cam("photo.jpg", target="wolf", method="layercam", layer="trunk.block4")
        """
        if method not in ("cam", *GRADIENT_METHODS):
            known = ", ".join(("cam", *GRADIENT_METHODS))
            raise ValueError(f"method {method!r}: expected one of {known}")
        if method == "cam" and layer is not None:
            raise ValueError(f"layer {layer!r} is for the gradient methods, not for cam")
        wanted = None if target is None else class_index(target, self.class_names)
        results = []
        for views, batch in self.views_and_batches(images):
            if method != "cam" and layer is None:
                layer = default_layer(self.model, batch)
            if wanted is None:
                targets = self.probabilities(batch).argmax(1)
            else:
                targets = torch.full((len(views),), wanted, device="cpu")
            raw = functools.partial(raw_map, self.model, targets, method, layer)
            with self.autocast():
                maps = (smoothed(raw, batch) if smooth else raw(batch))[method]
            results += [placed(maps[i], view) for i, view in enumerate(views)]
        return results[0] if is_one(images) else results


def raw_map(
    model: nn.Module,
    targets: Tensor,
    method: str,
    layer: nn.Module | str | None,
    batch: Tensor,
) -> dict[str, Tensor]:
    """{method: (N, h, w)} of the classes ``targets`` (N,)."""
    if method == "cam":
        return {method: raw_class_activation(model, batch, targets)}
    (found,) = raw_gradient_maps(model, batch, [targets], [method], [layer]).values()
    return {method: found[method][0]}


def placed(raw: Tensor, view: View) -> np.ndarray:
    """A map (h, w) of a view at its place in the picture: (H, W) float32, scaled to [0, 1]."""
    x0, y0, x1, y1 = view.box
    result = np.zeros(view.size, np.float32)
    result[y0:y1, x0:x1] = upsample_and_scale(raw[None], (y1 - y0, x1 - x0))[0].cpu().numpy()
    return result


# ---- sources ------------------------------------------------------------------------------------


def load_network(
    checkpoint: str | Path | None = None,
    *,
    arch: str | None = None,
    weights: str | Path | None = None,
    class_names: str | Path | None = None,
    device: str | torch.device = "auto",
    precision: str = "fp32",
) -> TrainedNetwork:
    """A trained network, ready for images, in evaluation mode.

    Args:
        checkpoint: of a run of this project, RUN/last.pt. Code in it never runs.
        arch, weights: instead of a checkpoint, a classifier of torchvision ("resnet50"), and its
            weights: "DEFAULT" or another name of torchvision's (downloaded into torch's cache), or
            a file with a state dict of yours (see explain/weights.py). ``description`` says what
            was taken of it.
        class_names: a file with names for the classes: one per line, or JSON; see
            explain/class_names.py.
        device: auto (a GPU if there is one), cpu, cuda, or cuda:N.
        precision: fp32; bf16 or fp16 by autocast, faster on a GPU; auto: what training uses there.
            Maps and probabilities are float32 in any case.

    Raises:
        UserError: a file, the device, or the torchvision network does not exist or does not fit.
        ValueError: no network is named, or two are.

    Example:
        >>> network = load_network("RUN/last.pt")
        >>> network.predict("photo.jpg", k=2)
        [("dog", 0.93), ("wolf", 0.04)]
        >>> load_network(arch="resnet50", weights="DEFAULT", device="cuda", precision="bf16")
    """
    if (checkpoint is None) == (arch is None) or (arch is None) != (weights is None):
        raise ValueError(
            'name one network: load_network("RUN/last.pt"), '
            'or load_network(arch="resnet50", weights="DEFAULT" or a file of yours)'
        )
    place = choose_device(str(device))
    if precision not in ("auto", *DTYPES):
        raise UserError(f"precision {precision}: expected auto, {', '.join(DTYPES)}", 2)
    chosen = choose_precision(precision, place)
    # whatever the caller has set: weights made in inference mode could never have gradients
    with torch.inference_mode(False), torch.device("cpu"):
        if arch is None:
            network = from_checkpoint(str(expand_user(checkpoint)))
        else:
            parts = from_torchvision(arch, str(expand_user(weights)))
            network = TrainedNetwork(**parts._asdict())
        if class_names is not None:
            path = expand_user(class_names)
            network.class_names = read_class_names(path, len(network.class_names))
            network.description += f"; class names of {printable(path)}"
        network.precision = chosen
        network.place_on(place)
    return network


def from_checkpoint(path: str) -> TrainedNetwork:
    """The network of a checkpoint. Raises UserError for a file that is not one of this project's
    checkpoints."""
    saved = read_checkpoint(path)
    config, class_names = saved["config"], tuple(saved["class_names"])
    height, width = map(int, saved["input_size"])
    model = load_model(saved).float()
    model.load_state_dict(inference_weights(saved))  # again: another default type had rounded them
    return TrainedNetwork(
        model=model,
        class_names=class_names,
        size=(height, width),
        mean=tuple(saved["mean"]),
        std=tuple(saved["std"]),
        description=f"{printable(path)}: {config['model']}, width {config['width']:g}, "
        f"{len(class_names)} classes, {height}x{width} px",
        config=config,
    )


# ---- classes ------------------------------------------------------------------------------------


def class_index(target: str | int, names: tuple[str, ...]) -> int:
    """The index of a class: of its name, ignoring case, or else its number, also as text. Raises
    ValueError with the nearest names."""
    if target in names:
        return names.index(target)
    wanted = folded(str(target).strip())
    matches = [i for i, name in enumerate(names) if folded(name) == wanted]
    if matches and isinstance(target, str):
        return matches[0]
    if wanted.isascii() and wanted.removeprefix("-").isdigit():
        if len(wanted) < 20 and 0 <= int(wanted) < len(names):
            return int(wanted)
        raise ValueError(f"target {target}: the classes are numbered 0 to {len(names) - 1}")
    near = nearest_names(str(target), names)
    raise ValueError(f"target {target}: there is no such class; nearest: {near}")


def folded(name: str) -> str:
    """A class name without case, its underscores as spaces."""
    return name.casefold().replace("_", " ")
