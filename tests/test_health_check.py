"""contrib/handlers/health-check: what it reads, what it finds wrong, and that it always ends."""

from __future__ import annotations

import errno
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Hive, calls_of, free_port
from sentinels import imported

import hive

HANDLER = ROOT / "contrib" / "handlers" / "health-check"
Done = subprocess.CompletedProcess[str]


health = imported("health_check", HANDLER)

LINUX = os.uname_result(("Linux", "attic", "6.1.0-26-amd64", "#1 SMP", "x86_64"))
MACOS = os.uname_result(("Darwin", "mini.lan", "23.6.0", "Darwin Kernel Version 23.6.0", "arm64"))
NOW = 1_771_143_500

FILES = {
    "proc/loadavg": "0.52 0.61 0.70 2/1084 913377\n",
    "proc/stat": "cpu  1 2 3 4\ncpu0 1 2 3 4\ncpu1 1 2 3 4\nintr 5 0 cpu9\nctxt 6\n",
    "proc/meminfo": (
        "MemTotal:        8000000 kB\nMemFree:          500000 kB\nMemAvailable:    6000000 kB\n"
        "SwapTotal:       2000000 kB\nSwapFree:        1500000 kB\nHugePages_Total:       0\n"
    ),
    "proc/mounts": "/dev/nvme0n1p2 / ext4 rw,errors=remount-ro 0 0\nproc /proc proc rw 0 0\n",
    "proc/uptime": "86400.53 160000.12\n",
    "sys/class/thermal/thermal_zone0/temp": "48000\n",
    "run/systemd/system/x": "",
}


def df(total: int, free: int, point: str, head: str = "1024-blocks") -> str:
    used = total - free
    return (
        f"Filesystem     {head}    Used Available Capacity Mounted on\n"
        f"/dev/nvme0n1p2 {total:>11} {used} {free:>9} {100 * used // total:>7}% {point}\n"
    )


COMMANDS: dict[str, str | int] = {
    "df -Pk /": df(100_000, 40_000, "/"),
    "df -Pi /": df(6_000, 4_500, "/", "Inodes"),
    "timedatectl show -p NTPSynchronized --value": "yes\n",
    "systemctl --failed --plain --no-legend": "",
    "systemctl --user --failed --plain --no-legend": 1,  # no user manager
}
MACOS_COMMANDS: dict[str, str | int] = {
    "sysctl -n hw.logicalcpu": "8\n",
    "sysctl -n vm.loadavg": "{ 2.10 1.95 1.80 }\n",
    "sysctl -n hw.memsize": "17179869184\n",
    "vm_stat": """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                4518.
Pages active:                            194947.
Pages inactive:                          191193.
Pages speculative:                         3014.
Pages throttled:                              0.
Pages wired down:                        159117.
Pages purgeable:                            630.
"Translation faults":                 574921966.
Pages copy-on-write:                   38671927.
File-backed pages:                       141843.
Pages occupied by compressor:            454496.
Swapouts:                                929703.
""",
    "sysctl -n vm.swapusage": "total = 2048.00M  used = 1843.25M  free = 204.75M  (encrypted)\n",
    "sysctl -n kern.boottime": "{ sec = 1771057100, usec = 979990 } Sat Feb 14 08:18:20 2026\n",
    "mount": """\
/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
devfs on /dev (devfs, local, nobrowse)
/dev/disk3s6 on /System/Volumes/VM (apfs, local, noexec, journaled, noatime, nobrowse)
/dev/disk3s2 on /System/Volumes/Preboot (apfs, local, journaled, nobrowse)
/dev/disk1s1 on /System/Volumes/iSCPreboot (apfs, local, journaled, nobrowse)
/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled, nobrowse, protect, root data)
map auto_home on /System/Volumes/Data/home (autofs, automounted, nobrowse)
//you@nas.local/media on /Volumes/media (smbfs, nodev, nosuid, mounted by you)
/dev/disk5s1 on /Volumes/My Disk (2) (exfat, local, nodev, nosuid, noowners)
/dev/disk7s1 on /Volumes/Archive (apfs, local, nodev, nosuid, journaled, noowners)
/dev/disk7s2 on /Volumes/Archive 2 (apfs, local, nodev, nosuid, journaled, noowners)
/dev/disk9s1 on /Volumes/Installer (hfs, local, nodev, nosuid, read-only, noowners)
""",
    "df -Pk /System/Volumes/Data": """\
Filesystem   1024-blocks      Used Available Capacity  Mounted on
/dev/disk3s5   482797652 193000000  24139882    89%    /System/Volumes/Data
""",
    "df -Pk /Volumes/My Disk (2)": df(1000, 900, "/Volumes/My Disk (2)"),
    "df -Pk /Volumes/Archive": df(2000, 1000, "/Volumes/Archive"),
}


