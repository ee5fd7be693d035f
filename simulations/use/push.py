"""A folder on the Hugging Face hub: an upload, or one line that says why not."""

from __future__ import annotations

from pathlib import Path

from deal_core.errors import UserError


def check_token() -> None:
    """Check that somebody is signed in; nothing is sent.

    Raises:
        UserError: nobody is.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise UserError("--push: no Hugging Face token; run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repository: str) -> str:
    """Make the repository where it is missing, private, and upload the folder to it.

    Args:
        folder: all of it is uploaded.
        repository: ``OWNER/NAME``.

    Returns:
        A line that says where it is.

    Raises:
        UserError: no network, no access, or no such name.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        where = api.create_repo(repository, private=True, exist_ok=True).repo_id
        api.upload_folder(repo_id=where, folder_path=folder)
    except Exception as error:  # of its own, of its HTTP library, of the system
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--push {repository}: not uploaded ({reason}); {folder} is complete, upload it with "
            f"`hf upload {repository} {folder}`"
        ) from None
    return (
        f"uploaded to {where}; a new repository is private, one that was there keeps its visibility"
    )
