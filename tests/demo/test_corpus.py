"""The texts are reproducible, and held-out records never occur in training texts."""

import random
import re

import pytest

from demo.batches import LENGTHS, Batcher
from demo.corpus import MAX_RECORDS, NAMES, held_out_recall, is_held_out, recall_sample
from demo.documents import LOOKUP_WEIGHT, drill_document, recall_document, skills_document
from demo.skills import SKILLS
from demo.tokenizer import train_tokenizer

_STATED = re.compile(r"(?:The code of the | )([a-z]+)(?: is)? (\d{4})")


def test_the_same_seed_draws_the_same_prompts() -> None:
    assert held_out_recall(3, 5, min_records=1, max_records=9) == held_out_recall(3, 5, min_records=1, max_records=9)
    assert held_out_recall(3, 5, min_records=1, max_records=9) != held_out_recall(4, 5, min_records=1, max_records=9)
    assert recall_sample(random.Random(1), num_records=4) == recall_sample(random.Random(1), num_records=4)


@pytest.mark.parametrize("num_records", [1, 2, 17, MAX_RECORDS])
def test_the_answer_is_the_code_stated_of_the_asked_name(num_records: int) -> None:
    for sample in held_out_recall(5, 20, min_records=num_records, max_records=num_records):
        stated = re.findall(r"The code of the ([a-z]+) is (\d{4})\.", sample.prompt)
        asked = re.findall(r"What is the code of the ([a-z]+)\?$", sample.prompt)
        assert len(stated) == len(dict(stated)) == num_records
        assert dict(stated)[asked[0]] == sample.answer


def test_every_held_out_record_is_of_the_held_out_class() -> None:
    for sample in held_out_recall(6, 50, min_records=1, max_records=30):
        stated = re.findall(r"The code of the ([a-z]+) is (\d{4})\.", sample.prompt)
        assert all(is_held_out(name, code) for name, code in stated)


def test_training_texts_state_no_held_out_record() -> None:
    rng = random.Random(7)
    texts = [recall_sample(rng, num_records=20).prompt for _ in range(20)]
    for compose in (recall_document, drill_document):
        texts += ["".join(piece.text for piece in compose(rng, length)) for length in LENGTHS for _ in range(10)]
    stated = [pair for text in texts for pair in _STATED.findall(text) if pair[0] in NAMES]
    assert len(stated) > 1000
    assert not [pair for pair in stated if is_held_out(*pair)]


@pytest.mark.parametrize("num_records", [-1, 0, MAX_RECORDS + 1])
def test_an_impossible_number_of_records_is_refused(num_records: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 110"):
        recall_sample(random.Random(0), num_records=num_records)


def test_every_skill_asks_and_answers() -> None:
    rng = random.Random(8)
    drawn = {name: draw(rng) for name, draw in SKILLS.items()}
    assert all(question and reply for question, reply in drawn.values())
    question, reply = SKILLS["add"](random.Random(1))
    a, b = map(int, re.findall(r"\d+", question))
    assert reply == f"{a} + {b} = {a + b}"


def test_pieces_encode_as_the_whole_text_does() -> None:
    tokenizer = train_tokenizer()
    batcher = Batcher(tokenizer, seed=0, batch_tokens=1)
    rng = random.Random(9)
    documents = [compose(rng, length) for compose in (recall_document, drill_document) for length in LENGTHS]
    for document in [*documents, skills_document(rng, 20)]:
        whole = tokenizer.encode("".join(piece.text for piece in document), add_special_tokens=False)
        assert batcher.encode(document)[0] == whole.ids


def test_a_recall_document_is_near_the_length_asked_for_and_asks_something() -> None:
    batcher = Batcher(train_tokenizer(), seed=0, batch_tokens=1)
    rng = random.Random(10)
    for length in LENGTHS:
        for _ in range(20):
            ids, weights = batcher.encode(recall_document(rng, length))
            assert 0.3 * length < len(ids) < 1.25 * length + 16
            assert weights.count(LOOKUP_WEIGHT) >= 1
