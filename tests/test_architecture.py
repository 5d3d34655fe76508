"""The rules that keep the house: who imports whom, nothing random behind the back, no corpus, no pickles.

Each rule is a function from parsed source to violations, so that the checker is itself tested on small sources that break the rules.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "k2ssl"

ROOMS = {"nn", "losses", "models", "optim", "data", "labelling", "train", "decode", "lattice", "report", "bin"}
LIBRARY_FILES = {"structure", "config", "batch", "distributed", "atomic_file", "file_hash", "gpu_kernels", "first_derivative"}

# What of ours each room may import, besides itself. `a.b` allows one module of a room.
MAY_IMPORT: dict[str, set[str]] = {
    "structure": set(),
    "atomic_file": set(),
    "file_hash": set(),
    "config": {"structure"},
    "batch": set(),
    "distributed": set(),
    "gpu_kernels": set(),
    "first_derivative": set(),
    "nn": {"gpu_kernels", "first_derivative"},
    "optim": set(),
    "lattice": set(),
    "losses": {"gpu_kernels", "first_derivative"},
    "models": {"nn", "losses", "batch", "structure", "atomic_file"},
    "data": {"batch", "structure", "atomic_file", "file_hash"},
    "labelling": {"data", "batch", "distributed", "nn", "structure", "atomic_file"},
    "train": {"optim", "distributed", "batch", "nn.schedule", "atomic_file"},
    "decode": {"batch"},
    "report": {"structure", "atomic_file", "file_hash", "train.ledger", "train.json_lines"},
    "bin": ROOMS | LIBRARY_FILES,
}
# What only a function may import, when a backend that needs k2 is asked for; also module by module.
MAY_IMPORT_LAZILY: dict[str, set[str]] = {"losses": {"lattice"}, "models.k2": {"lattice"}}

# Third-party packages that only some rooms may import, and rooms that may import nothing else.
ONLY_FROM: dict[str, set[str]] = {
    "tyro": {"config"},
    "k2": {"lattice"},
    "triton": {"losses", "nn"},
    "lhotse": {"data", "labelling", "bin"},
    "sentencepiece": {"data"},
    "kaldialign": {"decode"},
    "sklearn": set(),
    "matplotlib": {"report"},
    "espeakng_loader": set(),
    "pytest": set(),
}
TRIES_ALL = "bin.doctor_checks"  # finds out which packages can be imported, so it may try each of them
# Numpy and the standard library come with torch, they are not listed.
ONLY_THESE: dict[str, set[str]] = {
    "losses": {"torch", "numpy", "triton"},
    "decode": {"torch", "numpy", "kaldialign", "kenlm", "flashlight"},
}

STATEFUL_RANDOM = re.compile(
    r"^(random|numpy\.random|np\.random)\.(?!Random$|SystemRandom$|default_rng$|Generator$|SeedSequence$|PCG64$)\w+$"
)

CORPORA = re.compile(
    r"(?<![a-z0-9])(libri[-_ ]?speech|libri[-_ ]?light|libri[-_ ]?vox|libri[-_ ]?tts|mls|an[-_]?4|giga[-_ ]?speech2?|wenet[-_ ]?speech"
    r"|ted[-_ ]?lium[23]?|common[-_ ]?voice|vox[-_ ]?populi|vox[-_ ]?celeb|ai[-_ ]?shell|switchboard|swbd|wsj|timit|ami|spgi[-_ ]?speech"
    r"|people'?s[-_ ]speech|fleurs|musan|emilia|vctk|ljspeech)(?![a-z0-9])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Import:
    """One import statement: the dotted module, where it stands, and whether inside a function."""

    module: str
    line: int
    lazy: bool


@dataclass(frozen=True)
class Module:
    """A source file of ours under its dotted name, without the leading `k2ssl.`."""

    name: str
    source: str
    is_package: bool = False

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)


def imports_of(module: Module) -> Iterator[Import]:
    """All imports with relative ones resolved; `from k2ssl import nn` and `from k2ssl.nn import schedule` name what they fetch."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            yield from (Import(f"{base}.{alias.name}", node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and _dotted(node.func) in ("__import__", "importlib.import_module", "import_module"):
            argument = node.args[0] if node.args else None
            known = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            yield Import(argument.value if known else "(computed)", node.lineno, lazy)  # type: ignore[union-attr]
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    yield from visit(module.tree, lazy=False)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = ["k2ssl", *module.name.split(".")]
    parts = parts[: len(parts) - node.level + (1 if module.is_package else 0)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _within(name: str, allowed: set[str]) -> bool:
    return any(name == item or name.startswith(f"{item}.") for item in allowed)


def forbidden_imports_of_ours(module: Module) -> Iterator[str]:
    """Imports that the table does not allow. `k2ssl` itself (its version) may be imported by all."""
    if module.room not in MAY_IMPORT:
        yield f"{module.name}: no such room; rooms are {', '.join(sorted(MAY_IMPORT))}"
        return
    for found in imports_of(module):
        if found.module.split(".")[0] != "k2ssl" or found.module in ("k2ssl", "k2ssl.__version__"):
            continue
        target = found.module.removeprefix("k2ssl.")
        allowed = MAY_IMPORT[module.room] | {module.room}
        if found.lazy:
            allowed |= {room for owner, rooms in MAY_IMPORT_LAZILY.items() if _within(module.name, {owner}) for room in rooms}
        if not _within(target, allowed):
            where = " inside a function" if found.lazy else ""
            yield f"{module.name}:{found.line} imports {found.module}{where}; {module.room} may import {sorted(allowed)}"


def forbidden_third_parties(module: Module) -> Iterator[str]:
    """Imports of packages that belong to other rooms."""
    if module.name == TRIES_ALL:
        return
    for found in imports_of(module):
        package = found.module.split(".")[0]
        if package == "(computed)":
            yield f"{module.name}:{found.line} imports a module whose name is computed, which no rule can check"
        elif module.room not in ONLY_FROM.get(package, {module.room}):
            yield f"{module.name}:{found.line} imports {package}; only {sorted(ONLY_FROM[package]) or 'tests'} may"
        elif module.room in ONLY_THESE and not _is_standard_or_ours(package) and package not in ONLY_THESE[module.room]:
            yield f"{module.name}:{found.line} imports {package}; {module.room} may import {sorted(ONLY_THESE[module.room])}"


def _is_standard_or_ours(package: str) -> bool:
    return package == "k2ssl" or package in sys.stdlib_module_names


def global_random_state(module: Module) -> Iterator[str]:
    """Calls and imports of the module-level functions of `random` and `numpy.random`; instances are fine."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and STATEFUL_RANDOM.match(_dotted(node.func)):
            yield f"{module.name}:{node.lineno} calls {_dotted(node.func)}, which draws from a global state"
    for found in imports_of(module):
        if STATEFUL_RANDOM.match(found.module):
            yield f"{module.name}:{found.line} imports {found.module}, which draws from a global state"


def unsafe_loads(module: Module) -> Iterator[str]:
    """`torch.load` without a literal `weights_only=True`, and pickle by name."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and _dotted(node.func) == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True]
            if not safe:
                yield f"{module.name}:{node.lineno} calls torch.load without weights_only=True"
    for found in imports_of(module):
        if found.module == "torch.load" or found.module.split(".")[0] in ("pickle", "cloudpickle", "dill"):
            yield f"{module.name}:{found.line} imports {found.module}; load with torch.load(..., weights_only=True)"


def corpus_names(module: Module) -> Iterator[str]:
    """Names of corpora anywhere: file name, identifiers, strings, docstrings, comments."""
    if match := CORPORA.search(module.name):
        yield f"{module.name}: the file's name holds the corpus name {match.group()}"
    for token in tokenize.generate_tokens(io.StringIO(module.source).readline):
        for match in CORPORA.finditer(token.string):
            yield f"{module.name}:{token.start[0] + token.string[: match.start()].count(chr(10))} names the corpus {match.group()}"


RULES: list[Callable[[Module], Iterator[str]]] = [
    forbidden_imports_of_ours,
    forbidden_third_parties,
    global_random_state,
    unsafe_loads,
    corpus_names,
]


def modules() -> list[Module]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(name, path.read_text(encoding="utf-8"), is_package=parts[-1] == "__init__"))
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Callable[[Module], Iterator[str]]) -> None:
    assert len(modules()) > 10
    violations = [violation for module in modules() for violation in rule(module)]
    assert not violations, "\n".join(violations)


