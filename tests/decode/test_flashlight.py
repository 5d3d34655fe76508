"""Search with flashlight-text against prefix beam search and against sums over all paths. Skipped without the package, but for refusals."""

from __future__ import annotations

import gzip
import math
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from itertools import groupby, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2ssl.decode.alignment import align
from k2ssl.decode.ctc_beam import prefix_beam_search
from k2ssl.decode.flashlight import PIP_LINE, FlashlightConfig, FlashlightSearch, spellings
from k2ssl.decode.hypotheses import Hypothesis

PIECES = ("<blk>", "a", "b", "|")
WORDS = {"a": [["a", "|"]], "ab": [["a", "b", "|"]], "bb": [["b", "b", "|"]]}
WIDE = 100000

ARPA = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-1.1\t<unk>
-99\t<s>\t-0.3
-0.7\t</s>
-0.4\ta\t-0.2
-0.9\tab\t-0.5

\\2-grams:
-0.2\t<s> ab
-0.6\tab ab
-0.3\ta </s>

\\end\\
"""
BIGRAMS = {("<s>", "ab"): -0.2, ("ab", "ab"): -0.6, ("a", "</s>"): -0.3}
UNIGRAMS = {"</s>": -0.7, "a": -0.4, "ab": -0.9, "bb": -1.1}
BACKOFFS = {"<s>": -0.3, "a": -0.2, "ab": -0.5}


@pytest.fixture
def package() -> None:
    pytest.importorskip("flashlight.lib.text.decoder", reason=f"the package of this search: {PIP_LINE}")


def draw_log_probs(seed: int, *shape: int) -> Tensor:
    return (1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def words_of(tokens: tuple[int, ...]) -> tuple[str, ...]:
    return tuple("".join(PIECES[token] for token in tokens).replace("|", " ").split())


def sums_over_words(log_probs: Tensor) -> dict[tuple[str, ...], float]:
    """Log-probability of every sequence of words of the lexicon, summed over all paths of (T, V)."""
    sums: dict[tuple[str, ...], list[float]] = defaultdict(list)
    rows = log_probs.tolist()
    for path in product(range(len(PIECES)), repeat=len(rows)):
        words = words_of(tuple(symbol for symbol, _ in groupby(path) if symbol))
        if all(word in WORDS for word in words):
            sums[words].append(math.exp(math.fsum(row[symbol] for row, symbol in zip(rows, path, strict=True))))
    return {words: math.log(math.fsum(found)) for words, found in sums.items()}


def lm_score(words: tuple[str, ...]) -> float:
    """Natural logarithm of the probability that ARPA gives; bb is unknown to it."""
    history = ("<s>", *words)
    pairs = zip(history, (*words, "</s>"), strict=True)
    return math.log(10) * sum(BIGRAMS.get(pair, BACKOFFS.get(pair[0], 0.0) + UNIGRAMS[pair[1]]) for pair in pairs)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("seed", range(3))
def test_without_a_model_it_is_prefix_beam_search(seed: int) -> None:
    log_probs, lens = draw_log_probs(seed, 4, 6, 4), torch.tensor([6, 5, 1, 0])
    found = FlashlightSearch(FlashlightConfig(beam=WIDE), PIECES, 0).search(log_probs, lens, num_hypotheses=5)
    for ours, theirs in zip(prefix_beam_search(log_probs, lens, beam=400, num_hypotheses=5), found, strict=True):
        assert [h.tokens for h in theirs] == [h.tokens for h in ours]
        assert [h.frames for h in theirs] == [h.frames for h in ours]
        assert [h.score for h in theirs] == pytest.approx([h.score for h in ours], abs=1e-5)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_with_a_lexicon_it_is_the_exhaustive_sum_over_words(seed: int, model: bool, tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text(ARPA)
    config = FlashlightConfig(beam=WIDE, lm_scale=0.8, word_score=0.5, delimiter="|")
    search = FlashlightSearch(config, PIECES, 0, WORDS, str(tmp_path / "lm.arpa") if model else None)
    log_probs = draw_log_probs(seed, 1, 7, 4)
    (found,) = search.search(log_probs, torch.tensor([7]), num_hypotheses=1000)
    expected = {
        words: score + 0.5 * len(words) + (0.8 * lm_score(words) if model else 0.0)
        for words, score in sums_over_words(log_probs[0]).items()
    }
    assert len(expected) > 10
    assert {words_of(h.tokens): h.score for h in found} == pytest.approx(expected, abs=1e-4)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@pytest.mark.usefixtures("package")
def test_without_a_lexicon_the_model_is_over_pieces(tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text(ARPA.replace("ab", "b").replace("1=5", "1=6").replace("-0.4\ta", "-1.1\t|\n-0.4\ta"))
    plain, scaled = (
        FlashlightSearch(FlashlightConfig(beam=WIDE, lm_scale=scale), PIECES, 0, lm=str(tmp_path / "lm.arpa")) for scale in (0.0, 0.8)
    )
    log_probs, lens = draw_log_probs(0, 1, 6, 4), torch.tensor([6])
    before = {h.tokens: h.score for h in plain.search(log_probs, lens, 500)[0]}
    after = {h.tokens: h.score for h in scaled.search(log_probs, lens, 500)[0]}
    assert len(before) > 100 and before.keys() == after.keys()
    names = {"a": "a", "b": "ab", "|": "bb"}
    for tokens, score in before.items():
        assert after[tokens] - score == pytest.approx(0.8 * lm_score(tuple(names[PIECES[token]] for token in tokens)), abs=1e-4)


@pytest.mark.usefixtures("package")
def test_without_a_lexicon_a_model_that_lacks_pieces_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.arpa").write_text(ARPA)  # of words, one of which happens to be a piece
    with pytest.raises(ValueError, match=r"words.arpa: .* of another vocabulary: of 3 pieces it lacks 2, such as 'b', '\|'"):
        FlashlightSearch(FlashlightConfig(), PIECES, 0, lm=str(tmp_path / "words.arpa"))


@pytest.mark.usefixtures("package")
def test_words_that_the_model_lacks_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lm.arpa").write_text(ARPA)
    FlashlightSearch(FlashlightConfig(delimiter="|"), PIECES, 0, {word: WORDS[word] for word in ("a", "ab")}, str(tmp_path / "lm.arpa"))
    assert not caplog.messages
    FlashlightSearch(FlashlightConfig(delimiter="|"), PIECES, 0, {**WORDS, "b": [["b", "|"]]}, str(tmp_path / "lm.arpa"))
    (message,) = caplog.messages
    assert "lm.arpa: of 4 words of the lexicon this language model lacks 2, such as 'bb', 'b'; they have the probability" in message


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("kind", ["probing", "trie"])
def test_a_binary_file_of_kenlm_is_the_same_model(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = shutil.which("build_binary")
    if program is None:
        pytest.skip("KenLM's build_binary is not in PATH")
    (tmp_path / "lm.arpa").write_text(ARPA)
    subprocess.run([program, kind, "lm.arpa", "lm.binary"], cwd=tmp_path, check=True, capture_output=True)
    log_probs, lens = draw_log_probs(0, 1, 6, 4), torch.tensor([6])
    config = FlashlightConfig(delimiter="|")
    one, two = (FlashlightSearch(config, PIECES, 0, WORDS, str(tmp_path / name)) for name in ("lm.arpa", "lm.binary"))
    assert one.search(log_probs, lens, 5) == two.search(log_probs, lens, 5)
    assert [message.partition(": ")[2] for message in caplog.messages][:1] * 2 == [m.partition(": ")[2] for m in caplog.messages]
    with pytest.raises(ValueError, match=r"lm.binary: .* of another vocabulary: of 1 words it lacks 1, such as 'b'"):
        FlashlightSearch(config, PIECES, 0, {"b": [["b", "|"]]}, str(tmp_path / "lm.binary"))
    with pytest.raises(ValueError, match=r"lm.binary: .* of another vocabulary: of 3 pieces it lacks 2, such as 'b', '\|'"):
        FlashlightSearch(FlashlightConfig(), PIECES, 0, lm=str(tmp_path / "lm.binary"))


@pytest.mark.usefixtures("package")
def test_other_numbers_need_no_other_reading(tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text(ARPA)
    log_probs, lens = draw_log_probs(0, 1, 7, 4), torch.tensor([7])
    configs = [FlashlightConfig(beam=WIDE, lm_scale=scale, word_score=score, delimiter="|") for scale, score in ((0.0, 0.0), (1.5, 0.7))]
    one, two = (FlashlightSearch(config, PIECES, 0, WORDS, str(tmp_path / "lm.arpa")) for config in configs)
    (tmp_path / "lm.arpa").unlink()
    assert one.with_config(configs[1]).search(log_probs, lens, 9) == two.search(log_probs, lens, 9) != one.search(log_probs, lens, 9)
    with pytest.raises(ValueError, match="delimiter is '', that of the search is"):
        one.with_config(FlashlightConfig())
    with pytest.raises(ValueError, match=r"word_score is 1\.0, which has no effect without a lexicon"):
        FlashlightSearch(FlashlightConfig(), PIECES, 0).with_config(FlashlightConfig(word_score=1.0))


@pytest.mark.usefixtures("package")
def test_a_compressed_model_is_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text(ARPA)
    (tmp_path / "lm.arpa.gz").write_bytes(gzip.compress(ARPA.encode()))
    (tmp_path / "torn.gz").write_bytes(gzip.compress(ARPA.encode())[:-20])
    log_probs, lens = draw_log_probs(0, 1, 6, 4), torch.tensor([6])
    one, two = (
        FlashlightSearch(FlashlightConfig(delimiter="|"), PIECES, 0, WORDS, str(tmp_path / name)).search(log_probs, lens, 5)
        for name in ("lm.arpa", "lm.arpa.gz")
    )
    assert one == two
    with pytest.raises(ValueError, match=r"torn\.gz: the compressed file is damaged or cut off"):
        FlashlightSearch(FlashlightConfig(delimiter="|"), PIECES, 0, WORDS, str(tmp_path / "torn.gz"))


@pytest.mark.usefixtures("package")
def test_without_adding_up_the_score_is_that_of_one_alignment() -> None:
    log_probs, lens = draw_log_probs(1, 1, 7, 4), torch.tensor([7])
    ((best,),) = FlashlightSearch(FlashlightConfig(beam=WIDE, log_add=False), PIECES, 0).search(log_probs, lens)
    assert best.score == pytest.approx(float(log_probs[0].amax(1).sum()), abs=1e-5)


@pytest.mark.usefixtures("package")
def test_narrower_settings_narrow_the_search() -> None:
    log_probs, lens = draw_log_probs(2, 1, 7, 4), torch.tensor([7])

    def number(**settings: float) -> int:
        return len(FlashlightSearch(FlashlightConfig(**{"beam": WIDE, **settings}), PIECES, 0).search(log_probs, lens, 500)[0])

    everything = number(beam_threshold=1e30)
    assert everything > number(beam_threshold=2.0) and everything > number(beam_tokens=2)
    assert len(FlashlightSearch(FlashlightConfig(beam=7), PIECES, 0).search(log_probs, lens, 7)[0]) <= 7


@pytest.mark.usefixtures("package")
def test_a_class_that_no_piece_has_is_never_found_whatever_the_threshold() -> None:
    search = FlashlightSearch(FlashlightConfig(beam=WIDE, beam_threshold=1e30), PIECES, 0)
    (found,) = search.search(draw_log_probs(2, 1, 3, 4), torch.tensor([3]), 500)
    assert len(found) > 10 and {token for hypothesis in found for token in hypothesis.tokens} == {1, 2, 3}


@pytest.mark.usefixtures("package")
def test_an_utterance_decodes_the_same_alone_and_in_a_batch() -> None:
    log_probs, lens = draw_log_probs(3, 3, 40, 4), torch.tensor([40, 13, 27])
    search = FlashlightSearch(FlashlightConfig(delimiter="|"), PIECES, 0, WORDS)
    together = search.search(log_probs, lens, 3)
    for n in range(3):
        assert search.search(log_probs[n : n + 1, : lens[n]], lens[n : n + 1], 3) == [together[n]]


@pytest.mark.usefixtures("package")
def test_words_of_the_lexicon_win_over_what_the_frames_say() -> None:
    path = [1, 2, 3, 2, 0, 1, 0]  # "ab ba", of which "ba" is no word
    log_probs = torch.full((1, 7, 4), 0.02).log()
    log_probs[0, torch.arange(7), torch.tensor(path)] = math.log(0.94)
    ((free,),) = FlashlightSearch(FlashlightConfig(), PIECES, 0).search(log_probs, torch.tensor([7]))
    ((best,),) = FlashlightSearch(FlashlightConfig(delimiter="|"), PIECES, 0, WORDS).search(log_probs, torch.tensor([7]))
    assert words_of(free.tokens) == ("ab", "ba") and words_of(best.tokens) in (("ab", "a"), ("ab", "bb"))
    assert best.score < free.score and len(best.frames) == len(best.tokens)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("delimiter", ["", "|"])
def test_of_a_word_that_the_end_cuts_off_nothing_is_left(delimiter: str) -> None:
    def found(path: list[int], beam: int, *words: str) -> list[Hypothesis]:
        lexicon = {word: [[*word, *delimiter]] for word in words}
        config = FlashlightConfig(beam=beam, delimiter=delimiter, word_score=-0.1)  # no ties, which the package resolves by chance
        log_probs, lens = torch.full((1, len(path), 4), 0.02).log(), torch.tensor([len(path)])
        log_probs[0, torch.arange(len(path)), torch.tensor(path)] = math.log(0.94)
        (hypotheses,) = FlashlightSearch(config, PIECES, 0, lexicon).search(log_probs, lens, beam)
        for one in hypotheses:
            (aligned,) = align(log_probs, lens, torch.tensor([one.tokens]).long(), torch.tensor([len(one.tokens)]))
            assert aligned is not None and one.frames == aligned.begins and aligned.score - 0.5 <= one.score < 0
            assert all(re.fullmatch(f"({'|'.join(words)})+", word) for word in words_of(one.tokens))
        return hypotheses

    # "abba" and "abb": a beam that holds nothing else at its end
    (cut,) = found([1, 2, 0, 2, 1, *([3] if delimiter else [0]), 0, 1, 2, 0, 2], 1, "abba")
    assert words_of(cut.tokens) == ("abba",)
    (nothing,) = found([1, 2, 0, 2], 1, "abba")
    assert nothing.tokens == () and nothing.score == pytest.approx(3 * math.log(0.02) + math.log(0.94), abs=1e-4)
    # "ab", whose end lasts two frames: the beginning of "abba", and a word itself
    (whole,) = found([1, 2, 2], 1, "ab", "abba")
    assert whole.tokens == (1, 2) and whole.score == pytest.approx(3 * math.log(0.94) - 0.1 * bool(delimiter), abs=1e-4)
    # where the beam holds whole words there are these alone
    assert len(found([1, 2, 0, 2], 100, "a", "abba")) > 1


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("lexicon", [("ab", "abba"), ("abba", "ab"), ("abba", "abb", "ab")])
def test_of_equal_scores_the_whole_word_wins_over_the_beginning_of_a_longer_one(lexicon: tuple[str, ...]) -> None:
    log_probs = torch.full((1, 4, 4), 0.02).log()
    log_probs[0, torch.arange(4), torch.tensor([1, 2, 0, 0])] = math.log(0.94)
    search = FlashlightSearch(FlashlightConfig(beam=1, log_add=False), PIECES, 0, {word: [[*word]] for word in lexicon})
    ((best,),) = search.search(log_probs, torch.tensor([4]))
    assert best.tokens == (1, 2) and best.score == pytest.approx(4 * math.log(0.94), abs=1e-6)
    emissions = torch.nn.functional.pad(log_probs[0], (0, 1), value=-1e8).contiguous()  # a class that no piece has
    (found,) = search._decoder.decode(emissions.data_ptr(), *emissions.shape)
    assert found.words == [-1, -1, lexicon.index("ab"), -1, -1, -1]


@pytest.mark.usefixtures("package")
def test_text_before_the_data_of_an_arpa_file_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text("A model of two words; its data follow \\data\\\n\n" + ARPA)
    config = FlashlightConfig(delimiter="|")
    assert FlashlightSearch(config, PIECES, 0, WORDS, str(tmp_path / "lm.arpa")).search(torch.zeros(1, 0, 4), torch.tensor([0]))[0]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("something else", "neither an ARPA file nor one of KenLM's binary files"),
        (ARPA.replace("a", "A").replace("\\dAtA", "\\data"), "of another vocabulary: of 3 words it lacks 3, such as 'a', 'ab', 'bb'"),
        (ARPA.replace("ngram 1=5", "ngram 1=7"), "lm.arpa: KenLM cannot read this language model: .*"),
    ],
)
def test_models_that_do_not_fit_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "lm.arpa").write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        FlashlightSearch(FlashlightConfig(delimiter="|"), PIECES, 0, WORDS, str(tmp_path / "lm.arpa"))
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("settings", "lexicon", "message"),
    [
        ({"delimiter": "_"}, None, "delimiter is '_', which is none of the 4 pieces"),
        ({"word_score": 1.0}, None, "word_score is 1.0, which has no effect without a lexicon"),
        ({}, {}, "lexicon: it has no words"),
        ({}, {"c": [["c"]]}, "the spelling of 'c' holds 'c', which is none of the 4 pieces"),
        ({}, {"c": [["<blk>"]]}, "the spelling of 'c' holds '<blk>'"),
        ({}, {"c": [[]]}, "'c' has an empty spelling"),
        ({"delimiter": "|"}, {"a": [["a"]]}, "the spelling of 'a' does not end with the delimiter '|'"),
    ],
)
def test_lexicons_that_do_not_fit_are_refused(settings: dict, lexicon: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        FlashlightSearch(FlashlightConfig(**settings), PIECES, 0, lexicon)


@pytest.mark.usefixtures("package")
def test_log_probabilities_that_do_not_fit_are_refused() -> None:
    search = FlashlightSearch(FlashlightConfig(beam=10), PIECES, 0)
    with pytest.raises(ValueError, match="log_probs has 5 classes, there are 4 pieces"):
        search.search(torch.zeros(1, 2, 5), torch.tensor([2]))
    with pytest.raises(ValueError, match="FlashlightSearch: lens of utterance 0 is 3"):
        search.search(torch.zeros(1, 2, 4), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"num_hypotheses is 11, allowed are 1..10 \(beam\)"):
        search.search(torch.zeros(1, 2, 4), torch.tensor([2]), 11)
    log_probs = torch.zeros(1, 3, 4)
    log_probs[0, 2] = math.nan  # padding may hold anything
    assert search.search(log_probs, torch.tensor([2]))
    with pytest.raises(ValueError, match="log_probs holds nan"):
        search.search(log_probs, torch.tensor([3]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam": 0}, "beam is 0"),
        ({"beam_tokens": 0}, "beam_tokens is 0"),
        ({"beam_threshold": 0.0}, "beam_threshold is 0.0, a number > 0"),
        ({"lm_scale": -1.0}, "lm_scale is -1.0"),
        ({"word_score": math.nan}, "word_score is nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"FlashlightConfig: {message}"):
        FlashlightConfig(**settings)


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashlight.lib.text", None)
    with pytest.raises(ValueError, match="flashlight-text, which is not installed: pip install") as raised:
        FlashlightSearch(FlashlightConfig(), PIECES, 0)
    assert str(raised.value).endswith(PIP_LINE)


def test_a_lexicon_is_spelled_as_the_tokenizer_spells() -> None:
    found = spellings(["ab", "b", "ab"], lambda word: [PIECES.index(letter) for letter in word], PIECES, "|")
    assert found == {"ab": [["a", "b", "|"]], "b": [["b", "|"]]}
    assert spellings(["b"], lambda word: [2], PIECES) == {"b": [["b"]]}


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("delimiter", ["", "|"])
def test_the_words_of_the_lexicon_are_told_however_they_are_spelled(delimiter: str) -> None:
    def heard(path: list[int], lexicon: dict[str, str], beam: int = 100) -> tuple[str, ...] | None:
        log_probs = torch.full((1, len(path), 4), 0.02).log()
        log_probs[0, torch.arange(len(path)), torch.tensor(path)] = math.log(0.94)
        config = FlashlightConfig(beam=beam, delimiter=delimiter, word_score=-0.1)
        spelled = {word: [[*spelling, *delimiter]] for word, spelling in lexicon.items()}
        ((best,),) = FlashlightSearch(config, PIECES, 0, spelled).search(log_probs, torch.tensor([len(path)]))
        return best.words

    lexicon = {"ONE": "ab", "TWO": "b", "THREE": "bbaa"}
    assert heard([1, 2, *([3] if delimiter else [0]), 2, 0], lexicon) == ("ONE", "TWO")
    assert heard([1, 2, 0, 2, 1, *([3] if delimiter else [0]), 0, 1, 2, 0, 2], {"LONG": "abba"}, beam=1) == ("LONG",)  # and one cut off
    assert heard([1, 2, 2], {"ONE": "ab", "LONG": "abba"}, beam=1) == ("ONE",)  # the beginning of a longer one
    assert (
        FlashlightSearch(FlashlightConfig(), PIECES, 0).search(torch.zeros(1, 1, 4).log_softmax(2), torch.tensor([1]))[0][0].words is None
    )
