"""`data check` finds what is broken, `data edit|merge|split` break nothing and keep what belongs to an episode."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from toy_dataset import EMBODIMENT, TASKS, make_dataset, make_episode

from simtoreal import cli
from simtoreal.data_collection.check import CheckResult, check
from simtoreal.data_collection.compatibility import Scores
from simtoreal.data_collection.dataset import META, VIEW, Dataset
from simtoreal.data_collection.derive import Member, derive
from simtoreal.data_collection.edit import merge, recover, split
from simtoreal.data_collection.edit_episodes import Edit, edit, parse_numbers
from simtoreal.data_collection.episode import read_episode
from simtoreal.data_collection.filters import Filter, FilteredEpisode, read_filter, write_filter
from simtoreal.data_collection.inspection import inspect
from simtoreal.data_collection.writer import DatasetWriter, rebuild
from simtoreal.envs.errors import ConfigError, DatasetError


def set_mask(dataset: Dataset, name: str, members: list[str]) -> Dataset:
    file = dataset.path / META
    meta = json.loads(file.read_text())
    meta["masks"][name] = members
    file.write_text(json.dumps(meta))
    return rebuild(dataset.path)


def add_filter(dataset: Dataset, name: str = "compatible", threshold: float = 1.0) -> None:
    """A filter that drops the first step of every episode and rejects every third."""
    verdicts, keep, scores = {}, {}, {}
    for number, episode in enumerate(dataset.episodes):
        flags = np.arange(episode.steps) > 0
        verdicts[episode.name] = FilteredEpisode(
            steps=episode.steps, seed=episode.seed, operator=episode.operator, mode="static", base=False,
            compatibility=0.5, bad_steps=1, kept_steps=int(flags.sum()), accepted=number % 3 != 2,
        )  # fmt: skip
        keep[episode.name] = flags
        values = np.full(episode.steps, episode.seed, np.float32)
        scores[episode.name] = Scores(values, values)
    write_filter(
        dataset.path,
        Filter(name=name, settings={"method": "box"}, thresholds={"static": {"lambda": threshold}},
               episodes=verdicts, keep=keep, scores=scores),
    )  # fmt: skip
    rebuild(dataset.path)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    made = make_dataset(tmp_path / "a")
    add_filter(made)
    return set_mask(made, "chosen", ["000001", "000004"])


def texts(result: CheckResult) -> str:
    return "\n".join(f"{problem.where}: {problem.what}" for problem in result.problems)


def test_an_intact_dataset_has_no_problem(dataset: Dataset) -> None:
    result = check(dataset.path)
    assert result.problems == ()
    assert result.notes == ()
    assert (result.episodes, result.steps) == (6, sum(episode.steps for episode in dataset.episodes))
    with pytest.raises(DatasetError, match="not a dataset"):
        check(dataset.path / "episodes")


def test_flipped_bits_are_found_wherever_they_change_anything(tmp_path: Path) -> None:
    """Whatever bit of an episode flips, either the check says so or every array and text is what it was."""
    dataset = make_dataset(tmp_path / "a", episodes=1)
    file = dataset.path / "episodes/000000.hdf5"
    content = file.read_bytes()
    info, arrays = read_episode(file)
    generator = np.random.default_rng(0)
    places = [0, 8, 40, *generator.integers(0, len(content), 30).tolist(), *range(100, len(content), 1500)]
    found = 0
    for place in places:
        file.unlink()  # A new file: h5py must not see the pages of the old one.
        file.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        result = check(dataset.path)
        if result.problems:
            found += 1
            assert "000000" in texts(result)
            continue
        after, same = read_episode(file)
        assert after == info, place
        assert same.keys() == arrays.keys()
        assert all(np.array_equal(same[name], arrays[name]) for name in arrays), place
    assert found > 0.8 * len(places)
    file.write_bytes(content[: len(content) // 2])
    assert "truncated" in texts(check(dataset.path))


def change_attribute(dataset: Dataset, **changes: object) -> None:
    with h5py.File(dataset.path / "episodes/000003.hdf5", "r+") as file:
        content = json.loads(file.attrs["episode"])
        file.attrs["episode"] = json.dumps({**content, **changes})


def change_array(dataset: Dataset, name: str, row: int, value: float) -> None:
    with h5py.File(dataset.path / "episodes/000003.hdf5", "r+") as file:
        file[name][row] = value


def change_meta(dataset: Dataset, *keys: str, value: object) -> None:
    file = dataset.path / META
    meta = json.loads(file.read_text())
    target = meta
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    file.write_text(json.dumps(meta))


def change_view(dataset: Dataset) -> None:
    with h5py.File(dataset.path / VIEW, "r+") as file:
        del file["data/demo_2"]
        file["data/demo_2"] = h5py.ExternalLink("episodes/000001.hdf5", "/")


DAMAGE: dict[str, tuple[Callable[[Dataset], object], str]] = {
    "missing episode": (lambda d: (d.path / "episodes/000005.hdf5").unlink(), "000005.hdf5: is missing"),
    "unlisted episode": (
        lambda d: shutil.copy(d.path / "episodes/000000.hdf5", d.path / "episodes/000009.hdf5"),
        "000009.hdf5: is not listed",
    ),
    "unfinished": (lambda d: (d.path / "episodes/000006.part").write_bytes(b"x"), "000006.part: is unfinished"),
    "stranger": (lambda d: (d.path / "episodes/notes.txt").write_text("x"), "notes.txt: does not belong"),
    "link": (
        lambda d: (
            (d.path / "episodes/000005.hdf5").unlink(),
            (d.path / "episodes/000005.hdf5").symlink_to(d.path / "episodes/000000.hdf5"),
        ),
        "000005.hdf5: is a symbolic link",
    ),
    "view gone": (lambda d: (d.path / VIEW).unlink(), "dataset.hdf5: is missing"),
    "view of the wrong file": (change_view, "data/demo_2 is ['episodes/000001.hdf5'"),
    "mask of nobody": (lambda d: change_meta(d, "masks", "chosen", value=["000077"]), "1 episodes that do not exist"),
    "mask twice": (lambda d: change_meta(d, "masks", "chosen", value=["000001"] * 2), "names an episode twice"),
    "mask of text": (lambda d: change_meta(d, "masks", "chosen", value="000001"), "is not a list"),
    "mask not in the view": (lambda d: change_meta(d, "masks", "chosen", value=["000002"]), "mask/chosen is"),
    "length": (lambda d: change_meta(d, "episodes", "000001", value=99), "has 16 steps, meta.json says 99"),
    "statistics": (
        lambda d: change_meta(d, "statistics", "values", "obs/proprio", "mean", value=[0.0] * 20),
        "values/obs/proprio/mean",
    ),
    "number of steps": (lambda d: change_meta(d, "statistics", "steps", value=1), "steps is 1, should be"),
    "embodiment digest": (lambda d: change_meta(d, "embodiment_digest", value="0" * 16), "'embodiment_digest'"),
    "embodiment": (lambda d: change_meta(d, "embodiment", "control_hz", value=30.0), "another embodiment"),
    "task": (lambda d: change_meta(d, "tasks", value={"other": {}}), "task 'toy', which meta.json does not"),
    "no json": (lambda d: (d.path / META).write_text("{"), "not valid JSON"),
    "relabelled in place": (lambda d: change_attribute(d, operator="eve"), "the description is not what was written"),
    "success and failure": (lambda d: change_attribute(d, failure="timeout"), "exactly one of them must hold"),
    "not finite": (lambda d: change_array(d, "obs/proprio", 2, np.nan), "'obs/proprio' is not finite at step 2"),
    "a value": (lambda d: change_array(d, "actions", 4, 0.25), "'actions' is not what was written"),
    "time goes back": (lambda d: change_array(d, "step/timestamp_ns", 5, 7), "does not increase after step 4"),
    "instruction": (lambda d: change_array(d, "step/instruction", 5, 3), "points beyond the 1 instructions"),
    "filter arrays": (
        lambda d: (d.path / "filters/compatible.npz").write_bytes(b"PK"), "filters/compatible: ",
    ),
    "filter gone": (lambda d: (d.path / "filters/compatible.json").unlink(), "filters/compatible: "),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_the_command_fails(dataset: Dataset, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = DAMAGE[name]
    damage(dataset)
    assert expected in texts(check(dataset.path))
    output = dataset.path.parent / "out"
    with pytest.raises(SystemExit) as error:
        cli.run(["data", "check", str(dataset.path), "--output", str(output)])
    assert error.value.code == 1
    assert "problems" in capsys.readouterr().out
    assert json.loads((output / "results.json").read_text())["check"]["problems"]


def test_a_filter_of_other_episodes_is_found(dataset: Dataset, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "b", first_seed=50)
    shutil.copytree(dataset.path / "filters", other.path / "filters")
    rebuild(other.path)
    assert "judged another episode 000000" in texts(check(other.path))


def test_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, info = make_episode(0)
    with DatasetWriter(tmp_path / "d", EMBODIMENT, TASKS) as writer:
        writer.add(arrays, dataclasses.replace(info, operator="ann [/b]", instruction="[red]stack[/]"))
    cli.run(["data", "info", str(tmp_path / "d")])
    cli.run(["data", "inspect", str(tmp_path / "d"), "--output", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    assert "ann [/b] (1)" in printed
    assert "[red]stack[/] (1)" in printed


def test_a_task_of_another_kind_is_named(dataset: Dataset) -> None:
    change_meta(dataset, "tasks", value={"toy": "toy"})
    with pytest.raises(DatasetError, match=r"meta.json: tasks.toy is 'toy'; expected a mapping"):
        Dataset.open(dataset.path)


@pytest.mark.parametrize("listed", [None, 5, "000001", ["000001"]])
def test_an_episode_list_of_another_kind_is_named_and_recovered(dataset: Dataset, listed: object) -> None:
    change_meta(dataset, "episodes", value=listed)
    assert "'episodes' is not a list of the episodes" in texts(check(dataset.path))
    with pytest.raises(DatasetError, match=r"'episodes' is not a mapping.*data recover"):
        Dataset.open(dataset.path)
    recover(dataset.path)
    assert check(dataset.path).problems == ()


@pytest.mark.parametrize("masks", [None, 5, ["000001"], {"chosen": 5}, {"chosen": [1]}, {"chosen": ["first"]}])
def test_masks_of_another_kind_are_named(dataset: Dataset, masks: object) -> None:
    change_meta(dataset, "masks", value=masks)
    assert "'masks' is not a mapping of names to lists" in texts(check(dataset.path))
    with pytest.raises(DatasetError, match="'masks' is not a mapping of names to lists"):
        _ = Dataset.open(dataset.path).masks


def test_recover_sets_episodes_aside_whose_values_cannot_be_used(dataset: Dataset) -> None:
    change_array(dataset, "obs/proprio", 2, np.nan)
    result = recover(dataset.path)
    ((file, why),) = result.set_aside
    assert file.parent.name == "damaged"
    assert "'obs/proprio' holds values that are not finite" in why
    assert len(Dataset.open(dataset.path).episodes) == len(dataset.episodes) - 1


def test_recover_takes_lost_episodes_out_of_filters(dataset: Dataset) -> None:
    add_filter(dataset)
    names = list(read_filter(dataset.path, "compatible").episodes)
    dataset.episodes[1].path.unlink()
    recover(dataset.path)
    assert list(read_filter(dataset.path, "compatible").episodes) == [name for name in names if name != "000001"]
    assert check(dataset.path).problems == ()


def test_what_recover_and_rebuild_make_is_right_again(dataset: Dataset) -> None:
    (dataset.path / VIEW).unlink()
    change_meta(dataset, "statistics", value={})
    assert check(dataset.path).problems
    rebuild(dataset.path)
    assert check(dataset.path).problems == ()


def test_merge_and_split_keep_masks_filters_and_extras(dataset: Dataset, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "b", episodes=4, first_seed=20)
    add_filter(other)
    set_mask(other, "chosen", ["000000"])
    merged = merge([dataset.path, other.path], tmp_path / "m")
    assert merged.notes == ()
    assert check(tmp_path / "m").problems == ()
    joined = merged.dataset
    assert joined.masks["chosen"] == ["000001", "000004", "000006"]
    assert [episode.extra["score"] for episode in joined.episodes] == [0, 1, 2, 3, 4, 5, 20, 21, 22, 23]
    stored = read_filter(joined.path, "compatible")
    assert [verdict.seed for verdict in stored.episodes.values()] == [0, 1, 2, 3, 4, 5, 20, 21, 22, 23]
    assert (stored.scores["000007"].likelihood == 21).all()
    assert joined.masks["compatible"] == ["000000", "000001", "000003", "000004", "000006", "000007", "000009"]
    parts = split(joined.path, tmp_path / "p", {"x": 0.6, "y": 0.4}, seed=3)
    seeds = {}
    for name, part in parts.items():
        assert check(tmp_path / "p" / name).problems == ()
        kept = read_filter(part.dataset.path, "compatible")
        for episode in part.dataset.episodes:
            assert kept.episodes[episode.name].seed == episode.seed == episode.extra["score"]
            assert (kept.scores[episode.name].novelty == episode.seed).all()
        members = part.dataset.masks.get("chosen", [])
        seeds[name] = {episode.seed for episode in part.dataset.episodes if episode.name in members}
    assert seeds["x"] | seeds["y"] == {1, 4, 20}
    # A derived dataset stands alone, but as long as its source is there its links are compared with it.
    (tmp_path / "p/x/episodes/000000.hdf5").unlink()
    shutil.copy(tmp_path / "p/x/episodes/000001.hdf5", tmp_path / "p/x/episodes/000000.hdf5")
    assert "which it was linked to" in texts(check(tmp_path / "p/x"))


def test_an_episode_of_several_datasets_is_merged_once(dataset: Dataset, tmp_path: Path) -> None:
    """Else it counts twice, and one copy is learnt from while the other one is held out."""
    other = make_dataset(tmp_path / "b", episodes=3, first_seed=20)
    both = merge([dataset.path, other.path], tmp_path / "m").dataset
    relabelled = edit(other.path, tmp_path / "r", Edit(operator="bob")).derivation.dataset
    with h5py.File(relabelled.episodes[0].path, "r+") as file:
        del file.attrs["crc32"]  # of an older version
    grown = make_dataset(tmp_path / "c", episodes=2, first_seed=23)
    merged = merge([both.path, grown.path, relabelled.path, dataset.path], tmp_path / "n")
    assert [episode.seed for episode in merged.dataset.episodes] == [0, 1, 2, 3, 4, 5, 20, 21, 22, 23, 24]
    assert {episode.operator for episode in merged.dataset.episodes} == {"ann"}
    assert [note.partition(";")[0] for note in merged.notes if "too" in note] == [
        f"3 episodes of {relabelled.path} are in {both.path} too",
        f"6 episodes of {dataset.path} are in {both.path} too",
    ]
    assert merged.dataset.masks["chosen"] == ["000001", "000004"]
    assert check(merged.dataset.path).problems == ()


def test_a_trimmed_copy_is_merged_instead_of_what_it_was_trimmed_from(tmp_path: Path) -> None:
    whole = make_dataset(tmp_path / "a", episodes=3, steps=40, rest=25)
    first = edit(whole.path, tmp_path / "t", Edit(trim_idle=True, only=frozenset({1, 2}), instruction="open it"))
    trimmed = first.derivation.dataset
    # Cut again elsewhere, as an end that rests is; and data that only look as if they were of the same recording.
    with DatasetWriter(tmp_path / "u", EMBODIMENT, TASKS) as writer:
        info, arrays = trimmed.episodes[1], trimmed.read(trimmed.episodes[1])
        writer.add({name: array[:-5] for name, array in arrays.items()}, info)
        writer.add({**arrays, "obs/front_image": arrays["obs/front_image"] + 1}, info)
    for sources in ([whole.path, tmp_path / "t", tmp_path / "u"], [tmp_path / "u", tmp_path / "t", whole.path]):
        merged = merge(sources, tmp_path / f"m{sources.index(whole.path)}")
        steps = [(one.seed, one.steps) for one in merged.dataset.episodes]
        cut = trimmed.episodes[1].steps
        assert sorted(steps) == [(0, 40), (1, cut - 5), (1, cut), (2, trimmed.episodes[2].steps)]
        assert sum("too; they are taken once" in note for note in merged.notes) == 2
        assert check(merged.dataset.path).problems == ()


def test_a_recording_that_is_learnt_from_and_held_out_is_reported(tmp_path: Path) -> None:
    whole = make_dataset(tmp_path / "a", episodes=3, steps=40, rest=25)
    trimmed = edit(whole.path, tmp_path / "t", Edit(trim_idle=True)).derivation.dataset
    members = [Member(dataset=one, episode=episode) for one in (whole, trimmed) for episode in one.episodes]
    both = derive(members, EMBODIMENT, TASKS, tmp_path / "m", operation="merge").dataset  # as by an older version
    (held_out,) = both.masks["valid"]
    (problem,) = check(both.path).problems
    twin = f"{(int(held_out) + 3) % 6:06d}"
    assert problem.what == f"mask 'valid' has {held_out} and 'train' {twin}, steps of the same recording"
    inspection = inspect(both.path, images=False)
    pairs = [(pair["first"], pair["second"], pair["kind"]) for pair in inspection.summary["duplicates"]]
    assert pairs == [(f"{number:06d}", f"{number + 3:06d}", "trimmed") for number in range(3)]
    assert "3 trimmed copies of other episodes" in inspection.findings[0].text
    # In one of the two, or in none, they do no harm.
    set_mask(set_mask(both, "valid", ["000000", "000003"]), "train", ["000001", "000002", "000004", "000005"])
    assert check(both.path).problems == ()


def test_nothing_is_learnt_from_and_held_out_at_once(tmp_path: Path) -> None:
    made = make_dataset(tmp_path / "a", episodes=6)
    train = ["000000", "000001", "000002", "000003", "000005"]
    split_of_a_person = set_mask(set_mask(made, "train", train), "valid", ["000004"])
    parts = split(made.path, tmp_path / "p", {"x": 0.5, "y": 0.5})
    found = [split_of_a_person, *(part.dataset for part in parts.values())]
    # All that was held out is in one part; the other one holds out anew.
    assert sorted(set(part.dataset.meta["masks"]) for part in parts.values()) == [set(), {"train", "valid"}]
    made.episodes[4].path.unlink()
    recover(made.path)
    found.append(Dataset.open(made.path))
    assert found[-1].meta["masks"] == {}
    found.append(set_mask(make_dataset(tmp_path / "b"), "train", [f"{number:06d}" for number in range(5)]))
    assert found[-1].masks["valid"] == ["000005"]
    found.append(set_mask(make_dataset(tmp_path / "c"), "valid", ["000001", "000002"]))
    assert found[-1].masks["train"] == ["000000", "000003", "000004", "000005"]
    for one in found:
        assert one.masks["train"]
        assert one.masks["valid"]
        assert not set(one.masks["train"]) & set(one.masks["valid"])
    everything = set_mask(make_dataset(tmp_path / "d"), "train", [f"{number:06d}" for number in range(6)])
    assert "valid" not in everything.masks
    set_mask(everything, "valid", ["000002"])
    assert "masks 'train' and 'valid' share 1 episodes, e.g. 000002" in texts(check(everything.path))


def test_a_mask_does_not_hide_a_filter(dataset: Dataset) -> None:
    set_mask(dataset, "compatible", ["000002"])  # as an export of filtered data brings it along
    assert "mask 'compatible' hides what the filter of this name accepts" in texts(check(dataset.path))
    with pytest.raises(ConfigError, match=r"has a mask 'compatible' of its own.*--output-name"):
        cli.run(["data", "filter", str(dataset.path), "--against", str(dataset.path)])


def test_filters_that_do_not_fit_together_are_left_out_and_said_so(dataset: Dataset, tmp_path: Path) -> None:
    without = make_dataset(tmp_path / "b", episodes=3, first_seed=20)
    merged = merge([dataset.path, without.path], tmp_path / "m")
    assert "1 of the datasets do not have it" in merged.notes[0]
    assert "compatible" not in merged.dataset.masks
    add_filter(without, threshold=2.0)
    merged = merge([dataset.path, without.path], tmp_path / "n")
    assert "made differently" in merged.notes[0]
    assert check(tmp_path / "m").problems == check(tmp_path / "n").problems == ()


def test_edit_by_links(dataset: Dataset, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in (dataset.path / "episodes").iterdir()}
    flags = ["--remove", "3", "5-5", "--set-operator", "bob", "--relabel-instruction", "open it", "--episodes", "0-1"]
    cli.run(["data", "edit", str(dataset.path), "--output", str(tmp_path / "e"), *flags])
    edited = Dataset.open(tmp_path / "e")
    assert [episode.seed for episode in edited.episodes] == [0, 1, 2, 4]
    assert [episode.operator for episode in edited.episodes] == ["bob", "bob", "ann", "ann"]
    assert edited.episodes[1].instruction == "open it"
    assert edited.episodes[1].instructions == ("open it",)
    # Unchanged episodes are the same file, changed ones are new, and the source is as it was.
    linked = [(tmp_path / f"e/episodes/{n:06d}.hdf5").stat().st_nlink == 2 for n in range(4)]
    assert linked == [False, False, True, True]
    assert {file.name: file.read_bytes() for file in (dataset.path / "episodes").iterdir()} == before
    assert edited.masks["chosen"] == ["000001", "000003"]
    verdicts = read_filter(edited.path, "compatible").episodes
    assert verdicts["000003"].seed == 4
    assert [verdict.operator for verdict in verdicts.values()] == ["bob", "bob", "ann", "ann"]
    assert check(edited.path).problems == ()
    results = json.loads((tmp_path / "e/results.json").read_text())["edit"]
    assert results["removed"] == ["000003", "000005"]
    assert results["rewritten"] == ["000000", "000001"]
    kept = edit(dataset.path, tmp_path / "k", Edit(keep_mask="compatible"))
    assert [episode.seed for episode in kept.derivation.dataset.episodes] == [0, 1, 3, 4]
    assert check(tmp_path / "k").problems == ()


def test_trimming_takes_rest_and_nothing_else(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "a", episodes=5, steps=30, rest=20)
    change_attribute(dataset, extra={"score": 3, "sensors": {"front": {"received": 24}}})
    add_filter(dataset)
    result = edit(dataset.path, tmp_path / "t", Edit(trim_idle=True))
    trimmed = result.derivation.dataset
    # Two steps of rest stay, and those so close to the motion that they are not told from it.
    assert result.trimmed_steps == 5 * 11
    for old, new in zip(dataset.episodes, trimmed.episodes, strict=True):
        before, after = dataset.read(old), trimmed.read(new)
        assert all(np.array_equal(after[name], before[name][11:]) for name in before)
        assert new.extra == {"score": old.seed, "trimmed": {"start": 11, "steps": old.steps}}, "no sensors of all steps"
        assert new.duration_s == pytest.approx(new.steps * 0.05)
    assert "no longer covers 5 episodes" in result.derivation.notes[0]
    assert check(trimmed.path).problems == ()
    # Again there is nothing to trim: everything is a link.
    again = edit(trimmed.path, tmp_path / "u", Edit(trim_idle=True))
    assert (again.trimmed_steps, again.rewritten) == (0, ())


def test_steps_that_the_success_needs_are_not_trimmed(tmp_path: Path) -> None:
    arrays, info = make_episode(1, 50)
    for name in ("actions", "obs/proprio"):
        arrays[name][20:] = arrays[name][20]
    arrays["actions"][20:, :6] = 0
    with DatasetWriter(tmp_path / "a", EMBODIMENT, TASKS) as writer:
        writer.add(arrays, info)
        arrays["dones"][36:] = 1
        writer.add(arrays, dataclasses.replace(info, seed=2))
    trimmed = edit(tmp_path / "a", tmp_path / "t", Edit(trim_idle=True)).derivation.dataset
    assert [episode.steps for episode in trimmed.episodes] == [30, 37]


def test_a_reward_that_alone_says_success_is_not_trimmed(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "a", EMBODIMENT, TASKS) as writer:
        for seed, reward in ((0, 1.0), (1, 0.5)):
            arrays, info = make_episode(seed, steps=50)
            arrays["actions"][20:, :6] = 0
            arrays["obs/proprio"][20:] = arrays["obs/proprio"][20]
            arrays["rewards"][36:] = reward
            writer.add(arrays, info)
    trimmed = edit(tmp_path / "a", tmp_path / "t", Edit(trim_idle=True)).derivation.dataset
    assert [episode.steps for episode in trimmed.episodes] == [37, 30]
    assert trimmed.read(trimmed.episodes[0], ["rewards"])["rewards"].sum() == 1


def test_edits_that_make_no_sense(dataset: Dataset, tmp_path: Path) -> None:
    assert parse_numbers(["3", "7-9"], "--remove") == {3, 7, 8, 9}
    for word in ("x", "3-", "9-7", "-1"):
        with pytest.raises(ConfigError, match="--remove"):
            parse_numbers([word], "--remove")
    with pytest.raises(ConfigError, match="nothing to change"):
        edit(dataset.path, tmp_path / "e", Edit())
    with pytest.raises(ConfigError, match="--episodes says what a change applies to"):
        edit(dataset.path, tmp_path / "e", Edit(remove=frozenset({3}), only=frozenset({5})))
    with pytest.raises(ConfigError, match="no episode 8; it has 0-5"):
        edit(dataset.path, tmp_path / "e", Edit(remove=frozenset({8})))
    with pytest.raises(ConfigError, match="would be left"):
        edit(dataset.path, tmp_path / "e", Edit(remove=frozenset(range(6))))
    with pytest.raises(DatasetError, match="has no mask 'chose'"):
        edit(dataset.path, tmp_path / "e", Edit(keep_mask="chose"))
    with pytest.raises(DatasetError, match="already exists and is not an empty folder"):
        edit(dataset.path, dataset.path, Edit(operator="bob"))
    assert not (tmp_path / "e").exists()
