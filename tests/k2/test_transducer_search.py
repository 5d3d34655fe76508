"""The frame-synchronous transducer search against everything that a graph allows, and against our own beam search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path as File

import k2
import pytest
import torch
import toys
from torch import Tensor

from k2ssl.lattice.empty import EmptyLatticeError
from k2ssl.lattice.graphs import compile_lg
from k2ssl.lattice.paths import Path, n_best, one_best
from k2ssl.lattice.search import Lattice
from k2ssl.lattice.topologies import transducer_topology
from k2ssl.lattice.transducer_search import Scorer, TransducerPruning, transducer_lattice

EVERYTHING = TransducerPruning(search_beam=1000.0, max_states=100000, max_contexts=100000)
NUM_TOKENS = len(toys.SYMBOLS)
Table = Callable[[Tensor, Tensor], Tensor]


def table(seed: int, vocab: int) -> tuple[Scorer, Table]:
    """Networks that are a table over two tokens of context, -1 among them, and frames of as many numbers as tokens."""
    weights = 2 * torch.randn(vocab + 1, vocab, vocab, generator=torch.Generator().manual_seed(seed))

    def log_probs(frames: Tensor, contexts: Tensor) -> Tensor:
        return (frames + weights[contexts[:, 0] + 1, contexts[:, 1]]).log_softmax(-1)

    return log_probs, lambda frame, context: log_probs(frame[None], context[None])[0]


def search(
    graph: object, networks: Scorer, frames: Tensor, lens: Tensor, pruning: TransducerPruning = EVERYTHING, lm_scale: float = 1.0
) -> Lattice:
    return transducer_lattice(graph, networks, frames, lens, frames.shape[2], 2, pruning, lm_scale)


def every_path(frames: Tensor, one: Table) -> dict[tuple[int, ...], list[float]]:
    """Scores of all alignments of all token sequences with at most one token a frame."""
    found: dict[tuple[int, ...], list[float]] = {}
    asked: dict[tuple[int, tuple[int, int]], list[float]] = {}
    for labels in itertools.product(range(frames.shape[1]), repeat=len(frames)):
        context, score = (-1, 0), 0.0
        for t, label in enumerate(labels):
            if (t, context) not in asked:
                asked[t, context] = one(frames[t], torch.tensor(context)).tolist()
            score += asked[t, context][label]
            if label:
                context = (context[1], label)
        found.setdefault(tuple(label for label in labels if label), []).append(score)
    return found


def ranked(scores: dict[tuple[object, ...], float], number: int) -> tuple[list[tuple[object, ...]], list[float]]:
    best = sorted(scores.items(), key=lambda pair: -pair[1])[:number]
    return [outputs for outputs, _ in best], [score for _, score in best]


@pytest.mark.parametrize("seed", range(3))
def test_any_tokens_are_found_as_counting_everything_out_finds_them(seed: int) -> None:
    networks, one = table(seed, 4)
    frames, lens = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(seed)), torch.tensor([6, 4, 1])
    lattice = search(transducer_topology(4), networks, frames, lens)
    for row, (length, found, best) in enumerate(zip(lens.tolist(), n_best(lattice, 6), one_best(lattice))):
        outputs, scores = ranked({tokens: max(each) for tokens, each in every_path(frames[row, :length], one).items()}, 6)
        assert [path.outputs for path in found] == [path.tokens for path in found] == outputs[: len(found)]
        assert [path.score for path in found] == pytest.approx(scores, abs=1e-4)
        assert best == found[0] and alignment_score(best, frames[row, :length], one) == pytest.approx(best.score, abs=1e-4)


def alignment_score(path: Path, frames: Tensor, one: Table) -> float:
    """Of the alignment that a path's frames say."""
    emitted, context, score = dict(zip(path.frames, path.tokens)), (-1, 0), 0.0
    for t, frame in enumerate(frames):
        label = emitted.get(t, 0)
        score += one(frame, torch.tensor(context))[label].item()
        if label:
            context = (context[1], label)
    return score


