"""The machinery of the bar `startup`; how fast it is, the bar says."""

from tests.bars.startup import first_token_s, forbidden_imports, gateway_s, help_s


def test_serve_once_answers_and_ends() -> None:
    assert first_token_s() > 0


def test_help_answers_without_starting_anything() -> None:
    assert help_s() > 0


def test_a_gateway_maps_and_imports_neither_torch_nor_transformers() -> None:
    _, mapped = gateway_s()
    assert (mapped, forbidden_imports()) == ([], [])
