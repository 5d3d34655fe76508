"""Which searches there are, which options each of them has, and how it is made ready for a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from k2ssl.bin import decode_lattice
from k2ssl.decode import ctc, transducer
from k2ssl.decode.biasing import ContextGraph
from k2ssl.decode.ctc_beam import prefix_beam_search
from k2ssl.decode.flashlight import FlashlightConfig, FlashlightSearch, Lexicon
from k2ssl.decode.hypotheses import Hypothesis
from k2ssl.decode.lm import NgramLm
from k2ssl.decode.results import Word
from k2ssl.decode.word_times import word_times
from k2ssl.train.checkpoint import check_records

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from k2ssl.bin.decode_model import TrainedModel
    from k2ssl.data.tokenizer import Tokenizer
    from k2ssl.models.asr import AsrFrames
    from k2ssl.models.language_model import LanguageModel

Method = Literal[
    "ctc-greedy", "ctc-prefix-beam", "ctc-lexicon-free", "ctc-lexicon", "ctc-lattice", "ctc-hlg", "greedy", "modified-beam", "fast-beam"
]
T = TypeVar("T")
Search = Callable[["AsrFrames"], list[list[Hypothesis]]]

# The options of every method with the values they have where they are not given.
_BEAM = {"nbest": 1, "lm": None}
_FLASHLIGHT = {"beam": 100, **_BEAM, "lm_scale": 1.0, "beam_tokens": None, "beam_threshold": 50.0}
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "ctc-greedy": {},
    "ctc-prefix-beam": {"beam": 10, **_BEAM, "lm_scale": 0.3, "lm_final": True, "token_score": 0.0},
    "ctc-lexicon-free": _FLASHLIGHT,
    "ctc-lexicon": {**_FLASHLIGHT, "lexicon": None, "word_score": 0.0},
    "greedy": {"max_symbols_per_frame": 1, "blank_penalty": 0.0},
    "modified-beam": {
        **{"beam": 4, **_BEAM, "lm_scale": 0.3, "lm_final": False, "blank_penalty": 0.0, "temperature": 1.0},
        **{"context": None, "context_score": 2.0},
    },
    **decode_lattice.OPTIONS,
}
_ZIP = b"PK\x03\x04"  # a checkpoint begins with it, even one that is cut short
_TAKE_LM = "ctc-prefix-beam, modified-beam"  # those with a language model of ours
_FILES = ("lm", "lexicon", "context", "rescore_lm")  # options that name files
_NEEDS = {
    "lm_scale": "lm",
    "lm_final": "lm",
    "context_score": "context",
    "drop_words": "lm",
    "rescore_paths": "rescore_lm",
}  # no effect without
_REQUIRED = {"ctc-lexicon": ("lexicon",), "ctc-hlg": ("lexicon", "lm")}


@dataclass(frozen=True)
class SearchConfig(decode_lattice.LatticeOptions):
    """Options of the searches; docs/decoding.md says which method has which. One that has no effect is refused.

    Attributes:
        beam: hypotheses kept per utterance; none: 4 for modified-beam, 10 for ctc-prefix-beam, 100 for the searches of flashlight.
        nbest: how many hypotheses are written per utterance, with their scores; none: only the best.
        lm: language model over the tokenizer's tokens, an ARPA file or a checkpoint of k2ssl.bin.train_lm; for both searches of flashlight
            an ARPA or binary file of KenLM, for ctc-lexicon over words.
        lm_scale: weight of the language model's natural logarithms; none: 0.3, for the searches of flashlight 1.
        lm_final: whether the probability that the sentence ends counts; none: it does for ctc-prefix-beam, not for modified-beam. The
            searches of flashlight always count it.
        max_symbols_per_frame: how many tokens a frame may emit; none: 1.
        blank_penalty: subtracted from blank's logit, nats; larger values mean fewer deletions; none: 0.
        temperature: divides the logits; none: 1.
        token_score: added for every token, nats; larger values mean longer texts; none: 0.
        word_score: added for every word, nats; larger values mean more words; none: 0.
        lexicon: file with the words that may be recognised, one a line, perhaps followed by the tokens that spell it.
        beam_tokens: the most probable tokens of a frame that may be added; none: all.
        beam_threshold: hypotheses that are worse than the best by more nats are dropped; none: 50.
        context: file with words or phrases that score higher, one a line.
        context_score: what each token of a word or phrase of context gets, nats; none: 2.
    """

    beam: int | None = None
    nbest: int | None = None
    lm: str | None = None
    lm_scale: float | None = None
    lm_final: bool | None = None
    max_symbols_per_frame: int | None = None
    blank_penalty: float | None = None
    temperature: float | None = None
    token_score: float | None = None
    word_score: float | None = None
    lexicon: str | None = None
    beam_tokens: int | None = None
    beam_threshold: float | None = None
    context: str | None = None
    context_score: float | None = None

    def __post_init__(self) -> None:
        for name in ("beam", "nbest", "max_symbols_per_frame", "beam_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"SearchConfig: {name} is {getattr(self, name)}, allowed are whole numbers >= 1")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"SearchConfig: {field.name} is {value}, a finite number is needed")
        self.check_lattice("SearchConfig")
        if self.lm_scale is not None and self.lm_scale < 0:
            raise ValueError(f"SearchConfig: lm_scale is {self.lm_scale}, allowed is a number >= 0")
        for name in ("temperature", "beam_threshold", "context_score"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"SearchConfig: {name} is {getattr(self, name)}, allowed is a number > 0")

    def files(self) -> dict[str, str]:
        """The files that options name, by option."""
        return {f"search.{name}": getattr(self, name) for name in _FILES if getattr(self, name) is not None}

    def given(self) -> dict[str, Any]:
        """The options that are not none."""
        return {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None}


def options_of(method: Method, config: SearchConfig) -> dict[str, Any]:
    """Every option of the method, with its value.

    Raises:
        ValueError: an option is given that the method does not have, or options that contradict each other; names them.
    """
    given = config.given()
    for name, value in given.items():
        if name not in _OPTIONS[method]:
            others = [other for other, options in _OPTIONS.items() if name in options]
            raise ValueError(f"search.{name} is {value!r}, which has no effect with method {method!r}; it has with {', '.join(others)}")
    for name, other in _NEEDS.items():
        if name in given and other not in given:
            raise ValueError(f"search.{name} is {given[name]!r}, which has no effect without search.{other}")
    for name in _REQUIRED.get(method, ()):
        if name not in given:
            what = "the words that may be recognised" if name == "lexicon" else "a language model over words"
            raise ValueError(f"search.{name} is missing: with method {method!r} it names the file of {what}")
    options = {**_OPTIONS[method], **given}
    options = {name: value for name, value in options.items() if name not in _NEEDS or _NEEDS[name] in given}
    if "beam" in options and options.get("nbest", 1) > options["beam"]:
        raise ValueError(f"search.nbest is {options['nbest']}, at most search.beam, which is {options['beam']}, are allowed")
    return options


@dataclass(frozen=True)
class Recognizer:
    """From audio to text.

    Attributes:
        trained: the model and its tokenizer.
        search: from frames to hypotheses.
        options: every option of the search, with its value.
    """

    trained: TrainedModel
    search: Search
    options: Mapping[str, Any]

    @torch.no_grad()
    def hypotheses(self, audio: Tensor, audio_lens: Tensor) -> list[list[Hypothesis]]:
        """Per utterance its hypotheses, best first, at least one; audio (N, S) with sample counts (N,) on the CPU.

        Audio without a frame, of any number of utterances, gives an empty hypothesis.
        """
        found = [[Hypothesis((), 0.0)] for _ in range(len(audio))]
        rows = [row for row, samples in enumerate(audio_lens.tolist()) if self.trained.has_frame(samples)]
        if rows:
            if len(rows) < len(audio):
                audio_lens = audio_lens[rows]
                audio = audio[rows, : int(audio_lens.max())]
            heard = self.search(self.trained.encode(audio, audio_lens))
            for row, hypotheses in zip(rows, heard, strict=True):
                found[row] = hypotheses or found[row]
        return found

    def text(self, hypothesis: Hypothesis) -> str:
        """The words, separated by spaces."""
        return text_of(hypothesis, self.trained.tokenizer)

    def words(self, hypothesis: Hypothesis, num_samples: int) -> tuple[Word, ...]:
        """The words with their times, of audio of so many samples."""
        trained, tokens = self.trained, hypothesis.tokens
        numbers, texts = trained.tokenizer.word_numbers(tokens), self.text(hypothesis).split()
        if max(numbers, default=-1) + 1 != len(texts):
            raise ValueError(f"timestamps: the lexicon spells {' '.join(texts)!r} so that its tokens do not tell where words begin")
        frames, seconds = trained.num_frames(num_samples), num_samples / trained.sample_rate
        return word_times(texts, numbers, hypothesis.frames, trained.seconds_per_frame, frames, seconds=seconds)


def build_recognizer(method: Method, config: SearchConfig, trained: TrainedModel) -> Recognizer:
    """
    Raises:
        ValueError: see `options_of` and `build_search`.
    """
    options = options_of(method, config)
    return Recognizer(trained, build_search(method, options, trained), options)


def build_search(method: Method, options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any] | None = None) -> Search:
    """The search, ready to be called with frames: per utterance its hypotheses, best first.

    Args:
        method: which search.
        options: all of its options, see `options_of`.
        trained: the model.
        read: what the files of options hold, for several searches that differ in numbers alone; each file is read by the first of them.

    Raises:
        ValueError: the model lacks the head that the method searches over; names the methods that there are for it.
    """
    heads = [name for name in ("ctc", "transducer") if getattr(trained.model, name) is not None]
    head = "ctc" if method.startswith("ctc-") else "transducer"
    if head not in heads:
        possible = [other for other in _OPTIONS if ("ctc" if other.startswith("ctc-") else "transducer") in heads]
        raise ValueError(f"method is {method!r}, but the checkpoint has no {head} head; allowed are {', '.join(possible)}")
    return _BUILDERS[method](options, trained, {} if read is None else read)


def _ctc_greedy(options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any]) -> Search:
    head = trained.model.ctc
    assert head is not None
    return lambda output: _singly(ctc.greedy_search(head(output.frames), output.lens, trained.tokenizer.blank))


def _ctc_prefix_beam(options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any]) -> Search:
    head, settings = trained.model.ctc, _settings(options, trained, read)
    assert head is not None
    return lambda output: prefix_beam_search(head(output.frames), output.lens, trained.tokenizer.blank, **settings)


def _greedy(options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any]) -> Search:
    head = trained.model.transducer
    assert head is not None
    return lambda output: _singly(transducer.greedy_search(head.predictor, head.joiner, output.frames, output.lens, **options))


def _modified_beam(options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any]) -> Search:
    head, settings = trained.model.transducer, _settings(options, trained, read)
    assert head is not None
    return lambda output: transducer.modified_beam_search(head.predictor, head.joiner, output.frames, output.lens, **settings)


def _lexicon_free(options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any]) -> Search:
    return _flashlight(options, trained, read, None, "")


def _lexicon(options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any]) -> Search:
    return _flashlight(options, trained, read, _words(options, trained, read), trained.delimiter)


def _words(options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any]) -> Lexicon:
    return _once(read, "lexicon", lambda: read_lexicon(options["lexicon"], trained.tokenizer, trained.delimiter))


def _on_k2(method: Method) -> Callable[[Mapping[str, Any], TrainedModel, dict[str, Any]], Search]:
    def build(options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any]) -> Search:
        decode_lattice.need_k2(method)
        words = None if options.get("lexicon") is None else _words(options, trained, read)
        return (decode_lattice.transducer_search if method == "fast-beam" else decode_lattice.ctc_search)(options, trained, read, words)

    return build


def _flashlight(options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any], lexicon: Lexicon | None, delimiter: str) -> Search:
    head, tokenizer = trained.model.ctc, trained.tokenizer
    assert head is not None
    if options["lm"] is not None and _is_checkpoint(options["lm"]):
        raise ValueError(
            f"search.lm is {options['lm']}, a checkpoint; this method takes a file of KenLM, others take checkpoints: {_TAKE_LM}"
        )
    settings = {name: options[name] for name in ("beam", "beam_tokens", "beam_threshold", "lm_scale", "word_score") if name in options}
    config = FlashlightConfig(**settings, delimiter=delimiter)
    first = _once(read, "flashlight", lambda: FlashlightSearch(config, tokenizer.symbols, tokenizer.blank, lexicon, options["lm"]))
    search = first.with_config(config)
    return lambda output: search.search(head(output.frames), output.lens, options["nbest"])


_BUILDERS: Mapping[str, Callable[[Mapping[str, Any], TrainedModel, dict[str, Any]], Search]] = {
    "ctc-greedy": _ctc_greedy,
    "ctc-prefix-beam": _ctc_prefix_beam,
    "ctc-lexicon-free": _lexicon_free,
    "ctc-lexicon": _lexicon,
    "ctc-lattice": _on_k2("ctc-lattice"),
    "ctc-hlg": _on_k2("ctc-hlg"),
    "fast-beam": _on_k2("fast-beam"),
    "greedy": _greedy,
    "modified-beam": _modified_beam,
}


def _once(read: dict[str, Any], name: str, make: Callable[[], T]) -> T:
    """What `read` holds under a name, made if it is not there."""
    if name not in read:
        read[name] = make()
    result: T = read[name]
    return result


def _settings(options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a beam search, its files read."""
    settings = dict(options)
    settings["num_hypotheses"] = settings.pop("nbest")
    if (lm := settings.pop("lm")) is not None:
        settings["lm"] = _once(read, "lm", lambda: load_lm(lm, trained.tokenizer).to(trained.device))
    context, score = settings.pop("context", None), settings.pop("context_score", 0.0)
    if context is not None:
        settings["biasing"] = ContextGraph(read_phrases(context, trained.tokenizer), score).to(trained.device)
    return settings


