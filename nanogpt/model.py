"""Language models, all from token ids (B, T) to logits (B, T, vocab_size): Bigram, WordMLP and GPT.

B is the batch, T the tokens of one text (at most `block_size`), C the width `n_embd`, V the vocabulary. Logits at
position t speak of the token at t + 1 and may depend on tokens 0 to t alone.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import run

WRITTEN_OUT = 256  # tokens up to which, on a CPU, `attend` is faster than the fused operation (bench.py)


def count_parameters(model: nn.Module) -> int:
    """The trainable parameters; a tied head counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class Language(nn.Module):
    """What the models share: a plain `config` that `build` makes them from again, and the longest text they take."""

    def __init__(self, kind: str, **config):
        super().__init__()
        self.config = {"kind": kind, **config}
        self.vocab_size, self.block_size = config["vocab_size"], config["block_size"]

    def check(self, length: int):
        """Raise UserError where a text of `length` tokens is longer than this model knows."""
        if length > self.block_size:
            raise run.UserError(f"a text of {length} tokens: this model knows blocks of at most {self.block_size}")


class Bigram(Language):
    """The next token from the last one alone.

    With n_embd 0 a table of V x V logits; else that table as a product of two of V x n_embd, which a vocabulary of
    words needs: 30,000 squared is more than all of GPT-2.
    """

    def __init__(self, vocab_size: int, block_size: int = 64, n_embd: int = 0):
        super().__init__("bigram", vocab_size=vocab_size, block_size=block_size, n_embd=n_embd)
        self.table = nn.Embedding(vocab_size, n_embd or vocab_size)
        self.head = nn.Linear(n_embd, vocab_size) if n_embd else nn.Identity()
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        """idx: (B, T) int64. Returns logits (B, T, V)."""
        self.check(idx.shape[1])
        return self.head(self.table(idx))


class WordMLP(Language):
    """A neural probabilistic language model (Bengio et al. 2003, section 2): `context` words in, the next word out.

    y = b + W x + U tanh(d + H x) with x the embeddings of the last words, one after the other; W, the way around the
    hidden layer, is left out with direct=False, as the paper also tries. Before the text begins stands a token of its
    own.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int = 64,
        context: int = 4,
        n_embd: int = 32,
        hidden: int = 64,
        direct: bool = False,
    ):
        super().__init__(
            "wordmlp",
            vocab_size=vocab_size,
            block_size=block_size,
            context=context,
            n_embd=n_embd,
            hidden=hidden,
            direct=direct,
        )
        self.context = context
        self.embedding = nn.Embedding(vocab_size + 1, n_embd)
        self.hidden = nn.Linear(context * n_embd, hidden)
        self.head = nn.Linear(hidden, vocab_size)
        self.direct = nn.Linear(context * n_embd, vocab_size, bias=False) if direct else None
        for weight in [self.embedding.weight, self.head.weight, *([self.direct.weight] if direct else [])]:
            nn.init.normal_(weight, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        """idx: (B, T) int64. Returns logits (B, T, V)."""
        self.check(idx.shape[1])
        padded = F.pad(idx, (self.context - 1, 0), value=self.vocab_size)
        x = self.embedding(padded).unfold(1, self.context, 1)  # (B, T + N - 1, C) -> (B, T, C, N)
        x = x.transpose(2, 3).flatten(2)  # (B, T, C, N) -> (B, T, N * C)
        logits = self.head(torch.tanh(self.hidden(x)))
        return logits + self.direct(x) if self.direct else logits


# ---------------------------------------------------------------------------------------------------------------- GPT


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Causal attention, written out (Vaswani et al. 2017, section 3.2.1): softmax(q k^T / sqrt(d)) v.

    q: (B, n_head, T, d); k, v: (B, n_head, S, d) with S >= T, the queries being the last T of the S positions.
    Returns (B, n_head, T, d) and the weights (B, n_head, T, S), each row of which sums to 1.
    """
    B, n_head, T, d = q.shape
    S = k.shape[2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B, n_head, T, d) -> (B n_head, T, d)
    future = torch.full((T, S), -math.inf, device=q.device, dtype=q.dtype).triu(S - T + 1)
    scores = torch.baddbmm(future, q, k.mT, alpha=1 / math.sqrt(d))  # (B n_head, T, S): -inf + q k^T / sqrt(d)
    weights = scores.softmax(2)
    y = (F.dropout(weights, dropout) if dropout else weights) @ v
    return y.view(B, n_head, T, d), weights.view(B, n_head, T, S)


