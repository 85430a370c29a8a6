"""Which curves the page of a run shows: plain values that page.js draws, whatever they are."""

from typing import Any

from dsjax.config import Config
from dsjax.train.digest import Digest
from dsjax.train.lines import number

LOG_FROM = 50  # highest over lowest, from which an axis is logarithmic
_IF_ANY = ("mtp_weight", "balance_loss", "skipped", "overflow", "bias_update_speed")  # not shown where all are zero
_DEPTHS = ("orange", "gold", "brick")  # of MTP


def charts(digest: Digest, config: Config | None) -> list[dict[str, Any]]:
    """Charts in the order of the page, each with its series (x: "train" or "eval", y, and lo, hi of thinned ones)."""
    small = [
        _chart("grad_norm", "Gradient norm", "before clipping", [_train(digest, "grad_norm", "norm")]),
        _chart(
            "learning_rate", "Learning rate", "", [_train(digest, "learning_rate", "rate", smooth=False)], zero=True
        ),
        _chart("tokens_per_s", "Speed", "tokens a second", [_train(digest, "tokens_per_s", "speed")], zero=True),
        _chart(
            "batch", "Batch", "tokens a step", [_series("batch", "blue", "train", digest.batch_tokens())], zero=True
        ),
        _chart(
            "mtp_weight", "λ", "weight of the MTP loss", [_train(digest, "mtp_weight", "λ", smooth=False)], zero=True
        ),
        _chart(
            "bias_update_speed",
            "γ",
            "step of the router bias",
            [_train(digest, "bias_update_speed", "γ", smooth=False)],
            zero=True,
        ),
        _chart("balance_loss", "Balance loss", "weighted", [_train(digest, "balance_loss", "loss")], zero=True),
        _chart("skipped", "Skipped steps", "so far", [_train(digest, "skipped", "steps", smooth=False)], zero=True),
        _chart("overflow", "Rows without room", "", [_train(digest, "overflow", "rows", smooth=False)], zero=True),
    ]
    kept = [chart for chart in small if chart["series"] and not (chart["id"] in _IF_ANY and _all_zero(chart))]
    for chart in kept:
        if chart["id"] == "grad_norm":
            chart["log"] = _spread(chart) > LOG_FROM
            if config is not None:
                chart["lines"] = [{"name": "clipped at", "color": "orange", "value": config.optimizer.clip_norm}]
    in_bits = not digest.held or any("heldout_bpb" in row for row in digest.held)  # conversations are not
    return [_loss(digest), *([_bits(digest)] if in_bits else []), *kept]


def _loss(digest: Digest) -> dict[str, Any]:
    depth = digest.depth()
    names = ["MTP"] if depth == 1 else [f"MTP depth {k + 1}" for k in range(depth)]
    series = [
        _series(name, _DEPTHS[k % len(_DEPTHS)], "train", digest.curve("mtp_loss", k), smooth=True)
        for k, name in enumerate(names)
    ]
    series += [
        _train(digest, "loss", "training"),
        _series("averaged weights", "grey", "eval", digest.held_curve("ema_heldout_nats"), dots=True, dash=True),
        _series("held out", "ink", "eval", digest.held_curve("heldout_nats"), dots=True),
    ]
    return _chart("loss", "Loss", "nats a token", series) | {"big": True, "empty": "no steps yet"}


def _bits(digest: Digest) -> dict[str, Any]:
    series = [
        _series("averaged weights", "grey", "eval", digest.held_curve("ema_heldout_bpb"), dots=True, dash=True),
        _series("held out", "ink", "eval", digest.held_curve("heldout_bpb"), dots=True),
    ]
    last = digest.held[-1] if digest.held else {}
    lines = [
        {"name": f"{name} -9", "color": color, "value": value}
        for name, color in (("gzip", "orange"), ("xz", "green"))
        if (value := number(last.get(f"{name}_bpb"))) is not None
    ]
    chart = _chart("heldout", "Held-out text", "bits a byte", series, zero=True)
    return chart | {"big": True, "empty": "no evaluation yet", "lines": lines}


def _chart(id_: str, title: str, unit: str, series: list, zero: bool = False) -> dict[str, Any]:
    series = [one for one in series if one]
    return {"id": id_, "title": title, "unit": unit, "zero": zero, "log": False, "series": series, "lines": []}


def _train(digest: Digest, key: str, name: str, smooth: bool = True) -> dict[str, Any] | None:
    return _series(name, "blue", "train", digest.curve(key), smooth=smooth)


def _series(name: str, color: str, x: str, values: dict[str, list] | None, **look) -> dict[str, Any] | None:
    return {"name": name, "color": color, "x": x, **values, **look} if values else None


def _all_zero(chart: dict[str, Any]) -> bool:
    return not any(any(series["y"]) for series in chart["series"])


def _spread(chart: dict[str, Any]) -> float:
    values = [v for series in chart["series"] for v in (*series["y"], *series.get("hi", ())) if v]
    return max(values) / min(values) if values and min(values) > 0 else 1.0
