"""Writes what the agents' demo starts from: worked turns of a toy world, a bank of skills, a
tokenizer of one token per word, and a random-initialised Qwen3 model.

    python tools/make_demo_agents.py --out runs/demo_agents_assets --seed 0

The worked turns are of worlds whose hidden rules are drawn anew for every one, most of them with
the rules that matter in the prompt. Who learns from them can read skills, and knows no world.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_opd.contracts.environments import Exchange, Observation  # noqa: E402
from megatron_opd.environments.workshop import ITEMS, JOBS, Rules, Workshop  # noqa: E402
from megatron_opd.environments.workshop_dialogue import (  # noqa: E402
    WORDS,
    WorkshopDialogue,
    answer,
)
from megatron_opd.environments.workshop_skills import (  # noqa: E402
    lines_of,
    partly_wrong,
    write_bank,
)
from megatron_opd.recipe.agents import EnvironmentConfig  # noqa: E402
from tools.make_demo import CONTEXT, write_model  # noqa: E402

PAD, EOS = "<pad>", "<eos>"
SIZE = 4  # of the hidden tables of the world that the demo is played in
WRONG = 0.25  # of the entries of the bank that is partly wrong
EXAMPLES = 60_000
WITH_SKILLS = 0.6  # of the worked turns
MISTAKES = 0.3  # of the turns that come before
MODEL = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the agents' demo's assets.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo_agents_assets"), help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the turns and of the weights")
    parser.add_argument("--rules", type=int, default=0, help="seed of the world's hidden rules")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {out}: exists already and is not empty; remove it, or choose another")
    write_assets(out, arguments.seed, arguments.rules)


def write_assets(out: Path, seed: int, rules: int, examples: int = EXAMPLES) -> None:
    out.mkdir(parents=True, exist_ok=True)
    world = Rules.drawn(rules, SIZE)
    write_bank(out / "skills", world)
    write_bank(out / "skills_wrong", partly_wrong(world, WRONG, seed))
    write_turns(out / "turns.jsonl", examples, seed)
    write_model(out / "student", MODEL, build_tokenizer(), seed)


# ------------------------------------------------------------------------------------- worked turns
def write_turns(path: Path, count: int, seed: int) -> None:
    """JSONL with the prompt of a turn and the right answer to it, each of a world of its own."""
    draw = random.Random(f"turns {seed}")
    dialogue = WorkshopDialogue(EnvironmentConfig("workshop"))
    with path.open("w") as file:
        for _ in range(count):
            prompt, right = worked_turn(dialogue, draw)
            file.write(json.dumps({"problem": prompt, "answer": "", "response": right}) + "\n")
    print(f"{path}: {count:,} worked turns")


def worked_turn(dialogue: WorkshopDialogue, draw: random.Random) -> tuple[str, str]:
    """A turn somewhere in an episode, after mistakes or none."""
    world = Workshop(budget=9, seed=draw.randrange(2, 10**6))
    job = draw.choice(JOBS)
    item = draw.choice(ITEMS)
    text, info = world.reset(seed=0, options={"task_id": f"{job} {item}"})
    seen = Observation(text, task=str(info["task"]))
    past: list[Exchange] = []
    for _ in range(draw.randrange(4)):
        action = world.expert_action()
        if draw.random() < MISTAKES or world.done == 1:
            action = draw.choice([a for a in world._understood() if a != action])
        text, *_ = world.step(action)
        past.append(Exchange(seen, action, valid=True))
        seen = Observation(text, task=seen.task)
    prompt = dialogue.prompt(past, seen)
    if draw.random() < WITH_SKILLS:
        lines = lines_of(world.rules)
        prompt = f"{lines[item]}\n\n{lines[job]}\n\n{prompt}"
    return prompt, answer(world.expert_action())


# -------------------------------------------------------------------------------------------- model
def build_tokenizer() -> Any:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate([PAD, EOS, *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    main()
