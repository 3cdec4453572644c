from asyncdapo.api import Run, __version__, launch, load_config

__all__ = ["Run", "__version__", "launch", "load_config"]
