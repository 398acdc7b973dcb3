"""WebShop: our own parts alone, and the engine of a checkout where OPD_WEBSHOP names one."""

import json
import logging
import math
import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from megatron_opd.contracts.environments import Exchange, Observation
from megatron_opd.environments.webshop import (
    WebShop,
    admissible,
    are_chosen,
    goals_of,
)
from megatron_opd.environments.webshop_dialogue import LONGEST_PROMPT, WebShopDialogue
from megatron_opd.environments.webshop_engine import (
    ProductSearch,
    check_engine,
    indexed_text,
    missing_package,
    open_shop,
)
from megatron_opd.recipe.agents import EnvironmentConfig, HistoryConfig
from tools.make_webshop_catalogue import write_catalogue

CHECKOUT = os.environ.get("OPD_WEBSHOP", "")
FILES = ("items_shuffle", "items_ins", "items_human_ins")
with_engine = pytest.mark.skipif(
    check_engine(CHECKOUT) is not None or missing_package() is not None,
    reason="OPD_WEBSHOP names no checkout of princeton-nlp/WebShop, or its packages are missing",
)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    write_catalogue(folder, products=200, seed=0)
    return folder


def options(catalogue: Path) -> dict[str, str]:
    files = (str(catalogue / f"{name}.json") for name in FILES)
    return {"path": CHECKOUT} | dict(
        zip(("products", "attributes", "human"), files, strict=True)
    )  # fmt: skip


# ------------------------------------------------------------------------------------ our own parts
def test_the_first_500_goals_are_held_out() -> None:
    assert goals_of("heldout", 502) == [str(number) for number in range(500)]
    assert goals_of("train", 502) == ["500", "501"]
    assert goals_of("heldout", 3) == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"has 500 goals, .* environment\.train"):
        goals_of("train", 500)
    with pytest.raises(ValueError, match="no split 'test'"):
        goals_of("test", 600)


def test_admissible_actions_are_the_engines() -> None:
    first = {"has_search_bar": True, "clickables": ["search"]}
    assert admissible(first) == ["search[<your query>]", "click[search]"]
    item = {"has_search_bar": False, "clickables": ["< prev", "red"]}
    assert admissible(item) == ["click[< prev]", "click[red]"]


@pytest.mark.parametrize(
    ("chosen", "wanted", "expected"),
    [
        ({"size": "x-small"}, {"size": "small"}, False),  # the engine's matching takes it
        ({"size": "Small"}, {"Size": "small"}, True),
        ({"size": "small", "color": "red"}, {"size": "small"}, False),
        ({"size": "small"}, {"size": "small", "color": "red"}, False),
        ({}, {}, True),
        ({"size": "small", "color": "red"}, ["Red"], True),  # human goals: values of some options
        ({"size": "small"}, ["red"], False),
    ],
)
def test_strict_options(
    chosen: dict[str, str], wanted: dict[str, str] | list[str], expected: bool
) -> None:
    assert are_chosen(chosen, wanted) is expected


def product(asin: str, title: str, description: str = "", **options: list[str]) -> dict:
    """A product as the engine has extended it."""
    return {
        "asin": asin, "Title": title, "Description": description, "BulletPoints": ["first", "2nd"],
        "options": options,
    }  # fmt: skip


def test_what_is_indexed_of_a_product() -> None:
    text = indexed_text(product("B1", "Red Shirt", "Of wool.", color=["red", "blue"], size=["s"]))
    assert text == "red shirt of wool. first color: red, blue, and size: s"
    assert indexed_text(product("B1", "A") | {"BulletPoints": []}) == "a  "


def test_products_are_found_as_by_brute_force() -> None:
    random = np.random.default_rng(3)
    titles = [
        " ".join(f"w{number}" for number in random.integers(0, 30, size=length))
        for length in random.integers(3, 40, size=80)
    ]
    products = [product(f"B{number}", title) for number, title in enumerate(titles)]
    words = [indexed_text(one).split() for one in products]
    average = sum(map(len, words)) / len(words)
    search = ProductSearch(products)
    for query in ("w3 w17", "W5", "w1 w1 w2 nothing"):
        scores = np.zeros(len(words))
        for word in query.lower().split():
            containing = sum(word in one for one in words)
            for number, one in enumerate(words):
                count = Counter(one)[word]
                weight = math.log(1 + (len(words) - containing + 0.5) / (containing + 0.5))
                length = 0.9 * (1 - 0.4 + 0.4 * len(one) / average)
                scores[number] += weight * count / (count + length)
        found = [int(hit.docid[1:]) for hit in search.search(query, k=10)]
        assert np.allclose(scores[found], np.sort(scores)[::-1][:10])
        assert len(search.search(query, k=1000)) == (scores > 0).sum()
    assert search.search("nothing", k=10) == []
    assert json.loads(search.doc("B7").raw()) == {"id": "B7"}


