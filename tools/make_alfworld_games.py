"""Writes small games in ALFWorld's own format, over all six kinds of tasks.

    .venv-agents/bin/python tools/make_alfworld_games.py --out data/alfworld --train 60

ALFWORLD_DATA then is that directory. The rooms are ours: a kitchen, a bathroom or a bedroom of 9 to
16 receptacles; those of valid_unseen are in no other split. The rules of the world, the wording,
and what goes where are those of the package alfworld. A game is kept once alfworld's hand-coded
expert has won it, whose actions are its walkthrough; with --unplayed it is not tried.
"""

import argparse
import json
import random
import shutil
import sys
from dataclasses import dataclass
from itertools import count as count_from
from pathlib import Path

import textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredExpert
from alfworld.gen import constants, goal_library
from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
from textworld.envs import PddlEnv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_opd.environments.alfworld import TASK_TYPES

STATE_OF = {  # what an object must allow, by what is done to it
    "pick_clean_then_place_in_recep": "Cleanable",
    "pick_heat_then_place_in_recep": "Heatable",
    "pick_cool_then_place_in_recep": "Coolable",
}
PREDICATES = {"Cleanable": "cleanable", "Heatable": "heatable", "Coolable": "coolable"}
# The fewest and the most of every receptacle, by room.
KITCHEN = {
    "CounterTop": (1, 2), "Cabinet": (1, 3), "Drawer": (1, 2), "DiningTable": (1, 1),
    "Fridge": (1, 1), "Microwave": (1, 1), "SinkBasin": (1, 1), "StoveBurner": (1, 2),
    "GarbageCan": (1, 1), "Shelf": (1, 2),
}  # fmt: skip
BEDROOM = {
    "Bed": (1, 1), "Desk": (1, 1), "SideTable": (1, 2), "Drawer": (1, 3), "Dresser": (1, 1),
    "Shelf": (1, 3), "GarbageCan": (1, 1), "Safe": (1, 1), "ArmChair": (1, 1),
}  # fmt: skip
# What lies about: things that neither are receptacles nor belong to one room alone.
KITCHEN_THINGS = (
    "Apple", "Bread", "ButterKnife", "Cup", "DishSponge", "Egg", "Fork", "Knife", "Lettuce", "Mug",
    "Plate", "Potato", "SaltShaker", "SoapBottle", "Spatula", "Spoon", "Tomato",
)  # fmt: skip
BEDROOM_THINGS = (
    "AlarmClock", "Book", "CD", "CellPhone", "CreditCard", "KeyChain", "Laptop", "Mug", "Newspaper",
    "Pen", "Pencil", "Pillow", "RemoteControl", "Watch",
)  # fmt: skip
THINGS_IN_A_ROOM = (8, 12)
SCENES = {"train": range(0, 6), "valid_seen": range(0, 6), "valid_unseen": range(6, 9)}
MOST_STEPS = 50  # of the expert, as many as an episode has in the published runs
FIRST_BEDROOM = 301  # kitchens are numbered from 1, as in AI2-THOR
# Named by the domain, whether or not a room has one.
ALWAYS_DECLARED = {"rtype": ("SinkBasin", "Microwave", "Fridge"), "otype": ("Knife", "ButterKnife")}


@dataclass(frozen=True)
class Thing:
    """A receptacle or an object: its kind, and its id in the problem."""

    kind: str
    id: str


@dataclass(frozen=True)
class Goal:
    """What a task is about, in the words of its folder."""

    task_type: str
    target: str
    receptacle: str = ""
    toggle: str = ""

    def folder(self, scene: int) -> str:
        place = self.receptacle or self.toggle
        return f"{self.task_type}-{self.target}-None-{place}-{scene}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write games in ALFWorld's own format.")
    parser.add_argument("--out", type=Path, required=True, help="a new directory: ALFWORLD_DATA")
    parser.add_argument("--train", type=int, default=60, metavar="N", help="default %(default)s")
    parser.add_argument("--seen", type=int, default=18, metavar="N", help="default %(default)s")
    parser.add_argument("--unseen", type=int, default=18, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unplayed", action="store_true", help="do not let the expert try them")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out}: exists already; remove it or choose another one")
    counts = {
        "train": arguments.train,
        "valid_seen": arguments.seen,
        "valid_unseen": arguments.unseen,
    }
    if min(counts.values()) < 0:
        parser.error("--train, --seen and --unseen: must be 0 or more")
    for split, count in counts.items():
        for number in range(count):
            directory = arguments.out / "json_2.1.1" / split
            for attempt in count_from(0):
                draw = random.Random(f"alfworld {arguments.seed} {split} {number} {attempt}")
                folder = write_game(directory, split, number, arguments.seed, draw)
                if arguments.unplayed or add_walkthrough(folder):
                    break
                shutil.rmtree(folder.parent)
        print(f"{arguments.out}: {count} games in {split}")


