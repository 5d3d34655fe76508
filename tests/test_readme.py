"""README.md says what is so: its example runs, its files and commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_as_printed() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    checks = "\nassert output.loss.isfinite() and tuple(frames.shape) == (2, 99, 96)\n"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", block + checks], env=environment, capture_output=True, text=True, timeout=120, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\.\d\d nats per hidden frame\n", done.stdout)


def test_the_commands_of_the_readme_exist() -> None:
    commands = re.findall(r"^bash (\S+)", README, flags=re.MULTILINE)
    assert commands[:2] == ["recipes/quickstart/run.sh", "scripts/test.sh"]
    assert all((REPOSITORY / command).is_file() for command in commands)


def test_the_file_map_names_every_room_that_exists_and_no_other() -> None:
    (file_map,) = re.findall(r"^```\nk2ssl/\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"^  (\w+)/ ", file_map, flags=re.MULTILINE))
    assert named == {path.parent.name for path in (REPOSITORY / "k2ssl").glob("*/__init__.py")}


def test_the_file_map_names_every_file_beside_the_rooms() -> None:
    (file_map,) = re.findall(r"^```\nk2ssl/\n(.*?)^recipes/", README, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"^  (\w+\.py) ", file_map, flags=re.MULTILINE))
    assert named == {path.name for path in (REPOSITORY / "k2ssl").glob("*.py")} - {"__init__.py"}


def test_links_to_files_lead_somewhere() -> None:
    for text_file in [REPOSITORY / "README.md", *(REPOSITORY / "recipes").rglob("README.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text_file.read_text(encoding="utf-8")):
            assert (text_file.parent / target).exists(), f"{text_file} links to {target}"