def canned(answers: Mapping[str, str | int]) -> Callable[..., Done]:
    """What programs say, or the code that they end with; the others are not installed."""

    def run(argv: Sequence[str], seconds: float = 0, listen: bool = True) -> Done:
        said = answers.get(" ".join(argv))
        if said is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
        if said == "hangs":
            raise TimeoutError("no answer within 3 s")
        return Done(argv, said if isinstance(said, int) else 0, str(said))

    return run


def config_of(folder: Path, text: str = "", **environment: str) -> Any:
    """The configuration that this file and this environment make."""
    file = folder / ".config/hive/health-check.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return health.read_config(environment, folder)


class Machine:
    """A made-up machine: files below a folder, and what programs say."""

    def __init__(self, root: Path) -> None:
        self.root, self.system, self.config = root, LINUX, ""
        self.commands = dict(COMMANDS)
        for name, content in FILES.items():
            self.write(name, content)

    def write(self, name: str, content: str | bytes) -> None:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    def becomes_a_mac(self) -> None:
        self.system, self.commands = MACOS, dict(MACOS_COMMANDS)

    def look(self) -> dict[str, Any]:
        config = config_of(self.root, self.config)
        run = canned(self.commands)
        found = health.examine(config, self.system, self.root, self.root, run, NOW)
        assert "null" not in json.dumps(found, allow_nan=False)
        return dict(found)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def run_handler(
    home: Path, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """The handler as hive runs it, in a home of its own."""
    return subprocess.run(
        [HANDLER],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        env={"HOME": str(home), "PATH": os.environ["PATH"], **environment},
    )


# As a process


def test_this_machine_gets_an_answer(tmp_path: Path) -> None:
    done = run_handler(tmp_path, "not JSON; $(reboot)\n")
    found = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1 and "null" not in done.stdout
    assert found["status"] in ("ok", "warn", "critical")
    assert done.returncode == (found["status"] == "critical")
    assert done.stderr.splitlines() == (found["problems"] if done.returncode else [])
    assert {"host", "system", "load", "memory", "disks"} <= found.keys()
    assert "openclaw" not in found


def test_a_gateway_that_is_down_is_an_alert(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / ".openclaw-work").mkdir()
    (tmp_path / ".openclaw-work/openclaw.json").write_text(f'{{"gateway": {{"port": {port}}}}}')
    done = run_handler(tmp_path, HIVE_AGENT="main", HIVE_PROFILE="work")
    found = json.loads(done.stdout)
    how = f"port {port}: {os.strerror(errno.ECONNREFUSED)}"
    assert (done.returncode, found["status"]) == (1, "critical")
    assert done.stderr.splitlines() == found["problems"]
    assert f"critical: OpenClaw main does not answer ({how})" in found["problems"]


def test_a_wrong_configuration_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("temperatur_c.warn = 70\n")
    done = run_handler(tmp_path, HIVE_HEALTH_CHECK_CONFIG=str(file))
    line = f"health-check: {file}: temperatur_c: no such key; did you mean temperature_c?\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


def test_an_old_python_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tomllib.py").write_text("raise ImportError")
    done = run_handler(tmp_path, PYTHONPATH=str(tmp_path))
    version = sys.version.split()[0]
    line = f"health-check: needs Python 3.11 or newer, python3 is {version}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


def test_hive_takes_it_for_a_handler(tmp_path: Path) -> None:
    folder = tmp_path / "hive-daemon.d"
    folder.mkdir(mode=0o700)
    shutil.copy(HANDLER, folder)
    (folder / "health-check").chmod(0o755)
    assert os.access(HANDLER, os.X_OK)
    assert hive.scan_handlers(folder).handlers == {"health-check": folder / "health-check"}


def test_a_node_answers(hive: Hive) -> None:
    node = hive.node("alpha")
    node.handler("health-check", HANDLER.read_text("utf-8"))
    node.start()
    asked = ("send", "--to", "alpha", "--action", "health-check", "--text", "x", "--wait", "20")
    done = hive.cli("alpha", *asked, code=None)
    assert done.returncode in (0, 1)  # 1: this machine is in a critical state
    assert done.returncode or json.loads(done.stdout)["status"] in ("ok", "warn")


# What is read


def test_a_healthy_linux(machine: Machine) -> None:
    assert machine.look() == {
        "status": "ok",
        "problems": [],
        "host": "attic",
        "system": "Linux 6.1.0-26-amd64 x86_64",
        "load": {"1m": 0.52, "5m": 0.61, "15m": 0.7, "cores": 2, "per_core": 0.3},
        "memory": {
            "total": 8_192_000_000,
            "available": 6_144_000_000,
            "available_percent": 75.0,
        },
        "swap": {"total": 2_048_000_000, "used": 512_000_000, "used_percent": 25.0},
        "disks": [
            {
                "mount": "/",
                "type": "ext4",
                "total": 102_400_000,
                "free": 40_960_000,
                "free_percent": 40.0,
                "inodes_free_percent": 75.0,
            }
        ],
        "temperature_c": 48.0,
        "uptime_s": 86400,
        "clock_synchronised": True,
        "failed_units": [],
    }


def test_a_mac_with_a_full_disk(machine: Machine) -> None:
    machine.becomes_a_mac()
    machine.commands["df -Pk /Volumes/Archive"] = "hangs"
    found = machine.look()
    assert found == {
        "status": "warn",
        "problems": ["warn: /System/Volumes/Data has 5.0 % of its space free (limit 10 %)"],
        "host": "mini.lan",
        "system": "Darwin 23.6.0 arm64",
        "load": {"1m": 2.1, "5m": 1.95, "15m": 1.8, "cores": 8, "per_core": 0.24},
        "memory": {
            "total": 17_179_869_184,
            "available": (4518 + 191193 + 3014) * 16384,
            "available_percent": 19.0,
        },
        "swap": {"total": 2048 * 2**20, "used": 1932787712},
        "disks": [
            {
                "mount": "/System/Volumes/Data",
                "type": "apfs",
                "total": 482797652 * 1024,
                "free": 24139882 * 1024,
                "free_percent": 5.0,
            },
            {
                "mount": "/Volumes/My Disk (2)",
                "type": "exfat",
                "total": 1_024_000,
                "free": 921_600,
                "free_percent": 90.0,
            },
            {"mount": "/Volumes/Archive", "type": "apfs"},  # its df hangs
        ],
        "uptime_s": 86400,
    }


@pytest.mark.parametrize("mac", [False, True], ids=["Linux", "macOS"])
def test_what_cannot_be_read_is_absent(machine: Machine, mac: bool) -> None:
    machine.system = MACOS if mac else LINUX
    machine.commands.clear()
    for name in FILES:
        (machine.root / name).unlink()
    shutil.rmtree(machine.root / "run")
    assert machine.look().keys() == {"status", "problems", "host", "system"}


@pytest.mark.parametrize(
    "garbage", [b"", b"\0\xff\n", b"no\nsuch\nthing\n", b"1 2 3\n", b"-1: kB\n"]
)
@pytest.mark.parametrize("mac", [False, True], ids=["Linux", "macOS"])
def test_garbage_is_absent(machine: Machine, mac: bool, garbage: bytes) -> None:
    if mac:
        machine.becomes_a_mac()
    for name in FILES:
        machine.write(name, garbage)
    machine.commands = dict.fromkeys(machine.commands, garbage.decode(errors="replace"))
    found = machine.look()
    assert found["status"] in ("ok", "warn")  # any word is a failed unit
    assert found.keys() - {"failed_units"} <= {"status", "problems", "host", "system", "disks"}
    assert found.get("disks", []) == []


@pytest.mark.parametrize("name", ["MemTotal", "MemAvailable", "SwapTotal", "SwapFree"])
def test_one_missing_line_takes_one_key_with_it(machine: Machine, name: str) -> None:
    machine.write("proc/meminfo", FILES["proc/meminfo"].replace(name, "Other"))
    absent = "memory" if name.startswith("Mem") else "swap"
    assert {"memory", "swap"} - machine.look().keys() == {absent}


def test_no_swap_is_no_problem(machine: Machine) -> None:
    machine.write("proc/meminfo", "SwapTotal:   0 kB\nSwapFree:   0 kB\n")
    assert machine.look()["swap"] == {"total": 0, "used": 0}


def test_only_writable_disks_are_looked_at_and_each_once(machine: Machine) -> None:
    machine.write(
        "proc/mounts",
        "/dev/sda2 / btrfs rw,subvol=/@ 0 0\n"
        "/dev/sda2 /home btrfs rw,subvol=/@home 0 0\n"
        "udev /dev devtmpfs rw 0 0\n"
        "tmpfs /run tmpfs rw 0 0\n"
        "overlay /var/lib/docker/overlay2/x/merged overlay rw 0 0\n"
        "/dev/loop3 /snap/core/1 squashfs ro 0 0\n"
        "/dev/sdb1 /mnt/read-only ext4 ro,relatime 0 0\n"
        "/dev/fuse /etc/pve fuse rw 0 0\n"
        "portal /run/user/1000/doc fuse.portal rw 0 0\n"
        "nas:/export /mnt/nas nfs4 rw 0 0\n"
        "/dev/sdc1 /media/stick\\040one fuseblk rw 0 0\n"
        "/dev/sdd1 /media/line\u2028two vfat rw 0 0\n"
        "/dev/sde1 /boot/efi vfat rw 0 0\n"
        "tank/data /tank zfs rw,xattr 0 0\n"
        "/dev/sdf1 /below ext4 rw 0 0\n"
        "/dev/sdg1 /below xfs rw 0 0\n",
    )
    machine.config = 'ignore_mounts = ["/boot/*"]'
    assert [(disk["mount"], disk["type"]) for disk in machine.look()["disks"]] == [
        ("/", "btrfs"),
        ("/media/stick one", "fuseblk"),
        ("/media/line\u2028two", "vfat"),
        ("/tank", "zfs"),
        ("/below", "xfs"),
    ]


def test_a_disk_without_inodes_says_nothing_about_them(machine: Machine) -> None:
    machine.commands["df -Pi /"] = (
        "Filesystem Inodes IUsed IFree IUse% Mounted on\n/dev/sda1       0     0     0     - /\n"
    )
    assert "inodes_free_percent" not in machine.look()["disks"][0]


def test_a_thousand_mounts_are_not_all_asked(machine: Machine) -> None:
    machine.write("proc/mounts", "".join(f"tank/{n} /t{n} zfs rw 0 0\n" for n in range(1000)))
    assert len(machine.look()["disks"]) == health.MAX_DISKS


def test_the_hottest_chip_counts_and_a_loose_board_sensor_does_not(machine: Machine) -> None:
    for name, content in {
        "hwmon0/name": "k10temp\n",
        "hwmon0/temp1_input": "61250\n",
        "hwmon0/temp2_input": "255000\n",
        "hwmon1/name": "nct6775\n",
        "hwmon1/temp1_input": "127000\n",
        "hwmon2/name": "nvme\n",
        "hwmon2/temp1_input": "",
    }.items():
        machine.write(f"sys/class/hwmon/{name}", content)
    assert machine.look()["temperature_c"] == 61.2


CHRONY = "Reference ID    : C0A80001 (ntp.lan)\nStratum         : 3\nLeap status     : "


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"timedatectl show -p NTPSynchronized --value": "yes\n"}, True),
        ({"timedatectl show -p NTPSynchronized --value": "no\n", "ntpstat": 0}, False),
        ({"timedatectl show -p NTPSynchronized --value": 1, "ntpstat": 0}, True),
        ({"timedatectl show -p NTPSynchronized --value": "hangs", "ntpstat": 1}, False),
        ({"chronyc -n tracking": CHRONY + "Normal\n"}, True),
        ({"chronyc -n tracking": CHRONY + "Not synchronised\n"}, False),
        ({"chronyc -n tracking": 1, "ntpstat": 2}, None),
        ({}, None),
    ],
)
def test_the_clock_is_asked_of_whoever_is_there(
    answers: dict[str, str | int], expected: bool | None
) -> None:
    assert health.clock_synchronised(canned(answers)) is expected


