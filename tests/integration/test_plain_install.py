"""Every command in an environment that has no more than a plain `pip install` brings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.installation import ROOT, plain_environment

RUN = [
    "--dataset=quickstart",
    "--n_layer=1",
    "--n_head=1",
    "--n_embd=8",
    "--block_size=8",
    "--batch_size=2",
    "--max_iters=2",
    "--eval_iters=1",
    "--gradient_accumulation_steps=1",
    "--warmup_iters=0",
    "--device=cpu",
    "--compile=False",
    "--cpus_per_worker=0.5",
]
COMMANDS = {
    "help": ["--help"],
    "help of train": ["train", "--help"],
    "prepare": ["prepare", "quickstart"],
    "train": ["train", *RUN, "--out_dir=run"],
    "sample": ["sample", "--out_dir=run", "--num_samples=1", "--max_new_tokens=3", "--device=cpu"],
    "inspect": ["inspect", "--out_dir=run"],
    "report": ["report", "--out_dir=run"],
    "export for nanoGPT": ["export", "--out_dir=run", "--format=nanogpt", "--to=ckpt.pt"],
    "export for Hugging Face": ["export", "--out_dir=run", "--format=hf", "--to=hf"],
}


def run_all(python: Path, folder: Path, memory_dir: str) -> None:
    """Run every command, each in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for name, words in COMMANDS.items():
        more = [f"--memory_dir={memory_dir}"] if name == "train" else []
        done = subprocess.run(
            [python, "-m", "orchestrator", *words, *more],
            cwd=folder,
            env={**environment, "RAY_ADDRESS": "local"},
            timeout=240,
            capture_output=True,
            check=False,
            text=True,
        )
        assert done.returncode == 0, f"{name}:\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, f"{name}:\n{done.stderr}"
    assert (folder / "ckpt.pt").is_file()
    assert (folder / "hf" / "model.safetensors").is_file()


def test_every_command_runs_with_what_is_declared(tmp_path: Path, memory_dir: str) -> None:
    python = plain_environment(tmp_path / "venv")
    hidden = subprocess.run([python, "-c", "import pytest"], capture_output=True, check=False)
    assert hidden.returncode != 0, "what is not declared must not be found"
    run_all(python, tmp_path, memory_dir)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_runs_in_a_fresh_environment(tmp_path: Path, memory_dir: str) -> None:
    """Builds the wheel and installs it, without extras, as a user would: it downloads what it needs."""
    venv, wheels = tmp_path / "venv", tmp_path / "wheels"
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    for name in ("orchestrator", "model"):  # a build leaves its files where it takes place
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "source")
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(tmp_path / "source")], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--constraint", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    run_all(venv / "bin" / "python", tmp_path, memory_dir)
