"""The engine of key maps: patterns, rules, their inverse, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from kernelbank.errors import InputError
from kernelbank.weights.dialects import DIALECTS, Dialect
from kernelbank.weights.keymap import JOIN, Dropped, KeyMap, Pattern, cover, listed, rule

ids = [f"{d.name}-{d.family}" for d in DIALECTS]


@pytest.mark.parametrize(("pattern", "key", "bound"), [
    ("blocks.{i}.norm1.{p}", "blocks.11.norm1.bias", {"i": 11, "p": "bias"}),
    ("blocks.{i}.norm1.{p}", "blocks.01.norm1.bias", None),
    ("blocks.{i}.norm1.{p}", "blocks.1.norm1.gamma", None),
    ("blocks.{i}.norm1.{p}", "xblocks.1.norm1.bias", None),
    ("blocks.{i}.norm1.{p}", "blocksx1.norm1.bias", None),
    ("layers.{i+1}.reduction", "layers.3.reduction", {"i": 2}),
    ("layers.{i+1}.reduction", "layers.0.reduction", None),
    ("features.{2i+1}.{j}.qkv", "features.5.0.qkv", {"i": 2, "j": 0}),
    ("features.{2i+1}.{j}.qkv", "features.4.0.qkv", None),
    ("features.{2i+2}.norm", "features.2.norm", {"i": 0}),
    ("features.{2i+2}.norm", "features.0.norm", None),
])  # fmt: skip
def test_patterns_match_and_give_the_key_back(pattern: str, key: str, bound: dict[str, object] | None) -> None:
    found = Pattern(pattern).match(key)
    assert (found and dict(found)) == bound
    assert found is None or Pattern(pattern).key(found) == key


def test_a_rule_holds_the_same_placeholders_on_both_sides() -> None:
    with pytest.raises(ValueError, match="same placeholders"):
        rule("layers.{i}.norm", "norm")


SMALL = KeyMap(
    (rule(("q.{i}", "k.{i}", "v.{i}"), "qkv.{i}", JOIN), rule("norm3.{p}", "norm.{p}")),
    (Dropped(Pattern("pooler"), "there is none"),),
)


def test_the_inverse_is_derived() -> None:
    state = {"v.0": torch.ones(2) * 3, "q.0": torch.ones(2), "k.0": torch.ones(2) * 2, "norm3.bias": torch.zeros(1)}
    into, gone = SMALL.into({**state, "pooler": torch.zeros(1)})
    assert gone == {"pooler": "there is none"} and set(into) == {"qkv.0", "norm.bias"}
    assert into["qkv.0"].tolist() == [1, 1, 2, 2, 3, 3]
    back = SMALL.back(into)
    assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(("keys", "match"), [
    (["q.0", "v.0"], r"q\.0 without k\.0; expected all of them"),
    (["a", "b", "c", "d", "e"], r"no place for a, b, c and 2 more"),
    (["norm3.weight", "norm3.scale"], r"no place for norm3\.scale"),
])  # fmt: skip
def test_what_no_rule_takes_is_an_error(keys: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        SMALL.into({key: torch.ones(3) for key in keys})


def test_tensors_that_do_not_fit_a_change_are_named() -> None:
    with pytest.raises(InputError, match=r"qkv\.0: shape \(4,\) does not split"):
        SMALL.back({"qkv.0": torch.ones(4)})
    with pytest.raises(InputError, match=r"q\.0: shapes .* do not join"):
        SMALL.into({"q.0": torch.ones(2), "k.0": torch.ones(3), "v.0": torch.ones(2)})


def test_two_tensors_for_one_place_are_an_error() -> None:
    double = KeyMap((rule("a", "x"), rule("b", "x")))
    with pytest.raises(InputError, match="b and another tensor both become x"):
        double.into({"a": torch.ones(1), "b": torch.ones(1)})


def test_cover_names_what_is_missing_left_over_and_wrong() -> None:
    state = {"a": torch.ones(2), "b": torch.ones(3), "x": torch.ones(1)}
    with pytest.raises(InputError) as error:
        cover(state, {"a": (2,), "b": (4,), "c": (1,)}, "here")
    assert str(error.value) == "here: missing c; no place for x; wrong shape: b (3,) instead of (4,)"
    cover({"a": torch.ones(2)}, {"a": (2,)}, "here")


def test_long_lists_are_cut() -> None:
    assert listed("abc") == "a, b, c" and listed("abcde") == "a, b, c and 2 more"


@pytest.mark.parametrize("dialect", DIALECTS, ids=ids)
def test_exactly_one_rule_takes_a_key_on_either_side(dialect: Dialect) -> None:
    for side in ("theirs", "ours"):
        patterns = [pattern for rule in dialect.keys.rules for pattern in getattr(rule, side)]
        patterns += [drop.pattern for drop in dialect.keys.dropped] if side == "theirs" else []
        for pattern in patterns:
            for leaf in ("weight", "bias"):
                key = pattern.key((("i", 2), ("j", 1), ("p", leaf)))
                assert [other.text for other in patterns if other.match(key) is not None] == [pattern.text]
                assert side == "ours" or not dialect.is_derived(key)
