"""Weights on a server: torchvision's, kept where torch keeps them."""

from __future__ import annotations

import http.client
import os
import pickle
import socket
import sys
from pathlib import Path

import torch

from common.errors import UserError, one_line

SOCKET_TIMEOUT = 30.0  # seconds without an answer until a connection counts as broken


def hub_file(url: str) -> Path:
    """Where torch keeps the weights of that address (TORCH_HOME moves it)."""
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        if os.environ.get(name) == "":  # not set, by accident; torch would take the current folder
            del os.environ[name]
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def hub_weights(url: str, otherwise: str) -> dict[str, torch.Tensor]:
    """A state dict from torch's cache or its server, whose code never runs. The cache holds whole
    files only.

    Raises UserError, which ends in what else can be done."""
    path, timeout = hub_file(url), socket.getdefaulttimeout()
    by_hand = f"Fetch {url} yourself and put it at {path}, {otherwise}"
    there = path.is_file()
    if not there:
        print(f"downloading {url} to {path}", flush=True)
    try:
        # torch.hub sets none: a silent server would hold us for ever
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
        if there:
            raise UserError(
                f"{path} is damaged ({one_line(error)[:100]}). Move it away and start again, to have it "
                f"downloaded. {by_hand}"
            ) from None
        raise UserError(
            f"the ImageNet weights could not be downloaded ({one_line(error)[:100]}). {by_hand}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
