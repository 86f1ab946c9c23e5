"""How the package is built: imports go down its floors and never in a circle, and nothing in it is too large.

An import counts wherever it stands, also inside functions; those for type checkers alone do not.
"""

import ast
import graphlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_subprune

PACKAGE = Path(hf_subprune.__file__).parent
# From the top, as the package's docstring lists them.
FLOORS = [
    name for line in re.findall(r"^- .+", hf_subprune.__doc__, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)
]
PUBLIC = {(getattr(hf_subprune, name).__module__, name) for name in hf_subprune.__all__}

REPLACED = "stands in for a forward, which is called with whatever the model around it passes"
JOINED = "passes on to a method of Transformers whatever that takes"
READ = "Transformers passes what else stands in the config"
ANY_KEYWORDS = {
    "cli.options:_expanded.wrapped": "typer passes the options of the signature that it is given",
    "collection.stream:_ended_at_call.forward": REPLACED,
    "collection.stream:_made": REPLACED,
    "collection.stream:_return": REPLACED,
    "evaluation.costs:_attention_flops": "torch's counter passes the arguments of the operation that it counts",
    "loading:_from_dict": READ,
    "loading:_from_pretrained": JOINED,
    "loading:_join_in.joined": JOINED,
    "loading:_save_pretrained": JOINED,
    "models.experts:StackedExperts.__call__": REPLACED,
    "models.forwards:AdaptedForward.__call__": REPLACED,
    "models.forwards:_bypassing.bypassing": REPLACED,
    "models.forwards:_cutting.cutting": REPLACED,
    "models.listed:ListedExperts.__call__": REPLACED,
    "routing.tokens:RoutedTokens.route.record": REPLACED,
}
"""Functions that take any keywords, and why; public ones and commands apart."""


def modules(package: Path) -> dict[str, Path]:
    """Files by dotted name within the package, `__init__` for its own."""
    files = {file: file.relative_to(package).with_suffix("").parts for file in package.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__": f for f, parts in files.items()}


def imports(package: Path) -> dict[str, set[str]]:
    """Modules of the package that each of its modules imports."""
    files = modules(package)
    return {
        name: set(_imported(file, file.relative_to(package).parent.parts, files)) - {name}
        for name, file in files.items()
    }


def _imported(file: Path, folder: tuple[str, ...], known: dict[str, Path]) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    checked = [
        node.body for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    hidden = {id(inner) for body in checked for node in body for inner in ast.walk(node)}
    for node in ast.walk(tree):
        targets: list[tuple[str, ...]] = []
        if isinstance(node, ast.ImportFrom):
            above = (PACKAGE.name, *folder)[: len(folder) + 2 - node.level] if node.level else ()
            targets = [(*above, *(node.module or "").split("."), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        for target in targets if id(node) not in hidden else []:
            parts = [part for part in target if part]
            if parts[0] == PACKAGE.name:
                names = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
                yield next((name for name in names if name in known), "__init__")


def entry(module: str) -> str:
    """What stands directly under the package and holds the module."""
    return module.partition(".")[0]


def pairs(package: Path) -> set[tuple[str, str]]:
    """Entries of the package of which one imports from the other."""
    found = {(entry(name), entry(other)) for name, others in imports(package).items() for other in others}
    return {(one, other) for one, other in found if one != other}


def by_importer(found: set[tuple[str, str]]) -> dict[str, set[str]]:
    """What each entry imports from."""
    return {one: {other for first, other in found if first == one} for one, _ in found}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes that lead to one another, the first one again at the end; empty if none do."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def upward(package: Path) -> list[tuple[str, str]]:
    """Imports from a floor above."""
    return sorted(pair for pair in pairs(package) if FLOORS.index(pair[0]) > FLOORS.index(pair[1]))


def functions(node: ast.AST, within: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of a tree with its name, behind those of what it stands in."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        name = f"{within}.{child.name}".lstrip(".") if named else within
        if named and not isinstance(child, ast.ClassDef):
            yield name, child
        yield from functions(child, name)


def is_free(module: str, name: str, function: ast.FunctionDef) -> bool:
    """Whether a function may have many parameters: it is public, or a command."""
    command = any(re.search(r"\.command\(|_options$", ast.unparse(decorator)) for decorator in function.decorator_list)
    return command or (f"{PACKAGE.name}.{module}", entry(name)) in PUBLIC


def parameters(function: ast.FunctionDef) -> int:
    """Number of parameters, of which `*args` and `**kwargs` are one each."""
    given = function.args
    listed = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return sum(one is not None and one.arg not in ("self", "cls") for one in listed)


def body(function: ast.FunctionDef) -> int:
    """Lines of a function below its signature and docstring."""
    lines = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - lines[0].lineno + 1 if lines else 0


def all_functions(package: Path) -> Iterator[tuple[str, str, ast.FunctionDef]]:
    """Module, name and tree of every function of the package."""
    for module, file in modules(package).items():
        for name, function in functions(ast.parse(file.read_text(encoding="utf-8"))):
            yield module, name, function


def test_every_entry_has_a_floor_and_there_are_few():
    entries = {path.stem for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries - {"py"} == set(FLOORS)
    assert len(entries) <= 27
    assert len(pairs(PACKAGE)) <= 160


def test_every_folder_says_what_it_takes_and_gives():
    for folder in (path.parent for path in PACKAGE.glob("*/__init__.py")):
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert "\n\nTakes " in said and " gives " in said.replace("\n", " "), folder.name


def test_imports_go_down():
    assert upward(PACKAGE) == []


def test_nothing_leads_back_to_itself():
    assert circle(imports(PACKAGE)) == []
    assert circle(by_importer(pairs(PACKAGE))) == []


@pytest.mark.parametrize(
    ("module", "line", "up", "within"),
    [
        ("config", "def late():\n    from .pruning import prune\n", [("config", "pruning")], {"config", "pruning"}),
        ("solver/moments", "import hf_subprune.blocks\n", [("solver", "blocks")], set()),
        ("storage/on_import", "from .. import prune\n", [("storage", "__init__")], {"storage.on_import", "__init__"}),
        ("report/records", "from .page import save\n", [], {"report.records", "report.page"}),
        ("config", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .pruning import prune\n", [], set()),
    ],
)
def test_an_import_that_is_turned_round_is_found(tmp_path, module, line, up, within):
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name)
    changed = tmp_path / PACKAGE.name / f"{module}.py"
    changed.write_text(changed.read_text(encoding="utf-8") + line, encoding="utf-8")
    assert upward(tmp_path / PACKAGE.name) == up
    assert within <= set(circle(imports(tmp_path / PACKAGE.name)))


def test_files_functions_and_lists_of_parameters_are_short():
    found = list(all_functions(PACKAGE))
    assert [
        name for name, file in modules(PACKAGE).items() if len(file.read_text(encoding="utf-8").splitlines()) > 400
    ] == []
    assert [f"{module}:{name}" for module, name, function in found if body(function) > 60] == []
    few = [(module, name, function) for module, name, function in found if not is_free(module, name, function)]
    assert [f"{module}:{name}" for module, name, function in few if parameters(function) > 8] == []
    assert {f"{module}:{name}" for module, name, function in few if function.args.kwarg} == set(ANY_KEYWORDS)
