"""Writes a small catalogue in WebShop's format: products, attributes and human instructions.

    python tools/make_webshop_catalogue.py --out runs/webshop --products 200 --seed 0

It is for tests and first steps, in the place of the catalogue that WebShop's setup.sh downloads:

    environment.options.path=CHECKOUT \\
    environment.options.products=runs/webshop/items_shuffle.json \\
    environment.options.attributes=runs/webshop/items_ins.json \\
    environment.options.human=runs/webshop/items_human_ins.json
"""

import argparse
import json
import random
from pathlib import Path

# category -> (its path, things, attributes, options)
CATEGORIES: dict[str, tuple[str, list[str], list[str], dict[str, list[str]]]] = {
    "fashion": (
        "Clothing, Shoes & Jewelry/Women/Clothing",
        ["cotton shirt", "wool sweater", "rain jacket", "summer dress"],
        ["machine wash", "long sleeve", "quick drying", "slim fit"],
        {"color": ["red", "navy blue", "forest green"], "size": ["small", "x-small", "large"]},
    ),
    "garden": (
        "Home & Kitchen/Furniture/Living Room Furniture",
        ["coffee table", "book shelf", "floor lamp", "desk chair"],
        ["solid wood", "easy assemble", "space saving", "heavy duty"],
        {"color": ["walnut", "white"], "size": ["20 inch", "40 inch"]},
    ),
    "electronics": (
        "Electronics/Headphones/Over-Ear Headphones",
        ["wireless headphones", "usb charger", "phone case", "power bank"],
        ["fast charging", "noise cancelling", "water resistant", "long lasting"],
        {"color": ["black", "silver", "rose gold"]},
    ),
    "grocery": (
        "Grocery & Gourmet Food/Snack Foods/Nuts",
        ["roasted almonds", "green tea", "dark chocolate", "oat cookies"],
        ["sugar free", "gluten free", "individually wrapped", "low calorie"],
        {"flavor name": ["plain", "salted", "honey"], "size": ["pack of 1", "pack of 6"]},
    ),
    "beauty": (
        "Beauty & Personal Care/Skin Care/Body",
        ["hand cream", "face mask", "hair oil", "lip balm"],
        ["cruelty free", "fragrance free", "paraben free", "travel size"],
        {},
    ),
}
ARROW = " \u203a "  # between the steps of a category's path
MAKERS = ["Amberfield", "Norrvik", "Tallow & Reed", "Quillon", "Bracken", "Osterly"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small catalogue in WebShop's format.")
    parser.add_argument("--out", type=Path, required=True, help="a folder, made where it is not")
    parser.add_argument("--products", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    write_catalogue(arguments.out, arguments.products, arguments.seed)


def write_catalogue(out: Path, products: int, seed: int) -> None:
    """Writes items_shuffle.json, items_ins.json and items_human_ins.json into `out`."""
    draw = random.Random(seed)
    items = []
    attributes = {}
    human = {}
    for number in range(products):
        item, instructed = _product(number, draw)
        items.append(item)
        attributes[item["asin"]] = instructed
        if number % 4 == 0:
            human[item["asin"]] = [_human_instruction(item, instructed, draw)]
    out.mkdir(parents=True, exist_ok=True)
    files = {"items_shuffle": items, "items_ins": attributes, "items_human_ins": human}
    for name, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _product(number: int, draw: random.Random) -> tuple[dict, dict]:
    """A product's record, and its attributes with the instruction."""
    category = draw.choice(list(CATEGORIES))
    path, things, possible, options = CATEGORIES[category]
    thing = draw.choice(things)
    attributes = draw.sample(possible, draw.randint(1, 3))
    price = draw.randint(500, 9000) / 100
    pricing = draw.choice([f"${price}", f"${price} to ${round(price * 1.5, 2)}", ""])
    item = {
        "asin": f"B{number:09d}",
        "name": f"{draw.choice(MAKERS)} {thing.title()}, {', '.join(attributes)}, No. {number}",
        "category": category,
        "query": thing,
        "product_category": path.replace("/", ARROW),
        "full_description": f"A {thing} for every day. It is {' and '.join(attributes)}.",
        "small_description": [f"{one.capitalize()} {thing}" for one in attributes],
        "pricing": pricing,
        "customization_options": {
            name: [{"value": value, "image": None} for value in values]
            for name, values in options.items()
        }
        or None,
        "images": [f"https://example.com/{number}.jpg"],
    }
    wanted = attributes[: draw.randint(1, len(attributes))]
    instruction = f"i am looking for {thing} that is {' and '.join(wanted)}"
    instructed = {
        "attributes": attributes,
        "instruction": instruction,
        "instruction_attributes": wanted,
    }
    return item, instructed


def _human_instruction(item: dict, instructed: dict, draw: random.Random) -> dict:
    """What a person might have asked for: some options of the product, by their values alone."""
    options = item["customization_options"] or {}
    values = [draw.choice(contents)["value"] for contents in options.values()][:1]
    return {
        "instruction": " in ".join(
            [instructed["instruction"].replace("am looking", "look"), *values]
        ),
        "instruction_attributes": instructed["instruction_attributes"],
        "instruction_options": values,
    }


if __name__ == "__main__":
    main()
