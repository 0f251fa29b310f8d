"""Helpers of several commands."""
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Optional

import torch


def find_device(name: Optional[str]) -> torch.device:
    """A device by its name (default: an accelerator if there is one, else the CPU); ValueError if it cannot be used."""
    try:
        return torch.empty(0, device=name or torch.accelerator.current_accelerator(check_available=True)).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f'Device {name!r} cannot be used here: {str(error).splitlines()[0]}') from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears when everything in it is complete; FileExistsError if it exists. Until then a hidden folder
    stands beside it, which only SIGKILL can leave behind."""
    if path.exists():
        raise FileExistsError(f'{path} exists already: remove it, or choose another folder.')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent) as folder:
        partial = Path(folder) / path.name
        partial.mkdir()
        yield partial
        os.replace(partial, path)
