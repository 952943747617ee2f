"""Faults to put into a folder's code, drawn by a seed: what mutate.py shows to the tests.

An operator is one kind of fault: a function from a node of the syntax tree to all edits of the source text that it can
make there. Only what functions do is edited: no options, messages, figures, type hints or docstrings.
"""

import ast
import random
import re
from dataclasses import dataclass
from pathlib import Path

# files that start runs, measure seconds, download, show or draw; all others are for models, data, training and scores
SKIPPED = set("attention bench caption common compare drawing grids hub make_data_csv merge openwebtext plan".split())
SKIPPED |= set("predict report sample show stages sweep writer".split())
NOISE = set("add_argument figure note print set_description set_postfix tqdm warn UserError".split())  # calls
NOISE |= set("encoding flush leave memory_format newline non_blocking pin_memory strict".split())  # arguments
PARTS = re.compile(r"(?<![a-zA-Z])(train|val|validation|test|held_out|best|last)(_set|_part)?(?![a-zA-Z])")
SIGNS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
BOUNDS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")}
REDUCTIONS = dict(mean="sum", sum="mean", min="max", max="min", argmin="argmax", argmax="argmin")


@dataclass
class Fault:
    folder: str
    file: str
    line: int
    operator: str
    before: str
    after: str
    mutant: bytes  # the whole file


def word(node) -> str:
    """The name that is read, or the string, at a node; else nothing."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return node.id
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def called(node) -> str:
    """The name of the function or method that is called at a node; else nothing."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", "") or getattr(function, "id", "")


# ------------------------------------------------------ operators: all edits of a node, as (start, end, the new text)


def replace(node, new: str) -> tuple[int, int, str]:
    return node.start, node.end, new


def replace_between(left, right, old: str, new: str) -> tuple[int, int, str]:
    return left.end, right.start, left.text[left.end : right.start].decode().replace(old, new, 1)


def joins(left, right) -> bool:
    """Is it texts, paths or lists that + or / joins?"""
    kinds = ast.JoinedStr | ast.List | ast.ListComp | ast.Tuple
    return any(isinstance(node, kinds) or isinstance(node, ast.Constant) and word(node) for node in (left, right))


def delete_statement(node):
    """a call, an update in place, or a condition with all that depends on it is left out"""
    call = isinstance(node, ast.Expr) and called(node.value) not in ("", "eval", "train", "zero_grad")
    condition = isinstance(node, ast.If) and not node.orelse
    if call or condition or isinstance(node, ast.AugAssign | ast.Break | ast.Continue):
        yield replace(node, "pass")


def dropped_argument(node):
    """of a call: one with a name, or the last one without"""
    if isinstance(node, ast.Call):
        arguments = sorted([*node.args, *node.keywords], key=lambda argument: argument.start)
        for before, argument in zip([None, *arguments], arguments):
            named = isinstance(argument, ast.keyword) and argument.arg not in NOISE
            last = argument in node.args[-1:] and (len(node.args) > 1 or called(node) in REDUCTIONS)
            if named or last:
                yield before.end if before else argument.start, argument.end, ""


def dropped_operand(node):
    """a for a + b, b for a * b"""
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS and not joins(node.left, node.right):
        yield replace(node, f"({node.right.code if isinstance(node.op, ast.Mult) else node.left.code})")


def flipped_flag(node):
    """True for False in a call, and the reverse"""
    if isinstance(node, ast.keyword) and node.value.code in ("True", "False"):
        yield replace(node.value, "False" if node.value.code == "True" else "True")


def no_eval(node):
    """no eval(), or no train()"""
    if called(node) in ("eval", "train") and isinstance(node.func, ast.Attribute) and not node.args:
        yield replace(node, node.func.value.code)


def no_no_grad(node):
    """enable_grad() for no_grad(); no detach()"""
    if called(node) == "no_grad":
        yield replace(node, "torch.enable_grad()")
    if called(node) == "detach":
        yield replace(node, node.func.value.code)


def no_zero_grad(node):
    """no zero_grad()"""
    if called(node) == "zero_grad":
        yield replace(node, node.func.value.code)


def off_by_one(node):
    """the bound of a slice or a range, plus one"""
    bounds = [node.lower, node.upper] if isinstance(node, ast.Slice) else []
    bounds += node.args[:2] if called(node) == "range" else []
    for bound in filter(None, bounds):
        yield replace(bound, f"{bound.code} + 1")


def swapped_arguments(node):
    """the first two arguments of a call, both names or both numbers, say"""
    if isinstance(node, ast.Call) and len(node.args) > 1 and called(node) not in ("isinstance", "max", "min"):
        first, second = node.args[:2]
        if type(first) is type(second):
            comma = node.text[first.end : second.start].decode()
            yield first.start, second.end, second.code + comma + first.code


