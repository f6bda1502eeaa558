import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from skippipe_plugin.engine.host_memory import available_bytes, left_in_group


def test_no_more_than_the_host_has() -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(("limit", "left"), [("1000", 650), ("max", None)])
def test_what_a_control_group_leaves(limit: str, left: int | None, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 30\nactive_file 20\n")
    assert left_in_group(tmp_path) == left
    assert left_in_group(tmp_path / "none") is None


@pytest.mark.skipif(sys.platform != "linux", reason="limits of this kind are Linux's")
def test_what_a_limit_of_the_process_leaves() -> None:
    code = (
        "import psutil, resource; from skippipe_plugin.engine.host_memory import available_bytes; "
        "used = psutil.Process().memory_info().data; "
        "resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20), resource.RLIM_INFINITY)); "
        "print(available_bytes())"
    )
    left = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 0 < left <= 64 << 20
