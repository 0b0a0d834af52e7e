"""The module as a text: its map, the direction of its dependencies, its pure half, its sizes and its borders."""

from __future__ import annotations

import ast
import functools
import re
import statistics
import subprocess
import symtable
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qmesh

SOURCE = Path(qmesh.__file__).read_text(encoding="utf-8")

RULER = "# " + "=" * 102
BANNER = re.compile(r"^(# ={20,})\n# (\d+)  (\S.*)\n#\n(?:#.*\n)+?\1$", re.MULTILINE)
MAP_LINE = re.compile(r"^ +(\d+)  (\S+(?: \S+)*) {2,}\S", re.MULTILINE)

LAST_PURE = 12
PURE_MODULES = frozenset(
    {"__future__", "base64", "binascii", "bisect", "collections", "collections.abc", "dataclasses", "datetime", "enum"}
    | {"functools", "hashlib", "heapq", "hmac", "ipaddress", "itertools", "json", "math", "random", "re", "struct"}
    | {"typing"}
)
IMPURE_BUILTINS = frozenset({"__import__", "breakpoint", "eval", "exec", "input", "open", "print"})
NOT_ON_WINDOWS = frozenset({"curses", "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"})

MAX_FUNCTION_LINES = 60
MAX_MEDIAN_LINES = 14
MAX_CLASS_LINES = 300


parsed = functools.lru_cache(maxsize=2)(ast.parse)  # most rules are of the same module


class Page:
    """A module's source, cut at its banners. Section 0 is what stands before the first."""

    def __init__(self, source: str) -> None:
        self.tree = parsed(source)
        self.banners = [(int(found[2]), found[3]) for found in BANNER.finditer(source)]
        self.starts = [source.count("\n", 0, found.start()) + 1 for found in BANNER.finditer(source)]
        self.lines = source.splitlines()

    def section(self, node: ast.stmt | ast.expr) -> int:
        above = [number for (number, _), start in zip(self.banners, self.starts, strict=True) if start < node.lineno]
        return above[-1] if above else 0

    def scopes(self, statement: ast.stmt) -> Iterator[symtable.SymbolTable]:
        """A top-level statement's scopes. Read without the module's `from __future__`, annotations count as code."""
        first = min(part.lineno for part in [statement, *getattr(statement, "decorator_list", [])])
        text = "\n".join(self.lines[first - 1 : statement.end_lineno])
        return all_scopes(symtable.symtable(text, "page", "exec"))

    def defined(self, statement: ast.stmt) -> set[str]:
        top = next(self.scopes(statement))
        return {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}

    def used(self, statement: ast.stmt) -> set[str]:
        """The names that a statement takes from the module, or from the builtins."""
        return {
            symbol.get_name()
            for table in self.scopes(statement)
            for symbol in table.get_symbols()
            if (symbol.is_referenced() if table.get_type() == "module" else symbol.is_global())
        }


def all_scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from all_scopes(child)


def imported_modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module or "."] if isinstance(node, ast.ImportFrom) else []


# --- The rules. Each takes a module's source and lists what breaks the rule. ---


def map_findings(source: str) -> list[str]:
    """The docstring's map and the banners are the same list, numbered from 1; every ruler is a banner's."""
    page = Page(source)
    listed = [
        (int(number), title) for number, title in MAP_LINE.findall(ast.get_docstring(page.tree, clean=False) or "")
    ]
    findings = [f"on the map, without a banner: {entry}" for entry in listed if entry not in page.banners]
    findings += [f"a banner that is not on the map: {entry}" for entry in page.banners if entry not in listed]
    if [number for number, _ in page.banners] != list(range(1, len(page.banners) + 1)):
        findings.append("banners are not numbered 1, 2, 3, ...")
    if listed != sorted(listed):
        findings.append("the map is not in order")
    if len(re.findall(r"^# *={3,}", source, re.MULTILINE)) != 2 * len(page.banners):
        findings.append("a ruler that belongs to no banner")
    return findings


def downward_findings(source: str) -> list[str]:
    """A section uses names of its own and of earlier sections only, in annotations too."""
    page = Page(source)
    home: dict[str, int] = {}
    for statement in page.tree.body:
        for name in page.defined(statement):
            home.setdefault(name, page.section(statement))
    return [
        f"line {statement.lineno}, section {page.section(statement)}: uses {name} of section {home[name]}"
        for statement in page.tree.body
        for name in sorted(page.used(statement))
        if home.get(name, 0) > page.section(statement)
    ]


