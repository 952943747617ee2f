"""What several processes under torchrun do together. With one process, each function changes nothing."""

import contextlib

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def all_reduce(tensor, r):
    """Sum `tensor` over all processes, in place."""
    if r.world > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value, r):
    """`value` of every process, in the order of ranks."""
    values = [value] * r.world
    if r.world > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_buffers(module, r):
    """Give all processes the buffers of rank 0 (batch statistics are each process's own)."""
    if r.world > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def wrap(module, r):
    """(`module` as DDP where there are several processes, a context manager without all-reduce)"""
    if r.world == 1:
        return module, contextlib.nullcontext
    ddp_model = DistributedDataParallel(module, device_ids=[r.device.index] if r.device.type == "cuda" else None)
    return ddp_model, ddp_model.no_sync
