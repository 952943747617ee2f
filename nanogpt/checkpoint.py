"""Models in files: checkpoints of a run, small safetensors files of weights, and GPT-2 from the Hugging Face hub."""

import argparse
import hashlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

from common import run

import requests
from torch import nn

from model import GPT, GPTConfig
from networks import hub
from networks.baselines import Bigram, BigramConfig, WordMLP, WordMLPConfig
from tokenizer import tokenizer_from

KINDS = {"gpt": (GPT, GPTConfig), "bigram": (Bigram, BigramConfig), "wordmlp": (WordMLP, WordMLPConfig)}
KINDS |= {"hub": (hub.Hub, hub.HubConfig)}  # any causal model of the Hugging Face hub


def parse_config(config: dict) -> tuple[type[nn.Module], object]:
    """(class, its configuration) of the model that `config` describes, e.g. {"kind": "gpt", "vocab_size": 65}.

    Raises UserError if there is no such model.
    """
    if isinstance(config, dict) and str(config.get("kind")) not in KINDS:
        raise run.UserError(f"kind {config.get('kind')}: must be one of {', '.join(KINDS)}")
    try:
        model, shape = KINDS[config["kind"]]
        values = {name: value for name, value in config.items() if name != "kind"}
        types = {field.name: field.type for field in fields(shape)}
        if wrong := [name for name, value in values.items() if type(value) is not types.get(name, type(value))]:
            raise TypeError(f"{', '.join(wrong)}: must be of type {types[wrong[0]].__name__}")
        return model, shape(**values)
    except (KeyError, TypeError) as error:
        text = f"the configuration {str(config):.300} describes no model of this folder ({str(error):.100})"
        raise run.UserError(text) from error


def model_config(options, vocab_size: int) -> dict:
    """The configuration of the model that the options of train.py describe, as `build` takes it."""
    _, shape = KINDS[options.kind]
    names = [field.name for field in fields(shape) if field.name != "vocab_size"]
    return {"kind": options.kind, "vocab_size": vocab_size} | {name: getattr(options, name) for name in names}


def build(config: dict) -> nn.Module:
    """A new model of the kind and shape in `config`. Raises UserError."""
    model, shape = parse_config(config)
    return model(shape)


def config_of(model: nn.Module) -> dict:
    """The dict of plain values from which `build` makes a model like this one."""
    return {"kind": type(model).__name__.lower()} | asdict(model.config)


# -------------------------------------------------------------------------------------------------------------- files


def save_weights(path: Path, model: nn.Module, tokenizer_state: dict):
    """Write the weights as bfloat16 to a safetensors file, with the configuration and the tokenizer in its header."""
    header = {"config": json.dumps(config_of(model)), "tokenizer": json.dumps(tokenizer_state)}
    run.write_safetensors(Path(path), model.state_dict(), header)


class Trained(NamedTuple):
    """A model in evaluation mode, and its tokenizer."""

    net: nn.Module
    tokenizer: object


def load(path: str | Path) -> Trained:
    """The best checkpoint of a run folder, or the model in a file. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        path = path / "best.pt"
    net, state = load_checkpoint(path)
    tokenizer = tokenizer_from(state)
    if tokenizer.vocab_size != net.vocab_size:
        raise run.UserError(f"{path}: is damaged: a tokenizer of {tokenizer.vocab_size} tokens, for {net.vocab_size}")
    return Trained(net, tokenizer)


def load_checkpoint(path: Path) -> tuple[nn.Module, dict]:
    """(model, tokenizer state) from best.pt, last.pt or a safetensors file. Raises UserError."""
    path = Path(path)
    state = read_weights(path) if path.suffix == ".safetensors" else run.read_checkpoint(path)
    config = state["config"]
    if parse_config(config)[0] is not hub.Hub:
        state.check_shapes(lambda: build(config))
    model = build(config)
    state.load_into(model=model)
    run.check_weights(model, path)
    return model.eval(), state["tokenizer"]


def read_weights(path: Path) -> run.Checkpoint:
    """{"model", "config", "tokenizer"} from a file that `save_weights` wrote, in float32. Raises UserError."""
    tensors, header = run.read_safetensors(path)
    try:
        state = run.Checkpoint(model=tensors, config=json.loads(header["config"]))
        state["tokenizer"] = json.loads(header["tokenizer"])
    except (KeyError, ValueError, RecursionError) as error:
        raise run.UserError(f"{path}: holds no weights of a model of this folder ({error})") from error
    state.path = path
    return state


# ------------------------------------------------------------------------------------------------- where a run starts


class Init(NamedTuple):
    """The start of a run with --init: the weights, their tokenizer, and the digest of the file for the record."""

    weights: dict
    tokenizer: object
    digest: str

    def load_into(self, model: nn.Module):
        """Load the weights into `model`. Raises UserError if it is of another shape."""
        state = run.Checkpoint(model=self.weights)
        state.path = Path("--init")
        state.load_into(model=model)


INIT_HELP = (
    "start from these weights, and take over their shape and tokenizer: a run, a checkpoint, or a causal model of the "
    "Hugging Face hub"
)


def init_arg(text: str) -> str:
    """An argparse type for --init: a path that exists, as ./PATH relative to the repository, else a name of the hub.

    A record holds no paths of a machine, and this form is valid in any working directory.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    if os.path.exists(text):
        return "./" + Path(os.path.relpath(text, run.ROOT)).as_posix()
    if not text.startswith("./") and (text.count("/") > 1 or text.endswith((".pt", ".safetensors"))):
        raise argparse.ArgumentTypeError(f"{text}: there is no such run, checkpoint or folder")
    return text


