"""Searches over the frames of CTC against greedy search and against everything that a graph allows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path as File

import pytest
import torch
import toys
from torch import Tensor

from k2ssl.lattice.arpa import Arpa, read_arpa
from k2ssl.lattice.decoder import CtcDecoder, Words
from k2ssl.lattice.empty import EmptyLatticeError
from k2ssl.lattice.graphs import compile_hlg, compile_lg, grammar_graph
from k2ssl.lattice.lexicon import lexicon_from_spellings
from k2ssl.lattice.paths import Path, n_best, one_best
from k2ssl.lattice.rescoring import error_rate, oracle_errors, rescored, rescored_lattice
from k2ssl.lattice.search import Pruning, ctc_lattice
from k2ssl.lattice.topologies import ctc_topology, transducer_topology

EVERYTHING = Pruning(search_beam=1000.0, output_beam=1000.0, max_active=1000000)
NUM_TOKENS = len(toys.SYMBOLS)


def texts(paths: list[Path], words: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [tuple(words[word - 1] for word in path.outputs) for path in paths]


@pytest.mark.parametrize("seed", range(3))
def test_the_best_path_over_the_topology_is_that_of_greedy_search(ours: Callable[[str], dict[str, Tensor]], seed: int) -> None:
    a = ours(f"ctc_{seed}")
    found = one_best(ctc_lattice(ctc_topology(a["log_probs"].shape[2]), a["log_probs"], a["lens"]))
    for path, tokens, frames, score in zip(found, a["tokens"].tolist(), a["frames"].tolist(), a["scores"].tolist()):
        assert list(path.tokens) == list(path.outputs) == [token for token in tokens if token >= 0]
        assert list(path.frames) == [frame for frame in frames if frame >= 0]
        assert path.score == pytest.approx(score, abs=1e-4)


def test_the_modified_topology_may_read_equal_neighbours_as_two_tokens() -> None:
    log_probs = torch.tensor([[[-9.0, -0.1], [-9.0, -0.2], [-9.0, -0.3]]])
    lens = torch.tensor([3])
    assert [path.outputs for path in n_best(ctc_lattice(ctc_topology(2), log_probs, lens, EVERYTHING), 9)[0]] == [(1,), (1, 1), ()]
    modified = n_best(ctc_lattice(ctc_topology(2, modified=True), log_probs, lens, EVERYTHING), 9)[0]
    assert {path.outputs: round(path.score, 4) for path in modified[:3]} == {(1,): -0.6, (1, 1): -0.6, (1, 1, 1): -0.6}


@pytest.mark.parametrize("delimiter", ["|", ""])
@pytest.mark.parametrize(("order", "lm_scale"), [(1, 1.0), (2, 1.0), (3, 0.5)])
def test_a_graph_of_words_finds_what_counting_everything_out_finds(tmp_path: File, delimiter: str, order: int, lm_scale: float) -> None:
    lexicon, arpa = toys.lexicon(delimiter), toys.ngram_model(tmp_path, order, seed=order)
    graph = compile_hlg(lexicon, arpa, NUM_TOKENS)
    for seed in range(2):
        log_probs = toys.random_log_probs(seed, 6, NUM_TOKENS)
        expected = toys.ctc_sentences(log_probs, delimiter, lambda words: lm_scale * arpa.log_prob(words))
        lattice = ctc_lattice(graph, log_probs.unsqueeze(0), torch.tensor([6]), EVERYTHING, lm_scale)
        (best,) = one_best(lattice)
        assert texts([best], lexicon.words) == [expected[0][0]]
        assert best.score == pytest.approx(expected[0][1], abs=1e-4)
        assert best.lm_score == pytest.approx(arpa.log_prob(expected[0][0]), abs=1e-4)
        (every,) = n_best(lattice, 10**6)
        assert sorted(texts(every, lexicon.words)) == sorted(sentence for sentence, _ in expected)
        assert [path.score for path in every] == pytest.approx([score for _, score in expected], abs=1e-3)


def test_tokens_and_frames_of_a_path_of_words_are_those_of_its_labels(tmp_path: File) -> None:
    graph = compile_hlg(toys.lexicon("|"), toys.ngram_model(tmp_path, 2, seed=1), NUM_TOKENS)
    wanted = [0, 2, 2, 3, 1, 0, 4, 0, 4]  # ab|cc
    log_probs = torch.full((1, len(wanted), NUM_TOKENS), -50.0)
    log_probs[0, torch.arange(len(wanted)), wanted] = 0.0
    (best,) = one_best(ctc_lattice(graph, log_probs, torch.tensor([len(wanted)])))
    assert texts([best], toys.lexicon("|").words) == [("AB", "CC")]
    assert best.tokens == (2, 3, 1, 4, 4) and best.frames == (1, 3, 4, 6, 8)


def test_of_words_that_sound_alike_the_more_probable_one_is_found(tmp_path: File) -> None:
    alike = lexicon_from_spellings({"A": [["a"]], "EH": [["a"]]}, toys.SYMBOLS, "|")
    text = "\\data\\\nngram 1=4\nngram 2=2\n\n\\1-grams:\n-9\t<s>\t0\n-1\tA\t0\n-2\tEH\t0\n-1\t</s>\n\n\\2-grams:\n-0.1\tA EH\n-0.5\tEH A\n\n\\end\\\n"
    (tmp_path / "alike.arpa").write_text(text)
    arpa = read_arpa(tmp_path / "alike.arpa")
    log_probs = torch.full((1, 5, NUM_TOKENS), -50.0)
    log_probs[0, torch.arange(5), [2, 1, 2, 1, 2]] = 0.0
    (best,) = one_best(ctc_lattice(compile_hlg(alike, arpa, NUM_TOKENS), log_probs, torch.tensor([5])))
    every = {words: arpa.log_prob(words) for words in itertools.product(("A", "EH"), repeat=3)}
    assert texts([best], alike.words) == [max(every, key=every.__getitem__)] == [("A", "EH", "A")]
    assert best.score == pytest.approx(max(every.values()), abs=1e-4)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("delimiter", ["|", ""])
def test_rescoring_with_the_same_model_leaves_the_paths_in_their_places(tmp_path: File, delimiter: str, whole: bool) -> None:
    lexicon, arpa = toys.lexicon(delimiter), toys.ngram_model(tmp_path, 3, seed=5)
    lattice = ctc_lattice(
        compile_hlg(lexicon, arpa, NUM_TOKENS), toys.random_log_probs(1, 3, 9, NUM_TOKENS), torch.tensor([9, 7, 4]), lm_scale=0.7
    )
    before = n_best(lattice, 8)
    if whole:
        after = n_best(rescored_lattice(lattice, grammar_graph(arpa, lexicon), 0.7), 8)
    else:
        after = rescored(before, lattice, arpa, lexicon, 0.7)
    for old, new in zip(before, after):
        assert new[0].outputs == old[0].outputs and new[0].tokens == old[0].tokens
        assert [path.score for path in new] == pytest.approx([path.score for path in old], abs=1e-4)
        assert [path.lm_score for path in new] == pytest.approx([path.lm_score for path in old], abs=1e-4)


@pytest.mark.parametrize("rescore_paths", [10**6, 0])
def test_rescoring_everything_with_a_larger_model_is_searching_with_it(tmp_path: File, rescore_paths: int) -> None:
    lexicon, small, larger = toys.lexicon("|"), toys.ngram_model(tmp_path, 1, seed=1), toys.ngram_model(tmp_path, 3, seed=4)
    decoder = CtcDecoder(NUM_TOKENS, Words(lexicon, small, larger))
    log_probs = toys.random_log_probs(3, 6, NUM_TOKENS)
    expected = toys.ctc_sentences(log_probs, "|", lambda words: 0.8 * larger.log_prob(words))[:5]
    lattice = decoder.lattice(log_probs.unsqueeze(0), torch.tensor([6]), EVERYTHING, lm_scale=0.8)
    (found,) = decoder.choose(lattice, 5, rescore_paths)
    assert texts(found, lexicon.words) == [sentence for sentence, _ in expected]
    assert [path.score for path in found] == pytest.approx([score for _, score in expected], abs=1e-4)
    assert texts(one_best(lattice), lexicon.words) != [expected[0][0]]  # so that there was something to do


def test_a_batch_gives_what_its_utterances_give_alone(tmp_path: File) -> None:
    lexicon = toys.lexicon("|")
    decoder = CtcDecoder(NUM_TOKENS, Words(lexicon, toys.ngram_model(tmp_path, 2, seed=3), toys.ngram_model(tmp_path, 3, seed=3)))
    log_probs, lens = toys.random_log_probs(4, 6, 40, NUM_TOKENS), torch.tensor([40, 3, 17, 40, 1, 25])
    for number, paths in ((1, 0), (4, 20)):
        batch = decoder.choose(decoder.lattice(log_probs, lens), number, paths)
        for row, length in enumerate(lens.tolist()):
            alone = decoder.choose(decoder.lattice(log_probs[row : row + 1, :length], lens[row : row + 1]), number, paths)
            assert alone[0] == batch[row]


def test_the_oracle_is_the_least_of_all_paths_errors(tmp_path: File) -> None:
    lexicon = toys.lexicon("|")
    graph = compile_hlg(lexicon, toys.ngram_model(tmp_path, 2, seed=1), NUM_TOKENS)
    log_probs, lens = toys.random_log_probs(5, 4, 12, NUM_TOKENS), torch.tensor([12, 12, 8, 8])
    lattice = ctc_lattice(graph, log_probs, lens, Pruning(output_beam=5.0))
    references = [[1, 2, 3, 0, 4], [3, 3], [], [4, 1]]
    errors = oracle_errors(lattice, references)
    paths = n_best(lattice, 10**6)
    assert min(map(len, paths)) > 1
    assert errors == [min(edits(path.outputs, reference) for path in found) for found, reference in zip(paths, references)]
    assert max(errors) > 0 and error_rate(errors, references) == sum(errors) / 9


def edits(found: tuple[int, ...], reference: list[int]) -> int:
    if not found or not reference:
        return max(len(found), len(reference))
    same = edits(found[1:], reference[1:]) + (found[0] != reference[0])
    return min(same, edits(found[1:], reference) + 1, edits(found, reference[1:]) + 1)


# --- what cannot be


def test_a_search_that_ends_nowhere_is_made_again_with_a_wider_beam(tmp_path: File, caplog: pytest.LogCaptureFixture) -> None:
    graph = only_sentence(tmp_path)
    likely, unlikely = torch.tensor([-8.0, -9.0, -0.1, -8.0, -9.0]), torch.tensor([-0.1, -9.0, -8.0, -8.0, -9.0])
    log_probs = torch.stack([torch.stack([likely, likely, unlikely]), torch.stack([likely, likely.roll(1), unlikely])])
    lens = torch.tensor([3, 3])
    caplog.clear()
    narrow = Pruning(search_beam=3.0, min_active=0)
    found = one_best(ctc_lattice(graph, log_probs, lens, narrow, names=("hard", "easy")))
    assert [record.message for record in caplog.records] == ["no path is left of utterance hard: searching again with a search beam of 6"]
    expected = one_best(ctc_lattice(graph, log_probs, lens, EVERYTHING))
    assert found == expected and [path.tokens for path in found] == [(2, 3)] * 2


def test_an_utterance_without_any_path_is_named(tmp_path: File) -> None:
    graph = only_sentence(tmp_path)  # takes two frames
    log_probs, lens = toys.random_log_probs(0, 3, 5, NUM_TOKENS), torch.tensor([5, 1, 4])
    with pytest.raises(EmptyLatticeError, match=r"utterance 1 of the batch: no path .* is left: tried search_beam 20 and 40") as caught:
        ctc_lattice(graph, log_probs, lens)
    assert caught.value.rows == (1,)
    assert "utterance second:" in str(caught.value.named(["first", "second", "third"]))
    with pytest.raises(EmptyLatticeError, match="utterance second: no path"):
        ctc_lattice(graph, log_probs, lens, names=["first", "second", "third"])


def only_sentence(folder: File) -> object:
    """A graph of the one sentence AB."""
    path = folder / "only.arpa"
    path.write_text(
        "\\data\\\nngram 1=3\nngram 2=2\n\n\\1-grams:\n-99\t<s>\t-99\n-99\tAB\t-99\n-99\t</s>\n\n\\2-grams:\n0\t<s> AB\n0\tAB </s>\n\n\\end\\\n"
    )
    arpa = read_arpa(path)
    kept = {ngram: log_prob for ngram, log_prob in arpa.log_probs.items() if len(ngram) == 2 or ngram == ("AB",)}
    return compile_hlg(toys.lexicon(""), Arpa(arpa.path, 2, kept, {("<s>",): -1e5, ("AB",): -1e5}), NUM_TOKENS)


def test_words_outside_of_the_lexicon_are_counted_and_named_or_left_out(tmp_path: File, caplog: pytest.LogCaptureFixture) -> None:
    text = "\\data\\\nngram 1=5\n\n\\1-grams:\n-1\tA\n-1\tZEBRA\n-1\tYAK\n-2\t<unk>\n-1\t</s>\n\n\\end\\\n"
    (tmp_path / "zoo.arpa").write_text(text)
    arpa = read_arpa(tmp_path / "zoo.arpa")
    with pytest.raises(ValueError, match=r"zoo.arpa: 2 of its 3 words are not in the lexicon: 'ZEBRA', 'YAK'; add them"):
        compile_hlg(toys.lexicon("|"), arpa, NUM_TOKENS)
    graph = compile_hlg(toys.lexicon("|"), arpa, NUM_TOKENS, drop_words=True)
    assert "2 of its 3 words are not in the lexicon, n-grams with them are left out" in caplog.text
    assert "lacks 3 of the 4 words of the lexicon, which can not be recognised: 'AB', 'BEE', 'CC'" in caplog.text
    found = n_best(ctc_lattice(graph, toys.random_log_probs(0, 1, 5, NUM_TOKENS), torch.tensor([5]), EVERYTHING), 99)[0]
    assert {word for path in found for word in path.outputs} == {1}
    (tmp_path / "none.arpa").write_text(text.replace("\tA\n", "\tAARDVARK\n"))
    with pytest.raises(ValueError, match=r"none.arpa: of its 3 words none is in the lexicon"):
        compile_lg(toys.lexicon("|"), read_arpa(tmp_path / "none.arpa"), NUM_TOKENS, drop_words=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"log_probs": torch.zeros(2, 3)}, r"log_probs is torch.float32 \(2, 3\)"),
        ({"log_probs": torch.full((2, 3, 5), float("nan"))}, "log_probs of utterance 0 holds nan"),
        ({"log_probs": torch.zeros(2, 3, 4)}, r"the graph has the token 4, log_probs has classes 0..3"),
        ({"lens": torch.tensor([3, 0])}, r"lens is \[3, 0\]"),
        ({"lens": torch.tensor([3, 4])}, r"at least one utterance of 1..3 frames"),
        ({"lens": torch.tensor([3, 3], dtype=torch.int32)}, "lens is torch.int32"),
    ],
)
def test_scores_that_cannot_be_are_refused(change: dict[str, Tensor], said: str) -> None:
    given = {"log_probs": torch.zeros(2, 3, 5), "lens": torch.tensor([3, 2])}
    with pytest.raises(ValueError, match=said):
        ctc_lattice(ctc_topology(5), **{**given, **change})


def test_numbers_that_cannot_be_are_refused(tmp_path: File) -> None:
    for make in (ctc_topology, transducer_topology):
        with pytest.raises(ValueError, match="num_tokens is 1, at least 2"):
            make(1)
    with pytest.raises(ValueError, match=r"the lexicon has the token 4, allowed are 1..3"):
        compile_lg(toys.lexicon("|"), toys.ngram_model(tmp_path, 1, seed=0), 4)
    with pytest.raises(ValueError, match=r"search_beam is 0.0"):
        Pruning(search_beam=0.0)
    with pytest.raises(ValueError, match="min_active is 30, max_active 5"):
        Pruning(max_active=5)
    lattice = ctc_lattice(ctc_topology(3), torch.zeros(1, 2, 3), torch.tensor([2]))
    with pytest.raises(ValueError, match="number is 0"):
        n_best(lattice, 0)
    with pytest.raises(ValueError, match="2 references for 1 utterances"):
        oracle_errors(lattice, [[], []])
