"""Learn a tokenizer from the transcripts of cuts.

    python -m k2ssl.bin.train_tokenizer --cuts cuts_train.jsonl.gz --kind bpe --vocab-size 500 --output tokenizer.pt
    python -m k2ssl.bin.train_tokenizer --cuts cuts_train.jsonl.gz --kind letters --text.case upper \
        --text.allowed "ABCDEFGHIJKLMNOPQRSTUVWXYZ'" --check-cuts cuts_dev.jsonl.gz --output letters.pt

Writes OUTPUT and, beside it, the settings as OUTPUT.json, and prints a table of how the transcripts come out. The same
cuts and settings give the same file. Exit status: 0 done, 1 the run failed, 2 wrong usage or settings, 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from k2ssl.atomic_file import atomic_file
from k2ssl.bin.cluster_cuts import CutLists, check_files
from k2ssl.bin.output_file import check_output
from k2ssl.bin.program import run_program
from k2ssl.bin.refusal import refusing
from k2ssl.config import dump
from k2ssl.data.tokenizer import Kind, NormalizationConfig, Tokenizer
from k2ssl.data.tokenizer_training import TokenizerConfig, train_tokenizer

_log = logging.getLogger(__name__)

_NAMED = 5  # cuts without a transcript


@dataclass(frozen=True)
class TrainTokenizer:
    """Settings of the program.

    Attributes:
        cuts: manifests of the transcripts to learn from (.jsonl.gz). Cuts without one are left out, counted and named.
        output: file for the tokenizer.
        kind: bpe or unigram pieces, or letters.
        vocab_size: number of symbols, blank and the unknown one included; none: 500 pieces. Letters are what the transcripts hold, or all
            that text.allowed names, and take no size.
        character_coverage: share of the characters that pieces are made of, for scripts of thousands of characters; the rarest are left
            out, and unknown.
        text: what is done to transcripts first, here and wherever the tokenizer is used.
        check_cuts: further manifests that the table shows; nothing is learnt from them.
        overwrite: replace OUTPUT if it exists.
    """

    cuts: tuple[str, ...]
    output: str
    kind: Kind = "bpe"
    vocab_size: int | None = None
    character_coverage: float = 1.0
    text: NormalizationConfig = field(default_factory=NormalizationConfig)
    check_cuts: tuple[str, ...] = ()
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.cuts:
            raise ValueError("TrainTokenizer: cuts names no manifest, at least one is needed")
        self.tokenizer()

    def tokenizer(self) -> TokenizerConfig:
        """The settings of the training alone."""
        return TokenizerConfig(self.kind, self.vocab_size, self.character_coverage, self.text)


@dataclass(frozen=True)
class Coverage:
    """How the transcripts of a manifest come out of a tokenizer.

    Attributes:
        transcripts, words, tokens: how many.
        characters, unknown: how many, spaces not counted, and how many of them no symbol has.
        longest, longest_id: most tokens of one transcript, and whose.
    """

    transcripts: int
    words: int
    tokens: int
    characters: int
    unknown: int
    longest: int
    longest_id: str


def train(job: TrainTokenizer) -> None:
    """Do the job."""
    check_files(cuts=job.cuts, check_cuts=job.check_cuts)
    output = check_output(job.output, job.overwrite, cuts=job.cuts, check_cuts=job.check_cuts)
    with refusing():
        CutLists((*job.cuts, *job.check_cuts)).open()
    tokenizer = train_tokenizer((pair for path in job.cuts for pair in transcripts(path, job.text)), job.tokenizer())
    rows = {path: measure(transcripts(path, job.text, tell=path not in job.cuts), tokenizer) for path in (*job.cuts, *job.check_cuts)}
    with atomic_file(output.with_name(output.name + ".json")) as file:
        file.write(dump(job).encode())
    tokenizer.save(output)
    print(table(tokenizer, rows))
    print(f"{output}: sha256 {tokenizer.sha256[:16]}...")


def transcripts(path: str, normalization: NormalizationConfig, tell: bool = True) -> Iterator[tuple[str, str]]:
    """Id and text of the cuts that have a transcript; the others are counted, and logged with `tell`."""
    from k2ssl.data.cuts import read_cuts
    from k2ssl.data.intake import transcript

    number, named = 0, []
    for cut in read_cuts(path):
        text = transcript(cut)
        if normalization(text):
            yield cut.id, text
            continue
        number += 1
        if number <= _NAMED:
            named.append(repr(cut.id))
    if number and tell:
        more = f" and {number - _NAMED:,} more" if number > _NAMED else ""
        _log.warning(f"{path}: {number:,} cuts without a transcript are left out: {', '.join(named)}{more}")


def measure(texts: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> Coverage:
    """Tokenise transcripts, unknown characters marked, and count."""
    transcripts = words = tokens = characters = unknown = longest = 0
    longest_id = ""
    for cut_id, text in texts:
        normalized = tokenizer.normalization(text).split()
        length = len(tokenizer.encode(text, "mark"))
        transcripts, words, tokens = transcripts + 1, words + len(normalized), tokens + length
        characters += sum(map(len, normalized))
        unknown += len(tokenizer.outside(text))
        if length > longest:
            longest, longest_id = length, cut_id
    return Coverage(transcripts, words, tokens, characters, unknown, longest, longest_id)


def table(tokenizer: Tokenizer, rows: dict[str, Coverage]) -> str:
    """What the program prints."""
    width = max(len("transcripts of"), *map(len, rows))
    lines = [
        f"{tokenizer.kind}: {tokenizer.vocab_size:,} symbols of {len(tokenizer.alphabet):,} characters; blank is {tokenizer.blank}, the "
        f"unknown symbol {tokenizer.unk}",
        f"{'transcripts of':{width}}  {'number':>11} {'words':>13} {'tokens/word':>11} {'unknown':>9}  most tokens",
    ]
    for path, row in rows.items():
        per_word = f"{row.tokens / row.words:.3f}" if row.words else "-"
        unknown = f"{row.unknown / row.characters:.3%}" if row.characters else "-"
        longest = f"{row.longest:,} in {row.longest_id}" if row.transcripts else "-"
        lines.append(f"{path:{width}}  {row.transcripts:11,} {row.words:13,} {per_word:>11} {unknown:>9}  {longest}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    return run_program(train, TrainTokenizer, sys.argv[1:] if argv is None else argv, "train_tokenizer", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
