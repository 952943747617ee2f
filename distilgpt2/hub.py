"""The Hugging Face hub, asked once and briefly: does it answer within 5 seconds, and does it have the repository?

`transformers` and `datasets` alone would try again for minutes if there is no network.
"""

import os

from common.terminal import UserError

import requests

PATIENCE = 5.0  # seconds


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def missing(kind: str, name: str) -> str | None:
    """Why the hub cannot deliver the repository `name` of a kind ("models" or "datasets"); None if it can."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE forbids to ask the hub"
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        status = requests.get(f"{endpoint()}/api/{kind}/{name}", timeout=PATIENCE, headers=headers).status_code
    except requests.RequestException as error:
        reason = "timed out" if isinstance(error, requests.Timeout) else "cannot be reached"
        return f"{endpoint()} {reason}"
    if status in (401, 403, 404):
        return f"{endpoint()} has no such repository, or it is private"
    return None if status < 400 else f"{endpoint()} answered with status {status}"


def fetch_model(name: str) -> str | None:
    """Fetch the files of a model into the hub's cache. Returns the reason for a failure, else None."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, allow_patterns=["*.json", "*.txt", "model.safetensors"])
    except Exception as error:  # of the network, of the hub, of the disk
        return f"{endpoint()} did not deliver it ({next(iter(str(error).splitlines()), type(error).__name__)[:100]})"
    return None


def dataset_lines(name: str, configuration: str, parts, where: str) -> dict[str, list[str]]:
    """{part: lines} of a dataset with a column `text`. where: the beginning of the UserError if it cannot be had."""
    if reason := missing("datasets", name):
        raise UserError(f"{where}, and {reason}; lay the files out there, or pass --data builtin")
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, configuration)
        return {part: [line.rstrip("\n") for line in loaded[part]["text"]] for part in parts}
    except Exception as error:  # datasets raises a dozen kinds
        raise UserError(f"{where}, and the hub's copy cannot be loaded ({str(error).splitlines()[0][:100]})") from error
