"""Files that are written: what is refused before any work, and that nothing half is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import FileError
from runtime.outputs import appearing, check_outputs, check_room


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "^'': cannot be written .give the name"), ("-", "give the name of a file"),
        (".", "folder"), ("./", "folder"), ("/", "folder"), ("none/", "folder"), ("..", "folder"),
        ("none/a", "there is no folder none"), ("in/a", "there is no folder in"),
        ("a\0b", "null"), ("a" * 300, "too long"), ("dangling", "there is no folder"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_written(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").touch()
    Path("dangling").symlink_to("none/b")
    with pytest.raises(FileError, match=said):
        check_outputs([name])
    with pytest.raises(FileError, match=said), appearing(name):
        pytest.fail("it was opened")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match="no permission"):
        check_outputs([tmp_path / "a"])
    tmp_path.chmod(0o700)


def test_what_is_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any name: relative, of a link, of a hard link, in a folder that is read."""
    monkeypatch.chdir(tmp_path)
    folder = Path("checkpoint")
    folder.mkdir()
    weights, blob = folder / "model.safetensors", Path("blob")
    weights.symlink_to(tmp_path / blob)
    for path in (blob, Path("in")):
        path.touch()
    Path("soft").symlink_to("in")
    os.link("in", "hard")
    inputs = [tmp_path / "in", "-", None, "none", "."]
    for name in ("in", "./in", "checkpoint/../in", "soft", "hard", weights, blob):
        with pytest.raises(FileError, match="that is read"):
            check_outputs([name], inputs, folder)
    check_outputs(["none", folder / "new", None, os.devnull], inputs, folder)
    check_outputs(["hard"], [], "none")


def test_two_outputs_are_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("b")
    for pair in (("a", "./a"), ("b", "link")):
        with pytest.raises(FileError, match="two files would be written"):
            check_outputs(pair)
    check_outputs(["a", "b"])


def test_writers_do_not_mix_and_failures_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a"
    with appearing(out) as first:
        first.write(b"one ")
        with appearing(out) as second:
            second.write(b"two")
        assert out.read_bytes() == b"two"
        first.write(b"after the other")
    with pytest.raises(KeyboardInterrupt), appearing(out):
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), appearing(out):  # not of this file
        (tmp_path / "none" / "b").read_bytes()
    assert [*tmp_path.iterdir()] == [out] and out.read_bytes() == b"one after the other"


def test_a_link_keeps_leading_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a")
    with appearing(tmp_path / "link") as file:
        file.write(b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_told_to_end_it_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom runtime.outputs import appearing\n"
        "with appearing(sys.argv[1]):\n print('open', flush=True)\n time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"open\n"
        assert len([*tmp_path.iterdir()]) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert not [*tmp_path.iterdir()]


def test_room_is_said_in_units(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"takes 1000000.00 TB, [\d.]+ .B are free"):
        check_room(tmp_path / "a", 10**18)
    check_room(tmp_path / "a", 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_only_a_full_disk_is_one(tmp_path: Path) -> None:
    with (
        pytest.raises(FileError, match=r"No space left.*free some space"),
        appearing("/dev/full") as f,
    ):
        f.write(b"x")
    with pytest.raises(FileError) as raised:
        check_outputs([tmp_path / "none" / "a"])
    assert "space" not in str(raised.value)
