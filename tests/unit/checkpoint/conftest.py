"""The command line, for tests of checkpoints and formats."""

from __future__ import annotations

import pytest

from orchestrator.__main__ import main
from tests.support.commands import Say


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Return a function that gives words to the command line and returns what it prints, or why it refuses them."""

    def call(*words: str, code: int = 0) -> str:
        assert main(words) == code
        output = capsys.readouterr()
        return output.out if code == 0 else output.err

    return call
