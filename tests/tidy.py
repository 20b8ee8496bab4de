"""The house rules, as functions from one parsed source to its faults. See test_tidy.py."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
LINE_COLUMNS_MAX = 100

FACE = "__init__"
"""Unit name of the package itself: `import ckptmgr`, `from ckptmgr import __version__`."""

BASE = {"errors", "types", "config"}
IMPORTS: dict[str, set[str]] = {
    "errors": set(),
    "types": {"errors"},
    "config": {"errors", "types"},
    "bucket": set(),
    "heap": set(),
    "telling": set(),
    "keep": {"errors"},
    "preemption": {"errors"},
    "metrics": BASE,
    "staging": BASE,
    "store": BASE | {"bucket"},
    "repository": BASE | {"keep", "metrics", "staging", "store"},
    "restore": BASE | {"metrics", "staging", "store", "repository"},
    "goodput": BASE | {"repository"},
    "advise": BASE | {"goodput", "repository"},
    "plots": set(),
    "report_style": set(),
    "report": BASE | {"goodput", "plots", "present", "report_style", "repository"},
    "doctor": BASE | {"staging", "store", "repository", "present", FACE},
    "daemon": BASE
    | {"keep", "metrics", "staging", "store", "repository", "restore", "bucket", "goodput", FACE}
    | {"heap"},
    "watch": BASE
    | {"keep", "metrics", "staging", "store", "repository", "restore", "daemon", "bucket"},
    "rank": BASE | {"keep", "staging", "bucket", "preemption", "telling"},
    "testing": {"errors", "types", "store"},
    "foreground": set(),
    "present": BASE | {"repository", "restore"},  # how the command line shows things
    "commands": BASE
    | {"metrics", "staging", "store", "repository", "restore", "daemon", "testing"}
    | {"keep", "watch", "bucket", "foreground", "present", "demo"}
    | {"goodput", "advise", "report", "doctor", FACE},
    "cli": BASE | {"commands", "foreground", "heap", "present", FACE},
    # Explicit, because they stand outside the layers: the lazy faces, and the demonstration, which
    # uses the package as its users do.
    FACE: {"errors", "keep", "rank"},
    "demo": {"errors", "config", "staging", FACE},
    "rank.demo_training": BASE | {"staging", FACE},
}
"""Unit -> units of ckptmgr that it may import. A module that stands here by its own name is judged
by that entry instead of its package's."""

PLUGIN_IMPORTS = BASE | {"store", "preemption", "telling"}
PLUGIN_USES_THE_FACE = {"plugins/hai/ckptmgr_hai/checkpoint.py"}
"""An idiom of another library, kept by a Checkpointer: it uses the package as its users do."""

FACE_NAMES = {
    "Checkpointer": "rank",
    "SaveHandle": "rank",
    "load": "rank",
    "Keep": "keep",
    "CkptmgrError": "errors",
}

BANNED_MODULES = {
    "pickle": "it runs code from bytes",
    "cPickle": "it runs code from bytes",
    "cloudpickle": "it runs code from bytes",
    "dill": "it runs code from bytes",
    "joblib": "it pickles",
    "marshal": "it crashes on bad bytes",
    "shelve": "it pickles",
}
BANNED_CALLS = {
    "eval": "it runs code from text",
    "exec": "it runs code from text",
    "torch.load": "it unpickles",
    "os.fdatasync": "file systems over FUSE may not flush the size; use os.fsync",
    "os.system": "it runs a shell",
}
VAGUE = {
    *("manager", "handler", "helper", "engine", "util", "utility", "common", "misc", "info"),
    *("meta", "metadata", "data", "model", "stuff", "processor"),
}
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")  # spelled here and in its test only
PRINTING = {"ckptmgr/demo.py"}


@dataclass(frozen=True, slots=True)
class Fault:
    """One broken rule: where, what is wrong, what to do."""

    path: str
    line: int
    wrong: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.wrong}; {self.remedy}"