def init_file(init: str) -> Path | None:
    """The checkpoint that `init` names: itself, or best.pt of a run folder. None for a model of the hub."""
    path = run.ROOT / init
    if not init.startswith("./") or hub.is_model(path):
        return None
    return path / "best.pt" if path.is_dir() else path


def init_recipe(init: str | None) -> dict:
    """The options that --init sets: the tokens and the shape of the model. Empty if the file is gone; a run that is
    resumed has them in its record."""
    if not init:
        return {}
    file = init_file(init)
    if file is None:
        return {"tokens": "bpe", **hub.config_of(init)}
    if not file.is_file():
        return {}
    model, tokenizer = load_checkpoint(file)
    tokens = "bpe" if tokenizer["kind"] == "hub" else tokenizer["kind"]
    return {"tokens": tokens} | {name: value for name, value in config_of(model).items() if name != "vocab_size"}


def load_init(init: str, resume: str | None = None) -> Init:
    """The start of the run, or the run's own checkpoint if `resume` has one. Raises UserError."""
    last = Path(resume) / "last.pt" if resume else None
    file = last if last and last.exists() else init_file(init)
    if file is None:
        model = hub.load(init)
        return Init(model.state_dict(), hub.HubTokenizer(init), hub.digest(model))
    model, tokenizer = load_checkpoint(file)
    return Init(
        model.state_dict(), tokenizer_from(tokenizer), hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    )


# ------------------------------------------------------------------------------------------------- the hub's weights

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
# Their names here and in transformers. Its linear layers store (in, out), torch.nn.Linear stores (out, in).
EMBEDDINGS = {"tokens": "wte", "positions": "wpe", "norm": "ln_f", "norm1": "ln_1", "norm2": "ln_2"}
ATTENTION = {"attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj"}
LINEAR = ATTENTION | {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
GPT2_FORM = dict(
    activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    add_cross_attention=False,
)


def hub_is_reachable() -> bool:
    """Does the hub answer within three seconds? `transformers` itself would try again for half a minute."""
    try:
        requests.head(HUB, timeout=3)
        return True
    except requests.RequestException:
        return False


def load_gpt2(source) -> GPT:
    """The GPT with GPT-2's weights, in their dtype.

    source: a name or folder that `transformers` can load, or a GPT2LMHeadModel. Raises UserError if it cannot be loaded
    or differs from GPT-2 in more than size.
    """
    if isinstance(source, str | Path):
        remote, offline = not Path(source).exists(), False
        try:
            from transformers import GPT2LMHeadModel

            offline = remote and not hub_is_reachable()
            name = str(source)
            source, loaded = GPT2LMHeadModel.from_pretrained(name, local_files_only=offline, output_loading_info=True)
        except hub.UNREADABLE as error:
            reason = str(error).splitlines()[0]
            if offline:
                reason = f"it is not in the cache, and {HUB} cannot be reached; connect to a network, or name a run or "
                reason += "a committed model, such as cpu"
            raise run.UserError(f"{source}: no GPT-2 could be loaded ({reason})") from error
        hub.check_whole(name, source, loaded)
    theirs, c = source.state_dict(), source.config
    for name, value in GPT2_FORM.items():
        if getattr(c, name) != value:
            raise run.UserError(f"not supported: a GPT-2 with {name} {getattr(c, name)}, where GPT-2 has {value}")
    if c.n_inner not in (None, 4 * c.n_embd):
        raise run.UserError(f"not supported: a GPT-2 with n_inner {c.n_inner}, where GPT-2 has {4 * c.n_embd}")
    shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, bias=True, tied=c.tie_word_embeddings)
    model = GPT(GPTConfig(c.vocab_size, c.n_positions, **shape))
    state = {}
    for name in model.state_dict():
        module, kind = name.rsplit(".", 1)
        if module == "head":
            state[name] = theirs["lm_head.weight"]
            continue
        block = ""
        if module.startswith("blocks."):
            _, i, module = module.split(".", 2)
            block = f"h.{i}."
        value = theirs[f"transformer.{block}{(EMBEDDINGS | LINEAR)[module]}.{kind}"]
        state[name] = value.T if module in LINEAR and kind == "weight" else value
    model.to(theirs["transformer.wte.weight"].dtype).load_state_dict(state)
    return model.eval()
