#!/usr/bin/env python3
"""The topics of `hive help` as man pages, hive-TOPIC(7), into the folder that is named.

    python3 contrib/man.py FOLDER

Reads as much Markdown as contrib/help/ has: a title, headings, paragraphs, lists, and blocks of
code and tables, which stay as they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

HELP = Path(__file__).resolve().parent / "help"
ORIGIN = '.\\" From hive, which also shows it: hive help {topic}'  # by this uninstall knows it


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
        ORIGIN.format(topic=topic),
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


def main() -> None:
    folder = Path(sys.argv[1])
    for file in sorted(HELP.glob("*.md")):
        made = page(file.stem, file.read_text("utf-8"))
        (folder / f"hive-{file.stem}.7").write_text(made, "utf-8")


if __name__ == "__main__":
    main()
