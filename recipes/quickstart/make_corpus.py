"""Make a small spoken corpus in LibriSpeech's folder layout with a speech synthesiser: 40 voices, rooms, noise, about a hundred words.

    python recipes/quickstart/make_corpus.py --out exp/quickstart/corpus
    python recipes/quickstart/make_corpus.py --out exp/small --train-minutes 5 --dev-minutes 0.5 --test-minutes 1

Writes OUT/train-clean-quick, OUT/dev-clean-quick and OUT/test-clean-quick, which share neither voices nor sentences, as
PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac (16 kHz, 16 bit) with SPEAKER-CHAPTER.trans.txt beside them; SPEAKERS.TXT; and, at the end,
corpus.json. The same seed gives the same files, however many workers there are. The speech is synthetic: error rates on it say nothing about
those on recorded speech. The synthesiser is espeak-ng; get it with: pip install -c constraints.txt -e '.[quickstart]'

A finished corpus is left alone, an interrupted one is continued by the same command. Exit status: 0 done, 1 refused, 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile
from acoustics import add_noise, convolve, noise, resample, room, to_16_bit
from numpy.typing import NDArray
from prompts import PARTS, order, sentences
from tqdm import tqdm

from k2ssl.atomic_file import atomic_file, writable_folder
from k2ssl.bin.prepare_options import exit_code

SAMPLE_RATE = 16000
CHAPTER = 1
FORMAT = 1  # to be raised whenever the same settings come to give other files

# Accents and variants as espeak-ng calls them. Variants are what makes voices differ, so each belongs to one part only.
ACCENTS = ("en-us", "en-gb-x-rp")  # with more of them half an hour of speech teaches a small model little
VARIANTS = {
    "train": (
        *("m1", "f1", "m2", "f2", "m5", "f5", "m7", "Alicia", "m8", "Andrea", "Denis", "aunty", "Gene", "belinda", "Hugo", "steph"),
        *("Lee", "grandma", "Mario", "steph2", "Mike", "Michael", "max", "john", "quincy", "rob", "Alex", "victor", "zac", "travis"),
        *("Jacky", "boris"),
    ),
    "dev": ("m4", "f4", "robert", "linda"),
    "test": ("m3", "f3", "m6", "Annie"),
}
FEMALE = {"f1", "f2", "f3", "f4", "f5", "Alicia", "Andrea", "aunty", "belinda", "steph", "grandma", "steph2", "linda", "Annie"}

RATE = (120, 220)  # words a minute


@dataclass(frozen=True)
class Settings:
    """What the corpus depends on.

    Attributes:
        train_minutes, dev_minutes, test_minutes: of audio in the parts; within a sentence a voice, and no voice says less than one.
        seed: of everything that is drawn.
        format: of the corpus; that of this program.
    """

    train_minutes: float
    dev_minutes: float
    test_minutes: float
    seed: int
    format: int = FORMAT

    def seconds(self, part: str) -> float:
        return 60 * float(getattr(self, f"{part}_minutes"))


@dataclass(frozen=True)
class Speaker:
    """Somebody with a fixed way of speaking.

    Attributes:
        number: from 1; different in all parts.
        part: train, dev or test.
        rank: which voice of the part, from 0.
        accent, variant: of espeak-ng.
        rate: words a minute.
        pitch, range: 0 to 100.
    """

    number: int
    part: str
    rank: int
    accent: str
    variant: str
    rate: int
    pitch: int
    range: int

    @property
    def voice(self) -> str:
        return f"{self.accent}+{self.variant}"

    @property
    def subset(self) -> str:
        """Folder of the corpus that holds what this voice says."""
        return f"{self.part}-clean-quick"

    @property
    def chapter(self) -> str:
        return f"{self.number}-{CHAPTER}"

    def folder(self, out: Path) -> Path:
        return out / self.subset / str(self.number) / str(CHAPTER)

    def transcript(self, out: Path) -> Path:
        """The file that says that the chapter is complete: it is written last."""
        return self.folder(out) / f"{self.chapter}.trans.txt"


def speakers(seed: int) -> list[Speaker]:
    """All voices of the three parts."""
    result: list[Speaker] = []
    for part in PARTS:
        for rank, variant in enumerate(VARIANTS[part]):
            rng = np.random.default_rng([seed, 3, len(result) + 1])
            rate, pitch, spread = (int(rng.integers(low, high)) for low, high in ((120, 170), (30, 70), (35, 75)))
            accent = ACCENTS[rank % len(ACCENTS)]
            result.append(Speaker(len(result) + 1, part, rank, accent, variant, rate, pitch, spread))
    return result


class Synthesiser:
    """A voice of espeak-ng in a process of its own, as a context manager: see espeak.py.

    Attributes:
        sample_rate: of what `say` returns, Hz.

    Raises:
        ValueError: the synthesiser does not start, or has no such voice.
    """

    def __init__(self, voice: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("espeak.py")), voice]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        if not (head := self._output.readline()):
            raise self._failure()
        self.sample_rate = int(json.loads(head)["sample_rate"])

    def say(self, text: str, rate: int, pitch: int, range: int) -> NDArray[np.float64]:
        """(S,) audio between -1 and 1; parameters as in espeak.py.

        Raises:
            ValueError: the synthesiser failed, or gave silence.
        """
        try:
            self._input.write(f"{json.dumps({'text': text, 'rate': rate, 'pitch': pitch, 'range': range})}\n".encode())
            self._input.flush()
        except BrokenPipeError:
            raise self._failure() from None
        head = self._output.read(4)
        content = self._output.read(int.from_bytes(head, "little"))
        if len(head) < 4 or len(content) < int.from_bytes(head, "little"):
            raise self._failure()
        samples = np.frombuffer(content, dtype="<i2")
        if not samples.any():
            raise ValueError(f"espeak-ng gave silence for {text!r}")
        return samples / 32768

    def _failure(self) -> ValueError:
        errors = self._process.stderr.read().decode(errors="replace").strip() if self._process.stderr else ""
        status = self._process.wait()
        return ValueError(f"the speech synthesiser failed: {errors or f'status {status}'}")

    def __enter__(self) -> Synthesiser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with suppress(BrokenPipeError):
            self._input.close()  # which ends it
        self._process.wait()
        self._output.close()
        if self._process.stderr:
            self._process.stderr.close()


def record(synthesiser: Synthesiser, speaker: Speaker, sentence: str, seed: int, number: int) -> NDArray[np.int16]:
    """(S,) samples of an utterance: the voice a little off its usual, in a room, over noise, at some level."""
    rng = np.random.default_rng([seed, 4, speaker.number, number])
    rate = int(np.clip(speaker.rate + rng.integers(-15, 16), *RATE))
    dry = synthesiser.say(
        sentence.lower(), rate, pitch=speaker.pitch + int(rng.integers(-6, 7)), range=speaker.range + int(rng.integers(-10, 11))
    )
    before, after = rng.uniform(0.05, 0.3, size=2)
    audio = np.pad(resample(dry, synthesiser.sample_rate, SAMPLE_RATE), (int(before * SAMPLE_RATE), int(after * SAMPLE_RATE)))
    audio = convolve(audio, room(rng, SAMPLE_RATE, decay=rng.uniform(0.05, 0.35), direct_to_reverberant=rng.uniform(3, 15)))
    audio = add_noise(audio, noise(rng, len(audio), SAMPLE_RATE, pink=rng.uniform(0, 1)), ratio=rng.uniform(15, 35))
    return to_16_bit(audio, level=rng.uniform(-32, -20))


def make_chapter(out: Path, speaker: Speaker, prompts: Iterator[str], seconds: float, seed: int) -> None:
    """Write what a voice says: as many of the prompts as come closest to `seconds`, at least one. A complete chapter is left alone."""
    transcript = speaker.transcript(out)
    if transcript.exists():
        return
    transcript.parent.mkdir(parents=True, exist_ok=True)
    for left in transcript.parent.glob(".*.part"):  # by a run that was killed
        left.unlink(missing_ok=True)
    lines: list[str] = []
    spoken = 0.0
    with Synthesiser(speaker.voice) as synthesiser:
        while not lines or spoken + spoken / len(lines) / 2 < seconds:
            number, sentence = len(lines), next(prompts)
            samples = record(synthesiser, speaker, sentence, seed, number)
            utterance = f"{speaker.chapter}-{number:04}"
            with atomic_file(transcript.with_name(f"{utterance}.flac")) as file:
                soundfile.write(file, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            lines.append(f"{utterance} {sentence}\n")
            spoken += len(samples) / SAMPLE_RATE
    with atomic_file(transcript) as file:
        file.write("".join(lines).encode())


def make(out: Path, settings: Settings, num_workers: int, progress: bool) -> None:
    """Write the corpus, or what is missing of it.

    Raises:
        ValueError: there is something else in `out`, it cannot be written to, or the synthesiser is missing or fails.
        OSError: the disk is full.
    """
    if is_finished(out, settings):
        print(f"{out}: this corpus is finished; it is left as it is")
        return
    if importlib.util.find_spec("espeakng_loader") is None:
        raise ValueError("espeakng-loader, the speech synthesiser, is missing: pip install -c constraints.txt -e '.[quickstart]'")
    writable_folder(out)
    write_json(out / "corpus.unfinished.json", asdict(settings))
    everyone, texts = speakers(settings.seed), sentences(settings.seed)
    stop = threading.Event()

    def chapter(speaker: Speaker) -> None:
        if not stop.is_set():
            voices = len(VARIANTS[speaker.part])
            prompts = islice(order(texts[speaker.part], settings.seed, speaker.part), speaker.rank, None, voices)
            make_chapter(out, speaker, prompts, settings.seconds(speaker.part) / voices, settings.seed)

    # threads will do: the synthesisers are processes, and transforms, compression and disk do not hold Python's lock
    with ThreadPoolExecutor(num_workers) as pool, tqdm(total=len(everyone), unit="voice", disable=None if progress else True) as bar:
        try:
            for future in as_completed([pool.submit(chapter, speaker) for speaker in everyone]):
                future.result()
                bar.update()
        except BaseException:
            stop.set()
            raise
    finish(out, settings, everyone)


def finish(out: Path, settings: Settings, everyone: list[Speaker]) -> None:
    """Look at what there is, write SPEAKERS.TXT and corpus.json, and print a line for each part."""
    rows, lengths = [";ID  |SEX| SUBSET           |MINUTES| NAME"], {}
    subsets = dict.fromkeys(speaker.subset for speaker in everyone)
    summary: dict[str, dict[str, float | int]] = {subset: {"voices": 0, "utterances": 0, "minutes": 0.0} for subset in subsets}
    for speaker in everyone:
        lengths[speaker] = [soundfile.info(path).duration for path in sorted(speaker.folder(out).glob("*.flac"))]
        minutes = sum(lengths[speaker]) / 60
        sex = "F" if speaker.variant in FEMALE else "M"
        rows.append(f"{speaker.number:<5}| {sex} | {speaker.subset:<17}| {minutes:<6.2f}| {speaker.voice}")
        of_part = summary[speaker.subset]
        of_part["voices"] += 1
        of_part["utterances"] += len(lengths[speaker])
        of_part["minutes"] = round(of_part["minutes"] + minutes, 3)
    with atomic_file(out / "SPEAKERS.TXT") as file:
        file.write("".join(f"{row}\n" for row in rows).encode())
    write_json(out / "corpus.json", {"settings": asdict(settings), "subsets": summary})
    (out / "corpus.unfinished.json").unlink()
    for subset, of_part in summary.items():
        print(f"{out / subset}: {of_part['voices']} voices, {of_part['utterances']:,} utterances, {of_part['minutes']:.2f} min")


def is_finished(out: Path, settings: Settings) -> bool:
    """Whether `out` holds the corpus that the settings ask for; not if it holds nothing, or a part of it.

    Raises:
        ValueError: it holds a corpus with other settings, or one that is none of ours.
    """
    for name in ("corpus.json", "corpus.unfinished.json"):
        if not (out / name).exists():
            continue
        try:
            content = json.loads((out / name).read_text())
            found = content["settings"] if name == "corpus.json" else content
            other = [key for key, value in asdict(settings).items() if found[key] != value]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{out / name}: not written by this program; give another --out") from error
        if other:
            differences = ", ".join(f"{key} is {found[key]:g}, not {getattr(settings, key):g}" for key in other)
            raise ValueError(f"{out} holds a corpus with other settings ({differences}); give another --out, or remove it")
        return name == "corpus.json"
    if there := [name for name in ("SPEAKERS.TXT", *(f"{part}-clean-quick" for part in PARTS)) if (out / name).exists()]:
        raise ValueError(f"{out} holds {', '.join(there)}, but no corpus.json: not made by this program; give another --out")
    return False


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(f"{json.dumps(content, indent=2)}\n".encode())


def main(argv: list[str] | None = None) -> int:
    head, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=head, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus; made if need be")
    for part, minutes in (("train", 30), ("dev", 2), ("test", 4)):
        parser.add_argument(
            f"--{part}-minutes",
            type=positive,
            default=float(minutes),
            metavar="N",
            help=f"audio in {part}-clean-quick (default: {minutes})",
        )
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of all that is drawn (default: 0)")
    parser.add_argument(
        "--num-workers", type=at_least_one, default=2, metavar="N", help="voices that are made at the same time (default: 2)"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar (there is none either where standard error is not a terminal)"
    )
    options = parser.parse_args(argv)
    settings = Settings(options.train_minutes, options.dev_minutes, options.test_minutes, options.seed)
    return exit_code("make_corpus", lambda: make(options.out, settings, options.num_workers, progress=not options.quiet))


def positive(text: str) -> float:
    """An option's value: a number above 0."""
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not allowed, numbers above 0 are")
    return value


def whole(text: str) -> int:
    """An option's value: a whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not allowed, whole numbers from 0 are")
    return value


def at_least_one(text: str) -> int:
    """An option's value: a whole number from 1."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed, whole numbers from 1 are")
    return value


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's request to end is like Ctrl-C
    sys.exit(main())
