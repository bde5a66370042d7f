"""States: dicts of tensors and of such dicts, and their names in a file."""

import pytest
import torch

from memlm.memory.state import in_order, leaves, mapped, named, nested, numbered
from tests.conftest import same_state


def nested_state():
    x = torch.arange(40.0).reshape(20, 2)
    return {"k": x[0], "memory": {"conv": x[1], "weights": numbered(x[2:14])}, "bank": {"k": x[14]}}


def test_names_and_states_are_the_same_thing():
    state = nested_state()
    names = named(state)
    assert [*names][:3] == ["k", "memory.conv", "memory.weights.0"] and len(names) == 15
    again = nested(dict(reversed(names.items())))
    assert same_state(state, again) and nested({}) == {}
    # In the order of numbers, however the file sorts names.
    assert torch.equal(torch.stack(in_order(again["memory"]["weights"])), torch.arange(4.0, 28.0).reshape(12, 2))


def test_functions_meet_every_tensor_and_those_in_its_place():
    state = nested_state()
    assert len([*leaves(state)]) == 15
    sums = mapped(torch.add, state, mapped(lambda x: 2 * x, state))
    assert same_state(sums, mapped(lambda x: 3 * x, state)) and same_state(state, nested_state())
    with pytest.raises(KeyError, match="bank"):
        mapped(torch.add, state, {"k": state["k"], "memory": state["memory"]})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.b": torch.zeros(1)}, "state key 'a.b' must have no dot"),
        ({"a": {"b.c": torch.zeros(1)}}, "state key 'b.c' must have no dot"),
        ({"a": {}}, "state key 'a' holds an empty dict"),
    ],
)
def test_states_that_a_file_cannot_hold_are_named(state, message):
    with pytest.raises(ValueError, match=message):
        named(state)


@pytest.mark.parametrize("names", [("a", "a.b"), ("a.b", "a"), ("a", "a-b", "a.b.c")])
def test_a_name_is_of_a_tensor_or_of_a_dict(names):
    with pytest.raises(ValueError, match=r"tensor 'a\.b.*' begins with the name of another tensor"):
        nested(dict.fromkeys(names, torch.zeros(1)))
