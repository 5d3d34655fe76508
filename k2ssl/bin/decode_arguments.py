"""Command lines that begin with the names of files, as people type them."""

from __future__ import annotations

from collections.abc import Sequence


def with_names(argv: Sequence[str], first: str, rest: str) -> list[str]:
    """The command line with its leading arguments made options: `A B C --x 1` to `--FIRST A --REST B C --x 1`.

    A leading argument that ends in .toml or .json stays in front, as a file of settings. `-` alone is a name, of standard input.

    Args:
        argv: the command line.
        first: option that gets the first name.
        rest: option that gets all others; it may be `first` again.
    """
    begin = next((i for i, argument in enumerate(argv) if argument.startswith("-") and argument != "-"), len(argv))
    settings = [argument for argument in argv[:begin] if argument.endswith((".toml", ".json"))]
    names = [argument for argument in argv[:begin] if not argument.endswith((".toml", ".json"))]
    result = settings
    if first == rest:
        result = [*result, *([f"--{first}", *names] if names else [])]
    else:
        result = [*result, *([f"--{first}", names[0]] if names else []), *([f"--{rest}", *names[1:]] if names[1:] else [])]
    return [*result, *argv[begin:]]
