"""The n-gram model as a search uses it, held against back-off models in dictionaries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from k2ssl.decode.arpa import Arpa, NgramTable, write_arpa
from k2ssl.decode.flashlight import PIP_LINE
from k2ssl.decode.kneser_ney import kneser_ney
from k2ssl.decode.lm import NgramLm, TokenLm
from k2ssl.decode.ngram_counts import NgramCounter

CPU = torch.device("cpu")
PIECES = ("<blk>", "<unk>", "a", "b", "c", "d", "e")
END = len(PIECES)


def sentences(seed: int, number: int, length: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, len(PIECES), size=(number, length)))


def listed_sentences(model: Arpa, number: int, length: int) -> Tensor:
    """Sentences that begin with n-grams of the model, so that its long contexts are come by."""
    ids = {piece: token for token, piece in enumerate(PIECES)}
    words = [[ids[model.words[word]] for word in row if model.words[word] in ids] for row in model.orders[-1].words]
    tokens = sentences(0, number, length)
    for i, row in enumerate(np.random.default_rng(0).permutation(len(words))[:number]):
        tokens[i, : len(words[row])] = torch.tensor(words[row])
    return tokens


def walk(lm: TokenLm, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(N, T + 1, V) rows before every token of (N, T) and after the last, and (N, T + 1) logarithms of the end."""
    state = lm.start(len(tokens), CPU)
    rows, finals = [lm.log_probs(state)], [lm.final(state)]
    for token in tokens.T:
        state = lm.advance(state, token)
        rows.append(lm.log_probs(state))
        finals.append(lm.final(state))
    return torch.stack(rows, 1), torch.stack(finals, 1)


@pytest.mark.parametrize(("order", "share"), [(1, 0.0), (2, 0.4), (3, 0.3), (5, 0.25)])
def test_rows_ends_and_states_are_those_of_the_definition(ngrams, agreement, order: int, share: float) -> None:  # type: ignore[no-untyped-def]
    model = ngrams.random_model(order, PIECES[1:], order, share)
    plain = ngrams.plain(model)
    tokens = listed_sentences(model, 30, 8)
    rows, finals = walk(NgramLm(model, PIECES), tokens)
    expected = torch.zeros(30, 9, len(PIECES) + 1, dtype=torch.float64)
    for i, row in enumerate(tokens.tolist()):
        for t in range(9):
            history = ["<s>", *(PIECES[token] for token in row[:t])]
            for token in range(1, len(PIECES) + 1):
                expected[i, t, token] = plain.log10(history, (*PIECES, "</s>")[token]) * math.log(10)
    agreement.absolute("n-gram rows against dictionaries", rows[..., 1:], expected[..., 1 : len(PIECES)], 1e-5)
    agreement.absolute("n-gram ends against dictionaries", finals, expected[..., END], 1e-5)
    assert not rows[..., 0].any()


def test_models_made_for_the_comparison_have_gaps(ngrams) -> None:  # type: ignore[no-untyped-def]
    """Suffixes that are not listed, contexts without n-grams, and positive back-off weights are what makes back-off hard."""
    model = ngrams.random_model(5, PIECES[1:], 5, 0.25)
    entries = ngrams.plain(model).entries
    assert any(len(ngram) > 2 and ngram[1:] not in entries for ngram in entries)
    assert {len(ngram) for ngram in entries} == {1, 2, 3, 4, 5} and any(backoff > 0 for _, backoff in entries.values())
    prefixes = {ngram[:-1] for ngram in entries}
    assert any(1 < len(ngram) < 5 and ngram[-1] != "</s>" and ngram not in prefixes for ngram in entries)


def test_a_hypothesis_scores_the_same_alone_and_among_others(ngrams) -> None:  # type: ignore[no-untyped-def]
    lm = NgramLm(ngrams.random_model(0, PIECES[1:], 4), PIECES)
    tokens = sentences(1, 12, 6)
    rows, finals = walk(lm, tokens)
    for i in range(len(tokens)):
        alone = walk(lm, tokens[i : i + 1])
        assert torch.equal(alone[0][0], rows[i]) and torch.equal(alone[1][0], finals[i])


def test_a_model_in_float64_scores_as_one_in_float32(ngrams) -> None:  # type: ignore[no-untyped-def]
    model, tokens = ngrams.random_model(0, PIECES[1:], 3), sentences(1, 5, 6)
    for one, two in zip(walk(NgramLm(model, PIECES), tokens), walk(NgramLm(model, PIECES).double(), tokens), strict=True):
        torch.testing.assert_close(two, one.double())


def test_single_tokens_score_as_in_their_row(ngrams) -> None:  # type: ignore[no-untyped-def]
    lm = NgramLm(ngrams.random_model(0, PIECES[1:], 3), PIECES)
    state = lm.start(20, CPU)
    for token in sentences(2, 20, 6).T:
        log_prob, after = lm.step(state, token)
        torch.testing.assert_close(log_prob, lm.log_probs(state)[torch.arange(20), token])
        assert torch.equal(after, lm.advance(state, token)) and after.dtype == torch.int64
        state = after
    assert len(state.unique()) > 5


def test_an_estimated_model_gives_distributions(ngrams) -> None:  # type: ignore[no-untyped-def]
    text = ngrams.made_up_text(300, vocabulary=12)
    pieces = ("<blk>", "<unk>", *sorted({word for sentence in text for word in sentence}))
    counter = NgramCounter(4)
    for sentence in text:
        counter.add(sentence)
    lm = NgramLm(kneser_ney(counter.counts()), pieces)
    tokens = torch.from_numpy(np.random.default_rng(3).integers(1, len(pieces), size=(40, 7)))
    rows, finals = walk(lm, tokens)
    total = rows[..., 1:].exp().sum(-1) + finals.exp()
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)


