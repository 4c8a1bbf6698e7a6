import hashlib
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bncli.checkpoints import check_integrity, load_checkpoint, save_checkpoint
from bncli.checkpoints.own import load_content
from bncli.checkpoints.part_digests import digest_parts
from bncli.errors import CheckpointError

KERNEL = "state_dict.stages.0.0.conv.weight"


def content_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_the_stored_digest_is_sha256_of_the_type_the_shape_and_the_bits(finished_run: Path) -> None:
    content = content_of(finished_run / "last.pt")
    weight = content["state_dict"]["stages.0.0.conv.weight"]
    header = b"torch.float32 (8, 3, 3, 3)\n"
    expected = hashlib.sha256(header + weight.contiguous().numpy().tobytes()).hexdigest()
    assert content["digests"][KERNEL] == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["state_dict"]["stages.0.0.conv.weight"][5, 1].mul_(1.000001), KERNEL),
        (lambda c: c["state_dict"]["stages.0.0.norm.running_var"].neg_(), "running_var"),
        (lambda c: c["optimizer"]["state"][0]["momentum_buffer"][0].add_(1), "momentum_buffer"),
        (lambda c: c.update(test_accuracy=c["test_accuracy"] + 1e-9), "plain values"),
        (lambda c: c.update(epoch=float(c["epoch"])), "plain values"),
        (lambda c: c.update(class_names=tuple(reversed(c["class_names"]))), "plain values"),
        (lambda c: c["config"]["train"].update(seed=1), "plain values"),
        (lambda c: c["config"].update(train=dict(reversed(c["config"]["train"].items()))), "plain values"),
        (lambda c: c["state_dict"].pop("head.bias"), "head.bias"),
        (lambda c: c["state_dict"].update({"head.bias": c["state_dict"]["head.bias"].double()}), "head.bias"),
        (lambda c: c["digests"].update({KERNEL: "0" * 64}), KERNEL),
        (lambda c: c["digests"].pop(KERNEL), KERNEL),
        (lambda c: c.pop("digests"), "digests"),
    ],
)
def test_every_change_is_found_and_its_place_is_named(
    finished_run: Path, tmp_path: Path, change, named: str
) -> None:
    content = content_of(finished_run / "last.pt")
    change(content)
    torch.save(content, tmp_path / "changed.pt")
    with pytest.raises(CheckpointError, match="damaged: its SHA-256") as caught:
        load_checkpoint(tmp_path / "changed.pt")
    assert named in str(caught.value)
    assert str(tmp_path / "changed.pt") in str(caught.value)
    found = check_integrity(tmp_path / "changed.pt")
    assert found.digest_matches is False
    assert any(named in name for name in found.damaged)


def test_no_flipped_bit_is_ever_loaded_as_another_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    """300 flips at seeded random places: an error, or a flip in bytes of the container that hold nothing."""
    whole = (finished_run / "last.pt").read_bytes()
    expected = digest_parts(content_of(finished_run / "last.pt"))
    path = tmp_path / "flipped.pt"
    random_places = random.Random(6)
    num_found = 0
    for _ in range(300):
        flipped = bytearray(whole)
        place = random_places.randrange(len(whole))
        flipped[place] ^= 1 << random_places.randrange(8)
        path.write_bytes(flipped)
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            num_found += 1
        else:
            # with bncli's reader: torch's own refuses some bytes of the container that mean nothing
            assert digest_parts(load_content(path)) == expected, f"byte {place}"
    assert num_found > 150


def test_every_flipped_bit_in_the_data_of_a_tensor_is_found(finished_run: Path, tmp_path: Path) -> None:
    whole = (finished_run / "last.pt").read_bytes()
    with zipfile.ZipFile(finished_run / "last.pt") as archive:
        records = [info for info in archive.infolist() if "/data/" in info.filename]
    assert len(records) > 10
    random_places = random.Random(7)
    for record in records:
        # the local header: 30 bytes, then the name and the padding, whose lengths stand in it
        lengths = whole[record.header_offset + 26 : record.header_offset + 30]
        begin = record.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
        flipped = bytearray(whole)
        flipped[begin + random_places.randrange(record.file_size)] ^= 1 << random_places.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(flipped)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(tmp_path / "flipped.pt")


def test_a_file_of_version_1_is_read_but_cannot_be_verified(finished_run: Path, tmp_path: Path) -> None:
    content = content_of(finished_run / "last.pt")
    for key in ("digests", "data_digest", "running_epoch"):
        del content[key]
    torch.save({**content, "format_version": 1}, tmp_path / "old.pt")
    assert load_checkpoint(tmp_path / "old.pt").data_digest is None
    found = check_integrity(tmp_path / "old.pt")
    assert (found.format_version, found.digest_stored, found.digest_matches) == (1, False, None)


def test_integrity_counts_the_tensors_and_names_those_that_are_not_finite(
    finished_run: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(finished_run / "last.pt")
    found = check_integrity(finished_run / "last.pt")
    assert (found.digest_stored, found.digest_matches, found.damaged) == (True, True, ())
    assert (found.epoch, found.step, found.non_finite) == (2, 20, ())
    assert found.num_tensors == len(checkpoint.state_dict) + len(checkpoint.optimizer["state"])
    broken = {key: value.clone() for key, value in checkpoint.state_dict.items()}
    broken["head.bias"][3] = float("inf")
    save_checkpoint(replace(checkpoint, state_dict=broken), tmp_path / "broken.pt")
    assert check_integrity(tmp_path / "broken.pt").non_finite == ("state_dict.head.bias",)


def test_a_tensor_that_pretends_to_be_huge_is_refused_without_being_expanded(
    finished_run: Path, tmp_path: Path
) -> None:
    content = content_of(finished_run / "last.pt")
    content["state_dict"]["head.bias"] = torch.zeros(1).expand(1 << 40)
    torch.save(content, tmp_path / "huge.pt")
    for read in (load_checkpoint, check_integrity):
        with pytest.raises(CheckpointError, match=r"\(1099511627776,\) does not fit its storage of 1 values"):
            read(tmp_path / "huge.pt")
