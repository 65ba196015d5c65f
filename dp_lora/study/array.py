"""Members as one array of Slurm's jobs: send it, and follow it from this or a later process of the study.

The script and the jobs' names hold the study's own settings alone. Slurm passes the caller's environment on.
"""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dp_lora.config import relative
from dp_lora.errors import InputError
from dp_lora.files import private_folder, read_json, write_json
from dp_lora.slurm import waiting
from dp_lora.slurm.array import submit_array
from dp_lora.slurm.commands import ControllerAway, cancel, cluster_name, has_slurm
from dp_lora.slurm.settings import Settings, read_settings, require_gpus
from dp_lora.slurm.states import GONE, Job, read_job
from dp_lora.study.grid import Grid
from dp_lora.study.member import last_error, member_command, study_command
from dp_lora.study.place import Place, study_folder
from dp_lora.tracking.process import PAUSE_SIGNAL, stop_signals_deferred, stop_signals_wait

SENT = "slurm.json"  # in the study's folder: what is in the queue
OUTPUT = "slurm"  # beside it: scripts, and the jobs' output outside of members
LOOK_EVERY = 0.5  # seconds between two drawings of the table
CANCELLING = 20.0  # seconds that cancelled jobs have to end, shorter than `mlflow run` gives this process
SETTLING = 60.0  # seconds in which a shared disk shows what another machine has written
# shell: `make COMMAND` runs a command and passes signals on to it, which would else end the shell alone; after a signal
# no other command begins, and the shell ends as the command did
PASSES_SIGNALS_ON = (
    "rc=0",
    "told=",
    'tell() { told=$1; kill "-$1" "$work" 2>/dev/null; }',
    "trap 'tell USR1' USR1",
    "trap 'tell TERM' TERM",
    'make() { "$@" & work=$!',
    '[ -z "$told" ] || kill "-$told" "$work"',  # it came before the shell knew whom to tell
    'while wait "$work"; status=$?; kill -0 "$work" 2>/dev/null; do :; done',
    '[ "$status" = 0 ] || rc=$status',
    '[ -z "$told" ] || exit "$status"',
    "}",
)
PYTHON = "python"  # of the environment that the backend config names


@dataclass(frozen=True)
class Sent:
    """A study's jobs in the queue."""

    cluster: str
    run: str  # id of the study's run that sent it; its jobs have it as their comment
    array: str  # job ARRAY_N makes the members of task N
    tasks: Sequence[Sequence[str]]  # names of members' folders
    upstream: str = ""  # the job that makes base and pictures; empty: they lay there

    def job(self, job: str) -> Job:
        """The state of one of its jobs. Raises ControllerAway."""
        return read_job(job).of(self.run)

    def is_alive(self) -> bool:
        """Whether a task waits or works; True while the controller is away: nothing tells of an end then."""
        try:
            return any(not self.job(f"{self.array}_{number}").is_over for number in range(len(self.tasks)))
        except ControllerAway:
            return True

    @property
    def jobs(self) -> list[str]:
        return [job for job in (self.upstream, self.array) if job]


def settings_of(path: str) -> Settings:
    """The backend config in a file. InputError in one line where it cannot be read or a value is wrong."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"slurm={path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise InputError(f"slurm={path}: must be an object of JSON, as configs/slurm/venv.json is")
    return read_settings(given, Path(sys.prefix))


def check_members(places: Sequence[Place], settings: Settings) -> None:
    """InputError for a member that a task of the array could not run."""
    for place in places:
        compute = place.config.compute
        require_gpus(settings, compute)
        if compute.num_nodes > 1:
            raise InputError(
                f"{place.member.name}: compute.num_nodes={compute.num_nodes}: a member works on one machine"
            )


def read_sent(name: str, places: Sequence[Place]) -> Sent | None:
    """The array that an earlier call has sent and no call has gathered, or None.

    Raises InputError if it is of another cluster, or still makes members of other settings or code.
    """
    path = study_folder(name) / SENT
    if not path.exists():
        return None
    sent = Sent(**read_json(path))
    if sent.cluster != cluster_name():
        raise InputError(
            f"study={name}: its array {sent.array} is in the queue of the cluster {sent.cluster}: type this there, "
            f"or, where nothing of it runs any more, remove {relative(path)}"
        )
    if {folder for task in sent.tasks for folder in task} <= {place.folder.name for place in places}:
        return sent
    if sent.is_alive():
        raise InputError(
            f"study={name}: its array {sent.array} makes members of other settings or code; wait for its end, or "
            f"type: scancel {' '.join(sent.jobs)}"
        )
    forget(name)
    return None


def refuse_beside(name: str, places: Sequence[Place]) -> None:
    """InputError where an array of the study is in the queue: this machine would make its members once more."""
    if not has_slurm():
        return
    sent = read_sent(name, places)
    if sent is not None and sent.is_alive():
        raise InputError(
            f"study={name}: its array {sent.array} is in the queue; wait for it with slurm=FILE.json, or type: "
            f"scancel {' '.join(sent.jobs)}"
        )
    forget(name)


def forget(name: str) -> None:
    """Remove the note of a study's array: its jobs are over, or gathered."""
    (study_folder(name) / SENT).unlink(missing_ok=True)


