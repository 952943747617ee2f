"""GPT-2, from token ids (B, T) to logits (B, T, V).

B is the batch size, T the number of tokens of one sequence (at most `block_size`), C the width `n_embd`, V the size of
the vocabulary, d = C / n_head. The logits at position t predict token t + 1 and depend only on tokens 0 to t.
"""

import math
from dataclasses import dataclass

from common.run import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS, MLPS = ("layer", "rms"), ("gelu", "relu2", "swiglu")
LAYERS = 1000  # above any number of layers
FUSED_ABOVE = 256  # tokens; on a CPU `attend` is faster than PyTorch's fused attention up to this length (bench.py)


@dataclass
class GPTConfig:
    """The shape of a GPT. The defaults are from nanoGPT's laptop run; the last four options go beyond GPT-2."""

    vocab_size: int
    block_size: int = 64  # the longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = False  # in linear layers and layer norms; GPT-2 has them
    tied: bool = True  # the head shares its weights with the token embedding
    rotary: bool = False  # rotary instead of learned positions
    norm: str = "layer"  # or "rms"
    mlp: str = "gelu"  # or "relu2", "swiglu"
    qk_norm: bool = False  # layer normalization of queries and keys

    def __post_init__(self):
        check_positive(self, "vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        if self.n_layer > LAYERS:
            raise UserError(f"n_layer {self.n_layer}: must be at most {LAYERS}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd}: does not divide by n_head {self.n_head}")
        if self.rotary and self.n_embd // self.n_head % 2:
            raise UserError(f"rotary: needs heads of an even width, not {self.n_embd} / {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout}: must be at least 0 and below 1")
        for name, choices in {"norm": NORMS, "mlp": MLPS}.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} {getattr(self, name)}: must be one of {', '.join(choices)}")


def check_positive(config, *names: str):
    """Raise UserError if one of the numbers `names` of a configuration is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name} {getattr(config, name)}: must be at least 1")


def check_length(length: int, block_size: int):
    """Raise UserError if a sequence of `length` tokens is longer than `block_size`."""
    if length > block_size:
        raise UserError(f"a text of {length} tokens is too long: this model takes at most {block_size}")


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Causal attention, written out (Vaswani et al. 2017, section 3.2.1): softmax(q k^T / sqrt(d)) v.

    q: (B, n_head, T, d); k, v: (B, n_head, S, d) with S >= T, where the queries are the last T of the S positions.
    Returns (B, n_head, T, d) and the weights (B, n_head, T, S), whose rows sum to 1.
    """
    B, n_head, T, d = q.shape
    S = k.shape[2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B, n_head, T, d) -> (B n_head, T, d)
    mask = torch.full((T, S), -math.inf, device=q.device, dtype=q.dtype).triu(S - T + 1)
    scores = torch.baddbmm(mask, q, k.mT, alpha=1 / math.sqrt(d))  # (B n_head, T, S): mask + q k^T / sqrt(d)
    weights = scores.softmax(2)
    dropped = F.dropout(weights, dropout) if dropout else weights
    y = dropped @ v
    return y.view(B, n_head, T, d), weights.view(B, n_head, T, S)


def rotary_angles(first: int, length: int, d: int, device) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles t / 10000^(2i/d), i < d/2, of positions first <= t < first + length: (length, d) each.

    Dimensions i and i + d/2 are rotated together, so each angle appears twice; the first copy of the sine is negative.
    """
    frequencies = 10_000.0 ** (-torch.arange(d // 2, device=device, dtype=torch.float32) / (d // 2))
    angles = torch.arange(first, first + length, device=device)[:, None] * frequencies  # (length, d / 2)
    return torch.cat([angles.cos()] * 2, 1), torch.cat([-angles.sin(), angles.sin()], 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., T, d) by `rotary_angles` (Su et al. 2021, section 3.4.2).

    The product of a rotated query and a rotated key depends only on the distance of their positions.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class SquaredReLU(torch.autograd.Function):
    """max(0, h)^2 (So et al. 2021). It takes two passes over memory in each direction; autograd would take seven."""

    @staticmethod
    def forward(ctx, h):
        h = h.relu()
        ctx.save_for_backward(h)
        return h * h

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return (grad * h).mul_(2)


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.n_head = c.n_head
        self.dropout = c.dropout
        self.qk_norm = c.qk_norm
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, c.bias)
        self.out = nn.Linear(c.n_embd, c.n_embd, c.bias)

    def forward(
        self,
        x: Tensor,
        rotary: list[Tensor] | None = None,
        cache: list[Tensor] | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). `rotary`: cosines and sines of rotary positions. `cache`: keys and values of the
        earlier tokens; x adds its own. `maps`: a list to which the weights (B, n_head, T, S) are added.
        """
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        qk, v = qkv[:2], qkv[2]  # (B, T, 3, n_head, d) -> (2, B, n_head, T, d) and (B, n_head, T, d)
        if self.qk_norm:  # keeps the norms of queries and keys from growing (Dehghani et al. 2023, section 2)
            qk = F.layer_norm(qk, qk.shape[4:])
        if rotary:
            qk = rotate(qk, *rotary)
        q, k = qk
        if cache:
            k = torch.cat([cache[0], k], 2)
            v = torch.cat([cache[1], v], 2)
        if cache is not None:
            cache[:] = k, v
        dropout = self.dropout if self.training else 0.0
        if maps is not None or k.shape[2] != T or (x.device.type == "cpu" and T <= FUSED_ABOVE):
            y, weights = attend(q, k, v, dropout)
            if maps is not None:
                maps.append(weights)
        else:  # the same in one operation, which never stores the (T, S) weights
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = self.out(y.transpose(1, 2).flatten(2))  # (B, n_head, T, d) -> (B, T, C)
        return F.dropout(y, dropout) if dropout else y


