"""Episodes and settings are what was saved last, also after a restart."""

from adapter_store.state import StateDir


def test_the_newest_state_of_each_episode_survives(tmp_path) -> None:
    with StateDir(tmp_path) as state:
        state.episodes.save({"number": 2, "stage": "trial", "onset_seq": 9, "note": "dög"})
        state.episodes.save({"number": 1, "stage": "closed", "outcome": "installed"})
        state.episodes.save({"number": 2, "stage": "training", "onset_seq": 9})
    with StateDir(tmp_path) as state:
        assert [(e["number"], e["stage"]) for e in state.episodes.list()] == [
            (1, "closed"),
            (2, "training"),
        ]
        assert [e["number"] for e in state.episodes.open()] == [2]


def test_settings_are_what_was_put_last(tmp_path) -> None:
    with StateDir(tmp_path) as state:
        assert state.settings.get("desired") is None
        for version in (1, 2):
            state.settings.put("desired", {"version": version, "pinned": True})
    with StateDir(tmp_path) as state:
        assert state.settings.get("desired") == {"version": 2, "pinned": True}
