"""To the Hub: what `save_pretrained` writes, uploaded."""

import tempfile


class Pushable:
    """Has `save_pretrained`, and so can be pushed."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Uploads the object to the Hub's `repo_id` (made if it isn't there; `private` is for that), in a commit or,
        with `create_pr`, as a proposal; into `subfolder` of it, if that is given. Returns the commit's address.

        `token`, and what is raised, are huggingface_hub's. `variant` and `safe_serialization`: as in `save_pretrained`.
        """
        from huggingface_hub import HfApi  # takes its time, and is needed here alone

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant, safe_serialization=safe_serialization)
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the owner's name
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                create_pr=create_pr,
            )
