"""Charts: what TensorBoard, W&B and MLflow show of a record, and the error where one of them is not installed."""

from __future__ import annotations

from orchestrator.telemetry.records import CheckpointSaved, Evaluation, Record, Step

# Source: nanoGPT, train.py, the keys of wandb.log
_NANOGPT_KEYS = {"train_loss": "train/loss", "val_loss": "val/loss", "lr": "lr", "mfu": "mfu"}


def scalars(record: Record) -> dict[str, float]:
    """Return a record's numbers under the names that charts have: nanoGPT's for an evaluation, else `kind/key`.

    mfu is a fraction in records and percent in charts, as in nanoGPT; where it is not known it is left out.
    """
    if not isinstance(record, Step | Evaluation | CheckpointSaved):
        return {}
    values = {key: x for key, x in vars(record).items() if type(x) in (int, float) and key != "iter"}
    if "mfu" in values:
        values["mfu"] *= 100
    if isinstance(record, Evaluation):
        return {_NANOGPT_KEYS.get(key, key): x for key, x in values.items()}
    return {f"{record.kind}/{key}": x for key, x in values.items()}


def missing_package(extra: str, key: str) -> str:
    """Return the text of an error: a key needs the package of an extra."""
    return f"{key}=True needs a package: pip install 'nanogpt-orchestrator[{extra}]'"
