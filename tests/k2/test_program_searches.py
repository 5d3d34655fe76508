"""The searches as k2ssl.bin.decode builds them, with a model that gives its frames back: the part of that program that an old Python runs."""

from __future__ import annotations

from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from k2ssl.bin import decode_lattice
from k2ssl.lattice.graphs import compile_lg
from k2ssl.lattice.paths import n_best
from k2ssl.lattice.transducer_search import TransducerPruning, transducer_lattice

NUM_TOKENS = len(toys.SYMBOLS)
SPELLINGS = {word: [list(way) for way in ways] for word, ways in toys.SPELLINGS.items()}


def trained(networks: Any = None) -> Any:
    """What the searches ask of a trained model: log-probabilities are its frames."""
    tokenizer = SimpleNamespace(vocab_size=NUM_TOKENS, symbols=toys.SYMBOLS)
    model = SimpleNamespace(ctc=lambda frames: frames, transducer=networks)
    return SimpleNamespace(model=model, tokenizer=tokenizer, device=torch.device("cpu"), delimiter="|")


def output(lens: list[int]) -> Any:
    return SimpleNamespace(frames=toys.random_log_probs(1, len(lens), max(lens), NUM_TOKENS), lens=torch.tensor(lens))


def options(method: str, **given: object) -> dict[str, object]:
    return {**decode_lattice.OPTIONS[method], **given}


def test_ctc_lattice_finds_the_tokens_of_greedy_search() -> None:
    search = decode_lattice.ctc_search(options("ctc-lattice"), trained(), {}, None)
    said = output([8, 5])
    for (found,), frames, length in zip(search(said), said.frames, said.lens.tolist()):
        assert found.tokens == toys.collapsed(tuple(frames[:length].argmax(-1).tolist())) and found.words is None


def test_ctc_hlg_gives_words_and_reads_its_files_once(tmp_path: File) -> None:
    arpa, read = toys.ngram_model(tmp_path, 2, seed=1), {}
    given = options("ctc-hlg", lexicon="words.txt", lm=arpa.path, nbest=3, rescore_lm=toys.ngram_model(tmp_path, 3, seed=1).path)
    found = decode_lattice.ctc_search(given, trained(), read, SPELLINGS)(output([6, 4]))
    decoder = read["graph"]
    expected = decoder.choose(decoder.lattice(output([6, 4]).frames, torch.tensor([6, 4])), 3)
    words = list(toys.SPELLINGS)
    for mine, theirs in zip(found, expected):
        assert [one.words for one in mine] == [tuple(words[word - 1] for word in path.outputs) for path in theirs]
        assert [(one.tokens, one.frames, one.score) for one in mine] == [(path.tokens, path.frames, path.score) for path in theirs]
    decode_lattice.ctc_search({**given, "lm_scale": 0.5}, trained(), read, {})
    assert read["graph"] is decoder


def test_fast_beam_searches_a_transducer_with_and_without_words(tmp_path: File) -> None:
    weights = torch.randn(NUM_TOKENS + 1, NUM_TOKENS, NUM_TOKENS)

    def step(contexts: Tensor) -> Tensor:
        return weights[contexts[:, 0] + 1, contexts[:, 1]]

    class Joiner:
        def project_encoder(self, frames: Tensor) -> Tensor:
            return 2 * frames

        def project_predictor(self, given: Tensor) -> Tensor:
            return given

        def __call__(self, frames: Tensor, given: Tensor, project_input: bool) -> Tensor:
            assert not project_input
            return frames + given

    model = trained(SimpleNamespace(predictor=SimpleNamespace(step=step, context_size=2), joiner=Joiner()))
    arpa, said = toys.ngram_model(tmp_path, 2, seed=1), output([7, 3])
    given = options("fast-beam", lexicon="words.txt", lm=arpa.path, nbest=2, lm_scale=0.5)
    found = decode_lattice.transducer_search(given, model, {}, SPELLINGS)(said)
    graph = compile_lg(toys.lexicon("|"), arpa, NUM_TOKENS)
    sizes = (NUM_TOKENS, 2, TransducerPruning(), 0.5)
    expected = n_best(transducer_lattice(graph, lambda f, c: (f + step(c)).log_softmax(-1), 2 * said.frames, said.lens, *sizes), 2)
    for mine, theirs in zip(found, expected):
        assert [(one.tokens, one.score) for one in mine] == [(path.tokens, path.score) for path in theirs]
        assert [one.words for one in mine] == [tuple(list(toys.SPELLINGS)[word - 1] for word in path.outputs) for path in theirs]
    free = decode_lattice.transducer_search(options("fast-beam"), model, {}, None)(said)
    assert all(one.words is None and len(one.frames) == len(one.tokens) for (one,) in free)
    with pytest.raises(ValueError, match=r"search.lexicon and search.lm go together"):
        decode_lattice.transducer_search(options("fast-beam", lm=arpa.path), model, {}, None)
