"""Find out in seconds whether a tracking store can be used; MLflow, which tries for minutes, is not imported."""

import os
import re
import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

SECONDS = 10.0  # limit for a server's first answer
SCHEMA = re.compile(r"^(revision|down_revision)\b[^=]*=\s*[\"'](\w+)[\"']", re.MULTILINE)


def is_server(uri: str) -> bool:
    """Whether a store's address is that of an MLflow server."""
    return uri.startswith(("http://", "https://"))


def server_problem(uri: str, seconds: float = SECONDS) -> str | None:
    """The fault of the MLflow server at `uri`, and what to do; None where it answers."""
    import requests

    path = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    try:
        answer = requests.get(f"{uri.rstrip('/')}/health", timeout=seconds, verify=not insecure and (path or True))
    except requests.exceptions.SSLError:
        return "its certificate is not trusted; set MLFLOW_TRACKING_SERVER_CERT_PATH"
    except requests.Timeout:
        return f"no answer within {seconds:g} seconds; start the server, or set MLFLOW_TRACKING_URI"
    except (requests.RequestException, OSError, ValueError):
        return "no server is there; start it (`make ui` starts one), or set or unset MLFLOW_TRACKING_URI"
    if answer.status_code >= 500:
        return f"answers with status {answer.status_code}; look at the server's log"
    return None


def schema_problem(path: Path) -> str | None:
    """The fault of the SQLite store at `path`, and what to do; None if this MLflow can use or make it."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError:
        # no such table: MLflow makes its own; or locked: MLflow waits
        return None
    except sqlite3.DatabaseError:
        return "is no SQLite database; move it away, or set MLFLOW_TRACKING_URI"
    known, newest = _revisions()
    if found is None or found[0] == newest:
        return None
    if found[0] not in known:
        return "was made by a newer MLflow; update this environment (`make setup`), or set MLFLOW_TRACKING_URI"
    return f"was made by an older MLflow; keep a copy, then `.venv/bin/mlflow db upgrade 'sqlite:///{path}'`"


def _revisions() -> tuple[set[str], str]:
    """The database versions that the installed MLflow knows, and the newest version, which no other follows."""
    spec = find_spec("mlflow")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")
    revisions: set[str] = set()
    followed: set[str] = set()
    for script in (Path(spec.origin).parent / "store" / "db_migrations" / "versions").glob("*.py"):
        for name, value in SCHEMA.findall(script.read_text(encoding="utf-8")):
            (revisions if name == "revision" else followed).add(value)
    (newest,) = revisions - followed
    return revisions, newest
