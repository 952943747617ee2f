"""S2VT: a video becomes a sentence (Venugopalan et al. 2015, "Sequence to Sequence - Video to Text").

Two recurrent layers read the frames and then, with the same weights, write the words.

    stage      first layer reads         second layer reads
    encoding   a frame                   the first layer's output, and padding in place of a word
    decoding   padding, for the frame    the first layer's output, and the word before

No input of the first layer depends on the words. So a clip is encoded once for all of its captions, and each layer runs
over a whole sequence in one call.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD, BOS, EOS, UNK = range(4)
CELLS = {"gru": nn.GRU, "lstm": nn.LSTM}


class Encoding(NamedTuple):
    """The state of the network after it has read the frames of B clips.

    frames: (B, T, H), the first layer over the frames; ahead: (B, L, H), the first layer over the padding of the
    decoding stage; state: of the second layer, each tensor (1, B, H).
    """

    frames: Tensor
    ahead: Tensor
    state: tuple[Tensor, ...]


class S2VT(nn.Module):
    """The network of the paper's section 3, with GRU or LSTM cells, for frames of `features` numbers each.

    attention: every word also looks at all frames, weighted by how well they fit ("global attention" with the score
    "general" of Luong et al. 2015). pooled: every frame is replaced by the mean over the frames, the baseline without
    order. The buffers `mean` and `std` (features,) standardize the frames.
    """

    def __init__(
        self,
        features: int,
        vocab_size: int,
        hidden: int = 512,
        embed: int = 512,
        cell: str = "gru",
        attention: bool = False,
        dropout: float = 0.5,
        pooled: bool = False,
    ):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.frame_embed = nn.Linear(features, embed)
        self.word_embed = nn.Embedding(vocab_size, embed, padding_idx=PAD)  # padding is zero, as in the paper
        self.layer1 = CELLS[cell](embed, hidden, batch_first=True)
        self.layer2 = CELLS[cell](hidden + embed, hidden, batch_first=True)
        self.score = nn.Linear(hidden, hidden, bias=False) if attention else None
        self.combine = nn.Linear(2 * hidden, hidden) if attention else None
        self.head = nn.Linear(hidden, vocab_size)
        self.dropout = nn.Dropout(dropout)
        self.pooled = pooled
        self.hidden = hidden
        self.embed = embed

    def encode(self, features: Tensor, steps: int) -> Encoding:
        """features: (B, T, F), any float dtype. steps: how many words will be decoded at most."""
        x = (features.float() - self.mean) / self.std
        if self.pooled:
            x = x.mean(1, keepdim=True).expand_as(x)
        B, T, _ = x.shape
        x = self.dropout(self.frame_embed(x))  # (B, T, F) -> (B, T, E)
        x = torch.cat([x, x.new_zeros(B, steps, self.embed)], 1)  # padding in place of frames
        out, _ = self.layer1(x)  # (B, T + L, E) -> (B, T + L, H)
        frames, ahead = out[:, :T], out[:, T:]
        words = frames.new_zeros(B, T, self.embed)  # padding in place of words
        _, state = self.layer2(torch.cat([self.dropout(frames), words], 2))  # (B, T, H + E)
        return Encoding(frames, ahead, state if isinstance(state, tuple) else (state,))

    def decode(
        self, encoding: Encoding, words: Tensor, clip: Tensor, start: int = 0, state: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """The decoding stage over the steps start, start + 1, ... of N captions.

        words: int64 (N, L), each the word before; clip: int64 (N,), whose caption it is; state: of the second layer
        after the steps before. Returns (hidden (N, L, H) for `head`, the state, attention weights (N, L, T) or None).
        """
        state = tuple(s[:, clip] for s in encoding.state) if state is None else state
        ahead = encoding.ahead[clip, start : start + words.shape[1]]  # (N, L, H)
        x = torch.cat([self.dropout(ahead), self.dropout(self.word_embed(words))], 2)  # (N, L, H + E)
        hidden, state = self.layer2(x, state if len(state) > 1 else state[0])
        state = state if isinstance(state, tuple) else (state,)
        weights = None
        if self.score is not None:
            frames = encoding.frames[clip]  # (N, T, H)
            weights = (hidden @ self.score(frames).transpose(1, 2)).softmax(2)  # (N, L, H) @ (N, H, T) -> (N, L, T)
            hidden = torch.tanh(self.combine(torch.cat([weights @ frames, hidden], 2)))  # (N, L, 2 H) -> (N, L, H)
        return self.dropout(hidden), state, weights

    def forward(self, features: Tensor, words: Tensor, clip: Tensor, sampling: float = 0.0) -> Tensor:
        """hidden (N, L, H): `head` of it are the logits of the next words. features: (B, T, F); words: (N, L), which
        begin with <bos>; clip: (N,).

        sampling: the probability with which each word that is read is the network's own guess instead (scheduled
        sampling, Bengio et al. 2015). That needs a step per word.
        """
        N, L = words.shape
        encoding = self.encode(features, L)
        if not sampling:
            return self.decode(encoding, words, clip)[0]
        outputs = []
        state = None
        read = words[:, :1]
        for t in range(L):
            hidden, state, _ = self.decode(encoding, read, clip, t, state)
            outputs.append(hidden)
            if t + 1 < L:
                guess = self.head(hidden.detach()).argmax(2)  # (N, 1)
                own = torch.rand(N, 1).to(words.device) < sampling
                read = torch.where(own, guess, words[:, t + 1 : t + 2])
        return torch.cat(outputs, 1)

    def loss(self, features: Tensor, words: Tensor, targets: Tensor, clip: Tensor, sampling: float = 0.0) -> Tensor:
        """The cross-entropy of each word that is not padding, (number of words,).

        targets: int64 (N, L), PAD after <eos>. Padding is dropped before the logits are computed: it takes no time,
        and no average can include it.
        """
        hidden = self(features, words, clip, sampling)
        real = targets != PAD
        return F.cross_entropy(at_least_float32(self.head(hidden[real])), targets[real], reduction="none")


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 logits as float32: a log-softmax in bfloat16 is wrong in the second digit."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def standardize(model: S2VT, features: Tensor):
    """Set the buffers that standardize the frames from training features (N, T, F). A column that never changes
    becomes zero."""
    columns = features.flatten(0, 1)
    parts = [(part.float().sum(0, dtype=torch.float64), part.double().square().sum(0)) for part in columns.split(8192)]
    mean = sum(total for total, _ in parts) / len(columns)
    variance = sum(square for _, square in parts) / len(columns) - mean**2
    model.mean.copy_(mean)
    model.std.copy_(variance.clamp(min=0).sqrt().clamp(min=1e-3))
