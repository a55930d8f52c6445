"""Brokers that are neither ours nor Mosquitto: each starts, stops and keeps its files in `home`.

`make brokers` installs them and runs the end-to-end tests on each; see tests/brokers.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from conftest import ROOT, Broker, eventually, find_program, free_port

import hive

CACHE = ROOT / ".cache" / "brokers"
RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
BOOT = 90.0  # seconds; RabbitMQ takes ten of them on two quiet cores


class OtherBroker(Broker):
    """What the tests know of any broker: its port, start() and stop()."""

    program: tuple[str, ...] = ()
    settings: Mapping[str, str] = MappingProxyType({})

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.port = home, free_port()
        self._process = None
        self.configure()
        try:
            self.start()
        except BaseException:
            self.stop(signal.SIGKILL)
            raise

    def configure(self) -> None:
        """Write what it reads at its start."""

    def start(self) -> None:
        with (self.home / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [part.format(home=self.home, port=self.port) for part in self.program],
                stdout=log,
                stderr=log,
                env={**os.environ, "HOME": str(self.home), **self.settings},
                cwd=self.home,
                start_new_session=True,
            )
        eventually("the broker speaks MQTT", self.speaks_mqtt, BOOT)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """With its children: some of these are started by a shell."""
        if self._process:
            os.killpg(self._process.pid, number)
            self._process.wait()
            self._process = None

    def speaks_mqtt(self) -> bool:
        from hive import speaks_mqtt

        assert self._process and self._process.poll() is None, (
            self.home / "broker.log"
        ).read_text()
        return speaks_mqtt("127.0.0.1", self.port)


class Nats(OtherBroker):
    """nats-server with JetStream; it speaks MQTT 3.1.1."""

    program = ("nats-server", "-c", "{home}/nats.conf")

    def configure(self) -> None:
        (self.home / "nats.conf").write_text(
            f'server_name: hive\nlisten: "127.0.0.1:{free_port()}"\n'
            f'jetstream {{ store_dir: "{self.home}/jetstream" }}\n'
            f"mqtt {{ host: 127.0.0.1, port: {self.port} }}\n"
        )


class NatsCluster(OtherBroker):
    """Three of them, at 127.0.0.1 to .3, which keep everything three times (Linux)."""

    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3")

    def configure(self) -> None:
        own, route = free_port(), free_port()
        joined = ", ".join(f'"nats://{host}:{route}"' for host in self.hosts)
        self.members: dict[str, subprocess.Popen[bytes]] = {}
        for host in self.hosts:
            self.conf(host).write_text(
                f'server_name: "{host}"\nlisten: "{host}:{own}"\n'
                f'jetstream {{ store_dir: "{self.home}/{host}" }}\n'
                f'cluster {{ name: hive, listen: "{host}:{route}", routes: [{joined}] }}\n'
                f"mqtt {{ host: {host}, port: {self.port}, stream_replicas: 3 }}\n"
            )

    def conf(self, host: str) -> Path:
        return self.home / f"{host}.conf"

    def start(self) -> None:
        for host in self.hosts:
            if host not in self.members:
                self.start_member(host)
        for host in self.hosts:
            eventually(f"{host} lets us in", partial(self.lets_in, host), BOOT)

    def start_member(self, host: str) -> None:
        with (self.home / "broker.log").open("ab") as log:
            command = ["nats-server", "-c", str(self.conf(host))]
            self.members[host] = subprocess.Popen(command, stdout=log, stderr=log)

    def lets_in(self, host: str) -> bool:
        """Does it, which takes a leader of those who keep the sessions?"""
        return hive.lets_in(hive.MqttConfig(host=host, port=self.port, protocol="3.1.1"))

    def kill_member(self, host: str, number: int = signal.SIGKILL) -> None:
        self.members[host].send_signal(number)
        self.members.pop(host).wait()

    def stop(self, number: int = signal.SIGTERM) -> None:
        for host in [*self.members]:
            self.kill_member(host, number)


class RabbitMQ(OtherBroker):
    """RabbitMQ with rabbitmq_mqtt; it speaks MQTT 3.1.1."""

    program = (str(RABBITMQ),)

    def configure(self) -> None:
        (self.home / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{free_port()}\n"
            f"mqtt.listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            "mqtt.allow_anonymous = true\nmqtt.default_user = guest\nmqtt.default_pass = guest\n"
        )
        (self.home / "plugins").write_text("[rabbitmq_mqtt].\n")
        self.settings = {
            "RABBITMQ_NODENAME": f"hive{self.port}@localhost",
            "RABBITMQ_CONFIG_FILE": str(self.home / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.home / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.home / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.home / "logs"),
            "RABBITMQ_PID_FILE": str(self.home / "pid"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }

    def stop(self, number: int = signal.SIGTERM) -> None:
        """With the daemon that Erlang starts beside it, in a session of its own."""
        super().stop(number)
        subprocess.run(["epmd", "-kill"], env={**os.environ, **self.settings}, capture_output=True)


AEDES = """\
const { Aedes } = require("aedes");
Aedes.createBroker().then((broker) =>
  require("net").createServer(broker.handle).listen(Number(process.argv[2]), "127.0.0.1"));
