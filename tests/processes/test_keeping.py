"""Two drivers, and blocks that look at other samples or keep something: one process has all of both."""

import sys

import pytest

from tests.processes import keeping
from tests.processes.support import start

pytestmark = pytest.mark.slow


def train(block: type[keeping.Block]) -> tuple[int, str]:
    """Return how two drivers have ended, and what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    process = start([*command, keeping.__file__, block.__name__])
    try:
        output, errors = process.communicate(timeout=170)
    finally:
        process.kill()
    return process.returncode, output + errors


@pytest.mark.parametrize(("block", "name"), [(keeping.InBuffer, "mean"), (keeping.InList, "seen")])
def test_what_blocks_keep_would_be_written_for_each_driver(block: type[keeping.Block], name: str) -> None:
    code, said = train(block)
    assert code != 0
    assert f"the forward of blocks.0 writes {name}, and there are 2 drivers" in said
    assert "Use drivers=1" in said


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (
            keeping.Mixes,
            "There are 2 drivers, each with a batch of its own: what looks at all samples sees those of one",
        ),
        (keeping.Norm, "where one process takes them from all 8 and those of the other drivers"),
    ],
)
def test_that_each_driver_has_samples_of_its_own_is_said(block: type[keeping.Block], text: str) -> None:
    code, said = train(block)
    assert code == 0, said
    assert said.count(text) == 2, said
