import pytest

from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tags import check_iob2, entity_types, iob2_tags, map_entity_types


def sentences(*tags: list[str]) -> Sentences:
    return Sentences("news.json", [[f"w{j}" for j in range(len(row))] for row in tags], list(tags))


def test_well_formed_iob2_passes():
    check_iob2(sentences(["B-PER", "B-PER", "I-PER", "O", "B-LOC", "I-LOC", "I-LOC"], ["O"]))


@pytest.mark.parametrize(
    ("row", "token"),
    [
        (["I-PER"], 1),
        (["O", "I-PER"], 2),
        (["B-PER", "I-LOC"], 2),
        (["B-PER", "O", "I-PER"], 3),
        (["B_PER"], 1),
        (["O", "B-"], 2),
        (["O", "I"], 2),
        (["PER"], 1),
        (["O", ""], 2),
        (["o"], 1),
    ],
)
def test_a_malformed_tag_is_named_by_file_sentence_and_word(row, token):
    where = f"news.json, sentence 2, token {token} 'w{token - 1}'.*{row[token - 1]!r}"
    with pytest.raises(ValueError, match=where):
        check_iob2(sentences(["O"], row))


def test_the_inventory_joins_the_types_of_all_sets_in_alphabetical_order():
    types = entity_types([sentences(["B-PER", "O"]), sentences(["B-DATE", "I-DATE"], ["B-LOC"])])
    assert iob2_tags(types) == ["O", "B-DATE", "I-DATE", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_mapping_renames_a_type_and_drops_what_is_mapped_to_o():
    mapped = map_entity_types(
        sentences(["B-PERSON", "I-PERSON", "B-DATE", "I-DATE", "B-LOC"]), {"PERSON": "PER", "DATE": "O"}
    )
    assert mapped.tags == [["B-PER", "I-PER", "O", "O", "B-LOC"]]
