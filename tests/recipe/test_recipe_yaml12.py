"""Scalars and structures of recipe files: YAML 1.2, whatever PyYAML makes of them."""

import math

import pytest
import yaml

from reproduce.errors import RecipeError
from reproduce.recipe import load_recipe, yaml12

NUMBERS = {
    "010": 10, "08": 8, "-010": -10, "+7": 7, "0": 0, "0o10": 8, "0x1F": 31, "0xff": 255,
    "1e-4": 1e-4, "1E3": 1000.0, "-1.5e+2": -150.0, ".5": 0.5, "5.": 5.0, "1.e-8": 1e-8,
    "010.5": 10.5, ".inf": math.inf, "-.INF": -math.inf, "+.Inf": math.inf,
}  # fmt: skip
"""Section 10.3.2 of the specification; the first four are others in YAML 1.1, or nothing."""
WORDS = {
    "null": None, "~": None, "": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "FALSE": False,
}  # fmt: skip
TEXTS = [
    "1:30", "190:20:30", "1:30.5", "1_000", "0b101", "0o8", "0O10", "0X1F", "-0x1F", "-0o7",
    "1_0.5", "yes", "no", "on", "off", "y", "n", "Yes", "NO", "tRue", "nULL",
    "2024-01-01", "2024-01-01 10:00:00", "=", "inf", "nan", "1e", ".", "+", "-.", ".NaN1", "1.2.3",
]  # fmt: skip
"""Text in YAML 1.2; most are numbers, bools or dates in 1.1."""


@pytest.mark.parametrize(("text", "value"), [*NUMBERS.items(), *WORDS.items()])
def test_scalars_of_the_core_schema(text, value):
    found = yaml12.load(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_not_a_number():
    assert all(math.isnan(yaml12.load(text)) for text in (".nan", ".NaN", ".NAN"))


@pytest.mark.parametrize("text", TEXTS)
def test_all_else_is_text(text):
    assert yaml12.load(f"- {text}") == [text]


@pytest.mark.parametrize("value", [*NUMBERS, *WORDS, *TEXTS, "a: b", " x", "# c", "é\n"])
def test_text_that_looks_like_something_is_quoted_for_readers_of_either_version(value):
    shown = yaml12.dump(value)
    assert yaml12.load(shown) == yaml.safe_load(shown) == value
    assert yaml12.load(yaml12.dump({value: [value]})) == {value: [value]}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: &a {b: *a}", "line 1: the anchor &a holds itself"),
        ("seeds: &a\n  - 1\n  - [*a]", "line 3: the anchor &a holds itself"),
        ("pretrain:\n  arms: &a\n    foo: *a\n", "line 3: the anchor &a holds itself"),
        ("a: &a {<<: *a}", "line 1: the anchor &a holds itself"),
        ("? &a [*a]\n: 1", "line 1: the anchor &a holds itself"),
        ("[" * 300, "line 1: nested more than 50 deep"),
        ("a: " + "{a: " * 60 + "1" + "}" * 60, "line 1: nested more than 50 deep"),
        (
            "a0: &a0 [1, 2]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
            "line 6: more than 100000 values, anchors written out",
        ),
        ("updates: !!int 1_000", "line 1: '1_000' is no int of YAML 1.2"),
        ("updates: !!float 1:30", "line 1: '1:30' is no float of YAML 1.2"),
        ("updates: !!bool yes", "line 1: 'yes' is no bool of YAML 1.2"),
        ("updates: !!null nothing", "line 1: 'nothing' is no null of YAML 1.2"),
        ("name: !!timestamp 2024-01-01", "line 1: could not determine a constructor for the tag"),
        ("name: !!binary aGk=", "line 1: could not determine a constructor for the tag"),
        ("updates: 1" + "0" * 5000, "line 1: a number of 5001 digits"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_one_problem_of_the_recipe(tmp_path, text, found):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"smoke+{path}")
    (problem,) = caught.value.problems
    assert problem.startswith(found)
    assert caught.value.exit_code == 2


def test_tags_say_what_plain_scalars_are_too():
    assert yaml12.load("[!!int 010, !!float 1, !!str 010, !!bool TRUE]") == [10, 1.0, "010", True]


def test_anchors_and_merge_keys_are_written_out():
    text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\n"
    assert yaml12.load(text)["b"] == {"x": 1, "y": 2}
    assert yaml12.load(text)["c"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("way", ["file", "set"])
def test_files_and_set_read_alike(tmp_path, way):
    def load(path, text):
        if way == "set":
            return load_recipe("as-run", [f"{'.'.join(path)}={text}"])
        file = tmp_path / "mine.yaml"
        file.write_text(f"{path[0]}: {{{path[1]}: {text}}}\n", encoding="utf-8")
        return load_recipe(f"as-run+{file}")

    assert load(["pretrain", "updates"], "010").pretrain.updates == 10
    assert load(["data", "train_parts"], "[2024-01-01, 1:30, no]").data.train_parts == [
        "2024-01-01", "1:30", "no"
    ]  # fmt: skip
    for path, text, found in (
        (["pretrain", "updates"], "1_000", "should be a whole number, found '1_000'"),
        (["pretrain", "updates"], "1:30", "should be a whole number, found '1:30'"),
        (["pretrain", "crop_seconds"], "1:30.5", "should be a number, found '1:30.5'"),
        (["data", "download"], "yes", "should be true or false, found 'yes'"),
        (["data", "subset_sha256"], "0" * 64, "should be text, in quotes, found 0"),
        (["data", "archives_sha256"], "{010: abc}", "a key is text, found 10; put it in quotes"),
        (["data", "archives_sha256"], "&a {b: *a}", "the anchor &a holds itself"),
    ):
        with pytest.raises(RecipeError) as caught:
            load(path, text)
        assert found in caught.value.problems[0]
