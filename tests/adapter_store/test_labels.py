"""A label is something a person can read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_store.errors import LabelError
from adapter_store.labels import MAX_LABEL, check_label


@pytest.mark.parametrize("label", ["0", "stop sign", "grüner Tee", "犬", "a" * MAX_LABEL])
def test_words_are_labels(label) -> None:
    check_label(label)


@given(st.text(max_size=300))
def test_every_other_text_is_refused_in_printable_words(label) -> None:
    try:
        check_label(label)
    except LabelError as error:
        assert str(error).isprintable()
    else:
        assert 1 <= len(label) <= MAX_LABEL
        assert label.isprintable()