UNITS = "systemctl --failed --plain --no-legend"
USER_UNITS = "systemctl --user --failed --plain --no-legend"


def test_failed_units_of_the_system_and_the_user(machine: Machine) -> None:
    machine.commands[UNITS] = (
        "nginx.service    loaded failed failed A high performance web server\n"
        "apt-news.service loaded failed failed Update APT News\n"
    )
    machine.commands[USER_UNITS] = "sync.timer loaded failed failed\nsnap.x.service loaded failed\n"
    machine.config = 'ignore_units = ["apt-news.service", "snap.*"]'
    found = machine.look()
    assert found["failed_units"] == ["nginx.service", "sync.timer (user)"]
    assert found["problems"] == ["warn: failed units: nginx.service, sync.timer (user)"]


def test_of_many_failed_units_the_sentence_names_five(machine: Machine) -> None:
    machine.commands[UNITS] = "".join(f"u{n}.service loaded failed\n" for n in range(9))
    found = machine.look()
    assert len(found["failed_units"]) == 9
    assert found["problems"] == [
        "warn: failed units: u0.service, u1.service, u2.service, u3.service, u4.service and 4 more"
    ]


# What is a problem


def memory(available: int, swap_free: int = 100) -> dict[str, str]:
    lines = f"MemTotal: 100 kB\nMemAvailable: {available} kB\n"
    return {"proc/meminfo": f"{lines}SwapTotal: 100 kB\nSwapFree: {swap_free} kB\n"}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"proc/loadavg": "9.0 2.9 9.0 1/1 1\n"}, None),
        (
            {"proc/loadavg": "0.0 3.0 0.0 1/1 1\n"},
            "warn: load is 1.5 for each processor (limit 1.5)",
        ),
        (
            {"proc/loadavg": "0.0 8.0 0.0 1/1 1\n"},
            "critical: load is 4.0 for each processor (limit 4)",
        ),
        (memory(10), None),
        (memory(9), "warn: 9.0 % of memory is available (limit 10 %)"),
        (memory(3), "critical: 3.0 % of memory is available (limit 4 %)"),
        (memory(50, swap_free=51), None),
        (memory(50, swap_free=0), "warn: 100.0 % of swap is used (limit 50 %)"),
        (
            {"sys/class/thermal/thermal_zone0/temp": "85000\n"},
            "warn: the hottest chip has 85.0 C (limit 85 C)",
        ),
        (
            {"sys/class/thermal/thermal_zone0/temp": "101000\n"},
            "critical: the hottest chip has 101.0 C (limit 95 C)",
        ),
    ],
)
def test_limits(machine: Machine, files: dict[str, str], problem: str | None) -> None:
    for name, content in files.items():
        machine.write(name, content)
    found = machine.look()
    assert found["problems"] == ([problem] if problem else [])
    assert found["status"] == (problem.partition(":")[0] if problem else "ok")