def impure_findings(source: str) -> list[str]:
    """Sections 1 to 12 use neither input, output, tasks, clock nor chance; a generator may be an argument."""
    page = Page(source)
    preamble = [statement for statement in page.tree.body if page.section(statement) == 0]
    impure = set(IMPURE_BUILTINS)
    for statement in preamble:
        modules = {name for node in ast.walk(statement) for name in imported_modules(node)}
        if not modules <= PURE_MODULES or isinstance(statement, ast.If):
            impure |= page.defined(statement)
        if not modules:
            impure |= page.defined(statement) - {"__version__"}
    findings = []
    for statement in page.tree.body:
        if 1 <= page.section(statement) <= LAST_PURE:
            found = (page.used(statement) & impure) | set(late_imports(statement)) | set(random_calls(statement))
            findings += [f"line {statement.lineno}: {name}" for name in sorted(found)]
    return findings


def late_imports(statement: ast.stmt) -> Iterator[str]:
    for node in ast.walk(statement):
        yield from (name for name in imported_modules(node) if name not in PURE_MODULES)


def random_calls(statement: ast.stmt) -> Iterator[str]:
    """Uses of the module `random` that are not annotations."""
    annotations: list[ast.expr | None] = []
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            annotations.append(node.returns)
        elif isinstance(node, ast.arg | ast.AnnAssign):
            annotations.append(node.annotation)
    allowed = {id(part) for annotation in annotations if annotation for part in ast.walk(annotation)}
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and node.id == "random" and id(node) not in allowed:
            yield "random"


