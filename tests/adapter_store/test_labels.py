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
    if label.isprintable() and 1 <= len(label.strip()) == len(label) <= MAX_LABEL:
        check_label(label)
    else:
        with pytest.raises(LabelError) as caught:
            check_label(label)
        assert str(caught.value).isprintable()
