"""Two drivers read weights and gradients of the same workers, and see what one process sees, each in its own time."""

import json
import sys
from pathlib import Path

import pytest

from tests.processes import reading
from tests.processes.support import start


@pytest.mark.slow
def test_two_drivers_read_and_write_what_one_process_does(tmp_path: Path) -> None:
    reading.fit(tmp_path, 1, 0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    process = start([*command, reading.__file__, str(tmp_path)])
    try:
        _, errors = process.communicate(timeout=170)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-4000:]
    found = [json.loads((tmp_path / name).read_text()) for name in ("2-0", "2-1", "1-0")]
    assert found[0] == pytest.approx(found[2], rel=1e-4)
    assert found[1] == pytest.approx(found[2], rel=1e-4)
