"""Runs of several processes under torchrun (DistributedDataParallel). Only folders that offer torchrun import this.

    torchrun --nproc-per-node=2 FOLDER/train.py ...

Every process has a Run; only rank 0 writes and prints. Call `should_stop`, `save_due`, `save` and the collectives on
all ranks. Reduce values over ranks before `log` and `check_finite`.
"""

import contextlib
import os

from common import run
from common.terminal import UserError

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def init_distributed() -> tuple[int, int]:
    """Join the process group under torchrun. Returns (rank, world size): (0, 1) without torchrun."""
    if "RANK" in os.environ and not dist.is_initialized():
        # Import now. If DDP imports this module after init_process_group, its default arguments hold a reference to the
        # group, gloo's threads outlive destroy_process_group(), and the interpreter sometimes aborts at exit.
        from torch.distributed.nn import functional  # noqa: F401

        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def micro_batch_size(bs: int, micro_batch: int | None = None) -> int:
    """Examples of one forward pass of one process, where `bs` examples make one optimizer step of all processes.

    micro_batch: the requested size; None for the whole share of a process. Raises UserError if `bs` does not divide.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if bs % world:
        raise UserError(f"--bs {bs}: does not divide by {world} processes")
    share = bs // world
    if share % (micro_batch or share):
        raise UserError(f"--bs {bs}: the {share} examples of a process do not divide by micro_batch {micro_batch}")
    return micro_batch or share


def micro_batches(module, size: int | None, *tensors: torch.Tensor):
    """Yield the parts of a batch, `size` examples each (the last may have fewer; None: all at once), as tuples with a
    part of each of `tensors`. Gradients are all-reduced only in the backward pass of the last one.

        for inputs, targets in ddp.micro_batches(ddp_model, args.micro_batch, inputs, targets):
            loss = ... * len(inputs) / bs
            loss.backward()

    module: the first result of `Run.wrap`, whose forward pass has to be within the loop, too.
    """
    parts = list(zip(*(tensor.split(size or len(tensor)) for tensor in tensors), strict=True))
    without_all_reduce = getattr(module, "no_sync", contextlib.nullcontext)
    for part in parts[:-1]:
        with without_all_reduce():
            yield part
    yield parts[-1]


class Run(run.Run):
    """run.Run for one process or several; see the top of this file."""

    def __init__(self, args, script, name, **options):
        self.rank, self.world = init_distributed()
        super().__init__(args, script, name, **options)

    def _pick_device(self):
        device = super()._pick_device()
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        return device

    def _open_folder(self, name):
        """Rank 0 opens the folder and broadcasts it. If it cannot, it says why and all processes end."""
        opened, error = (None, None), None
        if self.rank == 0:
            try:
                opened = super()._open_folder(name)
            except UserError as caught:
                error = caught
        folder = [opened[0]]
        if self.world > 1:
            dist.broadcast_object_list(folder)
        if folder[0] is None:
            raise error or SystemExit(1)
        return folder[0], opened[1]

    def _launcher(self):
        return super()._launcher() if self.world == 1 else ["torchrun", f"--nproc-per-node={self.world}"]

    def should_stop(self) -> bool:
        """Has any process been told to stop? A collective."""
        return bool(self.all_reduce(torch.tensor(int(super().should_stop())), dist.ReduceOp.MAX))

    def save_due(self, seconds: float) -> bool:
        """Is the last checkpoint, or the start of process 0, longer ago than `seconds` by its clock? A collective."""
        due = torch.tensor(int(super().save_due(seconds)))
        if self.world > 1:
            dist.broadcast(due, 0)
        return bool(due)

    def _random_states(self):
        return [state for states in self.gather(super()._random_states()) for state in states]

    def __exit__(self, kind, error, trace):
        try:
            super().__exit__(kind, error, trace)
        finally:
            if self.world > 1 and kind in (None, KeyboardInterrupt):
                if kind is None:
                    dist.barrier()  # no process leaves the group while another one still uses it
                dist.destroy_process_group()

    # ------------------------------------------------------------------------------------------- collectives

    def all_reduce(self, tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce `tensor` over all processes, in place, and return it."""
        if self.world > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def gather(self, value) -> list:
        """`value` of every process, in the order of ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast_buffers(self, module: torch.nn.Module):
        """Give all processes the buffers of rank 0 (batch statistics are each process's own)."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def wrap(self, module: torch.nn.Module):
        """(the module as DDP if there are several processes, a context manager without all-reduce)."""
        if self.world == 1:
            return module, contextlib.nullcontext
        ids = [self.device.index] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(module, device_ids=ids)
        return wrapped, wrapped.no_sync
