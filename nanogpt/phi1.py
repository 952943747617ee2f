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
from pathlib import Path

from common import run, study

import torch

import checkpoint
import hub
import train
from textbooks import benchmarks, plan
from textbooks.complete import completions
from textbooks.prepare import ARMS, prepare, read_held_out
from textbooks.report import report

AUTO_THREADS = 1

DEFAULT = run.ROOT / "out" / "nanogpt" / "phi1"
SAMPLES, TEMPERATURE, NEW_TOKENS = 20, 0.5, {"ladder": 128, "humaneval": 256, "mbpp": 256}


def work_of(args) -> Path:
    return run.make_folder(args.out)


# ------------------------------------------------------------------------------------------------------- the commands


def do_prepare(args):
    if args.quick:
        args.tokens, args.exercises, args.vocabulary = min(args.tokens, 6000), min(args.exercises, 140), 400
    if args.writer and not args.execute:
        raise run.UserError("--writer: the programs of a language model run only with --execute, in the sandbox")
    record = prepare(args, work_of(args))
    e, removed = record["exercises"], record["removed"]["exercises"]["removed"]
    counts = f"{e['train']:,} exercises to train on, {e['held_out']} held out, {removed} copies removed"
    print(f"{counts}; {run.display_path(args.out)}")


def do_pretrain(args):
    if args.all:
        return study.run_jobs(train, plan.jobs(work_of(args), False, args.seeds, args.quick, more(args)), args)
    return fit(args, plan.job(work_of(args), args.arm, args.size, args.seed, False, args.quick, more=more(args)))


def do_finetune(args):
    if args.all:
        return study.run_jobs(train, plan.jobs(work_of(args), True, args.seeds, args.quick, more(args)), args)
    init = checkpoint.init_arg(args.init) if args.init else None
    work = work_of(args)
    job = plan.job(work, args.arm, args.size, args.seed, True, args.quick, init, more(args))
    if args.init or args.name:
        job = job._replace(folder=work / "finetuned" / (args.name or f"{Path(args.init).name}-s{args.seed}"))
    return fit(args, job)


def more(args) -> tuple:
    """The flags of train.py that these commands pass on."""
    words = [word for setting in args.set or [] for word in ("--set", setting)]
    for name in ("iters", "bs", "lr", "device", "threads", "precision"):
        words += [f"--{name}", str(getattr(args, name))] if getattr(args, name) not in (None, "auto") else []
    return tuple(words)


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
        return score(args, args.benchmark[0], problems, lines, Path(args.completions).with_suffix(""))
    folders = [Path(name) for name in args.model]
    if args.all:
        folders = [folder for folder in plan.evaluations(work, args.benchmark, args.seeds) if not scored(folder, args)]
    if args.list:
        for folder in folders:
            words = [run.display_path(folder), "--benchmark", *args.benchmark, *["--execute"] * args.execute]
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
            lines = complete(args, name, problems, model, tokenizer, place)
            if lines is not None:
                score(args, name, problems, lines, place / name)
    return None


def this_command(args, *words) -> str:
    where = [] if args.out == str(DEFAULT) else ["--out", run.display_path(args.out)]
    return "python " + shlex.join([run.display_path(__file__), *words, *where, *["--quick"] * args.quick])


def scored(folder, args) -> bool:
    return all((folder / f"{name}.scores.json").exists() for name in args.benchmark)


def open_model(name: str):
    """(model, tokenizer) of a run folder, a checkpoint, or a model of the hub. Raises UserError."""
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.count("/") > 1):
        raise run.UserError(f"{name}: there is no such run, checkpoint or folder")
    init = checkpoint.init_arg(name)
    start = checkpoint.load_init(init)
    model = checkpoint.build(checkpoint.init_recipe(init)["model"] | {"vocab_size": start.tokenizer.vocab_size})
    start.load_into(model)
    return model.eval(), start.tokenizer


