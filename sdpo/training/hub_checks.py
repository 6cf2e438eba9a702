"""Checks before a run that its model can be uploaded at its end; no torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from sdpo.common.errors import UserError, first_line
from sdpo.config import HubConfig

PROGRAM = "python -m sdpo.training.export"


def check_hub(hub: HubConfig, directory: Path) -> None:
    """Check without a network that an upload can be: the repository's name, and a token.

    Args:
        directory: whose name the repository has by default.

    Raises:
        UserError: naming the flag.
    """
    for name in ("hub_model_id", "hub_private_repo"):
        if getattr(hub, name) and not hub.push_to_hub:
            raise UserError(f"--{name} has no meaning without --push_to_hub")
    # The scripts install it after --check_only; the run itself checks again.
    if not hub.push_to_hub or find_spec("huggingface_hub") is None:
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = hub.hub_model_id or directory.resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        told = "" if hub.hub_model_id else ", which is the directory's name"
        raise UserError(
            f"--hub_model_id {name}{told}: {first_line(error)} Give NAME or ORG/NAME"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push_to_hub: HF_HUB_OFFLINE is set, which forbids it: unset it")
    if get_token() is None:
        raise UserError(
            "--push_to_hub: there is no token for the hub; log in by `hf auth login`, or set "
            "HF_TOKEN to one that may write"
        )


def check_account(hub: HubConfig) -> None:
    """Ask the hub whose token it is, and whether that account is of the repository's owner.

    Raises:
        UserError: it is not, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        account = HfApi().whoami()
    # Hub and network errors come in many classes.
    except Exception as error:
        raise UserError(
            f"--push_to_hub: the hub does not say whose token this is ({first_line(error)}); is "
            f"there a network, and is the token valid? Without the flag, `{PROGRAM} RUN "
            "--push_to_hub` uploads what a run left, later"
        ) from None
    owners = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    owner, slash, _ = (hub.hub_model_id or "").partition("/")
    if slash and owner.lower() not in (name.lower() for name in owners):
        raise UserError(
            f"--hub_model_id {hub.hub_model_id}: the token is of {owners[0]}, who is no member of "
            f"{owner}; known are {', '.join(owners)}"
        )
