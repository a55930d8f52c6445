"""Every key once; TOML in, Config or one ConfigError out."""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hive
from hive import CONFIG_TABLES, Config, ConfigError, effective_config, example_config, load_config

moderate = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TABLES = ["node", "mqtt", "heartbeat", "journal", "logging", "oc_instances", "handlers", "schedule"]
KEYS = sorted({key for table in CONFIG_TABLES.values() for key in table.FIELDS})
NESTED = [f"{table}.{key}" for table in [*TABLES, "handlers.x"] for key in [*KEYS, "other"]]
texts = st.text(max_size=20) | st.sampled_from(["main", "1", "1e3", "~", "~nobody/x", "..", "/"])
scalars = (
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts | st.dates() | st.datetimes()
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
        | st.dictionaries(texts, inner, max_size=1)
    ),
    max_leaves=4,
)
documents = st.dictionaries(
    st.sampled_from([*TABLES, *NESTED, "other"]) | texts.map(json.dumps), values, max_size=4
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to be in, and an empty home."""
    for variable in ("HIVE_CONFIG", "STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def load(content: str | bytes, mode: int = 0o600, **overrides: Any) -> Config:
    file = Path("hive.toml")
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    file.chmod(mode)
    return load_config("hive.toml", overrides)


def refusal(content: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load(content)
    return str(caught.value)


def written(value: object) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(k)} = {written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, float):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# -- whatever is in the file --


@moderate
@given(documents)
def test_any_toml_is_a_configuration_or_one_error(document: dict[str, Any]) -> None:
    content = "\n".join(f"{key} = {written(value)}" for key, value in document.items())
    try:
        load(content)
    except ConfigError as error:
        assert str(error).startswith("hive.toml: ")


@moderate
@given(st.text() | st.binary())
def test_any_noise_is_a_configuration_or_one_error(content: str | bytes) -> None:
    try:
        load(content)
    except ConfigError as error:
        assert str(error).startswith("hive.toml: ") and str(error).isprintable()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"[node]\nid = '\xff'", "hive.toml: not UTF-8 at byte 13"),
        ("node", "hive.toml: not TOML: "),
        ("[node]\nid = 1\nid = 2", "hive.toml: not TOML: "),
        ("[mqtt]\nport = " + "9" * 5000, "hive.toml: not TOML: "),
        ("x = " + "[" * 100_000, "hive.toml: not TOML: nested too deep"),
        ("x = " + "{a=" * 100_000, "hive.toml: not TOML: nested too deep"),
        (b"\0", "hive.toml: not TOML: "),
    ],
    ids=["not UTF-8", "no value", "twice", "5000 digits", "arrays", "inline tables", "NUL"],
)
def test_a_file_that_is_no_toml_is_an_error(content: str | bytes, line: str) -> None:
    assert refusal(content).startswith(line)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            "[heartbeat]\nintervall = 5",
            "heartbeat.intervall = 5: no such key; did you mean interval?",
        ),
        (
            "[heartbeat]\nx = 5",
            "heartbeat.x = 5: no such key; there are interval, miss_threshold",
        ),
        (
            "colour = 1",
            "colour = 1: no such key; there are"
            " node, mqtt, broker, heartbeat, journal, logging, oc_instances, handlers, schedule",
        ),
        ("mqtt = 1", "mqtt = 1: expected a table, as in [mqtt]"),
        ("[mqtt]\nport = 70000", "mqtt.port: 70000 is not a port number from 1 to 65535"),
        ("[mqtt]\nhost = 5", "mqtt.host: 5 is not a string"),
        (
            "[node]\nid = 'a'\n[mqtt]\nusername = 'b'\nsenders = 'checked'",
            "mqtt.username: 'b' is not this node's name, a, by which a broker that checks senders"
            " knows it",
        ),
        ("[mqtt]\ntls = 'yes'", "mqtt.tls: 'yes' is not true or false"),
        ("[mqtt]\nprotocol = '4'", 'mqtt.protocol: \'4\' is not "5" or "3.1.1"'),
        (
            "[heartbeat]\ninterval = 0",
            "heartbeat.interval: 0 is not seconds, above 0 and at most a year",
        ),
        (
            "[heartbeat]\nmiss_threshold = 1.5",
            "heartbeat.miss_threshold: 1.5 is not a whole number from 1 to 10000",
        ),
        (
            "[node]\nid = 'a/b'",
            "node.id: 'a/b' is not a name: 1 to 63 of A-Za-z0-9._- , not all, any, meta,"
            " state, roster or a channel's",
        ),
        ("[[oc_instances]]", 'oc_instances[0].name: missing; as in name = "main"'),
        (
            "[[oc_instances]]\nname = 'a'\n[[oc_instances]]\nname = 'a'",
            "oc_instances[1].name: 'a' is taken already",
        ),
        ("[handlers.'a b']", "handlers.a b: is not an action: 1 to 63 of A-Za-z0-9._-"),
        (
            "[handlers.sync]\ntimeuot = 5",
            "handlers.sync.timeuot = 5: no such key; did you mean timeout?",
        ),
        (
            "[logging]\nlevel = 'loud'",
            'logging.level: \'loud\' is not "debug" or "info" or "warning" or "error"',
        ),
        (
            "[mqtt]\ncert_file = 'a'",
            "mqtt.cert_file and mqtt.key_file: one is of no use without the other",
        ),
        ("[mqtt]\ncluster = ['b']", "mqtt.cluster: of no use without mqtt.host"),
        ("[mqtt]\ncluster = 5", "mqtt.cluster: 5 is not a string, or a list of strings"),
        (
            "[handlers.x]\nenv = ['A', 'B C']",
            "handlers.x.env: ['A', 'B C'] is not the name of an environment variable, or a list of"
            " them",
        ),
        ("[journal]\nshare = 'all'", "journal.share: 'all' is not a name, or a list of names"),
        (
            "[node]\ntags = ['a/b']",
            "node.tags: ['a/b'] is not a tag, or a list of tags: 1 to 63 of A-Za-z0-9._-",
        ),
    ],
)
def test_an_error_names_the_key_its_value_and_what_would_do(content: str, line: str) -> None:
    assert refusal(content) == f"hive.toml: {line}"


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("mqtt.port", ["1", "65535"], ["0", "65536", "1.5", "true", "nan", "inf", "'x'", "[]"]),
        ("mqtt.keepalive", ["5", "65535"], ["4", "65536", "30.5", "false"]),
        ("heartbeat.interval", ["0.1", "31622400"], ["0", "-1", "nan", "inf", "true", "31622401"]),
        ("heartbeat.miss_threshold", ["1", "10000"], ["0", "10001", "2.5", "true"]),
        ("node.id", ["'a'", "'A.b_c-9'"], ["''", "'all'", "'meta'", "'a+'", "'a\\u0000'", "1"]),
        ("node.topic_prefix", ["'a/b'"], ["''", "'/a'", "'a/#'", "'+'", "1"]),
        ("node.handler_dir", ["'x'"], ["''", "1", "['x']", '"\\u0000"']),
        ("mqtt.tls", ["true", "false"], ["1", "'true'"]),
        ("logging.format", ["'json'", "'text'"], ["'xml'", "1", "[]"]),
        ("handlers.x.workers", ["1"], ["0", "1.5"]),
        ("handlers.x.timeout", ["0.5"], ["0"]),
        ("handlers.x.retry", ["true", "false"], ["1", "'yes'"]),
        ("handlers.x.env", ["'A'", "['A', 'b_2']", "[]"], ["''", "1", "['A=1']", "['a b']", "'*'"]),
        ("handlers.env", ["'A'", "['A', 'b_2']", "[]"], ["1", "['A=1']", "['2']"]),
        ("journal.keep_days", ["1", "365"], ["0", "-1", "0.5", "true", "'7 days'", "[7]"]),
        ("journal.max_mb", ["1", "4096"], ["0", "1.5", "'64 MB'"]),
    ],
)
def test_a_value_is_held_to_its_kind(key: str, good: list[str], bad: list[str]) -> None:
    for value in good:
        load(f"{key} = {value}")
    for value in bad:
        assert refusal(f"{key} = {value}").startswith(f"hive.toml: {key}: ")


@pytest.mark.parametrize("value", ["''", "'  '", "[]", "['']", "[1]", "1", '"\\u0000"'])
def test_a_command_must_name_a_program(value: str) -> None:
    line = refusal(f"[[oc_instances]]\nname = 'main'\nopenclaw_cmd = {value}")
    assert line.startswith("hive.toml: oc_instances[0].openclaw_cmd: ")


def test_a_command_may_have_arguments_and_a_home(place: Path) -> None:
    toml = "[[oc_instances]]\nname = 'main'\nopenclaw_cmd = ['~/bin/oc', '--x y']"
    command = load(toml).agents["main"].openclaw_cmd
    assert command == (str(place.parent / "home/bin/oc"), "--x y")


# -- the example, and the configuration in force --


APART = ("password =", "at =", "hook_token =", "command =")


def uncommented(example: str) -> str:
    """The example with every key in force, except for those that exclude another."""
    found = re.findall(r"^(?:# )?(\[.+\]|\w+ = .+)$", example, re.M)
    return "\n".join(line for line in found if not line.startswith(APART))


def test_every_line_of_the_example_is_accepted(place: Path) -> None:
    for file in ("mqtt-password", "broker-password", "hook"):
        (place / file).write_text("x\n")
    content = uncommented(example_config())
    config = load(content)
    assert config.mqtt.password == "x"
    said = tomllib.loads(content)
    said |= {repeated: said[repeated][0] for repeated in ("oc_instances", "schedule")}
    said["handlers"] = said["handlers"]["NAME"]
    for name, table in CONFIG_TABLES.items():
        assert {*said[name]} == {*table.FIELDS} - {*"".join(APART).split(" =")}


def test_the_example_as_it_is_changes_nothing() -> None:
    example = load(example_config())
    plain = load("")
    assert all(getattr(example, name) == getattr(plain, name) for name in [*Config.FIELDS][:8])


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_its_line_of_help_in_the_example(key: str) -> None:
    assert re.search(rf"^# {key} = .+ # \w.{{4,}}$", example_config(), re.M)


@moderate
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_the_configuration_in_force_is_toml_that_says_the_same(said: str) -> None:
    config = load(f"mqtt.username = {written(said)}")
    shown = tomllib.loads(effective_config(config))
    assert shown["mqtt"]["username"] == said


def test_the_configuration_in_force_says_who_set_each_key() -> None:
    config = load("mqtt.port = 1\nheartbeat.interval = 2", **{"mqtt.port": 99})
    lines = [re.sub(" +", " ", line.strip()) for line in effective_config(config).splitlines()]
    assert lines[0] == "# from hive.toml"
    assert {
        "port = 99 # the command line",
        "interval = 2.0 # hive.toml",
        "miss_threshold = 3 # default",
        "# username is not set",
    } <= {*lines}
    assert config.heartbeat.interval == 2


# -- secrets --

SECRET = "hunter2"


@pytest.mark.parametrize(
    "content",
    [
        f"[mqtt]\npasswrod = '{SECRET}'",
        f"[mqtt]\npwd = '{SECRET}'",
        f"[mqtt]\npw = '{SECRET}'",
        f"[mqtt]\nPASSWORD = '{SECRET}'",
        f"[mqtt]\npassword = ['{SECRET}']",
        f"[mqtt.password]\nvalue = '{SECRET}'",
        f"password = '{SECRET}'",
        f"[mqqt]\npassword = '{SECRET}'",
        f"[[mqtt]]\npassword = '{SECRET}'",
        f"[oc_instances]\ntoken = '{SECRET}'",
        f"[oc_instance]\ntoken = '{SECRET}'",
        f"[[oc_instances]]\nname = 'main'\ntokne = '{SECRET}'",
        f"[[oc_instances]]\ntoken = '{SECRET}'",
        f"[mqtt]\npassword = '{SECRET}'\npassword_file = 'x'",
        f"[mqtt]\npassword = {SECRET}",
        f"[mqtt]\npassword = '{SECRET}",
        f"handlers.token = '{SECRET}'",
    ],
)
def test_no_error_shows_a_secret(content: str) -> None:
    assert SECRET not in refusal(content)


def test_no_output_shows_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    toml = f"mqtt.password = '{SECRET}'\n[[oc_instances]]\nname = 'main'\ntoken = '{SECRET}'"
    config = load(toml)
    assert config.mqtt.password == config.oc_instances[0].token == SECRET
    assert SECRET not in effective_config(config)
    assert SECRET not in repr(config)
    assert effective_config(config).count('= "***"') == 2
    assert hive.main(["config"]) == 0
    assert SECRET not in "".join(capsys.readouterr())


@pytest.mark.parametrize("content", ["s3cret", "s3cret\n", "s3cret\r\n", "s3cret\nnot this\n"])
def test_the_password_is_the_first_line_of_its_file(place: Path, content: str) -> None:
    (place / "pw").write_bytes(content.encode())
    assert load("mqtt.password_file = 'pw'").mqtt.password == "s3cret"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory"),
        (b"", "its first line is empty"),
        (b"\nx", "its first line is empty"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_a_password_file_that_holds_none_is_an_error(
    place: Path, content: bytes | None, why: str
) -> None:
    if content is not None:
        (place / "pw").write_bytes(content)
    line = refusal("mqtt.password_file = 'pw'")
    assert line == f"hive.toml: mqtt.password_file: {place.resolve()}/pw: {why}"


@pytest.mark.parametrize("mode", [0o601, 0o604, 0o610, 0o620, 0o640, 0o644])
def test_a_file_with_a_secret_that_others_may_read_is_warned_of(place: Path, mode: int) -> None:
    assert load("mqtt.password = 'x'", mode).warnings == (
        "hive.toml: holds a secret and others may read it; try: chmod 600 hive.toml",
    )
    two_of_them = "[[oc_instances]]\nname = 'a'\ntoken = 'x'\nhook_token = 'y'"
    assert len(load(two_of_them, mode).warnings) == 1
    for name in ("pw", "cert"):
        (place / name).write_text("x")
    (place / "pw").chmod(mode)
    config = load("mqtt = {password_file = 'pw', cert_file = 'cert', key_file = 'pw'}", mode)
    assert [warning.partition(":")[0] for warning in config.warnings] == [
        f"{place.resolve()}/pw"
    ] * 2


def test_a_file_that_is_private_or_holds_no_secret_is_not_warned_of() -> None:
    assert load("mqtt.password = 'x'", 0o600).warnings == ()
    assert load("mqtt.port = 1", 0o644).warnings == ()


# -- which file --


def test_the_first_file_that_is_there_is_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = place.parent / "home/.config/hive/hive.toml"
    home.parent.mkdir(parents=True)
    files = [place / "flag", place / "variable", home]
    for file in files:
        file.write_text(f"node.id = 'from-{file.parent.name}-{file.name}'")
    monkeypatch.setenv("HIVE_CONFIG", str(files[1]))
    read = [load_config(str(files[0])), load_config()]
    monkeypatch.delenv("HIVE_CONFIG")
    read.append(load_config())
    expected = ["from-here-flag", "from-here-variable", "from-hive-hive.toml"]
    assert [config.node.id for config in read] == expected


NOT_READ = "./hive.toml is not read; if you trust it, name it: --config hive.toml"


def test_a_file_of_the_current_directory_counts_only_if_it_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "hive.toml").write_text("node.id = 'evil'\nmqtt.password_file = '/etc/shadow'")
    unnamed = load_config()
    assert (unnamed.source, unnamed.warnings) == (None, (NOT_READ,))
    assert unnamed.node.id != "evil" and unnamed.mqtt.password is None
    (place / "hive.toml").write_text("node.id = 'mine'")
    assert load_config("hive.toml").node.id == "mine"
    assert load_config("hive.toml").warnings == ()
    monkeypatch.setenv("HIVE_CONFIG", "hive.toml")
    assert (load_config().node.id, load_config().warnings) == ("mine", ())
    monkeypatch.setenv("HIVE_CONFIG", str(place / "hive.toml"))
    assert (load_config().node.id, load_config().warnings) == ("mine", ())


def test_a_file_that_is_passed_by_is_told_of(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = place.parent / "home/.config/hive/hive.toml"
    home.parent.mkdir(parents=True)
    home.write_text("node.id = 'mine'")
    assert load_config().warnings == ()
    (place / "hive.toml").write_text("this is no TOML")
    assert (load_config().node.id, load_config().warnings) == ("mine", (NOT_READ,))
    (place / "named").write_text("")
    assert load_config("named").warnings == ()  # nobody counts on the other
    monkeypatch.chdir(home.parent)
    assert (load_config().node.id, load_config().warnings) == ("mine", ())  # it is the one


def test_a_file_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    (place / "hive.toml").write_text("")
    with pytest.raises(ConfigError, match=r"^'no\.toml': no such file \(named by --config\)$"):
        load_config("no.toml")
    monkeypatch.setenv("HIVE_CONFIG", "~/no.toml")
    with pytest.raises(ConfigError, match=r"^'~/no\.toml': no such file \(named by \$HIVE_CONFIG"):
        load_config()
    with pytest.raises(ConfigError):
        load_config(str(place))


def test_a_tilde_in_the_name_of_the_file_is_the_home(place: Path) -> None:
    (place.parent / "home/my.toml").write_text("mqtt.port = 7")
    assert load_config("~/my.toml").mqtt.port == 7


def test_a_file_that_cannot_be_read_is_an_error(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cannot be read: Is a directory$"):
        hive.read_toml(place)
    with pytest.raises(ConfigError, match=r"^cannot be read: No such file or directory$"):
        hive.read_toml(place / "vanished")


def test_a_file_of_another_user_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("")
    as_root = os.geteuid() == 0
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    if as_root:
        load_config("hive.toml")  # everybody trusts root's files
        os.chown("hive.toml", 12345, -1)
    with pytest.raises(ConfigError, match=r"^hive\.toml: belongs to another user, "):
        load_config("hive.toml")


# -- what is worked out --


def test_paths_are_relative_to_the_file(place: Path) -> None:
    (place / "etc").mkdir()
    (place / "etc/hive.toml").write_text(
        "[node]\nhandler_dir = 'h'\nstate_dir = '~/s'\n[mqtt]\nca_file = '/ca'"
    )
    config = load_config("etc/hive.toml")
    assert config.handler_dir == place.resolve() / "etc/h"
    assert config.state_dir == place.parent / "home/s"
    assert config.mqtt.ca_file == Path("/ca")


def test_handlers_lie_beside_the_configuration_or_beside_hive(place: Path) -> None:
    assert load("").handler_dir == place.resolve() / "hive-daemon.d"
    assert hive.make_config({}, None, {}).handler_dir == (
        Path(hive.__file__).resolve().parent / "hive-daemon.d"
    )


def test_the_state_lies_where_the_nearest_rule_says(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = "node.id = 'alpha'"
    assert load(toml).state_dir == place.parent / "home/.local/state/hive/alpha"
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert load(toml).state_dir == Path("/xdg/hive/alpha")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/hive:/var/lib/other")
    assert load(toml).state_dir == Path("/var/lib/hive")
    assert load("node = {id = 'alpha', state_dir = 's'}").state_dir == place.resolve() / "s"


@pytest.mark.parametrize(
    ("host", "node"),
    [
        ("attic", "attic"),
        ("attic.example.org", "attic"),
        ("Jörg's box", "J-rg-s-box"),
        ("-x-", "x-"),
        ("all", "node"),
        ("", "node"),
        ("x" * 100, "x" * 63),
    ],
)
def test_a_node_without_a_name_takes_its_hosts(
    host: str, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(nodename=host))
    config = load("")
    assert config.node.id == node
    assert config.origin["node.id"] == "this machine's name"


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert load("mqtt.host = '::1'").mqtt.address == "[::1]:1883"
    assert load("mqtt.host = 'broker'").mqtt.address == "broker:1883"


def test_what_is_no_text_is_refused_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        hive.main(["config", "--host", "\udcff"])  # the byte 0xff, as Python hands it over
    assert ended.value.code == 2 and "--host" in capsys.readouterr().err


def test_the_command_line_overrides_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    load("[node]\nid = 'alpha'\n[mqtt]\nhost = 'far'")
    near = ["--config", "hive.toml", "--host", "near"]
    code = hive.main([*near, "config", "--port", "99", "--prefix", "a/b"])
    shown = tomllib.loads(capsys.readouterr().out)
    assert code == 0
    assert (shown["mqtt"]["host"], shown["mqtt"]["port"]) == ("near", 99)
    assert (shown["node"]["id"], shown["node"]["topic_prefix"]) == ("alpha", "a/b")


# -- what each key is worth --

DEFAULTS = """
[node]
id = "box"
topic_prefix = "hive"
tags = []
handler_dir = "HERE/hive-daemon.d"
handler_timeout = 30.0
handler_workers = 4
agent_patience = 3600.0
sender_rate = 100
sender_burst = 20000
state_dir = "HOME/.local/state/hive/box"
[mqtt]
cluster = []
keepalive = 6
protocol = "5"
tls = false
senders = "open"
[broker]
anonymous = false
queue_messages = 10000
queue_mib = 64
total_mib = 256
retained_mib = 64
[heartbeat]
interval = 5.0
miss_threshold = 3
[journal]
keep_days = 7
max_mb = 64
share = []
share_texts = false
[logging]
level = "info"
format = "text"
[[oc_instances]]
name = "main"
openclaw_cmd = "openclaw"
via = "cli"
agent = "main"
agent_timeout = 300.0
options = []
env = []
[handlers.sync]
workers = 1
retry = false
env = []
publish = true
[[schedule]]
action = "sync"
every = 60.0
jitter = 0.0
text = "scheduled"
notify = "change"
catch_up = true
failures = 1
"""


def test_what_nobody_set_is_as_it_always_was(place: Path) -> None:
    said = "[node]\nid = 'box'\n[[oc_instances]]\nname = 'main'\n[handlers.sync]\n"
    config = load(f"{said}[[schedule]]\naction = 'sync'\nevery = '1m'")
    expected = DEFAULTS.replace("HERE", str(place.resolve()))
    expected = expected.replace("HOME", str(place.parent / "home"))
    assert tomllib.loads(effective_config(config)) == tomllib.loads(expected)
    assert config.agents == {"main": config.oc_instances[0]}
    assert config.topics.prefix == "hive"


@pytest.mark.parametrize(
    ("key", "said", "value"),
    [
        ("mqtt.port", "8883", 8883),
        ("mqtt.keepalive", "5", 5),
        ("broker.queue_messages", "1000000", 1_000_000),
        ("broker.total_mib", "7", 7),
        ("broker.listen", '"[::1]:1883"', "[::1]:1883"),
        ("broker.listen", "'localhost:65535'", "localhost:65535"),
        ("node.sender_rate", "1000000", 1_000_000),
        ("node.sender_burst", "1", 1),
        ("node.tags", "['b', 'a']", ["b", "a"]),
        ("journal.share", "'alpha'", "alpha"),
        ("journal.share", "['alpha', 'gamma']", ["alpha", "gamma"]),
        ("schedule.catch_up", "false", False),
        ("schedule.catch_up", "'2h'", 7200.0),
        ("heartbeat.interval", "1.5", 1.5),
        ("node.handler_timeout", "31622400", 31_622_400.0),
        ("schedule.every", "1", 1.0),
        ("schedule.every", "'90s'", 90.0),
        ("schedule.every", "'5m'", 300.0),
        ("schedule.every", "'1h30m'", 5400.0),
        ("schedule.every", "'1d2h3m4s'", 93_784.0),
        ("schedule.every", "'366d'", 31_622_400.0),
        ("schedule.at", "'07:30'", "07:30"),
        ("schedule.at", "23:59:58", "23:59"),
        ("schedule.jitter", "0", 0.0),
        ("schedule.jitter", "'30s'", 30.0),
        ("schedule.failures", "3", 3),
        ("schedule.notify", "'output'", "output"),
        ("oc_instances.command", "['a', 'b']", ["a", "b"]),
        ("oc_instances.hook_url", "'https://a:1/b'", "https://a:1/b"),
    ],
)
def test_a_value_means_what_it_says(key: str, said: str, value: object) -> None:
    table, _, name = key.partition(".")
    rest = {"schedule": "action = 'x'\n", "oc_instances": "name = 'x'\n"}.get(table, "")
    if table == "schedule" and name not in ("every", "at"):
        rest += "every = 60\n"
    header = f"[[{table}]]" if rest else f"[{table}]"
    shown = tomllib.loads(effective_config(load(f"{header}\n{rest}{name} = {said}")))[table]
    shown = shown[0] if rest else shown
    assert (shown[name], type(shown[name])) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("every", "'' '0s' 0 0.9 '1x' 's' '1m1h' '-1s' '367d' 31622401 true \"\\u0661s\""),
        ("at", "'24:00' '7:30' '07:60' '0730' 7 ''"),
        ("jitter", "-1 0.5 '0s' false 31622401"),
        ("notify", "'sometimes' true"),
        ("failures", "0 -1 1.5 true 'x'"),
        ("text", "'' 1"),
    ],
)
def test_a_schedule_is_held_to_its_kinds(key: str, bad: str) -> None:
    for value in bad.split():
        other = "" if key in ("every", "at") else "every = 60\n"
        line = refusal(f"[[schedule]]\naction = 'x'\n{other}{key} = {value}")
        assert line.startswith(f"hive.toml: schedule[0].{key}: "), value


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("broker.queue_messages", "0 1000001 1.5 true"),
        ("broker.total_mib", "0 10001 1.5"),
        ("broker.listen", "'' ':1883' '127.0.0.1' '::1:1883' '[]:1' 'h:0' 'h:65536' '[::1:1' 1"),
        ("oc_instances.hook_url", "'' 'ftp://a/' 'http://' 'http:///x' 'http://a@b/' 'http://a/ä'"),
        ("oc_instances.port", "0 65536"),
        ("oc_instances.agent_timeout", "0 -1"),
        ("mqtt.username", '1 "\\u0000"'),
        ("node.agent_patience", "0 31622401"),
        ("node.sender_rate", "0 1000001 1.5"),
        ("node.sender_burst", "0 1000001"),
        ("node.tags", "1 ['a',1] ['a/b'] ''"),
        ("journal.share", "1 ['a',1] ['a/b'] 'all'"),
    ],
)
def test_more_values_are_held_to_their_kinds(key: str, bad: str) -> None:
    table, _, name = key.partition(".")
    header = "[[oc_instances]]\nname = 'x'" if table == "oc_instances" else f"[{table}]"
    for value in bad.split():
        line = refusal(f"{header}\n{name} = {value}")
        where = "oc_instances[0]" if table == "oc_instances" else table
        assert line.startswith(f"hive.toml: {where}.{name}: "), value


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            "[[schedule]]\naction = 'x'",
            'schedule[0]: either every or at, as in every = "5m"',
        ),
        (
            "[[schedule]]\naction = 'x'\nevery = 60\nat = '07:30'",
            'schedule[0]: either every or at, as in every = "5m"',
        ),
        (
            "[[schedule]]\nevery = 60",
            'schedule[0].action: missing; as in action = "health-check"',
        ),
        ("[schedule]\nx = 1", "schedule = …: expected [[schedule]], twice bracketed"),
        ("handlers = 5", "handlers = 5: expected tables, as in [handlers.git-sync]"),
        ("handlers.x = 5", "handlers.x = 5: expected a table, as in [handlers.x]"),
        (
            "[broker]\nusername = 'x'",
            "broker.username and broker.password_file: one is of no use alone",
        ),
        (
            "[broker]\npassword = 'x'",
            "broker.username and broker.password_file: one is of no use alone",
        ),
        (
            "[mqtt]\nkey_file = 'a'",
            "mqtt.cert_file and mqtt.key_file: one is of no use without the other",
        ),
        (
            "[[oc_instances]]\nname = 'x'\ncommand = 'y'\nvia = 'call'",
            "oc_instances[0].via: has no meaning beside command; leave one of them out",
        ),
        (
            "[[oc_instances]]\nname = 'x'\nvia = 'claude'",
            'oc_instances[0].dir: missing; via = "claude" works there',
        ),
        (
            "[[oc_instances]]\nname = 'x'\nvia = 'hook'",
            'oc_instances[0].hook_token: missing; via = "hook" needs it',
        ),
        (
            "[mqtt]\npassword = 'x'\npassword_file = 'y'",
            "mqtt.password_file: password is set as well; keep one of the two",
        ),
    ],
)
def test_what_does_not_go_together_is_an_error(content: str, line: str) -> None:
    assert refusal(content) == f"hive.toml: {line}"


def test_what_goes_together_is_taken(place: Path) -> None:
    (place / "secret").write_text("s\nmore")
    agent = "[[oc_instances]]\nname = 'x'\n"
    for content in (
        f"{agent}via = 'hook'\nhook_token = 's'",
        f"{agent}via = 'hook'\nhook_token_file = 'secret'",
        f"{agent}via = 'auto'\nhook_token = 's'",
    ):
        assert load(content).oc_instances[0].hook_token == "s"
    assert load(f"{agent}command = 'y'\nvia = 'cli'").oc_instances[0].command == ("y",)
    config = load("[broker]\nusername = 'u'\npassword_file = 'secret'").broker
    assert (config.username, config.password) == ("u", "s")
    assert load("[mqtt]\ncert_file = 'c'\nkey_file = 'k'").mqtt.key_file == place.resolve() / "k"


@pytest.mark.parametrize(
    ("content", "exposed"),
    [
        ("[broker]\nusername = 'u'\npassword = 'x'", ["hive.toml"]),
        ("[broker]\nusername = 'u'\npassword_file = 'secret'", ["secret"]),
        ("[mqtt]\npassword_file = 'secret'", ["secret"]),
        ("[[oc_instances]]\nname = 'a'\nhook_token = 'x'", ["hive.toml"]),
        ("[[oc_instances]]\nname = 'a'\nhook_token_file = 'secret'", ["secret"]),
        ("[[oc_instances]]\nname = 'a'\n[[oc_instances]]\nname = 'b'\ntoken = 'x'", ["hive.toml"]),
        ("[[oc_instances]]\nname = 'a'", []),
    ],
)
def test_each_place_of_a_secret_is_watched(place: Path, content: str, exposed: list[str]) -> None:
    (place / "secret").write_text("x")
    (place / "secret").chmod(0o644)
    named = [Path(one.partition(":")[0]).name for one in load(content, 0o644).warnings]
    assert named == exposed
    (place / "secret").chmod(0o600)
    assert load(content, 0o600).warnings == ()


def test_a_file_that_everybody_may_write_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^hive\.toml: is writable by everyone; try: chmod o-w "):
        load("mqtt.port = 1", 0o602)
    assert load("mqtt.port = 1", 0o620).mqtt.port == 1


def test_where_the_broker_is() -> None:
    nowhere = load("").mqtt
    assert (nowhere.named, nowhere.endpoint) == (False, ("localhost", 1883))
    assert nowhere.address == "localhost:1883"
    assert load("mqtt.port = 7").mqtt.named and load("mqtt.host = 'x'").mqtt.named
    assert load("mqtt.port = 7").mqtt.endpoint == ("localhost", 7)
    unix = load("mqtt.host = '/run/broker'").mqtt
    assert (unix.unix, unix.address) == (True, "/run/broker")
    assert not load("mqtt.host = 'x/y'").mqtt.unix and not nowhere.unix


def test_the_configuration_in_force_shows_what_was_repeated(place: Path) -> None:
    toml = (
        "[handlers.a]\ntimeout = 2\n[handlers.b]\nworkers = 3\n"
        "[[oc_instances]]\nname = 'x'\nopenclaw_cmd = ['oc', '--y']\n[[oc_instances]]\nname = 'z'\n"
    )
    text = effective_config(load(toml))
    shown = tomllib.loads(text)
    assert (shown["handlers"]["a"]["timeout"], shown["handlers"]["b"]["workers"]) == (2.0, 3)
    assert [one["name"] for one in shown["oc_instances"]] == ["x", "z"]
    assert shown["oc_instances"][0]["openclaw_cmd"] == ["oc", "--y"]
    assert re.search(r"^workers = 3 +# hive\.toml$", text, re.M)
    assert effective_config(load_config("hive.toml")).startswith("# from hive.toml\n")
    Path("hive.toml").unlink()
    assert effective_config(load_config()).startswith("# no configuration file: the defaults\n")


def test_what_may_be_a_secret_is_not_shown_and_the_rest_is() -> None:
    assert refusal("[node]\nmy_credential = 'x'").startswith("hive.toml: node.my_credential = …: ")
    assert (
        refusal("[node]\nidd = 'x'") == "hive.toml: node.idd = 'x': no such key; did you mean id?"
    )
    assert refusal("[node]\nidd = [1]").startswith("hive.toml: node.idd = …: no such key; ")
    assert refusal("[mqtt]\npasword = 1").endswith("did you mean password?")


def test_what_all_handlers_get_may_be_named_beside_what_one_gets() -> None:
    config = load("[handlers]\nenv = ['A', 'B']\n[handlers.sync]\nenv = 'C'\nworkers = 2")
    assert config.handler_env == ("A", "B")
    assert {name: one.env for name, one in config.handlers.items()} == {"sync": ("C",)}
    shown = tomllib.loads(effective_config(config))["handlers"]
    assert (shown["env"], shown["sync"]["env"]) == (["A", "B"], "C")
    named_env = load("[handlers.env]\nworkers = 2")  # a handler may have that name
    assert (named_env.handler_env, named_env.handlers["env"].workers) == ((), 2)


SIMPLE = ("[node]", "[[oc_instances]]", "[oc_instances]", 'name = "a"  # b', "port = 1883", "")
fragments = st.sampled_from(
    [
        *SIMPLE,
        *"[]\"'\\#=.,_- \t\r\0\x7f\u2028é7",
        "true",
        "false",
        "name",
        "0",
        "1.50",
        "nan",
        "1e5",
    ]
)
lines = st.sampled_from(SIMPLE) | st.lists(fragments, max_size=6).map("".join)


def read(parse: Callable[[str], object], text: str) -> str:
    """What is read, with its types; or that it cannot be."""
    try:
        return repr(parse(text))
    except ValueError:
        return "not TOML"


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n", "# a\n", "#\0", "# \x7f", "name = 1", "[node", "node]", "[node]]", "[[node]"),
        *(
            "[a]\n[a]",
            "[[a]]\n[a]",
            "[a]\n[[a]]",
            "[[a]]\nx = 1\n[[a]]\nx = 2",
            "[a]\n\n[b]\nx = 1",
        ),
        *("[a]\r\nx = 1\r\n", "[é]", "[a]\né = 1", "[a]\nx = 1\nx = 1", "[a] # b\nx = 1#c"),
        *(f"[a]\nx = {value}" for value in ("01", "0", "-1", "1.50", "1.", "1e5", "1_0", "0x1")),
        *(f"[a]\nx = {value}" for value in ("true", "True", "false#", "truex", "1979-05-27", "''")),
        *(
            f'[a]\nx = "{value}"'
            for value in ("", "é", "a # b", "\\\\", '"', "\t", "\x7f", "\u2028")
        ),
    ],
)
def test_a_line_that_is_nearly_simple_is_read_as_tomllib_reads_it(text: str) -> None:
    assert read(hive.parse_toml, text) == read(tomllib.loads, text)


@settings(deadline=None, max_examples=300)
@given(st.lists(lines, max_size=6).map("\n".join))
def test_what_is_read_without_tomllib_is_what_tomllib_reads(text: str) -> None:
    assert read(hive.parse_toml, text) == read(tomllib.loads, text)


def test_what_init_writes_is_read_without_tomllib(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {
        "node": {"id": "alpha", "handler_timeout": 0.5},
        "mqtt": {"port": 1883, "tls": True},
        "oc_instances": [{"name": "main"}, {"name": "é", "profile": "work"}],
    }
    text = example_config(chosen)
    monkeypatch.setitem(sys.modules, "tomllib", None)
    found = hive.parse_toml(text)
    assert {name: table for name, table in found.items() if table} == chosen
    for more in (
        "a = 1\n",
        "[node.x]\n",
        '[node]\nid = "\\\\"',
        "[node]\nid = 'x'",
        "[node]\nx = -1",
    ):
        with pytest.raises(ImportError):
            hive.parse_toml(more)


# -- what follows from it --


def read_document(**document: Any) -> Config:
    return hive.make_config(document, None, {})


@pytest.mark.parametrize(
    ("senders", "addresses", "sender"),
    [("open", ["beta", "main"], ""), ("checked", ["beta"], "beta")],
)
def test_whose_mail_a_node_takes_is_what_its_broker_allows(
    senders: str, addresses: list[str], sender: str
) -> None:
    config = read_document(
        node={"id": "beta"}, mqtt={"senders": senders}, oc_instances=[{"name": "main"}]
    )
    assert (config.checked, config.topics) == (senders == "checked", hive.Topics("hive", sender))
    assert [*config.addresses] == addresses
    mail = [f"hive/{name}/+{end}" for name in (*addresses, "all") for end in ("", "/+")]
    states = [("hive/meta/+/state", 0), ("hive/meta/+/roster", 0)]
    assert config.subscriptions == [*((topic, 1) for topic in mail), *states]


def test_a_rule_names_whom_it_allows_and_without_one_everybody_may_but_read() -> None:
    config = read_document(
        oc_instances=[{"name": "a", "allow": "x"}, {"name": "b"}, {"name": "c", "allow": []}],
        handlers={"sync": {"allow": ["x", "y"]}, "ping": {}},
        journal={"share": ["z"]},
    )
    assert config.allow == {
        "[handlers.sync] allow": ("x", "y"),
        "allow of [[oc_instances]] a": ("x",),
        "allow of [[oc_instances]] c": (),
        "[journal] share": ("z",),
    }
    assert read_document().allow == {}


def test_without_a_file_paths_stay_as_they_are(place: Path) -> None:
    config = read_document(node={"state_dir": "x"})
    assert (config.state_dir, config.file) == (Path("x"), None)
    load("")
    assert load_config("hive.toml").file == str(place.resolve() / "hive.toml")


def test_a_program_in_one_file_lies_where_that_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hive").write_bytes(b"")
    for file, own in (("hive/hive.py", "hive"), ("src/hive.py", "src/hive.py")):
        monkeypatch.setattr(hive, "__file__", str(tmp_path / file))
        assert hive.own_file() == tmp_path.resolve() / own


def test_a_state_home_that_is_relative_does_not_count(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "xdg")
    assert hive.state_home() == place.parent / "home/.local/state/hive"


def test_the_file_of_this_machine_is_read_where_this_user_has_none(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hive.CONFIG_PLACES == ("~/.config/hive/hive.toml", "/etc/hive/hive.toml")
    mine, everybodys = place.parent / "home/mine.toml", place / "everybodys.toml"
    monkeypatch.setattr(hive, "CONFIG_PLACES", ("~/mine.toml", str(everybodys)))
    assert hive.find_config(None) is None
    for file in (everybodys, mine):
        file.write_text("")
        assert hive.find_config("") == file


def test_the_hosts_of_a_broker_are_tried_in_turn() -> None:
    mqtt = load("[mqtt]\nhost = 'a'\ncluster = ['b', 'c']").mqtt
    assert ["".join(mqtt.hosts(first)) for first in range(4)] == ["abc", "bca", "cab", "abc"]
    assert [*load("").mqtt.hosts(5)] == ["localhost"]


@pytest.mark.parametrize(
    ("said", "seconds"), [("true", float("inf")), ("false", 90.0), ("'2h'", 7200.0), ("7", 7.0)]
)
def test_how_late_a_run_may_be(said: str, seconds: float) -> None:
    toml = f"[[schedule]]\naction = 'x'\nat = '07:30'\ncatch_up = {said}"
    assert load(toml).schedule[0].patience == seconds


@pytest.mark.parametrize(
    ("said", "openclaw", "program"),
    [
        ("", True, False),
        ("via = 'chat'", True, False),
        ("command = 'x'", False, False),
        ("via = 'claude'\ndir = '/d'", False, True),
        ("via = 'codex'\ndir = '/d'\ncommand = 'x'", False, True),
    ],
)
def test_what_kind_of_agent_it_is(said: str, openclaw: bool, program: bool) -> None:
    [agent] = load(f"[[oc_instances]]\nname = 'a'\n{said}").oc_instances
    assert (agent.is_openclaw, agent.is_program) == (openclaw, program)


@pytest.mark.parametrize("mqtt", ["", "username = 'beta'"])
def test_a_checked_hive_knows_a_node_by_its_name(mqtt: str) -> None:
    toml = f"[node]\nid = 'beta'\n[mqtt]\nsenders = 'checked'\n{mqtt}"
    assert load(toml).checked
    assert load("[node]\nid = 'beta'\n[mqtt]\nusername = 'other'").mqtt.username == "other"


def test_a_value_is_written_as_toml() -> None:
    written = {(): "[]", ("a",): '"a"', ("a", "b"): '["a", "b"]', Path("/x"): '"/x"', "é": '"é"'}
    assert {value: hive.toml_value(value) for value in written} == written
    assert [hive.toml_value(one) for one in (True, 5, 1.5, 'a"\x7f')] == [
        *("true", "5", "1.5", r'"a\"\u007f"'),
    ]


def test_help_and_origin_stand_in_a_column() -> None:
    example = example_config({"mqtt": {"port": 7}, "oc_instances": [{"name": "a"}, {"name": "b"}]})
    for key, about in {
        "# interval = 5.0": "seconds between heartbeats",
        "port = 7": "its port, if not 1883 (8883 is usual with TLS)",
        'name = "b"': "its name; messages can be sent to it as to a node",
    }.items():
        assert f"{key:38}  # {about}" in example.splitlines()
    shown = effective_config(load("mqtt.port = 7")).splitlines()
    assert f"{'port = 7':40} # hive.toml" in shown
    assert "# username is not set".ljust(40) in shown


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mqtt.port", 8883),
        ("mqtt.cluster", ["b.lan"]),
        ("broker.listen", "127.0.0.1:1883"),
        ("oc_instances.port", 18789),
        ("oc_instances.hook_url", "http://127.0.0.1:18789/hooks/wake"),
        ("handlers.timeout", 120.0),
        ("schedule.every", "5m"),
        ("schedule.at", "07:30"),
        ("schedule.jitter", "30s"),
    ],
)
def test_the_example_shows_what_is_usual(key: str, value: object) -> None:
    declared = hive.setting_of(key)
    assert declared.example == value
    assert f"# {declared.name} = {json.dumps(value)} " in example_config()
