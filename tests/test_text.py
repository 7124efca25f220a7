"""Foreign text is shown, never obeyed: judged by a CommonMark parser with tables."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hub_magmax.text import (
    MAX_INLINE,
    code,
    fenced,
    is_invisible,
    one_line,
    publishable,
    publishable_values,
    quoted,
    verbatim,
)

SETTINGS = settings(derandomize=True, deadline=None)
PARSER = MarkdownIt("commonmark").enable("table")

#: Characters that mean something to Markdown, HTML or YAML, more often than chance would have them.
MARKUP = st.text(
    st.sampled_from("`|\\<>[]()*_#-~!&$@:/ \n\t\u202e\u200b\x00ab") | st.characters(), max_size=60
)


@pytest.mark.parametrize("text", ["org/model@abc1234", "test[:10%]", "a_b.c-d", "kernel size 3", "数字"])
def test_ordinary_text_stays_as_it_is(text):
    assert code(text) == f"`{text}`"


@SETTINGS
@given(MARKUP)
def test_verbatim_text_is_one_code_span_with_every_sign(text):
    line = "".join(f"⟨U+{ord(c):04X}⟩" if is_invisible(c) else c for c in text)
    (inline,) = [token for token in PARSER.parse(f"- a: {verbatim(text)}.") if token.type == "inline"]
    assert [child.type for child in inline.children] == ["text", "code_inline", "text"]
    assert inline.children[1].content == (line or "⟨empty⟩")


@SETTINGS
@given(MARKUP)
def test_quoted_text_is_read_back_as_it_was(text):
    assert json.loads(quoted(text)) == text
    assert not any(map(is_invisible, quoted(text)))


@SETTINGS
@given(MARKUP)
def test_any_text_is_one_code_span_in_a_table_cell(text):
    tokens = PARSER.parse(f"| a | b |\n|---|---|\n| {code(text)} | x |\n")
    cells = [token.children for token in tokens if token.type == "inline"]
    assert [len(cell) for cell in cells] == [1, 1, 1, 1]
    assert cells[2][0].type == "code_inline"


@SETTINGS
@given(MARKUP)
def test_any_text_is_one_code_span_in_a_paragraph_and_a_heading(text):
    for prefix in ("", "# ", "- "):
        inline = [t for t in PARSER.parse(f"{prefix}{code(text)}\n") if t.type == "inline"]
        assert [child.type for child in inline[0].children] == ["code_inline"]


@SETTINGS
@given(MARKUP)
def test_no_invisible_character_is_left(text):
    assert not any(is_invisible(character) for character in code(text))


@SETTINGS
@given(MARKUP)
def test_a_fence_ends_only_where_it_was_meant_to(text):
    tokens = PARSER.parse(f"{fenced(text, 'yaml')}\n")
    assert [token.type for token in tokens] == ["fence"]


def test_a_fence_is_longer_than_the_longest_run_inside():
    assert fenced("a\n`````\nb").startswith("``````\n")
    assert fenced("import a", "python") == "```python\nimport a\n```"


def test_nothing_invisible_is_left_in_a_fence_but_its_lines():
    assert fenced("a\u202e\nb\x1b[1m") == "```\na⟨U+202E⟩\nb⟨U+001B⟩[1m\n```"


def test_writing_direction_and_delimiters_are_spelled_out():
    assert code("a\u202eb|c`d") == "`a⟨U+202E⟩b⟨U+007C⟩c⟨U+0060⟩d`"


def test_long_text_is_cut():
    assert one_line("x" * 10_000) == "x" * (MAX_INLINE - 1) + "…"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("./models/base", "./models/base"),
        ("../base", "../base"),
        ("/home/someone/models/base", "base"),
        ("/home/someone/models/base/", "base"),
        ("~/models/base", "base"),
        ("~someone", "(folder)"),
        ("/", "(folder)"),
        ("C:\\Users\\someone\\base", "base"),
        ("file:///home/someone/base", "base"),
        ("org/model@main", "org/model@main"),
        ("https://someone:secret@huggingface.co/org/model", "https://huggingface.co/org/model"),
        ("token_hf_abcdefghijABCDEFGHIJ0123456789abcd", "token_hf_…"),
        ("org/hf_transformers", "org/hf_transformers"),
    ],
)
def test_what_concerns_one_machine_or_person_is_left_out(written, shown):
    assert publishable(written) == shown


def test_values_are_cleaned_at_every_depth():
    values = {"a": ["/x/y", {"/k/b": ("/z/w", 1, None, 0.5)}]}
    assert publishable_values(values) == {"a": ["y", {"b": ["w", 1, None, 0.5]}]}
