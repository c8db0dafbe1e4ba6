"""Free memory: the machine's and the control groups', and the refusal before an allocation."""

import sys

import pytest

from gemmakit.checkpoint import free_memory_bytes, memory, require_memory
from gemmakit.errors import NotEnoughMemory


@pytest.mark.skipif(sys.platform not in ("linux", "win32"), reason="other systems do not say")
def test_free_memory_is_positive_and_below_a_petabyte():
    assert 2**20 < free_memory_bytes() < 2**50


def test_require_memory_gives_needed_and_free_bytes_and_a_remedy():
    require_memory(1, "one byte")
    with pytest.raises(
        NotEnoughMemory, match=r"the weights needs 1125899906842624 bytes .* but only \d+ .*smaller dtype"
    ):
        require_memory(2**50, "the weights")
    with pytest.raises(MemoryError, match=r"free. Buy more\.$"):
        require_memory(2**50, "the weights", remedy="Buy more.")


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_smallest_control_group_on_the_way_up_decides(tmp_path):
    (tmp_path / "self").write_text("0::/a/b\n")
    write(tmp_path / "fs/a", memory__max="1000\n", memory__current="900\n", memory__stat="anon 5\ninactive_file 50\n")
    write(tmp_path / "fs/a/b", memory__max="max\n", memory__current="10\n")
    assert list(memory._cgroup_free_bytes(tmp_path / "self", tmp_path / "fs")) == [150]


def test_version_1_groups_and_a_limit_seen_from_inside_a_container(tmp_path):
    (tmp_path / "self").write_text("5:cpu,memory:/docker/x\n1:name=systemd:/\n")
    write(
        tmp_path / "fs/memory",
        memory__limit_in_bytes="500",
        memory__usage_in_bytes="700",
        memory__stat="total_inactive_file 1",
    )
    assert list(memory._cgroup_free_bytes(tmp_path / "self", tmp_path / "fs")) == [0]


def test_missing_files_mean_unknown(tmp_path):
    assert memory._meminfo_available_bytes(tmp_path / "none") is None
    assert list(memory._cgroup_free_bytes(tmp_path / "none", tmp_path)) == []


def test_meminfo_is_in_kibibytes(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:      7 kB\n")
    assert memory._meminfo_available_bytes(tmp_path / "meminfo") == 7168
