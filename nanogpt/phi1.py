"""Does textbook-quality data beat more data? phi-1's pipeline at the scale of two cores; see textbooks/README.md.

    python nanogpt/phi1.py prepare                                  # data of all arms and the exercises: 7 minutes
    python nanogpt/phi1.py pretrain --arm textbook --seed 0         # a run of 4 minutes, below out/nanogpt/phi1
    python nanogpt/phi1.py finetune --arm textbook --seed 0         # fine-tune it on the exercises
    python nanogpt/phi1.py finetune --init bigcode/starcoderbase-1b --name starcoder     # a model of the hub instead
    python nanogpt/phi1.py evaluate out/nanogpt/phi1/finetuned/textbook-small-s0 --execute
    python nanogpt/phi1.py evaluate --completions FILE --benchmark humaneval --execute  # what any engine wrote
    python nanogpt/phi1.py pretrain --all --jobs 2                  # all runs of the study; also finetune, evaluate
    python nanogpt/phi1.py report                                   # table, comparisons, figure
    python nanogpt/phi1.py report --list                            # the whole study as plain commands
    torchrun --nproc-per-node=8 nanogpt/phi1.py pretrain --arm textbook --size gpu

--execute runs programs that a model wrote, in a sandbox without network and files; without it they are only written
down. --quick does each step in seconds, for a look or a test.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from common import run, study
from common.options import add_options, flag, make_parser, option, short, to_argv

import torch

import checkpoint
import train
from networks import hub
from textbooks import benchmarks, plan
from textbooks.complete import completions
from textbooks.prepare import ARMS, MIN_EXERCISES, prepare, read_held_out
from textbooks.report import report

AUTO_THREADS = 1
UNKNOWN = {"n": None, "seed": None, "temperature": None}  # how completions of another call or engine were sampled

DEFAULT = run.ROOT / "out" / "nanogpt" / "phi1"
SAMPLES = 20
TEMPERATURE = 0.5
NEW_TOKENS = {"ladder": 128, "humaneval": 256, "mbpp": 256}


def work_of(args) -> Path:
    return run.make_folder(args.out)


# ------------------------------------------------------------------------------------------------------- the commands


def do_prepare(args):
    if args.quick:
        args.tokens = min(args.tokens, 6000)
        args.exercises = min(args.exercises, 140)
        args.vocabulary = 400
    record = prepare(args, work_of(args))
    e, removed = record["exercises"], record["removed"]["exercises"]["removed"]
    counts = f"{e['train']:,} exercises to train on, {e['held_out']} held out, {removed} copies removed"
    print(f"{counts}; {run.display_path(args.out)}")


def do_pretrain(args):
    if args.all:
        return study.run_jobs(train, plan.jobs(work_of(args), False, args.seeds, args.quick, args.more), args)
    return fit(args, plan.job(work_of(args), args.arm, args.size, args.seed, False, args.quick, more=args.more))


def do_finetune(args):
    if args.all:
        return study.run_jobs(train, plan.jobs(work_of(args), True, args.seeds, args.quick, args.more), args)
    init = checkpoint.init_arg(args.init) if args.init else None
    work = work_of(args)
    job = plan.job(work, args.arm, args.size, args.seed, True, args.quick, init, args.more)
    if args.init or args.name:
        job = job._replace(folder=work / "finetuned" / (args.name or f"{Path(args.init).name}-s{args.seed}"))
    return fit(args, job)


def fit(args, job):
    if args.list:
        print("python " + shlex.join(study.command(Path(train.__file__), job)))
        return None
    place = job.argv[job.argv.index("--data") + 1]
    if not Path(place).is_dir():
        raise run.UserError(f"{place}: is missing; run python nanogpt/phi1.py prepare first")
    if train.run.is_finished(job.folder, train.parse(job.argv)):
        print(f"{run.display_path(job.folder)}: is finished already")
        return None
    return train.main([*job.argv, "--out", str(job.folder), "--resume", "auto"])


def do_evaluate(args):
    work = work_of(args)
    if args.completions:
        if len(args.benchmark) != 1:
            raise run.UserError("--completions: name the one --benchmark that they answer")
        problems = problems_of(args.benchmark[0], args, work)
        lines = benchmarks.read_completions(Path(args.completions), problems)
        left_out = len(problems) - len({line["task_id"] for line in lines})
        if left_out:
            total = len(problems)
            print(f"*** {left_out} of {total} problems have no completion; the scores leave them out", file=sys.stderr)
        return score(args, args.benchmark[0], problems, lines, Path(args.completions).with_suffix(""), UNKNOWN)
    folders = [Path(name) for name in args.models]
    if args.all:
        folders = [folder for folder in plan.evaluations(work, args.benchmark, args.seeds) if not scored(folder, args)]
    if args.list:
        for folder in folders:
            words = [run.typed_path(folder), "--benchmark", *args.benchmark]
            if args.execute:
                words.append("--execute")
            if args.shard:
                words += ["--shard", "{}/{}".format(*args.shard)]
            for name in ("n", "temperature", "seed", "data_dir", "device", "threads"):
                if getattr(args, name) != getattr(type(args), name):
                    words += [flag(name), str(getattr(args, name))]
            print(this_command(args, "evaluate", *words))
        return None
    if not folders and not args.all:
        raise run.UserError("name a run folder or a model of the hub, or use --all")
    for folder in folders:
        model, tokenizer = open_model(str(folder))
        run.set_threads(args.threads, AUTO_THREADS)
        model.to(run.pick_device(args.device))
        place = folder if folder.is_dir() and not hub.is_model(folder) else run.make_folder(work / "hub" / folder.name)
        for name in args.benchmark:
            problems = problems_of(name, args, work)
            lines, sampled = complete(args, name, problems, model, tokenizer, place)
            if lines is not None:
                score(args, name, problems, lines, place / name, sampled)
    return None


def this_command(args, *words) -> str:
    words = [run.typed_path(__file__), *words]
    if args.out != str(DEFAULT):
        words += ["--out", run.typed_path(args.out)]
    if args.quick:
        words.append("--quick")
    return "python " + shlex.join(words)


def scored(folder, args) -> bool:
    return all((folder / f"{name}.scores.json").exists() for name in args.benchmark)


def open_model(name: str):
    """(model, tokenizer) of a run folder, a checkpoint, or a model of the hub. Raises UserError."""
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.count("/") > 1):
        raise run.UserError(f"{name}: there is no such run, checkpoint or folder")
    init = checkpoint.init_arg(name)
    start = checkpoint.load_init(init)
    shape = checkpoint.init_recipe(init)
    del shape["tokens"]
    model = checkpoint.build(shape | {"vocab_size": start.tokenizer.vocab_size})
    start.load_into(model)
    return model.eval(), start.tokenizer


def problems_of(name, args, work) -> list[benchmarks.Problem]:
    if name == "ladder":
        problems = benchmarks.held_out(read_held_out(work / "heldout.jsonl"))
    else:
        problems = getattr(benchmarks, name)(run.data_dir(args.data_dir))
    return problems[:: max(1, len(problems) // 8)] if args.quick else problems


def complete(args, name, problems, model, tokenizer, folder):
    """(the completions of a benchmark, how they were sampled), also from shards that were sampled before; None in place
    of completions after sampling a shard."""
    n, temperature = (args.n, args.temperature) if name == "ladder" else (1, 0.0)  # the others: greedy
    sampled = {"n": n, "seed": args.seed, "temperature": temperature}
    part, count = args.shard or (1, 1)
    shards = sorted(folder.glob(f"completions-{name}-*of*.jsonl"))
    if count == 1 and shards:
        lines = [line for file in shards for line in benchmarks.read_completions(file, problems)]
        if {line["task_id"] for line in lines} == {problem.task_id for problem in problems}:
            print(f"{run.display_path(folder)}: {len(shards)} shards of {name}, as they were sampled", file=sys.stderr)
            return lines, UNKNOWN
        raise run.UserError(f"{run.display_path(folder)}: not all shards of {name} are there; sample the others first")
    chosen = problems[part - 1 :: count]
    new = 24 if args.quick else NEW_TOKENS[name]
    lines = list(completions(model, tokenizer, chosen, n, temperature, args.seed, new))
    file = folder / f"completions-{name}{'' if count == 1 else f'-{part}of{count}'}.jsonl"
    run.write(file, "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines):,} completions of {len(chosen)} problems; {run.display_path(file)}", flush=True)
    return (lines if count == 1 else None), sampled


def score(args, name, problems, lines, stem, sampled):
    """Execute completions, write their scores to STEM.scores.json, and print them. sampled: how they were drawn."""
    if not args.execute:
        print("not executed: add --execute to run them in a sandbox", file=sys.stderr)
        return None
    levels = {problem.task_id: problem.level for problem in problems}
    done = [line | {"level": levels[line["task_id"]]} for line in benchmarks.execute(problems, lines)]
    table = benchmarks.scores(problems, done, (1, 10))
    too_long = len({line["task_id"] for line in lines if line.get("too_long")})
    record = {
        "benchmark": name,
        **sampled,
        "scores": table,
        "too_long": too_long,
        "completions": len(lines),
        **run.environment(torch.device("cpu"), __file__),
    }
    run.write(stem.with_name(stem.name + ".scored.jsonl"), "".join(json.dumps(line) + "\n" for line in done))
    run.write_json(stem.with_name(stem.name + ".scores.json"), record)
    for level, row in table.items():
        values = "  ".join(f"{k} {v:6.1%}" for k, v in row.items() if k != "problems")
        print(f"{name:10} {level:12} {row['problems']:4} problems  {values}")
    if too_long:
        print(f"{too_long} prompts are longer than the context and count as failed")
    return record


def do_report(args):
    work = work_of(args)
    if args.list:
        print(this_command(args, "prepare"))
        for finetuned in (False, True):
            study.run_jobs(train, plan.jobs(work, finetuned, args.seeds, args.quick), args)
        for benchmark in (("ladder",), ("humaneval", "mbpp")):
            evaluate = EvaluateOptions(all=True, list=True, execute=True, benchmark=benchmark)
            do_evaluate(replace(evaluate, out=args.out, quick=args.quick, seeds=args.seeds))
        print(this_command(args, "report"))
        return None
    return report(work, __file__)


# -------------------------------------------------------------------------------------------------------- the options


def seeds_arg(text: str) -> dict:
    """An argparse type: the maximum number of seeds per arm."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{short(text)!r} is not a positive whole number")
    return {arm: min(int(text), seeds) for arm, seeds in plan.SEEDS.items()}