@pytest.mark.parametrize("delimiter", ["|", ""])
def test_a_graph_of_words_finds_what_counting_everything_out_finds(tmp_path: File, delimiter: str) -> None:
    lexicon, arpa = toys.lexicon(delimiter), toys.ngram_model(tmp_path, 3, seed=1)
    networks, one = table(7, NUM_TOKENS)
    frames = torch.randn(1, 5, NUM_TOKENS)
    expected: dict[tuple[object, ...], float] = {}
    for tokens, scores in every_path(frames[0], one).items():
        for sentence in toys.sentences(tokens, delimiter):
            score = max(scores) + 0.6 * arpa.log_prob(sentence)
            expected[sentence] = max(expected.get(sentence, -math.inf), score)
    lattice = search(compile_lg(lexicon, arpa, NUM_TOKENS), networks, frames, torch.tensor([5]), lm_scale=0.6)
    outputs, scores = ranked(expected, 8)
    (found,) = n_best(lattice, 8)
    assert [tuple(lexicon.words[word - 1] for word in path.outputs) for path in found] == outputs
    assert [path.score for path in found] == pytest.approx(scores, abs=1e-4)
    assert [path.lm_score for path in found] == pytest.approx([arpa.log_prob(sentence) for sentence in outputs], abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_our_modified_beam_search_scores_as_the_lattice_that_holds_its_paths(ours: Callable[[str], dict[str, Tensor]], seed: int) -> None:
    a = ours(f"modified_beam_{seed}")
    batch, num_frames, vocab = a["log_probs"].shape[0], a["log_probs"].shape[1], a["log_probs"].shape[-1]
    # a frame is its own number, so that the networks are a table
    frames = torch.arange(batch * num_frames).view(batch, num_frames, 1).expand(-1, -1, vocab).float()
    flat = a["log_probs"].flatten(0, 1)
    lattice = search(
        transducer_topology(vocab), lambda frame, context: flat[frame[:, 0].long(), context[:, 0] + 1, context[:, 1]], frames, a["lens"]
    )
    for utterance, tokens, score in zip(a["utterance"].tolist(), a["tokens"].tolist(), a["scores"].tolist()):
        said = k2.linear_fsa([[token for token in tokens if token >= 0]])  # with blanks anywhere
        both = k2.intersect_device(lattice.fsa, k2.add_epsilon_self_loops(said), torch.tensor([utterance], dtype=torch.int32))
        total = k2.top_sort(k2.connect(both)).get_tot_scores(use_double_scores=True, log_semiring=True).item()
        assert total == pytest.approx(score, abs=1e-4)
    best = dict(enumerate(one_best(lattice)))
    kept = {
        (utterance, *(token for token in tokens if token >= 0)) for utterance, tokens in zip(a["utterance"].tolist(), a["tokens"].tolist())
    }
    assert sum((utterance, *path.tokens) in kept for utterance, path in best.items()) >= 2  # of three: one ranks sums, the other alignments


def test_a_batch_gives_what_its_utterances_give_alone(tmp_path: File) -> None:
    networks, _ = table(3, NUM_TOKENS)
    frames, lens = torch.randn(5, 30, NUM_TOKENS), torch.tensor([30, 2, 17, 1, 30])
    for graph in (transducer_topology(NUM_TOKENS), compile_lg(toys.lexicon("|"), toys.ngram_model(tmp_path, 2, seed=1), NUM_TOKENS)):
        batch = n_best(search(graph, networks, frames, lens, TransducerPruning(8.0, 16, 4)), 3)
        for row, length in enumerate(lens.tolist()):
            alone = n_best(search(graph, networks, frames[row : row + 1, :length], lens[row : row + 1], TransducerPruning(8.0, 16, 4)), 3)
            assert alone[0] == batch[row]


def test_an_utterance_without_any_path_is_named(tmp_path: File) -> None:
    (tmp_path / "long.arpa").write_text(
        "\\data\\\nngram 1=2\nngram 2=1\n\n\\1-grams:\n-1\t<s>\t0\n-1\tAB\t0\n\n\\2-grams:\n-1\tAB </s>\n\n\\end\\\n"
    )
    graph = compile_lg(toys.lexicon(""), toys.read_arpa(tmp_path / "long.arpa"), NUM_TOKENS)
    networks, _ = table(3, NUM_TOKENS)
    with pytest.raises(EmptyLatticeError, match="utterance second: no path of the decoding graph is left: tried search_beam 20 and 40"):
        transducer_lattice(graph, networks, torch.randn(2, 3, NUM_TOKENS), torch.tensor([3, 1]), NUM_TOKENS, 2, names=["first", "second"])


def test_numbers_that_cannot_be_are_refused() -> None:
    networks, _ = table(0, 4)
    with pytest.raises(ValueError, match="the graph has the token 5, there are 0"):
        search(transducer_topology(6), networks, torch.zeros(1, 2, 4), torch.tensor([2]))
    with pytest.raises(ValueError, match="encoder_out of utterance 0 holds nan"):
        search(transducer_topology(4), networks, torch.full((1, 2, 4), float("nan")), torch.tensor([2]))
    with pytest.raises(ValueError, match="max_states is 0"):
        TransducerPruning(max_states=0)
    with pytest.raises(ValueError, match="search_beam is -1"):
        TransducerPruning(search_beam=-1.0)
