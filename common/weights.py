"""The weights of networks in files: checkpoints of a run, and safetensors files. Both are validated."""

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

from common.files import write
from common.machine import memory_bytes
from common.terminal import UserError

import torch
from torch.overrides import TorchFunctionMode


class Checkpoint(dict):
    """The content of a checkpoint. A missing key raises a UserError that names the file."""

    path: Path

    def __missing__(self, key):
        raise UserError(f"{self.path}: is not a checkpoint of this experiment: {key!r} is missing")

    def load_into(self, **parts):
        """Load the state dicts of the checkpoint into the modules and optimizers `parts`; a list takes a list."""
        for name, part in parts.items():
            several = isinstance(part, list)
            states = self[name] if several else [self[name]]
            targets = part if several else [part]
            try:
                for target, state in zip(targets, states, strict=True):
                    target.load_state_dict(state)
            except (RuntimeError, LookupError, ValueError, AttributeError, TypeError) as error:
                detail = " ".join(str(error).split())[:100]
                raise UserError(f"{self.path}: is the checkpoint of another model ({detail})") from error

    def check_shapes(self, make: Callable[[], torch.nn.Module]):
        """Raise UserError if `model` in the checkpoint is not that of the network that `make` makes. To be called
        before it is made: the network that a damaged file describes may fit no memory."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a network on the meta device takes no values
            self.load_into(model=make_without_memory(make))


def read_checkpoint(path: Path, device="cpu") -> Checkpoint:
    """The checkpoint at `path`, with its tensors on `device`. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: is {'not a regular file' if path.exists() else 'missing'}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds
        whole = path.is_file() and zipfile.is_zipfile(path)
        reason = "holds more than tensors, numbers and strings, or is damaged" if whole else "is damaged or cut short"
        raise UserError(f"{path}: is not a readable checkpoint: it {reason}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: is not a checkpoint of a run: it holds a {type(state).__name__}")
    counts = [key for key in ("rows", "epoch", "step") if type(state.get(key, 0)) is not int or state.get(key, 0) < 0]
    if counts or not isinstance(state.get("best", 0), int | float) or not isinstance(state.get("random", []), list):
        raise UserError(f"{path}: is not a checkpoint of a run: its {', '.join(counts) or 'state'} cannot be right")
    state = Checkpoint(state)
    state.path = path
    return state


def write_checkpoint(path: Path, state: dict):
    """Write modules, optimizers, lists of them, tensors, numbers and strings. Raises UserError."""
    content = io.BytesIO()
    torch.save({name: state_of(value) for name, value in state.items()}, content)
    write(path, content.getbuffer())


def state_of(value):
    """The state dict of a module or optimizer, or of each one in a list; any other value as it is."""
    if isinstance(value, list):
        return [state_of(item) for item in value]
    return value.state_dict() if hasattr(value, "state_dict") else value


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, floating-point ones as float32; the texts of the header) of a safetensors file. Raises UserError."""
    from safetensors import safe_open

    if not path.is_file():
        raise UserError(f"{path}: is {'not a regular file' if path.exists() else 'missing'}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
    except Exception as error:  # safetensors has its own exceptions
        detail = " ".join(str(error).split())[:80]
        raise UserError(f"{path}: is not a readable safetensors file ({detail})") from error
    floats = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    return tensors | floats, header


def write_safetensors(path: Path, state: dict[str, torch.Tensor], header: dict[str, str]):
    """Write the state dict of a network, its weights as bfloat16, with texts in the header. Raises UserError."""
    from safetensors.torch import save

    tensors = {}
    for name, value in state.items():
        dtype = torch.bfloat16 if value.is_floating_point() else value.dtype
        tensors[name] = value.to("cpu", dtype, copy=True).contiguous()
    write(path, save(tensors, header))


def check_weights(net: torch.nn.Module, path: Path | str):
    """Raise UserError if a weight of `net`, read from the file `path`, is NaN or infinite."""
    for name, values in net.state_dict().items():
        if not values.isfinite().all():
            raise UserError(f"{path}: is damaged: its weight {name} has values that are not finite")


def count_parameters(module: torch.nn.Module) -> int:
    """The number of trainable parameters; a tied weight counts once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class NoInitialization(TorchFunctionMode):
    """In which networks are made without random numbers: on the meta device these import PyTorch's compiler, which
    takes two seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init" or function is torch.Tensor.normal_:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})


def make_without_memory(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The network that `make` makes, on the meta device: all shapes, no values."""
    with torch.device("meta"), NoInitialization():
        return make()


def check_memory(make: Callable[[], torch.nn.Module], device: torch.device, options: str):
    """Raise UserError if the network that `make` makes cannot be trained in the memory of the device: its weights,
    their gradients and the two moments of Adam, in float32, and the checkpoint, which is made in memory from all but
    the gradients. Nothing is allocated. options: those that decide the size, for the message."""
    weights = count_parameters(make_without_memory(make))
    needed = (4 + 3) * 4 * weights
    memory = memory_bytes(device)
    if memory is not None and needed > memory:
        raise UserError(
            f"{options}: training {weights:,} weights needs {needed / 2**30:,.0f} GiB of memory; there are "
            f"{memory / 2**30:,.0f}"
        )
