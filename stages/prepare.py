"""params -> a data set in COCO's layout (source: shapes) and its splits train, fit, test."""

from pathlib import Path

from stages.lib import shapes
from stages.lib.coco import make_splits
from stages.lib.command import entry
from stages.lib.files import atomic, disk_check, write_json
from stages.lib.params import load_params
from stages.lib.schema import InputError

BYTES_PER_PIXEL = 12_000 / 128**2  # of a generated image with its annotations, rounded up
COCO_2017 = {  # folder -> place, bytes and MD5 of its archive (COCO gives no checksums: these are what others check)
    "train2017": ("zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2"),
    "val2017": ("zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80"),
    "annotations": ("annotations/annotations_trainval2017.zip", 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c"),
}


def main(out: Path) -> None:
    params = load_params()
    prepare = params["prepare"]
    counts = prepare["images"]
    tasks = {task for model in params["models"].values() for task in model["tasks"]}
    if prepare["source"] == "coco":
        root = Path(prepare["coco_root"])
        if root.resolve().is_relative_to(out.resolve()):
            raise InputError(f"prepare.coco_root {root} lies in {out}, which is replaced; move the images elsewhere")
        if missing := [folder for folder in COCO_2017 if not (root / folder).is_dir()]:
            print(how_to_download(root.resolve(), missing), flush=True)
        with atomic(out) as folder:
            write_json(folder / "splits.json", make_splits(root, counts, tasks))
    else:
        disk_check(out, sum(counts.values()) * prepare["size"] ** 2 * BYTES_PER_PIXEL)
        with atomic(out) as folder:
            n_val = counts["fit"] + counts["test"]
            shapes.generate(folder, counts["train"], n_val, prepare["size"], prepare["seed"])
            write_json(folder / "splits.json", make_splits(folder, counts, tasks, seen_as=out))


def how_to_download(root: Path, missing: list[str]) -> str:
    """Commands for a shell that fetch, check and unpack the folders of COCO 2017 that are missing."""
    lines = [f"{root} lacks {', '.join(missing)}. If it is COCO 2017 that you want (README, the section of this name):"]
    lines.append(f"  mkdir -p {root} && cd {root}")
    for place, size, md5 in (COCO_2017[folder] for folder in missing):
        archive = Path(place).name
        lines.append(f"  curl -C - -O http://images.cocodataset.org/{place}  # {size:,} bytes")
        lines.append(f'  echo "{md5}  {archive}" | md5sum -c && unzip -q {archive}')
    return "\n".join(lines)


if __name__ == "__main__":
    entry(main)
