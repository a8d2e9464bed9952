"""Runs one benchmark by name: `python -m benchmarks train_step --json result.json`.

A benchmark is a module of this package whose docstring's first line describes it, with `add_arguments(parser)` and
`run(args) -> result`, a JSON value, and, if it can fail, `exit_code(result)`. It prints its own table. This module must
not know what is measured.
"""

import argparse
import ast
import importlib
import json
import sys
from pathlib import Path


def list_benchmarks() -> dict[str, str]:
    """Return name -> first line of the docstring, without importing anything."""
    files = sorted(file for file in Path(__file__).parent.glob("*.py") if not file.name.startswith("_"))
    docstrings = {file.stem: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for file in files}
    return {name: docstring.partition("\n")[0] for name, docstring in docstrings.items()}


def main(argv: list[str]) -> int:
    """Run the benchmark that argv names, return the exit code; argparse prints the list for --help and a wrong name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Side-by-side measurements.")
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    chosen = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, summary in list_benchmarks().items():
        options = benchmarks.add_parser(name, help=summary.replace("%", "%%"))
        options.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
        if name == chosen:  # only this one is imported, and knows its options
            module = importlib.import_module(f"benchmarks.{name}")
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
