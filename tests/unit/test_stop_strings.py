"""Stop texts across token boundaries, against a plain search in the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.router.stop_strings import StopMatcher


def run(stops: list[str], chunks: list[str], include: bool) -> tuple[str, str | None, list[str]]:
    matcher = StopMatcher(stops, include)
    released = [matcher.push(chunk) for chunk in chunks]
    if matcher.matched is None:
        released.append(matcher.flush())
    return "".join(released), matcher.matched, released


def expected(stops: list[str], text: str, include: bool) -> tuple[str, str | None]:
    found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[:end] if include else text[: end - len(stop)], stop


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3, unique=True),
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.booleans(),
)
def test_equals_a_search_in_the_whole_text(
    stops: list[str], chunks: list[str], include: bool
) -> None:
    text, matched, _ = run(stops, chunks, include)
    assert (text, matched) == expected(stops, "".join(chunks), include)


def test_cut_inside_one_token() -> None:
    assert run(["stop"], ["go and stop. Then"], True)[:2] == ("go and stop", "stop")
    assert run(["stop"], ["go and stop. Then"], False)[:2] == ("go and ", "stop")


def test_across_tokens_and_held_back_only_when_cut_off() -> None:
    chunks = ["a\n", "Us", "er", ": x"]
    assert run(["\nUser:"], chunks, False) == ("a", "\nUser:", ["a", "", "", ""])
    assert run(["\nUser:"], chunks, True)[2] == ["a\n", "Us", "er", ":"]


def test_held_text_is_released_when_it_was_no_stop() -> None:
    assert run(["\nUser:"], ["a\nUse", "d", "."], False)[2] == ["a", "\nUsed", ".", ""]


def test_held_text_is_released_at_the_end() -> None:
    assert run(["END"], ["the E", "N"], False) == ("the EN", None, ["the ", "", "EN"])


def test_nothing_after_a_match() -> None:
    matcher = StopMatcher(["x"], True)
    assert matcher.push("ax") == "ax"
    assert matcher.push("more") == ""


def test_repeating_stop_is_linear() -> None:
    matcher = StopMatcher(["a" * 20_000 + "b"], False)
    for _ in range(50):
        assert len(matcher.push("a" * 1000)) <= 1000
