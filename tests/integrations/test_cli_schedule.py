"""`aiotaskq schedule`, as a user meets it: output and exit status."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aiotaskq.cli import main
from aiotaskq.cli.schedule_table import ScheduleListing, listing_notes
from aiotaskq.scheduling.schedules import ScheduleInfo
from tests.integrations.programs import LONG, Programs, assert_help

pytestmark = pytest.mark.timeout(400)

TASKS = """\
from aiotaskq import Schedule, TaskQueue, crontab
app = TaskQueue("tasks"{options})

@app.task
async def report(kind: str, days: int = 1, *, deep: bool = False) -> str:
    if kind == "none":
        raise ValueError("nothing to report")
    return f"{{kind}} of {{days}}{{' in depth' if deep else ''}}"
"""
DECLARED = """
@app.task(schedule=Schedule(crontab(hour=3, minute=0), timezone="Europe/Oslo"))
async def clean_up() -> None: ...

app.conf.beat_schedule = {"hourly": {"task": "tasks.report", "schedule": 3600, "args": ["all"]}}
"""
STORES = ["embedded", "redis"]
ID = "[0-9a-f-]{36}"
MOMENT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}"
HINT = "not in the store yet, but in the code: hourly, tasks.clean_up; start `aiotaskq scheduler"


@pytest.fixture
def programs(programs: Programs) -> Programs:
    programs.write("tasks.py", TASKS.format(options=""))
    return programs


def done(programs: Programs, *words: str, **more: str) -> str:
    """Run a subcommand that must succeed and leave stderr empty; return its output."""
    ended = programs.run("schedule", *words, **more)
    assert (ended.stderr, ended.returncode) == ("", 0)
    return ended.stdout


def add(programs: Programs, schedule_id: str, *words: str) -> str:
    return done(programs, "add", "tasks:app", schedule_id, "tasks.report", *words)


def shown(programs: Programs, schedule_id: str) -> dict[str, Any]:
    (one,) = json.loads(done(programs, "show", "tasks:app", schedule_id, "--json"))
    return dict(one)


def known(schedule_id: str, next_at: datetime | None) -> ScheduleInfo:
    return ScheduleInfo(
        id=schedule_id, task="tasks.report", when="every 1 h", next_at=next_at, last_at=None,
        last_id=None, runs=0, skipped=0, paused=next_at is None, in_code=False, args=[], kwargs={},
        options={}, overlap="allow", misfire="once", grace=60.0,
            jitter=0.0, start=None, end=None,
    )  # fmt: skip


def start_scheduler(programs: Programs) -> None:
    """Have the schedules of the code in the store."""
    scheduler = programs.start("scheduler", "tasks:app")
    scheduler.line("scheduler ready")
    assert scheduler.stop() == 0


# --- list ---------------------------------------------------------------------------------------


def test_there_are_none(programs: Programs) -> None:
    for words in (("schedule", "tasks:app"), ("-A", "tasks", "schedule", "list")):
        ended = programs.run(*words)
        assert ended.stdout == "no schedules at sqlite:///aiotaskq.db\n"
        assert (ended.stderr, ended.returncode) == ("", 0)
    assert done(programs, "tasks:app", "--json") == "[]\n"


def test_a_list_fits_the_terminal_and_says_when_each_runs(programs: Programs) -> None:
    add(programs, "nightly", "all", "--cron", "0 3 * * *", "--timezone", "America/Los_Angeles")
    add(programs, "steady", "[bold]", "--every", "86400")
    add(programs, "a-name-that-is-long-enough-to-be-folded-in-the-table", "all", "--every", "7200")
    far = datetime.now(UTC) + timedelta(days=400, hours=12)
    add(programs, "far", "all", "--at", far.isoformat(timespec="minutes"))
    done(programs, "pause", "tasks:app", "steady")
    listed = done(programs, "tasks:app", COLUMNS="80", TZ="UTC")
    assert all(len(line) <= 80 for line in listed.splitlines())
    assert listed.startswith("schedules at sqlite:///aiotaskq.db ")
    assert re.search(r"nightly +0 3 \* \* \* +\d\d-\d\d 1[01]:00, in \d+ [hms] +run time", listed)
    assert re.search(r"tasks\.report +America/Los_Angeles +none", listed)
    assert re.search(r"steady +every 1 d +none +run time *\n +tasks.report +none +paused", listed)
    assert re.search(rf" at {far:%Y-%m-%d} .* {far:%Y-%m-%d}, in 40[01] d ", listed)


def test_times_are_in_the_time_zone_of_the_machine(programs: Programs) -> None:
    add(programs, "daily", "all", "--cron", "0 12 * * *")
    assert " 12:00, in " in done(programs, "tasks:app", TZ="UTC")
    assert " 17:30, in " in done(programs, "tasks:app", TZ="Asia/Kolkata")
    assert " 17:30:00 +0530 (in " in done(programs, "show", "tasks:app", "daily", TZ="Asia/Kolkata")


def test_what_stands_in_the_code_alone_is_told_below_the_list(programs: Programs) -> None:
    programs.write("tasks.py", TASKS.format(options="") + DECLARED)
    ended = programs.run("schedule", "tasks:app")
    assert ended.stdout == "no schedules at sqlite:///aiotaskq.db\n"
    assert ended.stderr == f"{HINT} tasks:app`, or a worker with -B\n"
    assert ended.returncode == 0
    (line,) = programs.run("schedule", "pause", "tasks:app", "hourly").stderr.splitlines()
    assert re.fullmatch("no schedule has the id hourly yet: it stands in the code, .*", line)
    start_scheduler(programs)
    listed = done(programs, "tasks:app")
    assert re.search(r"hourly +every 1 h +\S+ \d\d:00, in \d+ [ms] +in code", listed)
    assert re.search(
        r"tasks\.clean_up +0 3 \* \* \* Europe/Oslo +\S+ \S+ in \d+ \w +in code", listed
    )


def test_runs_that_nobody_sends_are_told_below_the_list() -> None:
    now = datetime.now(UTC)
    late = known("late", now - timedelta(minutes=2))
    soon = [
        known("next", now + timedelta(seconds=5)),
        known("just now", now - timedelta(seconds=5)),
    ]
    listing = ScheduleListing("sqlite:///x.db", now, [late, *soon, known("paused", None)], [])
    (note,) = listing_notes("tasks:app", listing)
    assert note == (
        "not sent in time: late; if no scheduler runs, start `aiotaskq scheduler tasks:app`, or a"
        " worker with -B"
    )


def test_of_many_that_are_missing_a_few_are_named() -> None:
    listing = ScheduleListing(
        "sqlite:///x.db", datetime.now(UTC), [], [f"number {n}" for n in range(9)]
    )
    (note,) = listing_notes("tasks:app", listing)
    assert "number 3, number 4 and 4 more; start" in note


# --- show ---------------------------------------------------------------------------------------


def test_all_that_is_known_is_shown(programs: Programs) -> None:
    add(
        programs, "nightly", "all", "7", "-k", "deep=true", "--cron", "0 3 * * *",
        "--queue", "slow", "--priority", "3", "--expires", "600", "--misfire", "skip",
        "--grace", "90",
    )  # fmt: skip
    text = done(programs, "show", "tasks:app", "nightly")
    assert text.splitlines()[0] == "nightly"
    for name, value in (
        ("task", r"tasks\.report"),
        ("when", r"0 3 \* \* \*"),
        ("state", "made at run time"),
        ("next run", rf"{MOMENT} \(in \d+ [hms]\)"),
        ("last run", "none"),
        ("runs", "0 sent, 0 left out"),
        ("args", r'\["all",7\]'),
        ("kwargs", r'{"deep":true}'),
        ("options", r'{"queue":"slow","priority":3,"expires":600\.0}'),
        ("overlap", "allow"),
        ("misfire", "skip, after 90 s"),
    ):
        assert re.search(rf"^  {name} +{value}$", text, re.MULTILINE), (name, text)


def test_show_as_json_has_the_fields_of_a_schedule(programs: Programs) -> None:
    add(programs, "one", "all", "--every", "3600")
    add(programs, "two", "text", "--cron", "@daily", "--overlap", "skip")
    text = done(programs, "show", "tasks:app", "two", "one", "--json")
    two, one = json.loads(text)
    assert (two["id"], two["overlap"], two["args"]) == ("two", "skip", ["text"])
    assert (one["id"], one["when"], one["paused"], one["in_code"]) == (
        "one",
        "every 1 h",
        False,
        False,
    )
    assert datetime.fromisoformat(one["next_at"]).minute == 0
    assert [each["id"] for each in json.loads(done(programs, "tasks:app", "--json"))] == [
        "one",
        "two",
    ]


def test_an_id_that_is_not_there_is_told(programs: Programs) -> None:
    add(programs, "there", "all", "--every", "3600")
    ended = programs.run("schedule", "show", "tasks:app", "there", "nothing")
    assert ended.stdout.startswith("there\n")
    assert (ended.stderr, ended.returncode) == ("no schedule has the id nothing\n", 1)
    for verb, word in (("pause", "paused"), ("resume", "resumed"), ("remove", "removed")):
        ended = programs.run("schedule", verb, "tasks:app", "nothing", "there")
        assert re.match(f"{word} there", ended.stdout)
        assert (ended.stderr, ended.returncode) == ("no schedule has the id nothing\n", 1)
    ended = programs.run("schedule", "run", "tasks:app", "nothing")
    assert (ended.stdout, ended.returncode) == ("", 1)
    assert ended.stderr == "no schedule has the id nothing\n"


# --- add ----------------------------------------------------------------------------------------


def test_add_says_when_the_first_run_comes(programs: Programs) -> None:
    moment = (datetime.now(UTC) + timedelta(days=2)).replace(hour=10, minute=0, tzinfo=None)
    printed = done(
        programs, "add", "tasks:app", "once", "tasks.report", "all",
        "--at", moment.isoformat("T", "minutes"), "--timezone", "Asia/Kolkata", TZ="UTC",
    )  # fmt: skip
    assert re.fullmatch(
        rf"added once: next run {moment:%Y-%m-%d} 04:30:00 \+0000 \(in \d+ [dh]\)\n", printed
    )
    assert shown(programs, "once")["when"] == f"at {moment:%Y-%m-%d} 10:00 Asia/Kolkata"


def test_bounds_and_jitter_are_kept_to(programs: Programs) -> None:
    start = (datetime.now(UTC) + timedelta(days=3)).replace(microsecond=0)
    end = start + timedelta(days=1)
    add(
        programs, "bound", "all", "--every", "86400", "--jitter", "600",
        "--start", start.isoformat(), "--end", end.isoformat(),
    )  # fmt: skip
    coming = datetime.fromisoformat(shown(programs, "bound")["next_at"])
    assert start <= coming <= start + timedelta(seconds=600)


def test_an_id_is_taken_once_unless_it_is_to_be_replaced(programs: Programs) -> None:
    add(programs, "mine", "all", "--every", "3600")
    ended = programs.run(
        "schedule", "add", "tasks:app", "mine", "tasks.report", "all", "--every", "60"
    )
    assert ended.stderr == (
        "aiotaskq: there is a schedule 'mine' already: choose another id, or give --replace\n"
    )
    assert (ended.stdout, ended.returncode) == ("", 2)
    assert shown(programs, "mine")["when"] == "every 1 h"
    add(programs, "mine", "all", "--every", "60", "--replace")
    assert shown(programs, "mine")["when"] == "every 1 min"


@pytest.mark.parametrize("stored", [False, True])
def test_what_stands_in_the_code_is_changed_there(programs: Programs, stored: bool) -> None:
    programs.write("tasks.py", TASKS.format(options="") + DECLARED)
    if stored:
        start_scheduler(programs)
    ended = programs.run(
        "schedule", "add", "tasks:app", "hourly", "tasks.report", "x", "--every", "9", "--replace"
    )
    assert ended.stderr == (
        "aiotaskq: the schedule 'hourly' stands in the code: change it there, or choose another"
        " id\n"
    )
    assert ended.returncode == 2


def test_a_task_that_is_registered_elsewhere_is_taken_with_a_note(programs: Programs) -> None:
    ended = programs.run(
        "schedule", "add", "tasks:app", "other", "billing.close", "--every", "3600"
    )
    assert ended.stderr == "billing.close is not registered in tasks:app; added all the same\n"
    assert ended.returncode == 0
    assert shown(programs, "other")["task"] == "billing.close"


# --- pause, resume, remove ----------------------------------------------------------------------


def test_a_paused_schedule_goes_on_when_it_is_resumed(programs: Programs) -> None:
    add(programs, "one", "all", "--every", "86400")
    add(programs, "two", "all", "--every", "86400")
    assert done(programs, "pause", "tasks:app", "one", "two", "one") == "paused one\npaused two\n"
    paused = shown(programs, "two")
    assert (paused["paused"], paused["next_at"]) == (True, None)
    resumed = done(programs, "resume", "tasks:app", "two")
    assert re.fullmatch(rf"resumed two: next run {MOMENT} \(in \d+ [hms]\)\n", resumed)
    assert shown(programs, "one")["paused"]
    assert not shown(programs, "two")["paused"]


def test_removed_schedules_are_gone(programs: Programs) -> None:
    for name in ("one", "two", "three"):
        add(programs, name, "all", "--every", "3600")
    assert done(programs, "remove", "tasks:app", "one", "three") == "removed one\nremoved three\n"
    assert [one["id"] for one in json.loads(done(programs, "tasks:app", "--json"))] == ["two"]


def test_remove_tells_that_one_in_the_code_comes_back(programs: Programs) -> None:
    programs.write("tasks.py", TASKS.format(options="") + DECLARED)
    start_scheduler(programs)
    printed = done(programs, "remove", "tasks:app", "hourly")
    assert printed == (
        "removed hourly; it stands in the code, so the next start of a scheduler brings it back:"
        " pause it instead, or take it out of the code\n"
    )


# --- run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
def test_a_schedule_runs_now_and_stays_as_it_is(
    programs: Programs, store: str, request: pytest.FixtureRequest
) -> None:
    if store == "redis":
        url = request.getfixturevalue("redis_url")
        programs.write("tasks.py", TASKS.format(options=f", broker={url!r}"))
    add(programs, "nightly", "all", "7", "-k", "deep=true", "--cron", "0 3 * * *")
    add(programs, "broken", "none", "--every", "86400")
    done(programs, "pause", "tasks:app", "nightly")
    before = shown(programs, "nightly")
    task_id = done(programs, "run", "tasks:app", "nightly").strip()
    assert re.fullmatch(ID, task_id)
    programs.worker()
    in_time = ("--timeout", str(LONG))
    waited = programs.run("result", "tasks:app", task_id, *in_time)
    assert waited.stdout == '"all of 7 in depth"\n'
    assert done(programs, "run", "tasks:app", "nightly", *in_time) == '"all of 7 in depth"\n'
    failed = programs.run("schedule", "run", "tasks:app", "broken", *in_time)
    assert "FAILURE: ValueError: nothing to report\n" in failed.stderr
    assert (failed.stdout, failed.returncode) == ("", 1)
    assert shown(programs, "nightly") == before


def test_run_waits_no_longer_than_told(programs: Programs) -> None:
    add(programs, "nightly", "all", "--every", "86400")
    ended = programs.run("schedule", "run", "tasks:app", "nightly", "--timeout", "0.05")
    assert (ended.stdout, ended.returncode) == ("", 3)
    assert len(ended.stderr.splitlines()) == 1


def test_run_does_not_send_where_the_result_is_wanted_and_none_is_kept(
    programs: Programs,
) -> None:
    programs.write("tasks.py", TASKS.format(options=', backend="disabled://"'))
    add(programs, "nightly", "all", "--every", "86400")
    ended = programs.run("schedule", "run", "tasks:app", "nightly", "--wait")
    assert ended.stderr == ("aiotaskq: tasks:app keeps no results: there is nothing to wait for\n")
    assert ended.returncode == 2
    assert "holds anything" in programs.run("queues", "tasks:app").stdout


def test_what_a_scheduler_sent_is_told(programs: Programs) -> None:
    add(programs, "quick", "all", "--every", "0.2")
    scheduler = programs.start("scheduler", "tasks:app")
    scheduler.line("sent ", times=2)
    assert scheduler.stop() == 0
    sent = re.findall(r"sent tasks\.report\[(quick@\S+Z)\]", scheduler.output)
    kept = shown(programs, "quick")
    assert (kept["runs"], kept["last_id"]) == (len(sent), sent[-1])
    text = done(programs, "show", "tasks:app", "quick")
    assert re.search(rf"^  last run +{MOMENT} \(\d+ s ago\)$", text, re.MULTILINE)
    assert re.search(r"^  last task +quick@\S+Z$", text, re.MULTILINE)


# --- mistakes and help --------------------------------------------------------------------------

ADD = ["schedule", "add", "tasks:app", "id", "tasks.report"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["schedule"], r"which application\?.* schedule list tasks:app"),
        (["schedule", "tasks:app", "shwo"], r"no such command: 'shwo'; there are list, show, add"),
        (
            ["schedule", "show", "tasks:app"],
            r"which schedule\? aiotaskq schedule show tasks:app ID",
        ),
        (["schedule", "pause", "tasks:app"], r"which schedule\? aiotaskq schedule pause tasks:app"),
        (["schedule", "run", "tasks:app", "a", "b"], r"one schedule at a time: .* tasks:app a$"),
        (["schedule", "add", "tasks:app", "id"], r"which task, .* add tasks:app ID TASK --every"),
        (ADD, r"when\? Give one of --every SECONDS, --cron TEXT and --at TIME"),
        ([*ADD, "--every", "5", "--at", "2030-01-01"], r"when\? Give only one of --every"),
        ([*ADD, "--every", "0"], r"every 0\.0: it must be a number of seconds"),
        ([*ADD, "--every", "soon"], r"Invalid value for '--every': "),
        ([*ADD, "--cron", "0 3 * *"], r"the crontab '0 3 \* \*' has 4 fields; give five"),
        ([*ADD, "--cron", "0 25 * * *"], r"hour is '25'; it may be 0 to 23"),
        ([*ADD, "--cron", "@often"], r"'@often' is no crontab; there are @hourly"),
        ([*ADD, "--at", "tomorrow"], r"at 'tomorrow': it must be a time such as 2026-11-21T10:00"),
        ([*ADD, "--every", "5", "--start", "now"], r"--start is 'now'; it must be a time such as"),
        ([*ADD, "--every", "5", "--timezone", "Oslo"], r"'Oslo'.*did you mean Europe/Oslo"),
        ([*ADD, "--every", "5", "--jitter", "-1"], r"jitter is -1\.0; it must be seconds, 0 or"),
        ([*ADD, "--every", "5", "--grace", "-1"], r"grace is -1\.0; it must be seconds, 0 or more"),
        ([*ADD, "--every", "5", "--overlap", "no"], r"overlap is 'no'; it may be 'allow', 'skip'"),
        ([*ADD, "--every", "5", "--misfire", "no"], r"misfire is 'no'; it may be"),
        ([*ADD, "--every", "5", "-k", "x"], r"'x' is no keyword argument; write it as name=value"),
        ([*ADD, "-1", "--every", "5"], r"No such option: -1.*Put -- before a negative number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_with_the_mend(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:  # found out before the application is imported
        main(words)
    printed = capsys.readouterr()
    assert re.search(complaint, printed.err), printed.err
    assert len(printed.err.splitlines()) == 1
    assert (printed.out, ended.value.code) == ("", 2)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["x", "tasks.report", "--every", "5"], r"missing a required argument: 'kind'"),
        (["x", "tasks.report", "a", "-k", "wide=1", "--every", "5"], r"'wide'"),
        (
            ["x", "tasks.report", "a", "--every", "5", "--priority", "10"],
            r"priority is 10; it must",
        ),
        (["x", "tasks.report", "a", "--at", "2020-01-01T10:00"], r"at 2020-01-01 10:00: no run "),
        (["x", "tasks.report", "a", "--every", "5", "--end", "2020-01-01"], r"every 5 s: no run "),
        (["x\n", "tasks.report", "a", "--every", "5"], r"a schedule's id is 'x\\n'; it must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_the_application_is_one_line_and_adds_nothing(
    programs: Programs, words: list[str], complaint: str
) -> None:
    ended = programs.run("schedule", "add", "tasks:app", *words)
    assert re.search(complaint, ended.stderr), ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert (ended.stdout, ended.returncode) == ("", 2)
    assert done(programs, "tasks:app", "--json") == "[]\n"


def test_a_store_that_one_process_sees_is_refused(programs: Programs) -> None:
    programs.write("tasks.py", TASKS.format(options=', broker="memory://"'))
    ended = programs.run("schedule", "tasks:app")
    assert ended.stderr.startswith("aiotaskq: memory:// is seen by one process only")
    assert ended.returncode == 2


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ["list", "show", "add", "remove", "pause", "resume", "run"]),
        (("list",), ["--json", "time zone of this machine"]),
        (("show",), ["--json", "Exit status"]),
        (
            ("add",),
            [
                "--every",
                "--cron",
                "--at",
                "--timezone",
                "--misfire",
                "--replace",
                "once (the",
                "[60]",
            ],
        ),
        (("remove",), ["stands in the code", "Exit status"]),
        (("pause",), ["until they are resumed", "Exit status"]),
        (("resume",), ["left out", "Exit status"]),
        (("run",), ["--wait", "--timeout", "Exit status"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_help(
    command: tuple[str, ...],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    assert_help(["schedule", *command], words, capsys)
