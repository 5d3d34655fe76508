"""Tokenizers: ids round-trip, normalisation, unknown symbols, what a checkpoint holds, and every refusal."""

from __future__ import annotations

import copy
import random
import unicodedata
from pathlib import Path

import pytest
import torch

from k2ssl.atomic_file import save_atomically
from k2ssl.data.tokenizer import LetterTokenizer, NormalizationConfig, PieceTokenizer, Tokenizer, load_tokenizer, tokenizer_from_dict
from k2ssl.data.tokenizer_training import TokenizerConfig, train_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
KINDS = ("bpe", "unigram", "letters")


def some_texts(letters: str = "abcdefg'", number: int = 300, seed: int = 0) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    words = ["".join(draw.choice(letters) for _ in range(draw.randint(1, 7))) for _ in range(60)]
    return [(f"u{i}", " ".join(draw.choice(words) for _ in range(draw.randint(1, 12)))) for i in range(number)]


def trained(kind, texts: list[tuple[str, str]] | None = None, vocab_size: int = 60, **normalization) -> Tokenizer:
    size = None if kind == "letters" else vocab_size
    return train_tokenizer(texts or some_texts(), TokenizerConfig(kind, size, normalization=NormalizationConfig(**normalization)))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(request.param)


def test_ids_round_trip_for_texts_that_were_never_seen(tokenizer: Tokenizer) -> None:
    used = set()
    for _, text in some_texts(seed=1):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.outside(text) == ""
        used |= set(ids)
    assert not used & {tokenizer.blank, tokenizer.unk} and max(used) < tokenizer.vocab_size


def test_blank_is_0_and_the_unknown_symbol_1(tokenizer: Tokenizer) -> None:
    assert tokenizer.symbols[:2] == ("<blk>", "<unk>") and (tokenizer.blank, tokenizer.unk) == (0, 1)
    assert tokenizer.vocab_size == len(tokenizer.symbols) == (11 if tokenizer.kind == "letters" else 60)


def test_letters_are_in_the_order_of_their_code_points_in_every_process() -> None:
    assert trained("letters").symbols[3:] == tuple("'abcdefg")


def test_bpe_and_unigram_learn_different_pieces() -> None:
    assert set(trained("bpe").symbols) != set(trained("unigram").symbols)


def test_letters_are_one_token_each_with_a_delimiter_between_words() -> None:
    tokenizer = LetterTokenizer("abc", NormalizationConfig())
    assert tokenizer.encode(" ab  ca ") == [3, 4, 2, 5, 3]
    assert tokenizer.decode([2, 3, 4, 2, 2, 5, 3, 2]) == "ab ca"


def test_pieces_are_longer_than_letters_where_words_repeat() -> None:
    lengths = {kind: sum(len(trained(kind).encode(text)) for _, text in some_texts()) for kind in KINDS}
    assert all(1.8 * lengths[kind] < lengths["letters"] for kind in ("bpe", "unigram"))


@pytest.mark.parametrize("text", ["abc <blk> <unk>", "ab|c", "ab▁c", "ab" + unicodedata.normalize("NFD", "é"), "a\x00b", "a👍b"])
def test_no_text_can_spell_what_is_not_in_the_vocabulary(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(ValueError, match=rf"holds .*which the {tokenizer.kind} vocabulary does not have"):
        tokenizer.encode(text)
    ids = tokenizer.encode(text, unknown="mark")
    assert tokenizer.blank not in ids and tokenizer.unk in ids
    assert "<unk>" in tokenizer.decode(ids)


def test_unknown_characters_are_named_and_counted() -> None:
    tokenizer = trained("letters")
    with pytest.raises(ValueError, match=r"'ab xyx' holds 'x', 'y', which"):
        tokenizer.encode("ab xyx")
    assert tokenizer.outside("ab xyx") == "xyx"
    assert tokenizer.encode("ab xyx", "mark").count(tokenizer.unk) == 3


def test_an_empty_transcript_is_refused(tokenizer: Tokenizer) -> None:
    for text in ("", "  \n"):
        with pytest.raises(ValueError, match=r"is empty$"):
            tokenizer.encode(text, "mark")


def test_a_transcript_that_normalisation_empties_is_refused() -> None:
    tokenizer = trained("letters", allowed=LETTERS, others="space")
    with pytest.raises(ValueError, match=r"the transcript '\?!' is empty after normalisation"):
        tokenizer.encode("?!")


def test_another_word_for_unknown_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="unknown is 'drop', allowed are 'refuse', 'mark'"):
        tokenizer.encode("abc", "drop")  # type: ignore[arg-type]