def tasks_of(places: Sequence[Place]) -> list[list[Place]]:
    """The members of each task: members that share a ledger are one task, for they may not run side by side."""
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(place.release, []).append(place)
    return list(found.values())


def task_line(grid: Grid, members: Sequence[Place], logs: Path) -> str:
    """The line of shell that makes a task's members one after the other; each fails alone."""
    lines = [_line(member_command(grid, one.number, PYTHON), logs / f"{one.number}.txt") for one in members]
    if len(lines) == 1:
        return f"exec {lines[0]}"  # signals of Slurm reach the member itself
    return "; ".join([*PASSES_SIGNALS_ON, *(f"make {line}" for line in lines), "exit $rc"])


def _line(command: Sequence[str], log: Path) -> str:
    return f"{shlex.join(command)} >> {shlex.quote(str(log))} 2>&1"


def send(
    grid: Grid,
    todo: Sequence[Place],
    settings: Settings,
    jobs: int,
    run_id: str,
    environment: Mapping[str, str],
    *,
    upstream: bool,
) -> Sent:
    """Send the members `todo` as one array, `jobs` at once; with `upstream` after a job that makes base and pictures.

    `environment` is set for the jobs beside this process' own. If interrupted, it leaves nothing in the queue.
    Raises InputError in Slurm's own words.
    """
    folder, logs = study_folder(grid.name), _logs(grid.name)
    output = folder / OUTPUT
    shutil.rmtree(output, ignore_errors=True)
    private_folder(output)
    for place in todo:
        # an earlier log would say that the member has begun
        (logs / f"{place.number}.txt").unlink(missing_ok=True)
    tasks = tasks_of(todo)
    cluster, sent = cluster_name(), list[str]()
    try:
        with stop_signals_deferred():
            if upstream:
                line = f"exec {_line([*study_command(grid, PYTHON), '--upstream'], logs / 'upstream.txt')}"
                (logs / "upstream.txt").unlink(missing_ok=True)
                beside = output / "upstream"
                sent.append(submit_array(settings, "study", [line], 1, beside, comment=run_id, environment=environment))
            after = list(sent)
            lines = [task_line(grid, members, logs) for members in tasks]
            sent.append(
                submit_array(
                    settings, "study", lines, jobs, output / "members", after, comment=run_id, environment=environment
                )
            )
            names = [[place.folder.name for place in members] for members in tasks]
            found = Sent(cluster, run_id, sent[-1], names, *after)
            write_json(folder / SENT, vars(found), private=True)
    except BaseException:
        # nobody would know of them
        for job in sent:
            with suppress(InputError):
                cancel(job)
        forget(grid.name)
        raise
    return found


def scripts(name: str) -> dict[str, str]:
    """The batch scripts of the study's last array: name of a kind of jobs (members, upstream) -> text."""
    found = sorted((study_folder(name) / OUTPUT).glob("*/job.sh"))
    return {path.parent.name: path.read_text(encoding="utf-8") for path in found}


def _logs(name: str) -> Path:
    return private_folder(study_folder(name) / "logs")