"""


class AedesBroker(OtherBroker):
    """aedes, in memory; it speaks MQTT 3.1.1."""

    program = ("node", "{home}/aedes.js", "{port}")
    settings = MappingProxyType({"NODE_PATH": str(CACHE / "node_modules")})

    def configure(self) -> None:
        (self.home / "aedes.js").write_text(AEDES)


class Amqtt(OtherBroker):
    """amqtt, in memory; it answers nothing at all to MQTT 5."""

    program = (str(CACHE / "venv" / "bin" / "amqtt"), "-c", "{home}/amqtt.yaml")

    def configure(self) -> None:
        (self.home / "amqtt.yaml").write_text(
            f"listeners:\n  default:\n    type: tcp\n    bind: 127.0.0.1:{self.port}\n"
            "plugins:\n  amqtt.plugins.authentication.AnonymousAuthPlugin:\n"
            "    allow_anonymous: true\n"
        )


OTHER_BROKERS = {
    "nats": Nats,
    "nats-x3": NatsCluster,
    "rabbitmq": RabbitMQ,
    "aedes": AedesBroker,
    "amqtt": Amqtt,
}


def install(kind: str) -> None:
    """Get it from the package registries; raises CalledProcessError, or says what is missing."""
    INSTALL[kind]()


def apt(package: str, program: str) -> None:
    if find_program(program) or Path(program).exists():
        return
    if not shutil.which("apt-get") or os.geteuid() != 0:
        sys.exit(f"{package} is missing, and only root can install it: apt-get install {package}")
    quiet = {**os.environ, "RUNLEVEL": "1", "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", package]):
        subprocess.run(["apt-get", *words], check=True, env=quiet, stdout=subprocess.DEVNULL)


def npm(package: str) -> None:
    if (CACHE / "node_modules" / package.partition("@")[0]).exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "package.json").write_text('{"private": true}\n')
    words = ["npm", "install", "--loglevel=error", "--no-fund", "--no-audit", package]
    subprocess.run(words, check=True, cwd=CACHE)


def pip(package: str) -> None:
    home = CACHE / "venv"
    if (home / "bin" / package.partition("=")[0]).exists():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    subprocess.run([home / "bin" / "python", "-m", "pip", "install", "-q", package], check=True)


INSTALL: dict[str, Callable[[], None]] = {
    "nats": lambda: apt("nats-server", "nats-server"),
    "nats-x3": lambda: apt("nats-server", "nats-server"),
    "rabbitmq": lambda: apt("rabbitmq-server", str(RABBITMQ)),
    "aedes": lambda: npm("aedes@1.2.0"),
    "amqtt": lambda: pip("amqtt==0.12.1"),
}
