"""A real Dovecot of the test's own, which lets anybody in who knows the password."""

from __future__ import annotations

import contextlib
import imaplib
import os
import pwd
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
from pathlib import Path

from conftest import answers, eventually, find_program, free_port, missing

PASSWORD = "s3cret"

CONFIGURATION = """
protocols = imap
base_dir = {home}/run
state_dir = {home}/state
log_path = {home}/log
listen = 127.0.0.1
default_login_user = {user}
default_internal_user = {user}
default_internal_group = {group}
ssl = required
ssl_cert = <{home}/cert.pem
ssl_key = <{home}/key.pem
mail_location = {location}
auth_failure_delay = 0
mail_max_userip_connections = 100
auth_mechanisms = plain login xoauth2
service anvil {{
  chroot =
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
service imap-login {{
  chroot =
  inet_listener imap {{
    port = {port}
  }}
  inet_listener imaps {{
    port = {tls_port}
    ssl = yes
  }}
}}
passdb {{
  driver = static
  args = password={password}
}}
passdb {{
  driver = oauth2
  mechanisms = xoauth2
  args = {home}/oauth2.conf
}}
namespace inbox {{
  inbox = yes
  separator = /
  mailbox Everything {{
    auto = create
    special_use = \\All
  }}
}}
userdb {{
  driver = static
  args = uid={user} gid={group} home={home}/mail/%u
}}
"""
OAUTH2 = """
introspection_mode = get
introspection_url = {url}
username_attribute = username
active_attribute = active
active_value = true
"""


def need_dovecot() -> None:
    if not find_program("dovecot"):
        missing("Dovecot is missing: this needs a real server (apt-get install dovecot-imapd)")


class Dovecot:
    """Runs as one ordinary user: as root it would want users of its own."""

    def __init__(self, tokens: str = "http://127.0.0.1:9/", location: str = "") -> None:
        """`tokens`: the address that says whose an OAuth2 token is."""
        self.home = Path(tempfile.mkdtemp(prefix="dovecot-"))  # a socket's path must be short
        (self.home / "state").mkdir()
        self.user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
        self.port, self.tls_port = free_port(), free_port()
        self._certify()
        names = {"user": self.user.pw_name, "group": self._group(), "home": self.home}
        ports = {"port": self.port, "tls_port": self.tls_port}
        location = location or f"maildir:{self.home}/mail/%u:LAYOUT=fs"
        said = CONFIGURATION.format(**names, **ports, location=location, password=PASSWORD)
        (self.home / "conf").write_text(said)
        (self.home / "oauth2.conf").write_text(OAUTH2.format(url=tokens))
        self.own(self.home)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def _group(self) -> str:
        import grp

        return grp.getgrgid(self.user.pw_gid).gr_name

    def _certify(self) -> None:
        openssl = shutil.which("openssl")
        assert openssl, "openssl is needed"
        request = f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
        request += f" -keyout {self.home}/key.pem -out {self.home}/cert.pem"
        request += " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
        subprocess.run(request.split(), check=True, capture_output=True)
        self.ca = self.home / "cert.pem"

    def start(self) -> None:
        program = find_program("dovecot")
        assert program
        other = os.geteuid() == 0
        self._process = subprocess.Popen(
            [program, "-F", "-c", str(self.home / "conf")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.home / "stderr").open("ab"),
            start_new_session=True,
            cwd=self.home,
            user=self.user.pw_uid if other else None,
            group=self.user.pw_gid if other else None,
            extra_groups=[] if other else None,
        )
        eventually(f"Dovecot listens: {self.log()}", lambda: answers(self.tls_port))

    def log(self) -> str:
        files = [self.home / "log", self.home / "stderr"]
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def kill(self) -> None:
        """At once, with all that it has started."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            eventually("it is gone", lambda: not answers(self.tls_port))

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    # What a user does with another program

    def session(self, user: str) -> imaplib.IMAP4_SSL:
        context = ssl.create_default_context(cafile=self.ca)
        made = imaplib.IMAP4_SSL("localhost", self.tls_port, ssl_context=context, timeout=20)
        made.login(user, PASSWORD)
        return made

    def deliver(
        self,
        user: str,
        *letters: bytes,
        folder: str = "INBOX",
        flags: str = "",
        when: float | None = None,
    ) -> None:
        """Mail arrives."""
        with contextlib.closing(Session(self.session(user))) as session:
            date = imaplib.Time2Internaldate(when or time.time())
            for letter in letters:
                kind, said = session.box.append(folder, flags, date, letter)
                assert kind == "OK", said

    def drop(self, user: str, *letters: bytes) -> None:
        """Much mail arrives, without a session for it."""
        folder = self.home / "mail" / user / "new"
        for number, content in enumerate(letters):
            file = folder / f"{time.time():.6f}.{number}.x"
            file.write_bytes(content)
            self.own(file)

    def own(self, file: Path) -> None:
        """Make it the server's, and what is in it."""
        for one in (file, *(file.iterdir() if file.is_dir() else ())):
            os.chown(one, self.user.pw_uid, self.user.pw_gid)

    def flags(self, user: str, folder: str = "INBOX") -> list[bytes]:
        """What FETCH FLAGS says of all."""
        with contextlib.closing(Session(self.session(user))) as session:
            session.box.select(folder, readonly=True)
            return [one for one in session.box.fetch("1:*", "(FLAGS)")[1] if isinstance(one, bytes)]


class Session:
    """Something to close."""

    def __init__(self, box: imaplib.IMAP4) -> None:
        self.box = box

    def close(self) -> None:
        self.box.logout()


def letter(subject: str = "hello", sender: str = "Ada <ada@example.org>", **more: str) -> bytes:
    """A plain message; `more` are headers, with _ for -, and `body`."""
    body = more.pop("body", "Dear reader,\nthis is the text.\n")
    said = {"From": sender, "To": "me@example.org", "Subject": subject}
    said |= {"Message-ID": f"<{time.monotonic_ns()}@example.org>"}
    said |= {name.replace("_", "-"): value for name, value in more.items()}
    lines = [f"{name}: {value}" for name, value in said.items()]
    return "\r\n".join([*lines, "", *body.split("\n")]).encode()
