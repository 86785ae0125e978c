"""A detector cut at its pyramid is still the same detector; its training data are COCO's, mirrored or not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from artifacts import assert_same, write_features
from pycocotools import mask as rle
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import clip_boxes_to_image

from stages.lib import models
from stages.lib.features import Features
from stages.lib.heads import Variants, _run_heads, detect_variants, run_lengths
from stages.lib.models import (
    Sizes,
    build,
    load_model,
    load_weights,
    naming,
    pyramid_of,
    read_checkpoint,
    save_model,
)
from stages.lib.params import ARCHITECTURES, SCALES, TASKS
from stages.lib.schema import InputError

PARAMS = {"architecture": "resnet10_fpn", "image_size": {"min": 64, "max": 96}}
CLASSES, KEYPOINTS = 7, 7


def random_model(architecture: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build(PARAMS | {"architecture": architecture}, CLASSES, KEYPOINTS)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # features of a sensible size from random weights
            module.running_var.fill_(0.3 if architecture == "resnet10_fpn" else 2.0)
    model.roi_heads.score_thresh = 0.01
    model.roi_heads.detections_per_img = 8 if architecture == "resnet10_fpn" else 4
    return model.eval().to(memory_format=torch.channels_last)  # as load_model: other layouts round otherwise


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return random_model("resnet10_fpn")


def image(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))


@torch.inference_mode()
def detect(model, pyramid, sizes, tasks) -> list[dict[str, torch.Tensor]]:
    """Pyramids [N, C, H_s, W_s] of N images -> what torchvision's detector gives for them, whole masks included."""
    each = Variants(pyramid, {scale: list(range(len(sizes))) for scale in pyramid})
    found = _run_heads(model, each, sizes, [dict.fromkeys(tasks)] * len(sizes))
    return model.transform.postprocess(found, [s.resized for s in sizes], [s.original for s in sizes])


# ---- the cut


@pytest.mark.parametrize("tasks", [set(TASKS), {"detection"}, {"segmentation"}, {"keypoints"}])
def test_stored_features_give_exactly_the_detections_of_the_whole_model(model, tasks, tmp_path):
    picture = image(50, 70)  # resized and padded on the way
    pyramid, sizes = pyramid_of(model, picture)
    write_features(tmp_path / "f", [("test", 1, pyramid, sizes)])
    stored = Features(tmp_path / "f", "test")
    with torch.inference_mode():
        (whole,) = model([picture])
    (cut,) = detect(model, stored.pyramids([1]), [stored.sizes(1)], tasks)
    assert len(whole["boxes"]) > 0
    assert ("masks" in cut, "keypoints" in cut) == ("segmentation" in tasks, "keypoints" in tasks)
    assert_same({key: whole[key] for key in cut}, cut)


def test_a_detector_without_the_other_heads_detects():
    torch.manual_seed(0)
    model = build(PARAMS, CLASSES, KEYPOINTS).eval()
    heads = model.roi_heads
    heads.mask_roi_pool = heads.mask_head = heads.mask_predictor = None
    heads.keypoint_roi_pool = heads.keypoint_head = heads.keypoint_predictor = None
    (found,) = detect(model, *detect_input(model, image(64, 64)), {"detection"})
    assert set(found) == {"boxes", "labels", "scores"}


def test_sizes_are_those_of_the_transform(model):
    _, sizes = pyramid_of(model, image(50, 70))
    assert sizes == Sizes((50, 70), (64, 89), (64, 96))


def test_pyramids_in_one_batch_give_the_detections_that_each_gives_alone(model):
    pyramid, sizes = pyramid_of(model, image(64, 64))
    variants = [pyramid] + [pyramid | {scale: pyramid[scale] * 0.5} for scale in SCALES]
    together = detect(
        model, {s: torch.cat([v[s] for v in variants]) for s in SCALES}, [sizes] * len(variants), set(TASKS)
    )
    for variant, found in zip(variants, together, strict=True):
        (alone,) = detect(model, variant, [sizes], set(TASKS))
        assert found["labels"].tolist() == alone["labels"].tolist()
        for key in ("boxes", "scores", "masks"):
            assert torch.allclose(found[key], alone[key], atol=1e-3)


class Given(torch.nn.Module):
    """In the place of a backbone: this pyramid, whatever the image."""

    def __init__(self, pyramid: dict[str, torch.Tensor]):
        super().__init__()
        self.pyramid = pyramid

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid


