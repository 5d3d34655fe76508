"""Fetching and unpacking archives, against a server of our own that cuts connections, knows no ranges or serves the wrong bytes."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import re
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from k2ssl.data import download

ROOT = Path(__file__).parents[2]


class Server(ThreadingHTTPServer):
    """Serves `files`, and remembers in `asked` every request as (path, first byte)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, int]] = []
        self.cuts: list[int] = []  # after so many bytes the next answers end
        self.ranges = True

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        found = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(found[1]) if found else 0
        self.server.asked.append((self.path, begin))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        if not self.server.ranges:
            begin = 0
        if begin and begin >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        end = begin + self.server.cuts.pop(0) if self.server.cuts else len(content)
        self.wfile.write(content[begin:end])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    serving = Server()
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield serving
    serving.shutdown()
    serving.server_close()
    thread.join()


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def packed(files: dict[str, bytes], *, compress: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), 1, mtime=0) if compress else buffer.getvalue()


def fetch(urls: list[str], path: Path, checksum: str | None = None) -> None:
    download.fetch(urls, path, checksum=checksum, progress=False, wait=0.0)


def test_a_cut_connection_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = content = noise(300_000)
    server.cuts = [100_000, 0, 0, 0, 50_000]  # three in a row without a byte, which is one fewer than end it
    fetch([server.url("/a")], tmp_path / "a", sha256(content))
    assert (tmp_path / "a").read_bytes() == content
    assert [begin for _, begin in server.asked] == [0, 100_000, 100_000, 100_000, 100_000, 150_000]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_an_earlier_process_fetched_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = content = noise(5000)
    (tmp_path / "a.partial").write_bytes(content[:4000])
    fetch([server.url("/a")], tmp_path / "a", sha256(content))
    assert (tmp_path / "a").read_bytes() == content and server.asked == [("/a", 4000)]
    (tmp_path / "b.partial").write_bytes(content)  # killed between the last byte and the renaming
    fetch([server.url("/a")], tmp_path / "b", sha256(content))
    assert (tmp_path / "b").read_bytes() == content and server.asked[1:] == [("/a", 5000)]


