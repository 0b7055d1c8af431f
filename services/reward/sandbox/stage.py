"""Runs first in the sandbox: bounds itself, takes in the program, and becomes it.

Its text is handed to the sandboxed Python by `-c`, with the number of a socket to the service.
It says "r" there, is told what to run, and says "b" when it begins; so a program never runs whose
service has died meanwhile, and whatever fails before is no doing of the program's. Nothing here
is secret: the program runs in the same process.
"""

# ruff: noqa: PLC0415, PTH109, PTH123 - imports take time, and the program inherits futures


def _taken_in() -> str:
    """The main file's name, when all files are written and all limits set."""
    import marshal
    import os
    import resource
    import sys

    # Else its signals to its group would reach what made the sandbox.
    os.setsid()
    socket = int(sys.argv[1])
    os.write(socket, b"r")
    with open(socket, "rb", closefd=False) as order:
        # From the service alone, and whole: a cut-off one is an EOFError.
        files, argv, limits = marshal.load(order)  # noqa: S302 - as it is said above
    for name, content in files.items():
        with open(name, "xb") as file:
            file.write(content)
    for name, bound in limits.items():
        resource.setrlimit(getattr(resource, name), (bound, bound))
    sys.argv = argv
    sys.path.insert(0, os.getcwd())
    os.write(socket, b"b")
    os.close(socket)
    main: str = argv[0]
    return main


def _text_of(main: str) -> bytes:
    with open(main, "rb") as file:
        return file.read()


def _out_of_memory() -> None:
    import os

    os.write(2, b"MemoryError\n")
    os._exit(121)  # OUT_OF_MEMORY in limits.py


__file__ = _taken_in()
try:
    exec(compile(_text_of(__file__), __file__, "exec"))  # noqa: S102 - what a sandbox is for
except MemoryError:
    _out_of_memory()