def test_a_batch_is_padded_with_blank_and_errors_name_the_utterance(tokenizer: Tokenizer) -> None:
    texts = ["abc fa", "g", "dab dab gag"]
    targets, lens = tokenizer.encode_batch(texts, ["x", "y", "z"])
    assert targets.dtype == lens.dtype == torch.int64 and targets.shape == (3, max(lens))
    for row, length, text in zip(targets, lens, texts, strict=True):
        assert row[:length].tolist() == tokenizer.encode(text) and not row[length:].any()
    with pytest.raises(ValueError, match="utterance 'y': the transcript '' is empty"):
        tokenizer.encode_batch(["abc", ""], ["x", "y"])
    with pytest.raises(ValueError, match=r"utterance 'x': .* holds 'z'"):
        tokenizer.encode_batch(["z"], ["x"])
    assert tokenizer.unk in tokenizer.encode_batch(["z"], ["x"], "mark")[0]


@pytest.mark.parametrize("token", [0, -1, 60])
def test_ids_that_are_no_symbols_of_a_text_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {token}, allowed are 1..59"):
        trained("bpe").decode([3, token])


def test_word_numbers_gather_the_tokens_of_each_word(tokenizer: Tokenizer) -> None:
    for _, text in some_texts(seed=2):
        ids = tokenizer.encode(text)
        numbers = tokenizer.word_numbers(ids)
        words = text.split()
        assert len(numbers) == len(ids) and set(numbers) - {-1} == set(range(len(words)))
        for number, word in enumerate(words):
            assert tokenizer.decode(token for token, of in zip(ids, numbers, strict=True) if of == number) == word
        assert tokenizer.decode(token for token, of in zip(ids, numbers, strict=True) if of == -1) == ""


def test_word_numbers_follow_what_decode_makes_of_any_tokens(tokenizer: Tokenizer) -> None:
    draw = random.Random(3)
    for length in range(40):
        ids = [draw.randrange(1, tokenizer.vocab_size) for _ in range(length)]
        numbers, words = tokenizer.word_numbers(ids), tokenizer.decode(ids).split()
        for number, word in enumerate(words):
            assert tokenizer.decode(token for token, of in zip(ids, numbers, strict=True) if of == number) == word
        assert max(numbers, default=-1) == len(words) - 1


def test_delimiters_are_part_of_no_word() -> None:
    letters = LetterTokenizer("abc", NormalizationConfig())
    delimiter, a, b = 2, 3, 4
    assert letters.word_numbers([delimiter, a, b, delimiter, delimiter, b, letters.unk, delimiter]) == [-1, 0, 0, -1, -1, 1, 1, -1]
    with pytest.raises(ValueError, match="token id 0"):
        letters.word_numbers([a, 0])


def test_normalisation_composes_squeezes_and_changes_case() -> None:
    assert NormalizationConfig()("  e\u0301a\t b\u00a0c\n") == "éa b c"
    assert NormalizationConfig("upper")("straße e\u0301") == "STRASSE É"
    assert NormalizationConfig("lower")("ABC'D") == "abc'd"
    assert NormalizationConfig("none")("aB") == "aB"


