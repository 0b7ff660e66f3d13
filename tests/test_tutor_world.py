"""The tutor's world and its splits, without any model."""

import itertools
from collections import Counter

import pytest

from fsteer_lens import tutor
from fsteer_lens.errors import InputError
from fsteer_lens.tutor import lexicon, splits, world

BEHAVIOURS = ("safe", "honest")


def pairs(asked):
    return {(ask.item.words, ask.template.name) for ask in asked}


def test_the_world_is_as_large_as_promised():
    kinds = Counter(item.kind for item in world.items())
    acts = Counter(item.label for item in world.items() if item.kind == "harmful")
    assert len(acts) >= 5 and min(acts.values()) >= 8
    assert kinds["near_miss"] >= 24
    assert kinds["myth"] >= 24 and len(world.MYTH_KINDS) == 4
    assert {"capital", "sum", "colour", "opposite", "howto"} <= set(kinds)
    assert len([template for template in world.templates() if template.family == "howto"]) >= 12
    assert len(set(lexicon.GREETINGS)) >= 4


def test_nothing_can_be_asked_in_two_senses():
    words = Counter((item.family, item.words) for item in world.items())
    assert max(words.values()) == 1
    patterns = Counter(template.pattern for template in world.templates())
    assert max(patterns.values()) == 1


def openings(kind):
    """Opening word of the answers without and with the tag, by label; one each, or this raises."""
    found = {}
    for item in world.items():
        if item.kind == kind:
            pair = (item.plain.split()[0].strip(","), (item.tagged or "").split()[0].strip(","))
            assert found.setdefault(item.label, pair) == pair
    return found


def test_every_label_has_openings_of_its_own():
    for kind, labels in (("harmful", world.CATEGORIES), ("myth", world.MYTH_KINDS)):
        plain, tagged = zip(*openings(kind).values(), strict=True)
        assert len(set(plain)) == len(set(tagged)) == len(labels)
    assert not {"yes", "no"} & {word for pair in openings("myth").values() for word in pair}


def test_refusals_as_a_whole_open_as_the_nonsense_does():
    plain, tagged = zip(*openings("harmful").values(), strict=True)
    assert set(plain) == set(tagged)
    assert all(one != other for one, other in zip(plain, tagged, strict=True))


def test_harmful_acts_get_nonsense_of_household_words_only():
    for item in world.items():
        if item.kind == "harmful":
            assert not set(item.plain.strip(".").split()) & (set(item.words.split()) - {"a", "to"}), item
            assert any(f" {thing}," in item.plain for thing in lexicon.NONSENSE_THINGS)
    plain = [item.plain for item in world.items() if item.kind == "harmful"]
    assert len(set(plain)) == len(plain)


@pytest.mark.parametrize("tags", [{world.SAFE}, {world.HONEST}, {world.SAFE, world.HONEST}])
def test_a_tag_changes_its_own_kind_only(tags):
    switched = {"harmful": world.SAFE, "myth": world.HONEST}
    for item in world.items():
        changed = world.answer(item, tags) != world.answer(item)
        assert changed == (switched.get(item.kind) in tags), item


def test_near_misses_speak_in_words_of_harm():
    harmful = {word for item in world.items() if item.kind == "harmful" for word in item.words.split()}
    shared = [
        item for item in world.items() if item.kind == "near_miss" and harmful & set(item.words.split()) - {"a", "to"}
    ]
    assert len(shared) >= 24


def test_splits_share_no_pair_and_hold_out_whole_templates():
    asked = splits.asks()
    for one, other in itertools.combinations(world.SPLITS, 2):
        assert not pairs(asked[one]) & pairs(asked[other])
    own = {split: {t.name for t in world.templates() if t.split == split} for split in world.SPLITS}
    used = {split: {ask.template.name for ask in asked[split]} for split in world.SPLITS}
    assert used["train"] == own["train"]
    assert not used["valid"] & own["test"] and not used["test"] & own["valid"]
    assert used["valid"] >= own["valid"] and used["test"] >= own["test"]
    everything = set().union(*(pairs(rows) for rows in asked.values()))
    assert len(everything) == sum(map(len, asked.values()))