@pytest.mark.parametrize(
    ("option", "free", "problem"),
    [
        ("-Pk", 100, None),
        ("-Pk", 99, "warn: / has 9.9 % of its space free (limit 10 %)"),
        ("-Pk", 0, "critical: / has 0.0 % of its space free (limit 3 %)"),
        ("-Pi", 30, "warn: / has 3.0 % of its inodes free (limit 10 %)"),
        ("-Pi", 29, "critical: / has 2.9 % of its inodes free (limit 3 %)"),
    ],
)
def test_a_disk_fills_up(machine: Machine, option: str, free: int, problem: str | None) -> None:
    machine.commands[f"df {option} /"] = df(1000, free, "/")
    assert machine.look()["problems"] == ([problem] if problem else [])


def test_a_clock_that_runs_free_is_a_problem(machine: Machine) -> None:
    machine.commands["timedatectl show -p NTPSynchronized --value"] = "no\n"
    assert machine.look()["problems"] == ["warn: the clock is not synchronised"]


def test_the_worst_problem_comes_first(machine: Machine) -> None:
    machine.write("proc/loadavg", "0.0 3.0 0.0 1/1 1\n")
    machine.commands["df -Pk /"] = df(1000, 1, "/")
    found = machine.look()
    assert found["status"] == "critical"
    assert [line.partition(":")[0] for line in found["problems"]] == ["critical", "warn"]