class MLP(nn.Module):
    """Two linear layers applied at each position, C -> 4 C -> C.

    SwiGLU (Shazeer 2020) has three matrices; with a hidden width of 8/3 C they have as many parameters. Squared ReLU
    is from Primer (So et al. 2021).
    """

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.dropout, self.activation = c.dropout, c.mlp
        hidden = 4 * c.n_embd
        if c.mlp == "swiglu":
            hidden = max(8, round(8 / 3 * c.n_embd / 8) * 8)  # a multiple of 8
        self.up = nn.Linear(c.n_embd, hidden * (2 if c.mlp == "swiglu" else 1), c.bias)
        self.down = nn.Linear(hidden, c.n_embd, c.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)  # (B, T, C) -> (B, T, 4 C); SwiGLU: 2 * 8/3 C
        if self.activation == "gelu":
            h = F.gelu(h, approximate="tanh")  # GPT-2's form; the exact one differs in the fourth digit
        elif self.activation == "relu2":
            h = SquaredReLU.apply(h)
        else:
            gate, h = h.chunk(2, 2)
            h = F.silu(gate) * h
        y = self.down(h)  # (B, T, 4 C) -> (B, T, C)
        return F.dropout(y, self.dropout) if self.training and self.dropout else y


class Norm(nn.Module):
    """Layer normalization (Ba et al. 2016), or RMSNorm (Zhang and Sennrich 2019), which has no mean and no bias."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.kind, self.weight = c.norm, nn.Parameter(torch.ones(c.n_embd))
        self.bias = nn.Parameter(torch.zeros(c.n_embd)) if c.bias and c.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Block(nn.Module):
    """The pre-norm Transformer block of GPT-2: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.norm1, self.norm2 = Norm(c), Norm(c)
        self.attention, self.mlp = Attention(c), MLP(c)

    def forward(self, x, rotary=None, cache=None, maps=None):
        x = x + self.attention(self.norm1(x), rotary, cache, maps)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): token and position embeddings, `n_layer` blocks, a norm and a head.

    Initial weights are normal(0, 0.02). As in the paper, those that write to the residual stream are divided by
    sqrt(2 n_layer).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.block_size = config.block_size
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = None if config.rotary else nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config)
        self.head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02
                if name.endswith(("attention.out.weight", "mlp.down.weight")):  # into the residual stream
                    std = 0.02 / math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx: Tensor, cache: list | None = None, maps: list | None = None) -> Tensor:
        """The input of the head: (B, T) -> (B, T, C). `cache` as in `forward`, `maps` as in `Attention.forward`."""
        offset = cache[0][0].shape[2] if cache and cache[0] else 0
        check_length(offset + idx.shape[1], self.block_size)
        x, rotary = self.tokens(idx), None  # (B, T) -> (B, T, C)
        if self.positions is None:
            d = self.config.n_embd // self.config.n_head
            rotary = [part.to(x.dtype) for part in rotary_angles(offset, idx.shape[1], d, idx.device)]
        else:
            x = x + self.positions.weight[offset : offset + idx.shape[1]]
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, cache[i] if cache is not None else None, maps)
        return self.norm(x)

    def forward(self, idx: Tensor, cache: list | None = None) -> Tensor:
        """idx: (B, T) int64. Returns logits (B, T, V). Raises UserError if T exceeds `block_size`.

        `cache`, from `new_cache()`, holds the keys and values of the tokens before idx, and gets idx's.
        """
        x = self.hidden(idx, cache)
        return F.linear(x, self.tokens.weight) if self.head is None else self.head(x)

    def new_cache(self) -> list:
        """An empty cache: for each block a list that `forward` fills with its keys and values."""
        return [[] for _ in self.blocks]

    @torch.no_grad()
    def attention_maps(self, idx: Tensor) -> Tensor:
        """The attention weights of idx (B, T): (n_layer, B, n_head, T, T), each row summing to 1."""
        maps = []
        self.hidden(idx, maps=maps)
        return torch.stack(maps)
