"""Pretrained weights of torchvision, in torch's own cache."""

from __future__ import annotations

import http.client
import os
import pickle
import socket
import sys
from pathlib import Path

import torch

from common.errors import UserError, one_line

SOCKET_TIMEOUT = 30.0  # seconds without an answer after which a connection counts as broken


def hub_weights(url: str, otherwise: str) -> dict[str, torch.Tensor]:
    """A state dict from torch's cache, or downloaded into it. Its code never runs; the cache holds
    complete files only.

    ``otherwise``: the last words of the error message, what else the user can do. Raises UserError.
    """
    path, timeout = hub_file(url), socket.getdefaulttimeout()
    by_hand = f"Fetch {url} yourself and put it at {path}, {otherwise}"
    cached = path.is_file()
    if not cached:
        print(f"downloading {url} to {path}", flush=True)
    try:
        # torch.hub sets no timeout: a silent server would block the run for ever
        socket.setdefaulttimeout(SOCKET_TIMEOUT)
        return torch.hub.load_state_dict_from_url(
            url,
            map_location="cpu",
            check_hash=True,
            weights_only=True,
            progress=sys.stderr is not None and sys.stderr.isatty(),
        )
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        pickle.UnpicklingError,
        http.client.HTTPException,
    ) as error:
        reason = one_line(error)[:100]
        if cached:
            raise UserError(
                f"{path} is damaged ({reason}). "
                f"Move it away and start again to download it. {by_hand}"
            ) from None
        raise UserError(
            f"the ImageNet weights could not be downloaded ({reason}). {by_hand}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def hub_file(url: str) -> Path:
    """Where torch caches the weights of this address (TORCH_HOME moves the cache)."""
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        # empty means unset by accident; torch would use the current folder
        if os.environ.get(name) == "":
            del os.environ[name]
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
