"""Images and annotations of `train` -> detector; or given weights, checked and brought into the project's form.

`torchrun --nproc-per-node N -m stages.train_model ...` trains with N processes, each on a batch of its own.
"""

import urllib.error
from pathlib import Path

import torch
from torchvision.models import get_model_weights

from stages.lib.coco import ground_truth, load_split
from stages.lib.command import entry
from stages.lib.detector_training import DetectionDataset, train
from stages.lib.models import (
    NORM_EPSILON,
    build,
    load_weights,
    published_state,
    read_checkpoint,
    save_model,
    set_norm_epsilon,
)
from stages.lib.params import load_params
from stages.lib.ranks import join, place
from stages.lib.schema import InputError


def main(splits: Path, name: str, out: Path) -> None:
    params = load_params()
    model = params["models"][name]
    part = load_split(splits, "train")
    instances = ground_truth(part, "detection")
    keypoints = ground_truth(part, "keypoints") if "keypoints" in model["tasks"] else None
    data = DetectionDataset(instances, keypoints, part.image_ids, part.images, "segmentation" in model["tasks"])
    num_classes, num_keypoints = max(instances.cats) + 1, data.num_keypoints
    if model["architecture"].startswith("keypoint"):
        num_classes = 2  # torchvision's keypoint model knows persons only, category 1
    torch.manual_seed(params["seed"])
    network = build(model, num_classes, num_keypoints)
    weights, published, original = model["weights"], False, False
    if weights and not Path(weights).suffix:  # a name such as COCO_V1; torchvision checks its own hash
        try:
            known = get_model_weights(model["architecture"])[weights]
        except (ValueError, KeyError):
            raise InputError(
                f"params.yaml: models.{name}.weights is {weights!r}: torchvision has no such weights of "
                f"{model['architecture']}; give a file (with its suffix), a name such as COCO_V1, or null"
            ) from None
        try:
            state = known.get_state_dict(progress=True, check_hash=True)
        except (urllib.error.URLError, RuntimeError) as error:  # no way there, or another hash
            raise InputError(
                f"params.yaml: models.{name}.weights is {weights!r}: {error}; download {known.url} and give the file"
            ) from None
        load_weights(network, state, weights)
        published, original = True, known.url == _original(model["architecture"])
    elif weights and Path(weights).suffix == ".pth":  # the file of such a name, downloaded by hand
        load_weights(network, published_state(Path(weights)), weights)
        published, original = True, Path(weights).name == Path(_original(model["architecture"])).name
    elif weights:
        checkpoint = read_checkpoint(Path(weights))
        load_weights(network, checkpoint["state"], weights)
        set_norm_epsilon(network, checkpoint)
    if original:
        set_norm_epsilon(network, {NORM_EPSILON: 0.0})  # they were trained so, and torchvision builds them so
    join()
    if model["steps"]:
        train(network, data, model["steps"], model["batch"], model["lr"], params["seed"])
    if place()[0] == 0:
        save_model(out, network, num_classes, num_keypoints, half=not published)


def _original(architecture: str) -> str:
    """Where the weights lie that torchvision published first; empty for an architecture that is not its own."""
    try:
        return get_model_weights(architecture)["COCO_V1"].url
    except ValueError:
        return ""


if __name__ == "__main__":
    entry(main)
