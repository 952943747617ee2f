"""An LSTM that reads a review and classifies it: embedding, LSTM, pooling, linear.

Padding never changes the output. The forward direction has not seen it at the last word; the backward direction reads
each review reversed by its own length; pooling is masked.
"""

import math

import torch
from torch import Tensor, nn

POOLS = ("last", "mean", "max")
CELLS = ("torch", "custom")


class CustomLSTM(nn.Module):
    """The LSTM of Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000), written out.

    Same parameters, names and initial values as nn.LSTM(input_size, hidden_size, batch_first=True).
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size
        bound = hidden_size**-0.5
        for name, shape in (
            ("weight_ih_l0", (4 * hidden_size, input_size)),
            ("weight_hh_l0", (4 * hidden_size, hidden_size)),
            ("bias_ih_l0", (4 * hidden_size,)),
            ("bias_hh_l0", (4 * hidden_size,)),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x: (B, T, input_size). Returns the hidden states (B, T, H) and (last hidden state, last cell) (1, B, H)."""
        h = c = x.new_zeros(len(x), self.hidden_size)
        # the inputs of all steps are known: one product for the whole sequence, (B, T, E) -> T x (B, 4 H)
        projected = (x @ self.weight_ih_l0.T + self.bias_ih_l0 + self.bias_hh_l0).unbind(1)
        states = []
        for step in projected:
            gates = torch.addmm(step, h.to(step.dtype), self.weight_hh_l0.T.to(step.dtype))  # (B, 4 H)
            i, f, g, o = gates.chunk(4, 1)  # 4 x (B, H): input gate, forget gate, candidate, output gate
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        return torch.stack(states, 1), (h[None], c[None])


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """x (B, T, E) with the first `lengths` (B,) steps of each row in reverse order; padding stays where it is."""
    rows, steps, size = x.shape
    position = torch.arange(steps, device=x.device)  # (T,)
    index = torch.where(position < lengths[:, None], lengths[:, None] - 1 - position, position)  # (B, T)
    flat = index + steps * torch.arange(rows, device=x.device)[:, None]
    return x.reshape(rows * steps, size).index_select(0, flat.flatten()).view(x.shape)  # gather copies single numbers


class Dropout(nn.Module):
    """nn.Dropout, three times as fast on a CPU: a random 64-bit integer decides about eight values, a byte for each.

    So `p` is rounded to a multiple of 1/256.
    """

    def __init__(self, p: float):
        super().__init__()
        self.kept = max(round(256 * (1 - p)), 1)  # of the 256 values of a byte

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.kept == 256:
            return x
        integers = torch.randint(-(2**63), 2**63 - 1, (math.ceil(x.numel() / 8),), device=x.device)  # of 64 bits
        draws = integers.view(torch.uint8)[: x.numel()].view(x.shape)
        return x * ((draws < self.kept).to(x.dtype) * (256 / self.kept))


class SentimentLSTM(nn.Module):
    """Embedding, LSTM layers (in one direction or both), pooling over time, dropout, linear.

    pool: "last" takes the hidden state at the last word (and, backwards, at the first), "mean" and "max" all states
    (Johnson and Zhang 2016, section 2.1). dropout: of embeddings, between layers and before the linear layer (Zaremba
    et al. 2014). word_dropout: the share of words that training replaces by <unk> (Iyyer et al. 2015). embed_std: the
    standard deviation of the initial word vectors, which is 1 in nn.Embedding.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int = 2,
        embed: int = 64,
        hidden: int = 128,
        layers: int = 1,
        bidirectional: bool = False,
        pool: str = "last",
        cell: str = "torch",
        dropout: float = 0.5,
        word_dropout: float = 0.0,
        embed_std: float = 0.1,
        pad: int = 0,
        unk: int = 1,
    ):
        super().__init__()
        self.pool = pool
        self.word_dropout = word_dropout
        self.unk = unk
        directions = 1 + bidirectional
        self.embedding = nn.Embedding(vocabulary, embed, padding_idx=pad)
        with torch.no_grad():
            self.embedding.weight *= embed_std
        self.layers = nn.ModuleList()
        for layer in range(layers):
            size = embed if layer == 0 else directions * hidden
            new = CustomLSTM if cell == "custom" else lambda i, h: nn.LSTM(i, h, batch_first=True)
            self.layers.append(nn.ModuleList(new(size, hidden) for _ in range(directions)))
            for lstm in self.layers[-1]:
                with torch.no_grad():  # a forget gate that is open at first (Jozefowicz et al. 2015)
                    lstm.bias_ih_l0[hidden : 2 * hidden] += 1
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(directions * hidden, classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens: int64 (B, T), padded; lengths: int64 (B,), at least 1. Returns the logits (B, classes)."""
        return self.classify(self.embedding(self.drop_words(tokens)), lengths)  # (B, T) -> (B, T, E) -> (B, classes)

    def drop_words(self, tokens: Tensor) -> Tensor:
        """Word dropout of tokens (B, T), in training; padding stays."""
        if not self.training or not self.word_dropout:
            return tokens
        dropped = torch.rand(tokens.shape, device=tokens.device) < self.word_dropout
        return torch.where(dropped & (tokens != self.embedding.padding_idx), self.unk, tokens)

    def classify(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """embedded: (B, T, E), word vectors. Returns the logits (B, classes)."""
        return self.linear(self.dropout(self.pooled(self.states(embedded, lengths), lengths)))

    def states(self, x: Tensor, lengths: Tensor) -> list[Tensor]:
        """x: (B, T, E). Returns the hidden states of the last layer, (B, T, H) for each direction, in text order."""
        states = [x]
        for forward, *backward in self.layers:
            x = self.dropout(states[0] if len(states) == 1 else torch.cat(states, 2))
            states = [forward(x)[0]]  # (B, T, E) -> (B, T, H)
            for lstm in backward:
                states.append(reverse(lstm(reverse(x, lengths))[0], lengths))
        return states

    def pooled(self, states: list[Tensor], lengths: Tensor) -> Tensor:
        """states: (B, T, H) for each direction. Returns (B, directions x H)."""
        rows, steps, _ = states[0].shape
        if self.pool == "last":
            last = states[0][torch.arange(rows, device=lengths.device), lengths - 1]
            return torch.cat([last, *(state[:, 0] for state in states[1:])], 1)
        padding = (torch.arange(steps, device=lengths.device) >= lengths[:, None])[:, :, None]  # (B, T, 1)
        if self.pool == "mean":
            return torch.cat([state.masked_fill(padding, 0).sum(1) / lengths[:, None] for state in states], 1)
        return torch.cat([largest(state, padding) for state in states], 1)


def largest(states: Tensor, padding: Tensor) -> Tensor:
    """The maximum over time, (B, H), of states (B, T, H) where `padding` (B, T, 1) is False. Its gradient goes to one
    state; amax would share it among equal ones, in twice the time."""
    without_padding = states.detach() + torch.where(padding, -torch.inf, 0.0).to(states.dtype)
    step = without_padding.max(1, keepdim=True).indices  # (B, 1, H)
    return states.gather(1, step).squeeze(1)