def load_lm(path: str, tokenizer: Tokenizer) -> NgramLm | LanguageModel:
    """The language model of a file, whatever its name: a checkpoint of k2ssl.bin.train_lm, or an ARPA file, compressed with gzip or not.

    Raises:
        ValueError: the file is neither or damaged, or the model is of another tokenizer.
    """
    if not _is_checkpoint(path):
        return NgramLm.load(path, tokenizer.symbols)
    from k2ssl.models.language_model import load_language_model

    check_records(path)
    return load_language_model(path, tokenizer.sha256)


def _is_checkpoint(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def read_phrases(path: str, tokenizer: Tokenizer) -> list[list[int]]:
    """The phrases of a text file, one a line, as token ids; empty lines are passed over.

    Raises:
        ValueError: no text in UTF-8, no phrase in it, or one that the tokenizer cannot spell; names the line.
    """
    return _read_lines(path, tokenizer.encode)


def read_lexicon(path: str, tokenizer: Tokenizer, delimiter: str) -> Lexicon:
    """The words of a text file, one a line: alone, spelled by the tokenizer then, or followed by the tokens that spell it.

    A word may have several lines, one for each spelling. Where tokens do not hold the mark of a word, each spelling gets `delimiter` at its
    end unless it has it.

    Raises:
        ValueError: no text in UTF-8, no word in it, or one that the tokenizer cannot spell; names the line.
    """

    def entry(line: str) -> tuple[str, list[str]]:
        word, *spelling = line.split()
        if not spelling:
            spelling = [tokenizer.symbols[token] for token in tokenizer.encode(word)]
        if unknown := [symbol for symbol in spelling if symbol not in known]:
            raise ValueError(f"the spelling of {word!r} holds {unknown[0]!r}, which is no token of the {tokenizer.kind} tokenizer")
        return word, [*spelling, *([delimiter] if delimiter and spelling[-1] != delimiter else [])]

    known = set(tokenizer.symbols)
    lexicon: dict[str, list[list[str]]] = {}
    for word, spelling in _read_lines(path, entry):
        lexicon.setdefault(word, []).append(spelling)
    return lexicon


def _read_lines(path: str, parse: Callable[[str], T]) -> list[T]:
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(parse(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path}: is empty, at least one line is needed")
    return found


def text_of(hypothesis: Hypothesis, tokenizer: Tokenizer) -> str:
    """The words of a hypothesis, separated by spaces."""
    return tokenizer.decode(hypothesis.tokens) if hypothesis.words is None else " ".join(hypothesis.words)


def _singly(found: Sequence[Hypothesis]) -> list[list[Hypothesis]]:
    return [[hypothesis] for hypothesis in found]
