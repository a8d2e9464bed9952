"""The law of the house, read off the source: sizes, broad excepts, import circles, and who may know Ray's internals."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("orchestrator", "model")

LONGEST_FUNCTION, LARGEST_CLASS = 60, 150
NANOGPTS_OWN = {"model.gpt.GPT"}  # nanoGPT's class, which people know as one
BROAD_EXCEPTS = 12  # together, each with its reason; no number here may rise
MODULES_THAT_THE_LOOP_IMPORTS = 10
FILES_AT_THE_ROOT = 4

RAYS_INTERNALS = ("ray._private", "ray._raylet", "ray.core.generated", "ray.train.v2._internal")
MAY_KNOW_RAYS_INTERNALS = {
    "orchestrator.cluster.autoscaler": "nothing public tells which machines an autoscaler may start",
    "orchestrator.cluster.join": "Ray knocks at a silent address for minutes, and ends its processes slowly",
    "orchestrator.controller.attempts": "the types of the hooks that `RunConfig(callbacks=...)` takes",
    "orchestrator.controller.gpu_check": "the type of such a hook",
    "orchestrator.controller.placement": "a node's free resources, draining nodes, and the label of a node's id",
    "orchestrator.controller.ray_errors": "the error of a worker that does not answer",
    "orchestrator.controller.scaling": "scaling policies, and which nodes drain",
    "orchestrator.controller.spares": "there is no public call that starts processes ahead",
    "orchestrator.driver.fit": "finds the controller's actor, to end it after Ctrl-C",
    "orchestrator.driver.ray_output": "the function by which Ray prints what its processes print",
    "orchestrator.driver.trainer": "the callbacks of Ray's that are left out",
    "orchestrator.worker.drain": "the public call for drain notices is a barrier of all ranks, and none drains a node",
    "orchestrator.worker.final_reports": "how a thread beside training fails its worker",
}


@cache
def sources() -> dict[str, ast.Module]:
    """Return the syntax trees of our modules by name."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in files]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    return {name.removesuffix(".__init__"): tree for name, tree in zip(names, trees, strict=True)}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Yield what a tree imports, also within functions and under TYPE_CHECKING; of `from a import b`, a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def definitions(kinds: tuple[type[ast.AST], ...]) -> dict[str, int]:
    """Return the number of lines of each definition of these kinds, by its full name."""
    found: dict[str, int] = {}

    def walk(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{name}.{child.name}"
                if isinstance(child, kinds):
                    found[inner] = (child.end_lineno or 0) - child.lineno + 1
            walk(child, inner)

    for module, tree in sources().items():
        walk(tree, module)
    return found


def is_broad(node: ast.expr | None) -> bool:
    """Return whether an except clause, or an argument of suppress, takes whatever comes."""
    names = node.elts if isinstance(node, ast.Tuple) else [node]
    return node is None or any(
        isinstance(name, ast.Name) and name.id in ("Exception", "BaseException") for name in names
    )


def broad_excepts() -> list[str]:
    """Return where whatever comes is caught, if only to be raised again."""
    found = []
    for module, tree in sources().items():
        for node in ast.walk(tree):
            is_suppress = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
            if (isinstance(node, ast.ExceptHandler) and is_broad(node.type)) or (
                is_suppress and isinstance(node, ast.Call) and any(map(is_broad, node.args))
            ):
                found.append(f"{module}:{node.lineno}")
    return found


def test_functions_and_classes_are_small() -> None:
    functions = definitions((ast.FunctionDef, ast.AsyncFunctionDef))
    classes = definitions((ast.ClassDef,))
    too_long = {name for name, lines in functions.items() if lines > LONGEST_FUNCTION}
    too_long |= {name for name, lines in classes.items() if lines > LARGEST_CLASS}
    assert too_long <= NANOGPTS_OWN


def test_few_excepts_take_whatever_comes() -> None:
    found = broad_excepts()
    assert len(found) <= BROAD_EXCEPTS, "\n".join(found)


def test_few_files_lie_at_the_root() -> None:
    files = [path.name for path in (ROOT / "orchestrator").glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= FILES_AT_THE_ROOT


def test_the_loop_imports_few_modules() -> None:
    known = sources().keys()
    imported = {name for name in imports_of(sources()["orchestrator.loop"]) if name in known and "." in name}
    assert len(imported) <= MODULES_THAT_THE_LOOP_IMPORTS, sorted(imported)


def test_rays_internals_are_known_to_those_that_have_a_reason() -> None:
    know = {
        module
        for module, tree in sources().items()
        if any(is_within(name, RAYS_INTERNALS) for name in imports_of(tree)) or "ray._private." in ast.unparse(tree)
    }
    assert know == MAY_KNOW_RAYS_INTERNALS.keys()


def test_no_import_goes_in_circles() -> None:
    known = sources().keys()
    graph = {
        module: {name for name in imports_of(tree) if name in known and name != module}
        for module, tree in sources().items()
    }
    left = {module: set(imported) for module, imported in graph.items()}
    while free := [
        module
        for module, imported in left.items()
        if not imported & left.keys() or not any(module in others for others in left.values())
    ]:
        for module in free:
            left.pop(module)
            for others in left.values():
                others.discard(module)
    assert not left, f"in circles: {sorted(left)}"


def spare_modules() -> list[str]:
    """Return the modules that a spare process imports, as `spares.py` names them."""
    (value,) = (
        node.value
        for node in sources()["orchestrator.controller.spares"].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULES"
    )
    return list(ast.literal_eval(value))


@pytest.mark.parametrize("module", spare_modules())
def test_a_spare_imports_what_is_there(module: str) -> None:
    # `preload` passes over what cannot be imported, so a name that is wrong would cost time at every start, unseen
    assert importlib.util.find_spec(module) is not None


def test_a_spare_has_torch() -> None:
    code = "import sys, orchestrator.worker.run; print('torch' in sys.modules, 'ray.train' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split()[-2:] == ["True", "True"]
