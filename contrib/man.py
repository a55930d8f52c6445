#!/usr/bin/env python3
"""hive(1), made from the parser, and the topics of `hive help` as hive-TOPIC(7).

    python3 contrib/man.py FOLDER

Of the topics it reads as much Markdown as contrib/help/ has: a title, headings, paragraphs,
lists, and blocks of code and tables, which stay as they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

HELP = Path(__file__).resolve().parent / "help"
ORIGIN = '.\\" From hive, which also shows it: hive {shows}'  # by this uninstall knows it

sys.path.insert(0, str(HELP.parent.parent))
sys.dont_write_bytecode = True  # who installs may not be whose checkout it is
import hive  # noqa: E402


def escaped(text: str) -> str:
    """For roff, that no dash, quote or dot of ours means anything to it."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\`").replace("'", "\\(aq")
    return re.sub(r"(?m)^\.", r"\\&.", text.replace("…", "..."))


def inline(text: str) -> str:
    """Of a paragraph: `code` and **words** in bold, links by their words."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(text.split()))
    parts = re.split(r"(`[^`]+`|\*\*.+?\*\*)", text)
    return "".join(
        f"\\fB{escaped(part.strip('`*'))}\\fP" if number % 2 else escaped(part)
        for number, part in enumerate(parts)
    )


def blocks(source: str) -> Iterator[str]:
    """What is separated by empty lines; code as one; each item of a list by itself."""
    for block in re.findall(r"(?ms)^```.*?^```$|(?:^[^\n]+\n)+", source):
        list_of = not block.startswith("```") and re.match(r"- |\d+\. ", block)
        yield from re.split(r"\n(?=- |\d+\. )", block) if list_of else [block]


def page(topic: str, source: str) -> str:
    """One man page."""
    title, body = source.split("\n", 1)
    about = title.partition(": ")[2]
    made = [
        ORIGIN.format(shows=f"help {topic}"),
        f'.TH HIVE\\-{topic.upper()} 7 "" hive "hive help"',
        f".SH NAME\nhive\\-{topic} \\- {inline(about)}",
        ".SH DESCRIPTION",
    ]
    for block in blocks(body):
        paragraph = "" if made[-1].startswith(".SH") else ".PP\n"
        if block.startswith("## "):
            made.append(f".SH {inline(block[3:].upper())}")
        elif block.startswith(("```", "|", "    ")):
            lines = re.sub(r"(?m)^```.*\n?", "", block)
            made.append(f"{paragraph}.nf\n{escaped(lines.rstrip())}\n.fi")
        elif item := re.match(r"(-|\d+\.) +", block):
            bullet = "\\(bu 2" if item[1] == "-" else f"{item[1]} 3"
            made.append(f".IP {bullet}\n{inline(block[item.end() :])}")
        else:
            made.append(f"{paragraph}{inline(block)}")
    return "\n".join(made) + "\n"


def option(flags: Iterable[str], how: Mapping[str, Any]) -> str:
    """One option or argument, and what it is for."""
    action = hive.parser_type()(add_help=False).add_argument(*flags, **how)
    value = action.metavar or "|".join(action.choices or ()) or action.dest.upper()
    takes = "" if action.nargs == 0 else f"\\fI{escaped(str(value))}\\fP"
    names = ", ".join(f"\\fB{escaped(flag)}\\fP" for flag in action.option_strings)
    return f".TP\n{names}{' ' if names and takes else ''}{takes}\n{inline(action.help or '')}"


def command(name: str, one: hive.Command) -> str:
    """One command, with its options and examples."""
    made = [f".SS hive {name}", inline(hive.docstring(one.run))]
    made += [option(*each) for each in one.options]
    if one.examples:
        examples = one.examples.replace("hive.py ", "hive ")
        made.append(f".PP\n.RS\n.nf\n{escaped(examples)}\n.fi\n.RE")
    return "\n".join(made)


def first_page() -> str:
    """hive(1)."""
    title, *about = (hive.__doc__ or "").strip().split("\n\n")
    codes = re.findall(r"(?m)^\| (\d+) +\| (.*?) *\|$", (HELP / "protocol.md").read_text("utf-8"))
    topics = [f"\\fBhive\\-{topic}\\fP(7)" for topic in hive.TOPICS]
    made = [
        ORIGIN.format(shows="--help"),
        f'.TH HIVE 1 "" "hive {hive.__version__}" hive',
        f".SH NAME\nhive \\- {inline(title.removeprefix('hive: ').rstrip('.'))}",
        ".SH SYNOPSIS\n.B hive\n.I COMMAND\n[\\fIOPTION\\fP ...]",
        ".SH DESCRIPTION",
        "\n.PP\n".join(map(inline, about)),
        ".SH COMMANDS",
        *(command(name, one) for name, one in hive.COMMANDS.items()),
        ".SH OPTIONS\nOf every command, before or after its name:",
        *(option(*each) for each in hive.COMMON_OPTIONS),
        ".SH EXIT STATUS",
        *(f".TP\n{code}\n{inline(meaning)}" for code, meaning in codes),
        ".SH ENVIRONMENT",
        ".TP\n.B HIVE_CONFIG\nthe hive.toml to read",
        ".TP\n.B HIVE_NODE\nwhich node is meant, where several run",
        ".TP\n.B NO_COLOR\nno colours, whatever it is",
        ".SH FILES",
        *(
            f".TP\n.I {escaped(place)}\nread where no other is named"
            for place in hive.CONFIG_PLACES
        ),
        f".SH SEE ALSO\n{', '.join(topics)}",
    ]
    return "\n".join(made) + "\n"


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "hive.1").write_text(first_page(), "utf-8")
    for file in sorted(HELP.glob("*.md")):
        made = page(file.stem, file.read_text("utf-8"))
        (folder / f"hive-{file.stem}.7").write_text(made, "utf-8")


if __name__ == "__main__":
    main()
