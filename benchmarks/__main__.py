"""Run one benchmark by name: `python -m benchmarks train_step --json result.json`.

A benchmark is a module anywhere in this package that defines `add_arguments(parser)` and `run(args) -> result`, a JSON
value, and, if it can fail, `exit_code(result)`. Its name is its file's, its docstring's first line describes it, and it
prints its own table. This module must not know what is measured, and imports only the benchmark that it runs.
"""

import argparse
import ast
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that has not been imported. module: its dotted name; summary: its docstring's first line."""

    name: str
    module: str
    summary: str


def list_benchmarks() -> list[Benchmark]:
    """Return all benchmarks by name, without importing any.

    Raises:
        ValueError: two have the same name.
    """
    found: dict[str, Benchmark] = {}
    for file in FOLDER.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if not {"add_arguments", "run"} <= functions:
            continue  # a part of a benchmark
        module = ".".join([FOLDER.name, *file.relative_to(FOLDER).with_suffix("").parts])
        if file.stem in found:
            raise ValueError(f"{module} and {found[file.stem].module} have the same name: rename one")
        summary = (ast.get_docstring(tree) or "").partition("\n")[0]
        found[file.stem] = Benchmark(file.stem, module, summary)
    return [found[name] for name in sorted(found)]


def main(argv: list[str]) -> int:
    """Run the benchmark that argv names, return the exit code; argparse prints the list for --help and a wrong name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Side-by-side measurements.")
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    chosen = next((argument for argument in argv if not argument.startswith("-")), None)
    for benchmark in list_benchmarks():
        options = benchmarks.add_parser(benchmark.name, help=benchmark.summary.replace("%", "%%"))
        options.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
        if benchmark.name == chosen:  # only this one is imported, and knows its options
            module = importlib.import_module(benchmark.module)
            options.formatter_class = argparse.RawDescriptionHelpFormatter
            options.description = module.__doc__
            module.add_arguments(options)
    args = parser.parse_args(argv)
    result = module.run(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(module.exit_code(result)) if hasattr(module, "exit_code") else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
