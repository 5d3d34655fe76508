"""Search scores of a file with k2, in an environment that needs nothing but torch, numpy and k2.

    python -m k2ssl.bin.write_scores CHECKPOINT --cuts cuts_test.jsonl.gz --output scores.npz        (where the model runs)
    python -m k2ssl.lattice.decode_scores scores.npz --lexicon words.txt --lm words.arpa --output hlg.jsonl    (where k2 runs)

Without --lexicon and --lm the graph is the topology of CTC. A line of OUTPUT is {"id", "ref", "hyp", "score", "duration", "speaker",
"timestamps", "nbest"}, as k2ssl.bin.score reads it. Exit status: 0 done, 1 failed, 2 wrong usage or input.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k2ssl.lattice.arpa import read_arpa
from k2ssl.lattice.lexicon import Lexicon, read_lexicon
from k2ssl.lattice.score_file import Scores, read_scores

if TYPE_CHECKING:  # loads k2, without which --help and what is refused before the search do
    from k2ssl.lattice.decoder import Words
    from k2ssl.lattice.paths import Path

UNKNOWN = 0  # a word of a transcript that the lexicon lacks


def parser() -> argparse.ArgumentParser:
    """The program's options."""
    summary, _, _ = (__doc__ or "").partition("\n")
    made = argparse.ArgumentParser(prog="python -m k2ssl.lattice.decode_scores", description=summary)
    made.add_argument("scores", help="file of k2ssl.bin.write_scores")
    made.add_argument("--output", required=True, help="file for the hypotheses (.jsonl)")
    made.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    made.add_argument("--lexicon", help="file with a word a line, spelled by its characters or by the tokens behind it")
    made.add_argument("--lm", help="ARPA file over the words of the lexicon")
    made.add_argument("--lm-scale", type=float, default=1.0, help="weight of the natural logarithms of --lm and of --rescore-lm")
    made.add_argument("--rescore-lm", help="a larger ARPA file, in the place of --lm behind the search")
    made.add_argument("--rescore-paths", type=int, default=100, help="best paths that --rescore-lm scores; 0: the whole lattice")
    made.add_argument("--drop-words", action="store_true", help="leave out n-grams with words that the lexicon lacks")
    made.add_argument("--modified", action="store_true", help="no blank needed between equal tokens")
    made.add_argument("--search-beam", type=float, default=20.0, help="at a frame, states worse than the best by more nats are dropped")
    made.add_argument(
        "--output-beam", type=float, default=8.0, help="arcs whose best path is worse than the best path by more nats are left out"
    )
    made.add_argument("--max-active", type=int, default=10000, help="states kept at a frame")
    made.add_argument("--nbest", type=int, default=1, help="hypotheses per utterance")
    made.add_argument("--batch", type=int, default=10, help="utterances searched together")
    made.add_argument("--oracle", action="store_true", help="tell the fewest word errors that the lattices allow")
    return made


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """Write the hypotheses; returns what is worth telling.

    Raises:
        ValueError: files or options that do not fit; an output that exists or cannot be written.
        ImportError: k2 does not load.
    """
    if (options.lexicon is None) != (options.lm is None):
        raise ValueError("--lexicon and --lm go together: one is given without the other")
    if options.lexicon is None and (options.rescore_lm or options.oracle):
        raise ValueError("--rescore-lm and --oracle have an effect with --lexicon and --lm only")
    for name, least in (("nbest", 1), ("batch", 1), ("rescore_paths", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}, at least {least} is needed")
    _check_output(options)
    from k2ssl.lattice.decoder import CtcDecoder
    from k2ssl.lattice.rescoring import oracle_errors
    from k2ssl.lattice.search import Pruning

    scores = read_scores(options.scores)
    pruning = Pruning(options.search_beam, options.output_beam, min(30, options.max_active), options.max_active)
    words = _words(options, scores)
    started = time.perf_counter()
    decoder = CtcDecoder(len(scores.symbols), words, options.modified)
    told = {"graph_arcs": decoder.graph.num_arcs, "graph_seconds": time.perf_counter() - started, "search_seconds": 0.0}
    told.update(utterances=len(scores.ids), seconds=float(scores.seconds.sum()), too_short=int((scores.lens == 0).sum()))
    told.update(oracle_errors=0, words=0)
    found: dict[int, list[Path]] = {}
    for rows, log_probs, lens in batches(scores, options.batch):
        started = time.perf_counter()
        lattice = decoder.lattice(log_probs, lens, pruning, options.lm_scale, [str(scores.ids[row]) for row in rows])
        found.update(zip(rows, decoder.choose(lattice, options.nbest, options.rescore_paths)))
        told["search_seconds"] += time.perf_counter() - started
        if options.oracle and words is not None:
            ids = words.lexicon.ids()
            references = [[ids.get(word, UNKNOWN) for word in str(scores.refs[row]).split()] for row in rows]
            told["oracle_errors"] += sum(oracle_errors(lattice, references))
            told["words"] += sum(map(len, references))
    write(options.output, scores, found, words.lexicon if words is not None else None)
    return told


def _check_output(options: argparse.Namespace) -> None:
    if os.path.isdir(options.output):
        raise ValueError(f"--output is {options.output}, which is a folder; a file is needed")
    if os.path.exists(options.output) and not options.overwrite:
        raise ValueError(f"{options.output} exists; --overwrite replaces it")
    folder = os.path.dirname(options.output) or "."
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: {folder} cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output: {folder} cannot be written to")


def _words(options: argparse.Namespace, scores: Scores) -> Words | None:
    if options.lexicon is None:
        return None
    from k2ssl.lattice.decoder import Words

    lexicon = read_lexicon(options.lexicon, [str(symbol) for symbol in scores.symbols], scores.delimiter)
    larger = read_arpa(options.rescore_lm) if options.rescore_lm else None
    return Words(lexicon, read_arpa(options.lm), larger, options.drop_words)


def batches(scores: Scores, size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rows, log-probabilities (N, T, V) and lengths of utterances that have frames, the longest first."""
    frames = scores.frames()
    order = sorted((row for row in range(len(frames)) if len(frames[row])), key=lambda row: -len(frames[row]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        parts = [torch.from_numpy(frames[row]) for row in rows]
        yield rows, torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), torch.tensor([len(part) for part in parts])


def write(path: str, scores: Scores, found: dict[int, list[Path]], lexicon: Lexicon | None) -> None:
    """The hypotheses of all utterances in their order; one without frames has no words. Nothing is left of a file that is not whole."""
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            for row, name in enumerate(scores.ids):
                paths = found.get(row, [])
                texts: dict[str, float] = {}  # each once, with the score of the best path that reads so
                for one in paths:
                    texts.setdefault(text_of(one, scores, lexicon), one.score)
                nbest = [{"hyp": text, "score": score} for text, score in texts.items()]
                hyp, score = next(iter(texts.items()), ("", 0.0))
                ref = str(scores.refs[row]) if scores.has_ref[row] else None
                line: dict[str, Any] = {"id": str(name), "ref": ref, "hyp": hyp, "score": score, "duration": float(scores.seconds[row])}
                line.update(speaker=None, timestamps=[], nbest=nbest if len(paths) > 1 else [])
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise


def text_of(path: Path, scores: Scores, lexicon: Lexicon | None) -> str:
    """Words of a lexicon, or the tokens put together."""
    if lexicon is not None:
        return lexicon.text(path.outputs)
    text = "".join(str(scores.symbols[token]) for token in path.tokens)
    return " ".join(text.replace(scores.delimiter or "\u2581", " ").split())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parser().parse_args(argv)
    try:
        told = decode(options)
    except (ValueError, ImportError) as error:
        print(f"decode_scores: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"decode_scores: {options.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"{told['utterances']:,} utterances, {told['seconds']:,.1f} s; {told['too_short']:,} without a frame give no words")
    print(f"graph: {told['graph_arcs']:,} arcs, built in {told['graph_seconds']:.2f} s")
    print(f"search: {told['search_seconds']:.2f} s, real-time factor {told['search_seconds'] / max(told['seconds'], 1e-9):.4f}")
    if told["words"]:
        print(f"oracle: {told['oracle_errors'] / told['words']:.2%}, {told['oracle_errors']} errors in {told['words']} words")
    return 0


if __name__ == "__main__":
    sys.exit(main())
