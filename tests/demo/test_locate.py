"""How a setting names a model: one rule for every process."""

from pathlib import Path

import pytest

from demo import MODEL_DIR, locate


def test_the_embedded_model_is_called_demo() -> None:
    assert locate("demo") == ("demo", MODEL_DIR)


@pytest.mark.parametrize("model", [".", "../tiny", "../tiny/", "sub/.."])
def test_a_directory_is_called_by_its_name_however_it_is_written(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tiny")
    assert locate(model) == ("tiny", Path(model))


def test_a_served_name_overrules_both() -> None:
    assert locate("demo", "mine") == ("mine", MODEL_DIR)
    assert locate("some/where", "mine") == ("mine", Path("some/where"))
