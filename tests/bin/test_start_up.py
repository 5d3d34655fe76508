"""No program imports for its --help, or for a refusal of its settings, what only its work needs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from k2ssl import bin as programs

# Each takes some tenths of a second; what `import torch` itself brings is not listed.
SLOW = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "lhotse",
    "matplotlib",
    "pandas",
    "scipy",
    "sentencepiece",
    "soundfile",
    "sympy",
    "tensorboard",
    "torchaudio",
    "triton",
)
WITHOUT_TORCH = ("doctor", "report", "score")

SHOW_HELP = """
import contextlib, importlib, io, json, sys
names, slow = json.loads(sys.argv[1])
found = {}
for name in names:
    module, text = importlib.import_module(f"k2ssl.bin.{name}"), io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            module.main(["--help"])
    except SystemExit as end:
        found[name] = [end.code, f"k2ssl.bin.{name}" in text.getvalue(), [module for module in slow if module in sys.modules]]
print(json.dumps(found))
"""


def after_help(names: list[str], slow: tuple[str, ...]) -> dict[str, list[object]]:
    """[exit status, whether the text names the program, modules of `slow` that were imported] of each program, in one new process."""
    command = [sys.executable, "-c", SHOW_HELP, json.dumps([names, slow])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_no_program_imports_for_its_help_what_only_its_work_needs() -> None:
    """One process shows the help of all; the first program that imports a module is the first that names it."""
    files = Path(programs.__file__).parent.glob("*.py")
    names = sorted(file.stem for file in files if "\ndef main(" in file.read_text(encoding="utf-8"))
    assert len(names) >= 17 and {"pretrain", "finetune", "decode", "transcribe"} < set(names)
    for name in SLOW[:4]:
        assert importlib.util.find_spec(name) is not None, f"torch has {name} no more: see where it went"
    assert after_help(names, SLOW) == {name: [0, True, []] for name in names}


def test_some_programs_show_their_help_without_torch() -> None:
    assert after_help([*WITHOUT_TORCH], ("torch", *SLOW)) == {name: [0, True, []] for name in WITHOUT_TORCH}
