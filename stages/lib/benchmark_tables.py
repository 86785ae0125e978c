"""What `benchmark` measured -> its tables: codecs, losses of one coded scale, one image, growth; and their goals."""

from typing import Any

from stages.lib.comparing import ANCHOR
from stages.lib.tables import NOT_AVAILABLE, Table

# Goals: at least so many times, or at most.
LIMIT_GOAL, CODER_GOAL, MEASURING_GOAL = 0.9, 3, 5
PLAIN_GOALS = {("default", "cpu"): 2, ("coco", "cuda"): 5}  # (size, device) -> times the plain loop
CORES_GOAL = 0.95  # "near 1"
PEAK_GOAL = 1.1
SENDER, RECEIVER = ("backbone", "precoding", "MFIP", "allocation", "coding", "writing"), ("decoding", "heads")


def benchmark_tables(report: dict[str, Any]) -> list[Table]:
    """The content of benchmark.json -> its tables; what was not measured says so."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    return [
        _codec_table(report["cases"], machine),
        _memory_table(report["memory"]),
        _measuring_table(report["measuring"]),
        _online_table(report["online"]),
        _growth_table(report["growth"]),
    ]


def _codec_table(cases: list[dict[str, Any]], machine: str) -> Table:
    rows = [row for case in cases for row in _codec_rows(case)]
    title = "Speed of the codecs beside their networks and coders alone, and beside plain loops"
    return Table(title, ["codec", "size", "device", "", "measured", "times", "goal"], rows, [f"{machine}."], texts=4)


def _codec_rows(case: dict[str, Any]) -> list[list[str]]:
    key = [case["codec"], " x ".join(map(str, case.get("plane", [case["size"]]))), case["device"]]
    if "note" in case:
        return [[*key, "all", case["note"], "", ""]]
    seconds, goal = case["seconds"], PLAIN_GOALS.get((case["size"], case["device"]))
    plain = seconds["plain_compress"] + seconds["plain_decompress"]
    speed = f"{case['samples_per_second'] / 1e6:.3f} M samples/s"
    rows = [
        ["compress, to network + entropy coder alone", speed, f"{case['of_limit']:.2f}", f"{LIMIT_GOAL}"],
        [
            f"compress and reconstruct, to compress + decompress of {case['plain']}",
            f"{seconds['encode']:.2f} s, {plain:.2f} s",
            f"{case['times_plain']:.2f}",
            f"{goal}" if goal else "",
        ],
    ]
    for name, coding in (("", case["entropy_coding"]), (", plane by plane", case["entropy_coding_by_plane"])):
        for way in ("encode", "decode", "both"):
            rate = f"{coding['symbols_per_second'][way] / 1e6:.1f} M symbols/s"
            times = f"{coding['ratio'][way]:.2f}"
            rows.append([f"entropy coding, to compressai's: {way}{name}", rate, times, f"{CODER_GOAL}"])
        sizes = coding["bytes"], coding["compressai_bytes"]
        rows.append(
            [f"strings, to compressai's{name}", f"{sizes[0]}, {sizes[1]} bytes", f"{sizes[0] / sizes[1]:.4f}", ""]
        )
    together = case["all_cores"]
    if "note" in together:
        rows.append(["entropy coding on all cores", together["note"], "", ""])
    else:
        what = f"by {together['processes']} processes, to as many times one"
        each = f"{together['seconds']['all']:.3f} s each"
        rows.append([f"entropy coding {what}", each, f"{together['of_linear']:.2f}", "near 1"])
        rows.append([f"SHA-256 {what}: what the machine allows", "", f"{together['of_linear_hash']:.2f}", ""])
    return [[*key, *row] for row in rows]


def _memory_table(weighed: list[dict[str, Any]]) -> Table:
    rows = []
    for case in weighed:
        numbers = [case.get("note", NOT_AVAILABLE), ""]
        if "note" not in case:
            numbers = [f"{case['peak_mib']:.0f}", f"{case['before_mib']:.0f}"]
        rows.append([case["codec"], f"{case['side']} x {case['side']}", case.get("device", ""), *numbers])
    return Table("Memory of one plane", ["codec", "plane", "device", "peak, MiB", "before, MiB"], rows, [], texts=3)


def _measuring_table(cases: list[dict[str, Any]]) -> Table:
    headers = ["detector", "size", "device", "images", "plain loop", "the same", "times", "goal", "measure", "times"]
    headers.append("equal results")
    note = (
        "The same: measure without what the plain loop does not do; measure: with it, scales that are not sent and "
        "losses against pseudo-labels."
    )
    rows = [_measuring_row(case) for case in cases]
    return Table("Losses of one coded scale, beside a loop of whole detectors", headers, rows, [note], texts=3)


def _measuring_row(case: dict[str, Any]) -> list[str]:
    key = [case["detector"], case["size"], case["device"]]
    if "note" in case:
        return [*key, "", case["note"], "", "", "", "", "", ""]
    seconds, times = case["seconds"], case["times_plain"]
    return [
        *key,
        str(case["images"]),
        f"{case['evaluations']} evaluations: {seconds['plain']:.1f} s",
        f"{seconds['alike']:.1f} s",
        f"{times['alike']:.2f}",
        f"at least {MEASURING_GOAL}",
        f"{case['variants']} variants: {seconds['ours']:.1f} s",
        f"{times['ours']:.2f}",
        f"{case['equal']:.2%}",
    ]


def _online_table(cases: list[dict[str, Any]]) -> Table:
    headers = ["cell", "device", "qualities", *SENDER, "sender", f"to {ANCHOR}", *RECEIVER, "receiver"]
    headers += ["sender, MiB", "receiver, MiB"]
    note = "Medians over images of test, on one thread; MiB: the peak of the process."
    rows = [row for case in cases for row in _online_rows(case, len(headers))]
    return Table("Seconds that one image takes", headers, rows, [note], texts=3)


def _online_rows(case: dict[str, Any], width: int) -> list[list[str]]:
    if "note" in case:
        row = [case["cell"], case["device"], case["note"]]
        return [row + [""] * (width - len(row))]
    sender, receiver = case["sender"]["seconds"], case["receiver"]["seconds"]
    totals = {way: sum(steps.values()) for way, steps in sender.items()}
    return [
        [
            case["cell"],
            case["device"],
            way,
            *(f"{steps[step]:.3f}" if step in steps else "" for step in SENDER),
            f"{totals[way]:.3f}",
            f"{totals[way] / totals[ANCHOR]:.2f}",
            *(f"{receiver[way][step]:.3f}" for step in RECEIVER),
            f"{sum(receiver[way].values()):.3f}",
            f"{case['sender']['peak_mib']:.0f}",
            f"{case['receiver']['peak_mib']:.0f}",
        ]
        for way, steps in sender.items()
    ]


def _growth_table(grown: dict[str, Any]) -> Table:
    few, *_, many = grown["times"]
    times = f"{many} x to {few} x"
    headers = ["stage", "items", "seconds", "CPU seconds", times, "goal", "peak, MiB", times, "goal"]
    rows = []
    for stage in grown["stages"]:
        items, peaks = (", ".join(f"{value:.0f}" for value in stage[name]) for name in ("items", "peak_mib"))
        seconds, of_cpu = (", ".join(f"{value:.1f}" for value in stage[name]) for name in ("seconds", "cpu_seconds"))
        of_time, of_memory = (f"{stage['ratio'][name]:.2f}" for name in ("cpu_seconds", "peak_mib"))
        goals = f"at most {many / few:.0f}", f"at most {PEAK_GOAL}"
        rows.append([stage["stage"], items, seconds, of_cpu, of_time, goals[0], peaks, of_memory, goals[1]])
    note = f"Peak of a process that does nothing: {grown['before_mib']:.0f} MiB."
    return Table("Stages as data grow", headers, rows, [note])
