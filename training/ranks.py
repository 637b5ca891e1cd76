"""Train one network on several GPUs, a process each: torchrun --nproc-per-node=N train_cifar100.py.

Every rank takes its part of each batch and of the evaluation set; gradients, sums and counts are
added up, so that all ranks hold the same numbers at every step. Rank 0 alone writes files and
standard output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import rendezvous

from common.errors import UserError, one_line, printable

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)  # until all ranks must have started
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # a rank's timeout for the others, once they have met


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process (``rank``) of ``world_size``; ``local_rank`` is its number on this machine. In a
    process alone, every method does nothing."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This rank's part of ``total`` items: near-equal parts in order, as those of
        Tensor.tensor_split."""
        least, larger = divmod(total, self.world_size)  # the first ranks have one item more
        start = self.rank * least + min(self.rank, larger)
        return slice(start, start + least + (self.rank < larger))

    def all_reduce(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over the ranks."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Waits for the device."""
        if self.world_size == 1:
            return flag
        total = torch.tensor(float(flag), device=device_of_this_rank(self))
        dist.all_reduce(total)
        return total.item() > 0

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=device_of_this_rank(self))
        return box[0]

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy rank 0's tensors into those of every rank."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def is_peer_failure(self, error: RuntimeError) -> bool:
        """Whether an error means that another rank has failed, not this one."""
        if self.world_size == 1:
            return False
        return isinstance(error, dist.DistError) or "gloo" in str(error).lower()

    @property
    def steps_are_whole(self) -> bool:
        """Whether the weights may be saved after a rank has failed. NCCL is asynchronous: after a
        rank dies, this step may hold partial sums."""
        return self.world_size == 1 or dist.get_backend() != "nccl"

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the block first; the others then find its work done (a download, a cache)."""
        if self.world_size > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.world_size > 1 and self.is_main:
            dist.barrier()


ALONE = Ranks()


def device_of_this_rank(ranks: Ranks) -> torch.device:
    """Where this rank's tensors must be for a collective call."""
    on_gpus = dist.get_backend() == "nccl"
    return torch.device("cuda", ranks.local_rank) if on_gpus else torch.device("cpu")


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
REMEDY = f"start with torchrun, or without it unset {' '.join(VARIABLES)}"


def ranks_from_environment() -> Ranks:
    """The ranks as torchrun sets them; a process alone without it. An empty variable counts as
    unset.

    Raises UserError where the variables are incomplete or contradict each other, left over from
    something else."""
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given.get("WORLD_SIZE", "1") == "1":
        return Ranks()
    missing = [name for name in VARIABLES if name not in given]
    try:
        rank, world_size, local_rank, port = (
            int(given.get(name, 0)) for name in VARIABLES if name != "MASTER_ADDR"
        )
        if not missing and 0 <= rank < world_size and local_rank >= 0 and 0 < port < 2**16:
            return Ranks(rank, world_size, local_rank)
    except ValueError:
        pass
    found = " ".join(f"{name}={printable(value)[:50]}" for name, value in given.items())
    without = f" without {', '.join(missing)}" if missing else ""
    raise UserError(f"the environment says {found}{without}, as torchrun would not: {REMEDY}", 2)


@contextlib.contextmanager
def init_distributed(device: str) -> Iterator[Ranks]:
    """Join the other ranks (NCCL where every rank has a GPU, else gloo), and leave them at the end.
    On every rank but the first, standard output is silent; errors are not.

    Raises UserError where this machine has fewer GPUs than ranks, or a rank is missing."""
    ranks = ranks_from_environment()
    if ranks.world_size == 1:
        yield ranks
        return
    on_gpus = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
    if on_gpus and (":" in device or ranks.local_rank >= torch.cuda.device_count()):
        raise UserError(
            f"torchrun started rank {ranks.local_rank} on a machine with "
            f"{torch.cuda.device_count()} GPUs: give --nproc-per-node at most that, and no number "
            f"in --device (CUDA_VISIBLE_DEVICES chooses)",
            2,
        )
    if on_gpus:
        torch.cuda.set_device(ranks.local_rank)
    options = {"device_id": torch.device("cuda", ranks.local_rank)} if on_gpus else {}
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if ranks.is_main:
        print(
            f"Waiting for {ranks.world_size} ranks to meet at {address}, "
            f"as RANK, WORLD_SIZE and MASTER_ADDR say.",
            flush=True,
        )
    try:
        store, rank, count = next(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    except (RuntimeError, ValueError, OSError) as error:  # DistError among them
        raise UserError(
            f"rank {ranks.rank} has not met the {ranks.world_size - 1} others at {address} "
            f"({one_line(error)[:150]}). Are they running, and can this machine reach "
            f"MASTER_ADDR? Else {REMEDY}"
        ) from None
    # the others wait while the first one downloads and decodes the data set
    store.set_timeout(COLLECTIVE_TIMEOUT)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        store=store,
        rank=rank,
        world_size=count,
        timeout=COLLECTIVE_TIMEOUT,
        **options,
    )
    succeeded = False
    try:
        silence = contextlib.redirect_stdout(io.StringIO())
        with contextlib.nullcontext() if ranks.is_main else silence:
            yield ranks
        with contextlib.suppress(RuntimeError):
            # rank 0 hosts the store: it must not leave before the others are done
            dist.barrier()
        succeeded = True
    finally:
        if not on_gpus:
            # before 2.8 PyTorch holds the GIL while it waits for gloo's threads, which may need it
            time.sleep(0.2)
        # After an error on this rank alone, NCCL would wait here for the others, and they for this
        # one: torchrun ends them as soon as this process has ended.
        if succeeded or not on_gpus:
            with contextlib.suppress(RuntimeError):  # a rank that died is missing here too
                dist.destroy_process_group()
