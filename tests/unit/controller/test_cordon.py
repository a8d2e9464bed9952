from __future__ import annotations

from orchestrator.controller.cordon import Cordon


def room_on(nodes: dict[str, int]):
    return lambda without: sum(room for node, room in nodes.items() if node not in without)


def test_a_node_is_kept_off_while_others_have_room() -> None:
    cordon = Cordon()
    cordon.put("b")
    assert cordon.kept_off(2, room_on({"a": 1, "b": 1, "c": 1})) == {"b"}
    assert cordon.kept_off(3, room_on({"a": 1, "b": 1, "c": 1})) == set(), "with no room elsewhere it is used at once"


def test_of_several_those_that_failed_last_are_kept_off_longest() -> None:
    cordon = Cordon()
    for node in ("a", "b", "a"):
        cordon.put(node)
    assert cordon.kept_off(2, room_on({"a": 1, "b": 1, "c": 2})) == {"a", "b"}
    assert cordon.kept_off(3, room_on({"a": 1, "b": 1, "c": 2})) == {"a"}


def test_after_half_an_hour_it_is_as_good_as_any() -> None:
    now_s = 0.0
    cordon = Cordon(clock=lambda: now_s)
    cordon.put("a")
    now_s = 1799.0
    assert cordon.kept_off(1, room_on({"a": 1, "b": 1})) == {"a"}
    now_s = 1800.0
    assert cordon.kept_off(1, room_on({"a": 1, "b": 1})) == set()
    cordon.put("a")
    assert cordon.kept_off(1, room_on({"a": 1, "b": 1})) == {"a"}, "it failed again"
