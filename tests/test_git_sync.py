"""The git-sync handler: real repositories, remotes that are dead, slow or want a password."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, ROOT, free_port

HANDLER = ROOT / "contrib" / "handlers" / "git-sync"


def workspaces(*names: str) -> str:
    return "".join(f'[[workspace]]\npath = "~/{name}"\n' for name in names)


class Machine:
    """A home with a workspace, ~/project, that was cloned from ~/upstream."""

    def __init__(self, home: Path) -> None:
        self.home, self.project, self.upstream = home, home / "project", home / "upstream"
        self.handler = HANDLER
        self.config = home / ".config" / "hive" / "git-sync.toml"
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
        }

    def furnish(self) -> None:
        self.config.parent.mkdir(parents=True)
        self.configure(workspaces("project") + 'branch = "main"')
        self.upstream.mkdir()
        self.git(self.upstream, "init", "-q", "-b", "main")
        self.commit(self.upstream, "file", "first")
        self.clone("project")

    def move_to(self, home: Path) -> Machine:
        """A copy, elsewhere: faster than to make it once more."""
        shutil.copytree(self.home, home, dirs_exist_ok=True)
        copy = Machine(home)
        copy.pull_from(f"file://{copy.upstream}")
        return copy

    def git(self, folder: Path, *arguments: str | Path, code: int | None = 0) -> str:
        user = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org")
        done = subprocess.run(
            ["git", *user, "-c", "protocol.file.allow=always", *arguments],
            cwd=folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert code is None or done.returncode == code, done.stderr
        return done.stdout.strip()

    def commit(self, folder: Path, file: str, content: str) -> str:
        (folder / file).write_text(content)
        self.git(folder, "add", "-f", file)
        self.git(folder, "commit", "-q", "-m", content)
        return self.head(folder)

    def head(self, folder: Path) -> str:
        return self.git(folder, "rev-parse", "HEAD")

    def clone(self, name: str, *options: str) -> Path:
        self.git(self.home, "clone", "-q", *options, f"file://{self.upstream}", name)
        return self.home / name

    def pull_from(self, url: str) -> None:
        self.git(self.project, "remote", "set-url", "origin", url)

    def configure(self, toml: str) -> None:
        self.config.write_text(toml)

    def script(self, name: str, lines: str) -> Path:
        file = self.home / name
        file.write_text(f"#!/bin/sh\n{lines}\n")
        file.chmod(0o755)
        return file

    def after(self, command: str, lines: str) -> str:
        """A PATH with a git that does more, in the workspace, once it has done `command`."""
        real = str(shutil.which("git"))
        then = f"cd '{self.project}' && {lines.replace('GIT', real)}"
        more = f"case \" $* \" in *' {command} '*) {then};; esac"
        self.script("git", f"'{real}' \"$@\" || exit\n{more}")
        return f"{self.home}:{self.environment['PATH']}"

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-S", self.handler],  # without site: the standard library alone
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.home,
            env=self.environment | environment,
        )

    def feed(self, stdin: str, **environment: str) -> tuple[int, str, str]:
        with self.start(**environment) as running:
            stdout, stderr = running.communicate(stdin, timeout=PATIENCE)
        assert "Traceback" not in stderr
        return running.returncode, stdout, stderr

    def sync(self, text: str = "all", **environment: str) -> Any:
        """What the handler reports; each trouble is a line on stderr, and the exit code says so."""
        code, stdout, stderr = self.feed(json.dumps({"v": 1, "text": text}), **environment)
        assert stdout, stderr
        result = json.loads(stdout)
        troubled = [
            f"git-sync: {one['path']}: {one['status']}: {one['hint']}"
            for one in result["workspaces"]
            if one["status"] not in ("up-to-date", "updated")
        ]
        assert stderr.splitlines() == troubled
        assert code == bool(troubled)
        assert result["total"] - result["in_sync"] == len(troubled)
        return result

    def sync_one(self, **environment: str) -> tuple[str, str]:
        """The status and the hint of the only workspace."""
        (one,) = self.sync(**environment)["workspaces"]
        return one["status"], one["hint"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    model = Machine(tmp_path_factory.mktemp("model"))
    model.furnish()
    return model


@pytest.fixture
def machine(model: Machine, tmp_path: Path) -> Machine:
    return model.move_to(tmp_path)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE)
        yield server


def url_of(server: socket.socket) -> str:
    return f"git://127.0.0.1:{server.getsockname()[1]}/x"


def hung_up(connection: socket.socket) -> bool:
    """Has the other side ended?"""
    with connection:
        connection.settimeout(PATIENCE)
        while connection.recv(4096):
            pass
    return True


def files_in(folder: Path) -> dict[str, bytes]:
    """What a user has there, the repository itself aside."""
    found = folder.rglob("*") if folder.is_dir() else [folder] if folder.exists() else []
    return {str(p): p.read_bytes() for p in found if p.is_file() and ".git" not in p.parts}


# What is pulled


def test_a_workspace_that_is_behind_is_brought_up_to_date(machine: Machine) -> None:
    old = machine.head(machine.project)
    machine.commit(machine.upstream, "file", "second")
    new = machine.commit(machine.upstream, "other", "third")
    assert machine.sync() == {
        "workspaces": [
            {
                "path": "~/project",
                "remote": "origin",
                "branch": "main",
                "old": old,
                "new": new,
                "pulled": 2,
                "status": "updated",
                "hint": "",
            }
        ],
        "in_sync": 1,
        "total": 1,
    }
    assert machine.head(machine.project) == new
    assert (machine.project / "other").read_text() == "third"
    assert machine.git(machine.project, "status", "--porcelain", "-b") == "## main...origin/main"


def test_nothing_new_is_up_to_date(machine: Machine) -> None:
    old = machine.head(machine.project)
    (one,) = machine.sync()["workspaces"]
    assert (one["status"], one["old"], one["new"], one["pulled"]) == ("up-to-date", old, old, 0)


def test_the_branch_that_is_checked_out_is_the_default(machine: Machine) -> None:
    machine.git(machine.upstream, "switch", "-q", "-c", "topic")
    machine.commit(machine.upstream, "file", "on the topic")
    machine.git(machine.project, "switch", "-q", "-c", "topic")
    machine.configure(workspaces("project"))
    (one,) = machine.sync()["workspaces"]
    assert (one["branch"], one["status"]) == ("topic", "updated")


def test_another_remote_can_be_configured(machine: Machine) -> None:
    machine.git(machine.project, "remote", "rename", "origin", "mirror")
    machine.configure(workspaces("project") + 'remote = "mirror"')
    assert machine.sync_one() == ("up-to-date", "")


@pytest.mark.parametrize("kind", ["worktree", "shallow", "link"])
def test_a_workspace_need_not_be_a_plain_clone(machine: Machine, kind: str) -> None:
    other = machine.home / "other"
    if kind == "worktree":
        machine.git(machine.project, "switch", "-q", "--detach")
        machine.git(machine.project, "worktree", "add", "-q", other, "main")
    elif kind == "shallow":
        machine.clone("other", "--depth=1")
    else:
        other.symlink_to(machine.project)
    new = machine.commit(machine.upstream, "file", "second")
    machine.configure(workspaces("other"))
    assert machine.sync_one() == ("updated", "")
    assert machine.head(other) == new


def test_tags_and_other_branches_stay_at_the_remote(machine: Machine) -> None:
    machine.git(machine.project, "config", "remote.origin.tagOpt", "--tags")
    machine.commit(machine.upstream, "file", "second")
    machine.git(machine.upstream, "tag", "v1")
    machine.git(machine.upstream, "branch", "other")
    assert machine.sync_one() == ("updated", "")
    assert machine.git(machine.project, "tag") == ""
    assert "other" not in machine.git(machine.project, "branch", "-a")


def test_submodules_are_left_alone(machine: Machine) -> None:
    library = machine.home / "library"
    library.mkdir()
    machine.git(library, "init", "-q", "-b", "main")
    old = machine.commit(library, "code", "1")
    machine.git(machine.upstream, "submodule", "--quiet", "add", f"file://{library}", "lib")
    machine.git(machine.upstream, "commit", "-q", "-m", "lib")
    machine.git(machine.project, "pull", "-q")
    machine.git(machine.project, "submodule", "--quiet", "update", "--init")
    machine.git(machine.project, "config", "submodule.recurse", "true")
    machine.commit(library, "code", "2")
    machine.git(machine.upstream / "lib", "pull", "-q")
    machine.git(machine.upstream, "commit", "-q", "-am", "newer lib")
    assert machine.sync_one() == ("updated", "")
    assert machine.head(machine.project / "lib") == old
    assert machine.git(machine.project / "lib", "rev-parse", "origin/main") == old
    assert machine.sync_one() == ("up-to-date", "")


# What is left as it is

Spoil = Callable[[Machine], object]


def edit(machine: Machine) -> None:
    (machine.project / "file").write_text("mine")


def stage(machine: Machine) -> None:
    edit(machine)
    machine.git(machine.project, "add", "file")


def put_untracked(machine: Machine) -> None:
    (machine.project / "news").write_text("mine")


def put_ignored(machine: Machine) -> None:
    (machine.project / ".git" / "info" / "exclude").write_text("news\n")
    put_untracked(machine)


def commit_here(machine: Machine) -> None:
    machine.commit(machine.project, "mine", "mine")


def pull_and_commit(machine: Machine) -> None:
    machine.git(machine.project, "pull", "-q")
    commit_here(machine)


def rewrite(machine: Machine) -> None:
    machine.git(machine.upstream, "commit", "-q", "--amend", "-m", "rewritten")
    machine.git(machine.project, "pull", "-q")
    machine.git(machine.upstream, "commit", "-q", "--amend", "-m", "rewritten again")


def conflict(*command: str) -> Spoil:
    def spoil(machine: Machine) -> None:
        machine.git(machine.project, "switch", "-q", "-c", "rival")
        machine.commit(machine.project, "file", "rival")
        machine.git(machine.project, "switch", "-q", "main")
        machine.commit(machine.project, "file", "mine")
        machine.commit(machine.project, "file", "mine again")
        machine.git(machine.project, *command, code=None)

    return spoil


def in_project(*command: str) -> Spoil:
    return lambda machine: machine.git(machine.project, *command)


def remove(machine: Machine) -> None:
    shutil.rmtree(machine.project)


def replace_by_a_file(machine: Machine) -> None:
    remove(machine)
    machine.project.write_text("a file")


def remove_the_repository(machine: Machine) -> None:
    shutil.rmtree(machine.project / ".git")


def leave_it_in_a_repository(machine: Machine) -> None:
    remove_the_repository(machine)
    machine.git(machine.home, "init", "-q", "-b", "main")


def replace_by_a_bare_one(machine: Machine) -> None:
    remove(machine)
    machine.clone("project", "--bare")


def replace_by_an_empty_one(machine: Machine) -> None:
    remove(machine)
    machine.project.mkdir()
    machine.git(machine.project, "init", "-q", "-b", "main")


def leave_a_lock(machine: Machine) -> None:
    (machine.project / ".git" / "index.lock").touch()


def leave_a_ref_lock(machine: Machine) -> None:
    (machine.project / ".git" / "refs" / "heads" / "main.lock").touch()


def rename_upstream(machine: Machine) -> None:
    machine.git(machine.upstream, "branch", "-m", "trunk")


def remove_upstream(machine: Machine) -> None:
    shutil.rmtree(machine.upstream)


def break_the_configuration(machine: Machine) -> None:
    (machine.project / ".git" / "config").write_text("[core\n")


TROUBLES: list[tuple[Spoil, str, str]] = [
    (edit, "dirty", "uncommitted changes, as in 'file'; commit or stash them"),
    (stage, "dirty", "uncommitted changes, as in 'file'; commit or stash them"),
    (put_untracked, "dirty", "'news' would be overwritten; commit it, or move it out of the way"),
    (put_ignored, "dirty", "'news' would be overwritten; commit it, or move it out of the way"),
    (pull_and_commit, "ahead", "1 local commit(s); try: git push origin main"),
    (commit_here, "diverged", "1 commit(s) here and 1 there; try: git rebase "),
    (rewrite, "diverged", "1 commit(s) here and 1 there; try: git rebase "),
    (conflict("merge", "rival"), "in-progress", "merge: finish it, or try: git merge --abort"),
    (conflict("rebase", "rival"), "in-progress", "rebase: finish it, or try: git rebase --abort"),
    (conflict("rebase", "--apply", "rival"), "in-progress", "rebase: finish it, "),
    (conflict("cherry-pick", "rival"), "in-progress", "cherry-pick: finish it, or try: git cherry"),
    (conflict("revert", "HEAD~1"), "in-progress", "revert: finish it, or try: git revert --abort"),
    (in_project("bisect", "start"), "in-progress", "bisect: finish it, or try: git bisect reset"),
    (in_project("switch", "--detach"), "detached", "try: git switch main"),
    (
        in_project("switch", "-c", "topic"),
        "other-branch",
        "topic is checked out, not main; try: git switch main",
    ),
    (remove, "missing", "git clone it to there, or remove it from "),
    (replace_by_a_file, "not-a-repository", "this is no folder"),
    (remove_the_repository, "not-a-repository", "git clone it to there, or is the path right?"),
    (leave_it_in_a_repository, "not-a-repository", "it is not the top folder of a repository's"),
    (in_project("config", "core.worktree", "/"), "not-a-repository", "it is not the top folder"),
    (replace_by_a_bare_one, "bare", "it has no files to bring up to date; name a clone of it"),
    (replace_by_an_empty_one, "empty", "nothing is committed yet; try: git pull origin main"),
    (
        leave_a_lock,
        "locked",
        "another git is at work, or died: if none runs, remove .git/index.lock",
    ),
    (leave_a_ref_lock, "locked", "another git is at work, or died: if none runs, remove .git/refs"),
    (in_project("remote", "remove", "origin"), "no-remote", "try: git remote add origin URL"),
    (rename_upstream, "no-branch", "origin has no main; is the name right, was it pushed?"),
    (remove_upstream, "fetch-failed", "git says "),
    (break_the_configuration, "error", "git says 'fatal: bad config line 1"),
]


@pytest.mark.parametrize(
    ("spoil", "status", "hint"), TROUBLES, ids=[f"{i}-{t[1]}" for i, t in enumerate(TROUBLES)]
)
def test_a_workspace_in_trouble_is_left_as_it_is(
    machine: Machine, spoil: Spoil, status: str, hint: str
) -> None:
    machine.commit(machine.upstream, "news", "news")
    spoil(machine)
    before = files_in(machine.project)
    (one,) = machine.sync()["workspaces"]
    assert (one["status"], one["hint"][: len(hint)]) == (status, hint)
    assert (one["new"], one["pulled"]) == (one["old"], 0)
    assert files_in(machine.project) == before
    assert not (machine.project / "mine").exists() or status in ("ahead", "diverged")


def test_the_others_are_still_done_when_one_fails(machine: Machine) -> None:
    second = machine.clone("second")
    new = machine.commit(machine.upstream, "file", "second")
    edit(machine)
    machine.configure(workspaces("project", "second"))
    result = machine.sync()
    assert [one["status"] for one in result["workspaces"]] == ["dirty", "updated"]
    assert (result["in_sync"], result["total"]) == (1, 2)
    assert machine.head(second) == new


@pytest.mark.parametrize(
    ("meanwhile", "status"),
    [
        ("GIT switch -q -c topic", "busy"),
        ("GIT fetch -q ../upstream other", "busy"),
        ("echo mine >file", "dirty"),
    ],
)
def test_what_somebody_does_during_the_fetch_is_noticed(
    machine: Machine, meanwhile: str, status: str
) -> None:
    machine.git(machine.upstream, "branch", "other")
    machine.commit(machine.upstream, "news", "news")
    old = machine.head(machine.project)
    path = machine.after("fetch", meanwhile)
    assert machine.sync_one(PATH=path)[0] == status
    assert machine.head(machine.project) == old


# Remotes that want something, or say nothing


class Locked(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="x"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def locked() -> Iterator[str]:
    """A web server that lets nobody in; its address."""
    with HTTPServer(("127.0.0.1", 0), Locked) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}/x"
        server.shutdown()
        thread.join()


def test_a_remote_that_wants_a_password_is_reported_and_nobody_is_asked(
    machine: Machine, locked: str
) -> None:
    asked = machine.home / "asked"
    program = str(machine.script("ask", f"touch '{asked}'"))
    machine.git(machine.project, "config", "core.askPass", program)
    machine.pull_from(f"http://{locked}")
    status, hint = machine.sync_one(GIT_ASKPASS=program, SSH_ASKPASS=program, DISPLAY=":0")
    assert status == "credentials"
    assert hint.startswith("nobody can be asked here; log in by hand until this works: git fetch")
    assert not asked.exists()


@pytest.mark.parametrize("port", ["open", "closed"])
def test_a_password_in_a_url_is_not_told(machine: Machine, locked: str, port: str) -> None:
    address = locked if port == "open" else f"127.0.0.1:{free_port()}/x"
    machine.pull_from(f"http://ada:s3cret@{address}")
    status, hint = machine.sync_one()
    assert status == ("credentials" if port == "open" else "fetch-failed")
    assert "s3cret" not in hint


@pytest.mark.parametrize("said", [None, "GIT_SSH_COMMAND", "GIT_SSH", "core.sshCommand"])
def test_ssh_asks_nothing_unless_the_user_set_it_up(machine: Machine, said: str | None) -> None:
    called = machine.home / "called"
    ssh = machine.script(
        "ssh", f"echo \"$@\" >>'{called}'\necho 'x: Permission denied (publickey).' >&2\nexit 255"
    )
    machine.pull_from("git@host.invalid:x")
    environment = {"PATH": f"{machine.home}:{machine.environment['PATH']}"}
    if said == "core.sshCommand":
        machine.git(machine.project, "config", said, str(ssh))
    elif said:
        environment[said] = str(ssh)
    status, hint = machine.sync_one(**environment)
    assert status == "credentials"
    assert hint.endswith("git fetch origin (git says 'x: Permission denied (publickey).')")
    assert ("-o BatchMode=yes" in called.read_text()) is (said is None)


def test_dead_remotes_are_given_up_with_all_that_git_started_and_delay_nobody(
    machine: Machine, silent: socket.socket
) -> None:
    stubborn, sound = machine.clone("stubborn"), machine.clone("sound")
    new = machine.commit(machine.upstream, "file", "second")
    machine.pull_from(url_of(silent))
    lifeline = machine.home / "lifeline"
    os.mkfifo(lifeline)
    end = os.open(lifeline, os.O_RDONLY | os.O_NONBLOCK)
    ssh = machine.script("ssh", f"trap '' TERM\nexec 9>'{lifeline}'\necho up >&9\nsleep 60")
    machine.git(stubborn, "config", "core.sshCommand", str(ssh))
    machine.git(stubborn, "remote", "set-url", "origin", "ssh://host/x")
    machine.configure("deadline = 2\n" + workspaces("project", "stubborn", "sound"))
    first, second, third = machine.sync(GIT_SSH_VARIANT="simple")["workspaces"]
    assert (first["status"], second["status"], third["status"]) == ("timeout", "timeout", "updated")
    assert re.fullmatch(r"git fetch was ended after [12]\.\d s; is the remote up\?", first["hint"])
    assert machine.head(sound) == new
    assert hung_up(silent.accept()[0])
    assert os.read(end, 100) == b"up\n"
    assert os.read(end, 100) == b""  # or BlockingIOError, if somebody still held the other end
    os.close(end)


def test_when_the_handler_is_ended_its_gits_end_too(
    machine: Machine, silent: socket.socket
) -> None:
    machine.pull_from(url_of(silent))
    with machine.start() as running:
        assert running.stdin
        running.stdin.write('{"text": "all"}')
        running.stdin.close()
        connection, _ = silent.accept()
        running.terminate()
        assert running.wait(PATIENCE) == 128 + signal.SIGTERM
    assert hung_up(connection)
    assert not list((machine.project / ".git").rglob("*.lock"))


def test_many_dead_remotes_end_before_hive_ends_the_handler(
    machine: Machine, silent: socket.socket
) -> None:
    names = [f"project{number}" for number in range(9)]
    machine.pull_from(url_of(silent))
    for name in names:
        shutil.copytree(machine.project, machine.home / name)
    machine.configure(workspaces(*names))
    source = HANDLER.read_text()
    assert "\nLIMIT = 27.0 " in source
    machine.handler = machine.home / "hasty"
    machine.handler.write_text(source.replace("\nLIMIT = 27.0 ", "\nLIMIT = 2.0 "))
    *eight, last = machine.sync()["workspaces"]
    assert {one["status"] for one in [*eight, last]} == {"timeout"}
    assert last["hint"] == "no time was left for git rev-parse; send it once more"
    assert last["hint"] not in [one["hint"] for one in eight]


# What a hostile repository, environment or peer gets


def test_no_hook_is_run(machine: Machine) -> None:
    ran = machine.home / "ran"
    hook = machine.script("hook", f"echo \"$0 $@\" >>'{ran}'")
    for event in ("post-merge", "post-checkout", "reference-transaction", "post-index-change"):
        shutil.copy(hook, machine.project / ".git" / "hooks" / event)
    machine.git(machine.project, "config", "core.fsmonitor", str(hook))
    machine.commit(machine.upstream, "file", "second")
    assert machine.sync_one() == ("updated", "")
    assert not ran.exists()


def test_no_hook_of_the_configuration_is_run(machine: Machine) -> None:
    """git 2.54 and newer know them; so this asks git, whichever it is, what it was told."""
    machine.git(machine.project, "config", "hook.a=b.event", "post-merge")
    machine.git(machine.project, "config", "hook.a=b.command", f"touch '{machine.home}/ran'")
    machine.commit(machine.upstream, "file", "second")
    path = machine.after("merge", "GIT config --type=bool hook.a=b.enabled >../enabled")
    assert machine.sync_one(PATH=path) == ("updated", "")
    assert (machine.home / "enabled").read_text() == "false\n"
    assert not (machine.home / "ran").exists()


def test_no_program_is_run_by_a_url(machine: Machine) -> None:
    machine.git(machine.project, "config", "protocol.ext.allow", "always")
    machine.pull_from(f"ext::touch {machine.home}/ran")
    assert machine.sync_one()[0] == "fetch-failed"
    assert not (machine.home / "ran").exists()


def test_the_environment_points_nowhere_else(machine: Machine) -> None:
    new = machine.commit(machine.upstream, "file", "second")
    elsewhere = str(machine.home / "elsewhere")
    names = ("DIR", "WORK_TREE", "INDEX_FILE", "OBJECT_DIRECTORY", "COMMON_DIR", "NAMESPACE")
    environment = {f"GIT_{name}": elsewhere for name in names}
    assert machine.sync_one(**environment, GIT_TRACE="1") == ("updated", "")
    assert machine.head(machine.project) == new


def test_a_peer_chooses_among_the_workspaces(machine: Machine) -> None:
    machine.clone("second")
    machine.configure(workspaces("project", "second"))
    second, whole = "~/second", str(machine.home / "second")
    for text in ([second], {"paths": [second]}, [whole], [second, whole]):
        (one,) = machine.sync(json.dumps(text))["workspaces"]
        assert (one["path"], one["status"]) == (second, "up-to-date")
    assert machine.sync("please, all of them")["total"] == 2


def test_a_peer_names_no_new_workspace(machine: Machine) -> None:
    machine.commit(machine.upstream, "file", "second")
    seen = {
        "~/upstream": "'~/upstream'",
        "~/project/": "'~/project/'",
        "~/x/../project": "'~/x/../project'",
        "--upload-pack=x": "'--upload-pack=x'",
        "a\n\x1b[31mb\ud800": r"'a\n\x1b[31mb\ud800'",
        "x" * 1000: "'" + "x" * 56 + "...",
        "": "''",
    }
    *unknown, known = machine.sync(json.dumps([*seen, "~/project"]))["workspaces"]
    assert [one["path"] for one in unknown] == [*seen.values()]
    for one in unknown:
        del one["path"]
        assert one == {
            "remote": None,
            "branch": None,
            "old": None,
            "new": None,
            "pulled": 0,
            "status": "unknown",
            "hint": "not configured here, so nothing was done",
        }
    assert known["status"] == "updated"


@pytest.mark.parametrize(
    "text",
    [
        " {",
        "{}",
        "[]",
        '["~/project", null]',
        '{"paths": "~/project"}',
        '{"paths": ["~/project"], "force": true}',
        "[" * 100_000,
        json.dumps([f"~/{number}" for number in range(101)]),
    ],
    ids=range(8),
)
def test_a_choice_that_is_none_does_nothing(machine: Machine, text: str) -> None:
    old = machine.head(machine.project)
    machine.commit(machine.upstream, "file", "second")
    code, stdout, stderr = machine.feed(json.dumps({"text": text}))
    assert (code, stdout) == (1, "")
    assert stderr.startswith("git-sync: text: '")
    assert stderr.endswith(
        ' is no choice; send 1 to 100 paths as ["~/project"] or {"paths": ["~/project"]},'
        " or a plain word for all\n"
    )
    assert len(stderr) < 250
    assert machine.head(machine.project) == old


@pytest.mark.parametrize("stdin", ["", "[]", '{"text": 1}', "[" * 100_000])
def test_without_a_message_nothing_is_done(machine: Machine, stdin: str) -> None:
    assert machine.feed(stdin) == (
        1,
        "",
        """git-sync: stdin: no message; by hand: echo '{"text": "all"}' | git-sync\n""",
    )


# Configuration and installation

PATH_KEY = workspaces("project")


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        ("deadlin = 5\n" + PATH_KEY, "'deadlin': no such key; there are deadline, workspace"),
        ("deadline = 26\n" + PATH_KEY, "deadline = 26: must be seconds, above 0 and at most 25"),
        ("deadline = nan\n" + PATH_KEY, "deadline = nan: must be seconds, above 0 and at most 25"),
        (
            "deadline = true\n" + PATH_KEY,
            "deadline = True: must be seconds, above 0 and at most 25",
        ),
        ("workspace = 5", "workspace = 5: must be [[workspace]] tables"),
        ("", 'workspace: names none; write one with [[workspace]] and path = "~/project"'),
        (
            "[[workspace]]\n",
            'workspace 1: path: is missing; add it, as in path = "~/project"',
        ),
        (
            PATH_KEY + "brnch = 'main'",
            "workspace 1: 'brnch': no such key; there are path, remote, branch",
        ),
        (
            "[[workspace]]\npath = 'project'",
            "workspace 1: path = 'project': must be an absolute path, or one that begins with ~/",
        ),
        (PATH_KEY * 2, "workspace 2: path: '~/project' is there twice; remove one"),
        ("deadline = ", "cannot be read as TOML: Invalid value (at end of document)"),
        (
            "deadline = 0x" + "f" * 5000,
            "deadline = a int too large to show: must be seconds, above 0 and at most 25",
        ),
    ],
)
def test_a_wrong_configuration_is_one_line(machine: Machine, toml: str, line: str) -> None:
    machine.configure(toml)
    code, stdout, stderr = machine.feed('{"text": "all"}')
    assert (code, stdout, stderr) == (1, "", f"git-sync: {machine.config}: {line}\n")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("remote", "--upload-pack=x"),
        ("remote", "ext::x"),
        ("remote", ""),
        ("branch", "-f"),
        ("branch", "a:b"),
        ("branch", "a..b"),
        ("branch", "a\n"),
    ],
)
def test_what_git_could_take_for_something_else_is_no_name(
    machine: Machine, key: str, value: str
) -> None:
    machine.configure(f"{PATH_KEY}{key} = {json.dumps(value)}")
    code, stdout, stderr = machine.feed('{"text": "all"}')
    assert (code, stdout) == (1, "")
    assert stderr == (
        f"git-sync: {machine.config}: workspace 1: {key} = {value!a}: must be a name as git takes"
        r" it: no - at its head, no .. and no space or ~^:?*[\ in it" + "\n"
    )


@pytest.mark.parametrize("spoil", ["missing", "a folder", "not UTF-8"])
def test_a_configuration_that_cannot_be_read_is_one_line(machine: Machine, spoil: str) -> None:
    machine.config.unlink()
    if spoil == "a folder":
        machine.config.mkdir()
    elif spoil == "not UTF-8":
        machine.config.write_bytes(b"\xff")
    code, stdout, stderr = machine.feed('{"text": "all"}')
    assert (code, stdout) == (1, "")
    assert stderr.startswith(f"git-sync: {machine.config}: ")
    assert stderr.count("\n") == 1


def test_the_configuration_can_be_elsewhere(machine: Machine) -> None:
    machine.config.rename(machine.home / "mine.toml")
    assert machine.sync_one(HIVE_GIT_SYNC_CONFIG="~/mine.toml") == ("up-to-date", "")


def test_it_is_executable_and_runs_under_any_name(machine: Machine) -> None:
    assert HANDLER.stat().st_mode & 0o777 == 0o755
    machine.handler = machine.home / "pull everything"
    shutil.copy(HANDLER, machine.handler)
    assert machine.sync_one() == ("up-to-date", "")


def test_without_git_it_says_so(machine: Machine) -> None:
    assert machine.feed('{"text": "all"}', PATH=str(machine.home)) == (
        1,
        "",
        "git-sync: git is not to be found in PATH; install it\n",
    )


NOBODY = (
    "import pwd, runpy, sys\n"
    "def unknown(uid):\n    raise KeyError(uid)\n"
    "pwd.getpwuid = unknown\n"
    "runpy.run_path(sys.argv[1], run_name='__main__')\n"
)


@pytest.mark.parametrize("home", [None, "", "here"])
@pytest.mark.parametrize("said", ["~/.config/hive/git-sync.toml", "~/project"])
def test_without_a_home_it_asks_for_one(machine: Machine, home: str | None, said: str) -> None:
    """A folder called `~` is neither read nor made, and no path begins at the root."""
    machine.configure(workspaces("project"))
    (machine.home / "~").mkdir()
    environment = machine.environment | ({} if home is None else {"HOME": home})
    if home is None:
        del environment["HOME"]
    if said == "~/project":
        environment["HIVE_GIT_SYNC_CONFIG"] = str(machine.config)
    done = subprocess.run(
        [sys.executable, "-c", NOBODY, machine.handler],
        input=json.dumps({"text": "all"}),
        capture_output=True,
        text=True,
        env=environment,
        cwd=machine.home,
    )
    why = f"'{said}': your home is not known; set HOME, or name the whole path"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.replace('"', "'") == f"git-sync: {why}\n"
