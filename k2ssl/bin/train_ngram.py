"""Estimate an n-gram language model, of words or of a tokenizer's tokens, and write it as an ARPA file.

    python -m k2ssl.bin.train_ngram --text corpus.txt more.txt.gz --order 3 --prune 0 0 1 --output words.arpa.gz
    python -m k2ssl.bin.train_ngram --cuts cuts_train.jsonl.gz --tokenizer tokenizer.pt --order 6 --check-cuts cuts_dev.jsonl.gz \
        --output tokens.arpa

Interpolated modified Kneser-Ney smoothing. Writes OUTPUT and, beside it, the settings as OUTPUT.json; prints how many n-grams there are, and
perplexities. The text to check is read through before the work begins, and OUTPUT is written last. The same text and settings give the
same file. Exit status: 0 done, 1 the run failed, 2 wrong usage or settings, 130 interrupted.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from k2ssl.atomic_file import atomic_file
from k2ssl.bin.cluster_cuts import CutLists, check_files
from k2ssl.bin.output_file import check_output
from k2ssl.bin.program import run_program
from k2ssl.bin.refusal import refusing
from k2ssl.bin.sentences import Sentences
from k2ssl.config import dump
from k2ssl.data.tokenizer import NormalizationConfig, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from k2ssl.decode.arpa import Arpa
    from k2ssl.decode.lm import NgramLm
    from k2ssl.decode.ngram_counts import NgramCounts

_log = logging.getLogger(__name__)

_TELL_EVERY = 1_000_000  # sentences
_AT_ONCE = 4096  # sentences whose perplexity is computed together


@dataclass(frozen=True)
class TrainNgram:
    """Settings of the program.

    Attributes:
        output: the ARPA file; compressed if its name ends in .gz.
        text: text files with a sentence a line, UTF-8 (.gz too). Empty lines are left out.
        cuts: manifests whose transcripts are taken too (.jsonl.gz).
        order: most words of an n-gram.
        prune: n-grams that occur so often or less are left out; a number for every order from 1, where it is 0, none smaller than the one
            before it; the last one holds for higher orders.
        tokenizer: file of the tokenizer whose tokens take the place of words; none: words. All its tokens get a probability.
        normalization: what is done to the text first; a tokenizer has its own.
        check_text: text files whose perplexity is printed; without any, that of the text itself.
        check_cuts: manifests of transcripts whose perplexity is printed, too (.jsonl.gz).
        overwrite: replace OUTPUT if it exists.
    """

    output: str
    text: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()
    order: int = 4
    prune: tuple[int, ...] = (0,)
    tokenizer: str | None = None
    normalization: NormalizationConfig = field(default_factory=NormalizationConfig)
    check_text: tuple[str, ...] = ()
    check_cuts: tuple[str, ...] = ()
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.text and not self.cuts:
            raise ValueError("TrainNgram: text and cuts name no file, at least one is needed")
        if self.order < 1:
            raise ValueError(f"TrainNgram: order is {self.order}, allowed are whole numbers >= 1")
        rising = all(a <= b for a, b in pairwise(self.prune))
        if not self.prune or self.prune[0] != 0 or not rising or len(self.prune) > self.order:
            raise ValueError(
                f"TrainNgram: prune is {' '.join(map(str, self.prune)) or 'empty'}; allowed are 0, then numbers none smaller than the one "
                f"before, at most {self.order} (order) in all"
            )
        if self.tokenizer is not None and self.normalization != NormalizationConfig():
            raise ValueError("TrainNgram: normalization is set, but the tokenizer has its own; leave one of the two out")


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts sentences.

    Attributes:
        sentences, words: how many; the ends of sentences are not counted, but predicted.
        unknown: how many of the words the model does not list.
        log_prob: natural logarithm of the probability of all words and ends, unknown words with what the model gives `<unk>`.
        unknown_log_prob: what the unknown words take of it.
    """

    sentences: int
    words: int
    unknown: int
    log_prob: float
    unknown_log_prob: float

    @property
    def all(self) -> float:
        """Of words and ends, unknown ones with the probability of `<unk>`, which is not that of any one word."""
        return _power(-self.log_prob, self.words + self.sentences)

    @property
    def known(self) -> float:
        """Of known words and ends."""
        return _power(self.unknown_log_prob - self.log_prob, self.words - self.unknown + self.sentences)


