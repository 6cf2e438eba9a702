"""Whether a model is uploaded to the Hugging Face hub, and where to."""

from __future__ import annotations

from dataclasses import dataclass

from sdpo.common.flags import flag


@dataclass(frozen=True)
class HubConfig:
    """The repository; the token is that of `hf auth login` or HF_TOKEN."""

    push_to_hub: bool = flag(False, "upload the exported model and its card when it is done")
    hub_model_id: str | None = flag(
        None,
        "repository to upload to; it is made where there is none",
        metavar="[ORG/]NAME",
        shown="the run directory's name, under the token's user",
    )
    hub_private_repo: bool = flag(
        False, "make that repository a private one", shown="the account's own default"
    )
