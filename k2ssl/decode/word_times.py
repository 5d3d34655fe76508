"""When words were said, from the frames of their tokens.

A head emits a token somewhere within the sound, CTC often in a single frame, so that beginnings and ends are near the truth and no more: a word
begins with the first frame of its first token, and its last token lasts until the next token begins, or a delimiter, but at most TAIL_SECONDS
beyond its last own frame, so that a pause is no part of the word before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from k2ssl.decode.results import Word

TAIL_SECONDS = 0.2  # about as long as a syllable, which a piece at the end of a word often is


def word_times(
    words: Sequence[str],
    numbers: Sequence[int],
    begins: Sequence[int],
    frame_seconds: float,
    num_frames: int,
    ends: Sequence[int] | None = None,
    tail_seconds: float = TAIL_SECONDS,
    seconds: float = math.inf,
) -> tuple[Word, ...]:
    """Times of words, in order.

    Args:
        words: their texts.
        numbers: of each token the word that it is part of, or -1; see `Tokenizer.word_numbers`.
        begins: first frame of each token, ascending.
        frame_seconds: from one frame to the next, s.
        num_frames: of the utterance; no word lasts longer.
        ends: the frame after each token's last one; without it the frame after its first one.
        tail_seconds: how long a token may last beyond its last frame, s, where no other follows.
        seconds: of the audio, beyond which the last frame of a down-sampled output may reach; no word does.

    Returns:
        The words with begin and end in seconds, rounded to milliseconds.

    Raises:
        ValueError: the numbers of tokens differ, or a word has no token.
    """
    ends = [begin + 1 for begin in begins] if ends is None else ends
    if not len(numbers) == len(begins) == len(ends):
        raise ValueError(
            f"word_times: {len(numbers)} word numbers, {len(begins)} begins and {len(ends)} ends of tokens; as many are needed"
        )
    tail = tail_seconds / frame_seconds
    firsts: dict[int, float] = {}
    lasts: dict[int, float] = {}
    for place, (number, begin, end) in enumerate(zip(numbers, begins, ends, strict=True)):
        following = begins[place + 1] if place + 1 < len(begins) else num_frames
        firsts.setdefault(number, begin)
        lasts[number] = min(end + tail, following, num_frames)
    if missing := [repr(word) for number, word in enumerate(words) if number not in firsts]:
        raise ValueError(f"word_times: no token is part of {', '.join(missing)}")
    times = ((round(firsts[n] * frame_seconds, 3), round(min(lasts[n] * frame_seconds, seconds), 3)) for n in range(len(words)))
    return tuple(Word(text, begin, max(begin, end)) for text, (begin, end) in zip(words, times, strict=True))