def test_a_disk_cannot_forge_a_line(machine: Machine) -> None:
    machine.write("proc/mounts", "/dev/sdb1 /media/x\\012critical:\\033[2J vfat rw 0 0\n")
    machine.commands["df -Pk /media/x\ncritical:\033[2J"] = df(1000, 50, "/media/x")
    sentence = "warn: /media/x?critical:?[2J has 5.0 % of its space free (limit 10 %)"
    assert machine.look()["problems"] == [sentence]


# Configuration


def test_limits_can_be_changed_and_switched_off(machine: Machine) -> None:
    machine.write("proc/loadavg", "0.0 3.0 0.0 1/1 1\n")
    machine.commands["df -Pk /"] = df(1000, 150, "/")
    machine.config = "load_per_core.warn = false\n[disk_free_percent]\nwarn = 30.5\ncritical = 20\n"
    assert machine.look()["problems"] == [
        "critical: / has 15.0 % of its space free (limit 20 %)",
    ]


@pytest.mark.parametrize("environment", [{}, {"HIVE_HEALTH_CHECK_CONFIG": ""}])
def test_without_a_file_the_defaults_hold(tmp_path: Path, environment: dict[str, str]) -> None:
    config = health.read_config(environment, tmp_path)
    assert (config.limits, config.instances) == (health.LIMITS, [])
    assert all(limit.meaning for limit in config.limits.values())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("load_per_cor.warn = 1", "load_per_cor: no such key; did you mean load_per_core?"),
        (
            "zzz = 1",
            "zzz: no such key; there are load_per_core, memory_available_percent,"
            " swap_used_percent, disk_free_percent, inodes_free_percent, temperature_c,"
            " failed_units, clock_unsynced, openclaw_down, openclaw_unknown, ignore_mounts,"
            " ignore_units, instance",
        ),
        (
            "temperature_c.warm = 1",
            "temperature_c.warm: no such key; did you mean warn?",
        ),
        (
            "temperature_c = 80",
            "temperature_c = 80: expected { warn = NUMBER, critical = NUMBER }",
        ),
        *(
            (
                f"temperature_c.warn = {wrong}",
                f"temperature_c.warn = {shown}: not a number from 0 to 1e9, nor false",
            )
            for wrong, shown in {
                '"hot"': "'hot'",
                "true": "True",
                "nan": "nan",
                "-1": "-1",
                "1e999": "inf",
                "0x" + "f" * 5000: "something too large to show",
            }.items()
        ),
        (
            'ignore_mounts = "/mnt"',
            "ignore_mounts = '/mnt': expected a list of names; * stands for any",
        ),
        ("ignore_units = [1]", "ignore_units = [1]: expected a list of names; * stands for any"),
        (
            "[instance]\nname = 'a'",
            "instance = {'name': 'a'}: expected [[instance]], twice bracketed",
        ),
        ("[[instance]]", "instance[0].name = None: expected a name of its own"),
        (
            "[[instance]]\nname = 'a'\n[[instance]]\nname = 'a'",
            "instance[1].name = 'a': expected a name of its own",
        ),
        (
            "[[instance]]\nname = 'a'\nprot = 1",
            "instance[0].prot: no such key; did you mean port?",
        ),
        (
            "[[instance]]\nname = 'a'\nport = 65536",
            "instance[0].port = 65536: not a port number from 1 to 65535",
        ),
        (
            "[[instance]]\nname = 'a'\nprofile = '../x'",
            "instance[0].profile = '../x': not the name of a profile (letters, digits, - and _)",
        ),
        ("a = ", "not TOML: Invalid value (at end of document)"),
        ("a = " + "[" * 9999, "not TOML: nested too deep"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(health.Wrong) as error:
        config_of(tmp_path, text)
    assert str(error.value) == f"{tmp_path}/.config/hive/health-check.toml: {line}"


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (
            {"HIVE_HEALTH_CHECK_CONFIG": "/nowhere/x.toml"},
            "/nowhere/x.toml: no such file ($HIVE_HEALTH_CHECK_CONFIG names it)",
        ),
        ({"HIVE_HEALTH_CHECK_CONFIG": "/"}, "/: cannot be read: Is a directory"),
        (
            {"HIVE_AGENT": "main", "HIVE_PROFILE": "--help"},
            "HIVE_PROFILE = '--help': not the name of a profile (letters, digits, - and _)",
        ),
        ({"HIVE_OPENCLAW_CMD": "npx 'x"}, 'HIVE_OPENCLAW_CMD = "npx \'x": No closing quotation'),
    ],
)
def test_a_wrong_environment_is_named(
    tmp_path: Path, environment: dict[str, str], line: str
) -> None:
    with pytest.raises(health.Wrong) as error:
        health.read_config(environment, tmp_path)
    assert str(error.value) == line