def wrong_boundary(node):
    """< for <=, > for >=, and the reverse"""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in BOUNDS:
        yield replace_between(node.left, node.comparators[0], *BOUNDS[type(node.ops[0])])


def wrong_dimension(node):
    """dim=0 for any other"""
    if isinstance(node, ast.keyword) and node.arg in ("dim", "axis"):
        yield replace(node.value, "1" if node.value.code == "0" else "0")


def wrong_part(node):
    """training, validation, test, best and last, one for another, if the function has a name or string like that"""
    if PARTS.search(word(node)):
        others = {word(other) for other in ast.walk(node.function) if type(other) is type(node)} - {word(node)}
        for other in sorted(others):
            if PARTS.sub("@", other) == PARTS.sub("@", word(node)):
                yield replace(node, node.code.replace(word(node), other))


def wrong_reduction(node):
    """the sum for the mean, the minimum for the maximum, and the reverse"""
    if called(node) in ("min", "max") or called(node) in REDUCTIONS and isinstance(node.func, ast.Attribute):
        yield node.func.end - len(called(node)), node.func.end, REDUCTIONS[called(node)]


def wrong_sign(node):
    """+ for -, * for /, and the reverse"""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in SIGNS:
        left = node.left if isinstance(node, ast.BinOp) else node.target
        right = node.right if isinstance(node, ast.BinOp) else node.value
        if not joins(left, right):
            yield replace_between(left, right, *SIGNS[type(node.op)])


OPERATORS = [delete_statement, dropped_argument, dropped_operand, flipped_flag, no_eval, no_no_grad, no_zero_grad]
OPERATORS += [off_by_one, swapped_arguments, wrong_boundary, wrong_dimension, wrong_part, wrong_reduction, wrong_sign]

# ------------------------------------------------------------------------------------------------------------- drawing


def draw(tree: Path, folder: str, count: int, seed: int) -> list[Fault]:
    """Up to `count` faults for tree/folder: an operator, then one of its edits. A larger count adds to them."""
    edits = {operator: [] for operator in OPERATORS}
    for path in sorted((tree / folder).rglob("*.py")):
        if path.stem not in SKIPPED:
            for node in mutable_nodes(path.read_bytes()):
                for operator in OPERATORS:
                    edits[operator] += [(path, node.text, *edit) for edit in operator(node)]
    rng, faults = random.Random(f"{seed} {folder}"), []
    while len(faults) < count and any(edits.values()):
        operator = rng.choice([operator for operator in OPERATORS if edits[operator]])
        path, text, start, end, new = edits[operator].pop(rng.randrange(len(edits[operator])))
        mutant = text[:start] + new.encode() + text[end:]
        if not is_fault(text, mutant):
            continue
        first, last = text.rfind(b"\n", 0, start) + 1, text.find(b"\n", end)
        before, after = text[first:last], text[first:start] + new.encode() + text[end:last]
        file, line = path.relative_to(tree).as_posix(), text.count(b"\n", 0, start) + 1
        faults.append(Fault(folder, file, line, operator.__name__, one_line(before), one_line(after), mutant))
    return faults


def is_fault(text: bytes, mutant: bytes) -> bool:
    """Does it compile, and to something else?"""
    try:
        compile(mutant, "mutant", "exec")
    except SyntaxError:
        return False
    return ast.dump(ast.parse(mutant)) != ast.dump(ast.parse(text))


def one_line(code: bytes) -> str:
    return " ".join(code.decode().split())


def mutable_nodes(text: bytes) -> list[ast.AST]:
    """The nodes of all functions in a file, without noise; each has its place in bytes, its code and its function."""
    tree, starts = ast.parse(text), [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = list(below(tree))
    for node in ast.walk(tree):
        if hasattr(node, "lineno"):
            node.text = text
            node.start = starts[node.lineno - 1] + node.col_offset
            node.end = starts[node.end_lineno - 1] + node.end_col_offset
            node.code = text[node.start : node.end].decode()
    return found


def below(node, function=None):
    """The nodes in functions below `node`, without noise; each gets its outermost function."""
    for child in ast.iter_child_nodes(node):
        if is_noise(child, node):
            continue
        if function:
            child.function = function
            yield child
        inner = child if isinstance(child, ast.FunctionDef | ast.Lambda) else None
        yield from below(child, function or inner)


def is_noise(node, parent) -> bool:
    """Docstrings, type hints, formats, messages, and functions that draw."""
    if isinstance(node, ast.FunctionDef):
        return any(called(inner) == "Figure" for inner in ast.walk(node))
    expression = node.value if isinstance(node, ast.Expr) else node
    if called(expression) in NOISE or getattr(node, "arg", None) in NOISE:
        return True
    if isinstance(node, ast.Expr) and isinstance(expression, ast.Constant):
        return True
    hints = getattr(parent, "annotation", None), getattr(parent, "returns", None)
    return isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert) or node in hints