def write_game(directory: Path, split: str, number: int, seed: int, draw: random.Random) -> Path:
    """Writes game `number` of a split, whose kind is the number's, modulo six. Returns its
    folder."""
    task_type = TASK_TYPES[number % len(TASK_TYPES)]
    is_bedroom = task_type == "look_at_obj_in_light" or (
        task_type not in STATE_OF and draw.random() < 0.5
    )
    scene = draw.choice(SCENES[split]) + (FIRST_BEDROOM if is_bedroom else 1)
    room = receptacles_of(scene, BEDROOM if is_bedroom else KITCHEN, seed)
    goal = drawn_goal(task_type, room, BEDROOM_THINGS if is_bedroom else KITCHEN_THINGS, draw)
    things = things_for(goal, room, BEDROOM_THINGS if is_bedroom else KITCHEN_THINGS, draw)
    folder = directory / goal.folder(scene) / f"trial_T{seed:04}{number:06}"
    folder.mkdir(parents=True)
    sentence = draw.choice(goal_library.gdict[task_type]["templates"]).format(
        obj=goal.target.lower(), recep=goal.receptacle.lower(), toggle=goal.toggle.lower()
    )
    game = {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text(),
        "grammar": Path(ALFRED_TWL2_PATH).read_text().replace("UNKNOWN GOAL", sentence),
        "pddl_problem": problem(goal, room, things),
        "solvable": True,
        "walkthrough": None,
    }
    (folder / "game.tw-pddl").write_text(json.dumps(game))
    trajectory = {
        "task_type": task_type,
        "task_id": folder.name,
        "scene": {"scene_num": scene, "floor_plan": f"FloorPlan{scene}"},
        "pddl_params": {
            "object_target": goal.target,
            "parent_target": goal.receptacle,
            "toggle_target": goal.toggle,
            "mrecep_target": "",
            "object_sliced": False,
        },
        "turk_annotations": {"anns": [{"task_desc": sentence, "high_descs": []}]},
    }
    (folder / "traj_data.json").write_text(json.dumps(trajectory, indent=1))
    return folder


def add_walkthrough(folder: Path) -> bool:
    """Lets the expert play a game, and keeps its actions if it wins."""
    random.seed(0)  # the expert guesses where it is stuck
    infos = textworld.EnvInfos(won=True, admissible_commands=True, facts=True)
    environment = AlfredExpert(AlfredDemangler(PddlEnv(infos)))
    environment.load(str(folder / "game.tw-pddl"))
    state = environment.reset()
    actions: list[str] = []
    try:
        while not state["won"] and len(actions) < MOST_STEPS:
            actions += state["extra.expert_plan"][:1]
            state, _, _ = environment.step(actions[-1])
    except NameError:  # what the expert raises where it gives up
        return False
    game = json.loads((folder / "game.tw-pddl").read_text()) | {"walkthrough": actions}
    (folder / "game.tw-pddl").write_text(json.dumps(game))
    return bool(state["won"])


def receptacles_of(scene: int, kinds: dict[str, tuple[int, int]], seed: int) -> list[Thing]:
    """The receptacles of a room, the same in all games of its number."""
    draw = random.Random(f"alfworld {seed} room {scene}")
    names = [kind for kind, bounds in kinds.items() for _ in range(draw.randint(*bounds))]
    return [Thing(name, name_of(name, draw)) for name in names]


def drawn_goal(
    task_type: str, room: list[Thing], things: tuple[str, ...], draw: random.Random
) -> Goal:
    if task_type == "look_at_obj_in_light":
        return Goal(task_type, draw.choice(things), toggle="DeskLamp")
    state = STATE_OF.get(task_type)
    targets = [t for t in things if not state or t in constants.VAL_ACTION_OBJECTS[state]]
    pairs = sorted(
        {(t, r.kind) for t in targets for r in room if fits(t, r) and places(t, room, r.kind)}
    )
    target, receptacle = draw.choice(pairs)
    return Goal(task_type, target, receptacle)


