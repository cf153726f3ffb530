from .batcher import Answer, Batcher, OverloadedError
from .server import Server, listen, run

__all__ = ["Answer", "Batcher", "OverloadedError", "Server", "listen", "run"]
