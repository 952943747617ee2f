"""What can be checked of GPUs without one. A tensor on the meta device has a shape and no values, and does not mix with
tensors of the CPU here: a training step on it fails where a tensor is made without its device."""

import contextlib
import importlib
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch.fx.experimental._config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import FOLDERS, load, quick, run, train

STEPS = 3
READS = {  # the methods that read a tensor, and what they answer where it has no values
    "item": lambda tensor: 0.5,
    "tolist": lambda tensor: torch.zeros(tensor.shape).tolist(),
    "__bool__": lambda tensor: True,
    "cpu": lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype),
    "numpy": lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype).numpy(),
}


class SameDevice(TorchDispatchMode):
    """No operation takes tensors of two devices, but for copies and scalars. Many kernels do not look."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor) and value.dim()]
        devices = {tensor.device.type for tensor in tensors}
        copies = operation.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
        assert len(devices) < 2 or copies, f"{operation} takes tensors of two devices"
        return operation(*args, **kwargs or {})


class Enough(Exception):
    """The training has made its steps."""


def answered(read, answer, reads=None):
    """The method `read` of a tensor, with `answer` for those on the meta device, which are noted in `reads`."""

    def read_or_answer(tensor, *args, **options):
        if not tensor.is_meta:
            return read(tensor, *args, **options)
        if reads is not None:
            reads.append(read.__name__)
        return answer(tensor)

    return read_or_answer


@pytest.fixture
def on_meta_device(monkeypatch):
    """Every run computes on the meta device, until it has made a few steps: then it raises Enough. The fixture is a
    list: the names of the methods that read tensors, step by step."""
    reads = []
    for name, answer in READS.items():
        monkeypatch.setattr(torch.Tensor, name, answered(getattr(torch.Tensor, name), answer, reads))
    optimizer = importlib.import_module("torch.optim.optimizer")
    fused_on = [*optimizer._get_fused_kernels_supported_devices(), "meta"]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: fused_on)
    monkeypatch.setattr(torch, "equal", answered(torch.equal, lambda tensor: True))
    monkeypatch.setattr(run.Run, "check_finite", lambda *args: None)
    monkeypatch.setattr(run.Run, "_pick_device", lambda r: torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    backward, steps = torch.Tensor.backward, []

    def counted(loss, *args, **options):
        backward(loss, *args, **options)
        assert loss.is_meta
        steps.append(list(reads))
        reads.clear()
        if len(steps) == STEPS:
            raise Enough

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True), SameDevice():
        yield steps


@pytest.mark.parametrize("folder", [name for name in FOLDERS if name != "lms"])  # which computes in NumPy
def test_a_training_step_makes_its_tensors_on_the_device(folder, on_meta_device, tmp_path, monkeypatch):
    if folder == "nanogpt":  # its first loss is read, and judged
        monkeypatch.setattr(load(folder), "check_start", lambda *args, **options: 1.0)
    if folder == "gan":  # which trains a classifier first, and measures the held-out images
        monkeypatch.setattr(load(folder, "features"), "load", mock.Mock())
        judge = mock.Mock(protocol=lambda samples: {}, classes=1)
        monkeypatch.setattr(load(folder, "fid"), "Judge", lambda *args: judge)
        monkeypatch.setattr(load(folder, "fid"), "describe", lambda protocol: "a distance")
    with pytest.raises(Enough):
        train(folder, *quick(folder, bs=4), "--out", tmp_path / "run")
    assert len(on_meta_device) == STEPS
    by_transformers = ["__bool__"] if folder == "distilgpt2" else []  # which looks for packed sequences in each batch
    assert on_meta_device[-1] == by_transformers, "a GPU stalls where a tensor is read between two steps"


# ------------------------------------------------------------------------------------------------------- torch.compile


def networks_of_a_step(folder, tmp_path):
    """[(network, arguments, options)]: the first call of each network in the first training step of a quick run; of
    modules that call each other, the outer one."""
    calls = {}
    running = []
    call = torch.nn.Module.__call__

    def recorded(module, *args, **options):
        if not running and module.training and torch.is_grad_enabled():
            calls.setdefault(type(module), (module, args, options))
        running.append(module)
        try:
            return call(module, *args, **options)
        finally:
            running.pop()

    def stop(*args, **options):
        raise Enough

    with mock.patch.object(torch.nn.Module, "__call__", recorded), mock.patch.object(torch.Tensor, "backward", stop):
        with pytest.raises(Enough):
            train(folder, *quick(folder, precision="fp32"), "--out", tmp_path / "run")
    return list(calls.values())


@pytest.mark.slow
@pytest.mark.parametrize("folder", [name for name in FOLDERS if name != "lms"])
def test_networks_are_compiled_without_a_graph_break(folder, tmp_path, monkeypatch):
    if folder == "gan":
        monkeypatch.setattr(load(folder, "features"), "load", mock.Mock())
        judge = mock.Mock(protocol=lambda samples: {}, classes=1)
        monkeypatch.setattr(load(folder, "fid"), "Judge", lambda *args: judge)
        monkeypatch.setattr(load(folder, "fid"), "describe", lambda protocol: "a distance")
    networks = networks_of_a_step(folder, tmp_path)
    assert networks
    for network, args, options in networks:
        torch._dynamo.reset()
        with torch._dynamo.config.patch(allow_rnn=True):  # else PyTorch does not try its LSTM and GRU
            found = torch._dynamo.explain(network)(*args, **options)
        assert found.graph_count == 1 and not found.break_reasons, f"{type(network).__name__}: {found.break_reasons}"
