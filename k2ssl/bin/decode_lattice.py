"""The searches on k2 for `k2ssl.bin.decode`: which options they have, and why they cannot run where k2 does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from k2ssl.decode.flashlight import Lexicon as Spellings
from k2ssl.decode.hypotheses import Hypothesis

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from k2ssl.bin.decode_model import TrainedModel
    from k2ssl.lattice.arpa import Arpa
    from k2ssl.lattice.lexicon import Lexicon
    from k2ssl.lattice.paths import Path
    from k2ssl.models.asr import AsrFrames

Search = Callable[["AsrFrames"], list[list[Hypothesis]]]

_CTC = {"nbest": 1, "search_beam": 20.0, "output_beam": 8.0, "max_active": 10000}
_LM = {"lexicon": None, "lm": None, "drop_words": False}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "ctc-lattice": _CTC,
    "ctc-hlg": {**_CTC, **_LM, "lm_scale": 1.0, "rescore_lm": None, "rescore_paths": 100},
    "fast-beam": {"nbest": 1, "search_beam": 20.0, "max_states": 64, "max_contexts": 8, **_LM, "lm_scale": 0.3},
}


@dataclass(frozen=True)
class LatticeOptions:
    """Options of the searches on k2.

    Attributes:
        search_beam: at a frame, states that are worse than the best by more nats are dropped; none: 20.
        output_beam: arcs whose best path is worse than the best path by more nats are not kept in the lattice; none: 8.
        max_active: states kept at a frame; none: 10,000.
        max_states: for fast-beam: pairs of last tokens and a state of the graph, kept at a frame; none: 64.
        max_contexts: for fast-beam: different last tokens kept at a frame; none: 8.
        drop_words: leave out n-grams of lm with words that the lexicon lacks, instead of refusing them; none: False.
        rescore_lm: a larger ARPA file over words, whose scores take the place of lm's behind the search.
        rescore_paths: best paths that rescore_lm scores; 0: the whole lattice; none: 100.
    """

    search_beam: float | None = None
    output_beam: float | None = None
    max_active: int | None = None
    max_states: int | None = None
    max_contexts: int | None = None
    drop_words: bool | None = None
    rescore_lm: str | None = None
    rescore_paths: int | None = None

    def check_lattice(self, name: str) -> None:
        """
        Raises:
            ValueError: a value out of range; names the option of the class `name`.
        """
        for option, least in (("max_active", 1), ("max_states", 1), ("max_contexts", 1), ("rescore_paths", 0)):
            if getattr(self, option) is not None and getattr(self, option) < least:
                raise ValueError(f"{name}: {option} is {getattr(self, option)}, allowed are whole numbers >= {least}")
        for option in ("search_beam", "output_beam"):
            if getattr(self, option) is not None and getattr(self, option) <= 0:
                raise ValueError(f"{name}: {option} is {getattr(self, option)}, allowed is a number > 0")


def need_k2(method: str) -> None:
    """
    Raises:
        ValueError: k2 cannot be used; says why, and what would do.
    """
    from k2ssl.bin.doctor_checks import why_no_k2

    if why := why_no_k2():
        raise ValueError(f"method is {method!r}, which takes the package k2: {why}; methods without it: docs/decoding.md")


def ctc_search(options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any], spellings: Spellings | None) -> Search:
    """The search over the topology of CTC, or with a lexicon over HLG; arguments as of a builder of `k2ssl.bin.decode_methods`.

    Raises:
        ValueError: files that cannot be read or do not fit together.
    """
    from k2ssl.lattice.decoder import CtcDecoder, Words
    from k2ssl.lattice.search import Pruning

    head, device = trained.model.ctc, str(trained.device)
    assert head is not None
    if "graph" not in read:
        words = None
        if spellings is not None:
            larger = None if options["rescore_lm"] is None else _arpa(options["rescore_lm"])
            words = Words(_lexicon(options, trained, spellings), _arpa(options["lm"]), larger, options["drop_words"])
        read["graph"] = CtcDecoder(trained.tokenizer.vocab_size, words, device=device)
    decoder = read["graph"]
    lexicon = None if decoder.words is None else decoder.words.lexicon
    pruning = Pruning(options["search_beam"], options["output_beam"], min(30, options["max_active"]), options["max_active"])

    def search(output: AsrFrames) -> list[list[Hypothesis]]:
        lattice = decoder.lattice(head(output.frames), output.lens, pruning, options.get("lm_scale", 1.0))
        return _hypotheses(decoder.choose(lattice, options["nbest"], options.get("rescore_paths", 100)), lexicon)

    return search


def transducer_search(options: Mapping[str, Any], trained: TrainedModel, read: dict[str, Any], spellings: Spellings | None) -> Search:
    """The frame-synchronous search of a transducer over any tokens, or with a lexicon and a language model over LG.

    Raises:
        ValueError: one of the two without the other; files that cannot be read or do not fit together.
    """
    from k2ssl.lattice.decoder import best_paths
    from k2ssl.lattice.graphs import compile_lg
    from k2ssl.lattice.topologies import transducer_topology
    from k2ssl.lattice.transducer_search import TransducerPruning, transducer_lattice

    if (spellings is None) != (options["lm"] is None):
        raise ValueError("search.lexicon and search.lm go together with method 'fast-beam': one is given without the other")
    head, vocab_size = trained.model.transducer, trained.tokenizer.vocab_size
    assert head is not None
    if "graph" not in read:
        lexicon = None if spellings is None else _lexicon(options, trained, spellings)
        graph = (
            transducer_topology(vocab_size)
            if lexicon is None
            else compile_lg(lexicon, _arpa(options["lm"]), vocab_size, options["drop_words"])
        )
        read["graph"] = (graph.to(trained.device), lexicon)
    graph, lexicon = read["graph"]
    pruning = TransducerPruning(options["search_beam"], options["max_states"], options["max_contexts"])
    predictor, joiner = head.predictor, head.joiner

    def log_probs(frames: Tensor, contexts: Tensor) -> Tensor:
        projected = joiner.project_predictor(predictor.step(contexts))
        return joiner(frames, projected, project_input=False).float().log_softmax(-1)

    def search(output: AsrFrames) -> list[list[Hypothesis]]:
        frames = joiner.project_encoder(output.frames)
        sizes = (vocab_size, predictor.context_size)
        lattice = transducer_lattice(graph, log_probs, frames, output.lens, *sizes, pruning, options.get("lm_scale", 1.0))
        return _hypotheses(best_paths(lattice, options["nbest"]), lexicon)

    return search


def _lexicon(options: Mapping[str, Any], trained: TrainedModel, spellings: Spellings) -> Lexicon:
    from k2ssl.lattice.lexicon import lexicon_from_spellings

    return lexicon_from_spellings(spellings, trained.tokenizer.symbols, trained.delimiter, options["lexicon"])


def _arpa(path: str) -> Arpa:
    from k2ssl.lattice.arpa import read_arpa

    return read_arpa(path)


def _hypotheses(found: Sequence[Sequence[Path]], lexicon: Lexicon | None) -> list[list[Hypothesis]]:
    def one(path: Path) -> Hypothesis:
        words = None if lexicon is None else tuple(lexicon.words[word - 1] for word in path.outputs)
        return Hypothesis(path.tokens, path.score, path.frames, words)

    return [[one(path) for path in paths] for paths in found]
