"""Sums of files in the format of sha256sum."""

import hashlib
import shutil
import subprocess

import pytest

from tim._checksums import digest, problem_with, read_sums, write_sums


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
def test_digest(tmp_path, size) -> None:
    data = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert digest(tmp_path / "file") == hashlib.sha256(data[:size]).hexdigest()


def test_files_are_compared(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b  c", "d"):
        (tmp_path / name).write_text(name)
    names = ["a", "sub/b  c", "d"]
    write_sums(tmp_path, {name: digest(tmp_path / name) for name in names})
    sums = read_sums(tmp_path)
    assert list(sums) == sorted(names) and problem_with(tmp_path, sums, sums) is None
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
        subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / "d").write_text("e")
    assert problem_with(tmp_path, sums, ["a"]) is None
    assert problem_with(tmp_path, sums, sums) == (
        f"{tmp_path / 'd'} is damaged: its checksum is not the one in SHA256SUMS"
    )
    (tmp_path / "a").unlink()
    assert problem_with(tmp_path, sums, sums) == f"{tmp_path / 'a'} is missing"


def test_no_sums_and_junk(tmp_path) -> None:
    assert read_sums(tmp_path) is None
    (tmp_path / "SHA256SUMS").write_text("0123  a\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS is damaged: a line reads '0123  a'"):
        read_sums(tmp_path)
