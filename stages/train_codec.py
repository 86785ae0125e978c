"""Features of `train` -> packing and trained codec, and its loss curve.

`torchrun --nproc-per-node N -m stages.train_codec ...` trains with N processes, each on crops of its own.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from stages.lib import codec_training
from stages.lib.coding import FeatureCodec, build_codec, load_codec_weights, load_published, save_codec
from stages.lib.command import entry
from stages.lib.features import Features
from stages.lib.files import write_csv
from stages.lib.models import UNBUILT, naming, read_checkpoint
from stages.lib.params import load_params
from stages.lib.planes import Packing
from stages.lib.ranks import join, place, shared
from stages.lib.schema import InputError
from stages.lib.shards import unfinished

CONFIG = ("packing", "network", "lambda_range", "gains")  # what the weights depend on


def main(features: Path, model: str, name: str, out: Path, reports: Path) -> None:
    params = load_params()
    wanted = params["codecs"][name]
    config = {"codec": name} | {key: wanted[key] for key in CONFIG if key in wanted}
    family = wanted.get("family", [])
    if family:
        config["lambdas"] = [member["lmbda"] for member in family]
    join()
    data = Features(features, "train")
    channels = len(data.scale(data.image_ids[0], "0"))
    torch.manual_seed(params["seed"])
    codec: Any = build_codec(config)  # its type follows from config
    if wanted.get("init"):
        start = read_checkpoint(Path(wanted["init"]), "config", "packing", "channels")
        with naming(Path(wanted["init"]), UNBUILT):
            known, packing = dict(start["config"]), Packing(**start["packing"])
        for key, value in config.items():
            if known.get(key) != value:
                raise InputError(
                    f"params.yaml: codecs.{name}: {key} is {value!r}, the weights {wanted['init']} were "
                    f"trained with {known.get(key)!r}: use that, or init: null"
                )
        if start["channels"] != channels:
            raise InputError(
                f"{wanted['init']}: made for pyramids of {start['channels']} channels, {model} has {channels}; "
                "use init: null"
            )
        load_codec_weights(codec, start["state"], wanted["init"])
    else:
        packing = codec_training.fit_packing(data, config["packing"])
        if family:
            load_published(codec, [member["weights"] for member in family])
        elif config["packing"] != "tile" and "network" in config:
            codec.net.transform_start(codec_training.block_basis(data, packing))
    rank, processes = place()
    init = Path(wanted["init"]) if wanted.get("init") else None
    made_from = features, wanted, init, params["seed"], processes
    with unfinished(out, *made_from) if rank == 0 else nullcontext() as folder:
        log = []
        if "steps" in wanted:
            schedule = codec_training.Schedule(*(wanted[key] for key in codec_training.Schedule._fields))
            checkpoint = shared(folder) / "training.pt"
            log = codec_training.train(codec, data, packing, schedule, params["seed"], checkpoint)
        if rank == 0:
            save_codec(out, FeatureCodec(codec, packing, channels), config)
            write_csv(reports / "loss.csv", pd.DataFrame(log, columns=["step", "loss", "bpp_plane", "mse"]))


if __name__ == "__main__":
    entry(main)
