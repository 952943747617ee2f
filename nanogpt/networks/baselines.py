"""Two baselines for the GPT, with the same interface: from token ids (B, T) to logits (B, T, V)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import check_length, check_positive


@dataclass
class BigramConfig:
    """The shape of a Bigram."""

    vocab_size: int
    block_size: int = 64
    n_embd: int = 0  # the rank of the table; 0: a full table

    def __post_init__(self):
        check_positive(self, "vocab_size", "block_size")
        if self.n_embd:
            check_positive(self, "n_embd")


class Bigram(nn.Module):
    """The next token from the last one alone.

    The model is a table of V x V logits, or with n_embd > 0 the product of two smaller ones, (V, C) and (C, V). A
    vocabulary of 30,000 words needs this: its full table would be larger than GPT-2.
    """

    def __init__(self, config: BigramConfig):
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.block_size = config.block_size
        self.table = nn.Embedding(config.vocab_size, config.n_embd or config.vocab_size)
        self.head = nn.Linear(config.n_embd, config.vocab_size) if config.n_embd else nn.Identity()
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        """idx: (B, T) int64. Returns logits (B, T, V)."""
        check_length(idx.shape[1], self.block_size)
        return self.head(self.table(idx))


@dataclass
class WordMLPConfig:
    """The shape of a WordMLP."""

    vocab_size: int
    block_size: int = 64
    context: int = 4  # words that predict the next one
    n_embd: int = 32
    hidden: int = 64
    direct: bool = False  # connections from the embeddings to the logits

    def __post_init__(self):
        check_positive(self, "vocab_size", "block_size", "context", "n_embd", "hidden")


class WordMLP(nn.Module):
    """A neural probabilistic language model (Bengio et al. 2003, section 2): `context` words predict the next one.

    y = b + W x + U tanh(d + H x), where x is the concatenation of the last words' embeddings. direct=False leaves out
    W, as the paper also tries. A padding token stands before the beginning of the text.
    """

    def __init__(self, config: WordMLPConfig):
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.block_size = config.block_size
        width = config.context * config.n_embd
        self.embedding = nn.Embedding(config.vocab_size + 1, config.n_embd)
        self.hidden = nn.Linear(width, config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab_size)
        self.direct = nn.Linear(width, config.vocab_size, bias=False) if config.direct else None
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if self.direct:
            nn.init.normal_(self.direct.weight, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        """idx: (B, T) int64. Returns logits (B, T, V)."""
        check_length(idx.shape[1], self.block_size)
        padded = F.pad(idx, (self.config.context - 1, 0), value=self.vocab_size)
        x = self.embedding(padded).unfold(1, self.config.context, 1)  # (B, T + N - 1, C) -> (B, T, C, N)
        x = x.transpose(2, 3).flatten(2)  # (B, T, C, N) -> (B, T, N C)
        logits = self.head(torch.tanh(self.hidden(x)))
        return logits + self.direct(x) if self.direct else logits