def rotary_angles(first: int, length: int, d: int, device) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles t / 10000^(2i/d), i < d/2, of positions first <= t < first + length: (length, d) each.

    Each angle stands at i and at i + d/2, the two dimensions that turn together; the sin of the former is negative.
    """
    frequencies = 10_000.0 ** (-torch.arange(d // 2, device=device, dtype=torch.float32) / (d // 2))
    angles = torch.arange(first, first + length, device=device)[:, None] * frequencies  # (length, d / 2)
    return torch.cat([angles.cos()] * 2, 1), torch.cat([-angles.sin(), angles.sin()], 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (..., T, d) by `rotary_angles` (Su et al. 2021, section 3.4.2): q . k then knows the distance alone."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class SquaredReLU(torch.autograd.Function):
    """max(0, h)^2 (So et al. 2021), in two passes over memory there and two back, where autograd would take seven."""

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

    def __init__(self, n_embd, n_head, dropout, bias, qk_norm):
        super().__init__()
        self.n_head, self.dropout, self.qk_norm = n_head, dropout, qk_norm
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias)
        self.out = nn.Linear(n_embd, n_embd, bias)

    def forward(self, x, rotary=None, cache=None, maps=None):
        """x: (B, T, C). `rotary`: the angles of its positions, if they are rotary. `cache`, a list, holds keys and
        values of what came before x, and is extended; to `maps`, a list, the weights (B, n_head, T, S) are appended."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        qk, v = qkv[:2], qkv[2]  # (B, T, 3, n_head, d) -> (2, B, n_head, T, d) and (B, n_head, T, d)
        if self.qk_norm:  # lengths of queries and keys can then no longer run away (Dehghani et al. 2023, section 2)
            qk = F.layer_norm(qk, qk.shape[4:])
        if rotary:
            qk = rotate(qk, *rotary)
        q, k = qk
        if cache is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(cache, (k, v))) if cache else (k, v)
            cache[:] = k, v
        dropout = self.dropout if self.training else 0.0
        if maps is not None or k.shape[2] != T or (x.device.type == "cpu" and T <= WRITTEN_OUT):
            y, weights = attend(q, k, v, dropout)
            if maps is not None:
                maps.append(weights)
        else:  # the same in one operation, which does not keep the (T, S) weights
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = self.out(y.transpose(1, 2).flatten(2))  # (B, n_head, T, d) -> (B, T, C)
        return F.dropout(y, dropout) if dropout else y


class MLP(nn.Module):
    """Each position by itself: to four times the width and back. SwiGLU (Shazeer 2020) has three matrices, and 8/3 of
    the width so that they weigh as much; squared ReLU is from Primer (So et al. 2021)."""

    def __init__(self, n_embd, dropout, bias, activation):
        super().__init__()
        self.dropout, self.activation = dropout, activation
        hidden = 4 * n_embd if activation != "swiglu" else round(8 / 3 * n_embd / 8) * 8
        self.up = nn.Linear(n_embd, hidden * (1 + (activation == "swiglu")), bias)
        self.down = nn.Linear(hidden, n_embd, bias)

    def forward(self, x):
        h = self.up(x)  # (B, T, C) -> (B, T, 4 C)
        if self.activation == "gelu":
            h = F.gelu(h, approximate="tanh")  # GPT-2's; the exact form differs in the fourth digit
        elif self.activation == "relu2":
            h = SquaredReLU.apply(h)
        else:
            gate, h = h.chunk(2, 2)
            h = F.silu(gate) * h
        y = self.down(h)  # (B, T, 4 C) -> (B, T, C)
        return F.dropout(y, self.dropout) if self.training and self.dropout else y


