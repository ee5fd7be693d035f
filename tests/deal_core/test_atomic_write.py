"""A file that cannot be written whole."""

import errno
import resource

import pytest

from deal_core.atomic_write import atomic_write


def test_a_disk_that_takes_no_more_is_named_and_the_old_file_stands(tmp_path):
    path = tmp_path / "results.json"
    atomic_write(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match="large") as full:
            atomic_write(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (full.value.errno, full.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
