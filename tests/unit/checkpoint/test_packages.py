"""Models that packages bring: put together once, and only of what they must hold."""

import hashlib

import pytest

from gemmakit import hub
from gemmakit.errors import CheckpointError, MissingDependency

PARTS = (b"GGUF of", b" two parts")
SHA = hashlib.sha256(b"".join(PARTS)).hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two parts, and the folder where models go."""
    folder = tmp_path / "site" / "gemmakit_test_model"
    folder.mkdir(parents=True)
    for number, part in enumerate(PARTS):
        (folder / f"part{number}").write_bytes(part)
    (folder / "__init__.py").write_text(
        "from pathlib import Path\n\ndef chunk_paths():\n    return sorted(Path(__file__).parent.glob('part*'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("GEMMAKIT_REAL", str(tmp_path / "models"))
    monkeypatch.setitem(hub.PACKAGES, "tiny-test", hub.Package("gemmakit_test_model", SHA))
    return folder


def test_the_parts_are_put_together_once_and_found_by_every_loader(package, tmp_path):
    path = hub.find_gguf("tiny-test", None)
    assert path == tmp_path / "models" / "tiny-test.gguf"
    assert path.read_bytes() == b"".join(PARTS)
    (package / "part0").unlink()  # which is not needed any more
    assert hub.packaged_model("tiny-test") == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_parts_of_another_content_are_refused_and_leave_nothing(package, tmp_path):
    (package / "part1").write_bytes(b" something else")
    with pytest.raises(CheckpointError, match=f"must be {SHA}"):
        hub.packaged_model("tiny-test")
    assert not list((tmp_path / "models").iterdir())


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("GEMMAKIT_REAL", str(tmp_path))
    monkeypatch.setitem(hub.PACKAGES, "absent-test", hub.Package("gemmakit_no_such_module", SHA))
    with pytest.raises(MissingDependency, match=r"pip install 'gemmakit\[absent-test\]'"):
        hub.packaged_model("absent-test")


def test_a_folder_of_that_name_and_any_other_name_are_what_they_were(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-test").mkdir()
    assert hub.packaged_model("tiny-test") is None
    assert hub.packaged_model("google/gemma-2b") is None


def test_nothing_else_of_a_packages_model_is_looked_for_on_the_hub(package, monkeypatch):
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("the Hub was asked"))
    assert hub.find_file("tiny-test", "generation_config.json", optional=True) is None
    with pytest.raises(CheckpointError, match=r"tiny-test is one GGUF file.* it has no config\.json"):
        hub.find_file("tiny-test", "config.json")