class Norm(nn.Module):
    """Layer normalization (Ba et al. 2016), or its half, RMSNorm (Zhang and Sennrich 2019): no mean, no bias."""

    def __init__(self, n_embd, kind, bias):
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias and kind == "layer" else None

    def forward(self, x):
        if self.kind == "rms":
            return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm Transformer block of GPT-2."""

    def __init__(self, n_embd, n_head, dropout, bias, norm, mlp, qk_norm):
        super().__init__()
        self.norm1, self.norm2 = Norm(n_embd, norm, bias), Norm(n_embd, norm, bias)
        self.attention = Attention(n_embd, n_head, dropout, bias, qk_norm)
        self.mlp = MLP(n_embd, dropout, bias, mlp)

    def forward(self, x, rotary=None, cache=None, maps=None):
        x = x + self.attention(self.norm1(x), rotary, cache, maps)
        return x + self.mlp(self.norm2(x))


class GPT(Language):
    """GPT-2 (Radford et al. 2019): token and position embeddings, `n_layer` blocks, a norm, and a head that is tied to
    the token embedding. Weights begin as normal(0, 0.02), those that write to the residual stream smaller by
    sqrt(2 n_layer), as in the paper. The options beyond GPT-2's are off by default: `rotary` positions for learned
    ones, `norm` "rms", `mlp` "relu2" or "swiglu", `qk_norm`."""

    def __init__(
        self,
        vocab_size: int,
        block_size: int = 64,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        dropout: float = 0.0,
        bias: bool = False,
        tied: bool = True,
        rotary: bool = False,
        norm: str = "layer",
        mlp: str = "gelu",
        qk_norm: bool = False,
    ):
        super().__init__(
            "gpt",
            vocab_size=vocab_size,
            block_size=block_size,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            dropout=dropout,
            bias=bias,
            tied=tied,
            rotary=rotary,
            norm=norm,
            mlp=mlp,
            qk_norm=qk_norm,
        )
        if n_embd % n_head:
            raise run.UserError(f"n_embd {n_embd} cannot be shared out among {n_head} heads")
        self.dropout, self.head_width = dropout, n_embd // n_head
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = None if rotary else nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, bias, norm, mlp, qk_norm) for _ in range(n_layer))
        self.norm = Norm(n_embd, norm, bias)
        self.head = None if tied else nn.Linear(n_embd, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                small = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if small else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx: Tensor, cache: list | None = None, maps: list | None = None) -> Tensor:
        """What the head reads: (B, T) -> (B, T, C). See `forward`."""
        offset = cache[0][0].shape[2] if cache and cache[0] else 0
        self.check(offset + idx.shape[1])
        x, rotary = self.tokens(idx), None  # (B, T) -> (B, T, C)
        if self.positions is None:
            rotary = rotary_angles(offset, idx.shape[1], self.head_width, idx.device)
            rotary = [part.to(x.dtype) for part in rotary]
        else:
            x = x + self.positions.weight[offset : offset + idx.shape[1]]
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, cache[i] if cache is not None else None, maps)
        return self.norm(x)

    def forward(self, idx: Tensor, cache: list | None = None) -> Tensor:
        """idx: (B, T) int64. Returns logits (B, T, V).

        `cache`, from `new_cache()`, holds keys and values of the tokens before idx, and then those of idx too.
        """
        x = self.hidden(idx, cache)
        return F.linear(x, self.tokens.weight) if self.head is None else self.head(x)

    def new_cache(self) -> list:
        """An empty cache: for each block a list that `forward` fills with its keys and values."""
        return [[] for _ in self.blocks]

    @torch.no_grad()
    def attention_maps(self, idx: Tensor) -> Tensor:
        """Who looks at whom: (n_layer, B, n_head, T, T), each row summing to 1."""
        maps = []
        self.hidden(idx, maps=maps)
        return torch.stack(maps)

    @classmethod
    def from_hugging_face(cls, source, **changes) -> "GPT":
        """GPT-2 with weights from `source`: a name or folder that `transformers` knows, or its GPT2LMHeadModel.

        Its linear layers keep (in, out) where torch.nn.Linear keeps (out, in): four matrices a block are transposed.
        Raises UserError where it is no GPT-2 of the usual form, or cannot be had.
        """
        if isinstance(source, str | Path):
            try:
                from transformers import GPT2LMHeadModel

                source = GPT2LMHeadModel.from_pretrained(source)
            except (ImportError, OSError, ValueError) as error:
                raise run.UserError(f"{source}: no GPT-2 could be loaded ({str(error).splitlines()[0]})") from None
        theirs, c = source.state_dict(), source.config
        usual = dict(
            activation_function="gelu_new",
            layer_norm_epsilon=1e-5,
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        )
        for name, value in usual.items():
            if getattr(c, name) != value:
                raise run.UserError(f"a GPT-2 with {name} {getattr(c, name)} is none of the usual form ({value})")
        if c.n_inner not in (None, 4 * c.n_embd):
            raise run.UserError(f"a GPT-2 with n_inner {c.n_inner} is none of the usual form ({4 * c.n_embd})")
        model = cls(
            c.vocab_size,
            c.n_positions,
            c.n_layer,
            c.n_head,
            c.n_embd,
            bias=True,
            **{"tied": c.tie_word_embeddings} | changes,
        )
        names = {
            "tokens": "wte",
            "positions": "wpe",
            "norm": "ln_f",
            "norm1": "ln_1",
            "norm2": "ln_2",
            "attention.qkv": "attn.c_attn",
            "attention.out": "attn.c_proj",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        }
        state = {}
        for ours in model.state_dict():
            module, kind = ours.rsplit(".", 1)
            if module == "head":
                state[ours] = theirs["lm_head.weight"]
                continue
            _, block, *inner = module.split(".", 2) if module.startswith("blocks.") else ("", "", module)
            block, module = f"h.{block}." if block else "", inner[0]
            value = theirs[f"transformer.{block}{names[module]}.{kind}"]
            linear = kind == "weight" and module in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
            state[ours] = value.T if linear else value
        model.to(theirs["transformer.wte.weight"].dtype).load_state_dict(state)
        return model


@torch.no_grad()
def check_causal(model: Language, idx: Tensor):
    """Raise UserError if a logit depends on a token that comes later; idx: (B, T). The model should be in eval mode.

    Changes the last token, and the logits at all places before it must be the same to the bit.
    """
    other = idx.clone()
    other[:, -1] = (other[:, -1] + 1) % model.vocab_size
    if not torch.equal(model(idx)[:, :-1], model(other)[:, :-1]):
        raise run.UserError("the model looks into the future: a later token changes earlier logits")


KINDS = {"bigram": Bigram, "wordmlp": WordMLP, "gpt": GPT}


def build(config: dict) -> Language:
    """The model that a checkpoint's `config` describes, with new weights."""
    try:
        return KINDS[config["kind"]](**{k: v for k, v in config.items() if k != "kind"})
    except (KeyError, TypeError) as error:
        raise run.UserError(f"the configuration {config} describes no model of this folder ({error})") from None


