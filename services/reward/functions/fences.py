"""Code in an answer: models write it between fences of three backticks."""

from __future__ import annotations


def fenced(completion: str) -> str | None:
    """The last fenced block of `completion`; one that was cut off counts. None: there is none."""
    last: list[str] | None = None
    block: list[str] | None = None
    for line in completion.splitlines(keepends=True):
        mark = line.strip()
        if block is None:
            # Perhaps with a language; text that ends in backticks is code within a sentence.
            if mark.startswith("```") and "`" not in mark[3:]:
                block = []
        elif mark == "```":
            last, block = block, None
        else:
            block.append(line)
    found = last if block is None else block
    return None if found is None else "".join(found)