def function_lengths(source: str) -> dict[str, int]:
    return {
        f"line {node.lineno}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def size_findings(source: str) -> list[str]:
    """No function over 60 lines, no class over 300, and half of the functions under 14."""
    lengths = function_lengths(source)
    findings = [f"{name} has {lines} lines" for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES]
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno + 1 > MAX_CLASS_LINES:
            findings.append(f"class {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines")
    median = statistics.median(lengths.values()) if lengths else 0
    return [*findings, f"the median function has {median} lines"] if median >= MAX_MEDIAN_LINES else findings


def import_findings(source: str) -> list[str]:
    """What is imported when the module loads is in the standard library, on every platform."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    pending: list[ast.AST] = [parsed(source)]
    findings = []
    while pending:
        node = pending.pop()
        roots = {name.partition(".")[0] for name in imported_modules(node)}
        findings += sorted(roots - sys.stdlib_module_names | roots & NOT_ON_WINDOWS)
        pending += [child for child in ast.iter_child_nodes(node) if not isinstance(child, functions)]
    return findings


PUBLIC_IN_SPITE_OF_ITS_NAME = "os._exit"  # documented by the standard library


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_findings(source: str) -> list[str]:
    """`something._name` stands only in a section with a class that defines `_name`; self and cls are free."""
    page = Page(source)
    owned = {
        (page.section(node), name)
        for node in ast.walk(page.tree)
        if isinstance(node, ast.ClassDef)
        for name in private_members(node)
    }
    return [
        f"line {node.lineno}, section {page.section(node)}: {ast.unparse(node)}"
        for node in ast.walk(page.tree)
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        and (page.section(node), node.attr) not in owned
        and ast.unparse(node) != PUBLIC_IN_SPITE_OF_ITS_NAME
    ]


def private_members(class_node: ast.ClassDef) -> Iterator[str]:
    """Private methods, class variables and attributes that a class gives to itself."""
    names: list[str] = []
    for member in class_node.body:
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(member.name)
        elif isinstance(member, ast.Assign | ast.AnnAssign):
            targets = member.targets if isinstance(member, ast.Assign) else [member.target]
            names += map(ast.unparse, targets)
    for node in ast.walk(class_node):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.append(node.attr)
    return filter(is_private, names)


def export_findings(source: str) -> list[str]:
    """Every name in `__all__` is defined in the module, as a class or function with a docstring."""
    tree = parsed(source)
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = {node.name for node in tree.body if isinstance(node, kinds) and ast.get_docstring(node)}
    exported: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exported = ast.literal_eval(node.value)
    return [f"{name} is not there, or says nothing of itself" for name in exported if name not in documented]


RULES = [
    map_findings,
    downward_findings,
    impure_findings,
    size_findings,
    import_findings,
    private_findings,
    export_findings,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_module_keeps_the_rule(rule: Callable[[str], list[str]]) -> None:
    assert rule(SOURCE) == []


def test_the_rules_see_the_whole_module() -> None:
    page = Page(SOURCE)
    assert len(page.banners) >= LAST_PURE
    assert len(function_lengths(SOURCE)) > 200
    assert {page.section(statement) for statement in page.tree.body} == set(range(len(page.banners) + 1))


def test_the_module_loads_in_silence_without_any_installed_package() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(qmesh.__file__).parent)!r}); import qmesh; "
        "print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names - {'qmesh', '__main__'})"
    )
    command = [sys.executable, "-I", "-S", "-B", "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


# --- Each rule can fail. ---


def page_of(*bodies: str, preamble: str = "") -> str:
    """A module with one section for each body, and a map of them."""
    numbers = range(1, len(bodies) + 1)
    lines = ['"""A page.', "", *(f"    {number:2}  Part {number}    what it holds" for number in numbers), '"""']
    lines += [preamble]
    for number, body in zip(numbers, bodies, strict=True):
        lines += ["", RULER, f"# {number}  Part {number}", "#", "# What holds here.", RULER, "", body]
    return "\n".join(lines) + "\n"


def filler(count: int) -> str:
    """The body of a function or class."""
    return "\n".join(["    x = 1"] * count)


TWELVE = page_of(*["a = 1"] * 12)
HOLDER = "class Holder:\n    def __init__(self) -> None:\n        self._kept = 1\n"

GOOD = {
    "an empty page": page_of(),
    "twelve sections": TWELVE,
    "a name of an earlier section": page_of("A = 1", "def f(x: int = A) -> int:\n    return A"),
    "a later name that is only local": page_of("def f(later: int) -> int:\n    return later", "later = 1"),
    "a later name that is only an attribute": page_of("def f(x: int) -> int:\n    return x.later", "later = 1"),
    "a name of the same section, further down": page_of("def f() -> int:\n    return B\nB = 1"),
    "a pure module in the pure half": page_of("a = math.pi", preamble="import math"),
    "a generator as an argument": page_of("def f(rng: random.Random) -> None: ...", preamble="import random"),
    "a clock below the pure half": page_of(*["a = 1"] * LAST_PURE, "t = time.time()", preamble="import time"),
    "a function of 60 lines": "def f():\n" + filler(59) + "\ndef g():\n    pass\ndef h():\n    pass",
    "a class of 300 lines": "class C:\n" + filler(299),
    "another package, inside a function": "def f():\n    import psutil",
    "a private name of one's own": page_of(HOLDER + "def f(holder: Holder) -> int:\n    return holder._kept"),
    "a documented name of the standard library": "import os\ndef f():\n    os._exit(1)",
    "a documented function": '__all__ = ["f"]\ndef f():\n    """Do it."""',
}

NO_SEVEN = TWELVE.replace("     7  Part 7    what it holds\n", "")
SWAPPED = TWELVE.replace("# 7  Part 7", "# x").replace("# 8  Part 8", "# 7  Part 7").replace("# x", "# 8  Part 8")
MIXED_MAP = NO_SEVEN.replace(' it holds\n"', ' it holds\n     7  Part 7    what it holds\n"')
NESTED = "def f():\n    def g():\n        return LATER\n    return g"
TASK = "async def f():\n    await asyncio.sleep(0)"
GUARDED = "try:\n    import psutil\nexcept ImportError:\n    pass"
LOG = "import logging\nlog = logging.getLogger()"

# What is wrong: (the rule that finds it, the page, words of the finding).
BAD = {
    "a banner that is not on the map": (map_findings, NO_SEVEN, "not on the map: (7, 'Part 7')"),
    "a banner of another title": (map_findings, TWELVE.replace("# 7  Part 7", "# 7  Part x"), "without a banner: (7"),
    "a banner of another number": (map_findings, TWELVE.replace("# 7  Part 7", "# 8  Part 7"), "not numbered"),
    "two lines of the map exchanged": (map_findings, MIXED_MAP, "map is not in order"),
    "two banners exchanged": (map_findings, SWAPPED, "not numbered"),
    "a banner without a number": (map_findings, TWELVE.replace("# 12  Part", "# Part"), "without a banner: (12"),
    "a banner without rules": (map_findings, TWELVE.replace("#\n# What holds here.\n", "", 1), "without a banner: (1,"),
    "a banner that is not closed": (map_findings, TWELVE.replace(f"here.\n{RULER}", "here.", 1), "no banner"),
    "a call of a later function": (downward_findings, page_of("def f(): return g()", "def g(): ..."), "g of section 2"),
    "a later constant": (downward_findings, page_of("A = LATER", "LATER = 1"), "LATER of section 2"),
    "a later argument": (downward_findings, page_of("def f(x: Later): ...", "class Later: ..."), "Later of section 2"),
    "a later field": (downward_findings, page_of("class A:\n    b: Later", "class Later: ..."), "Later of section 2"),
    "a later base class": (downward_findings, page_of("class A(Later): ...", "class Later: ..."), "Later of section 2"),
    "a later decorator": (downward_findings, page_of("@later\ndef f(): ...", "def later(): ..."), "later of section 2"),
    "a later default": (downward_findings, page_of("def f(x=LATER): ...", "LATER = 1"), "LATER of section 2"),
    "a later name in a lambda": (downward_findings, page_of("f = lambda: LATER", "LATER = 1"), "LATER of section 2"),
    "a later name in a list": (
        downward_findings,
        page_of("a = [LATER for _ in ()]", "LATER = 1"),
        "LATER of section 2",
    ),
    "a later name in a nested function": (downward_findings, page_of(NESTED, "LATER = 1"), "LATER of section 2"),
    "a clock": (impure_findings, page_of("t = time.time()", preamble="import time"), "time"),
    "a clock by its own name": (impure_findings, page_of("t = now()", preamble="from time import time as now"), "now"),
    "a task in the last pure section": (
        impure_findings,
        page_of(*["a = 1"] * (LAST_PURE - 1), TASK, preamble="import asyncio"),
        "asyncio",
    ),
    "an impure annotation": (impure_findings, page_of("def f(s: ssl.SSLContext): ...", preamble="import ssl"), "ssl"),
    "a log line": (impure_findings, page_of("def f(): log.info('')", preamble=LOG), "log"),
    "a file": (impure_findings, page_of("def f(): return open('x')"), "open"),
    "a path": (impure_findings, page_of("a = Path('x').read_text()", preamble="from pathlib import Path"), "Path"),
    "a printed line": (impure_findings, page_of("def f(): print('x')"), "print"),
    "an import in a pure function": (impure_findings, page_of("def f():\n    import psutil"), "psutil"),
    "a random number": (impure_findings, page_of("a = random.random()", preamble="import random"), "random"),
    "a random default": (impure_findings, page_of("def f(r=random.Random()): ...", preamble="import random"), "random"),
    "a function of 61 lines": (size_findings, "def g(): ...\ndef h(): ...\ndef f():\n" + filler(60), "f has 61 lines"),
    "a median function of 14 lines": (size_findings, "def f():\n" + filler(13), "median function has 14 lines"),
    "a class of 301 lines": (size_findings, "class C:\n" + filler(300), "class C has 301 lines"),
    "another package": (import_findings, "import numpy", "numpy"),
    "part of another package": (import_findings, "from llama_cpp.llama import Llama", "llama_cpp"),
    "another package, if it is there": (import_findings, GUARDED, "psutil"),
    "a module that Windows lacks": (import_findings, "import fcntl", "fcntl"),
    "a private attribute elsewhere": (
        private_findings,
        page_of(HOLDER, "a = Holder()._kept"),
        "section 2: Holder()._kept",
    ),
    "a private attribute of one's attribute": (
        private_findings,
        page_of(HOLDER, "class User:\n    def use(self) -> int:\n        return self.holder._kept"),
        "self.holder._kept",
    ),
    "a private attribute set from outside": (private_findings, page_of(HOLDER, "a._kept = 2"), "section 2: a._kept"),
    "a private method elsewhere": (
        private_findings,
        page_of("class A:\n    def _work(self): ...", "def f(a: A):\n    a._work()"),
        "section 2: a._work",
    ),
    "an exported name that is not there": (export_findings, '__all__ = ["f"]', "f is not there"),
    "an exported function without a docstring": (
        export_findings,
        '__all__ = ["f"]\ndef f(): ...',
        "f is not there, or",
    ),
    "an exported class without a docstring": (export_findings, '__all__ = ["C"]\nclass C: ...', "C is not there, or"),
}


@pytest.mark.parametrize("source", GOOD.values(), ids=GOOD.keys())
def test_a_page_that_keeps_the_rules_passes_them_all(source: str) -> None:
    assert [finding for rule in RULES for finding in rule(source)] == []


@pytest.mark.parametrize(("rule", "source", "words"), BAD.values(), ids=BAD.keys())
def test_a_page_that_breaks_a_rule_is_found(rule: Callable[[str], list[str]], source: str, words: str) -> None:
    assert words in " | ".join(rule(source))


def test_every_rule_is_shown_to_fail() -> None:
    assert {rule for rule, _, _ in BAD.values()} == set(RULES)