def problems_of(name, args, work) -> list[benchmarks.Problem]:
    if name == "ladder":
        problems = benchmarks.held_out(read_held_out(work / "heldout.jsonl"))
    else:
        problems = getattr(benchmarks, name)(run.data_dir(args.data_dir))
    return problems[:: max(1, len(problems) // 8)] if args.quick else problems


def complete(args, name, problems, model, tokenizer, folder):
    """The completions of a benchmark, also from shards that were sampled before; None after sampling a shard."""
    n, temperature = (args.n, args.temperature) if name == "ladder" else (1, 0.0)  # the others: greedy
    part, count = args.shard
    shards = sorted(folder.glob(f"completions-{name}-*of*.jsonl"))
    if count == 1 and shards:
        lines = [line for file in shards for line in benchmarks.read_completions(file, problems)]
        if {line["task_id"] for line in lines} == {problem.task_id for problem in problems}:
            return lines
        raise run.UserError(f"{run.display_path(folder)}: not all shards of {name} are there; sample the others first")
    wanted = problems[part - 1 :: count]
    new = 24 if args.quick else NEW_TOKENS[name]
    lines = list(completions(model, tokenizer, wanted, n, temperature, args.seed, new))
    file = folder / f"completions-{name}{'' if count == 1 else f'-{part}of{count}'}.jsonl"
    run.write(file, "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines):,} completions of {len(wanted)} problems; {run.display_path(file)}", flush=True)
    return lines if count == 1 else None


def score(args, name, problems, lines, stem):
    if not args.execute:
        print("not executed: add --execute to run them in a sandbox", file=sys.stderr)
        return None
    levels = {problem.task_id: problem.level for problem in problems}
    done = [line | {"level": levels[line["task_id"]]} for line in benchmarks.execute(problems, lines)]
    table = benchmarks.scores(problems, done, (1, 10))
    too_long = len({line["task_id"] for line in lines if line.get("too_long")})
    record = {"benchmark": name, "n": args.n if name == "ladder" else 1, "seed": args.seed, "scores": table,
              "temperature": args.temperature if name == "ladder" else 0.0, "too_long": too_long,
              "completions": len(lines), **run.environment(torch.device("cpu"), __file__)}  # fmt: skip
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
        args.all, args.completions, args.model, args.execute = True, None, [], True
        for args.benchmark in (["ladder"], ["humaneval", "mbpp"]):
            do_evaluate(args)
        print(this_command(args, "report"))
        return None
    return report(work, __file__)


# --------------------------------------------------------------------------------------------------------- the parser


def seeds(text: str) -> dict:
    """An argparse type: the maximum number of seeds per arm."""
    n = run.positive_int(text)
    return {arm: min(n, wanted) for arm, wanted in plan.SEEDS.items()}


def shard(text: str) -> tuple[int, int]:
    """An argparse type: I/N, the part I of N."""
    try:
        part, count = map(int, text.split("/"))
    except ValueError:
        part, count = 0, 0
    if not 1 <= part <= count:
        raise argparse.ArgumentTypeError(f"{text!r} is no I/N with 1 <= I <= N")
    return part, count


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, text, *flags, **changes):
        q = commands.add_parser(name, help=text, description=text)
        q.set_defaults(function=function)
        run.add_flags(q, *flags, out=dict(default=str(DEFAULT), help="work folder of the study"), **changes)
        q.add_argument("--quick", action="store_true", help="a few seconds, for a look or a test")
        return q

    def plan_flags(q, jobs=True):
        q.add_argument("--list", action="store_true", help="print the commands and run nothing")
        q.add_argument("--seeds", type=seeds, metavar="N", help="at most N seeds of every arm (default: all)")
        if jobs:
            q.add_argument("--all", action="store_true", help="all of the study that has not been done")
            q.add_argument("--jobs", type=run.positive_int, default=1, metavar="N", help="runs at a time (1)")

    q = command("prepare", do_prepare, "write the data of all arms and the exercises", "data_dir", "seed")
    q.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="(default: all)")
    q.add_argument("--tokens", type=run.positive_int, default=2_000_000, metavar="N", help="of each arm (%(default)s)")
    q.add_argument("--exercises", type=run.positive_int, default=7000, metavar="N", help="to train on (%(default)s)")
    q.add_argument("--vocabulary", type=vocabulary, default=1024, metavar="N", help="byte pairs (%(default)s)")
    q.add_argument("--raw", type=run.path_arg, metavar="DIR", help="folder of .py files, not the standard library")
    q.add_argument("--embeddings", action="store_true", help="quality filter on embeddings of all-MiniLM-L6-v2")
    q.add_argument("--writer", metavar="URL|NAME", help="a language model that writes more exercises and pages")
    q.add_argument("--write", type=run.positive_int, default=10, metavar="N", help="how many of each (%(default)s)")
    q.add_argument("--execute", action="store_true", help="run the solutions of --writer in the sandbox")

    train_flags = ("seed", "device", "threads", "precision", "iters", "bs", "lr", "set")
    for name, function, text in (("pretrain", do_pretrain, "pretrain a model on the texts of an arm"),
                                 ("finetune", do_finetune, "fine-tune a model on the exercises")):  # fmt: skip
        q = command(name, function, text, *train_flags)
        arms = [*ARMS, "scratch"] if name == "finetune" else list(ARMS)
        q.add_argument("--arm", choices=arms, default="textbook", help="(default: %(default)s)")
        q.add_argument("--size", choices=list(plan.RECIPES), default="small", help="(default: %(default)s)")
        plan_flags(q)
        if name == "finetune":
            q.add_argument("--init", metavar="RUN|FILE|NAME", help="start from this run, file or model of the hub")
            q.add_argument(
                "--name", type=run.path_arg, metavar="NAME", help="of the run folder (default: ARM-SIZE-sSEED)"
            )

    q = command("evaluate", do_evaluate, "sample completions and score them", "data_dir", "seed", "device", "threads")
    q.add_argument("model", nargs="*", metavar="RUN|NAME", help="run folders, or models of the hub")
    q.add_argument("--benchmark", nargs="+", choices=list(NEW_TOKENS), default=["ladder"], help="(default: ladder)")
    q.add_argument("--n", type=run.positive_int, default=SAMPLES, metavar="N", help="samples per problem (%(default)s)")
    q.add_argument("--temperature", type=run.nonnegative_float, default=TEMPERATURE, metavar="X", help="(%(default)s)")
    q.add_argument("--execute", action="store_true", help="run the generated code, in a sandbox")
    q.add_argument("--completions", type=run.path_arg, metavar="FILE", help="score these: task_id and completion")
    q.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="sample only the part I of N")
    plan_flags(q)

    q = command("report", do_report, "tables, comparisons and figure of what has been run")
    plan_flags(q, jobs=False)
    return p


def vocabulary(text: str) -> int:
    """An argparse type: a number of byte pairs."""
    n = run.positive_int(text)
    if not 300 <= n <= 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not between 300 and {2**16}")
    return n


def parse(argv=None):
    """The arguments. A flag that would not be read is an error."""
    p = parser()
    args = p.parse_args(argv)
    if args.command in ("pretrain", "finetune") and args.all:
        defaults = p.parse_args([args.command])
        for name in ("arm", "size", "seed", "init", "name"):  # of one run
            if getattr(args, name, None) != getattr(defaults, name, None):
                p.error(f"--{name}: is read only without --all, which runs every setting of the study")
    if args.command == "report" and args.seeds and not args.list:
        p.error("--seeds: is read only with --list; the report takes every run that it finds")
    return args


def main(argv=None):
    args = parse(argv)
    return args.function(args)


if __name__ == "__main__":
    run.cli(main)