def test_characters_that_are_not_allowed_are_kept_or_become_spaces() -> None:
    text = "Well-known, isn't it? 3"
    assert NormalizationConfig("lower", LETTERS, "space")(text) == "well known isn't it"
    assert NormalizationConfig("lower", LETTERS)(text) == "well-known, isn't it? 3"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"case": "title"}, "case is 'title', allowed are none, upper, lower"),
        ({"others": "drop"}, "others is 'drop', allowed are refuse, space"),
        ({"others": "space"}, "others is 'space', which takes a list"),
        ({"allowed": "abca"}, "allowed holds 'a' twice"),
        ({"allowed": "aB", "case": "lower"}, r"allowed holds 'B', which no transcript holds .*case is 'lower'"),
        ({"allowed": "a b"}, "allowed holds ' ', which no transcript"),
        ({"allowed": "\u212b"}, "which no transcript"),  # the ångström sign is composed to a letter
    ],
)
def test_a_normalisation_that_makes_no_sense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"NormalizationConfig: .*{message}"):
        NormalizationConfig(**settings)


def test_the_normalisation_is_part_of_the_tokenizer() -> None:
    tokenizer = trained("bpe", case="upper", allowed=LETTERS.upper(), others="space")
    assert tokenizer.decode(tokenizer.encode("bad, Fa's")) == "BAD FA'S"
    assert tokenizer_from_dict(tokenizer.to_dict()).encode("bad, Fa's") == tokenizer.encode("BAD FA'S")


