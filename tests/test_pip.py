"""The wheel: pip makes it from git, and what it installs runs and has its help.

Offline: the build backend is one of this environment's own packages.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, missing

import hive

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--quiet", "--no-index", "--no-deps"]


def run(*command: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    return subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=100
    )


def test_a_newcomers_environment_has_paho_and_no_tools() -> None:
    done = subprocess.run(
        ["make", "-n", "-B", "venv"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if " pip install " in line]
    assert line.partition(" pip install ")[2].split()[2:] == ["'paho-mqtt>=2,<3'"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pip install git+https://...#subdirectory=contrib/pip` makes it, of what lies here."""
    if not importlib.util.find_spec("hatchling") or not shutil.which("git"):
        missing("git or hatchling is missing: make test installs hatchling")
    home = tmp_path_factory.mktemp("pip")
    repository = home / "a checkout"
    for folder in ("contrib/pip", "contrib/help"):
        shutil.copytree(ROOT / folder, repository / folder)
    for file in ("hive.py", "contrib/man.py"):
        shutil.copy(ROOT / file, repository / file)
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x"]
    for words in ("init -q", "add -A", "commit -q -m x"):
        done = run(*git, *words.split(), home=home)
        assert done.returncode == 0, done.stderr
    where = f"git+{repository.as_uri()}#subdirectory=contrib/pip"
    build = ["wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", str(home), where]
    done = run(*PIP, *build, home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = home.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and with this one's paho-mqtt."""
    made = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    done = run(*PIP, "--python", made / "bin/python", "install", *OFFLINE, wheel, home=made)
    assert done.returncode == 0, done.stdout + done.stderr
    (site,) = made.glob("lib/python*/site-packages")
    found = importlib.util.find_spec("paho")
    assert found and found.origin
    (site / "paho").symlink_to(Path(found.origin).parent)
    return made


def test_what_it_is_called_and_what_it_needs(wheel: Path, environment: Path) -> None:
    assert wheel.name == f"hive_agents-{hive.__version__}-py3-none-any.whl"
    (metadata,) = environment.glob("lib/python*/site-packages/hive_agents-*/METADATA")
    text = metadata.read_text()
    runtime = re.search(r"^RUNTIME := '(.*)'$", (ROOT / "Makefile").read_text(), re.M)
    assert runtime
    name, bounds = runtime[1].partition(">")[0], runtime[1].removeprefix("paho-mqtt").split(",")
    (needed,) = re.findall(r"^Requires-Dist: (\S+?)([<>=].*)$", text, re.M)
    assert (needed[0], {*needed[1].split(",")}) == (name, {*bounds})
    pinned = tomllib.loads((ROOT / "contrib/pip/pyproject.toml").read_text())["project"]
    assert f"Requires-Python: {pinned['requires-python']}\n" in text


@pytest.mark.parametrize("name", ["hive", "hive-cli"])
def test_its_commands_run(name: str, environment: Path, tmp_path: Path) -> None:
    program = environment / "bin" / name
    said = run(program, "--version", home=tmp_path)
    assert said.stdout.startswith(f"hive {hive.__version__} (")
    refused = run(program, "status", "--port", "1", home=tmp_path)
    assert refused.returncode == hive.Exit.BROKER and "Connection refused" in refused.stderr


def test_it_has_its_help(environment: Path, tmp_path: Path) -> None:
    for topic in hive.TOPICS:
        done = run(environment / "bin/hive", "help", topic, home=tmp_path)
        assert (done.stdout, done.stderr) == (hive.help_topic(topic), "")


def test_it_has_its_man_pages_and_completions(environment: Path, tmp_path: Path) -> None:
    share = environment / "share"
    files = {str(file.relative_to(share)) for file in share.rglob("*") if file.is_file()}
    completions = {
        "bash": "bash-completion/completions/hive",
        "zsh": "zsh/site-functions/_hive",
        "fish": "fish/vendor_completions.d/hive.fish",
    }
    pages = {f"man/man7/hive-{topic}.7" for topic in hive.TOPICS}
    assert files == {"man/man1/hive.1", *pages, *completions.values()}
    assert f'"hive {hive.__version__}"' in (share / "man/man1/hive.1").read_text()
    for shell, place in completions.items():
        said = run(environment / "bin/hive", "completion", shell, home=tmp_path)
        assert (share / place).read_text() == said.stdout


def test_it_puts_nothing_elsewhere(environment: Path) -> None:
    (site,) = environment.glob("lib/python*/site-packages")
    names = {path.name for path in site.iterdir()} - {"__pycache__", "paho"}
    assert {name for name in names if not name.endswith(".dist-info")} == {"hive.py", "hive-help"}
