"""What `k2ssl.bin.doctor` looks at in the Python environment: packages, versions, GPUs. Nothing heavy is imported before it is looked at."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import k2ssl

Status = Literal["ok", "warning", "error"]

ROOT = Path(k2ssl.__file__).resolve().parents[1]
PIP = f"{shlex.quote(sys.executable or 'python')} -m pip"
INSTALL = f"cd {shlex.quote(str(ROOT))} && {PIP} install -c constraints.txt -e ."
_TESTED = ((3, 10), (3, 13))
_DRIVER = Path("/proc/driver/nvidia/version")
_NATIVE_IMPORT_SECONDS = 120
_SHOWN = 5  # packages of other versions that are named


@dataclass(frozen=True)
class Finding:
    """What one look gave.

    Attributes:
        status: ok, warning (works, with a loss that is told) or error.
        text: one line.
        fix: command that mends it, "" where there is nothing to mend.
    """

    status: Status
    text: str
    fix: str = ""


class NotCheckedError(Exception):
    """Another package has to work first; says which."""


class NotLoadingError(Exception):
    """A package does not load.

    Attributes:
        fix: command that mends it.
    """

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def python() -> Iterator[Finding]:
    """The interpreter."""
    here = sys.version_info[:2]
    text = f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}"
    low, high = (".".join(map(str, one)) for one in _TESTED)
    if here < _TESTED[0]:
        yield Finding("error", f"{text}; {low} or newer is needed", f"K2SSL_PYTHON=/path/to/python{high} bash scripts/setup.sh")
    elif here > _TESTED[1]:
        yield Finding("warning", f"{text}; tests are run with {low} to {high}", f"K2SSL_PYTHON=/path/to/python{high} bash scripts/setup.sh")
    else:
        yield Finding("ok", text)


def package() -> Iterator[Finding]:
    """Whether the k2ssl that is imported is that of the current folder."""
    ours, here = Path(k2ssl.__file__).resolve().parent, Path.cwd().resolve() / "k2ssl"
    text = f"{k2ssl.__version__} in {ours}"
    if (here / "__init__.py").is_file() and here != ours:
        yield Finding("warning", f"{text}, not the one of this folder, {here}", f"{PIP} install --no-deps -e .")
    else:
        yield Finding("ok", text)


def torch() -> Iterator[Finding]:
    """PyTorch, and what it was built for."""
    module = _imported("torch")
    built = f"built for CUDA {module.version.cuda}" if module.version.cuda else "built for the CPU only"
    total = (module.ones(2, 3) @ module.ones(3, 2)).sum().item()
    if total == 12:
        yield Finding("ok", f"{module.__version__}, {built}")
    else:
        yield Finding(
            "error", f"{module.__version__}: a product of matrices of ones adds up to {total}, not to 12", _pair(module.__version__)
        )


def torchaudio() -> Iterator[Finding]:
    """torchaudio loads and is of the same release as torch."""
    base, own = _public(_torch_or_not().__version__), _installed("torchaudio")
    fix = _pair(base)
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError) as error:
        yield Finding("error", f"{own} does not load beside torch {base}: {first_line(error)}", fix)
        return
    if _public(own) != base:
        yield Finding("warning", f"{own} beside torch {base}: they are released in pairs, and others may fail when first used", fix)
    else:
        yield Finding("ok", own)


def gpus() -> Iterator[Finding]:
    """Driver and GPUs, and which number formats they have."""
    module = _torch_or_not()
    driver = _driver()
    if not module.version.cuda:
        if driver:
            yield Finding(
                "warning", f"there is a GPU driver ({driver}), but this torch was built for the CPU only", _pair(module.__version__)
            )
        else:
            yield Finding("ok", "none, and torch was built for the CPU only; programs run on the CPU")
        return
    if not module.cuda.is_available():
        if driver:
            yield Finding("error", f"driver {driver}, but torch cannot use it: {_why_no_cuda(module)}", "nvidia-smi")
        else:
            yield Finding("ok", "none, no driver; programs run on the CPU")
        return
    yield Finding("ok", f"driver {driver or 'of unknown version'}, {module.cuda.device_count()} GPU(s)")
    for number in range(module.cuda.device_count()):
        yield _gpu(module, number)


def _gpu(module: Any, number: int) -> Finding:
    properties = module.cuda.get_device_properties(number)
    capability = (properties.major, properties.minor)
    name = f"{number}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {capability[0]}.{capability[1]}"
    try:
        free, _ = module.cuda.mem_get_info(number)
        ones = module.ones(64, 64, device=f"cuda:{number}")
        total = (ones @ ones).sum().item()
    except RuntimeError as error:
        if "out of memory" in str(error):
            return Finding("warning", f"{name}: no memory is free, another process holds it", "nvidia-smi")
        return Finding("error", f"{name}: does not compute: {first_line(error)}", _pair(module.__version__))
    if total != 64**3:
        return Finding("error", f"{name}: a product of matrices of ones adds up to {total}, not to {64**3}", "nvidia-smi")
    has = {"float16": (0, 0), "bfloat16": (8, 0), "tf32": (8, 0), "fp8": (8, 9)}
    forms = ", ".join(form for form, least in has.items() if capability >= least)
    return Finding("ok", f"{name}, {free / 2**30:.0f} GiB free; {forms}")


def exchange() -> Iterator[Finding]:
    """NCCL and gloo, over which processes exchange tensors."""
    module = _torch_or_not()
    if not module.distributed.is_available() or not module.distributed.is_gloo_available():
        yield Finding("error", "this torch has no gloo: only one process can work", _pair(module.__version__))
    elif not module.cuda.is_available():
        yield Finding("ok", "gloo; NCCL is not needed without GPUs")
    elif not module.distributed.is_nccl_available():
        yield Finding("error", "this torch has no NCCL: only one GPU can work", _pair(module.__version__))
    else:
        yield Finding("ok", f"gloo, NCCL {'.'.join(map(str, module.cuda.nccl.version()))}")


def triton() -> Iterator[Finding]:
    """Triton, which computes the transducer loss, Swoosh and parts of the frontend on GPUs: its kernels are held against PyTorch."""
    module = _torch_or_not()
    gpu = module.cuda.is_available()
    if find_spec("triton") is None:
        told = "not installed: what its kernels are for is computed in PyTorch, slower"
        yield Finding("warning", told, INSTALL) if gpu else Finding("ok", "not installed, and not needed without a GPU")
        return
    try:
        importlib.import_module("triton")
        if gpu and (lacking := _what_triton_lacks()):
            yield Finding("warning", f"what its kernels are for is computed in PyTorch, slower: {lacking}", "install what is lacking")
            return
        difference = _kernel_difference(module) if gpu else 0.0
    except Exception as error:
        yield Finding("error" if gpu else "warning", f"{_installed('triton')} does not work: {first_line(error)}", _again("triton"))
        return
    if not difference <= 1e-4:  # NaN, too
        yield Finding("error", f"{_installed('triton')}: its kernels differ from PyTorch by {difference:.2g}", _again("triton"))
    elif gpu:
        yield Finding("ok", f"{_installed('triton')} compiles; its kernels give what PyTorch gives")
    else:
        yield Finding("ok", f"{_installed('triton')}; used where there is a GPU")


def _what_triton_lacks() -> str | None:
    from k2ssl.gpu_kernels import why_no_triton

    return why_no_triton()


def _kernel_difference(module: Any) -> float:
    from k2ssl.losses.transducer import full_loss
    from k2ssl.losses.transducer_backend import use_lattice_backend
    from k2ssl.nn import kernels, triton_kernels

    generator = module.Generator().manual_seed(0)
    logits, symbols = module.randn(1, 5, 4, 6, generator=generator).cuda(), module.tensor([[1, 2, 3]]).cuda()
    boundary = module.tensor([[0, 0, 3, 5]])
    losses = []
    try:
        for backend in ("torch", "triton"):
            use_lattice_backend(backend)
            losses.append(full_loss(logits, symbols, boundary).item())
    finally:
        use_lattice_backend("auto")
    return float(module.tensor([abs(losses[0] - losses[1]), kernels.difference(triton_kernels, logits.device)]).max())


def audio() -> Iterator[Finding]:
    """libsndfile writes and reads FLAC and OGG in memory; lhotse loads."""
    soundfile, numpy = _imported("soundfile"), _imported("numpy")
    library = f"soundfile {_installed('soundfile')} with libsndfile {soundfile.__libsndfile_version__}"
    samples = numpy.sin(numpy.arange(16000) / 20).astype("float32") / 2
    for form, allowed in (("FLAC", 1e-3), ("OGG", 0.1)):
        file = io.BytesIO()
        try:
            soundfile.write(file, samples, 16000, format=form)
            file.seek(0)
            read, _ = soundfile.read(file, dtype="float32")
        except (RuntimeError, TypeError) as error:
            yield Finding("error", f"{library} cannot do {form}: {first_line(error)}", _again("soundfile"))
            continue
        off = float(abs(read - samples).max()) if read.shape == samples.shape else float("inf")
        if off > allowed:
            yield Finding("error", f"{library}: {form} is read with a difference of {off:.2g}", _again("soundfile"))
        else:
            yield Finding("ok", f"{library} reads and writes {form}")
    _imported("lhotse")
    yield Finding("ok", f"lhotse {_installed('lhotse')}")


def scoring() -> Iterator[Finding]:
    """kaldialign, which counts word errors."""
    counts = _imported("kaldialign").edit_distance(["a", "b"], ["a", "c", "b"])
    if counts.get("total") == 1:
        yield Finding("ok", f"kaldialign {_installed('kaldialign')}")
    else:
        yield Finding("error", f"kaldialign {_installed('kaldialign')} counts {counts} for one inserted word", _again("kaldialign"))


def other_package(name: str, distribution: str) -> Iterator[Finding]:
    """A package that programs import."""
    _imported(name, distribution)
    yield Finding("ok", _installed(distribution))


def flashlight() -> Iterator[Finding]:
    """flashlight-text, optional."""
    if find_spec("flashlight") is None:
        wheel = "" if sys.version_info < (3, 13) else "; it has no wheel for Python 3.13"
        yield Finding("ok", f"optional, not installed: the searches ctc-lexicon and ctc-lexicon-free would need it{wheel}")
        return
    try:
        importlib.import_module("flashlight.lib.text.decoder.kenlm")
    except (ImportError, OSError) as error:
        yield Finding(
            "warning", f"does not load, so ctc-lexicon and ctc-lexicon-free cannot run: {first_line(error)}", _again("flashlight-text")
        )
    else:
        yield Finding("ok", f"{_installed('flashlight-text')}: the searches ctc-lexicon and ctc-lexicon-free can run")


def k2() -> Iterator[Finding]:
    """k2, optional."""
    _torch_or_not()
    why = why_no_k2()
    if find_spec("k2") is None:
        use = "the searches ctc-lattice, ctc-hlg and fast-beam would need it, and the transducer loss could be computed on it"
        yield Finding("ok", f"optional, {why.partition(':')[0]}: {use} (backend 'k2' in Python);{why.partition(':')[2]}")
    elif why:
        yield Finding("warning", why, f"{PIP} uninstall k2")
    else:
        yield Finding(
            "ok",
            f"{_installed('k2')} loads: the searches ctc-lattice, ctc-hlg and fast-beam can run, and backend 'k2' of the transducer loss can be "
            "chosen in Python",
        )


def why_no_k2() -> str:
    """Why k2 cannot be used, and which k2 could; "" where it can. It is loaded in a process of its own, as a wheel of another torch may end the
    process."""
    from k2ssl.lattice.wheel import wheel_that_fits

    if find_spec("k2") is None:
        return f"not installed: {wheel_that_fits()}"
    problem = _fails_alone("import k2; k2.mutual_information_recursion; print(k2.with_cuda)")
    return "" if problem is None else f"{_installed('k2')} cannot be used: {problem}; {wheel_that_fits()}"


def _fails_alone(code: str) -> str | None:
    """Why a piece of Python fails in a process of its own; None where it does not."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_NATIVE_IMPORT_SECONDS, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"the process ended with status {done.returncode} and no message"


