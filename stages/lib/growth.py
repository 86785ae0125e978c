"""A profile with few images, then twice and four times as many -> what its heavy stages take: seconds, peak memory.

Seconds on the clock grow with what else the machine does; those of the CPU hardly do, so the ratio is of these.
"""

from pathlib import Path
from typing import Any

from stages.lib.planning import forked, items_of, run_sample, sampled
from stages.lib.schema import need

TIMES = (1, 2, 4)
LEAST = 2  # images of `fit`
IMAGES = 16  # of each split, at first: two batches of the heads, one shard


def growth(params: dict[str, Any], dvc_yaml: Path) -> dict[str, Any]:
    """`stages`, each with items, seconds, CPU seconds and peak MiB at TIMES, and ratios of the last two, last to first.

    before_mib: peak of a process that does nothing, with all imports made.
    """
    _, before = forked(lambda: None)
    model = next(iter(params["cells"].values()))["model"]
    learned = next((name for name, codec in params["codecs"].items() if "network" in codec), None)
    cheapest = "hevc" if "hevc" in params["codecs"] else learned
    quality = params["mfip"]["precode"]
    coders = [f"{model}-{codec}" for codec in dict.fromkeys((cheapest, learned)) if codec]
    addresses = [
        f"extract@{model}",
        *(f"compress@{coder}-{quality}" for coder in coders),
        f"measure_uncoded@{model}",
        f"measure@{coders[0]}",
        f"evaluate@{coders[0]}",
    ]
    few = min(IMAGES, min(params["prepare"]["images"].values()) // TIMES[-1])
    need(few >= LEAST, "prepare.images", params["prepare"]["images"], f"growth needs {LEAST * TIMES[-1]} of each split")
    samples = [sampled(params, times * few) for times in TIMES]
    measured = [{run.address: run for run in run_sample(sample, dvc_yaml, addresses)} for sample in samples]
    stages = []
    for address in addresses:
        runs = [of_sample[address] for of_sample in measured]
        found = {name: [getattr(run, name) for run in runs] for name in ("seconds", "cpu_seconds", "peak_mib")}
        items = [items_of(sample, run.stage, address) for sample, run in zip(samples, runs, strict=True)]
        ratios = {name: found[name][-1] / found[name][0] for name in ("cpu_seconds", "peak_mib")}
        stages.append({"stage": address, "items": items} | found | {"ratio": ratios})
    return {"times": list(TIMES), "before_mib": before.ru_maxrss / 1024, "stages": stages}