def test_the_catalogue_follows_from_its_seed(catalogue: Path, tmp_path: Path) -> None:
    write_catalogue(tmp_path / "again", products=200, seed=0)
    write_catalogue(tmp_path / "other", products=200, seed=1)
    for name in FILES:
        text = (catalogue / f"{name}.json").read_text()
        assert text == (tmp_path / "again" / f"{name}.json").read_text()
        assert text != (tmp_path / "other" / f"{name}.json").read_text()
    products = json.loads((catalogue / "items_shuffle.json").read_text())
    attributes = json.loads((catalogue / "items_ins.json").read_text())
    assert len({one["asin"] for one in products}) == len(products) == 200
    assert all(len(one["asin"]) <= 10 for one in products)  # the engine drops longer ones
    assert set(attributes) == {one["asin"] for one in products}
    assert all(set(one["instruction_attributes"]) <= set(one["attributes"])
               for one in attributes.values())  # fmt: skip


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "path: missing; give your checkout"),
        ({"path": "."}, "path: . is no checkout of princeton-nlp/WebShop"),
    ],
)
def test_check_without_a_checkout(options: dict[str, str], problem: str) -> None:
    assert str(WebShop.check(options)).startswith(problem)


@pytest.mark.skipif(missing_package() is None, reason="this interpreter has WebShop's packages")
def test_an_interpreter_without_the_packages_is_named() -> None:
    """The training process checks the options, and another interpreter may play."""
    with pytest.raises(RuntimeError, match=r"needs the package .* lacks; set environment\.python"):
        WebShop("a checkout")


# ------------------------------------------------------------------------------------- the dialogue
TASK = "i need a red shirt, and price lower than 20.00 dollars"
DIALOGUE = WebShopDialogue(EnvironmentConfig("webshop", history=HistoryConfig(length=2)))
FIRST = f"WebShop [SEP] Instruction: [SEP] {TASK} [SEP] Search"


def page(text: str, *actions: str) -> Observation:
    return Observation(f"Instruction: [SEP] {TASK} [SEP] {text}", task=TASK, admissible=actions)


def test_a_prompt_without_history() -> None:
    seen = Observation(FIRST, task=TASK, admissible=("search[<your query>]", "click[search]"))
    prompt = DIALOGUE.prompt([], seen)
    assert f"Your task: {TASK}\nYou see: 'Search'\n" in prompt
    assert (
        "[\n'search[<your query>]',\n'click[search]',\n]" in prompt and "Observation" not in prompt
    )


def test_a_prompt_has_the_last_pages_with_what_was_done_on_them() -> None:
    past = [Exchange(page(f"P{k} [SEP] Next >"), f"click[{k}]", True) for k in range(1, 4)]
    prompt = DIALOGUE.prompt(past, page("P4 [SEP] Buy Now", "click[buy now]"))
    assert (
        "You have taken 3 step(s) so far. The last 2 observations, and what you did:\n"
        "[Observation 2: ''P2' [SEP] 'Next >'', Action 2: 'click[2]']\n"
        "[Observation 3: ''P3' [SEP] 'Next >'', Action 3: 'click[3]']\n"
        "You are at step 4 and see: 'P4' [SEP] 'Buy Now'\n"
    ) in prompt


def test_a_long_history_is_left_out() -> None:
    past = [Exchange(page("x" * LONGEST_PROMPT), "click[a]", True)]
    assert "Observation" not in DIALOGUE.prompt(past, page("P"))
    assert "Observation" in DIALOGUE.prompt([Exchange(page("x"), "click[a]", True)], page("P"))


def test_a_conversation_appends_the_page() -> None:
    reply = DIALOGUE.reply(page("P [SEP] Q", "click[a]"))
    assert reply.startswith("'P' [SEP] 'Q'\n") and "'click[a]',\n" in reply
    assert DIALOGUE.reply(Observation("Thank you")).startswith("Thank you\n")


@pytest.mark.parametrize(
    ("text", "action", "valid"),
    [
        ("<think>a</think><action>Click[Red]</action>", "click[red]", True),
        ("<action> click[red] </action><think></think>", "click[red]", True),
        ("<action>click[red]</action>", "click[red]", False),
        ("<think>a<action>click[red]</action>", "click[red]", False),
        ("<think>a</think>\u597d<action>click[red]</action>", "click[red]", False),
        ("<think></think><action>a</action><action>b</action>", "a", True),
        ("<think></think></action><action>a", "", True),  # verl-agent's too
        (
            "<think>a</think> I would click[red] now, or CLICK[BLUE]",
            "ow, or click[blue]"[-20:],
            False,
        ),
        ("", "", False),
    ],
)
def test_actions(text: str, action: str, valid: bool) -> None:
    made = DIALOGUE.action(text)
    assert (made.text.endswith(action), made.valid, len(made.text) <= 20) == (True, valid, True)
    assert action or not made.text
    assert DIALOGUE.end_of_action(text) is None