def versions() -> Iterator[Finding]:
    """Installed versions against constraints.txt of this folder or beside the package."""
    found = [folder / "constraints.txt" for folder in (Path.cwd(), ROOT)]
    file = next((path for path in found if path.is_file()), None)
    if file is None:
        yield Finding("ok", "no constraints.txt here: versions are not compared")
        return
    requirement = _imported("packaging.requirements").Requirement
    others, same = [], 0
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        wanted = requirement(line)
        try:
            installed = version(wanted.name)
        except PackageNotFoundError:
            continue  # of an extra that is not installed; what is needed has checks of its own
        if wanted.marker is None or wanted.marker.evaluate():
            if wanted.specifier.contains(_public(installed), prereleases=True):
                same += 1
            else:
                others.append(f"{wanted.name} {installed} (tested: {str(wanted.specifier).removeprefix('==')})")
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        yield Finding("warning", f"not the versions of {file}: {', '.join(others[:_SHOWN])}{more}", INSTALL)
    else:
        yield Finding("ok", f"{same} packages are those of {file}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _imported(name: str, distribution: str = "") -> Any:
    """A package; one that does not load says how to mend it."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        is_there = find_spec(name.partition(".")[0]) is not None
        fix = _again(distribution or name.partition(".")[0]) if is_there else INSTALL
        raise NotLoadingError(f"does not load: {first_line(error)}", fix) from error


def _again(distribution: str) -> str:
    """Command that installs a package again that is there, and broken."""
    return f"cd {shlex.quote(str(ROOT))} && {PIP} install --force-reinstall --no-deps -c constraints.txt {distribution}"


def _pair(release: str) -> str:
    """Command that installs torch and torchaudio of one release."""
    return f"{PIP} install --force-reinstall torch=={_public(release)} torchaudio=={_public(release)}"


def _torch_or_not() -> Any:
    try:
        return importlib.import_module("torch")
    except Exception as error:
        raise NotCheckedError("torch does not load") from error


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"


def _public(full: str) -> str:
    """A version without what stands behind its plus."""
    return full.partition("+")[0]


def _driver() -> str:
    try:
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found[1] if found else "of unknown version"


def _why_no_cuda(module: Any) -> str:
    try:
        module.cuda.init()
    except Exception as error:
        return first_line(error)
    return "it finds no GPU; CUDA_VISIBLE_DEVICES may hide it"