@contextmanager
def ends_with_caller(name: str, sent: Sent, settings: Settings) -> Iterator[None]:
    """Where the block is interrupted, cancel the jobs or leave them, as the backend config says."""
    try:
        yield
    except InputError:
        # otherwise each later call would gather the ended array, and fail alike
        with suppress(InputError):
            if not sent.is_alive():
                forget(name)
        raise
    except KeyboardInterrupt as error:
        # closing the terminal, or pausing this process, must not cancel the jobs
        if settings.on_interrupt == "leave" or str(error) in ("SIGHUP", PAUSE_SIGNAL.name):
            error.add_note(f"its jobs go on, and the same command gathers; to end: scancel {' '.join(sent.jobs)}")
            raise
        with stop_signals_wait(), suppress(InputError):
            for job in sent.jobs:
                cancel(job)
            forget(name)
            error.add_note("its jobs are cancelled; the same command goes on")
            end = time.monotonic() + CANCELLING
            while sent.is_alive() and time.monotonic() < end:
                time.sleep(waiting.SHORTEST)
        raise


class _Questions:
    """Asks the controller; while that is away, a line says so once."""

    def __init__(self, sent: Sent, say: Callable[[str], None]) -> None:
        self._sent, self._say, self._told = sent, say, ""

    def state(self, job: str) -> Job | None:
        try:
            found = self._sent.job(job)
        except InputError as error:
            if str(error) != self._told:
                self._say(f"{error}; the jobs go on, and so does this wait")
            self._told = str(error)
            return None
        self._told = ""
        return found


def wait_for_upstream(name: str, sent: Sent, say: Callable[[str], None]) -> None:
    """Wait until base and pictures are made; on failure, empty the queue and raise InputError."""
    if not sent.upstream:
        return
    ask, pauses = _Questions(sent, say), waiting.pauses()
    while (job := ask.state(sent.upstream)) is None or not job.is_over:
        time.sleep(next(pauses))
    _, reason = job.ended_as
    if reason and job.state != GONE:
        with suppress(InputError):
            cancel(sent.array)
        forget(name)
        log = _logs(name) / "upstream.txt"
        said = last_error(log) if job.state == "FAILED" else ""
        raise InputError(
            f"base and pictures: {said or reason}; {relative(log)} has all that their job said",
            f"base and pictures: {reason}",
        )


def follow(
    sent: Sent,
    places: Sequence[Place],
    logs: Path,
    is_made: Callable[[Place], bool],
    started: Callable[[int], None],
    ended: Callable[[int, str], None],
    look: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Wait for the end of an array, and report members that begin and end, with the line of a failure.

    A member has begun once its log exists, and is made once `is_made` says so. `look` is called now and then.
    """
    by_folder = {place.folder.name: place for place in places}
    left = {f"{sent.array}_{number}": [by_folder[name] for name in task] for number, task in enumerate(sent.tasks)}
    begun, told, over_since = set[int](), set[int](), dict[str, float]()
    ask = _Questions(sent, say)
    for pause in waiting.pauses():
        for name, members in list(left.items()):
            job = ask.state(name)
            if job is None:
                break
            here = [place for place in members if (logs / f"{place.number}.txt").exists()]
            for place in here:
                if place.number not in begun:
                    begun.add(place.number)
                    started(place.number)
            if job.state == "COMPLETED" and not all(map(is_made, members)):
                # a shared disk may show the last files late
                since = over_since.setdefault(name, time.monotonic())
                if time.monotonic() - since < SETTLING:
                    continue
            for place in members if job.is_over else here[:-1]:
                if place.number not in told:
                    told.add(place.number)
                    ended(place.number, "" if is_made(place) else _reason(job, logs / f"{place.number}.txt"))
            if job.is_over:
                del left[name]
        if not left:
            return
        end = time.monotonic() + pause
        while time.monotonic() < end:
            look()
            time.sleep(LOOK_EVERY)


def _reason(job: Job, log: Path) -> str:
    said = "" if job.state not in ("RUNNING", "COMPLETED", "FAILED", GONE) else last_error(log)
    by_slurm = job.ended_as[1] if job.is_over else ""
    return said or by_slurm or "its job ended, and made no result"
