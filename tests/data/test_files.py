from __future__ import annotations

import pytest

from manyheads.data.files import replacing, write_atomically


def test_text_and_bytes_arrive_and_folders_are_made(tmp_path):
    assert write_atomically(tmp_path / "a" / "b.txt", "größer").read_text(encoding="utf-8") == "größer"
    assert write_atomically(tmp_path / "c.bin", b"\x00\xff").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    target = write_atomically(tmp_path / "result.json", "old")

    def interrupted():
        with replacing(target) as temporary:
            temporary.write_text("ne")
            raise failure

    with pytest.raises(failure):
        interrupted()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_the_temporary_file_keeps_the_suffix_and_the_result_is_readable(tmp_path):
    with replacing(tmp_path / "weights.safetensors") as temporary:
        assert temporary.suffix == ".safetensors"
        temporary.write_bytes(b"x")
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o400
