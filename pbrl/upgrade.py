"""What stored configs of earlier versions call otherwise, brought to today's names, nesting and units.

Classes that moved are in `pbrl.launch.stored.MOVED`.
"""

from __future__ import annotations

from typing import Any

FITTING = "pbrl.fitting.Fitting"
FITTED = {  # updaters whose fitting's values stood beside their own, until version 0.2
    "pbrl.updaters.aparl.APARL",
    "pbrl.updaters.mrn.Mrn",
    "pbrl.updaters.pebble.Pebble",
    "pbrl.updaters.penalty.Penalty",
    "pbrl.updaters.surf.Surf",
}
# what the constructors took a value for that the config did not name
ABSENT = {
    "epochs": 50,
    "batch_size": 128,
    "stop_accuracy": 0.97,
    "least_steps": 0,
    "steps_per_label": None,
    "crop": 0.0,
    "shrink": 0.0,
}
# what a fitting did before it had a key for it
LATER = {"stop_over": "epoch", "pieces": 1, "label_smoothing": 0.0, "even_batches": False}
AGENT = {  # what its first versions were
    "precision": "fp32",
    "compile": False,
    "normalise": False,
    "actor_layer_norm": False,
    "critic_layer_norm": False,
    "blocks": 0,
    "critics": 2,
    "weight_decay": 0.0,
    "target_entropy": -1.0,
    "n_steps": 1,
    "relabel_updates": 0,
    "gradient_steps": 1,
    "reset_above": None,
    "noise_color": 0.0,
}


def upgrade(stored: dict[str, Any]) -> None:
    """Change a stored config in place; one of today's stays as it is."""
    feedback = stored.get("feedback")
    if isinstance(feedback, dict) and "decay_to" not in feedback:
        at_least, per_session = feedback.get("at_least", 1), feedback.get("per_session")  # pairs a session, for a day
        if isinstance(at_least, int) and isinstance(per_session, int) and 1 <= at_least <= per_session:
            feedback.pop("at_least", None)  # what is no such number stays, to be refused
            feedback["decay_to"] = 0.0 if at_least == 1 else at_least / per_session
    pretraining = stored.setdefault("pretraining", {})
    if isinstance(pretraining, dict):
        pretraining.setdefault("whiten", False)
    agent = stored.get("agent")
    if isinstance(agent, dict) and agent.get("_target_") == "pbrl.agent.sac.make_agent":
        stored["agent"] = AGENT | agent
    reward = stored.get("reward")
    if isinstance(reward, dict) and reward.get("_target_") == "pbrl.reward.RewardEnsemble":
        reward.setdefault("skip", False)
    updater = stored.get("updater")
    while isinstance(updater, dict):
        _upgrade_updater(updater, stored.get("segment_length"))
        updater = updater.get("inner")


def _upgrade_updater(node: dict[str, Any], segment_length: Any) -> None:
    target = str(node.get("_target_"))
    if target in FITTED and "fit" not in node:
        surf = target.endswith(".Surf")
        absent = ABSENT | {"crop": 5} if surf else ABSENT
        fit = {name: node.pop(name, value) for name, value in absent.items()}
        fit["crop"] = _shares(fit["crop"], segment_length if surf else None)
        node["fit"] = {"_target_": FITTING, **fit}
        if surf:
            node["segment_length"] = segment_length
    fitting = node.get("fit")
    if isinstance(fitting, dict) and fitting.get("_target_") == FITTING:
        node["fit"] = LATER | fitting
    if target == "pbrl.updaters.rime.Rime":
        node.setdefault("warmup_epochs", 0)
    for name in ("implicit", "walk"):
        inner = node.get(name)
        if isinstance(inner, dict) and "horizon" in inner:
            inner["trajectory_length"] = inner.pop("horizon")


def _shares(crop: Any, segment_length: Any) -> Any:
    """Shortest and longest piece as shares of a segment; what was no number stays what it is, to be refused.

    They were a share that may be left out, or (SURF, with `segment_length`) the steps by which both ends may be off it.
    """
    unit = 1 if segment_length is None else segment_length
    if not all(isinstance(value, int | float) for value in (crop, unit)) or not unit:
        return crop
    if not crop:
        return None
    return [1 - crop, 1.0] if segment_length is None else [1 - crop / unit, 1 + crop / unit]
