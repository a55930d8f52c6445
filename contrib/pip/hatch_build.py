"""What the wheel has besides hive.py and its help: man pages, and completions of three shells.

They go where `make install` puts them too, below the prefix that pip installs into.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPLETIONS = {
    "bash": "share/bash-completion/completions/hive",
    "zsh": "share/zsh/site-functions/_hive",
    "fish": "share/fish/vendor_completions.d/hive.fish",
}


class Made(BuildHookInterface):  # type: ignore[type-arg]
    """Makes them of hive.py for as long as the wheel is built."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        checkout = Path(self.root).parents[1]
        self._folder = tempfile.TemporaryDirectory()
        made = Path(self._folder.name)
        subprocess.run([sys.executable, checkout / "contrib/man.py", made], check=True)
        places = {page: f"share/man/man{page.suffix[1:]}/{page.name}" for page in made.iterdir()}
        for shell, place in COMPLETIONS.items():
            words = [sys.executable, str(checkout / "hive.py"), "completion", shell]
            said = subprocess.run(words, check=True, capture_output=True)
            (made / shell).write_bytes(said.stdout)
            places[made / shell] = place
        build_data["shared_data"] |= {str(file): place for file, place in places.items()}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._folder.cleanup()
