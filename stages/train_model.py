"""Images and annotations of `train` -> detector; or given weights, checked and brought into the project's form.

`torchrun --nproc-per-node N -m stages.train_model ...` trains with N processes, each on a batch of its own.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torchvision.models import get_model_weights

from stages.lib.coco import ground_truth, image_path, load_split
from stages.lib.command import entry
from stages.lib.detector_training import DetectionDataset, train
from stages.lib.models import (
    NORM_EPSILON,
    build,
    downloaded,
    load_weights,
    published_state,
    read_checkpoint,
    save_model,
    set_norm_epsilon,
)
from stages.lib.params import load_params
from stages.lib.ranks import join, place, shared
from stages.lib.schema import InputError
from stages.lib.shards import unfinished


def main(splits: Path, name: str, out: Path) -> None:
    params = load_params()
    model = params["models"][name]
    part = load_split(splits, "train")
    masks = "segmentation" in model["tasks"]
    instances = ground_truth(part, "segmentation" if masks else "detection")
    keypoints = ground_truth(part, "keypoints") if "keypoints" in model["tasks"] else None
    data = DetectionDataset(instances, keypoints, {i: image_path(part, i) for i in part.image_ids}, masks)
    num_classes, num_keypoints = max(instances.cats) + 1, data.num_keypoints
    if model["architecture"].startswith("keypoint"):
        num_classes = 2  # torchvision's keypoint model knows persons only, category 1
        if keypoints and set(keypoints.cats) != {1}:
            raise InputError(
                f"{part.person_keypoints}: categories have the ids {sorted(keypoints.cats)}, but "
                f"{model['architecture']} knows persons only, as 1; give them this id, or use another architecture"
            )
    if model["steps"] and not len(data):
        raise InputError(
            f"{part.instances}: no image of the split train has an object to learn from (no crowd, wider and higher "
            f"than 1 px); raise prepare.images.train, or set models.{name}.steps to 0"
        )
    torch.manual_seed(params["seed"])
    network = build(model, num_classes, num_keypoints)
    published = load_given(network, name, model["architecture"], model["weights"])
    join()
    rank, processes = place()
    given = Path(model["weights"]) if model["weights"] and Path(model["weights"]).suffix else None
    made_from = splits, model, given, params["seed"], processes
    with unfinished(out, *made_from) if model["steps"] and rank == 0 else nullcontext() as folder:
        if model["steps"]:
            checkpoint = shared(folder) / "training.pt"
            train(network, data, model["steps"], model["batch"], model["lr"], params["seed"], checkpoint)
        if rank == 0:
            save_model(out, network, num_classes, num_keypoints, half=not published)


def load_given(network: nn.Module, name: str, architecture: str, weights: str | None) -> bool:
    """`models.<name>.weights` of params.yaml into the network -> whether torchvision published them."""
    if not weights:
        return False
    if Path(weights).suffix and Path(weights).suffix != ".pth":
        checkpoint = read_checkpoint(Path(weights))
        load_weights(network, checkpoint["state"], weights)
        set_norm_epsilon(network, checkpoint)
        return False
    file = Path(weights) if Path(weights).suffix else _file_of(name, architecture, weights)
    load_weights(network, published_state(file), weights)
    if file.name == Path(_original(architecture)).name:
        set_norm_epsilon(network, {NORM_EPSILON: 0.0})  # they were trained so, and torchvision builds them so
    return True


def _file_of(name: str, architecture: str, weights: str) -> Path:
    """Where torch keeps the weights that torchvision calls so, COCO_V1 for example."""
    try:
        known = get_model_weights(architecture)[weights]
    except (ValueError, KeyError):
        raise InputError(
            f"params.yaml: models.{name}.weights is {weights!r}: torchvision has no such weights of {architecture}; "
            "give a file (with its suffix), a name such as COCO_V1, or null"
        ) from None
    try:
        return downloaded(known.url)
    except (OSError, RuntimeError) as error:  # no way there, or another hash
        raise InputError(
            f"params.yaml: models.{name}.weights is {weights!r}: {error}; download {known.url} and give the file"
        ) from None


def _original(architecture: str) -> str:
    """Where the weights lie that torchvision published first; empty for an architecture that is not its own."""
    try:
        return get_model_weights(architecture)["COCO_V1"].url
    except ValueError:
        return ""


if __name__ == "__main__":
    entry(main)
