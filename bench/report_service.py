"""Tables of docs/performance.md that tell of a server: requests, starts, memory, watchers."""

from __future__ import annotations

from bench.results_file import figure, judge, load, origin, size, table

TIERS = {"12gb": ("12 GB", 11), "16gb": ("16 GB", 15), "24gb": ("24 GB", 20), "warm": ("80 GB", 48)}
"""Files of the service's bench; the card's memory; the most GB that may be used."""


def service_table(name: str) -> str:
    """Ten requests to a server."""
    rows = [
        [
            size(r),
            str(r["tokens"]),
            f"{r['client_s']:.3f}",
            f"{r['pipeline_s']:.3f}",
            f"{r['encoding_s']:.3f}",
            f"{r['overhead_ms']:.1f}",
            f"{r['first_step_s']:.3f}",
            f"{r['step_ms']:.1f}",
        ]
        for r in load(name)["requests"]
    ]
    header = ("size", "tokens", "client s", "pipeline s", "PNG s", "beyond both, ms", "first step s", "ms a step")
    return table(header, rows)


def service_verdict(name: str) -> str:
    """What they show."""
    result = load(name)
    over = [r["overhead_ms"] for r in result["requests"]]
    within = sum(value <= 10 for value in over)
    cost = result["previews_cost"]
    return (
        f"Beyond pipeline and PNG: {min(over):.1f} to {max(over):.1f} ms an image, "
        f"{within} of {len(over)} within the target of 10 ms. "
        f"A preview at every step cost {100 * cost:.1f} % of the time "
        f"(target 1 %: {judge(cost, 0.01)}). "
        f"Files compiled after warm-up: {result['compiled_after_warm_up']}."
    )


def service_against_bench() -> str:
    """The first request of each size beside the bench's median."""
    speed, rows, seen = load("h100-speed"), [], set()
    for r in load("h100-service")["requests"]:
        if size(r) in seen:
            continue
        seen.add(size(r))
        alone = figure(speed, r["profile"], r["width"], r["height"])["total_s"]
        rows.append(
            [
                size(r),
                str(r["tokens"]),
                f"{alone:.3f}",
                f"{100 * (r['pipeline_s'] / alone - 1):+.1f} %",
                f"{100 * (r['client_s'] / alone - 1):+.1f} %",
            ]
        )
    return table(("size", "tokens", "bench s", "server's pipeline", "client, PNG included"), rows)


def starts(kernels: str, *, to_first_step: bool = False) -> list[float]:
    """Seconds of the starts with these kernels, the shortest first."""
    return sorted(
        s["serving_after_s"] + (s["first_step_s"] if to_first_step else 0.0)
        for s in load("h100-start")["starts"]
        if s["kernels"] == kernels
    )


def start() -> str:
    """From the server's start to a first step."""
    result = load("h100-start")
    told = "; ".join(
        f"{' and '.join(f'{s:.1f}' for s in starts(kernels, to_first_step=True))} s with kernels {kernels}"
        for kernels in ("cached", "compiled anew")
    )
    worst = starts("cached", to_first_step=True)[-1]
    return (
        f"From the process's start to the first step ({origin(result)}): {told}. "
        f"Target 15 s, compile aside: {judge(worst, 15)}."
    )


def memory_table() -> str:
    """Servers limited to what smaller cards have."""
    rows = []
    for name, (card, target) in TIERS.items():
        result = load(f"h100-service-{name}")
        request, plan = result["requests"][0], result["memory_plan"]
        tiled = ", autoencoder in tiles" if plan.get("tile_autoencoder") else ""
        graphs = "" if plan.get("record_graphs") else ", no graphs"
        rows.append(
            [
                card,
                f"weights {plan['weights']}, T5 on {plan['text_encoder']}, "
                f"master on {plan['master']}{tiled}{graphs}",
                f"{request['peak_gb']:.1f}",
                f"{target}",
                judge(request["peak_gb"], target),
                f"{result['device_memory_gb']:.1f}",
                f"{request['pipeline_s']:.2f}",
                f"{request['pipeline_s'] / load('h100-service-warm')['requests'][0]['pipeline_s']:.2f}",
            ]
        )
    header = ("card", "plan", "GB by torch", "target", "", "GB by the driver", "pipeline s", "× of 80 GB")
    return table(header, rows)


def watchers_table(name: str) -> str:
    """Many watchers of one running job."""
    header = ["watchers", "events", "saw all, in order", "median ms", "99th percentile ms", "ms a step", "slower"]
    return table(
        [*header, "memory MB"],
        (
            [
                f"{w['watchers']:,}",
                f"{w['events']:,}",
                f"{w['complete']:,}",
                f"{w['p50_ms']:.0f}",
                f"{w['p99_ms']:.0f}",
                f"{w['step_ms']:.0f}",
                f"{100 * w['slowdown']:.0f} %",
                f"+{w['rss_growth_mb']:.0f}",
            ]
            for w in load(name)["watched"]
        ),
    )


def watchers_verdict(name: str) -> str:
    """The rest of that bench."""
    result = load(name)
    made, again = result["created"], sorted(result["reattach_ms"])
    return (
        f"An idle server takes {100 * result['idle_cpu']:.2f} % of a core (target 1 %). After a cut the first "
        f"missed event comes {again[len(again) // 2]:.0f} ms after the new call, at worst {again[-1]:.0f} ms "
        f"(target 50 ms). 20 `CreateJob` a second for {made['calls'] / 20:.0f} s: "
        f"{made['calls']} calls, {made['accepted']} accepted, "
        f"{made['refused_full']} `QUEUE_FULL`, {made['other']} with another answer; the server lists "
        f"{made['listed']} of them."
    )
