"""What the README types and shows, and whether that is what came."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import harness
import reference

README = harness.ROOT / "README.md"
LAB = "A lab in one page"  # the chapter that is typed on machines of a LAN
CHAT = ">"  # where a line is typed at the prompt of `chat`


@dataclass(frozen=True)
class Typed:
    """A command, the machine where it is typed (CHAT: a line of a conversation), and what is shown then."""

    machine: str
    command: str
    shown: str = ""


@dataclass
class Text:
    """What people wrote of the README: what is made for it is left out."""

    blocks: dict[str, list[str]] = field(default_factory=dict)  # by their language
    prose: str = ""


def written() -> str:
    return reference.in_readme(README.read_text("utf-8"), dict.fromkeys(reference.BLOCKS, str))


def parts_of(text: str) -> Text:
    parts = Text()
    for number, part in enumerate(re.split(r"^```", text, flags=re.MULTILINE)):
        if number % 2:
            language, _, block = part.partition("\n")
            parts.blocks.setdefault(language, []).append(block)
        else:
            parts.prose += part
    return parts


def chapter_of(text: str, title: str) -> str:
    chapter = re.split(rf"^## {re.escape(title)}$", text, flags=re.MULTILINE)[1]
    return re.split(r"^## ", chapter, flags=re.MULTILINE)[0]


def without_chapter(text: str, title: str) -> str:
    return text.replace(chapter_of(text, title), "")


def typed_in_block(block: str) -> list[Typed]:
    """Lines that begin with `$`, with or without a machine's name, or with `>`; where none does, all lines."""
    typed: list[Typed] = []
    for line in block.splitlines():
        if found := re.fullmatch(r"(?:(\w*)\$|>) (.+)", line):
            machine = CHAT if found[1] is None else found[1]
            typed.append(Typed(machine, found[2]))
        elif typed:
            last = typed.pop()
            typed.append(Typed(last.machine, last.command, f"{last.shown}{line}\n"))
    if not typed:
        lines = (re.sub(r" +# .*", "", line) for line in block.splitlines())
        typed = [Typed("", line) for line in lines if line]
    return typed


def sessions_in(text: str) -> list[list[Typed]]:
    """What is typed in each of the blocks of a text."""
    return [typed_in_block(block) for block in parts_of(text).blocks.get("", [])]


def inline_code(text: str) -> Iterator[str]:
    """What stands between backticks in prose, on one line each."""
    for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", parts_of(text).prose):
        yield " ".join(found.split())


def masked(text: str) -> str:
    """Without what differs each time: ids, fingerprints, numbers, and how wide a table is."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r", ""))
    text = re.sub(r"\b[0-9a-f]{6}\b", "ID", text)
    text = re.sub(r"(?<=\()[a-z2-7]{8}(?=\))|(?<=closed mesh )[a-z2-7]{8}\b", "MESH", text)
    text = re.sub(r"\d+([.,:]\d+)*", "0", text)
    text = re.sub(r"(?<=\d)%?s?\b|(?<=\d) (ms|s|kB|MB|GB)\b", "", text)
    text = re.sub(r"\b(healthy|busy|overloaded)\b", "STATE", text)
    text = re.sub(r"\b0 workers?\b", "0 workers", text)
    text = re.sub(r"(?<=Response: ).*", "ANSWER", text)
    return "\n".join(re.sub(r"\s+", " ", line).strip() for line in text.strip().splitlines())


def looks_like(shown: str, transcript: str) -> bool:
    """Whether what was shown is what the transcript says, where `...` stands for whatever there is."""
    pattern = re.escape(masked(transcript)).replace(re.escape("..."), ".*")
    return re.fullmatch(pattern, masked(shown), re.DOTALL) is not None