def test_the_same_texts_give_the_same_tokenizer_and_others_another(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = trained(tokenizer.kind)
    assert again.sha256 == tokenizer.sha256 and again.symbols == tokenizer.symbols
    tokenizer.save(tmp_path / "a.pt")
    again.save(tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    others = [trained(tokenizer.kind, some_texts("abcdefgh")), trained(tokenizer.kind, case="lower")]
    assert len({tokenizer.sha256, *(other.sha256 for other in others)}) == 3


def test_kinds_and_models_have_different_hashes() -> None:
    model = trained("bpe").to_dict()["model"]
    assert PieceTokenizer("bpe", model, NormalizationConfig()).sha256 != PieceTokenizer("unigram", model, NormalizationConfig()).sha256
    assert LetterTokenizer("ab", NormalizationConfig()).sha256 != LetterTokenizer("ba", NormalizationConfig()).sha256


def test_a_tokenizer_travels_in_a_checkpoint_and_to_another_process(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_atomically(tmp_path / "checkpoint.pt", {"model": {}, "tokenizer": tokenizer.to_dict()})
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    tokenizer.save(tmp_path / "tokenizer.pt")
    copies = [tokenizer_from_dict(content["tokenizer"]), load_tokenizer(tmp_path / "tokenizer.pt"), copy.deepcopy(tokenizer)]
    for other in copies:
        assert other.sha256 == tokenizer.sha256 and other.normalization == tokenizer.normalization and other.kind == tokenizer.kind
        assert all(other.encode(text) == tokenizer.encode(text) for _, text in some_texts(seed=2, number=20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "k2ssl-kmeans"}, "a k2ssl-tokenizer is needed, this is format 'k2ssl-kmeans'"),
        ({"version": 2}, "version is 2, this release reads version 1"),
        ({"model": None}, "lacks model"),
        ({"kind": "phones"}, "kind is 'phones' with a model of type Tensor, allowed are bpe, unigram, letters"),
        ({"kind": "letters"}, "kind is 'letters' with a model of type Tensor"),
        ({"kind": "unigram"}, "it was altered"),
        ({"model": "abc"}, "kind is 'bpe' with a model of type str"),
        ({"model": torch.zeros(5)}, "kind is 'bpe' with a model of type Tensor"),
        ({"model": torch.full((9,), 255, dtype=torch.uint8)}, "the model is none that SentencePiece can read"),
        ({"normalization": {"case": "title"}}, "normalization.case: is 'title'"),
        ({"normalization": {"case": "upper"}}, "it was altered"),
        ({"sha256": "0" * 64}, "it was altered"),
    ],
)
def test_what_is_no_tokenizer_of_ours_is_refused(change: dict, message: str) -> None:
    content = {key: value for key, value in {**trained("bpe").to_dict(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=f"c.pt.*{message}|PieceTokenizer: {message}"):
        tokenizer_from_dict(content, "c.pt")


def test_a_model_whose_first_symbols_are_others_is_refused() -> None:
    model = trained("bpe").to_dict()["model"]
    renamed = torch.tensor(list(model.numpy().tobytes().replace(b"<blk>", b"<pad>")), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"the first symbols are \['<pad>', '<unk>'\]"):
        PieceTokenizer("bpe", renamed, NormalizationConfig())


def test_files_that_are_no_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.pt: there is no such file"):
        load_tokenizer(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text.pt: a k2ssl-tokenizer file is needed"):
        load_tokenizer(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt: a k2ssl-tokenizer is needed, this is a list"):
        load_tokenizer(tmp_path / "list.pt")


@pytest.mark.parametrize("letters", ["", "aa", "a b", "a|b"])
def test_letters_that_cannot_be_are_refused(letters: str) -> None:
    with pytest.raises(ValueError, match="LetterTokenizer: letters are"):
        LetterTokenizer(letters, NormalizationConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_allowed_characters_are_in_the_vocabulary_even_if_the_text_lacks_them(kind) -> None:
    tokenizer = trained(kind, allowed=LETTERS)
    assert tokenizer.alphabet == set(LETTERS)
    assert tokenizer.decode(tokenizer.encode("zebra quiz")) == "zebra quiz"


def test_rare_characters_may_be_left_out_of_the_pieces() -> None:
    texts = [*some_texts(), ("rare", "abxa")]
    assert "x" in train_tokenizer(texts, TokenizerConfig("bpe", 60)).alphabet
    without = train_tokenizer(texts, TokenizerConfig("bpe", 60, character_coverage=0.99))
    assert without.outside("abxa") == "x"


def test_very_long_transcripts_are_learnt_from_too() -> None:
    assert "x" in trained("bpe", [*some_texts(), ("long", " ".join(["abxa"] * 2000))]).alphabet


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([], {}, "no transcripts"),
        ([], {"kind": "letters", "vocab_size": None, "allowed": "abc"}, "no transcripts"),
        ([("u", "abc"), ("v", " ")], {}, "utterance 'v': the transcript ' ' is empty"),
        ([("u", "ab▁c")], {}, "utterance 'u': the transcript 'ab▁c' holds '▁'; allowed are all but '▁'"),
        ([("u", "ab|c")], {"kind": "letters", "vocab_size": None}, r"holds '\|'"),
        ([("u", "abc"), ("v", "a-b 3")], {"allowed": "abc"}, "utterance 'v': the transcript 'a-b 3' holds '-', '3'; allowed are 'abc'"),
        ([("u", "abc")], {"vocab_size": 500}, "vocab_size is 500, which SentencePiece cannot make of this text: .*too high"),
        ([("u", "abcdefgh")], {"vocab_size": 5}, "vocab_size is 5, .*smaller than required"),
    ],
)
def test_texts_that_cannot_be_learnt_from_are_refused(texts: list, settings: dict, message: str) -> None:
    allowed = settings.pop("allowed", "")
    config = TokenizerConfig(**{"vocab_size": 8, "normalization": NormalizationConfig(allowed=allowed), **settings})
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "char"}, "kind is 'char', allowed are bpe, unigram, letters"),
        ({"kind": "letters", "vocab_size": 30}, "takes neither vocab_size"),
        ({"kind": "letters", "character_coverage": 0.99}, "takes neither vocab_size"),
        ({"vocab_size": 3}, "vocab_size is 3, at least 4"),
        ({"character_coverage": 0.5}, "character_coverage is 0.5"),
        ({"character_coverage": 1.1}, "character_coverage is 1.1"),
        ({"normalization": NormalizationConfig(allowed="ab▁")}, "holds '▁', which stands for the space in bpe"),
        ({"kind": "letters", "normalization": NormalizationConfig(allowed="a|")}, r"holds '\|', which stands for the space in letters"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"TokenizerConfig: .*{message}"):
        TokenizerConfig(**settings)


@pytest.mark.parametrize("text", ["so <unk> then", "a <blk> b", "a\u2585b", "a\ud800b"])
def test_text_that_sentencepiece_would_leave_out_is_refused_by_its_utterance(text: str) -> None:
    config = TokenizerConfig(kind="bpe", vocab_size=20)
    with pytest.raises(ValueError, match=r"utterance 'second': the transcript .* holds"):
        train_tokenizer([("first", "a plain one"), ("second", text)], config)