class Source:
    """One Python file, parsed once. `path` is relative to the root of the tree."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text
        self.lines = text.splitlines()
        self.tree = ast.parse(text, path)
        self._nodes = list(ast.walk(self.tree))
        self.comments: dict[int, str] = {}
        self.code_lines: set[int] = set()
        blank = {
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        }
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                self.comments[token.start[0]] = token.string
            elif token.type not in blank:
                self.code_lines.update(range(token.start[0], token.end[0] + 1))

    @property
    def in_package(self) -> bool:
        """Whether it is shipped, and not a test."""
        return self.path.startswith("ckptmgr/")

    @property
    def in_plugin(self) -> bool:
        """Whether it is a plugin's, which is shipped too."""
        return self.path.startswith("plugins/")

    @property
    def module(self) -> str:
        """Dotted name below ckptmgr: 'rank.capture', 'errors', and '__init__' for the package; a
        plugin's below its own package.
        """
        parts = self.path.removesuffix(".py").split("/")[3 if self.in_plugin else 1 :]
        return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == FACE else parts)

    def fault(self, where: int | ast.AST, wrong: str, remedy: str) -> Fault:
        """Make a fault at a line number or a node."""
        line = where if isinstance(where, int) else getattr(where, "lineno", 1)
        return Fault(self.path, line, wrong, remedy)

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        """Every node of these kinds, wherever it hides."""
        return (node for node in self._nodes if isinstance(node, kinds))


def read_tree(root: Path, *tops: str) -> list[Source]:
    """Parse every Python file below `tops`."""
    return [
        Source(path.relative_to(root).as_posix(), path.read_text())
        for top in tops
        for path in sorted((root / top).rglob("*.py"))
        if ".venv" not in path.parts
    ]


