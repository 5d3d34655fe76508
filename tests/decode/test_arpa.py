"""ARPA files: what is read, what is written, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from k2ssl.decode.arpa import Arpa, read_arpa, write_arpa

SMALL = """A word about this model.
ngram 1=7

\\data\\
ngram 1=4
ngram  2 = 2

\\1-grams:
-1.5\t<s>\t-0.25
-0.5 </s>
-0.75\tnon\u00a0break\t0.125
-99\té

\\2-grams:
-0.1\t<s> é
0 é </s>

\\end\\
after the end
"""


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "lm.arpa"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def same(one: Arpa, two: Arpa) -> bool:
    arrays = [[a for t in model.orders for a in (t.words, t.log_prob, t.backoff)] for model in (one, two)]
    return one.words == two.words and all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True))


@pytest.mark.parametrize("change", [str.encode, lambda s: s.replace("\n", "\r\n").encode(), lambda s: gzip.compress(s.encode())])
def test_a_file_is_read_with_words_of_any_script_and_a_remark_before_it(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    model = read_arpa(written(tmp_path, change(SMALL)))
    assert model.words == ("<s>", "</s>", "non\u00a0break", "é")
    single, pairs = model.orders
    assert single.log_prob.tolist() == [-1.5, -0.5, -0.75, -99.0] and single.backoff.tolist() == [-0.25, 0.0, 0.125, 0.0]
    assert pairs.words.tolist() == [[0, 3], [3, 1]] and pairs.log_prob.tolist() == [-0.1, 0.0] and pairs.backoff.tolist() == [0.0, 0.0]
    assert model.text(2, 1) == "é </s>"


@pytest.mark.parametrize("compress", [False, True])
def test_what_is_written_is_read_back_and_the_bytes_are_always_the_same(tmp_path: Path, ngrams, compress: bool) -> None:  # type: ignore[no-untyped-def]
    model = ngrams.random_model(0, ["a", "bé", "c"], 3)
    assert min(len(table.log_prob) for table in model.orders) > 3 and any((t.backoff > 0).any() for t in model.orders)
    for name in ("one", "two"):
        with open(tmp_path / name, "wb") as file:
            write_arpa(file, model, compress)
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes() and content.startswith(b"\x1f\x8b" if compress else b"\\data\\\nngram 1=5\n")
    assert not compress or not any(content[4:8])  # where gzip puts the time
    assert same(read_arpa(tmp_path / "one"), model)


REFUSED = {
    "no data": ("\\data\\", "", "holds no line"),
    "count too large": ("ngram  2 = 2", "ngram 2=3", "line 18: 3 2-grams were promised, 2 are there"),
    "count too small": ("ngram 1=4", "ngram 1=3", "line 14: 3 1-grams were promised, 4 are there"),
    "count of another order": ("ngram  2 = 2", "ngram 3=2", "line 6: the count of 2-grams is needed here, it is 'ngram 3=2'"),
    "no count": ("ngram 1=4\nngram  2 = 2\n", "", "line 6: 'ngram 1=...' is needed here"),
    "other section": ("\\2-grams:", "\\3-grams:", "line 14: \\2-grams: is needed here, it is '\\\\3-grams:'"),
    "no number": ("-0.75", "x0.75", "line 11: the log-probability is 'x0.75', a number <= 0 is needed"),
    "nan": ("-0.75", "nan", "line 11: the log-probability is 'nan'"),
    "probability above 1": ("-0.75", "0.75", "line 11: the log-probability is '0.75', a number <= 0 is needed"),
    "no back-off number": ("0.125", "inf", "line 11: the back-off weight is 'inf', a number is needed"),
    "too few words": ("-0.1\t<s> é", "-0.1\t<s>", "line 15: a 2-gram is a number, 2 words; this is"),
    "back-off at the highest order": ("-0.1\t<s> é", "-0.1\t<s> é 0", "line 15: a 2-gram is a number, 2 words; this is"),
    "too many words": ("-99\té", "-99\té é é", "line 12: a 1-gram is a number, 1 words and perhaps a number"),
    "unknown word": ("<s> é", "<s> e", "line 15: the word 'e' is not among the 1-grams"),
    "word twice": ("</s>\n", "<s>\n", "line 10: the 1-gram '<s>' is listed twice"),
    "no end": ("\\end\\\nafter the end\n", "", "line 17: the file ends among its 2-grams, before \\end\\"),
    "other end": ("\\end\\", "\\the end\\", "line 18: \\end\\ is needed here"),
    "cut off early": ("\n\\1-grams" + SMALL.partition("\n\\1-grams")[2], "", "the file ends before its first n-gram"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_its_line(tmp_path: Path, case: str) -> None:
    before, after, message = REFUSED[case]
    assert before in SMALL
    path = written(tmp_path, SMALL.replace(before, after, 1))
    with pytest.raises(ValueError) as refusal:
        read_arpa(path)
    assert message in str(refusal.value) and str(refusal.value).startswith(str(path))


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    packed = gzip.compress(SMALL.encode() * 50)
    with pytest.raises(ValueError, match=r"lm\.arpa: the compressed file is damaged or cut off"):
        read_arpa(written(tmp_path, gzip.compress(SMALL.encode())[:-30]))
    with pytest.raises(ValueError, match=r"lm\.arpa: the compressed file is damaged or cut off"):
        read_arpa(written(tmp_path, packed[:40] + b"\xff" * 60 + packed[100:]))
    with pytest.raises(ValueError, match=r"lm\.arpa: words must be UTF-8"):
        read_arpa(written(tmp_path, SMALL.encode("latin-1")))


def test_a_published_model_is_read(real_speech: Path) -> None:
    path = real_speech / "an4" / "etc" / "an4.lm"
    if not path.is_file():
        pytest.skip(f"no {path}")
    model = read_arpa(path)
    assert [len(table.log_prob) for table in model.orders] == [107, 1] and model.text(2, 0) == "<s> </s>"
    assert model.orders[0].log_prob[model.words.index("ZERO")] == -2.0253 and model.orders[0].backoff[model.words.index("</s>")] == -99