# OpenClaw


@pytest.fixture
def open_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def ask(home: Path, text: str = "", run: Any = None, **environment: str) -> list[dict[str, Any]]:
    """What is found out about the gateways, without the time that it took."""
    config = config_of(home, text, **environment)
    root = home / "nothing"
    run = run or health.Commands(dict(os.environ), 10)
    found = health.examine(config, LINUX, root, home, run, NOW).get("openclaw", [])
    assert all(instance.pop("ms") >= 0 for instance in found)
    return list(found)


def test_a_gateway_that_listens_is_well_and_another_is_down(tmp_path: Path, open_port: int) -> None:
    closed = free_port()
    text = f"[[instance]]\nname='up'\nport={open_port}\n[[instance]]\nname='off'\nport={closed}\n"
    assert ask(tmp_path, text) == [
        {"name": "up", "status": "ok", "how": f"port {open_port}"},
        {"name": "off", "status": "down", "how": f"port {closed}: Connection refused"},
    ]


@pytest.mark.parametrize(
    ("profile", "folder"),
    [("", ".openclaw"), ("default", ".openclaw"), ("work", ".openclaw-work")],
)
def test_the_port_comes_from_the_profile(
    tmp_path: Path, open_port: int, profile: str, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "openclaw.json").write_text(json.dumps({"gateway": {"port": open_port}}))
    assert ask(tmp_path, HIVE_AGENT="main", HIVE_PROFILE=profile) == [
        {"name": "main", "status": "ok", "how": f"port {open_port}"}
    ]


