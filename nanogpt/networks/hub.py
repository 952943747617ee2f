"""Any pretrained causal model of the Hugging Face hub, with its tokenizer, in the training loop of this folder."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common import run

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

MAX_BYTES = 4  # of a character in UTF-8
MAX_BLOCK = 1024  # tokens of a sequence; the models take more, but exercises are short


@dataclass
class HubConfig:
    """A model of the hub: its name, or ./PATH, a folder relative to the repository."""

    vocab_size: int
    name: str
    block_size: int = MAX_BLOCK


def is_model(path: Path) -> bool:
    """Is `path` a folder with a model that `transformers` wrote?"""
    return (path / "config.json").is_file()


# what `transformers` raises where a model cannot be loaded
UNREADABLE = (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def call(function, init: str, **options):
    """function(path of the model); an error becomes a UserError of one line."""
    place = run.ROOT / init if init.startswith("./") else init
    try:
        return function(place, **options)
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise run.UserError(f"{init}: no causal language model could be loaded ({reason:.200})") from error


def auto(kind: str):
    """A class of `transformers`, which is imported only if needed: that takes seconds."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError as error:
        raise run.UserError("--init NAME needs transformers: pip install transformers") from error
    transformers.logging.set_verbosity_error()  # what is wrong is one line
    transformers.logging.disable_progress_bar()
    return getattr(transformers, kind)


def config_of(init: str) -> dict:
    """The configuration of the model `init` as a recipe has it, without vocab_size. Raises UserError."""
    theirs = call(auto("AutoConfig").from_pretrained, init, trust_remote_code=False)
    lengths = (getattr(theirs, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return {"kind": "hub", "name": init, "block_size": min([MAX_BLOCK, *filter(None, lengths)])}


class Hub(nn.Module):
    """A causal model of `transformers` that takes (B, T) and returns logits (B, T, V), like the models of model.py."""

    def __init__(self, config: HubConfig):
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.block_size = config.block_size
        theirs = call(auto("AutoConfig").from_pretrained, config.name, trust_remote_code=False)
        self.net = auto("AutoModelForCausalLM").from_config(theirs)

    def forward(self, idx: Tensor, cache: list | None = None) -> Tensor:
        """idx: (B, T) int64. Returns logits (B, T, V). `cache` as in model.py."""
        if cache is None:
            return self.net(idx, use_cache=False).logits[..., : self.vocab_size]
        done = self.net(idx, past_key_values=cache[0] if cache else None, use_cache=True)
        cache[:] = [done.past_key_values]
        return done.logits[..., : self.vocab_size]

    def new_cache(self) -> list:
        """An empty cache, which `forward` fills."""
        return []


def check_whole(init: str, theirs: nn.Module, loaded: dict):
    """Raise UserError if weights of the pretrained model `init` were missing in its file, and so are random, or have no
    place in it, or are not finite. loaded: the loading info of `from_pretrained`."""
    problems = {"missing_keys": "lacks weights that its config describes", "unexpected_keys": "has unknown weights"}
    for kind, problem in problems.items():
        names = sorted(loaded[kind])
        if names:
            raise run.UserError(f"{init}: {problem}: {', '.join(names[:3])} ({len(names):,} in all)")
    run.check_weights(theirs, init)


def load(init: str) -> Hub:
    """The model with its pretrained weights, in float32. Raises UserError."""
    options = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
    theirs, loaded = call(auto("AutoModelForCausalLM").from_pretrained, init, **options)
    check_whole(init, theirs, loaded)
    model = Hub.__new__(Hub)
    nn.Module.__init__(model)
    model.config = HubConfig(HubTokenizer(init).vocab_size, **{k: v for k, v in config_of(init).items() if k != "kind"})
    model.vocab_size = model.config.vocab_size
    model.block_size = model.config.block_size
    model.net = theirs
    if theirs.get_input_embeddings().num_embeddings < model.vocab_size:
        raise run.UserError(f"{init}: its tokenizer has more tokens than its model")
    return model


def digest(model: nn.Module) -> str:
    """A digest of the weights."""
    total = hashlib.blake2b(digest_size=16)
    for name, p in sorted(model.state_dict().items()):
        total.update(name.encode() + p.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()


class HubTokenizer:
    """The tokenizer of a model of the hub, with the methods of those in tokenizer.py. Its end token ends a row."""

    def __init__(self, name: str):
        self.name = name
        self.theirs = call(auto("AutoTokenizer").from_pretrained, name, trust_remote_code=False)
        if self.theirs.eos_token_id is None:
            raise run.UserError(f"{name}: its tokenizer has no end token")
        self.vocab_size, self.vocabulary = len(self.theirs), {"<|endoftext|>": self.theirs.eos_token_id}

    def missing(self, text: str) -> list[str]:
        return []

    def encode(self, text: str) -> list[int]:
        return self.theirs.encode(text, add_special_tokens=False, split_special_tokens=True)  # <|endoftext|> is text

    def decode(self, ids: list[int]) -> str:
        return self.theirs.decode(ids, clean_up_tokenization_spaces=False)

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text that each token adds. Bytes of a character are held back until it is complete."""
        read, unread = [], []  # tokens whose text was yielded last, for it may change the next text; and the others
        for i in ids:
            unread.append(i)
            text = self.decode(read + unread)
            if text.endswith("\ufffd") and len(unread) < MAX_BYTES:
                yield ""
                continue
            yield text[len(self.decode(read)) :]
            read, unread = unread, []
        yield self.decode(read + unread)[len(self.decode(read)) :]

    def state(self) -> dict:
        return {"kind": "hub", "name": self.name}
