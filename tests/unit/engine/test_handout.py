"""The secret reaches the other ranks by a file that only this user can read."""

import stat
from pathlib import Path

import pytest

from skippipe_plugin.engine import handout
from skippipe_plugin.engine.handout import find_secret, fingerprint, leave_secret
from skippipe_plugin.engine.secret import SecretError

SECRET = "5e" * 32


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(handout.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(handout, "_PATIENCE_S", 0.1)
    return tmp_path


def test_what_one_rank_leaves_another_finds(folders: Path) -> None:
    path = leave_secret(SECRET)
    assert path is not None
    assert path.is_relative_to(folders / "cache")
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    assert find_secret(fingerprint(SECRET)) == SECRET
    assert SECRET not in str(path)


def test_a_home_that_cannot_be_written_to_leaves_the_temporary_folder(folders: Path) -> None:
    (folders / "cache").write_text("in the way")
    path = leave_secret(SECRET)
    assert path is not None
    assert path.parent.parent == folders
    assert find_secret(fingerprint(SECRET)) == SECRET


def test_a_host_without_the_file_says_what_to_do() -> None:
    with pytest.raises(SecretError, match=r"give all ranks the same one by SKIPPIPE_SECRET, before the launcher"):
        find_secret(fingerprint(SECRET))


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "5e" * 31, "/etc/passwd"])
def test_a_name_that_is_no_fingerprint_is_not_looked_for(name: str) -> None:
    with pytest.raises(SecretError, match="is no fingerprint"):
        find_secret(name)


def test_a_file_that_was_exchanged_or_opened_is_not_believed() -> None:
    path = leave_secret(SECRET)
    assert path is not None
    path.write_text("ab" * 32)
    with pytest.raises(SecretError, match="is not the secret of this job"):
        find_secret(fingerprint(SECRET))
    path.write_text(SECRET)
    path.chmod(0o644)
    with pytest.raises(SecretError, match="can be read by others"):
        find_secret(fingerprint(SECRET))
