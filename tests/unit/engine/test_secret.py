"""Where a job's secret comes from, and which secrets are refused."""

import os
import stat
from pathlib import Path

import pytest

from skippipe_plugin.engine.secret import SecretError, job_secret

DIGITS = "ab" * 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(f"{DIGITS}\n")
    path.chmod(0o600)
    return path


def test_it_comes_from_the_argument_then_the_variable_then_the_file_that_a_variable_names(file: Path) -> None:
    both = {"SKIPPIPE_SECRET": "cd" * 32, "SKIPPIPE_SECRET_FILE": str(file)}
    assert job_secret(str(file), environment=both) == DIGITS
    assert job_secret(None, environment=both) == "cd" * 32
    del both["SKIPPIPE_SECRET"]
    assert job_secret(None, environment=both) == DIGITS
    assert job_secret(None, environment={}) is None


def test_a_driver_makes_the_file_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new"
    umask = os.umask(0)
    try:
        made = job_secret(str(path), create=True, environment={})
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(bytes.fromhex(made)) == 32
    assert job_secret(str(path), create=True, environment={}) == made  # the next start keeps it


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_can_read_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(SecretError, match=rf"read by others \(mode 0{mode:o}\).*chmod 600"):
        job_secret(str(file), environment={})


@pytest.mark.parametrize("user", [0, 12345])
def test_a_file_of_another_user_is_refused(file: Path, user: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has written it knows what is in it, whoever can read it."""
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1 + user)
    with pytest.raises(SecretError, match=rf"belongs to another user \(uid {file.stat().st_uid}, "):
        job_secret(str(file), environment={})


def test_a_link_and_a_pipe_are_no_secret_files(file: Path, tmp_path: Path) -> None:
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    os.mkfifo(pipe, 0o600)
    with pytest.raises(SecretError, match=rf"is a link; name the file itself: {file}"):
        job_secret(str(link), environment={})
    with pytest.raises(SecretError, match="is no ordinary file"):
        job_secret(str(pipe), environment={})


@pytest.mark.parametrize("content", ["", "hunter2", "ab" * 15, "äö" * 32])
def test_what_is_no_secret_is_refused_and_not_quoted(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(SecretError, match="openssl rand -hex 32") as caught:
        job_secret(str(file), environment={})
    assert not content or content not in str(caught.value)
    with pytest.raises(SecretError, match="SKIPPIPE_SECRET holds no secret"):
        job_secret(None, environment={"SKIPPIPE_SECRET": content})


def test_a_missing_file_is_an_error_that_says_where_it_is_from(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match=r"nowhere cannot be read .*start line"):
        job_secret(str(tmp_path / "nowhere"), environment={})
    with pytest.raises(SecretError, match="cannot be made"):
        job_secret(str(tmp_path / "no" / "folder"), create=True, environment={})