def things_for(
    goal: Goal, room: list[Thing], things: tuple[str, ...], draw: random.Random
) -> list[tuple[Thing, Thing]]:
    """Objects with the receptacles they are in; the goal's are in none of the goal's kind."""
    possible = places(goal.target, room, goal.receptacle)
    if goal.task_type == "pick_two_obj_and_place":
        # Together and in sight: the expert of alfworld 0.4.2 takes no notice of its own "move", and
        # goes back to where it took the first.
        seen = [r for r in possible if r.kind not in constants.OPENABLE_CLASS_SET]
        where = [draw.choice(seen or possible)] * 2
    else:
        where = draw.choices(possible, k=draw.randint(1, 2))
    placed = [(Thing(goal.target, name_of(goal.target, draw)), place) for place in where]
    if goal.toggle:
        tables = [r for r in room if r.kind in ("Desk", "SideTable")]
        placed.append((Thing(goal.toggle, name_of(goal.toggle, draw)), draw.choice(tables)))
    others = [name for name in things if name != goal.target and places(name, room)]
    for name in draw.choices(others, k=draw.randint(*THINGS_IN_A_ROOM)):
        placed.append((Thing(name, name_of(name, draw)), draw.choice(places(name, room))))
    return placed


def places(name: str, room: list[Thing], but: str = "") -> list[Thing]:
    """Receptacles that an object may be in, without those of a kind."""
    return [r for r in room if r.kind != but and fits(name, r)]


def fits(name: str, receptacle: Thing) -> bool:
    return name in constants.VAL_RECEPTACLE_OBJECTS[receptacle.kind]


def name_of(kind: str, draw: random.Random) -> str:
    """An id as in AI2-THOR, whose coordinates are made up: alfworld makes "apple 1" of it."""
    numbers = (f"{draw.uniform(-5, 5):+06.2f}" for _ in range(3))
    words = [
        number.replace("+", "_plus_").replace("-", "_minus_").replace(".", "_dot_")
        for number in numbers
    ]
    if kind == "SinkBasin":  # alfworld appends "basin" to the first word of such an id
        return "_bar_".join(["Sink", *words, "SinkBasin"])
    return "_bar_".join([kind, *words])


def problem(goal: Goal, room: list[Thing], placed: list[tuple[Thing, Thing]]) -> str:
    """The PDDL of a game."""
    location = {r.id: f"loc_bar_{i}_bar_{i}_bar_0_bar_30" for i, r in enumerate(room, start=1)}
    start = "loc_bar_0_bar_0_bar_0_bar_30"
    objects = [thing for thing, _ in placed]
    rtypes = sorted({r.kind for r in room} | set(ALWAYS_DECLARED["rtype"]))
    otypes = sorted({o.kind for o in objects} | set(ALWAYS_DECLARED["otype"]))
    declared = [
        "agent1 - agent",
        *(f"{o.id} - object" for o in objects),
        *(f"{r.id} - receptacle" for r in room),
        *(f"{name}Type - rtype" for name in rtypes),
        *(f"{name}Type - otype" for name in otypes),
        *(f"{place} - location" for place in [start, *location.values()]),
    ]
    facts = ["= (total-cost) 0", f"atLocation agent1 {start}"]
    for r in room:
        facts += [f"receptacleType {r.id} {r.kind}Type"]
        facts += [f"receptacleAtLocation {r.id} {location[r.id]}"]
        facts += [f"openable {r.id}"] * (r.kind in constants.OPENABLE_CLASS_SET)
    for thing, where in placed:
        facts += [f"objectType {thing.id} {thing.kind}Type"]
        facts += [f"inReceptacle {thing.id} {where.id}"]
        facts += [f"objectAtLocation {thing.id} {location[where.id]}"]
        if thing.kind in constants.VAL_ACTION_OBJECTS["Toggleable"]:
            facts += [f"toggleable {thing.id}"]
        else:
            facts += [f"pickupable {thing.id}"]
        for state, predicate in PREDICATES.items():
            facts += [f"{predicate} {thing.id}"] * (
                thing.kind in constants.VAL_ACTION_OBJECTS[state]
            )
    facts += [
        f"canContain {r}Type {o}Type"
        for r in rtypes
        for o in otypes
        if o in constants.VAL_RECEPTACLE_OBJECTS.get(r, ())
    ]
    wanted = goal_library.gdict[goal.task_type]["pddl"].format(
        obj=goal.target, recep=goal.receptacle, toggle=goal.toggle
    )
    lines = [
        "(define (problem made)",
        "(:domain alfred)",
        "(:objects",
        *(f"  {line}" for line in declared),
        ")",
        "(:init",
        *(f"  ({fact})" for fact in facts),
        ")",
        wanted.replace("#", "-"),  # ends the definition too
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
