"""params -> a data set in COCO's layout (source: shapes) and its splits train, fit, test."""

from pathlib import Path

from stages.lib import shapes
from stages.lib.coco import make_splits
from stages.lib.files import atomic, disk_check, write_json
from stages.lib.params import InputError, entry, load_params

BYTES_PER_PIXEL = 12_000 / 128**2  # of a generated image with its annotations, rounded up


def main(out: Path) -> None:
    params = load_params()
    prepare = params["prepare"]
    counts = prepare["images"]
    tasks = {task for model in params["models"].values() for task in model["tasks"]}
    if prepare["source"] == "coco":
        root = Path(prepare["coco_root"])
        if root.resolve().is_relative_to(out.resolve()):
            raise InputError(f"prepare.coco_root {root} lies in {out}, which is replaced; move the images elsewhere")
        with atomic(out) as folder:
            write_json(folder / "splits.json", make_splits(root, counts, tasks))
    else:
        disk_check(out, sum(counts.values()) * prepare["size"] ** 2 * BYTES_PER_PIXEL)
        with atomic(out) as folder:
            n_val = counts["fit"] + counts["test"]
            shapes.generate(folder, counts["train"], n_val, prepare["size"], prepare["seed"])
            write_json(folder / "splits.json", make_splits(folder, counts, tasks, seen_as=out))


if __name__ == "__main__":
    entry(main)
