"""Generate the committed stubs in rollmesh/api from protos/.

`python scripts/gen_protos.py` writes them; `--check` writes nothing and fails where what is
committed differs from what the pinned generators make.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
API = ROOT / "rollmesh" / "api"
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")


def generate(target: Path) -> None:
    """Write all stubs below `target`, as the tree that is imported as `rollmesh.api`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for proto in sorted(PROTOS.rglob("*.proto")):
            plugins = [f"--python_out={out}", f"--mypy_out=quiet:{out}"]
            if proto.stem.endswith("_service"):
                # Only a proto with a service gets a _pb2_grpc file: the others would be empty.
                plugins += [f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}"]
            well_known = Path(protoc.__file__).parent / "_proto"
            # The plugins of this environment, whether or not it is on the PATH.
            bin_folder = Path(sys.executable).parent
            plugins += [f"--plugin={name}={bin_folder / name}" for name in PLUGINS]
            arguments = ["protoc", f"-I{PROTOS}", f"-I{well_known}", *plugins, str(proto)]
            if protoc.main(arguments) != 0:
                sys.exit(f"protoc failed on {proto}")
        generated = out / "rollmesh" / "api"
        for package in [generated, *(path for path in generated.rglob("*") if path.is_dir())]:
            (package / "__init__.py").touch()
        (generated / "__init__.py").write_text('"""Generated from protos/. Never edited."""\n')
        shutil.copytree(generated, target, dirs_exist_ok=True)


def differences(left: Path, right: Path) -> list[str]:
    """Relative paths of the files that only one tree has, or that differ."""

    def files(root: Path) -> set[Path]:
        return {
            path.relative_to(root)
            for path in root.rglob("*")
            if path.is_file() and path.suffix in {".py", ".pyi"}
        }

    both = files(left) & files(right)
    _, mismatch, errors = filecmp.cmpfiles(left, right, [str(path) for path in both], shallow=False)
    return sorted([*mismatch, *errors, *map(str, files(left) ^ files(right))])


def main() -> None:
    """Generate, or check that nothing would change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail on a difference, write nothing")
    if parser.parse_args().check:
        with tempfile.TemporaryDirectory() as folder:
            fresh = Path(folder) / "api"
            generate(fresh)
            if stale := differences(fresh, API):
                sys.exit("stale stubs, run `make proto`:\n  " + "\n  ".join(stale))
        print("stubs are up to date")
        return
    with tempfile.TemporaryDirectory() as folder:
        # Beside what is there until all of it is made: a mistake in a proto breaks nothing.
        fresh = Path(folder) / "api"
        generate(fresh)
        shutil.rmtree(API, ignore_errors=True)
        shutil.copytree(fresh, API)


if __name__ == "__main__":
    main()
