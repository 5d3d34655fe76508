"""Command lines that begin with the names of files, as people type them."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def is_settings(name: str) -> bool:
    """Whether a file is one of settings, by its name."""
    return name.endswith((".toml", ".json"))


def with_names(argv: Sequence[str], first: str, rest: str, settings: Callable[[str], bool] = is_settings) -> list[str]:
    """The command line with its leading arguments made options: `A B C --x 1` to `--FIRST A --REST B C --x 1`.

    A leading argument that is a file of settings stays in front. `-` alone is a name, of standard input.

    Args:
        argv: the command line.
        first: option that gets the first name.
        rest: option that gets all others; it may be `first` again.
        settings: tells which arguments are files of settings.
    """
    begin = next((i for i, argument in enumerate(argv) if argument.startswith("-") and argument != "-"), len(argv))
    result = [argument for argument in argv[:begin] if settings(argument)]
    names = [argument for argument in argv[:begin] if not settings(argument)]
    if first == rest:
        result = [*result, *([f"--{first}", *names] if names else [])]
    else:
        result = [*result, *([f"--{first}", names[0]] if names else []), *([f"--{rest}", *names[1:]] if names[1:] else [])]
    return [*result, *argv[begin:]]
