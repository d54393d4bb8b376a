"""One file a data source; a file in this folder that registers one is found without further edits."""

__all__: list[str] = []