@pytest.mark.parametrize(
    "written",
    [
        None,
        "{gateway: {port: 1}, /* JSON5 */}",
        "[" * 100_000,
        '{"gateway": 1}',
        '{"gateway": {"port": "1"}}',
        '{"gateway": {"port": 99999}}',
        '{"gateway": {"port": true}}',
        '{"gateway": {"port": 1, "mode": "remote"}}',
        '{"gateway": {"port": 1, "bind": "tailnet"}}',
    ],
)
def test_where_no_port_is_known_openclaw_is_asked(tmp_path: Path, written: str | None) -> None:
    if written:
        (tmp_path / ".openclaw").mkdir()
        (tmp_path / ".openclaw/openclaw.json").write_text(written)
    run = canned({"openclaw gateway probe": 0})
    assert ask(tmp_path, run=run, HIVE_AGENT="main") == [
        {"name": "main", "status": "ok", "how": "openclaw gateway probe"}
    ]


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (1, "down", ": exit 1"),
        ("hangs", "down", ": no answer within 3 s"),
        (None, "unknown", ": No such file or directory"),
    ],
)
def test_a_probe_that_fails_says_why(
    tmp_path: Path, answer: str | int | None, status: str, reason: str
) -> None:
    run = canned({} if answer is None else {"openclaw --profile work gateway probe": answer})
    found = ask(tmp_path, run=run, HIVE_AGENT="main", HIVE_PROFILE="work")
    assert found == [
        {"name": "main", "status": status, "how": f"openclaw gateway probe{reason}"},
    ]


def test_a_gateway_that_cannot_be_asked_is_a_warning(machine: Machine) -> None:
    machine.config = "[[instance]]\nname = 'main'\n"
    how = "openclaw gateway probe: No such file or directory"
    assert machine.look()["problems"] == [f"warn: OpenClaw main cannot be asked ({how})"]


