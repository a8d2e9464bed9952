"""Where the compiler keeps what it has compiled, so that a process that starts again need not wait for it.

What lies there is code, in pickles, and the compiler runs it. So it is a folder of this user's alone, on this machine's
own disk; nothing compiled is ever taken from out_dir, from storage or from another node.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # PyTorch's; to import its compiler sets it


def keep_compiled() -> Path:
    """Tell the compiler where its cache is, and return that; call it before anything is compiled.

    A folder that the user has set is taken as it is, with a warning where others can put code into it. PyTorch's own
    default is not taken: whoever comes first can make that folder, and with most umasks a group can write to it.
    """
    from torch._inductor import config as compiler  # slow to import
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if _why_unsafe(Path(default_cache_dir())):  # where these are, whatever is set
        compiler.cpp_cache_precompile_headers = False
    given = os.environ.get(VARIABLE)
    if given and given != default_cache_dir():
        if why := _why_unsafe(Path(given)):
            logger.warning("%s=%s %s: code of theirs may be run here", VARIABLE, given, why)
        return Path(given)
    # named so that it is not taken for node memory's, should memory_dir be the folder of temporary files
    folder = Path(tempfile.gettempdir(), f"nanogpt-orchestrator-cache-{os.geteuid()}")
    if why := _make_own(folder):
        own = Path(tempfile.mkdtemp(prefix="nanogpt-orchestrator-cache-"))  # with mode 0700
        logger.warning("%s %s: what is compiled is kept in %s, for this process only", folder, why, own)
        folder = own
    os.environ[VARIABLE] = str(folder / "compiled")
    return folder / "compiled"


def _make_own(folder: Path) -> str:
    """Make a folder with a cache in it, for this user alone; return why it cannot be used, "" if it can."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if why := _why_unsafe(folder):
            return why
        (folder / "compiled").mkdir(mode=0o700, exist_ok=True)
        return _why_unsafe(folder / "compiled")
    except OSError as error:
        return f"cannot be made ({error.strerror})"


def _why_unsafe(folder: Path) -> str:
    """Return why code in a folder may be of others, "" if it is the user's alone, or not there yet."""
    try:
        found = folder.lstat()
    except OSError:
        return ""
    if not stat.S_ISDIR(found.st_mode):
        return "is no folder"
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    return "can be written to by others" if found.st_mode & 0o022 else ""
