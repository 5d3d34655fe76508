"""The documentation says what is so: its commands are understood by the programs, its files, links and headings exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.command_lines import KNOWN, REPOSITORY, RefusedError, check, commands_in

PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "recipes").glob("*/README.md")])
SHELL = ("bash", "sh", "")
_FENCE = re.compile(r"(?:<!-- needs data: (?P<needs>.+?) -->\s*\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^ *```$", re.M | re.S)
_STARTS = {"python", "bash", "torchrun", ".venv/bin/python", *(name.split()[0] for name in KNOWN)}


def named(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def shell_blocks(text: str) -> list[tuple[list[list[str]], bool]]:
    """Commands of each block of shell in a page, and whether the page says that they need data."""
    found = []
    for match in _FENCE.finditer(text):
        if match["language"] in SHELL:
            commands = commands_in(match["body"]) if match["language"] or _begins_with_a_command(match["body"]) else []
            if commands:
                found.append((commands, match["needs"] is not None))
    return found


def _begins_with_a_command(body: str) -> bool:
    lines = [line.strip().removeprefix("$ ") for line in body.splitlines()]
    first = next((line for line in lines if line and not line.startswith("#")), "")
    words = re.sub(r"^(\w+=\S*;? +)+", "", first).split()
    return bool(words) and words[0] in _STARTS


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_of_a_page_is_understood_by_its_program(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # pages are for machines with a GPU as well
    for commands, needs_data in shell_blocks(page.read_text(encoding="utf-8")):
        for words in commands:
            try:
                check(words, arguments=not needs_data)
            except RefusedError as error:
                pytest.fail(f"{named(page)}: {' '.join(words)}\n{error}")


def test_manifests_that_a_page_makes_again_have_the_names_that_the_folder_recipe_gave_them() -> None:
    given = [words for page in PAGES for commands, _ in shell_blocks(page.read_text(encoding="utf-8")) for words in commands]
    made = {tuple(map(after(words), ("--audio-dir", "--out"))) for words in given if "recipes/folder/label.sh" in words}
    again = [words for words in given if "recipes/folder/prepare_cuts.py" in words and "--overwrite" in words]
    assert again
    for words in again:
        value = after(words)
        assert (value("--audio-dir"), value("--out").removesuffix("/cuts")) in made
        assert value("--split") == Path(value("--audio-dir")).name, "as label.sh names it"


def after(words: list[str]) -> Callable[[str], str]:
    """The value of an option in a command, empty if it is not there."""
    return lambda option: words[words.index(option) + 1] if option in words else ""


def test_what_python_in_a_page_imports_is_there() -> None:
    imported = []
    for page in PAGES:
        for match in _FENCE.finditer(page.read_text(encoding="utf-8")):
            if match["language"] == "python":
                for node in ast.walk(ast.parse(match["body"])):
                    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("k2ssl"):
                        imported += [(named(page), node.module, alias.name) for alias in node.names]
    assert len(imported) >= 7
    assert [each for each in imported if each[2] not in defined_in(each[1])] == []


def defined_in(module: str) -> set[str]:
    """Functions, classes and constants of a module, which is not imported: k2 need not be there."""
    path = REPOSITORY / f"{module.replace('.', '/')}.py"
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{named(page)} links to {target}"
        assert not heading or heading in headings(path), f"{named(page)} links to {target}, which has the headings {sorted(headings(path))}"


def headings(page: Path) -> set[str]:
    """Headings as they are written behind the # of a link."""
    lines = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_named_in_a_page_exist(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for quoted in re.findall(r"`((?:k2ssl|recipes|scripts|tests|docs|\.ci)/[^`\s]+)`", text):
        for name in braces_expanded(quoted):
            if not re.search(r"[*<>$]|\b[A-Z]+\b(?!\.md)|\.\.\.|…", name):
                file, _, test = name.partition("::")
                assert (REPOSITORY / file).exists(), f"{named(page)} names {name}"
                assert not test or f"def {test}(" in (REPOSITORY / file).read_text(encoding="utf-8"), f"{named(page)} names {name}"


def braces_expanded(name: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", name)
    if match is None:
        return [name]
    return [full for part in match[1].split(",") for full in braces_expanded(name[: match.start()] + part + name[match.end() :])]


def test_messages_of_the_troubleshooting_page_are_those_of_programs() -> None:
    sources = "".join(file.read_text(encoding="utf-8") for file in (REPOSITORY / "k2ssl").rglob("*.py"))
    said = re.sub(r'" *\n? *f?"', "", re.sub(r"\n\s*", "", sources))  # texts that go on in the next line are one
    messages = re.findall(r"^> `(.+)`$", (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        for piece in message.split("…"):
            words = piece.strip(" :;,.()")
            assert words in said, f"docs/troubleshooting.md says {message}, no program says {words!r}"


def test_pages_named_anywhere_exist() -> None:
    named_in = {}
    for folder in ("k2ssl", "recipes", "scripts", "docs", ".ci"):
        for file in (REPOSITORY / folder).rglob("*"):
            if file.suffix in (".py", ".sh", ".md", ".toml", "") and file.is_file():
                named_in |= dict.fromkeys(re.findall(r"docs/\w+\.md", file.read_text(encoding="utf-8")), named(file))
    assert len(named_in) > 3
    missing = {page: file for page, file in named_in.items() if not (REPOSITORY / page).is_file()}
    assert not missing


def test_every_program_is_in_some_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (REPOSITORY / "docs").glob("*.md"))
    programs = [
        file.stem for file in (REPOSITORY / "k2ssl" / "bin").glob("*.py") if re.search(r"^def main\(", file.read_text("utf-8"), re.M)
    ]
    assert len(programs) >= 14
    assert [name for name in programs if not re.search(rf"k2ssl\.bin\.{name}\b", text)] == []


def test_commands_are_told_from_what_surrounds_them() -> None:
    text = "$ E=exp python -m a b \\\n    c > d 2>&1  # why\ncat x | bash y.sh --z 'two words' && git clone u; cd v\n\n# no command\n"
    assert commands_in(text) == [
        ["python", "-m", "a", "b", "c"],
        ["cat", "x"],
        ["bash", "y.sh", "--z", "two words"],
        ["git", "clone", "u"],
        ["cd", "v"],
    ]


def test_output_and_other_languages_are_not_read_as_commands() -> None:
    page = "```\nWER  sub\n```\n\n```python\nimport x\n```\n\n```\npython -m k2ssl.bin.score a\n```\n<!-- needs data: b -->\n```bash\ncat b\n```\n"
    assert shell_blocks(page) == [([["python", "-m", "k2ssl.bin.score", "a"]], False), ([["cat", "b"]], True)]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python -m k2ssl.bin.no_such_program --x 1", "there is no program k2ssl.bin.no_such_program"),
        ("python -m k2ssl.bin.program", "has no main"),
        ("python -m k2ssl.bin.average --output a.pt --begin b.pt", "--begin"),
        ("python -m k2ssl.bin.average --end b.pt", "output"),
        (
            "torchrun --nproc-per-node 8 -m k2ssl.bin.pretrain recipes/none/conf/x.toml --output a",
            "there is no file recipes/none/conf/x.toml",
        ),
        ("python -m k2ssl.bin.train_tokenizer --cuts a --kind runes --output b", "runes"),
        ("python recipes/folder/prepare_cuts.py --audio-dir a", "--out"),
        ("python recipes/folder/prepare_cuts.py --audio-dir a --out b --loud", "--loud"),
        ("python scripts/none.py", "there is no file scripts/none.py"),
        ("bash recipes/folder/label.sh --audio-dir a --loudly b", "unknown option --loudly"),
        ("bash recipes/folder/label.sh --audio-dir --dry-run", "--audio-dir needs a value"),
        ("bash recipes/folder/none.sh", "there is no file recipes/folder/none.sh"),
        ("sbatch recipes/none.slurm", "there is no file recipes/none.slurm"),
        ("rm -r exp", "not a command that documentation may name"),
        ("python -c pass", "not a command that documentation may name"),
    ],
)
def test_a_command_that_would_not_do_is_refused(command: str, said: str) -> None:
    (words,) = commands_in(command)
    with pytest.raises(RefusedError, match=re.escape(said)):
        check(words)


def test_a_command_that_would_do_gives_its_settings() -> None:
    (words,) = commands_in("python -m k2ssl.bin.decode step-10.pt step-12.pt --cuts cuts.jsonl.gz --method greedy --output exp/test")
    job = check(words)
    assert (job.checkpoints, job.output) == (("step-10.pt", "step-12.pt"), "exp/test")


def test_what_a_file_to_come_may_say_is_not_missed_and_all_else_is_looked_at() -> None:
    (words,) = commands_in("python -m k2ssl.bin.decode best.json step-10.pt --cuts cuts.jsonl.gz --output exp/test")
    assert check(words) is None
    with pytest.raises(RefusedError, match="--out-put"):
        check([*words, "--out-put", "x"])