def dotted(node: ast.AST) -> str:
    """'os.path.join' of an attribute chain; '' where it does not start with a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        below = dotted(node.value)
        return f"{below}.{node.attr}" if below else ""
    return ""


def imported_modules(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every absolute name that the file imports: 'os', 'ckptmgr.store.base.Store', ...

    Sees imports in functions, under TYPE_CHECKING, relative ones, and importlib with a string.
    Where importlib is given an expression, every string of the file that looks like one of our
    modules counts.
    """
    package = ["ckptmgr", *source.path.split("/")[1:-1]]
    for node in source.nodes(ast.Import, ast.ImportFrom, ast.Call):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *([node.module] if node.module else [])]
            yield from ((node, ".".join([*parts, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and is_dynamic_import(node):
            yield from dynamically_imported(source, node)


def is_dynamic_import(call: ast.Call) -> bool:
    """Whether it is import_module(...) or __import__(...)."""
    return dotted(call.func).split(".")[-1] in {"import_module", "__import__"}


def dynamically_imported(source: Source, call: ast.Call) -> Iterator[tuple[ast.AST, str]]:
    """Yield the constant argument, or else every string that could be it."""
    if call.args and isinstance(call.args[0], ast.Constant):
        yield call, str(call.args[0].value)
        return
    for text in source.nodes(ast.Constant):
        value = text.value if isinstance(text, ast.Constant) else None
        if isinstance(value, str) and re.fullmatch(r"(ckptmgr|torch)(\.\w+)*", value):
            yield text, value


def unit_of(name: str) -> str:
    """Unit of an absolute name in ckptmgr: 'ckptmgr.store.base.Store' -> 'store'."""
    parts = name.split(".")
    first = parts[1] if len(parts) > 1 else FACE
    if first in FACE_NAMES:
        return FACE_NAMES[first]
    return FACE if first.startswith("__") else first


def import_table(source: Source) -> Iterator[Fault]:
    """Keep the import directions (docs/architecture.md)."""
    own = source.module.split(".")[0]
    allowed = IMPORTS.get(source.module, IMPORTS.get(own))
    if allowed is None:
        yield source.fault(1, f"module {own!r} is not in the import table", "add it to IMPORTS")
        return
    for node, name in imported_modules(source):
        if name.split(".")[0] != "ckptmgr":
            continue
        unit = unit_of(name)
        if unit not in allowed | {own}:
            may = ", ".join(sorted(allowed)) or "nothing of ckptmgr"
            yield source.fault(
                node,
                f"{source.module} imports {name}",
                f"it may import {may}: move what is shared down",
            )


def plugin_imports(source: Source) -> Iterator[Fault]:
    """A plugin sees what a third party's may: the seams, and nothing of the layers above."""
    allowed = PLUGIN_IMPORTS | ({FACE} if source.path in PLUGIN_USES_THE_FACE else set())
    for node, name in imported_modules(source):
        if name.split(".")[0] == "ckptmgr" and unit_of(name) not in allowed:
            yield source.fault(
                node, f"a plugin imports {name}", f"it may import {sorted(PLUGIN_IMPORTS)}"
            )


def torch_only_below_rank(source: Source) -> Iterator[Fault]:
    """Keep torch (1.7 s and 235 MiB) out of the daemon and the command line."""
    if source.module.split(".")[0] == "rank":
        return
    for node, name in imported_modules(source):
        if name.split(".")[0] in {"torch", "torchdata"}:
            yield source.fault(node, f"imports {name}", "only ckptmgr/rank/ may import torch")


def banned_modules(source: Source) -> Iterator[Fault]:
    """No module that turns bytes into code."""
    for node, name in imported_modules(source):
        why = BANNED_MODULES.get(name.split(".")[0])
        if why:
            yield source.fault(node, f"imports {name}", f"{why}: use staging/values.py or msgspec")
        if name == "time.sleep":
            yield source.fault(node, "imports time.sleep", "wait for an event with a deadline")


def banned_calls(source: Source) -> Iterator[Fault]:
    """No call that runs code, sleeps, or unpickles."""
    for node in source.nodes(ast.Call):
        assert isinstance(node, ast.Call)
        name = dotted(node.func)
        if name in BANNED_CALLS:
            yield source.fault(node, f"calls {name}", BANNED_CALLS[name])
        if name == "time.sleep":
            yield source.fault(node, "calls time.sleep", "wait for an event with a deadline")
        for keyword in node.keywords:
            constant = keyword.value
            if (
                keyword.arg == "allow_pickle"
                and isinstance(constant, ast.Constant)
                and constant.value
            ):
                yield source.fault(node, "passes allow_pickle=True", "never unpickle")


def durable_writes(source: Source) -> Iterator[Fault]:
    """Sync descriptors that nothing buffers; never move onto a name that may exist."""
    in_store = source.path.startswith(("ckptmgr/store/", "plugins/"))
    for node in source.nodes(ast.Call):
        assert isinstance(node, ast.Call)
        name = dotted(node.func)
        last = node.func.attr if isinstance(node.func, ast.Attribute) else name
        if last == "fsync" and any(reads_fileno(argument) for argument in node.args):
            yield source.fault(
                node,
                "syncs a buffered file object",
                "os.open, os.write and os.fsync the descriptor",
            )
        moves = name in {"os.rename", "os.replace", "shutil.move"} or last in {"rename", "renames"}
        if in_store and moves:
            yield source.fault(node, f"calls {last}", "use os.link: it refuses a name that exists")


def reads_fileno(node: ast.AST) -> bool:
    """Whether it is `something.fileno()`."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "fileno"
    )


def narrow_excepts(source: Source) -> Iterator[Fault]:
    """No bare except; a broad one raises again or says why it does not."""
    for node in source.nodes(ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        if node.type is None:
            yield source.fault(node, "bare except", "catch the narrowest type")
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = {dotted(kind) for kind in caught} & {"Exception", "BaseException"}
        raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
        if broad and not raises and not is_reason(source.comments.get(node.lineno, "")):
            yield source.fault(
                node,
                f"except {broad.pop()} that does not raise again",
                "catch the narrowest type, or say on this line why everything is caught",
            )


def is_reason(comment: str) -> bool:
    """Whether a comment says something beyond linter codes: three words or more."""
    prose = re.sub(r"#|noqa:?|type: ignore(\[[^]]*\])?|\b[A-Z]+\d+\b", " ", comment)
    return len(re.findall(r"[A-Za-z]{2,}", prose)) >= 3


def finished(source: Source) -> Iterator[Fault]:
    """No work left in comments."""
    for line, comment in source.comments.items():
        if UNFINISHED.search(comment):
            yield source.fault(line, "unfinished work in a comment", "finish it or file an issue")


def no_print(source: Source) -> Iterator[Fault]:
    """Only the command line talks to people."""
    if source.path in PRINTING:
        return
    for node in source.nodes(ast.Call):
        if isinstance(node, ast.Call) and dotted(node.func) == "print":
            yield source.fault(node, "calls print", "log an event, or return it to commands/")


def clear_names(source: Source) -> Iterator[Fault]:
    """Modules and classes are named by the nouns of the project."""
    for part in source.module.split("."):
        if part != FACE and part.split("_")[-1].rstrip("s") in VAGUE:
            yield source.fault(1, f"module name {part!r} says nothing", "name it by its one noun")
    for node in source.nodes(ast.ClassDef):
        assert isinstance(node, ast.ClassDef)
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*|[a-z]+", node.name)
        if words and words[-1].lower().rstrip("s") in VAGUE:
            yield source.fault(
                node, f"class name {node.name!r} says nothing", "name it by its noun"
            )


def module_docstring(source: Source) -> Iterator[Fault]:
    """Every module says in one sentence what it is."""
    if not ast.get_docstring(source.tree):
        yield source.fault(1, "no module docstring", "say in one sentence what the module is")


def sizes(source: Source) -> Iterator[Fault]:
    """Files, functions and lines that fit a head and a screen."""
    if len(source.lines) > FILE_LINES_MAX:
        yield source.fault(
            len(source.lines), f"{len(source.lines)} lines", f"split it: at most {FILE_LINES_MAX}"
        )
    for number, line in enumerate(source.lines, 1):
        if len(line) > LINE_COLUMNS_MAX:
            yield source.fault(number, f"{len(line)} columns", f"at most {LINE_COLUMNS_MAX}")
    for node in source.nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        count = lines_of_code(source, node)
        if count > FUNCTION_LINES_MAX:
            yield source.fault(
                node, f"{node.name} has {count} lines of code", f"at most {FUNCTION_LINES_MAX}"
            )


def lines_of_code(source: Source, node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function without its docstring, comments and blank lines."""
    own = set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    if ast.get_docstring(node) is not None:
        doc = node.body[0]
        own -= set(range(doc.lineno, (doc.end_lineno or doc.lineno) + 1))
    return len(own & source.code_lines)


Rule = Callable[[Source], Iterator[Fault]]

EVERYWHERE: tuple[Rule, ...] = (sizes, finished)
SHIPPED: tuple[Rule, ...] = (
    *EVERYWHERE,
    *(torch_only_below_rank, banned_modules, banned_calls, durable_writes),
    *(narrow_excepts, no_print, clear_names, module_docstring),
)
IN_A_PLUGIN: tuple[Rule, ...] = (*SHIPPED, plugin_imports)
IN_THE_PACKAGE: tuple[Rule, ...] = (*SHIPPED, import_table)


def faults_of(source: Source) -> list[Fault]:
    """Everything that is wrong with one file."""
    rules = EVERYWHERE
    if source.in_package or source.in_plugin:
        rules = IN_A_PLUGIN if source.in_plugin else IN_THE_PACKAGE
    return [fault for rule in rules for fault in rule(source)]
