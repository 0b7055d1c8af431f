"""Writes docs/tinker-compatibility.md: `python -m tests.mesh.sdk --write`."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import yaml

from services.local.config import LocalConfig
from services.local.mesh import mesh
from tests.mesh.sdk.page import failures, page
from tests.mesh.sdk.versions import ROOT, runs

MANY_ADAPTERS = 4096
"""Each exercise makes models of its own, which stay for a day."""
PAGE = ROOT / "docs" / "tinker-compatibility.md"


async def main(*, write: bool) -> int:
    """Say what differs, or write it down; 1: something failed."""
    values = yaml.safe_load((ROOT / "examples" / "local.yaml").read_text())
    values["gateway"] = {}
    values["trainers"][0]["max_adapters"] = MANY_ADAPTERS
    with tempfile.TemporaryDirectory() as folder:
        config = LocalConfig.parse(values, source="examples/local.yaml")
        async with mesh(config, Path(folder)) as running:
            done = await runs(running, Path(folder))
    text = page(done)
    wrong = [failure for run in done for failure in failures(run)]
    print("\n".join(wrong))
    if write and not wrong:
        PAGE.write_text(text)
    same = PAGE.exists() and PAGE.read_text() == text
    print(f"{PAGE.relative_to(ROOT)} is {'up to date' if same else 'not what the code does'}")
    return 0 if same and not wrong else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the page anew")
    raise SystemExit(asyncio.run(main(write=parser.parse_args().write)))
