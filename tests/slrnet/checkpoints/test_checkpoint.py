"""Checkpoints: whole or absent, damage found and named, nothing in them runs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from slrnet.checkpoints import checkpoint as checkpoint_module
from slrnet.checkpoints.checkpoint import (
    CheckpointError,
    NotFiniteError,
    TrainState,
    check_classes,
    find_checkpoint,
    load_checkpoint,
    load_whole,
    prune_checkpoints,
    require_free_space,
    restore_model,
    save_checkpoint,
)
from slrnet.config import Config

FILES = {"model.safetensors", "trainer.pt", "state.json", "config.json"}
CONFIG = Config(recipe="mine")


def state(epoch: int, score: float | None = None, *, key: str = "val/miou_ss") -> TrainState:
    return TrainState(
        epoch=epoch,
        step=10 * epoch,
        classes=("background", "cat"),
        data_fingerprint="abc",
        world_size=2,
        best_score=score,
        metrics={} if score is None else {key: score, "train/epoch_loss": 1.5},
        run_id="run",
    )


def save(folder: Path, epoch: int, score: float | None = None, **kwargs: Any) -> Path:
    weights = torch.full((3,), float(epoch), requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [weights], "base_lr": 0.5}], lr=0.1, momentum=0.9)
    weights.sum().backward()
    optimizer.step()
    # A transposed tensor is not contiguous, and one in bfloat16 is of another type.
    model = {"a": weights, "b": torch.arange(6.0).view(2, 3).t(), "c": torch.ones(2, dtype=torch.bfloat16)}
    return save_checkpoint(
        folder, config=CONFIG, state=state(epoch, score, **kwargs), model=model, optimizer=optimizer.state_dict()
    )


def whole(folder: Path, which: Literal["last", "best"] = "last") -> Path | None:
    checkpoint = load_whole(folder, which=which)
    return checkpoint and checkpoint.path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestRoundTrip:
    def test_all_comes_back(self, tmp_path: Path) -> None:
        path = save(tmp_path, 3, 0.25)
        assert path == tmp_path / "checkpoint-0003"
        assert names(path) == FILES
        loaded = load_checkpoint(path)
        assert (loaded.path, loaded.config, loaded.state) == (path, CONFIG, state(3, 0.25))
        assert loaded.model["b"].equal(torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
        assert loaded.model["c"].dtype == torch.bfloat16
        (group,) = loaded.optimizer["param_groups"]
        assert (group["base_lr"], group["momentum"]) == (0.5, 0.9)
        assert loaded.optimizer["state"][0]["momentum_buffer"].equal(torch.ones(3))

    def test_writing_an_epoch_again_replaces_it(self, tmp_path: Path) -> None:
        save(tmp_path, 3, 0.25)
        save(tmp_path, 3, 0.5)
        assert names(tmp_path) == {"checkpoint-0003"}
        assert load_checkpoint(tmp_path / "checkpoint-0003").state.best_score == 0.5

    @pytest.mark.parametrize("within", [".", "checkpoints"])
    def test_a_run_folder_stands_for_its_best_checkpoint(self, tmp_path: Path, within: str) -> None:
        for epoch, score in ((1, 0.2), (2, 0.4), (3, 0.3)):
            save(tmp_path / "run" / "checkpoints", epoch, score)
        assert load_checkpoint(tmp_path / "run" / within).state.epoch == 2
        assert load_checkpoint(str(tmp_path / "run" / "checkpoints" / "checkpoint-0003")).state.epoch == 3

    def test_a_folder_without_checkpoints_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"holds no checkpoint; give a directory with state\.json, or"):
            load_checkpoint(tmp_path)
        for name in ("b", "a"):
            save(tmp_path / name / "checkpoints", 1)
        with pytest.raises(CheckpointError, match=f"an epoch; runs in it: {tmp_path}/a, {tmp_path}/b$"):
            load_checkpoint(tmp_path)


class TestAtomic:
    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    @pytest.mark.parametrize("function", ["save_file", "torch.save", "sha256_of", "json.dumps"])
    def test_a_failure_leaves_the_earlier_one_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        save(tmp_path, 1, 0.5)
        with monkeypatch.context() as patch:
            patch.setattr(f"{checkpoint_module.__name__}.{function}", fail)
            with pytest.raises(type(error)):
                save(tmp_path, 2, 0.6)
        assert names(tmp_path) == {"checkpoint-0001"}
        assert load_checkpoint(tmp_path / "checkpoint-0001").state.epoch == 1

    def test_what_a_killed_process_left_is_not_found_and_goes_with_the_next_pruning(self, tmp_path: Path) -> None:
        whole = save(tmp_path, 1, 0.5)
        shutil.copytree(whole, tmp_path / ".checkpoint-0002.4711.partial")
        assert find_checkpoint(tmp_path) == whole
        prune_checkpoints(tmp_path)
        assert names(tmp_path) == {"checkpoint-0001"}


class TestFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("place", ["model", "optimizer"])
    def test_a_spoiled_state_is_not_written(self, tmp_path: Path, place: str, value: float) -> None:
        good = torch.ones(2)
        parts = {"model": {"a": good}, "optimizer": {"state": {0: {"momentum_buffer": good}}}}
        parts[place] = {"state": {0: {"momentum_buffer": torch.tensor([1.0, value])}}}
        if place == "model":
            parts[place] = {"decoder.b": torch.tensor([1.0, value], dtype=torch.bfloat16)}
        named = {"model": r"decoder\.b", "optimizer": r"state\.0\.momentum_buffer"}[place]
        with pytest.raises(
            NotFiniteError, match=f"checkpoint-0001 is not written: {named} has values that are not fin"
        ):
            save_checkpoint(tmp_path, config=CONFIG, state=state(1), **parts)
        assert names(tmp_path) == set()

    @pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt"])
    def test_the_last_finite_one_is_taken(self, tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
        folder = tmp_path / "checkpoints"
        earlier, spoiled = save(folder, 1, 0.1), save(folder, 2, 0.9)
        if file == "trainer.pt":
            torch.save({"state": torch.tensor(math.nan)}, spoiled / file)
        else:
            save_file({"a": torch.tensor([1.0, math.nan])}, spoiled / file)
        digest = hashlib.sha256((spoiled / file).read_bytes()).hexdigest()
        edit_state(spoiled, lambda record: record | {"sha256": record["sha256"] | {file: digest}})
        assert whole(folder) == whole(folder, "best") == earlier
        assert find_checkpoint(folder) == spoiled  # reads no weights
        assert "skipping a checkpoint" in caplog.text
        assert load_checkpoint(tmp_path).state.epoch == 1
        with pytest.raises(
            NotFiniteError, match=r"checkpoint-0002 has values that are not finite, in .*; take another"
        ):
            load_checkpoint(spoiled)


class TestDamage:
    @pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "config.json"])
    def test_a_flipped_bit_is_found_and_named_and_the_one_before_is_used(
        self, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        earlier, last = save(tmp_path, 1, 0.1), save(tmp_path, 2, 0.9)
        content = bytearray((last / name).read_bytes())
        content[len(content) // 2] ^= 1
        (last / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"checkpoint-0002.{name} is damaged or missing; take another"):
            load_checkpoint(last)
        with caplog.at_level(logging.WARNING):
            assert whole(tmp_path) == whole(tmp_path, "best") == earlier
        assert find_checkpoint(tmp_path) == last  # reads no weights
        assert f"checkpoint-0002/{name} is damaged" in caplog.text

    @pytest.mark.parametrize("name", sorted(FILES))
    def test_a_missing_file(self, tmp_path: Path, name: str) -> None:
        earlier, last = save(tmp_path, 1), save(tmp_path, 2)
        (last / name).unlink()
        assert find_checkpoint(tmp_path) == earlier
        with pytest.raises(CheckpointError):
            load_checkpoint(last)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda record: record | {"schema_version": 99}, "has schema version 99, this slrnet reads 1"),
            (lambda record: {"schema_version": 99}, "has schema version 99, this slrnet reads 1"),
            (lambda record: [record], "has schema version None"),
            (lambda record: record | {"sha256": []}, "lacks the checksums"),
            (lambda record: record | {"sha256": {}}, "lacks the checksums"),
            (lambda record: record | {"extra": 1}, "lacks or has foreign fields"),
            (lambda record: record | {"classes": 3}, "lacks or has foreign fields"),
            (lambda record: {name: value for name, value in record.items() if name != "step"}, "foreign fields"),
        ],
    )
    def test_a_state_that_is_none(self, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
        path = save(tmp_path, 1)
        edit_state(path, change)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)
        assert find_checkpoint(tmp_path) is None

    def test_a_state_that_is_no_json(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        (path / "state.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"state\.json cannot be read: .*; take another checkpoint"):
            load_checkpoint(path)

    @pytest.mark.parametrize("stranger", ["../outside.txt", "/etc/hostname", "..", "extra.txt"])
    def test_a_state_that_points_elsewhere_is_refused_unread(
        self, tmp_path: Path, stranger: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = save(tmp_path, 1)
        (tmp_path / "outside.txt").write_text("secret")
        edit_state(path, lambda record: record | {"sha256": record["sha256"] | {stranger: "0"}})
        read: list[Path] = []
        monkeypatch.setattr(checkpoint_module, "sha256_of", lambda file: read.append(file) or "0")
        with pytest.raises(CheckpointError, match="lacks the checksums"):
            load_checkpoint(path)
        assert not read


class _Opener(NamedTuple):
    """Unpickling one makes the folder: what code in a pickle could do."""

    folder: str

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_pickled_code_is_refused_even_with_right_checksums(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1)
    torch.save({"state": _Opener(str(tmp_path / "made")), "param_groups": []}, path / "trainer.pt")
    digest = hashlib.sha256((path / "trainer.pt").read_bytes()).hexdigest()
    edit_state(path, lambda record: record | {"sha256": record["sha256"] | {"trainer.pt": digest}})
    with pytest.raises(CheckpointError, match="cannot be read: Weights only load failed"):
        load_checkpoint(path)
    assert not (tmp_path / "made").exists()
    torch.load(path / "trainer.pt", weights_only=False)  # the trap would have worked
    assert (tmp_path / "made").exists()


def sign(path: Path) -> None:
    """Right checksums for whatever lies in the folder, as a stranger with bad intent would make them."""
    files = ("model.safetensors", "trainer.pt", "config.json")
    sums = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in files}
    edit_state(path, lambda record: record | {"sha256": sums})


def header(content: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 10**8) + b"{}",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        header({"a": tensor([2], 0, 8)}, b"\0" * 4),
        header({"a": tensor([2], 0, 8)}, b"\0" * 12),
        header({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, b"\0" * 12),
        header({"a": tensor([2], 2**62, 2**62 + 8)}, b"\0" * 8),
        header({"a": tensor([2], 8, 0)}, b"\0" * 8),
        header({"a": tensor([2**40, 2**40], 0, 8)}, b"\0" * 8),
        header({"a": tensor([3], 0, 8)}, b"\0" * 8),
        header({"a": tensor([-1], 0, 8)}, b"\0" * 8),
        header({"a": tensor([2], 0, 8, "PICKLE")}, b"\0" * 8),
        header({"a": [1]}),
    ],
)  # fmt: skip
def test_weights_that_are_none_are_refused_even_with_right_checksums(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes(content)
    sign(path)
    with pytest.raises(CheckpointError, match=r"checkpoint-0001 cannot be read: .*; take another checkpoint"):
        load_checkpoint(path)


@pytest.mark.slow
def test_weights_of_another_shape_or_name_do_not_fit(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="does not fit its own configuration"):
        restore_model(load_checkpoint(path))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02", b"\0" * 1000])
def test_an_optimizer_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 1)
    (path / "trainer.pt").write_bytes(content)
    sign(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


def test_an_optimizer_of_another_type_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    torch.save([1, 2], path / "trainer.pt")
    sign(path)
    with pytest.raises(CheckpointError, match=r"trainer\.pt holds a list"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 1000 + "]" * 1000, "1" * 10_000, "\0", "NaN"])
def test_json_that_is_made_to_break_readers_is_refused(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").write_text(text)
    assert find_checkpoint(tmp_path) is None
    shutil.rmtree(path)
    path = save(tmp_path, 1)
    (path / "config.json").write_text(text)
    sign(path)
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|holds a)"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "values",
    [
        {"step": "7"}, {"step": -1}, {"step": 1.5}, {"epoch": None}, {"epoch": True}, {"world_size": [1]},
        {"classes": [1, 2]}, {"classes": "ab", "run_id": 3}, {"data_fingerprint": {}}, {"best_score": "high"},
        {"metrics": {"val/miou_ss": "high"}}, {"metrics": [1]}, {"unfinished": {"loss": None}}, {"unfinished": 3},
        {"untracked": [[1]]}, {"untracked": [["x", {}]]}, {"untracked": [[1, [2]]]}, {"untracked": 5},
    ],
)  # fmt: skip
def test_values_of_other_types_are_refused_where_they_are_read(tmp_path: Path, values: dict[str, Any]) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2, 0.5)
    edit_state(path, lambda record: record | values)
    with pytest.raises(CheckpointError, match="lacks or has foreign fields"):
        load_checkpoint(path)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-0001"
    assert find_checkpoint(tmp_path, which="best") == tmp_path / "checkpoint-0001"
    prune_checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "config.json"])
@pytest.mark.parametrize("target", ["/dev/zero", "pipe", "."])
def test_what_has_no_end_is_not_read(tmp_path: Path, name: str, target: str) -> None:
    path = save(tmp_path / "checkpoints", 1)
    os.mkfifo(tmp_path / "pipe")
    (path / name).unlink()
    (path / name).symlink_to(target if target != "pipe" else tmp_path / "pipe")
    assert find_checkpoint(tmp_path / "checkpoints") is None


class TestChoice:
    @pytest.mark.parametrize(
        ("scores", "last", "best"),
        [
            ([0.2, 0.4, 0.3], 3, 2),
            ([0.4, 0.4, 0.3], 3, 2),  # the later one of equals
            ([0.2, None, None], 3, 1),  # epochs that were not measured
            ([None, None], 2, 2),
            ([0.1, 0.5, 0.4, 0.3, 0.2], 5, 2),
        ],
    )
    def test_pruning_keeps_the_two_last_and_the_best(
        self, tmp_path: Path, scores: list[float | None], last: int, best: int
    ) -> None:
        for epoch, score in enumerate(scores, start=1):
            save(tmp_path, epoch, score)
        assert find_checkpoint(tmp_path) == tmp_path / f"checkpoint-{last:04d}"
        assert find_checkpoint(tmp_path, which="best") == tmp_path / f"checkpoint-{best:04d}"
        prune_checkpoints(tmp_path)
        assert names(tmp_path) == {f"checkpoint-{epoch:04d}" for epoch in (last - 1, last, best)}

    def test_steps_within_an_epoch_come_after_its_beginning_and_are_never_the_best(self, tmp_path: Path) -> None:
        save(tmp_path, 2, 0.1)
        untracked = ((20, {"train/loss": 0.1}), (25, {"train/loss": 0.7}))
        within = replace(state(2), step=25, unfinished={"loss": 0.1 + 0.2}, untracked=untracked)
        path = save_checkpoint(tmp_path, config=CONFIG, state=within, model={"a": torch.ones(1)}, optimizer={})
        assert path.name == "checkpoint-0002-00000025"
        assert find_checkpoint(tmp_path) == path
        assert load_checkpoint(path).state == within  # sums to the last bit
        assert find_checkpoint(tmp_path, which="best") == tmp_path / "checkpoint-0002"
        save(tmp_path, 3, 0.05)
        assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-0003"

    def test_the_score_is_the_one_of_the_protocol_that_the_run_measures(self, tmp_path: Path) -> None:
        for epoch, score in ((1, 0.5), (2, 0.3)):
            save(tmp_path, epoch, score, key="val/miou_ss_gated_by_scores")
        assert find_checkpoint(tmp_path, which="best") == tmp_path / "checkpoint-0001"

    def test_epochs_are_numbers_not_names(self, tmp_path: Path) -> None:
        for epoch in (9999, 10000):
            save(tmp_path, epoch)
        assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-10000"

    def test_an_empty_or_missing_folder_has_none(self, tmp_path: Path) -> None:
        assert find_checkpoint(tmp_path / "missing") is None
        prune_checkpoints(tmp_path / "missing")
        assert find_checkpoint(tmp_path) is None

    def test_pruning_reads_no_weights_and_loading_does(self, tmp_path: Path) -> None:
        """A checkpoint that was damaged on the disk is found when it is used, not at each later write."""
        paths = [save(tmp_path, epoch, score) for epoch, score in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3))]
        with (paths[3] / "model.safetensors").open("r+b") as file:
            file.write(b"damaged!")
        (paths[2] / "trainer.pt").unlink()
        prune_checkpoints(tmp_path)
        assert names(tmp_path) == {"checkpoint-0001", "checkpoint-0002", "checkpoint-0004"}
        assert find_checkpoint(tmp_path) == paths[3]
        assert whole(tmp_path) == paths[1]
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            load_checkpoint(paths[3])

    def test_pruning_keeps_everything_where_nothing_is_whole(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        (path / "config.json").unlink()
        prune_checkpoints(tmp_path)
        assert path.exists()


def test_classes_that_differ_are_refused_with_both_lists() -> None:
    check_classes(state(1), ("background", "cat"), data="shards")
    with pytest.raises(CheckpointError) as caught:
        check_classes(state(1), ("background", "cat", "dog"), data="shards")
    assert str(caught.value).startswith(
        "the checkpoint knows 2 classes (background, cat), the data in shards has 3 (background, cat, dog); use"
    )
    with pytest.raises(CheckpointError):  # the order counts: the place is the id
        check_classes(state(1), ("cat", "background"), data="shards")


class TestFreeSpace:
    def test_enough(self, tmp_path: Path) -> None:
        require_free_space(tmp_path / "a" / "b", 1)
        assert (tmp_path / "a" / "b").is_dir()

    def test_too_little(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=5 * 2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        require_free_space(tmp_path, 5 * 2**20)
        with pytest.raises(CheckpointError, match=r"has 5 MiB free, .* need 7 MiB; .*--storage"):
            require_free_space(tmp_path, 7 * 2**20)

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match=r"file.run cannot be made: Not a directory; give another one"):
            require_free_space(tmp_path / "file" / "run", 1)


def edit_state(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(change(record)))


def test_a_checkpoint_is_compared_with_its_checksums_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "checkpoints", 3, 0.25)
    hashed: list[str] = []
    honest = checkpoint_module.sha256_of
    monkeypatch.setattr(checkpoint_module, "sha256_of", lambda file: [hashed.append(file.name), honest(file)][1])
    for place in (tmp_path, path):
        hashed.clear()
        assert load_checkpoint(place).path == path
        assert sorted(hashed) == ["config.json", "model.safetensors", "trainer.pt"]