# --------------------------------------------------------------------------------------- the engine
@with_engine
def test_a_goal_is_the_same_in_every_process(catalogue: Path) -> None:
    files = [str(catalogue / f"{name}.json") for name in FILES]
    shops = [
        open_shop.__wrapped__(CHECKOUT, *files, False, 0, seed, "bm25", "")
        for seed in (233, 233, 1)
    ]
    goals = [[(g["instruction_text"], g["price_upper"]) for g in s.server.goals] for s in shops]
    prices = [shop.server.product_prices for shop in shops]
    assert goals[0] == goals[1] != goals[2] and prices[0] == prices[1] != prices[2]


@with_engine
def test_20_purchases_have_the_engines_reward(catalogue: Path) -> None:
    """Of the goal's product and of others, with the goal's options, with others and with none."""
    environment = WebShop(**options(catalogue), search="bm25")
    strict = WebShop(**options(catalogue), search="bm25", strict=True)
    from web_agent_site.engine.goal import get_reward

    server = environment._shop.server
    random = np.random.default_rng(0)
    scores = []
    for number in range(20):
        goal = server.goals[number]
        asin = goal["asin"]
        if number % 4 == 3:
            asin = server.all_products[random.integers(len(server.all_products))]["asin"]
        bought = server.product_item_dict[asin]
        wanted = goal["goal_options"] if number % 4 == 0 else {}
        chosen = {name: wanted.get(name, values[0]) for name, values in bought["options"].items()}
        if number % 4 == 2:
            chosen = {}
        for played in (environment, strict):
            played.reset(seed=0, options={"task_id": str(number)})
            played.step(f"search[{bought['Title']}]")
            for value in [asin.lower(), *chosen.values()]:
                info = played.step(f"click[{value}]")[4]
                assert info["score"] == 0.0 and not info["won"], (number, value)
            _, reward, ended, truncated, info = played.step("click[Buy Now]")
            expected = get_reward(bought, goal, server.product_prices[asin], chosen)
            assert (reward, ended, truncated, info["score"]) == (expected, True, False, expected)
            exact = played is environment or chosen == goal["goal_options"]
            assert info["won"] is (expected == 1.0 and exact)
        scores.append(expected)
    assert scores[::4] == [1.0] * 5 and len(set(scores)) > 3  # with the goal's product and options


@with_engine
@pytest.mark.parametrize("human_goals", [False, True])
def test_the_scripted_buyer_wins(catalogue: Path, human_goals: bool) -> None:
    environment = WebShop(**options(catalogue), search="bm25", human_goals=human_goals, strict=True)
    for number in range(0, 40, 10):
        _, info = environment.reset(seed=0, options={"task_id": str(number)})
        ended = False
        for _ in range(12):
            if ended:
                break
            action = environment.expert_action()
            assert action in info["admissible"] or action.startswith("search[")
            *_, ended, _, info = environment.step(action)
        assert info["won"] is True and info["score"] == 1.0, number


@with_engine
def test_environments_of_a_process_share_the_shop_and_nothing_else(catalogue: Path) -> None:
    one, other = (WebShop(**options(catalogue), search="bm25") for _ in range(2))
    assert one._shop is other._shop
    _, seen = one.reset(seed=0, options={"task_id": "7"})
    before_page, _ = other.reset(seed=0, options={"task_id": "7"})
    before = len(one._shop.server.user_sessions)
    one.step("search[shirt]")
    assert other.step("click[back to search]")[0] == before_page  # still at its search page
    page, *_, info = one.step("nonsense")
    assert "Page 1" in page and info["task"] == seen["task"]
    for number in range(5):
        one.reset(seed=0, options={"task_id": str(number)})
    assert len(one._shop.server.user_sessions) == before
    first = [one.step("search[<r>]")[0], one.reset(seed=4, options={"task_id": "7"})]
    again = [one.step("search[<r>]")[0], one.reset(seed=4, options={"task_id": "7"})]
    assert first[1] == again[1] and one.step("search[<r>]")[0] == again[0] != first[0]
    with pytest.raises(ValueError, match="there are goals 0 to"):
        one.reset(seed=0, options={"task_id": "x"})


@with_engine
def test_human_goals_and_what_the_log_says(
    catalogue: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING):
        environment = WebShop(**options(catalogue), human_goals=True)
    assert ("pyserini" in caplog.text) is (find_spec("pyserini") is None)
    assert len(environment.task_ids("heldout")) == 50
    _, info = environment.reset(seed=0, options={"task_id": "0"})
    assert str(info["task"]).startswith("i look for")
    without = options(catalogue) | {"human": str(tmp_path / "none.json")}
    assert len(WebShop(**without, search="bm25").task_ids("heldout")) == 500


@with_engine
def test_check_of_the_files(catalogue: Path) -> None:
    named = options(catalogue)
    assert WebShop.check(named) is None
    assert "products: no such file" in str(WebShop.check({**named, "products": "nowhere.json"}))
    assert "search: unknown value" in str(WebShop.check({**named, "search": "lucine"}))
    assert WebShop.check({**named, "human": "nowhere.json"}) is None
    problem = WebShop.check({**named, "human": "nowhere.json", "human_goals": True})
    assert "human: no such file" in str(problem)
