from __future__ import annotations

import dataclasses

import pytest

from bsa_compile.errors import UsageError
from bsa_compile.pipelines.small.captions import parse_caption, sample_captions


def test_captions_are_read_back():
    captions = sample_captions(2000, seed=0)
    assert [parse_caption(caption.text) for caption in captions] == captions


def test_case_marks_and_other_words_do_not_matter():
    plain = parse_caption("a small red ball rolls to the left over grass")
    loose = parse_caption("Look: a SMALL, shiny red ball\n rolls to the  left... over wet grass!")
    assert loose == dataclasses.replace(plain, text=loose.text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a ball rises over sand", "name a colour, got .* Colours are: red, yellow,"),
        ("a red thing rises over sand", "name a shape, .* Shapes are: ball, circle,"),
        ("a red ball rolls over sand", "name a motion, .* rolls to the left,"),
        ("a red ball rises", "name a background, .* Backgrounds are: grass,"),
        ("a dog runs", "name a colour, a shape, a motion, a background, "),
        ("", "name a colour, a shape, a motion, a background, got ''"),
        ("a red or blue ball rises over sand", r"more than one colour \(red, blue\)"),
        ("a red ball rises, then falls over sand", r"more than one motion \(up, down\)"),
        ("a small and big red ball and star rise or bounces on sand", r"shape \(ball, star\) and size \(small, big\)"),
        ("a reddish starlet rises over grasses", "name a colour, a shape, a background, "),
    ],
)
def test_what_is_missing_or_ambiguous_is_named(text, said):
    with pytest.raises(UsageError, match=said):
        parse_caption(text)