def shard_arg(text: str) -> tuple[int, int]:
    """An argparse type: I/N, the part I of N."""
    try:
        part, count = map(int, text.split("/"))
    except ValueError:
        part, count = 0, 0
    if not 1 <= part <= count:
        raise argparse.ArgumentTypeError(f"{short(text)!r} is not I/N with 1 <= I <= N")
    return part, count


def refuse_unread(options, names: tuple[str, ...], reason: str):
    """Raise UserError if one of the options `names` is not at its default."""
    for name in names:
        if getattr(options, name, None) != getattr(type(options), name, None):
            raise run.UserError(f"--{name}: {reason}")


def name_arg(text: str) -> str:
    """An argparse type: the name of a folder, which is not a path to another place."""
    if not text.strip() or text in (".", "..") or set(text) & set("/\\\0"):
        raise argparse.ArgumentTypeError(f"{short(text)!r} is not the name of a folder")
    return text


def writer_arg(text: str) -> str:
    """An argparse type: a model's name or URL."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def list_option():
    return option(False, "print the commands and run nothing")


def seeds_option():
    return option(None, "at most N seeds of every arm (default: all)", type=seeds_arg, metavar="N")


def all_option():
    return option(False, "all of the study that has not been done")


@dataclass(kw_only=True)
class CommandOptions(run.ScriptOptions):
    """The options of every command."""

    out: str = option(str(DEFAULT), "work folder of the study", type=run.path_arg, metavar="DIR")
    quick: bool = option(False, "a few seconds, for a look or a test")
    more: ClassVar[tuple] = ()  # flags of train.py, passed on


@dataclass(kw_only=True)
class PrepareOptions(CommandOptions):
    data_dir: str | None = run.data_dir_option()
    seed: int = option(0, "seed of the exercises and pages", at_least=0)
    arms: tuple[str, ...] = option(ARMS, "which arms", choices=ARMS, nargs="+", metavar="ARM")
    tokens: int = option(2_000_000, "tokens of each arm", above=0)
    exercises: int = option(7000, "exercises to train on", at_least=MIN_EXERCISES)
    vocabulary: int = option(1024, "byte pairs", at_least=300, at_most=2**16)
    raw: str | None = option(None, "folder of .py files, not the standard library", type=run.path_arg, metavar="DIR")
    embeddings: bool = option(False, "quality filter on embeddings of all-MiniLM-L6-v2")
    writer: str | None = option(
        None, "a language model that writes more exercises and pages", type=writer_arg, metavar="URL|NAME"
    )
    write: int = option(10, "number of exercises, and of pages, that --writer writes", above=0)
    execute: bool = option(False, "run the solutions of --writer in the sandbox")

    def check(self):
        if self.writer and not self.execute:
            raise run.UserError("--writer: the programs of a language model run only with --execute, in the sandbox")


@dataclass(kw_only=True)
class PretrainOptions(CommandOptions):
    arm: str = option("textbook", "the texts", choices=ARMS)
    size: str = option("small", "the model", choices=[*plan.RECIPES])
    seed: int = option(0, "initial weights, data order", at_least=0)
    seeds: dict | None = seeds_option()
    all: bool = all_option()
    jobs: int = option(1, "runs at a time", above=0)
    list: bool = list_option()

    def check(self):
        if self.all:
            one_run = ("arm", "size", "seed", "init", "name")
            refuse_unread(self, one_run, "is read only without --all, which runs every setting of the study")
        else:
            refuse_unread(self, ("seeds", "jobs"), "is read only with --all")


@dataclass(kw_only=True)
class FinetuneOptions(PretrainOptions):
    arm: str = option("textbook", "the texts that it was pretrained on", choices=(*ARMS, "scratch"))
    init: str | None = option(None, "start from this run, file or model of the hub", metavar="RUN|FILE|NAME")
    name: str | None = option(None, "name of the run folder (default: ARM-SIZE-sSEED)", type=name_arg, metavar="NAME")


@dataclass(kw_only=True)
class EvaluateOptions(CommandOptions):
    models: tuple[str, ...] = option((), "run folders, or models of the hub", positional=True, metavar="RUN|NAME")
    data_dir: str | None = run.data_dir_option()
    seed: int = option(0, "seed of the samples", at_least=0)
    device: str = run.device_option()
    threads: int | str = run.threads_option()
    benchmark: tuple[str, ...] = option(("ladder",), "the problems", choices=[*NEW_TOKENS], nargs="+", metavar="NAME")
    n: int = option(SAMPLES, "samples per problem", above=0)
    temperature: float = option(TEMPERATURE, "temperature of the samples", at_least=0)
    execute: bool = option(False, "run the generated code, in a sandbox")
    completions: str | None = option(
        None, "score these: lines with task_id and completion", type=run.path_arg, metavar="FILE"
    )
    shard: tuple | None = option(None, "sample only the part I of N", type=shard_arg, metavar="I/N")
    seeds: dict | None = seeds_option()
    all: bool = all_option()
    list: bool = list_option()

    def check(self):
        if not self.all:
            refuse_unread(self, ("seeds",), "is read only with --all")
        if self.completions:
            refuse_unread(
                self, ("models", "all", "shard", "n", "temperature", "seed"), "is not read with --completions"
            )
        if self.all and self.models:
            raise run.UserError(f"{self.models[0]}: is read only without --all, which evaluates every run of the study")


@dataclass(kw_only=True)
class ReportOptions(CommandOptions):
    seeds: dict | None = seeds_option()
    list: bool = list_option()

    def check(self):
        if self.seeds and not self.list:
            raise run.UserError("--seeds: is read only with --list; the report takes every run that it finds")


PASSED_ON = "; every other flag is passed on to train.py, such as --lr 0.001 --n-layer 6"
COMMANDS = {  # command: (its function, its options, its help)
    "prepare": (do_prepare, PrepareOptions, "write the data of all arms and the exercises"),
    "pretrain": (do_pretrain, PretrainOptions, "pretrain a model on the texts of an arm" + PASSED_ON),
    "finetune": (do_finetune, FinetuneOptions, "fine-tune a model on the exercises" + PASSED_ON),
    "evaluate": (do_evaluate, EvaluateOptions, "sample completions and score them"),
    "report": (do_report, ReportOptions, "tables, comparisons and figure of what has been run"),
}
PLANNED = ("data", "out", "resume", "recipe", "init", "seed")  # flags of train.py that the plan sets


def passed_on(words: list[str]) -> tuple[str, ...]:
    """Flags of train.py, checked as train.py checks them. Raises UserError for those that the plan sets."""
    given = vars(make_parser(train.Options).parse_args(words))
    for name in PLANNED:
        if name in given:
            raise run.UserError(f"{flag(name)}: is set by the plan of the study")
    return tuple(to_argv(train.Options, given))


def parse(argv=None):
    """(the function of the command, its options). A flag that would not be read is an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, cls, text) in COMMANDS.items():
        add_options(commands.add_parser(name, help=text, description=text), cls, cls())
    given, others = parser.parse_known_args(argv)
    given = vars(given)
    command = given.pop("command")
    function, cls, _ = COMMANDS[command]
    try:
        options = cls(**given)
        options.check()
        if others and not issubclass(cls, PretrainOptions):
            raise run.UserError(f"unrecognized arguments: {short(' '.join(others))}")
        options.more = passed_on(others)
    except run.UserError as error:
        commands.choices[command].error(str(error))
    return function, options


def main(argv=None):
    function, options = parse(argv)
    return function(options)


if __name__ == "__main__":
    run.cli(main)
