"""Fine-tuning: the loss, which weights are trained (all, LoRA's matrices, the last layers), and LoRA written out.

The models themselves come from `transformers`. `peft` adds LoRA to them; LoRALinear here is the same layer to read.
"""

import math

from common.terminal import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

METHODS = ("full", "lora", "last")
ATTENTION = ("c_attn", "query_key_value", "qkv_proj", "q_proj", "v_proj")  # as in the paper on LoRA


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy, in nats per token, of logits (B, T, V) and targets int64 (B, T), in float32 or more."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class LoRALinear(nn.Module):
    """A linear layer whose weight W (out, in) stays as it is, with a trained update of low rank (Hu et al. 2021, 4.1):

        y = W x + (alpha / rank) B A x        A: (rank, in), B: (out, rank)

    A begins random and B at zero, so that training begins at the pretrained model. rank (in + out) weights are trained
    instead of in x out.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        # GPT-2 in transformers has Conv1D, a linear layer that stores its weight as (in, out)
        self.transposed = type(base).__name__ == "Conv1D"
        n_out, n_in = base.weight.shape[::-1] if self.transposed else base.weight.shape
        self.A, self.B = nn.Parameter(torch.empty(rank, n_in)), nn.Parameter(torch.zeros(n_out, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)  # (..., in) -> (..., rank) -> (..., out)

    def merged(self) -> Tensor:
        """The weight, in the form of the base, of a layer without LoRA that does the same: W + (alpha / rank) B A."""
        update = self.scale * (self.B @ self.A)  # (out, in)
        return self.base.weight + (update.T if self.transposed else update)


def takes_lora(module: nn.Module) -> bool:
    """Is it a linear layer or an embedding?"""
    return isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"


def add_lora(net: nn.Module, rank: int, alpha: float, targets: str = "all") -> nn.Module:
    """`net` with LoRA from `peft`, the only trained weights.

    targets: "all" linear layers of the blocks; "attention": queries and values (in GPT-2, whose layer is one for
    queries, keys and values, that layer); or the names of layers, separated by commas. Raises UserError.
    """
    from peft import LoraConfig, get_peft_model

    modules = {name: module for name, module in net.named_modules() if takes_lora(module)}
    layers = {name.rpartition(".")[2] for name in modules}
    chosen = targets.split(",")
    if targets == "attention":
        chosen = [name for name in ATTENTION if name in layers] or ATTENTION
    unknown = [name for name in chosen if name not in layers]
    if targets != "all" and unknown:
        names = " or ".join(map(repr, unknown))
        raise UserError(
            f"--targets {targets}: the model has no linear layer or embedding called {names}; it has "
            f"{', '.join(sorted(layers))}"
        )
    highest = max(min(module.weight.shape) for module in modules.values())
    if rank > highest:  # such adapters would have more weights than the model
        raise UserError(f"--rank {rank}: the matrices of this model have a rank of {highest} at most")
    transposed = any(type(module).__name__ == "Conv1D" for module in net.modules())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear" if targets == "all" else chosen,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(net, config)


def train_last_layers(net: nn.Module, count: int) -> nn.Module:
    """`net` with only its last `count` blocks, and the norm after them, trained: the cheap baseline of before LoRA.
    Raises UserError."""
    net.requires_grad_(False)
    inner = dict(net.base_model.named_children())  # the network without the output layer
    blocks = next((module for module in inner.values() if isinstance(module, nn.ModuleList)), None)
    norm = next((inner[name] for name in ("ln_f", "norm", "final_layer_norm") if name in inner), None)
    if blocks is None or norm is None:
        raise UserError(f"--method last: found no blocks and final norm in {type(net).__name__}; use full or lora")
    if count > len(blocks):
        raise UserError(f"--last-blocks {count}: the model has {len(blocks)} blocks")
    for module in (*blocks[-count:], norm):
        module.requires_grad_(True)
    return net


def prepare(net: nn.Module, method: str, rank=None, alpha=None, targets=None, last_blocks=None) -> nn.Module:
    """`net` with the weights that `method` trains marked as trainable. Raises UserError."""
    if method == "lora":
        return add_lora(net, rank, alpha, targets)
    return train_last_layers(net, last_blocks) if method == "last" else net.requires_grad_(True)


def merge_lora(net: nn.Module) -> nn.Module:
    """The base model of `net`, which has adapters of `peft`, with every W + (alpha / rank) B A in place of W.

    Embeddings that the output layer shares stop being shared if one of the two has an adapter: the update of one
    belongs into one.
    """
    base = net.get_base_model()
    tied = base.get_input_embeddings(), base.get_output_embeddings()
    layers = [getattr(module, "base_layer", module) for module in tied]  # without peft's wrappers
    if layers[0].weight is layers[1].weight and any(hasattr(module, "base_layer") for module in tied):
        layers[1].weight = nn.Parameter(layers[1].weight.detach().clone())
        base.config.tie_word_embeddings = False
    return net.merge_and_unload()


def checkpoint_activations(net: nn.Module):
    """Keep only the inputs of the blocks for the backward pass, and compute the rest again (Chen et al. 2016)."""
    enable = getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)  # its name since 5.20
    enable({"use_reentrant": False})


class Trainable:
    """The trained weights of a module as a state dict of their own: a checkpoint of LoRA holds the adapter alone."""

    def __init__(self, net: nn.Module):
        self.weights = {name: p for name, p in net.named_parameters() if p.requires_grad}  # a tied weight once

    def count(self) -> int:
        """The number of trained parameters."""
        return sum(p.numel() for p in self.weights.values())

    def groups(self) -> list[dict]:
        """Two groups for an optimizer: matrices, and biases and norms, which have no weight decay."""
        split = [[p for p in self.weights.values() if (p.dim() > 1) == matrices] for matrices in (True, False)]
        return [group for group in (dict(params=split[0]), dict(params=split[1], weight_decay=0.0)) if group["params"]]

    def state_dict(self) -> dict[str, Tensor]:
        """{name: tensor} of the trained weights."""
        return {name: p.detach() for name, p in self.weights.items()}

    def load_state_dict(self, state: dict[str, Tensor]):
        """Load the result of `state_dict`. Raises RuntimeError if names or shapes differ."""
        if self.weights.keys() != state.keys():
            raise RuntimeError(f"other names, such as {min(self.weights.keys() ^ state.keys())}")
        for name, p in self.weights.items():
            if not isinstance(state[name], Tensor) or p.shape != state[name].shape:
                raise RuntimeError(f"{name} has another shape")
            p.data.copy_(state[name])