def train(job: TrainNgram) -> None:
    """Do the job."""
    from k2ssl.decode.arpa import write_arpa
    from k2ssl.decode.kneser_ney import kneser_ney

    inputs = {"text": job.text, "cuts": job.cuts, "check_text": job.check_text, "check_cuts": job.check_cuts, "tokenizer": job.tokenizer}
    check_files(**inputs)
    output = check_output(job.output, job.overwrite, **inputs)
    with refusing():
        tokenizer = None if job.tokenizer is None else load_tokenizer(job.tokenizer)
        CutLists((*job.cuts, *job.check_cuts)).open()
        sentences = Sentences(job.text, job.cuts, job.normalization, tokenizer)
        checks = _checks(job, sentences)
        for check in checks:
            _read_through(check)  # hours of counting must not end at a mistake in the text to check
    counts = _count(sentences, job.order)
    unknown = f", {sentences.unknown:,} characters that the tokenizer does not have" if sentences.unknown else ""
    model = kneser_ney(counts, job.prune)
    unit = "words" if tokenizer is None else "tokens"
    perplexities = _perplexities(checks or [sentences], bool(checks), tokenizer, model, unit)
    with atomic_file(output.with_name(output.name + ".json")) as file:
        file.write(dump(job).encode())
    with atomic_file(output) as file:
        write_arpa(file, model, compress=output.suffix == ".gz")
    print(f"{output}: of {counts.num_sentences:,} sentences with {counts.num_words:,} {unit}{unknown}")
    print(_table(counts, model, unit))
    print(perplexities)


def _checks(job: TrainNgram, sentences: Sentences) -> list[Sentences]:
    """The text whose perplexity is asked for, file by file."""
    texts = [replace(sentences, text=(path,), cuts=()) for path in job.check_text]
    return texts + [replace(sentences, text=(), cuts=(path,)) for path in job.check_cuts]


def _read_through(sentences: Sentences) -> None:
    for _ in sentences:
        pass


def _count(sentences: Sentences, order: int) -> NgramCounts:
    from k2ssl.decode.ngram_counts import NgramCounter

    symbols = () if sentences.tokenizer is None else sentences.tokenizer.symbols[1:]  # all but blank
    counter = NgramCounter(order, symbols)
    for sentence in sentences:
        counter.add(sentence)
        if counter.num_sentences % _TELL_EVERY == 0:
            _log.info(f"{counter.num_sentences:,} sentences, {counter.num_words:,} words read")
    return counter.counts()


def _table(counts: NgramCounts, model: Arpa, unit: str) -> str:
    lines = [f"{'order':>5}  {'n-grams':>13}  {'in the model':>13}   ({unit} of order 1 with <s>, </s> and <unk>)"]
    for n, (counted, kept) in enumerate(zip(counts.orders, model.orders, strict=True), start=1):
        lines.append(f"{n:5}  {len(counted.count):13,}  {len(kept.log_prob):13,}")
    return "\n".join(lines)


def _perplexities(checks: Sequence[Sentences], named: bool, tokenizer: Tokenizer | None, model: Arpa, unit: str) -> str:
    from k2ssl.decode.lm import NgramLm

    # blank, which no text has, has the name of no word
    pieces = ("", "<unk>", *model.words[3:]) if tokenizer is None else tokenizer.symbols
    lm = NgramLm(model, pieces)
    lines = []
    for check in checks:
        name = " ".join((*check.text, *check.cuts)) if named else "the text itself, which it knows"
        row = perplexity(lm, pieces, check)
        lines.append(
            f"perplexity of {name}: {row.known:.2f} ({row.all:.2f} with {row.unknown:,} unknown {unit}); "
            f"{row.sentences:,} sentences, {row.words:,} {unit}"
            if row.sentences
            else f"perplexity of {name}: it holds no sentence"
        )
    return "\n".join(lines)


def perplexity(lm: NgramLm, pieces: Iterable[str], sentences: Iterable[list[str]]) -> Perplexity:
    """Of sentences, which may hold words that are none of `pieces`, the model's."""
    import torch

    ids = {piece: token for token, piece in enumerate(pieces)}
    unk = ids["<unk>"]
    rest = iter(sentences)
    number = words = unknown = 0
    log_prob, unknown_log_prob = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    while group := list(islice(rest, _AT_ONCE)):
        rows = [torch.tensor([ids.get(word, unk) for word in sentence]) for sentence in group]
        lens = torch.tensor([len(row) for row in rows])
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        state = lm.start(len(group), torch.device("cpu"))
        for t in range(tokens.shape[1]):
            going_on = t < lens
            step, after = lm.step(state, tokens[:, t])
            log_prob += step[going_on].double().sum()
            unknown_log_prob += step[going_on & (tokens[:, t] == unk)].double().sum()
            state = torch.where(going_on, after, state)
        log_prob += lm.final(state).double().sum()
        unknown += int(((tokens == unk) & (torch.arange(tokens.shape[1]) < lens.unsqueeze(1))).sum())
        number, words = number + len(group), words + int(lens.sum())
    return Perplexity(number, words, unknown, log_prob.item(), unknown_log_prob.item())


def _power(negative_log_prob: float, count: int) -> float:
    return math.exp(negative_log_prob / count) if count else math.nan


def main(argv: list[str] | None = None) -> int:
    return run_program(train, TrainNgram, sys.argv[1:] if argv is None else argv, "train_ngram", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
