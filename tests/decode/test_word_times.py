"""Times of words from frames of tokens."""

from __future__ import annotations

import pytest

from k2ssl.decode.results import Word
from k2ssl.decode.word_times import TAIL_SECONDS, word_times

# letters and a delimiter: a t | o n
LETTERS = {"words": ["at", "on"], "numbers": [0, 0, -1, 1, 1], "begins": [3, 5, 9, 14, 15]}


def test_a_word_begins_with_its_first_token_and_ends_where_the_delimiter_begins() -> None:
    assert word_times(**LETTERS, frame_seconds=0.02, num_frames=18) == (Word("at", 0.06, 0.18), Word("on", 0.28, 0.36))


def test_without_a_delimiter_it_ends_where_the_next_word_begins() -> None:
    assert word_times(["a", "b"], [0, 1], [0, 4], 0.02, 6) == (Word("a", 0.0, 0.08), Word("b", 0.08, 0.12))


def test_a_pause_is_no_part_of_the_word_before_it() -> None:
    first, last = word_times(["a", "b"], [0, 1], [10, 100], 0.02, 200)
    assert (first.begin, first.end) == (0.2, round(0.22 + TAIL_SECONDS, 3))
    assert (last.begin, last.end) == (2.0, round(2.02 + TAIL_SECONDS, 3))
    assert word_times(["a", "b"], [0, 1], [10, 100], 0.02, 200, tail_seconds=0.0)[0].end == 0.22


def test_the_tail_follows_the_last_frame_of_the_token_if_it_is_known() -> None:
    first, _ = word_times(["a", "b"], [0, 1], [10, 100], 0.02, 200, ends=[30, 101], tail_seconds=0.1)
    assert (first.begin, first.end) == (0.2, 0.7)


def test_frames_of_another_length_scale_the_times_but_not_the_tail() -> None:
    (word,) = word_times(["a"], [0], [10], 0.04, 200)
    assert (word.begin, word.end) == (0.4, round(0.44 + TAIL_SECONDS, 3))


def test_no_word_lasts_longer_than_the_audio_nor_ends_before_it_begins() -> None:
    inside, beyond = word_times(["a", "b"], [0, 1], [10, 24], 0.04, 25, seconds=0.95)
    assert (inside.begin, inside.end) == (0.4, round(0.44 + TAIL_SECONDS, 3))
    assert (beyond.begin, beyond.end) == (0.96, 0.96)
    assert word_times(["a"], [0], [23], 0.04, 25, seconds=0.9875)[0].end == 0.988


def test_without_words_there_are_no_times() -> None:
    assert word_times([], [], [], 0.02, 10) == () == word_times([], [-1], [3], 0.02, 10)


def test_tokens_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="1 word numbers, 2 begins and 2 ends of tokens"):
        word_times(["a"], [0], [1, 2], 0.02, 10)
    with pytest.raises(ValueError, match="no token is part of 'b'"):
        word_times(["a", "b"], [0, 0], [1, 2], 0.02, 10)
