"""Which curves the page of a run shows: plain values that page.js draws, whatever they are."""

from typing import Any

from dsjax.config import Config
from dsjax.train.digest import Digest
from dsjax.train.lines import number

LOG_FROM = 50  # highest over lowest, from which an axis is logarithmic
_IF_ANY = ("mtp_weight", "balance_loss", "skipped", "overflow", "bias_update_speed")  # not shown where all are zero
_IF_ANY += ("clipped", "left_out", "kl", "resampled", "staleness", "truncated")
_PARTS = ("orange", "green", "violet", "cyan", "gold", "brick")  # of a reward
_PASSES = ("ink", "blue", "green", "gold", "orange", "brick", "grey")  # pass@1, pass@2, pass@4, ...
_DEPTHS = ("orange", "gold", "brick")  # of MTP


def charts(digest: Digest, config: Config | None) -> list[dict[str, Any]]:
    """Charts in the order of the page, each with its series (x: "train" or "eval", y, and lo, hi of thinned ones)."""
    rewarded = digest.rewards() is not None
    small = [
        *(_policy(digest) if rewarded else []),
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
        if chart["id"] == "gap":
            chart["log"] = not _all_zero(chart)
        if chart["id"] == "grad_norm":
            chart["log"] = _spread(chart) > LOG_FROM
            if config is not None:
                chart["lines"] = [{"name": "clipped at", "color": "orange", "value": config.optimizer.clip_norm}]
    if rewarded:
        return [_reward(digest), _passed(digest), *kept]
    in_bits = not digest.held or any("heldout_bpb" in row for row in digest.held)  # conversations are not
    return [_loss(digest), *([_bits(digest)] if in_bits else []), *kept]


def _reward(digest: Digest) -> dict[str, Any]:
    """Of the answers that were learned from, and of held-out ones."""
    parts = digest.rewards()
    series = [
        _series(name, _PARTS[k % len(_PARTS)], "train", digest.curve(f"reward_{name}"), smooth=True)
        for k, name in enumerate(parts if len(parts) > 1 else [])
    ]
    series += [
        _train(digest, "reward", "mean reward"),
        _series("held out", "ink", "eval", digest.held_curve("heldout_reward"), dots=True),
    ]
    unit = "of an answer" if len(parts) < 2 else "of an answer, and its parts before their weights"
    return _chart("reward", "Reward", unit, series) | {"big": True, "empty": "no steps yet"}


def _passed(digest: Digest) -> dict[str, Any]:
    names = digest.passes()
    series = [
        _series(f"pass@{name[5:]}", _PASSES[k % len(_PASSES)], "eval", digest.held_curve(name), dots=True)
        for k, name in enumerate(names)
    ]
    chart = _chart("passed", "Held-out problems", "share solved", series, zero=True)
    return chart | {"big": True, "empty": "no reward says what is right" if digest.held else "no evaluation yet"}


def _policy(digest: Digest) -> list[dict[str, Any]]:
    """What policy optimisation watches besides."""

    def one(id_, title, unit, *lines, zero=True):
        series = [
            _series(name, color, "eval" if key.startswith("heldout") else "train", values, **look)
            for key, name, color in lines
            for values in [digest.held_curve(key) if key.startswith("heldout") else digest.curve(key)]
            for look in [{"dots": True} if key.startswith("heldout") else {"smooth": True}]
        ]
        return _chart(id_, title, unit, series, zero=zero)

    return [
        one(
            "length", "Length of answers", "tokens",
            ("length", "mean", "blue"), ("length_max", "longest", "gold"), ("heldout_length", "held out", "ink"),
        ),
        one(
            "truncated", "Cut off", "share of answers",
            ("truncated", "learned from", "blue"), ("heldout_truncated", "held out", "ink"),
        ),
        one("entropy", "Entropy", "nats a token", ("entropy", "entropy", "blue")),
        one("kl", "KL to the reference", "nats a token, k3", ("kl", "KL", "blue")),
        one("zero_spread", "Groups without spread", "share; nothing is learned from them", ("zero_spread", "share", "blue")),
        one("resampled", "Groups replaced", "a round", ("resampled", "groups", "blue")),
        one(
            "gap", "Sampler and trainer apart", "nats, of a token's log-probability",
            ("gap_max", "most", "gold"), ("gap", "mean", "blue"), zero=False,
        ),
        one("clipped", "Clipped", "share of tokens without gradient", ("clipped", "share", "blue")),
        one("left_out", "Left out", "share of tokens, of bad answers too far from the policy", ("left_out", "share", "blue")),
        one("staleness", "Staleness", "steps between a token's weights and those that learn", ("staleness", "mean", "blue")),
        one(
            "seconds", "Time", "seconds a round",
            ("sample_s", "sampling", "green"), ("learn_s", "learning", "blue"),
        ),
        one("answer_tokens", "Answers", "tokens a round", ("answer_tokens", "tokens", "blue")),
        one("policy_loss", "Loss", "of the policy", ("loss", "loss", "blue"), zero=False),
    ]  # fmt: skip


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