def test_the_package_itself_imports_nothing() -> None:
    assert not list(imports_of(Module("", (PACKAGE / "__init__.py").read_text(encoding="utf-8"), is_package=True)))


def test_every_folder_is_a_room_and_a_package() -> None:
    folders = {path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {folder.name for folder in folders} <= ROOMS
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_no_file_is_longer_than_400_lines() -> None:
    longest = {module.name: module.source.count("\n") for module in modules() if module.source.count("\n") > 400}
    assert not longest, f"files over 400 lines: {longest}"


BAD_IMPORTS = {
    "nn.linear": "from k2ssl.batch import PretrainBatch",
    "nn.norm": "import k2ssl.models.hubert",
    "optim.adam": "from k2ssl.nn import schedule",
    "losses.ctc": "from k2ssl.lattice import graphs",  # at the top: only lazily
    "losses.other": "def f():\n    from k2ssl.models import hubert",
    "models.hubert": "from k2ssl.train import trainer",
    "models.asr": "def f():\n    from k2ssl.lattice import graphs",  # only models.k2 may
    "models.k2": "import k2ssl.lattice.graphs",
    "data.cuts": "from ..models import hubert",
    "labelling.kmeans": "from k2ssl.models.hubert import HubertModel",
    "train.trainer": "from k2ssl.nn.norm import BiasNorm",  # nn.schedule only
    "train.metrics": "from k2ssl import data",
    "decode.ctc": "from k2ssl.models import asr",
    "lattice.graphs": "from k2ssl import batch",
    "models.zipformer": "from k2ssl.config import load",
    "report.card": "class A:\n    def f(self):\n        import k2ssl.config",
    "report.chain": "from k2ssl.train.trainer import Trainer",  # the ledger and its lines only
    "batch": "from . import nn",
    "nn.__init__": "import importlib\nimportlib.import_module('k2ssl.models')",
    "registry": "import torch",  # not a room
}
GOOD_IMPORTS = {
    "nn.linear": "from k2ssl.nn.schedule import Clock\nfrom . import norm\nfrom k2ssl import __version__",
    "losses.ctc": "def f():\n    from k2ssl.lattice import graphs",
    "models.hubert": "from k2ssl.batch import LossOutput\nfrom ..nn.schedule import Clock\nfrom k2ssl.structure import to_dict",
    "models.k2": "def f():\n    import k2ssl.lattice.graphs",
    "models.k2.graphs": "def f():\n    import k2ssl.lattice.graphs",
    "train.trainer": "from k2ssl.nn.schedule import Clock\nimport k2ssl.nn.schedule\nfrom k2ssl.optim import build",
    "report.card": "from k2ssl.train.ledger import total\nfrom k2ssl.structure import to_dict",
    "bin.train": "from k2ssl.config import load\nfrom k2ssl.models import hubert\nfrom k2ssl.data import cuts",
}


@pytest.mark.parametrize("name", BAD_IMPORTS)
def test_a_forbidden_import_of_ours_is_found(name: str) -> None:
    assert list(forbidden_imports_of_ours(Module(name, BAD_IMPORTS[name])))


@pytest.mark.parametrize("name", GOOD_IMPORTS)
def test_an_allowed_import_of_ours_is_let_through(name: str) -> None:
    assert not list(forbidden_imports_of_ours(Module(name, GOOD_IMPORTS[name])))


def test_relative_imports_of_a_package_file_are_resolved_against_its_own_folder() -> None:
    assert [found.module for found in imports_of(Module("nn", "from .norm import BiasNorm", is_package=True))] == ["k2ssl.nn.norm.BiasNorm"]
    assert [found.module for found in imports_of(Module("nn.a", "from ..optim import x"))] == ["k2ssl.optim.x"]


@pytest.mark.parametrize(
    ("name", "source", "bad"),
    [
        ("bin.train", "import tyro", True),
        ("config", "import tyro", False),
        ("losses.ctc", "def f():\n    import k2", True),
        ("lattice.graphs", "import k2.ragged", False),
        ("train.trainer", "from lhotse import CutSet", True),
        ("data.cuts", "from lhotse import CutSet", False),
        ("losses.ctc", "import lhotse", True),
        ("decode.ctc", "import torchaudio", True),
        ("report.pictures", "def f():\n    from matplotlib.figure import Figure", False),
        ("bin.report", "import matplotlib", True),
        ("decode.ctc", "import math\nimport torch", False),
        ("data.cuts", "import importlib\nimportlib.import_module(name)", True),
    ],
)
def test_third_party_packages_stay_in_their_rooms(name: str, source: str, bad: bool) -> None:
    assert bool(list(forbidden_third_parties(Module(name, source)))) is bad


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("import random\nrandom.random()", True),
        ("import random\nrandom.seed(1)", True),
        ("from random import shuffle", True),
        ("import numpy as np\nnp.random.rand(3)", True),
        ("import numpy\nnumpy.random.seed(3)", True),
        ("from numpy.random import rand", True),
        ("import random\nr = random.Random(1)\nr.random()", False),
        ("import numpy as np\nnp.random.default_rng(1).normal()", False),
        ("from random import Random", False),
    ],
)
def test_global_random_states_are_found(source: str, bad: bool) -> None:
    assert bool(list(global_random_state(Module("nn.x", source)))) is bad


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("import torch\ntorch.load('x')", True),
        ("import torch\ntorch.load('x', weights_only=False)", True),
        ("import torch\ntorch.load('x', weights_only=flag)", True),
        ("from torch import load", True),
        ("import pickle", True),
        ("import torch\ntorch.load('x', map_location='cpu', weights_only=True)", False),
    ],
)
def test_loads_that_could_run_code_are_found(source: str, bad: bool) -> None:
    assert bool(list(unsafe_loads(Module("models.load", source)))) is bad


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("librispeech = 1", True),
        ("prepare_libri_light = 1", True),
        ("x = 'Libri-Light'", True),
        ("# as for AN4", True),
        ('"""Trained\non GigaSpeech."""', True),
        ("x = 'wenetspeech/train'", True),
        ("x = 'TEDLIUM3'", True),
        ("def f(common_voice): ...", True),
        ("x = f'{y} VoxPopuli'", True),
        ("plan4 = 'a library, an4x, dynamic, amino'", False),
        ("mls_x, xmls = 1, 2", True),
        ("xmls = families = 1", False),
    ],
)
def test_corpus_names_are_found_as_whole_words(source: str, bad: bool) -> None:
    assert bool(list(corpus_names(Module("data.cuts", source)))) is bad


def test_a_corpus_name_is_reported_at_its_own_line() -> None:
    assert list(corpus_names(Module("nn.x", '"""One\ntwo LibriSpeech."""'))) == ["nn.x:2 names the corpus LibriSpeech"]