def test_hives_own_command_is_run_as_words_and_without_openclaws_variables(
    tmp_path: Path, fast_agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENCLAW_STATE_DIR", "/elsewhere")
    odd = fast_agent.rename(tmp_path / "open claw; false")
    agent = hive.InstanceConfig("main", "work", openclaw_cmd=(str(odd), "$HOME", "a b"))
    envelope = hive.Envelope.new("alpha", "beta", "command", "please", action="health-check")
    environment = hive.handler_environment(envelope, "beta", "hive", agent, {})
    assert environment["HIVE_OPENCLAW_CMD"] == shlex.join([str(odd), "$HOME", "a b"])
    assert ask(tmp_path, **environment) == [
        {"name": "main", "status": "ok", "how": "openclaw gateway probe"}
    ]
    words = ["$HOME", "a b", "--profile", "work", "gateway", "probe"]
    assert calls_of(odd) == [{"argv": words, "env": {}}]


def test_the_addressed_agent_is_asked_once_with_what_the_file_says(tmp_path: Path) -> None:
    text = "[[instance]]\nname = 'main'\n[[instance]]\nname = 'second'\nprofile = 'own'\n"
    environment = {"HIVE_AGENT": "second", "HIVE_PROFILE": "work"}
    assert config_of(tmp_path, text, **environment).instances == [
        health.Instance("main"),
        health.Instance("second", "own"),
    ]
    environment["HIVE_AGENT"] = "main"
    assert config_of(tmp_path, text, **environment).instances[0] == health.Instance("main", "work")


def test_a_gateway_without_a_result_is_not_forgotten(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(health, "openclaw", broken)
    machine.config = "[[instance]]\nname = 'main'\n"
    assert machine.look()["openclaw"] == [
        {"name": "main", "status": "unknown", "how": "no result within 15 s"}
    ]


# Deadlines


class Hanging:
    """A program that does not end, nor does its child; both hold a pipe that tells of their end."""

    def __init__(self, folder: Path) -> None:
        pipe = folder / "pipe"
        os.mkfifo(pipe)
        self.pipe = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self.file = folder / "hanging"
        self.file.write_text(
            f"#!/bin/sh\ntrap '' TERM INT HUP\nexec 3>{shlex.quote(str(pipe))}\n"
            "echo up >&3\nsleep 60 &\nwait\nsleep 60\n"
        )
        self.file.chmod(0o755)

    def hear(self) -> bytes:
        """The next thing from it: that it is up; then nothing, when all of it has ended."""
        assert select.select([self.pipe], [], [], 20)[0]
        return os.read(self.pipe, 100)


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Hanging]:
    made = Hanging(tmp_path)
    yield made
    os.close(made.pipe)


@pytest.mark.parametrize("listen", [True, False])
def test_a_program_that_hangs_is_ended_with_its_children(hanging: Hanging, listen: bool) -> None:
    run = health.Commands({}, 20)
    with pytest.raises(TimeoutError, match=r"^no answer within 1 s$"):
        run([str(hanging.file)], 1, listen)
    assert (hanging.hear(), hanging.hear()) == (b"up\n", b"")


def test_no_program_outlives_the_common_deadline(hanging: Hanging) -> None:
    run = health.Commands({}, 0.3)
    with pytest.raises(TimeoutError):
        run([str(hanging.file)], 60)
    with pytest.raises(TimeoutError, match=r"^no answer within 0 s$"):
        run([str(hanging.file)], 60)


def test_if_everything_hangs_there_is_an_answer_all_the_same(
    hanging: Hanging, tmp_path: Path, machine: Machine
) -> None:
    for name in ("df", "systemctl", "timedatectl", "chronyc", "ntpstat", "openclaw"):
        (tmp_path / name).symlink_to(hanging.file)
    config = config_of(tmp_path, HIVE_AGENT="main")
    run = health.Commands({"PATH": str(tmp_path)}, 0.5)
    started = time.monotonic()
    found = health.examine(config, LINUX, machine.root, tmp_path, run, NOW)
    assert time.monotonic() - started < 5
    assert found["disks"] == [{"mount": "/", "type": "ext4"}]
    assert found["openclaw"][0]["status"] == "down"
    assert not {"clock_synchronised", "failed_units"} & found.keys()


def test_the_deadlines_leave_hive_time() -> None:
    assert health.PROBE < health.DEADLINE < 20 < hive.NodeConfig().handler_timeout
    assert 2 * health.COMMAND < health.DISKS < health.DEADLINE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(hanging: Hanging, tmp_path: Path, number: int) -> None:
    environment = {"HIVE_AGENT": "main", "HIVE_OPENCLAW_CMD": shlex.quote(str(hanging.file))}
    with subprocess.Popen(
        [HANDLER],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as handler:
        assert hanging.hear() == b"up\n"
        handler.send_signal(number)
        assert handler.communicate(timeout=20) == (b"", b"")
    assert handler.returncode == 128 + number
    assert hanging.hear() == b""


@pytest.mark.parametrize("home", [None, "", "here"])
def test_without_a_home_a_folder_called_tilde_is_not_believed(
    tmp_path: Path, home: str | None
) -> None:
    nobody = (
        "import pwd, runpy, sys\n"
        "def unknown(uid):\n    raise KeyError(uid)\n"
        "pwd.getpwuid = unknown\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')\n"
    )
    for folder in ("~", "here"):
        file = tmp_path / folder / ".config/hive/health-check.toml"
        file.parent.mkdir(parents=True)
        file.write_text("this is not TOML")
    environment = {"PATH": os.environ["PATH"]} | ({} if home is None else {"HOME": home})
    line = [sys.executable, "-c", nobody, str(HANDLER)]
    how: dict[str, Any] = {"input": "{}", "capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run(line, **how, env=environment)
    assert json.loads(done.stdout)["status"]
    environment["HIVE_HEALTH_CHECK_CONFIG"] = "~/mine.toml"
    done = subprocess.run(line, **how, env=environment)
    assert done.returncode == 1 and "/nonexistent/mine.toml: no such file" in done.stderr