def variants_of(pyramids: list[dict[str, torch.Tensor]]) -> tuple[Variants, list[dict[str, torch.Tensor]], list[int]]:
    """Pyramids of images -> for each itself, then one with another map of one scale, for every scale; which image."""
    maps = {s: torch.cat([m for p in pyramids for m in (p[s], noisy(p[s]))]) for s in SCALES}
    at = {s: [] for s in SCALES}
    for k in range(len(pyramids)):
        for changed in (None, *SCALES):
            for s in SCALES:
                at[s].append(2 * k + (s == changed))
    each = [{s: maps[s][at[s][n], None] for s in SCALES} for n in range(len(at["0"]))]
    return Variants(maps, at), each, [n // (1 + len(SCALES)) for n in range(len(each))]


def noisy(maps: torch.Tensor, share: float = 0.2) -> torch.Tensor:
    return maps + share * maps.std() * torch.randn(maps.shape, generator=torch.Generator().manual_seed(1))


def whole(model: torch.nn.Module, picture: torch.Tensor, pyramid: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torchvision's own model makes of a picture that has this pyramid."""
    backbone, model.backbone = model.backbone, Given(pyramid)
    with torch.inference_mode():
        (found,) = model([picture])
    model.backbone = backbone
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_variants_have_the_detections_of_torchvisions_own_model(architecture):
    model, tasks = random_model(architecture), ARCHITECTURES[architecture]
    pictures = [image(50, 70), image(49, 70)]  # resized to other sizes, padded to one
    pyramids, sizes = zip(*(pyramid_of(model, picture) for picture in pictures), strict=True)
    assert sizes[0].resized != sizes[1].resized and sizes[0].padded == sizes[1].padded
    variants, each, image_of = variants_of(pyramids)
    together = detect_variants(model, variants, [sizes[k] for k in image_of], [dict.fromkeys(tasks)] * len(each))
    boxes = []
    for found, k, pyramid in zip(together, image_of, each, strict=True):
        expected = whole(model, pictures[k], pyramid)
        assert torch.equal(found["labels"], expected["labels"]) and len(found["labels"]) > 0
        assert torch.allclose(found["boxes"], expected["boxes"], atol=1e-3)
        assert torch.allclose(found["scores"], expected["scores"], atol=1e-5)
        assert ("run_lengths" in found, "keypoints" in found) == ("segmentation" in tasks, "keypoints" in tasks)
        if "segmentation" in tasks:
            masks = torch.from_numpy(rle.decode(found["run_lengths"])).permute(2, 0, 1)
            assert ((expected["masks"][:, 0] > 0.5) != masks).float().mean() < 1e-3
        if "keypoints" in tasks:
            assert torch.allclose(found["keypoints"], expected["keypoints"], atol=1e-2)
        boxes.append(tuple(expected["boxes"].flatten().tolist()))
    assert len(set(boxes)) >= 4  # noise is seen


def test_passes_of_any_size_give_the_same_detections(model, monkeypatch):
    pyramid, sizes = pyramid_of(model, image(64, 64))
    variants, each, _ = variants_of([pyramid])
    args = model, variants, [sizes] * len(each), [dict.fromkeys(TASKS)] * len(each)
    expected = detect_variants(*args)
    monkeypatch.setattr(models, "PIXELS_PER_PASS", 1)
    monkeypatch.setattr("stages.lib.heads.REGIONS_PER_PASS", 3)
    for found, same in zip(detect_variants(*args), expected, strict=True):
        assert torch.equal(found["labels"], same["labels"])
        for key in ("boxes", "scores", "keypoints"):
            assert torch.allclose(found[key], same[key], atol=1e-3)


def test_what_variants_have_in_common_passes_the_heads_once(model):
    pyramid, sizes = pyramid_of(model, image(64, 64))
    changed = pyramid | {"1": noisy(pyramid["1"], 0.8)}
    parts = model.rpn.head.conv, model.roi_heads.box_head, model.roi_heads.mask_head, model.roi_heads.keypoint_head
    seen = [0] * len(parts)

    def count(k: int):
        def hook(_, args):
            seen[k] += len(args[0])

        return hook

    hooks = [part.register_forward_pre_hook(count(k)) for k, part in enumerate(parts)]

    def passed(maps: dict[str, torch.Tensor], of_scale_1: list[int]) -> list[int]:
        seen[:] = [0] * len(parts)
        at = {s: of_scale_1 if s == "1" else [0] * len(of_scale_1) for s in SCALES}
        detect_variants(model, Variants(maps, at), [sizes] * len(of_scale_1), [dict.fromkeys(TASKS)] * len(of_scale_1))
        return seen.copy()

    one, other = passed(pyramid, [0]), passed(changed, [0])
    assert one[0] == len(SCALES) and min(one) > 0
    assert passed(pyramid, [0, 0, 0]) == one
    both = passed(pyramid | {"1": torch.cat([pyramid["1"], changed["1"]])}, [1, 0, 1])
    assert both[0] == len(SCALES) + 1
    assert all(max(a, b) < ab < a + b for a, b, ab in zip(one[1:], other[1:], both[1:], strict=True))
    for hook in hooks:
        hook.remove()


def objects(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).view(-1, 5)


def everywhere(label: int) -> torch.Tensor:
    return objects([label, -1000, -1000, 1000, 1000])


def test_each_variant_has_what_its_own_tasks_ask_for(model):
    pyramid, sizes = pyramid_of(model, image(64, 64))
    variants = Variants(pyramid, {s: [0] * 5 for s in SCALES})
    (label, *_) = detect(model, pyramid, [sizes], {"detection"})[0]["labels"].tolist()
    asked = [
        {"detection": None},
        {"segmentation": everywhere(label)},
        {"keypoints": objects()},
        {"keypoints": everywhere(label)},
        dict.fromkeys(TASKS),
    ]
    boxes, masks, nothing, keypoints, everything = detect_variants(model, variants, [sizes] * 5, asked)
    (expected,) = detect(model, pyramid, [sizes], set(TASKS))
    assert set(boxes) == {"boxes", "labels", "scores"} == set(masks) - {"run_lengths"} == set(nothing) - {"keypoints"}
    assert torch.equal(everything["keypoints"], expected["keypoints"]) and expected["keypoints"].all(2).any()
    whole_masks = torch.from_numpy(rle.decode(everything["run_lengths"])).permute(2, 0, 1)
    assert torch.equal(whole_masks.bool(), expected["masks"][:, 0] > 0.5)
    chosen, empty = everything["labels"] == label, rle.encode(np.zeros((64, 64), np.uint8, order="F"))
    assert 0 < chosen.sum() < len(chosen)
    for code, full, c in zip(masks["run_lengths"], everything["run_lengths"], chosen, strict=True):
        assert code == (full if c else empty)
    assert not nothing["keypoints"].any() and nothing["keypoints"].shape == expected["keypoints"].shape
    assert torch.equal(keypoints["keypoints"][chosen], expected["keypoints"][chosen])
    assert not keypoints["keypoints"][~chosen].any()


def test_keypoints_are_looked_for_in_the_boxes_of_persons_only(model):
    pyramid, sizes = pyramid_of(model, image(64, 64))
    one = Variants(pyramid, {s: [0] for s in SCALES})
    (all_boxes,) = detect_variants(model, one, [sizes], [{"keypoints": None}])
    labels = all_boxes["labels"]
    person, *others = labels.unique().tolist()
    assert others
    (persons,) = detect_variants(model, one, [sizes], [{"keypoints": everywhere(person)}])
    chosen = labels == person
    assert torch.equal(persons["labels"], labels)
    assert torch.allclose(persons["keypoints"][chosen], all_boxes["keypoints"][chosen], atol=1e-3)
    assert (persons["keypoints"][~chosen] == 0).all() and (all_boxes["keypoints"][~chosen] != 0).any()
    (nobody,) = detect_variants(model, one, [sizes], [{"keypoints": everywhere(CLASSES + 1)}])
    assert (nobody["keypoints"] == 0).all() and nobody["keypoints"].shape == all_boxes["keypoints"].shape


def test_only_masks_that_share_no_pixel_with_an_object_of_their_label_are_left_out(model):
    """In an image that was resized, so that boxes and objects have other coordinates until the end."""
    pyramid, sizes = pyramid_of(model, image(50, 70))
    assert sizes.original != sizes.resized
    one = Variants(pyramid, {s: [0] for s in SCALES})
    (expected,) = detect_variants(model, one, [sizes], [{"segmentation": None}])
    empty, kept, left_out = rle.encode(np.zeros(sizes.original, np.uint8, order="F")), 0, 0
    for x, y in np.ndindex(7, 5):
        place = np.zeros(sizes.original, np.uint8, order="F")
        place[10 * y : 10 * y + 10, 10 * x : 10 * x + 10] = 1
        box = [10 * x, 10 * y, 10 * x + 10, 10 * y + 10]
        of_place = objects(*([label, *box] for label in range(1, CLASSES)))
        (found,) = detect_variants(model, one, [sizes], [{"segmentation": of_place}])
        for code, full in zip(found["run_lengths"], expected["run_lengths"], strict=True):
            if code == full:
                kept += code != empty
            else:
                assert code == empty and not rle.area(rle.merge([full, rle.encode(place)], intersect=True))
                left_out += 1
    assert kept > 10 and left_out > 10


def test_run_lengths_are_those_of_torchvisions_pasted_masks():
    torch.manual_seed(0)
    corners, size = 60 * torch.rand(40, 2) - 10, (40, 50)
    boxes = torch.cat([corners, corners + 30 * torch.rand(40, 2)], 1)
    boxes[0], boxes[1] = torch.tensor([0.0, 0, 50, 40]), torch.tensor([7.3, 9.1, 7.3, 9.1])
    boxes = clip_boxes_to_image(boxes, size)  # as they are when masks are pasted
    masks = torch.rand(40, 1, 28, 28)
    masks[2] = 0
    pasted = paste_masks_in_image(masks, boxes, size)[:, 0] > 0.5
    expected = rle.encode(np.asfortranarray(pasted.permute(1, 2, 0).numpy(), dtype=np.uint8))
    assert run_lengths(masks, boxes, size) == expected
    assert run_lengths(masks[:0], boxes[:0], size) == []


def test_images_of_other_original_sizes_share_a_pass(model):
    pyramid, sizes = pyramid_of(model, image(64, 64))
    small, large = detect(
        model,
        {scale: torch.cat([value, value]) for scale, value in pyramid.items()},
        [sizes, sizes._replace(original=(128, 128))],
        {"segmentation"},
    )
    assert torch.allclose(2 * small["boxes"], large["boxes"], atol=1e-3)
    assert large["masks"].shape[-2:] == (128, 128)


def test_pool_is_every_second_value_of_scale_3(model):
    for height, width in ((64, 64), (70, 90)):
        pyramid, _ = pyramid_of(model, image(height, width))
        assert torch.equal(pyramid["pool"], pyramid["3"][:, :, ::2, ::2])


def test_an_images_features_do_not_depend_on_other_images(model):
    first, _ = pyramid_of(model, image(50, 70))
    pyramid_of(model, image(90, 60))
    again, _ = pyramid_of(model, image(50, 70))
    assert_same(first, again)


# ---- files


def test_a_saved_model_detects_alike(model, tmp_path):
    save_model(tmp_path / "m.pt", model, CLASSES, KEYPOINTS, half=False)
    loaded = load_model(tmp_path / "m.pt", PARAMS)
    loaded.roi_heads.score_thresh, loaded.roi_heads.detections_per_img = 0.01, 8
    assert not loaded.training
    before, after = (detect(m, *detect_input(m, image(64, 64)), set(TASKS))[0] for m in (model, loaded))
    assert_same(before, after)


def detect_input(model, picture):
    pyramid, sizes = pyramid_of(model, picture)
    return pyramid, [sizes]


def test_half_files_hold_matrices_as_float16_and_read_back_as_float32(model, tmp_path):
    save_model(tmp_path / "h.pt", model, CLASSES, KEYPOINTS, half=True)
    save_model(tmp_path / "f.pt", model, CLASSES, KEYPOINTS, half=False)
    assert (tmp_path / "h.pt").stat().st_size < 0.55 * (tmp_path / "f.pt").stat().st_size
    loaded = load_model(tmp_path / "h.pt", PARAMS)
    for (name, one), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.half().to(one.dtype) if one.ndim > 1 else one, other), name
    save_model(tmp_path / "again.pt", loaded, CLASSES, KEYPOINTS, half=True)  # nothing more is lost
    assert_same(read_checkpoint(tmp_path / "h.pt")["state"], read_checkpoint(tmp_path / "again.pt")["state"])


def test_weights_of_another_network_name_the_layer():
    net = torch.nn.Linear(3, 2)
    weight, bias = torch.zeros(2, 3), torch.zeros(2)
    for state, word in (
        ({"weight": weight}, "'bias'"),
        ({"weight": weight.T, "bias": bias}, r"'weight'.*\(3, 2\).*\(2, 3\)"),
        ({"weight": weight, "bias": bias, "gate": bias}, "'gate'"),
    ):
        with pytest.raises(InputError, match=f"file.pt.*{word}"):
            load_weights(net, state, "file.pt")


def test_a_file_is_not_blamed_for_memory_that_ends():
    with pytest.raises(InputError, match="^m.pt: out of memory"), naming(Path("m.pt"), "is no weights file"):
        raise RuntimeError("std::bad_alloc")