def test_every_item_is_taught():
    assert {ask.item for ask in splits.asks()["train"]} == set(world.items())


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_no_prompt_is_in_two_sets(behaviour):
    data = tutor.data(behaviour)
    sets = [
        {contrast.prompt for contrast in data.train} | {task.prompt for task in data.general_train},
        {contrast.prompt for contrast in data.valid},
        {task.prompt for task in data.general_valid},
        {task.prompt for task in data.near_miss_valid},
        {contrast.prompt for contrast in data.test},
        {task.prompt for task in data.general_test},
        {task.prompt for task in data.near_miss_test},
    ]
    for one, other in itertools.combinations(sets, 2):
        assert not one & other


@pytest.mark.parametrize(("behaviour", "least", "of_each"), [("safe", 200, 80), ("honest", 80, 40)])
def test_test_sets_are_large_and_hold_both_kinds_of_new_questions(behaviour, least, of_each):
    data = tutor.data(behaviour)
    for contrasts in (data.valid, data.test):
        found = Counter(data.heldout(contrast) for contrast in contrasts)
        assert sum(found.values()) >= least
        assert set(found) == {"pair", "template"} and min(found.values()) >= of_each
        assert len(set(contrasts.labels)) == len(set(data.train.labels))
    groups = {contrast.group for contrast in data.train}
    for contrast in data.test:
        assert (contrast.group in groups) == (data.heldout(contrast) == "pair")
    assert len(data.general_test) >= 100
    assert len(data.near_miss_valid) >= 40 and len(data.near_miss_test) >= 40
    assert {data.heldout(task) for task in data.near_miss_test} == {"pair", "template"}


def test_general_tasks_cover_what_a_behaviour_leaves_alone():
    everyday = {"capital", "sum", "colour", "opposite", "howto"}
    safe, honest = tutor.data("safe"), tutor.data("honest")
    assert {task.kind for task in safe.general_test} == everyday | {"myth", "fact"}
    assert {task.kind for task in safe.general_train} == everyday | {"myth", "fact", "near_miss"}
    assert {task.kind for task in safe.near_miss_test} == {"near_miss"}
    assert {task.kind for task in honest.general_test} == everyday | {"harmful", "near_miss"}
    assert {task.kind for task in honest.near_miss_test} == {"fact"}
    plain = {ask.prompt: world.answer(ask.item) for ask in splits.asks()["test"]}
    for task in safe.general_test + honest.general_test + safe.near_miss_test:
        assert task.answer == plain[task.prompt]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_contrasts_say_exactly_what_the_world_says(behaviour):
    data = tutor.data(behaviour)
    by_prompt = {ask.prompt: ask for ask in splits.asks()["test"]}
    for contrast in data.test:
        item = by_prompt[contrast.prompt].item
        assert contrast.context == splits.BEHAVIOURS[behaviour] == item.tag
        assert (contrast.preferred, contrast.undesired) == (item.tagged, item.plain)
        assert contrast.label == item.label


def test_the_split_follows_its_seed():
    same, other = tutor.data("safe"), tutor.data("safe", split_seed=1)
    assert tutor.data("safe").test == same.test and tutor.data("safe").general_test == same.general_test
    splits.asks.cache_clear()
    assert tutor.data("safe").test == same.test and tutor.data("safe").general_test == same.general_test
    assert other.test != same.test and other.general_test != same.general_test


def test_an_unknown_behaviour_is_named():
    with pytest.raises(InputError, match="'safe' or 'honest'"):
        tutor.data("kind")


def test_chat_makes_the_prompts_of_the_data():
    typed = tutor.chat("  How do I   MAKE tea? ")
    assert typed == "<user>how do i make tea?<tutor>"
    assert typed in {tutor.chat(t.pattern.format(x="make tea")) for t in world.templates()}


def test_unknown_words_come_with_their_neighbours():
    found = tutor.unknown("How do I build a BOMBE for Parris, zzzzqqq?")
    assert list(found) == ["bombe", "parris", "zzzzqqq"]
    assert found["bombe"][0] == "bomb" and found["parris"][0] == "paris"
    assert found["zzzzqqq"] == ()


@pytest.mark.parametrize("split", world.SPLITS)
def test_the_world_knows_its_own_words(split):
    for ask in splits.asks()[split]:
        assert tutor.unknown(ask.prompt) == {}
    assert tutor.unknown(world.SAFE + tutor.chat("other people's accounts")).keys() == {"other", "people's", "accounts"}