def test_nothing_waits_for_the_device(ngrams, no_questions) -> None:  # type: ignore[no-untyped-def]
    lm = NgramLm(ngrams.random_model(0, PIECES[1:], 4), PIECES)
    tokens = sentences(4, 5, 3)
    with no_questions():
        state = lm.start(5, CPU)
        for token in tokens.T:
            lm.log_probs(state)
            lm.final(state)
            state = lm.advance(state, token)


def test_special_words_are_found_in_either_case_and_made_up_where_missing() -> None:
    words = ("<UNK>", "</s>", "x", "y")
    single = NgramTable(np.arange(4, dtype=np.int32)[:, None], np.array([-1.0, -0.5, -0.25, -2.0]), np.zeros(4))
    rows, finals = walk(NgramLm(Arpa(words, (single,)), ("<blk>", "<unk>", "x", "y")), torch.zeros(1, 0, dtype=torch.int64))
    torch.testing.assert_close(rows[0, 0] / math.log(10), torch.tensor([0.0, -1.0, -0.25, -2.0]))
    torch.testing.assert_close(finals[0, 0] / math.log(10), torch.tensor(-0.5))
    without = Arpa(("x", "y"), (NgramTable(single.words[:2], single.log_prob[2:], np.zeros(2)),))
    rows, finals = walk(NgramLm(without, ("<blk>", "<unk>", "x", "y")), torch.tensor([[2, 3]]))
    torch.testing.assert_close(rows[0, 2] / math.log(10), torch.tensor([0.0, -99.0, -0.25, -2.0]))
    assert rows.isfinite().all() and finals.isfinite().all() and finals[0, 0] < -200


def test_a_model_over_another_vocabulary_is_refused_by_name(ngrams, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = ngrams.random_model(0, PIECES[1:], 2)
    with open(tmp_path / "lm.arpa", "wb") as file:
        write_arpa(file, model)
    assert NgramLm.load(tmp_path / "lm.arpa", PIECES).vocab_size == 7
    with pytest.raises(ValueError) as refusal:
        NgramLm.load(tmp_path / "lm.arpa", ("<blk>", "<unk>", "a", "b", *"uvwxyz"))
    message = str(refusal.value)
    assert message.startswith(str(tmp_path / "lm.arpa")) and "another vocabulary" in message
    assert "6 ('u', 'v', 'w', 'x', 'y', ...) of the tokenizer's 10 symbols are missing" in message
    assert "3 (" in message and "of its 8 words are none of the tokenizer's" in message
    with pytest.raises(ValueError, match=r"1 \('f'\) of the tokenizer's 8 symbols are missing in it, and 0 of its 8 words"):
        NgramLm(model, (*PIECES, "f"))
    with pytest.raises(ValueError, match=r"0 of the tokenizer's 6 symbols are missing in it, and 1 \('e'\) of its 8 words"):
        NgramLm(model, PIECES[:-1])
    with pytest.raises(ValueError, match=r"of its 8 words are none"):
        NgramLm(model, ("a", "<unk>", *PIECES[3:]))  # blank is never a word


def test_ngrams_listed_twice_or_without_their_first_words_are_refused() -> None:
    single = NgramTable(np.arange(4, dtype=np.int32)[:, None], np.full(4, -1.0), np.zeros(4))
    words, pieces = ("</s>", "<s>", "x", "y"), ("<blk>", "<unk>", "x", "y")

    def table(*rows: tuple[int, ...]) -> NgramTable:
        return NgramTable(np.array(rows, dtype=np.int32), np.full(len(rows), -1.0), np.zeros(len(rows)))

    with pytest.raises(ValueError, match="the 2-gram 'x y' is listed twice"):
        NgramLm(Arpa(words, (single, table((2, 3), (1, 2), (2, 3)))), pieces)
    with pytest.raises(ValueError, match="the 3-gram 'x y </s>' is listed without its first words"):
        NgramLm(Arpa(words, (single, table((2, 2), (1, 2)), table((1, 2, 3), (2, 3, 0)))), pieces)


def scores_of(model: Any, tokens: list[int]) -> list[float]:
    """Decimal logarithms that KenLM gives the tokens of a sentence and its end."""
    scores, state = [], model.start(False)
    for token in tokens:
        state, score = model.score(state, token)
        scores.append(score)
    return [*scores, model.finish(state)[1]]


def test_scores_are_those_of_kenlm(ngrams, agreement, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    kenlm = pytest.importorskip("flashlight.lib.text.decoder.kenlm", reason=f"the package that holds KenLM: {PIP_LINE}")
    dictionary = pytest.importorskip("flashlight.lib.text.dictionary")
    counter = NgramCounter(4)
    for sentence in ngrams.made_up_text(200):
        counter.add(sentence)
    model = kneser_ney(counter.counts(), (0, 0, 1))
    with open(tmp_path / "lm.arpa", "wb") as file:
        write_arpa(file, model)
    pieces = ("<blk>", "<unk>", *model.words[3:])
    tokens = torch.from_numpy(np.random.default_rng(0).integers(1, len(pieces), size=(60, 7)))
    rows, finals = walk(NgramLm(model, pieces), tokens)
    ours = torch.cat([rows[:, :-1].gather(2, tokens.unsqueeze(2)).squeeze(2), finals[:, -1:]], dim=1)
    theirs = kenlm.KenLM(str(tmp_path / "lm.arpa"), dictionary.Dictionary(list(pieces)))
    expected = [scores_of(theirs, row) for row in tokens.tolist()]
    agreement.absolute("n-gram scores against kenlm", ours, torch.tensor(expected, dtype=torch.float64) * math.log(10), 2e-5)