def test_a_server_without_ranges_begins_again_and_the_file_is_right(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = content = noise(5000)
    server.ranges, server.cuts = False, [3000, 1000, 4000]
    fetch([server.url("/a")], tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content and len(server.asked) == 4


def test_a_connection_that_never_brings_the_rest_is_an_error_and_keeps_what_there_is(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = noise(5000)
    server.cuts = [1000] + [0] * 20
    with pytest.raises(ValueError, match=r"a could not be fetched; http://.*/a: the connection was cut after 1,000 of 5,000 bytes"):
        fetch([server.url("/a")], tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial"] and (tmp_path / "a.partial").stat().st_size == 1000


def test_another_checksum_is_refused_and_the_next_address_is_taken(server: Server, tmp_path: Path) -> None:
    server.files |= {"/right/a": noise(5000), "/wrong/a": noise(6000, seed=1)}
    right, wrong = f"md5:{md5(server.files['/right/a'])}", md5(server.files["/wrong/a"])
    with pytest.raises(ValueError, match=f"/wrong/a: it has md5 {wrong}, {right[4:]} is published"):
        fetch([server.url("/wrong/a")], tmp_path / "a", right)
    assert not (tmp_path / "a").exists() and (tmp_path / "a.partial").stat().st_size == 0
    fetch([server.url("/none/a"), server.url("/wrong/a"), server.url("/right/a")], tmp_path / "a", right)
    assert (tmp_path / "a").read_bytes() == server.files["/right/a"]
    assert server.asked[-1] == ("/right/a", 0)
    (tmp_path / "a").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="a is there, but it has md5"):
        fetch([server.url("/right/a")], tmp_path / "a", right)


def test_a_partial_file_longer_than_the_real_one_is_not_taken(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = content = noise(1000)
    (tmp_path / "a.partial").write_bytes(noise(2000, seed=3))
    fetch([server.url("/a")], tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content


def test_every_address_that_failed_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"/x/a: HTTP status 404 Not Found; http://127.0.0.1:1/a: .*refused"):
        fetch([server.url("/x/a"), "http://127.0.0.1:1/a"], tmp_path / "a")


def test_two_processes_do_not_fetch_the_same_file(server: Server, tmp_path: Path) -> None:
    with download._locked(tmp_path / "a.partial"), pytest.raises(ValueError, match="another process is fetching"):
        fetch([server.url("/a")], tmp_path / "a")


def test_lists_of_checksums_are_read_as_they_are_published(server: Server) -> None:
    server.files["/two/md5sum.txt"] = (
        b"0cc175b9c0f1b6a831c399e269772661  a.tar.gz\n92EB5FFEE6AE2FEC3AD71C777531578F *./b.tar\nno sum at all\n"
    )
    found = download.published_md5([server.url("/one"), server.url("/two")])
    assert found == {"a.tar.gz": "md5:0cc175b9c0f1b6a831c399e269772661", "b.tar": "md5:92eb5ffee6ae2fec3ad71c777531578f"}
    assert download.published_md5([server.url("/none"), "http://127.0.0.1:1"]) == {}


@pytest.mark.parametrize("compress", [True, False])
def test_the_folder_asked_for_is_unpacked_and_nothing_else(tmp_path: Path, compress: bool) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(packed({"C/one/x": b"1", "C/one/deep/y": b"22", "C/other/z": b"3", "C/one-more/v": b"4"}, compress=compress))
    (tmp_path / "C").mkdir()
    assert download.unpack(archive, "C/one", tmp_path / "C/one", progress=False) == 2
    there = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != archive}
    assert there == {"C/one/x": b"1", "C/one/deep/y": b"22", "C/one/.unpacked": b"a.tar 2\n"}
    with pytest.raises(ValueError, match="one is there already"):
        download.unpack(archive, "C/one", tmp_path / "C/one", progress=False)
    with pytest.raises(ValueError, match="holds no files below C/none/"):
        download.unpack(archive, "C/none", tmp_path / "C/none", progress=False)


@pytest.mark.parametrize("compress", [True, False])
def test_an_archive_that_ends_anywhere_but_at_its_end_leaves_nothing(tmp_path: Path, compress: bool) -> None:
    whole = packed({f"C/one/{i}": noise(512, seed=i) for i in range(4)}, compress=compress)
    # of the plain archive: between members, inside of one, and one of the two blocks that end it missing
    ends = [len(whole) - 5, len(whole) // 2] if compress else [2048, 1300, 4 * 1024 + 512]
    for end in ends:
        (tmp_path / "a.tar").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"a\.tar is damaged \(.*\): remove it, and it is fetched again"):
            download.unpack(tmp_path / "a.tar", "C/one", tmp_path / "one", progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_flipped_bit_behind_the_last_member_is_found(tmp_path: Path) -> None:
    whole = bytearray(packed({"C/one/a": noise(3000)}))
    whole[-6] ^= 1  # in the checksum that ends a gzip file
    (tmp_path / "a.tgz").write_bytes(whole)
    with pytest.raises(ValueError, match="is damaged"):
        download.unpack(tmp_path / "a.tgz", "C/one", tmp_path / "one", progress=False)
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text")[:-3])
    with pytest.raises(ValueError, match="is damaged"):
        download.check_gzip(tmp_path / "a.gz")


def test_members_that_lie_outside_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(packed({"C/one/a": b"1", "C/one/../../../evil": b"2"}))
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="is damaged"):
        download.unpack(tmp_path / "a.tar", "C/one", tmp_path / "in/one", progress=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "in"]


def test_too_little_room_is_refused_with_both_numbers(tmp_path: Path) -> None:
    download.need_space(tmp_path / "not" / "yet", 1, "few")
    with pytest.raises(ValueError, match=r"yet: the parts take 1048576\.0 GiB, [\d.]+ GiB are free"):
        download.need_space(tmp_path / "not" / "yet", 2**50, "the parts")


# --- recipes/librispeech/download.py -----------------------------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("librispeech_download", ROOT / "recipes/librispeech/download.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def mini(server: Server) -> bytes:
    archive = packed({f"LibriSpeech/dev-clean-2/84/121123/84-121123-000{i}.flac": noise(2000, seed=i) for i in range(3)})
    server.files |= {"/31/dev-clean-2.tar.gz": archive, "/31/md5sum.txt": f"{md5(archive)}  dev-clean-2.tar.gz\n".encode()}
    return archive


def test_a_part_is_fetched_checked_and_unpacked_once(
    server: Server, program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mini(server)
    server.cuts = [10_000, 1000]  # the list of checksums comes first, whole
    arguments = ["--out", str(tmp_path), "--parts", "dev-clean-2", "--base-url", server.url(), "--quiet"]
    assert program.main(arguments) == 0
    assert "3 files; archive has the published md5" in capsys.readouterr().out
    audio = tmp_path / "LibriSpeech/dev-clean-2/84/121123/84-121123-0002.flac"
    assert audio.read_bytes() == noise(2000, seed=2) and [path.name for path in tmp_path.iterdir()] == ["LibriSpeech"]
    requests = len(server.asked)
    assert program.main(arguments) == 0
    assert len(server.asked) == requests and "is there already\n" in capsys.readouterr().out


def test_a_damaged_part_does_not_pass_for_finished(
    server: Server, program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = mini(server)
    arguments = ["--out", str(tmp_path), "--parts", "dev-clean-2", "--base-url", server.url(), "--quiet"]
    server.files["/31/dev-clean-2.tar.gz"] = archive[:-1] + b"x"
    assert program.main(arguments) == 1
    assert "it has md5" in capsys.readouterr().err and not (tmp_path / "LibriSpeech").exists()
    del server.files["/31/md5sum.txt"]  # nothing to hold it against: the archive's own checksum is left
    assert program.main(arguments) == 1
    assert "dev-clean-2.tar.gz is damaged" in capsys.readouterr().err
    assert not (tmp_path / "LibriSpeech/dev-clean-2").exists()
    (tmp_path / "dev-clean-2.tar.gz").unlink()
    server.files["/31/dev-clean-2.tar.gz"] = archive
    assert program.main([*arguments, "--keep-archives"]) == 0
    assert "without published checksum, read to its end" in capsys.readouterr().out
    assert (tmp_path / "dev-clean-2.tar.gz").exists()


def test_published_checksums_stand_above_the_server_s(
    server: Server, program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = packed({"LibriSpeech/dev-clean/1/2/1-2-0000.flac": b"x"})
    server.files |= {"/12/dev-clean.tar.gz": archive, "/12/md5sum.txt": f"{md5(archive)}  dev-clean.tar.gz\n".encode()}
    assert program.main(["--out", str(tmp_path), "--parts", "dev-clean", "--base-url", server.url(), "--quiet"]) == 1
    assert "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3 is published" in capsys.readouterr().err


def test_language_models_get_their_name_when_they_were_read_to_their_end(
    server: Server, program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = gzip.compress(b"\\data\\\n" * 100)
    arguments = ["--out", str(tmp_path), "--lm", "3-gram.pruned.1e-7", "vocab", "--base-url", server.url(), "--quiet"]
    server.files |= {"/11/3-gram.pruned.1e-7.arpa.gz": whole[:-2] + b"xx", "/11/librispeech-vocab.txt": b"A\nB\n"}
    assert program.main(arguments) == 1 and "is damaged" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "lm").iterdir()] == ["3-gram.pruned.1e-7.arpa.gz.unchecked"]
    (tmp_path / "lm/3-gram.pruned.1e-7.arpa.gz.unchecked").unlink()
    server.files["/11/3-gram.pruned.1e-7.arpa.gz"] = whole
    assert program.main(arguments) == 0
    assert (tmp_path / "lm/3-gram.pruned.1e-7.arpa.gz").read_bytes() == whole
    assert sorted(path.name for path in (tmp_path / "lm").iterdir()) == ["3-gram.pruned.1e-7.arpa.gz", "librispeech-vocab.txt"]


def test_a_disk_without_room_is_refused_before_anything_is_fetched(
    server: Server, program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 12 * 10**9}))
    arguments = ["--out", str(tmp_path), "--parts", "train-clean-100", "--base-url", server.url(), "--quiet"]
    assert program.main(arguments) == 1
    assert "train-clean-100 take 11.9 GiB, 11.2 GiB are free" in capsys.readouterr().err and not server.asked
    (tmp_path / "train-clean-100.tar.gz.partial").write_bytes(bytes(10**6))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2 * 6_387_309_499 - 10**6}))
    assert program.main(arguments) == 1 and server.asked  # what is there need not be fetched: enough room, but no such file


def test_every_part_and_model_has_an_address_and_wrong_names_are_refused(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(program.PARTS) == {
        *("dev-clean", "dev-other", "test-clean", "test-other", "train-clean-100", "train-clean-360", "train-other-500"),
        *("dev-clean-2", "train-clean-5"),
    }
    assert all(len(remote.sha256) == 64 for remote in program.PARTS.values() if remote.resource == 12)
    for arguments in (["--out", "x", "--parts", "train-clean-200"], ["--out", "x"]):
        with pytest.raises(SystemExit) as stopped:
            program.main(arguments)
        assert stopped.value.code == 2
    assert "nothing is asked for" in capsys.readouterr().err
