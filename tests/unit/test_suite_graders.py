"""The graders of suites: which option a text chooses, and when an answer is a gold answer."""

import json

import pytest

from megatron_opd.contracts.suites import Answer, Asked, Question
from megatron_opd.verify.graders.choice import chosen_option
from megatron_opd.verify.graders.items import judge_item, judge_legacy
from megatron_opd.verify.graders.reasoning import conclusion, no_answer

FOUR = Question("k", "?", "B", ("red", "5 km", "blue sky", r"$\frac{1}{2}$"))
TEN = Question("k", "?", "B", tuple(f"option {n}" for n in range(10)))


def asked(question: Question) -> Asked:
    return Asked(question, 0, "?", question.gold, tuple(range(len(question.options))))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"so \boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{(C)}", "C"),
        (r"\boxed{\textbf{(D)}\ \frac12}", "D"),
        (r"\boxed{b}", "B"),
        (r"\boxed{B. 5 km}", "B"),
        (r"\boxed{Option C}", "C"),
        (r"\boxed{5 km}", "B"),  # an option's words
        (r"\boxed{\text{Blue sky}}", "C"),
        (r"\boxed{\frac{1}{2}}", "D"),
        (r"\boxed{A} and then \boxed{C}", "C"),
        (r"\boxed{E}", "E"),  # no option, and so wrong
        (r"\boxed{A, B}", "A, B"),
        (r"\boxed{}", None),
        (r"answer: A, \boxed{B", None),
        ("ANSWER: C", "C"),
        ("Answer: B) 5 km", "B"),
        ("Answer: (d)", "D"),
        ("answer: d", "D"),
        ("answer is d", None),
        ("The answer is (C).", "C"),
        ("The correct answer is **B**.", "B"),
        ("The answer is option C", "C"),
        ("the answer is\n\n**(C)**", "C"),
        ("The answer is D, not A", "D"),
        ("The answer is A because it is", "A"),
        ("The answer is A good thing", None),
        ("the answer is a red thing", None),
        ("The correct option is J", None),
        ("<answer>B</answer>", "B"),
        ("I guess\nB", "B"),
        ("hm\n**C**", "C"),
        ("hm\nB. 5 km", "B"),
        ("A. 4 km\n\nB. 5 km", "B"),  # the first line is no option
        ("B. 5 km\nB. 5 km", "B"),
        ("B. 5 km\nC. Blue sky", None),  # the options said again, none chosen
        ("A\nB\n\nC\nD\n", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_option_that_a_text_chooses(text: str, letter: str | None) -> None:
    assert chosen_option(text, asked(FOUR)) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is I think", None),
        ("So the answer is I.", "I"),
        ("The answer is I because of it", "I"),
        ("The correct option is: J", "J"),
        ("I would say that I am a good guesser", None),
        ("Answer: I'm not sure", None),
    ],
)
def test_the_pronoun_is_no_option(text: str, letter: str | None) -> None:
    assert chosen_option(text, asked(TEN)) == letter


def test_a_cut_text_has_no_last_line() -> None:
    assert chosen_option("and then\nB", asked(FOUR), cut=True) is None
    assert chosen_option("the answer is (B) and", asked(FOUR), cut=True) == "B"


def test_reasoning_is_no_answer() -> None:
    def text(words: str, truncated: bool = False, opened: bool = False) -> str | None:
        return conclusion(Answer(asked(FOUR), words, truncated, opened))

    assert text("<think>A</think>B</think> C") == " C"
    assert text("no tags") == "no tags"
    assert text("<think>A") is None
    assert text("A", truncated=True, opened=True) is None
    assert text("A", opened=True) == "A"  # it ended by itself: this is what it has to say
    assert no_answer(Answer(asked(FOUR), "", True)) == "truncated"


def judged(answer: str, gold: str, **wanted: object) -> str:
    return judge_item(answer, json.dumps({"gold": gold, **wanted}))


NEAR = {"relative_tolerance": 1e-4, "units": "ignored"}


@pytest.mark.parametrize(
    ("answer", "gold", "wanted", "reason"),
    [
        (r"4.5 \times 10^{33}", "4.5e33", {}, "correct"),
        (r"4.5\cdot10^{33}\ \mathrm{erg\,s^{-1}}", "4.5e33", NEAR, "correct"),
        (r"4.5 \times 10^{33} \text{ erg/s}", "4.5e33", NEAR, "correct"),
        (r"4.6 \times 10^{33}", "4.5e33", NEAR, "wrong"),
        ("2400", "2.4e3", {}, "correct"),
        ("2.4e3", "2400", {}, "correct"),
        ("0.0024", "2.4e-3", {}, "correct"),
        ("10^{5}", "1e5", {}, "correct"),
        ("v = 3.20002", "3.2", NEAR, "correct"),
        ("3.2004", "3.2", NEAR, "wrong"),
        (r"\sqrt{3}", "1.73205", NEAR, "correct"),
        (r"\sqrt{3}", "1.73205", {}, "wrong"),
        ("7 km", "7", NEAR, "correct"),
        ("7x", "7", NEAR, "wrong"),
        (r"\left( 1,\, 2 \right)", "(1,2)", {}, "correct"),
        ("", "3", {}, "no_answer"),
        ("3", "", {}, "bad_gold"),
        # several: all, in any order, none extra
        ("5,3", "3,5", {"several": True}, "correct"),
        ("3", "3,5", {"several": True}, "wrong"),
        ("3,5,7", "3,5", {"several": True}, "wrong"),
        ("3,3,5", "3,5", {"several": True}, "correct"),
        (r"\{3, 5\}", "3,5", {"several": True}, "correct"),
        (r"3 \text{ and } 5", "3,5", {"several": True}, "correct"),
        ("(2,1), (3,4)", "(3,4),(2,1)", {"several": True}, "correct"),
        ("(1,2), (3,4)", "(3,4),(2,1)", {"several": True}, "wrong"),
        ("2.55, 1.45", "1.5,2.5", {"several": True, "error": "0.1"}, "correct"),
        # tuples: in their order, every component within its error
        ("(2,1)", "(1,2)", {"kind": "Tuple"}, "wrong"),
        ("(0.505,0.69)", "(0.5,0.7)", {"kind": "Tuple", "error": "0.01,0.02"}, "correct"),
        ("(0.505,0.69)", "(0.5,0.7)", {"kind": "Tuple", "error": "0.01,0.001"}, "wrong"),
        ("(0.5,0.7,1)", "(0.5,0.7)", {"kind": "Tuple", "error": "0.01,0.02"}, "wrong"),
        ("4.4", "4.35", {"error": "0.05"}, "correct"),
        ("4.41", "4.35", {"error": "0.05"}, "wrong"),
    ],
)
def test_answers_and_items(answer: str, gold: str, wanted: dict[str, object], reason: str) -> None:
    assert judged(answer, gold, **wanted) == reason


def test_an_answer_never_raises() -> None:
    for answer in ("(" * 40, "\\boxed{", "{}" * 99, "1" * 5000, "1," * 99, "\x00", "e" * 99):
        assert judged(answer, "1,2", several=True, **NEAR) in ("wrong", "no_answer", "error")
        assert judge_legacy(answer, '{"gold": "2"}') in ("wrong", "no_answer", "error")