# --------------------------------------------------------------------------------------------------------- generation


def choose(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """One token from logits (V,): the likeliest at temperature 0; else drawn, from the `top_k` likeliest, or from the
    fewest whose probabilities come to `top_p` (nucleus sampling, Holtzman et al. 2020), or from what both allow."""
    if temperature == 0:
        return int(logits.argmax())
    logits, order = (logits.float() / temperature).sort(descending=True, stable=True)
    probabilities = logits[:top_k].softmax(0)
    if top_p is not None:  # the token that crosses the line still belongs
        probabilities = probabilities * (probabilities.cumsum(0) - probabilities < top_p)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: Language,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
):
    """Continue the tokens idx (1, T), T >= 1: yields `max_new_tokens` ids, each as soon as it is chosen.

    repetition_penalty (Keskar et al. 2019, section 4.1) divides the logits of tokens that have occurred, where
    positive, and multiplies them where negative. With a cache a step costs one token, not the whole text. When the
    text has outgrown `block_size`, with or without cache, its last half block is encoded anew and grows from there.
    """
    model.eval()
    text = idx[0].tolist()
    seen = torch.zeros(model.vocab_size, dtype=torch.bool, device=idx.device)
    seen[idx[0]] = True
    use_cache = use_cache and isinstance(model, GPT)
    window, cache = text[-model.block_size :], None
    for _ in range(max_new_tokens):
        if len(window) > model.block_size:
            window, cache = window[-max(1, model.block_size // 2) :], None
        if use_cache and cache is not None:
            logits = model(torch.tensor([window[-1:]], device=idx.device), cache)
        elif use_cache:
            cache = model.new_cache()
            logits = model(torch.tensor([window], device=idx.device), cache)
        else:
            logits = model(torch.tensor([window], device=idx.device))
        logits = logits[0, -1]  # (1, T, V) -> (V,)
        if repetition_penalty != 1.0:
            punished = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = torch.where(seen, punished, logits)
        token = choose(logits, temperature, top_k, top_p, generator)
        seen[token] = True
        window.append(token)
        yield token


# -------------------------------------------------------------------------------------------------------------- files


def save_weights(path: Path, model: Language, tokenizer_state: dict):
    """Write the weights as bfloat16 in a safetensors file; configuration and tokenizer travel in its header."""
    from safetensors.torch import save

    tensors = {name: p.to("cpu", torch.bfloat16).contiguous() for name, p in model.state_dict().items()}
    header = {"config": json.dumps(model.config), "tokenizer": json.dumps(tokenizer_state)}
    run.write(Path(path), save(tensors, header))


def load_weights(path: Path) -> tuple[Language, dict]:
    """(model in float32, tokenizer state) from a file that `save_weights` wrote. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
        config, tokenizer = json.loads(header["config"]), json.loads(header["tokenizer"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise run.UserError(f"{path}: holds no weights of this folder ({error})") from None
    model = build(config)
    run.restore(model, tensors, path)
    return model.eval(), tokenizer


def load_checkpoint(path: Path) -> tuple[Language, dict]:
    """(model, tokenizer state) from best.pt, last.pt or a safetensors file. Raises UserError."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_weights(path)
    state = run.read_checkpoint(path)
    if not {"model", "config", "tokenizer"} <= state.keys():
        raise run.UserError(f"{path}: is the checkpoint of another experiment")
    model = build(state["config"])
    run.restore(model, state["model"], path)
    return model.eval(), state["tokenizer"]
