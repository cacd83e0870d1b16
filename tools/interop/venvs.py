"""The peers' venvs: made once, from pinned lists; a second run needs no network.

Layer: tool.

- `requirements/NAME.txt` pins all that a venv holds and is installed without dependencies. It was
  made by `pip freeze` of a venv that worked.
- torch is the exception: tools/install_torch.sh finds the CPU build of the version that it pins.
- A stamp holds the list that was installed; a venv whose list changed is made anew.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from interop.cases import UnavailableError
from interop.site import TOOLS, venv_of

_LISTS: Final = Path(__file__).resolve().parent / "requirements"
_STAMP: Final = ".installed"


def prepare(name: str) -> None:
    """Make a venv as its list says, unless it is there.

    Raises:
        UnavailableError: pip could not install something.
    """
    text = (_LISTS / f"{name}.txt").read_text()
    venv = venv_of(name)
    stamp = venv / _STAMP
    if stamp.exists() and stamp.read_text() == text:
        return
    sys.stderr.write(f"interop: installing the venv {name}\n")
    shutil.rmtree(venv, ignore_errors=True)
    _run(sys.executable, "-m", "venv", str(venv))
    python = str(venv / "bin" / "python")
    pins = [line for line in text.splitlines() if line and not line.startswith(("#", "torch=="))]
    pinned = venv / "requirements.txt"
    pinned.write_text("\n".join(pins) + "\n")
    _run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps",
         "--only-binary=:all:", "-r", str(pinned))  # fmt: skip
    if any(line.startswith("torch==") for line in text.splitlines()):
        _run("bash", str(TOOLS / "install_torch.sh"), python)
    stamp.write_text(text)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = " / ".join(done.stderr.strip().splitlines()[-2:])
        raise UnavailableError(f"{Path(command[0]).name}: {said[-300:]}")
