"""Beam search with the flashlight-text package, for words of a lexicon or without one, with an n-gram that KenLM reads.

The package is an extra; it searches on the CPU, one utterance after the other. With an n-gram over words it is the search of published CTC
results; without a lexicon and a language model it finds what `prefix_beam_search` finds when both keep enough hypotheses.

Source: Pratap et al. 2019, arXiv 1812.07625 (wav2letter++). Upstream: torchaudio's and fairseq's decoders, which wrap the same package.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from k2ssl.decode.alignment import align, token_begins
from k2ssl.decode.arpa import UNKNOWN, open_text
from k2ssl.decode.ctc import check_log_probs
from k2ssl.decode.hypotheses import Hypothesis

_log = logging.getLogger(__name__)

PIP_LINE = 'pip install "flashlight-text>=0.0.7"'
Lexicon = Mapping[str, Sequence[Sequence[str]]]

# A word that is spelled and the same pieces as the beginning of a longer one often score the same, and the package ranks equal scores by where
# they lie in memory, so that runs would differ; this much more, in nats, decides for the word.
_TIE = 1e-9
_NEVER = -1e8  # log-probability of what cannot be; finite, since the package takes differences
_OTHER = "(none of these)"  # what is none of the words, or none of the pieces
_DATA_MARK = b"\\data\\"
_KENLM_BINARY = b"mmap lm http://kheafield.com/code"


@dataclass(frozen=True)
class FlashlightConfig:
    """Settings of the search.

    Attributes:
        beam: hypotheses kept; one that ends in blank and one that ends in a token count apart.
        beam_tokens: the most probable tokens of a frame that may be added; none: all.
        beam_threshold: hypotheses that are worse than the best by more nats than this are dropped.
        lm_scale: weight of the language model's natural logarithms; without a model it has no effect.
        word_score: added for each word of a lexicon; positive values make for more words.
        delimiter: the piece between words, such as "|", for a lexicon spelled with it; none where pieces hold the mark of a word.
        log_add: add the probabilities of equal hypotheses up; otherwise the best alignment counts.

    Raises:
        ValueError: a value out of range.
    """

    beam: int = 100
    beam_tokens: int | None = None
    beam_threshold: float = 50.0
    lm_scale: float = 1.0
    word_score: float = 0.0
    delimiter: str = ""
    log_add: bool = True

    def __post_init__(self) -> None:
        for name in ("beam", "beam_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"FlashlightConfig: {name} is {value}, a whole number >= 1 is needed")
        if not self.beam_threshold > 0:
            raise ValueError(f"FlashlightConfig: beam_threshold is {self.beam_threshold}, a number > 0 is needed")
        if not (math.isfinite(self.lm_scale) and self.lm_scale >= 0):
            raise ValueError(f"FlashlightConfig: lm_scale is {self.lm_scale}, a finite number >= 0 is needed")
        if not math.isfinite(self.word_score):
            raise ValueError(f"FlashlightConfig: word_score is {self.word_score}, a finite number is needed")


def spellings(words: Iterable[str], encode: Callable[[str], Sequence[int]], pieces: Sequence[str], delimiter: str = "") -> Lexicon:
    """A lexicon of words as a tokenizer spells them.

    Args:
        words: what may be recognised; repetitions are dropped.
        encode: word to token ids, as `Tokenizer.encode`.
        pieces: the text of every id.
        delimiter: as in `FlashlightConfig`: the piece that ends every word.
    """
    ending = [delimiter] if delimiter else []
    return {word: [[*(pieces[token] for token in encode(word)), *ending]] for word in words}


class FlashlightSearch:
    """The search, ready for any number of utterances.

    Args:
        config: its settings.
        pieces: the text of every token id, blank included.
        blank: blank's id.
        lexicon: the words that may be recognised, with their spellings in pieces; None: any sequence of pieces. Spelled without a delimiter,
            a word's last piece counts in one frame only, as this package has it; alignments in which it lasts longer are left out.
        lm: ARPA file, compressed with gzip or not, or KenLM binary file, over the lexicon's words, or without a lexicon over pieces; None: no
            language model. Words of the lexicon that it lacks are counted and named in a warning. A binary file does not list its words:
            there a word counts as lacking that scores like one it cannot know.

    Raises:
        ValueError: the package is not installed; a delimiter or a spelling that is not made of pieces; an empty lexicon, or a word score
            without one; a language model that cannot be read, or that lacks a piece, or all words of the lexicon.
    """

    def __init__(self, config: FlashlightConfig, pieces: Sequence[str], blank: int, lexicon: Lexicon | None = None, lm: str | None = None):
        self.config, self.blank, self.vocab_size = config, blank, len(pieces)
        ids = {piece: token for token, piece in enumerate(pieces) if token != blank}
        if config.delimiter and config.delimiter not in ids:
            raise ValueError(f"FlashlightConfig: delimiter is {config.delimiter!r}, which is none of the {len(pieces)} pieces")
        if lexicon is not None and not lexicon:
            raise ValueError("lexicon: it has no words, at least one is needed")
        _check_word_score(config, lexicon is not None)
        # the package lets silence pass between words; where pieces know no delimiter, that is a class of its own that never occurs
        self._silence = ids[config.delimiter] if config.delimiter else len(pieces)
        self._ends_words = lexicon is not None and bool(config.delimiter)
        decoder = self._package = _package()
        words = [*(pieces if lexicon is None else lexicon), _OTHER]
        needed = [word for word in (ids if lexicon is None else lexicon) if word != UNKNOWN]
        model = decoder.ZeroLM() if lm is None else _read_lm(lm, words, needed, all_of_them=lexicon is None)
        self._num_words = 0 if lexicon is None else len(lexicon)
        self._words = () if lexicon is None else tuple(lexicon)
        self._spelled: dict[tuple[int, ...], str] = {}  # words by their spelling, without the delimiter
        self._trie = None if lexicon is None else self._build_trie(decoder, lexicon, ids, model)
        self._model = model  # the package does not keep it alive
        self._decoder = self._build_decoder()

    def with_config(self, config: FlashlightConfig) -> FlashlightSearch:
        """The same search with other numbers, by the same language model and lexicon, which are not read again.

        Raises:
            ValueError: another delimiter, which the lexicon is spelled with; or a word score without a lexicon.
        """
        if config.delimiter != self.config.delimiter:
            raise ValueError(f"FlashlightConfig: delimiter is {config.delimiter!r}, that of the search is {self.config.delimiter!r}")
        _check_word_score(config, self._trie is not None)
        other = copy.copy(self)
        other.config = config
        other._decoder = other._build_decoder()
        return other

    @torch.no_grad()
    def search(self, log_probs: Tensor, lens: Tensor, num_hypotheses: int = 1) -> list[list[Hypothesis]]:
        """The best hypotheses of each utterance.

        Args:
            log_probs: (N, T, V) log-probabilities.
            lens: (N,) int64 CPU, frames of each utterance.
            num_hypotheses: how many to return per utterance, 1..beam.

        Returns:
            Best first; fewer than asked for where fewer differ. A score is log-probability + lm_scale * that of the language model +
            word_score * words; frames are those where each token begins in its most probable alignment. Where all that a beam holds at the
            end ends within a word of the lexicon, as in audio that is cut off, the best comes alone and without that beginning of a word,
            and its score is the log-probability of its most probable alignment.

        Raises:
            ValueError: shapes, dtypes or lengths that do not fit, or log-probabilities of nan.
        """
        check_log_probs("FlashlightSearch", log_probs, lens, self.blank)
        if log_probs.shape[2] != self.vocab_size:
            raise ValueError(f"FlashlightSearch: log_probs has {log_probs.shape[2]} classes, there are {self.vocab_size} pieces")
        if not 1 <= num_hypotheses <= self.config.beam:
            raise ValueError(f"FlashlightSearch: num_hypotheses is {num_hypotheses}, allowed are 1..{self.config.beam} (beam)")
        values = log_probs.float().cpu()
        if any(bool(values[n, :length].isnan().any()) for n, length in enumerate(lens.tolist())):
            raise ValueError("FlashlightSearch: log_probs holds nan, numbers are needed")
        return [self._search_one(values[n, :length], num_hypotheses) for n, length in enumerate(lens.tolist())]

    def _search_one(self, log_probs: Tensor, num_hypotheses: int) -> list[Hypothesis]:
        emissions = torch.full((len(log_probs) + self._ends_words, self.vocab_size + 1), _NEVER)
        emissions[: len(log_probs), :-1] = log_probs.clamp(min=_NEVER)
        if self._ends_words:  # a frame that ends the last word, for models whose transcripts do not end in a delimiter
            emissions[-1, self._silence] = 0.0
        if not len(emissions):
            return [Hypothesis((), 0.0)]
        found: dict[tuple[int, ...], tuple[float, tuple[str, ...] | None]] = {}
        for result in self._decoder.decode(emissions.data_ptr(), *emissions.shape):
            # a place before the first frame and one behind the last, which tells how the end was reached
            path = result.tokens[1 : 1 + len(log_probs)]
            end = self._end_of_words(path, result.words[1:])
            words = self._words_of(result.words[1:], path, end)
            if end is not None:  # the package gives whole words alone where there are any
                return [replace(_aligned(self._collapse(path[:end]), log_probs.clamp(min=_NEVER), self.blank), words=words)]
            found.setdefault(self._collapse(path), (result.score, words))  # words of the same spelling are one hypothesis
            if len(found) == num_hypotheses:
                break
        transcripts = list(found)
        lens = torch.full((len(transcripts),), len(log_probs))
        begins = token_begins(log_probs.expand(len(transcripts), -1, -1), lens, transcripts, self.blank)
        return [Hypothesis(tokens, score, at, words) for (tokens, (score, words)), at in zip(found.items(), begins, strict=True)]

    def _words_of(self, words: Sequence[int], path: Sequence[int], end: int | None) -> tuple[str, ...] | None:
        """The words of the lexicon by their numbers, -1 for none; of a path that counts up to `end` also the last, if it is not told there."""
        if self._trie is None:
            return None
        ends = [frame + 1 for frame, word in enumerate(words) if word >= 0]
        rest = self._unfinished(path[max(ends, default=0) : end]) if end is not None else ()
        return (*(self._words[words[frame - 1]] for frame in ends), *([self._spelled[rest]] if rest in self._spelled else []))

    def _unfinished(self, path: Sequence[int]) -> tuple[int, ...]:
        return tuple(token for token in self._collapse(path) if token != self._silence)

    def _collapse(self, path: Sequence[int]) -> tuple[int, ...]:
        return tuple(token for token, _ in groupby(path) if token != self.blank)

    def _end_of_words(self, path: Sequence[int], words: Sequence[int]) -> int | None:
        """Of a path that ends within a word of the lexicon the number of frames up to the end of its last whole word; None of other paths.

        A beginning that spells a shorter word counts as whole: the package leaves that one out where its last piece lasts.
        """
        if self._trie is None:
            return None
        end = max((frame + 1 for frame, word in enumerate(words) if word >= 0), default=0)
        rest = self._unfinished(path[end:])
        return None if not rest else len(path) if rest in self._spelled else end

    def _build_decoder(self) -> Any:
        decoder, config = self._package, self.config
        options = {
            "beam_size": config.beam,
            "beam_size_token": config.beam_tokens or self.vocab_size + 1,
            "beam_threshold": min(config.beam_threshold, -_NEVER / 2),
            "lm_weight": config.lm_scale * math.log(10.0),  # KenLM's logarithms are decimal
            "sil_score": 0.0,
            "log_add": config.log_add,
            "criterion_type": decoder.CriterionType.CTC,
        }
        if self._trie is None:
            return decoder.LexiconFreeDecoder(decoder.LexiconFreeDecoderOptions(**options), self._model, self._silence, self.blank, [])
        scored = decoder.LexiconDecoderOptions(**options, word_score=config.word_score + _TIE, unk_score=-math.inf)
        return decoder.LexiconDecoder(scored, self._trie, self._model, self._silence, self.blank, self._num_words, [], False)

    def _build_trie(self, decoder: Any, lexicon: Lexicon, ids: Mapping[str, int], model: Any) -> Any:
        trie = decoder.Trie(self.vocab_size + 1, self._silence)
        start = model.start(False)
        for number, (word, ways) in enumerate(lexicon.items()):
            _, score = model.score(start, number)
            for spelling in ways:
                if not spelling:
                    raise ValueError(f"lexicon: {word!r} has an empty spelling")
                if unknown := [piece for piece in spelling if piece not in ids]:
                    raise ValueError(
                        f"lexicon: the spelling of {word!r} holds {unknown[0]!r}, which is none of the {self.vocab_size} pieces"
                    )
                if self._ends_words and list(spelling[-1:]) != [self.config.delimiter]:
                    raise ValueError(f"lexicon: the spelling of {word!r} does not end with the delimiter {self.config.delimiter!r}")
                tokens = [ids[piece] for piece in spelling]
                trie.insert(tokens, number, score)
                self._spelled.setdefault(tuple(tokens[:-1] if self._ends_words else tokens), word)
        trie.smear(decoder.SmearingMode.MAX)
        return trie


def _aligned(tokens: tuple[int, ...], log_probs: Tensor, blank: int) -> Hypothesis:
    """Tokens with the score of their most probable alignment with (T, V)."""
    transcript = torch.tensor([tokens], dtype=torch.int64)
    (found,) = align(log_probs.unsqueeze(0), torch.tensor([len(log_probs)]), transcript, torch.tensor([len(tokens)]), blank)
    assert found is not None, "these frames have spelled the tokens before"
    return Hypothesis(tokens, found.score, found.begins)


def _check_word_score(config: FlashlightConfig, has_lexicon: bool) -> None:
    if config.word_score and not has_lexicon:
        raise ValueError(f"FlashlightConfig: word_score is {config.word_score}, which has no effect without a lexicon")


def _package() -> Any:
    try:
        from flashlight.lib.text import decoder
    except ImportError as error:
        raise ValueError(f"this search takes the package flashlight-text, which is not installed: {PIP_LINE}") from error
    return decoder


def _read_lm(path: str, words: Sequence[str], needed: Sequence[str], all_of_them: bool) -> Any:
    """The model, which numbers `words` as they come here, the last of them one that it does not know; of the `needed` ones it must know all,
    or at least one."""
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    with tempfile.NamedTemporaryFile(suffix=".arpa") as copy:
        known = _unigrams(path, copy)
        if known is not None:
            _check_vocabulary(path, [word for word in needed if word not in known], len(needed), all_of_them)
        try:
            model = KenLM(path if known is None else copy.name, Dictionary(list(words)))
        except RuntimeError as error:
            raise ValueError(f"{path}: KenLM cannot read this language model: {' '.join(str(error).split())}") from error
    if known is None:
        strangers, wanted = _strangers(model, len(words) - 1), set(needed)
        _check_vocabulary(
            path, [word for number, word in enumerate(words) if number in strangers and word in wanted], len(needed), all_of_them
        )
    return model


def _check_vocabulary(path: str, missing: Sequence[str], number: int, all_of_them: bool) -> None:
    """Refuse a model that lacks words which it must know; say which others it lacks."""
    if not missing:
        return
    named = ", ".join(map(repr, missing[:3]))
    if all_of_them or len(missing) == number:
        raise ValueError(
            f"{path}: this language model is of another vocabulary: of {number} {'pieces' if all_of_them else 'words'} it lacks "
            f"{len(missing)}, such as {named}"
        )
    _log.warning(
        "%s: of %s words of the lexicon this language model lacks %s, such as %s; they have the probability of an unknown word",
        *(path, f"{number:,}", f"{len(missing):,}", named),
    )


def _strangers(model: Any, unknown: int) -> set[int]:
    """The words, by number below `unknown`, that a model without a list of its words scores like that one."""
    start = model.start(False)
    score = model.score(start, unknown)[1]
    return {word for word in range(unknown) if model.score(start, word)[1] == score}


def _unigrams(path: str, copy: IO[bytes]) -> set[str] | None:
    """The words of an ARPA file, which is written to `copy` without what stands before its data; None: the file is binary."""
    words: set[str] = set()
    section = b""
    with open(path, "rb") as file:
        if file.read(len(_KENLM_BINARY)) == _KENLM_BINARY:
            return None
    with open_text(path) as lines:
        for line in lines:
            stripped = line.strip()
            if stripped.startswith(b"\\") and (section or stripped == _DATA_MARK):
                section = stripped
            if section:
                copy.write(line)
            if section == b"\\1-grams:" and len(columns := stripped.split()) > 1:
                words.add(columns[1].decode(errors="replace"))
    copy.flush()
    if not section:
        raise ValueError(f"{path}: neither an ARPA file nor one of KenLM's binary files")
    return words
